"""Where crops lie: closed forms and invariants of each layout, without a voxel read."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from pretrain.crops import Bases, Crops, MultiCrop, Pairs, Slabs, coarse_axis
from pretrain.overlap import overlap_fractions
from pretrain.places import Box, Frame, Place, inside
from pretrain.schedule import generator

SIZE = (12, 16, 20)
SHAPES = [(60, 70, 80), (5, 70, 80), (60, 9, 7), (12, 16, 20), (13, 15, 21), (1, 1, 1)]


def frame_of(
    shape: tuple[int, int, int],
    seed: int = 0,
    number: int = 0,
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0),
) -> Frame:
    """A volume whose foreground is its middle half."""
    n = np.array(shape)
    foreground = Box(n // 4, np.maximum(n - n // 4, n // 4 + 1))

    def around(rng: np.random.Generator) -> Any:
        return rng.integers(*foreground)

    shared = partial(generator, "test", seed)
    own = around(generator("test", seed, number))
    return Frame(n, np.array(spacing), foreground, own, shared, around)


def places(
    crops: Crops, shape: tuple[int, int, int], seed: int, size: Any = SIZE, **options: Any
) -> list[Place]:
    return [crops.place(n, size, frame_of(shape, seed, n, **options)) for n in range(crops.total)]


def box(place: Place) -> np.ndarray:
    low = place.centre - place.span // 2
    return np.stack([low, low + place.span])


def in_volume(found: np.ndarray, shape: Any, size: Any = SIZE) -> bool:
    """Within the volume along each axis that is no shorter."""
    fits = np.array(shape) >= size
    return bool(((found[0] >= 0) & (found[1] <= shape))[fits].all())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "crops", [Crops(3), Pairs(2, 0.7), Bases(3, (2, 1, 3)), Slabs(3), MultiCrop(gram_size=SIZE)]
)
def test_a_place_is_a_function_of_its_number(
    crops: Crops, shape: tuple[int, int, int], seed: int
) -> None:
    """Whoever asks for one crop of a sample gets the same as who asks for all, in any order."""
    whole = places(crops, shape, seed)
    for n in reversed(range(crops.total)):
        alone = crops.place(n, SIZE, frame_of(shape, seed, n))
        assert np.array_equal(box(alone), box(whole[n])) and alone.pose == whole[n].pose
    assert sum(group.crops for group in crops.groups(SIZE)) == crops.total
    assert [place.group.name for place in whole] == [
        group.name for group in crops.groups(SIZE) for _ in range(group.crops)
    ]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("overlap", [0.0, 0.5, 0.9, 1.0])
def test_views_of_a_pair_share_each_side(
    shape: tuple[int, int, int], overlap: float, seed: int
) -> None:
    apart, everywhere = [], []
    for n in range(200):
        found = [box(place) for place in places(Pairs(2, overlap), shape, 1000 * seed + n)]
        for one, other in (found[:2], found[2:]):
            shared = np.minimum(one[1], other[1]) - np.maximum(one[0], other[0])
            assert (shared >= overlap * np.array(SIZE) - 1e-9).all()
            assert in_volume(one, shape) and in_volume(other, shape)
            # Of a volume that is too short both see all of it.
            short = np.array(shape) < SIZE
            assert (shared == SIZE)[short].all()
            apart.append(shared)
        everywhere.append((found[0] == found[2]).all())
    if shape == SHAPES[0]:
        least = np.ceil(overlap * np.array(SIZE) - 1e-9)
        assert (np.min(apart, axis=0) == least).all() or overlap == 0
        assert (np.max(apart, axis=0) == SIZE).all() and not np.all(everywhere)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("grid", [(1, 3, 3), (2, 1, 3), (4, 4, 1)])
def test_bases_tile_a_region_that_holds_the_random_crops(
    shape: tuple[int, int, int], grid: tuple[int, int, int], seed: int
) -> None:
    layout = Bases(3, grid)
    for n in range(40):
        found = np.array([box(place) for place in places(layout, shape, 1000 * seed + n)])
        crops, bases = found[:3], found[3:]
        cells = bases.reshape(*grid, 2, 3)
        for at in np.ndindex(*grid):
            assert (cells[at][0] == cells[0, 0, 0][0] + np.array(at) * SIZE).all()
            assert (cells[at][1] - cells[at][0] == SIZE).all()
        tensor = partial(torch.tensor, dtype=torch.float32)
        shares = overlap_fractions(tensor(crops)[None], tensor(bases)[None])
        torch.testing.assert_close(shares.sum(-1), torch.ones(1, 3))
        region = np.array([bases[0][0], bases[-1][1]])
        assert in_volume(region, shape, np.array(grid) * SIZE)
        assert all(in_volume(crop, shape) for crop in crops)


def test_random_crops_reach_all_of_the_region(seed: int) -> None:
    found = [
        [box(p)[0] for p in places(Bases(1, (1, 3, 3)), (60, 70, 80), 1000 * seed + n)]
        for n in range(300)
    ]
    away = np.array([crop - base for crop, base, *_ in found])
    assert (away.min(0) == 0).all() and (away.max(0) == [0, 2 * 16, 2 * 20]).all()


@pytest.mark.parametrize("shape", [(60, 70, 80), (40, 9, 80), (9, 16, 20), (3, 30, 30)])
@pytest.mark.parametrize("side", [1, 11, 12])
def test_a_crops_middle_lies_in_its_slab(shape: tuple[int, int, int], side: int, seed: int) -> None:
    """Also where it then leaves the volume; all slabs are of one thickness."""
    layout, size = Slabs(4), (side, 16, 20)
    seen = []
    for n in range(60):
        found = places(layout, shape, 1000 * seed + n, size)
        low, high = (int(end[0]) for end in frame_of(shape).foreground)
        for number, place in enumerate(found):
            slab = number % 4
            middle = place.centre[0] - side // 2 + side / 2
            ends = [low + k * (high - low) / 4 for k in (slab, slab + 1)]
            loose = 0.0 if high - low >= 4 else 0.5  # a slab between two voxels
            assert ends[0] - loose <= middle <= ends[1] + loose
            flat = np.array([0, 1, 1], dtype=bool)
            assert in_volume(box(place)[:, flat], np.array(shape)[flat], np.array(size)[flat])
        # Views are placed each for itself, and share half of each side in the plane.
        for one, other in zip(found[:4], found[4:], strict=True):
            shared = np.array(size) - np.abs(one.centre - other.centre)
            assert (shared[1:] >= np.array(size[1:]) / 2).all()
            seen.append((one.centre == other.centre).all())
            assert one.pose is None and other.pose is None
    assert not all(seen) or max(shape) < 20


def test_aligned_views_are_the_same_place_and_pose(seed: int) -> None:
    found = places(Slabs(3, aligned=True), (60, 70, 80), seed)
    for slab, (one, other) in enumerate(zip(found[:3], found[3:], strict=True)):
        assert np.array_equal(box(one), box(other))
        assert one.pose is None and other.pose == slab
    assert not np.array_equal(box(found[0])[:, 1:], box(found[1])[:, 1:])


@pytest.mark.parametrize(
    ("spacing", "axis"),
    [
        ((1, 1, 1), 0),
        ((5, 1, 1), 0),
        ((1, 5, 1), 1),
        ((0.7, 0.7, 3), 2),
        ((1, 1, 0.4), 2),
        ((1.001, 1.0, 1.002), 0),
        ((2.0, 1.0, 1.1), 0),
        ((1.0, 1.1, 3.0), 2),
    ],
)
def test_the_coarse_axis_is_the_odd_one(spacing: tuple[float, ...], axis: int) -> None:
    none = np.zeros(3, dtype=bool)
    assert coarse_axis(np.array(spacing, dtype=float), none) == axis
    assert coarse_axis(np.array(spacing, dtype=float), np.array([False, True, False])) == 1


@pytest.mark.parametrize("shape", [(60, 70, 80), (5, 70, 80), (120, 40, 40)])
@pytest.mark.parametrize("region", [None, (24, 30, 36)])
@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (0.8, 0.8, 4.0)])
def test_sides_are_shares_of_the_region(
    shape: tuple[int, int, int],
    region: tuple[int, int, int] | None,
    spacing: tuple[float, float, float],
    seed: int,
) -> None:
    """In the plane of the fine axes as areas, along the coarse one as lengths; nothing beyond."""
    layout = MultiCrop(
        count=2, local=4, local_size=(6, 8, 10), region=region, gram_size=(18, 24, 30)
    )
    frame = frame_of(shape)
    sides = frame.foreground.sides if region is None else np.minimum(region, shape)
    coarse = 0 if spacing[2] == 1 else 2
    fine = [axis for axis in range(3) if axis != coarse]
    height, width = sides[fine]
    most = min(height, width * 1.11) * min(width, height / 0.9) / (height * width)
    lows, shorter = [], []
    for n in range(80):
        found = places(layout, shape, 1000 * seed + n, spacing=spacing)
        boxes = np.array([box(place) for place in found])
        if region is None:
            assert (boxes[:, 0] >= frame.foreground.low).all()
            assert (boxes[:, 1] <= frame.foreground.high).all()
        assert (boxes[:, 0] >= 0).all() and (boxes[:, 1] <= shape).all()
        assert (boxes[:, 1].max(0) - boxes[:, 0].min(0) <= sides).all()
        for number, place in enumerate(found[:6]):
            area, length = (
                (layout.area, layout.length)
                if number < 2
                else (layout.local_area, layout.local_length)
            )
            # A side is rounded to whole voxels.
            share = (place.span - 0.5) / sides, (place.span + 0.5) / sides
            assert share[1][coarse] >= length[0] and share[0][coarse] <= length[1]
            assert share[1][fine].prod() >= min(area[0], most) and share[0][fine].prod() <= area[1]
            # The aspect is that of voxels, whatever that of the region is.
            low, high = ((place.span + e)[fine[0]] / (place.span - e)[fine[1]] for e in (-0.5, 0.5))
            assert low <= 1.11 and high >= 0.9
        for number, gram in enumerate(found[6:]):
            assert np.array_equal(box(gram), box(found[number]))
            assert gram.pose == number and gram.posed == SIZE and not gram.group.changed
        lows.append(boxes[2, 0])
        shorter.append(found[2].span < sides - 1)
    assert (np.ptp(lows, axis=0)[np.mean(shorter, axis=0) > 0.5] > 0).all()


def test_areas_and_lengths_are_uniform(seed: int) -> None:
    layout = MultiCrop(local=1, region=(1000, 1000, 1000), area=(0.25, 0.75), length=(0.2, 0.6))
    spans = np.array(
        [p.span for n in range(400) for p in places(layout, (1000,) * 3, 1000 * seed + n)[:2]]
    )
    area, length = spans[:, 1] * spans[:, 2] / 1e6, spans[:, 0] / 1e3
    for values, (low, high) in ((area, layout.area), (length, layout.length)):
        assert values.min() >= low - 2e-3 and values.max() <= high + 2e-3
        assert values.mean() == pytest.approx((low + high) / 2, abs=0.02)
        assert values.std() == pytest.approx((high - low) / 12**0.5, abs=0.015)
    aspect = np.log(spans[:, 1] / spans[:, 2])
    assert aspect.mean() == pytest.approx(0, abs=0.01)


def test_crops_of_a_slice_sample_lie_in_one_slice(seed: int) -> None:
    layout, size = MultiCrop(local_size=(1, 8, 8), gram_size=(1, 24, 24)), (1, 16, 16)
    slices = set()
    for n in range(20):
        found = places(layout, (60, 70, 80), 1000 * seed + n, size, spacing=(1.0, 1.0, 3.0))
        assert {int(place.span[0]) for place in found} == {1}
        depths = {int(place.centre[0]) for place in found}
        assert len(depths) == 1
        slices |= depths
        for place in found[:2]:
            assert 0.45 <= place.span[1] * place.span[2] / (36 * 40) <= 1
    assert len(slices) > 5


def test_more_local_crops_leave_the_others_where_they_are(seed: int) -> None:
    few, many = (places(MultiCrop(local=n), (60, 70, 80), seed) for n in (2, 9))
    assert all(np.array_equal(box(a), box(b)) for a, b in zip(few, many, strict=False))


def test_inside_is_what_a_search_finds(seed: int) -> None:
    """The nearest place within the box; in the middle, the odd voxel far, where it is too short."""
    rng = np.random.default_rng(seed)
    for _ in range(300):
        low, length, side, centre = rng.integers([-9, 1, 1, -30], [9, 20, 20, 40])
        within = Box(np.full(3, low), np.full(3, low + length))
        (found,) = set(inside(np.full(3, centre), np.full(3, side), within).tolist())
        if length >= side:
            starts = range(low, low + length - side + 1)
            assert found == min(starts, key=lambda s: abs(s - (centre - side // 2)))
        else:
            before, after = low - found, found + side - (low + length)
            assert after - before in (0, 1)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: Crops(0), "count=0"),
        (lambda: Pairs(2, 1.5), "overlap=1.5"),
        (lambda: Bases(grid=(0, 3, 3)), "grid"),
        (lambda: Bases(0), "count"),
        (lambda: Slabs(0), "count"),
        (lambda: MultiCrop(local=-1), "local=-1"),
        (lambda: MultiCrop(local_size=(4, 4)), "local_size"),  # type: ignore[arg-type]
        (lambda: MultiCrop(area=(0.0, 1.0)), "area"),
        (lambda: MultiCrop(local_length=(0.5, 0.2)), "local_length"),
        (lambda: MultiCrop(length=(0.5, 1.2)), "length"),
        (lambda: MultiCrop(aspect=(0.0, 1.0)), "aspect"),
        (lambda: MultiCrop(region=(0, 5, 5)), "region"),
        (lambda: MultiCrop().groups((1, 16, 16)), "local_size"),
        (lambda: MultiCrop(local=0, gram_size=(1, 8, 8)).groups((8, 16, 16)), "gram_size"),
    ],
)
def test_what_is_out_of_range_is_named(make: Any, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        make()


def test_sizes_of_crops_that_there_are_none_of_do_not_matter() -> None:
    assert len(MultiCrop(local=0).groups((1, 16, 16))) == 1


def test_lists_become_tuples() -> None:
    """As YAML gives them: sizes are compared, and layouts are keys."""
    made: Any = [MultiCrop(local_size=[4, 6, 8], gram_size=[9, 9, 9]), Bases(1, [1, 2, 2])]  # type: ignore[arg-type]
    assert made[0].groups(SIZE)[1].size == (4, 6, 8) and made[1].grid == (1, 2, 2)
    assert len({*made, MultiCrop(local_size=(4, 6, 8), gram_size=(9, 9, 9))}) == 2
