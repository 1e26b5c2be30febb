"""Residual U-Net encoder (ResEnc).

Isensee et al. 2024, "nnU-Net Revisited", arXiv:2404.09556; the block is a ResNet-D basic block
(He et al. 2018, arXiv:1812.01187). An own implementation whose parameters carry the names that
dynamic-network-architectures uses (`stem.convs.0.conv`, `stages.1.blocks.0.skip.1.norm`, ...).
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import Tensor, nn

from pretrain.backbones.convolution import (
    Chain,
    Channels,
    ConvNorm,
    ConvStack,
    Pyramid,
    Stages,
    Stride,
    check_same_stages,
    init_convolution,
)
from pretrain.masking import triple


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

    def forward(self, x: Tensor, visible: Tensor | None = None) -> Tensor:
        """Maps [B, C_in, D, H, W] to [B, C_out, D/s, H/s, W/s], the resolution of `visible`."""
        skip = x
        for part in self.skip:
            # A pool needs no mask: the cells below a hidden one are hidden and zero, all of them.
            skip = part(skip, visible) if isinstance(part, ConvNorm) else part(skip)
        return self.nonlin2(self.conv2(self.conv1(x, visible), visible) + skip)


class Stage(nn.Module):
    """Residual blocks, the first of which changes resolution and channels."""

    def __init__(
        self, in_channels: int, out_channels: int, count: int, stride: tuple[int, int, int]
    ) -> None:
        super().__init__()
        first = ResidualBlock(in_channels, out_channels, stride)
        rest = (ResidualBlock(out_channels, out_channels) for _ in range(count - 1))
        self.blocks = Chain(first, *rest)

    def forward(self, x: Tensor, visible: Tensor | None = None) -> Tensor:
        """Maps [B, C_in, D, H, W] to [B, C_out, D/s, H/s, W/s], the resolution of `visible`."""
        return self.blocks(x, visible)


class ResEncUNetEncoder(Pyramid):
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
        features: Stages[Channels] = (32, 64, 128, 256, 320, 320),
        strides: Stages[Stride | tuple[Stride, Stride, Stride]] = (1, 2, 2, 2, 2, 2),
        blocks: Stages[Annotated[int, Field(ge=1, le=100)]] = (1, 3, 4, 6, 6, 6),
    ) -> None:
        check_same_stages(features=features, strides=strides, blocks=blocks)
        steps = [triple(s) for s in strides]
        super().__init__(in_channels, features, steps)
        self.stem = ConvStack(in_channels, self.channels[0], 1)
        inputs = (self.channels[0], *self.channels[:-1])
        self.stages = nn.Sequential(
            *(Stage(*args) for args in zip(inputs, self.channels, blocks, steps, strict=True))
        )
        self.apply(init_convolution)
