from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from seeds import SEED
from torch import Tensor, nn
from torch.nn import functional as F

from data_prep.errors import InputError
from pretrain.backbones.resenc import ResEncUNetEncoder
from pretrain.backbones.vit import ViT3D
from pretrain.crops import MultiCrop
from pretrain.estimate import bare_loop
from pretrain.objective import Batch
from pretrain.objectives.dino import DINO
from pretrain.optim import make_optimizer, parameter_groups
from pretrain.settings import LoopSettings, PretrainSettings
from pretrain.teacher import Teacher

PATCH, GRID, SHAPE, LOCAL, FINE = (2, 4, 4), (2, 3, 4), (4, 12, 16), (2, 8, 8), (8, 24, 32)
N, K, LOCALS = 24, 11, 3
MakeBatch = Callable[..., Batch]
VARIANTS: dict[str, dict[str, Any]] = {
    "sinkhorn": {},
    "centring": {"targets": "centring"},
    "shared": {"ibot_head": "shared"},
    "gram": {"gram_weight": 2.0},
    "fine gram": {"gram_weight": 2.0, "gram_size": FINE},
    "global only": {"local": 0},
    "no koleo": {"koleo_weight": 0.0},
}
variants = pytest.mark.parametrize("variant", VARIANTS)
SETTINGS = LoopSettings(crop_size=SHAPE, steps=10, batch_size=2, lr=1e-2, clip=3.0)


def objective(variant: str = "sinkhorn", *, different: bool = True, **changes: Any) -> DINO:
    """A small one in training mode; teachers have other weights than their students."""
    torch.manual_seed(SEED)
    encoder = ViT3D(
        patch_size=PATCH, embed_dim=24, depth=2, num_heads=2, cls_token=True, register_tokens=2
    )
    sizes = {"prototypes": K, "hidden_dim": 16, "bottleneck_dim": 8, "local": LOCALS}
    given = sizes | {"local_size": LOCAL, "mask_ratio": (0.2, 0.75)} | VARIANTS[variant] | changes
    built = DINO(encoder=encoder, **given)
    with torch.no_grad():
        for head in built._heads():
            for weight in head.mlp.parameters():
                weight.mul_(10)
        for name, parameter in built.named_parameters():
            if different and not parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
                assert name.startswith(("teacher", "gram"))
    for centring in (built.centring, built.ibot_centring):
        if centring is not None:
            centring.centre.normal_(std=0.1)
    bare_loop(SETTINGS, built)
    return built


@pytest.fixture
def crops(make_batch: MakeBatch) -> Callable[..., Batch]:
    def made(model: DINO, samples: int = 2, seed: int = 0) -> Batch:
        """Crops of all groups; a corner of the second global crop is padding."""
        batch, *others = [
            (group.name, make_batch(group.size, size=samples * group.crops, seed=seed + number))
            for number, group in enumerate(model.crops.groups(SHAPE))
        ]
        batch[1].others = dict(others)
        batch[1].valid[1, :, :, :8, :8] = False
        return batch[1]

    return made


Crops = Callable[..., Batch]


# The whole of it, pair by pair.


def plain_sinkhorn(logits: Tensor, temperature: float) -> Tensor:
    Q = (logits / temperature).exp()
    for _ in range(3):
        Q = Q / Q.sum(0) / Q.shape[1]
        Q = Q / Q.sum(1, keepdim=True) / Q.shape[0]
    return Q * Q.shape[0]


