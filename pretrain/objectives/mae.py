"""Masked autoencoder on a 3D ViT: hide most patches, rebuild their voxels from the others.

He et al. 2021, arXiv:2111.06377; in 3D as in Chen et al. 2022, arXiv:2204.11716. The encoder sees
visible patches only; a small decoder, thrown away afterwards, fills in the rest, and the loss is
the mean squared error over hidden voxels.

Shape legend: B batch, C channels, N patches, V visible and M = N - V hidden ones, E width of the
decoder, P = C * pd * ph * pw values of a patch, K prefix tokens of the encoder.
"""

from __future__ import annotations

from typing import Annotated, NamedTuple

import torch
from pydantic import Field
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from data_prep.errors import InputError
from pretrain.backbones.backbone import Backbone
from pretrain.backbones.vit import ViT3D, init_transformer, sincos_position
from pretrain.collectives import global_mean
from pretrain.masking import (
    kept,
    patchify,
    random_hidden,
    take_rows,
    unpatchify,
    visible_first,
)
from pretrain.objective import Batch, Losses, Objective

# Below this variance a patch is constant for the log; of the same size as what norm_target adds.
CONSTANT_VARIANCE = 1e-6


class PatchStatistics(NamedTuple):
    """Mean and unbiased variance [..., 1] of each patch over its valid voxels."""

    mean: Tensor
    variance: Tensor


def patch_statistics(patches: Tensor, valid: Tensor) -> PatchStatistics:
    """Mean and unbiased variance of patches [..., P], leaving invalid voxels out.

    The reference divides by P - 1 too. A patch with fewer than two valid voxels has variance 0.
    """
    weight = valid.to(patches.dtype)
    count = weight.sum(-1, keepdim=True)
    mean = (patches * weight).sum(-1, keepdim=True) / count.clamp(min=1)
    spread = ((patches - mean) * weight).square().sum(-1, keepdim=True)
    return PatchStatistics(mean, spread / (count - 1).clamp(min=1))


def normalise(patches: Tensor, statistics: PatchStatistics) -> Tensor:
    """The paper's target: (x - mean) / sqrt(variance + 1e-6), finite for constant patches."""
    return (patches - statistics.mean) * (statistics.variance + 1e-6).rsqrt()


def denormalise(patches: Tensor, statistics: PatchStatistics) -> Tensor:
    """Inverts `normalise`."""
    return patches * (statistics.variance + 1e-6).sqrt() + statistics.mean


def masked_mse(prediction: Tensor, target: Tensor, counted: Tensor) -> Tensor:
    """Mean squared error over the voxels where `counted` is True, in float32; 0 if there is none.

    The mean is over the batch of all ranks. Voxels are selected by `where`, not by a product, so
    that an uncounted one has no gradient even where its prediction is not finite.
    """
    error = torch.where(counted, prediction.float() - target.float(), 0.0)
    return global_mean(error.square().sum(), counted.sum())


