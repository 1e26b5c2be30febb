"""The report's pictures: one style, one width, colours that also tell the colour-blind apart."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib import patheffects
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from finetune.intervals import Estimate
from finetune.lines import BETTER, OWN, WORSE, Group, Line, Table
from finetune.pages import data_uri
from pretrain.previews import PLANES, planes

WIDTH = 10.4
"""Inches; the page shows every figure at its full width."""
ARM_COLOURS = {"pretrained": "#1f5fa8", "scratch": "#d1711c", "scratch-own": "#6f3a08"}
CLASS_COLOURS = ("#ffb02e", "#35c9ff", "#ff5c8a", "#7dff6a", "#c79bff", "#fff56a", "#ff7b3a")
_VERDICT_COLOURS = {
    BETTER: ARM_COLOURS["pretrained"],
    WORSE: ARM_COLOURS["scratch"],
}
_OUTLINE = [patheffects.withStroke(linewidth=2, foreground="black")]
INK, FAINT, GRID = "#1c2733", "#6b7785", "#e4e8ed"

STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "axes.edgecolor": "#b8c0ca",
    "axes.labelcolor": FAINT,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "text.color": INK,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "svg.fonttype": "path",
    "svg.hashsalt": "voxelith",
}


@dataclass(frozen=True)
class Overlay:
    """One case with what is drawn on it: all [D, H, W] on one grid, labels as class indices."""

    title: str
    image: NDArray[np.float32]
    spacing: tuple[float, float, float]
    truth: NDArray[Any]
    predictions: dict[str, NDArray[Any]]
    scores: dict[str, float]


def svg(figure: Figure) -> str:
    """A figure as a data URI: sharp at any size."""
    return data_uri(_drawn(figure, format="svg", metadata={"Date": None}), "image/svg+xml")


def png(figure: Figure, dpi: int = 190) -> bytes:
    """A figure as a file of pixels."""
    return _drawn(figure, format="png", dpi=dpi)


def _drawn(figure: Figure, **how: Any) -> bytes:
    """A figure as a file; it is closed, whatever comes of it."""
    buffer = io.BytesIO()
    try:
        figure.savefig(buffer, **how)
    finally:
        plt.close(figure)
    return buffer.getvalue()


def draw_comparison(
    rows: Sequence[tuple[str, Estimate]],
    scores: dict[str, dict[tuple[str, str], float]],
    main: Line,
    shown: str = "Dice",
) -> str:
    """Differences with intervals beside the scores they come from.

    Args:
        rows: name and difference in the main metric (pretrained minus scratch), from top to bottom.
        scores: per arm, (case, seed) to a score.
        main: the line whose metric it is.
        shown: which score of cases that is.
    """
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(
            1, 2, figsize=(WIDTH, 3.3), width_ratios=[1.55, 1], layout="constrained"
        )
        _forest(left, rows, main)
        _pairs(right, scores, shown)
        return svg(figure)


def _forest(axis: Axes, rows: Sequence[tuple[str, Estimate]], main: Line) -> None:
    axis.axvline(0, color=INK, linewidth=1)
    for y, (_, value) in enumerate(reversed(rows)):
        first = y == len(rows) - 1
        if value.has_interval:
            clear = value.low > 0 or value.high < 0
            better = (value.mean > 0) == main.measures.higher_is_better
            colour = ARM_COLOURS["pretrained" if better else "scratch"] if clear else FAINT
            axis.plot([value.low, value.high], [y, y], color=colour, linewidth=3.2 if first else 2)
        else:
            colour = FAINT
        style = "D" if first else "o"
        axis.plot(value.mean, y, style, color=colour, markersize=8 if first else 6)
    axis.set_yticks(range(len(rows)), [name for name, _ in reversed(rows)])
    axis.tick_params(axis="y", length=0, labelcolor=INK)
    axis.set_ylim(-0.6, len(rows) - 0.4)
    axis.grid(axis="y", visible=False)
    _centre_zero(axis, [value for _, value in rows], main)
    axis.set_title(f"Difference in {main.measures.title}: pretrained minus scratch")


def _pairs(axis: Axes, scores: dict[str, dict[tuple[str, str], float]], shown: str) -> None:
    a, b = scores.get("pretrained", {}), scores.get("scratch", {})
    cells = sorted(a.keys() & b.keys())
    seeds = sorted({seed for _, seed in cells})
    shades = plt.get_cmap("viridis")(np.linspace(0.1, 0.8, max(len(seeds), 1)))
    for seed, colour in zip(seeds, shades, strict=False):
        chosen = [cell for cell in cells if cell[1] == seed]
        x, y = [b[cell] for cell in chosen], [a[cell] for cell in chosen]
        axis.scatter(x, y, s=20, color=colour, alpha=0.75, linewidths=0, label=f"seed {seed}")
    values = [v for cell in cells for v in (a[cell], b[cell])] or [0.0, 100.0]
    room = 2.0 if max(values) > 10 else 0.02 * (max(values) - min(values)) or 1.0
    low, high = min(values) - room, max(values) + room
    axis.plot([low, high], [low, high], color=INK, linewidth=1)
    axis.set(xlim=(low, high), ylim=(low, high), aspect="equal")
    axis.set_xlabel(f"scratch, {shown}")
    axis.set_ylabel(f"pretrained, {shown}")
    axis.set_title("Each case and seed")
    if 1 < len(seeds) <= 8:
        axis.legend(loc="upper left", handletextpad=0.1, borderpad=0.2)


def draw_table(table: Table) -> dict[str, bytes]:
    """The pictures of a table by file name; those without anything to show are not there."""
    drawn = {
        "forest.png": draw_forest(table),
        "label_curves.png": draw_label_curves(table),
        "budget.png": draw_budget(table),
    }
    return {name: picture for name, picture in drawn.items() if picture is not None}


def draw_forest(table: Table) -> bytes | None:
    """The deciding difference of every group with its interval, by data set, as a PNG.

    Differences in another metric or unit have axes of their own.
    """
    panels: dict[str, list[tuple[Group, Estimate]]] = {}
    for group in table.groups:
        if (found := group.main.decides) is not None:
            panels.setdefault(group.main.quantity, []).append((group, found))
    if not panels:
        return None
    heights = [
        1.0 + 0.27 * (len(pairs) + 1.2 * len({group.dataset for group, _ in pairs}))
        for pairs in panels.values()
    ]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            len(panels), figsize=(WIDTH, sum(heights)), height_ratios=heights, squeeze=False,
            layout="constrained",
        )  # fmt: skip
        for axis, pairs in zip(axes.flat, panels.values(), strict=True):
            _effects(axis, pairs)
        return png(figure)


def _effects(axis: Axes, shown: Sequence[tuple[Group, Estimate]]) -> None:
    """The differences in one metric, one below the other."""
    by_dataset: dict[str, list[tuple[Group, Estimate]]] = {}
    for group, value in shown:
        by_dataset.setdefault(group.dataset, []).append((group, value))
    axis.axvline(0, color=INK, linewidth=1)
    y, ticks = -1.2, {}
    for dataset, pairs in by_dataset.items():
        y += 1.2
        ticks[y] = dataset
        for group, value in pairs:
            y += 1
            ticks[y] = f"{group.told}, {group.n_labels} labels"
            _effect(axis, y, value, group.main)
    axis.set_ylim(y + 0.6, -0.7)
    axis.set_yticks(list(ticks), list(ticks.values()))
    for label, name in zip(axis.get_yticklabels(), ticks.values(), strict=True):
        label.set_fontweight("bold" if name in by_dataset else "normal")
    axis.tick_params(axis="y", length=0, labelcolor=INK)
    axis.grid(axis="y", visible=False)
    main = shown[0][0].main
    _centre_zero(axis, [value for _, value in shown], main)
    which = " (the arm harder to beat)" * any(g.main.own is not None for g, _ in shown)
    axis.set_title(f"Difference in {main.measures.title}: pretrained minus scratch{which}")


def _effect(axis: Axes, y: float, value: Estimate, line: Line) -> None:
    """A row of the forest, with its numbers beside the axes; hollow without an interval."""
    verdict, form = line.verdict, f"+.{line.digits}f"
    colour = _VERDICT_COLOURS.get(verdict, FAINT)
    interval = "no interval"
    if value.has_interval:
        axis.plot([value.low, value.high], [y, y], color=colour, linewidth=2.4)
        interval = f"{value.low:{form}}, {value.high:{form}}"
    inside = colour if value.has_interval else "white"
    axis.plot(value.mean, y, "D", color=colour, markersize=6, markerfacecolor=inside)
    axis.text(
        1.01, y, f"{value.mean:{form}} [{interval}]", transform=axis.get_yaxis_transform(),
        va="center_baseline", color=_VERDICT_COLOURS.get(verdict, INK),
    )  # fmt: skip


def _centre_zero(axis: Axes, values: Sequence[Estimate], line: Line) -> None:
    """Differences on an axis with as much room on either side, which is said to be whose.

    The pretrained arm's is the right one, also where lower is better.
    """
    ends = [abs(v) for r in values for v in (r.low, r.high, r.mean) if not math.isnan(v)]
    reach = 1.15 * max([*ends, 1.0 if line.unit == "points" else 1e-6])
    sides = (-reach, reach) if line.measures.higher_is_better else (reach, -reach)
    axis.set_xlim(*sides)
    unit = f"{line.measures.title} points" if line.unit == "points" else line.quantity
    axis.set_xlabel(f"← {WORSE} | {BETTER} →\n{unit}, 95 % interval")


def draw_label_curves(table: Table) -> bytes | None:
    """The main score of the arms against the number of labels with 95 % bands, as a PNG.

    A panel for each data set, part of a split, checkpoint and protocol with two numbers of labels
    at least. Where a number of labels has several recipes, no line can be drawn through them, and
    there is no panel.
    """
    panels: dict[tuple[str, ...], list[Group]] = {}
    for group in table.groups:
        if group.n_labels > 0:
            key = (
                group.dataset,
                group.main.checkpoint_digest,
                group.checkpoint,
                group.main.protocol,
                group.main.split,
                group.main.quantity,
            )
            panels.setdefault(key, []).append(group)
    panels = {
        key: sorted(found, key=lambda group: group.n_labels)
        for key, found in panels.items()
        if 1 < len(found) == len({group.n_labels for group in found})
    }
    if not panels:
        return None
    with plt.rc_context(STYLE):
        figure, axes = _grid(len(panels))
        for axis, ((dataset, _, checkpoint, protocol, _, _), found) in zip(
            axes, panels.items(), strict=True
        ):
            _label_curves(axis, [group.main for group in found])
            axis.set_title(", ".join(part for part in (dataset, checkpoint, protocol) if part))
        _one_legend(figure, axes)
        return png(figure)


def draw_budget(table: Table) -> bytes | None:
    """Validation Dice of both arms over training, as a PNG: a panel for each comparison."""
    panels = [group for group in table.groups if len(group.curves) > 1]
    if not panels:
        return None
    with plt.rc_context(STYLE):
        figure, axes = _grid(len(panels), sharey=len({group.dataset for group in panels}) == 1)
        for axis, group in zip(axes, panels, strict=True):
            for arm, style in (("pretrained", "o-"), ("scratch", "s-")):
                curve = group.curves[arm]
                axis.plot(
                    curve.steps, curve.dice, style, color=ARM_COLOURS[arm], markersize=4, lw=1.6,
                    label=arm,
                )  # fmt: skip
            told = group.told.replace(", ", "\n")
            axis.set_title(f"{group.dataset}, {group.n_labels} labels\n{told}", fontsize=8.5)
            axis.set_xlabel("step")
            axis.set_ylabel("validation Dice")
        _one_legend(figure, axes)
        return png(figure)


def _grid(count: int, sharey: bool = False) -> tuple[Figure, list[Axes]]:
    """Axes for so many panels, at most three side by side."""
    columns = min(count, 3)
    rows = math.ceil(count / columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(WIDTH, 0.4 + 2.9 * rows), squeeze=False, layout="constrained",
        sharey=sharey,
    )  # fmt: skip
    for axis in axes.flat[count:]:
        axis.set_visible(False)
    return figure, list(axes.flat[:count])


def _one_legend(figure: Figure, axes: Sequence[Axes]) -> None:
    """What the lines of all panels are, once below them."""
    handles = {
        label: handle
        for axis in axes
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3)


def _label_curves(axis: Axes, lines: Sequence[Line]) -> None:
    for arm, style in (("pretrained", "o-"), ("scratch", "s-"), ("scratch-own", "^--")):
        found = [
            (line.n_labels, value)
            for line in lines
            if (value := getattr(line, "own" if arm == "scratch-own" else arm)) is not None
        ]
        if found:
            counts = [count for count, _ in found]
            low, high = ([getattr(value, end) for _, value in found] for end in ("low", "high"))
            colour = ARM_COLOURS[arm]
            axis.fill_between(counts, low, high, color=colour, alpha=0.11, linewidth=0)
            for end in (low, high):
                axis.plot(counts, end, color=colour, alpha=0.5, linewidth=0.8)
            means = [value.mean for _, value in found]
            label = OWN if arm == "scratch-own" else arm
            axis.plot(counts, means, style, color=colour, markersize=5, linewidth=1.8, label=label)
    counts = sorted({line.n_labels for line in lines})
    axis.set_xscale("log")
    axis.set_xticks(counts, [str(count) for count in counts])
    axis.minorticks_off()
    axis.set_xlabel("labelled cases")
    title = lines[0].measures.title if lines[0].unit == "points" else lines[0].quantity
    axis.set_ylabel(f"{title}, 95 % band")


def draw_cases(cases: Sequence[Overlay], classes: Sequence[str]) -> str:
    """Truth and predictions as contours: a row per case, three planes per arm, one scale in mm."""
    arms = list(cases[0].predictions)
    boxes = [_box(case) for case in cases]
    paired = list(zip(cases, boxes, strict=True))
    depth, height, width = (
        max((box[i].stop - box[i].start) * case.spacing[i] for case, box in paired)
        for i in range(3)
    )
    # (width, height) in mm of the axial, coronal and sagittal panels; rows share one height.
    wide, tall = [width, width, height], max(depth, height)
    gap = 0.06 * sum(wide)
    ratios = [r for arm in arms for r in (([gap] if arm != arms[0] else []) + wide)]
    inches_per_mm = (WIDTH - 0.1) / (sum(ratios) * 1.015)
    row_inches = tall * inches_per_mm
    title, foot = 0.3, 0.36
    total = len(cases) * (row_inches + title) + foot
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            len(cases),
            len(ratios),
            figsize=(WIDTH, total),
            squeeze=False,
            width_ratios=ratios,
        )
        figure.subplots_adjust(
            left=0.003,
            right=0.997,
            bottom=foot / total,
            top=1 - title / total,
            wspace=0.02,
            hspace=title / row_inches,
        )
        for row, (case, box) in enumerate(paired):
            for spacer in axes[row, 3::4]:
                spacer.set_visible(False)
            for a, arm in enumerate(arms):
                for p in range(3):
                    axis = axes[row, 4 * a + p]
                    _panel(axis, case, box, case.predictions[arm], p, (wide[p], tall))
                    axis.text(
                        0.97, 0.97, PLANES[p], transform=axis.transAxes, ha="right", va="top",
                        color="white", fontsize=7.5, path_effects=_OUTLINE,
                    )  # fmt: skip
                text = f"{case.title}, {arm}: Dice {case.scores[arm]:.1f}"
                axes[row, 4 * a].set_title(text, fontsize=9.5, color=ARM_COLOURS.get(arm, INK))
        _scale_bar(axes[0, 0], wide[0], tall)
        handles = [Line2D([], [], color="white", linewidth=2, label="truth")]
        for name, colour in zip(classes, _colours(len(classes)), strict=True):
            handles.append(Line2D([], [], color=colour, linewidth=2, label=f"{name}, predicted"))
        figure.legend(
            handles=handles, loc="lower center", ncols=min(len(handles), 8), fontsize=8.5,
            frameon=True, facecolor="#202a36", framealpha=1, edgecolor="none", labelcolor="white",
        )  # fmt: skip
        return data_uri(png(figure), "image/png")


def _colours(count: int) -> list[str]:
    return [CLASS_COLOURS[i % len(CLASS_COLOURS)] for i in range(count)]


def _box(case: Overlay, margin_mm: float = 10.0) -> tuple[slice, ...]:
    """What is worth looking at: all labels, with some room around them."""
    used = case.truth > 0
    for prediction in case.predictions.values():
        used = used | (prediction > 0)
    box = []
    for axis, (n, s) in enumerate(zip(used.shape, case.spacing, strict=True)):
        hit = np.flatnonzero(used.any(axis=tuple(i for i in range(3) if i != axis)))
        room = round(margin_mm / s)
        low, high = (int(hit[0]), int(hit[-1]) + 1) if len(hit) else (0, n)
        box.append(slice(max(low - room, 0), min(high + room, n)))
    return tuple(box)


def _panel(
    axis: Axes,
    case: Overlay,
    box: tuple[slice, ...],
    prediction: NDArray[Any],
    p: int,
    size: tuple[float, float],
) -> None:
    """One plane through the middle of the truth on black, `size` (width, height) in mm."""
    image, truth, guess = (v[box] for v in (case.image, case.truth, prediction))
    hits = np.argwhere(truth > 0)
    middle = np.median(hits, axis=0) if len(hits) else np.array(truth.shape) // 2
    centre = (int(middle[0]), int(middle[1]), int(middle[2]))
    d, h, w = case.spacing
    tall, wide = [(h, w), (d, w), (d, h)][p]
    picture = planes(image, centre)[p]
    height, width = picture.shape[0] * tall, picture.shape[1] * wide
    extent = (-width / 2, width / 2, height / 2, -height / 2)
    low, high = np.percentile(image, [0.5, 99.5])
    axis.imshow(picture, cmap="gray", vmin=low, vmax=high, extent=extent, interpolation="bilinear")
    x = (np.arange(picture.shape[1]) + 0.5) * wide - width / 2
    y = (np.arange(picture.shape[0]) + 0.5) * tall - height / 2
    colours = _colours(int(max(truth.max(), guess.max(), 1)))
    for value, colour in enumerate(colours, start=1):
        for mask, line, thick in ((truth == value, "white", 1.3), (guess == value, colour, 1.3)):
            shown = planes(mask.astype(np.float32), centre)[p]
            if shown.any() and min(shown.shape) > 1:
                axis.contour(x, y, shown, [0.5], colors=[line], linewidths=thick)
    axis.set(xlim=(-size[0] / 2, size[0] / 2), ylim=(size[1] / 2, -size[1] / 2))
    axis.set(xticks=[], yticks=[], aspect="equal")
    axis.set_facecolor("black")
    axis.grid(visible=False)
    for spine in axis.spines.values():
        spine.set_visible(False)


def _scale_bar(axis: Axes, wide: float, tall: float) -> None:
    length = next(n for n in (100, 50, 20, 10, 5, 2, 1) if n <= wide / 2.5 or n == 1)
    x, y = -wide / 2 + 0.06 * wide, tall / 2 - 0.04 * tall
    axis.plot([x, x + length], [y, y], color="white", linewidth=2.5, solid_capstyle="butt")
    axis.text(
        x, y - 0.02 * tall, f"{length} mm", color="white", fontsize=7.5, path_effects=_OUTLINE,
    )  # fmt: skip
