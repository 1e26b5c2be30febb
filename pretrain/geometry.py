"""Spacing, rotation and scale of a crop as one affine map, applied in one interpolation.

A worker knows the map before it reads, so it reads the box that the crop's voxels come from and no
more: most crops are not turned, and a box for the worst turn would be eleven times as large. Boxes
differ in size, so the device makes the moved crops one by one; each then depends on nothing but its
own box, whatever else is in the batch.

Ranges follow nnU-Net v2 (Isensee et al. 2021, Nature Methods 18, and its batchgeneratorsv2): a
rotation about all axes together, one scale for all axes. Unlike there, a rotation is rigid in
millimetres, so voxels that are longer than wide shear nothing.

Positions count voxels from the middle of the first one. The grid is that of the volume after the
resampling that its preprocessing asks for. C channels; D, H, W voxels of the crop, d, h, w of the
box.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from data_prep.preprocess import resampled_shape, smoothing, spacing_factors
from pretrain.draws import uniform
from pretrain.places import Size
from pretrain.settings import AugmentSettings

Triple = tuple[float, float, float]

ROTATION, SCALE = 80, 81
"""Streams of the draws."""

THIN = 3.0
"""From this ratio on an axis is too coarse or too short to be turned into; nnU-Net's threshold."""

TRUNCATE = 4.0
"""Sigmas after which scipy's Gaussian ends, and so the preprocessing's."""

# A weight below this is rounding: a position that is a voxel's own takes nothing from the next.
ROUNDING = 1e-3


class Grid(NamedTuple):
    """The grid of a resampled volume: `factors` volume voxels per grid voxel, and its shape."""

    factors: NDArray[np.float64]
    shape: NDArray[np.int64]
    spacing: NDArray[np.float64]

    @property
    def native(self) -> bool:
        """Whether it is the volume's own."""
        return bool((self.factors == 1).all())

    def voxel(self, voxel: NDArray[np.int64]) -> NDArray[np.int64]:
        """The grid's voxel that a voxel of the volume lies in."""
        inside = np.floor((voxel + 0.5) / self.factors).astype(np.int64)
        return np.minimum(inside, self.shape - 1)


class Move(NamedTuple):
    """How a crop is made of a box: its voxel o is the box at `matrix @ o + offset`.

    `field` holds per axis the first and last position within the volume; beyond it a crop is
    `fill`, one code per channel, and not valid. The box is smoothed with `sigma` voxels first.
    """

    matrix: tuple[Triple, Triple, Triple]
    offset: Triple
    field: tuple[tuple[float, float], ...]
    sigma: Triple
    size: Size
    fill: tuple[int, ...]


def grid_of(shape: Sequence[int], spacing: Sequence[float], wanted: Sequence[float] | None) -> Grid:
    """The grid of a volume once it is resampled to `wanted` mm; its own if that is None."""
    factors = np.ones(3) if wanted is None else spacing_factors(spacing, wanted)
    own = (factors == 1).all()
    return Grid(
        factors,
        np.array(shape if own else resampled_shape(shape, factors), dtype=np.int64),
        np.asarray(spacing, dtype=np.float64) * factors,
    )


def thin_axes(
    size: Sequence[int], spacing: Sequence[float] | NDArray[np.float64] = (1.0, 1.0, 1.0)
) -> tuple[bool, ...]:
    """Which axes of a crop are much shorter, or much coarser, than the others."""
    return tuple(
        max(size) / n > THIN or s / min(spacing) > THIN for n, s in zip(size, spacing, strict=True)
    )


def drawn_matrix(
    seed: int, chosen: AugmentSettings, size: Size, spacing: NDArray[np.float64]
) -> NDArray[np.float64] | None:
    """The rotation and scale of a crop: grid voxels per crop voxel [3, 3], or None for neither.

    A crop with a thin axis is turned about that axis alone, by any angle, and scaled across it
    alone, as nnU-Net does on slices. Columns are as long as the scale: above 1, things shrink.
    """
    if not (chosen.rotate or chosen.scale):
        return None
    seeds = torch.tensor([seed])
    thin = thin_axes(size, spacing)
    if sum(thin) > 1:
        return None
    happens, *turns = uniform(seeds, (4,), ROTATION)[0].tolist()
    rotation = np.eye(3)
    if happens < chosen.rotate:
        for axis, turn in enumerate(turns):
            degrees = (180.0 if thin[axis] else 0.0) if any(thin) else chosen.degrees
            rotation = rotation @ _about(axis, math.radians((2 * turn - 1) * degrees))
    happens, *zooms = uniform(seeds, (4,), SCALE)[0].tolist()
    scale = np.ones(3)
    if happens < chosen.scale:
        low, high = chosen.zoom
        scale = low + (high - low) * np.array(zooms if chosen.zoom_per_axis else zooms[:1] * 3)
        scale = np.where(thin, 1.0, scale)
    matrix = rotation * spacing / spacing[:, None] * scale
    return None if np.array_equal(matrix, np.eye(3)) else matrix


