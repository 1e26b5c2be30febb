"""Optimisers with the right parameter groups, and the schedule of their rate.

AdamW: Loshchilov and Hutter 2017, arXiv:1711.05101. Biases, norms, positions and tokens do not
decay: decaying them pulls a network towards ignoring its own scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from pretrain.ramps import cosine

if TYPE_CHECKING:
    from pretrain.settings import LoopSettings


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Splits trainable parameters into decayed and not decayed ones.

    Vectors and scalars do not decay, nor does anything that a submodule names in
    `no_weight_decay()`. A module that gives some parameters a share of the rate, by name, in
    `lr_scales()` has such a pair of groups for each share, the largest first; groups without a
    parameter are then left out.
    """
    exempt: set[str] = set()
    for prefix, part in module.named_modules():
        listed = getattr(part, "no_weight_decay", None)
        if callable(listed):
            exempt |= {f"{prefix}.{name}" if prefix else name for name in listed()}
    stated = getattr(module, "lr_scales", None)
    scales: dict[str, float] = stated() if callable(stated) else {}
    pairs: dict[float, tuple[list[nn.Parameter], list[nn.Parameter]]] = {1.0: ([], [])}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            spared = parameter.ndim <= 1 or name in exempt
            pairs.setdefault(scales.get(name, 1.0), ([], []))[spared].append(parameter)
    groups: list[dict[str, object]] = []
    for scale, (decayed, spared_ones) in sorted(pairs.items(), reverse=True):
        share = {"lr_scale": scale} if scales else {}
        groups.append({"params": decayed, "weight_decay": weight_decay, **share})
        groups.append({"params": spared_ones, "weight_decay": 0.0, **share})
    return [group for group in groups if group["params"]] if scales else groups


def make_optimizer(module: nn.Module, chosen: LoopSettings) -> torch.optim.Optimizer:
    """The optimiser that the settings name, over the groups.

    `adam` adds its decay to the gradient (PyMIC), `adamw` to the weights, `sgd` has Nesterov
    momentum (nnU-Net). Each weight is read and written once (fused), where the device can: a
    third of the time on a CPU, and no copy of the weights on a GPU.
    """
    groups = parameter_groups(module, chosen.weight_decay)
    fused = all(p.device.type in ("cpu", "cuda") for p in module.parameters())
    if chosen.optimizer == "sgd":
        return torch.optim.SGD(
            groups,
            lr=chosen.lr,
            momentum=chosen.momentum,
            nesterov=chosen.momentum > 0,
            fused=fused,
        )
    kind = torch.optim.AdamW if chosen.optimizer == "adamw" else torch.optim.Adam
    return kind(groups, lr=chosen.lr, betas=chosen.betas, fused=fused)


Moments = dict[str, Mapping[str, torch.Tensor]]
"""What an optimiser keeps of each parameter, by the parameter's name."""


def named_moments(module: nn.Module, state: Mapping[str, Any]) -> Moments:
    """What an optimiser keeps of each parameter, from its state, by the parameters' names."""
    order = _ordered_names(module)
    return {order[int(place)]: _tensors(kept) for place, kept in state["state"].items()}


def with_moments(
    optimizer: torch.optim.Optimizer, module: nn.Module, moments: Moments
) -> dict[str, Any]:
    """The state of a new optimiser over a module that takes over moments."""
    order = _ordered_names(module)
    kept = {i: dict(moments[name]) for i, name in enumerate(order) if name in moments}
    return {**optimizer.state_dict(), "state": kept}


def fitting_moments(module: nn.Module, moments: Moments) -> Moments:
    """Those that a module's parameters can take over: of their names and shapes."""
    shapes = {name: p.shape for name, p in module.named_parameters() if p.requires_grad}
    return {
        name: kept
        for name, kept in moments.items()
        if name in shapes and all(value.shape in ((), shapes[name]) for value in kept.values())
    }


def _ordered_names(module: nn.Module) -> list[str]:
    """Names of the parameters in the order in which an optimiser's state counts them."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    groups = cast("list[dict[str, list[nn.Parameter]]]", parameter_groups(module, 0.0))
    return [names[id(parameter)] for group in groups for parameter in group["params"]]


def _tensors(kept: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in kept.items() if isinstance(value, torch.Tensor)}


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
    return cosine(done, 1.0, 0.0)
