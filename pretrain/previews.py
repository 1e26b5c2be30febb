"""Pictures of volumes: three planes through the middle, true aspect ratio.

Radiological display: the patient's left is on the right of an axial or coronal slice, superior is
up, and anterior is up (axial) or left (sagittal).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.files import atomic
from pretrain.objective import Batch, Objective

PLANES = ("axial", "coronal", "sagittal")


def planes(volume: NDArray[Any], centre: tuple[int, int, int] | None = None) -> list[NDArray[Any]]:
    """Axial, coronal and sagittal slice of [D, H, W], first row on top of the picture."""
    d, h, w = centre or tuple(n // 2 for n in volume.shape)
    return [volume[d], volume[::-1, h], volume[::-1, :, w]]


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
    count = len(batch.image)
    spacing = batch.spacing.cpu().numpy()
    size = batch.image.shape[2:]
    # Column widths follow the planes, so that nothing is squeezed.
    widths = [size[2] * spacing[0][2], size[2] * spacing[0][2], size[1] * spacing[0][1]]
    figure, axes = plt.subplots(
        count,
        3 * len(kinds),
        figsize=(1.5 * 3 * len(kinds), 1.75 * count + 0.5),
        squeeze=False,
        width_ratios=[w for w in widths for _ in kinds],
        layout="constrained",
    )
    for row in range(count):
        low, high = np.percentile(batch.image[row, 0].float().cpu().numpy(), [0.5, 99.5])
        for column, name in enumerate(kinds):
            slices = planes(kinds[name][row, 0])
            for plane, (picture, aspect) in enumerate(
                zip(slices, aspects(spacing[row]), strict=True)
            ):
                axis = axes[row, plane * len(kinds) + column]
                axis.imshow(picture, cmap="gray", vmin=low, vmax=high, aspect=aspect)
                axis.set_axis_off()
                if row == 0:
                    axis.set_title(f"{PLANES[plane]}\n{name}" if column == 0 else name, fontsize=8)
    with atomic(path) as file:
        figure.savefig(file, format="png", dpi=110)
    plt.close(figure)