def plain_loss(  # noqa: C901
    model: DINO, batch: Batch, progress: float
) -> dict[str, Tensor]:
    """Crop by crop, pair by pair and token by token, as the papers write it."""
    K1 = model.encoder.prefix_tokens
    B = len(batch.image) // 2
    T = 0.1
    Tt = 0.07 if progress >= 0.3 else 0.04 + 0.03 * progress / 0.3
    hidden = model.hidden(batch)

    def centred(logits: Tensor, which: str) -> Tensor:
        if model.centring is None:
            return plain_sinkhorn(logits, Tt)
        return ((logits - getattr(model, which).centre) / Tt).softmax(-1)

    def cross(target: Tensor, logits: Tensor) -> Tensor:
        return -(target * F.log_softmax(logits / T, -1)).sum()

    teacher, head = model.teacher.module, model.teacher_head.module
    ibot = model.ibot_head or model.head
    ibot_teacher = (model.teacher_ibot_head or model.teacher_head).module
    with torch.no_grad():
        seen = [teacher.tokens(batch.image[i : i + 1])[0] for i in range(2 * B)]
        t_cls = centred(torch.stack([head(tokens[0]) for tokens in seen]), "centring")
        places = [(i, n) for i in range(2 * B) for n in range(N) if hidden[i, n]]
        t_hidden = centred(
            torch.stack([ibot_teacher(seen[i][K1 + n]) for i, n in places]), "ibot_centring"
        )
    shown = [
        model.encoder.tokens(
            batch.image[i : i + 1], hidden[i : i + 1], mask_token=model.mask_token
        )[0]
        for i in range(2 * B)
    ]
    pairs = []
    for b in range(B):
        for t in range(2):
            for s in range(2):
                if s != t:
                    pairs.append(cross(t_cls[2 * b + t], model.head(shown[2 * b + s][0])))
            for crop in range(model.crops.local):
                image = batch.others["local"].image[model.crops.local * b + crop][None]
                local = model.encoder.tokens(image)[0, 0]
                pairs.append(cross(t_cls[2 * b + t], model.head(local)))
    assert len(pairs) == B * (2 * model.crops.local + 2)
    found = {"cls": torch.stack(pairs).mean()}
    per_crop = []
    for i in range(2 * B):
        own = [
            cross(t_hidden[row], ibot(shown[i][K1 + n]))
            for row, (j, n) in enumerate(places)
            if i == j
        ]
        per_crop.append(torch.stack(own).mean() if own else torch.zeros(()))
    found["ibot"] = torch.stack(per_crop).sum() / (2 * B)
    loss = found["cls"] + found["ibot"]
    if model.koleo_weight:
        found["koleo"] = torch.zeros(())
        for crop in range(2):
            x = [F.normalize(shown[2 * b + crop][0], dim=0) for b in range(B)]
            for b in range(B):
                nearest = min((x[b] - x[other]).norm() for other in range(B) if other != b)
                found["koleo"] = found["koleo"] - (nearest + 1e-8).log() / B
        loss = loss + 0.1 * found["koleo"]
    if model.gram is not None:
        given = batch.others["gram"] if model.crops.gram_size else batch
        errors = []
        for i in range(2 * B):
            patches = model.gram.module.tokens(given.image[i : i + 1])[0, K1:].detach()
            if model.crops.gram_size:  # twice as fine: means of 2 x 2 x 2 cells
                cells = patches.view(GRID[0], 2, GRID[1], 2, GRID[2], 2, -1)
                patches = cells.mean((1, 3, 5)).flatten(0, 2)
            x, y = F.normalize(shown[i][K1:], dim=1), F.normalize(patches, dim=1)
            errors += [(x[p] @ x[q] - y[p] @ y[q]).square() for p in range(N) for q in range(N)]
        found["gram"] = torch.stack(errors).mean()
        loss = loss + model.gram_weight * found["gram"]
    return {"loss": loss, **found}


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


@variants
@pytest.mark.parametrize("progress", [0.1, 0.5])
def test_the_loss_and_its_gradients_are_those_of_plain_loops(
    crops: Crops, variant: str, progress: float
) -> None:
    model = objective(variant)
    batch = crops(model)
    expected = plain_loss(model, batch, progress)
    expected["loss"].backward()
    slow = gradients(model)
    model.zero_grad()
    loss, parts = model(batch, progress)
    loss.backward()
    for name, value in expected.items():
        found = loss if name == "loss" else parts[name]
        assert found.item() == pytest.approx(value.item(), rel=1e-5), name
    fast = gradients(model)
    assert fast.keys() == slow.keys()
    largest = max(g.abs().max() for g in slow.values())
    for name, gradient in fast.items():
        assert (gradient - slow[name]).abs().max() <= 1e-5 * largest, name


