"""AdamW with the right parameter groups, and the schedule of its rate.

Loshchilov and Hutter 2017, arXiv:1711.05101. Biases, norms, positions and tokens do not decay:
decaying them pulls a network towards ignoring its own scale.
"""

from __future__ import annotations

import math

import torch
from torch import nn


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


def make_optimizer(
    module: nn.Module, *, lr: float, weight_decay: float, betas: tuple[float, float]
) -> torch.optim.AdamW:
    """AdamW over the groups; foreach, since Lightning cannot clip before a fused step in bf16."""
    return torch.optim.AdamW(parameter_groups(module, weight_decay), lr=lr, betas=betas)


def warmup_cosine(step: int, *, total: int, warmup: int, floor: float = 0.0) -> float:
    """Share of the peak rate at a step: linear from 0, then half a cosine down to `floor`.

    The first step has rate 1/warmup rather than 0, so that no step is wasted.
    """
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, total - warmup)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
