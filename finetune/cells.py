"""Scores by case and draw, and the tables that intervals are computed from.

Averaged in this order: classes of a case, cases of a subject. A class that is absent from truth
and prediction has no score and is not averaged. Answers for whole scans: `scan_metrics`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from data_prep.errors import InputError
from finetune.lines import ALL_CLASSES, Metric, metrics_of, shown_digits
from finetune.rows import Row
from finetune.scan_metrics import Scores, scan_scores

Parts = Sequence[Scores]
"""The scores of one checkpoint, or of each of several that are one recipe."""


def score_in_words(rows: Sequence[Row]) -> str:
    """The main score of one run in words."""
    metric, mean = metrics_of(rows)[0], mean_score(rows)
    if math.isnan(mean):
        return f"{metric.title} not defined"
    unit = metric.unit.format(unit=rows[0].unit)
    told = "" if unit == "points" else f" {unit}"
    return f"{metric.title} {mean:.{shown_digits(metric, mean)}f}{told}"


def mean_score(rows: Sequence[Row]) -> float:
    """The main score of one run, the mean over its subjects; NaN where it is not defined.

    As in a table, of cases that the checkpoint has not seen in pretraining.
    """
    scores = case_scores(unseen(rows), metrics_of(rows)[0], ALL_CLASSES, ())
    table, _ = score_matrix(scores, subjects_of(rows))
    return float(table.mean()) if table.size else math.nan


def unseen(rows: Iterable[Row]) -> list[Row]:
    """Rows of cases that the checkpoint has not seen in pretraining, as far as that is known."""
    return [row for row in rows if row.status != "tainted"]


def score_differences(
    a: list[Row],
    b: list[Row],
    metric: Metric,
    class_name: str,
    invented: Collection[tuple[str, int]],
) -> Scores:
    """(case, draw) to the score of one arm minus another's.

    Where a run of either `invented` a structure that is not there, finding nothing is the best:
    otherwise the two would be compared over other classes, or the case with the invention would
    drop out.
    """
    if metric.of_scans:  # a score of all cases together is compared over the same cases
        shared = {row.case for row in a} & {row.case for row in b}
        a, b = ([row for row in rows if row.case in shared] for rows in (a, b))
    first, second = (case_scores(rows, metric, class_name, invented) for rows in (a, b))
    return {cell: first[cell] - second[cell] for cell in first.keys() & second.keys()}


def invented_structures(rows: list[Row]) -> set[tuple[str, int]]:
    """Case and class of structures that are not there and that some run found."""
    return {(row.case, row.class_value) for row in rows if row.outcome == "false_positive"}


def case_scores(
    rows: list[Row], metric: Metric, class_name: str, invented: Collection[tuple[str, int]]
) -> Scores:
    """(case, draw) to the score, meaned over classes; cases without any score are absent.

    Args:
        rows: of one arm.
        metric: the column.
        class_name: a class, or all of them.
        invented: case and class of structures that this arm, or the one that it is compared
            with, found where there are none; see `score_differences`.
    """
    _check_once(rows)
    if metric.of_scans:
        return scan_scores(rows, metric, class_name)
    values: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        if metric.of_lesions and row.lesion_tp < 0:
            continue
        if class_name in (ALL_CLASSES, row.class_name):
            value = metric.scale * getattr(row, metric.name)
            if row.outcome == "true_negative" and (row.case, row.class_value) in invented:
                value = metric.best
            if not math.isnan(value):
                values.setdefault((row.case, row.draw), []).append(value)
    return {cell: float(np.mean(found)) for cell, found in values.items()}


def _check_once(rows: list[Row]) -> None:
    seen: set[tuple[str, str, int]] = set()
    for row in rows:
        cell = (row.case, row.draw, row.class_value)
        if cell in seen:
            raise InputError(
                f"{row.arm} of {row.checkpoint or row.dataset}, labels={row.labels}, seed="
                f"{row.draw}: case {row.case} occurs twice; two runs of the same settings were "
                "given, leave one out"
            )
        seen.add(cell)


def score_matrix(scores: Scores, subjects: dict[str, str]) -> tuple[NDArray[np.float64], int]:
    """[subjects, draws] of the cases that every draw has scored, and how many cases these are."""
    draws = sorted({draw for _, draw in scores})
    complete = complete_cases([scores])
    return _by_subject(scores, complete, draws, subjects), len(complete)


def score_cube(parts: Parts, subjects: dict[str, str]) -> tuple[NDArray[np.float64], bool, int]:
    """[checkpoints, subjects, draws], whether draws are shared, and how many cases it is of.

    Of draws that only some checkpoints have nothing is taken; where no draw is common to all, each
    checkpoint has its own, as many as the poorest has.
    """
    draws = [sorted({draw for _, draw in scores}) for scores in parts]
    common = sorted(set.intersection(*map(set, draws)))
    fewest = min(map(len, draws))
    chosen = [common or own[:fewest] for own in draws]
    kept = [
        {(case, draw): value for (case, draw), value in scores.items() if draw in own}
        for scores, own in zip(parts, chosen, strict=True)
    ]
    complete = complete_cases(kept)
    tables = [
        _by_subject(scores, complete, own, subjects)
        for scores, own in zip(kept, chosen, strict=True)
    ]
    return np.stack(tables), bool(common), len(complete)


def _by_subject(
    scores: Scores, cases: list[str], draws: list[str], subjects: dict[str, str]
) -> NDArray[np.float64]:
    """[subjects, draws]: the mean over the cases of a subject."""
    found: dict[str, list[list[float]]] = {}
    for case in cases:
        found.setdefault(subjects[case], []).append([scores[case, draw] for draw in draws])
    if not found:
        return np.empty((0, len(draws)))
    return np.array([np.mean(rows, axis=0) for rows in found.values()])


def mean_scores(parts: Parts) -> Scores:
    """The mean over checkpoints of the cells that all of them have."""
    cells = set.intersection(*(set(scores) for scores in parts)) if parts else set()
    return {cell: float(np.mean([scores[cell] for scores in parts])) for cell in sorted(cells)}


def independent_draws(rows: Iterable[Row]) -> dict[str, str]:
    """Each draw with the name of the one that it counts as.

    Which cases are labelled varies more than all else that a draw stands for, so seeds that share
    a choice of labels are no draws of their own. With one choice, or with all labels, they are.
    """
    rows = list(rows)
    by_labels = len({row.label_seed for row in rows if row.labels != "all"}) > 1
    return {row.draw: str(row.label_seed if by_labels else row.seed) for row in rows}


def merged(scores: Scores, draws: Mapping[str, str]) -> Scores:
    """Scores with the mean over draws that count as one, of the cases that all of these have."""
    complete = set(complete_cases([scores]))
    found: dict[tuple[str, str], list[float]] = {}
    for (case, draw), value in scores.items():
        if (counts_as := draws.get(draw, draw)) == draw or case in complete:
            found.setdefault((case, counts_as), []).append(value)
    return {cell: float(np.mean(values)) for cell, values in found.items()}


def complete_cases(parts: Parts) -> list[str]:
    """The cases that every draw of every part has scored."""
    cases = sorted({case for scores in parts for case, _ in scores})
    draws = [{draw for _, draw in scores} for scores in parts]
    return [
        case
        for case in cases
        if all((case, draw) in s for s, own in zip(parts, draws, strict=True) for draw in own)
    ]


def subjects_of(rows: Iterable[Row]) -> dict[str, str]:
    """The subject of each case."""
    return {row.case: row.subject for row in rows}