def test_local_crops_are_never_targets_and_pairs_weigh_alike(crops: Crops) -> None:
    """With eight local crops there are 18 pairs, and an even student has the mean, ln K."""
    model = objective(local=8)
    with torch.no_grad():
        model.head.scale.zero_()
    batch = crops(model)
    seen: list[tuple[int, ...]] = []
    model.teacher.module.blocks[0].register_forward_pre_hook(
        lambda _, given: seen.append(tuple(given[0].shape))
    )
    _, parts = model(batch, 0.5)
    assert parts["cls"].item() == pytest.approx(math.log(K), rel=1e-6)
    assert parts["cls_of_even"].item() == pytest.approx(1, rel=1e-6)
    assert seen == [(4, 3 + N, 24)]  # one pass of the teacher, over the global crops alone


@pytest.mark.parametrize(
    ("shape", "patch", "tokens"), [((96, 96, 96), 16, 216), ((48, 48, 48), 16, 27)]
)
def test_the_crops_of_the_papers_have_their_tokens(
    shape: tuple[int, int, int], patch: int, tokens: int
) -> None:
    encoder = ViT3D(patch_size=patch, embed_dim=12, depth=1, num_heads=2, cls_token=True)
    assert math.prod(encoder.grid(shape)) == tokens
    assert encoder.tokens(torch.zeros(1, 1, *shape)).shape == (1, 1 + tokens, 12)


# How often the encoder runs, and what it sees.


@variants
def test_three_passes_of_the_encoder(crops: Crops, variant: str) -> None:
    """Crops of one shape at once: ten crops, not ten passes; Gram's teacher has one of its own."""
    model = objective(variant)
    batch = crops(model)
    passes: list[tuple[str, int]] = []

    def counted(name: str) -> Callable[..., None]:
        return lambda _, given: passes.append((name, len(given[0])))

    for name, part in (("student", model.encoder), ("teacher", model.teacher.module)):
        part.blocks[0].register_forward_pre_hook(counted(name))
    if model.gram is not None:
        model.gram.module.blocks[0].register_forward_pre_hook(counted("gram"))
    model(batch, 0.5).loss.backward()
    local = [("student", 2 * LOCALS)] if model.crops.local else []
    gram = [("gram", 4)] if model.gram is not None else []
    assert sorted(passes) == sorted([("student", 4), *local, ("teacher", 4), *gram])


def test_the_student_sees_a_mask_token_where_tokens_are_hidden(crops: Crops) -> None:
    model = objective()
    batch = crops(model)
    seen: list[Tensor] = []
    model.encoder.blocks[0].register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    model(batch, 0.5)
    hidden = model.hidden(batch)
    expected = model.mask_token + model.encoder.pos_embed(GRID, batch.image.device)
    assert torch.equal(seen[0][:, 3:][hidden], expected.expand(4, -1, -1)[hidden])
    assert not (seen[0][:, 3:] == expected).all(-1)[~hidden].any()
    assert hidden.any(1).view(2, 2).sum(1).tolist() == [1, 1]


def test_padding_is_never_to_be_told(crops: Crops) -> None:
    model = objective()
    batch = crops(model)
    batch.valid[:, :, :, 4:] = False
    first_row = torch.arange(N).view(GRID)[:, 0].flatten()
    hidden = model.hidden(batch)
    assert hidden[:, first_row].any()
    hidden[:, first_row] = False
    assert not hidden.any()


def test_every_weight_has_a_gradient_when_nothing_is_hidden(crops: Crops) -> None:
    """Or DDP would wait for one: static rows, some of which are padding alone."""
    for mask_ratio in ((0.2, 0.75), (1e-6, 1e-5)):
        model = objective(mask_ratio=mask_ratio)
        batch = crops(model)
        batch.valid[:] = mask_ratio[1] < 0.1
        loss, parts = model(batch, 0.5)
        loss.backward()
        assert parts["ibot"] == 0 and loss.isfinite()
        trained = {n for n, p in model.named_parameters() if p.requires_grad}
        assert set(gradients(model)) == trained


# Teachers.


