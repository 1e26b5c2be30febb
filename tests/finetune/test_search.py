"""A search is held against the report: what was tried, on which cases, and what was taken."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from arm_rows import make_rows, scratch_own

from data_prep.errors import InputError
from finetune.rows import Row, read_rows, write_rows
from finetune.search import read_searches
from finetune.table import read_table


def write_run(folder: Path, rows: list[Row], lr: float, **recipe: Any) -> None:
    """A run folder as far as a table reads it, one for each seed."""
    for seed in sorted({row.seed for row in rows}):
        run = folder / f"{rows[0].arm}-{lr:g}-{seed}"
        run.mkdir(parents=True)
        write_rows([row for row in rows if row.seed == seed], run / "rows.csv")
        trained = {"lr": lr, "steps": 100, "part": "test", **recipe}
        (run / "run.json").write_text(json.dumps({"trained": trained}))


def report(folder: Path, own: float = 1e-2) -> Path:
    write_run(folder, make_rows("pretrained", 0.05), 1e-3)
    write_run(folder, make_rows("scratch"), 1e-3)
    write_run(folder, scratch_own(0.01), own)
    return folder


def searched(
    folder: Path, arm: str, gains: dict[float, float], seeds: int = 2, encoder: str = "",
    **recipe: Any,
) -> Path:  # fmt: skip
    """The arm's runs on validation cases; the twins' rates have a recipe hash each."""
    for lr, gain in gains.items():
        rows = [
            dataclasses.replace(
                row,
                case=f"v{row.case}",
                split="official/validation",
                config_hash=f"lr{lr:g}",
                pretrain_recipe=encoder,
            )
            for row in make_rows(arm, gain, seeds=seeds)
        ]
        write_run(folder, rows, lr, part="validation", **recipe)
    return folder


def notes(runs: Path, search: Path | None) -> list[str]:
    table = read_table([runs], search=search)
    return [note for note in table.groups[0].notes if "search" in note or "rates were" in note]


PRETRAINED = {1e-3: 0.05, 1e-2: 0.02}
SCRATCH = {1e-3: 0.0, 1e-2: 0.01}


def test_without_a_search_the_own_recipe_is_a_claim(tmp_path: Path) -> None:
    (note,) = notes(report(tmp_path / "runs"), None)
    assert note.startswith("scratch's own recipe (rate 0.01) is its protocol's claim")


def test_a_gain_over_the_twin_alone_is_told(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    write_run(runs, make_rows("pretrained", 0.05), 1e-3)
    write_run(runs, make_rows("scratch"), 1e-3)
    said = "to the twin alone: whether scratch has a better rate of its own is not shown"
    assert said in read_table([runs]).groups[0].notes
    write_run(runs, scratch_own(0.01), 1e-2)
    assert said not in read_table([runs]).groups[0].notes


def test_a_fair_search_is_told_and_nothing_is_wrong(tmp_path: Path) -> None:
    search = tmp_path / "search"
    searched(search, "pretrained", PRETRAINED)
    searched(search, "scratch", SCRATCH)
    note, *ends = notes(report(tmp_path / "runs"), search)
    assert "pretrained 0.001 of 0.001, 0.01 (Dice 70." in note and "4 runs" in note
    assert "scratch 0.01 of 0.001, 0.01 (Dice 66." in note
    assert [end.split(" that")[0] for end in ends] == [
        "the search: pretrained is best at the lowest rate",
        "the search: scratch is best at the highest rate",
    ]
    searched(search, "pretrained", {1e-4: 0.0})
    searched(search, "scratch", {1e-1: 0.0})
    assert len(notes(tmp_path / "runs", search)) == 2  # scratch had 0.1, the other arm not
    searched(search, "scratch", {1e-4: 0.0})
    assert len(notes(tmp_path / "runs", search)) == 1


@pytest.mark.parametrize(
    ("planted", "said"),
    [
        ({"scratch": {1e-2: 0.01}}, "scratch was searched with less"),
        ({"seeds": 1}, "scratch was searched with less"),
        ({"scratch": {}}, "scratch had none"),
        ({"scratch": {1e-3: 0.05, 1e-2: 0.0}}, "scratch-own trained with 0.01, where 0.001 was"),
        ({"pretrained": {1e-3: 0.0, 1e-2: 0.1}}, "pretrained trained with 0.001, where 0.01 was"),
        ({"steps": 50}, "it differs from the report in steps"),
    ],
)
def test_an_unfair_search_is_told(tmp_path: Path, planted: dict[str, Any], said: str) -> None:
    search = tmp_path / "search"
    more = {"steps": planted["steps"]} if "steps" in planted else {}
    searched(search, "pretrained", planted.get("pretrained", PRETRAINED), **more)
    searched(
        search, "scratch", planted.get("scratch", SCRATCH), seeds=planted.get("seeds", 2), **more
    )
    found = notes(report(tmp_path / "runs"), search)
    assert any(said in note for note in found), found


def test_a_rate_that_was_chosen_on_reported_cases_is_told(tmp_path: Path) -> None:
    runs = report(tmp_path / "runs")
    found = notes(runs, runs)
    assert any("chosen on cases that are reported" in note for note in found)


def test_another_checkpoint_or_data_set_is_told(tmp_path: Path) -> None:
    search, runs = tmp_path / "search", report(tmp_path / "runs")
    searched(search, "scratch", SCRATCH)
    for lr, gain in PRETRAINED.items():
        rows = [
            dataclasses.replace(row, case=f"v{row.case}", checkpoint_digest="other")
            for row in make_rows("pretrained", gain, seeds=2)
        ]
        write_run(search, rows, lr)
    assert any("with another checkpoint" in note for note in notes(runs, search))
    elsewhere = [dataclasses.replace(row, dataset="liver") for row in make_rows("scratch")]
    write_run(tmp_path / "liver", elsewhere, 1e-3)
    assert notes(runs, tmp_path / "liver") == ["no run of the search is about this data set"]


def test_each_recipe_of_pretraining_has_its_own_best_rate(tmp_path: Path) -> None:
    """Two that were searched in one folder; seeds of one recipe share what it found."""
    search, runs = tmp_path / "search", tmp_path / "runs"
    searched(search / "a", "pretrained", PRETRAINED, encoder="masked")
    searched(search / "b", "pretrained", {1e-3: 0.0, 1e-2: 0.2}, encoder="fused")
    searched(search / "c", "scratch", SCRATCH)
    for part in sorted(search.glob("*/*")):
        part.rename(search / f"{part.parent.name}-{part.name}")
    rows = make_rows("pretrained", 0.05)
    for seed in (0, 1):
        made: dict[str, Any] = {
            "pretrain_recipe": "masked",
            "pretrain_seed": seed,
            "checkpoint_digest": f"{seed}",
        }
        write_run(runs / f"{seed}", [dataclasses.replace(row, **made) for row in rows], 1e-3)
    write_run(runs / "c", make_rows("scratch"), 1e-3)
    for part in sorted(runs.glob("*/*")):
        part.rename(runs / f"{part.parent.name}-{part.name}")
    found = notes(runs, search)
    assert any("pretrained 0.001 of 0.001, 0.01 (Dice 70." in note and "4 runs" in note
               for note in found)  # fmt: skip
    assert not any("was best" in note or "another checkpoint" in note for note in found), found


def test_scratch_is_that_of_the_groups_own_network(tmp_path: Path) -> None:
    """Two architectures in one search: the other's scratch is neither a choice nor a fault."""
    search, runs = tmp_path / "search", tmp_path / "runs"
    searched(search / "a", "pretrained", PRETRAINED, network="cnn")
    searched(search / "b", "scratch", SCRATCH, network="cnn")
    searched(search / "z", "scratch", {1e-3: 0.2, 1e-2: 0.0, 1e-1: 0.0}, network="vit")
    for part in sorted(search.glob("*/*")):
        part.rename(search / f"{part.parent.name}-{part.name}")
    write_run(runs, make_rows("pretrained", 0.05), 1e-3, network="cnn")
    write_run(runs, make_rows("scratch"), 1e-3, network="cnn")
    write_run(runs, scratch_own(0.01), 1e-2, network="cnn")
    note, *ends = notes(runs, search)
    assert len(ends) == 2 and all("rate that was tried" in end for end in ends)
    assert "scratch 0.01 of 0.001, 0.01 (Dice 66." in note and note.endswith("4 runs)")


