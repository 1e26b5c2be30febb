import math

import numpy as np
import pytest
from scipy import stats

from finetune.intervals import estimate


def test_one_varying_side_gives_students_interval() -> None:
    """Where draws are identical the interval is that of a t-test over units, and the reverse."""
    x = np.random.default_rng(0).normal(size=12)
    t = stats.ttest_1samp(x, 0).confidence_interval(0.95)
    found = estimate(np.repeat(x[:, None], 4, axis=1))
    assert (found.low, found.high) == pytest.approx((t.low, t.high))
    found = estimate(np.repeat(x[None, :], 9, axis=0))
    assert (found.low, found.high) == pytest.approx((t.low, t.high))


def test_interval_moves_and_scales_with_the_scores() -> None:
    x = np.random.default_rng(1).normal(size=(20, 5))
    a, b = estimate(x), estimate(3 * x + 10)
    assert (b.mean, b.low, b.high) == pytest.approx(
        (3 * a.mean + 10, 3 * a.low + 10, 3 * a.high + 10)
    )


def test_too_few_draws_or_subjects_have_no_interval() -> None:
    for shape, word in [((20, 2), "seeds"), ((20, 1), "seeds"), ((4, 5), "subjects")]:
        found = estimate(np.random.default_rng(2).normal(size=shape))
        assert math.isnan(found.low) and not found.has_interval
        assert word in found.note
    assert math.isnan(estimate(np.empty((0, 3))).mean)


def test_constant_scores_have_an_interval_of_no_width() -> None:
    found = estimate(np.full((6, 3), 2.0))
    assert (found.low, found.mean, found.high) == (2, 2, 2)


@pytest.mark.parametrize("draws", [3, 8])
@pytest.mark.parametrize("draw_sd", [1 / 3, 1.5])
def test_a_true_zero_is_missed_as_often_as_promised(draws: int, draw_sd: float) -> None:
    """A/A: both arms are the same, so 95 % intervals miss zero in about 5 % of the studies."""
    rng = np.random.default_rng(draws)
    studies, units = 1500, 30
    missed = 0
    for _ in range(studies):
        scores = rng.normal(size=(units, 1)) + draw_sd * rng.normal(size=(1, draws))
        found = estimate(scores + rng.normal(size=(units, draws)))
        missed += not found.low <= 0 <= found.high
    # Two binomial standard errors (0.55 %) around 3.0 to 6.5 %.
    assert 0.02 < missed / studies < 0.076


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
