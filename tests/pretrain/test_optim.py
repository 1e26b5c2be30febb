"""Which parameters decay, and the rate at each step."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from seeds import SEED
from torch import nn

from pretrain.optim import make_optimizer, parameter_groups, rate
from pretrain.settings import LoopSettings


class Tokened(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 2, 3))
        self.linear = nn.Linear(3, 4)
        self.norm = nn.LayerNorm(4)

    def no_weight_decay(self) -> set[str]:
        return {"token"}


def test_only_matrices_decay() -> None:
    module = nn.Sequential(Tokened(), nn.Conv3d(1, 2, 3))
    module[1].bias.requires_grad_(False)
    decayed, spared = parameter_groups(module, 0.3)
    shapes = [tuple(p.shape) for p in decayed["params"]]
    assert shapes == [(4, 3), (2, 1, 3, 3, 3)] and decayed["weight_decay"] == 0.3
    assert {tuple(p.shape) for p in spared["params"]} == {(1, 2, 3), (4,)}
    assert len(spared["params"]) == 4 and spared["weight_decay"] == 0.0


def settings(**changes: Any) -> LoopSettings:
    base: dict[str, Any] = {"crop_size": (8, 8, 8), "steps": 110, "batch_size": 1, "lr": 0.5}
    return LoopSettings.model_validate(base | {"warmup": 10} | changes)


def rates(**changes: Any) -> list[float]:
    chosen = settings(**changes)
    return [rate(step, chosen) for step in range(111)]


def test_warmup_rises_linearly_then_falls_as_half_a_cosine() -> None:
    found = rates()
    assert found[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert found[10] == 1.0
    assert found[60] == pytest.approx(0.5)
    assert found[110] == pytest.approx(0)
    assert all(a >= b for a, b in itertools.pairwise(found[10:]))


def test_poly_is_that_of_nnunet() -> None:
    found = rates(schedule="poly", warmup=0, steps=110)
    assert found == pytest.approx([(1 - step / 110) ** 0.9 for step in range(111)])
    assert rates(schedule="poly")[10] == 1.0


def test_halving_halves() -> None:
    found = rates(schedule="halving", halve_every=20, warmup=0)
    assert found[:20] == [1.0] * 20 and found[20:40] == [0.5] * 20 and found[100] == 1 / 32


@pytest.mark.parametrize("changes", [{"schedule": "halving"}, {"halve_every": 3}])
def test_halving_and_its_pace_come_together(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="halve_every"):
        settings(**changes)


def test_no_warmup_starts_at_the_peak() -> None:
    assert rates(warmup=0)[0] == 1.0


def stepped(**changes: Any) -> tuple[float, float]:
    """What one and two steps of gradient 1 make of the weight 2."""
    layer = nn.Linear(1, 1)
    nn.init.constant_(layer.weight, 2.0)
    optimizer = make_optimizer(layer, settings(lr=0.1, weight_decay=0.5, **changes))
    found = []
    for _ in range(2):
        layer.weight.grad = torch.ones(1, 1)
        optimizer.step()
        found.append(layer.weight.item())
    return found[0], found[1]


def test_sgd_is_nesterov_with_decay_in_the_gradient() -> None:
    weight, velocity, expected = 2.0, 0.0, []
    for _ in range(2):
        gradient = 1 + 0.5 * weight
        velocity = 0.9 * velocity + gradient
        weight -= 0.1 * (gradient + 0.9 * velocity)
        expected.append(weight)
    assert stepped(optimizer="sgd", momentum=0.9) == pytest.approx(expected, rel=1e-6)


def test_adamw_decays_the_weight_and_adam_the_gradient() -> None:
    # The first step of Adam is the sign of its gradient, whatever its size.
    assert stepped(optimizer="adam")[0] == pytest.approx(2 - 0.1, rel=1e-5)
    assert stepped(optimizer="adamw")[0] == pytest.approx(2 - 0.1 * 0.5 * 2 - 0.1, rel=1e-5)


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd"])
def test_the_fused_step_is_the_plain_one(optimizer: str) -> None:
    torch.manual_seed(SEED)
    ours, plain = nn.Linear(7, 5), nn.Linear(7, 5)
    plain.load_state_dict(ours.state_dict())
    chosen = settings(optimizer=optimizer, lr=1e-2, momentum=0.9)
    fused, written_out = make_optimizer(ours, chosen), make_optimizer(plain, chosen)
    for group in written_out.param_groups:
        group["fused"] = False
    assert all(group["fused"] for group in fused.param_groups)
    for _ in range(20):
        x = torch.randn(3, 7)
        for module, one in ((ours, fused), (plain, written_out)):
            one.zero_grad()
            module(x).square().mean().backward()
            one.step()
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-7)


def test_stand_in_tensors_have_an_optimiser_too() -> None:
    make_optimizer(nn.Linear(2, 2, device="meta"), settings())