def test_a_rate_is_not_chosen_on_cases_that_were_all_seen(tmp_path: Path) -> None:
    search = tmp_path / "search"
    searched(search, "pretrained", PRETRAINED)
    searched(search, "scratch", SCRATCH)
    for file in search.glob("pretrained-*/rows.csv"):
        write_rows([dataclasses.replace(row, status="tainted") for row in read_rows(file)], file)
    found = notes(report(tmp_path / "runs"), search)
    assert "pretrained none of 0.001, 0.01 (no draw is scored for all, 4 runs)" in found[0]
    assert not any("was best" in note or "nan" in note for note in found)


def test_a_rate_is_no_better_for_the_draws_that_it_had(tmp_path: Path) -> None:
    """0.01 is worse on each draw, and was tried on the luckiest alone."""
    search = tmp_path / "search"
    searched(search, "scratch", SCRATCH)
    for lr, gains in ((1e-3, {0: 0.05, 1: 0.15}), (1e-2, {1: 0.12})):
        for seed, gain in gains.items():
            rows = [row for row in make_rows("pretrained", gain, seeds=2) if row.seed == seed]
            rows = [dataclasses.replace(r, case=f"v{r.case}", config_hash=f"{lr}") for r in rows]
            write_run(search, rows, lr, part="validation")
    found = notes(report(tmp_path / "runs"), search)
    assert any("pretrained 0.001 of 0.001, 0.01" in note and "3 runs" in note for note in found)
    assert "the search: rates of pretrained are compared on shared draws, 2 of its runs" in found
    assert not any("was best" in note for note in found)


