"""Means with intervals over cases and draws, both of which vary.

A finetuning score depends on the case that is segmented and on the draw: which labels were
chosen, how the decoder started, in what order crops came. A draw moves all cases together, so the
scores of three seeds on forty cases are not 120 independent numbers, and a bootstrap over cases
or over few seeds promises far too much. Here both are random: score[c, s] = mean + case[c] +
draw[s] + rest[c, s], a two-way layout without replication, whose mean squares give the variance of
the mean (Satterthwaite 1946, Biometrics Bulletin 2:110; the design of multi-reader studies,
Hillis 2007, Statistics in Medicine 26:596). A paired difference has one draw in both arms, so it
is one such table as well.

Variance. The side with fewer levels, mostly the draws, decides and enters with its whole mean
square, rest included; the other adds what it varies beyond the rest:
units * draws * var(mean) = MS_poor + max(MS_rich - MS_rest, 0). Of equals the larger enters whole.

Quantile. Satterthwaite's degrees of freedom are liberal at three draws (up to 8 % false
positives); Cochran's mean of Student quantiles, weighted by the shares of the variance (Cochran
and Cox, Experimental Designs, 1957, section 4.14), is conservative. The quantile lies between
them, `w` of the way to Cochran's, where w = min(2 u / df, 1) with u the share and df the degrees
of freedom of the poorer side: the more the verdict hangs on few draws, the more careful.
Satterthwaite grows more liberal in smaller tails, Cochran's does not; below 5 % w goes to 1 with
the level, which is what Holm's smaller levels need.

What comes of it: docs/results/aa_grid.md, made by benchmarks/aa_grid.py. Why: docs/decisions/0009.

Three things are random in a claim about a recipe: the seed of pretraining, the draw of labels, and
the start and order of finetuning. The last two are drawn together here. One checkpoint says
nothing of the first, and supports a claim about that checkpoint only (`Estimate.claim`); several
are a third random side (`estimate_recipe`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import gammaincinv, ndtr, stdtrit

Floats = NDArray[np.float64]

LEVEL = 0.05
"""Of every test; intervals are 1 - LEVEL."""
MIN_DRAWS = 3
"""Two draws know nothing of how draws vary: one degree of freedom, 10 % false positives."""
MIN_UNITS = 5
MIN_FOLDS = 3
MIN_PRETRAININGS = 3
SMALLEST_P = 1e-50
"""Smaller ones are given as this: no data supports them, and quantiles end somewhere."""

CHECKPOINT_ONLY = "this checkpoint only: one pretraining seed"


@dataclass(frozen=True)
class Spread:
    """The variance of a mean and what is known of it. Shapes are those of the tables, [...].

    `shares` are the parts of the variance by side, the one with the fewest levels first, and
    `dfs` their degrees of freedom.
    """

    variance: Floats
    shares: tuple[Floats, ...]
    dfs: tuple[int, ...]

    @property
    def df(self) -> Floats:
        """Satterthwaite's degrees of freedom, between those of the poorest side and all."""
        return np.asarray(1 / sum(u**2 / df for u, df in zip(self.shares, self.dfs, strict=True)))

    def critical(self, level: float = LEVEL) -> Floats:
        """How many standard errors a mean must lie from the truth to be called different."""
        tail = level / 2
        satterthwaite = -stdtrit(np.maximum(self.df, self.dfs[0]), tail)
        cochran = -sum(u * stdtrit(df, tail) for u, df in zip(self.shares, self.dfs, strict=True))
        w = np.minimum(2 * self.shares[0] / self.dfs[0], 1)
        w = 1 - (1 - w) * min(level / LEVEL, 1)
        return (1 - w) * satterthwaite + w * cochran


