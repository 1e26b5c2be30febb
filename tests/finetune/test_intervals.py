import importlib.util
import itertools
import json
import math
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from scipy import stats
from seeds import SEED

from finetune.intervals import (
    CHECKPOINT_ONLY,
    SMALLEST_P,
    Estimate,
    crossed_spread,
    estimate,
    estimate_folds,
    estimate_recipe,
    spread,
)

ROOT = Path(__file__).parents[2]


def three_sides(
    rng: np.random.Generator, n: int, sizes: tuple[int, ...], sds: tuple[float, ...]
) -> np.ndarray:
    """Crossed main effects and a rest: [n, *sizes]."""
    scores = sds[-1] * rng.normal(size=(n, *sizes))
    for side, sd in enumerate(sds[:-1]):
        shape = [n] + [size if k == side else 1 for k, size in enumerate(sizes)]
        scores = scores + sd * rng.normal(size=shape)
    return scores


def rejected(scores: np.ndarray, level: float = 0.05) -> float:
    """Share of the tables [n, units, draws] whose interval leaves zero out."""
    found = spread(scores)
    mean = np.abs(scores.mean(axis=(1, 2)))
    return float((mean > found.critical(level) * np.sqrt(found.variance)).mean())


# Closed forms


def test_one_varying_side_gives_students_interval() -> None:
    """Where draws are identical the interval is that of a t-test over units, and the reverse."""
    x = np.random.default_rng(SEED).normal(size=12)
    t = stats.ttest_1samp(x, 0)
    for scores in (np.repeat(x[:, None], 4, axis=1), np.repeat(x[None, :], 9, axis=0)):
        found = estimate(scores)
        ci = t.confidence_interval(0.95)
        assert (found.low, found.high) == pytest.approx((ci.low, ci.high))
        assert found.p == pytest.approx(t.pvalue)


def test_draws_that_vary_little_approach_the_paired_t_test() -> None:
    rng = np.random.default_rng(SEED + 3)
    a, b = rng.normal(size=(2, 20))
    t = stats.ttest_rel(a + 0.5, b)
    for tiny in (1e-3, 1e-6):
        noise = tiny * rng.normal(size=(20, 4))
        found = estimate((a + 0.5 - b)[:, None] + noise)
        assert found.p == pytest.approx(t.pvalue, rel=20 * tiny)
        assert found.df == pytest.approx(19, rel=20 * tiny)


def test_mean_squares_are_those_of_a_two_way_anova_by_hand() -> None:
    """Three draws, five units: sums of squares written out, cell by cell."""
    x = np.array([[1.0, 2, 6], [3, 5, 7], [4, 4, 10], [0, 3, 6], [7, 6, 11]])
    mean = sum(sum(row) for row in x) / 15
    unit = [sum(row) / 3 for row in x]
    draw = [sum(x[u][d] for u in range(5)) / 5 for d in range(3)]
    ms_unit = 3 * sum((m - mean) ** 2 for m in unit) / 4
    ms_draw = 5 * sum((m - mean) ** 2 for m in draw) / 2
    rest = sum((x[u][d] - unit[u] - draw[d] + mean) ** 2 for u in range(5) for d in range(3)) / 8
    assert ms_unit > rest and ms_draw > rest
    found = estimate(x)
    total = ms_draw + ms_unit - rest
    assert found.error**2 == pytest.approx(total / 15)
    assert found.sd_rest**2 == pytest.approx(rest)
    assert found.sd_draws**2 == pytest.approx((ms_draw - rest) / 5)
    assert found.sd_units**2 == pytest.approx((ms_unit - rest) / 3)
    assert found.df == pytest.approx(total**2 / (ms_draw**2 / 2 + (ms_unit - rest) ** 2 / 4))
    # Two degrees of freedom: the weight of Cochran's quantile is the draws' share itself.
    u = ms_draw / total
    cochran = u * stats.t.ppf(0.975, 2) + (1 - u) * stats.t.ppf(0.975, 4)
    wanted = (1 - u) * stats.t.ppf(0.975, found.df) + u * cochran
    assert found.high - found.mean == pytest.approx(wanted * found.error)


