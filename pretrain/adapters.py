"""Named changes that make the weights of an encoder fit another input, and nothing else.

An architecture that is built for other channels, another patch or slices has weights of the same
names, and of other shapes where they meet the image. Each of these has a change that keeps what
the weights answer where both inputs say the same:

- channels, one to several: `repeat` gives each a share of the weights, so an image that all
  channels repeat is answered as before (nnU-Net and OpenMind, arXiv:2412.17041); `first` gives the
  first channels the weights and the others zeros, so these begin as if they were not there.
- channels, several to one: the sum, as for an image that is repeated.
- patch: trilinear between the voxels of the kernel, times the old volume over the new, so a patch
  of one value is answered as before.
- slices to volumes: the kernel is repeated along the new axis, a share each (I3D: Carreira and
  Zisserman 2017, arXiv:1705.07750), so what does not change along it is answered as before; volumes
  to slices: the sum.

Learned positions of another reference grid are interpolated in it, as the encoder does for a crop;
the others are computed. What has another width or depth is another network.

Shape legend: O outputs, C channels, d h w voxels of a kernel or cells of a grid, E width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd

Channels = Literal["repeat", "first"]


def adapted(
    value: Tensor, shape: tuple[int, ...], channels: Channels = "repeat"
) -> tuple[Tensor, str] | None:
    """A kernel in the shape that another input needs, and in words how; None: no adapter can.

    Args:
        value: a kernel [O, C, d, h, w], or [O, C, h, w] of slices.
        shape: that it is to have.
        channels: how several channels begin from one.
    """
    sizes = {value.ndim, len(shape)}
    if not sizes <= {4, 5} or value.shape[0] != shape[0]:
        return None
    made = value[:, :, None] if value.ndim == 4 else value
    wanted = (*shape[:2], 1, *shape[2:]) if len(shape) == 4 else shape
    said = []
    if made.shape[1] != wanted[1]:
        changed = to_channels(made, wanted[1], channels)
        if changed is None:
            return None
        said.append(f"{made.shape[1]} to {wanted[1]} channels: {changed[1]}")
        made = changed[0]
    if tuple(made.shape[2:]) != wanted[2:]:
        old, new = list(made.shape[2:]), list(wanted[2:])
        made, how = to_kernel(made, wanted[2:])
        said.append(f"kernel {old} to {new}: {how}")
    return made.reshape(shape).contiguous(), "; ".join(said) or "a slice's kernel with its axis"


def to_channels(weight: Tensor, count: int, how: Channels = "repeat") -> tuple[Tensor, str] | None:
    """[O, C, ...] to [O, count, ...], and in words how; None: they cannot be told apart.

    Several channels become others only by `first`: which of them is like which, nobody knows.
    """
    own = weight.shape[1]
    if own == 1 and how == "repeat":
        return weight.repeat(1, count, *[1] * (weight.ndim - 2)) / count, f"1/{count} each"
    if count == 1:
        return weight.sum(1, keepdim=True), "their sum, as for an image repeated"
    if how == "repeat":
        return None
    kept = weight[:, :count]
    rest = weight.new_zeros(weight.shape[0], count - kept.shape[1], *weight.shape[2:])
    return torch.cat([kept, rest], 1), f"the first {kept.shape[1]}, zeros for the others"


def to_kernel(weight: Tensor, size: tuple[int, ...]) -> tuple[Tensor, str]:
    """[O, C, d, h, w] to a kernel of another size, and in words how."""
    said = []
    for axis, (old, new) in enumerate(zip(weight.shape[2:], size, strict=True), start=2):
        if old == 1 < new:
            counts = [new if i == axis else 1 for i in range(weight.ndim)]
            weight = weight.repeat(counts) / new
            said.append(f"1/{new} along {'dhw'[axis - 2]}")
        elif new == 1 < old:
            weight = weight.sum(axis, keepdim=True)
            said.append(f"the sum along {'dhw'[axis - 2]}")
    if tuple(weight.shape[2:]) != tuple(size):
        share = weight[0, 0].numel() / torch.Size(size).numel()
        made = F.interpolate(weight.float(), size=size, mode="trilinear", align_corners=False)
        weight = (made * share).to(weight.dtype)
        said.append("trilinear, its volume kept")
    return weight, ", ".join(said)


def to_grid(weight: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, str] | None:
    """Learned positions [d, h, w, E] on another grid, and in words how; None: of another width."""
    if weight.ndim != 4 or weight.shape[3] != shape[3]:
        return None
    maps = weight.permute(3, 0, 1, 2)[None].float()
    made = F.interpolate(maps, size=shape[:3], mode="trilinear", align_corners=False)
    said = f"positions {list(weight.shape[:3])} to {list(shape[:3])}: trilinear"
    return made[0].permute(1, 2, 3, 0).to(weight.dtype).contiguous(), said


def adapted_state(
    state: Mapping[str, Tensor], module: nn.Module, channels: Channels = "repeat"
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Weights in the shapes of a module, and how those that had others were changed.

    What has the right shape, or none that an adapter makes, stays as it is.
    """
    found, how = dict(state), {}
    for path, layer in module.named_modules(remove_duplicate=False):
        name, own = f"{path}.weight", getattr(layer, "weight", None)
        if name in state and own is not None and state[name].shape != own.shape:
            changed = _changed(layer, state[name], tuple(own.shape), channels)
            if changed is not None:
                found[name], how[name] = changed
    return found, dict(sorted(how.items()))


def _changed(
    layer: nn.Module, value: Tensor, shape: tuple[int, ...], channels: Channels
) -> tuple[Tensor, str] | None:
    """What the kind of a layer asks for; None: it has no adapter."""
    if isinstance(layer, _ConvNd):
        return adapted(value, shape, channels)
    from pretrain.backbones.vit import Position  # it imports timm, which most do without

    return to_grid(value, shape) if isinstance(layer, Position) else None
