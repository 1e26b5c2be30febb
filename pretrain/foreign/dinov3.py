"""DINOv3's and MedDINOv3's weights for `SliceViT`.

Under Meta's names, as released (`backbone.` before them) or bare, or under timm's.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from data_prep.errors import InputError
from pretrain.backbones.slice_vit import SliceViT, rotary_periods
from pretrain.release import LoadReport

_RENAMED = {"storage_tokens": "reg_token", "ls1.gamma": "gamma_1", "ls2.gamma": "gamma_2"}
_SKIPPED = {
    "mask_token": "stands for hidden patches; objectives have one of their own",
    "bias_mask": "hides the bias of keys, which have none here",
    "local_cls_norm.weight": "norm of small crops in pretraining",
    "local_cls_norm.bias": "norm of small crops in pretraining",
}


def from_dinov3(
    weights: Mapping[str, Tensor], encoder: SliceViT
) -> tuple[dict[str, Tensor], LoadReport]:
    """Gives public weights the names and shapes of an encoder; all of it must come from them.

    Returns:
        The encoder's tensors, and which was copied or adapted, which of the others skipped and why.

    Raises:
        InputError: they are another network's, or lack something; the message lists every tensor
            that does not fit.
    """
    wanted = {name: list(tensor.shape) for name, tensor in encoder.state_dict().items()}
    found: dict[str, Tensor] = {}
    report, problems = LoadReport(), []
    within = "backbone." if any(name.startswith("backbone.") for name in weights) else ""
    for name, tensor in weights.items():
        if not name.startswith(within):
            report.skipped[name] = "no part of the backbone"
            continue
        try:
            placed, how = _converted(name.removeprefix(within), tensor, encoder)
            for own, value in placed.items():
                if list(value.shape) != wanted.get(own):
                    expected = wanted.get(own, "nothing of that name")
                    raise ValueError(f"has shape {list(value.shape)}, the encoder {expected}")
        except ValueError as error:
            problems.append(f"{name}: {error}")
            continue
        found |= placed
        if not placed:
            report.skipped[name] = how
        elif how:
            report.adapted |= dict.fromkeys(placed, how)
        else:
            report.copied += placed
    problems += [f"{own}: is not in the file" for own in wanted.keys() - found.keys()]
    if problems:
        raise InputError(sorted(problems))
    return found, report


def _converted(name: str, tensor: Tensor, encoder: SliceViT) -> tuple[dict[str, Tensor], str]:
    """What a public tensor is here, by our names, and how it was adapted; or nothing, and why.

    Raises:
        ValueError: the encoder computes something else.
    """
    for end, why in _SKIPPED.items():
        if name.endswith(end):
            return {}, why
    if name == "rope_embed.periods":
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
