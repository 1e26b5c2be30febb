import csv
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from arm_rows import BASE, make_rows, scratch_own
from numpy.typing import NDArray
from seeds import SEED

from data_prep.errors import InputError
from finetune.facts import Facts, run_of
from finetune.formats import make_table, markdown
from finetune.intervals import estimate_recipe
from finetune.lines import Table
from finetune.rows import Row, read_rows, write_rows
from finetune.table import _together, read_table, tabulate


def test_a_large_gain_is_seen_and_a_small_one_is_not() -> None:
    clear = tabulate(make_rows("scratch") + make_rows("pretrained", 0.05)).groups[0]
    assert clear.main.verdict == "pretrained better"
    d = clear.main.difference
    assert d is not None and d.low > 0
    assert d.mean == pytest.approx(5, abs=0.5)
    assert (d.cases, d.units, d.draws) == (12, 6, 3)
    worse = tabulate(make_rows("scratch") + make_rows("pretrained", -0.05)).groups[0]
    assert worse.main.verdict == "scratch better"
    vague = tabulate(make_rows("scratch") + make_rows("pretrained", 0.001, noise=0.1)).groups[0]
    assert vague.main.verdict == "no clear difference"
    assert vague.sentence.startswith("hippocampus, 4 labels, mae: no clear difference")


def test_the_stronger_scratch_decides() -> None:
    """Better than the twin is not enough where scratch does as well with its own best recipe."""
    arms = make_rows("scratch") + make_rows("pretrained", 0.05)
    weak = tabulate(arms + scratch_own(-0.02)).groups[0]
    assert weak.main.verdict == "pretrained better" and not weak.main.own_decides
    strong = tabulate(arms + scratch_own(0.05)).groups[0]
    assert strong.main.verdict == "no clear difference" and strong.main.own_decides
    assert strong.main.difference == weak.main.difference
    assert strong.main.against_own is not None
    assert strong.main.against_own.mean == pytest.approx(0, abs=0.6)
    assert tabulate(arms + scratch_own(0.1)).groups[0].main.verdict == "scratch better"
    # It is no checkpoint: one line for the one that there is, and none without the twin.
    assert len(tabulate(arms + scratch_own(0.1)).groups) == 1
    alone = tabulate(make_rows("pretrained", 0.05) + scratch_own(0.0)).groups[0]
    assert alone.main.against_own is None and alone.main.verdict == "no scratch twin"


