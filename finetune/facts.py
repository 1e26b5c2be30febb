"""What the folders of finished runs hold: their rows, and what they say beside them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from data_prep.errors import InputError
from data_prep.files import read_table
from finetune.anchor import Labels
from finetune.budget import Curve, read_curve
from finetune.costs import Cost
from finetune.lines import OWN
from finetune.rows import Row, read_rows

Run = tuple[str, ...]
"""What tells a run among others: data set, split, labels, recipe, arm, draw."""


class Facts(NamedTuple):
    """Of one run; empty or None where its folder does not say it.

    `without_label` names classes that no labelled case of its draw has, `trained` is the recipe
    that it trained with, `classes` are the label values of each structure that it is scored on,
    `by_voxels_alone` the test cases of which copies could not be looked for in pretraining,
    `label_subjects` how many people its labelled cases are of; 0 where that is not said,
    `validation_seen` the validation cases that pretraining has seen, `precisions` those that it was
    computed in.
    """

    curve: Curve | None
    cost: Cost | None
    without_label: Sequence[str]
    trained: dict[str, Any]
    classes: dict[str, Labels]
    by_voxels_alone: Sequence[str]
    label_subjects: int = 0
    validation_seen: Sequence[str] = ()
    precisions: Sequence[str] = ()


def run_of(row: Row) -> Run:
    """The run that a row belongs to."""
    return (row.dataset, row.split_hash, row.labels, row.config_hash, arm_of(row), row.draw)


def arm_of(row: Row) -> str:
    """The arm; of those with weights of their own, each checkpoint is one."""
    if row.arm in ("scratch", "scratch-own"):
        return row.arm
    return f"{row.arm}:{row.checkpoint_digest}:{row.checkpoint}"


def refuse_mixed(rows: Iterable[Row]) -> None:
    """Rows of a group that are no draws of one experiment.

    Raises:
        InputError: scratch at its own best has several recipes, or a fold has several splits.
    """
    recipes: dict[str, set[str]] = defaultdict(set)
    splits: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        where = f"{row.dataset}, labels={row.labels}: "
        splits[f"{where}{row.split}"].add(row.split_hash[:8])
        if row.arm == "scratch-own":
            recipes[f"{where}{OWN}"].add(row.recipe_hash[:8])
    problems = [
        f"{arm} was trained by several recipes (recipe_hash {', '.join(sorted(found))}, which the "
        "runs of a sweep have in their names): they are no draws of one arm; give the runs of one"
        for arm, found in recipes.items()
        if len(found) > 1
    ]
    problems += [
        f"{split} has other cases in some runs than in others (split_hash "
        f"{', '.join(sorted(found))}): they are of several cross-validations; give the runs of "
        "one, and make a table of each"
        for split, found in splits.items()
        if len(found) > 1
    ]
    if problems:
        raise InputError(problems)


def read_run(rows: Path) -> tuple[list[Row], Facts]:
    """The rows of a rows.csv and what lies beside it.

    Raises:
        InputError: it cannot be read.
    """
    path = rows.with_name("run.json")
    # Rows that were made or moved elsewhere have none.
    said = read_table(path) if path.is_file() else {}
    task = said.get("recipe", {}).get("task")
    labelled = task and "target" not in task
    scored = (task["regions"] or task["classes"]) if labelled else ()
    return read_rows(rows), Facts(
        read_curve(rows.parent),
        Cost.of(said),
        said.get("classes_without_label", ()),
        said.get("trained", {}),
        {c["name"]: frozenset(c["values"]) for c in scored},
        said.get("compared_by_voxels_alone", ()),
        said.get("label_subjects", 0),
        said.get("validation_seen", ()),
        said.get("precisions", ()),
    )


def find_rows(runs: Sequence[Path]) -> list[Path]:
    """The rows.csv of each run.

    Raises:
        InputError: names every path that leads to none.
    """
    found: list[Path] = []
    problems = []
    for run in runs:
        if run.is_file():
            found.append(run)
            continue
        if not run.is_dir():
            problems.append(f"{run}: no such folder; give finetuning runs, or a folder of them")
            continue
        here = [run / "rows.csv"] if (run / "rows.csv").is_file() else []
        here = here or sorted(run.glob("*/rows.csv"))
        if not here:
            problems.append(
                f"{run}: no rows.csv in it or one level below; expected finetune runs that have "
                "finished (an unfinished one goes on with the same command)"
            )
        found += here
    if not runs:
        problems.append("no run folder was given")
    if problems:
        raise InputError(problems)
    return list(dict.fromkeys(path.resolve() for path in found))
