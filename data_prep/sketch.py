"""A sketch of a scan: finds it again after it was resampled, cropped, turned, windowed or resaved.

At places that a scan itself singles out (extrema of a difference of Gaussians, in 3D, as in SIFT:
Lowe 2004) the neighbourhood is told by 144 comparisons of smoothed values (as in BRIEF: Calonder et
al. 2010). Everything is measured in millimetres on grids of 1, 2, 4 and 8 mm, so another voxel size
changes little, and compares ranks of values, so another scale or window does neither. Cropping
takes places away and leaves the others as they are. The points that are compared are closed under
all 48 turns and mirrorings of a cube: a copy whose header tells other axes has the same features
with their bits in another order.

A sketch holds no places and its features are sorted, so nothing says which neighbourhood lay where:
it is a bag of blurred spots, and no image can be put together from it. Two scans are
near-duplicates if `NEAR` of the features of the smaller one are found in the other.
"""

from __future__ import annotations

import base64
import itertools
import struct
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain, islice

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage, sparse

from data_prep.volume import Volume

PREFIX = "local-bits-1:"
"""What the text of a sketch begins with; another version is never compared with this one."""

GRIDS = (1.0, 2.0, 4.0, 8.0)
"""Millimetres between the points of the grids that features are looked for on."""

NEAR = 0.18
"""Share of features from which on two scans are one; see docs/decisions/0036."""

FEWEST = 16
"""With fewer features on every grid a scan is too small, or too empty, to be compared."""

MOST = 128
"""Features kept of each grid, those of the highest contrast."""

# A grid is left out where it would have more points than this, voxels that are much coarser, or
# fewer points along an axis than two neighbourhoods need.
_POINTS = 2_500_000
_COARSER = 2.0
_REACH = 6
_SHORTEST = 2 * _REACH + 5
# Smoothing in grid units: of what is sampled (in all), of nearer points, and of farther ones.
_SAMPLED, _FINE, _COARSE, _WIDE = 0.8, 0.6, 1.4, 2.4
_CONTRAST = 0.01
_LEVELS = 1024
# Features are the same if no more bits differ, drawn by lot half of all would, and all others of
# both scans differ in twice as many (Lowe's ratio).
_BITS = 144
_SAME = 8
_CLEARLY = 0.5
# The least that a share is of: of few features a few are found anywhere, in one of 48 turns.
_FLOOR = 36
# CT is told twice: as it is, and as most who publish images window it.
_SOFT_TISSUE = (-160.0, 240.0)
# Parts of a feature that the index looks up; where 6 bits differ one of 4 is mostly untouched.
_WORDS = 4
_CANDIDATES = 32
# A part that more scans have than this tells nothing and costs the most: of the parts of a head
# 1 in 100 is in half of all others, and 7 in 10 are in none of 50 others.
_COMMON = 256

TOGETHER = 256
"""Sketches that are best looked up at once."""

Bits = NDArray[np.uint8]
"""Features `[N, 18]`, eight comparisons a byte, in ascending order."""


@dataclass(frozen=True)
class Sketch:
    """Features of a scan: of each channel and window, on each grid that suits its size."""

    sets: tuple[tuple[float, Bits], ...]

    @property
    def is_comparable(self) -> bool:
        """Whether there is enough of it to be found again."""
        return any(len(bits) >= FEWEST for _, bits in self.sets)

    def to_bytes(self) -> bytes:
        """A compact form: per set grid, count and features."""
        parts = [struct.pack("<fH", grid, len(bits)) + bits.tobytes() for grid, bits in self.sets]
        return b"".join(parts)

    def to_text(self) -> str:
        """One word beside the fingerprints of a release."""
        return PREFIX + base64.b64encode(self.to_bytes()).decode()

    @classmethod
    def from_text(cls, text: str) -> Sketch:
        """The inverse of `to_text`; ValueError if the word is something else."""
        return cls.from_bytes(base64.b64decode(text.removeprefix(PREFIX), validate=True))

    @classmethod
    def from_bytes(cls, data: bytes) -> Sketch:
        """The inverse of `to_bytes`; ValueError if the bytes are something else."""
        sets, at = [], 0
        while at < len(data):
            if len(data) - at < 6:
                raise ValueError("a sketch ends in the middle of a set")
            grid, count = struct.unpack_from("<fH", data, at)
            size = count * _BITS // 8
            at += 6
            if grid not in GRIDS or len(data) - at < size:
                raise ValueError("these bytes are no sketch")
            bits = np.frombuffer(data, np.uint8, size, at).reshape(count, -1)
            sets.append((grid, bits))
            at += size
        return cls(tuple(sets))


