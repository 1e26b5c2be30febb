"""What crops make a sample: an objective declares them, the loader places them.

Crops of one shape form a group and come as one tensor, so that an encoder passes over all of them
at once. The first group is the main one, whose shape is `crop_size`; its crops are `Batch.image`.
Any further group is a batch of its own in `Batch.others`, under its name, with the same samples in
the same order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

Size = tuple[int, int, int]
Range = tuple[float, float]


class Group(NamedTuple):
    """Crops of one shape: how many of them a sample has, and their voxels."""

    name: str
    crops: int
    size: Size


@dataclass(frozen=True)
class Crops:
    """Crops anywhere in the foreground of a volume, each for itself."""

    count: int = 1

    def groups(self, crop_size: Size) -> list[Group]:
        """The groups of a sample, the main one, which has no name, first."""
        return [Group("", self.main, crop_size)]

    @property
    def main(self) -> int:
        """Crops of the main group."""
        return self.count


ONE = Crops()
"""One crop a sample."""


@dataclass(frozen=True)
class Pairs(Crops):
    """Places in a volume, and two views of each: crops that share a part of every side.

    Order: both views of the first place, both of the second, ...

    Attributes:
        count: places of a sample.
        overlap: least share of a side that the views of a place have in common.
    """

    overlap: float = 0.5

    @property
    def main(self) -> int:
        """Two views of each place."""
        return 2 * self.count


@dataclass(frozen=True)
class MultiCrop(Crops):
    """Two global and some local crops of one region, each of a size of its own (DINO).

    Main group: the two global crops; group `local`: the others; group `gram`, if asked for: both
    global crops again, on another grid and with unchanged intensities, mirrored as they are. Sizes
    are shares of the region: of its area in the two fine axes (H and W, or the two that are alike
    in spacing) with a drawn aspect, of its length along the third. Slices keep their one voxel.

    Attributes:
        count: global crops.
        local: local crops of a sample.
        local_size: voxels of a local crop.
        region: voxels of the region along (D, H, W), around a place in the foreground; None: the
            foreground's box.
        area: share of the area of a global crop, drawn from this range.
        length: share of the length of a global crop.
        local_area: as `area`, of a local crop.
        local_length: as `length`, of a local crop.
        aspect: height over width in the fine axes.
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

    def groups(self, crop_size: Size) -> list[Group]:
        """Global crops, then local ones, then the Gram teacher's."""
        found = [*super().groups(crop_size)]
        if self.local:
            found.append(Group("local", self.local, self.local_size))
        if self.gram_size is not None:
            found.append(Group("gram", self.count, self.gram_size))
        return found


@dataclass(frozen=True)
class Bases(Crops):
    """Random crops within a grid of crops that tile a region (VoCo).

    Order: the random crops, then the bases in C order of the grid.

    Attributes:
        count: random crops of a sample.
        grid: bases along (D, H, W).
    """

    count: int = 2
    grid: Size = (1, 3, 3)

    @property
    def main(self) -> int:
        """Random crops and bases."""
        d, h, w = self.grid
        return self.count + d * h * w


@dataclass(frozen=True)
class Slabs(Crops):
    """A crop in each of the slabs that the body axis is cut into, in two views (Chaitanya).

    Order: the slabs of the first view from feet to head, then those of the second.

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
