"""Residual U-Net encoder (ResEnc).

Isensee et al. 2024, "nnU-Net Revisited", arXiv:2404.09556; the block is a ResNet-D basic block
(He et al. 2018, arXiv:1812.01187). An own implementation whose parameters carry the names that
dynamic-network-architectures uses (`stem.convs.0.conv`, `stages.1.blocks.0.skip.1.norm`, ...).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, TypeVar

from pydantic import Field
from torch import Tensor, nn

from pretrain.backbones.backbone import Backbone
from pretrain.masking import triple

_Each = TypeVar("_Each")
Stages = Annotated[tuple[_Each, ...], Field(min_length=1, max_length=12)]
Stride = Annotated[int, Field(ge=1, le=16)]


class ConvNorm(nn.Module):
    """Convolution, instance norm and, unless the caller adds something first, LeakyReLU."""

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
        self.norm = nn.InstanceNorm3d(out_channels, eps=1e-5, affine=True)
        self.nonlin = nn.LeakyReLU(0.01, inplace=True) if activation else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Maps [B, C_in, D, H, W] to [B, C_out, D/s, H/s, W/s]."""
        return self.nonlin(self.norm(self.conv(x)))


class ConvStack(nn.Module):
    """Convolutions one after the other, the first of which changes the channels."""

    def __init__(self, in_channels: int, out_channels: int, count: int) -> None:
        super().__init__()
        self.convs = nn.Sequential(
            *(ConvNorm(out_channels if i else in_channels, out_channels) for i in range(count))
        )

    def forward(self, x: Tensor) -> Tensor:
        """Maps [B, C_in, D, H, W] to [B, C_out, D, H, W]."""
        return self.convs(x)


class ResidualBlock(nn.Module):
    """Two convolutions beside a skip that is pooled and projected where the shape changes."""

    def __init__(
        self, in_channels: int, out_channels: int, stride: tuple[int, int, int] = (1, 1, 1)
    ) -> None:
        super().__init__()
        self.conv1 = ConvNorm(in_channels, out_channels, 3, stride)
        self.conv2 = ConvNorm(out_channels, out_channels, activation=False)
        self.nonlin2 = nn.LeakyReLU(0.01, inplace=True)
        skip: list[nn.Module] = []
        if stride != (1, 1, 1):
            skip.append(nn.AvgPool3d(stride, stride))
        if in_channels != out_channels:
            skip.append(ConvNorm(in_channels, out_channels, 1, bias=False, activation=False))
        self.skip = nn.Sequential(*skip)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [B, C_in, D, H, W] to [B, C_out, D/s, H/s, W/s]."""
        return self.nonlin2(self.conv2(self.conv1(x)) + self.skip(x))


class Stage(nn.Module):
    """Residual blocks, the first of which changes resolution and channels."""

    def __init__(
        self, in_channels: int, out_channels: int, count: int, stride: tuple[int, int, int]
    ) -> None:
        super().__init__()
        first = ResidualBlock(in_channels, out_channels, stride)
        rest = (ResidualBlock(out_channels, out_channels) for _ in range(count - 1))
        self.blocks = nn.Sequential(first, *rest)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [B, C_in, D, H, W] to [B, C_out, D/s, H/s, W/s]."""
        return self.blocks(x)


class ResEncUNetEncoder(Backbone):
    """Pyramid of residual stages; the feature maps are the outputs of all stages, finest first.

    Args:
        in_channels: channels of the image.
        features: channels of each stage.
        strides: stride of each stage against the one before, a number or (d, h, w); the first
            is usually 1, so that the finest map has the resolution of the image.
        blocks: residual blocks of each stage.

    Raises:
        ValueError: if the three lists differ in length.
    """

    def __init__(
        self,
        *,
        in_channels: Annotated[int, Field(ge=1, le=1024)] = 1,
        features: Stages[Annotated[int, Field(ge=1, le=4096)]] = (32, 64, 128, 256, 320, 320),
        strides: Stages[Stride | tuple[Stride, Stride, Stride]] = (1, 2, 2, 2, 2, 2),
        blocks: Stages[Annotated[int, Field(ge=1, le=100)]] = (1, 3, 4, 6, 6, 6),
    ) -> None:
        super().__init__()
        if not len(features) == len(strides) == len(blocks) > 0:
            raise ValueError(
                "features, strides and blocks must name the same stages, found "
                f"{len(features)}, {len(strides)} and {len(blocks)} entries"
            )
        steps = [triple(s) for s in strides]
        self.in_channels = in_channels
        self.channels = tuple(int(f) for f in features)
        self.strides = tuple(
            triple([math.prod(step[axis] for step in steps[: i + 1]) for axis in range(3)])
            for i in range(len(steps))
        )
        self.stem = ConvStack(in_channels, self.channels[0], 1)
        inputs = (self.channels[0], *self.channels[:-1])
        self.stages = nn.Sequential(
            *(Stage(*args) for args in zip(inputs, self.channels, blocks, steps, strict=True))
        )
        self.apply(init_convolution)

    def grids(self, shape: Sequence[int]) -> list[tuple[int, int, int]]:
        """Returns the (d, h, w) size of every feature map for a crop of `shape` voxels.

        Raises:
            ValueError: if the total stride does not divide the crop, or leaves a single voxel,
                which instance norm cannot normalise.
        """
        size = tuple(int(s) for s in shape[-3:])
        total = self.strides[-1]
        if any(s % t for s, t in zip(size, total, strict=True)):
            near = [max(round(s / t), 1) * t for s, t in zip(size, total, strict=True)]
            raise ValueError(
                f"a crop of {list(size)} voxels does not fit this encoder, whose total stride is "
                f"{list(total)}; each side must be a multiple, for example {near}"
            )
        if size == total:
            raise ValueError(
                f"a crop of {list(size)} voxels shrinks to a single voxel in this encoder of total "
                f"stride {list(total)}; take a larger crop or fewer stages"
            )
        return [
            triple([s // t for s, t in zip(size, stride, strict=True)]) for stride in self.strides
        ]

    def forward(self, x: Tensor) -> list[Tensor]:
        """Returns the feature maps [B, C_i, D_i, H_i, W_i] of an image [B, C, D, H, W]."""
        self.grids(x.shape)
        x = self.stem(x)
        maps = []
        for stage in self.stages:
            x = self.run(stage, x)
            maps.append(x)
        return maps


def init_convolution(module: nn.Module) -> None:
    """Initialises convolutions for the LeakyReLU that follows: Kaiming-normal, zero biases."""
    if isinstance(module, nn.Conv3d | nn.ConvTranspose3d):
        nn.init.kaiming_normal_(module.weight, a=0.01)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