class MAE(Objective):
    """Masked autoencoder with a transformer decoder.

    The defaults are the paper's decoder for ViT-L; a narrower and shallower one is enough for a
    small encoder.

    Args:
        encoder: a backbone with tokens (ViT3D).
        decoder_dim: width of the decoder.
        decoder_depth: its blocks.
        decoder_heads: its attention heads; must divide the width.
        mask_ratio: share of the patches to hide.
        norm_target: predict patches normalised by their own mean and variance instead of raw
            voxels.

    Raises:
        InputError: if the encoder has no tokens or the heads do not divide the width.
    """

    encoder: ViT3D

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
        super().__init__()
        if not isinstance(encoder, ViT3D):
            raise InputError(
                f"objective=mae encodes tokens and {type(encoder).__name__} has none: "
                "choose a ViT, such as backbone=vit_s, or objective=cnn_mae"
            )
        if decoder_dim % decoder_heads:
            raise InputError(
                f"objective.decoder_heads={decoder_heads} does not divide "
                f"objective.decoder_dim={decoder_dim}: change one of them"
            )
        self.encoder = encoder
        self.mask_ratio = mask_ratio
        self.norm_target = norm_target
        self.decoder_dim = decoder_dim
        d, h, w = encoder.patch_size
        self.embed = nn.Linear(encoder.embed_dim, decoder_dim)
        # One-dimensional, so that it is spared from weight decay as biases and norms are.
        self.mask_token = nn.Parameter(torch.empty(decoder_dim))
        self.blocks = nn.ModuleList(
            Block(decoder_dim, decoder_heads, qkv_bias=True) for _ in range(decoder_depth)
        )
        self.norm = nn.LayerNorm(decoder_dim, eps=1e-6)
        self.head = nn.Linear(decoder_dim, encoder.in_channels * d * h * w)
        for module in (self.embed, self.blocks, self.head):
            module.apply(init_transformer)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, batch: Batch, progress: float) -> Losses:
        """Returns the mean squared error over hidden, valid voxels."""
        order, prediction = self.predict(batch)
        hidden = order[:, order.shape[1] - prediction.shape[1] :]  # [B, M]
        target, valid = self._patches(batch)
        target, valid = take_rows(target, hidden), take_rows(valid, hidden)
        statistics = patch_statistics(target, valid)
        if self.norm_target:
            target = normalise(target, statistics)
        loss = masked_mse(prediction, target, valid)
        constant = (statistics.variance < CONSTANT_VARIANCE).float().mean()
        return Losses(loss, {"mse": loss.detach(), "constant_patches": constant})

    def predict(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Rebuilds the hidden patches.

        Returns:
            order: int64 [B, N], indices of the patches, V visible ones first, then M hidden.
            prediction: [B, M, P] for the hidden ones, in the units of the target.
        """
        grid = self.encoder.grid(batch.image.shape)
        hidden = random_hidden(batch.seeds, grid, self.mask_ratio)
        order = visible_first(hidden)
        keep = kept(order.shape[1], self.mask_ratio)
        visible = self.embed(self.encoder.tokens(batch.image, hidden, keep))  # [B, K + V, E]
        prefix = self.encoder.prefix_tokens

        # Attention does not care for the order of tokens, so they stay as they are, each with the
        # position of its own patch; only the hidden ones, at the end, are turned into voxels.
        position = sincos_position(grid, self.decoder_dim, batch.image.device)[order]  # [B, N, E]
        x = torch.cat(
            [
                visible[:, :prefix],
                visible[:, prefix:] + position[:, :keep],
                self.mask_token + position[:, keep:],
            ],
            dim=1,
        )
        for block in self.blocks:
            x = block(x)
        return order, self.head(self.norm(x[:, prefix + keep :]))

    @torch.no_grad()
    def preview(self, batch: Batch) -> dict[str, Tensor]:
        """Returns "input", "visible" (hidden voxels NaN) and "output", all in units of the input.

        The output shows the prediction in hidden patches and the input in visible ones, which the
        loss never trained. A normalised prediction gets the mean and the spread of the true patch.
        """
        patches, valid = self._patches(batch)
        order, prediction = self.predict(batch)
        hidden = order[:, order.shape[1] - prediction.shape[1] :]  # [B, M]
        prediction = prediction.float()
        if self.norm_target:
            statistics = patch_statistics(take_rows(patches, hidden), take_rows(valid, hidden))
            prediction = denormalise(prediction, statistics)
        hidden = hidden[:, :, None].expand_as(prediction)
        grid, patch = self.encoder.grid(batch.image.shape), self.encoder.patch_size
        return {
            "input": batch.image,
            "visible": unpatchify(patches.scatter(1, hidden, torch.nan), grid, patch),
            "output": unpatchify(patches.scatter(1, hidden, prediction), grid, patch),
        }

    def _patches(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The image in float32 and its valid voxels as patches, both [B, N, P]."""
        patch = self.encoder.patch_size
        valid = batch.valid.expand_as(batch.image)
        return patchify(batch.image.float(), patch), patchify(valid, patch)
