"""STU-Net: a U-Net of residual blocks that grows in width and depth, decoder and all.

Huang et al. 2023, arXiv:2304.06716: S, B, L and H of 15, 58, 440 and 1457 million parameters. Each
stage begins with a block that changes resolution and channels and projects its shortcut; upsampling
is nearest, without weights, and a 1x1x1 convolution, so that no weight depends on a task's strides
and the whole network but its head transfers. An own implementation, held to the public one's
numbers; `from_published` gives its weights the names that they have here.

Shape legend: B batch, C channels, D H W cells of a map.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from pretrain.backbones.convolution import (
    Chain,
    Channels,
    ConvNorm,
    Pyramid,
    Stages,
    Stride,
    check_same_stages,
    init_convolution,
)
from pretrain.masking import enlarge, triple


class Block(nn.Module):
    """Two convolutions beside a shortcut, which a first block projects without a norm."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: tuple[int, int, int] = (1, 1, 1),
        *,
        project: bool = False,
    ) -> None:
        super().__init__()
        self.conv1 = ConvNorm(in_channels, out_channels, 3, stride)
        self.conv2 = ConvNorm(out_channels, out_channels, activation=False)
        self.shortcut = nn.Conv3d(in_channels, out_channels, 1, stride) if project else None
        self.nonlin2 = nn.LeakyReLU(0.01, inplace=True)

    def forward(self, x: Tensor, visible: Tensor | None = None) -> Tensor:
        """Maps [B, C_in, D, H, W] to [B, C_out, D/s, H/s, W/s], the resolution of `visible`."""
        out = self.conv2(self.conv1(x, visible), visible)
        if self.shortcut is not None:
            x = self.shortcut(x)
            if visible is not None:  # the bias would fill hidden cells again
                x = torch.where(visible, x, 0.0)
        return self.nonlin2(out + x)


def _stage(
    in_channels: int, out_channels: int, count: int, stride: tuple[int, int, int] = (1, 1, 1)
) -> Chain:
    first = Block(in_channels, out_channels, stride, project=True)
    return Chain(first, *(Block(out_channels, out_channels) for _ in range(count - 1)))


class STUNetEncoder(Pyramid):
    """The encoder of STU-Net; the feature maps are the outputs of all stages, finest first.

    Args:
        in_channels: channels of the image.
        features: channels of each stage.
        strides: stride of each stage against the one before, a number or (d, h, w).
        blocks: residual blocks of each stage, here and in the decoder.

    Raises:
        ValueError: if the three lists differ in length.
    """

    def __init__(
        self,
        *,
        in_channels: Annotated[int, Field(ge=1, le=1024)] = 1,
        features: Stages[Channels] = (32, 64, 128, 256, 512, 512),
        strides: Stages[Stride | tuple[Stride, Stride, Stride]] = (1, 2, 2, 2, 2, 2),
        blocks: Stages[Annotated[int, Field(ge=1, le=100)]] = (1, 1, 1, 1, 1, 1),
    ) -> None:
        check_same_stages(features=features, strides=strides, blocks=blocks)
        steps = [triple(s) for s in strides]
        super().__init__(in_channels, features, steps)
        self._make_decoder = functools.partial(
            STUNetDecoder, features=self.channels, steps=steps, blocks=blocks
        )
        self.stem = None
        inputs = (in_channels, *self.channels[:-1])
        self.stages = nn.Sequential(
            *(_stage(*args) for args in zip(inputs, self.channels, blocks, steps, strict=True))
        )
        self.apply(init_convolution)

    def own_decoder(self, out_channels: int) -> STUNetDecoder:
        """Returns STU-Net's decoder."""
        return self._make_decoder(out_channels=out_channels)


class STUNetDecoder(nn.Module):
    """The decoder of STU-Net: what is coarser, repeated, beside the skip, through the blocks.

    `STUNetEncoder.own_decoder` makes it: all arguments but the last are the encoder's.

    Args:
        features: channels of the encoder's maps, finest first.
        steps: stride of each stage of the encoder against the one before.
        blocks: residual blocks of each stage.
        out_channels: channels of the output.
    """

    def __init__(
        self,
        *,
        features: Sequence[int],
        steps: Sequence[tuple[int, int, int]],
        blocks: Sequence[int],
        out_channels: int,
    ) -> None:
        super().__init__()
        self.out_channels = out_channels
        self.steps = list(steps)
        levels = range(len(features) - 2, -1, -1)  # coarsest first
        self.ups = nn.ModuleList(nn.Conv3d(features[i + 1], features[i], 1) for i in levels)
        self.stages = nn.ModuleList(_stage(2 * features[i], features[i], blocks[i]) for i in levels)
        self.head = nn.Conv3d(features[0], out_channels, 1)
        self.apply(init_convolution)

    def forward(self, image: Tensor, features: list[Tensor]) -> Tensor:
        """Decodes maps [B, C_i, D_i, H_i, W_i], finest first, to [B, out_channels, D, H, W]."""
        x = features[-1]
        levels = zip(self.ups, self.stages, self.steps[:0:-1], reversed(features[:-1]), strict=True)
        for up, stage, step, skip in levels:
            # Cells that are repeated are convolved alike, so once is enough.
            x = stage(torch.cat([enlarge(up(x), step), skip], dim=1))
        return enlarge(self.head(x), self.steps[0])


class Published(NamedTuple):
    """Weights of a public STU-Net under the names of this module, and what has no place here."""

    encoder: dict[str, Tensor]
    decoder: dict[str, Tensor]
    skipped: dict[str, str]
    """Published names to reasons."""


_BLOCK = r"conv_blocks_(?:context|localization)\.(\d+\.\d+)"
_RENAMED = {
    _BLOCK + r"\.conv([12])\.(weight|bias)": r"stages.\1.conv\2.conv.\3",
    _BLOCK + r"\.norm([12])\.(weight|bias)": r"stages.\1.conv\2.norm.\3",
    _BLOCK + r"\.conv3\.(weight|bias)": r"stages.\1.shortcut.\2",
    r"upsample_layers\.(\d+)\.conv\.(weight|bias)": r"ups.\1.\2",
}
_HEAD = re.compile(r"seg_outputs\.(\d+)\.(weight|bias)")


def from_published(weights: Mapping[str, Tensor]) -> Published:
    """Names the weights of a public STU-Net (`network_weights` of nnU-Net v2's file) as ours are.

    Of its heads, one for each scale, the finest is our decoder's; the others serve deep supervision
    in training alone.

    Raises:
        ValueError: if there are names that STU-Net does not have; the message lists all of them.
    """
    heads = {name: match for name in weights if (match := _HEAD.fullmatch(name))}
    finest = max((int(match[1]) for match in heads.values()), default=0)
    published, unknown = Published({}, {}, {}), []
    for name, tensor in weights.items():
        if name in heads:
            if int(heads[name][1]) == finest:
                published.decoder[f"head.{heads[name][2]}"] = tensor
            else:
                published.skipped[name] = "head of a coarser scale, for deep supervision"
            continue
        ours = [re.sub(old, new, name) for old, new in _RENAMED.items() if re.fullmatch(old, name)]
        unknown += [] if ours else [name]
        half = published.encoder if name.startswith("conv_blocks_context") else published.decoder
        half.update((new, tensor) for new in ours)
    if unknown:
        raise ValueError(f"no weights of a STU-Net: {', '.join(sorted(unknown))}")
    return published
