"""What keeps features apart and in place: KoLeo spreads the batch, Gram holds on to locality.

KoLeo: Sablayrolles et al. 2018, arXiv:1806.03198, as in DINOv2 (Oquab et al. 2023,
arXiv:2304.07193). Gram anchoring: DINOv3, Siméoni et al. 2025, arXiv:2508.10104. In 3D a teacher's
map is resized trilinearly; the bicubic one of DINOv3 has no counterpart there.

Shape legend: B samples, N tokens, E width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from pretrain.numerics import in_float32, unit


@in_float32
def koleo(features: Tensor) -> Tensor:
    """-mean ln(distance to the nearest other sample + 1e-8), of features scaled to length 1.

    Among the samples of this rank, as in DINOv2: what is near depends on who is there, so the
    ranks' mean is not the value of the joint batch. One call is for one global crop of each
    sample; two crops of one sample would find each other. Duplicates have a large loss and no
    gradient from each other.

    Args:
        features: [B, E], the encoder's CLS token before any head.

    Raises:
        ValueError: if there are fewer than two samples.
    """
    B = len(features)
    if B < 2:
        raise ValueError("KoLeo needs at least two samples on each rank: raise the batch size")
    x = unit(features)
    with torch.no_grad():
        itself = torch.eye(B, dtype=torch.bool, device=x.device)
        nearest = (x @ x.mT).masked_fill(itself, -torch.inf).argmax(1)
    distance = torch.linalg.vector_norm(x - x.index_select(0, nearest), dim=1)
    return -(distance + 1e-8).log().mean()


@in_float32
def gram_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of the cosine similarities between all tokens of an image.

    It is blind to a rotation of all features and to the length of each. Negative similarities
    count as they are.

    Args:
        student: patch tokens after the encoder's last norm [B, N, E], hidden ones too.
        teacher: those of the Gram teacher on the same grid [B, N, E'], without a gradient.
    """
    x, y = unit(student), unit(teacher.detach())
    return (x @ x.mT - y @ y.mT).square().mean()


@in_float32
def resize_tokens(tokens: Tensor, grid: Sequence[int], target: Sequence[int]) -> Tensor:
    """Resizes the map of tokens [B, N, E] on a grid of (d, h, w) trilinearly to another grid.

    Cells are volumes, not points (corners are not aligned): half the grid takes means of 2x2x2.
    """
    B, _, E = tokens.shape
    volume = tokens.mT.reshape(B, E, *grid)
    resized = F.interpolate(volume, size=tuple(target), mode="trilinear", align_corners=False)
    return resized.flatten(2).mT
