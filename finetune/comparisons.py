"""What a table says of a comparison beside its mean: the family it belongs to, cases, suitability.

Family. A checkpoint that is compared with its scratch twin on ten data sets has ten chances to look
good, so p values are adjusted (Holm 1979, Scandinavian Journal of Statistics 6:65). A family is
one checkpoint's comparisons over data sets at one setting of labels, in the main column alone:
Dice over all classes. Other label counts, metrics and classes are shown with their intervals and
carry no adjusted p; a claim that picks the best of them is not covered.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FEW_CASES = 20
"""A data set with fewer test cases than this is noted to be unfit to decide between methods."""

Floats = NDArray[np.float64]


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p values: below 0.05 for any true zero of the family in 5 % of families at most.

    NaN, a comparison that was refused an interval, stays NaN and does not count: it is refused
    for its size, not for what it shows.
    """
    tested = [k for k, p in enumerate(p_values) if not math.isnan(p)]
    adjusted = [math.nan] * len(p_values)
    largest = 0.0
    for rank, k in enumerate(sorted(tested, key=lambda k: p_values[k])):
        largest = max(largest, min((len(tested) - rank) * p_values[k], 1.0))
        adjusted[k] = largest
    return adjusted


def holm_by_family(families: Sequence[Hashable], p_values: Sequence[float]) -> list[float]:
    """Holm's adjustment within each family.

    Args:
        families: of each comparison, for instance (checkpoint digest, labels).
        p_values: of each comparison.
    """
    members: dict[Hashable, list[int]] = {}
    for k, family in enumerate(families):
        members.setdefault(family, []).append(k)
    adjusted = [math.nan] * len(p_values)
    for ks in members.values():
        for k, p in zip(ks, holm([p_values[k] for k in ks]), strict=True):
            adjusted[k] = p
    return adjusted


def p_against_stronger(p: float, others: Sequence[float], *, loses: bool) -> float:
    """P of a difference to one of several scratch arms, picked by the very same scores.

    A gain is one over each of them, so the largest p counts: the arm that looks weaker may be the
    one of which less is known (intersection-union test, Berger 1982, Technometrics 24:295). Against
    pretraining it is a choice of the luckiest: p counts as often as there were arms (Bonferroni).

    Args:
        p: of the difference to the one that was picked, by itself.
        others: of the differences to the other scratch arms.
        loses: whether it speaks against pretraining.

    Returns:
        NaN where `p` is, and of a gain where any of them is.
    """
    tested = [p] if loses else [p, *others]
    if any(map(math.isnan, tested)):
        return math.nan
    return min((1 + len(others)) * p, 1.0) if loses else max(tested)


def share_improved(differences: Floats, *, higher_is_better: bool = True) -> float:
    """Share of units whose difference, meaned over draws, is a gain; no difference counts half.

    Args:
        differences: [units, draws].
        higher_is_better: whether a positive difference is a gain.
    """
    if differences.size == 0:
        return math.nan
    signs = np.sign(differences.mean(axis=1)) * (1 if higher_is_better else -1)
    return float((signs + 1).mean() / 2)


def median_difference(differences: Floats) -> float:
    """Median over units of the difference, meaned over draws: what outliers do not move.

    Args:
        differences: [units, draws].
    """
    return float(np.median(differences.mean(axis=1))) if differences.size else math.nan


@dataclass(frozen=True)
class Suitability:
    """Whether a data set can tell methods apart.

    `ratio` is the standard deviation between the methods' means over that between the draws of a
    method (pooled over methods). A ratio below 1 is no proof against a difference: pairs share
    their draws, and intervals see that. But who compares unpaired numbers there compares seeds.
    """

    ratio: float
    flags: tuple[str, ...]


def suitability(means: Floats, cases: int) -> Suitability:
    """The ratio, and what speaks against deciding on this data set.

    Args:
        means: [methods, draws], the mean over cases of each run; every method has the same draws.
        cases: how many test cases there are.
    """
    methods, draws = means.shape
    ratio = math.nan
    if methods > 1 and draws > 1:
        between = float(means.mean(axis=1).std(ddof=1))
        seeds = math.sqrt(float(means.var(axis=1, ddof=1).mean()))
        if seeds > 0:
            ratio = between / seeds
        elif between > 0:
            ratio = math.inf
    flags = []
    if ratio < 1:
        flags.append(f"seeds vary more than methods (ratio {ratio:.2f})")
    if cases < FEW_CASES:
        flags.append(f"{cases} test cases, fewer than {FEW_CASES}")
    return Suitability(ratio, tuple(flags))
