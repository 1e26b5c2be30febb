"""Scores by case and draw, and the tables that intervals are computed from.

Averaged in this order: classes of a case, cases of a subject. A class that is absent from truth
and prediction has no score and is not averaged.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable

import numpy as np
from numpy.typing import NDArray

from data_prep.errors import InputError
from finetune.lines import ALL_CLASSES, Metric
from finetune.rows import Row

Scores = dict[tuple[str, str], float]
"""(case, draw) to a score."""


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
    values: dict[tuple[str, str], list[float]] = {}
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
        if metric.of_lesions and row.lesion_tp < 0:
            continue
        if class_name in (ALL_CLASSES, row.class_name):
            value = metric.scale * getattr(row, metric.name)
            if row.outcome == "true_negative" and (row.case, row.class_value) in invented:
                value = metric.best
            if not math.isnan(value):
                values.setdefault((row.case, row.draw), []).append(value)
    return {cell: float(np.mean(found)) for cell, found in values.items()}


def score_matrix(
    scores: dict[tuple[str, str], float], subjects: dict[str, str]
) -> tuple[NDArray[np.float64], int]:
    """[subjects, draws] of the cases that every draw has scored, and how many cases these are."""
    draws = sorted({draw for _, draw in scores})
    complete = complete_cases(scores)
    by_subject: dict[str, list[list[float]]] = {}
    for case in complete:
        by_subject.setdefault(subjects[case], []).append([scores[case, draw] for draw in draws])
    if not by_subject:
        return np.empty((0, len(draws))), 0
    return np.array([np.mean(rows, axis=0) for rows in by_subject.values()]), len(complete)


def complete_cases(scores: Scores) -> list[str]:
    """The cases that every draw has scored."""
    draws = {draw for _, draw in scores}
    cases = sorted({case for case, _ in scores})
    return [case for case in cases if all((case, draw) in scores for draw in draws)]


def subjects_of(rows: Iterable[Row]) -> dict[str, str]:
    """The subject of each case."""
    return {row.case: row.subject for row in rows}
