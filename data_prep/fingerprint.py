"""A fingerprint of a scan's voxels: finds the same scan again in another corpus or test set.

The hash covers the shape and, voxel by voxel, the rank of the value among the values that occur.
Ranks rather than values, since copies of one public scan differ in how they were stored: uint8
with a slope, float32, min-max scaled. They keep the order of the intensities and so one
fingerprint. A copy that was resampled, cropped or clipped has another one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from data_prep.intensity import INT16, histogram, ranks

ALGORITHM = "voxel-blake2b"
VERSION = 1


def fingerprint(
    codes: np.ndarray, slopes: Sequence[float], counts: Sequence[np.ndarray] | None = None
) -> dict[str, Any]:
    """Fingerprint of int16 codes `[C, D, H, W]` on the canonical native grid.

    Args:
        codes: The whole scan, before any crop or resampling.
        slopes: Factor from code to physical value, per channel; only its sign matters.
        counts: The `histogram` of each channel, if it is there already.
    """
    digest = hashlib.blake2b(digest_size=32)
    digest.update(np.asarray(codes.shape, dtype="<u4").tobytes())
    counts = [histogram(channel) for channel in codes] if counts is None else counts
    for channel, slope, count in zip(codes, slopes, counts, strict=True):
        table = ranks(count).astype("<u2")
        if slope < 0:
            table = table.max() - table
        table = np.roll(table, INT16.min)  # codes below 0 are the upper half of uint16
        for slab in channel.view(np.uint16):
            digest.update(np.take(table, slab).data)
    return {"algorithm": ALGORITHM, "version": VERSION, "value": digest.hexdigest()}


def as_text(data: dict[str, Any]) -> str:
    """One comparable word, `voxel-blake2b-1:HEX`; other algorithms never compare equal."""
    return f"{data['algorithm']}-{data['version']}:{data['value']}"
