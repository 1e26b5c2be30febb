"""Vision transformer of slices, DINOv3's architecture in timm's modules and names.

Simeoni et al. 2025, "DINOv3", arXiv:2508.10104, and MedDINOv3 (Li et al. 2025, arXiv:2509.02379),
which pretrains it on CT slices: rotary position along two axes, a CLS token and four storage tokens
(registers) that are not turned, layer scale, no bias of the keys. The feature maps are those of
MedDINOv3: blocks at each quarter of the depth (2, 5, 8 and 11 of 12, counted from 0), each through
the final norm.

Public weights expect three channels. An encoder of one channel has the sum of their three patch
embeddings, which is the same as repeating the slice three times (`pretrain.foreign`).

Shape legend: B batch, C channels, N = gh*gw patches, V visible ones, E width, K prefix tokens, A
width of an attention head.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Annotated

import torch
from pydantic import Field
from timm.models.eva import Eva
from torch import Tensor, nn

from pretrain.backbones.backbone import fitting_crop
from pretrain.backbones.vit import Side, TokenBackbone, tapped_blocks
from pretrain.masking import spread, take_rows


def rotary_periods(head_dim: int, device: torch.device | None = None) -> Tensor:
    """The A / 4 periods of the rotary position, from 1 to nearly 100: float32 100^(4 i / A)."""
    count = head_dim // 4
    steps = torch.arange(count, device=device, dtype=torch.float32)
    return torch.exp(steps * (math.log(100.0) / count))


def slice_rotary_table(
    grid: Sequence[int], head_dim: int, device: torch.device | None = None
) -> Tensor:
    """Sines and cosines by which attention turns the queries and keys of a slice's patches.

    A place is the centre of a patch, and both axes run from -1 to 1 whatever the number of patches.
    Channel i and channel i + A/2 form a pair; the first half of the pairs turns by h, the second by
    w, by 2 pi place / period (`rotary_periods`).

    Args:
        grid: patches along (h, w).
        head_dim: A, a multiple of 4.
        device: of the table.

    Returns:
        float32 [N, 2 A]: sines, then cosines, rows in C order of the grid.
    """
    axes = [2 * (torch.arange(n, device=device, dtype=torch.float32) + 0.5) / n - 1 for n in grid]
    places = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(-1, 2)
    angle = (
        (2 * math.pi * places[:, :, None] / rotary_periods(head_dim, device)).flatten(1).tile(2)
    )  # [N, A]
    return torch.cat([angle.sin(), angle.cos()], dim=1)


class SliceViT(TokenBackbone):
    """2D vision transformer for slices, crops [B, C, 1, H, W] of any size that its patch divides.

    Args:
        in_channels: channels of the image.
        patch_size: side of a patch.
        embed_dim: width E.
        depth: number of blocks.
        num_heads: attention heads.
        mlp_ratio: hidden width of a block's MLP over E.
        qkv_bias: whether the maps to queries and values have biases; keys never have one.
        layer_scale: initial value of a learned factor per channel on each branch.
        norm_eps: added to the variance in all norms: 1e-5 in DINOv3, 1e-6 in MedDINOv3.
        register_tokens: learned tokens that follow the CLS token.
        drop_path: stochastic depth of the last block, growing linearly from 0.
        taps: 1-based numbers of the blocks whose outputs are the feature maps; default: at a
            quarter, half, three quarters and the whole of the depth.

    Raises:
        ValueError: if the width of a head is no multiple of 4, or a tap is not a block.
    """

    normed_taps = True

    def __init__(
        self,
        *,
        in_channels: Annotated[int, Field(ge=1, le=1024)] = 1,
        patch_size: Side = 16,
        embed_dim: Annotated[int, Field(ge=4, le=8192)] = 768,
        depth: Annotated[int, Field(ge=1, le=128)] = 12,
        num_heads: Annotated[int, Field(ge=1, le=128)] = 12,
        mlp_ratio: Annotated[float, Field(gt=0, le=16)] = 4.0,
        qkv_bias: bool = False,
        layer_scale: Annotated[float, Field(gt=0, le=10)] = 1e-5,
        norm_eps: Annotated[float, Field(gt=0, le=1e-2)] = 1e-5,
        register_tokens: Annotated[int, Field(ge=0, le=64)] = 4,
        drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.0,
        taps: Annotated[tuple[int, ...], Field(min_length=1, max_length=32)] | None = None,
    ) -> None:
        super().__init__()
        if embed_dim % (4 * num_heads):
            raise ValueError(
                f"embed_dim={embed_dim} must be a multiple of 4 * num_heads={4 * num_heads}: "
                "pairs of a head's channels are turned along two axes"
            )
        self.taps = tapped_blocks(taps, depth)
        self.in_channels = in_channels
        self.patch_size = (1, patch_size, patch_size)
        self.embed_dim = embed_dim
        self.qkv_bias = qkv_bias
        self.head_dim = embed_dim // num_heads
        self.prefix_tokens = 1 + register_tokens
        self.channels = (embed_dim,) * len(self.taps)
        self.strides = (self.patch_size,) * len(self.taps)
        vit = Eva(
            patch_size=patch_size,
            in_chans=in_channels,
            num_classes=0,
            global_pool="token",
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            qkv_bias=qkv_bias,
            mlp_ratio=mlp_ratio,
            drop_path_rate=drop_path,
            norm_layer=partial(nn.LayerNorm, eps=norm_eps),
            init_values=layer_scale,
            num_reg_tokens=register_tokens,
            use_abs_pos_emb=False,
            rope_rotate_half=True,
            dynamic_img_size=True,
        )
        # Its parts, under its names. The table of positions is ours: timm's is made on the host,
        # and each step would wait for it.
        self.patch_embed = vit.patch_embed
        self.cls_token = vit.cls_token
        self.reg_token = vit.reg_token
        self.blocks = vit.blocks
        self.norm = vit.norm

    def grid(self, shape: Sequence[int]) -> tuple[int, int, int]:
        """Returns the patches along (d, h, w) of a crop of `shape` voxels; d is 1.

        Raises:
            ValueError: if the crop is no slice, or the patch does not divide it.
        """
        size = tuple(shape[-3:])
        if size[0] != 1:
            advice = [1, *fitting_crop(size, self.patch_size)[1:]]
            raise ValueError(
                f"a crop of {list(size)} voxels is no slice, and {type(self).__name__} takes "
                f"nothing else; sides are (d, h, w), of which d must be 1, for example {advice}"
            )
        return super().grid(shape)

    def no_weight_decay(self) -> set[str]:
        """Returns the CLS and register tokens."""
        return {"cls_token"} | ({"reg_token"} if self.reg_token is not None else set())

    def prefix(self) -> list[nn.Parameter]:
        """Returns the CLS token, then the register tokens if there are any."""
        return [token for token in (self.cls_token, self.reg_token) if token is not None]

    def rotary(self, grid: Sequence[int], device: torch.device) -> tuple[Tensor, ...]:
        """Returns (table [N, 2 A],)."""
        return (slice_rotary_table(grid[1:], self.head_dim, device),)

    def embed_patches(
        self,
        x: Tensor,
        grid: tuple[int, int, int],
        hidden: Tensor | None,
        visible: Tensor | None,
    ) -> Tensor:
        """Embeds patches as [B, V, E]; hidden voxels are zero before anything else."""
        if hidden is not None:
            x = x.masked_fill(spread(hidden, grid, self.patch_size), 0.0)
        tokens = self.patch_embed(x[:, :, 0]).flatten(1, 2)  # [B, N, E]
        return tokens if visible is None else take_rows(tokens, visible)
