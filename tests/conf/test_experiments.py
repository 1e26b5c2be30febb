"""Every recipe composes, fits together, and has its small twin."""

from __future__ import annotations

from pathlib import Path

import pytest

from conf.compose import HERE, recipes, settings_for
from pretrain.objective import Objective
from pretrain.train import build_objective

FULL, SMALL = recipes(small=False), recipes(small=True)


def test_every_full_recipe_has_a_small_twin() -> None:
    assert sorted(f"{name}_small" for name in FULL) == SMALL


@pytest.mark.parametrize("name", FULL + SMALL)
def test_a_recipe_fits_together(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings, backbone, objective and crop: a step without memory, as before a run."""
    settings = settings_for("pretrain", ["corpus=c", "run=r", f"experiment={name}"])
    small = name.endswith("_small")
    assert settings.warmup < settings.steps
    if small:
        assert settings.trainer.accelerator == "cpu" and settings.steps <= 500
    # Weights of the full ones are not wanted here.
    import torch

    from pretrain import train

    real = train.build

    def light(*args: object, **given: object) -> object:
        with torch.device("meta"):
            return real(*args, **given)

    monkeypatch.setattr(train, "build", light)
    assert isinstance(build_objective(settings, channels=1), Objective)


def test_what_is_given_beside_a_recipe_wins() -> None:
    words = ["corpus=c", "run=r", "experiment=mae", "backbone=vit_b", "lr=0.5"]
    settings = settings_for("pretrain", words)
    assert settings.lr == 0.5 and settings.backbone["embed_dim"] == 768
    assert settings.weight_decay == 0.05 and settings.objective["decoder_depth"] == 8
    given = ["corpus=c", "run=r", "trainer=cpu", "backbone=vit_s", "batch_size=8"]
    plain = settings_for("pretrain", given)
    for name in FULL + SMALL:  # whole groups too: nothing of the recipe's stays in another option
        chosen = settings_for("pretrain", [*given, f"experiment={name}"])
        assert (chosen.trainer, chosen.backbone) == (plain.trainer, plain.backbone)


def test_a_run_of_before_an_option_had_what_the_command_gives_now() -> None:
    """What conf composes, not the model's defaults, is what a requeued job compares with."""
    now = settings_for("pretrain", ["corpus=c", "run=r"])
    before = now.model_dump(mode="json")
    for added in ("intensity", "optimizer", "momentum", "schedule", "halve_every", "health"):
        del before[added]
    assert now.changed(before) == []


def test_full_recipes_say_where_they_come_from() -> None:
    for name in FULL:
        text = Path(HERE / "experiment" / f"{name}.yaml").read_text()
        assert "arXiv:" in text, name
