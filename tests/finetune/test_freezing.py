"""Frozen means: no gradient, no optimiser, norms and dropout of inference, not a byte changed."""

from __future__ import annotations

import pytest
import torch
from seeds import SEED
from small_runs import BACKBONES, TASK, backbone
from torch import nn

from finetune.protocol import freeze_problem
from finetune.segmentation import Segmentation
from finetune.settings import TaskSettings
from pretrain.objective import Batch
from pretrain.optim import parameter_groups

KINDS = list(BACKBONES)


def model_of(kind: str) -> Segmentation:
    torch.manual_seed(SEED + 1)
    return Segmentation(encoder=backbone(kind), task=TaskSettings.model_validate(TASK))


def batch(seed: int = 0) -> Batch:
    g = torch.Generator().manual_seed(seed)
    image = torch.randn(2, 1, 8, 16, 32, generator=g)
    label = (image[:, 0] > 0.5).long()
    return Batch(
        image, torch.ones_like(image, dtype=torch.bool), torch.ones(2, 3), torch.arange(2),
        ["a", "b"], label,
    )  # fmt: skip


def step(model: Segmentation, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(batch(), 0.0).loss.backward()
    optimizer.step()


def tensors(module: nn.Module) -> dict[str, bytes]:
    return {name: value.numpy().tobytes() for name, value in module.state_dict().items()}


@pytest.mark.parametrize("kind", KINDS)
def test_layers_hold_each_parameter_once_in_the_order_of_depth(kind: str) -> None:
    encoder = backbone(kind)
    found = [
        id(p)
        for layer in encoder.layers()
        for part in layer
        for p in ([part] if isinstance(part, nn.Parameter) else part.parameters())
    ]
    assert sorted(found) == sorted(id(p) for p in encoder.parameters())
    assert len(encoder.layers()) == (
        5 if kind in ("vit", "primus", "pct_net") else len(encoder.stages)
    )
    # What comes before is done without what comes after: frozen ones get no gradient to pass on.
    for count in range(1, len(encoder.layers())):
        for number, layer in enumerate(encoder.layers()):
            for part in layer:
                part.requires_grad_(number >= count)
        maps = encoder(batch().image)
        assert maps[-1].requires_grad


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("what", ["encoder", 2])
def test_frozen_bytes_stay_and_the_rest_learns(kind: str, what: str | int) -> None:
    model = model_of(kind)
    model.hold(what)  # type: ignore[arg-type]
    model.train()  # as a trainer would
    frozen = {
        id(t)
        for layer in model.encoder.layers()[: 2 if what == 2 else None]
        for part in layer
        for t in (
            [part] if isinstance(part, nn.Parameter) else [*part.parameters(), *part.buffers()]
        )
    }
    assert frozen
    held = [p for p in model.parameters() if id(p) in frozen]
    before = {n: v.clone() for n, v in [*model.named_parameters(), *model.named_buffers()]}
    groups = parameter_groups(model, 0.1)
    listed = {id(p) for group in groups for p in group["params"]}  # type: ignore[attr-defined]
    assert not listed & frozen and listed == {id(p) for p in model.parameters()} - frozen
    optimizer = torch.optim.AdamW(groups, 1e-2)  # type: ignore[arg-type]
    for _ in range(2):
        step(model, optimizer)
    assert all(p.grad is None for p in held)
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if id(value) in frozen:
            assert torch.equal(value, before[name]), name
    learnt = [n for n, p in model.named_parameters() if not torch.equal(p, before[n])]
    assert any(name.startswith("decoder.") for name in learnt)
    assert any(name.startswith("encoder.") for name in learnt) == (what == 2)


def test_frozen_parts_behave_as_in_inference_after_train() -> None:
    model = model_of("pct_net")  # batch norms, dropout and drop path
    model.hold("encoder")
    model.train()
    assert model.decoder.training and not any(m.training for m in model.encoder.modules())
    image = batch().image
    assert all(
        torch.equal(a, b) for a, b in zip(model.encoder(image), model.encoder(image), strict=True)
    )
    model.hold(2)
    assert model.encoder.training and not model.encoder.stages[1].training
    assert model.encoder.stages[2].training
    model.hold("none")
    assert all(m.training for m in model.encoder.modules())
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("kind", ["resenc", "vit"])
def test_nothing_is_kept_for_a_gradient_that_is_not_wanted(kind: str) -> None:
    """What autograd saves in the encoder: nothing when frozen, much when not."""

    def saved(model: Segmentation) -> int:
        total = 0

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal total
            total += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            maps = model.encoder(batch().image)
        assert all(x.requires_grad == (total > 0) for x in maps)
        return total

    model = model_of(kind)
    model.hold("none")
    assert saved(model) > 10_000
    model.hold("encoder")
    assert saved(model) == 0


def test_more_layers_than_there_are_cannot_be_frozen() -> None:
    assert freeze_problem(3, 4, "freeze") is None
    assert "the encoder has 4 layers" in str(freeze_problem(4, 4, "freeze"))
    assert freeze_problem("encoder", 1, "freeze") is None


def test_rates_fall_with_the_distance_from_the_top() -> None:
    model = model_of("vit")
    model.layer_decay = 0.5
    scales = model.lr_scales()
    assert set(scales) == {f"encoder.{n}" for n, _ in model.encoder.named_parameters()}
    assert scales["encoder.patch_embed.proj.weight"] == 0.5**5
    assert scales["encoder.pos_embed.weight"] == scales["encoder.cls_token"] == 0.5**5
    assert [scales[f"encoder.blocks.{i}.mlp.fc1.weight"] for i in range(4)] == [
        0.5**4, 0.5**3, 0.5**2, 0.5,
    ]  # fmt: skip
    assert scales["encoder.norm.weight"] == 0.5
    groups = parameter_groups(model, 0.1)
    names = {id(p): n for n, p in model.named_parameters()}
    seen: set[str] = set()
    for group in groups:
        for p in group["params"]:  # type: ignore[attr-defined]
            name = names[id(p)]
            seen.add(name)
            assert group["lr_scale"] == scales.get(name, 1.0)
            spared = p.ndim <= 1 or name in ("encoder.register_tokens", "encoder.pos_embed.weight")
            assert group["weight_decay"] == (0.0 if spared else 0.1)
    assert seen == set(names.values())
    assert groups[0]["lr_scale"] == 1.0  # the rate that is logged
    model.layer_decay = 1.0
    assert len(parameter_groups(model, 0.1)) == 2 and not model.lr_scales()


def test_one_step_moves_each_layer_by_its_rate() -> None:
    """Adam's first step is the rate itself, whatever the gradient: the moves tell the rates."""
    model = model_of("resenc")
    model.layer_decay = 0.5
    optimizer = torch.optim.Adam(parameter_groups(model, 0.0), lr=1.0, eps=1e-12)  # type: ignore[arg-type]
    for group in optimizer.param_groups:
        group["lr"] = 1e-3 * group["lr_scale"]
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    step(model, optimizer)
    for name, p in model.named_parameters():
        moved = (p.detach() - before[name]).abs()
        if name.endswith("conv2.conv.weight") or name == "decoder.head.weight":
            stage = int(name.split(".")[2]) if name.startswith("encoder.") else 4
            assert moved.max().item() == pytest.approx(1e-3 * 0.5 ** (4 - stage), rel=1e-2), name