@dataclass(frozen=True)
class Estimate:
    """A mean with what it rests on.

    `low` and `high` bound the 95 % interval and `p` tests a mean of zero by the same rule, so it
    is below 0.05 exactly where the interval leaves zero out. They are NaN, as is all that follows
    from them, and `note` says why, where there are too few draws or subjects. `cases` counts
    cases, `units` the subjects they come from, `draws` the finetuning draws (of one checkpoint,
    if there are several), `pretrainings` the pretraining seeds, `folds` those of a
    cross-validation, each with `draws` of its own. `error` is the standard error with
    `df` degrees of freedom, `critical` the half-width in standard errors. `sd_units`, `sd_draws`
    and `sd_rest` are the standard deviations of the model's parts.
    """

    mean: float
    low: float
    high: float
    cases: int
    units: int
    draws: int
    note: str = ""
    p: float = math.nan
    error: float = math.nan
    df: float = math.nan
    critical: float = math.nan
    sd_units: float = math.nan
    sd_draws: float = math.nan
    sd_rest: float = math.nan
    pretrainings: int = 1
    folds: int = 1

    @property
    def has_interval(self) -> bool:
        """Whether the data allow an interval."""
        return not math.isnan(self.low)

    @property
    def claim(self) -> str:
        """What a difference may be said of."""
        if self.pretrainings == 1:
            return CHECKPOINT_ONLY
        return f"the recipe, over {self.pretrainings} pretraining seeds"

    def power(self, difference: float) -> float:
        """The chance that such a study finds a true difference, from what it saw vary.

        Non-central t with the interval's standard error, quantile and degrees of freedom. With
        few draws the standard error itself is poorly known, and with it this number.
        """
        if not self.has_interval:
            return math.nan
        if self.error == 0:
            return float(difference != 0)
        return _power(abs(difference) / self.error, self.df, self.critical)

    def detectable(self, power: float = 0.8) -> float:
        """The smallest true difference that such a study finds with this power."""
        if not self.has_interval:
            return math.nan
        if self.error == 0:
            return 0.0
        low, high = 0.0, self.critical + 40.0  # 40 standard errors beyond any quantile
        found = brentq(lambda d: _power(d, self.df, self.critical) - power, low, high)
        return float(found * self.error)


def estimate(scores: Floats, cases: int | None = None) -> Estimate:
    """Mean, 95 % interval and p of a complete table of scores or paired differences.

    Args:
        scores: [units, draws], no NaN; a unit is a subject, with the mean over its cases.
        cases: how many cases the units hold; the number of units by default.
    """
    units, draws = scores.shape
    cases = units if cases is None else cases
    if units == 0 or draws == 0:
        return without_interval(math.nan, cases, units, draws, "no scored case")
    mean = float(scores.mean())
    note = _too_few(units, draws)
    if note:
        return without_interval(mean, cases, units, draws, note)
    return _with_interval(mean, spread(scores), _deviations(scores), (cases, units, draws, 1))


def estimate_folds(folds: Sequence[Floats], cases: int | None = None) -> Estimate:
    """The same over the folds of a cross-validation, each trained by itself and scored on its own.

    A subject is in one fold alone, so folds are no draws of the same table. How their means vary
    holds subjects, label draws and starts together: Student's interval over them, of the mean over
    all subjects. Two folds share most of their training cases, which no estimate of the variance
    from one cross-validation can see (Bengio and Grandvalet 2004, JMLR 5:1089): it is a little too
    narrow for a claim about other training sets, and right for these.

    Args:
        folds: [units of the fold, draws] each, no NaN.
        cases: how many cases the units hold; the number of units by default.
    """
    sizes = np.array([len(fold) for fold in folds])
    units, draws = int(sizes.sum()), min(fold.shape[1] for fold in folds)
    cases = units if cases is None else cases
    if 0 in sizes or draws == 0:
        return without_interval(math.nan, cases, units, draws, "a fold has no scored case")
    means, shares = np.array([fold.mean() for fold in folds]), sizes / units
    mean, k = float(shares @ means), len(folds)
    note = "" if k >= MIN_FOLDS else f"an interval needs {MIN_FOLDS} folds"
    note = note or _too_few(units, MIN_DRAWS)
    if note:
        return replace(without_interval(mean, cases, units, draws, note), folds=k)
    variance = k / (k - 1) * np.sum((shares * (means - mean)) ** 2)
    found = Spread(np.asarray(variance), (np.ones(()),), (k - 1,))
    nothing = (math.nan, math.nan, math.nan)
    return replace(_with_interval(mean, found, nothing, (cases, units, draws, 1)), folds=k)


