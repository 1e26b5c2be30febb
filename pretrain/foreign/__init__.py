"""Public weights of others, from a local file into an encoder of ours.

A file is told by names and shapes of its tensors and never by its own name (`layout.py`); all of
the encoder must come from it, and the report says what became of each tensor. What no tensor shows,
such as the number of attention heads, comes from what the file says beside the weights or from the
published sizes, and from whoever loads it where neither tells: nothing is guessed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_prep.errors import InputError
from pretrain.arguments import build_backbone
from pretrain.backbones.axes import OURS
from pretrain.backbones.backbone import Backbone
from pretrain.foreign.axes import turn_vit
from pretrain.foreign.layout import Layout, Untold, convert, found_in, root_of
from pretrain.foreign.stored import read_stored, read_weights
from pretrain.release import LoadReport

__all__ = ["Foreign", "converted", "open_foreign", "read_weights"]


@dataclass(frozen=True)
class Foreign:
    """A public encoder as one of ours.

    Attributes:
        layout: what it is, for people.
        backbone: name and arguments, as a release's config.json has them.
        state: its weights under our names.
        report: what became of each tensor.
        preprocessing: what the file says about it, as plain data; None: nothing.
        facts: all that the file says beside its weights, as plain data.
    """

    layout: str
    backbone: dict[str, Any]
    state: dict[str, Tensor]
    report: LoadReport
    preprocessing: dict[str, Any] | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    def build(self) -> Backbone:
        """The encoder with its weights, to evaluate."""
        encoder = build_backbone(self.backbone["name"], self.backbone["args"], "backbone")
        encoder.load_state_dict(self.state)
        return encoder.eval()


def open_foreign(
    path: Path,
    told: Mapping[str, Any] | None = None,
    *,
    axes: str = OURS,
    crop_size: Sequence[int] | None = None,
) -> Foreign:
    """Reads a file of public weights as an encoder of ours.

    The encoder is made without memory first: sizes out of bounds, and weights that do not fit, are
    refused before anything is allocated.

    Args:
        path: a local file.
        told: arguments of our backbone that the file does not tell, such as num_heads, or that are
            to be others, such as in_channels=1 for weights of slices in three colours.
        axes: codes of the axes of the images that it was trained on, such as RAS.
        crop_size: of images on our axes; needed where positions are computed and axes are others.

    Raises:
        InputError: it cannot be read, is of no layout or of several, or does not fit; all that is
            wrong is said at once.
    """
    stored = read_stored(path)
    try:
        layout = recognised(stored.weights)
        root, _ = root_of(layout, stored.weights)
        read, preprocessing = layout.sizes(found_in(stored.weights, root, stored.facts))
        arguments = read | dict(told or {})
        untold = {name: why for name, why in arguments.items() if isinstance(why, Untold)}
        if untold:
            raise InputError([f"{why}; give {name}=..." for name, why in untold.items()])
        if axes != OURS and layout.axes == "argument":
            arguments["axes"] = axes
        encoder = _without_memory(layout, arguments)
        state, report = convert(layout, stored.weights, encoder, stored.facts)
        if axes != OURS and layout.axes == "weights":
            arguments, state = turn_vit(arguments, state, report, axes, crop_size)
            _without_memory(layout, arguments)
        elif axes != OURS and layout.axes == "none":
            raise InputError(f"axes={axes}: {layout.name} takes {OURS} alone here")
    except InputError as error:
        raise InputError([f"{path}: {problem}" for problem in error.problems]) from error
    report.skipped |= {
        f"{name}.*": f"{number} tensors beside {stored.wrapper}"
        for name, number in stored.beside.items()
    }
    return Foreign(
        layout=layout.name,
        backbone={"name": layout.backbone, "args": arguments},
        state=state,
        report=report,
        preprocessing=preprocessing,
        facts=stored.facts,
    )


def converted(
    weights: Mapping[str, Tensor], encoder: Backbone
) -> tuple[dict[str, Tensor], LoadReport]:
    """Public weights by the names of an encoder, which may be without memory (meta).

    Raises:
        InputError: no public layout is known for them, or they do not fit the encoder; the message
            lists every tensor that does not.
    """
    layout = recognised(weights)
    own = f"{type(encoder).__module__}.{type(encoder).__qualname__}"
    if own != f"pretrain.backbones.{layout.backbone}":
        raise InputError(
            f"the weights are {layout.name}, which here is {layout.backbone}, and the encoder is "
            f"{type(encoder).__name__}: choose another backbone"
        )
    return convert(layout, weights, encoder)


def layouts() -> list[Layout]:
    """All public layouts that are known."""
    from pretrain.foreign.dinov3 import DINOV3  # timm and MONAI are slow to import
    from pretrain.foreign.nnssl import PRIMUS, RESENC
    from pretrain.foreign.stunet import STUNET
    from pretrain.foreign.swin import SWIN, SWIN_UNETR, SWIN_UNETR_OLD
    from pretrain.foreign.vit import DINO_3D, DINOV2, HI_END_MAE

    return [
        RESENC, PRIMUS, HI_END_MAE, DINO_3D, DINOV2, DINOV3, STUNET, SWIN_UNETR, SWIN_UNETR_OLD,
        SWIN,
    ]  # fmt: skip


def recognised(weights: Mapping[str, Tensor]) -> Layout:
    """The layout of a file's weights.

    Raises:
        InputError: none is known, or several fit.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    known = layouts()
    found = [layout for layout in known if layout.roots(shapes)]
    if len(found) == 1:
        return found[0]
    some = ", ".join(f"{name} {list(shape)}" for name, shape in list(shapes.items())[:5])
    names = ", ".join(dict.fromkeys(layout.name for layout in found or known))
    if found:
        raise InputError(f"the weights fit several layouts ({names}): keep those of one ({some})")
    raise InputError(
        f"the weights are of no layout that is known here ({len(shapes)} tensors, such as {some}); "
        f"known are {names}: give such a file, or a release or run of ours"
    )


def _without_memory(layout: Layout, arguments: Mapping[str, Any]) -> Backbone:
    try:
        with torch.device("meta"):
            return build_backbone(layout.backbone, arguments, layout.name)
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:
        raise InputError(f"{layout.name}: {error}") from error
