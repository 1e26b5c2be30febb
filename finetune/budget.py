"""Curves of Dice against steps: whether training was long enough, and what a head start is.

Pretraining can shorten the way to the same place or lead to a better one. With too few steps the
first looks like the second, so a difference is only read from curves that have ended:

- converged: the last quarter of training gains no more than 0.5 Dice points on validation;
- generalises better: both arms have converged, and one ends more than 0.5 points above the other;
- converges faster: both have converged within 0.5 points of each other, and one needs at most 80 %
  of the steps of the other to come, for good, within 0.5 points of the lower end, which chance does
  less than once in twenty times.

An end is the mean of the last quarter, a curve the mean over draws and cases. How sure a difference
at the end is says its interval (finetune/intervals.py). How sure a speed is says an exact test: if
the arms were alike, each draw could as well have had their curves the other way round (Fisher 1935;
Pitman 1937), so p is the share of all such exchanges that are as far from equal speed. Five draws
can tell nothing by it, six can.
"""

from __future__ import annotations

import csv
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from data_prep.errors import CorruptionError
from finetune.intervals import LEVEL

CURVE = "validation.csv"
"""The file of a run that holds its curve; finetune/validation.py writes it."""

MARGIN = 0.5
"""Dice points that count as nothing."""
FASTER = 0.8
EXCHANGED = 15
"""Draws up to which all exchanges of the arms are tried, and 16384 of them above."""
LAST = 0.75
"""Where the last quarter begins."""

Floats = NDArray[np.float64]

Reading = Literal[
    "not converged", "generalises better", "generalises worse", "converges faster",
    "converges slower", "no difference",
]  # fmt: skip


@dataclass(frozen=True)
class Curve:
    """Validation Dice over training.

    `steps` rise and are above zero, `dice` is in points (0 to 100); both [measurements].

    Raises:
        ValueError: they do not fit each other, or the last quarter has fewer than two.
    """

    steps: Sequence[float]
    dice: Sequence[float]

    def __post_init__(self) -> None:
        steps, dice = np.asarray(self.steps, float), np.asarray(self.dice, float)
        if steps.ndim != 1 or steps.shape != dice.shape:
            raise ValueError(f"{steps.shape} steps and {dice.shape} values of Dice, expected pairs")
        if not np.isfinite(dice).all() or (np.diff(steps) <= 0).any() or (steps <= 0).any():
            raise ValueError("steps must rise from above zero, and Dice be known at each")
        if self._last.sum() < 2:
            raise ValueError(
                "the last quarter needs two measurements: validate at least every quarter, "
                "at 75 % and at the end"
            )

    @property
    def _last(self) -> NDArray[np.bool_]:
        steps = np.asarray(self.steps, float)
        return steps >= LAST * steps[-1] if len(steps) else np.zeros(0, bool)

    @property
    def last_gain(self) -> float:
        """What the last quarter of training gained, in points.

        The rise of the least-squares line through its measurements, which noise moves less than
        the difference of the outer two.
        """
        steps = np.asarray(self.steps, float)[self._last]
        dice = np.asarray(self.dice, float)[self._last]
        slope = np.polyfit(steps - steps.mean(), dice, 1)[0]
        return float(slope * 0.25 * self.steps[-1])

    @property
    def converged(self) -> bool:
        """Whether the last quarter gained no more than the margin."""
        return self.last_gain <= MARGIN

    @property
    def end(self) -> float:
        """Mean Dice of the last quarter."""
        return float(np.asarray(self.dice, float)[self._last].mean())


def read_curve(run: Path) -> Curve | None:
    """A run's curve; None if it has none, or if a look found no structure to score.

    Raises:
        CorruptionError: the file is damaged, or says nothing of the end of training.
    """
    path = run / CURVE
    if not path.is_file():
        return None
    try:
        with path.open(newline="") as file:
            rows = [(float(row["step"]), float(row["dice"])) for row in csv.DictReader(file)]
        if any(math.isnan(dice) for _, dice in rows):
            return None
        return Curve([step for step, _ in rows], [dice for _, dice in rows])
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptionError(
            f"{path}: no curve of Dice over steps ({error}); remove the file, or the run's folder "
            "and start the same finetune command"
        ) from error


def mean_curve(curves: Sequence[Curve | None]) -> Curve | None:
    """Mean of curves at the same steps; None if one is missing or has other steps."""
    known = [curve for curve in curves if curve is not None]
    if not known or len(known) < len(curves) or any(c.steps != known[0].steps for c in known):
        return None
    return Curve(known[0].steps, np.mean([curve.dice for curve in known], axis=0).tolist())


