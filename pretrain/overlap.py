"""VoCo: a crop's similarity to the bases of a volume is to tell how much it overlaps each.

Wu et al. 2024, arXiv:2402.17300 (CVPR) and arXiv:2410.09890 (Large-Scale-Medical). The paper's
bases and crops share their place along z, so that overlaps are areas; here boxes have three
dimensions, and a crop may lie anywhere. The overlap is known from where a crop was cut, before it
is flipped or turned.

Two forms are in use, and the names say whose: `overlap_cross_entropy` of Large-Scale-Medical,
`overlap_log_loss` of nnssl, and of the first release.

Shape legend: B volumes, T crops and N bases of each, E width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pretrain.collectives import global_mean
from pretrain.numerics import in_float32, unit

_EPS = 1e-6


@in_float32
def overlap_fractions(crops: Tensor, bases: Tensor) -> Tensor:
    """The share of each crop's volume that lies in each base: [B, T, N].

    They sum to 1 where bases tile the volume and the crop lies within.

    Args:
        crops: boxes [B, T, 2, 3], first corner and the one beyond the last voxel, in any unit.
        bases: boxes [B, N, 2, 3] in the same unit and frame.
    """
    a, b = crops[:, :, None], bases[:, None]
    shared = torch.minimum(a[..., 1, :], b[..., 1, :]) - torch.maximum(a[..., 0, :], b[..., 0, :])
    return shared.clamp(min=0).prod(-1) / (a[..., 1, :] - a[..., 0, :]).prod(-1)


@in_float32
def predicted_overlap(crops: Tensor, bases: Tensor) -> Tensor:
    """Cosine of each crop with each base, 0 where negative, which then has no gradient.

    Within a volume the bases are the teacher's. Between volumes the teacher's pair predicts the
    target of the student's; VoCo takes the bases of the next volume in the batch. With
    `bases.roll(B // 2, 0)` a volume has the same partner for any number of ranks.

    Args:
        crops: embeddings [B, T, E].
        bases: embeddings [B, N, E].

    Returns:
        [B, T, N] in [0, 1].
    """
    # Rounding may pass 1, and the logarithm of the losses its end.
    return (unit(crops) @ unit(bases).mT).relu().clamp(max=1)


@in_float32
def overlap_cross_entropy(target: Tensor, prediction: Tensor) -> Tensor:
    """Mean of -ln(1 - |y - s|) weighted by the overlap y, plus mean of -ln(1 - s) where y = 0.

    Both are over the batch of all ranks.

    Args:
        target: overlaps y [B, T, N] in [0, 1]; no gradient.
        prediction: s [B, T, N] in [0, 1].
    """
    return _weighted(target, prediction) + _apart(target, -(1 - prediction + _EPS).log())


@in_float32
def overlap_log_loss(target: Tensor, prediction: Tensor) -> Tensor:
    """The form of nnssl: as `overlap_cross_entropy`, but the mean of s^2 at y = 0."""
    return _weighted(target, prediction) + _apart(target, prediction.square())


def _weighted(target: Tensor, prediction: Tensor) -> Tensor:
    target = target.detach()
    losses = -target * (1 - (target - prediction).abs() + _EPS).log()
    return global_mean(losses.sum(), target.sum())


def _apart(target: Tensor, losses: Tensor) -> Tensor:
    apart = target == 0
    return global_mean(torch.where(apart, losses, 0).sum(), apart.sum())


@in_float32
def base_similarity(bases: Tensor, *, squared: bool) -> Tensor:
    """Regularisation: the mean over pairs of a volume's bases of their cosine, 0 where negative.

    Bases are different places, so they are to be orthogonal. Of each pair one side is held fixed.

    Args:
        bases: the student's embeddings [B, N, E].
        squared: whether cosines are squared (Large-Scale-Medical) or not (nnssl).
    """
    x = unit(bases)
    N = x.shape[1]
    first, second = torch.triu_indices(N, N, 1, device=x.device)  # [N (N - 1) / 2] each
    cosine = (x.index_select(1, first) * x.detach().index_select(1, second)).sum(-1).relu()
    return (cosine.square() if squared else cosine).mean()
