"""What a finetuning cost: parameters, arithmetic, time, memory; and what a table says of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np


class Cost(NamedTuple):
    """Of one run; None is not known. Seconds are those of all its devices one after the other.

    `pretrain_seconds` are those that the checkpoint has cost; scratch has none.
    """

    parameters: int
    trained_parameters: int
    flops: int | None
    train_seconds: float | None
    predict_seconds: float | None
    peak_mib: float | None
    device: str
    pretrain_seconds: float | None = None

    @classmethod
    def of(cls, facts: dict[str, Any]) -> Cost | None:
        """What a run.json says; None where it is of a version that did not."""
        found = facts.get("cost")
        return None if found is None else cls(**found)


def cost_note(costs: Sequence[Cost]) -> str:
    """What a run cost, on the mean, and what the pretraining before it did.

    Args:
        costs: of at least one run; twins cost the same but for the noise of their machine.
    """

    def mean(values: Sequence[float | None]) -> float:
        known = [value for value in values if value is not None]
        return float(np.mean(known)) if known else math.nan

    first = costs[0]
    said = [f"{first.parameters / 1e6:.3g} M parameters"]
    if first.trained_parameters != first.parameters:
        said[0] += f" ({first.trained_parameters / 1e6:.3g} M trained)"
    parts = (
        (mean([c.flops for c in costs]), lambda v: f"{v / 1e12:.3g} TFLOP"),
        (mean([c.train_seconds for c in costs]), lambda v: f"{duration(v)} of training"),
        (mean([c.predict_seconds for c in costs]), lambda v: f"{duration(v)} of prediction"),
        (mean([c.peak_mib for c in costs]), lambda v: f"{v / 1024:.2g} GiB at its peak"),
    )
    said += [text(value) for value, text in parts if not math.isnan(value)]
    devices = ", ".join(sorted({c.device for c in costs}))
    note = f"a run: {', '.join(said)} ({devices})"
    pretraining = mean([c.pretrain_seconds for c in costs])
    if not math.isnan(pretraining):
        note += f"; the pretraining before it: {duration(pretraining)}"
    return note


def duration(seconds: float) -> str:
    """A span of time in words, to two digits."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{float(f'{seconds / size:.2g}'):g} {unit}"
    return f"{float(f'{seconds:.2g}'):g} s"
