"""Words to settings: all mistakes at once, any path as it is, every shipped group composes."""

from __future__ import annotations

from pathlib import Path

import pytest

from conf.compose import HERE, settings_for
from data_prep.errors import InputError

NEEDED = ["corpus=c", "run=r"]


def problems(command: str, *words: str) -> list[str]:
    with pytest.raises(InputError) as caught:
        settings_for(command, list(words))
    return caught.value.problems


def test_all_mistakes_are_listed_at_once_each_with_a_fix() -> None:
    found = problems(
        "pretrain",
        *NEEDED,
        "stepz=3",
        "batch_size=-1",
        "objective.maskratio=.3",
        "objective.mask_ratio=1.4",
        "backbone=vit_sm",
        "lr=abc",
        "steps",
    )
    text = "\n".join(found)
    assert len(found) == 7
    assert "stepz=3: no such key; did you mean steps?" in text
    assert "batch_size=-1: must be greater than or equal to 1" in text
    assert "objective.maskratio: unknown; did you mean mask_ratio?" in text
    assert "objective.mask_ratio=1.4: must be less than 1" in text
    assert "backbone=vit_sm: no such backbone; did you mean vit_s?" in text
    assert "lr=abc" in text and "steps: expected key=value" in text


def test_missing_keys_are_named() -> None:
    assert problems("pretrain") == [
        "corpus: missing; give corpus=...",
        "run: missing; give run=...",
    ]


def test_a_missing_group_is_named_with_its_options() -> None:
    found = problems("finetune", "corpus=c", "ckpt=r", "stepz=1")
    assert any(p.startswith("task: missing; give task= one of") for p in found)
    assert any(p.startswith("stepz=1: no such key") for p in found)


# Paths that Hydra's grammar rejects or takes apart.
PATHS = [
    "dcm_PE=AP_3",
    "Scan (1)",
    "x-{000..127}.tar",
    "scans, all",
    "Köln/Übersicht",
    "it's",
    'say "aah"',
    "a\\b",
    "ends\\",
    "[1,2]",
    "{a: b}",
    "null",
    "12",
    "$HOME",
    "${oc.env:HOME}",
    "/data/*.nii.gz",
    "~/x",
    "a  b",
    "100%",
    "#1",
    "a;b|c&d",
    r"a\${x}",
    r"\\${x}b",
]


@pytest.mark.parametrize("path", PATHS)
def test_paths_are_taken_as_they_are(path: str) -> None:
    settings = settings_for("prep", [f"input={path}", f"output={path}"])
    assert settings.input == Path(path) and settings.output == Path(path)


def test_an_optional_path_can_be_null() -> None:
    settings = settings_for("prep", ["input=a", "output=null", "salt=null", "name=Scan (1)"])
    assert settings.salt is None and settings.output == Path("null") and settings.name == "Scan (1)"


def test_names_may_hold_what_hydra_would_parse() -> None:
    assert settings_for("pretrain", ["corpus=c", "run=a=b"]).run == "a=b"
    settings = settings_for("finetune", ["corpus=c", "ckpt=r", "task=hippocampus", "labels=16"])
    assert settings.labels == "16"


def test_quoted_paths_lose_their_quotes() -> None:
    assert settings_for("prep", ["input='a b'", 'output="c d"']).input == Path("a b")


@pytest.mark.parametrize("file", sorted((HERE / "backbone").glob("*.yaml")), ids=lambda f: f.stem)
def test_every_backbone_composes(file: Path) -> None:
    settings = settings_for("pretrain", [*NEEDED, f"backbone={file.stem}"])
    assert settings.backbone["_target_"].startswith("pretrain.backbones.")


@pytest.mark.parametrize("file", sorted((HERE / "objective").glob("*.yaml")), ids=lambda f: f.stem)
def test_every_objective_composes(file: Path) -> None:
    settings = settings_for("pretrain", [*NEEDED, f"objective={file.stem}"])
    assert settings.objective["_target_"].startswith("pretrain.objectives.")


@pytest.mark.parametrize("file", sorted((HERE / "trainer").glob("*.yaml")), ids=lambda f: f.stem)
def test_every_trainer_composes(file: Path) -> None:
    settings_for("pretrain", [*NEEDED, f"trainer={file.stem}"])


@pytest.mark.parametrize("file", sorted((HERE / "task").glob("*.yaml")), ids=lambda f: f.stem)
def test_every_task_composes(file: Path) -> None:
    settings_for("finetune", ["corpus=c", "ckpt=r", f"task={file.stem}"])


def test_lists_and_numbers_keep_hydras_grammar() -> None:
    settings = settings_for("pretrain", [*NEEDED, "crop_size=[32,48,32]", "lr=1e-3"])
    assert settings.crop_size == (32, 48, 32) and settings.lr == 1e-3


def test_arguments_that_only_the_signature_knows_are_accepted() -> None:
    settings = settings_for("pretrain", [*NEEDED, "backbone.drop_path=0.1"])
    assert settings.backbone["drop_path"] == 0.1


def test_a_users_own_objective_comes_by_config_dir(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new objective needs no edit: a class, a YAML."""
    (tmp_path / "mine.py").write_text(
        "from typing import Annotated\n"
        "from pydantic import Field\n"
        "from torch import nn\n"
        "class Mine(nn.Module):\n"
        "    def __init__(self, *, encoder: nn.Module, share: Annotated[float, Field(le=1)]):\n"
        "        super().__init__()\n"
    )
    groups = tmp_path / "my grüps 100%"
    (groups / "objective").mkdir(parents=True)
    (groups / "objective" / "mine.yaml").write_text("_target_: mine.Mine\nshare: 0.5")
    monkeypatch.syspath_prepend(str(tmp_path))
    own = ["--config-dir", str(groups), "objective=mine"]
    assert settings_for("pretrain", [*NEEDED, *own]).objective["share"] == 0.5
    assert problems("pretrain", *NEEDED, *own, "objective.share=3") == [
        "objective.share=3: must be less than or equal to 1"
    ]


def test_a_batch_that_does_not_divide_says_why() -> None:
    (found,) = problems("pretrain", *NEEDED, "trainer.devices=3", "batch_size=64")
    assert "must be a multiple of devices x nodes x accumulate = 3" in found
