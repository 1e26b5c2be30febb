"""Public weights of others, from a local file into an encoder of ours.

An encoder takes the layouts that its class can compute, told apart by names and shapes of tensors
and never by that of the file. All of the encoder must come from the file, and the report says what
became of each tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from data_prep.errors import InputError
from pretrain.backbones.backbone import Backbone
from pretrain.release import LoadReport


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, or of a .pth that holds nothing else; no pickle is run.

    The weights of a `teacher` beside other things are those of the teacher.

    Raises:
        InputError: the file cannot be read, or holds other things.
    """
    try:
        stored: Any = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
        raise InputError(f"{path}: cannot be read as weights ({said})") from error
    weights = stored.get("teacher", stored) if isinstance(stored, dict) else stored
    if not isinstance(weights, dict) or not all(torch.is_tensor(t) for t in weights.values()):
        raise InputError(f"{path}: holds other things than tensors by name; give weights alone")
    return weights


def converted(
    weights: Mapping[str, Tensor], encoder: Backbone
) -> tuple[dict[str, Tensor], LoadReport]:
    """Public weights by the names of an encoder, which may be without memory (meta).

    Raises:
        InputError: no public layout is known for this encoder, or they do not fit it; the message
            lists every tensor that does not.
    """
    from pretrain.backbones.slice_vit import SliceViT  # timm is slow to import
    from pretrain.foreign.dinov3 import from_dinov3

    if not isinstance(encoder, SliceViT):
        raise InputError(
            f"no public weights are known for {type(encoder).__name__}; SliceViT takes those of "
            "DINOv3 and MedDINOv3 (backbone=dinov3_b_2d)"
        )
    found, report = from_dinov3(weights, encoder)
    report.covered = 1.0
    return found, report


def load_foreign(encoder: Backbone, path: Path) -> LoadReport:
    """Copies public weights from a local file; see `read_weights` and `converted`."""
    found, report = converted(read_weights(path), encoder)
    encoder.load_state_dict(found)
    return report
