"""What the convolutional encoders are made of, and how they leave hidden parts of a crop out.

Every part is called as `part(x, visible)`. Without a mask it is the ordinary dense layer. With one,
it behaves as a sparse convolution on a dense grid does (SparK, Tian et al. 2023, arXiv:2301.03580;
in 3D nnssl's S3D, Wald et al. 2024, arXiv:2410.23132): norm statistics are those of the visible
cells alone, and hidden cells of the output are zero. The mask is an argument and no state, so that
what is checkpointed or compiled sees the mask of its own call. Nothing is gathered or indexed by
it: shapes never depend on values.

Shape legend: B batch, C channels, D H W cells of a map, visible bool [B, 1, D, H, W], True = seen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, TypeVar

import torch
from pydantic import Field
from torch import Tensor, nn

from pretrain.backbones.backbone import Backbone, divided
from pretrain.masking import enlarge, triple

_Each = TypeVar("_Each")
Stages = Annotated[tuple[_Each, ...], Field(min_length=1, max_length=12)]
Channels = Annotated[int, Field(ge=1, le=4096)]
Stride = Annotated[int, Field(ge=1, le=16)]


class InstanceNorm(nn.InstanceNorm3d):
    """Instance norm that can leave hidden cells out of its statistics and of its output."""

    def forward(self, x: Tensor, visible: Tensor | None = None) -> Tensor:
        """Normalises [B, C, D, H, W] per sample and channel; hidden cells become zero.

        Samples may differ in how much of them is visible. Statistics are taken in float32.
        """
        if visible is None:
            return super().forward(x)
        axes = (2, 3, 4)
        count = visible.sum(axes, keepdim=True).clamp(min=1)  # [B, 1, 1, 1, 1]
        seen = torch.where(visible, x.float(), 0.0)
        mean = seen.sum(axes, keepdim=True) / count
        centred = torch.where(visible, seen - mean, 0.0)
        variance = centred.square().sum(axes, keepdim=True) / count
        scale = (variance + self.eps).rsqrt()  # [B, C, 1, 1, 1]
        if not self.affine:
            return (centred * scale).to(x.dtype)
        weight, bias = self.weight.view(-1, 1, 1, 1), self.bias.view(-1, 1, 1, 1)
        # The bias is what would fill hidden cells again.
        return torch.where(visible, centred * (scale * weight) + bias, 0.0).to(x.dtype)


class ConvNorm(nn.Module):
    """Convolution, instance norm and, unless the caller adds something first, LeakyReLU.

    What the convolution writes into hidden cells is read by nobody: the norm behind it leaves
    them out and blanks them, and LeakyReLU keeps zero.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int = 3,
        stride: int | tuple[int, int, int] = 1,
        *,
        bias: bool = True,
        activation: bool = True,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv3d(in_channels, out_channels, kernel, stride, kernel // 2, bias=bias)
        self.norm = InstanceNorm(out_channels, eps=1e-5, affine=True)
        self.nonlin = nn.LeakyReLU(0.01, inplace=True) if activation else nn.Identity()

    def forward(self, x: Tensor, visible: Tensor | None = None) -> Tensor:
        """Maps [B, C_in, D, H, W] to [B, C_out, D/s, H/s, W/s], the resolution of `visible`."""
        return self.nonlin(self.norm(self.conv(x), visible))


class Chain(nn.Sequential):
    """Parts one after the other, all given the same mask."""

    def forward(self, x: Tensor, visible: Tensor | None = None) -> Tensor:
        """Maps [B, C_in, D, H, W] to what the last part returns."""
        for part in self:
            x = part(x, visible)
        return x


class ConvStack(nn.Module):
    """Convolutions one after the other, the first of which changes resolution and channels."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        count: int,
        stride: int | tuple[int, int, int] = 1,
    ) -> None:
        super().__init__()
        first = ConvNorm(in_channels, out_channels, stride=stride)
        self.convs = Chain(first, *(ConvNorm(out_channels, out_channels) for _ in range(1, count)))

    def forward(self, x: Tensor, visible: Tensor | None = None) -> Tensor:
        """Maps [B, C_in, D, H, W] to [B, C_out, D/s, H/s, W/s], the resolution of `visible`."""
        return self.convs(x, visible)


def check_same_stages(**lists: Sequence[object]) -> None:
    """Looks whether lists, one for each argument of a constructor, have an entry for each stage.

    Raises:
        ValueError: if they differ in length, or are empty.
    """
    lengths = [len(each) for each in lists.values()]
    if not min(lengths) == max(lengths) > 0:
        *names, last = lists
        *found, end = lengths
        raise ValueError(
            f"{', '.join(names)} and {last} must name the same stages, found "
            f"{', '.join(map(str, found))} and {end} entries"
        )


class Pyramid(Backbone):
    """An encoder of stages, each coarser than the one before, that can leave hidden blocks out.

    Subclasses set `stem`, at the resolution of the image or None, and `stages`.

    Args:
        in_channels: channels of the image.
        features: channels of each stage.
        steps: stride of each stage against the one before.
    """

    stem: nn.Module | None
    stages: nn.Sequential

    def __init__(
        self, in_channels: int, features: Sequence[int], steps: Sequence[tuple[int, int, int]]
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.channels = tuple(int(f) for f in features)
        self.strides = tuple(
            triple([math.prod(step[axis] for step in steps[: i + 1]) for axis in range(3)])
            for i in range(len(steps))
        )

    def grids(self, shape: Sequence[int]) -> list[tuple[int, int, int]]:
        """Returns the (d, h, w) size of every feature map for a crop of `shape` voxels.

        Raises:
            ValueError: if the total stride does not divide the crop, or leaves a single cell,
                which instance norm cannot normalise.
        """
        return divided(shape, self.strides)

    def layers(self) -> list[list[nn.Module | nn.Parameter]]:
        """Returns the stages; the stem belongs to the first."""
        stages: list[list[nn.Module | nn.Parameter]] = [[stage] for stage in self.stages]
        if self.stem is not None:
            stages[0].insert(0, self.stem)
        return stages

    def visible(self, hidden: Tensor, shape: Sequence[int]) -> list[Tensor | None]:
        """Returns what is visible of each feature map, bool [B, 1, D_i, H_i, W_i].

        A cell within a block shares the block's fate. A map with a cell larger than a block along
        some axis counts as visible throughout and has None: the rule of nnssl, where at 160^3 and
        blocks of 16 the last stage, 5^3 cells for 10^3 blocks, is an ordinary dense one.

        Args:
            hidden: bool [B, 1, gd, gh, gw], one cell per block, True = hidden.
            shape: the image's; its last axes are voxels.

        Raises:
            ValueError: if the blocks do not divide the crop, or cells do not divide the blocks.
        """
        block = _block(hidden, shape)
        masks: list[Tensor | None] = []
        for stride in self.strides:
            if any(s > b for s, b in zip(stride, block, strict=True)):
                masks.append(None)
                continue
            if any(b % s for s, b in zip(stride, block, strict=True)):
                near = [max(round(b / s), 1) * s for s, b in zip(stride, block, strict=True)]
                raise ValueError(
                    f"blocks of {list(block)} voxels do not fit this encoder, whose strides are "
                    f"{[list(s) for s in self.strides]}: they hold no whole number of cells of "
                    f"{list(stride)} voxels; take for example blocks of {near}"
                )
            cells = triple([b // s for s, b in zip(stride, block, strict=True)])
            masks.append(~enlarge(hidden, cells))
        return masks

    def forward(self, x: Tensor, hidden: Tensor | None = None) -> list[Tensor]:
        """Returns the feature maps [B, C_i, D_i, H_i, W_i] of an image [B, C, D, H, W].

        With `hidden`, bool [B, 1, gd, gh, gw], one cell per block of voxels, hidden voxels are
        never read, whatever they hold, and hidden cells of the maps are zero (see `visible`).

        Raises:
            ValueError: if crop, blocks and strides do not fit.
        """
        self.grids(x.shape)
        voxels: Tensor | None = None
        masks: list[Tensor | None] = [None] * len(self.strides)
        if hidden is not None:
            masks = self.visible(hidden, x.shape)
            voxels = ~enlarge(hidden, _block(hidden, x.shape))
            x = torch.where(voxels, x, 0.0)
        if self.stem is not None:
            x = self.stem(x, voxels)
        maps = []
        for stage, visible in zip(self.stages, masks, strict=True):
            x = self.run(stage, x, visible)
            maps.append(x)
        return maps


def _block(hidden: Tensor, shape: Sequence[int]) -> tuple[int, int, int]:
    """Voxels of a block along (d, h, w)."""
    size, grid = [int(s) for s in shape[-3:]], [int(g) for g in hidden.shape[-3:]]
    if any(s % g for s, g in zip(size, grid, strict=True)):
        raise ValueError(
            f"a mask of {grid} blocks does not divide a crop of {size} voxels into whole ones"
        )
    return triple([s // g for s, g in zip(size, grid, strict=True)])


def init_convolution(module: nn.Module) -> None:
    """Initialises convolutions for the LeakyReLU that follows: Kaiming-normal, zero biases."""
    if isinstance(module, nn.Conv3d | nn.ConvTranspose3d):
        nn.init.kaiming_normal_(module.weight, a=0.01)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
