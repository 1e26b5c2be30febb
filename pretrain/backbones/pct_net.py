"""PCT-Net: a pyramid of convolutions and window attention side by side.

Wang et al. 2023, "MIS-FM", arXiv:2306.16925, which pretrains it by Volume Fusion. Convolutions
embed the image down to about a quarter of its resolution; three stages from there on add a
convolutional branch and a branch of shifted windows (Liu et al. 2021, arXiv:2103.14030). Every
convolution follows a batch norm and a PReLU. An own implementation, held to the public one's
numbers; what that one does beside the paper is kept where weights depend on it:

- the index into the table of relative positions steps by 3 w - 1 along depth, where (2 w - 1)^2
  would keep all offsets apart, so several offsets of a window share an entry;
- windows are padded with zeros behind the norm, and the padding is attended to;
- a stage whose smallest side is no larger than its window takes that side as the window and does
  not shift. The public network decides so when it is built, ours for each crop, so that one set of
  weights takes any crop that the strides divide.

Batch norm means that running statistics are part of the weights: they are buffers, saved, resumed
and released with them. In training a norm sees one micro-batch of one rank, so unlike with the
other backbones the result depends on `accumulate` and on the number of ranks beyond rounding. At
the first forward pass of each step DDP sends rank 0's buffers to all ranks (`broadcast_buffers`,
its default): ranks agree from step to step, and what is saved are the statistics of rank 0's
samples.

Shape legend: B batch, C channels, D H W cells of a map, w side of a window, N = w*w*w its cells,
W windows of a map.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from timm.layers import DropPath, Mlp
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from pretrain.backbones.backbone import Backbone, divided
from pretrain.masking import triple

Width = Annotated[int, Field(ge=1, le=4096)]
Share = Annotated[float, Field(ge=0, lt=1)]
Depth = Annotated[int, Field(ge=1, le=64)]
Heads = Annotated[int, Field(ge=1, le=128)]
Window = Annotated[int, Field(ge=1, le=16)]
Mode = Literal[0, 1, 2]

_FLAT, _CUBE = (1, 3, 3), (3, 3, 3)
_KERNELS: dict[int, tuple[tuple[int, int, int], tuple[int, int, int]]] = {
    0: (_CUBE, _CUBE),
    1: (_FLAT, _CUBE),
    2: (_FLAT, _FLAT),
}
"""Kernels at full and at the next resolution: in-plane where slices are thick."""
_STEPS: dict[int, tuple[tuple[int, int, int], ...]] = {
    0: ((2, 2, 2), (2, 2, 2), (2, 2, 2), (2, 2, 2)),
    1: ((1, 2, 2), (2, 2, 2), (2, 2, 2), (2, 2, 2)),
    2: ((1, 2, 2), (1, 2, 2), (2, 2, 2), (2, 2, 2)),
}
"""Stride of each map against the one before."""


def _norm_conv(in_channels: int, out_channels: int, kernel: Sequence[int]) -> list[nn.Module]:
    size = triple(kernel)
    padding = triple([k // 2 for k in size])
    return [
        nn.BatchNorm3d(in_channels),
        nn.PReLU(),
        nn.Conv3d(in_channels, out_channels, size, padding=padding),
    ]


class ConvBlock(nn.Sequential):
    """Twice batch norm, PReLU, convolution, with dropout before the second convolution."""

    def __init__(self, channels: int, kernel: Sequence[int], dropout: float) -> None:
        first = _norm_conv(channels, channels, kernel)
        norm, activation, conv = _norm_conv(channels, channels, kernel)
        super().__init__(*first, norm, activation, nn.Dropout(dropout), conv)


class Down(nn.Sequential):
    """Max-pooling, then batch norm, PReLU, convolution."""

    def __init__(
        self, in_channels: int, out_channels: int, step: tuple[int, int, int], kernel: Sequence[int]
    ) -> None:
        super().__init__(nn.MaxPool3d(step), *_norm_conv(in_channels, out_channels, kernel))


class Up(nn.Module):
    """Transposed convolution of the coarser map, concatenated with the finer, convolved."""

    def __init__(
        self, fine: int, coarse: int, step: tuple[int, int, int], kernel: Sequence[int]
    ) -> None:
        super().__init__()
        self.up = nn.Sequential(
            nn.BatchNorm3d(coarse), nn.PReLU(), nn.ConvTranspose3d(coarse, fine, step, step)
        )
        self.conv = nn.Sequential(*_norm_conv(2 * fine, fine, kernel))

    def forward(self, skip: Tensor, x: Tensor) -> Tensor:
        """Maps [B, fine, D, H, W] and [B, coarse, d, h, w] to [B, fine, D, H, W]."""
        return self.conv(torch.cat([skip, self.up(x)], dim=1))


class WindowAttention(nn.Module):
    """Self-attention within windows, with a learned bias for each relative position."""

    def __init__(self, dim: int, heads: int, window: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.window = window
        self.dropout = dropout
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * window - 1) ** 3, heads))
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(dropout)
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def no_weight_decay(self) -> set[str]:
        """A position is no weight."""
        return {"relative_position_bias_table"}

    def forward(self, x: Tensor, side: int, apart: Tensor | None) -> Tensor:
        """Attends within each window.

        Args:
            x: [B, W, N, C] of windows with `side` cells along each axis.
            side: at most the window that the table was made for.
            apart: bool [W, N, N], True where two cells of a shifted window are no neighbours.
        """
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(3, 0, 1, 4, 2, 5)
        index = _relative_positions(side, self.window, x.device)
        bias = self.relative_position_bias_table[index].movedim(-1, 0)  # [heads, N, N]
        if apart is not None:
            bias = bias - 100.0 * apart[:, None]  # [W, heads, N, N]
        rate = self.dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, bias.to(q.dtype), rate)
        return self.proj_drop(self.proj(out.transpose(2, 3).flatten(-2)))


def _relative_positions(side: int, window: int, device: torch.device) -> Tensor:
    """int64 [N, N]: for each pair of cells of a window the entry of the table."""
    axis = torch.arange(side, device=device)
    cells = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), dim=-1).flatten(0, 2)
    offset = cells[:, None] - cells[None, :] + (window - 1)  # [N, N, 3]
    return offset[..., 0] * (3 * window - 1) + offset[..., 1] * (2 * window - 1) + offset[..., 2]


class WindowBlock(nn.Module):
    """Transformer block whose attention stays within windows, shifted by half of one or not."""

    def __init__(
        self, dim: int, heads: int, window: int, shifted: bool, dropout: float, drop_path: float
    ) -> None:
        super().__init__()
        self.window = window
        self.shifted = shifted
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, heads, window, dropout)
        self.drop_path = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, 4 * dim, drop=dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [B, D, H, W, C] to the same shape."""
        x = x + self.drop_path(self._attend(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def _attend(self, x: Tensor) -> Tensor:
        size = x.shape[1:4]
        side = min(self.window, *size)
        shift = self.window // 2 if self.shifted and min(size) > self.window else 0
        missing = [-n % side for n in size]
        x = F.pad(x, (0, 0, 0, missing[2], 0, missing[1], 0, missing[0]))
        padded = x.shape[1:4]
        apart = None
        if shift:
            x = x.roll((-shift, -shift, -shift), (1, 2, 3))
            region = _shift_regions(padded, side, shift, x.device)[None, ..., None]
            region = _windows(region, side)[0, ..., 0]  # [W, N]
            apart = region[:, :, None] != region[:, None, :]
        x = _from_windows(self.attn(_windows(x, side), side, apart), padded, side)
        if shift:
            x = x.roll((shift, shift, shift), (1, 2, 3))
        return x[:, : size[0], : size[1], : size[2]]


def _windows(x: Tensor, side: int) -> Tensor:
    """Cuts [B, D, H, W, C] into [B, W, N, C]."""
    B, D, H, W, C = x.shape
    x = x.reshape(B, D // side, side, H // side, side, W // side, side, C)
    return x.permute(0, 1, 3, 5, 2, 4, 6, 7).reshape(B, -1, side**3, C)


def _from_windows(x: Tensor, size: Sequence[int], side: int) -> Tensor:
    """Inverts `_windows`."""
    D, H, W = size
    x = x.reshape(x.shape[0], D // side, H // side, W // side, side, side, side, -1)
    return x.permute(0, 1, 4, 2, 5, 3, 6, 7).reshape(x.shape[0], D, H, W, -1)


def _shift_regions(size: Sequence[int], side: int, shift: int, device: torch.device) -> Tensor:
    """int64 [D, H, W]: which of 27 regions a cell of the rolled map comes from.

    Cells that the roll brought together from opposite ends lie in different regions.
    """
    parts = []
    for n in size:
        cell = torch.arange(n, device=device)
        parts.append((cell >= n - side).long() + (cell >= n - shift).long())
    d, h, w = parts
    return 9 * d[:, None, None] + 3 * h[:, None] + w


class ConvTransBlock(nn.Module):
    """The sum of a convolutional branch and of window attention, both of the same map."""

    def __init__(
        self, dim: int, depth: int, heads: int, window: int, dropout: float, drop_path: float
    ) -> None:
        super().__init__()
        self.conv = ConvBlock(dim, _CUBE, dropout)
        self.pos_drop = nn.Dropout(dropout)
        self.blocks = nn.Sequential(
            *(WindowBlock(dim, heads, window, i % 2 == 1, dropout, drop_path) for i in range(depth))
        )

    def forward(self, x: Tensor) -> Tensor:
        """Maps [B, C, D, H, W] to the same shape."""
        attended = self.blocks(self.pos_drop(x.movedim(1, -1)))
        return self.conv(x) + attended.movedim(-1, 1)


class PCTNetEncoder(Backbone):
    """The encoder of PCT-Net: five maps, two of the embedding and three of its stages.

    The defaults are the public demo's (LUNA, crops of 64x128x128). Its three alternative
    embeddings for other slice distances are three networks here: `resolution_mode` chooses one.

    Args:
        in_channels: channels of the image.
        features: channels of each map, finest first.
        dropout: for each map.
        depths: window blocks of each of the three stages.
        heads: attention heads of each; must divide its channels.
        windows: side of the windows of each, in cells.
        resolution_mode: stride of the third map, 0: 4x4x4, 1: 2x4x4, 2: 1x4x4.
        drop_path: stochastic depth of every window block.

    Raises:
        ValueError: if heads do not divide their channels.
    """

    any_size = False  # windows and their shifts follow from it

    def __init__(
        self,
        *,
        in_channels: Annotated[int, Field(ge=1, le=1024)] = 1,
        features: tuple[Width, Width, Width, Width, Width] = (24, 48, 128, 256, 512),
        dropout: tuple[Share, Share, Share, Share, Share] = (0.0, 0.0, 0.2, 0.2, 0.2),
        depths: tuple[Depth, Depth, Depth] = (2, 2, 2),
        heads: tuple[Heads, Heads, Heads] = (4, 8, 16),
        windows: tuple[Window, Window, Window] = (6, 6, 6),
        resolution_mode: Mode = 1,
        drop_path: Share = 0.2,
    ) -> None:
        super().__init__()
        for dim, count in zip(features[2:], heads, strict=True):
            if dim % count:
                raise ValueError(f"heads={count} does not divide the {dim} channels of its stage")
        steps, kernels = _STEPS[resolution_mode], _KERNELS[resolution_mode]
        self.in_channels = in_channels
        self.channels = tuple(int(f) for f in features)
        strides = [(1, 1, 1)]
        for step in steps:
            strides.append(triple([a * b for a, b in zip(strides[-1], step, strict=True)]))
        self.strides = tuple(strides)
        self._make_decoder = functools.partial(
            PCTDecoder,
            features=self.channels,
            dropout=dropout,
            depths=depths,
            heads=heads,
            windows=windows,
            resolution_mode=resolution_mode,
            drop_path=drop_path,
        )
        first = triple(kernels[0])
        proj = nn.Conv3d(in_channels, features[0], first, padding=triple([k // 2 for k in first]))
        stages = [nn.Sequential(proj, ConvBlock(features[0], kernels[0], dropout[0]))]
        for i in range(1, 5):
            kernel = kernels[1] if i == 1 else _CUBE
            down = Down(features[i - 1], features[i], steps[i - 1], kernel)
            block: nn.Module
            if i == 1:
                block = ConvBlock(features[1], kernels[1], dropout[1])
            else:
                j = i - 2
                block = ConvTransBlock(
                    features[i], depths[j], heads[j], windows[j], dropout[i], drop_path
                )
            stages.append(nn.Sequential(down, block))
        self.stages = nn.ModuleList(stages)

    def grids(self, shape: Sequence[int]) -> list[tuple[int, int, int]]:
        """Returns the (d, h, w) size of every feature map for a crop of `shape` voxels.

        Raises:
            ValueError: if the total stride does not divide the crop, or leaves a single cell,
                which batch norm cannot normalise in a batch of one.
        """
        return divided(shape, self.strides, "PCT-Net")

    def forward(self, x: Tensor) -> list[Tensor]:
        """Returns the five maps [B, C_i, D_i, H_i, W_i] of an image [B, C, D, H, W]."""
        self.grids(x.shape)
        maps = []
        for stage in self.stages:
            x = self.run(stage, x)
            maps.append(x)
        return maps

    def run(self, part: Callable[..., Any], *args: Any) -> Any:
        """As every backbone's, but running statistics move once: not when computed again."""
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(
                part,
                *args,
                use_reentrant=False,
                context_fn=lambda: (contextlib.nullcontext(), _without_statistics(self)),
            )
        return part(*args)

    def compile_parts(self) -> list[nn.Module]:
        """Returns the stages."""
        return list(self.stages)

    def layers(self) -> list[list[nn.Module | nn.Parameter]]:
        """Returns the stages."""
        return [[stage] for stage in self.stages]

    def own_decoder(self, out_channels: int) -> PCTDecoder:
        """Returns PCT-Net's decoder."""
        return self._make_decoder(out_channels=out_channels)


@contextlib.contextmanager
def _without_statistics(module: nn.Module) -> Iterator[None]:
    """Batch norms use their batch and leave the running statistics as they are."""
    norms = [part for part in module.modules() if isinstance(part, nn.BatchNorm3d)]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm, (_, count) in zip(norms, before, strict=True):
        norm.momentum = 0.0
        norm.num_batches_tracked = None if count is None else count.clone()
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count


class PCTDecoder(nn.Module):
    """The decoder of PCT-Net, with a head at each of its four scales.

    `PCTNetEncoder.own_decoder` makes it: all arguments but the last are the encoder's.

    Args:
        features: channels of the encoder's maps, finest first.
        dropout: for each map.
        depths: window blocks of each stage.
        heads: attention heads of each stage.
        windows: side of the windows of each stage, in cells.
        resolution_mode: stride of the third map.
        drop_path: stochastic depth of every window block.
        out_channels: channels of every output.
    """

    def __init__(
        self,
        *,
        features: Sequence[int],
        dropout: Sequence[float],
        depths: Sequence[int],
        heads: Sequence[int],
        windows: Sequence[int],
        resolution_mode: Mode,
        drop_path: float,
        out_channels: int,
    ) -> None:
        super().__init__()
        self.out_channels = out_channels
        steps, kernels = _STEPS[resolution_mode], _KERNELS[resolution_mode]
        ups: list[nn.Module] = []
        blocks: list[nn.Module] = []
        for i in (3, 2, 1, 0):  # coarsest first
            kernel = kernels[i] if i < 2 else _CUBE
            ups.append(Up(features[i], features[i + 1], steps[i], kernel))
            if i < 2:
                blocks.append(ConvBlock(features[i], kernel, dropout[i]))
            else:
                j = i - 2
                blocks.append(
                    ConvTransBlock(
                        features[i], depths[j], heads[j], windows[j], dropout[i], drop_path
                    )
                )
        self.ups = nn.ModuleList(ups)
        self.blocks = nn.ModuleList(blocks)
        self.heads = nn.ModuleList(
            nn.Sequential(*_norm_conv(features[i], out_channels, (1, 1, 1))) for i in range(4)
        )  # finest first

    def compile_parts(self) -> list[nn.Module]:
        """Returns what does the work: a training step calls `outputs`, not the decoder itself."""
        return [*self.ups, *self.blocks, *self.heads]

    def forward(self, image: Tensor, features: list[Tensor]) -> Tensor:
        """Decodes five maps, finest first, to [B, out_channels, D, H, W]."""
        return self.heads[0](self._decoded(features)[0])

    def outputs(self, image: Tensor, features: list[Tensor]) -> list[Tensor]:
        """Returns the outputs of all four scales, finest first, each at its own resolution."""
        decoded = self._decoded(features)
        return [head(x) for head, x in zip(self.heads, decoded, strict=True)]

    def _decoded(self, features: list[Tensor]) -> list[Tensor]:
        x, decoded = features[-1], []
        levels = zip(self.ups, self.blocks, reversed(features[:-1]), strict=True)
        for up, block, skip in levels:
            x = block(up(skip, x))
            decoded.append(x)
        return decoded[::-1]
