"""Pictures of a training over its steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from numpy.typing import NDArray

from finetune.figures import ARM_COLOURS, FAINT, INK, STYLE, WIDTH, svg

Log = Mapping[str, NDArray[Any]]
NO_PARTS = {
    "step", "samples", "loss", "lr", "grad_norm", "seconds_per_step", "samples_per_second",
    "data_wait", "memory_gib", "start", "repeated",
}  # fmt: skip
"""Columns of metrics.csv that are no part of a loss."""


@dataclass(frozen=True)
class Losses:
    """The training losses of a run over its steps."""

    arm: str
    seed: int
    steps: NDArray[Any]
    loss: NDArray[Any]


def draw_losses(curves: Sequence[Losses]) -> str:
    """Loss against step of finished finetunings, one line for each."""
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(WIDTH, 2.9), layout="constrained")
        named: set[str] = set()
        for curve in curves:
            label = None if curve.arm in named else curve.arm
            colour = ARM_COLOURS.get(curve.arm, FAINT)
            axis.plot(curve.steps, curve.loss, color=colour, lw=1.6, alpha=0.85, label=label)
            named.add(curve.arm)
        axis.set_title("Finetuning, one line per seed")
        axis.legend(loc="upper right")
        axis.margins(x=0.02)
        axis.set_xlabel("step")
        axis.set_ylabel("training loss")
        return svg(figure)


def draw_training(log: Log, starts: Sequence[int]) -> str:
    """Loss with its parts, and how fast a training is, with a mark where it was started again.

    Args:
        log: columns of metrics.csv.
        starts: the steps that starts but the first went on from.
    """
    parts = [
        name
        for name in log
        if name not in NO_PARTS and not np.array_equal(log[name], log["loss"], equal_nan=True)
    ]
    panels: list[tuple[str, dict[str, str], float]] = [
        ("Loss", {"loss": "loss", **{name: name for name in parts[:4]}}, 1.0),
        ("Samples a second", {"samples_per_second": "samples"}, 1.0),
        ("Waiting for data, %", {"data_wait": "waiting"}, 100.0),
    ]
    panels = [panel for panel in panels if next(iter(panel[1])) in log]
    widths = [2.0, *[1.0] * (len(panels) - 1)]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            1, len(panels), figsize=(WIDTH, 2.9), squeeze=False, layout="constrained",
            width_ratios=widths,
        )  # fmt: skip
        for axis, (title, lines, scale) in zip(axes.flat, panels, strict=True):
            for number, (name, label) in enumerate(lines.items()):
                colour = INK if number == 0 else None
                width = 1.8 if number == 0 else 1.0
                axis.plot(log["step"], scale * log[name], color=colour, lw=width, label=label)
            if len(lines) > 1:
                axis.legend(loc="upper right")
            if title != "Loss":
                axis.set_ylim(bottom=0)
            axis.set_title(title)
            axis.set_xlabel("step")
            axis.margins(x=0.02)
            _mark(axis, starts)
        return svg(figure)


def _mark(axis: Axes, starts: Sequence[int]) -> None:
    for number, step in enumerate(starts, 2):
        axis.axvline(step, color=ARM_COLOURS["scratch"], lw=1.0, ls=(0, (3, 2)), zorder=0)
        if len(starts) <= 8:
            axis.annotate(
                f"{number}", (step, 1.0), xycoords=("data", "axes fraction"), xytext=(2, -2),
                textcoords="offset points", va="top", fontsize=8, color=ARM_COLOURS["scratch"],
            )  # fmt: skip


def draw_health(log: Log) -> str:
    """Columns of a run's health.csv against its steps: spread, rank and, if asked, the probe."""
    panels = [
        ("Spread of the features", {"std": "of cells", "pooled_std": "of scans"}),
        ("Effective rank (RankMe)", {"rank": "of cells", "pooled_rank": "of scans"}),
        ("Probe on labelled cases", {"probe_dice": "Dice", "probe_knn": "neighbours' recall"}),
    ]
    panels = [panel for panel in panels if panel[1].keys() <= log.keys()]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            1, len(panels), figsize=(WIDTH, 2.6), squeeze=False, layout="constrained"
        )
        for axis, (title, lines) in zip(axes.flat, panels, strict=True):
            for (name, label), colour in zip(lines.items(), (INK, FAINT), strict=True):
                axis.plot(
                    log["step"], log[name], "o-", color=colour, markersize=3, linewidth=1.6,
                    label=label,
                )  # fmt: skip
            if "rank" in lines:
                axis.set_yscale("log")
            axis.margins(x=0.02)
            axis.set_title(title)
            axis.set_xlabel("step")
            axis.legend(loc="best")
        return svg(figure)
