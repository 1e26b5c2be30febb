"""report.html: what was done and what it showed, in one file that needs nothing else.

Pictures travel inside the page; it asks no network for anything and opens from a disk in ten
years' time.
"""

from __future__ import annotations

import json
import math
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_prep.corpus import Corpus
from data_prep.errors import InputError
from data_prep.files import make_folder, read_note, read_table, write_text
from finetune.cells import score_in_words, unseen
from finetune.curves import Losses, draw_losses
from finetune.facts import find_rows
from finetune.figures import (
    Overlay,
    draw_cases,
    draw_comparison,
    draw_table,
)
from finetune.formats import on_page
from finetune.intervals import Estimate
from finetune.lines import (
    ALL_CLASSES,
    BETTER,
    NO_PRETRAINED,
    NO_TWIN,
    OWN,
    SEEN,
    UNDEFINED,
    WORSE,
    Group,
    Line,
    Table,
)
from finetune.pages import render
from finetune.predictions import read_prediction
from finetune.rows import Row, read_rows
from finetune.scan_task import ScanTask
from finetune.segmentation import class_table, to_classes
from finetune.settings import TaskSettings, choose_task
from finetune.step_zero import FILE as STEP_ZERO
from finetune.training import read_log, training_section

MAX_BYTES = 10_000_000
"""Beyond it, the page goes without pictures of trainings."""
_TONES = {BETTER: "better", WORSE: "worse"}


@dataclass(frozen=True)
class _Run:
    """A finetune run folder, read."""

    path: Path
    facts: dict[str, Any]
    config: dict[str, Any]
    rows: list[Row]

    @property
    def arm(self) -> str:
        return self.rows[0].arm

    @property
    def seed(self) -> int:
        return self.rows[0].seed

    @property
    def has_predictions(self) -> bool:
        """Whether there are label maps of all its cases: they are large, and may be cleared."""
        cases, folder = {row.case for row in self.rows}, self.path / "predictions"
        return all((folder / f"{case}.nii.gz").is_file() for case in cases)

    @property
    def recipe(self) -> str:
        """What it shares with the other arms."""
        return str(self.facts["identity"]["config_hash"])


def make_report(
    trainings: Sequence[Path],
    finetune_runs: list[Path],
    table: Table | None,
    output: Path,
    notice: str | None = None,
) -> Path:
    """Writes the report.

    Args:
        trainings: pretrainings, and finetunings that are not finished, each in its present state.
        finetune_runs: the finished runs that the table was made from.
        table: from `read_table`; None if no run is finished.
        output: a .html file, or a folder that gets report.html.
        notice: a sentence that stands above the verdict, such as a warning about a small budget.

    Returns:
        The file.

    Raises:
        InputError: a run folder is missing or not finished.
    """
    runs = _read_runs(finetune_runs) if table is not None else []
    groups = [] if table is None else table.groups
    sections = [training_section(run) for run in trainings]
    worth = "What pretraining was worth: " + ", ".join(dict.fromkeys(g.dataset for g in groups))
    path = output if output.suffix == ".html" else output / "report.html"
    make_folder(path.parent, "output")
    values = dict(
        notice=notice,
        title=worth if groups else ", ".join(run.name for run in trainings),
        groups=[_group(group) for group in groups],
        own=table is not None and any(line.own is not None for line in table.lines),
        pictures=None if table is None else on_page(draw_table(table)),
        losses=_losses(runs),
        cases=_cases(runs),
        runs=[_run_line(run) for run in runs],
        loads=_loads(runs),
        facts=_facts(runs),
        commands=_commands([*trainings, *(run.path for run in runs)]),
    )
    page = render("report.html.j2", **values, trainings=sections, without_pictures=0)
    if without_pictures := _lighten(sections, len(page.encode()) - MAX_BYTES):
        page = render(
            "report.html.j2", **values, trainings=sections, without_pictures=without_pictures
        )
    write_text(path, page)
    return path


