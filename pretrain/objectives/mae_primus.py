"""The masked autoencoder of Primus: rotary decoder blocks of the encoder's kind, raw voxels.

Wald et al. 2025, "Primus", arXiv:2503.01835, pretrained as in nnssl and OpenMind (Wald et al. 2024,
arXiv:2412.17041): the encoder sees a quarter of the 8x8x8 patches; mask tokens join, all tokens get
a position of the decoder's own, pass two blocks like the encoder's in its width, and transposed
convolutions turn each into its voxels. nnssl reads the mask of its loss with two axes swapped; here
patches, positions and masks share one order.

Shape legend: B batch, N patches, V visible and M hidden ones, K prefix tokens, E width, P = C * pd
* ph * pw values of a patch.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from data_prep.errors import InputError
from pretrain.backbones.backbone import Backbone
from pretrain.backbones.vit import Position, ViT3D, as_vit
from pretrain.decoders import PatchDecoder
from pretrain.masking import patchify
from pretrain.objectives.masked_patches import MaskedPatches, complete


class PrimusMAE(MaskedPatches):
    """Masked autoencoder whose decoder continues the encoder.

    Args:
        encoder: a ViT3D; its patch's sides must be powers of two.
        decoder_depth: blocks of the decoder, of the encoder's kind and width.
        drop_path: stochastic depth of the decoder's last block, growing linearly from 0.
        mask_ratio: share of the patches to hide.
        norm_target: predict patches normalised by their own mean and variance instead of raw
            voxels.

    Raises:
        InputError: if the encoder is no ViT3D or its patch cannot be reached by doubling.
    """

    encoder: ViT3D

    def __init__(
        self,
        *,
        encoder: Backbone,
        decoder_depth: Annotated[int, Field(ge=1)] = 2,
        drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.2,
        mask_ratio: Annotated[float, Field(gt=0, lt=1)] = 0.75,
        norm_target: bool = False,
    ) -> None:
        vit = as_vit(encoder, "mae_primus")
        super().__init__(encoder=vit, mask_ratio=mask_ratio, norm_target=norm_target)
        width = vit.embed_dim
        rates = [drop_path * i / max(decoder_depth - 1, 1) for i in range(decoder_depth)]
        self.mask_token = nn.Parameter(torch.empty(width))
        self.pos_embed = Position(vit.pos_embed.kind, width, vit.pos_embed.grid)
        self.blocks = vit.kind.blocks(width, rates, vit.prefix_tokens)
        self.norm = vit.kind.norm(width)
        try:
            self.decoder = PatchDecoder(width, vit.patch_size, vit.in_channels)
        except ValueError as error:
            raise InputError(f"objective=mae_primus: {error}; or choose objective=mae") from error
        nn.init.normal_(self.mask_token, std=1e-6)

    def rebuild(self, image: Tensor, hidden: Tensor, order: Tensor, keep: int) -> Tensor:
        """Rebuilds the hidden patches as [B, M, P]; see `MaskedPatches.rebuild`."""
        encoder = self.encoder
        grid, width, prefix = encoder.grid(image.shape), encoder.embed_dim, encoder.prefix_tokens
        visible = encoder.tokens(image, hidden, keep)  # [B, K + V, E]
        position = self.pos_embed(grid, image.device)[order]  # [B, N, E]
        x = complete(visible, self.mask_token, position, prefix)  # [B, K + N, E]
        rotary = [table[order][:, None] for table in encoder.kind.rotary(grid, width, image.device)]
        for block in self.blocks:
            x = block(x, *rotary)
        # The transposed convolutions see one token at a time, so the hidden ones can stand in a
        # row instead of in the grid.
        row = self.norm(x[:, prefix + keep :]).transpose(1, 2)[..., None, None]  # [B, E, M, 1, 1]
        return patchify(self.decoder(image, [row]), encoder.patch_size)
