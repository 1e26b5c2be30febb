"""Means with intervals over cases and draws, both of which vary.

A finetuning score depends on the case that is segmented and on the draw: which labels were
chosen, how the decoder started, in what order crops came. A draw moves all cases together, so the
scores of three seeds on forty cases are not 120 independent numbers, and a bootstrap over cases
or over few seeds promises far too much. Here both are random: score[c, s] = mean + case[c] +
draw[s] + rest[c, s], a two-way layout without replication, whose mean squares give the variance of
the mean (Satterthwaite 1946, Biometrics Bulletin 2:110; the design of multi-reader studies,
Hillis 2007, Statistics in Medicine 26:596).

Satterthwaite's degrees of freedom are liberal at three draws (up to 8 % false positives), and the
weighted quantile of Cochran and Cox (Experimental Designs, 1957, section 4.14) is conservative
(down to 2 %); the half-width uses the mean of the two quantiles. Simulated without a true
difference over 3 to 12 draws, 10 to 60 cases, draws that vary 0 to 1.5 times as much as the larger
of case and rest, and rests of 0.3 to 2 times the case, 1.5 to 6.6 % of the 95 % intervals miss
zero; 3.5 to 6 % do nearly everywhere that draws vary and there are 30 cases.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

MIN_DRAWS = 3
"""Two draws know nothing of how draws vary: one degree of freedom, 10 % false positives."""
MIN_UNITS = 5


@dataclass(frozen=True)
class Estimate:
    """A mean with what it rests on.

    `low` and `high` bound the 95 % interval; both are NaN, and `note` says why, where there are
    too few draws or subjects for one. `cases` counts cases, `units` the subjects they come from.
    """

    mean: float
    low: float
    high: float
    cases: int
    units: int
    draws: int
    note: str = ""

    @property
    def has_interval(self) -> bool:
        """Whether the data allow an interval."""
        return not math.isnan(self.low)


def estimate(scores: NDArray[np.float64], cases: int | None = None) -> Estimate:
    """Mean and 95 % interval of a complete table of scores.

    Args:
        scores: [units, draws], no NaN; a unit is a subject, with the mean over its cases.
        cases: how many cases the units hold; the number of units by default.
    """
    units, draws = scores.shape
    cases = units if cases is None else cases
    if units == 0 or draws == 0:
        return Estimate(math.nan, math.nan, math.nan, cases, units, draws, "no scored case")
    mean = float(scores.mean())
    if draws < MIN_DRAWS:
        note = f"an interval needs {MIN_DRAWS} seeds"
        return Estimate(mean, math.nan, math.nan, cases, units, draws, note)
    if units < MIN_UNITS:
        note = f"an interval needs {MIN_UNITS} subjects"
        return Estimate(mean, math.nan, math.nan, cases, units, draws, note)
    half = _half_width(scores)
    return Estimate(mean, mean - half, mean + half, cases, units, draws)


def _half_width(scores: NDArray[np.float64], level: float = 0.95) -> float:
    units, draws = scores.shape
    mean = scores.mean()
    by_unit, by_draw = scores.mean(axis=1), scores.mean(axis=0)
    rest = scores - by_unit[:, None] - by_draw[None, :] + mean
    df_unit, df_draw = units - 1, draws - 1
    ms_unit = draws * float(((by_unit - mean) ** 2).sum()) / df_unit
    ms_draw = units * float(((by_draw - mean) ** 2).sum()) / df_draw
    ms_rest = float((rest**2).sum()) / (df_unit * df_draw)
    # ms_draw already holds the rest once. It enters whole, as the draws are few and decide; cases
    # add what they vary beyond the rest.
    extra = max(ms_unit - ms_rest, 0.0)
    total = ms_draw + extra
    if total == 0:
        return 0.0
    df = total**2 / (ms_draw**2 / df_draw + (ms_unit**2 / df_unit if extra else 0.0))
    # A sum of variances knows no less than its poorest part; the difference in `extra` can make
    # the formula say so, and an interval of a hundred metres.
    df = max(df, min(df_draw, df_unit))
    tail = 0.5 + level / 2
    satterthwaite = stdtrit(df, tail)
    cochran = (ms_draw * stdtrit(df_draw, tail) + extra * stdtrit(df_unit, tail)) / total
    return float((satterthwaite + cochran) / 2 * math.sqrt(total / (units * draws)))