def estimate_recipe(
    scores: Floats, draws: Literal["shared", "own"], cases: int | None = None
) -> Estimate:
    """The same over several checkpoints of one recipe, whose pretraining seeds are random too.

    Where each checkpoint has its own draws (and its own scratch runs with them), draws are nested
    in pretraining seeds: how the checkpoints' means vary holds both, and the model is that of
    `estimate` with checkpoints in place of draws. Where all checkpoints share the draws, as in a
    sweep `ckpt=a,b,c seed=0,1,2` with one scratch run per seed, draws are a third crossed side.

    Args:
        scores: [pretraining seeds, units, draws], no NaN.
        draws: whether checkpoints share them (draw k of one is draw k of all) or have their own.
        cases: how many cases the units hold; the number of units by default.

    Returns:
        An estimate whose `sd_draws` is that of the checkpoints' means.
    """
    pretrainings, units, n_draws = scores.shape
    cases = units if cases is None else cases
    if pretrainings == 1:
        return estimate(scores[0], cases)
    if 0 in scores.shape:
        return without_interval(math.nan, cases, units, n_draws, "no scored case", pretrainings)
    mean = float(scores.mean())
    # Own draws need not be many: how the checkpoints' means vary holds them.
    note = _too_few(units, n_draws if draws == "shared" else MIN_DRAWS)
    if pretrainings < MIN_PRETRAININGS:
        note = (
            f"a recipe needs {MIN_PRETRAININGS} pretraining seeds for an interval; "
            "each checkpoint has its own"
        )
    if note:
        return without_interval(mean, cases, units, n_draws, note, pretrainings)
    by_checkpoint = scores.mean(axis=2).T  # [units, pretraining seeds]
    found = spread(by_checkpoint) if draws == "own" else crossed_spread(scores)
    deviations = _deviations(by_checkpoint)
    return _with_interval(mean, found, deviations, (cases, units, n_draws, pretrainings))


def spread(scores: Floats) -> Spread:
    """The variance of the mean of each table.

    Args:
        scores: [..., units, draws].
    """
    units, draws = scores.shape[-2:]
    ms_unit, ms_draw, ms_rest = _mean_squares(scores)
    if draws <= units:
        parts = _whole_and_extra(ms_draw, ms_unit, ms_rest, equal=draws == units)
        return _joined(parts, (draws - 1, units - 1), units * draws)
    parts = _whole_and_extra(ms_unit, ms_draw, ms_rest, equal=False)
    return _joined(parts, (units - 1, draws - 1), units * draws)


def crossed_spread(scores: Floats) -> Spread:
    """The same for tables of three crossed random sides.

    The variance of the mean holds MS_a + MS_b + MS_c - MS_ab - MS_ac - MS_bc + MS_abc. As with two
    sides, the poorest enters whole; the second adds what it varies beyond its part in common with
    the first, the third what it varies beyond both.

    Args:
        scores: [..., pretraining seeds, units, draws].
    """
    sizes = scores.shape[-3:]
    order = sorted(range(3), key=lambda side: sizes[side])
    a, b, c = (scores.ndim - 3 + side for side in order)
    main = {side: _effect(scores, [side]) for side in (a, b, c)}
    pair = {sides: _effect(scores, sides) for sides in ((a, b), (a, c), (b, c))}
    rest = _effect(scores, (a, b, c))
    equal = sizes[order[0]] == sizes[order[1]]
    first, second = _whole_and_extra(main[a], main[b], pair[a, b], equal=equal)
    third = np.maximum(main[c] - pair[a, c] - pair[b, c] + rest, 0)
    dfs = tuple(sizes[side] - 1 for side in order)
    return _joined((first, second, third), dfs, math.prod(sizes))


def _whole_and_extra(
    poor: Floats, rich: Floats, shared: Floats, *, equal: bool
) -> tuple[Floats, Floats]:
    """The mean square that enters whole, and what the other adds beyond what both share.

    Of two sides with equally many levels the one that varies more is taken for the poorer.
    """
    if equal:
        poor, rich = np.maximum(poor, rich), np.minimum(poor, rich)
    return poor, np.maximum(rich - shared, 0)


