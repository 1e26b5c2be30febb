"""Weights of a ViT that was trained on other axes, as one that takes ours: S, P, L.

Attention does not know where its tokens lie but by what their embeddings say, so a kernel and
positions that are turned make a network which answers a turned image as before, to the last token.
A convolution whose stride is not its kernel has no such form: mirrored, its cells lie elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from data_prep.errors import InputError
from pretrain.backbones.axes import OURS, turned, turned_back
from pretrain.backbones.vit import sincos_position
from pretrain.masking import triple
from pretrain.release import LoadReport

_KERNEL, _POSITION = "patch_embed.proj.weight", "pos_embed.weight"


def turn_vit(
    arguments: dict[str, Any],
    state: dict[str, Tensor],
    report: LoadReport,
    axes: str,
    crop_size: Sequence[int] | None,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Arguments and weights for images on our axes; the report says what was turned.

    Args:
        arguments: of the encoder for images on its own axes.
        state: its weights.
        report: of their load.
        axes: codes of its own axes.
        crop_size: on our axes; a position that is computed becomes one that is stored, for it.

    Raises:
        InputError: the order of its axes is in what no weights show.
    """
    patch = triple(arguments["patch_size"])
    if arguments.get("rope") or len(set(patch)) > 1:
        raise InputError(
            f"axes={axes}: the encoder turns by rotary positions or has a patch of {list(patch)}, "
            f"so its axes cannot be changed; give axes={OURS}"
        )
    changed = {**state, _KERNEL: turned_back(state[_KERNEL], axes).contiguous()}
    how = f"turned from {axes} to {OURS} axes"
    report.adapted[_KERNEL] = _also(report.adapted.get(_KERNEL), how)
    if arguments.get("position") == "none":
        return arguments, changed
    if arguments.get("position") == "learned":
        position = state[_POSITION]
        report.adapted[_POSITION] = _also(report.adapted.get(_POSITION), how)
    else:
        if crop_size is None:
            raise InputError(
                f"axes={axes}: the encoder computes its positions, and stored ones need a "
                "crop_size; give it"
            )
        grid = [side // p for side, p in zip(crop_size, patch, strict=True)]
        theirs = list(turned(torch.empty(*grid, device="meta"), axes).shape)
        position = sincos_position(theirs, arguments["embed_dim"]).view(*theirs, -1)
        report.adapted[_POSITION] = f"computed for {axes} axes, {how}"
    maps = turned_back(position.movedim(-1, 0), axes).movedim(0, -1).contiguous()
    changed[_POSITION] = maps
    report.copied = [name for name in report.copied if name not in report.adapted]
    grid = list(maps.shape[:3])
    return {**arguments, "position": "learned", "position_grid": grid}, changed


def _also(before: str | None, how: str) -> str:
    return how if before is None else f"{before}; {how}"
