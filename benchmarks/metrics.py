"""Our scores beside those of surface-distance and MONAI on a 512 x 512 x 400 case, in one run.

    python benchmarks/metrics.py [--shape 400 512 512] [--repeats 3] [--output FILE]

The case is made here, the same each time: fifteen organs of an abdomen in their usual sizes, each a
ball in its own axes with a wavy border, and a prediction that is moved by a millimetre or so, has
other waves, one organ too thin and two islands far away. All of it has one label map for the truth
and one for the prediction, and what is timed starts there: the libraries take masks, so theirs are
cut out class by class, as their users do. Each computes Dice, surface Dice, HD95 and the mean
surface distance, and we the volumes too. One thread; the programs take turns, so that a busy
machine slows all, and a ratio is of neighbours.

"ours, masks" is ours called as the libraries are, one pair of whole masks at a time.

surface-distance weighs surfaces by area, as we do: all four numbers must agree to 1e-5, or nothing
is written. Of MONAI, Dice and surface Dice (use_subvoxels) must; its HD95 and mean surface distance
count voxels, and what they differ by is printed. Our distances are also compared with an exact
distance transform. Without the package surface-distance (`pip install "voxelith[dev]"` brings it)
its part is left out, and said so.
"""

from __future__ import annotations

import argparse
import math
import os
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from line import ROOT
from monai.metrics import (
    compute_average_surface_distance,
    compute_dice,
    compute_hausdorff_distance,
    compute_surface_dice,
)
from numpy.typing import NDArray
from scipy import ndimage

from data_prep.files import write_json
from finetune.metrics import Score, score_class, score_labels
from finetune.settings import TaskClass
from finetune.surfaces import distances, surface
from pretrain.bench import machine, spread
from pretrain.run_folder import versions

try:
    import surface_distance
except ImportError:
    surface_distance = None

Labels = NDArray[np.uint8]
Numbers = dict[str, list[float]]
Program = Callable[[Labels, Labels], Numbers]

SPACING = (1.5, 0.8, 0.8)
EXTENT = (600.0, 409.6, 409.6)
"""Of the image in mm, whatever its shape is."""
TOLERANCE = 2.0
SCORES = ("dsc", "nsd", "hd95", "assd")
SAME = {"ours, masks": SCORES, "surface-distance": SCORES, "monai": ("dsc", "nsd")}
"""What must come out alike; MONAI's other two are other definitions."""


@dataclass(frozen=True)
class Organ:
    """Where an organ's centre lies, as a share of the image, and its half axes in mm."""

    name: str
    centre: tuple[float, float, float]
    axes: tuple[float, float, float]


ORGANS = (
    Organ("liver", (0.62, 0.40, 0.33), (80, 70, 85)),
    Organ("spleen", (0.66, 0.55, 0.72), (50, 35, 28)),
    Organ("right kidney", (0.50, 0.60, 0.35), (55, 28, 26)),
    Organ("left kidney", (0.50, 0.60, 0.65), (55, 28, 26)),
    Organ("stomach", (0.62, 0.40, 0.62), (60, 40, 45)),
    Organ("gallbladder", (0.42, 0.30, 0.45), (30, 15, 15)),
    Organ("oesophagus", (0.80, 0.55, 0.50), (100, 9, 9)),
    Organ("aorta", (0.62, 0.58, 0.53), (170, 12, 12)),
    Organ("vena cava", (0.58, 0.57, 0.47), (130, 11, 11)),
    Organ("pancreas", (0.55, 0.47, 0.52), (20, 18, 70)),
    Organ("right adrenal gland", (0.60, 0.58, 0.40), (18, 5, 12)),
    Organ("left adrenal gland", (0.60, 0.58, 0.60), (18, 5, 12)),
    Organ("duodenum", (0.50, 0.46, 0.42), (40, 15, 25)),
    Organ("bladder", (0.18, 0.45, 0.50), (45, 38, 45)),
    Organ("prostate", (0.10, 0.50, 0.50), (20, 18, 24)),
)
CLASSES = tuple(
    TaskClass(name=organ.name, values=(value,), tolerance_mm=TOLERANCE)
    for value, organ in enumerate(ORGANS, start=1)
)


