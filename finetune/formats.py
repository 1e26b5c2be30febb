"""The table as files: Markdown and HTML to read, LaTeX for a paper, CSV and JSON to compute with.

Markdown and HTML show the same columns with the same digits; LaTeX has the main lines, such as Dice
over all classes; CSV and JSON have every number in full.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from data_prep.files import make_folder, write_bytes, write_json, write_text
from finetune.anchor import ANCHOR
from finetune.budget import MARGIN
from finetune.intervals import Estimate
from finetune.lines import BETTER, UNCLEAR, WORSE, Line, Table
from finetune.pages import data_uri, render
from finetune.table import read_table

WORDS = (
    "data set", "split", "protocol", "recipe", "checkpoint", "metric", "class", "verdict",
)  # fmt: skip
"""Columns of words; all others are numbers and end on the right."""

EXPLAIN = (
    "Means over a case's classes, a subject's cases, then subjects and seeds, with 95 % intervals "
    "over subjects and seeds, both taken as random. Difference: pretrained minus scratch on the "
    "same cases and seeds. Where scratch at its own best is a third arm, the verdict is about the "
    "one that is harder to beat: of two gains the one with the larger p; else the stronger arm, "
    "and against pretraining p counts double. Better in: share of subjects that gain "
    "over the twin; median: over subjects, of "
    "the difference to it. p: of the deciding difference in {main}, adjusted over the data sets "
    "of a checkpoint at one number of labels; where it is 0.05 or more, no arm is called better. "
    "One checkpoint supports a claim about this checkpoint only."
)

EXPLAIN_ANCHOR = (
    f"{ANCHOR}: Dice from its own summary.json over the same cases, averaged in the same order; it "
    "may have been trained with other labels, and no verdict is about it."
)

PICTURES = {
    "forest.png": "The difference that each verdict is about, with its 95 % interval.",
    "label_curves.png": "The main score against the number of labelled cases, with 95 % bands.",
    "budget.png": "Dice of up to 8 validation cases over training, the mean over draws.",
}
"""Pictures of a table by file name, with what they show."""

_LEAKAGE = {
    "tainted": ("†", "test cases that the checkpoint has seen in pretraining are left out"),
    "unknown": ("‡", "what the checkpoint has seen in pretraining is unknown"),
}
"""Marks of checkpoints, and what they say."""

_MARKS = {
    BETTER: r"$\uparrow$",
    WORSE: r"$\downarrow$",
    UNCLEAR: r"$\sim$",
}
"""Verdicts in LaTeX; all others share a question mark."""

_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "[": "{[}",  # at the start of a row it would be an option of the line break before it
    "*": "{*}",
    "–": "--",
    "†": r"$\dagger$",
    "‡": r"$\ddagger$",
} | {sign: f"\\{sign}" for sign in "_&%#${}"}


def make_table(
    runs: Sequence[Path],
    output: Path,
    anchor: str = "",
    search: Path | None = None,
) -> Table:
    """Makes the table of finished runs and writes it to `output` in all formats.

    Args:
        runs: run folders of finetune (or their rows.csv), or folders that hold such folders.
        output: a folder, made if missing, that gets table.md, .html, .tex, .csv and .json, and the
            pictures of `PICTURES` that have something to show.
        anchor: summary.json of nnU-Net, as `read_anchors` takes it; none by default.
        search: folder of the runs in which rates were chosen, on validation.

    Raises:
        InputError: what `read_table` refuses, or `output` cannot be written.
    """
    table = read_table(runs, anchor, search)
    make_folder(output, "output")
    from finetune.figures import draw_table  # matplotlib takes its time to start

    pictures = draw_table(table)
    for name in PICTURES:
        (output / name).unlink(missing_ok=True)  # of a table that was there before
        if name in pictures:
            write_bytes(output / name, pictures[name])
    write_text(output / "table.md", markdown(table))
    write_text(output / "table.html", html(table, pictures))
    write_text(output / "table.tex", latex(table))
    write_text(output / "table.csv", csv_text(table))
    write_json(output / "table.json", table.to_dict())
    return table


def markdown(table: Table) -> str:
    """The verdicts; every mean with its interval, cases, subjects and seeds; and notes below."""
    records = _records(table)
    names = list(records[0]) if records else []
    out = [names, ["---" if name in WORDS else "--:" for name in names]]
    out += [[text.replace("|", r"\|") for text in record.values()] for record in records]
    lines = [f"| {' | '.join(cells)} |" for cells in out]
    notes = [f"- {note}" for note in notes_of(table)]
    said = [f"- {group.sentence}" for group in table.groups]
    return "\n".join([*said, "", *lines, "", _explain(table), "", *notes]).rstrip() + "\n"


def html(table: Table, pictures: Mapping[str, bytes]) -> str:
    """The same as one page that needs nothing else.

    Args:
        table: to show.
        pictures: PNGs by their names in `PICTURES`.
    """
    return render(
        "table.html.j2",
        title=", ".join(dict.fromkeys(g.dataset for g in table.groups)),
        sentences=[group.sentence for group in table.groups],
        pictures=on_page(pictures),
        records=_records(table),
        words=WORDS,
        explain=_explain(table),
        notes=notes_of(table),
    )


def on_page(pictures: Mapping[str, bytes]) -> list[tuple[str, str]]:
    """Address and caption of each picture, as pages show them."""
    return [(data_uri(png, "image/png"), PICTURES[name]) for name, png in pictures.items()]


def latex(table: Table) -> str:
    """A `tabular` with the main lines, for any document that loads booktabs."""
    mains = [group.main for group in table.groups]
    arms, varied = _arms(table), _varied(table)
    quantities = list(dict.fromkeys(line.quantity for line in mains))
    metric = len(quantities) > 1  # else it stands above the table
    names = ["Data set", *map(str.capitalize, varied), "Labels", "Checkpoint"]
    names += ["Metric"] * metric
    names += [arm if arm == ANCHOR else arm.capitalize() for arm in arms]
    rows = [
        [
            _escaped(line.dataset),
            *(_escaped(_varied_cell(line, name)) for name in varied),
            *map(_escaped, (_count(line.n_labels), _checkpoint(line))),
            *([_escaped(line.quantity)] if metric else []),
            *(_in_math(show(line)) for show in arms.values()),
            _MARKS.get(line.verdict, "?") + "$^*$" * (line.still_gains > MARGIN),
        ]
        for line in mains
    ]
    verdicts: dict[str, dict[str, None]] = {}
    for line in mains:
        verdicts.setdefault(_MARKS.get(line.verdict, "?"), {})[line.verdict] = None
    legend = [f"{mark}: {' or '.join(said)}" for mark, said in verdicts.items()]
    legend += ["$^*$: not converged"] * any(line.still_gains > MARGIN for line in mains)
    legend += [_escaped(said) for said in _marked(mains)]
    told = [f"{line.measures.title} in {line.unit}" for line in mains]
    measured = _escaped(" or ".join(dict.fromkeys(told)) or "Dice in points")
    return "\n".join(
        [
            r"% needs \usepackage{booktabs}; for the caption:",
            rf"% {measured}, mean and 95\,\% interval. {'; '.join(legend)}.",
            rf"\begin{{tabular}}{{l {'l ' * len(varied)}r l {'l ' * metric}{'r ' * len(arms)}c}}",
            r"\toprule",
            " & ".join(names) + r" & \\",
            r"\midrule",
            *(" & ".join(cells) + r" \\" for cells in rows),
            r"\bottomrule",
            r"\end{tabular}",
            "",
        ]
    )


def csv_text(table: Table) -> str:
    """A row for each line, every estimate in parts, nothing rounded to be read."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    plain = [field.name for field in dataclasses.fields(Line)][:8]  # up to class_name
    parts = ("mean", "low", "high", "cases", "units", "draws")
    arms = ("pretrained", "scratch", "difference", "own", "against_own", "anchor")
    more = ("improved", "median", "adjusted_p", "still_gains")
    told = ("split", "protocol", "recipe", "leakage", "unit")
    estimates = [f"{arm}_{part}" for arm in arms for part in parts]
    writer.writerow([*plain, *told, *estimates, *more, "verdict"])
    for line in table.lines:
        cells: list[object] = [getattr(line, name) for name in (*plain, *told)]
        for arm in arms:
            value = getattr(line, arm)
            cells += ["" if value is None else _number(getattr(value, part)) for part in parts]
        numbers = [_number(getattr(line, name)) for name in more]
        writer.writerow([*cells, *numbers, line.verdict])
    return text.getvalue()


