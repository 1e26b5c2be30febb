"""Encoders that are small enough to be compared with loops."""

from __future__ import annotations

import torch
from seeds import SEED

from pretrain.backbones.backbone import Backbone
from pretrain.backbones.resenc import ResEncUNetEncoder
from pretrain.backbones.vit import ViT3D


def encoder(kind: str = "resenc") -> Backbone:
    """A pyramid of two maps, or tokens (`vit`); its weights are the same each time."""
    torch.manual_seed(SEED)
    if kind == "vit":
        return ViT3D(patch_size=2, embed_dim=24, depth=4, num_heads=2)
    return ResEncUNetEncoder(features=[4, 8], strides=[1, 2], blocks=[1, 1])
