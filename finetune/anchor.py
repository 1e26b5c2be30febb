"""An anchor: what nnU-Net itself scored on the same cases, from the summary.json that it writes.

It stands beside the arms and takes no part in any verdict: how many labels it had, and which, the
file does not say. Its Dice by case and label is averaged in the same order as that of the arms. An
invented structure scores 0 there as here; where truth and prediction have none, it has no Dice and
is not averaged.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath

from data_prep.errors import InputError, near, some
from data_prep.layouts.case import stem
from data_prep.naming import slug
from finetune.rows import Row

ANCHOR = "nnU-Net"

Labels = frozenset[int]
"""The label values of a class or region."""


@dataclass(frozen=True)
class Anchor:
    """A summary.json of nnU-Net v2.

    `scores` has, of each case (as keys of a corpus are made of names) and label or region, Dice,
    NaN where neither truth nor prediction has it, and the voxels of the truth. `values` are the
    label values of the classes by name.
    """

    path: Path
    scores: Mapping[str, Mapping[Labels, tuple[float, int]]]
    values: Mapping[str, Labels]

    def rows(self, rows: Sequence[Row]) -> list[Row]:
        """Its Dice as rows, one for each case and class that the given rows of our arms have.

        Raises:
            InputError: it lacks a case or a class, or was scored against another truth.
        """
        cells = {(row.case, row.class_value): row for row in rows}
        cases = {row.case for row in rows}
        problems = []
        if absent := sorted(cases - self.scores.keys()):
            problems.append(
                f"anchor={self.path}: lacks {_some(absent, len(cases), 'test cases')}; expected a "
                "prediction_file named as the case is for each; let nnU-Net predict the same split"
            )
        labels = {label for case in self.scores.values() for label in case}
        classes = {row.class_name for row in rows}
        if unknown := sorted(n for n in classes if self.values.get(n) not in labels):
            has = ", ".join("+".join(map(str, sorted(label))) for label in sorted(labels, key=min))
            problems.append(
                f"anchor={self.path}: lacks {_some(unknown, len(classes), 'classes')} by their "
                f"label values; it has labels {has}"
            )
        if not problems and (other := self._other_truth(cells)):
            problems.append(
                f"anchor={self.path}: was scored against another truth than the runs in "
                f"{_some(other, len(cases), 'cases')}, by the volume of its classes; labels must "
                "have the same values and voxels in both"
            )
        if problems:
            raise InputError(problems)
        return [self._row(row) for row in cells.values()]

    def left_over(self, rows: Sequence[Row]) -> int:
        """How many of its cases no row is about."""
        return len(self.scores.keys() - {row.case for row in rows})

    def _row(self, row: Row) -> Row:
        dice, _ = self.scores[row.case][self.values[row.class_name]]
        outcome = "true_negative" if math.isnan(dice) else "scored"
        if row.outcome == "not_annotated":
            dice, outcome = math.nan, row.outcome
        return dataclasses.replace(
            row, arm=ANCHOR, dsc=dice, outcome=outcome, seed=-1, label_seed=-1, init_seed=-1
        )

    def _other_truth(self, cells: Mapping[tuple[str, int], Row]) -> list[str]:
        """Cases in which the classes do not come to one volume of a voxel."""
        sizes: dict[str, set[float]] = {}
        for (case, _), row in cells.items():
            _, voxels = self.scores[case][self.values[row.class_name]]
            if row.outcome != "not_annotated" and (voxels or row.volume_true_ml):
                size = row.volume_true_ml / voxels if voxels else math.inf
                sizes.setdefault(case, set()).add(size)
        return sorted(
            case
            for case, found in sizes.items()
            if not 0 < min(found) <= max(found) < 1.001 * min(found)
        )


def read_anchors(words: str, values: Mapping[str, Mapping[str, Labels]]) -> dict[str, Anchor]:
    """The anchors of the data sets that have one.

    Args:
        words: a file where there is one data set; else `NAME:FILE`, several with commas.
        values: of each data set the label values of its classes.

    Raises:
        InputError: a file cannot be read, or it is not clear whose it is.
    """
    parts = [part.rpartition(":") for part in words.split(",")] if ":" in words else []
    if Path(words).is_file() or not parts:
        parts = [("", "", words)]
    anchors: dict[str, Anchor] = {}
    problems = []
    for name, _, file in parts:
        dataset = next(iter(values)) if not name and len(values) == 1 else name
        if dataset in anchors:
            problems.append(f"anchor={words}: has two files for {dataset}; give one")
        elif dataset in values:
            try:
                anchors[dataset] = Anchor(Path(file), _read(Path(file)), values[dataset])
            except InputError as error:
                problems += error.problems
        elif name:
            problems.append(f"anchor={words}: no run has data set {name}; {near(name, values)}")
        else:
            problems.append(
                f"anchor={words}: does not say whose it is; the runs have "
                f"{', '.join(sorted(values)) or 'no run.json beside rows.csv'}, expected "
                "anchor=NAME:FILE,NAME:FILE"
            )
    if problems:
        raise InputError(problems)
    return anchors


def _read(path: Path) -> dict[str, dict[Labels, tuple[float, int]]]:
    """Case and label to Dice and voxels of the truth."""
    scores: dict[str, dict[Labels, tuple[float, int]]] = {}
    try:
        for case in json.loads(path.read_text())["metric_per_case"]:
            # The path is that of the machine which predicted, whatever its separators.
            name = slug(stem(Path(PureWindowsPath(case["prediction_file"]).name)))
            if name in scores:
                raise InputError(f"anchor={path}: has case {name} twice; give one file of scores")
            scores[name] = {
                frozenset(map(int, re.findall(r"\d+", label))): (
                    float(found["Dice"]),
                    int(found["n_ref"]),
                )
                for label, found in case["metrics"].items()
            }
    except OSError as error:
        raise InputError(f"anchor={path}: cannot be read ({error.strerror})") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"anchor={path}: is no summary.json of nnU-Net v2 ({error}); expected metric_per_case "
            "with prediction_file, and metrics with Dice and n_ref for each label"
        ) from error
    return scores


def _some(names: Sequence[str], total: int, what: str) -> str:
    return f"{len(names)} of {total} {what} ({some(names)})"
