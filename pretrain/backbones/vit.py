"""Vision transformer over 3D patches.

Dosovitskiy et al. 2020, arXiv:2010.11929, on timm's blocks (pre-norm, fused attention), with the
fixed sine-cosine position of MAE (He et al. 2021, arXiv:2111.06377) extended to three axes.

Shape legend: B batch, C channels, N = gd*gh*gw patches, V visible ones, E width, K prefix tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain.backbones.backbone import Backbone
from pretrain.masking import patchify, take_rows, triple, visible_first

Side = Annotated[int, Field(ge=1, le=64)]
"""Voxels of a patch along an axis."""


def sincos_position(grid: Sequence[int], dim: int, device: torch.device | None = None) -> Tensor:
    """Fixed position of every cell of a (d, h, w) grid, in cells, by sines and cosines.

    Each axis takes dim // 6 frequencies 10000^(-i / (dim // 6)): first their sines, then their
    cosines; the axes follow each other as d, h, w. What a width not divisible by 6 leaves over
    stays zero, so any width works.

    Returns:
        float32 [N, dim], rows in C order of the grid.
    """
    count = dim // 6
    if count == 0:
        raise ValueError(f"a 3D sine-cosine position needs a width of 6 or more, found {dim}")
    steps = torch.arange(count, device=device, dtype=torch.float32)
    omega = torch.exp(steps * (-math.log(10000.0) / count))
    axes = [torch.arange(size, device=device, dtype=torch.float32) for size in grid]
    cells = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(-1, 3)
    angle = cells[:, :, None] * omega  # [N, 3, count]
    position = torch.cat([angle.sin(), angle.cos()], dim=-1).flatten(1)
    return F.pad(position, (0, dim - 6 * count))


class PatchEmbed(nn.Module):
    """A convolution whose stride is its kernel, computed as a matrix product over patches.

    The weight keeps a convolution's name and shape (`proj.weight` [E, C, pd, ph, pw]), and only
    the patches that are asked for are embedded.
    """

    def __init__(self, in_channels: int, embed_dim: int, patch_size: tuple[int, int, int]) -> None:
        super().__init__()
        self.proj = nn.Conv3d(in_channels, embed_dim, patch_size, patch_size)
        # As MAE does: it starts like the linear map that it is.
        nn.init.xavier_uniform_(self.proj.weight.data.view(embed_dim, -1))
        if self.proj.bias is not None:
            nn.init.zeros_(self.proj.bias)

    def forward(self, patches: Tensor) -> Tensor:
        """Embeds [B, N, P] as [B, N, E]."""
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


class ViT3D(Backbone):
    """3D vision transformer for crops of any shape that its patch divides.

    Position depends on the grid alone and is not stored, so one set of weights serves all crop
    sizes. The feature maps are the outputs of four blocks, shallow to deep, all at the stride of
    the patch; the deepest one passes the final norm, as the tokens do.

    Args:
        in_channels: channels of the image.
        patch_size: voxels of a patch, one number or (d, h, w).
        embed_dim: width E.
        depth: number of blocks.
        num_heads: attention heads; must divide the width.
        mlp_ratio: hidden width of a block's MLP over E.
        drop_path: stochastic depth of the last block, growing linearly from 0 at the first.
        cls_token: prepend one learned token without position.
        taps: 1-based numbers of the blocks whose outputs are the feature maps; default: at a
            quarter, half, three quarters and the whole of the depth.

    Raises:
        ValueError: if heads do not divide the width or a tap is not a block.
    """

    def __init__(
        self,
        *,
        in_channels: Annotated[int, Field(ge=1, le=1024)] = 1,
        patch_size: Side | tuple[Side, Side, Side] = 16,
        embed_dim: Annotated[int, Field(ge=6, le=8192)] = 384,
        depth: Annotated[int, Field(ge=1, le=128)] = 12,
        num_heads: Annotated[int, Field(ge=1, le=128)] = 6,
        mlp_ratio: Annotated[float, Field(gt=0, le=16)] = 4.0,
        drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.0,
        cls_token: bool = False,
        taps: Annotated[tuple[int, ...], Field(min_length=1, max_length=32)] | None = None,
    ) -> None:
        super().__init__()
        if embed_dim % num_heads:
            raise ValueError(f"num_heads={num_heads} does not divide embed_dim={embed_dim}")
        self.taps = tuple(int(t) for t in taps) if taps else _quarters(depth)
        if sorted(self.taps) != list(self.taps) or not 1 <= self.taps[0] <= self.taps[-1] <= depth:
            raise ValueError(f"taps must rise within 1..depth={depth}, found {list(self.taps)}")
        self.in_channels = in_channels
        self.patch_size = triple(patch_size)
        self.embed_dim = embed_dim
        self.prefix_tokens = int(cls_token)
        self.channels = (embed_dim,) * len(self.taps)
        self.strides = (self.patch_size,) * len(self.taps)

        self.patch_embed = PatchEmbed(in_channels, embed_dim, self.patch_size)
        self.cls_token = nn.Parameter(torch.empty(embed_dim)) if cls_token else None
        rates = [drop_path * i / max(depth - 1, 1) for i in range(depth)]
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, mlp_ratio, qkv_bias=True, drop_path=rate) for rate in rates
        )
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.apply(init_transformer)
        if self.cls_token is not None:
            nn.init.normal_(self.cls_token, std=0.02)

    def grid(self, shape: Sequence[int]) -> tuple[int, int, int]:
        """Returns the patches along (d, h, w) of a crop of `shape` voxels.

        Raises:
            ValueError: if the patch does not divide the crop.
        """
        size = tuple(int(s) for s in shape[-3:])
        if any(s < p or s % p for s, p in zip(size, self.patch_size, strict=True)):
            near = [max(round(s / p), 1) * p for s, p in zip(size, self.patch_size, strict=True)]
            raise ValueError(
                f"a crop of {list(size)} voxels cannot be cut into patches of "
                f"{list(self.patch_size)}; each side must be a multiple, for example {near}"
            )
        d, h, w = (s // p for s, p in zip(size, self.patch_size, strict=True))
        return d, h, w

    def grids(self, shape: Sequence[int]) -> list[tuple[int, int, int]]:
        """Returns the size of each feature map, which is that of the grid for all of them."""
        return [self.grid(shape)] * len(self.taps)

    def tokens(self, x: Tensor, hidden: Tensor | None = None, keep: int | None = None) -> Tensor:
        """Encodes the visible patches only; hidden voxels are never read.

        Args:
            x: image [B, C, D, H, W].
            hidden: bool [B, N], True = hidden, equally many in every sample; None hides none.
            keep: number V of visible patches. Without it the number is read from the mask, for
                which the host waits for the device.

        Returns:
            Tokens [B, K + V, E] after the final norm, prefix first, visible patches in grid order.
        """
        tokens = self._embed(x, hidden, keep)
        for block in self.blocks:
            tokens = self.run(block, tokens)
        return self.norm(tokens)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Returns the tapped feature maps [B, E, gd, gh, gw], shallow to deep."""
        grid = self.grid(x.shape)
        tokens = self._embed(x, None, None)
        maps: list[Tensor] = []
        for number, block in enumerate(self.blocks, start=1):
            tokens = self.run(block, tokens)
            for _ in range(self.taps.count(number)):
                maps.append(tokens)
        maps[-1] = self.norm(maps[-1])
        return [
            tokens[:, self.prefix_tokens :].transpose(1, 2).unflatten(2, grid) for tokens in maps
        ]

    def compile_parts(self) -> list[nn.Module]:
        """Returns the blocks: alike, so that one compilation serves all of them."""
        return list(self.blocks)

    def _embed(self, x: Tensor, hidden: Tensor | None, keep: int | None) -> Tensor:
        grid = self.grid(x.shape)
        patches = patchify(x, self.patch_size)
        position = sincos_position(grid, self.embed_dim, x.device)  # [N, E]
        if hidden is not None:
            if keep is None:
                keep = int((~hidden[0]).sum())
            visible = visible_first(hidden)[:, :keep]  # [B, V]
            patches = take_rows(patches, visible)
            position = position[visible]
        tokens = self.patch_embed(patches) + position
        if self.cls_token is not None:
            cls = self.cls_token.to(tokens.dtype).expand(len(x), 1, -1)
            tokens = torch.cat([cls, tokens], dim=1)
        return tokens


def init_transformer(module: nn.Module) -> None:
    """Initialises linear layers as MAE does: Xavier-uniform weights, zero biases."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _quarters(depth: int) -> tuple[int, ...]:
    # A network of fewer than four blocks repeats some: decoders count on four maps.
    return tuple(max(1, -(-depth * i // 4)) for i in range(1, 5))
