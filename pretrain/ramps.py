"""Schedules of what is not the rate, as functions of progress: 0 at the start, 1 at the end."""

from __future__ import annotations

import math


def warm(progress: float, start: float, end: float, until: float) -> float:
    """Rises linearly from `start` to `end`, reached at the progress `until`, and stays there.

    The teacher's temperature in DINOv2: 0.04 to 0.07 within the first 30 of 100 epochs.
    """
    return end if progress >= until else start + (end - start) * progress / until


def cosine(progress: float, start: float, end: float) -> float:
    """Half a cosine from `start` to `end`.

    In DINOv2 the teacher's momentum (0.992 to 1) and the weight decay (0.04 to 0.4).
    """
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * progress))
