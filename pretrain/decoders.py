"""Decoders from an encoder's feature maps back to the resolution of the image.

Objectives rebuild images with them and finetune segments with them, so a decoder that was
pretrained can be transferred. All are called as `decoder(image, features)`, return
[B, out_channels, D, H, W] and say `out_channels`; parameters whose names begin with `head` belong
to the task and stay behind.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from data_prep.errors import InputError
from pretrain.backbones.backbone import Backbone
from pretrain.backbones.convolution import ConvNorm, ConvStack, init_convolution
from pretrain.backbones.unet import UNetEncoder
from pretrain.backbones.vit import ChannelNorm, TokenBackbone
from pretrain.masking import triple

_Value = TypeVar("_Value")


def without_head(named: Mapping[str, _Value]) -> dict[str, _Value]:
    """Of a decoder's tensors by name, those that transfer to another task."""
    return {name: value for name, value in named.items() if not name.startswith("head")}


def first_blocks(named: Mapping[str, _Value], blocks: int | None) -> dict[str, _Value]:
    """Of a U-Net decoder's tensors by name, those of its first blocks; None: all but the head."""
    if blocks is None:
        return without_head(named)
    parts = tuple(f"{part}.{n}." for n in range(blocks) for part in ("transpconvs", "stages"))
    return {name: value for name, value in named.items() if name.startswith(parts)}


def build_decoder(encoder: Backbone, out_channels: int) -> nn.Module:
    """The decoder that fits: the encoder's own, UNETR-like on tokens, U-Net on a pyramid."""
    own = encoder.own_decoder(out_channels)
    if own is not None:
        return own
    if isinstance(encoder, TokenBackbone):
        if encoder.decoder == "patch":
            return PatchDecoder(encoder.embed_dim, encoder.patch_size, out_channels)
        if len(encoder.taps) != UNETRDecoder.TAPS:
            raise InputError(
                f"backbone.taps={list(encoder.taps)}: this decoder joins {UNETRDecoder.TAPS} maps "
                "of the encoder; pretrain with four taps, or with backbone.decoder=patch"
            )
        return UNETRDecoder(
            encoder.in_channels, encoder.embed_dim, encoder.patch_size, out_channels
        )
    return unet_decoder(encoder, out_channels)


def unet_decoder(
    encoder: Backbone,
    out_channels: int,
    convs: int | None = None,
    kind: type[UNetDecoder] | None = None,
) -> UNetDecoder:
    """A U-Net's decoder; nnU-Net has two convolutions a stage in its plain one, one in ResEnc."""
    if convs is None:
        convs = 2 if isinstance(encoder, UNetEncoder) else 1
    return (kind or UNetDecoder)(encoder.channels, encoder.strides, out_channels, convs)


def full_outputs(decoder: nn.Module, image: Tensor, features: list[Tensor]) -> list[Tensor]:
    """All that a decoder has to say at the resolution of the image, for deep supervision.

    One output for most. A decoder with a method `outputs` gives several, finest first; coarser
    ones are interpolated.
    """
    scales = getattr(decoder, "outputs", None)
    if scales is None:
        return [decoder(image, features)]
    size = image.shape[2:]
    return [resized(x, size) for x in scales(image, features)]


