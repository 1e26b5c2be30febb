"""The strip: principal components of the tokens of fixed slices, over the course of a run.

previews/strip.png has a row per slice and a column per kept preview; red, green and blue are the
first three principal components of the newest features (decision 0013 says why the newest), and
every column is projected onto this one basis, so that colours mean the same throughout. Of each
preview the features of three planes lie in previews/tokens, in half precision.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from data_prep.files import atomic
from pretrain.backbones.backbone import Backbone
from pretrain.events import step_of
from pretrain.objective import Batch, Objective
from pretrain.previews import PLANES, aspects, planes, worth_drawing

COLUMNS = 7
"""Previews that are kept: first, newest, and some between them."""

CELLS = 8
"""Along each axis that a map should have to be worth a picture."""


def add_to_strip(objective: Objective, batch: Batch, folder: Path, step: int) -> None:
    """Keeps the features of the middle slices of a batch and draws the strip anew.

    Previews of later steps are of a run that was killed, and go.

    Args:
        objective: whose released encoder is looked at, in evaluation mode and without gradients.
        batch: the fixed samples.
        folder: `previews` of the run.
        step: that is done.
    """
    chosen = map_to_show(objective.released.grids(batch.image.shape))
    image = batch.image[:: objective.crops.main]  # the first crop of each sample
    found, stride = fine_map(objective.released, image, chosen)
    features = found.float().cpu().numpy()
    if not np.isfinite(features).all():
        return  # the next logged row says what happened
    kept = folder / "tokens"
    kept.mkdir(exist_ok=True)
    with atomic(kept / f"step-{step:08d}.npz") as file:
        np.savez(file, **_cut(features))
    files = {step_of(path): path for path in kept.glob("step-*.npz")}
    for other in [*(s for s in files if s > step), *thinned([s for s in files if s <= step])]:
        files.pop(other).unlink()
    shots = {number: _read(files[number]) for number in sorted(files)}
    spacing = batch.spacing[:: objective.crops.main]
    _draw(image, spacing, stride, shots, folder / "strip.png")


def map_to_show(grids: list[tuple[int, int, int]]) -> int:
    """Which feature map: the deepest with 8 cells along each axis, else the deepest of the finest.

    Of a vision transformer it is the last, of a pyramid one from the middle.
    """
    fine = [i for i, grid in enumerate(grids) if min(grid) >= CELLS]
    finest = max(np.prod(grid) for grid in grids)
    return (fine or [i for i, grid in enumerate(grids) if np.prod(grid) == finest])[-1]


def fine_map(encoder: Backbone, image: Tensor, chosen: int) -> tuple[Tensor, NDArray[np.float64]]:
    """A feature map [B, E, d, h, w] and its stride; of a coarse one, twice as fine.

    A coarse map is computed for the crop moved by a quarter of a cell back and forth along each
    axis, eight times, and the results are laid between each other.
    """
    stride = encoder.strides[chosen]
    coarse = min(encoder.grids(image.shape)[chosen]) < CELLS
    if not coarse or any(s % 4 for s in stride):
        return encoder(image)[chosen], np.array(stride, float)
    d, h, w = (s // 4 for s in stride)
    padded = F.pad(image, (w, w, h, h, d, d), mode="replicate")
    pieces = [
        encoder(
            padded[
                (
                    slice(None),
                    slice(None),
                    *(
                        slice(o * s // 2, o * s // 2 + n)
                        for o, s, n in zip(offsets, stride, image.shape[2:], strict=True)
                    ),
                )
            ]
        )[chosen]
        for offsets in itertools.product((0, 1), repeat=3)
    ]
    # [8, B, E, d, h, w] to [B, E, d, 2, h, 2, w, 2], each piece at its offset.
    laid = torch.stack(pieces).unflatten(0, (2, 2, 2)).permute(3, 4, 5, 0, 6, 1, 7, 2)
    return laid.flatten(6, 7).flatten(4, 5).flatten(2, 3), np.array(stride) / 2


def thinned(steps: list[int]) -> list[int]:
    """Steps to drop, so that at most 7 are left: first, newest, and others about evenly."""
    left, dropped = sorted(steps), []
    while len(left) > COLUMNS:
        gaps = [left[i + 1] - left[i - 1] for i in range(1, len(left) - 1)]
        dropped.append(left.pop(1 + int(np.argmin(gaps))))
    return dropped


def basis(
    tokens: NDArray[np.float64],
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """First three principal axes [E, 3] of tokens [N, E], and what becomes black and white [3].

    Each axis points to where its largest entry is positive, so that colours do not turn over when
    a later picture is drawn.
    """
    _, vectors = np.linalg.eigh(tokens.T @ tokens / len(tokens))
    axes = vectors[:, ::-1][:, :3]
    if axes.shape[1] < 3:
        axes = np.pad(axes, ((0, 0), (0, 3 - axes.shape[1])))
    axes = axes * np.sign(axes[np.abs(axes).argmax(0), np.arange(3)] + 1e-300)
    low, high = np.percentile(tokens @ axes, [2, 98], axis=0)
    return axes, low, np.maximum(high, low + 1e-12)


Shot = list[list[NDArray[np.float64]]]
"""Features [a, b, E] of a preview, by sample and plane."""


def _cut(features: NDArray[np.float32]) -> dict[str, Any]:
    """Planes through the middle of features [B, E, d, h, w], by name `SAMPLE-PLANE`."""
    limit = np.finfo(np.float16).max
    return {
        f"{b}-{name}": np.clip(np.stack(cut, axis=-1), -limit, limit).astype(np.float16)
        for b, volume in enumerate(features)
        for name, cut in zip(
            PLANES, zip(*(planes(channel) for channel in volume), strict=True), strict=True
        )
    }


def _read(path: Path) -> Shot:
    """A kept preview, centred and scaled as a whole: features grow while a network trains."""
    with np.load(path, allow_pickle=False) as file:
        count = len(file.files) // len(PLANES)
        shot = [[file[f"{b}-{name}"].astype(np.float64) for name in PLANES] for b in range(count)]
    every = _tokens(shot)
    mean, scale = every.mean(0), max(float(every.std()), 1e-12)
    return [[(cut - mean) / scale for cut in sample] for sample in shot]


def _tokens(shot: Shot) -> NDArray[np.float64]:
    return np.concatenate([cut.reshape(-1, cut.shape[-1]) for sample in shot for cut in sample])


def _draw(
    image: Tensor,
    spacing_mm: Tensor,
    stride: NDArray[np.float64],
    shots: dict[int, Shot],
    path: Path,
) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    axes_of, low, high = basis(_tokens(shots[max(shots)]))
    images = image[:, 0].float().cpu().numpy()
    spacing = spacing_mm.cpu().numpy()
    shown = worth_drawing(images.shape[1:])[:2]  # the third adds height and little else
    size = np.array(images.shape[1:]) * spacing[0]
    heights = [(size[1], size[0], size[0])[plane] for plane in shown] * len(images)
    columns = 1 + len(shots)
    width = 1.55
    figure, axes = plt.subplots(
        len(heights),
        columns,
        figsize=(width * columns, width * sum(heights) / size[2] + 0.4),
        squeeze=False,
        height_ratios=heights,
        layout="constrained",
    )
    figure.get_layout_engine().set(w_pad=0.01, h_pad=0.01, wspace=0.01, hspace=0.01)
    for line, (b, plane) in zip(
        axes, [(b, plane) for b in range(len(images)) for plane in shown], strict=True
    ):
        grey = planes(images[b])[plane]
        limits = np.percentile(images[b], [0.5, 99.5])
        voxel, cell = aspects(spacing[b])[plane], aspects(spacing[b] * stride)[plane]
        line[0].imshow(grey, cmap="gray", vmin=limits[0], vmax=limits[1], aspect=voxel)
        for axis, shot in zip(line[1:], shots.values(), strict=True):
            colours = np.clip((shot[b][plane] @ axes_of - low) / (high - low), 0, 1)
            axis.imshow(colours, aspect=cell, interpolation="nearest")
    for axis in axes.flat:
        axis.set_axis_off()
    axes[0, 0].set_title("input", fontsize=9)
    for axis, step in zip(axes[0, 1:], shots, strict=True):
        axis.set_title(f"step {step}", fontsize=9)
    with atomic(path) as file:
        figure.savefig(file, format="png", dpi=110)
    plt.close(figure)
