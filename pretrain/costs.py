"""What a training has cost: time from its log, memory from its process."""

from __future__ import annotations

import csv
import re
import resource
import sys
from collections.abc import Mapping
from pathlib import Path

import torch


def trained_seconds(metrics: Path, ranks: Mapping[int, int] | None = None) -> float:
    """Seconds in which a run made steps, waiting for data included.

    Those of all its processes, where `ranks` says how many each start had, by its number.

    From its log, so a run that was stopped and went on counts each step once, and neither waiting
    in a queue nor what a resumption repeats is in it. NaN where there is no log.
    """
    if not metrics.is_file():
        return float("nan")
    total, before = 0.0, 0
    with metrics.open(newline="") as file:
        for row in csv.DictReader(file):
            step = int(row["step"])
            together = 1 if ranks is None else ranks[int(row.get("start") or 0)]
            total += (step - before) * float(row["seconds_per_step"]) * together
            before = step
    return total


def peak_mib(device: torch.device) -> float:
    """The most memory that this process has held: on a GPU what torch allocated there."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    # Kibibytes, but bytes on macOS.
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def held_gib(device: torch.device) -> float:
    """GiB that this process holds: on a GPU the most that its tensors took there so far.

    On a CPU what is resident now, the loader's workers apart. Waits for no device.
    """
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device)) / 2**30
    return resident() / 2**30


def resident(name: str = "VmRSS") -> int:
    """Bytes of this process in memory; VmHWM is the most so far."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:  # no Linux: the peak of the whole process is all there is
        return round(peak_mib(torch.device("cpu")) * 2**20)
    found = re.search(rf"^{name}:\s+(\d+) kB", status, re.MULTILINE)
    return int(found.group(1)) * 1024 if found else 0
