"""Pictures of volumes: three planes through the middle, true aspect ratio.

Radiological display: the patient's left is on the right of an axial or coronal slice, superior is
up, and anterior is up (axial) or left (sagittal).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from data_prep.files import atomic

if TYPE_CHECKING:
    from pretrain.objective import Batch, Objective

PLANES = ("axial", "coronal", "sagittal")
HIDDEN = "#2f5d8a"
"""Of voxels that are NaN: no shade of grey can be taken for it."""


def planes(volume: NDArray[Any], centre: tuple[int, int, int] | None = None) -> list[NDArray[Any]]:
    """Axial, coronal and sagittal slice of [D, H, W], first row on top of the picture."""
    d, h, w = centre or tuple(n // 2 for n in volume.shape)
    return [volume[d], volume[::-1, h], volume[::-1, :, w]]


def worth_drawing(shape: Sequence[int]) -> list[int]:
    """Which planes of a volume [D, H, W] are more than a line; the first if all are lines."""
    d, h, w = (side > 1 for side in shape)
    return [i for i, wide in enumerate((h and w, d and w, d and h)) if wide] or [0]


def aspects(spacing: tuple[float, float, float] | NDArray[Any]) -> list[float]:
    """Height over width of a voxel in each of the planes."""
    d, h, w = (float(s) for s in spacing)
    return [h / w, d / w, d / h]


def draw_previews(objective: Objective, batch: Batch, path: Path) -> None:
    """Draws what the objective shows of a batch: a row per sample, its planes side by side.

    An objective that has nothing to show draws nothing.
    """
    shown = objective.preview(batch)
    if not shown:
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    kinds = {name: value.float().cpu().numpy() for name, value in shown.items()}
    spacing = batch.spacing.cpu().numpy()
    size = np.array(batch.image.shape[2:])
    # A row may be made of several crops; it has the size and the greys of the first.
    count, wide = len(next(iter(kinds.values()))), len(kinds)
    first = range(0, len(batch.image), len(batch.image) // count)
    # Widths and heights in millimetres of the first sample: nothing is squeezed, titles line up.
    d, h, w = size * spacing[0]
    drawn = worth_drawing(batch.image.shape[2:])
    widths, heights = np.array([w, w, h])[drawn], np.array([h, d, d])[drawn]
    broad = min(12.0, 3.0 * wide * len(drawn))
    figure, axes = plt.subplots(
        count,
        len(drawn) * wide,
        figsize=(broad, broad * count * heights.max() / (wide * widths.sum()) + 0.5),
        squeeze=False,
        width_ratios=np.repeat(widths, wide),
        layout="constrained",
    )
    figure.get_layout_engine().set(w_pad=0.01, h_pad=0.02, wspace=0.01, hspace=0.01)
    shades = plt.get_cmap("gray").with_extremes(bad=HIDDEN)
    for row in range(count):
        low, high = np.percentile(batch.image[first[row], 0].float().cpu().numpy(), [0.5, 99.5])
        for column, name in enumerate(kinds):
            slices, squeezed = planes(kinds[name][row, 0]), aspects(spacing[first[row]])
            for place, plane in enumerate(drawn):
                axis = axes[row, place * wide + column]
                picture, aspect = slices[plane], squeezed[plane]
                axis.imshow(picture, cmap=shades, vmin=low, vmax=high, aspect=aspect)
                axis.set_axis_off()
                axis.set_anchor("N")
                if row == 0:
                    axis.set_title(f"{PLANES[plane]}, {name}", fontsize=9)
    with atomic(path) as file:
        figure.savefig(file, format="png", dpi=110)
    plt.close(figure)