@variants
def test_teachers_have_no_gradient_and_are_no_part_of_the_step(crops: Crops, variant: str) -> None:
    model = objective(variant).eval().train()
    model(crops(model), 0.5).loss.backward()
    teachers = [n for n, p in model.named_parameters() if n.startswith(("teacher", "gram"))]
    assert len(teachers) >= 38
    assert not set(teachers) & set(gradients(model))
    stepped = [p for group in parameter_groups(model, 0.1) for p in group["params"]]
    trained = [p for n, p in model.named_parameters() if n not in teachers]
    assert {id(p) for p in stepped} == {id(p) for p in trained} and len(stepped) == len(trained)
    clipped = [p for part in model.clip_parts() for p in part]
    assert sorted(map(id, clipped)) == sorted(map(id, trained))
    assert not any(part.training for part in model.modules() if isinstance(part, Teacher))


def values(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def test_teachers_follow_all_parts_by_the_formula(crops: Crops) -> None:
    model = objective(momentum=(0.9, 1.0))
    assert len(model._teachers()) == 3
    for progress, momentum in ((0.0, 0.9), (0.5, 0.95), (1.0, 1.0)):
        before = values(model)
        model.after_step(progress)
        for name, value in model.named_parameters():
            if not name.startswith("teacher"):
                assert torch.equal(value, before[name])
                continue
            own = (
                name.replace(".module", "").replace("teacher.", "encoder.").replace("teacher_", "")
            )
            expected = momentum * before[name] + (1 - momentum) * before[own]
            torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-7)
            assert momentum == 1 or not torch.equal(value, before[name]), name


def test_a_forward_pass_moves_neither_teacher_nor_centre(crops: Crops) -> None:
    model = objective("centring")
    before = values(model)
    model(crops(model), 0.5)
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    model.after_step(0.5)
    moved = {n for n, v in model.state_dict().items() if not torch.equal(v, before[n])}
    assert {"centring.centre", "ibot_centring.centre", "teacher.module.cls_token"} <= moved


def test_a_fresh_teacher_is_its_student(crops: Crops) -> None:
    model = objective(different=False)
    state = model.state_dict()
    torch.testing.assert_close(state["teacher.module.cls_token"], state["encoder.cls_token"])
    assert model.released is model.teacher.module and model.released is not model.encoder


def test_the_gram_teacher_is_taken_anew_when_due(crops: Crops) -> None:
    model = objective("gram", gram_refresh=3, gram_refreshes=2, momentum=(0.5, 0.5))
    assert model.gram is not None
    found = []
    for step in range(1, 13):
        with torch.no_grad():
            model.encoder.cls_token.add_(1.0)
        model.loop.step = step
        model.after_step(step / 12)
        same = torch.equal(model.gram.module.cls_token, model.teacher.module.cls_token)
        found.append(same)
    assert [step for step, same in enumerate(found, start=1) if same] == [3, 6]


def test_a_run_is_taken_over_with_its_teacher() -> None:
    old = objective()
    state = old.state_dict()
    new = objective("gram")
    with torch.no_grad():
        for parameter in new.parameters():
            parameter.add_(1)
    taken = new.inherit(state)
    assert set(taken) == set(state)
    assert all(torch.equal(new.state_dict()[name], value) for name, value in state.items())
    assert new.gram is not None
    for name, value in old.teacher.state_dict().items():
        assert torch.equal(new.gram.state_dict()[name], value)
    assert not torch.equal(state["teacher.module.cls_token"], state["encoder.cls_token"])


def test_an_encoder_alone_becomes_its_own_teacher() -> None:
    old, new = objective(), objective("gram")
    encoder = {n: v + 1 for n, v in old.state_dict().items() if n.startswith("encoder.")}
    assert set(new.inherit(encoder)) == set(encoder)
    for name, value in encoder.items():
        for part in ("encoder", "teacher.module", "gram.module"):
            assert torch.equal(new.state_dict()[name.replace("encoder", part, 1)], value)


# Steps.


