"""Surfaces of masks, and exact distances between them.

The surface of a mask is made of surfels: the mask's corner-to-corner cells of 2x2x2 voxels that
hold both inside and outside, each weighted with the area in mm² that the surface has in it
(marching cubes with vertices in the middle of edges: Lorensen and Cline, SIGGRAPH 1987; surfels
and their areas as in Nikolov et al. 2018, arXiv:1809.04430). Voxel counting, which others use,
makes scores depend on how a surface lies in the grid.

In an image of one slice a mask has no top and no bottom: its surface is its contour, whose cells
are 2x2 pixels, each weighted with the length in mm that the contour has in it. That is the wall of
a solid with this slice everywhere, per mm of its height, so one table gives both.

Surfels of both masks stand on one lattice, that of voxel corners, so most distances need no search
structure: a prediction worth scoring lies within a few voxels of the truth, and the nearest surfel
is found by trying the lattice's smallest steps in order of length. What is farther away asks a
k-d tree, and where that is a lot, as after a network that learned nothing, an exact distance
transform. On an organ of 140,000 surfels in a box of 4.8 million voxels the steps took 8 ms, the
tree alone 130 ms and the transform 550 ms; for 2 million surfels of noise far from an organ the
tree takes five times as long as the transform. All give the same.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial import cKDTree

Mask = NDArray[np.bool_]
Floats = NDArray[np.float64]
Cells = NDArray[np.int64]
Spacing = tuple[float, ...]
Point = tuple[float, ...]
Loop = list[Point]

STEPS = 250
"""At most as many lattice steps are tried before anything else."""

TREE = 32
"""Asking the tree for one surfel costs as much as a distance transform of so many cells."""

# Corner i of a cell stands at this (d, h, w) and owns bit i of the cell's code.
_CORNERS = np.array(list(itertools.product((0, 1), repeat=3)))


@dataclass(frozen=True)
class Surface:
    """Surfels of a mask: flat indices [N] into a lattice of cells, and areas [N] in mm².

    Of a slice they are pieces of the contour, with lengths in mm. `lattice` [D, H, W] or [H, W] is
    True where a surfel is; around the mask it has a margin as wide as the longest step along each
    axis.
    """

    cells: Cells
    areas: Floats
    lattice: Mask
    spacing: Spacing

    def index(self, chosen: slice | Cells = slice(None)) -> Cells:
        """Positions [N, 3 or 2] of surfels on the lattice."""
        return np.stack(np.unravel_index(self.cells[chosen], self.lattice.shape), axis=1)


def surface(mask: Mask, spacing: Sequence[float]) -> Surface:
    """Returns the surfels of a mask; what lies beyond its edges counts as outside.

    Args:
        mask: [D, H, W], bool; or [H, W], the whole of a slice of any direction.
        spacing: (d, h, w) in mm, or that of the slice's axes.
    """
    spacing = tuple(float(s) for s in spacing)
    codes: NDArray[Any] = np.pad(mask, [(n + 1, n + 1) for n in _steps(spacing).reach]).view(
        np.uint8
    )
    codes = codes[..., :-1] | codes[..., 1:] << 1
    codes = codes[..., :-1, :] | codes[..., 1:, :] << 2
    # Above a slice comes the same slice.
    codes = codes[:-1] | codes[1:] << 4 if mask.ndim == 3 else codes | codes << 4
    # 0 is all outside and 255 all inside; uint8 wraps 255 + 1 to 0, so one comparison finds both.
    lattice = codes + np.uint8(1) > 1
    cells = np.flatnonzero(lattice)
    return Surface(cells, _areas((1.0, *spacing)[-3:])[codes.ravel()[cells]], lattice, spacing)


def distances(a: Surface, b: Surface) -> Floats:
    """Returns [N], for each surfel of `a` the distance in mm to the nearest surfel of `b`.

    Args:
        a: of a mask of the same shape and spacing as that of `b`.
        b: has at least one surfel.
    """
    steps = _steps(a.spacing)
    there = b.lattice.ravel()
    found = np.empty(len(a.cells))
    left, cells = np.arange(len(a.cells)), a.cells
    strides = np.array([math.prod(b.lattice.shape[axis + 1 :]) for axis in range(len(a.spacing))])
    for step, length in zip(steps.moves @ strides, steps.lengths, strict=True):
        hit = there[cells + step]
        if hit.any():
            found[left[hit]] = length
            left, cells = left[~hit], cells[~hit]
            if not len(left):
                return found
    spacing, start = np.asarray(a.spacing), a.index(left)
    if len(left) * TREE > there.size:
        goals = ndimage.distance_transform_edt(
            ~b.lattice, spacing, return_distances=False, return_indices=True
        )
        nearest = goals.reshape(len(spacing), -1)[:, cells].T
    else:
        goals = b.index()
        # Sliding midpoints suit points on a lattice better than median splits, which tie always.
        tree = cKDTree(goals * spacing, balanced_tree=False, compact_nodes=False)
        nearest = goals[tree.query(start * spacing)[1]]
    found[left] = np.sqrt((((start - nearest) * spacing) ** 2).sum(1))
    return found


@dataclass(frozen=True)
class _Steps:
    """All lattice moves [K, 3 or 2] up to some length, shortest first, and their lengths [K] in mm.

    `reach` is how far, axis by axis, the longest go along each axis.
    """

    moves: Cells
    lengths: Floats
    reach: NDArray[np.int64]


@lru_cache(maxsize=64)
def _steps(spacing: Spacing) -> _Steps:
    count, ball = len(spacing), {2: math.pi, 3: 4 / 3 * math.pi}
    radius = (STEPS * math.prod(spacing) / ball[count]) ** (1 / count)
    axes = [np.arange(-n, n + 1) for n in np.floor(radius / np.asarray(spacing)).astype(np.int64)]
    moves = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, count)
    lengths = np.sqrt(((moves * np.asarray(spacing)) ** 2).sum(1))
    # Beyond the radius the box of candidates has gaps, and a nearer surfel could be passed over.
    order = np.argsort(lengths, kind="stable")
    order = order[lengths[order] <= radius][:STEPS]
    return _Steps(moves[order], lengths[order], np.abs(moves[order]).max(0))


@lru_cache(maxsize=64)
def _areas(spacing: Spacing) -> Floats:
    """Surface area in mm² within a cell, for each of the 256 codes."""
    # A mask and its complement have the same surface.
    few = [code if code.bit_count() <= 4 else 255 - code for code in range(256)]
    return np.array([_area(_triangles(code), spacing) for code in few])


def _area(triangles: Sequence[Loop], spacing: Spacing) -> float:
    if not triangles:
        return 0.0
    corners = np.asarray(triangles) * spacing  # [N, 3, 3]
    sides = corners[:, 1:] - corners[:, :1]
    return float(np.linalg.norm(np.cross(sides[:, 0], sides[:, 1]), axis=1).sum() / 2)


@lru_cache(maxsize=256)
def _triangles(code: int) -> list[Loop]:
    """The triangles of a cell's surface.

    A polygon that is not flat can be cut in several ways. Marching cubes' own is that of the
    largest area in a cubic cell.
    """
    cube = (1.0, 1.0, 1.0)
    best = [max(_cuts(loop), key=lambda cut: _area(cut, cube)) for loop in _loops(code)]
    return [triangle for cut in best for triangle in cut]


def _cuts(loop: Loop) -> Iterator[list[Loop]]:
    """Every way to cut a polygon into triangles."""
    if len(loop) < 3:
        yield []
        return
    for third in range(1, len(loop) - 1):
        for before, after in itertools.product(_cuts(loop[: third + 1]), _cuts(loop[third:])):
            yield [*before, [loop[0], loop[third], loop[-1]], *after]


def _loops(code: int) -> list[Loop]:
    """The closed polygons that part inside from outside corners of a cell.

    On each face the middles of the edges that change side are joined; where all four do, each
    inside corner is cut off by itself. Joining the pieces over the faces closes the loops.
    """
    inside = [bool(code >> i & 1) for i in range(8)]
    joined: dict[Point, list[Point]] = {}
    for axis, side in itertools.product(range(3), (0, 1)):
        face = [i for i in range(8) if _CORNERS[i][axis] == side]
        ring = [face[0], face[1], face[3], face[2]]  # neighbours in the ring share an edge
        middle = [
            tuple((_CORNERS[p] + _CORNERS[q]) / 2) if inside[p] != inside[q] else None
            for p, q in zip(ring, ring[1:] + ring[:1], strict=True)
        ]
        present = [m for m in middle if m is not None]
        if len(present) == 2:
            pairs = [(present[0], present[1])]
        elif len(present) == 4:
            # middle[i - 1] and middle[i] are the two edges at corner ring[i]
            pairs = [(present[i - 1], present[i]) for i in range(4) if inside[ring[i]]]
        else:
            pairs = []
        for p, q in pairs:
            joined.setdefault(p, []).append(q)
            joined.setdefault(q, []).append(p)
    loops = []
    while joined:
        loop = [next(iter(joined))]
        while True:
            onward = [q for q in joined.pop(loop[-1]) if q in joined]
            if not onward:
                break
            loop.append(onward[0])
        loops.append(loop)
    return loops
