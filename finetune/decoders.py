"""Which decoder finetuning puts on an encoder, and those that only finetuning has.

`auto` is the one that pretraining would have taken (`pretrain.decoders`), the only one that a
release's own decoder can be loaded into. All are called as `decoder(image, features)` and give
[B, out_channels, D, H, W]; names of parameters that begin with `head` belong to the task.

Shape legend: B batch, C_i channels of feature map i with D_i, H_i, W_i cells, K outputs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from data_prep.errors import InputError
from finetune.protocol import DecoderKind
from pretrain.backbones.backbone import Backbone
from pretrain.backbones.convolution import init_convolution
from pretrain.backbones.vit import TokenBackbone
from pretrain.decoders import (
    PatchDecoder,
    UNetDecoder,
    UNETRDecoder,
    build_decoder,
    resized,
    unet_decoder,
)
from pretrain.numerics import in_float32
from pretrain.probe import NEIGHBOURS, counted_maps


def choose_decoder(
    encoder: Backbone, out_channels: int, kind: DecoderKind = "auto", *, deep: bool = False
) -> nn.Module:
    """The decoder of that kind for an encoder.

    Args:
        encoder: gives the maps.
        out_channels: K.
        kind: which one.
        deep: whether it also has the heads of nnU-Net's deep supervision.

    Raises:
        InputError: the encoder's maps do not fit it.
    """
    where = f"decoder={kind}: {type(encoder).__name__}"
    if kind == "linear":
        decoder: nn.Module = LinearDecoder(encoder.channels, out_channels)
    elif kind == "knn":
        decoder = NeighbourDecoder(encoder.channels, encoder.strides, out_channels)
    elif kind == "mlp":
        decoder = MLPDecoder(encoder.channels, out_channels)
    elif kind == "unet" or (kind == "auto" and deep and _takes_unet(encoder)):
        try:
            decoder = unet_decoder(encoder, out_channels, None, DeepUNetDecoder if deep else None)
        except ValueError as error:
            raise InputError(f"{where}: {error}") from error
    elif kind == "auto":
        decoder = build_decoder(encoder, out_channels)
    elif not isinstance(encoder, TokenBackbone):
        raise InputError(f"{where} has no tokens to decode; choose auto, unet, linear or mlp")
    elif kind == "unetr":
        if len(encoder.taps) != UNETRDecoder.TAPS:
            raise InputError(
                f"{where} has {len(encoder.taps)} taps, this decoder joins {UNETRDecoder.TAPS}"
            )
        decoder = UNETRDecoder(
            encoder.in_channels, encoder.embed_dim, encoder.patch_size, out_channels
        )
    else:
        taps = len(encoder.taps) if kind == "aggregate" else 1
        try:
            decoder = AggregateDecoder(encoder.embed_dim, taps, encoder.patch_size, out_channels)
        except ValueError as error:
            raise InputError(f"{where}: {error}") from error
        if kind == "patch":
            decoder = decoder.decode
    if deep and not hasattr(decoder, "outputs"):
        raise InputError(
            f"deep_supervision=true: {type(decoder).__name__} has an output at one scale only; "
            "it goes with U-Net decoders and with PCT-Net's"
        )
    return decoder


def _takes_unet(encoder: Backbone) -> bool:
    """Whether `auto` comes to a U-Net's decoder."""
    with torch.device("meta"):
        own = encoder.own_decoder(1)
    return own is None and not isinstance(encoder, TokenBackbone)


