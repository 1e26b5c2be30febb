"""Where a crop lies: what a layout knows of a volume, and what it says of one of its crops.

Positions and sides are whole voxels of the grid that a volume has after resampling, along D, H, W.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Size = tuple[int, int, int]
Voxel = NDArray[np.int64]
"""Three whole numbers: a voxel of the grid, or sides of a box."""


class Box(NamedTuple):
    """First voxel, and the one beyond the last."""

    low: Voxel
    high: Voxel

    @property
    def sides(self) -> Voxel:
        """Voxels along each axis."""
        return self.high - self.low


class Frame(NamedTuple):
    """What the places of a sample's crops may depend on.

    `centre` is a voxel of the foreground that belongs to the one crop that is asked about. What
    crops share comes from `shared()`, a fresh generator that is the same for all of a sample, and
    from `around(rng)`, another voxel of the foreground. `foreground` is its box, in the volume.
    """

    shape: Voxel
    spacing: NDArray[np.float64]
    foreground: Box
    centre: Voxel
    shared: Callable[[], np.random.Generator]
    around: Callable[[np.random.Generator], Voxel]

    @property
    def volume(self) -> Box:
        """All of the grid."""
        return Box(np.zeros(3, dtype=np.int64), self.shape)


class Group(NamedTuple):
    """Crops of one shape: how many of them a sample has, their voxels, and what is done to them.

    The size of a group other than the main one is the objective's argument `NAME_size`. `changed`:
    whether intensities are changed at random.
    """

    name: str
    crops: int
    size: Size
    changed: bool = True


class Place(NamedTuple):
    """Where one crop lies.

    Attributes:
        group: that the crop belongs to; its size is that of the crop as it is delivered.
        span: voxels of the grid that it covers; the crop is zoomed where they are not its size.
        centre: the middle voxel of what it covers, the second of the two of an even side.
        within: the crop, with what augmentation adds to its span, is moved into this box.
        pose: number of the crop whose seed says how it is mirrored and turned; None: its own.
        posed: size of that crop.
    """

    group: Group
    span: Voxel
    centre: Voxel
    within: Box
    pose: int | None = None
    posed: Size | None = None


def inside(centre: Voxel, sides: Voxel, within: Box) -> Voxel:
    """First voxel of the box of these sides around a voxel, moved so that it leaves nothing.

    Where `within` is shorter than the box, it lies in the middle, the far end getting the odd
    voxel of the gap, as inference does.
    """
    room = within.sides - sides
    last = within.low + np.maximum(room, 0)
    moved = np.clip(centre - sides // 2, within.low, last)
    return np.where(room >= 0, moved, within.low - (-room // 2))
