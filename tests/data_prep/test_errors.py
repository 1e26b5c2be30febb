"""Messages: what differs, what was meant, and all problems of a command together."""

from __future__ import annotations

import pytest

from data_prep.errors import (
    CorruptionError,
    attempt,
    config_text,
    differences,
    near,
    some,
)


def test_of_many_names_the_first_are_told_and_that_there_are_more() -> None:
    assert some([]) == "" and some("ab") == "a, b" and some("abcde") == "a, b, c, d, e"
    assert some("abcdef") == "a, b, c, d, e, ..." and some([3, 1, 2], 2) == "3, 1, ..."


def test_differences_name_the_innermost_keys_alone() -> None:
    before = {
        "lr": 0.001,
        "crop_size": [32, 32, 32],
        "objective": {"_target_": "a.MAE", "ratio": 0.5, "deep": {"x": None, "y": 1}},
        "rules": [{"op": "pad", "n": 1}, {"op": "cut", "n": 2}],
        "empty": {},
        "same": {"a": 1},
    }
    now = {
        "lr": 0.001,
        "crop_size": [32, 48, 32],
        "objective": {"_target_": "a.MAE", "ratio": 0.75, "deep": {"x": True, "y": 1}},
        "rules": [{"op": "pad", "n": 1}, {"op": "cut", "n": 3}],
        "empty": {"new": "x"},
        "same": {"a": 1},
    }
    assert differences(before, before) == []
    assert differences(before, now) == [
        "crop_size: [32,32,32] -> [32,48,32]",
        "objective.ratio: 0.5 -> 0.75",
        "objective.deep.x: null -> true",
        "rules.1.n: 2 -> 3",
        "empty: {} -> not set",
        "empty.new: not set -> x",
    ]


def test_arguments_of_another_class_are_not_compared() -> None:
    before = {"objective": {"_target_": "a.MAE", "ratio": 0.5}, "objective_weight": 1}
    now = {"objective": {"_target_": "a.SimMIM", "block": 32}, "objective_weight": 2}
    assert differences(before, now) == [
        "objective._target_: a.MAE -> a.SimMIM",
        "objective_weight: 1 -> 2",
    ]


def test_values_are_shown_as_they_are_typed() -> None:
    value = {"a": [1, 2.5, "x"], "b": None, "c": {"d": False}}
    assert config_text(value) == "{a: [1,2.5,x], b: null, c: {d: false}}"


def test_wrong_input_joins_what_else_is_wrong() -> None:
    def work(x: int, *, y: int) -> int:
        if x > y:
            raise CorruptionError(["first", "second"])
        return x + y

    problems = ["before"]
    assert attempt(problems, work, 1, y=2) == 3
    assert attempt(problems, work, 3, y=2) is None
    assert problems == ["before", "first", "second"]


def test_other_errors_are_not_taken_for_wrong_input() -> None:
    def broken() -> None:
        raise OSError("disk full")

    problems: list[str] = []
    with pytest.raises(OSError, match="disk full"):
        attempt(problems, broken)
    assert problems == []


def test_a_hint_names_one_or_all() -> None:
    assert near("stepz", ["steps", "lr"]) == "did you mean steps?"
    assert near("depth", ["backbone.depth", "lr"]) == "did you mean backbone.depth?"
    assert near("zzz", ["steps", "lr"]) == "known: lr, steps"
    assert near("zzz", ["steps", "lr"], "--help lists them") == "--help lists them"
