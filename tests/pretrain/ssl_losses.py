"""Every loss on embeddings, on inputs in which samples are as unequal as they can be.

Each takes a student's and a teacher's embeddings [B, 8, E] of 8 items of B samples, and hidden [B,
8], True = hidden; each gives a scalar. Samples are in pairs: rank 0 of two has the even ones.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pretrain.contrast import local_contrast, nt_xent, partition_contrast, within_scan
from pretrain.distillation import Centring, cls_loss, ibot_loss, sinkhorn
from pretrain.masked_tokens import hidden_rows
from pretrain.overlap import (
    base_similarity,
    overlap_cross_entropy,
    overlap_log_loss,
    predicted_overlap,
)
from pretrain.regularisers import gram_loss, koleo

SAMPLES = 4
T = 0.2
Embedded = Callable[[Tensor, Tensor, Tensor], Tensor]


def inputs(width: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Items [4, 8, E] in float64 and which are hidden; what rank 0 has is little."""
    random = torch.Generator().manual_seed(seed)
    items = torch.randn(SAMPLES, 8, width, generator=random, dtype=torch.float64)
    items += torch.linspace(-1, 1, SAMPLES, dtype=torch.float64)[:, None, None]
    hidden = torch.zeros(SAMPLES, 8, dtype=torch.bool)
    hidden[0, 3] = hidden[3, 1:3] = True
    hidden[1] = True
    return items, hidden


def dino(student: Tensor, teacher: Tensor, hidden: Tensor) -> Tensor:
    rows = teacher[:, :2]
    targets = sinkhorn(rows.flatten(0, 1), T).view_as(rows)
    return cls_loss(targets, student[:, :2], student[:, 2:], T).loss


def ibot(student: Tensor, teacher: Tensor, hidden: Tensor) -> Tensor:
    rows = hidden_rows(hidden, 12)
    taken, seen = (z.flatten(0, 1).index_select(0, rows.token) for z in (student, teacher))
    return ibot_loss(sinkhorn(seen, T, rows.counted), taken, rows.weight, len(hidden), T)


def centred(student: Tensor, teacher: Tensor, hidden: Tensor) -> Tensor:
    """The second batch is centred by the first, from which only hidden items count."""
    with student.device:
        centring = Centring(student.shape[2])
    centring.to(torch.promote_types(student.dtype, torch.float32))
    centring(teacher.flatten(0, 1), T, hidden.flatten())
    centring.update()
    targets = centring(teacher.flatten(0, 1), T, hidden.flatten()).view_as(student)
    return cls_loss(targets[:, :2], student[:, :2], student[:, 2:], T).loss


def table(student: Tensor) -> Tensor:
    """Neighbours of four regions: those before and after each in a circle."""
    region = torch.arange(4, device=student.device)
    return (region - region[:, None]) % 2 == 1


def by_four(items: Tensor) -> tuple[Tensor, Tensor]:
    """Two views of four crops, partitions or regions."""
    return items[:, :4], items[:, 4:]


def voco(loss: Callable[[Tensor, Tensor], Tensor]) -> Embedded:
    def found(student: Tensor, teacher: Tensor, hidden: Tensor) -> Tensor:
        target = torch.where(hidden[:, None, 3:], 0, teacher[:, :3, :5].abs().clamp(max=1))
        return loss(target, predicted_overlap(student[:, :3], teacher[:, 3:]))

    return found


def between(student: Tensor, teacher: Tensor, hidden: Tensor) -> Tensor:
    """VoCo between volumes: what the teacher says of another volume's bases is the target."""
    half = len(student) // 2
    target, found = (
        predicted_overlap(z[:, :3], z[:, 3:].roll(half, 0)) for z in (teacher, student)
    )
    return overlap_cross_entropy(target, found)


LOSSES: dict[str, Embedded] = {
    "dino": dino,
    "ibot": ibot,
    "centred": centred,
    "gram": lambda s, t, h: gram_loss(s, t),
    "koleo": lambda s, t, h: koleo(s[:, 0]),
    "nt_xent": lambda s, t, h: nt_xent(s[:, 0], s[:, 1], T),
    "within_scan": lambda s, t, h: within_scan(*by_four(s), T),
    "partitions": lambda s, t, h: partition_contrast(*by_four(s), T, across=False),
    "partitions across": lambda s, t, h: partition_contrast(*by_four(s), T, across=True),
    "regions": lambda s, t, h: local_contrast(
        *(z[:, None] for z in by_four(s)), table(s), T, across=False
    ),
    "regions across": lambda s, t, h: local_contrast(
        *(z.unflatten(1, (1, 4)) for z in by_four(s)), table(s), T, across=True
    ),
    "overlap_cross_entropy": voco(overlap_cross_entropy),
    "overlap_log_loss": voco(overlap_log_loss),
    "overlap between volumes": between,
    "base_similarity": lambda s, t, h: base_similarity(s, squared=True),
}
