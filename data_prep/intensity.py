"""Intensities of a scan as int16 codes, and statistics that do not depend on how it was stored.

CT is rounded to whole HU. MR keeps slope and intercept, so that nothing is lost beyond half a
step. All statistics are of the whole native volume and come from the histogram of the codes:
exact, and bounded in memory whatever the size of the scan.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from data_prep.volume import Statistics, Volume

INT16 = np.iinfo(np.int16)


def encode_int16(
    values: np.ndarray, slope: float, intercept: float, modality: str
) -> tuple[np.ndarray, float, float]:
    """Codes (int16, same shape), slope and intercept, so that physical = code * slope + intercept.

    Args:
        values: Integers as stored in a file, or float physical values.
        slope: Factor from `values` to physical values.
        intercept: Offset from `values` to physical values.
        modality: `CT` gives whole HU with slope 1 (beyond +-32767 clipped). Anything else keeps
            integers that fit, shifts those that fit after a shift, and spreads the rest linearly
            over the full int16 range with an error of at most half a step.
    """
    if modality == "CT":
        if (slope, intercept) == (1.0, 0.0) and values.dtype.kind in "iub":
            return _int16(np.clip(values, INT16.min, INT16.max)), 1.0, 0.0
        return _rounded(values, slope, intercept), 1.0, 0.0

    low, high = float(values.min()), float(values.max())
    whole = values.dtype.kind in "iub" or bool((values == np.rint(values)).all())
    if whole and low >= INT16.min and high <= INT16.max:
        return _int16(values), float(slope), float(intercept)
    if whole and high - low <= 65535 and abs(low) < 2**53:
        shift = low - INT16.min
        return _rounded(values, 1.0, -shift), float(slope), float(intercept + shift * slope)
    step = (high - low) / 65535 or 1.0
    first = low - INT16.min * step
    return _rounded(values, 1 / step, -first / step), step * slope, first * slope + intercept


def encode(volume: Volume) -> Volume:
    """The volume with int16 codes instead of its values; returned as it is if it has them."""
    plain = all(
        modality != "CT" or (slope, intercept) == (1.0, 0.0)
        for modality, slope, intercept in zip(
            volume.modality, volume.slope, volume.intercept, strict=True
        )
    )
    if volume.array.dtype == np.int16 and plain:
        return volume
    parts = [
        encode_int16(volume.array[c], volume.slope[c], volume.intercept[c], volume.modality[c])
        for c in range(len(volume.array))
    ]
    return replace(
        volume,
        array=np.stack([codes for codes, _, _ in parts]),
        slope=tuple(slope for _, slope, _ in parts),
        intercept=tuple(intercept for _, _, intercept in parts),
    )


def channel_statistics(
    codes: np.ndarray, slope: float, intercept: float, counts: np.ndarray | None = None
) -> Statistics:
    """Robust statistics of one channel in physical units, exact from the histogram of its codes.

    Args:
        codes: int16, of any shape.
        slope: of the codes.
        intercept: of the codes.
        counts: their `histogram`, if it is there already.

    Returns:
        min, max, p0_5, p50, p99_5 (percentiles with linear interpolation, as numpy's default) and
        clipped_mean, clipped_std: mean and standard deviation after clipping to [p0_5, p99_5].
    """
    counts = histogram(codes) if counts is None else counts
    present = np.flatnonzero(counts)
    values = (present.astype(np.float64) + INT16.min) * slope + intercept
    weights = counts[present]
    if slope < 0:
        values, weights = values[::-1], weights[::-1]
    total = int(weights.sum())
    cumulative = np.cumsum(weights)

    def percentile(q: float) -> float:
        position = q / 100 * (total - 1)
        below = int(np.floor(position))
        one, other = values[
            np.searchsorted(cumulative, [below, min(below + 1, total - 1)], side="right")
        ]
        return float(one + (other - one) * (position - below))

    low, high = percentile(0.5), percentile(99.5)
    clipped = np.clip(values, low, high)
    mean = float((clipped * weights).sum() / total)
    variance = float((weights * (clipped - mean) ** 2).sum() / total)
    return {
        "min": float(values[0]),
        "max": float(values[-1]),
        "p0_5": low,
        "p50": percentile(50),
        "p99_5": high,
        "clipped_mean": mean,
        "clipped_std": variance**0.5,
    }


def volume_statistics(volume: Volume) -> list[Statistics]:
    """`channel_statistics` of each channel of a volume."""
    coded = encode(volume)
    return [
        channel_statistics(coded.array[c], coded.slope[c], coded.intercept[c])
        for c in range(len(coded.array))
    ]


def ranks(counts: np.ndarray) -> np.ndarray:
    """For each of the 65536 codes of a `histogram`, its rank among those present; uint16."""
    return (np.cumsum(counts > 0) - 1).clip(min=0).astype(np.uint16)


def histogram(codes: np.ndarray) -> np.ndarray:
    """Counts of the 65536 int16 codes, one slab at a time to keep the index array small."""
    counts = np.zeros(65536, dtype=np.int64)
    for slab in codes.view(np.uint16):
        counts += np.bincount(slab.ravel(), minlength=65536)
    return np.roll(counts, -INT16.min)  # codes below 0 were the upper half


def equal_neighbours(codes: np.ndarray, counts: np.ndarray) -> float:
    """Share of neighbours that are equal, in up to 64 slabs: high in label maps of any kind.

    The commonest value, which is what is around, and the ends, where windows clip, do not count.

    Args:
        codes: int16 `[D, H, W]`.
        counts: their `histogram`.
    """
    present = np.flatnonzero(counts)
    counted = np.ones(65536, dtype=bool)
    counted[[present[0], present[-1], counts.argmax()]] = False
    equal = pairs = 0
    for slab in codes[:: max(1, len(codes) // 64)]:
        inside = counted[slab.astype(np.int32) - INT16.min]
        for one, other in ((np.s_[1:], np.s_[:-1]), (np.s_[:, 1:], np.s_[:, :-1])):
            both = inside[one] & inside[other]
            pairs += int(np.count_nonzero(both))
            equal += int(np.count_nonzero(both & (slab[one] == slab[other])))
    return equal / pairs if pairs else 0.0


def _rounded(values: np.ndarray, factor: float, offset: float) -> np.ndarray:
    """round(values * factor + offset) clipped to int16, one slab at a time in float64."""
    codes = np.empty(values.shape, dtype=np.int16)
    for slab, code in zip(values, codes, strict=True):
        exact = slab.astype(np.float64) * factor + offset
        code[...] = np.clip(np.rint(exact), INT16.min, INT16.max)
    return codes


def _int16(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values, dtype=np.int16)