class DeepUNetDecoder(UNetDecoder):
    """A U-Net's decoder whose coarser stages have heads too, for training alone.

    Deep supervision as in nnU-Net (Isensee et al. 2021): the outputs are compared with targets at
    their own resolution, output i (0 the finest) with weight 2^-i, and the weights sum to 1. The
    coarsest stage has weight 0 there, and hence no head here, unless it is the only one.
    """

    def __init__(
        self,
        channels: Sequence[int],
        strides: Sequence[tuple[int, int, int]],
        out_channels: int,
        convs_per_stage: int = 1,
    ) -> None:
        super().__init__(channels, strides, out_channels, convs_per_stage)
        # Behind the rest, so that its start is that of the decoder without them.
        self.heads = nn.ModuleList(
            nn.Conv3d(width, out_channels, 1) for width in channels[1 : len(self.stages) - 1]
        )
        self.heads.apply(init_convolution)
        halves = [0.5**i for i in range(1 + len(self.heads))]
        self.output_weights = tuple(share / sum(halves) for share in halves)

    def compile_parts(self) -> list[nn.Module]:
        """Returns what does the work: a training step calls `outputs`, not the decoder itself."""
        return [*self.transpconvs, *self.stages, self.head, *self.heads]

    def outputs(self, image: Tensor, features: list[Tensor]) -> list[Tensor]:
        """Returns the weighted outputs, finest first, each at its stage's resolution."""
        maps = self.decoded(features)
        return [head(x) for head, x in zip([self.head, *self.heads], maps, strict=False)]


class LinearDecoder(nn.Module):
    """One linear map of all feature maps, interpolated to each voxel: what a frozen encoder knows.

    A 1x1x1 convolution of concatenated, interpolated maps, computed the other way round: both are
    linear, so each map gives its scores at its own resolution and the scores are interpolated.

    Args:
        channels: C_i of the maps.
        out_channels: K.
    """

    def __init__(self, channels: Sequence[int], out_channels: int) -> None:
        super().__init__()
        self.out_channels = out_channels
        heads = [nn.Conv3d(width, out_channels, 1, bias=i == 0) for i, width in enumerate(channels)]
        for head in heads:
            nn.init.normal_(head.weight, std=0.01)
            if head.bias is not None:
                nn.init.zeros_(head.bias)
        self.heads = nn.ModuleList(heads)

    def forward(self, image: Tensor, features: list[Tensor]) -> Tensor:
        """Scores [B, K, D, H, W] from maps [B, C_i, D_i, H_i, W_i]."""
        scores = [head(x) for head, x in zip(self.heads, features, strict=True)]
        return _summed(scores, image.shape[2:])


class NeighbourDecoder(nn.Module):
    """Nearest neighbours: a cell's classes by the labelled voxels whose features are most like its.

    Dense k-NN on frozen features, as DINO evaluates images by it (Caron et al. 2021,
    arXiv:2104.14294): the 10 most similar of a bank of voxels vote with exp(cosine / 0.07), on
    standardised features. Cells are those of the finest map that counts (`counted_maps`), and the
    shares of votes are interpolated. It has no parameters; `finetune.probes` fills the bank.

    Args:
        channels: C_i of the maps.
        strides: their strides, finest first.
        out_channels: K.
    """

    BANK = 4096
    """Voxels of the bank. Where fewer could be had, the rest is of no class and votes for none."""
    AT_ONCE = 4096
    """Cells that are compared with the bank at a time."""
    TEMPERATURE = 0.07

    mean: Tensor
    scale: Tensor
    bank: Tensor
    classes: Tensor

    def __init__(
        self,
        channels: Sequence[int],
        strides: Sequence[tuple[int, int, int]],
        out_channels: int,
    ) -> None:
        super().__init__()
        self.out_channels = out_channels
        self.maps = counted_maps(strides)
        width = sum(channels[i] for i in self.maps)
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("scale", torch.ones(width))
        self.register_buffer("bank", torch.zeros(self.BANK, width))
        self.register_buffer("classes", torch.full((self.BANK,), -1))

    def scaled(self, features: Tensor) -> Tensor:
        """Standardised features [n, F] of length 1."""
        return F.normalize((features - self.mean) / self.scale, dim=1)

    def forward(self, image: Tensor, features: list[Tensor]) -> Tensor:
        """Logarithms of the shares of votes, [B, K, D, H, W]."""
        finest = features[self.maps[0]].shape[2:]
        cells = torch.cat([resized(features[i].float(), finest) for i in self.maps], dim=1)
        rows = self.scaled(cells.movedim(1, -1).flatten(0, -2))  # [B N, F]
        votes = torch.cat([self._votes(part) for part in rows.split(self.AT_ONCE)])
        shares = votes.unflatten(0, (len(image), *finest)).movedim(-1, 1)  # [B, K, d, h, w]
        return resized(shares, image.shape[2:]).clamp(min=1e-6).log()

    @in_float32  # similarities over so small a temperature
    def _votes(self, rows: Tensor) -> Tensor:
        """Shares of votes [n, K] for features [n, F]."""
        cosine = (rows @ self.bank.T).masked_fill(self.classes < 0, -math.inf)
        nearest, index = cosine.topk(NEIGHBOURS, dim=1)
        weight = ((nearest - 1) / self.TEMPERATURE).exp()
        chosen = F.one_hot(self.classes[index] + 1, self.out_channels + 1)[..., 1:]
        votes = (weight[..., None] * chosen).sum(1)
        return votes / votes.sum(1, keepdim=True).clamp(min=1e-12)


