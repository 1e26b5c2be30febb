"""VoCo: targets from boxes, the whole objective against loops, and how its teacher moves."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from seeds import SEED
from small_encoders import encoder
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain.augment import Augment
from pretrain.loader import to_batch
from pretrain.noise import raw_batch
from pretrain.objective import Batch
from pretrain.objectives.voco import VoCo
from pretrain.settings import AugmentSettings, LoopSettings

SHAPE = (4, 6, 8)
T, GRID, N = 2, (1, 2, 3), 6
Make = Callable[..., Batch]


def objective(kind: str = "resenc", **chosen: Any) -> VoCo:
    built = VoCo(encoder=encoder(kind), targets=T, grid=GRID, hidden_dim=16, out_dim=8, **chosen)
    # A teacher that is not the student shows whose embedding is taken where.
    torch.manual_seed(SEED + 1)
    for value in built.teacher.module.parameters():
        value.add_(0.3 * torch.randn_like(value))
    return built


def grid_boxes(offset: Tensor) -> Tensor:
    """Bases of GRID from a corner on, in C order, [N, 2, 3]."""
    shape = torch.tensor(SHAPE)
    cells = torch.cartesian_prod(*(torch.arange(n) for n in GRID))
    start = offset + cells * shape
    return torch.stack([start, start + shape], 1).float()


@pytest.fixture
def batch(make_batch: Make, seed: int) -> Batch:
    """Two samples: random crops within the grid, then the bases."""
    random = torch.Generator().manual_seed(seed)
    made = make_batch(SHAPE, size=2 * (T + N))
    boxes = []
    shape = torch.tensor(SHAPE)
    for sample in range(2):
        bases = grid_boxes(torch.tensor([3, 5, 7]) * sample)
        room = bases[-1, 1] - bases[0, 0] - shape
        places = bases[0, 0] + (torch.rand(T, 3, generator=random) * (room + 1)).floor()
        boxes += [torch.stack([places, places + shape], 1), bases]
    return replace(made, box=torch.cat(boxes))


def overlap(crop: Tensor, base: Tensor) -> float:
    """Voxels that both have, counted one by one, over those of the crop."""
    inside = [
        [v for v in range(int(crop[0, a]), int(crop[1, a])) if base[0, a] <= v < base[1, a]]
        for a in range(3)
    ]
    return math.prod(map(len, inside)) / math.prod(SHAPE)


def head(rows: list[Tensor], layers: list[Tensor], biases: list[Tensor]) -> list[Tensor]:
    """Three linear layers; behind two of them features have mean 0 and variance 1."""
    for number, (weight, bias) in enumerate(zip(layers, biases, strict=True)):
        rows = [weight @ row + bias for row in rows]
        if number == 2:
            break
        mean = sum(rows) / len(rows)
        variance = sum((row - mean) ** 2 for row in rows) / len(rows)
        rows = [((row - mean) / (variance + 1e-5).sqrt()).clamp(min=0) for row in rows]
    return [row / row.norm() for row in rows]


def by_loops(built: VoCo, batch: Batch) -> dict[str, float]:
    published = built.form == "large_scale_medical"
    rows = []
    for crop in batch.image:
        maps = built.encoder(crop[None])
        used = maps if len(set(built.encoder.strides)) > 1 else maps[-1:]
        rows.append(torch.cat([m.flatten(2).mean(2)[0] for m in used]))

    def embedded(part: nn.Module) -> list[list[Tensor]]:
        values = list(part.parameters())
        found = head(rows, values[::2], values[1::2])
        return [found[: T + N], found[T + N :]]

    student, teacher = embedded(built.projector), embedded(built.teacher.module)
    assert batch.box is not None
    box = batch.box.reshape(2, T + N, 2, 3)

    def loss(pairs: list[tuple[float, float]]) -> float:
        weighted = sum(-y * math.log(1 - abs(y - s) + 1e-6) for y, s in pairs)
        none = [-math.log(1 - s + 1e-6) if published else s**2 for y, s in pairs if y == 0]
        return weighted / sum(y for y, _ in pairs) + sum(none) / max(1, len(none))

    def cosine(a: Tensor, b: Tensor) -> float:
        return max(0.0, float(a @ b))

    intra, inter, bases = [], [], []
    for v in range(2):
        for t in range(T):
            for n in range(T, T + N):
                seen = overlap(box[v, t], box[v, n])
                intra.append((seen, cosine(student[v][t], teacher[v][n])))
                guess = cosine(teacher[v][t], teacher[1 - v][n])
                inter.append((guess, cosine(student[v][t], student[1 - v][n])))
        for i in range(T, T + N):
            for j in range(i + 1, T + N):
                similar = cosine(student[v][i], student[v][j])
                bases.append(similar**2 if published else similar)
    assert len(bases) == 2 * N * (N - 1) // 2
    found = {"intra": loss(intra), "bases": sum(bases) / len(bases)}
    return found | ({"inter": loss(inter)} if built.inter else {})


@pytest.mark.parametrize("kind", ["resenc", "vit"])
@pytest.mark.parametrize(("form", "inter"), [("large_scale_medical", True), ("nnssl", False)])
def test_the_objective_by_loops(batch: Batch, kind: str, form: Any, inter: bool) -> None:
    built = objective(kind, form=form, inter=inter)
    loss, parts = built(batch, 0.0)
    expected = by_loops(built, batch)
    assert {name: part.item() for name, part in parts.items()} == pytest.approx(expected, rel=1e-4)
    assert loss.item() == pytest.approx(sum(expected.values()), rel=1e-4)


def test_targets_sum_to_one_and_a_crop_on_a_base_is_that_base(batch: Batch) -> None:
    assert batch.box is not None
    built = objective()
    torch.testing.assert_close(built.targets(batch).sum(2), torch.ones(2, T))
    batch.box[0] = batch.box[T + 4]
    assert built.targets(batch)[0, 0].tolist() == [0, 0, 0, 0, 1, 0]


def test_mirrored_crops_have_the_targets_of_where_they_were_cut(batch: Batch) -> None:
    built = objective()
    mirrored = replace(batch, image=batch.image.flip(4))
    torch.testing.assert_close(built.targets(mirrored), built.targets(batch), rtol=0, atol=0)
    assert built(mirrored, 0.0).loss != built(batch, 0.0).loss


def test_the_loaders_mirrors_change_the_crops_and_not_the_targets() -> None:
    built = objective()
    chosen = LoopSettings(crop_size=SHAPE, steps=1, batch_size=2, lr=1.0)
    raw = raw_batch(chosen, 1, 2, built.crops)
    plain, mirrored = (
        to_batch(raw, Augment((on, on, on), AugmentSettings())) for on in (False, True)
    )
    assert not torch.equal(plain.image, mirrored.image)
    torch.testing.assert_close(built.targets(mirrored), built.targets(plain), rtol=0, atol=0)
    torch.testing.assert_close(built.targets(plain).sum(2), torch.ones(2, T))


def test_the_teacher_is_of_the_projector_begins_as_the_student_and_has_no_gradient(
    batch: Batch,
) -> None:
    built = VoCo(encoder=encoder(), targets=T, grid=GRID, hidden_dim=16, out_dim=8)
    pairs = zip(built.teacher.module.parameters(), built.projector.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    built(batch, 0.0).loss.backward()
    assert all(p.grad is None for p in built.teacher.parameters())
    assert all(p.grad is not None for p in built.projector.parameters())


def test_the_teacher_moves_once_a_step_and_only_then(batch: Batch) -> None:
    built = objective(momentum=0.9)
    before = [p.clone() for p in built.teacher.parameters()]
    built(batch, 0.0)
    assert all(map(torch.equal, before, built.teacher.parameters()))
    built.after_step(0.1)
    for old, new, student in zip(
        before, built.teacher.parameters(), built.projector.parameters(), strict=True
    ):
        torch.testing.assert_close(new, 0.9 * old + 0.1 * student)


def test_without_momentum_the_teacher_is_the_student() -> None:
    built = objective(momentum=0.0)
    built.after_step(0.5)
    pairs = zip(built.teacher.parameters(), built.projector.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_a_constant_that_all_crops_share_does_not_matter(batch: Batch) -> None:
    """Which is what keeps crops from being one point: means of maps are nearly the same."""
    built = objective()
    features = built.features(batch.image)
    torch.testing.assert_close(
        built.projector(features + 3.0), built.projector(features), rtol=1e-3, atol=1e-4
    )
    alike, apart = (F.normalize(x, dim=-1) for x in (features + 3.0, built.projector(features)))
    assert (alike @ alike.mT).mean() > 0.98 > 0.9 > (apart @ apart.mT).mean()
    built.eval()
    again = built.projector(features)
    built.train()
    assert torch.equal(again, built.projector(features))  # no running statistics


def test_one_base_is_refused_and_samples_come_in_twos_where_they_are_compared() -> None:
    with pytest.raises(ValueError, match="give two or more"):
        VoCo(encoder=encoder(), grid=(1, 1, 1))
    assert objective().batch_multiple == 2
    assert objective(inter=False).batch_multiple == 1


def test_one_batch_is_learned(batch: Batch) -> None:
    built = VoCo(encoder=encoder(), targets=T, grid=GRID, hidden_dim=64, out_dim=64)
    optimizer = torch.optim.Adam(built.parameters(), lr=3e-3)
    first = built(batch, 0.0).loss.item()
    for _ in range(100):
        optimizer.zero_grad()
        loss = built(batch, 0.0).loss
        loss.backward()
        optimizer.step()
        built.after_step(0.0)
    assert loss.item() < 0.75 * first
    assert built(batch, 0.0).parts["bases"] < 0.3  # not one point
