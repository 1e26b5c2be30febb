"""DINOv3's and MedDINOv3's weights for `SliceViT`.

Simeoni et al. 2025, arXiv:2508.10104, and Li et al. 2025, arXiv:2509.02379. Under Meta's names, as
released (`backbone.` before them) or bare, or under timm's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pretrain.backbones.slice_vit import SliceViT, rotary_periods
from pretrain.foreign.layout import Found, Layout, Placed, count, published, ratio
from pretrain.manifest import Shapes

_RENAMED = {"storage_tokens": "reg_token", "ls1.gamma": "gamma_1", "ls2.gamma": "gamma_2"}
_SKIPPED = {
    "mask_token": "stands for hidden patches; objectives have one of their own",
    "bias_mask": "hides the bias of keys, which have none here",
    "local_cls_norm.weight": "norm of small crops in pretraining",
    "local_cls_norm.bias": "norm of small crops in pretraining",
}
_PERIODS = ("rope_embed.periods", "rope.periods")
_HEADS = {384: 6, 768: 12, 1024: 16}


def _recognises(shapes: Shapes) -> bool:
    return (
        len(shapes["patch_embed.proj.weight"]) == 4
        and len(shapes.get("cls_token", ())) == 3
        and "pos_embed" not in shapes
        and any(re.match(r"blocks\.\d+\.(ls1\.gamma|gamma_1)$", name) for name in shapes)
    )


def _arguments(file: Found) -> dict[str, Any]:
    shapes = file.shapes
    width, channels, patch, _ = shapes["patch_embed.proj.weight"]
    registers = [shapes[name][1] for name in ("storage_tokens", "reg_token") if name in shapes]
    periods = [shapes[name][0] for name in _PERIODS if name in shapes]  # a quarter of a head
    return {
        "in_channels": channels,
        "patch_size": patch,
        "embed_dim": width,
        "depth": count(shapes, r"blocks\.(\d+)\."),
        "num_heads": width // (4 * periods[0])
        if periods and periods[0]
        else published(_HEADS, width, "num_heads"),
        "mlp_ratio": ratio(shapes.get("blocks.0.mlp.fc1.weight", (0,))[0], width),
        "qkv_bias": any(name.endswith(("attn.qkv.bias", "attn.q_bias")) for name in shapes),
        "layer_scale": 1e-5,
        # Released models of DINOv3 are bare; MedDINOv3 keeps the names of its training, whose
        # "layernorm" this is.
        "norm_eps": 1e-6 if file.root.endswith("backbone.") else 1e-5,
        "register_tokens": sum(registers),
    }


def _place(name: str, weights: Mapping[str, Tensor], encoder: SliceViT) -> Placed:
    tensor = weights[name]
    for end, why in _SKIPPED.items():
        if name.endswith(end):
            return {}, why
    if name in _PERIODS:
        ours = rotary_periods(encoder.head_dim)
        # Released periods are rounded to bfloat16.
        if tensor.shape != ours.shape or not torch.allclose(tensor.float(), ours, rtol=1e-2):
            raise ValueError(f"is {tensor.tolist()}, this encoder turns by {ours.tolist()}")
        return {}, "computed, and the same"
    own = name
    for old, new in _RENAMED.items():
        own = own.replace(old, new)
    if name == "patch_embed.proj.weight" and encoder.in_channels == 1 < tensor.shape[1]:
        how = f"sum over {tensor.shape[1]} channels, as for a slice repeated"
        return {own: tensor.sum(1, keepdim=True)}, how
    if name.endswith("qkv.bias"):
        # That of keys is masked in DINOv3, whatever is stored.
        query, _, value = tensor.chunk(3)
        if encoder.qkv_bias:
            biases = {own.replace("qkv.", "q_"): query, own.replace("qkv.", "v_"): value}
            return biases, "a third of qkv.bias; that of keys is masked"
        if query.any() or value.any():
            raise ValueError("is not zero; the encoder needs backbone.qkv_bias=true")
        return {}, "zero, and this encoder has no biases there"
    return {own: tensor}, ""


def _hidden(encoder: SliceViT) -> dict[str, Any]:
    return {"num_heads": encoder.embed_dim // encoder.head_dim}


DINOV3 = Layout(
    name="DINOv3 or MedDINOv3",
    backbone="slice_vit.SliceViT",
    mark="patch_embed.proj.weight",
    recognises=_recognises,
    arguments=_arguments,
    place=_place,
    hidden=_hidden,
)