def zoomed(
    turn: NDArray[np.float64] | None, span: NDArray[np.int64], posed: Size, size: Size
) -> NDArray[np.float64] | None:
    """Grid voxels per crop voxel [3, 3] of a crop that covers `span`; None: as many.

    Args:
        turn: of `drawn_matrix`, of a crop of the size `posed` that covers the same.
        span: voxels of the grid.
        posed: see `turn`.
        size: of the crop.
    """
    if turn is None:
        return None if (span == size).all() else np.diag(span / np.array(size))
    return turn * (span / np.array(posed))[:, None] * (np.array(posed) / size)


def _about(axis: int, angle: float) -> NDArray[np.float64]:
    a, b = (i for i in range(3) if i != axis)
    turn = np.eye(3)
    turn[a, a] = turn[b, b] = math.cos(angle)
    turn[a, b], turn[b, a] = -math.sin(angle), math.sin(angle)
    return turn


def extent(size: Size, matrix: NDArray[np.float64] | None, grid: Grid) -> NDArray[np.float64]:
    """Sides of a crop in voxels of the grid, were it not turned."""
    if matrix is None:
        return np.array(size, dtype=np.float64)
    scale = np.linalg.norm(matrix * grid.spacing[:, None] / grid.spacing, axis=0)
    return np.array(size) * scale


def reach(size: Size, matrix: NDArray[np.float64] | None, grid: Grid) -> NDArray[np.int64]:
    """How many grid voxels a crop spans along each axis, were it not turned."""
    return np.ceil(extent(size, matrix, grid) - 1e-6).astype(np.int64)


def plan(
    start: NDArray[np.int64] | NDArray[np.float64],
    size: Size,
    matrix: NDArray[np.float64] | None,
    grid: Grid,
    shape: NDArray[np.int64],
    fill: Sequence[int],
    zoom: NDArray[np.float64] | float = 1.0,
) -> tuple[NDArray[np.int64], NDArray[np.int64], Move]:
    """The box of the volume that a crop comes from, and how the crop is made of it.

    Args:
        start: where the crop lies on the grid before it is turned, and zoomed, about its middle.
        size: of the crop.
        matrix: grid voxels per crop voxel [3, 3], or None: as many.
        grid: the volume's after resampling.
        shape: the volume's own.
        fill: what lies outside the volume, one code per channel.
        zoom: grid voxels per crop voxel that the crop's place asks for, part of the matrix: what
            shrinks by it is smoothed as a resampled volume is. Random scales are too small for it.

    Returns:
        First voxel of the box, its voxels along each axis, and the move.
    """
    turn = np.eye(3) if matrix is None else matrix
    last = np.array(size) - 1
    middle = last / 2
    f = grid.factors
    full = f[:, None] * turn
    offset = (start + middle - turn @ middle + 0.5) * f - 0.5
    low = offset + np.minimum(full * last, 0).sum(1)
    high = offset + np.maximum(full * last, 0).sum(1)
    sigma = smoothing(f * zoom)
    margin = np.array([_radius(s) for s in sigma])
    first = np.clip(np.floor(low).astype(np.int64) - margin, 0, shape - 1)
    stop = np.clip(np.ceil(high).astype(np.int64) + margin, first, shape - 1) + 1
    # What the resampling leaves over at the far end is not part of its result.
    ends = zip(-0.5 - first, grid.shape * f - 0.5 - first, strict=True)
    rows = [_floats(row) for row in full]
    move = Move(
        (rows[0], rows[1], rows[2]),
        _floats(offset - first),
        tuple((float(a), float(b)) for a, b in ends),
        _floats(sigma),
        size,
        tuple(int(code) for code in fill),
    )
    return first, stop - first, move


def _floats(values: NDArray[np.float64]) -> Triple:
    a, b, c = (float(value) for value in values)
    return a, b, c


