"""Which parameters decay, and the rate at each step."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from pretrain.optim import parameter_groups, warmup_cosine


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


def test_warmup_rises_linearly_then_falls_as_half_a_cosine() -> None:
    rate = [warmup_cosine(step, total=110, warmup=10, floor=0.1) for step in range(111)]
    assert rate[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert rate[10] == 1.0
    assert rate[60] == pytest.approx(0.55)  # half way: the mean of peak and floor
    assert rate[110] == pytest.approx(0.1)
    assert all(a >= b for a, b in itertools.pairwise(rate[10:]))


def test_no_warmup_starts_at_the_peak() -> None:
    assert warmup_cosine(0, total=10, warmup=0) == 1.0
