"""What this machine gives a process."""

from __future__ import annotations

import os


def cores() -> int:
    """Cores that this process may use; where the system does not say which, all there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