def sketch(volume: Volume) -> Sketch:
    """The sketch of a scan, whole and on its native grid.

    Args:
        volume: Codes or values on canonical axes.
    """
    sets = []
    for c, modality in enumerate(volume.modality):
        slope, intercept = volume.slope[c], volume.intercept[c]
        windows = (None, _SOFT_TISSUE) if modality == "CT" else (None,)
        for grid in _grids(volume.array.shape[1:], volume.spacing):
            for window in windows:
                clip = window and sorted((end - intercept) / slope for end in window)
                sampled = _sampled(volume.array[c], volume.spacing, grid, clip, slope < 0)
                bits = _features(sampled)
                if len(bits):
                    sets.append((grid, bits))
    return Sketch(tuple(sets))


def similarity(one: Sketch, other: Sketch, turns: Collection[int] = range(48)) -> float:
    """The largest share of features that two scans have in common, on any grid that both have.

    Args:
        one: A sketch.
        other: Another.
        turns: Ways to turn and mirror the first that are looked at; 0 leaves it as it is.
    """
    best = 0.0
    for grid, a in one.sets:
        for same, b in other.sets:
            if grid == same and min(len(a), len(b)) >= FEWEST:
                best = max(best, *(_share(a, b, turn) for turn in turns))
    return best


class SketchIndex:
    """Sketches to be searched: candidates by parts of features that are equal, then `similarity`.

    Args:
        sketches: Numbered in their order.
    """

    def __init__(self, sketches: Iterable[Sketch]) -> None:
        self.sketches = list(sketches)
        # Hash above, owner below: one sort, and no second array.
        table = np.empty(
            _WORDS * sum(len(bits) for one in self.sketches for _, bits in one.sets), np.uint64
        )
        end = 0
        for n, some in enumerate(batched(self.sketches, TOGETHER)):
            words = _Features(some, n * TOGETHER).words()
            table[end : end + len(words)] = words
            end += len(words)
        table.sort()
        self._owners = table.astype(np.uint32)  # the lower half
        table >>= np.uint64(32)
        words = table.astype(np.uint32)
        del table  # the largest by far, of a large corpus: no more is held beside it than that
        first = np.ones(len(words), dtype=np.bool_)
        np.not_equal(words[1:], words[:-1], out=first[1:])
        self._words = words[first]
        # Where the owners of each begin, and the end of all.
        ends = np.flatnonzero(np.append(first, True))
        self._starts = ends.astype(np.min_scalar_type(len(words)))

    def find(self, wanted: Sketch, least: float = NEAR) -> list[tuple[int, float]]:
        """Numbers of near-duplicates with their similarity, the most similar first."""
        return next(self.find_all([wanted], least))

    def find_all(
        self,
        wanted: Sequence[Sketch],
        least: float = NEAR,
        among: Callable[[int, int], bool] = lambda one, other: True,
    ) -> Iterator[list[tuple[int, float]]]:
        """As `find` for each of many sketches, some hundred of which are looked up together.

        Their words are sorted, so the table is walked through and not jumped about in: many times
        as fast as one by one where the table is larger than the caches.

        Args:
            wanted: Sketches.
            least: The least similarity.
            among: Whether for the sketch of one number in `wanted` another of the index counts;
                asked when it is that one's turn. Of those that count the best are compared.
        """
        places = chain.from_iterable(map(self.candidates, batched(wanted, TOGETHER)))
        for one, (look, found) in enumerate(zip(wanted, places, strict=True)):
            best = islice((place for place in found if among(one, place[0])), _CANDIDATES)
            alike = [(n, similarity(look, self.sketches[n], {0, turn})) for n, turn in best]
            near = [pair for pair in alike if pair[1] >= least]
            yield sorted(near, key=lambda pair: (-pair[1], pair[0]))

    def candidates(self, wanted: Sequence[Sketch]) -> Iterator[list[tuple[int, int]]]:
        """Of each, those with two parts of features in common or more, and the turn; best first."""
        pairs, votes, turns = (np.zeros(0, dtype=np.int64) for _ in range(3))
        size = max(1, len(self.sketches))
        features = _Features(wanted)
        for turn in range(len(_turns()[0])):
            words = np.unique(features.words(turn))
            sought = (words >> np.uint64(32)).astype(np.uint32)
            place = np.searchsorted(self._words, sought)
            place[place == len(self._words)] = 0
            told = self._words[place] == sought if len(self._words) else place < 0
            place, number = place[told], (words[told] & np.uint64(2**32 - 1)).astype(np.int64)
            first = self._starts[place].astype(np.int64)
            counts = self._starts[place + 1] - first
            rare = counts <= _COMMON
            first, counts, number = first[rare], counts[rare], number[rare]
            owners = self._owners[_ranges(first, first + counts)]
            both, counts = np.unique(np.repeat(number, counts) * size + owners, return_counts=True)
            enough = counts >= 2
            pairs = np.concatenate([pairs, both[enough]])
            votes = np.concatenate([votes, counts[enough]])
            turns = np.concatenate([turns, np.full(int(enough.sum()), turn)])
        # Of each pair the turn with the most votes, the first of them.
        order = np.lexsort((turns, -votes, pairs))
        pairs, votes, turns = pairs[order], votes[order], turns[order]
        best = np.ones(len(pairs), dtype=np.bool_)
        best[1:] = pairs[1:] != pairs[:-1]
        pairs, votes, turns = pairs[best], votes[best], turns[best]
        order = np.lexsort((pairs, -votes, pairs // size))
        queries, owners = np.divmod(pairs[order], size)
        turns = turns[order]
        ends = np.searchsorted(queries, np.arange(len(wanted) + 1))
        for first, last in itertools.pairwise(ends):  # they are many: as tuples one by one
            yield list(zip(owners[first:last].tolist(), turns[first:last].tolist(), strict=True))


# Sampling.


def _grids(shape: Sequence[int], spacing: Sequence[float]) -> list[float]:
    extent = np.array(shape) * np.array(spacing)
    return [
        grid
        for grid in GRIDS
        if np.prod(extent / grid) <= _POINTS
        and max(spacing) <= _COARSER * grid
        and (extent / grid).min() >= _SHORTEST
    ]


def _sampled(
    array: np.ndarray,
    spacing: Sequence[float],
    grid: float,
    clip: Sequence[float] | None,
    negative: bool,
) -> NDArray[np.float32]:
    """The array `[D, H, W]` blurred to one sharpness, whatever its voxels, at points of a grid.

    Axis by axis by sparse matrices, which give the same bits whatever the number of threads.
    """
    columns = array.reshape(array.shape[0], -1)
    along = _blur(array.shape[0], spacing[0], grid)
    out = np.empty((along.shape[0], columns.shape[1]), dtype=np.float32)
    step = max(64, 2**18 // array.shape[0])
    for start in range(0, columns.shape[1], step):  # no second copy of a large scan
        block = columns[:, start : start + step].astype(np.float32)
        if clip:
            np.clip(block, *clip, out=block)
        out[:, start : start + step] = along @ block
    if negative:
        np.negative(out, out=out)
    sampled = out.reshape(-1, *array.shape[1:])
    for axis in (1, 2):
        moved = np.moveaxis(sampled, axis, 0)
        flat = np.ascontiguousarray(moved).reshape(moved.shape[0], -1)
        blurred = _blur(array.shape[axis], spacing[axis], grid) @ flat
        sampled = np.moveaxis(blurred.reshape(-1, *moved.shape[1:]), 0, axis)
    return np.ascontiguousarray(sampled, dtype=np.float32)


def _blur(count: int, spacing: float, grid: float) -> sparse.csr_array:
    """Gaussian weights `[points, voxels]` that make up for what the voxels have blurred already."""
    points = max(1, int((count - 1) * spacing / grid) + 1)
    first = ((count - 1) * spacing - (points - 1) * grid) / 2
    sigma = max((_SAMPLED * grid) ** 2 - spacing**2 / 12, (0.35 * spacing) ** 2) ** 0.5
    apart = first + np.arange(points)[:, None] * grid - np.arange(count)[None] * spacing
    weights = np.where(np.abs(apart) <= 4 * sigma + spacing, np.exp(-0.5 * (apart / sigma) ** 2), 0)
    weights /= weights.sum(axis=1, keepdims=True)
    return sparse.csr_array(weights.astype(np.float32))


def _equalised(sampled: NDArray[np.float32]) -> NDArray[np.float32] | None:
    """Values as their share of all edges below them, 0 to 1: the same for any scale and window."""
    low, high = np.percentile(sampled, [0.1, 99.9])
    if high <= low:
        return None
    slopes = sum(part**2 for part in np.gradient(sampled)) ** 0.5
    scaled = (sampled.ravel() - low) / (high - low) * (_LEVELS - 1)
    level = np.clip(scaled, 0, _LEVELS - 1).astype(np.int32)
    edges = np.bincount(level, weights=slopes.ravel(), minlength=_LEVELS)
    below = (np.cumsum(edges) - edges / 2) / max(edges.sum(), 1e-12)
    return below[level].reshape(sampled.shape).astype(np.float32)


# Features.


def _features(sampled: NDArray[np.float32]) -> Bits:
    even = _equalised(sampled)
    if even is None:
        return np.zeros((0, _BITS // 8), dtype=np.uint8)
    return np.unique(described(even)[0], axis=0)  # sorted: their order would tell of contrast


def described(even: NDArray[np.float32]) -> tuple[Bits, NDArray[np.float64]]:
    """Features of an equalised grid, and where they lie `[N, 3]`, which no sketch holds."""
    nothing = np.zeros((0, _BITS // 8), dtype=np.uint8), np.zeros((0, 3))
    coarse = ndimage.gaussian_filter(even, _COARSE)
    band = coarse - ndimage.gaussian_filter(even, _WIDE)
    peaks = (band == ndimage.maximum_filter(band, 3)) | (band == ndimage.minimum_filter(band, 3))
    inner = np.zeros_like(peaks)
    inner[(slice(_REACH, -_REACH),) * 3] = True
    places = np.argwhere(peaks & inner & (np.abs(band) > _CONTRAST))
    if not len(places):
        return nothing
    strength = np.abs(band[tuple(places.T)])
    places = places[np.argsort(-strength, kind="stable")[:MOST]]
    centres = places + _between(band, places)
    points, near, pairs = _pattern()
    values = np.empty((len(places), len(points)), dtype=np.float32)
    for image, which in ((ndimage.gaussian_filter(even, _FINE), near), (coarse, ~near)):
        where = (centres[:, None] + points[which]).reshape(-1, 3).T
        found = ndimage.map_coordinates(image, where, order=3, mode="nearest")
        values[:, which] = found.reshape(len(places), -1)
    return np.packbits(values[:, pairs[:, 0]] > values[:, pairs[:, 1]], axis=1), centres


def _between(band: NDArray[np.float32], places: NDArray[np.int64]) -> NDArray[np.float64]:
    """Where between the points of the grid an extremum lies, by a parabola along each axis."""
    shifts = np.zeros(places.shape)
    here = band[tuple(places.T)].astype(np.float64)
    for axis in range(3):
        step = np.eye(3, dtype=np.int64)[axis]
        after, before = (band[tuple((places + s * step).T)].astype(np.float64) for s in (1, -1))
        bend = after - 2 * here + before
        safe = np.where(np.abs(bend) > 1e-9, bend, np.inf)
        shifts[:, axis] = np.clip((before - after) / (2 * safe), -0.6, 0.6)
    return shifts


@cache
def _cube() -> list[NDArray[np.float64]]:
    """The 48 turns and mirrorings of a cube."""
    made = []
    for order in itertools.permutations(range(3)):
        for signs in itertools.product((1.0, -1.0), repeat=3):
            matrix = np.zeros((3, 3))
            matrix[range(3), order] = signs
            made.append(matrix)
    return made


# Pairs of points in grid units that are compared; each stands for all that a cube's turns make of
# it. The first point of each lies farther out than the second, where the coarser image is read,
# but for the second pair.
_COMPARED = (
    ((-4.572, -2.286, 2.286), (-2.263, -2.263, 0.0)),
    ((0.0, -1.610, 3.220), (0.0, -2.0, 0.0)),
    ((-2.286, 4.572, -2.286), (0.0, 2.263, 2.263)),
    ((0.0, -3.960, 3.960), (2.0, 0.0, 0.0)),
)


@cache
def _pattern() -> tuple[NDArray[np.float64], NDArray[np.bool_], NDArray[np.int64]]:
    """Points `[P, 3]`, whether each is read in the finer image, and pairs of them `[144, 2]`."""
    pairs: dict[tuple[tuple[float, ...], tuple[float, ...]], None] = {}
    for one, other in _COMPARED:
        for turn in _cube():
            a, b = (tuple((turn @ np.array(p) + 0.0).tolist()) for p in (one, other))
            if (b, a) not in pairs:
                pairs[a, b] = None
    points = sorted({point for pair in pairs for point in pair})
    number = {point: n for n, point in enumerate(points)}
    array = np.array(points)
    near = np.linalg.norm(array, axis=1) < 5
    return array, near, np.array([[number[a], number[b]] for a, b in pairs])


@cache
def _turns() -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Of each turn: which bit of a feature stands where afterwards, and whether it is inverted."""
    points, _, pairs = _pattern()
    number = {tuple(point): n for n, point in enumerate(points.tolist())}
    place = {tuple(pair): (n, False) for n, pair in enumerate(pairs.tolist())}
    place |= {(b, a): (n, True) for (a, b), (n, _) in place.items()}
    source, inverted = [], []
    for turn in _cube():
        moved = [number[tuple((turn @ point + 0.0).tolist())] for point in points]
        found = [place[moved[a], moved[b]] for a, b in pairs]
        source.append([n for n, _ in found])
        inverted.append([wrong for _, wrong in found])
    return np.array(source), np.array(inverted)


# Comparing.


def _unpacked(bits: Bits, turn: int = 0) -> NDArray[np.uint8]:
    source, inverted = _turns()
    plain = np.unpackbits(bits, axis=1)
    return plain[:, source[turn]] ^ inverted[turn]


def _share(a: Bits, b: Bits, turn: int) -> float:
    """Features that are each other's nearest, and the same, as a share of the smaller set."""
    one, other = (2 * _unpacked(bits, t).astype(np.float32) - 1 for bits, t in ((a, turn), (b, 0)))
    differ = (_BITS - one @ other.T) / 2
    nearest, back = differ.argmin(axis=1), differ.argmin(axis=0)
    rows = np.arange(len(a))
    least = differ[rows, nearest]
    same = (back[nearest] == rows) & (least <= _SAME)
    # The next best, in either direction: where it is hardly worse, both are found anywhere. What
    # is nearest to any is set aside on both sides, so that it matters not who asks whom.
    differ[rows, nearest] = np.inf
    differ[back, np.arange(len(b))] = np.inf
    second = np.minimum(differ.min(axis=1), differ.min(axis=0)[nearest])
    same &= least <= _CLEARLY * second
    return int(same.sum()) / max(min(len(a), len(b)), _FLOOR)


class _Features:
    """All features of some sketches, to be told by hashes of their parts, in any turn.

    Args:
        sketches: Some.
        first: Number of the first.
    """

    def __init__(self, sketches: Sequence[Sketch], first: int = 0) -> None:
        sets = [(n, grid, b) for n, one in enumerate(sketches, first) for grid, b in one.sets]
        lengths = [len(bits) for _, _, bits in sets]
        empty = np.zeros((0, _BITS // 8), dtype=np.uint8)
        self._plain = np.unpackbits(np.concatenate([empty, *(b for _, _, b in sets)]), axis=1)
        self._numbers = np.repeat(np.array([n for n, _, _ in sets], dtype=np.uint64), lengths)
        self._grids = np.repeat(np.array([grid for _, grid, _ in sets], np.uint64), lengths)

    def words(self, turn: int = 0) -> NDArray[np.uint64]:
        """Of all parts: a hash of 32 bits of it, its place and its grid; below it the number."""
        source, inverted = _turns()
        parts = (self._plain[:, source[turn]] ^ inverted[turn]).reshape(-1, _WORDS, _BITS // _WORDS)
        width = np.uint64(parts.shape[2])
        numbers = np.zeros(parts.shape[:2], dtype=np.uint64)
        packed = np.packbits(parts, axis=2, bitorder="little")
        for n in range(packed.shape[2]):
            numbers |= packed[:, :, n].astype(np.uint64) << np.uint64(8 * n)
        kinds = np.arange(_WORDS, dtype=np.uint64)[None] + np.uint64(8) * self._grids[:, None]
        numbers ^= kinds << width
        hashed = (numbers * np.uint64(0x9E3779B97F4A7C15)) & np.uint64(0xFFFFFFFF00000000)
        return (hashed | self._numbers[:, None]).ravel()


def batched(sketches: Sequence[Sketch], count: int) -> Iterator[Sequence[Sketch]]:
    """So many at a time, in their order."""
    for start in range(0, len(sketches), count):
        yield sketches[start : start + count]


def _ranges(first: NDArray[np.intp], last: NDArray[np.intp]) -> NDArray[np.int64]:
    """All numbers from each `first` up to its `last`, one range after another."""
    lengths = last - first
    ends = np.cumsum(lengths)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(first - ends + lengths, lengths)
