"""STU-Net's weights (Huang et al. 2023, arXiv:2304.06716) in nnU-Net's files, of both versions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from pretrain.backbones.stunet import STUNetEncoder, from_published
from pretrain.foreign.layout import Found, Layout, Placed, Untold, count
from pretrain.manifest import Shapes
from pretrain.masking import triple

_PUBLISHED = ([16, 32, 64, 128, 256, 256], [32, 64, 128, 256, 512, 512],
              [64, 128, 256, 512, 1024, 1024], [96, 192, 384, 768, 1536, 1536])  # fmt: skip
"""Widths of the sizes S, B, L and H, all pretrained with five halvings."""


_FIRST = "conv_blocks_context.0.0.conv1.weight"


def _recognises(shapes: Shapes) -> bool:
    return len(shapes[_FIRST]) == 5


def _strides(features: list[int], facts: Mapping[str, Any]) -> list[Any] | Untold:
    said = facts.get("init_args") or {}
    plans = said.get("plans") if isinstance(said, Mapping) else None
    if isinstance(plans, Mapping):
        chosen = plans.get("configurations", {}).get(said.get("configuration"), {})
        steps = [list(triple(step)) for step in chosen.get("pool_op_kernel_sizes") or []]
        if len(steps) == len(features):
            return steps
        if len(steps) == len(features) - 1:
            return [[1, 1, 1], *steps]
    if features in _PUBLISHED:
        return [[1, 1, 1]] + [[2, 2, 2]] * 5
    return Untold("strides: no tensor shows them, the file has no plans and is no published size")


def _arguments(file: Found) -> dict[str, Any]:
    shapes = file.shapes
    stages = range(count(shapes, r"conv_blocks_context\.(\d+)\."))
    name = "conv_blocks_context.{}.0.conv1.weight"
    features = [shapes.get(name.format(i), (0,))[0] for i in stages]
    return {
        "in_channels": shapes[_FIRST][1],
        "features": features,
        "strides": _strides(features, file.facts),
        "blocks": [count(shapes, rf"conv_blocks_context\.{i}\.(\d+)\.") for i in stages],
    }


def _place(name: str, weights: Mapping[str, Tensor], encoder: STUNetEncoder) -> Placed:
    found = from_published({name: weights[name]})
    return found.encoder, "" if found.encoder else "decoder"


STUNET = Layout(
    name="STU-Net",
    backbone="stunet.STUNetEncoder",
    mark=_FIRST,
    recognises=_recognises,
    arguments=_arguments,
    place=_place,
)
