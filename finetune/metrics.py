"""Scores of one class in one case: Dice, surface Dice and HD95, with every edge case decided.

The surface of a mask is made of surfels: the mask's corner-to-corner cells of 2x2x2 voxels that
hold both inside and outside, each weighted with the area in mm² that the surface has in it
(marching cubes with vertices in the middle of edges: Lorensen and Cline, SIGGRAPH 1987). Surface
Dice at a tolerance is after Nikolov et al. 2018, arXiv:1809.04430; the 95th percentile of the
surface distances (HD95) is area-weighted too. Voxel counting, which others use, makes both depend
on how a surface lies in the grid.

What happens with empty masks decides whether missing an organ is punished (metric version 1):

| truth | prediction | status | dsc | nsd | hd95 |
| --- | --- | --- | --- | --- | --- |
| present | present | scored | computed | computed | computed |
| absent | absent | true_negative | NaN | NaN | NaN |
| absent | present | false_positive | 0 | 0 | image diagonal |
| present | absent | missed | 0 | 0 | image diagonal |
| not annotated | any | not_annotated | NaN | NaN | NaN |

NaN means "not averaged". Axes are [D, H, W], spacing is (d, h, w) in mm.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

METRIC_VERSION = 1
STATUSES = ("scored", "true_negative", "missed", "false_positive", "not_annotated")

Mask = NDArray[np.bool_]
Floats = NDArray[np.float64]
Spacing = Sequence[float]

# Corner i of a cell stands at this (d, h, w) and owns bit i of the cell's code.
_CORNERS = np.array(list(itertools.product((0, 1), repeat=3)))


@dataclass(frozen=True)
class Score:
    """One class in one case. Volumes in ml, hd95 in mm, dsc and nsd from 0 to 1."""

    status: str
    dsc: float
    nsd: float
    hd95: float
    volume_pred_ml: float
    volume_true_ml: float


@dataclass(frozen=True)
class Surface:
    """Surfels of a mask: positions [N, 3] in mm and areas [N] in mm²."""

    points: Floats
    areas: Floats


def score_class(
    prediction: Mask,
    truth: Mask,
    spacing: Spacing,
    tolerance_mm: float,
    annotated: bool = True,
) -> Score:
    """Scores one class in one case by the table at the top of this module.

    Args:
        prediction: [D, H, W].
        truth: [D, H, W].
        spacing: (d, h, w) in mm.
        tolerance_mm: distance below which surface Dice counts a surfel as right.
        annotated: False if the class was not looked for in this case; absence then means nothing.

    Raises:
        ValueError: the masks differ in shape or are not three-dimensional.
    """
    if prediction.shape != truth.shape or truth.ndim != 3:
        raise ValueError(
            f"prediction {prediction.shape} and truth {truth.shape} must be the same [D, H, W]"
        )
    n_pred, n_true = int(np.count_nonzero(prediction)), int(np.count_nonzero(truth))
    spacing = tuple(float(s) for s in spacing)
    voxel_ml = math.prod(spacing) / 1000
    volumes = (n_pred * voxel_ml, n_true * voxel_ml)
    if not annotated:
        return Score("not_annotated", math.nan, math.nan, math.nan, volumes[0], math.nan)
    if n_pred == 0 and n_true == 0:
        return Score("true_negative", math.nan, math.nan, math.nan, *volumes)
    if n_pred == 0 or n_true == 0:
        worst = math.dist([0, 0, 0], [n * s for n, s in zip(truth.shape, spacing, strict=True)])
        return Score("missed" if n_true else "false_positive", 0.0, 0.0, worst, *volumes)
    box = _union_box(prediction, truth)
    prediction, truth = prediction[box], truth[box]
    a, b = surface(prediction, spacing), surface(truth, spacing)
    to_truth, to_pred = distances(a, b), distances(b, a)
    # Headers hold spacings as float32: 0.8 mm arrives as 0.80000001, and is still within 0.8 mm.
    limit = tolerance_mm + 1e-5
    within = a.areas[to_truth <= limit].sum() + b.areas[to_pred <= limit].sum()
    return Score(
        "scored",
        2 * int(np.count_nonzero(prediction & truth)) / (n_pred + n_true),
        float(within / (a.areas.sum() + b.areas.sum())),
        max(_percentile(to_truth, a.areas, 0.95), _percentile(to_pred, b.areas, 0.95)),
        *volumes,
    )


def surface(mask: Mask, spacing: Spacing) -> Surface:
    """Returns the surfels of a mask; what lies beyond its edges counts as outside.

    Args:
        mask: [D, H, W], bool.
        spacing: (d, h, w) in mm.
    """
    inside = np.pad(mask, 1).view(np.uint8)
    codes = np.zeros([n - 1 for n in inside.shape], np.uint8)
    for bit, (d, h, w) in enumerate(_CORNERS):
        d_end, h_end, w_end = (n + c for n, c in zip(codes.shape, (d, h, w), strict=True))
        codes |= inside[d:d_end, h:h_end, w:w_end] << bit
    # 0 is all outside and 255 all inside; uint8 wraps 255 + 1 to 0, so one comparison finds both.
    cells = np.nonzero(codes + np.uint8(1) > 1)
    points = np.stack(cells, axis=1).astype(np.float64) * np.asarray(spacing)
    return Surface(points, _areas(tuple(float(s) for s in spacing))[codes[cells]])


def distances(a: Surface, b: Surface) -> Floats:
    """Returns [N], for each surfel of `a` the distance in mm to the nearest surfel of `b`."""
    # Sliding midpoints suit points on a lattice better than median splits, which tie all the time.
    tree = cKDTree(b.points, balanced_tree=False, compact_nodes=False)
    return np.asarray(tree.query(a.points)[0], np.float64)


def _percentile(values: Floats, weights: Floats, fraction: float) -> float:
    """The smallest value that at least `fraction` of the weight does not exceed."""
    order = np.argsort(values)
    share = np.cumsum(weights[order]) / weights.sum()
    return float(values[order][min(int(np.searchsorted(share, fraction)), len(values) - 1)])


def _union_box(a: Mask, b: Mask) -> tuple[slice, ...]:
    """The smallest box that holds both masks."""
    box = []
    for axis in range(3):
        others = tuple(i for i in range(3) if i != axis)
        used = np.flatnonzero(a.any(axis=others) | b.any(axis=others))
        box.append(slice(int(used[0]), int(used[-1]) + 1))
    return tuple(box)


@lru_cache(maxsize=64)
def _areas(spacing: tuple[float, float, float]) -> Floats:
    """Surface area in mm² within a cell, for each of the 256 codes."""
    areas = np.zeros(256)
    for code in range(256):
        for loop in _loops(code):
            points = np.array(loop) * spacing
            centre = points.mean(axis=0)  # a fan around the centre keeps mirror symmetry
            fan = np.cross(points - centre, np.roll(points, -1, axis=0) - centre)
            areas[code] += np.linalg.norm(fan, axis=1).sum() / 2
    return areas


def _loops(code: int) -> list[list[tuple[float, ...]]]:
    """The closed polygons that part inside from outside corners of a cell.

    On each face the middles of the edges that change side are joined; where all four do, each
    inside corner is cut off by itself. Joining the pieces over the faces closes the loops.
    """
    inside = [bool(code >> i & 1) for i in range(8)]
    joined: dict[tuple[float, ...], list[tuple[float, ...]]] = {}
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