class MLPDecoder(nn.Module):
    """A hidden layer between the concatenated maps and the scores, at the grid of the finest map.

    Args:
        channels: C_i of the maps.
        out_channels: K.
        hidden: width of the hidden layer.
    """

    def __init__(self, channels: Sequence[int], out_channels: int, hidden: int = 64) -> None:
        super().__init__()
        self.out_channels = out_channels
        self.lifts = nn.ModuleList(
            nn.Conv3d(width, hidden, 1, bias=i == 0) for i, width in enumerate(channels)
        )
        self.head = nn.Conv3d(hidden, out_channels, 1)

    def forward(self, image: Tensor, features: list[Tensor]) -> Tensor:
        """Scores [B, K, D, H, W] from maps [B, C_i, D_i, H_i, W_i], finest first."""
        lifted = [lift(x) for lift, x in zip(self.lifts, features, strict=True)]
        hidden = F.gelu(_summed(lifted, features[0].shape[2:]))
        return resized(self.head(hidden), image.shape[2:])


class AggregateDecoder(nn.Module):
    """Several blocks' tokens side by side, decoded patch by patch.

    The token aggregation of MedDINOv3 (Li et al. 2025, arXiv:2509.02379) in front of the
    transposed convolutions of Primus (`PatchDecoder`): a ViT's middle blocks keep detail that its
    last one has given up. With one tap it is Primus' decoder.

    Args:
        embed_dim: width of the ViT.
        taps: maps that it gives.
        patch_size: voxels of its patch: powers of two.
        out_channels: K.

    Raises:
        ValueError: the patch has a side that is no power of two.
    """

    def __init__(
        self, embed_dim: int, taps: int, patch_size: tuple[int, int, int], out_channels: int
    ) -> None:
        super().__init__()
        self.out_channels = out_channels
        self.decode = PatchDecoder(embed_dim * taps, patch_size, out_channels)

    def forward(self, image: Tensor, features: list[Tensor]) -> Tensor:
        """Scores [B, K, D, H, W] from maps [B, E, gd, gh, gw]."""
        out: Tensor = self.decode(image, [torch.cat(features, dim=1)])
        return out


def _summed(maps: list[Tensor], size: Sequence[int]) -> Tensor:
    """The sum of maps at a resolution; maps of one grid are interpolated once."""
    grids: dict[tuple[int, ...], Tensor] = {}
    for x in maps:
        grid = tuple(x.shape[2:])
        grids[grid] = grids[grid] + x if grid in grids else x
    total, *rest = (resized(x, size) for x in grids.values())
    for x in rest:
        total = total + x
    return total