def stepped(model: DINO, batch: Batch, count: int, **changes: Any) -> None:
    """Optimiser steps as the loop makes them."""
    loop = bare_loop(SETTINGS.model_copy(update=changes), model)
    optimizer = make_optimizer(model, loop.settings)
    for _ in range(count):
        loop.set_rate(optimizer)
        optimizer.zero_grad()
        model(batch, loop.progress).loss.backward()
        loop.clip(model)
        optimizer.step()
        loop.step += 1
        model.after_step(loop.progress)


def test_prototypes_stay_while_they_are_frozen_and_move_then(crops: Crops) -> None:
    """Neither gradient nor decay nor moments from before reach them."""
    model = objective(freeze=0.25, different=False)
    batch, before = crops(model), values(model)
    last = [f"{head}.{part}" for head in ("head", "ibot_head") for part in ("prototypes", "scale")]
    stepped(model, batch, 3, weight_decay=0.5)  # of ten: progress 0, 0.1 and 0.2
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in last)
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    frozen = ("prototypes", "scale")  # of the teacher as well
    assert moved == {n for n, _ in model.named_parameters() if not n.endswith(frozen)}
    model = objective(freeze=0.25, different=False)
    stepped(model, batch, 4)
    assert not any(torch.equal(model.state_dict()[name], before[name]) for name in last)


def test_each_part_is_clipped_by_itself(crops: Crops) -> None:
    model = objective(freeze=0.0)
    (1000 * model(crops(model), 0.5).loss).backward()
    model.loop.clip(model)
    norms = [
        torch.stack([p.grad.norm() for p in part if p.grad is not None]).norm()
        for part in model.clip_parts()
    ]
    assert [norm.item() for norm in norms] == pytest.approx([3.0] * 3, rel=1e-4)
    assert model.loop.norm is not None and model.loop.norm > 30  # of before, over all of them


def test_rates_fall_with_depth_and_the_patch_embedding_has_a_fifth() -> None:
    scales = objective().lr_scales()
    assert scales["encoder.blocks.1.attn.qkv.weight"] == pytest.approx(0.9)
    assert scales["encoder.blocks.0.attn.qkv.weight"] == pytest.approx(0.81)
    assert scales["encoder.cls_token"] == scales["mask_token"] == pytest.approx(0.729)
    assert scales["encoder.patch_embed.proj.weight"] == pytest.approx(0.2 * 0.729)
    assert not any(name.startswith(("head", "ibot_head", "teacher")) for name in scales)
    names = dict(objective().named_parameters())
    assert set(scales) <= set(names)


def test_weight_decay_rises_by_half_a_cosine_and_spares_what_it_spared() -> None:
    model = objective()
    chosen = {"weight_decay": 0.04, "weight_decay_end": 0.4, "steps": 100}
    run = {"corpus": ".", "run": "r", "backbone": {}, "objective": {}}
    settings = PretrainSettings.model_validate(SETTINGS.model_dump() | chosen | run)
    loop = bare_loop(settings, model)
    optimizer = make_optimizer(model, loop.settings)
    found = []
    for step in (0, 50, 100):
        loop.step = step
        loop.set_rate(optimizer)
        found.append({group["weight_decay"] for group in optimizer.param_groups})
    assert all(0.0 in decays and len(decays) == 2 for decays in found)
    assert [max(decays) for decays in found] == pytest.approx([0.04, 0.22, 0.4])


@pytest.mark.parametrize("variant", ["sinkhorn", "fine gram"])
def test_one_batch_can_be_learned(crops: Crops, variant: str) -> None:
    """The student of a teacher that stands still comes close to its targets."""
    model = objective(variant, momentum=(1.0, 1.0), freeze=0.0, koleo_weight=0.0)
    batch = crops(model, 3)
    before = model(batch, 0.9)
    stepped(model, batch, 150, lr=3e-3, steps=150, weight_decay=0.0)
    after = model(batch, 0.9)
    entropy = after.parts["entropy"] * math.log(K)
    assert after.parts["cls"] - entropy < 0.4 * (before.parts["cls"] - entropy)
    assert after.parts["ibot"] < 0.8 * before.parts["ibot"]
    if variant == "fine gram":
        assert after.parts["gram"] < before.parts["gram"]


