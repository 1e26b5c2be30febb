"""Every preset of conf/backbone and conf/objective builds what it says, without memory."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path

import hydra.utils
import pytest
import torch
from omegaconf import OmegaConf

import conf
from pretrain.backbones.backbone import Backbone
from pretrain.backbones.vit import TokenBackbone
from pretrain.objective import Batch, Objective

CONF = Path(conf.__file__).parent
MILLIONS = {
    "vit_s": 23,
    "vit_b": 88,
    "vit_l": 307,
    "resenc_small": 2.06,
    "vit_ti_2d": 3.57,
    "hi_end_ti": 3.08,
    "primus_ti": 1.60,
    "resenc_l": 90.3,
    "unet_small": 0.88,
    "unet_b": 14.0,
    "hi_end_b": 88,
    "hi_end_l": 343,
    "stunet_small": 0.89,
    "swin_unetr_small": 3.33,
    "swin_unetr_b": 53.2,
    "swin_unetr_l": 212,
    "swin_unetr_h": 847,
    "dinov3_ti_2d": 3.57,
    "dinov3_s_2d": 21.4,
    "dinov3_b_2d": 85.2,
    "primus_s": 26.1,  # 8000 positions among them
    "primus_b": 97.7,
    "primus_m": 151,
    "primus_l": 331,
    "dino_b": 88,
    "dino_l": 307,
    "dino_ti": 2.77,
}


def build(group: str, name: str, **given: object) -> torch.nn.Module:
    with torch.device("meta"):
        return hydra.utils.instantiate(OmegaConf.load(CONF / group / f"{name}.yaml"), **given)


def names(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def some_crop(encoder: Backbone) -> tuple[int, ...]:
    """Two by three cells of the coarsest map, in a slice where nothing else is taken."""
    for counts in ((2, 3, 1), (1, 2, 3)):
        shape = tuple(s * n for s, n in zip(encoder.strides[-1], counts, strict=True))
        with contextlib.suppress(ValueError):
            encoder.grids(shape)
            break
    return shape


@pytest.mark.parametrize("name", names("backbone"))
def test_a_preset_has_the_surface_of_a_backbone(name: str) -> None:
    encoder = build("backbone", name)
    assert isinstance(encoder, Backbone)
    shape = some_crop(encoder)
    maps = encoder(torch.zeros(2, encoder.in_channels, *shape, device="meta"))
    expected = zip(encoder.channels, encoder.grids(shape), strict=True)
    assert [tuple(m.shape) for m in maps] == [(2, c, *grid) for c, grid in expected]
    for grid, stride in zip(encoder.grids(shape), encoder.strides, strict=True):
        assert all(g * s == n for g, s, n in zip(grid, stride, shape, strict=True))
    if name in MILLIONS:
        millions = sum(p.numel() for p in encoder.parameters()) / 1e6
        assert millions == pytest.approx(MILLIONS[name], rel=0.03)


@pytest.mark.parametrize("name", names("backbone"))
def test_every_preset_with_tokens_takes_registers(name: str) -> None:
    if not isinstance(build("backbone", name), TokenBackbone):
        return
    none, four = (build("backbone", name, register_tokens=n) for n in (0, 4))
    assert isinstance(none, TokenBackbone) and isinstance(four, TokenBackbone)
    assert four.prefix_tokens == none.prefix_tokens + 4
    shape = some_crop(four)
    image = torch.zeros(1, four.in_channels, *shape, device="meta")
    assert four.tokens(image).shape[1] == four.prefix_tokens + math.prod(four.grid(shape))
    assert [m.shape for m in four(image)] == [m.shape for m in none(image)]


@pytest.mark.parametrize(
    ("objective", "backbone", "shape"),
    [
        ("mae", "vit_ti", (32, 48, 32)),
        ("mae", "vit_s", (96, 96, 96)),
        ("mae", "vit_b_2d", (1, 224, 224)),
        ("hi_end_mae", "hi_end_b", (96, 96, 96)),
        ("hi_end_mae_l", "hi_end_l", (96, 96, 96)),
        ("mae_primus", "primus_m", (160, 160, 160)),
        ("mae", "dinov3_b_2d", (1, 224, 160)),
        ("simmim", "vit_s", (96, 96, 96)),
        ("simmim", "dinov3_s_2d", (1, 224, 160)),
        ("hi_end_mae", "dinov3_b_2d", (1, 224, 160)),
        ("simmim_primus", "primus_s", (64, 96, 32)),
        ("cnn_mae", "resenc_small", (32, 48, 32)),
        ("cnn_mae", "resenc_l", (160, 160, 160)),
        ("cnn_mae", "unet_b", (128, 128, 128)),
        ("s3d", "resenc_small", (32, 48, 32)),
        ("s3d", "resenc_l", (160, 160, 160)),
        ("s3d", "unet_b", (128, 128, 128)),
        ("s3d", "stunet_b", (128, 128, 128)),
        ("volume_fusion", "stunet_h", (128, 128, 128)),
        ("volume_fusion", "swin_unetr_h", (96, 96, 96)),
    ],
)
def test_presets_fit_together(objective: str, backbone: str, shape: tuple[int, int, int]) -> None:
    built = build("objective", objective, encoder=build("backbone", backbone))
    assert isinstance(built, Objective)
    with torch.device("meta"):
        batch = Batch(
            torch.zeros(2, 1, *shape),
            torch.ones(2, 1, *shape, dtype=torch.bool),
            torch.ones(2, 3),
            torch.zeros(2, dtype=torch.int64),
        )
    assert built(batch, 0.0).loss.shape == ()
