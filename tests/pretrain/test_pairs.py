"""Every objective with every backbone: one step, or a refusal that says what would fit."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from tiny_pairs import build, composed, fitting, names, one_each, pairs, refused, shrink
from torch import nn

from data_prep.errors import InputError
from pretrain.estimate import bare_loop, raw_batch
from pretrain.objective import Objective
from pretrain.settings import PretrainSettings
from pretrain.train import build_objective

STEPPED: set[str] = set()


@pytest.mark.parametrize(("objective", "backbone"), pairs())
def test_one_step_reaches_every_part_or_the_pair_is_refused(objective: str, backbone: str) -> None:
    chosen = fitting(objective, backbone)
    if isinstance(chosen, InputError):
        advised = re.findall(r"backbone=(\w+)", str(chosen))
        assert advised, f"names no backbone that would fit: {chosen}"
        assert not any(refused(objective, name) for name in advised)
        return
    small = chosen.model_dump_json()
    if small not in STEPPED:  # many presets are the same network once they are small
        one_step(chosen, build_objective(chosen, 1))
        STEPPED.add(small)


def one_step(chosen: PretrainSettings, objective: Objective) -> None:
    loop = bare_loop(chosen, objective)
    raw = raw_batch(chosen, 1, 4, objective.crops)
    batch = loop.to_batch(raw)
    batch.valid[0, :, :, :3] = False
    loss, parts = objective(batch, 0.5)
    loss.backward()
    assert loss.isfinite() and loss.dtype == torch.float32
    assert all(part.isfinite().all() for part in parts.values())
    missing, zero, wild = [], [], []
    for name, parameter in objective.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.grad is None:
            missing.append(name)
        elif not parameter.grad.isfinite().all():
            wild.append(name)
        # A bias before a norm has no effect, so weights tell.
        elif parameter.ndim > 1 and not parameter.grad.any():
            zero.append(name)
    assert (missing, zero, wild) == ([], [], [])
    before = {name: p.detach().clone() for name, p in objective.encoder.named_parameters()}
    loop.make_optimizer(objective).step()
    moved = {n for n, p in objective.encoder.named_parameters() if not torch.equal(p, before[n])}
    trained = {n: p for n, p in objective.encoder.named_parameters() if p.requires_grad}
    assert {n for n, p in trained.items() if p.ndim > 1} <= moved <= trained.keys()
    padding = replace(batch, valid=torch.zeros_like(batch.valid))
    assert objective(padding, 0.5).loss.isfinite()


@pytest.mark.parametrize("objective", names("objective"))
def test_some_backbone_fits_each_objective(objective: str) -> None:
    assert not all(refused(objective, backbone) for backbone in names("backbone"))


@pytest.mark.parametrize("backbone", names("backbone"))
def test_some_objective_fits_each_backbone(backbone: str) -> None:
    assert not all(refused(objective, backbone) for objective in names("objective"))


def test_shrinking_twice_is_shrinking_once() -> None:
    for backbone in names("backbone"):
        chosen = composed("mae", backbone)
        assert shrink(chosen.backbone) == chosen.backbone
    for objective in names("objective"):
        chosen = composed(objective, "vit_s")
        assert shrink(chosen.objective) == chosen.objective


@pytest.mark.parametrize(("objective", "backbone"), one_each())
def test_a_part_without_gradient_is_noticed(objective: str, backbone: str) -> None:
    """The check itself: an encoder whose last weights are cut off must not pass.

    Where it is frozen, as in the second stage of a training, the decoder on it.
    """
    chosen, built = build(objective, backbone)
    trains = any(p.requires_grad for p in built.encoder.parameters())
    weights = [
        module
        for module in (built.encoder if trains else built.decoder).modules()
        if isinstance(module, nn.Linear | nn.Conv3d) and module.weight.requires_grad
    ]
    weights[-1].register_forward_hook(lambda module, args, output: output.detach())
    with pytest.raises(AssertionError, match=re.escape("== ([], [], [])")):
        one_step(chosen, built)