def test_interval_moves_and_scales_with_the_scores() -> None:
    x = np.random.default_rng(SEED + 1).normal(size=(20, 5))
    a, b = estimate(x), estimate(3 * x + 10)
    assert (b.mean, b.low, b.high) == pytest.approx(
        (3 * a.mean + 10, 3 * a.low + 10, 3 * a.high + 10)
    )
    assert estimate(3 * x).p == pytest.approx(a.p)


def test_too_few_draws_or_subjects_have_no_interval() -> None:
    for shape, word in [((20, 2), "seeds"), ((20, 1), "seeds"), ((4, 5), "subjects")]:
        found = estimate(np.random.default_rng(SEED + 2).normal(size=shape))
        assert not found.has_interval and word in found.note
        assert all(
            map(math.isnan, (found.low, found.p, found.error, found.power(5), found.detectable()))
        )
    assert math.isnan(estimate(np.empty((0, 3))).mean)


def test_constant_scores_have_an_interval_of_no_width() -> None:
    found = estimate(np.full((6, 3), 2.0))
    assert (found.low, found.mean, found.high, found.p) == (2, 2, 2, SMALLEST_P)
    assert found.power(0.1) == 1 and found.detectable() == 0
    assert estimate(np.zeros((6, 3))).p == 1


def test_intervals_never_explode(seed: int) -> None:
    """Where subjects vary hardly more than the rest, the interval is still Student's at worst."""
    rng = np.random.default_rng(seed)
    for _ in range(400):
        scores = rng.normal(size=(15, 3))
        found = estimate(scores)
        units, draws = scores.shape
        ms_unit = draws * scores.mean(1).var(ddof=1)
        ms_draw = units * scores.mean(0).var(ddof=1)
        largest = 4.303 * np.sqrt((ms_unit + ms_draw) / (units * draws))  # t at 2 df
        assert found.high - found.mean <= largest + 1e-9


# p values


def test_p_is_below_5_percent_exactly_where_the_interval_leaves_zero_out(seed: int) -> None:
    rng = np.random.default_rng(seed)
    sides = [0, 0]
    for _ in range(600):
        units, draws = int(rng.integers(5, 40)), int(rng.integers(3, 13))
        scores = rng.normal(size=(units, 1)) * rng.choice([0, 1, 3])
        scores = scores + rng.normal(size=(1, draws)) * rng.choice([0, 0.3, 2])
        scores = scores + rng.normal(size=(units, draws)) + rng.normal()
        found = estimate(scores)
        excluded = not found.low <= 0 <= found.high
        assert (found.p < 0.05) == excluded
        assert SMALLEST_P <= found.p <= 1
        sides[excluded] += 1
    assert min(sides) > 60


def test_at_p_the_interval_touches_zero(seed: int) -> None:
    """p is the level whose quantile is the t of the mean, and quantiles fall with the level."""
    rng = np.random.default_rng(seed)
    for _ in range(50):
        shape = int(rng.integers(5, 40)), int(rng.integers(3, 13))
        scores = rng.normal(size=shape) + rng.normal(size=shape[1]) + 0.5
        found = estimate(scores)
        s = spread(scores)
        assert s.critical(found.p) * found.error == pytest.approx(abs(found.mean), rel=1e-8)
        quantiles = [float(s.critical(level)) for level in np.logspace(0, -49, 200)]
        assert (np.diff(quantiles) > 0).all() and quantiles[0] == pytest.approx(0, abs=1e-12)


# How often the promise holds

BAND = (0.035, 0.065)
STUDIES = 2000


def band(studies: int) -> tuple[float, float]:
    """What is asked for, with three binomial standard errors of the simulation."""
    low, high = BAND
    return (
        low - 3 * math.sqrt(low * (1 - low) / studies),
        high + 3 * math.sqrt(high * (1 - high) / studies),
    )


