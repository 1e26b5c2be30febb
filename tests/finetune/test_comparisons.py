import math

import numpy as np
import pytest

from finetune.comparisons import (
    holm,
    holm_by_family,
    median_difference,
    p_against_stronger,
    share_improved,
    suitability,
)
from finetune.intervals import estimate


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_holm_is_the_step_down_test(seed: int) -> None:
    """Rejections at any level are those of the procedure as Holm wrote it."""
    rng = np.random.default_rng(seed)
    for _ in range(200):
        p = rng.uniform(size=int(rng.integers(1, 9))) ** 3
        level = rng.uniform(0.01, 0.3)
        rejected = set()
        for rank, k in enumerate(np.argsort(p)):
            if p[k] >= level / (len(p) - rank):
                break
            rejected.add(int(k))
        assert {k for k, value in enumerate(holm(list(p))) if value < level} == rejected


def test_a_comparison_without_p_does_not_count() -> None:
    found = holm([0.02, math.nan, 0.04])
    assert found[0] == pytest.approx(0.04) and math.isnan(found[1]) and found[2] == 0.04


def test_families_are_adjusted_apart() -> None:
    families = [("mae", "4"), ("mae", "all"), ("mae", "4"), ("dino", "4")]
    found = holm_by_family(families, [0.02, 0.02, 0.03, 0.02])
    assert found == pytest.approx([0.04, 0.02, 0.04, 0.02])


def test_families_keep_five_percent(seed: int) -> None:
    rng = np.random.default_rng(seed)
    wrong = [min(holm(list(rng.uniform(size=6)))) < 0.05 for _ in range(4000)]
    assert np.mean(wrong) == pytest.approx(1 - (1 - 0.05 / 6) ** 6, abs=0.011)


def test_cases_count_once_whatever_the_draws() -> None:
    differences = np.array([[3.0, -1.0], [-2.0, -2.0], [1.0, -1.0], [50.0, 60.0]])
    assert share_improved(differences) == pytest.approx(2.5 / 4)
    assert share_improved(differences, higher_is_better=False) == pytest.approx(1.5 / 4)
    assert median_difference(differences) == pytest.approx(0.5)
    assert math.isnan(share_improved(np.empty((0, 3))))
    assert math.isnan(median_difference(np.empty((0, 3))))


def test_suitability_by_hand() -> None:
    # Means 2 and 6: SD 2.83; within: variances 1 and 9: SD 2.24.
    means = np.array([[1.0, 2.0, 3.0], [3.0, 6.0, 9.0]])
    found = suitability(means, cases=40)
    assert found.ratio == pytest.approx(math.sqrt(8 / 5)) and found.flags == ()
    flags = suitability(means - [[0.0], [4.0]], cases=19).flags
    assert len(flags) == 2 and "ratio 0.00" in flags[0] and "19 test cases" in flags[1]


def test_suitability_without_seeds_is_unknown() -> None:
    assert math.isnan(suitability(np.array([[1.0], [2.0]]), 40).ratio)
    assert suitability(np.array([[1.0, 1.0], [2.0, 2.0]]), 40).ratio == math.inf


def test_the_stronger_of_two_equal_scratch_arms_makes_nothing_worse(seed: int) -> None:
    """Three equal arms, 3000 studies of 5 draws: 2.5 % either way, within four standard errors."""
    rng = np.random.default_rng(seed)
    better = worse = plain = 0
    studies, units, draws = 3000, 20, 5
    for _ in range(studies):
        pretrained, twin, own = rng.normal(size=(3, units, draws)) + rng.normal(size=(3, 1, draws))
        scratch = max((twin, own), key=lambda arm: arm.mean())
        found = estimate(pretrained - scratch)
        p = p_against_stronger(found.p, [0.0], loses=found.mean < 0)
        better += p < 0.05 and found.mean > 0
        worse += p < 0.05 and found.mean < 0
        plain += found.p < 0.05 and found.mean < 0
    error = 4 * math.sqrt(0.025 * 0.975 / studies)
    assert better / studies <= 0.025 + error and worse / studies <= 0.025 + error
    assert plain / studies > 0.025 + error / 2  # what picking does if p is taken as it is


def test_p_against_the_stronger_by_hand() -> None:
    assert p_against_stronger(0.03, [0.01], loses=False) == 0.03
    assert p_against_stronger(0.01, [0.03], loses=False) == 0.03
    assert p_against_stronger(0.03, [], loses=False) == 0.03
    assert p_against_stronger(0.03, [0.9], loses=True) == 0.06
    assert p_against_stronger(0.03, [], loses=True) == 0.03
    assert p_against_stronger(0.7, [0.1], loses=True) == 1.0
    assert p_against_stronger(0.03, [math.nan], loses=True) == 0.06
    assert math.isnan(p_against_stronger(math.nan, [0.1], loses=True))
    assert math.isnan(p_against_stronger(0.01, [math.nan], loses=False))


def test_a_gain_over_two_arms_is_not_that_over_the_better_known(seed: int) -> None:
    """No gain over an arm whose draws vary, one over the other: 2.5 % are called a gain at most."""
    rng = np.random.default_rng(seed)
    studies, units, draws = 1000, 20, 5
    better = plain = 0
    for _ in range(studies):
        to_twin, to_own = (
            gain + rng.normal(size=(units, draws)) + rng.normal(scale=sd, size=(1, draws))
            for gain, sd in ((1.0, 0.5), (0.0, 4.0))
        )
        weakest, other = sorted((estimate(to_twin), estimate(to_own)), key=lambda one: one.mean)
        p = p_against_stronger(weakest.p, [other.p], loses=weakest.mean < 0)
        better += p < 0.05 and weakest.mean > 0
        plain += weakest.p < 0.05 and weakest.mean > 0
    error = 4 * math.sqrt(0.025 * 0.975 / studies)
    assert better / studies <= 0.025 + error
    assert plain / studies > 0.025 + error  # what the weakest alone does
