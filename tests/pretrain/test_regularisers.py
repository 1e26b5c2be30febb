from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pretrain.regularisers import gram_loss, koleo, resize_tokens


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_koleo_equals_loops(seed: int) -> None:
    features = randn(7, 5, seed=seed)
    x = [row / row.norm() for row in features]
    nearest = [min((x[i] - x[j]).norm() for j in range(7) if j != i) for i in range(7)]
    expected = -sum(math.log(d + 1e-8) for d in nearest) / 7
    assert koleo(features).item() == pytest.approx(expected)
    assert koleo(features * (0.1 + torch.rand(7, 1).double())).item() == pytest.approx(expected)


def test_koleo_of_opposites_and_of_duplicates() -> None:
    x = torch.tensor([[3.0, 4.0], [-6.0, -8.0]])
    assert koleo(x).item() == pytest.approx(-math.log(2))
    same = torch.tensor([[3.0, 4.0], [3.0, 4.0], [-6.0, -8.0]], requires_grad=True)
    loss = koleo(same)
    loss.backward()
    assert loss.item() == pytest.approx(-(2 * math.log(1e-8) + math.log(2)) / 3)
    assert same.grad is not None and same.grad.isfinite().all()


def test_koleo_pushes_neighbours_apart() -> None:
    angles = torch.tensor([0.0, 0.3, 2.0], requires_grad=True)
    koleo(torch.stack([angles.cos(), angles.sin()], 1)).backward()
    assert angles.grad is not None and angles.grad[0] > 0 > angles.grad[1]


def test_koleo_needs_a_neighbour() -> None:
    with pytest.raises(ValueError, match="at least two samples"):
        koleo(torch.ones(1, 4))


def test_gram_equals_loops(seed: int) -> None:
    student, teacher = randn(2, 4, 5, seed=seed), randn(2, 4, 3, seed=seed + 1)
    total = 0.0
    for b in range(2):
        for i in range(4):
            for j in range(4):
                cosines = [
                    float(x[b, i] @ x[b, j] / x[b, i].norm() / x[b, j].norm())
                    for x in (student, teacher)
                ]
                total += (cosines[0] - cosines[1]) ** 2
    assert gram_loss(student, teacher).item() == pytest.approx(total / 32)


def test_gram_is_blind_to_lengths_and_to_a_common_rotation() -> None:
    x = randn(2, 6, 5)
    rotation = torch.linalg.qr(randn(5, 5, seed=1))[0]
    assert gram_loss(
        x * (0.1 + torch.rand(2, 6, 1).double()), x @ rotation
    ).item() == pytest.approx(0)
    other_order = gram_loss(x, x.flip(1))
    assert other_order > 1e-2


def test_gram_compares_within_an_image_only() -> None:
    """Another rotation of each image changes nothing: images are not compared with each other."""
    x = randn(2, 6, 5)
    rotations = torch.stack([torch.linalg.qr(randn(5, 5, seed=s))[0] for s in (1, 2)])
    assert gram_loss(x, x @ rotations).item() == pytest.approx(0)


def test_gram_moves_the_student_only() -> None:
    student, teacher = randn(2, 6, 5).requires_grad_(), randn(2, 6, 5, seed=1).requires_grad_()
    gram_loss(student, teacher).backward()
    assert student.grad is not None and teacher.grad is None


def test_half_the_grid_takes_means_of_cells() -> None:
    grid = (4, 6, 2)
    tokens = randn(2, 48, 5)
    cells = tokens.view(2, 2, 2, 3, 2, 1, 2, 5).mean((2, 4, 6)).flatten(1, 3)
    torch.testing.assert_close(resize_tokens(tokens, grid, (2, 3, 1)), cells)
    assert torch.equal(resize_tokens(tokens, grid, grid), tokens)


def test_a_resized_ramp_is_a_ramp() -> None:
    """The place of a cell's middle as its feature: all but the cells at the border keep it."""
    grid, target = (4, 6, 8), (6, 9, 12)

    def places(cells: tuple[int, int, int]) -> Tensor:
        axes = [(torch.arange(n, dtype=torch.float64) + 0.5) / n for n in cells]
        return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)

    found = resize_tokens(places(grid).flatten(0, 2)[None], grid, target)
    inner = found.view(*target, 3)[1:-1, 1:-1, 1:-1]
    torch.testing.assert_close(inner, places(target)[1:-1, 1:-1, 1:-1])
