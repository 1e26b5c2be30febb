"""Vision transformers with a learned or fixed position: Hi-End-MAE, 3DINO and DINOv2.

Hi-End-MAE: Tang et al. 2025, arXiv:2502.08347; DINOv2: Oquab et al. 2023, arXiv:2304.07193, under
Meta's names or timm's, and with registers (Darcet et al. 2023, arXiv:2309.16588); 3DINO: Xu et al.
2025, arXiv:2501.11755. DINOv2 of images is a `ViT3D` whose patch is one voxel deep.

A class token that has a position is stored here with it. For other crops than the stored positions
are for, ours are interpolated between cell centres; DINOv2 and 3DINO do so with a small offset.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pretrain.backbones.vit import ViT3D, sincos_position
from pretrain.foreign.layout import (
    NOT_OURS,
    Found,
    Layout,
    Placed,
    Untold,
    count,
    cube,
    published,
    ratio,
)
from pretrain.manifest import Shapes

_HEADS = {384: 6, 768: 12, 1024: 16}
_HI_END_HEADS = {768: 12, 1536: 16}
_REGISTERS = ("register_tokens", "reg_token")
_SKIPPED = {
    "mask_token": "stands for hidden patches; objectives have one of their own",
    "head.": "classifier",
}


def hidden(encoder: ViT3D) -> dict[str, Any]:
    """What tensors of a ViT do not show."""
    kind = encoder.kind
    return {
        "num_heads": kind.num_heads,
        "rope": kind.rope,
        "position": encoder.pos_embed.kind,
        "norm_eps": kind.norm_eps,
    }


def _common(shapes: Shapes) -> dict[str, Any]:
    width, channels, *patch = shapes["patch_embed.proj.weight"]
    return {
        "in_channels": channels,
        "patch_size": [1] * (3 - len(patch)) + patch,
        "embed_dim": width,
        "depth": count(shapes, r"blocks\.(?:\d+\.)?(\d+)\."),
        "mlp_ratio": ratio(_hidden_width(shapes), width),
        "qkv_bias": any(name.endswith("attn.qkv.bias") for name in shapes),
        "cls_token": True,
        "norm_eps": 1e-6,
        "rope": False,
    }


def _hidden_width(shapes: Shapes) -> int:
    ends = [shape[0] for name, shape in shapes.items() if name.endswith(".mlp.fc1.weight")]
    return ends[0] if ends else 0


def _has_blocks(shapes: Shapes, *, axes: int, scaled: bool, placed: bool) -> bool:
    blocks = [name for name in shapes if name.startswith("blocks.")]
    return (
        len(shapes["patch_embed.proj.weight"]) == axes + 2
        and len(shapes.get("cls_token", ())) == 3
        and any(".attn.qkv." in name for name in blocks)
        and any(name.endswith("ls1.gamma") for name in blocks) == scaled
        and not any(name.endswith("gamma_1") for name in blocks)
        and (len(shapes.get("pos_embed", ())) == 3) == placed
    )


# Hi-End-MAE.


def _hi_end_arguments(file: Found) -> dict[str, Any]:
    made = _common(file.shapes) | {"position": "sincos"}
    made["num_heads"] = published(_HI_END_HEADS, made["embed_dim"], "num_heads")
    # What its own decoders read: outputs of these blocks.
    return made | ({"taps": [4, 7, 10, 12]} if made["depth"] == 12 else {})


def _place_hi_end(name: str, weights: Mapping[str, Tensor], encoder: ViT3D) -> Placed:
    if name == "cls_token":
        return {name: weights[name].flatten()}, "flat"
    return {name: weights[name]}, ""


def _beside_hi_end(name: str, tensor: Tensor, encoder: ViT3D) -> str:
    if not name.endswith("encoder_pos_embed"):
        return NOT_OURS
    side = cube(tensor.shape[1])
    if side is not None:
        ours = sincos_position([side] * 3, encoder.embed_dim)
        if tensor.shape[1:] == ours.shape and torch.allclose(tensor[0].float(), ours, atol=1e-4):
            return "computed, and the same"
    raise ValueError("is not the fixed position that the encoder adds")


HI_END_MAE = Layout(
    name="Hi-End-MAE",
    backbone="vit.ViT3D",
    mark="patch_embed.proj.weight",
    recognises=lambda shapes: _has_blocks(shapes, axes=3, scaled=False, placed=False),
    arguments=_hi_end_arguments,
    place=_place_hi_end,
    beside=_beside_hi_end,
    hidden=hidden,
    axes="weights",
)


# DINOv2 and 3DINO.


def _dino_arguments(file: Found) -> dict[str, Any]:
    shapes = file.shapes
    made = _common(shapes)
    axes = len(shapes["patch_embed.proj.weight"]) - 2
    rows = shapes["pos_embed"][1]
    side = cube(rows - 1, axes) or cube(rows, axes)
    untold = Untold(f"position_grid: {rows} positions are no grid with equal sides")
    registers = [shapes[name][1] for name in _REGISTERS if name in shapes]
    return made | {
        "num_heads": published(_HEADS, made["embed_dim"], "num_heads"),
        "layer_scale": 1e-5,
        "position": "learned",
        "position_grid": [1] * (3 - axes) + [side] * axes if side else untold,
        "register_tokens": sum(registers),
    }


def _place_dino(name: str, weights: Mapping[str, Tensor], encoder: ViT3D) -> Placed:
    tensor, position = weights[name], weights["pos_embed"]
    grid = encoder.pos_embed.grid
    if grid is None:
        raise ValueError("the encoder needs position=learned")
    prefix = position.shape[1] - grid[0] * grid[1] * grid[2]
    for start, why in _SKIPPED.items():
        if name.startswith(start):
            return {}, why
    if name == "pos_embed":
        if prefix not in (0, 1):
            raise ValueError(
                f"has {position.shape[1]} positions, the encoder's position_grid is {list(grid)}"
            )
        rows = position[0, prefix:]
        return {"pos_embed.weight": rows.view(*grid, -1)}, "of patches alone, as a grid (d, h, w)"
    if name == "cls_token":
        flat = tensor.flatten()
        # Added in the order of the reference: one rounding, the same.
        return {name: flat + position[0, 0] if prefix else flat}, (
            "with its position, row 0 of pos_embed, added" if prefix else "flat"
        )
    if name in _REGISTERS:
        return {"register_tokens": tensor.flatten(0, 1)}, "flat"
    if name == "patch_embed.proj.weight":
        return _patches(tensor, encoder)
    # Blocks may be numbered within chunks.
    return {re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", name): tensor}, ""


def _patches(tensor: Tensor, encoder: ViT3D) -> Placed:
    own, how = tensor, []
    if tensor.ndim == 4:
        own, how = own.unsqueeze(2), ["a slice's as of patches one voxel deep"]
        if encoder.in_channels == 1 < tensor.shape[1]:
            own = own.sum(1, keepdim=True)
            how.append(f"sum over {tensor.shape[1]} channels, as for a slice repeated")
    return {"patch_embed.proj.weight": own}, "; ".join(how)


def _dino(name: str, axes: int) -> Layout:
    return Layout(
        name=name,
        backbone="vit.ViT3D",
        mark="patch_embed.proj.weight",
        recognises=lambda shapes: _has_blocks(shapes, axes=axes, scaled=True, placed=True),
        arguments=_dino_arguments,
        place=_place_dino,
        hidden=hidden,
        axes="weights",
    )


DINO_3D = _dino("3DINO", 3)
DINOV2 = _dino("DINOv2", 2)
