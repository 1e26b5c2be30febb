"""nnssl's weights (OpenMind): residual U-Net encoders and Primus, the adaptation plan beside them.

Wald et al. 2024, "An OpenMind for 3D medical vision self-supervised learning", arXiv:2412.17041;
Primus: Wald et al. 2025, arXiv:2503.01835. nnU-Net's files of a residual encoder are the same.

nnssl's masked pretraining of Primus (EvaMAE) runs over the patches in the order (h, d, w); Primus
itself, which nnU-Net finetunes with these weights, runs in C order over (d, h, w), and so does this
adapter. Who wants the order of the pretraining gives images with their first two axes swapped.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from pretrain.backbones.resenc import ResEncUNetEncoder
from pretrain.backbones.vit import ViT3D
from pretrain.foreign.layout import Found, Layout, Placed, Untold, count, cube, published, ratio
from pretrain.foreign.vit import hidden as hidden_of_vit
from pretrain.manifest import Shapes
from pretrain.masking import triple

PLAN = "nnssl_adaptation_plan"


def _preprocessing(facts: Mapping[str, Any]) -> dict[str, Any] | None:
    """Spacing, normalisation and crop, where the plan has one configuration."""
    plan: dict[str, Any] = facts.get(PLAN) or {}
    configurations = plan.get("pretrain_plan", {}).get("configurations", {})
    if len(configurations) != 1:
        return None
    (chosen,) = configurations.values()
    axes = plan["pretrain_plan"].get("transpose_forward")
    return {
        "spacing_mm": chosen.get("spacing"),
        "normalisation": chosen.get("normalization_schemes"),
        "crop_size": plan.get("recommended_downstream_patchsize") or chosen.get("patch_size"),
        "axes": None if axes is None else list(axes),
    }


def _arch_kwargs(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of the network that the plan names; empty where there is no plan."""
    plan = facts.get(PLAN) or {}
    return plan.get("architecture_plans", {}).get("arch_kwargs") or {}


# Residual encoders.


def _is_resenc(shapes: Shapes) -> bool:
    kernel = shapes["stem.convs.0.conv.weight"]
    return len(kernel) == 5 and any(name.startswith("stages.0.blocks.0.") for name in shapes)


def _resenc_arguments(file: Found) -> dict[str, Any]:
    shapes = file.shapes
    stages = count(shapes, r"stages\.(\d+)\.")
    first = [shapes.get(f"stages.{i}.blocks.0.conv1.conv.weight", (0,))[0] for i in range(stages)]
    blocks = [count(shapes, rf"stages\.{i}\.blocks\.(\d+)\.") for i in range(stages)]
    steps = _arch_kwargs(file.facts).get("strides") or _steps_of_decoder(file.others, stages)
    strides = [list(triple(step)) for step in steps] or Untold(
        "strides: no tensor of the encoder shows them, and the file has neither plan nor decoder"
    )
    return {
        "in_channels": shapes["stem.convs.0.conv.weight"][1],
        "features": first,
        "strides": strides,
        "blocks": blocks,
    }


def _steps_of_decoder(others: Shapes, stages: int) -> list[Any]:
    """A U-Net's decoder undoes each stride by a transposed convolution of that kernel."""
    kernels = {
        int(match[1]): shape[2:]
        for name, shape in others.items()
        if (match := re.search(r"(?:^|\.)decoder\.transpconvs\.(\d+)\.weight$", name))
    }
    if sorted(kernels) != list(range(stages - 1)):
        return []
    return [(1, 1, 1), *(kernels[i] for i in range(stages - 2, -1, -1))]


def _place_resenc(name: str, weights: Mapping[str, Tensor], encoder: ResEncUNetEncoder) -> Placed:
    return {name: weights[name]}, ""