class UNetDecoder(nn.Module):
    """The decoder of a U-Net: transposed convolution, concatenated skip, convolutions, per stage.

    Ronneberger et al. 2015, arXiv:1505.04597, in the form of nnU-Net (Isensee et al. 2021), whose
    parameter names it carries (`transpconvs.0`, `stages.0.convs.0.conv`), coarsest stage first.
    It needs maps that grow coarser; if the finest is coarser than the image, the output is
    interpolated.

    Args:
        channels: channels of the feature maps, finest first.
        strides: their strides against the image, finest first.
        out_channels: channels of the output.
        convs_per_stage: 3x3x3 convolutions after each concatenation.

    Raises:
        ValueError: if a map is not a whole multiple coarser than the one before.
    """

    def __init__(
        self,
        channels: Sequence[int],
        strides: Sequence[tuple[int, int, int]],
        out_channels: int,
        convs_per_stage: int = 1,
    ) -> None:
        super().__init__()
        self.out_channels = out_channels
        self.transpconvs = nn.ModuleList()
        self.stages = nn.ModuleList()
        for i in range(len(channels) - 1, 0, -1):
            fine, coarse = strides[i - 1], strides[i]
            if fine == coarse or any(c % f for f, c in zip(fine, coarse, strict=True)):
                raise ValueError(
                    "a U-Net decoder needs feature maps that grow coarser by whole factors, found "
                    f"strides {[list(s) for s in strides]}"
                )
            step = triple([c // f for f, c in zip(fine, coarse, strict=True)])
            self.transpconvs.append(nn.ConvTranspose3d(channels[i], channels[i - 1], step, step))
            self.stages.append(ConvStack(2 * channels[i - 1], channels[i - 1], convs_per_stage))
        self.head = nn.Conv3d(channels[0], out_channels, 1)
        self.apply(init_convolution)

    def forward(self, image: Tensor, features: list[Tensor]) -> Tensor:
        """Decodes maps [B, C_i, D_i, H_i, W_i], finest first; the image only lends its size."""
        x = self.head(self.decoded(features)[0])
        return resized(x, image.shape[2:])

    def decoded(self, features: list[Tensor], blocks: int | None = None) -> list[Tensor]:
        """What its stages give, finest first; without a stage the one map that there is.

        With `blocks`, only that many stages are run, from the coarsest.
        """
        x, maps = features[-1], []
        levels = zip(self.transpconvs, self.stages, reversed(features[:-1]), strict=True)
        for upsample, stage, skip in islice(levels, blocks):
            x = stage(torch.cat([upsample(x), skip], dim=1))
            maps.append(x)
        return maps[::-1] or [x]


class UNETRDecoder(nn.Module):
    """Decodes the maps of a ViT, all at the stride of its patch, with skips and the image.

    In the manner of UNETR (Hatamizadeh et al. 2021, arXiv:2103.10504): the deepest map is doubled
    step by step up to full resolution; shallower maps, doubled on their own, join on the way, and
    a convolution of the image itself joins at full resolution, where a ViT has no detail.

    A side that is no power of two (12) is doubled as often as fits and then interpolated; an
    anisotropic patch doubles its long sides first. Level j is reached when j doublings remain and
    has feature_size * 2^j channels.

    Args:
        in_channels: channels of the image.
        embed_dim: width of the ViT.
        patch_size: voxels of its patch, one number or (d, h, w); 2 or more along some axis.
        out_channels: channels of the output.
        feature_size: channels at full resolution.

    Raises:
        ValueError: if the patch is a single voxel.
    """

    TAPS = 4

    def __init__(
        self,
        in_channels: int,
        embed_dim: int,
        patch_size: int | tuple[int, int, int],
        out_channels: int,
        feature_size: int = 16,
    ) -> None:
        super().__init__()
        self.out_channels = out_channels
        doublings = [p.bit_length() - 1 for p in triple(patch_size)]  # floor(log2)
        top = max(doublings)
        if top == 0:
            raise ValueError("a patch of one voxel leaves nothing to decode")
        # Step i leads from level i + 1 to level i; an axis joins once its doublings are left.
        steps = [triple([2 if n > level else 1 for n in doublings]) for level in range(top)]
        width = [feature_size * 2**level for level in range(top)]
        # Taps 0..2 go to levels 1..top-1, shallow to fine; uneven numbers share or go without.
        shared = np.array_split(np.arange(self.TAPS - 1), top - 1) if top > 1 else []
        self.sources = [[int(tap) for tap in taps] for taps in shared]

        self.image_skip = ConvNorm(in_channels, feature_size)
        self.ups = nn.ModuleList()
        self.lifts = nn.ModuleList()
        self.merges = nn.ModuleList()
        for level in range(top):
            source = embed_dim if level == top - 1 else width[level + 1]
            self.ups.append(nn.ConvTranspose3d(source, width[level], steps[level], steps[level]))
            sources = self.sources[level - 1] if level else []
            self.lifts.extend(_lift(embed_dim, width[level], steps[level:]) for _ in sources)
            joined = width[level] * (1 + (len(sources) if level else 1))
            self.merges.append(ConvStack(joined, width[level], 2 if level else 1))
        self.head = nn.Conv3d(feature_size, out_channels, 1)
        self.apply(init_convolution)

    def forward(self, image: Tensor, features: list[Tensor]) -> Tensor:
        """Decodes four maps [B, E, gd, gh, gw], shallow to deep, with the image [B, C, D, H, W]."""
        if len(features) != self.TAPS:
            raise ValueError(f"this decoder takes {self.TAPS} feature maps, found {len(features)}")
        lifted = [lift(tap) for lift, tap in zip(self.lifts, features, strict=False)]
        x = features[-1]
        for level in range(len(self.ups) - 1, 0, -1):
            skips = [lifted[tap] for tap in self.sources[level - 1]]
            x = self.merges[level](torch.cat([self.ups[level](x), *skips], dim=1))
        x = self.ups[0](x)
        x = resized(x, image.shape[2:])
        return self.head(self.merges[0](torch.cat([x, self.image_skip(image)], dim=1)))


class PatchDecoder(nn.Module):
    """Decodes the deepest map of a ViT alone, by transposed convolutions of stride 2.

    Published with Primus (Wald et al. 2025, arXiv:2503.01835). Kernels are as large as strides and
    norms are over channels, so each token becomes its own patch of voxels and sees no other. The
    widths fall geometrically towards twice the output's, in multiples of 8, and so depend on
    `out_channels`: only decoders of equal output have equal shapes.

    Args:
        embed_dim: width of the ViT.
        patch_size: voxels of its patch, one number or (d, h, w): powers of two. A shorter side is
            doubled last.
        out_channels: channels of the output.

    Raises:
        ValueError: if a side of the patch is no power of two, or all are 1.
    """

    def __init__(
        self, embed_dim: int, patch_size: int | tuple[int, int, int], out_channels: int
    ) -> None:
        super().__init__()
        self.out_channels = out_channels
        sides = triple(patch_size)
        count = max(sides).bit_length() - 1
        if count == 0 or any(side & (side - 1) for side in sides):
            raise ValueError(
                "the patch decoder doubles its way up and needs a patch whose sides are powers of "
                f"two, one of them 2 or more, found {list(sides)}"
            )
        steps = [triple([2 if side >> n > 1 else 1 for side in sides]) for n in range(count)][::-1]
        shrink = (embed_dim / (2 * out_channels)) ** (1 / count)
        inner = [embed_dim / shrink ** (i + 1) for i in range(count - 1)]
        width = [embed_dim, *(max(8, 8 * round((w + 1e-6) / 8)) for w in inner)]
        self.stages = nn.Sequential(
            *(
                nn.Sequential(
                    nn.ConvTranspose3d(width[i], width[i + 1], steps[i], steps[i]),
                    ChannelNorm(width[i + 1]),
                    nn.GELU(),
                )
                for i in range(count - 1)
            )
        )
        self.head = nn.ConvTranspose3d(width[-1], out_channels, steps[-1], steps[-1])
        self.apply(init_convolution)

    def forward(self, image: Tensor, features: list[Tensor]) -> Tensor:
        """Decodes the last map [B, E, gd, gh, gw] to [B, out_channels, D, H, W]."""
        return self.head(self.stages(features[-1]))


def _lift(in_channels: int, out_channels: int, steps: list[tuple[int, int, int]]) -> nn.Sequential:
    """Doubles a tapped map up to its level; `steps` runs from that level to the coarsest."""
    layers: list[nn.Module] = []
    for i, step in enumerate(reversed(steps)):
        source = out_channels if i else in_channels
        layers.append(nn.ConvTranspose3d(source, out_channels, step, step, bias=False))
        layers.append(nn.InstanceNorm3d(out_channels, eps=1e-5, affine=True))
        layers.append(nn.LeakyReLU(0.01, inplace=True))
    return nn.Sequential(*layers)


def resized(x: Tensor, size: Sequence[int]) -> Tensor:
    """Maps [B, C, d, h, w] at another resolution, interpolated linearly."""
    if x.shape[2:] == tuple(size):
        return x
    return F.interpolate(x, size=tuple(size), mode="trilinear", align_corners=False)