def main() -> None:
    chosen = _arguments()
    torch.set_num_threads(1)
    load = os.getloadavg()[0]
    spacing = tuple(e / n for e, n in zip(EXTENT, chosen.shape, strict=True))
    truth, prediction = _case(chosen.shape, spacing)
    programs = _programs(spacing)
    if surface_distance is None:
        print('surface-distance is not installed, and left out: pip install "voxelith[dev]"')
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    scores: dict[str, Numbers] = {}
    for _ in range(chosen.repeats):
        for name, program in programs.items():
            began = time.perf_counter()
            scores[name] = program(prediction, truth)
            seconds[name].append(time.perf_counter() - began)
    ours = seconds["ours"]
    against = {
        name: spread([theirs / own for theirs, own in zip(spent, ours, strict=True)])
        for name, spent in seconds.items()
        if name != "ours"
    }
    agreement = {
        name: {
            score: max(
                abs(theirs - own) / (own or 1)
                for own, theirs in zip(scores["ours"][score], found[score], strict=True)
            )
            for score in SCORES
        }
        for name, found in scores.items()
        if name != "ours"
    }
    wrong = [
        f"{name}: {score} differs by {agreement[name][score]:.2g} of ours"
        for name, same in SAME.items()
        for score in same
        if name in agreement and agreement[name][score] > 1e-5
    ]
    if wrong:
        raise SystemExit("error: " + "; ".join(wrong))
    for name, spent in seconds.items():
        whole = spread(spent)
        line = f"{name:<18} {whole['median']:8.2f} s"
        if name in against:
            apart = ", ".join(f"{score} {value:.2%}" for score, value in agreement[name].items())
            line += f"; ours is {against[name]['median']:.1f}x as fast; differs at most by {apart}"
        print(line)
    memory = _memory(prediction, truth, spacing)
    transform = _beside_a_transform(prediction, truth, spacing)
    print(f"ours adds {memory / 2**20:.0f} MiB to two label maps of {truth.nbytes / 2**20:.0f} MiB")
    print(
        f"distances of all surfels: {transform['ours_seconds']:.2f} s, by distance transforms "
        f"{transform['transform_seconds']:.2f} s; they differ by {transform['difference_mm']:.2g}"
    )
    result = {
        "shape": list(chosen.shape),
        "spacing_mm": spacing,
        "tolerance_mm": TOLERANCE,
        "classes": [organ.name for organ in ORGANS],
        "voxels": np.bincount(truth.ravel(), minlength=len(ORGANS) + 1)[1:].tolist(),
        "speed_of_ours_over": against,
        "largest_relative_difference": agreement,
        "peak_bytes_of_ours": memory,
        "distances": transform,
        "seconds": seconds,
        "scores": scores,
        "machine": {**machine(torch.device("cpu")), "load_before": load},
        "versions": versions() | _more_versions(),
    }
    chosen.output.parent.mkdir(parents=True, exist_ok=True)
    write_json(chosen.output, result)
    print(f"{chosen.output}: written")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", type=int, nargs=3, default=(400, 512, 512), metavar="N")
    parser.add_argument("--repeats", type=int, default=3)
    results = ROOT / "docs" / "results"
    parser.add_argument("--output", type=Path, default=results / "metrics.json")
    return parser.parse_args()


# The case.


def _case(shape: tuple[int, ...], spacing: tuple[float, ...]) -> tuple[Labels, Labels]:
    """Truth and prediction [D, H, W]; an organ takes no voxel that an earlier one has."""
    rng = np.random.default_rng(0)
    truth, prediction = np.zeros(shape, np.uint8), np.zeros(shape, np.uint8)
    for value, organ in enumerate(ORGANS, start=1):
        waves = rng.normal(size=(8, 8, 8)).astype(np.float32)
        others = waves + 0.12 * rng.normal(size=waves.shape).astype(np.float32)
        shift = rng.normal(size=3)
        _draw(truth, value, organ, spacing, waves, np.zeros(3), 1.0)
        size = 0.93 if organ.name == "pancreas" else 1.0
        _draw(prediction, value, organ, spacing, others, shift, size)
    for value, where in ((1, 0.05), (8, 0.93)):  # an island of liver, and one of aorta
        start = [int(where * n) for n in shape]
        prediction[tuple(slice(n, n + 5) for n in start)] = value
    return truth, prediction


