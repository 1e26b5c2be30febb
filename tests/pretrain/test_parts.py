"""Blocks and stages one by one: compiled, or computed again in the backward pass."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.config as dynamo
from seeds import SEED
from test_loop import CNN_MAE, MAE, RESENC, VIT, settings, weights
from tiny_pairs import build, one_each
from torch import Tensor
from torch._dynamo.utils import clear_compilation_metrics, get_compilation_metrics

from pretrain.estimate import bare_loop, raw_batch
from pretrain.objective import Objective
from pretrain.settings import PretrainSettings
from pretrain.train import pretrain


def stepped(chosen: PretrainSettings, objective: Objective) -> dict[str, Tensor]:
    """Loss and gradients of one seeded step in training mode."""
    torch.manual_seed(SEED)
    raw = raw_batch(chosen, 1, 4, objective.crops)
    torch.manual_seed(SEED + 1)
    objective.zero_grad()
    loss = objective(bare_loop(chosen, objective).to_batch(raw), 0.5).loss
    loss.backward()
    found = {name: p.grad for name, p in objective.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **{name: grad.clone() for name, grad in found.items()}}


@pytest.mark.parametrize(("objective", "backbone"), one_each())
def test_what_is_computed_again_is_the_same(objective: str, backbone: str) -> None:
    chosen, built = build(objective, backbone)
    if "drop_path" in chosen.backbone:  # what draws must draw the same a second time
        chosen = chosen.model_copy(update={"backbone": {**chosen.backbone, "drop_path": 0.3}})
        from pretrain.train import build_objective

        built = build_objective(chosen, 1)
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    for part in built.encoder.compile_parts()[:1]:
        part.register_forward_pre_hook(count)
    plain = stepped(chosen, built)
    passes, calls = calls, 0  # two, of crops of two sizes
    built.encoder.set_grad_checkpointing()
    again = stepped(chosen, built)
    trains = any(p.requires_grad for p in built.encoder.parameters())
    if len(built.encoder.compile_parts()) > 1 and trains:
        twice = "the first block must run in the forward and in the backward pass"
        assert calls == 2 * passes > 0, twice
    assert plain.keys() == again.keys()
    assert [name for name in plain if not torch.equal(plain[name], again[name])] == []


@pytest.mark.parametrize(("objective", "backbone"), one_each())
def test_parts_are_traced_without_a_break_and_keep_their_names(
    objective: str, backbone: str
) -> None:
    chosen, built = build(objective, backbone)
    plain, names = stepped(chosen, built), list(built.state_dict())
    parts = built.compile_parts()
    covered = {id(p) for part in parts for p in part.parameters()}
    left = sum(p.numel() for p in built.parameters() if id(p) not in covered)
    assert left < 0.5 * sum(p.numel() for p in built.parameters())
    torch.compiler.reset()
    for part in parts:
        part.compile(backend="eager", fullgraph=True, dynamic=False)
    with dynamo.patch(recompile_limit=256):  # both as the loop has it: parts differ in shape
        traced = stepped(chosen, built)
    assert list(built.state_dict()) == names
    for name, value in plain.items():
        torch.testing.assert_close(traced[name], value, rtol=1e-4, atol=1e-6)


def losses(run: Path) -> list[float]:
    with (run / "metrics.csv").open() as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


@pytest.mark.parametrize(
    ("backbone", "objective"),
    [pytest.param(RESENC, CNN_MAE, marks=pytest.mark.slow), (VIT, MAE | {"decoder_depth": 3})],
    ids=["resenc", "vit"],
)
def test_a_compiled_and_checkpointed_run_is_the_plain_one_but_for_rounding(
    pretrain_corpus: Path, tmp_path: Path, backbone: dict[str, Any], objective: dict[str, Any]
) -> None:
    """With drop path in the ViT: its draws are torch's generator's, at each block's own rate.

    torch's cache of compiled graphs gave one block the rate of another as long as rates were
    symbols of the graph. SGD, because Adam's first steps divide a gradient by its own size,
    rounding included.
    """
    found = []
    clear_compilation_metrics()
    for name, compiled in (("plain", False), ("compiled", True)):
        machine = {
            "accelerator": "cpu", "workers": 0, "threads": 1,
            "compile": compiled, "checkpointing": compiled,
        }  # fmt: skip
        found.append(
            pretrain(
                settings(
                    pretrain_corpus, tmp_path, name, steps=4, log_every=1, trainer=machine,
                    backbone=backbone, objective=objective, optimizer="sgd", momentum=0.9,
                )
            )
        )  # fmt: skip
    assert losses(found[1]) == pytest.approx(losses(found[0]), rel=1e-4)
    assert weights(found[1]).keys() == weights(found[0]).keys()
    compilations = get_compilation_metrics()
    symbolic = [one.co_name for one in compilations if one.shape_env_guard_count]
    assert compilations
    assert symbolic == [], "compiled for all shapes, which torch 2.11 does wrong on GPUs"
