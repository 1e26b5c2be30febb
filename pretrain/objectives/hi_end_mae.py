"""Hierarchical masked autoencoder: the decoder asks the encoder's layers, deep ones first.

Tang et al. 2025, "Hi-End-MAE", arXiv:2502.08347. As in MAE the encoder sees visible patches only
and mask tokens join behind it. Then each cross block lets all tokens of the decoder attend to the
visible tokens of one layer of the encoder, each through a projection of its own, from the deepest
tapped layer to the shallowest, so that all layers have to be worth asking. The target is
normalised patch by patch by the biased variance, as in the published code.

Shape legend: B batch, N patches, V visible and M hidden ones, K prefix tokens, E width of the
decoder, P = C * pd * ph * pw values of a patch.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from timm.layers import Mlp
from timm.models.vision_transformer import Attention, Block
from torch import Tensor, nn
from torch.nn import functional as F

from data_prep.errors import InputError
from pretrain.backbones.backbone import Backbone
from pretrain.backbones.vit import as_tokens, init_transformer, sincos_position
from pretrain.objectives.masked_patches import MaskedPatches, complete


class CrossAttention(nn.Module):
    """Attention whose queries come from one sequence, keys and values from another."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        """Lets x [B, T, E] ask memory [B, S, E]; returns [B, T, E]."""
        heads = (self.num_heads, x.shape[2] // self.num_heads)
        q = self.q(x).unflatten(2, heads).transpose(1, 2)  # [B, heads, T, E / heads]
        k, v = self.kv(memory).unflatten(2, (2, *heads)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class CrossBlock(nn.Module):
    """Self-attention, cross-attention to a memory that is taken as it is, and an MLP."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.norm0 = nn.LayerNorm(dim, eps=1e-6)
        self.self_attn = Attention(dim, num_heads, qkv_bias=True)
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.cross_attn = CrossAttention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, 4 * dim)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        """Maps x [B, T, E] with memory [B, S, E] to [B, T, E]."""
        x = x + self.self_attn(self.norm0(x))
        x = x + self.cross_attn(self.norm1(x), memory)
        return x + self.mlp(self.norm2(x))


class HiEndMAE(MaskedPatches):
    """Masked autoencoder whose decoder attends to tapped layers of the encoder.

    The defaults are the decoder of the released large model; the base one is 384 wide with 12
    heads.

    Args:
        encoder: a backbone with tokens (ViT3D, SliceViT).
        decoder_dim: width of the decoder.
        decoder_heads: its attention heads; must divide the width.
        self_blocks: plain blocks before the cross blocks.
        taps: 1-based numbers of the encoder's blocks that are asked, shallow to deep, a cross block
            for each; default: the first one behind a quarter, half and three quarters of the depth,
            which are 4, 7 and 10 of 12.
        mask_ratio: share of the patches to hide.

    Raises:
        InputError: if the encoder has no tokens, the heads do not divide the width or a tap is not
            a block.
    """

    unbiased = False

    def __init__(
        self,
        *,
        encoder: Backbone,
        decoder_dim: Annotated[int, Field(ge=6)] = 528,
        decoder_heads: Annotated[int, Field(ge=1)] = 16,
        self_blocks: Annotated[int, Field(ge=0)] = 2,
        taps: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)] | None = None,
        mask_ratio: Annotated[float, Field(gt=0, lt=1)] = 0.75,
    ) -> None:
        vit = as_tokens(encoder, "hi_end_mae")
        depth = len(vit.blocks)
        taps = taps or tuple(depth * quarter // 4 + 1 for quarter in (1, 2, 3))
        problems = []
        if decoder_dim % decoder_heads:
            problems.append(
                f"objective.decoder_heads={decoder_heads} does not divide "
                f"objective.decoder_dim={decoder_dim}: change one of them"
            )
        if list(taps) != sorted(taps) or taps[-1] > depth:
            problems.append(
                f"objective.taps={list(taps)}: must rise within the encoder's blocks 1..{depth}"
            )
        if problems:
            raise InputError(problems)
        super().__init__(encoder=vit, mask_ratio=mask_ratio, norm_target=True)
        self.decoder_dim = decoder_dim
        self.taps = taps
        d, h, w = vit.patch_size
        self.embed = nn.Linear(vit.embed_dim, decoder_dim)
        self.tap_embeds = nn.ModuleList(nn.Linear(vit.embed_dim, decoder_dim) for _ in taps)
        self.mask_token = nn.Parameter(torch.empty(decoder_dim))
        self.blocks = nn.ModuleList(
            Block(decoder_dim, decoder_heads, qkv_bias=True) for _ in range(self_blocks)
        )
        self.cross_blocks = nn.ModuleList(CrossBlock(decoder_dim, decoder_heads) for _ in taps)
        self.norm = nn.LayerNorm(decoder_dim, eps=1e-6)
        self.head = nn.Linear(decoder_dim, vit.in_channels * d * h * w)
        for module in (self.embed, self.tap_embeds, self.blocks, self.cross_blocks, self.head):
            module.apply(init_transformer)
        nn.init.normal_(self.mask_token, std=0.02)

    def rebuild(self, image: Tensor, hidden: Tensor, order: Tensor, keep: int) -> Tensor:
        """Rebuilds the hidden patches as [B, M, P]; see `MaskedPatches.rebuild`."""
        tokens = self.decode(image, hidden, order, keep)
        return self.head(tokens[:, self.encoder.prefix_tokens + keep :])

    def decode(self, image: Tensor, hidden: Tensor, order: Tensor, keep: int) -> Tensor:
        """Returns the decoder's tokens [B, K + N, E] in the order prefix, visible, hidden."""
        deepest, tapped = self.encoder.encode(image, hidden, keep, blocks=self.taps)
        position = sincos_position(self.encoder.grid(image.shape), self.decoder_dim, image.device)
        visible = self.embed(deepest)  # [B, K + V, E]
        x = complete(visible, self.mask_token, position[order], self.encoder.prefix_tokens)
        for block in self.blocks:
            x = block(x)
        # The encoder's tokens are asked as its blocks left them: no norm, no further position.
        memories = [embed(tap) for embed, tap in zip(self.tap_embeds, tapped, strict=True)]
        for cross, memory in zip(self.cross_blocks, reversed(memories), strict=True):
            x = cross(x, memory)
        return self.norm(x)