def _steps(encoder: Any) -> dict[str, Any]:
    """Strides of stages against the ones before, as the argument has them."""
    before = [(1, 1, 1), *encoder.strides[:-1]]
    pairs = zip(encoder.strides, before, strict=True)
    return {"strides": [[a // b for a, b in zip(one, other, strict=True)] for one, other in pairs]}


RESENC = Layout(
    name="nnssl or nnU-Net ResEnc",
    backbone="resenc.ResEncUNetEncoder",
    mark="stem.convs.0.conv.weight",
    recognises=_is_resenc,
    arguments=_resenc_arguments,
    place=_place_resenc,
    second_names={r"\.all_modules\.0\.": ".conv.", r"\.all_modules\.1\.": ".norm."},
    hidden=_steps,
    preprocessing=_preprocessing,
)


# Primus.

_HEADS = {396: 6, 792: 12, 864: 12, 1056: 16}
_BESIDE = {
    "mask_token": "stands for hidden patches in the pretraining",
    "up_projection.": "decoder",
    "decoder.": "decoder of the pretraining",
}


def _is_primus(shapes: Shapes) -> bool:
    kernel = shapes["down_projection.proj.weight"]
    return len(kernel) == 5 and any(name.startswith("eva.blocks.0.") for name in shapes)


def _primus_arguments(file: Found) -> dict[str, Any]:
    shapes = file.shapes
    width, channels, *patch = shapes["down_projection.proj.weight"]
    block = "eva.blocks.0."
    swiglu = f"{block}mlp.fc1_g.weight" in shapes
    inner = "fc1_g" if swiglu else "fc1"
    heads = _arch_kwargs(file.facts).get("encoder_eva_numheads")
    made: dict[str, Any] = {
        "in_channels": channels,
        "patch_size": patch,
        "embed_dim": width,
        "depth": count(shapes, r"eva\.blocks\.(\d+)\."),
        "num_heads": heads or published(_HEADS, width, "num_heads"),
        "mlp_ratio": ratio(shapes.get(f"{block}mlp.{inner}.weight", (0,))[0], width),
        "mlp": "swiglu" if swiglu else "gelu",
        "inner_norm": f"{block}attn.norm.weight" in shapes,
        "layer_scale": 0.1 if f"{block}gamma_1" in shapes else None,
        "norm_eps": 1e-5,
        "rope": True,
        "position": "none",
        "decoder": "patch",
    }
    if "eva.pos_embed" not in shapes:
        return made
    cells = shapes["eva.pos_embed"][1]
    grid = _position_grid(file.facts.get(PLAN) or {}, patch, cells)
    untold = Untold(f"position_grid: {cells} positions are no cube, and the plan has no such grid")
    return made | {"position": "learned", "position_grid": grid or untold}


def _position_grid(plan: Mapping[str, Any], patch: Sequence[int], cells: int) -> list[int]:
    """Patches (d, h, w) that the positions are for: those of a crop in the plan, or of a cube."""
    configurations = plan.get("pretrain_plan", {}).get("configurations", {})
    crops = [one.get("patch_size") for one in configurations.values()]
    for crop in (*crops, plan.get("recommended_downstream_patchsize")):
        grid = [n // p for n, p in zip(crop or (), patch, strict=False)]
        if len(grid) == 3 and math.prod(grid) == cells:
            return grid
    side = cube(cells)
    return [side] * 3 if side else []


def _place_primus(name: str, weights: Mapping[str, Tensor], encoder: ViT3D) -> Placed:
    tensor = weights[name]
    for start, why in _BESIDE.items():
        if name.startswith(start):
            return {}, why
    if name == "eva.pos_embed":
        grid = encoder.pos_embed.grid
        if grid is None or tensor.shape[1] != grid[0] * grid[1] * grid[2]:
            raise ValueError(
                f"has {tensor.shape[1]} positions; the encoder needs position=learned and a "
                f"position_grid of so many cells, and has {grid}"
            )
        return {"pos_embed.weight": tensor.view(*grid, -1)}, "positions as a grid (d, h, w)"
    own = re.sub(r"^down_projection\.", "patch_embed.", name)
    return {own.removeprefix("eva."): tensor}, ""


PRIMUS = Layout(
    name="nnssl Primus",
    backbone="vit.ViT3D",
    mark="down_projection.proj.weight",
    recognises=_is_primus,
    arguments=_primus_arguments,
    place=_place_primus,
    hidden=hidden_of_vit,
    preprocessing=_preprocessing,
)
