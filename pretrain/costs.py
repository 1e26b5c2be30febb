"""What a training has cost: time from its log, memory from its process."""

from __future__ import annotations

import csv
import resource
import sys
from pathlib import Path

import torch


def trained_seconds(metrics: Path) -> float:
    """Seconds in which a run made steps, waiting for data included.

    From its log, so a run that was stopped and went on counts each step once, and neither waiting
    in a queue nor what a resumption repeats is in it. NaN where there is no log.
    """
    if not metrics.is_file():
        return float("nan")
    total, before = 0.0, 0
    with metrics.open(newline="") as file:
        for row in csv.DictReader(file):
            step = int(row["step"])
            total += (step - before) * float(row["seconds_per_step"])
            before = step
    return total


def peak_mib(device: torch.device) -> float:
    """The most memory that this process has held: on a GPU what torch allocated there."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    # Kibibytes, but bytes on macOS.
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
