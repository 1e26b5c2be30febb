"""What the masked autoencoders of a ViT share: masks, targets, loss and previews.

The encoder sees the visible patches of a crop only, a decoder of the objective's own rebuilds the
hidden ones, and the loss is the mean squared error over their voxels, raw or normalised patch by
patch. Voxels that are not valid have no part in statistics, loss and gradient.

Shape legend: B batch, C channels, N patches, V visible and M = N - V hidden ones, E width of the
decoder, P = C * pd * ph * pw values of a patch, K prefix tokens of the encoder.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pretrain.backbones.vit import TokenBackbone
from pretrain.losses import masked_mse
from pretrain.masking import kept, patchify, random_hidden, take_rows, unpatchify, visible_first
from pretrain.objective import Batch, Losses, Objective

# Below this variance a patch is constant for the log; of the same size as what `normalise` adds.
CONSTANT_VARIANCE = 1e-6


class PatchStatistics(NamedTuple):
    """Mean and variance [..., 1] of each patch over its valid voxels."""

    mean: Tensor
    variance: Tensor


def patch_statistics(patches: Tensor, valid: Tensor, unbiased: bool = True) -> PatchStatistics:
    """Mean and variance of patches [..., P], leaving invalid voxels out.

    The unbiased variance divides by one less than the number of voxels. A patch with fewer than
    two valid voxels has variance 0.
    """
    count = valid.sum(-1, keepdim=True)
    mean = torch.where(valid, patches, 0).sum(-1, keepdim=True) / count.clamp(min=1)
    spread = torch.where(valid, patches - mean, 0).square().sum(-1, keepdim=True)
    return PatchStatistics(mean, spread / (count - int(unbiased)).clamp(min=1))


def normalise(patches: Tensor, statistics: PatchStatistics) -> Tensor:
    """The normalised target: (x - mean) / sqrt(variance + 1e-6), finite for constant patches."""
    return (patches - statistics.mean) * (statistics.variance + 1e-6).rsqrt()


def denormalise(patches: Tensor, statistics: PatchStatistics) -> Tensor:
    """Inverts `normalise`."""
    return patches * (statistics.variance + 1e-6).sqrt() + statistics.mean


def constant(statistics: PatchStatistics) -> Tensor:
    """Which patches have no contrast, bool [..., 1]: normalising them magnifies their noise."""
    return statistics.variance < CONSTANT_VARIANCE


def complete(visible: Tensor, mask_token: Tensor, position: Tensor, prefix: int) -> Tensor:
    """Appends a mask token for every hidden patch, and gives each patch its position.

    Attention does not care for the order of tokens, so they are not put back into the grid's.

    Args:
        visible: tokens [B, K + V, E] in the decoder's width.
        mask_token: [E].
        position: [B, N, E] of the visible patches, then of the hidden ones.
        prefix: their number K; prefix tokens have no position.

    Returns:
        Tokens [B, K + N, E]: prefix, visible, hidden.
    """
    seen = visible.shape[1] - prefix
    return torch.cat(
        [
            visible[:, :prefix],
            visible[:, prefix:] + position[:, :seen],
            mask_token + position[:, seen:],
        ],
        dim=1,
    )


class MaskedPatches(Objective):
    """Hides patches at random and has a subclass rebuild them.

    Args:
        encoder: the ViT.
        mask_ratio: share of the patches to hide.
        norm_target: predict patches normalised by their own mean and variance instead of raw
            voxels.
    """

    encoder: TokenBackbone

    unbiased: bool = True
    """Whether a normalised target divides by the unbiased variance, as MAE does."""

    def __init__(self, *, encoder: TokenBackbone, mask_ratio: float, norm_target: bool) -> None:
        super().__init__()
        self.encoder = encoder
        self.mask_ratio = mask_ratio
        self.norm_target = norm_target

    def rebuild(self, image: Tensor, hidden: Tensor, order: Tensor, keep: int) -> Tensor:
        """Rebuilds hidden patches from visible ones.

        Args:
            image: [B, C, D, H, W]; what is hidden in it must not be read.
            hidden: bool [B, N], True = hidden.
            order: int64 [B, N], indices of the visible patches, then of the hidden ones.
            keep: number V of visible patches.

        Returns:
            [B, M, P] in the units of the target.
        """
        raise NotImplementedError

    def draw(self, batch: Batch) -> Tensor:
        """Which patches are hidden: bool [B, N], the same number in every sample."""
        grid = self.encoder.grid(batch.image.shape)
        return random_hidden(batch.seeds, grid, self.mask_ratio)

    def forward(self, batch: Batch, progress: float) -> Losses:
        """Returns the mean squared error over hidden, valid voxels."""
        order, prediction = self.predict(batch)
        hidden = order[:, order.shape[1] - prediction.shape[1] :]  # [B, M]
        target, valid = self._patches(batch)
        target, valid = take_rows(target, hidden), take_rows(valid, hidden)
        statistics = patch_statistics(target, valid, self.unbiased)
        if self.norm_target:
            target = normalise(target, statistics)
        loss = masked_mse(prediction, target, valid)
        filled = valid.any(-1, keepdim=True)  # one of padding alone is no patch of the scan
        share = (constant(statistics) & filled).sum() / filled.sum().clamp(min=1)
        return Losses(loss, {"mse": loss.detach(), "constant_patches": share})

    def predict(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Rebuilds the hidden patches.

        Returns:
            order: int64 [B, N], indices of the patches, V visible ones first, then M hidden.
            prediction: [B, M, P] for the hidden ones, in the units of the target.
        """
        hidden = self.draw(batch)
        order = visible_first(hidden)
        keep = kept(hidden.shape[1], self.mask_ratio)
        return order, self.rebuild(batch.image, hidden, order, keep)

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
            target, valid = take_rows(patches, hidden), take_rows(valid, hidden)
            prediction = denormalise(prediction, patch_statistics(target, valid, self.unbiased))
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