def _lighten(sections: Sequence[dict[str, Any]], surplus: int) -> int:
    """Takes pictures from trainings, the last first, until the page is smaller by so many bytes.

    Returns:
        How many trainings have lost theirs.
    """
    lightened = 0
    for section in reversed(sections):
        strip = (section["health"] or {}).get("strip")
        pictures = [p for p in ((section["previews"] or {}).get("picture"), strip) if p]
        if surplus > 0 and pictures:
            surplus -= sum(map(len, pictures))
            section["previews"] = None
            section["health"] = section["health"] and section["health"] | {"strip": None}
            lightened += 1
    return lightened


def _read_runs(folders: Sequence[Path]) -> list[_Run]:
    runs = []
    for file in find_rows(folders):
        folder = file.parent
        facts, config = folder / "run.json", folder / "config.json"
        if not facts.is_file() or not config.is_file():
            raise InputError(
                f"{folder}: has rows.csv but no run.json and config.json; the report needs the "
                "run folders that `voxelith finetune` made"
            )
        rows = read_rows(file)
        if not rows:
            raise InputError(f"{file}: holds no row")
        runs.append(_Run(folder, read_table(facts), read_table(config), rows))
    return sorted(runs, key=lambda run: (run.rows[0].n_labels, run.arm, run.seed))


# The verdict and the table.


def _group(group: Group) -> dict[str, Any]:
    line = group.main
    headline = {
        BETTER: "Pretraining helped",
        WORSE: "Scratch was better",
        SEEN: "Every test case was seen in pretraining",
        NO_TWIN: "No scratch twin, no verdict",
        NO_PRETRAINED: "Only the scratch arm",
        UNDEFINED: f"{line.measures.title} is not defined",
    }.get(line.verdict, line.verdict.capitalize())
    comparison = None
    if line.difference is not None:
        rows = [
            (_class(one), one.difference)
            for one in group.lines
            if one.metric == line.metric and one.difference is not None
        ]
        if line.against_own is not None:
            rows.insert(1, (f"{_class(line)}, to own best", line.against_own))
        comparison = draw_comparison(rows, group.scores, line, group.shown)
    return {
        "dataset": group.dataset,
        "n_labels": group.n_labels,
        "checkpoint": group.checkpoint,
        "headline": headline,
        "measured": f"{line.measures.title}, {line.unit}",
        "scored": "one answer each" if line.measures.of_scans else "every class, native grid",
        "tone": _TONES.get(line.verdict, "unclear"),
        "why": _why(line),
        **_arms(line),
        "basis": line.basis,
        "comparison": comparison,
        "lines": [_line(one) for one in group.lines],
        "notes": group.notes,
    }


def _class(line: Line) -> str:
    """What a line is about."""
    if line.class_name != ALL_CLASSES:
        return line.class_name
    return "all classes" if line.measures.by_class else "all cases"


def _arms(line: Line) -> dict[str, dict[str, str] | None]:
    """The arms and their differences; None stands for a third arm that is not there."""
    own = line.own is not None
    return {
        "difference": _number(line.difference, line.digits, sign=True),
        "pretrained": _number(line.pretrained, line.digits),
        "scratch": _number(line.scratch, line.digits),
        "own": _number(line.own, line.digits) if own else None,
        "against_own": _number(line.against_own, line.digits, sign=True) if own else None,
    }


def _why(line: Line) -> str:
    d = line.decides
    if d is None:
        return "A difference is only shown where both arms have the same cases and seeds."
    if not d.has_interval:
        return f"There is no interval: {d.note}."
    which = f"of the difference to {OWN} " if line.own_decides else ""
    if d.low <= 0 <= d.high:
        return f"The 95 % interval {which}holds zero: these runs cannot tell the arms apart."
    if line.verdict not in (BETTER, WORSE):
        return f"The 95 % interval {which}leaves zero out; the notes say why that is not enough."
    return f"The 95 % interval {which}lies on one side of zero."


def _number(value: Estimate | None, digits: int, sign: bool = False) -> dict[str, str]:
    if value is None or math.isnan(value.mean):
        return {"mean": "–", "interval": ""}
    form = f"{'+' * sign}.{digits}f"
    interval = f"{value.low:{form}} to {value.high:{form}}" if value.has_interval else "no interval"
    minus = str.maketrans("-", "−")
    return {"mean": f"{value.mean:{form}}".translate(minus), "interval": interval.translate(minus)}