def test_recipes_of_one_checkpoint_are_told_by_what_differs() -> None:
    """A sweep over rates: its lines, sentences and notes say which rate, not a hash."""
    rows, facts = [], {}
    for rate, steps in ((0.001, 600), (0.01, 600)):
        config_hash = f"{rate:g}".ljust(16, "0")
        arms = make_rows("scratch") + make_rows("pretrained", 10 * rate)
        rows += [dataclasses.replace(row, config_hash=config_hash) for row in arms]
        trained = {"lr": rate, "steps": steps, "augment": {"gain": rate, "noise": 0.1}}
        facts |= {
            run_of(row): Facts(None, None, (), trained, {}, ()) for row in rows
            if row.config_hash == config_hash
        }  # fmt: skip
    table = tabulate(rows, facts=facts)
    assert [line.departs for line in (group.main for group in table.groups)] == [
        "lr=0.001, augment.gain=0.001", "lr=0.01, augment.gain=0.01",
    ]  # fmt: skip
    told = markdown(table)
    assert "| hippocampus | lr=0.01, augment.gain=0.01 | 4 |" in told
    assert "4 labels, mae, lr=0.001, augment.gain=0.001: " in table.verdict
    # One recipe needs no words, and what no folder tells keeps its hash.
    assert not any(line.departs for line in tabulate(rows[: len(rows) // 2], facts=facts).lines)
    assert "| hippocampus | 0.001000 | 4 |" in markdown(tabulate(rows))


def test_p_values_are_adjusted_over_the_data_sets_of_a_checkpoint() -> None:
    rows = []
    for number, gain in enumerate((0.05, 0.004, 0.0)):
        rows += [
            dataclasses.replace(r, dataset=f"set{number}")
            for r in make_rows("scratch") + make_rows("pretrained", gain)
        ]
    mains = [group.main for group in tabulate(rows).groups]
    raw = [line.difference.p for line in mains if line.difference is not None]
    order = np.argsort(raw)
    expected = np.maximum.accumulate(np.minimum(np.sort(raw) * [3, 2, 1], 1))
    assert [mains[i].adjusted_p for i in order] == pytest.approx(list(expected))
    assert all(np.isnan(line.adjusted_p) for line in tabulate(rows).groups[0].lines[1:])
    assert "would be found with a chance of" in markdown(tabulate(rows))


def test_no_delta_without_its_twin() -> None:
    table = tabulate(make_rows("pretrained"))
    assert all(line.difference is None for line in table.lines)
    assert table.groups[0].main.verdict == "no scratch twin"
    assert "init=scratch" in table.verdict
    other = [dataclasses.replace(r, config_hash="other") for r in make_rows("scratch")]
    table = tabulate(make_rows("pretrained") + other)
    assert len(table.groups) == 2
    assert all(line.difference is None for line in table.lines)


def test_checkpoints_share_a_twin() -> None:
    second = [
        dataclasses.replace(r, checkpoint="vf", checkpoint_digest="d2")
        for r in make_rows("pretrained", 0.1)
    ]
    table = tabulate(make_rows("scratch") + make_rows("pretrained") + second)
    assert [g.checkpoint for g in table.groups] == ["mae", "vf"]
    assert all(g.main.difference is not None for g in table.groups)


def test_two_seeds_have_no_interval_and_no_verdict() -> None:
    group = tabulate(make_rows("scratch", seeds=2) + make_rows("pretrained", 0.2, seeds=2)).groups[
        0
    ]
    assert group.main.verdict == "undecided"
    assert "an interval needs 3 seeds" in group.sentence


def test_seen_cases_are_left_out_and_counted() -> None:
    seen = [
        dataclasses.replace(r, status="tainted", dsc=1.0) if r.case == "c0" else r
        for r in make_rows("pretrained")
    ]
    group = tabulate(make_rows("scratch") + seen).groups[0]
    assert group.main.difference is not None and group.main.difference.cases == 11
    assert any("seen in pretraining" in note for note in group.notes)


def test_a_checkpoint_that_has_seen_every_case_gets_no_score() -> None:
    seen = [dataclasses.replace(r, status="tainted") for r in make_rows("pretrained")]
    table = tabulate(make_rows("scratch") + seen)
    assert table.groups[0].main.pretrained is None
    assert "12 test cases were seen in pretraining and are left out" in table.groups[0].notes
    assert {line.verdict for line in table.lines} == {"tainted"}
    assert "every test case was seen in pretraining" in table.verdict
    assert "tainted" in markdown(table)


def test_what_speaks_against_a_data_set_is_noted() -> None:
    def moved_by_seed(rows: list[Row]) -> list[Row]:
        return [dataclasses.replace(r, dsc=r.dsc + 0.1 * r.seed - 0.2) for r in rows]

    def notes(rows: list[Row]) -> list[str]:
        return [n for n in tabulate(rows).groups[0].notes if n.startswith("suitability")]

    few = make_rows("scratch") + make_rows("pretrained", 0.05)
    assert notes(few) == ["suitability: 12 test cases, fewer than 20"]
    many = make_rows("scratch", cases=24, noise=0) + make_rows(
        "pretrained", 0.05, cases=24, noise=0
    )
    assert notes(many) == []
    # Arms 5 points apart have a deviation of 3.54, seeds 10 points apart one of 10.
    assert notes(moved_by_seed(many)) == ["suitability: seeds vary more than methods (ratio 0.35)"]
    assert notes(make_rows("scratch")) == []  # nothing to decide between


def test_classes_that_a_label_draw_lacks_are_noted(tmp_path: Path) -> None:
    for arm in ("scratch", "pretrained"):
        for seed in range(3):
            run = tmp_path / f"{arm}-{seed}"
            run.mkdir()
            write_rows([r for r in make_rows(arm) if r.seed == seed], run / "rows.csv")
            lacking = ["posterior"] if seed else []
            (run / "run.json").write_text(json.dumps({"classes_without_label": lacking}))
    notes = read_table([tmp_path]).groups[0].notes
    assert "no labelled case has posterior in label draw 1, 2" in notes
    (tmp_path / "scratch-0/run.json").write_text("{")
    with pytest.raises(InputError, match=r"scratch-0/run\.json: cannot be read"):
        read_table([tmp_path])


@pytest.mark.parametrize(
    ("people", "told"),
    [
        ((2, 3, 2), "4 labelled cases are of 2 to 3 people"),
        ((2, 2, 2), "are of 2 people"),
        ((4, 4, 4), ""),
    ],
)
def test_draws_whose_cases_are_of_the_same_people_are_noted(
    people: tuple[int, ...], told: str, tmp_path: Path
) -> None:
    for arm in ("scratch", "pretrained"):
        for seed in range(3):
            run = tmp_path / f"{arm}-{seed}"
            run.mkdir()
            write_rows([r for r in make_rows(arm) if r.seed == seed], run / "rows.csv")
            (run / "run.json").write_text(json.dumps({"label_subjects": people[seed]}))
    said = [n for n in read_table([tmp_path]).groups[0].notes if "whole subjects" in n]
    assert len(said) == bool(told) and all(note.endswith(told) for note in said)


def test_cases_of_which_copies_were_not_looked_for_are_noted(tmp_path: Path) -> None:
    for arm in ("scratch", "pretrained"):
        (tmp_path / arm).mkdir()
        write_rows(make_rows(arm), tmp_path / arm / "rows.csv")
        alone = ["c0", "c3", "of another split"] if arm == "pretrained" else []
        note = json.dumps({"compared_by_voxels_alone": alone})
        (tmp_path / arm / "run.json").write_text(note)
    notes = read_table([tmp_path]).groups[0].notes
    assert [note for note in notes if note.startswith("2 of 12 test cases were compared")]
    (tmp_path / "pretrained/run.json").unlink()
    assert not [n for n in read_table([tmp_path]).groups[0].notes if "were compared" in n]


def test_missing_a_structure_costs_and_absence_does_not() -> None:
    def changed(rows: list[Row], **what: object) -> list[Row]:
        return [dataclasses.replace(r, **what) if r.case == "c0" else r for r in rows]  # type: ignore[arg-type]

    missed = changed(make_rows("pretrained"), status="missed", outcome="missed", dsc=0.0)
    group = tabulate(make_rows("scratch") + missed).groups[0]
    assert group.main.pretrained is not None and group.main.scratch is not None
    assert group.main.pretrained.mean < group.main.scratch.mean - 3
    assert "pretrained missed a structure 6 times (scored 0)" in group.notes
    absent = changed(
        make_rows("pretrained"), status="true_negative", outcome="true_negative", dsc=math.nan
    )
    group = tabulate(make_rows("scratch") + absent).groups[0]
    assert group.main.difference is not None and group.main.difference.cases == 11
    assert any("lack a score" in note for note in group.notes)


def test_the_same_run_twice_is_refused() -> None:
    with pytest.raises(InputError, match="occurs twice"):
        tabulate(make_rows("scratch") + make_rows("scratch"))


def test_metric_versions_do_not_mix() -> None:
    newer = [dataclasses.replace(r, metric_version=2) for r in make_rows("pretrained")]
    with pytest.raises(InputError, match="metric versions"):
        tabulate(make_rows("scratch") + newer)


def test_files_say_with_every_mean_what_it_rests_on(tmp_path: Path) -> None:
    for arm in ("scratch", "pretrained"):
        (tmp_path / arm).mkdir()
        write_rows(make_rows(arm), tmp_path / arm / "rows.csv")
    table = make_table([tmp_path], tmp_path / "table")
    with (tmp_path / "table/table.csv").open() as file:
        records = list(csv.DictReader(file))
    assert len(records) == 15  # 5 metrics x (mean and 2 classes), none of lesions
    for record in records:
        for arm in ("pretrained", "scratch", "difference"):
            for part in ("mean", "low", "high", "cases", "units", "draws"):
                assert record[f"{arm}_{part}"]
    text = (tmp_path / "table/table.md").read_text()
    assert table.groups[0].sentence in text
    rows = [line for line in text.splitlines() if line.startswith("| hippo")]
    assert rows and all(" 12 | 6 | 3 |" in row for row in rows)
    plain = json.loads((tmp_path / "table/table.json").read_text())
    assert plain["format"] == 1 and plain["groups"][0]["verdict"]


def test_missing_runs_are_all_named(tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        make_table([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    assert len(error.value.problems) == 2
    assert not (tmp_path / "out").exists()


def test_rows_survive_the_file(tmp_path: Path) -> None:
    rows = [BASE, dataclasses.replace(BASE, dsc=math.nan, status="true_negative", labels="10%")]
    write_rows(rows, tmp_path / "rows.csv")
    found = read_rows(tmp_path / "rows.csv")
    assert found[0] == rows[0]
    assert math.isnan(found[1].dsc) and found[1].labels == "10%"


def test_foreign_rows_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("case,dice\na,0.5\n")
    with pytest.raises(InputError, match="columns"):
        read_rows(path)
    write_rows([dataclasses.replace(BASE, format=9)], path)
    with pytest.raises(InputError, match="format 9"):
        read_rows(path)
    path.write_bytes(b"")
    with pytest.raises(InputError, match="columns"):
        read_rows(path)
    path.write_bytes(b"\x93NUMPY\xff\xfe")
    with pytest.raises(InputError, match=r"rows\.csv: is no table of rows"):
        read_rows(path)


def test_rows_of_an_older_format_are_refused_with_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    names = [field.name for field in dataclasses.fields(Row)]
    old = names[: names.index("metric_version") + 1]
    values = {name: str(getattr(BASE, name)) for name in old} | {"format": "1"}
    path.write_text(",".join(old) + "\n" + ",".join(values.values()) + "\n")
    with pytest.raises(InputError, match=r"row format 1, expected 2.*voxelith evaluate"):
        read_rows(path)


def with_lesions(rows: list[Row], found: int) -> list[Row]:
    """The anterior part is made of two lesions, of which an arm finds some; the other is not."""
    f1 = 2 * found / (found + 2)
    return [
        dataclasses.replace(
            r, lesion_tp=found, lesion_fp=0, lesion_fn=2 - found, lesion_f1=f1, lesion_pq=f1 / 2
        )
        if r.class_name == "anterior"
        else r
        for r in rows
    ]


def test_lesions_are_compared_where_a_class_is_made_of_them() -> None:
    rows = with_lesions(make_rows("scratch"), 1) + with_lesions(make_rows("pretrained"), 2)
    lines = [x for x in tabulate(rows).groups[0].lines if x.metric.startswith("lesion")]
    assert [(x.metric, x.class_name) for x in lines] == [
        (metric, name) for metric in ("lesion_f1", "lesion_pq") for name in ("mean", "anterior")
    ]
    for line in lines:
        assert line.difference is not None
        assert line.difference.mean == pytest.approx(100 / 3 / (1 + (line.metric == "lesion_pq")))
        assert line.improved == 1.0


def test_an_invented_organ_is_no_lesion_of_its_twin() -> None:
    """An organ that its twin rightly does not find counts as best Dice, but never as lesions."""

    def absent(rows: list[Row], outcome: str, dsc: float) -> list[Row]:
        return [
            dataclasses.replace(r, status=outcome, outcome=outcome, dsc=dsc)
            if r.case == "c0" and r.class_name == "posterior"
            else r
            for r in rows
        ]

    rows = with_lesions(absent(make_rows("scratch"), "true_negative", math.nan), 1)
    rows += with_lesions(absent(make_rows("pretrained"), "false_positive", 0.0), 1)
    lines = [x for x in tabulate(rows).groups[0].lines if x.metric == "lesion_f1"]
    assert "posterior" not in {x.class_name for x in lines}
    for line in lines:
        assert line.scratch is not None
        assert line.scratch.mean == pytest.approx(200 / 3)


def test_volume_errors_of_both_signs_do_not_cancel() -> None:
    rows = [
        dataclasses.replace(r, volume_error_ml=(-1.0) ** r.seed * 2)
        for r in make_rows("scratch") + make_rows("pretrained")
    ]
    lines = [x for x in tabulate(rows).groups[0].lines if x.metric == "volume_difference_ml"]
    assert lines
    for line in lines:
        assert line.scratch is not None and line.scratch.mean == pytest.approx(2.0)


def test_predictions_from_elsewhere_are_shown_without_a_verdict() -> None:
    given = {"arm": "external", "checkpoint": "theirs", "config_hash": "external", "n_labels": -1}
    rows = [dataclasses.replace(r, seed=-1, **given) for r in make_rows("scratch", seeds=1)]
    group = tabulate([*rows, *make_rows("scratch"), *make_rows("pretrained")]).groups
    assert [g.main.verdict for g in group if g.checkpoint == "theirs"] == ["predicted elsewhere"]
    assert "init=scratch" not in next(g.sentence for g in group if g.checkpoint == "theirs")


def test_parts_of_a_split_are_two_lines_whoever_predicted_them() -> None:
    given = {"arm": "external", "checkpoint": "theirs", "config_hash": "external", "seed": -1}
    test = [dataclasses.replace(row, **given) for row in make_rows("scratch", seeds=1)]
    other = {"split": "official/validation"}
    validation = [
        dataclasses.replace(row, case=f"v{row.case}", dsc=1.0, **other) for row in test[:8]
    ]
    alone = [tabulate(rows).groups[0].main for rows in (test, validation)]
    both = [group.main for group in tabulate([*test, *validation]).groups]
    assert [line.pretrained for line in both] == [line.pretrained for line in alone]


def test_intervals_of_means_end_where_the_scale_does() -> None:
    rng = np.random.default_rng(SEED + 4)
    shift = {seed: float(rng.normal(0.3, 0.2)) for seed in range(3)}
    rows = [
        dataclasses.replace(r, dsc=min(max(r.dsc + shift[r.seed], 0), 1), hd95=5 * shift[r.seed])
        for r in make_rows("scratch")
    ]
    for line in tabulate([*rows, *make_rows("pretrained")]).lines:
        assert line.scratch is not None
        assert line.scratch.low >= 0
        assert line.metric not in ("dsc", "nsd") or line.scratch.high <= 100


def test_other_label_draws_are_no_pairs() -> None:
    """Equal seeds do not make twins of runs that saw other labels."""
    scratch = [dataclasses.replace(r, label_seed=r.seed + 100) for r in make_rows("scratch")]
    group = tabulate(scratch + make_rows("pretrained", 0.3)).groups[0]
    assert group.main.difference is None and group.main.verdict == "nothing to pair"


def test_label_draws_alone_may_vary() -> None:
    """One seed with several label draws is a design of its own, not the same run twice."""

    def drawn(rows: list[Row]) -> list[Row]:
        return [dataclasses.replace(r, seed=0, init_seed=0, label_seed=r.seed) for r in rows]

    group = tabulate(drawn(make_rows("scratch")) + drawn(make_rows("pretrained", 0.05))).groups[0]
    assert group.main.difference is not None and group.main.difference.draws == 3


def test_seeds_that_share_their_labels_are_no_draws_of_their_own(seed: int) -> None:
    """Three choices of labels, three seeds each: three draws, and as sure as the means of three."""
    rng = np.random.default_rng(seed)
    gains = {choice: rng.normal(0.03, 0.02) for choice in range(3)}

    def drawn(arm: str, *, crossed: bool) -> list[Row]:
        rows = make_rows(arm, seeds=9)
        if arm == "pretrained":
            rows = [dataclasses.replace(r, dsc=r.dsc + gains[r.seed // 3]) for r in rows]
        if not crossed:
            return rows
        return [
            dataclasses.replace(r, label_seed=r.seed // 3, seed=r.seed % 3, init_seed=r.seed % 3)
            for r in rows
        ]

    apart, shared = (
        tabulate(drawn("scratch", crossed=crossed) + drawn("pretrained", crossed=crossed)).groups[0]
        for crossed in (False, True)
    )
    wide, narrow = shared.main.difference, apart.main.difference
    assert wide is not None and narrow is not None
    assert (narrow.draws, wide.draws) == (9, 3) and wide.mean == pytest.approx(narrow.mean)
    assert wide.high - wide.low > narrow.high - narrow.low
    assert any("9 draws count as 3" in note for note in shared.notes)
    assert not any("draws count as" in note for note in apart.notes)


@pytest.mark.parametrize("labels, draws", [("all", 3), ("4", 9)])
def test_label_seeds_choose_nothing_where_all_labels_are_used(labels: str, draws: int) -> None:
    rows = [
        dataclasses.replace(r, labels=labels, seed=r.seed % 3, init_seed=r.seed % 3)
        for r in make_rows("scratch", seeds=9) + make_rows("pretrained", 0.05, seeds=9)
    ]
    difference = tabulate(rows).groups[0].main.difference
    assert difference is not None and difference.draws == draws


def test_one_choice_of_labels_is_told() -> None:
    rows = [
        dataclasses.replace(r, label_seed=0)
        for r in make_rows("scratch") + make_rows("pretrained", 0.05)
    ]
    group = tabulate(rows).groups[0]
    assert any("the same labelled cases" in note for note in group.notes)


def test_inventing_a_structure_costs_where_its_twin_rightly_finds_none() -> None:
    """c0 has no anterior part: scratch says so, pretrained invents one with one of the seeds."""

    def absent(rows: list[Row], invented: int | None) -> list[Row]:
        out = []
        for r in rows:
            if r.case == "c0" and r.class_value == 1:
                wrong = r.seed == invented
                outcome = "false_positive" if wrong else "true_negative"
                dsc = 0.0 if wrong else math.nan
                r = dataclasses.replace(r, status=outcome, outcome=outcome, dsc=dsc)
            out.append(r)
        return out

    twin = absent(make_rows("scratch"), None)
    group = tabulate(twin + absent(make_rows("pretrained"), 0)).groups[0]
    anterior = next(
        line for line in group.lines if line.class_name == "anterior" and line.metric == "dsc"
    )
    assert anterior.difference is not None and anterior.difference.cases == 12
    # One of 12 x 3 pairs is 0 against 100; subjects hold two cases each, so they weigh alike.
    plain = tabulate(make_rows("scratch") + make_rows("pretrained")).groups[0]
    before = next(
        line for line in plain.lines if line.class_name == "anterior" and line.metric == "dsc"
    )
    assert before.difference is not None
    assert anterior.difference.mean == pytest.approx(before.difference.mean - 100 / 36, abs=0.2)
    # The arms are over the same cases as their difference.
    assert anterior.pretrained is not None and anterior.scratch is not None
    gap = anterior.pretrained.mean - anterior.scratch.mean
    assert gap == pytest.approx(anterior.difference.mean)
    # Where nobody invents anything, rightly finding nothing is left out of both arms.
    clean = tabulate(twin + absent(make_rows("pretrained"), None)).groups[0]
    line = next(x for x in clean.lines if x.class_name == "anterior" and x.metric == "dsc")
    assert line.difference is not None and line.difference.cases == 11


def test_an_arm_or_a_checkpoint_more_changes_no_score_of_the_others() -> None:
    """Also where the third arm invents what the others rightly do not find."""

    def absent(rows: list[Row], outcome: str) -> list[Row]:
        dsc = 0.0 if outcome == "false_positive" else math.nan
        return [
            dataclasses.replace(r, status=outcome, outcome=outcome, dsc=dsc)
            if r.case == "c0"
            else r
            for r in rows
        ]

    twins = absent(make_rows("scratch"), "true_negative")
    twins += absent(make_rows("pretrained", 0.02), "true_negative")
    plain = tabulate(twins).groups[0].main
    other = [
        dataclasses.replace(r, checkpoint="other", checkpoint_digest="d2")
        for r in absent(make_rows("pretrained"), "false_positive")
    ]
    table = tabulate(twins + absent(scratch_own(0.01), "false_positive") + other)
    found = next(group.main for group in table.groups if group.checkpoint == "mae")
    assert (found.pretrained, found.scratch) == (plain.pretrained, plain.scratch)
    assert found.difference == plain.difference


def test_lines_say_split_protocol_and_recipe_where_they_differ() -> None:
    """A search on validation, another protocol and another rate are no results of this one."""
    rows = make_rows("scratch") + make_rows("pretrained", 0.05)
    rows = [dataclasses.replace(r, protocol="short_cnn") for r in rows]
    told = markdown(tabulate(rows))
    assert "All lines: split official/test, protocol short_cnn." in told
    assert "| split |" not in told and "| recipe |" not in told
    validation = [
        dataclasses.replace(r, split="fold-0/validation", split_hash="f", config_hash="v")
        for r in rows
    ]
    faster = [dataclasses.replace(r, config_hash="rate") for r in rows]
    table = tabulate(rows + validation + faster)
    told = markdown(table)
    assert "| data set | split | recipe |" in told
    assert "All lines: protocol short_cnn." in told
    assert {line.split for line in table.lines} == {"official/test", "fold-0/validation"}
    # A search is no further data set among which a result could be chosen.
    assert len({group.main.adjusted_p for group in table.groups}) <= 2
    searched = next(g.main for g in table.groups if g.main.split == "fold-0/validation")
    assert searched.difference is not None
    assert searched.adjusted_p == searched.difference.p


def test_a_gain_that_chance_over_many_data_sets_explains_is_taken_back() -> None:
    rows = []
    for number in range(6):
        gain = 0.024 if number == 0 else 0.0
        rows += [
            dataclasses.replace(r, dataset=f"set{number}")
            for r in make_rows("scratch", noise=0.02) + make_rows("pretrained", gain, noise=0.02)
        ]
    alone = [row for row in rows if row.dataset == "set0"]
    (one,) = tabulate(alone).groups
    assert one.main.verdict == "pretrained better"
    assert one.main.difference is not None and one.main.difference.p > 0.05 / 6
    many = tabulate(rows).groups[0]
    assert many.main.difference == one.main.difference
    assert many.main.verdict == "no clear difference"
    assert any("pretrained better by itself" in note for note in many.notes)


def test_a_training_that_was_too_short_is_marked(tmp_path: Path) -> None:
    steps = range(25, 101, 25)
    for arm, dice in (("scratch", (50, 60, 66, 70)), ("pretrained", (69, 69.8, 70, 70.1))):
        for seed in range(6):
            run = tmp_path / f"{arm}-{seed}"
            run.mkdir()
            rows = [r for r in make_rows(arm, 0.05 * (arm != "scratch"), seeds=6) if r.seed == seed]
            write_rows(rows, run / "rows.csv")
            curve = "".join(f"{s},{d}\n" for s, d in zip(steps, dice, strict=True))
            (run / "validation.csv").write_text(f"step,dice\n{curve}")
    (group,) = read_table([tmp_path]).groups
    assert group.main.still_gains == pytest.approx(4)
    assert "the last quarter of training still gained scratch 4.0 points" in " ".join(group.notes)
    assert "pretrained better, not converged" in markdown(read_table([tmp_path]))
    for seed in range(6):  # now scratch comes to where the other was long before, and stays
        (tmp_path / f"scratch-{seed}" / "validation.csv").write_text(
            "step,dice\n25,50\n50,60\n75,70\n100,70\n"
        )
    (group,) = read_table([tmp_path]).groups
    assert "over training: converges faster" in " ".join(group.notes)
    assert "1.8 times as fast (p 0.031)" in " ".join(group.notes)
    assert "not converged" not in markdown(read_table([tmp_path]))
    (tmp_path / "scratch-0" / "validation.csv").unlink()
    (group,) = read_table([tmp_path]).groups  # not known of every run
    assert math.isfinite(group.main.still_gains)
    assert "faster" not in " ".join(group.notes)


def watched(folder: Path, gain: float, scratch: float, pretrained: float, **facts: Any) -> Table:
    """Arms that differ by `gain` on test cases, with curves that end where it is said."""
    for arm, end in (("scratch", scratch), ("pretrained", pretrained)):
        for seed in range(6):
            run = folder / f"{arm}-{seed}"
            run.mkdir()
            rows = [r for r in make_rows(arm, gain * (arm != "scratch"), seeds=6) if r.seed == seed]
            write_rows(rows, run / "rows.csv")
            curve = "".join(f"{s},{d}\n" for s, d in ((25, 50), (50, 60), (75, end), (100, end)))
            (run / "validation.csv").write_text(f"step,dice\n{curve}")
            told = {name: by_arm[arm] for name, by_arm in facts.items()}
            (run / "run.json").write_text(json.dumps(told))
    return read_table([folder])


@pytest.mark.parametrize(
    ("gain", "end", "said"),
    [
        (0.05, 74, "over training: generalises better, +4.0 points at the end"),
        (0.0, 74, "over training: ends apart, +4.0 points at the end, no more than chance may do"),
        # The test says the contrary, and is what counts.
        (0.05, 66, "over training: ends apart, -4.0 points at the end, no more than chance may do"),
    ],
)
def test_curves_claim_no_more_than_the_test(
    gain: float, end: float, said: str, tmp_path: Path
) -> None:
    (group,) = watched(tmp_path, gain, 70, end).groups
    assert any(note.endswith(said) for note in group.notes)


def test_curves_follow_a_verdict_that_is_taken_back(tmp_path: Path) -> None:
    watched(tmp_path, 0.006, 70, 71)  # p 0.02 by itself
    assert "generalises better" in " ".join(read_table([tmp_path]).groups[0].notes)
    others = [
        dataclasses.replace(r, dataset=f"set{n}")
        for n in range(9)
        for r in make_rows("scratch") + make_rows("pretrained", 0)
    ]
    (tmp_path / "others").mkdir()
    write_rows(others, tmp_path / "others" / "rows.csv")
    (group,) = [g for g in read_table([tmp_path]).groups if g.dataset == "hippocampus"]
    assert group.main.verdict == "no clear difference"
    assert "generalises" not in " ".join(group.notes) and "ends apart" in " ".join(group.notes)


def test_a_curve_over_cases_that_pretraining_has_seen_is_not_read(tmp_path: Path) -> None:
    seen = {"scratch": [], "pretrained": ["v1", "v2"]}
    (group,) = watched(tmp_path, 0.05, 70, 74, validation_seen=seen).groups
    assert "2 validation cases were seen in pretraining: its curve is not read" in group.notes
    assert not any("over training" in note for note in group.notes)
    assert list(group.curves) == ["scratch"]


def test_arms_that_were_rounded_otherwise_are_noted(tmp_path: Path) -> None:
    rounded = {"scratch": ["bf16-mixed"], "pretrained": ["32-true"]}
    (group,) = watched(tmp_path, 0.05, 70, 74, precisions=rounded).groups
    note = "in 6 of 6 draws runs were computed in 32-true and in bf16-mixed, so the arms are not"
    assert any(one.startswith(note) for one in group.notes)
    for run in tmp_path.glob("*-[0-2]"):  # all of these on one machine, all others on another
        (run / "run.json").write_text(json.dumps({"precisions": ["32-true"]}))
    for run in tmp_path.glob("*-[3-5]"):
        (run / "run.json").write_text(json.dumps({"precisions": ["bf16-mixed"]}))
    assert "computed" not in " ".join(read_table([tmp_path]).groups[0].notes)


def test_runs_of_several_own_recipes_are_no_draws_of_one_arm() -> None:
    """Own rates change the recipe alone, not what arms share."""
    twins = make_rows("scratch") + make_rows("pretrained", 0.05)
    first, other = (
        [dataclasses.replace(r, recipe_hash=name * 64) for r in scratch_own(0.0)] for name in "ab"
    )
    assert tabulate(twins + first).groups[0].main.own is not None
    for mixed in (first + other, [r for r in first if r.seed < 2] + other[-24:]):
        with pytest.raises(InputError, match=r"labels=4: .*recipe_hash aaaaaaaa, bbbbbbbb,"):
            tabulate(twins + mixed)
    # For another number of labels another rate may be the best.
    few = [dataclasses.replace(r, labels="2", n_labels=2) for r in twins + other]
    assert len(tabulate(twins + first + few).groups) == 2


def folded(rows: list[Row], name: str = "hash") -> list[Row]:
    """The rows as of five folds of a cross-validation, each scored on its validation."""
    out = []
    for r in rows:
        fold = int(r.subject[1:]) % 5
        told = {"split": f"fold-{fold}/validation", "split_hash": f"{name}{fold}"}
        out.append(dataclasses.replace(r, **told))
    return out


def test_arms_of_two_cross_validations_are_refused() -> None:
    """Their cases may be the same: what they were trained on is not."""
    arms = make_rows("scratch", seeds=1, cases=40), make_rows("pretrained", 0.05, 1, 40)
    with pytest.raises(InputError) as error:
        tabulate(folded(arms[0], "x") + folded(arms[1], "y"))
    assert len(error.value.problems) == 5
    assert "hippocampus, labels=4: fold-0/validation has other cases in some runs" in str(error)
    assert "(split_hash x0, y0)" in str(error)


def test_folds_are_one_line_over_all_their_cases() -> None:
    """Five folds with one seed, as cross-validation is reported; each has a split of its own."""
    arms = [make_rows("scratch", seeds=1, cases=40), make_rows("pretrained", 0.05, 1, 40)]
    (group,) = tabulate(folded(arms[0]) + folded(arms[1])).groups
    d = group.main.difference
    assert d is not None
    assert (d.cases, d.units, d.draws, d.folds) == (40, 20, 1, 5)
    assert group.main.verdict == "pretrained better"
    assert group.main.split == "5 folds/validation"
    assert "40 cases of 20 subjects, 5 folds, 1 seed" in group.sentence
    plain = tabulate(arms[0] + arms[1]).groups[0].main.difference
    assert plain is not None and not plain.has_interval
    assert d.mean == pytest.approx(plain.mean)
    # A test part that all folds share is scored once in each: no folds of one table.
    again = [
        dataclasses.replace(r, split=r.split.replace("validation", "test")) for r in folded(arms[0])
    ]
    assert len(tabulate(again).groups) == 5


# Several pretraining seeds


def seeds_of_a_recipe(gains: list[float], seeds: int = 3) -> list[Row]:
    """Checkpoints that are one recipe but for the seed, each with its gain over scratch."""
    out = []
    for number, gain in enumerate(gains):
        told = {
            "checkpoint": f"mae-{number}",
            "checkpoint_digest": f"d{number}",
            "pretrain_seed": number,
            "pretrain_recipe": "r",
        }
        rows = make_rows("pretrained", gain, seeds=seeds)
        out += [dataclasses.replace(row, **told) for row in rows]
    return out


def dice(rows: list[Row], draws: list[int]) -> NDArray[np.float64]:
    """[subjects, draws] in points, the slow way."""
    found = np.zeros((6, len(draws)))
    for row in rows:
        if row.seed in draws:
            found[int(row.subject[1:]), draws.index(row.seed)] += 100 * row.dsc / 4
    return found


def test_checkpoints_that_differ_in_the_seed_have_a_line_together() -> None:
    gains = [0.03, 0.05, 0.08]
    rows = make_rows("scratch") + seeds_of_a_recipe(gains)
    *alone, recipe = tabulate(rows).groups
    assert [group.checkpoint for group in alone] == ["mae-0", "mae-1", "mae-2"]
    assert recipe.checkpoint == "mae-{0,1,2}"
    draws = [0, 1, 2]
    scratch = dice(make_rows("scratch"), draws)
    cube = np.stack([dice(make_rows("pretrained", gain), draws) - scratch for gain in gains])
    expected = estimate_recipe(cube, "shared", 12)
    found = recipe.main.difference
    assert found is not None and found.pretrainings == 3 and found.cases == 12
    assert (found.mean, found.low, found.high, found.p) == pytest.approx(
        (expected.mean, expected.low, expected.high, expected.p), rel=1e-6
    )
    # How seeds of pretraining vary is no part of what is known of one.
    single = alone[1].main.difference
    assert single is not None and found.error > 2 * single.error
    assert any("about the recipe, over 3 pretraining seeds" in note for note in recipe.notes)
    assert "3 pretraining seeds, 3 seeds each" in recipe.sentence
    assert recipe.main.pretrained is not None
    assert recipe.main.pretrained.mean == pytest.approx(
        np.mean([g.main.pretrained.mean for g in alone if g.main.pretrained is not None])
    )


def test_a_checkpoint_without_a_pair_takes_no_recipe_with_it() -> None:
    """Three of four have scratch's seeds; of the fourth nothing is known."""
    rows = seeds_of_a_recipe([0.03, 0.05, 0.08, 0.05])
    three = [row for row in rows if row.checkpoint != "mae-3"]
    moved = [
        dataclasses.replace(row, seed=row.seed + 3, label_seed=row.seed + 3, init_seed=row.seed + 3)
        for row in rows
        if row.checkpoint == "mae-3"
    ]
    expected = tabulate([*make_rows("scratch"), *three]).groups[-1]
    *alone, recipe = tabulate([*make_rows("scratch"), *three, *moved]).groups
    assert len(alone) == 4 and recipe.checkpoint == "mae-{0,1,2}"
    assert recipe.main.difference == expected.main.difference
    assert "left out of the recipe, no seed in common with scratch: mae-3" in recipe.notes
    groups = tabulate([*make_rows("scratch"), *three[: len(three) // 3], *moved]).groups
    assert [group.checkpoint for group in groups] == ["mae-0", "mae-3"]


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (["mae-9", "mae-10", "mae-11"], "mae-{9,10,11}"),
        (["vf-0 with decoder", "vf-1 with decoder"], "vf-{0,1} with decoder"),
        (["a/first", "b/first"], "{a,b}/first"),
        (["mae", "mae-1"], "mae{,-1}"),
        (["seed1", "seed12"], "{seed1,seed12}"),
        (["mae", "mae", "mae"], "mae, 3 pretraining seeds"),
    ],
)
def test_checkpoints_of_a_recipe_have_a_name_together(names: list[str], told: str) -> None:
    assert _together(names) == told


def test_draws_of_a_recipe_are_shared_or_each_checkpoints_own() -> None:
    gains = [0.03, 0.05, 0.08]
    rows = seeds_of_a_recipe(gains, seeds=4)
    partly = [row for row in rows if (row.checkpoint, row.seed) != ("mae-1", 0)]
    shared = tabulate(make_rows("scratch", seeds=4) + partly).groups[-1].main.difference
    assert shared is not None and (shared.draws, shared.pretrainings) == (3, 3)
    own = [
        dataclasses.replace(row, **dict.fromkeys(("seed", "label_seed", "init_seed"), seed))
        for row in rows
        for seed in [row.seed + 10 * row.pretrain_seed]
    ]
    scratch = [
        dataclasses.replace(row, **dict.fromkeys(("seed", "label_seed", "init_seed"), seed))
        for row in make_rows("scratch", seeds=4)
        for seed in (row.seed, row.seed + 10, row.seed + 20)
    ]
    nested = tabulate(scratch + own).groups[-1].main.difference
    assert nested is not None and (nested.draws, nested.pretrainings) == (4, 3)
    plain = dice(make_rows("scratch", seeds=4), [0, 1, 2, 3])
    cube = np.stack(
        [dice(make_rows("pretrained", g, seeds=4), [0, 1, 2, 3]) - plain for g in gains]
    )
    assert nested.error == pytest.approx(estimate_recipe(cube, "own").error, rel=1e-6)


def test_what_is_no_recipe_has_no_line_of_it() -> None:
    scratch = make_rows("scratch")
    two = tabulate(scratch + seeds_of_a_recipe([0.03, 0.05])).groups[-1]
    assert two.main.verdict == "undecided" and "3 pretraining seeds" in two.sentence
    assert len(tabulate(scratch + seeds_of_a_recipe([0.03])).groups) == 1
    unknown = [dataclasses.replace(r, pretrain_recipe="") for r in seeds_of_a_recipe([0.03, 0.05])]
    assert len(tabulate(scratch + unknown).groups) == 2
    same = [dataclasses.replace(r, pretrain_seed=1) for r in seeds_of_a_recipe([0.03, 0.05])]
    assert len(tabulate(scratch + same).groups) == 2
    cases = {f"c{n}": n % 3 for n in range(12)}
    folds = [
        dataclasses.replace(r, split=f"fold-{cases[r.case]}/validation")
        for r in scratch + seeds_of_a_recipe([0.03, 0.05, 0.08])
    ]
    pooled = tabulate(folds).groups[-1].main
    assert pooled.verdict == "undecided" and pooled.difference is not None
    assert "over several folds" in pooled.difference.note


def test_rows_of_before_recipes_are_read(tmp_path: Path) -> None:
    write_rows([BASE], tmp_path / "rows.csv")
    with (tmp_path / "rows.csv").open(newline="") as file:
        records = list(csv.DictReader(file))
    for dropped in ("pretrain_recipe", "assd"):
        names = [name for name in records[0] if name != dropped]
        with (tmp_path / "old.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, names, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(records)
        if dropped == "pretrain_recipe":
            assert read_rows(tmp_path / "old.csv") == [BASE]
        else:
            with pytest.raises(InputError, match="columns assd are missing"):
                read_rows(tmp_path / "old.csv")


def test_a_loss_to_the_luckier_of_two_scratch_arms_counts_double() -> None:
    """By itself the difference to scratch at its own best is just below 0.05."""
    arms = make_rows("scratch") + make_rows("pretrained", 0.05)
    for gain in np.arange(0.0505, 0.07, 0.0005):
        group = tabulate(arms + scratch_own(float(gain))).groups[0]
        against = group.main.against_own
        assert against is not None
        if against.mean < 0 and 0.025 <= against.p < 0.05:
            break
    else:
        pytest.fail("no gain gives such a p")
    assert group.main.own_decides and group.main.verdict == "no clear difference"
    assert group.main.adjusted_p == pytest.approx(2 * against.p)
    assert any("counts double" in note for note in group.notes)
    gained = tabulate(arms + scratch_own(0.04)).groups[0].main
    assert gained.decides is not None and gained.difference is not None
    assert gained.adjusted_p == max(gained.decides.p, gained.difference.p)


@pytest.mark.parametrize("seeds", [(0, 1, 3), (0, 1), ()])
def test_scratch_at_its_own_best_counts_on_its_own_seeds(seeds: tuple[int, ...]) -> None:
    """Three points above pretraining where it ran, on draws that are poor for all."""
    poor = {0: -0.30, 1: -0.28, 3: -0.29}
    rows = [
        dataclasses.replace(row, dsc=row.dsc + poor.get(row.seed, 0.0))
        for row in make_rows("scratch", seeds=5)
        + make_rows("pretrained", 0.03, seeds=5)
        + scratch_own(0.06, seeds=5)
        if row.arm != "scratch-own" or row.seed in seeds or (not seeds and row.seed == 0)
    ]
    if not seeds:  # none in common
        rows = [
            dataclasses.replace(row, seed=9, label_seed=9, init_seed=9)
            if row.arm == "scratch-own"
            else row
            for row in rows
        ]
    group = tabulate(rows).groups[0]
    assert group.main.own is not None and group.main.scratch is not None
    assert group.main.own.mean < group.main.scratch.mean  # by means of arms the twin is stronger
    verdict = "scratch better" if len(seeds) == 3 else "undecided"
    assert group.main.verdict == verdict, group.notes
    assert group.main.own_decides == bool(seeds)
    assert any("scratch at its own best" in note and "one arm only" in note for note in group.notes)
    if not seeds:
        assert any("a gain has to be one over both" in note for note in group.notes)


def test_notes_count_cases_as_differences_do() -> None:
    """What one arm invented is scored in the other: these cases do not lack a score."""
    rows = []
    for n in range(24):
        for arm, dsc, outcome in (
            ("pretrained", 0.0 if n < 6 else 0.8, "false_positive" if n < 6 else "scored"),
            ("scratch", math.nan if n < 6 else 0.75, "true_negative" if n < 6 else "scored"),
        ):
            for seed in range(3):
                made = {"pretrained": "p"}.get(arm, "")
                row = dataclasses.replace(
                    BASE, case=f"c{n}", subject=f"s{n}", arm=arm, dsc=dsc, nsd=dsc, hd95=math.nan,
                    outcome=outcome, status=outcome, seed=seed, label_seed=seed, init_seed=seed,
                    checkpoint=made, checkpoint_digest=made,
                )  # fmt: skip
                rows.append(row)
    group = tabulate(rows).groups[0]
    assert group.main.difference is not None and group.main.difference.cases == 24
    assert not any("lack a score" in note or "fewer than" in note for note in group.notes)


def test_a_family_is_of_all_data_sets_whatever_their_splits_are_called() -> None:
    def table(names: list[str]) -> Table:
        rows = []
        for n, name in enumerate(names):
            rows += [
                dataclasses.replace(row, dataset=f"d{n}", split=name, split_hash=name)
                for row in make_rows("scratch") + make_rows("pretrained", 0.05)
            ]
        return tabulate(rows)

    same, other = table(["official/test"] * 3), table(["official/test", "default/test", "x/all"])
    assert [g.main.adjusted_p for g in same.groups] == [g.main.adjusted_p for g in other.groups]
    main = same.groups[0].main
    assert main.adjusted_p == pytest.approx(3 * main.p)
    assert any("over 3 comparisons (Holm)" in note for note in other.groups[0].notes)