def _joined(parts: Sequence[Floats], dfs: tuple[int, ...], count: int) -> Spread:
    total = np.asarray(sum(parts))
    # A table without any variance: as if all of it came from the poorest side.
    nothing = total == 0
    safe = np.where(nothing, 1, total)
    shares = [np.where(nothing, float(k == 0), part / safe) for k, part in enumerate(parts)]
    return Spread(total / count, tuple(shares), dfs)


def _effect(scores: Floats, sides: Sequence[int]) -> Floats:
    """The mean square of an effect or an interaction in a complete layout.

    Args:
        scores: [..., A, B, C], one score in each cell.
        sides: the axes of the effect.
    """
    axes = tuple(range(scores.ndim - 3, scores.ndim))
    found = scores.mean(axis=tuple(set(axes) - set(sides)), keepdims=True)
    for side in sides:
        found = found - found.mean(axis=side, keepdims=True)
    df = math.prod(scores.shape[side] - 1 for side in sides)
    repeats = math.prod(scores.shape[axis] for axis in axes if axis not in sides)
    return np.asarray(repeats * (found**2).sum(axis=axes) / df)


def _mean_squares(scores: Floats) -> tuple[Floats, Floats, Floats]:
    """Of units, draws and the rest, [...]."""
    table = scores[..., None]  # a third side of one level
    unit, draw = scores.ndim - 2, scores.ndim - 1
    return _effect(table, [unit]), _effect(table, [draw]), _effect(table, [unit, draw])


def _deviations(scores: Floats) -> tuple[float, float, float]:
    """Standard deviations of units, draws and the rest: none is below zero."""
    units, draws = scores.shape
    ms_unit, ms_draw, ms_rest = (float(ms) for ms in _mean_squares(scores))
    return (
        math.sqrt(max(ms_unit - ms_rest, 0) / draws),
        math.sqrt(max(ms_draw - ms_rest, 0) / units),
        math.sqrt(ms_rest),
    )


def _too_few(units: int, draws: int) -> str:
    if draws < MIN_DRAWS:
        return f"an interval needs {MIN_DRAWS} seeds"
    return f"an interval needs {MIN_UNITS} subjects" if units < MIN_UNITS else ""


def without_interval(
    mean: float, cases: int, units: int, draws: int, note: str, pretrainings: int = 1
) -> Estimate:
    """A mean alone; `note` says why."""
    return Estimate(mean, math.nan, math.nan, cases, units, draws, note, pretrainings=pretrainings)


def _with_interval(
    mean: float,
    found: Spread,
    deviations: tuple[float, float, float],
    counts: tuple[int, int, int, int],
) -> Estimate:
    cases, units, draws, pretrainings = counts
    error, critical = math.sqrt(found.variance), float(found.critical())
    half = critical * error
    return Estimate(
        mean,
        mean - half,
        mean + half,
        cases,
        units,
        draws,
        "",
        _p_value(mean, error, found),
        error,
        float(found.df),
        critical,
        *deviations,
        pretrainings,
    )


def _p_value(mean: float, error: float, found: Spread) -> float:
    """The level at which the interval just touches zero."""
    if mean == 0:
        return 1.0
    t = abs(mean) / error if error else math.inf
    if t >= float(found.critical(SMALLEST_P)):
        return SMALLEST_P

    def beyond(log_level: float) -> float:
        return float(found.critical(math.exp(log_level))) - t

    return math.exp(brentq(beyond, math.log(SMALLEST_P), 0, xtol=1e-13))


def _power(shift: float, df: float, critical: float) -> float:
    """Chance that a non-central t lies outside -critical to critical.

    The mean over equally likely values of the standard error; library routines for the
    distribution give NaN for large shifts.
    """
    chances = (np.arange(4000) + 0.5) / 4000
    error = np.sqrt(2 / df * gammaincinv(df / 2, chances))  # of a chi with df, over its truth
    return float((ndtr(shift - critical * error) + ndtr(-shift - critical * error)).mean())


NOTHING = estimate(np.empty((0, 0)), 0)
"""What is known where every case had to be left out."""
