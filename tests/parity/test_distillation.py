"""Targets and losses of self-distillation are those of DINOv2, the Gram loss that of DINOv3.

The reference takes exp(logits / T) in float32 as it stands, which overflows beyond 88: where its
logits are too large for that, it gave NaN. There its formula is taken in float64 in its stead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from pretrain.distillation import Centring, cls_loss, ibot_loss, sinkhorn, soft_cross_entropy
from pretrain.masked_tokens import hidden_rows
from pretrain.regularisers import gram_loss, koleo

Parity = Callable[[str], Any]


def plain_sinkhorn(logits: Tensor, temperature: float, iterations: int) -> Tensor:
    """As it is published, in float64, where exp overflows beyond 709."""
    Q = (logits.double() / temperature).exp().T  # [K, B]
    K, B = Q.shape
    Q = Q / Q.sum()
    for _ in range(iterations):
        Q = Q / Q.sum(1, keepdim=True) / K
        Q = Q / Q.sum(0, keepdim=True) / B
    return (Q * B).T


def near(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    assert expected.isfinite().all() and found.isfinite().all()
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def targets(tensors: dict[str, Tensor], temperature: float, iterations: int) -> Tensor:
    """The reference's, or where they overflowed its formula's."""
    logits, expected = tensors["input.teacher_logits"], tensors["expected.sinkhorn"]
    plain = plain_sinkhorn(logits, temperature, iterations)
    if expected.isfinite().all():
        near(plain, expected)
    else:
        assert (logits / temperature).exp().isinf().any()
    return plain


def test_class_tokens(parity: Parity) -> None:
    tensors, metadata = parity("dino_cls")
    batch, local = int(metadata["batch"]), int(metadata["local_crops"])
    warm, cold = float(metadata["student_temp"]), float(metadata["teacher_temp"])
    iterations = int(metadata["sinkhorn_iterations"])
    logits = tensors["input.teacher_logits"]

    def by_sample(rows: Tensor, crops: int) -> Tensor:
        return rows.unflatten(0, (crops, batch)).transpose(0, 1)

    expected = targets(tensors, cold, iterations)
    found = sinkhorn(logits, cold, iterations=iterations)
    near(found, expected)
    student = (
        by_sample(tensors["input.student_global_logits"], 2),
        by_sample(tensors["input.student_local_logits"], local),
    )
    losses = cls_loss(by_sample(found, 2), *student, warm)
    if tensors["expected.loss"].isfinite():
        near(losses.loss, tensors["expected.loss"])
        near(losses.local, tensors["expected.local_sum"])
        near(losses.crossed, tensors["expected.global_sum"])
    else:
        exact = [z.double() for z in student]
        near(losses.loss, cls_loss(by_sample(expected, 2), *exact, warm).loss)

    centring = Centring(int(metadata["prototypes"]), float(metadata["center_momentum"]))
    centring(logits, cold)
    centring.update()
    near(centring.centre, tensors["expected.center_after_one_update"][0])
    near(centring(logits, cold), tensors["expected.centered_softmax"])


@pytest.mark.parametrize("padding", [0, 7])
def test_patch_tokens(parity: Parity, padding: int) -> None:
    tensors, metadata = parity("ibot_patch")
    warm, cold = float(metadata["student_temp"]), float(metadata["teacher_temp"])
    iterations = int(metadata.get("sinkhorn_iterations", 3))
    mask = tensors["input.mask"]
    student, teacher = tensors["input.student_logits"], tensors["input.teacher_logits"]
    expected = targets(tensors, cold, iterations)

    hidden = hidden_rows(mask, len(student) + padding)
    student = torch.cat([student, torch.randn(padding, student.shape[1])])
    teacher = torch.cat([teacher, torch.randn(padding, student.shape[1])])
    found = sinkhorn(teacher, cold, hidden.counted, iterations)
    near(found[hidden.counted], expected)
    loss = ibot_loss(found, student, hidden.weight, len(mask), warm)
    if tensors["expected.loss"].isfinite():
        near(loss, tensors["expected.loss"])
    else:
        exact = hidden.weight.double()[: len(expected)]
        cross = soft_cross_entropy(expected, tensors["input.student_logits"].double(), warm)
        near(loss, (exact * cross).sum() / len(mask))


def test_koleo(parity: Parity) -> None:
    tensors, _ = parity("koleo")
    near(koleo(tensors["input.features"]), tensors["expected.loss"])


def test_gram_keeps_negative_similarities(parity: Parity) -> None:
    tensors, _ = parity("gram")
    found = gram_loss(tensors["input.student"], tensors["input.teacher"])
    near(found, tensors["expected.loss_keep_negative"])
