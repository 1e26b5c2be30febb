"""Plain U-Net encoder, as nnU-Net configures it.

Ronneberger et al. 2015, arXiv:1505.04597, in the form of nnU-Net (Isensee et al. 2021): two
convolutions per stage, the first of which strides. An own implementation whose parameters carry
the names of dynamic-network-architectures' PlainConvEncoder (`stages.1.0.convs.0.conv`, ...).
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import nn

from pretrain.backbones.convolution import (
    Chain,
    Channels,
    ConvStack,
    Pyramid,
    Stages,
    Stride,
    check_same_stages,
    init_convolution,
)
from pretrain.masking import triple


class UNetEncoder(Pyramid):
    """Pyramid of convolution stages; the feature maps are their outputs, finest first.

    Args:
        in_channels: channels of the image.
        features: channels of each stage.
        strides: stride of each stage against the one before, a number or (d, h, w); the first
            is usually 1, so that the finest map has the resolution of the image.
        convs: convolutions of each stage.

    Raises:
        ValueError: if the three lists differ in length.
    """

    def __init__(
        self,
        *,
        in_channels: Annotated[int, Field(ge=1, le=1024)] = 1,
        features: Stages[Channels] = (32, 64, 128, 256, 320, 320),
        strides: Stages[Stride | tuple[Stride, Stride, Stride]] = (1, 2, 2, 2, 2, 2),
        convs: Stages[Annotated[int, Field(ge=1, le=100)]] = (2, 2, 2, 2, 2, 2),
    ) -> None:
        check_same_stages(features=features, strides=strides, convs=convs)
        steps = [triple(s) for s in strides]
        super().__init__(in_channels, features, steps)
        self.stem = None
        inputs = (in_channels, *self.channels[:-1])
        # A chain of one: in nnU-Net's form a pool may come before the convolutions.
        self.stages = nn.Sequential(
            *(
                Chain(ConvStack(*args))
                for args in zip(inputs, self.channels, convs, steps, strict=True)
            )
        )
        self.apply(init_convolution)