def _draw(
    labels: Labels,
    value: int,
    organ: Organ,
    spacing: tuple[float, ...],
    waves: NDArray[np.float32],
    shift: NDArray[np.float64],
    size: float,
) -> None:
    box, squares = [], np.zeros((1, 1, 1), np.float32)
    for axis in range(3):
        middle, half = organ.centre[axis] * EXTENT[axis], organ.axes[axis]
        low = max(0, math.floor((middle - 1.4 * half) / spacing[axis]))
        high = min(labels.shape[axis], math.ceil((middle + 1.4 * half) / spacing[axis]))
        box.append(slice(low, high))
        at = (np.arange(low, high) * spacing[axis] - middle - shift[axis]) / half
        squares = squares + (at.astype(np.float32) ** 2).reshape(np.roll([-1, 1, 1], axis))
    zoom = [n / w for n, w in zip(squares.shape, waves.shape, strict=True)]
    border = size + 0.08 * ndimage.zoom(waves, zoom, order=2, mode="nearest", grid_mode=True)
    part = labels[tuple(box)]
    part[(np.sqrt(squares) < border) & (part == 0)] = value


# The programs. Each gives the numbers of all classes.


def _programs(spacing: tuple[float, ...]) -> dict[str, Program]:
    values = range(1, len(ORGANS) + 1)

    def ours(prediction: Labels, truth: Labels) -> Numbers:
        return _numbers(score_labels(prediction, truth, CLASSES, spacing, annotated=values))

    def our_masks(prediction: Labels, truth: Labels) -> Numbers:
        return _numbers(
            [score_class(prediction == v, truth == v, spacing, TOLERANCE) for v in values]
        )

    def theirs(prediction: Labels, truth: Labels) -> Numbers:
        found: Numbers = {score: [] for score in SCORES}
        for value in values:
            masks = truth == value, prediction == value
            apart = surface_distance.compute_surface_distances(*masks, spacing)
            # Its mean distances are one for each direction; ours is over both surfaces together.
            areas = [apart[f"surfel_areas_{side}"].sum() for side in ("gt", "pred")]
            means = surface_distance.compute_average_surface_distance(apart)
            add(
                found,
                surface_distance.compute_dice_coefficient(*masks),
                surface_distance.compute_surface_dice_at_tolerance(apart, TOLERANCE),
                surface_distance.compute_robust_hausdorff(apart, 95),
                np.average(means, weights=areas),
            )
        return found

    def monai(prediction: Labels, truth: Labels) -> Numbers:
        found: Numbers = {score: [] for score in SCORES}
        how: dict[str, Any] = {"include_background": True, "spacing": spacing}
        for value in values:
            masks = [torch.from_numpy(x == value)[None, None] for x in (prediction, truth)]
            add(
                found,
                compute_dice(*masks, include_background=True),
                compute_surface_dice(*masks, [TOLERANCE], use_subvoxels=True, **how),
                compute_hausdorff_distance(*masks, percentile=95, **how),
                compute_average_surface_distance(*masks, symmetric=True, **how),
            )
        return found

    def add(found: Numbers, *numbers: Any) -> None:
        for score, number in zip(SCORES, numbers, strict=True):
            found[score].append(float(number))

    programs: dict[str, Program] = {"ours": ours, "ours, masks": our_masks}
    if surface_distance is not None:
        programs["surface-distance"] = theirs
    return programs | {"monai": monai}


def _numbers(found: list[Score]) -> Numbers:
    return {score: [getattr(one, score) for one in found] for score in SCORES}


# What ours costs beside time, and whether its distances are exact.


def _memory(prediction: Labels, truth: Labels, spacing: tuple[float, ...]) -> int:
    tracemalloc.start()
    score_labels(prediction, truth, CLASSES, spacing, annotated=range(1, len(ORGANS) + 1))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak


def _beside_a_transform(
    prediction: Labels, truth: Labels, spacing: tuple[float, ...]
) -> dict[str, float]:
    """Distances of all surfels by our search, and by exact distance transforms of their lattice."""
    spent = {"ours_seconds": 0.0, "transform_seconds": 0.0, "difference_mm": 0.0}
    boxes = ndimage.find_objects(np.maximum(prediction, truth))
    for value, box in enumerate(boxes, start=1):
        a, b = (surface(labels[box] == value, spacing) for labels in (prediction, truth))
        began = time.perf_counter()
        found = distances(a, b)
        middle = time.perf_counter()
        exact = ndimage.distance_transform_edt(~b.lattice, spacing).ravel()[a.cells]
        spent["transform_seconds"] += time.perf_counter() - middle
        spent["ours_seconds"] += middle - began
        spent["difference_mm"] = max(spent["difference_mm"], float(abs(found - exact).max()))
    return spent


def _more_versions() -> dict[str, str]:
    names = ["scipy"] + ["surface-distance"] * (surface_distance is not None)
    return {name: metadata.version(name) for name in names}


if __name__ == "__main__":
    main()
