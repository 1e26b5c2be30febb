from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from torch import Tensor

from pretrain.overlap import (
    base_similarity,
    overlap_cross_entropy,
    overlap_fractions,
    overlap_log_loss,
    predicted_overlap,
)

BOTH = [overlap_cross_entropy, overlap_log_loss]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def boxes(starts: list[tuple[int, int, int]], size: tuple[int, int, int]) -> Tensor:
    """[1, N, 2, 3]."""
    low = torch.tensor(starts, dtype=torch.float64)
    return torch.stack([low, low + torch.tensor(size)], 1)[None]


GRID = [(4 * d, 6 * h, 8 * w) for d, h, w in product(range(2), range(3), range(3))]
BASES = boxes(GRID, (4, 6, 8))  # of a volume of 8 x 18 x 24


def test_a_crop_within_the_grid_is_shared_out(seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    size = (3, 5, 4)
    starts = [
        tuple(int(torch.randint(0, room - s + 1, (), generator=random)) for room, s in
              zip((8, 18, 24), size, strict=True))
        for _ in range(20)
    ]  # fmt: skip
    found = overlap_fractions(boxes(starts, size), BASES)  # type: ignore[arg-type]
    torch.testing.assert_close(found.sum(-1), torch.ones(1, 20, dtype=torch.float64))
    for t, n in product(range(20), range(len(GRID))):
        cells = [
            set(range(a, a + s)) & set(range(b, b + size_b))
            for a, s, b, size_b in zip(starts[t], size, GRID[n], (4, 6, 8), strict=True)
        ]
        shared = math.prod(len(c) for c in cells)
        assert found[0, t, n].item() == pytest.approx(shared / math.prod(size))


def test_an_aligned_crop_is_one_base() -> None:
    found = overlap_fractions(BASES, BASES)[0]
    assert torch.equal(found, torch.eye(len(GRID), dtype=torch.float64))


def test_the_crop_is_what_is_shared_out() -> None:
    """A small crop within a base is all in it; a large one around it is in it for a part."""
    base = boxes([(4, 4, 4)], (4, 4, 4))
    assert overlap_fractions(boxes([(5, 5, 5)], (2, 2, 2)), base).item() == 1
    assert overlap_fractions(boxes([(0, 0, 0)], (8, 8, 8)), base).item() == 1 / 8
    assert overlap_fractions(boxes([(0, 4, 4)], (4, 4, 4)), base).item() == 0
    for axis in range(3):  # along each of them
        start = [4, 4, 4]
        start[axis] = 5
        assert overlap_fractions(boxes([tuple(start)], (4, 4, 4)), base).item() == 3 / 4


def test_boxes_of_each_volume_are_its_own() -> None:
    crops = torch.cat([boxes([(0, 0, 0)], (4, 4, 4)), boxes([(2, 0, 0)], (4, 4, 4))])
    found = overlap_fractions(crops, boxes([(0, 0, 0)], (4, 4, 4)).expand(2, 1, 2, 3))
    assert found.flatten().tolist() == [1, 0.5]


def test_predictions_are_cosines_without_the_negative_ones() -> None:
    crops, bases = randn(2, 3, 5), randn(2, 4, 5, seed=1)
    found = predicted_overlap(crops, bases)
    for b, t, n in product(range(2), range(3), range(4)):
        cosine = float(crops[b, t] @ bases[b, n] / crops[b, t].norm() / bases[b, n].norm())
        assert found[b, t, n].item() == pytest.approx(max(cosine, 0.0))
    assert (found == 0).any()
    many = randn(1, 200, 64, seed=2).float()
    assert predicted_overlap(many, many).max() <= 1  # rounding alone passes it


def planted() -> tuple[Tensor, Tensor]:
    target = randn(2, 3, 4).softmax(-1)
    target[0, 0] = torch.tensor([0, 0, 1, 0])
    target[1, 2] = torch.tensor([0.5, 0, 0, 0.5])
    return target, randn(2, 3, 4, seed=1).sigmoid()


@pytest.mark.parametrize("loss", BOTH)
def test_losses_equal_loops(loss) -> None:
    target, prediction = planted()
    near, apart = [], []
    for y, s in zip(target.flatten().tolist(), prediction.flatten().tolist(), strict=True):
        if y > 0:
            near.append(-y * math.log(1 - abs(y - s)))
        else:
            apart.append(s * s if loss is overlap_log_loss else -math.log(1 - s))
    expected = sum(near) / target.sum().item() + sum(apart) / len(apart)
    assert loss(target, prediction).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("loss", BOTH)
def test_a_right_prediction_costs_nothing(loss) -> None:
    target, _ = planted()
    assert loss(target, target).item() == pytest.approx(0, abs=2e-6)
    assert loss(target, (target + 0.01).clamp(max=1)) > 1e-3


@pytest.mark.parametrize("loss", BOTH)
def test_the_worst_predictions_are_finite(loss) -> None:
    for target, prediction in ((0.0, 1.0), (1.0, 0.0), (0.0, 0.0), (1.0, 1.0)):
        y, s = torch.full((1, 2, 3), target), torch.full((1, 2, 3), prediction, requires_grad=True)
        found = loss(y, s)
        found.backward()
        assert found.isfinite() and s.grad is not None and s.grad.isfinite().all()


@pytest.mark.parametrize("loss", BOTH)
def test_duplicates_have_a_finite_gradient(loss) -> None:
    target, _ = planted()
    for value in (1.0, 0.0, -1.0):
        crops = torch.full((2, 3, 8), value, requires_grad=True)
        loss(target.float(), predicted_overlap(crops, torch.ones(2, 4, 8))).backward()
        assert crops.grad is not None and crops.grad.isfinite().all()


@pytest.mark.parametrize("loss", BOTH)
def test_a_target_that_was_predicted_has_no_gradient(loss) -> None:
    teacher, student = randn(2, 3, 5).requires_grad_(), randn(2, 3, 5, seed=1).requires_grad_()
    bases = randn(2, 4, 5, seed=2)
    loss(predicted_overlap(teacher, bases), predicted_overlap(student, bases)).backward()
    assert teacher.grad is None and student.grad is not None


@pytest.mark.parametrize(("squared", "power"), [(False, 1), (True, 2)])
def test_base_similarity_is_a_mean_over_pairs(squared: bool, power: int) -> None:
    bases = randn(2, 9, 5)
    cosines = [
        max(float(x[i] @ x[j] / x[i].norm() / x[j].norm()), 0.0) ** power
        for x in bases
        for i in range(9)
        for j in range(i)
    ]
    assert len(cosines) == 2 * 36
    found = base_similarity(bases, squared=squared)
    assert found.item() == pytest.approx(sum(cosines) / 72)
    assert base_similarity(torch.eye(9)[None], squared=squared) == 0
    assert base_similarity(torch.ones(1, 9, 4), squared=squared).item() == pytest.approx(1)


def test_one_base_of_a_pair_is_held_fixed() -> None:
    bases = torch.tensor([[[1.0, 0.0], [1.0, 1.0]]], requires_grad=True)
    base_similarity(bases, squared=False).backward()
    assert bases.grad is not None
    assert bases.grad[0, 0].any() and not bases.grad[0, 1].any()
