"""SwinUNETR's weights in MONAI's layout: whole networks, VoCo's encoders, transformers alone.

Hatamizadeh et al. 2022, arXiv:2201.01266; VoCo: Wu et al. 2024, arXiv:2410.09890; pretraining of
the transformer: Tang et al. 2022, arXiv:2111.14791. Older files call the transformer `swin_vit`
and the layers of its MLPs fc1 and fc2.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from pretrain.backbones.swin_unetr import SwinUNETREncoder
from pretrain.foreign.layout import Found, Layout, Placed, Untold, count
from pretrain.manifest import Shapes

_EMBED = "patch_embed.proj.weight"
_TABLE = "{}layers{}.0.blocks.0.attn.relative_position_bias_table"
_RENAMED = {".mlp.fc1.": ".mlp.linear1.", ".mlp.fc2.": ".mlp.linear2."}
_ENCODER = ("swinViT", "encoder1", "encoder2", "encoder3", "encoder4", "encoder10")
_OTHERS = {
    **{f"decoder{number}": "decoder" for number in range(1, 6)},
    "out": "decoder",
    "student": "head of VoCo",
    "teacher": "head of VoCo",
    "rotation_pre": "head of the pretraining",
    "rotation_head": "head of the pretraining",
    "contrastive_pre": "head of the pretraining",
    "contrastive_head": "head of the pretraining",
    "conv": "decoder of the pretraining",
}


def _arguments(file: Found, swin: str) -> dict[str, Any]:
    shapes = file.shapes
    stages = range(1, 5)
    tables = [shapes.get(_TABLE.format(swin, n), (0, 0)) for n in stages]
    # Offsets along an axis, of which a window has twice its cells but one.
    sides = [n for n in range(1, 33) if (2 * n - 1) ** 3 == tables[0][0]]
    untold = Untold(f"window: a table of {tables[0][0]} offsets is of no window with equal sides")
    return {
        "in_channels": shapes[swin + _EMBED][1],
        "feature_size": shapes[swin + _EMBED][0],
        "depths": [count(shapes, rf"{swin}layers{n}\.0\.blocks\.(\d+)\.") for n in stages],
        "heads": [table[1] for table in tables],
        "window": sides[0] if sides else untold,
        "use_v2": any(name.startswith(f"{swin}layers1c.") for name in shapes),
        "refine": any(name.startswith("encoder1.") for name in shapes),
    }


def _place_transformer(
    name: str, weights: Mapping[str, Tensor], encoder: SwinUNETREncoder
) -> Placed:
    if name.startswith("norm."):
        return {}, "norm behind the last stage, which SwinUNETR does not have"
    if name.partition(".")[0] in _OTHERS:
        return {}, _OTHERS[name.partition(".")[0]]
    return _place(f"swinViT.{name}", {f"swinViT.{name}": weights[name]}, encoder)


def _place(name: str, weights: Mapping[str, Tensor], encoder: SwinUNETREncoder) -> Placed:
    part, _, rest = name.partition(".")
    part = "swinViT" if part == "swin_vit" else part
    if part in _OTHERS:
        return {}, _OTHERS[part]
    if part not in _ENCODER:
        raise ValueError("is no tensor of a SwinUNETR")
    own = f"{part}.{rest}"
    for old, new in _RENAMED.items():
        own = own.replace(old, new)
    return {own: weights[name]}, ""


def _layout(swin: str) -> Layout:
    def recognises(shapes: Shapes) -> bool:
        blocks = f"{swin}layers1.0.blocks."
        return len(shapes[swin + _EMBED]) == 5 and any(name.startswith(blocks) for name in shapes)

    return Layout(
        name="MONAI SwinUNETR or VoCo" if swin else "MONAI Swin transformer",
        backbone="swin_unetr.SwinUNETREncoder",
        mark=swin + _EMBED,
        recognises=recognises,
        arguments=lambda file: _arguments(file, swin),
        place=_place if swin else _place_transformer,
        axes="argument",
        never_behind=() if swin else ("swinViT.", "swin_vit."),
    )


SWIN_UNETR = _layout("swinViT.")
SWIN_UNETR_OLD = _layout("swin_vit.")
SWIN = _layout("")
