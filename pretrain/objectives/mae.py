"""Masked autoencoder on a 3D ViT: hide most patches, rebuild their voxels from the others.

He et al. 2021, arXiv:2111.06377; in 3D as in Chen et al. 2022, arXiv:2204.11716. The encoder sees
visible patches only; a small decoder, thrown away afterwards, fills in the rest, and the loss is
the mean squared error over hidden voxels. Slices (crops of one voxel along an axis) work as
volumes do.

Shape legend: B batch, C channels, N patches, V visible and M = N - V hidden ones, E width of the
decoder, P = C * pd * ph * pw values of a patch, K prefix tokens of the encoder.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from data_prep.errors import InputError
from pretrain.backbones.backbone import Backbone
from pretrain.backbones.vit import as_tokens, init_transformer, sincos_position
from pretrain.objectives.masked_patches import MaskedPatches, complete


class DecoderBlock(Block):
    """A transformer block whose first tokens may end with their part in the attention."""

    def forward(self, x: Tensor, first: int = 0) -> Tensor:
        """Maps [B, T, E] to [B, T - first, E]."""
        x = (x + self.attn(self.norm1(x)))[:, first:]
        return x + self.mlp(self.norm2(x))


class MAE(MaskedPatches):
    """Masked autoencoder with a transformer decoder.

    The defaults are the paper's decoder for ViT-L; a narrower and shallower one is enough for a
    small encoder.

    Args:
        encoder: a backbone with tokens (ViT3D, SliceViT).
        decoder_dim: width of the decoder.
        decoder_depth: its blocks.
        decoder_heads: its attention heads; must divide the width.
        mask_ratio: share of the patches to hide.
        norm_target: predict patches normalised by their own mean and variance instead of raw
            voxels.

    Raises:
        InputError: if the encoder has no tokens or the heads do not divide the width.
    """

    def __init__(
        self,
        *,
        encoder: Backbone,
        decoder_dim: Annotated[int, Field(ge=6)] = 512,
        decoder_depth: Annotated[int, Field(ge=0)] = 8,
        decoder_heads: Annotated[int, Field(ge=1)] = 16,
        mask_ratio: Annotated[float, Field(gt=0, lt=1)] = 0.75,
        norm_target: bool = True,
    ) -> None:
        vit = as_tokens(encoder, "mae")
        if decoder_dim % decoder_heads:
            raise InputError(
                f"objective.decoder_heads={decoder_heads} does not divide "
                f"objective.decoder_dim={decoder_dim}: change one of them"
            )
        super().__init__(encoder=vit, mask_ratio=mask_ratio, norm_target=norm_target)
        self.decoder_dim = decoder_dim
        d, h, w = vit.patch_size
        self.embed = nn.Linear(vit.embed_dim, decoder_dim)
        # One-dimensional, so that it is spared from weight decay as biases and norms are.
        self.mask_token = nn.Parameter(torch.empty(decoder_dim))
        self.blocks = nn.ModuleList(
            DecoderBlock(decoder_dim, decoder_heads, qkv_bias=True) for _ in range(decoder_depth)
        )
        self.norm = nn.LayerNorm(decoder_dim, eps=1e-6)
        self.head = nn.Linear(decoder_dim, vit.in_channels * d * h * w)
        for module in (self.embed, self.blocks, self.head):
            module.apply(init_transformer)
        nn.init.normal_(self.mask_token, std=0.02)

    def rebuild(self, image: Tensor, hidden: Tensor, order: Tensor, keep: int) -> Tensor:
        """Rebuilds the hidden patches as [B, M, P]; see `MaskedPatches.rebuild`."""
        visible = self.embed(self.encoder.tokens(image, hidden, keep))  # [B, K + V, E]
        prefix = self.encoder.prefix_tokens
        position = sincos_position(self.encoder.grid(image.shape), self.decoder_dim, image.device)
        x = complete(visible, self.mask_token, position[order], prefix)  # [B, K + N, E]
        # Only hidden patches are rebuilt, so that the last block takes the others no further.
        rest = prefix + keep
        for number, block in enumerate(self.blocks, start=1):
            x = block(x, rest if number == len(self.blocks) else 0)
        return self.head(self.norm(x if self.blocks else x[:, rest:]))
