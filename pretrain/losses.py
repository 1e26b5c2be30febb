"""Losses that more than one objective takes, over chosen voxels: the rest has no gradient.

Soft Dice after Milletari et al. 2016, arXiv:1606.04797. B batch, K classes with background,
D, H, W voxels.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from pretrain.collectives import global_mean, global_sum

IGNORE = -1


def masked_mse(prediction: Tensor, target: Tensor, counted: Tensor) -> Tensor:
    """Mean squared error over the voxels where `counted` is True, in float32; 0 if there is none.

    The mean is over the batch of all ranks. Voxels are selected by `where`, not by a product, so
    that an uncounted one has no gradient even where its prediction is not finite.
    """
    return global_mean(_difference(prediction, target, counted).square().sum(), counted.sum())


def masked_l1(prediction: Tensor, target: Tensor, counted: Tensor) -> Tensor:
    """Mean absolute error over the voxels where `counted` is True, otherwise as `masked_mse`."""
    return global_mean(_difference(prediction, target, counted).abs().sum(), counted.sum())


def _difference(prediction: Tensor, target: Tensor, counted: Tensor) -> Tensor:
    return torch.where(counted, prediction.float() - target.float(), 0.0)


SMOOTH = 1e-5
"""Keeps the Dice of an absent class finite."""


def dice_loss(
    logits: Tensor,
    target: Tensor,
    *,
    background: bool = False,
    over_batch: bool = True,
) -> Tensor:
    """One minus the mean soft Dice over classes.

    Args:
        logits: [B, K, D, H, W].
        target: [B, D, H, W] class indices; -1 is left out.
        background: whether class 0 is one of the classes.
        over_batch: whether a class is summed over the batch of all ranks before dividing; else each
            sample has its own Dice, and the loss does not depend on who else is in the batch.
    """
    first = 0 if background else 1
    seen = (target != IGNORE)[:, None]  # [B, 1, D, H, W]
    probability = torch.where(seen, logits.softmax(1)[:, first:], 0.0)
    classes = torch.arange(first, logits.shape[1], device=logits.device).view(1, -1, 1, 1, 1)
    truth = (target[:, None] == classes).to(probability.dtype)
    axes = (0, 2, 3, 4) if over_batch else (2, 3, 4)
    overlap = (probability * truth).sum(axes)  # [K] or [B, K]
    total = probability.sum(axes) + truth.sum(axes)
    if over_batch:
        overlap, total = global_sum(torch.stack([overlap, total])).unbind()
    return 1 - ((2 * overlap + SMOOTH) / (total + SMOOTH)).mean()


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Mean over the voxels of all ranks that count; zero, not NaN, if there are none.

    Args:
        logits: [B, K, D, H, W].
        target: [B, D, H, W] class indices; -1 is left out.
    """
    total = F.cross_entropy(logits, target, ignore_index=IGNORE, reduction="sum")
    return global_mean(total, (target != IGNORE).sum())
