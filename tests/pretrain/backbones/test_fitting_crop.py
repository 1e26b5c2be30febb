"""Crops that messages advise: they fit."""

from __future__ import annotations

import random
import re

import pytest

from pretrain.backbones.backbone import Backbone, fitting_crop
from pretrain.backbones.pct_net import PCTNetEncoder
from pretrain.backbones.resenc import ResEncUNetEncoder
from pretrain.backbones.slice_vit import SliceViT
from pretrain.backbones.swin_unetr import SwinUNETREncoder
from pretrain.backbones.vit import ViT3D


def test_advice_fits_and_is_near(seed: int) -> None:
    draw = random.Random(seed)
    for _ in range(300):
        unit = [draw.choice([1, 2, 4, 6, 8, 16]) for _ in range(3)]
        size = [draw.randint(1, 100) for _ in range(3)]
        found = fitting_crop(size, unit)
        assert all(f % u == 0 for f, u in zip(found, unit, strict=True))
        if sorted(found) != sorted(size) and found != [2 * u if u > 1 else 1 for u in unit]:
            assert all(
                abs(f - s) <= max(u / 2, u - s) for f, s, u in zip(found, size, unit, strict=True)
            )


@pytest.mark.parametrize(
    ("size", "unit", "advice"),
    [
        ((64, 64, 1), (1, 8, 8), [1, 64, 64]),
        ((224, 1, 224), (1, 16, 16), [1, 224, 224]),
        ((96, 90, 96), (16, 16, 16), [96, 96, 96]),
        ((32, 48, 8), (8, 16, 16), [8, 32, 48]),
        ((64, 60, 1), (1, 8, 8), [64, 64, 8]),
        ((20, 30, 30), (32, 32, 32), [64, 64, 64]),
        ((1, 5, 5), (1, 8, 8), [1, 16, 16]),
    ],
)
def test_sides_are_exchanged_or_rounded(
    size: tuple[int, int, int], unit: tuple[int, int, int], advice: list[int]
) -> None:
    assert fitting_crop(size, unit) == advice


SLICES = [(64, 64, 1), (8, 32, 32), (2, 30, 3), (1, 30, 32)]
BACKBONES: list[tuple[Backbone, tuple[int, int, int]]] = [
    (ViT3D(patch_size=(1, 8, 8), embed_dim=24, depth=1, num_heads=2), (64, 64, 1)),
    (ViT3D(patch_size=8, embed_dim=24, depth=1, num_heads=2), (64, 60, 3)),
    (
        ResEncUNetEncoder(features=(4, 8, 8), strides=(1, (1, 2, 2), (1, 2, 2)), blocks=(1, 1, 1)),
        (32, 32, 1),
    ),
    (ResEncUNetEncoder(features=(4, 8), strides=(1, 2), blocks=(1, 1)), (3, 3, 3)),
    (PCTNetEncoder(features=(4, 8, 8, 8, 16), heads=(2, 2, 2)), (24, 24, 24)),
    (PCTNetEncoder(features=(4, 8, 8, 8, 16), heads=(2, 2, 2)), (9, 9, 9)),
    (SwinUNETREncoder(feature_size=4, heads=(2, 2, 2, 2), window=2), (20, 96, 96)),
    *((SliceViT(patch_size=8, embed_dim=24, depth=1, num_heads=2), size) for size in SLICES),
]


@pytest.mark.parametrize(("encoder", "size"), BACKBONES)
def test_a_backbone_takes_the_crop_that_it_advises(
    encoder: Backbone, size: tuple[int, int, int]
) -> None:
    with pytest.raises(ValueError, match="for example") as caught:
        encoder.grids(size)
    (advice,) = re.findall(r"for example \[(.*)\]", str(caught.value))
    encoder.grids([int(side) for side in advice.split(",")])
