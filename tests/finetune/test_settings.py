from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from pydantic import ValidationError

from finetune.settings import FinetuneSettings, choose_task, config_hash

CONF = Path(__file__).parents[2] / "conf"
TASKS = sorted((CONF / "task").glob("*.yaml"))


def settings(**changes: Any) -> FinetuneSettings:
    task = OmegaConf.to_container(OmegaConf.load(CONF / "task/hippocampus.yaml"))
    given = {"task": task, "corpus": "c", "ckpt": "rel/mae v1", "steps": 10, "batch_size": 2}
    return FinetuneSettings.model_validate({**given, "lr": 1e-3, **changes})


@pytest.mark.parametrize("path", TASKS, ids=lambda path: path.stem)
def test_every_task_file_is_valid_and_carries_its_name(path: Path) -> None:
    task = choose_task(OmegaConf.to_container(OmegaConf.load(path)))
    assert task.name == path.stem


WRONG = ["0", "-1", "0%", "101%", "half", "1.5", "1e3", "%", "", " 4", "4 %", "+4", "-3%", "ten%"]


@pytest.mark.parametrize("labels", WRONG)
def test_labels_that_make_no_sense_are_refused(labels: str) -> None:
    with pytest.raises(ValidationError, match="a number of cases such as 16"):
        settings(labels=labels)


def test_labels_may_come_as_a_number() -> None:
    assert settings(labels=16).labels == "16"
    assert settings(labels="2.5%").labels == "2.5%"


def test_run_names_tell_the_arms_apart() -> None:
    names = {
        settings(init=init, labels=labels, seed=seed).run_name
        for init in ("pretrained", "scratch")
        for labels in (4, "10%", "all")
        for seed in (0, 1)
    }
    assert len(names) == 12
    # A derived name is one that could have been given.
    assert all(settings(run=name).run_name == name for name in names)


def test_twins_share_a_recipe_and_nothing_else_does() -> None:
    base = config_hash(settings().recipe(network="n"))
    for same in (
        {"init": "scratch"},
        {"seed": 3},
        {"label_seed": 4},
        {"ckpt": "other"},
        {"run": "x"},
        {"log_every": 3},
        {"trainer": {"accelerator": "cpu", "devices": 2, "nodes": 1, "workers": 7, "threads": 3}},
        {"trainer": {"compile": True, "checkpointing": True}},
        {"trainer": {"precision": "auto"}},
    ):
        assert config_hash(settings(**same).recipe(network="n")) == base
    for other in (
        {"lr": 2e-3},
        {"steps": 11},
        {"labels": 4},
        {"augment": {"gain": 0.2}},
        {"foreground": 0.4},
        {"trainer": {"precision": "32-true"}},
        {"trainer": {"precision": "bf16-mixed"}},
    ):
        assert config_hash(settings(**other).recipe(network="n")) != base
    assert config_hash(settings().recipe(network="m")) != base
