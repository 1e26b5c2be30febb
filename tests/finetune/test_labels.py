import itertools

import pytest

from data_prep.errors import InputError
from finetune.labels import choose_labels, count_labels

KEYS = [f"case{i:02d}" for i in range(30)]
SUBJECTS = [f"s{i // 2:02d}" for i in range(30)]


def test_smaller_subsets_lie_in_larger_ones() -> None:
    for seed in range(5):
        chosen = [choose_labels(KEYS, SUBJECTS, n, seed) for n in ("2", "10%", "16", "50%", "all")]
        assert [len(c) for c in chosen] == [2, 3, 16, 15, 30]
        for small, large in itertools.pairwise(sorted(chosen, key=len)):
            assert large[: len(small)] == small


def test_subjects_stay_together() -> None:
    chosen = choose_labels(KEYS, SUBJECTS, "8", 3)
    assert len({SUBJECTS[KEYS.index(key)] for key in chosen}) == 4


def test_draws_depend_on_the_seed_and_not_on_the_order() -> None:
    draws = [tuple(choose_labels(KEYS, SUBJECTS, "4", seed)) for seed in range(20)]
    assert len(set(draws)) > 15
    assert tuple(choose_labels(KEYS[::-1], SUBJECTS[::-1], "4", 0)) == draws[0]


def test_a_new_case_leaves_the_others_order() -> None:
    before = choose_labels(KEYS, SUBJECTS, "all", 7)
    after = choose_labels([*KEYS, "new"], [*SUBJECTS, "s99"], "all", 7)
    assert [key for key in after if key != "new"] == before


def test_more_labels_than_there_are_cases_are_refused() -> None:
    assert count_labels("30", 30) == 30
    with pytest.raises(InputError, match=r"labels=31: .* ask for at most 30"):
        count_labels("31", 30)


def test_shares_round_up_and_have_no_float_noise() -> None:
    assert count_labels("10%", 30) == 3
    assert count_labels("1%", 30) == count_labels("0.0000001%", 30) == 1
    assert count_labels("100%", 30) == 30
    assert count_labels("7.5%", 40) == 3
    with pytest.raises(InputError, match="no case"):
        count_labels("all", 0)
