from __future__ import annotations

import csv
import dataclasses
import io
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from arm_rows import make_rows, scratch_own

from finetune.budget import Curve
from finetune.facts import Facts, Run, run_of
from finetune.figures import draw_label_curves, draw_table
from finetune.formats import csv_text, html, latex, make_table, markdown, notes_of
from finetune.lines import Table
from finetune.rows import Row, write_rows
from finetune.table import tabulate

NASTY = "a_b & 5% #1 $x {y} ~z^2 \\w <i>"


def two_sets() -> Table:
    """A clear gain on one data set, with the third arm, and none on the other."""
    clear = make_rows("scratch") + make_rows("pretrained", 0.05) + scratch_own(0.02)
    rows = [dataclasses.replace(r, dataset=NASTY) for r in clear]
    vague = make_rows("scratch") + make_rows("pretrained", 0.001, noise=0.1)
    return tabulate(
        rows + [dataclasses.replace(r, checkpoint=r.checkpoint and "[v]") for r in vague]
    )


class Cells(HTMLParser):
    """The rows of the first table of a page, as texts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.inside = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag == "tr":
            self.rows.append([])
        self.inside = tag in ("td", "th")
        if self.inside:
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        self.inside = False

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.rows[-1][-1] += data


def test_markdown_and_html_show_the_same() -> None:
    table = two_sets()
    rows = [
        [text.strip() for text in line.strip("|").split("|")]
        for line in markdown(table).splitlines()
        if line.startswith("|") and "---" not in line
    ]
    assert rows == Cells(html(table, {})).rows
    assert any(NASTY in row for row in rows) and "<i>" not in html(table, {})
    # What the verdicts are about comes first, a sentence and a row each.
    assert markdown(table).splitlines()[:2] == [f"- {group.sentence}" for group in table.groups]
    assert [row[-1] for row in rows[1:3]] == [group.main.verdict for group in table.groups]
    assert len(rows) - 1 == len(table.lines)


def test_the_page_fetches_nothing() -> None:
    table = two_sets()
    page = html(table, draw_table(table))
    addresses = re.findall(r'(?:src|href)\s*=\s*["\']?([^"\'\s>]+)', page)
    assert len(addresses) == 1 and addresses[0].startswith("data:image/png")
    assert not re.search(r"<script|<link|@import|url\(", page)


def test_latex_prints_every_sign_and_breaks_no_row() -> None:
    text = latex(two_sets())
    lines = text.splitlines()
    assert lines[2] == r"\begin{tabular}{l r l r r r r r c}" and lines[-1] == r"\end{tabular}"
    body = lines[lines.index(r"\midrule") + 1 : lines.index(r"\bottomrule")]
    assert len(body) == 2  # main lines alone
    for row in body:
        assert row.endswith(r" \\")
        assert len(re.findall(r"(?<!\\)&", row)) == 8
        assert not re.match(r"[\[*]", row)
        # Nothing but numbers' signs and verdicts is mathematics.
        assert set(re.findall(r"(?<!\\)\$(.*?)(?<!\\)\$", row)) <= {"+", "-", r"\uparrow", r"\sim"}
    assert body[0].startswith(
        r"a\_b \& 5\% \#1 \$x \{y\} \textasciitilde{}z\textasciicircum{}2 "
        r"\textbackslash{}w \textless{}i\textgreater{} & 4 & mae & "
    )
    assert body[0].endswith(r"$\uparrow$ \\") and body[1].endswith(r"$\sim$ \\")
    assert "& {[}v] &" in body[1]
    # As many braces open as close, without those that are printed.
    bare = re.sub(r"\\[{}]", "", text)
    assert bare.count("{") == bare.count("}")
    assert r"$\uparrow$: pretrained better; $\sim$: no clear difference" in text


@pytest.mark.parametrize(
    ("status", "mark", "sign"),
    [("tainted", "†", r"$\dagger$"), ("unknown", "‡", r"$\ddagger$")],
)
def test_checkpoints_that_may_have_seen_the_test_are_marked(
    status: str, mark: str, sign: str
) -> None:
    rows = [
        dataclasses.replace(r, status=status) if r.case == "c0" else r
        for r in make_rows("pretrained", 0.05)
    ]
    clean = [
        dataclasses.replace(r, checkpoint="other", checkpoint_digest="d2")
        for r in make_rows("pretrained")
    ]
    table = tabulate(make_rows("scratch") + rows + clean)
    names = [row[2] for row in Cells(html(table, {})).rows]
    assert {f"mae {mark}", "other"} < set(names) and "mae" not in names
    assert f"{mark}: " in markdown(table) and f"{mark}: " in html(table, {})
    assert f"& mae {sign} &" in latex(table) and f"{sign}: " in latex(table)
    assert "& other &" in latex(table)
    records = list(csv.DictReader(io.StringIO(csv_text(table))))
    assert {(r["checkpoint"], r["leakage"]) for r in records} == {
        ("mae", status),
        ("other", "clean"),
    }


def test_latex_says_what_tells_its_lines_apart_and_what_has_not_converged() -> None:
    arms = make_rows("scratch") + make_rows("pretrained", 0.05)
    other = [dataclasses.replace(r, protocol="full_vit", config_hash="z") for r in arms]
    one, two = tabulate(arms + other).groups
    short = dataclasses.replace(two, lines=(dataclasses.replace(two.main, still_gains=2.0),))
    text = latex(Table((one, short)))
    assert r"\begin{tabular}{l l r l r r r c}" in text
    assert "Data set & Protocol & Labels" in text and "$^*$: not converged" in text
    ended, gains = sorted(line for line in text.splitlines() if line.startswith("hippocampus"))
    assert ended.startswith("hippocampus &  & 4") and "$^*$" not in ended
    assert gains.startswith(r"hippocampus & full\_vit & 4") and gains.endswith(r"$^*$ \\")
    assert "not converged" not in latex(Table((one,)))


def test_latex_and_markdown_have_the_same_digits() -> None:
    table = two_sets()
    for group, row in zip(
        table.groups, latex(table).split("\\midrule\n")[1].splitlines(), strict=False
    ):
        d = group.main.difference
        assert d is not None
        shown = f"{d.mean:+.1f} [{d.low:+.1f}, {d.high:+.1f}]"
        assert shown in markdown(table) and shown in row.replace("$", "")


def with_labels(rows: list[Row], count: int, **changes: object) -> list[Row]:
    changes |= {"labels": str(count), "n_labels": count, "config_hash": f"recipe-{count}"}
    return [dataclasses.replace(r, **changes) for r in rows]  # type: ignore[arg-type]


def test_the_budget_is_drawn_where_both_arms_were_validated() -> None:
    """Curves of runs, meaned over draws; an arm that was not watched leaves no half a picture."""
    rows = make_rows("scratch") + make_rows("pretrained", 0.05)

    def facts(*watched: str) -> dict[Run, Facts]:
        curve = Curve([150, 300, 450, 600], [70, 75, 78, 79])
        return {
            run_of(row): Facts(curve if row.arm in watched else None, None, (), {}, {}, ())
            for row in rows
        }

    both = tabulate(rows, facts=facts("pretrained", "scratch"))
    assert both.groups[0].curves["scratch"].dice == [70, 75, 78, 79]
    assert draw_table(both)["budget.png"].startswith(b"\x89PNG")
    assert "budget.png" not in draw_table(tabulate(rows, facts=facts("pretrained")))
    assert "budget.png" not in draw_table(tabulate(rows))


def test_curves_need_two_numbers_of_labels_of_one_recipe() -> None:
    arms = make_rows("scratch") + make_rows("pretrained", 0.05)
    four, sixteen = with_labels(arms, 4), with_labels(arms, 16)
    assert draw_label_curves(tabulate(four)) is None
    assert draw_label_curves(tabulate(four + sixteen)) is not None
    # A second recipe at sixteen labels: no line leads through both.
    other = [dataclasses.replace(r, config_hash="other") for r in sixteen]
    assert draw_label_curves(tabulate(four + sixteen + other)) is None
    named = [dataclasses.replace(r, protocol="full") for r in other]
    assert draw_label_curves(tabulate(four + sixteen + named)) is not None
    elsewhere = [dataclasses.replace(r, split="official/validation") for r in sixteen]
    assert draw_label_curves(tabulate(four + elsewhere)) is None


def test_pictures_lie_beside_the_table_and_never_outlive_it(tmp_path: Path) -> None:
    arms = make_rows("scratch") + make_rows("pretrained", 0.05)
    names = []
    for number, rows in enumerate((with_labels(arms, 4) + with_labels(arms, 16), arms)):
        write_rows(rows, tmp_path / f"{number}.csv")
        make_table([tmp_path / f"{number}.csv"], tmp_path / "table")
        names.append(sorted(path.name for path in (tmp_path / "table").iterdir()))
    files = [f"table.{kind}" for kind in ("csv", "html", "json", "md", "tex")]
    assert names == [["forest.png", "label_curves.png", *files], ["forest.png", *files]]


def test_what_holds_for_all_checkpoints_is_said_once() -> None:
    arms = make_rows("scratch") + make_rows("pretrained", 0.05)
    other = [
        dataclasses.replace(row, checkpoint="other", checkpoint_digest="d2")
        for row in make_rows("pretrained", 0.05)
    ]
    one, two = tabulate(arms + other).groups
    shared = dataclasses.replace(one, notes=("a", "b")), dataclasses.replace(two, notes=("c", "b"))
    assert notes_of(Table(shared)) == [
        "hippocampus, 4 labels, mae: a",
        "hippocampus, 4 labels: b",
        "hippocampus, 4 labels, other: c",
    ]
    assert notes_of(Table(shared[:1])) == [
        "hippocampus, 4 labels, mae: a",
        "hippocampus, 4 labels, mae: b",
    ]


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="needs pdflatex")
def test_latex_compiles_whatever_the_names(tmp_path: Path) -> None:
    odd = 'a_b&c%$#{}~^\\<>|[*–†"q'
    rows = [
        dataclasses.replace(
            row, dataset="[set]_1", checkpoint=odd if row.arm == "pretrained" else ""
        )
        for row in make_rows("scratch") + make_rows("pretrained", 0.05)
    ]
    (tmp_path / "table.tex").write_text(latex(tabulate(rows)))
    head = r"\documentclass{article}\usepackage{booktabs,graphicx}"
    body = r"\begin{document}\input{table.tex}\end{document}"
    (tmp_path / "all.tex").write_text(head + body)
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "-draftmode", "all.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:]
