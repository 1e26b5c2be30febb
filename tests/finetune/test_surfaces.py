"""Areas against closed forms, distances against brute force over every pair of surfels."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray
from surfels import points

from finetune.surfaces import TREE, Surface, distances, surface

SPACINGS = [(1.0, 1.0, 1.0), (2.0, 0.9, 1.4), (5.0, 0.5, 0.5), (0.4, 6.0, 0.7)]


def brute_force(a: Surface, b: Surface) -> NDArray[np.float64]:
    return np.array([min(math.dist(p, q) for q in points(b)) for p in points(a)])


def random_masks(rng: np.random.Generator, shape: tuple[int, int, int]) -> list[NDArray[np.bool_]]:
    """Two of any density, from single voxels to nearly full, anywhere in the image."""
    masks = []
    for _ in range(2):
        mask = np.zeros(shape, bool)
        start = [rng.integers(0, n) for n in shape]
        part = tuple(
            slice(s, s + rng.integers(1, n + 1)) for s, n in zip(start, shape, strict=True)
        )
        mask[part] = rng.random(mask[part].shape) < rng.uniform(0.05, 0.95)
        mask[tuple(start)] = True
        masks.append(mask)
    return masks


@pytest.mark.parametrize("spacing", SPACINGS)
def test_distances_are_those_of_brute_force(spacing: tuple[float, float, float], seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(5):
        a, b = (surface(mask, spacing) for mask in random_masks(rng, (6, 9, 11)))
        assert distances(a, b) == pytest.approx(brute_force(a, b), abs=1e-9)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_what_lies_far_away_is_found_too(spacing: tuple[float, float, float]) -> None:
    """One voxel and another, from neighbours to far beyond the steps that are tried first."""
    for axis in range(3):
        for apart in (1, 2, 3, 4, 6, 9, 14, 40):
            shape = [3, 3, 3]
            shape[axis] += apart
            masks = np.zeros((2, *shape), bool)
            masks[0][(0,) * 3] = True
            there = [0, 0, 0]
            there[axis] = apart
            masks[1][tuple(there)] = True
            a, b = (surface(mask, spacing) for mask in masks)
            # Each voxel has eight corners; half of them face the other voxel.
            near, far = (apart - 1) * spacing[axis], apart * spacing[axis]
            assert np.sort(distances(a, b)) == pytest.approx([near] * 4 + [far] * 4)


@pytest.mark.parametrize("spacing", [*SPACINGS, (50.0, 0.1, 0.1)])
def test_a_nearer_surfel_is_not_passed_over(spacing: tuple[float, float, float], seed: int) -> None:
    """Few voxels at about the distance where steps end and the tree begins."""
    rng = np.random.default_rng(seed)
    for _ in range(60):
        masks = np.zeros((2, 3, 27, 27), bool)
        masks[0, 1, 13, 13] = True
        for _ in range(3):
            masks[1][tuple(rng.integers(0, masks.shape[1:]))] = True
        a, b = (surface(mask, spacing) for mask in masks)
        assert distances(a, b) == pytest.approx(brute_force(a, b), abs=1e-9)


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (5.0, 0.5, 0.5)])
def test_straight_ahead_is_nearer_than_a_little_farther_aside(
    spacing: tuple[float, float, float],
) -> None:
    """The steps lie in a box, whose corners are farther than what lies just beyond its faces."""
    for ahead in range(1, 16):
        for h, w in np.ndindex(16, 16):
            if not ahead < math.hypot(h, w) < ahead + 0.5:
                continue
            masks = np.zeros((2, 1, 18, 18), bool)
            masks[0, 0, 0, 0] = masks[1, 0, 0, ahead + 1] = masks[1, 0, h + 1, w + 1] = True
            for turned in (masks, masks[:, :, ::-1, ::-1]):
                a, b = (surface(mask, spacing) for mask in turned)
                assert distances(a, b) == pytest.approx(brute_force(a, b), abs=1e-9)


def test_noise_far_away_is_measured_too(seed: int) -> None:
    """So much of it that a distance transform is made instead of a tree."""
    noise, voxels = np.zeros((2, 6, 20, 40), bool)
    noise[:, :, :20] = np.random.default_rng(seed).random((6, 20, 20)) < 0.5
    voxels[5, 19, 33] = voxels[0, 19, 36] = True  # which is nearer hangs on the spacing
    spacing = (5.0, 0.9, 1.4)
    a, b = surface(noise, spacing), surface(voxels, spacing)
    assert len(a.cells) * TREE > a.lattice.size > len(b.cells) * TREE
    assert distances(a, b) == pytest.approx(brute_force(a, b), abs=1e-9)
    assert distances(b, a) == pytest.approx(brute_force(b, a), abs=1e-9)


def test_area_of_a_sphere() -> None:
    grid = np.indices((64, 64, 64)) - 31.5
    radius, exact = 14.4, 4 * math.pi * 14.4**2
    # A binary mask's surface is a staircase: its area is some percent too large, more so where
    # voxels are longer. Counting voxel faces instead would give 50 %.
    for spacing, excess in [((1.0, 1.0, 1.0), 1.10), ((2.0, 1.0, 0.5), 1.18)]:
        scaled = grid * np.array(spacing)[:, None, None, None]
        area = surface((scaled**2).sum(0) < radius**2, spacing).areas.sum()
        assert exact < area < excess * exact


def test_area_of_a_slab_is_exact_per_axis() -> None:
    mask = np.zeros((20, 20, 20), bool)
    mask[8:12] = True
    spacing = (3.0, 0.7, 1.1)
    found = surface(mask, spacing)
    places = points(found)
    inner = np.isclose(places[:, :1], [8 * 3.0, 12 * 3.0]).any(1)
    inner &= (places[:, 1:] > 1e-9).all(1)
    inner &= (places[:, 1] < 20 * 0.7 - 1e-9) & (places[:, 2] < 20 * 1.1 - 1e-9)
    assert inner.sum() == 2 * 19 * 19
    assert found.areas[inner] == pytest.approx(0.7 * 1.1)


def test_a_mask_and_its_complement_have_the_same_surface(seed: int) -> None:
    mask = np.random.default_rng(seed).random((7, 8, 9)) < 0.5
    mask[[0, -1]] = mask[:, [0, -1]] = mask[:, :, [0, -1]] = False  # only what both have within
    spacing = (2.0, 0.9, 1.4)
    one, other = surface(mask, spacing), surface(~mask, spacing)
    shell = surface(np.ones_like(mask), spacing)
    assert one.areas.sum() == pytest.approx(other.areas.sum() - shell.areas.sum())


def test_a_mask_at_the_edge_of_the_image_is_closed() -> None:
    inside, outside = np.zeros((8, 8, 8), bool), np.ones((4, 4, 4), bool)
    inside[2:6, 2:6, 2:6] = True
    assert surface(inside, (1, 2, 3)).areas.sum() == pytest.approx(
        surface(outside, (1, 2, 3)).areas.sum()
    )


@pytest.mark.parametrize("spacing", [(1.0, 1.0), (0.9, 1.4), (5.0, 0.5)])
def test_a_slice_has_a_contour(spacing: tuple[float, float], seed: int) -> None:
    """A rectangle's corners are cut off in the middle of their pixels' sides."""
    mask = np.zeros((30, 40), bool)
    mask[4:14, 5:25] = True
    found = surface(mask, spacing)
    assert len(found.cells) == 2 * (10 + 20)
    straight = 2 * (9 * spacing[0] + 19 * spacing[1])
    assert found.areas.sum() == pytest.approx(straight + 4 * math.hypot(*spacing) / 2)
    whole = surface(np.ones((10, 20), bool), spacing)  # at the edge it is closed, as in a volume
    assert whole.areas.sum() == pytest.approx(found.areas.sum())
    rng = np.random.default_rng(seed)
    for _ in range(5):
        masks = [mask[2] for mask in random_masks(rng, (5, 9, 11))]
        masks[0][3, 4] = masks[1][8, 8] = True
        a, b = (surface(mask, spacing) for mask in masks)
        assert distances(a, b) == pytest.approx(brute_force(a, b), abs=1e-9)
