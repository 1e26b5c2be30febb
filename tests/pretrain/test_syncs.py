"""A training step never waits for the device; a logged row waits once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from sync_counter import DEVICE, SyncCounter
from tiny_pairs import build, kinds, one_each
from torch import Tensor

from pretrain.augment import Augment
from pretrain.estimate import raw_batch
from pretrain.loop import Loop
from pretrain.objective import Objective
from pretrain.settings import AugmentSettings


class Step:
    """One optimiser step as Lightning drives it, its hooks in its order, on stand-in tensors."""

    def __init__(self, objective: str, backbone: str) -> None:
        self.settings, built = build(objective, backbone)
        self.objective = built.to(DEVICE)
        nothing: Any = None
        self.loop = Loop(
            self.settings,
            nothing,
            nothing,
            augment=Augment((True, True, True), AugmentSettings(gain=0.1)),
        )
        self.objective.loop = self.loop
        self.trainer = L.Trainer(
            accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
        )
        self.objective.trainer = self.trainer
        self.optimizer = self.objective.configure_optimizers()
        self.trainer.strategy.optimizers = [self.optimizer]
        self.raw = raw_batch(self.settings, 1, 4, self.objective.crops, DEVICE)

    def run(self) -> None:
        def closure() -> Tensor:
            batch = self.objective.on_after_batch_transfer(self.raw, 0)
            loss = self.objective.training_step(batch, 0)
            self.optimizer.zero_grad()
            loss.backward()
            self.objective.configure_gradient_clipping()
            return loss

        self.objective.optimizer_step(0, 0, self.optimizer, closure)


@pytest.mark.parametrize(("objective", "backbone"), one_each())
def test_a_step_never_waits(objective: str, backbone: str) -> None:
    step = Step(objective, backbone)
    step.run()  # the optimiser makes its state in the first one
    with SyncCounter() as counter:
        step.run()
        step.run()
    assert counter.found == []
    assert step.loop.step == 3


def test_a_logged_row_waits_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pretrain.loop.world_size", lambda: 2)  # the sums of weights come along
    step = Step(*next(iter(kinds())))
    step.run()
    with SyncCounter() as counter:
        row, _ = step.loop.observed(lambda own: own, step.objective)
    assert len(counter.found) == 1, counter.found
    assert {"loss", "grad_norm"} <= row.keys()


def item(x: Tensor) -> Any:
    return x.sum().item()


def in_backward(x: Tensor) -> Any:
    leaf = x.detach().clone().requires_grad_()
    product = leaf * 2
    product.register_hook(lambda gradient: gradient * gradient.sum().item())
    product.sum().backward()


PLANTED: dict[str, Callable[[Tensor], Any]] = {
    "_local_scalar_dense": item,
    "_local_scalar_dense at test_syncs": in_backward,
    "aten._local_scalar_dense": lambda x: 1 if x.sum() > 0 else 0,
    "copy to the host": lambda x: x.cpu(),
    "copy to the host at": lambda x: x.tolist(),
    "copy to the device": lambda x: torch.ones(3).to(x.device),
    "torch.tensor": lambda x: torch.tensor([1.0, 2.0], device=x.device),
    "boolean index": lambda x: x.index_put_((x > 0,), x.new_zeros(())),
    "equal": lambda x: torch.equal(x, x),
}


@pytest.mark.parametrize("said", PLANTED)
def test_what_waits_is_counted(said: str) -> None:
    with SyncCounter() as counter:
        PLANTED[said](torch.ones(3, device=DEVICE))
    assert len(counter.found) == 1 and said in counter.found[0]
    assert "test_syncs.py:" in counter.found[0]


@pytest.mark.parametrize(
    "asked", [lambda x: x[x > 0], lambda x: x.nonzero(), lambda x: torch.unique(x)]
)
def test_what_has_no_answer_raises(asked: Callable[[Tensor], Any]) -> None:
    with SyncCounter() as counter, pytest.raises(NotImplementedError):
        asked(torch.ones(3, device=DEVICE))
    assert len(counter.found) == 1


def test_what_does_not_wait_is_not_counted() -> None:
    x = torch.ones(3, device=DEVICE)
    with SyncCounter() as counter:
        torch.where(x > 0, x, 0.0).sum()
        x.masked_fill(x > 0, 1.0)
        x[torch.zeros(2, dtype=torch.long, device=DEVICE)]
        torch.ones(3).sum().item()  # on the host all along
        x.to(torch.bfloat16)
    assert counter.found == []


@pytest.mark.parametrize(("objective", "backbone"), one_each())
def test_an_item_in_a_forward_pass_is_found(
    objective: str, backbone: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Step(objective, backbone)
    kind = type(step.objective)
    original = kind.forward

    def planted(self: Objective, batch: Any, progress: float) -> Any:
        losses = original(self, batch, progress)
        losses.loss.item()
        return losses

    monkeypatch.setattr(kind, "forward", planted)
    with SyncCounter() as counter:
        step.run()
    assert [line.split(" at ")[0] for line in counter.found] == ["aten._local_scalar_dense"]
