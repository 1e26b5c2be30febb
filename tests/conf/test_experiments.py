"""Every recipe composes, fits together, and has its small twin."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from conf.compose import HERE, recipes, settings_for, stages_for
from pretrain.objective import Objective
from pretrain.train import build_objective

FULL, SMALL = recipes(small=False), recipes(small=True)


def test_every_full_recipe_has_a_small_twin() -> None:
    assert sorted(f"{name}_small" for name in FULL) == SMALL


IMAGENET = 1_281_167
NNSSL = {
    "crop_size": (160, 160, 160), "batch_size": 8, "steps": 1000 * 250, "schedule": "poly",
    "augment.gain": 0.0, "flip": (True, True, True), "gpus": 4,
}  # fmt: skip
RESENC = {
    **NNSSL, "optimizer": "sgd", "lr": 1e-2, "momentum": 0.99, "weight_decay": 3e-5, "warmup": 0,
    "clip": 12.0, "objective.block": 16, "objective.mask_ratio": 0.75,
}  # fmt: skip
PYMIC = {
    "crop_size": (64, 128, 128), "optimizer": "adam", "lr": 1e-3, "weight_decay": 1e-5,
    "betas": (0.9, 0.999), "schedule": "halving", "warmup": 0, "augment.gain": 0.0,
    "flip": (True, True, True), "objective.coefficients": 4, "objective.dice_weight": 0.5,
    "objective.entropy_weight": 0.5, "objective.batch_dice": True,
    "backbone.features": [24, 48, 128, 256, 512],
}  # fmt: skip
MAE = {
    "optimizer": "adamw", "weight_decay": 0.05, "betas": (0.9, 0.95), "schedule": "cosine",
    "clip": None, "augment.gain": 0.0, "objective.decoder_dim": 512, "objective.decoder_depth": 8,
    "objective.decoder_heads": 16, "objective.mask_ratio": 0.75, "objective.norm_target": True,
}  # fmt: skip
DINO = {
    "crop_size": (96, 96, 96), "steps": 100 * 1250, "warmup": 10 * 1250, "optimizer": "adamw",
    "weight_decay": 0.04, "weight_decay_end": 0.4, "betas": (0.9, 0.999), "clip": 3.0,
    "objective.prototypes": 65536, "objective.bottleneck_dim": 256, "objective.hidden_dim": 2048,
    "objective.koleo_weight": 0.1, "objective.teacher_temperature": [0.04, 0.07],
    "objective.teacher_warmup": 0.3, "objective.momentum": [0.992, 1.0], "objective.freeze": 0.01,
    "objective.student_temperature": 0.1, "objective.patch_rate": 0.2, "objective.local": 8,
    "objective.layer_decay": 0.9, "objective.mask_share": 0.5,
}  # fmt: skip
STATED: dict[str, dict[str, Any]] = {
    "mae": {
        **MAE, "batch_size": 4096, "lr": 1.5e-4 * 4096 / 256, "gpus": 64,
        "steps": pytest.approx(800 * IMAGENET / 4096, rel=1e-2),
        "warmup": pytest.approx(40 * IMAGENET / 4096, rel=1e-2),
        "backbone.embed_dim": 1024, "backbone.depth": 24, "backbone.num_heads": 16,
    },
    "mae_2d": {**MAE, "batch_size": 512, "lr": 1.5e-4 * 512 / 256},
    "hi_end_mae": {
        "crop_size": (96, 96, 96), "batch_size": 24 * 8 * 4, "gpus": 4, "optimizer": "adamw",
        "lr": 1e-4, "weight_decay": 0.05, "betas": (0.9, 0.95), "schedule": "cosine", "clip": None,
        "steps": pytest.approx(1000 * 10_000 / (24 * 4), rel=1e-2),
        "warmup": pytest.approx(10 * 10_000 / (24 * 4), rel=1e-2),
        "augment.gain": 0.1, "flip": (True, True, True), "objective.decoder_dim": 528,
        "objective.decoder_heads": 16, "objective.self_blocks": 2, "objective.mask_ratio": 0.75,
        "backbone.embed_dim": 1536, "backbone.depth": 12, "backbone.num_heads": 16,
        "backbone.patch_size": 12, "backbone.cls_token": True,
    },
    "cnn_mae": RESENC,
    "s3d": {**RESENC, "objective.norm_target": False, "objective.densify": "conv"},
    "primus_mae": {
        **NNSSL, "optimizer": "adamw", "lr": 3e-4, "weight_decay": 0.05, "betas": (0.9, 0.98),
        "warmup": 50 * 250, "clip": 1.0, "objective.decoder_depth": 2, "objective.drop_path": 0.2,
        "objective.mask_ratio": 0.75, "objective.norm_target": False, "backbone.embed_dim": 864,
        "backbone.depth": 16, "backbone.num_heads": 12, "backbone.patch_size": 8,
        "backbone.drop_path": 0.2, "backbone.layer_scale": 0.1,
    },
    "simmim": {
        "batch_size": 2048, "optimizer": "adamw", "lr": 8e-4, "weight_decay": 0.05,
        "betas": (0.9, 0.999), "schedule": "cosine", "clip": 5.0, "gpus": 16,
        "steps": pytest.approx(800 * IMAGENET / 2048, rel=1e-2),
        "warmup": pytest.approx(20 * IMAGENET / 2048, rel=1e-2),
        "objective.block": 32, "objective.mask_ratio": 0.6, "objective.error": "l1",
        "objective.head": "linear",
    },
    "dino": {
        **DINO, "lr": 4e-3, "batch_size": 1024, "gpus": 16, "objective.ibot_head": "shared",
        "objective.targets": "centring", "objective.mask_ratio": [0.1, 0.5],
    },
    "dino_3dino": {
        **DINO, "lr": pytest.approx(2e-3 * (512 / 1024) ** 0.5, rel=1e-3), "batch_size": 128 * 4,
        "gpus": 4, "objective.ibot_head": "own", "objective.targets": "sinkhorn",
        "objective.mask_ratio": [0.2, 0.75], "objective.area": [0.48, 1.0],
        "objective.length": [0.5, 1.0], "objective.local_area": [0.16, 0.48],
        "objective.local_length": [0.2, 0.5], "objective.local_size": [48, 48, 48],
        "backbone.embed_dim": 1024, "backbone.depth": 24, "backbone.position": "learned",
        "backbone.layer_scale": 1e-5, "backbone.drop_path_rule": "uniform",
    },
    "dino_2d": {
        **DINO, "crop_size": (1, 224, 224), "batch_size": 2048,
        "lr": pytest.approx(1e-3 * (2048 / 1024) ** 0.5, rel=1e-3),
        "objective.mask_ratio": [0.1, 0.5], "objective.area": [0.32, 1.0],
        "objective.local_area": [0.05, 0.32], "objective.local_size": [1, 96, 96],
        "backbone.register_tokens": 4, "backbone.qkv_bias": False,
    },
    "volume_fusion": {
        **PYMIC, "batch_size": 4, "steps": 400_000, "halve_every": 50_000, "gpus": 2,
        "objective.form": "boxes",
    },
    "volume_fusion_b": {
        **PYMIC, "batch_size": 2, "steps": 80_000, "halve_every": 20_000, "gpus": 1,
        "objective.form": "grid",
    },
    "simclr": {
        **{key: value for key, value in NNSSL.items() if key != "augment.gain"},
        "crop_size": (64, 64, 64), "optimizer": "sgd", "lr": 1e-2, "clip": 0.1,
        "objective.form": "nt_xent", "objective.places": 2, "objective.overlap": 0.5,
        "objective.temperature": 0.5, "augment.noise": 0.1, "augment.gamma": 0.3,
    },
    "simclr_ct_fm": {
        "batch_size": 4 * 4, "optimizer": "adamw", "lr": 1e-4, "weight_decay": 1e-6,
        "steps": 500 * 500, "warmup": 10 * 500, "gpus": 4, "objective.form": "within_scan",
        "objective.places": 15, "objective.temperature": 0.1, "objective.hidden_dim": 256,
        "objective.out_dim": 128, "augment.blur": 0.5,
    },
    "voco": {
        "crop_size": (64, 64, 64), "batch_size": 2 * 8, "optimizer": "adamw", "lr": 1e-4,
        "weight_decay": 0.01, "warmup": 5000, "steps": 2_000_000, "clip": None, "gpus": 8,
        "objective.form": "large_scale_medical", "objective.targets": 2,
        "objective.grid": [1, 3, 3], "objective.inter": True, "objective.momentum": 0.9,
        "objective.hidden_dim": 1024,
    },
    "contrastive": {
        "batch_size": 12, "optimizer": "adam", "lr": 1e-3, "steps": 10_000,
        "objective.slabs": 4, "objective.across": True, "objective.temperature": 0.1,
        "objective.hidden_dim": 1024, "objective.out_dim": 128,
    },
}  # fmt: skip
LATER_STAGES: dict[str, list[dict[str, Any]]] = {
    "contrastive": [{"steps": 10_000, "blocks": 3, "region": 3, "slabs": 4, "out_dim": 128}],
    "dino_3dino": [
        {
            "steps": 12_500, "crop_size": (112, 112, 112), "local_size": [64, 64, 64],
            "batch_size": 64 * 4, "lr": pytest.approx(1e-3 * (256 / 1024) ** 0.5),
            "gram_weight": 0.0, "prototypes": 65536, "mask_ratio": [0.2, 0.75],
        }
    ],
    "dino_2d": [
        {
            "gram_weight": 2.0, "gram_refresh": 10_000, "gram_refreshes": 3, "lr": 3e-5,
            "momentum": [0.999, 0.999], "teacher_temperature": [0.07, 0.07],
            "weight_decay": 0.04, "weight_decay_end": None,
        },
        {
            "gram_weight": 1.5, "gram_refreshes": 0, "crop_size": (1, 512, 512),
            "gram_size": [1, 768, 768], "lr": 1.25e-5,
        },
    ],
}  # fmt: skip
WINDOWS = {
    "simclr_ct_fm": (-1024.0, 2048.0, (0.0, 1.0)),
    "voco": (-175.0, 250.0, (0.0, 1.0)),
    "hi_end_mae": (-175.0, 250.0, (0.0, 1.0)),
    "volume_fusion": (-1000.0, 1000.0, (-1.0, 1.0)),
    "volume_fusion_b": (-1000.0, 1000.0, (-1.0, 1.0)),
}


@pytest.mark.parametrize("name", FULL)
def test_a_full_recipe_has_the_numbers_of_its_source(name: str) -> None:
    """Worked out from what is stated: epochs, images, crops of a volume, the rate of a batch."""
    assert name in STATED, "a new recipe states its numbers here too"
    settings = settings_for("pretrain", ["corpus=c", "run=r", f"experiment={name}"])
    found: dict[str, Any] = {"gpus": settings.trainer.devices * settings.trainer.nodes}
    for key in STATED[name]:
        group, _, argument = key.rpartition(".")
        if group:
            part = getattr(settings, group)
            found[key] = part[argument] if isinstance(part, dict) else getattr(part, argument)
        elif key != "gpus":
            found[key] = getattr(settings, key)
    assert {key: found[key] for key in STATED[name]} == STATED[name]
    words = ["corpus=c", "run=r", f"experiment={name}"]
    later = list(stages_for("pretrain", words).values())[1:]
    for stage, stated in zip(later, LATER_STAGES.get(name, []), strict=True):
        found = {**stage.model_dump(), **stage.objective}
        assert {key: found[key] for key in stated} == stated
    if name in WINDOWS:
        rule = settings.intensity.CT
        assert (rule.low, rule.high, rule.onto) == WINDOWS[name]


@pytest.mark.parametrize("name", FULL + SMALL)
def test_a_recipe_fits_together(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings, backbone, objective and crop: a step without memory, as before a run."""
    stages = stages_for("pretrain", ["corpus=c", "run=r", f"experiment={name}"]).values()
    for settings in stages:
        assert settings.warmup < settings.steps
        if name.endswith("_small"):
            assert settings.trainer.accelerator == "cpu"
    if name.endswith("_small"):
        assert sum(settings.steps for settings in stages) <= 500
    # Weights of the full ones are not wanted here.
    import torch

    from pretrain import train

    real = train.build

    def light(*args: object, **given: object) -> object:
        with torch.device("meta"):
            return real(*args, **given)

    monkeypatch.setattr(train, "build", light)
    for settings in stages:
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
