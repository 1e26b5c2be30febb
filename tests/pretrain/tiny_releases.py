"""Releases of networks so small that they are written in a moment."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from data_prep.preprocess import Preprocess
from pretrain.arguments import build_backbone
from pretrain.release import Release, write_release

VIT = {"patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2}


def tiny_release(
    output: Path,
    name: str,
    args: dict[str, Any],
    crop: Sequence[int],
    seed: int,
    modalities: Sequence[str] = ("MR",),
    preprocess: Preprocess | None = None,
) -> Release:
    torch.manual_seed(seed)
    encoder = build_backbone(name, args, "test").eval()
    with torch.no_grad():
        for parameter in encoder.parameters():  # those that begin at zero or one as well
            nn.init.normal_(parameter, std=0.1)
        for buffer in encoder.buffers():
            if buffer.is_floating_point():
                buffer.uniform_(0.5, 1.5)
    config = {
        "format": 1, "name": "tiny", "kind": "encoder", "backbone": {"name": name, "args": args},
        "objective": {"name": "mae.MAE", "args": {}}, "crop_size": list(crop),
        "modalities": list(modalities),
        "preprocess": (preprocess or Preprocess.default()).to_dict(), "training": {},
        "data": {"licence": {"CC-BY-4.0": 3, "CC-BY-NC-4.0": 1}}, "versions": {},
    }  # fmt: skip
    prints = {"format": 1, "values": []}
    return write_release(output, encoder=encoder, config=config, fingerprints=prints, card="A.\n")
