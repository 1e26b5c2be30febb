"""One answer per scan: closed forms, padding, mirrors, and a batch that can be learnt."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from seeds import SEED
from small_runs import backbone

from data_prep.errors import InputError
from finetune.pooled import Classification, PooledHead, Regression
from finetune.scan_task import ScanTask
from pretrain.augment import mirrors
from pretrain.objective import Batch


def classes(*names: str, **changes: Any) -> ScanTask:
    return ScanTask(name="t", target="x", kind="classification", classes=names, **changes)


AGE = ScanTask(name="t", target="x", kind="regression", unit="years")


def batch() -> Batch:
    x = torch.randn(4, 1, 8, 16, 32, generator=torch.Generator().manual_seed(SEED))
    x = x * torch.tensor([0.2, 0.6, 1.0, 1.4])[:, None, None, None, None]
    valid = torch.ones_like(x, dtype=torch.bool)
    return Batch(x, valid, torch.ones(4, 3), torch.arange(4), ["a", "b", "c", "d"])


def test_the_mean_leaves_padding_out() -> None:
    head = PooledHead(2, 1)
    with torch.no_grad():
        head.last.weight.copy_(torch.tensor([[1.0, 10.0]]))
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


@pytest.mark.parametrize("decoder", ["auto", "mlp"])
@pytest.mark.parametrize("kind", ["resenc", "vit"])
def test_classes_can_be_learnt_with_the_encoder_frozen_or_not(kind: str, decoder: Any) -> None:
    torch.manual_seed(SEED)
    model = Classification(
        encoder=backbone(kind),
        task=classes("p", "q", "r"),
        decoder=decoder,
        targets={"a": 0, "b": 0, "c": 1, "d": 2},
    )
    assert isinstance(model.decoder, PooledHead)
    assert (model.decoder.last is model.decoder.head) == (decoder == "auto")
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
    answers = model.answers(one.image, one.valid)
    assert answers.argmax(1).tolist() == [0, 0, 1, 2]
    assert answers.sum(1).tolist() == pytest.approx([1, 1, 1, 1])


def test_numbers_are_learnt_in_units_of_their_deviation() -> None:
    torch.manual_seed(SEED)
    targets = {"a": 20.0, "b": 40.0, "c": 60.0, "d": 80.0}
    model = Regression(encoder=backbone("resenc"), task=AGE, targets=targets)
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
    with torch.no_grad():
        before = model.answers(one.image, one.valid)
        assert before[:, 0].tolist() == pytest.approx([20, 40, 60, 80], abs=5)
        # A network without its targets gives the same answers from the weights alone.
        model.finish()
        other = Regression(encoder=backbone("resenc"), task=AGE)
        other.load_state_dict(model.state_dict())
        other.eval()
        assert torch.allclose(other.answers(one.image, one.valid), before, rtol=1e-5)
    assert {name.partition(".")[0] for name in model.state_dict()} == {"encoder", "decoder"}


def test_a_mirrored_crop_is_of_the_other_side() -> None:
    task = classes("left", "mid", "right", flip=(False, False, True), swap=[("left", "right")])
    targets = {"a": 0, "b": 0, "c": 1, "d": 2}
    model = Classification(encoder=backbone("resenc"), task=task, targets=targets)
    turned = [False, True, True, True]
    seeds = torch.arange(50)
    left, right = (seeds[mirrors(seeds)[:, 2] == told] for told in (False, True))
    one = dataclasses.replace(batch(), seeds=torch.cat([left[:1], right[:3]]))
    partner = {0: 2, 1: 1, 2: 0}
    expected = [partner[t] if m else t for t, m in zip([0, 0, 1, 2], turned, strict=True)]
    assert model.train().wanted(one).tolist() == expected
    assert model.eval().wanted(one).tolist() == [0, 0, 1, 2]
    still = Classification(encoder=backbone("resenc"), task=classes("p", "q", "r"), targets=targets)
    assert still.train().wanted(one).tolist() == [0, 0, 1, 2]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (
            lambda e: Classification(encoder=e, task=classes("p", "q", "r"), targets={"a": 3}),
            "from 0 to 2, found 3",
        ),
        (
            lambda e: Regression(encoder=e, task=AGE, targets={"a": 1.0, "b": 1.0}),
            "numbers that differ",
        ),
        (lambda e: Regression(encoder=e, task=AGE, targets={"a": 1.0, "b": math.nan}), "finite"),
        (lambda e: Regression(encoder=e, task=AGE, targets={}), "of 0 cases"),
    ],
)
def test_targets_that_cannot_be_learnt_are_refused(make: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        make(backbone("resenc"))


def test_answers_in_a_large_unit_keep_their_digits_in_bfloat16() -> None:
    values = {"a": 1800.0, "b": 1820.5, "c": 1843.25, "d": 1870.0}
    model = Regression(encoder=backbone("resenc"), task=AGE, targets=values)
    torch.nn.init.normal_(model.decoder.last.weight, std=0.5)
    model.finish()
    model.eval()
    one = batch()
    with torch.no_grad():
        exact = model.answers(one.image, one.valid)
        with torch.autocast("cpu", torch.bfloat16):
            found = model.answers(one.image, one.valid)
    assert exact.unique().numel() == 4
    torch.testing.assert_close(found, exact, rtol=0, atol=1.0)  # a step of bfloat16 is 8 there