@dataclass(frozen=True)
class BudgetReading:
    """What the curves of two arms say of the first, beside the second.

    `gap` is the difference of their ends in points; `speed` how many times fewer steps the first
    needs to come within the margin of the lower end, NaN where the ends are apart (the better one
    passes the other's end early, which is no speed), where a curve has not converged or leaves
    that level again; `p` how often chance would make speeds so unequal, NaN where there is none.
    """

    reading: Reading
    gap: float
    speed: float
    p: float


def read_budget(first: Sequence[Curve], second: Sequence[Curve]) -> BudgetReading:
    """Tells faster from better; see the module for the definitions.

    Args:
        first: curves of an arm, one of each draw, all at the same steps.
        second: of the other arm, the same draws in the same order.
    """
    a, b = mean_curve(first), mean_curve(second)
    if a is None or b is None or len(first) != len(second) or a.steps != b.steps:
        raise ValueError("expected a curve of each arm for each draw, all at the same steps")
    gap = a.end - b.end
    if not (a.converged and b.converged):
        return BudgetReading("not converged", gap, math.nan, math.nan)
    if abs(gap) > MARGIN:
        reading: Reading = "generalises better" if gap > 0 else "generalises worse"
        return BudgetReading(reading, gap, math.nan, math.nan)
    dice = np.array([[curve.dice for curve in arm] for arm in (first, second)], float)
    speeds = _log_speeds(np.asarray(a.steps, float), *_exchanged(dice))
    if not math.isfinite(speeds[0]):
        return BudgetReading("no difference", gap, math.nan, math.nan)
    # Where neither arm comes to the level for good, none is faster.
    unequal = np.nan_to_num(np.abs(speeds), nan=0.0, posinf=math.inf)
    speed, p = math.exp(speeds[0]), float((unequal >= unequal[0] * (1 - 1e-9)).mean())
    reading = "no difference"
    if p < LEVEL and not FASTER < speed < 1 / FASTER:
        reading = "converges faster" if speed > 1 else "converges slower"
    return BudgetReading(reading, gap, speed, p)


def _exchanged(dice: Floats) -> tuple[Floats, Floats]:
    """Mean curves of both arms, [exchanges, measurements]: first as they are, then exchanged.

    The first draw keeps its arms: exchanging all others instead gives the same speed, inverted.

    Args:
        dice: [2 arms, draws, measurements].
    """
    draws = dice.shape[1]
    if draws <= EXCHANGED:
        rest = np.array(list(itertools.product([0.0, 1.0], repeat=draws - 1)))
    else:
        rest = np.random.default_rng(0).integers(0, 2, (2 ** (EXCHANGED - 1), draws - 1))
        rest[0] = 0
    swapped = np.hstack([np.zeros((len(rest), 1)), rest.reshape(len(rest), draws - 1)])
    both = dice.sum(axis=0)
    first = ((1 - swapped) @ dice[0] + swapped @ dice[1]) / draws
    return first, both.sum(axis=0) / draws - first


def _log_speeds(steps: Floats, a: Floats, b: Floats) -> Floats:
    """Log of how many times fewer steps `a` needs than `b`, of pairs of curves.

    Args:
        steps: [measurements].
        a: [pairs, measurements].
        b: likewise.

    Returns:
        [pairs]; infinite where one never comes to the level for good, NaN where neither does.
    """
    last = steps >= LAST * steps[-1]
    level = np.minimum(a[:, last].mean(axis=1), b[:, last].mean(axis=1)) - MARGIN
    with np.errstate(invalid="ignore"):
        return np.asarray(np.log(_steps_to(steps, b, level)) - np.log(_steps_to(steps, a, level)))


def _steps_to(steps: Floats, dice: Floats, level: Floats) -> Floats:
    """The step from which on curves stay at a level or above it, infinite if they never do.

    Between measurements they are straight lines; from the first one back to step 0 they are
    unknown, so the answer is never before the first.

    Args:
        steps: [measurements].
        dice: [..., measurements].
        level: [...].
    """
    below = dice < level[..., None]
    after = dice.shape[-1] - np.argmax(below[..., ::-1], axis=-1)  # the first that stays
    after = np.where(below.any(axis=-1), after, 0)
    ends = len(steps) - 1
    k, before = np.clip(after, 0, ends), np.clip(after - 1, 0, ends)
    low, high = (np.take_along_axis(dice, i[..., None], -1)[..., 0] for i in (before, k))
    share = np.where(high > low, (level - low) / np.where(high > low, high - low, 1), 0)
    found = steps[before] + share * (steps[k] - steps[before])
    return np.where(after == 0, steps[0], np.where(after > ends, math.inf, found))