def test_searches_with_other_labels_are_not_taken_together(tmp_path: Path) -> None:
    search = tmp_path / "search"
    searched(search, "scratch", SCRATCH)
    searched(search, "pretrained", PRETRAINED)
    other = searched(tmp_path / "other", "pretrained", {1e-3: 0.0, 1e-2: 0.2})
    for run in list(other.iterdir()):
        rows = [dataclasses.replace(row, labels="16") for row in read_rows(run / "rows.csv")]
        write_rows(rows, run / "rows.csv")
        run.rename(search / f"16-{run.name}")
    note, *ends = notes(report(tmp_path / "runs"), search)
    assert len(ends) == 2 and all("rate that was tried" in end for end in ends)
    assert "pretrained 0.001 of 0.001, 0.01 (Dice 70." in note and "4 runs" in note
    for run in search.iterdir():
        if not run.name.startswith("16"):
            (run / "rows.csv").unlink()
            continue
        facts = json.loads((run / "run.json").read_text())
        facts["trained"]["labels"] = "16"
        (run / "run.json").write_text(json.dumps(facts))
    found = notes(tmp_path / "runs", search)
    assert "the search: it had labels=16" in found
    assert not any("differs from the report" in note for note in found)  # it is told once


def test_every_run_of_a_search_is_held_against_the_report(tmp_path: Path) -> None:
    search = tmp_path / "search"
    searched(search, "scratch", SCRATCH)
    searched(search, "pretrained", PRETRAINED)
    last = max(search.glob("pretrained-*"))
    facts = json.loads((last / "run.json").read_text())
    facts["trained"]["steps"] = 5
    (last / "run.json").write_text(json.dumps(facts))
    found = notes(report(tmp_path / "runs"), search)
    assert "the search: it differs from the report in steps" in found


def test_without_an_own_arm_scratchs_best_rate_is_told(tmp_path: Path) -> None:
    search = tmp_path / "search"
    searched(search, "pretrained", PRETRAINED)
    searched(search, "scratch", SCRATCH)
    write_run(tmp_path / "runs", make_rows("pretrained", 0.05), 1e-3)
    write_run(tmp_path / "runs", make_rows("scratch"), 1e-3)
    found = notes(tmp_path / "runs", search)
    assert "the search: scratch is best with 0.01, its twin has 0.001: recipe_of=own" in found


def test_runs_that_do_not_say_their_rate_show_no_search(tmp_path: Path) -> None:
    runs = report(tmp_path / "runs")
    (tmp_path / "bare").mkdir()
    write_rows(make_rows("scratch"), tmp_path / "bare" / "rows.csv")
    with pytest.raises(InputError, match=r"no run\.json that says its rate"):
        notes(runs, tmp_path / "bare")
    with pytest.raises(InputError, match=r"search=.*nowhere: no such folder"):
        notes(runs, tmp_path / "nowhere")


def test_scratch_is_held_against_its_own_arm(tmp_path: Path) -> None:
    """Phases are of pretrained weights: scratch at its best is searched, and trained, without."""
    search, runs = tmp_path / "search", tmp_path / "runs"
    phases: dict[str, Any] = {"phases": [{"steps": 5, "freeze": "encoder"}]}
    searched(search, "pretrained", PRETRAINED, **phases)
    searched(search, "scratch", SCRATCH)
    write_run(runs, make_rows("pretrained", 0.05), 1e-3, **phases)
    write_run(runs, make_rows("scratch"), 1e-3, **phases)
    write_run(runs, scratch_own(0.01), 1e-2)
    assert not any("differs" in note for note in notes(runs, search))
    searched(tmp_path / "other", "pretrained", PRETRAINED)
    searched(tmp_path / "other", "scratch", SCRATCH)
    assert any("differs from the report in phases" in n for n in notes(runs, tmp_path / "other"))


def test_a_rate_is_judged_over_all_folds(tmp_path: Path) -> None:
    for fold, gains in enumerate([{1e-3: 0.2, 1e-2: 0.0}, {1e-3: 0.0, 1e-2: 0.01}]):
        for lr, gain in gains.items():
            rows = [
                dataclasses.replace(row, split_hash=f"fold{fold}", config_hash=f"lr{lr:g}")
                for row in make_rows("scratch", gain, seeds=1)
            ]
            write_run(tmp_path / f"{fold}", rows, lr, part="validation")
    for part in sorted(tmp_path.glob("*/*")):
        part.rename(tmp_path / f"{part.parent.name}-{part.name}")
    (search,) = read_searches(tmp_path).values()
    assert {rate: len(scores) for rate, scores in search.shared("scratch").items()} == {
        1e-3: 2,
        1e-2: 2,
    }
    assert search.best("scratch")[0] == 1e-3  # 10 points better on the mean
