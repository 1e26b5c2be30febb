from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from torch import Tensor

from pretrain.contrast import (
    local_contrast,
    nt_xent,
    partition_contrast,
    region_lattice,
    take_regions,
    within_scan,
)

T = 0.3


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def similarity(a: Tensor, b: Tensor) -> float:
    return math.exp(float(a @ b / a.norm() / b.norm()) / T)


def pair(a: Tensor, b: Tensor, negatives: list[Tensor]) -> float:
    positive = similarity(a, b)
    return -math.log(positive / (positive + sum(similarity(a, n) for n in negatives)))


def mean(losses: list[float]) -> float:
    return sum(losses) / len(losses)


def test_nt_xent_equals_loops(seed: int) -> None:
    views = randn(2, 5, 4, seed=seed)
    crops = list(product(range(2), range(5)))
    losses = []
    for v, i in crops:
        others = [views[u, j] for u, j in crops if j != i]
        losses.append(pair(views[v, i], views[1 - v, i], others))
    assert len(others) == 8
    assert nt_xent(*views, T).item() == pytest.approx(mean(losses))


@pytest.mark.parametrize("C", [2, 5, 15])
def test_within_a_scan_equals_loops(seed: int, C: int) -> None:
    views = randn(2, 3, C, 4, seed=seed)
    losses = []
    for s, i in product(range(3), range(C)):
        negatives = [views[v, s, j] for v in range(2) for j in range(C) if j != i]
        assert len(negatives) == 2 * (C - 1)
        losses.append(pair(views[0, s, i], views[1, s, i], negatives))
    found = within_scan(*views, T)
    assert found.item() == pytest.approx(mean(losses))
    assert within_scan(*views.flip(0), T) != found  # one direction


def test_scans_do_not_see_each_other() -> None:
    views = randn(2, 3, 4, 5)
    alone = [within_scan(*views[:, [s]], T).item() for s in range(3)]
    assert within_scan(*views, T).item() == pytest.approx(mean(alone))
    assert nt_xent(*views.flatten(1, 2), T).item() != pytest.approx(mean(alone))


@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize(("V", "P"), [(1, 2), (2, 4), (3, 2)])
def test_partitions_equal_loops(seed: int, V: int, P: int, across: bool) -> None:
    views = randn(2, V, P, 4, seed=seed)
    images = list(product(range(2), range(V), range(P)))
    losses = []
    for (a, v, p), (b, w, q) in product(images, images):
        view_pair = v == w and a != b
        volume_pair = across and v != w and a == b
        if p == q and (view_pair or volume_pair):
            negatives = [views[i] for i in images if i[2] != p]
            assert len(negatives) == 2 * V * (P - 1)
            losses.append(pair(views[a, v, p], views[b, w, q], negatives))
    assert len(losses) == 2 * V * P * (V if across else 1)
    assert partition_contrast(*views, T, across=across).item() == pytest.approx(mean(losses))


def test_volumes_attract_each_other_only_where_that_is_asked() -> None:
    """Both volumes' partitions are far from each other in the second arrangement."""
    far = torch.eye(4, dtype=torch.float64).view(2, 2, 4)
    near = far[[0, 0]]
    own = [partition_contrast(x, x, T, across=False).item() for x in (near, far)]
    both = [partition_contrast(x, x, T, across=True).item() for x in (near, far)]
    assert own[0] == pytest.approx(own[1]) == pytest.approx(both[0])
    assert both[1] > both[0] + 0.5


def table(R: int, k: int) -> Tensor:
    """Neighbours of region r are the k next ones."""
    steps = (torch.arange(R) - torch.arange(R)[:, None]) % R
    return (steps > 0) & (steps <= k)


@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize(("V", "P"), [(1, 1), (3, 1), (2, 2)])
def test_regions_equal_loops(seed: int, V: int, P: int, across: bool) -> None:
    R = 5
    near, maps = table(R, 2), randn(2, V, P, R, 4, seed=seed)
    images = list(product(range(2), range(V), range(P)))
    losses = []
    for (a, v, p), (b, w, q), r in product(images, images, range(R)):
        if p == q and ((v == w and a != b) or (across and v != w and a == b)):
            one, other = maps[a, v, p], maps[b, w, q]
            negatives = [z[n] for z in (one, other) for n in range(R) if near[r, n]]
            losses.append(pair(one[r], other[r], negatives))
    found = local_contrast(*maps, near, T, across=across)
    assert found.item() == pytest.approx(mean(losses))