CELLS = list(itertools.product((3, 8), (30, 60), (1 / 3, 1.5)))


def tables(draws: int, cases: int, draw_sd: float, seed: int) -> np.ndarray:
    rng = np.random.default_rng([seed, draws, cases])
    return three_sides(rng, STUDIES, (cases, draws), (1.0, draw_sd, 1.0))


@pytest.mark.parametrize(("draws", "cases", "draw_sd"), CELLS)
def test_a_true_zero_is_missed_as_often_as_promised(
    draws: int, cases: int, draw_sd: float, seed: int
) -> None:
    """A/A: both arms are the same, so 95 % intervals miss zero in about 5 % of the studies."""
    low, high = band(STUDIES)
    assert low < rejected(tables(draws, cases, draw_sd, seed)) < high


@pytest.mark.parametrize(("draws", "cases", "draw_sd"), CELLS)
def test_the_simulation_would_see_draws_ignored(
    draws: int, cases: int, draw_sd: float, seed: int
) -> None:
    """The same tables with a t-test over cases, which takes the draws for given."""
    scores = tables(draws, cases, draw_sd, seed)
    t = stats.ttest_1samp(scores.mean(axis=2), 0, axis=1)
    assert (t.pvalue < 0.05).mean() > band(STUDIES)[1]


def test_small_levels_hold_as_well(seed: int) -> None:
    """Holm on five data sets asks for 1 %; with the weight of the 5 % level 2.1 are missed."""
    studies = 40000
    scores = three_sides(np.random.default_rng(seed), studies, (60, 3), (1.0, 0.6, 1.0))
    assert rejected(scores, 0.01) < 0.015 + 3 * math.sqrt(0.015 / studies)


def benchmark() -> ModuleType:
    place = importlib.util.spec_from_file_location("aa_grid", ROOT / "benchmarks/aa_grid.py")
    assert place is not None and place.loader is not None
    module = importlib.util.module_from_spec(place)
    place.loader.exec_module(module)
    return module


def test_the_kept_grid_is_complete_and_keeps_the_promise() -> None:
    made = benchmark()
    kept = json.loads((ROOT / "docs/results/aa_grid.json").read_text())
    assert kept["replications"] >= 20000
    normal = [cell for cell in kept["grid"] if cell["shape"] == "normal"]
    there = {(c["draws"], c["cases"], c["draw_sd"], c["rest_sd"]) for c in normal}
    wanted = itertools.product(
        (3, 5, 8, 12), (10, 30, 60), (0.0, round(1 / 3, 4), 1.5), (0.3, 1.0, 2.0)
    )
    assert there == set(wanted)
    assert made.bounds(kept["grid"]) == []


@pytest.mark.slow
def test_every_cell_of_the_grid(seed: int) -> None:
    made = benchmark()
    cells = list(made.grid(20000, seed + 1, shapes=("normal",), others=False))
    assert len(cells) == 108
    # The highest cell (8 draws, 10 cases, none varies) has 6.26 % in truth.
    assert made.bounds(cells, slack=2 * math.sqrt(0.065 * 0.935 / 20000)) == []


# Power


def test_power_is_that_of_the_t_test_where_only_units_vary() -> None:
    x = np.random.default_rng(SEED + 4).normal(size=16)
    found = estimate(np.repeat(x[:, None], 5, axis=1))
    shift = 0.7 / (x.std(ddof=1) / 4)
    quantile = stats.t.ppf(0.975, 15)
    wanted = stats.nct.sf(quantile, 15, shift) + stats.nct.cdf(-quantile, 15, shift)
    assert found.power(0.7) == found.power(-0.7) == pytest.approx(wanted, abs=1e-4)
    assert found.power(0) == pytest.approx(0.05, abs=1e-4)
    assert found.power(1e4) == pytest.approx(1)


