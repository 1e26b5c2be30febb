"""One answer per scan: closed forms, padding, and a batch that can be learnt."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from small_runs import backbone

from data_prep.errors import InputError
from finetune.pooled import Classification, PooledHead, Regression
from pretrain.objective import Batch


def batch() -> Batch:
    x = torch.randn(4, 1, 8, 16, 32, generator=torch.Generator().manual_seed(0))
    x = x * torch.tensor([0.2, 0.6, 1.0, 1.4])[:, None, None, None, None]
    valid = torch.ones_like(x, dtype=torch.bool)
    return Batch(x, valid, torch.ones(4, 3), torch.arange(4), ["a", "b", "c", "d"])


def test_the_mean_leaves_padding_out() -> None:
    head = PooledHead(2, 1)
    with torch.no_grad():
        head.head.weight.copy_(torch.tensor([[1.0, 10.0]]))
    cells = torch.arange(8.0).reshape(1, 2, 1, 2, 2)
    valid = torch.ones(1, 1, 2, 4, 4, dtype=torch.bool)
    assert head([cells], valid).item() == pytest.approx(1.5 + 10 * 5.5)
    valid[:, :, :, 2:] = False  # the second row of cells lies outside the volume
    assert head([cells], valid).item() == pytest.approx(0.5 + 10 * 4.5)
    valid[:, :, :, 2] = True  # and now half of it inside
    assert head([cells], valid).item() == pytest.approx(
        (0.5 * 2 + 2.5) / 3 + 10 * (4.5 * 2 + 6.5) / 3
    )
    valid[:] = False
    assert torch.isfinite(head([cells], valid)).all()


@pytest.mark.parametrize("kind", ["resenc", "vit"])
def test_classes_can_be_learnt_with_the_encoder_frozen_or_not(kind: str) -> None:
    torch.manual_seed(0)
    targets = {"a": 0, "b": 0, "c": 1, "d": 2}
    model = Classification(encoder=backbone(kind), targets=targets, classes=3)
    one = batch()
    assert model.eval()(one, 0.0).loss.item() == pytest.approx(math.log(3), rel=0.2)
    model.hold("encoder")
    model.train()
    model(one, 0.0).loss.backward()
    assert all(p.grad is None for p in model.encoder.parameters())
    model.hold("none")
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        model(one, 0.0).loss.backward()
        optimizer.step()
    model.eval()
    assert model.probabilities(one.image, one.valid).argmax(1).tolist() == [0, 0, 1, 2]


def test_numbers_are_learnt_in_units_of_their_deviation() -> None:
    torch.manual_seed(0)
    targets = {"a": 20.0, "b": 40.0, "c": 60.0, "d": 80.0}
    model = Regression(encoder=backbone("resenc"), targets=targets)
    one = batch()
    losses = model(one, 0.0)
    assert losses.loss.item() == pytest.approx(1, abs=0.2)  # predicting the mean
    assert losses.parts["mse"].item() == pytest.approx(losses.loss.item() * 500)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(80):
        optimizer.zero_grad()
        model(one, 0.0).loss.backward()
        optimizer.step()
    model.eval()
    assert model.values(one.image, one.valid).tolist() == pytest.approx([20, 40, 60, 80], abs=5)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda e: Classification(encoder=e, targets={"a": 3}, classes=3), "from 0 to 2, found 3"),
        (lambda e: Regression(encoder=e, targets={"a": 1.0, "b": 1.0}), "numbers that differ"),
        (lambda e: Regression(encoder=e, targets={"a": 1.0, "b": math.nan}), "finite"),
        (lambda e: Regression(encoder=e, targets={}), "of 0 cases"),
    ],
)
def test_targets_that_cannot_be_learnt_are_refused(make: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        make(backbone("resenc"))
