"""What crops make a sample: an objective declares them, the loader places them.

Crops of one shape form a group and come as one tensor, so that an encoder passes over all of them
at once. The first group is the main one, whose shape is `crop_size`; its crops are `Batch.image`.
Any further group is a batch of its own in `Batch.others`, under its name, with the same samples in
the same order. A layout numbers all crops of a sample through its groups, the main one first.

Where a crop lies is a function of the sample alone: of (seed, epoch, position) and the crop's
number. Each crop has a seed of its own, from which masks and changes of intensity derive.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pretrain.places import Box, Frame, Group, Place, Size, Voxel, inside

Range = tuple[float, float]

TRIES = 10
"""Shapes that are drawn of a crop until one fits, as torchvision and 3DINO do."""
ALIKE = 1.01
"""Spacings that differ by less than this factor are the same."""


def _check(fine: bool, name: str, value: object, wanted: str) -> None:
    if not fine:
        raise ValueError(f"{name}={value}: must be {wanted}")


def _checked_size(name: str, size: Sequence[int]) -> Size:
    """As a tuple: YAML knows lists alone."""
    _check(len(size) == 3 and min(size) >= 1, name, size, "three numbers of at least 1")
    d, h, w = size
    return d, h, w


@dataclass(frozen=True)
class Crops:
    """Crops anywhere in the foreground of a volume, each for itself.

    Attributes:
        count: crops of a sample.

    Raises:
        ValueError: an argument, named, is out of its range; so do all layouts.
    """

    count: int = 1

    def __post_init__(self) -> None:
        _check(self.count >= 1, "count", self.count, "at least 1")

    def groups(self, crop_size: Size) -> list[Group]:
        """The groups of a sample, the main one, which has no name, first."""
        return [Group("", self.main, crop_size)]

    @property
    def main(self) -> int:
        """Crops of the main group."""
        return self.count

    @property
    def total(self) -> int:
        """Crops of all groups."""
        return self.main

    def locate(self, number: int, crop_size: Size) -> tuple[Group, int]:
        """The group of a crop of the sample, and its number there."""
        for group in self.groups(crop_size):
            if number < group.crops:
                return group, number
            number -= group.crops
        raise IndexError(f"a sample has {self.total} crops")

    def place(self, number: int, crop_size: Size, frame: Frame) -> Place:
        """Where a crop of the sample lies in its volume."""
        return Place(self.groups(crop_size)[0], np.array(crop_size), frame.centre, frame.volume)

    def _at(self, start: Voxel, crop_size: Size, within: Box) -> Place:
        """A crop of the main group that starts at a voxel, on the grid itself."""
        span = np.array(crop_size)
        return Place(self.groups(crop_size)[0], span, start + span // 2, within)


ONE = Crops()
"""One crop a sample."""


@dataclass(frozen=True)
class Pairs(Crops):
    """Places in a volume, and two views of each: crops that share a part of every side.

    Order: both views of the first place, both of the second, ...

    The first view lies around a voxel of the foreground; how far the second is from it is uniform
    over what overlap and volume allow. Both lie within the volume along each axis that is no
    shorter than the crop. The share holds before `augment.scale` zooms either.

    Attributes:
        count: places of a sample.
        overlap: least share of a side that the views of a place have in common.
    """

    overlap: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(0 <= self.overlap <= 1, "overlap", self.overlap, "within [0, 1]")

    @property
    def main(self) -> int:
        """Two views of each place."""
        return 2 * self.count

    def place(self, number: int, crop_size: Size, frame: Frame) -> Place:
        """One view of a place."""
        place, view = divmod(number, 2)
        rng, size = frame.shared(), np.array(crop_size)
        where = [frame.around(rng) for _ in range(self.count)][place]
        start = inside(where, size, frame.volume)
        if view:
            apart = size - np.ceil(self.overlap * size - 1e-9).astype(np.int64)
            last = np.maximum(frame.shape - size, 0)
            fits = frame.shape >= size
            low = np.where(fits, np.maximum(start - apart, 0), start)
            high = np.where(fits, np.minimum(start + apart, last), start)
            start = _between(low, high, rng.random((self.count, 3))[place])
        return self._at(start, crop_size, frame.volume)


@dataclass(frozen=True)
class MultiCrop(Crops):
    """Two global and some local crops of one region, each of a size of its own (DINO).

    Main group: the global crops; group `local`: the others; group `gram`, if asked for: the global
    crops again, on another grid and with unchanged intensities, mirrored and turned as they are.
    What a crop covers is resampled to the size of its group. Its sides are shares of the region:
    of its area in the two fine axes with a drawn aspect, of its length along the third, the coarse
    axis, whose spacing differs from the two others most (D, where none does). The aspect is drawn
    evenly on the scale of its logarithm, the rest uniformly; area and aspect are drawn again where
    the crop would be longer than the region, which has an aspect of its own.

    Along an axis where `crop_size` is one voxel (slices) a crop covers one voxel, the same for all
    crops of the sample, and the two other axes are the fine ones.

    A crop is read as the box that it covers and 2 (f - 1) voxels more on each side for smoothing,
    where f voxels become one. With `region` None a global crop may cover all of the foreground, so
    nearly all of a large CT: 500 MB of int16 at 512x512x1000. A region bounds it: no crop reads
    more than the region and that margin (and what `augment` turns and scales into it).

    Attributes:
        count: global crops.
        local: local crops of a sample; 0: none.
        local_size: voxels of a local crop.
        region: voxels of the region along (D, H, W), around a voxel of the foreground and within
            the volume, to which it is cut where it is larger; None: the foreground's box.
        area: share of the area of a global crop, drawn from this range.
        length: share of the length of a global crop.
        local_area: as `area`, of a local crop.
        local_length: as `length`, of a local crop.
        aspect: height over width in the fine axes, in voxels.
        gram_size: voxels of the crops of `gram`.
    """

    count: int = 2
    local: int = 8
    local_size: Size = (48, 48, 48)
    region: Size | None = None
    area: Range = (0.48, 1.0)
    length: Range = (0.5, 1.0)
    local_area: Range = (0.16, 0.48)
    local_length: Range = (0.2, 0.5)
    aspect: Range = (0.9, 1.11)
    gram_size: Size | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self.local >= 0, "local", self.local, "at least 0")
        for name in ("local_size", "region", "gram_size"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, _checked_size(name, getattr(self, name)))
        for name in ("area", "length", "local_area", "local_length", "aspect"):
            low, high = getattr(self, name)
            most = math.inf if name == "aspect" else 1
            _check(0 < low <= high <= most, name, (low, high), f"0 < low <= high <= {most}")
            object.__setattr__(self, name, (low, high))

    @property
    def total(self) -> int:
        """Global crops, local ones and the Gram teacher's."""
        return self.count + self.local + self.count * (self.gram_size is not None)

    def groups(self, crop_size: Size) -> list[Group]:
        """Global crops, then local ones, then the Gram teacher's.

        Raises:
            ValueError: one size is a slice where `crop_size` is none, or the other way round.
        """
        for name in ("local_size", "gram_size"):
            size = getattr(self, name) or crop_size
            alike = all((a == 1) == (b == 1) for a, b in zip(size, crop_size, strict=True))
            flat = f"one voxel long where crop_size={list(crop_size)} is, and there alone"
            _check(alike or (name == "local_size" and not self.local), name, list(size), flat)
        found = [*super().groups(crop_size)]
        if self.local:
            found.append(Group("local", self.local, self.local_size))
        if self.gram_size is not None:
            found.append(Group("gram", self.count, self.gram_size, changed=False))
        return found

    def place(self, number: int, crop_size: Size, frame: Frame) -> Place:
        """A share of the region; that of a `gram` crop is its global crop's."""
        group, own = self.locate(number, crop_size)
        flat = np.array(crop_size) == 1
        rng = frame.shared()
        region = self._region(flat, rng, frame)
        # Further local crops change nothing in those before them.
        row = number if group.changed else own
        length, *draws = rng.random((self.count + self.local, 4 + 2 * TRIES))[row]
        where, tries = np.array(draws[:3]), np.reshape(draws[3:], (TRIES, 2))
        is_global = row < self.count
        coarse = coarse_axis(frame.spacing, flat)
        sides = region.sides.astype(float)
        sides[coarse] *= _on(self.length if is_global else self.local_length, length)
        fine = [axis for axis in range(3) if axis != coarse]
        sides[fine] = self._cut(sides[fine], self.area if is_global else self.local_area, tries)
        span = np.clip(np.rint(sides).astype(np.int64), 1, region.sides)
        start = _between(region.low, region.high - span, where)
        pose, posed = (None, None) if group.changed else (own, crop_size)
        return Place(group, span, start + span // 2, frame.volume, pose, posed)

    def _region(self, flat: NDArray[np.bool_], rng: np.random.Generator, frame: Frame) -> Box:
        """What the crops are shares of."""
        around = frame.around(rng)
        if self.region is None:
            low, high = frame.foreground
        else:
            sides = np.minimum(self.region, frame.shape)
            low = inside(around, sides, frame.volume)
            high = low + sides
        return Box(np.where(flat, around, low), np.where(flat, around + 1, high))

    def _cut(
        self, sides: NDArray[np.float64], area: Range, tries: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """Height and width of a share of a rectangle: the first try that fits into it.

        Where none does, the largest rectangle of an aspect that may be.
        """
        logs = (math.log(self.aspect[0]), math.log(self.aspect[1]))
        for share, aspect in tries:
            root = math.exp(_on(logs, aspect) / 2)
            found = math.sqrt(_on(area, share) * sides.prod()) * np.array([root, 1 / root])
            if (found <= sides).all():
                return found
        height, width = sides
        low, high = self.aspect
        return np.array([min(height, width * high), min(width, height / low)])


def coarse_axis(spacing: NDArray[np.float64], flat: NDArray[np.bool_]) -> int:
    """The axis left over by the two that are most alike in spacing, or a flat one; D if all are."""
    if flat.any():
        return int(flat.argmax())
    d, h, w = np.log(spacing)
    apart = np.abs([h - w, d - w, d - h])
    coarse = int(apart.argmin())
    return coarse if apart[0] > apart[coarse] + math.log(ALIKE) else 0


@dataclass(frozen=True)
class Bases(Crops):
    """Random crops within a grid of crops that tile a region (VoCo).

    Order: the random crops, then the bases in C order of the grid.

    The region is as large as the grid of crops and lies, as a crop of its size would, around a
    voxel of the foreground; where the volume is shorter it reaches beyond, on both sides. A random
    crop lies in the region and, along each axis that is no shorter than itself, in the volume.
    Boxes tile the region, and overlaps of a random crop with the bases sum to 1, unless
    `augment.scale` zooms them.

    Attributes:
        count: random crops of a sample.
        grid: bases along (D, H, W).
    """

    count: int = 2
    grid: Size = (1, 3, 3)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "grid", _checked_size("grid", self.grid))

    @property
    def main(self) -> int:
        """Random crops and bases."""
        d, h, w = self.grid
        return self.count + d * h * w

    def place(self, number: int, crop_size: Size, frame: Frame) -> Place:
        """A random crop, or a base."""
        rng, size = frame.shared(), np.array(crop_size)
        sides = size * np.array(self.grid)
        low = inside(frame.around(rng), sides, frame.volume)
        region = Box(low, low + sides)
        if number >= self.count:
            cell = np.array(np.unravel_index(number - self.count, self.grid))
            return self._at(low + cell * size, crop_size, region)
        # Beyond the volume a crop would be padding and tell nothing.
        room = Box(np.maximum(low, 0), np.minimum(region.high, frame.shape))
        first = inside(room.low, size, room)
        last = inside(room.high, size, room)
        start = _between(first, last, rng.random((self.count, 3))[number])
        return self._at(start, crop_size, region)


@dataclass(frozen=True)
class Slabs(Crops):
    """A crop in each of the slabs that the body axis is cut into, in two views (Chaitanya).

    Order: the slabs of the first view from feet to head, then those of the second.

    The foreground's extent along D is cut into equal slabs. The middle of a crop lies in its slab,
    anywhere, even where the crop then reaches beyond the volume, into what is not valid. In the
    plane it lies around the middle of the foreground, a quarter of its own side away at most, so
    that two views of a slab have half of each side in common, and within the volume.

    Attributes:
        count: slabs.
        aligned: whether both views show the same voxels, mirrored and turned alike, so that they
            differ in intensities only; otherwise each is placed for itself.
    """

    count: int = 4
    aligned: bool = False

    @property
    def main(self) -> int:
        """Each slab in two views."""
        return 2 * self.count

    def place(self, number: int, crop_size: Size, frame: Frame) -> Place:
        """A view of a slab."""
        view, slab = divmod(number, self.count)
        size = np.array(crop_size)
        draw = frame.shared().random((self.main, 3))[slab if self.aligned else number]
        middle, quarter = frame.foreground.low + frame.foreground.sides // 2, size // 4
        centre = _between(middle - quarter, middle + quarter, draw)
        start = inside(centre, size, frame.volume)
        start[0] = self._depth(slab, crop_size[0], draw[0], frame.foreground)
        # Along D nothing moves it out of its slab, in the plane nothing out of the volume.
        low, high = np.zeros(3, dtype=np.int64), frame.shape.copy()
        low[0], high[0] = start[0], start[0] + size[0]
        pose = slab if self.aligned and view else None
        return self._at(start, crop_size, Box(low, high))._replace(pose=pose)

    def _depth(self, slab: int, side: int, draw: float, foreground: Box) -> int:
        """First voxel along D of a crop whose middle lies in a slab."""
        low, extent = int(foreground.low[0]), int(foreground.sides[0])
        near, far = (low + n * extent / self.count - side / 2 for n in (slab, slab + 1))
        first, last = math.ceil(near), math.ceil(far) - 1
        if last < first:  # a slab between two voxels
            return round((near + far) / 2)
        return int(_between(np.array(first), np.array(last), np.array(draw)))


def _between(first: Voxel, last: Voxel, draw: NDArray[np.float64]) -> Voxel:
    """Whole numbers from first to last, both included, equally likely for a draw in [0, 1)."""
    return first + np.floor(draw * (last - first + 1)).astype(np.int64)


def _on(span: Range, draw: float) -> float:
    return span[0] + (span[1] - span[0]) * draw