def test_the_detectable_effect_has_the_power_it_is_named_for(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for draws in (3, 5, 12):
        found = estimate(3 * rng.normal(size=(25, draws)) + 2 * rng.normal(size=draws))
        assert found.power(found.detectable()) == pytest.approx(0.8)
        assert found.power(found.detectable(0.5)) == pytest.approx(0.5)


def test_power_foretells_how_often_a_gain_is_found(seed: int) -> None:
    """Where the spread is well known; a handful of draws foretells poorly, and says so."""
    rng = np.random.default_rng(seed)
    scores = three_sides(rng, STUDIES, (60, 40), (3.0, 3.0, 3.0))
    foretold = np.median([estimate(one).power(1.5) for one in scores[:100]])
    assert rejected(scores + 1.5) == pytest.approx(foretold, abs=0.06)


# Pretraining seeds


def test_one_pretraining_seed_speaks_for_one_checkpoint() -> None:
    x = np.random.default_rng(SEED + 5).normal(size=(1, 12, 4))
    found = estimate_recipe(x, "shared")
    assert found == estimate(x[0])
    assert found.claim == CHECKPOINT_ONLY


def test_two_pretraining_seeds_have_no_interval() -> None:
    found = estimate_recipe(np.random.default_rng(SEED + 6).normal(size=(2, 12, 4)), "own")
    assert not found.has_interval and "3 pretraining seeds" in found.note
    assert found.pretrainings == 2 and "recipe" in found.claim


def test_own_draws_are_nested_in_pretraining_seeds() -> None:
    x = np.random.default_rng(SEED + 7).normal(size=(4, 12, 2))
    found, plain = estimate_recipe(x, "own"), estimate(x.mean(axis=2).T)
    assert (found.low, found.high, found.p) == pytest.approx((plain.low, plain.high, plain.p))
    assert (found.pretrainings, found.draws) == (4, 2)
    assert "seeds" in estimate_recipe(x, "shared").note


def test_shared_draws_are_a_side_of_their_own() -> None:
    x = np.random.default_rng(SEED + 11).normal(size=(4, 12, 5)) + np.arange(5)
    found = estimate_recipe(x, "shared")
    assert found.error**2 == pytest.approx(float(crossed_spread(x).variance))
    assert found.error > 2 * estimate_recipe(x, "own").error
    assert (found.p < 0.05) != (found.low <= 0 <= found.high)


def test_crossed_mean_squares_by_hand() -> None:
    """Each effect from its definition, loops over cells; sides of 3 x 5 x 4."""
    x = np.random.default_rng(SEED + 8).normal(size=(3, 5, 4))
    x += 2 * np.arange(3)[:, None, None] + np.arange(5)[:, None] + 3 * np.arange(4)
    cells = list(itertools.product(range(3), range(5), range(4)))

    def over(*fixed: int | None) -> float:
        return float(
            np.mean(
                [
                    x[cell]
                    for cell in cells
                    if all(f in (None, c) for f, c in zip(fixed, cell, strict=True))
                ]
            )
        )

    n = None
    p = sum((over(i, n, n) - over(n, n, n)) ** 2 for i, _, _ in cells) / 2
    s = sum((over(n, n, k) - over(n, n, n)) ** 2 for _, _, k in cells) / 3
    u = sum((over(n, j, n) - over(n, n, n)) ** 2 for _, j, _ in cells) / 4
    ps = sum(
        (over(i, n, k) - over(i, n, n) - over(n, n, k) + over(n, n, n)) ** 2 for i, _, k in cells
    ) / (2 * 3)
    pu = sum(
        (over(i, j, n) - over(i, n, n) - over(n, j, n) + over(n, n, n)) ** 2 for i, j, _ in cells
    ) / (2 * 4)
    su = sum(
        (over(n, j, k) - over(n, j, n) - over(n, n, k) + over(n, n, n)) ** 2 for _, j, k in cells
    ) / (3 * 4)
    psu = sum(
        (
            x[i, j, k]
            - over(i, j, n) - over(i, n, k) - over(n, j, k)
            + over(i, n, n) + over(n, j, n) + over(n, n, k)
            - over(n, n, n)
        )
        ** 2
        for i, j, k in cells
    ) / (2 * 3 * 4)  # fmt: skip
    parts = [p, s - ps, u - pu - su + psu]
    assert min(parts) > 0
    found = crossed_spread(x)
    assert float(found.variance) == pytest.approx(sum(parts) / 60)
    assert [float(share) for share in found.shares] == pytest.approx(
        [part / sum(parts) for part in parts]
    )
    assert found.dfs == (2, 3, 4)


def test_draws_that_do_not_vary_leave_two_sides() -> None:
    x = np.random.default_rng(SEED + 9).normal(size=(3, 12)) + np.arange(3)[:, None]
    found = crossed_spread(np.repeat(x[:, :, None], 4, axis=2))
    plain = spread(x.T)
    assert found.variance == pytest.approx(plain.variance)
    assert found.critical() == pytest.approx(float(plain.critical()))


@pytest.mark.parametrize("sizes", [(3, 20, 3), (3, 20, 5), (5, 20, 3)])
def test_shared_draws_must_not_be_taken_for_own(sizes: tuple[int, int, int], seed: int) -> None:
    """A/A over pretraining seeds: the crossed model keeps 5 %, the nested one does not."""
    rng = np.random.default_rng([seed, *sizes])
    scores = three_sides(rng, STUDIES, sizes, (0.3, 1.0, 1.5, 1.0))
    found = crossed_spread(scores)
    mean = np.abs(scores.mean(axis=(1, 2, 3)))
    assert (mean > found.critical() * np.sqrt(found.variance)).mean() < band(STUDIES)[1]
    assert rejected(scores.mean(axis=3).swapaxes(1, 2)) > 2 * band(STUDIES)[1]


def test_estimates_are_plain_numbers() -> None:
    """They are written to JSON."""
    found = estimate(np.random.default_rng(SEED + 10).normal(size=(8, 4)))
    assert isinstance(found, Estimate)
    assert {type(v) for v in vars(found).values()} <= {float, int, str}


def test_folds_are_students_interval_over_their_means() -> None:
    rng = np.random.default_rng(SEED + 3)
    folds = [rng.normal(size=(8, 2)) + 0.5 for _ in range(5)]
    found = estimate_folds(folds, 50)
    means = [fold.mean() for fold in folds]
    low, high = stats.t.interval(0.95, 4, np.mean(means), stats.sem(means))
    assert (found.low, found.high) == pytest.approx((low, high))
    assert found.p == pytest.approx(stats.ttest_1samp(means, 0).pvalue, rel=1e-6)
    assert (found.cases, found.units, found.draws, found.folds) == (50, 40, 2, 5)
    assert not estimate_folds(folds[:2]).has_interval
    assert estimate_folds(folds[:2]).note == "an interval needs 3 folds"
    uneven = estimate_folds([np.full((10, 1), 1.0), np.full((5, 1), 4.0), np.full((5, 1), 4.0)])
    assert uneven.mean == pytest.approx(2.5), "subjects weigh alike, whatever fold they are in"


@pytest.mark.parametrize("draw_sd", [0.0, 0.5, 1.5])
def test_a_true_zero_over_five_folds_of_one_seed(seed: int, draw_sd: float) -> None:
    """Each fold's training moves all of its subjects together; one seed knows it from the folds."""
    rng = np.random.default_rng([seed, int(10 * draw_sd)])
    wrong, tables = 0, 4000
    for _ in range(tables):
        folds = [rng.normal(size=(6, 1)) + draw_sd * rng.normal() for _ in range(5)]
        found = estimate_folds(folds)
        wrong += found.low > 0 or found.high < 0
    assert 0.035 < wrong / tables < 0.065
