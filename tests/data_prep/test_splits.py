from __future__ import annotations

from pathlib import Path

import pytest

from data_prep.corpus import Corpus, split_hash
from data_prep.errors import InputError
from data_prep.splits import make_split, split_from, write_split

KEYS = [f"k{i:03d}" for i in range(100)]
SUBJECTS = [f"s{i // 4}" for i in range(100)]


def test_subjects_stay_together_and_everyone_is_placed() -> None:
    split = make_split(KEYS, SUBJECTS, seed=1)
    where = {key: part for part, keys in split["parts"].items() for key in keys}
    assert sorted(where) == KEYS
    for subject in set(SUBJECTS):
        assert len({where[k] for k, s in zip(KEYS, SUBJECTS, strict=True) if s == subject}) == 1
    assert [len(split["groups"][p]) for p in ("train", "validation", "test")] == [18, 2, 5]


def test_order_does_not_matter_and_the_seed_does() -> None:
    one = make_split(KEYS, SUBJECTS, seed=1)
    assert make_split(KEYS[::-1], SUBJECTS[::-1], seed=1) == one
    assert make_split(KEYS, SUBJECTS, seed=2)["parts"] != one["parts"]


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_few_subjects_fill_training_first(count: int) -> None:
    split = make_split(KEYS[:count], KEYS[:count])
    sizes = [len(split["parts"][part]) for part in ("train", "validation", "test")]
    assert sum(sizes) == count
    assert sizes[0] >= 1
    assert (sizes[1:] == [1, 1]) == (count >= 3)


def test_fractions_must_make_sense() -> None:
    for fractions in ({"train": 0.5}, {"train": 0.5, "exam": 0.5}, {"train": 2.0, "test": -1.0}):
        with pytest.raises(InputError, match="sum to 1"):
            make_split(KEYS, SUBJECTS, fractions=fractions)


def test_a_subject_in_two_parts_is_refused() -> None:
    with pytest.raises(InputError, match="s0"):
        split_from("official", ["a", "b"], ["s0", "s0"], ["train", "test"])


def test_samples_without_a_part_are_left_out() -> None:
    split = split_from("official", ["a", "b"], ["s0", "s0"], ["train", ""])
    assert split["parts"] == {"train": ["a"], "validation": [], "test": []}


def test_a_written_split_is_verified_on_reading(labelled_corpus: Path, tmp_path: Path) -> None:
    corpus = Corpus.open(labelled_corpus)
    assert corpus.splits == ["official"]
    official = corpus.split("official")
    assert official["hash"] == split_hash(official)
    assert {part: len(keys) for part, keys in official["parts"].items()} == {
        "train": 22,
        "validation": 8,
        "test": 30,
    }
    path = write_split(official, tmp_path)
    assert path.read_bytes() == (labelled_corpus / "splits" / "official.json").read_bytes()
    with pytest.raises(InputError, match="official"):
        corpus.split("other")