# Alarms.


def test_an_even_guess_and_equal_targets_are_called(crops: Crops) -> None:
    model = objective()
    healthy = {n: v.item() for n, v in model(crops(model), 0.5).parts.items()}
    assert model.alarm(healthy) == ""
    assert "ln K" in model.alarm({**healthy, "cls": math.log(K) + 0.009})
    assert model.alarm({**healthy, "cls": math.log(K) - 0.02}) == ""
    with torch.no_grad():  # the teacher says the same of all crops, and says it firmly
        model.teacher_head.module.mlp[-1].weight.zero_()
        model.teacher_head.module.mlp[-1].bias.normal_()
    centred = objective("centring")
    centred.teacher_head = model.teacher_head
    parts = {n: v.item() for n, v in centred(crops(centred), 0.5).parts.items()}
    assert parts["information"] == pytest.approx(0, abs=1e-5)
    assert "targets of all crops are the same" in centred.alarm(parts)


# Pictures.


@pytest.mark.parametrize("rope", [False, True])
def test_attention_is_that_of_an_attention_that_is_not_fused(rope: bool) -> None:
    from pretrain.attention import cls_attention

    torch.manual_seed(SEED)
    encoder = ViT3D(
        patch_size=PATCH, embed_dim=24, depth=2, num_heads=2, cls_token=True, register_tokens=2,
        rope=rope,
    ).eval()  # fmt: skip
    image = torch.randn(2, 1, *SHAPE)
    found = cls_attention(encoder, image)
    attention = encoder.blocks[-1].attn
    attention.fused_attn = False
    kept: list[Tensor] = []
    attention.attn_drop.register_forward_hook(lambda _, given, out: kept.append(out))
    encoder.tokens(image)
    torch.testing.assert_close(found, kept[0][:, :, 0, 3:])
    assert found.shape == (2, 2, N) and (found.sum(-1) < 1).all()


def test_a_preview_shows_attention_in_the_greys_of_the_crop(crops: Crops) -> None:
    model = objective().eval()
    batch = crops(model)
    shown = model.preview(batch)
    assert list(shown) == ["input", "attention"]
    seen = shown["attention"]
    assert seen.shape == batch.image.shape
    torch.testing.assert_close(seen.flatten(1).amax(1), batch.image.flatten(1).amax(1))
    assert (seen.flatten(1).amin(1) >= batch.image.flatten(1).amin(1)).all()
    cells = seen.view(4, GRID[0], PATCH[0], GRID[1], PATCH[1], GRID[2], PATCH[2])
    assert (cells == cells[:, :, :1, :, :1, :, :1]).all()


# What is refused.


def test_an_encoder_without_a_class_token_is_refused() -> None:
    for encoder in (
        ViT3D(patch_size=4, embed_dim=24, depth=1, num_heads=2),
        ResEncUNetEncoder(features=(4, 8), strides=(1, 2), blocks=(1, 1)),
    ):
        with pytest.raises(InputError, match=r"backbone=dino_b.*backbone\.cls_token=true"):
            DINO(encoder=encoder)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"mask_ratio": (0.5, 0.2)}, r"objective.mask_ratio=\[0.5, 0.2\]: the smaller"),
        ({"area": (1.0, 0.5)}, r"area=\(1.0, 0.5\): must be"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises((InputError, ValueError), match=said):
        objective(**changes)


def test_crops_are_declared(crops: Crops) -> None:
    model = objective("fine gram", region=(8, 16, 16), local_area=(0.1, 0.2))
    assert isinstance(model.crops, MultiCrop)
    groups = [(group.name, group.crops, group.size) for group in model.crops.groups(SHAPE)]
    assert groups == [("", 2, SHAPE), ("local", LOCALS, LOCAL), ("gram", 2, FINE)]
    assert model.crops.region == (8, 16, 16) and model.crops.local_area == (0.1, 0.2)
    assert len(objective("gram").crops.groups(SHAPE)) == 2
    assert objective().batch_multiple == 2 and objective("no koleo").batch_multiple == 1
