"""A fingerprint of a scan's voxels: finds the same scan again in another corpus or test set.

The hash covers the shape and, voxel by voxel, the rank of the value among the values that occur.
Ranks rather than values, since copies of one public scan differ in how they were stored: uint8
with a slope, float32, min-max scaled. They keep the order of the intensities and so one
fingerprint. A copy that was resampled, cropped or clipped has another one.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from data_prep.intensity import INT16, ranks

ALGORITHM = "voxel-blake2b"
VERSION = 1


def fingerprint(codes: np.ndarray, slopes: tuple[float, ...]) -> dict[str, Any]:
    """Fingerprint of int16 codes `[C, D, H, W]` on the canonical native grid.

    Args:
        codes: The whole scan, before any crop or resampling.
        slopes: Factor from code to physical value, per channel; only its sign matters.
    """
    digest = hashlib.blake2b(digest_size=32)
    digest.update(np.asarray(codes.shape, dtype="<u4").tobytes())
    for channel, slope in zip(codes, slopes, strict=True):
        table = ranks(channel).astype("<u2")
        if slope < 0:
            table = table.max() - table
        for slab in channel:
            digest.update(table[slab.astype(np.int32) - INT16.min].tobytes())
    return {"algorithm": ALGORITHM, "version": VERSION, "value": digest.hexdigest()}


def as_text(data: dict[str, Any]) -> str:
    """One comparable word, `voxel-blake2b-1:HEX`; other algorithms never compare equal."""
    return f"{data['algorithm']}-{data['version']}:{data['value']}"