def _line(line: Line) -> dict[str, Any]:
    return {
        "metric": line.measures.title,
        "unit": line.unit,
        "class_name": _class(line),
        "overall": line.class_name == ALL_CLASSES,
        **_arms(line),
        "basis": line.basis,
        "improved": "–" if math.isnan(line.improved) else f"{line.improved:.0%}",
        "verdict": line.verdict,
        "tone": _TONES.get(line.verdict, "unclear"),
    }


# Curves and pictures.


def _losses(runs: list[_Run]) -> str | None:
    """The losses of finished runs; probes in closed form have none."""
    curves = []
    for run in runs:
        log = read_log(run.path / "metrics.csv")
        if log is not None:
            curves.append(Losses(run.arm, run.seed, log["step"], log["loss"]))
    return draw_losses(curves) if curves else None


def _cases(every: list[_Run]) -> dict[str, str] | None:
    """Worst, median and best case of the pretrained arm, with the same seed of every arm.

    Of runs whose predictions are all there, over a corpus that is as it was.
    """
    runs = [run for run in every if run.has_predictions]
    lead = [run for arm in ("pretrained", "scratch") for run in runs if run.arm == arm]
    found = next(((run, corpus) for run in lead if (corpus := _corpus(run)) is not None), None)
    if found is None:
        return None
    first, corpus = found
    task = choose_task(first.config["task"])
    if isinstance(task, ScanTask):
        return None  # nothing that could be drawn
    chosen = {first.arm: first}
    for arm in ("scratch", "scratch-own"):
        for run in runs:
            if (run.arm, run.seed, run.recipe) == (arm, first.seed, first.recipe):
                chosen.setdefault(arm, run)
    means = {arm: _case_means(run.rows) for arm, run in chosen.items()}
    common = set.intersection(*(set(found) for found in means.values()))
    ranked = sorted(common, key=lambda case: (means[first.arm][case], case))
    if not ranked:
        return None
    picks = {"best": ranked[-1], "median": ranked[len(ranked) // 2], "worst": ranked[0]}
    try:
        overlays = [
            _overlay(corpus, key, f"{name} case", chosen, means, task)
            for name, key in list(picks.items())[::-1]
            if list(picks.values()).index(key) == list(picks).index(name)
        ]
    except InputError as error:
        print(f"report: no pictures of cases: {error}", file=sys.stderr)
        return None
    return {
        "arm": first.arm,
        "arms": str(len(chosen)),
        "seed": str(first.seed),
        "labels": str(first.rows[0].n_labels),
        "picture": draw_cases(overlays, [c.name for c in task.classes]),
        "names": ", ".join(f"{name} {key}" for name, key in list(picks.items())[::-1]),
    }


def _corpus(run: _Run) -> Corpus | None:
    """The corpus that a run was scored on, if it is on this machine and still the same."""
    said = run.facts["corpus"]
    try:
        corpus = Corpus.open(said["path"]) if Path(said["path"]).is_dir() else None
    except InputError:
        return None
    return corpus if corpus is not None and corpus.index_hash == said["index_hash"] else None


def _case_means(rows: list[Row]) -> dict[str, float]:
    values: dict[str, list[float]] = {}
    for row in rows:
        if not math.isnan(row.dsc):
            values.setdefault(row.case, []).append(100 * row.dsc)
    return {case: float(np.mean(found)) for case, found in values.items()}


def _overlay(
    corpus: Corpus,
    key: str,
    title: str,
    runs: dict[str, _Run],
    means: dict[str, dict[str, float]],
    task: TaskSettings,
) -> Overlay:
    i = corpus.position(key)
    volume = corpus.volume(i)
    table = class_table(task).clamp(min=0)

    def classes(labels: np.ndarray) -> np.ndarray:
        return to_classes(torch.from_numpy(labels.astype(np.int64)), table).numpy()

    predictions = {
        arm: classes(read_prediction(run.path / "predictions" / f"{key}.nii.gz", volume))
        for arm, run in runs.items()
    }
    return Overlay(
        title,
        volume.physical()[0],
        volume.spacing,
        classes(corpus.read(i, "seg")),
        predictions,
        {arm: means[arm][key] for arm in runs},
    )


# What was run.


def _run_line(run: _Run) -> dict[str, Any]:
    head = run.rows[0]
    scored = {r.case for r in unseen(run.rows) if math.isfinite(r.dsc) or math.isfinite(r.truth)}
    covered = read_note(run.path / "load_report.json").get("covered", 0.0)
    equal = read_note(run.path / STEP_ZERO).get("features_equal_release")
    return {
        "name": run.path.name,
        "arm": head.arm,
        "labels": head.n_labels,
        "seed": head.seed,
        "steps": head.steps,
        "score": score_in_words(run.rows),
        "cases": len(scored),
        "missed": sum(row.outcome == "missed" for row in run.rows),
        "loaded": f"{covered:.0%}",
        "start": "–" if equal is None else "the release's" if equal else "others",
    }


def _loads(runs: list[_Run]) -> list[dict[str, Any]]:
    """What of the weights was not taken as it was, or has no values; once for runs that agree."""
    found: dict[str, dict[str, Any]] = {}
    for run in runs:
        note = read_note(run.path / "load_report.json")
        constant, adapted = note.get("constant", []), note.get("adapted", {})
        if constant or adapted:
            same = found.setdefault(
                json.dumps([constant, adapted]),
                {"runs": [], "constant": constant, "adapted": list(adapted.items())},
            )
            same["runs"].append(run.path.name)
    return list(found.values())


def _facts(runs: list[_Run]) -> list[tuple[str, str]]:
    """What holds for all runs, or each value that occurs."""

    def values(found: Sequence[Any]) -> str:
        return ", ".join(dict.fromkeys(str(value) for value in found))

    heads = [run.rows[0] for run in runs]
    rows = [row for run in runs for row in run.rows]
    statuses = {row.status for row in rows if row.arm == "pretrained"}
    leakage = statuses & {"tainted", "unknown"} or ({"clean"} if statuses else {"no arm"})
    said = {
        "clean": "no exact copy of a test case was in the pretraining data",
        "tainted": "some test cases were in the pretraining data; they are left out of the table",
        "no arm": "no pretrained arm here",
        "unknown": "unknown for some cases: the checkpoint does not say what it was trained on",
    }
    checkpoints = [f"{r.checkpoint} ({r.checkpoint_digest[:12]})" for r in heads if r.checkpoint]
    sizes = [f"{run.facts['parameters'] / 1e6:.2f} million parameters" for run in runs]
    versions = [
        ", ".join(f"{name} {version}" for name, version in run.facts["versions"].items())
        for run in runs
    ]
    tolerances = [
        f"{r.class_name} {r.nsd_tolerance_mm:g} mm"
        for r in rows
        if math.isfinite(r.nsd_tolerance_mm)
    ]
    facts = [
        ("Checkpoint", values(checkpoints)),
        ("Leakage", "; ".join(said[kind] for kind in sorted(leakage))),
        ("Split", values([f"{r.split} ({r.split_hash[:12]})" for r in heads])),
        ("Corpus", values([str(run.facts["corpus"]["index_hash"])[:12] for run in runs])),
        ("Recipe", values([r.config_hash for r in heads])),
        ("Labelled cases", values([r.n_labels for r in heads])),
        ("Label draws (seeds)", values(sorted({r.label_seed for r in heads}))),
        ("Network", values(sizes)),
        ("Surface Dice at", values(tolerances)),
        ("Versions", values(versions)),
        ("Commit", values([c for run in runs if (c := run.facts.get("commit"))])),
    ]
    return [(name, value) for name, value in facts if value]


def _commands(folders: Sequence[Path]) -> list[str]:
    """How each run was started."""
    commands = []
    for folder in folders:
        command = read_note(folder / "run.json").get("command", ["voxelith"])
        commands.append(shlex.join([Path(command[0]).name, *command[1:]]))
    return list(dict.fromkeys(commands))