def _records(table: Table) -> list[dict[str, str]]:
    """Column to text, of each line; those that verdicts are about come first."""
    arms = _arms(table)
    varied = _varied(table)
    mains = [group.main for group in table.groups]
    rest = [line for group in table.groups for line in group.lines if line is not group.main]
    records = []
    for line in mains + rest:
        records.append(
            {
                "data set": line.dataset,
                **{name: _varied_cell(line, name) for name in varied},
                "labels": _count(line.n_labels),
                "checkpoint": _checkpoint(line),
                "metric": line.quantity,
                "class": line.class_name,
                **{name: show(line) for name, show in arms.items()},
                "cases": str(line.basis.cases),
                "subjects": str(line.basis.units),
                "seeds": str(line.basis.draws),
                "better in": "–" if math.isnan(line.improved) else f"{line.improved:.0%}",
                "median": "–" if math.isnan(line.median) else f"{line.median:+.{line.digits}f}",
                "p (Holm)": "–" if math.isnan(line.adjusted_p) else f"{line.adjusted_p:.2g}",
                "verdict": line.verdict + ", not converged" * (line.still_gains > MARGIN),
            }
        )
    return records


def _varied(table: Table) -> list[str]:
    """What lines differ in beside what every table shows: a column each; the rest is said once."""
    names = ("split", "protocol", "recipe")
    found = [n for n in names if len({getattr(line, n) for line in table.lines}) > 1]
    if "recipe" not in found:
        return found
    # Each data set has a recipe of its own: it tells lines apart only where nothing else does.
    alike = {group.but_recipe for group in table.groups}
    return found if len(alike) < len(table.groups) else found[:-1]


