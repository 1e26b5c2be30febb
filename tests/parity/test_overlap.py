"""The losses of VoCo in nnssl's form are those of nnssl."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from pretrain.overlap import base_similarity, overlap_log_loss, predicted_overlap


def test_voco(parity: Callable[[str], Any]) -> None:
    tensors, _ = parity("voco")
    crops, bases = tensors["input.target_embeddings"], tensors["input.base_embeddings"]
    loss = overlap_log_loss(tensors["input.overlaps"], predicted_overlap(crops, bases))
    assert loss.item() == pytest.approx(tensors["expected.prediction_loss"].item(), rel=1e-5)
    apart = base_similarity(bases, squared=False)
    assert apart.item() == pytest.approx(tensors["expected.regularization_loss"].item(), rel=1e-5)
    assert (loss + apart).item() == pytest.approx(tensors["expected.loss"].item(), rel=1e-5)
