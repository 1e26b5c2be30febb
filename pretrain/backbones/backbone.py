"""The surface that every backbone offers to objectives, decoders and whoever wants features."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import permutations
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Backbone(nn.Module):
    """An encoder of crops [B, in_channels, D, H, W] into feature maps, finest first.

    Subclasses set the three attributes and implement `grids` and `forward`.
    """

    in_channels: int
    """Channels of the image."""

    channels: tuple[int, ...]
    """Channels of each feature map."""

    strides: tuple[tuple[int, int, int], ...]
    """Voxels of the image along (d, h, w) for one cell of each feature map."""

    refined: tuple[int, ...] | None = None
    """The maps that end in parts of their own, which losses on other maps do not train."""

    any_size: bool = True
    """Whether crops of all sizes take the same steps: what looks at the size to choose them is
    exported for one (`pretrain.portable`)."""

    grad_checkpointing: bool = False
    """Whether the parts that `run` calls are computed again in the backward pass."""

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trades time for memory: only the inputs of blocks or stages are kept (timm's name)."""
        self.grad_checkpointing = enable

    def run(self, part: Callable[..., Any], *args: Any) -> Any:
        """Calls a block or stage, checkpointed where that is switched on and a gradient follows.

        Masks are arguments like any other, so that what is computed again sees the same ones. An
        encoder that only passes gradients on to adapters is in evaluation mode, and is included.
        """
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(part, *args, use_reentrant=False)
        return part(*args)

    def compile_parts(self) -> list[nn.Module]:
        """Returns the modules to compile one by one: those whose calls do all the work."""
        return [self]

    def layers(self) -> list[list[nn.Module | nn.Parameter]]:
        """Returns the encoder in the order of its depth, what an image passes first at the start.

        Finetuning freezes the first of them and slows them down. Each parameter belongs to exactly
        one layer; a backbone that does not say where it can be cut is one layer.
        """
        return [[self]]

    def layer_rates(self, decay: float) -> dict[str, float]:
        """Returns the share of the rate for each parameter, by name: layer-wise decay.

        As BEiT finetunes (Bao et al. 2021, arXiv:2106.08254) and DINOv2 pretrains: layer l of L has
        decay^(L - l), and what is on top of the encoder the whole rate.
        """
        layers = self.layers()
        owners = {
            id(parameter): number
            for number, layer in enumerate(layers)
            for part in layer
            for parameter in ([part] if isinstance(part, nn.Parameter) else part.parameters())
        }
        return {
            name: decay ** (len(layers) - owners[id(parameter)])
            for name, parameter in self.named_parameters()
        }

    def own_decoder(self, out_channels: int) -> nn.Module | None:
        """Returns the decoder that was published with this encoder, if it needs one of its own.

        It is called as `decoder(image, features)` and gives [B, out_channels, D, H, W]. Parameters
        whose names begin with `head` belong to the task and do not transfer to another one.
        """
        return None

    def grids(self, shape: Sequence[int]) -> list[tuple[int, int, int]]:
        """Returns the (d, h, w) size of each feature map for an image whose last axes are `shape`.

        Raises:
            ValueError: if the backbone cannot take such a crop; the message says which it can.
        """
        raise NotImplementedError

    def no_weight_decay(self) -> set[str]:
        """Returns the names of parameters to keep from decay besides biases and norms."""
        return set()

    def forward(self, x: Tensor) -> list[Tensor]:
        """Returns the feature maps [B, C_i, D_i, H_i, W_i], finest first."""
        raise NotImplementedError


def divided(
    shape: Sequence[int], strides: Sequence[tuple[int, int, int]], name: str = "this encoder"
) -> list[tuple[int, int, int]]:
    """The (d, h, w) size of each map of a pyramid for a crop whose last axes are `shape`.

    Raises:
        ValueError: if the last of the strides does not divide the crop, or leaves a single cell,
            which no norm over space can normalise.
    """
    size, total = tuple(shape[-3:]), strides[-1]  # not cast: see TokenBackbone.grid
    if any(s < t or s % t for s, t in zip(size, total, strict=True)):
        raise ValueError(
            f"a crop of {list(size)} voxels does not fit {name}, whose total stride is "
            f"{list(total)}; sides are (d, h, w) and must be multiples, for example "
            f"{fitting_crop(size, total)}"
        )
    if size == total:
        raise ValueError(
            f"a crop of {list(size)} voxels shrinks to a single cell in {name}, whose total stride "
            "it is; take a larger crop or fewer stages"
        )
    d, h, w = size
    return [(d // sd, h // sh, w // sw) for sd, sh, sw in strides]


def fitting_crop(size: Sequence[int], unit: Sequence[int]) -> list[int]:
    """A crop near `size` whose sides are multiples of `unit`, both (d, h, w), for messages.

    The same sides in another order if they fit there, as when a slice is given as (h, w, d); else
    each side rounded, but not to a single unit, of which nothing can be hidden or normalised.
    """
    for order in permutations(size):
        if not any(s % u for s, u in zip(order, unit, strict=True)):
            return list(order)
    near = [max(round(s / u), 1) * u for s, u in zip(size, unit, strict=True)]
    return near if near != list(unit) else [2 * u if u > 1 else 1 for u in unit]