def _varied_cell(line: Line, name: str) -> str:
    """What a line has in a column of `_varied`: a recipe's hash only where no words tell it."""
    return line.departs or line.recipe if name == "recipe" else str(getattr(line, name))


def _same(table: Table) -> list[str]:
    """Split and protocol where all lines share them."""
    if not table.groups:
        return []
    main, varied = table.groups[0].main, _varied(table)
    told = [f"{n} {getattr(main, n)}" for n in ("split", "protocol") if n not in varied]
    return [f"All lines: {', '.join(told)}."] if told else []


def _arms(table: Table) -> dict[str, Callable[[Line], str]]:
    """The columns of arms and differences that the table has, and how a line shows them."""
    arms: dict[str, Callable[[Line], str]] = {
        "pretrained": lambda line: cell(line.pretrained, digits=line.digits),
        "scratch": lambda line: cell(line.scratch, digits=line.digits),
        "difference": lambda line: cell(line.difference, sign=True, digits=line.digits),
    }
    if any(line.own is not None for line in table.lines):
        arms["scratch, own best"] = lambda line: cell(line.own, digits=line.digits)
        arms["difference to it"] = lambda line: cell(
            line.against_own, sign=True, digits=line.digits
        )
    if _anchored(table):
        arms[ANCHOR] = lambda line: f"{line.anchor.mean:.1f}" if line.anchor else "–"
    return arms


def _anchored(table: Table) -> bool:
    return any(line.anchor is not None for line in table.lines)


def _explain(table: Table) -> str:
    marks = [f"{said}." for said in _marked(table.lines)]
    anchor = [EXPLAIN_ANCHOR] if _anchored(table) else []
    mains = dict.fromkeys(group.main.measures.title for group in table.groups)
    explain = EXPLAIN.format(main=" or ".join(mains) or "Dice")
    return " ".join([explain, *marks, *anchor, *_same(table)])


def _checkpoint(line: Line) -> str:
    mark, _ = _LEAKAGE.get(line.leakage, ("", ""))
    return f"{line.checkpoint or '–'} {mark}".rstrip()


def _marked(lines: Sequence[Line]) -> list[str]:
    """What the marks of checkpoints say, as far as lines have them."""
    used = {line.leakage for line in lines}
    return [f"{mark}: {said}" for kind, (mark, said) in _LEAKAGE.items() if kind in used]


def notes_of(table: Table) -> list[str]:
    """All notes; what holds for all checkpoints of a data set and number of labels is said once."""
    found: dict[tuple[str, str], dict[str, list[str]]] = {}
    names: dict[tuple[str, str], list[str]] = {}
    for group in table.groups:
        block, name = (group.dataset, _count(group.n_labels)), group.told or "scratch"
        names.setdefault(block, []).append(name)
        for note in group.notes:
            found.setdefault(block, {}).setdefault(note, []).append(name)
    told = []
    for block, notes in found.items():
        for note, who in notes.items():
            every = len(who) > 1 and who == names[block]
            about = "" if every else f", {', '.join(who)}"
            told.append(f"{block[0]}, {block[1]} labels{about}: {note}")
    return told


def _count(n_labels: int) -> str:
    return str(n_labels) if n_labels >= 0 else "–"


def cell(value: Estimate | None, sign: bool = False, digits: int = 1) -> str:
    """An estimate as text: mean and interval."""
    if value is None or math.isnan(value.mean):
        return "–"
    form = f"{'+' * sign}.{digits}f"
    if not value.has_interval:
        return f"{value.mean:{form}} [no interval]"
    return f"{value.mean:{form}} [{value.low:{form}}, {value.high:{form}}]"


def _escaped(text: str) -> str:
    """Text that LaTeX prints as it is."""
    return "".join(_LATEX.get(sign, sign) for sign in text)


def _in_math(text: str) -> str:
    """Numbers with signs that are no hyphens."""
    return re.sub(r"[+-](?=\d)", lambda sign: f"${sign[0]}$", text.replace("–", "--"))


def _number(value: float) -> str | int:
    if isinstance(value, int):
        return value
    return "" if math.isnan(value) else f"{value:.6g}"
