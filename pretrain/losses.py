"""Errors over chosen voxels, shared by objectives."""

from __future__ import annotations

import torch
from torch import Tensor


def masked_mse(prediction: Tensor, target: Tensor, counted: Tensor) -> Tensor:
    """Mean squared error over the voxels where `counted` is True, in float32; 0 if there is none.

    Selected by `where`, not by a product, so that an uncounted voxel has no gradient even where
    its prediction is not finite.
    """
    return _difference(prediction, target, counted).square().sum() / counted.sum().clamp(min=1)


def masked_l1(prediction: Tensor, target: Tensor, counted: Tensor) -> Tensor:
    """Mean absolute error over the voxels where `counted` is True, otherwise as `masked_mse`."""
    return _difference(prediction, target, counted).abs().sum() / counted.sum().clamp(min=1)


def _difference(prediction: Tensor, target: Tensor, counted: Tensor) -> Tensor:
    return torch.where(counted, prediction.float() - target.float(), 0.0)
