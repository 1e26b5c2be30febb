"""Optimisers with the right parameter groups, and the schedule of their rate.

AdamW: Loshchilov and Hutter 2017, arXiv:1711.05101. Biases, norms, positions and tokens do not
decay: decaying them pulls a network towards ignoring its own scale.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from pretrain.settings import LoopSettings


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Splits trainable parameters into decayed and not decayed ones.

    Vectors and scalars do not decay, nor does anything that a submodule names in
    `no_weight_decay()`.
    """
    exempt: set[str] = set()
    for prefix, part in module.named_modules():
        listed = getattr(part, "no_weight_decay", None)
        if callable(listed):
            exempt |= {f"{prefix}.{name}" if prefix else name for name in listed()}
    decayed: list[nn.Parameter] = []
    spared: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            (spared if parameter.ndim <= 1 or name in exempt else decayed).append(parameter)
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": spared, "weight_decay": 0.0},
    ]


def make_optimizer(module: nn.Module, chosen: LoopSettings) -> torch.optim.Optimizer:
    """The optimiser that the settings name, over the groups.

    `adam` adds its decay to the gradient (PyMIC), `adamw` to the weights, `sgd` has Nesterov
    momentum (nnU-Net). foreach, not fused: Lightning cannot clip before a fused step in bf16.
    """
    groups = parameter_groups(module, chosen.weight_decay)
    if chosen.optimizer == "sgd":
        return torch.optim.SGD(
            groups, lr=chosen.lr, momentum=chosen.momentum, nesterov=chosen.momentum > 0
        )
    kind = torch.optim.AdamW if chosen.optimizer == "adamw" else torch.optim.Adam
    return kind(groups, lr=chosen.lr, betas=chosen.betas)


def rate(step: int, chosen: LoopSettings) -> float:
    """Share of the peak rate at a step: linear warm-up, then what the schedule says.

    cosine: half a cosine down to 0; poly: (1 - done)^0.9 (nnU-Net); halving: by 2 after each
    `halve_every` steps. The first step has rate 1/warmup rather than 0, so that none is wasted.
    """
    if step < chosen.warmup:
        return (step + 1) / chosen.warmup
    past = step - chosen.warmup
    done = min(1.0, past / max(1, chosen.steps - chosen.warmup))
    if chosen.schedule == "poly":
        return float((1 - done) ** 0.9)
    if chosen.schedule == "halving":
        assert chosen.halve_every is not None
        return float(0.5 ** (past // chosen.halve_every))
    return 0.5 * (1 + math.cos(math.pi * done))
