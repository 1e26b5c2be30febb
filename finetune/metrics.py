"""Scores of one class in one case, with every edge case decided.

`dsc` is Dice. `nsd`, `hd95` and `assd` compare surfaces by area (surfaces.py): surface Dice at a
tolerance after Nikolov et al. 2018, arXiv:1809.04430; HD95, the larger of the two directed 95th
percentiles; ASSD, the mean distance over both surfaces together (Heimann et al. 2009,
doi:10.1109/TMI.2009.2013851). `volume_error_ml` is prediction minus truth,
`volume_error_relative` the same as a share of the truth. `lesion_*` are of classes that a task
declares to be made of lesions (lesions.py).

What happens with empty masks decides whether missing an organ is punished (metric version 2):

| truth | prediction | status | dsc, nsd | hd95, assd | volume_error_ml | _relative |
| --- | --- | --- | --- | --- | --- | --- |
| present | present | scored | computed | computed | computed | computed |
| absent | absent | true_negative | NaN | NaN | NaN | NaN |
| absent | present | false_positive | 0 | image diagonal | computed | NaN |
| present | absent | missed | 0 | image diagonal | computed | -1 |
| not annotated | any | not_annotated | NaN | NaN | NaN | NaN |

| truth | prediction | lesion_tp | lesion_fp | lesion_fn | lesion_f1, lesion_rq, lesion_pq |
| --- | --- | --- | --- | --- | --- |
| present | present | counted | counted | counted | computed |
| absent | absent | 0 | 0 | 0 | NaN |
| absent | present | 0 | counted | 0 | 0 |
| present | absent | 0 | 0 | counted | 0 |
| not annotated | any | -1 | -1 | -1 | NaN |
| class without lesions | any | -1 | -1 | -1 | NaN |

NaN means "not averaged", -1 "not counted". An invented volume is no share of an absent truth: it
costs in `volume_error_ml`, and in the relative error it cannot. Axes are [D, H, W], spacing is
(d, h, w) in mm. In an image of one slice surfaces are contours and the diagonal is the slice's: how
thick it is counts in volumes alone.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from finetune.lesions import count_lesions
from finetune.settings import TaskClass
from finetune.surfaces import Floats, Mask, distances, surface

METRIC_VERSION = 2
"""Raised when the same masks no longer give the same score."""

Box = tuple[slice, ...]


@dataclass(frozen=True)
class Score:
    """One class in one case. Volumes in ml, distances in mm, all else from 0 to 1."""

    status: str
    volume_pred_ml: float
    volume_true_ml: float
    dsc: float = math.nan
    nsd: float = math.nan
    hd95: float = math.nan
    assd: float = math.nan
    volume_error_ml: float = math.nan
    volume_error_relative: float = math.nan
    lesion_tp: int = -1
    lesion_fp: int = -1
    lesion_fn: int = -1
    lesion_f1: float = math.nan
    lesion_rq: float = math.nan
    lesion_pq: float = math.nan


def score_labels(
    prediction: NDArray[Any],
    truth: NDArray[Any],
    classes: Sequence[TaskClass],
    spacing: Sequence[float],
    *,
    annotated: Collection[int],
    counts: Mask | None = None,
) -> list[Score]:
    """Scores each class of a pair of label maps.

    A whole map is passed once, to find where its values lie; classes are scored in their boxes.

    Args:
        prediction: label values [D, H, W], unsigned.
        truth: label values [D, H, W], unsigned.
        classes: the classes, which may share values.
        spacing: (d, h, w) in mm.
        annotated: the values that were looked for; a class with others is not annotated.
        counts: False [D, H, W] where voxels count neither for nor against; None if all count.

    Raises:
        ValueError: the maps differ in shape or are not three-dimensional.
    """
    _check(prediction, truth)
    places = [ndimage.find_objects(labels) for labels in (prediction, truth)]
    scores = []
    for chosen in classes:
        box = _union([boxes[v - 1] for boxes in places for v in chosen.values if v <= len(boxes)])
        found, there = (_holds(labels[box], chosen.values) for labels in (prediction, truth))
        if counts is not None:
            found, there = found & counts[box], there & counts[box]
        scores.append(
            score_class(
                found,
                there,
                spacing,
                chosen.tolerance_mm,
                annotated=set(annotated).issuperset(chosen.values),
                lesion=chosen.lesion,
                image_shape=truth.shape,
            )
        )
    return scores


def score_class(
    prediction: Mask,
    truth: Mask,
    spacing: Sequence[float],
    tolerance_mm: float,
    *,
    annotated: bool = True,
    lesion: bool = False,
    image_shape: Sequence[int] | None = None,
) -> Score:
    """Scores one class in one case by the table at the top of this module.

    Args:
        prediction: [D, H, W].
        truth: [D, H, W].
        spacing: (d, h, w) in mm.
        tolerance_mm: distance below which surface Dice counts a surfel as right.
        annotated: False if the class was not looked for in this case; absence then means nothing.
        lesion: whether the class is made of lesions, to be counted one by one.
        image_shape: (D, H, W) of the image where the masks are a part of it; its diagonal is the
            worst distance, and whether it is a single slice decides what a surface is.

    Raises:
        ValueError: the masks differ in shape or are not three-dimensional.
    """
    _check(prediction, truth)
    n_pred, n_true = int(np.count_nonzero(prediction)), int(np.count_nonzero(truth))
    d, h, w = (float(s) for s in spacing)
    voxel_ml = d * h * w / 1000
    if not annotated:
        return Score("not_annotated", n_pred * voxel_ml, math.nan)
    score = Score("true_negative", n_pred * voxel_ml, n_true * voxel_ml)
    if n_pred == 0 and n_true == 0:
        return replace(score, lesion_tp=0, lesion_fp=0, lesion_fn=0) if lesion else score
    score = replace(
        score,
        volume_error_ml=(n_pred - n_true) * voxel_ml,
        volume_error_relative=(n_pred - n_true) / n_true if n_true else math.nan,
    )
    image_shape = tuple(image_shape or truth.shape)
    box = _union_box(prediction, truth)
    prediction, truth = prediction[box], truth[box]
    if lesion:
        found = count_lesions(prediction, truth)
        score = replace(
            score,
            lesion_tp=found.tp,
            lesion_fp=found.fp,
            lesion_fn=found.fn,
            lesion_f1=found.f1,
            lesion_rq=found.rq,
            lesion_pq=found.pq,
        )
    sides = list(zip(image_shape, (d, h, w), strict=True))
    if 1 in image_shape:  # and not the box: what is one voxel thick in a volume has two faces
        across = image_shape.index(1)
        prediction, truth = prediction.squeeze(across), truth.squeeze(across)
        del sides[across]
    if n_pred == 0 or n_true == 0:
        worst = math.hypot(*(n * s for n, s in sides))
        status = "missed" if n_true else "false_positive"
        return replace(score, status=status, dsc=0.0, nsd=0.0, hd95=worst, assd=worst)
    a, b = (surface(mask, [s for _, s in sides]) for mask in (prediction, truth))
    to_truth, to_pred = distances(a, b), distances(b, a)
    area = a.areas.sum() + b.areas.sum()
    # Headers hold spacings as float32: 0.8 mm arrives as 0.80000001, and is still within 0.8 mm.
    limit = tolerance_mm + 1e-5
    within = a.areas[to_truth <= limit].sum() + b.areas[to_pred <= limit].sum()
    return replace(
        score,
        status="scored",
        dsc=2 * int(np.count_nonzero(prediction & truth)) / (n_pred + n_true),
        nsd=float(within / area),
        hd95=max(_percentile(to_truth, a.areas, 0.95), _percentile(to_pred, b.areas, 0.95)),
        assd=float((to_truth @ a.areas + to_pred @ b.areas) / area),
    )


def _check(prediction: NDArray[Any], truth: NDArray[Any]) -> None:
    if prediction.shape != truth.shape or truth.ndim != 3:
        raise ValueError(
            f"prediction {prediction.shape} and truth {truth.shape} must be the same [D, H, W]"
        )


def _percentile(values: Floats, weights: Floats, fraction: float) -> float:
    """The smallest value that at least `fraction` of the weight does not exceed."""
    order = np.argsort(values)
    share = np.cumsum(weights[order]) / weights.sum()
    return float(values[order][min(int(np.searchsorted(share, fraction)), len(values) - 1)])


def _holds(labels: NDArray[Any], values: Sequence[int]) -> Mask:
    """Where one of the values stands; a table is many times faster than numpy's isin."""
    table = np.zeros(max(*values, int(labels.max(initial=0))) + 1, bool)
    table[list(values)] = True
    return np.asarray(table[labels])


def _union(boxes: Sequence[Box | None]) -> Box:
    """The smallest box that holds all; of one voxel if there is none."""
    some = [box for box in boxes if box is not None]
    if not some:
        return (slice(0, 1),) * 3
    sides = zip(*some, strict=True)
    return tuple(slice(min(s.start for s in side), max(s.stop for s in side)) for side in sides)


def _union_box(a: Mask, b: Mask) -> Box:
    """The smallest box that holds both masks."""
    (box,) = ndimage.find_objects((a | b).view(np.uint8))
    return tuple(box)
