import math

import numpy as np
import pytest

from finetune.comparisons import (
    holm,
    holm_by_family,
    median_difference,
    share_improved,
    suitability,
)


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
