"""A recipe with stages: what each is told, by the recipe and by what is typed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from conf.compose import settings_for, stages_for
from conf.help import describe
from data_prep.errors import InputError

NEEDED = ["corpus=.", "run=r", "experiment=contrastive_small"]


def stages(*words: str, command: str = "pretrain") -> dict[str, Any]:
    return stages_for(command, [*NEEDED, *words])


def problems(*words: str) -> list[str]:
    with pytest.raises(InputError) as caught:
        stages(*words)
    return caught.value.problems


def test_a_stage_changes_keys_options_and_their_arguments() -> None:
    found = stages()
    assert list(found) == ["global", "local"]
    one, two = found.values()
    assert (one.run, two.run) == ("r.global", "r.local")
    assert one.objective["_target_"].endswith("GlobalContrast")
    assert two.objective["_target_"].endswith("LocalContrast")
    # Of the recipe for both, of the stage, of the option of the stage.
    assert (two.objective["slabs"], two.objective["blocks"], two.objective["region"]) == (2, 2, 3)
    assert "blocks" not in one.objective
    assert (one.steps, two.steps) == (200, 100)
    assert one.backbone == two.backbone


def test_what_is_typed_wins_in_all_stages_and_what_is_typed_for_one_wins_there() -> None:
    one, two = stages("steps=7", "stages.global.lr=0.5", "backbone=unet_small").values()
    assert (one.steps, two.steps) == (7, 7)
    assert (one.lr, two.lr) == (0.5, 1e-3)
    assert one.backbone == two.backbone and "UNetEncoder" in one.backbone["_target_"]
    one, two = stages("steps=7", "stages.local.steps=9", "stages.local.objective.blocks=1").values()
    assert (one.steps, two.steps, two.objective["blocks"]) == (7, 9, 1)
    one, two = stages("stages.local.objective=contrastive_global").values()
    assert "blocks" in stages()["local"].objective and two.objective["slabs"] == 2


def test_other_commands_take_the_first_stage() -> None:
    for command, words in (("pretrain", NEEDED), ("bench", NEEDED)):
        assert settings_for(command, words).objective["_target_"].endswith("GlobalContrast")


def test_without_stages_there_is_one_without_a_name() -> None:
    (name,) = stages_for("pretrain", ["corpus=.", "run=r"])
    assert name == ""
    assert settings_for("pretrain", ["corpus=.", "run=r"]).run == "r"


def test_problems_of_all_stages_are_told_at_once_with_the_stage() -> None:
    found = problems(
        "lr=20", "stages.local.stps=3", "stages.lokal.steps=3", "stages.local.objective.block=1",
        "stages.global.batch_size=0",
    )  # fmt: skip
    assert "lr=20: must be less than 10" in found  # of both: once, without a name
    text = "\n".join(found)
    assert "stages.lokal.steps=3: no such key; did you mean stages.local.steps?" in text
    assert "local: stages.local.stps=3: no such key; did you mean steps?" in text
    assert "local: objective.block: unknown; did you mean blocks?" in text
    assert "global: batch_size=0: must be" in text
    assert len(found) == 5


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("stages.local.objective=contrastive_globl", "did you mean contrastive_global?"),
        ("stages.local.steps=", "stages.local.steps=: has no value"),
    ],
)
def test_mistakes_within_a_stage_name_the_word(word: str, said: str) -> None:
    assert said in "\n".join(problems(word))


@pytest.mark.parametrize("body", ["stages: 3", "stages: {a b: {}}", "stages: {a: 3}"])
def test_a_users_stages_that_are_none_are_refused(tmp_path: Path, body: str) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(f"# @package _global_\n{body}\n")
    words = ["corpus=.", "run=r", "experiment=mine", "--config-dir", str(tmp_path)]
    with pytest.raises(InputError, match="stages: expected a mapping of names"):
        stages_for("pretrain", words)


def test_help_lists_the_stages() -> None:
    assert "stages.local.objective=contrastive_local" in describe("pretrain", NEEDED)
    assert "stages (" not in describe("pretrain", NEEDED[:2])
