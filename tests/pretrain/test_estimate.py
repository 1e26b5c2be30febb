"""Costs told by fake tensors beside closed forms and what a real step does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_pairs import build, names, one_each
from torch import nn
from torch.profiler import ProfilerActivity, profile

from conf.compose import settings_for
from pretrain.estimate import bare_loop, estimate, raw_batch
from pretrain.masking import kept
from pretrain.settings import PretrainSettings
from pretrain.train import build_objective

VIT = {
    "_target_": "pretrain.backbones.vit.ViT3D",
    "patch_size": 8,
    "embed_dim": 96,
    "depth": 4,
    "num_heads": 2,
}
MAE = {
    "_target_": "pretrain.objectives.mae.MAE",
    "decoder_dim": 48,
    "decoder_depth": 2,
    "decoder_heads": 2,
}
RESENC = {
    "_target_": "pretrain.backbones.resenc.ResEncUNetEncoder",
    "features": [8, 16, 24],
    "strides": [1, 2, 2],
    "blocks": [1, 2, 2],
}
CNN_MAE = {"_target_": "pretrain.objectives.cnn_mae.CnnMAE", "block": 8}
PAIRS = [(VIT, MAE), (RESENC, CNN_MAE)]


def settings(backbone: dict[str, Any], objective: dict[str, Any], **changes: Any) -> Any:
    chosen: dict[str, Any] = {
        "corpus": Path("unused"),
        "run": "unused",
        "backbone": backbone,
        "objective": objective,
        "trainer": {"accelerator": "cpu"},
        "crop_size": (16, 24, 32),
        "steps": 10,
        "batch_size": 4,
        "lr": 1e-3,
    }
    return PretrainSettings.model_validate(chosen | changes)


def test_flops_of_a_masked_autoencoder_by_hand() -> None:
    found = estimate(settings(VIT, MAE), precisions=())
    tokens, patch = 24, 8**3
    visible = kept(tokens, 0.75)

    def blocks(depth: int, tokens: int, width: int) -> int:
        # Forward and the two products of the backward pass; attention recomputes its scores.
        linear = 3 * 2 * tokens * width * 12 * width
        attention = (2 + 5) * 2 * tokens * tokens * width
        return depth * (linear + attention)

    by_hand = 2 * 2 * visible * patch * 96  # embedding: the image needs no gradient
    by_hand += blocks(4, visible, 96)
    by_hand += 3 * 2 * visible * 96 * 48  # to the decoder
    by_hand += blocks(2, tokens, 48)
    by_hand -= 3 * 2 * visible * 48 * 8 * 48  # visible ones end in the last block's attention
    by_hand += 3 * 2 * (tokens - visible) * 48 * patch  # the head sees hidden patches alone
    assert found.tokens == tokens and found.voxels == 16 * 24 * 32
    assert found.flops_per_sample == by_hand
    assert found.flops_per_step == 4 * by_hand


def test_flops_of_a_u_net_by_its_convolutions() -> None:
    """Every convolution reports its own shapes in a real forward pass."""
    chosen = settings(RESENC, CNN_MAE)
    objective = build_objective(chosen, 1)
    counted = 0

    def count(module: nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> None:
        nonlocal counted
        assert isinstance(module, nn.Conv3d | nn.ConvTranspose3d)
        along = args[0] if isinstance(module, nn.ConvTranspose3d) else output
        products = 2 * along[:, 0].numel() * module.weight.numel()
        counted += products * (3 if args[0].requires_grad else 2)

    for module in objective.modules():
        if isinstance(module, nn.Conv3d | nn.ConvTranspose3d):
            module.register_forward_hook(count)
    loop = bare_loop(chosen, objective)
    objective(loop.to_batch(raw_batch(chosen, 1, 4, objective.crops)), 0.5)
    assert estimate(chosen, precisions=()).flops_per_sample == counted // 4


@pytest.mark.parametrize(("backbone", "objective"), PAIRS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_memory_is_what_a_real_step_allocates(
    backbone: dict[str, Any], objective: dict[str, Any], checkpointing: bool
) -> None:
    chosen = settings(backbone, objective)
    told = estimate(chosen, device="cpu", precisions=("float32",)).memory[checkpointing]
    assert told.checkpointing == checkpointing
    real, before = _real_peak(chosen, checkpointing)
    assert told.weights + told.optimiser == pytest.approx(before, rel=0.01)
    # Convolutions on the CPU also have a workspace of their own, which no operation shows.
    assert told.peak == pytest.approx(real, rel=0.002 if backbone is VIT else 0.08)
    assert told.peak <= real


def _real_peak(chosen: PretrainSettings, checkpointing: bool) -> tuple[int, int]:
    """Most bytes that the allocator gave out in the second step, and those before it."""
    objective = build_objective(chosen, 1)
    objective.encoder.set_grad_checkpointing(checkpointing)
    loop = bare_loop(chosen, objective)
    optimizer = loop.make_optimizer(objective)

    def step() -> None:
        batch = loop.to_batch(raw_batch(chosen, 1, 4, objective.crops))
        loss = objective(batch, 0.5).loss
        loss.backward()
        del loss, batch
        loop.clip(objective)
        optimizer.step()
        optimizer.zero_grad()

    step()
    state = [v for s in optimizer.state.values() for v in s.values()]
    before = sum(t.untyped_storage().nbytes() for t in (*objective.parameters(), *state))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        step()
    live = peak = before
    events = [e for e in watched.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    assert events
    return peak, before


def test_more_ranks_and_micro_batches_change_what_they_should() -> None:
    one = estimate(settings(VIT, MAE), precisions=("float32",))
    ranks = estimate(settings(VIT, MAE, trainer={"devices": 2}), precisions=("float32",))
    assert (one.micro_batch, ranks.micro_batch) == (4, 2)
    assert ranks.flops_per_step == one.flops_per_step
    assert ranks.flops_per_sample == one.flops_per_sample
    assert ranks.memory[0].buckets == one.memory[0].gradients
    assert ranks.memory[0].activations < one.memory[0].activations


@pytest.mark.parametrize(("backbone", "objective"), PAIRS)
def test_half_precision_and_checkpointing_save_activations(
    backbone: dict[str, Any], objective: dict[str, Any]
) -> None:
    found = estimate(settings(backbone, objective, batch_size=64)).memory
    full, full_again, half, half_again = (one.activations for one in found)
    assert half < full and full_again < full and half_again < full_again
    assert len({one.weights for one in found}) == 1


def test_nothing_is_allocated() -> None:
    """ViT-L's weights alone are 1.2 GB, which would be seen."""
    large = VIT | {"embed_dim": 1024, "depth": 24, "num_heads": 16}
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        found = estimate(settings(large, MAE), precisions=())
    assert found.parameters > 300e6
    events = [e for e in watched.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert sum(max(e.nbytes(), 0) for e in events) < 100e6


@pytest.mark.parametrize(("objective", "backbone"), one_each())
def test_every_objective_can_be_told(objective: str, backbone: str) -> None:
    chosen, _ = build(objective, backbone)
    found = estimate(chosen, precisions=("bf16",))
    assert found.flops_per_sample > 0
    assert all(one.peak >= one.weights + one.optimiser + one.activations for one in found.memory)


@pytest.mark.slow
@pytest.mark.parametrize(
    "recipe", [name for name in names("experiment") if not name.endswith("_small")]
)
def test_every_full_recipe_can_be_told(recipe: str) -> None:
    found = estimate(settings_for("bench", [f"experiment={recipe}"]))
    assert found.parameters > 1e6 and len(found.memory) == 4