def moved(
    image: Tensor, hidden: Tensor | None, label: Tensor | None, move: Move
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Makes a crop of its box: the image linearly, labels by the weight of their corners.

    Labels are those of the largest share among the eight voxels around a position, the higher
    value where shares are equal: what interpolating each label by itself would choose, for any
    number of them. The nearest voxel alone is wrong by half a voxel, always to the same side,
    where a spacing is halved: positions then lie between voxels.

    Args:
        image: codes [C, d, h, w].
        hidden: bool [1, d, h, w] or None, True where a voxel must not be looked at.
        label: [d, h, w] or None.
        move: of `plan`.

    Returns:
        Codes [C, D, H, W] float32, valid [1, D, H, W], labels [D, H, W] as they came.
    """
    position = _positions(move, image.device)
    inside = torch.ones(move.size, dtype=torch.bool, device=image.device)
    for at, (low, high) in zip(position, move.field, strict=True):
        inside &= (at >= low - ROUNDING) & (at <= high + ROUNDING)
    sampled = zip(_sampled(_smoothed(image, move), position), move.fill, strict=True)
    codes = torch.stack([torch.where(inside, channel, float(code)) for channel, code in sampled])
    valid = inside[None]
    if hidden is not None:
        valid = valid & (_sampled(_smoothed(hidden, move), position) < ROUNDING)
    if label is not None:
        label = torch.where(inside, _elected(label, position), 0)
    return codes, valid, label


def _smoothed(box: Tensor, move: Move) -> Tensor:
    """[C, d, h, w] as float32, without what a crop of larger voxels cannot show."""
    box = box.float()
    for axis, sigma in enumerate(move.sigma):
        if sigma:
            box = convolved(box, gaussian(sigma, _radius(sigma)), axis - 3)
    return box


def _positions(move: Move, device: torch.device) -> list[Tensor]:
    """Where each voxel of a crop lies in its box: three times [D, H, W]."""
    d, h, w = (torch.arange(n, device=device, dtype=torch.float32) for n in move.size)
    return [
        start + a * d[:, None, None] + b * h[:, None] + c * w
        for (a, b, c), start in zip(move.matrix, move.offset, strict=True)
    ]


def _sampled(box: Tensor, position: list[Tensor]) -> Tensor:
    """[C, d, h, w] at positions, linearly; beyond the box as at its border."""
    # grid_sample counts w, h, d, from -1 to 1 between the outer faces.
    sides = zip(reversed(position), reversed(box.shape[1:]), strict=True)
    at = torch.stack([(2 * p + 1) / n - 1 for p, n in sides], -1)
    return F.grid_sample(box[None], at[None], padding_mode="border", align_corners=False)[0]


def _elected(label: Tensor, position: list[Tensor]) -> Tensor:
    """The label with the largest share of each position's eight corners; the higher of equals."""
    below, above, share = [], [], []
    for p, n in zip(position, label.shape, strict=True):
        p = p.clamp(0, n - 1)
        low = p.floor()
        part = p - low
        # Rounding must not take a side where two shares are equal.
        share.append((part / ROUNDING).round() * ROUNDING)
        below.append(low.long())
        above.append((low.long() + 1).clamp(max=n - 1))
    _, h, w = label.shape
    flat = label.reshape(-1)
    votes, weights = [], []
    for corner in itertools.product((0, 1), repeat=3):
        d_, h_, w_ = ((above if up else below)[a] for a, up in enumerate(corner))
        votes.append(flat[(d_ * h + h_) * w + w_])
        parts = [share[a] if up else 1 - share[a] for a, up in enumerate(corner)]
        weights.append(parts[0] * parts[1] * parts[2])
    totals = list(weights)
    for a, b in itertools.combinations(range(8), 2):
        same = (votes[a] == votes[b]).to(weights[a])
        totals[a] = torch.addcmul(totals[a], same, weights[b])
        totals[b] = torch.addcmul(totals[b], same, weights[a])
    best, most = votes[0], totals[0]
    for vote, total in zip(votes[1:], totals[1:], strict=True):
        equal = (total - most).abs() < ROUNDING**2
        better = torch.where(equal, vote > best, total > most)
        best, most = torch.where(better, vote, best), torch.where(better, total, most)
    return best


def gaussian(sigma: float, radius: int) -> list[float]:
    """Weights of a Gaussian at whole voxels from -radius to radius; their sum is 1."""
    weights = [math.exp(-0.5 * (x / sigma) ** 2) for x in range(-radius, radius + 1)]
    return [weight / sum(weights) for weight in weights]


def _radius(sigma: float) -> int:
    return int(TRUNCATE * sigma + 0.5)


def convolved(image: Tensor, kernel: Sequence[float], axis: int) -> Tensor:
    """Convolves along one axis; beyond the ends lies the outermost voxel again.

    A sum of shifted images: no mixed precision touches it, and it costs less than a convolution
    of one channel does.
    """
    radius, n = len(kernel) // 2, image.shape[axis]
    index = torch.arange(-radius, n + radius, device=image.device).clamp(0, n - 1)
    wide = image.index_select(axis, index)
    out = torch.zeros_like(image)
    for shift, weight in enumerate(kernel):
        out = out.add(wide.narrow(axis, shift, n), alpha=weight)
    return out