LOSSES = {
    "nt_xent": (lambda a, b, t: nt_xent(a[:, 0], b[:, 0], t), 2 * 6 - 2),
    "within_scan": (within_scan, 2 * (4 - 1)),
    "views of a partition": (lambda a, b, t: partition_contrast(a, b, t, across=False), 2 * 6 * 3),
    "volumes too": (lambda a, b, t: partition_contrast(a, b, t, across=True), 2 * 6 * 3),
    "views of a region": (
        lambda a, b, t: local_contrast(a[:, None], b[:, None], table(4, 2), t, across=False), 4,
    ),
    "volumes' regions too": (
        lambda a, b, t: local_contrast(a[:, None], b[:, None], table(4, 2), t, across=True), 4,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LOSSES)
def test_equal_embeddings_and_a_hot_temperature_count_the_negatives(name: str) -> None:
    loss, negatives = LOSSES[name]
    same = torch.ones(6, 4, 8, dtype=torch.float64)
    assert loss(same, same, T).item() == pytest.approx(math.log(1 + negatives))
    views = randn(2, 6, 4, 8)
    assert loss(*views, 1e6).item() == pytest.approx(math.log(1 + negatives), rel=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_perfect_positives_and_orthogonal_negatives(name: str) -> None:
    loss, negatives = LOSSES[name]
    distinct = torch.eye(24, dtype=torch.float64).view(6, 4, 24)
    if name.startswith("volumes"):  # all volumes alike
        distinct = torch.eye(4, dtype=torch.float64).expand(6, 4, 4)
    expected = math.log(1 + negatives * math.exp(-1 / T))
    assert loss(distinct, distinct, T).item() == pytest.approx(expected)


@pytest.mark.parametrize("name", LOSSES)
def test_duplicates_have_a_finite_gradient(name: str) -> None:
    loss, _ = LOSSES[name]
    for value in (1.0, 0.0):
        a, b = (torch.full((6, 4, 8), value, requires_grad=True) for _ in range(2))
        loss(a, b, 0.05).backward()
        assert a.grad is not None and a.grad.isfinite().all()
        assert b.grad is not None and b.grad.isfinite().all()


def test_one_partition_has_no_negatives() -> None:
    with pytest.raises(ValueError, match="two partitions"):
        partition_contrast(randn(3, 1, 4), randn(3, 1, 4), T, across=True)


@pytest.mark.parametrize(
    ("shape", "size"), [((15, 15, 15), 3), ((9, 16, 11), 3), ((24, 24, 24), 3), ((5, 6, 12), 1)]
)
@pytest.mark.parametrize("neighbours", [5, 8])
def test_regions_lie_in_the_map_and_apart(
    shape: tuple[int, int, int], size: int, neighbours: int
) -> None:
    starts, near = region_lattice(shape, size, neighbours)
    assert len(starts) == 35 and near.shape == (35, 35)
    covered = torch.zeros(shape, dtype=torch.int64)
    for d, h, w in starts:
        block = covered[d : d + size, h : h + size, w : w + size]
        assert block.shape == (size, size, size)
        block += 1
    assert covered.max() == 1
    assert not near.diagonal().any()
    assert (near.sum(1) == neighbours).all()


def test_neighbours_are_the_nearest() -> None:
    starts, near = region_lattice((19, 19, 19), 3)
    points = torch.tensor(starts).double()
    distance = torch.cdist(points, points)
    for region in range(35):
        others = distance[region][torch.arange(35) != region]
        chosen = distance[region][near[region]]
        assert chosen.max() <= others.sort().values[7]
    # A point between has the corners of its octant.
    assert [starts[i] for i in near[27].nonzero()[:, 0]] == [
        (d, h, w) for d in (0, 8) for h in (0, 8) for w in (0, 8)
    ]


@pytest.mark.parametrize(("shape", "size"), [((14, 14, 14), 3), ((8, 20, 20), 3), ((4, 4, 4), 1)])
def test_a_map_too_small_is_refused(shape: tuple[int, int, int], size: int) -> None:
    with pytest.raises(ValueError, match="overlap"):
        region_lattice(shape, size)


def test_regions_are_cut_where_they_lie() -> None:
    features = randn(2, 3, 9, 16, 11)
    starts, _ = region_lattice((9, 16, 11), 3)
    rows = take_regions(features, starts, 3)
    assert rows.shape == (2, 35, 81)
    for number, (d, h, w) in enumerate(starts):
        cube = features[:, :, d : d + 3, h : h + 3, w : w + 3]
        assert torch.equal(rows[:, number].view(2, 3, 3, 3, 3), cube)
