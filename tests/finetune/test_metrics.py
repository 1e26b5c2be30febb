"""Closed forms, the edge-case table, invariances, and the defects that other libraries have."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from surfels import points

from finetune.metrics import Score, score_class, score_labels
from finetune.settings import TaskClass
from finetune.surfaces import surface

Mask = NDArray[np.bool_]
# What a class without lesions is scored by.
NUMBERS = ("dsc", "nsd", "hd95", "assd", "volume_error_ml", "volume_error_relative")


def cube(shape: tuple[int, int, int], start: tuple[int, int, int], side: int) -> Mask:
    mask = np.zeros(shape, bool)
    mask[tuple(slice(s, s + side) for s in start)] = True
    return mask


def ball(
    radius: float,
    spacing: tuple[float, float, float],
    shift: tuple[float, float, float] = (0.0, 0.0, 0.0),
    shape: tuple[int, int, int] = (60, 64, 68),
) -> Mask:
    """A ball in mm around the middle of the image."""
    squares = 0
    for axis, (n, s, m) in enumerate(zip(shape, spacing, shift, strict=True)):
        at = (np.arange(n) - (n - 1) / 2) * s - m
        squares = squares + (at**2).reshape([-1 if a == axis else 1 for a in range(3)])
    return np.asarray(squares < radius**2)


def numbers(score: Score) -> list[float]:
    return [getattr(score, name) for name in NUMBERS]


def test_shifted_cube_has_closed_form() -> None:
    spacing = (2.0, 1.0, 0.5)
    a, b = cube((40, 40, 40), (10, 10, 10), 12), cube((40, 40, 40), (13, 10, 10), 12)
    found = score_class(a, b, spacing, tolerance_mm=1.0)
    assert found.dsc == pytest.approx(9 / 12)
    assert found.volume_pred_ml == found.volume_true_ml == pytest.approx(12**3 * 1.0 / 1000)
    assert (found.volume_error_ml, found.volume_error_relative) == (0, 0)
    assert found.hd95 == pytest.approx(6.0)


def test_shifted_slab_has_closed_form() -> None:
    """Through the whole image, moved along D by 6 mm."""
    spacing = (2.0, 1.0, 0.5)
    a, b = (np.zeros((40, 30, 30), bool) for _ in range(2))
    a[10:20], b[13:23] = True, True
    found = score_class(a, b, spacing, tolerance_mm=5.9)
    areas = surface(a, spacing).areas
    z, y, x = points(surface(a, spacing)).T
    # Of the sides, what stands out of the other slab; both faces by 6 mm, but the hidden one is
    # nearer to the other's sides along the rim.
    side = np.minimum(np.minimum(y, 30 - y), np.minimum(x, 15 - x))
    apart = np.where(z < 26, 26 - z, np.where(z < 40, 0, np.minimum(6, side)))
    assert found.assd == pytest.approx((apart * areas).sum() / areas.sum())
    assert found.nsd == pytest.approx(areas[apart <= 5.9].sum() / areas.sum())
    assert score_class(a, b, spacing, tolerance_mm=6.0).nsd == 1.0


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (2.0, 0.8, 1.25)])
def test_balls_have_closed_forms(spacing: tuple[float, float, float]) -> None:
    """Concentric: every point is as far as the radii differ, but for half a voxel's diagonal."""
    small, large = ball(13.0, spacing), ball(18.0, spacing)
    found = score_class(large, small, spacing, tolerance_mm=1.0)
    error = math.hypot(*spacing) / 2
    assert found.assd == pytest.approx(5.0, abs=error)
    assert found.hd95 == pytest.approx(5.0, abs=2 * error)
    assert found.nsd == 0.0
    assert score_class(large, small, spacing, tolerance_mm=5 + 3 * error).nsd == 1.0
    ratio = (18 / 13) ** 3
    assert found.dsc == pytest.approx(2 / (1 + ratio), rel=0.02)
    assert found.volume_error_relative == pytest.approx(ratio - 1, rel=0.03)
    assert found.volume_error_ml == pytest.approx(4 / 3 * math.pi * (18**3 - 13**3) / 1e3, rel=0.03)


def test_a_shifted_ball_has_closed_forms() -> None:
    """Moved by m: the distance at angle t follows from the law of cosines, cos t is uniform."""
    radius, m = 22.0, 6.0
    a, b = ball(radius, (1.0, 1.0, 1.0)), ball(radius, (1.0, 1.0, 1.0), (m, 0.0, 0.0))
    found = score_class(a, b, (1.0, 1.0, 1.0), tolerance_mm=3.0)
    cosine = np.linspace(-1, 1, 2001)
    apart = abs(np.sqrt(radius**2 + m**2 - 2 * radius * m * cosine) - radius)
    error = math.sqrt(3) / 2  # surfels of a staircase stand that far off the ball at most
    assert found.hd95 == pytest.approx(np.percentile(apart, 95), abs=error)
    assert found.assd == pytest.approx(apart.mean(), abs=error / 2)
    low, high = ((apart <= 3.0 + shift).mean() for shift in (-error, error))
    assert low < found.nsd < high
    # Of a ball, the lens that both share: Dice is its volume over the ball's.
    assert found.dsc == pytest.approx(1 - 3 * m / (4 * radius) + m**3 / (16 * radius**3), rel=0.01)


def test_identical_masks_score_perfectly() -> None:
    mask = cube((9, 10, 11), (2, 0, 3), 5)  # touches the border
    found = score_class(mask, mask, (1.0, 1.0, 3.0), 0.5, lesion=True)
    assert (found.status, *numbers(found)) == ("scored", 1.0, 1.0, 0.0, 0.0, 0.0, 0.0)
    assert (found.lesion_tp, found.lesion_f1, found.lesion_pq) == (1, 1.0, 1.0)


def test_scores_are_those_of_brute_force(seed: int) -> None:
    rng = np.random.default_rng(seed)
    spacing, tolerance = (2.0, 0.9, 1.4), 1.7
    for _ in range(4):
        a, b = rng.random((2, 7, 8, 6)) < rng.uniform(0.02, 0.4, (2, 1, 1, 1))
        a[0, 0, 0] = b[6, 7, 5] = True
        one, two = surface(a, spacing), surface(b, spacing)
        gaps = np.linalg.norm(points(one)[:, None] - points(two)[None], axis=2)
        apart = [(gaps.min(1), one.areas), (gaps.min(0), two.areas)]
        area = sum(w.sum() for _, w in apart)
        hd95 = max(
            min(limit for limit in d if w[d <= limit].sum() >= 0.95 * w.sum() - 1e-9)
            for d, w in apart
        )
        found = score_class(a, b, spacing, tolerance)
        assert found.dsc == pytest.approx(2 * (a & b).sum() / (a.sum() + b.sum()))
        assert found.nsd == pytest.approx(sum(w[d <= tolerance].sum() for d, w in apart) / area)
        assert found.assd == pytest.approx(sum((d * w).sum() for d, w in apart) / area)
        assert found.hd95 == pytest.approx(hd95)


# The table of the module's docstring, row by row.


def test_absent_and_found_absent_is_not_averaged() -> None:
    empty = np.zeros((8, 8, 8), bool)
    found = score_class(empty, empty, (3.0, 1.0, 2.0), 1)
    assert found.status == "true_negative"
    assert all(math.isnan(v) for v in numbers(found))
    assert (found.volume_pred_ml, found.volume_true_ml) == (0, 0)


def test_an_invented_structure_scores_worst() -> None:
    full, empty = cube((8, 8, 8), (2, 2, 2), 4), np.zeros((8, 8, 8), bool)
    found = score_class(full, empty, (3.0, 1.0, 2.0), 1)
    worst, volume = math.dist((0, 0, 0), (24, 8, 16)), 64 * 6 / 1000
    assert found.status == "false_positive"
    assert numbers(found)[:5] == pytest.approx([0, 0, worst, worst, volume])
    assert math.isnan(found.volume_error_relative)
    assert (found.volume_pred_ml, found.volume_true_ml) == (pytest.approx(volume), 0)


def test_a_missed_structure_scores_worst() -> None:
    full, empty = cube((8, 8, 8), (2, 2, 2), 4), np.zeros((8, 8, 8), bool)
    found = score_class(empty, full, (3.0, 1.0, 2.0), 1)
    worst, volume = math.dist((0, 0, 0), (24, 8, 16)), 64 * 6 / 1000
    assert found.status == "missed"
    assert numbers(found) == pytest.approx([0, 0, worst, worst, -volume, -1])


def test_a_class_that_was_not_annotated_has_no_score() -> None:
    full, empty = cube((8, 8, 8), (2, 2, 2), 4), np.zeros((8, 8, 8), bool)
    for prediction in (full, empty):
        found = score_class(prediction, empty, (3.0, 1.0, 2.0), 1, annotated=False)
        assert found.status == "not_annotated"
        assert all(math.isnan(v) for v in [*numbers(found), found.volume_true_ml])
        assert found.volume_pred_ml == pytest.approx(prediction.sum() * 6 / 1000)


# Invariances.


def test_flips_and_permutations_change_nothing(seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = (rng.random((2, 12, 9, 11)) > 0.6).astype(bool)
    spacing = np.array([2.5, 1.0, 0.7])
    expected = score_class(a, b, spacing, 1.2, lesion=True)
    for axes in [(0, 1, 2), (2, 0, 1), (1, 0, 2)]:
        for flip in [(), (0,), (1, 2), (0, 1, 2)]:
            moved = [np.flip(m.transpose(axes), flip) for m in (a, b)]
            found = score_class(moved[0], moved[1], spacing[list(axes)], 1.2, lesion=True)
            values, others = (list(dataclasses.asdict(s).values())[1:] for s in (found, expected))
            assert values == pytest.approx(others)


def test_swapping_prediction_and_truth_turns_the_sign_of_the_volume_alone(seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = (rng.random((2, 9, 9, 9)) > 0.7).astype(bool)
    one, other = (score_class(*masks, (1, 2, 3), 1, lesion=True) for masks in ((a, b), (b, a)))
    for name in ("dsc", "nsd", "hd95", "assd", "lesion_rq", "lesion_pq"):
        assert getattr(one, name) == pytest.approx(getattr(other, name))
    assert one.volume_error_ml == pytest.approx(-other.volume_error_ml)


def test_a_larger_tolerance_never_scores_less(seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = (rng.random((2, 9, 9, 9)) > 0.9).astype(bool)
    scores = [score_class(a, b, (1, 2, 3), t).nsd for t in np.linspace(0.1, 12, 30)]
    assert scores == sorted(scores)
    assert scores[0] < scores[-1] == 1.0


def test_a_worse_prediction_never_scores_better() -> None:
    truth = cube((30, 30, 30), (10, 10, 10), 8)
    scores = [
        score_class(np.roll(truth, shift, 0), truth, (1.5, 1, 1), 2.0) for shift in range(0, 10)
    ]
    for name, sign in (("dsc", -1), ("nsd", -1), ("hd95", 1), ("assd", 1)):
        values = [sign * getattr(score, name) for score in scores]
        assert values == sorted(values) and values[0] < values[-1]


def test_tolerance_survives_float32_spacing() -> None:
    a, b = cube((20, 20, 20), (5, 5, 5), 8), cube((20, 20, 20), (6, 5, 5), 8)
    spacing = np.array([0.8, 0.8, 0.8], np.float32)  # 0.800000012
    assert score_class(a, b, spacing, 0.8).nsd == 1.0


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match="must be the same"):
        score_class(np.zeros((3, 3, 3), bool), np.zeros((3, 3, 4), bool), (1, 1, 1), 1)
    with pytest.raises(ValueError, match="must be the same"):
        score_labels(
            np.zeros((3, 3), np.uint8), np.zeros((3, 3), np.uint8), [], (1, 1, 1), annotated=()
        )


# What others get wrong, so that it is not wrong here.


def mean(scores: list[Score], name: str) -> float:
    return float(np.nanmean([getattr(score, name) for score in scores]))


def test_missing_a_structure_never_pays() -> None:
    """MONAI gives it no HD95, so the mean over cases improves when a bad case is left out."""
    truth = cube((20, 20, 20), (2, 2, 2), 5)
    good, poor = truth, cube((20, 20, 20), (14, 14, 14), 5)
    empty = np.zeros_like(truth)
    before = [score_class(p, truth, (1, 1, 1), 1) for p in (good, poor)]
    after = [score_class(p, truth, (1, 1, 1), 1) for p in (good, empty)]
    assert mean(after, "dsc") <= mean(before, "dsc")
    assert mean(after, "nsd") <= mean(before, "nsd")
    for name in ("hd95", "assd"):
        assert mean(after, name) > mean(before, name)
        assert math.isfinite(mean(after, name))  # surface-distance: infinite


def test_an_invented_structure_always_costs() -> None:
    """MONAI's Dice ignores cases whose truth is empty, whatever was predicted."""
    truth = cube((20, 20, 20), (2, 2, 2), 5)
    empty = np.zeros_like(truth)
    one = [score_class(truth, truth, (1, 1, 1), 1), score_class(empty, empty, (1, 1, 1), 1)]
    two = [score_class(truth, truth, (1, 1, 1), 1), score_class(truth, empty, (1, 1, 1), 1)]
    assert mean(two, "dsc") < mean(one, "dsc") == 1.0
    assert mean(two, "hd95") > mean(one, "hd95") == 0.0


def test_finding_nothing_where_nothing_is_is_no_success() -> None:
    """MetricsReloaded gives 1, so empty cases lift the mean; nnU-Net and we do not average them."""
    truth = cube((20, 20, 20), (2, 2, 2), 5)
    empty = np.zeros_like(truth)
    half = score_class(np.roll(truth, 2, 0), truth, (1, 1, 1), 1)
    both = [half, score_class(empty, empty, (1, 1, 1), 1)]
    for name in NUMBERS:
        assert mean(both, name) == pytest.approx(getattr(half, name))


def test_areas_weigh_and_not_the_number_of_voxels() -> None:
    """Of a thin slab across coarse slices, one face is wrong: half of the area, however sampled.

    Counting surface voxels would give the same weight to a voxel of 5 x 1 and of 1 x 1 mm².
    """
    fine, coarse = np.zeros((2, 44, 40, 40), bool), np.zeros((2, 44, 40, 8), bool)
    for masks in (fine, coarse):
        masks[0, 10:30], masks[1, 10:34] = True, True
    scores = [
        score_class(a, b, spacing, 1.0)
        for (a, b), spacing in ((fine, (1.0, 1.0, 1.0)), (coarse, (1.0, 1.0, 5.0)))
    ]
    assert scores[0].nsd == pytest.approx(scores[1].nsd, rel=0.02)
    assert scores[0].assd == pytest.approx(scores[1].assd, rel=0.03)


def test_scores_do_not_hang_on_the_size_of_the_image_where_both_are_present() -> None:
    """And worst distances do: they are the diagonal of the image, not of a crop of it."""
    a, b = cube((12, 12, 12), (2, 3, 4), 4), cube((12, 12, 12), (4, 3, 5), 4)
    wide = [np.pad(m, ((3, 9), (0, 5), (7, 2))) for m in (a, b)]
    assert numbers(score_class(a, b, (1, 2, 3), 1)) == numbers(score_class(*wide, (1, 2, 3), 1))
    empty = np.zeros_like(a)
    part = score_class(empty, a, (1, 2, 3), 1, image_shape=wide[0].shape)
    assert part.hd95 == score_class(np.zeros_like(wide[0]), wide[0], (1, 2, 3), 1).hd95


# Whole label maps.


def task_class(name: str, *values: int, **what: Any) -> TaskClass:
    return TaskClass(name=name, values=values, tolerance_mm=1.5, **what)


@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_label_maps_are_scored_as_their_masks(kind: type, seed: int) -> None:
    """Regions that overlap, values that occur nowhere, 16 bits, voxels that do not count."""
    rng = np.random.default_rng(seed)
    scale = 1 if kind is np.uint8 else 9000
    truth, prediction = (scale * rng.integers(0, 6, (2, 9, 8, 11))).astype(kind)
    truth[:, :, 6:][truth[:, :, 6:] == 2 * scale] = 0
    prediction[prediction == 5 * scale] = 0
    counts = rng.random(truth.shape) < 0.8
    classes = [
        task_class("whole", *(scale * v for v in (1, 2, 3)), lesion=True),
        task_class("core", scale * 2, scale * 3),
        task_class("one", scale * 1),
        task_class("never predicted", scale * 5, lesion=True),
        task_class("nowhere", 60000),
        task_class("not looked for", scale * 4),
    ]
    annotated = [scale * v for v in (1, 2, 3, 5)] + [60000]
    spacing = (2.0, 1.0, 0.7)
    for counted in (None, counts):
        found = score_labels(
            prediction, truth, classes, spacing, annotated=annotated, counts=counted
        )
        for score, chosen in zip(found, classes, strict=True):
            masks = [np.isin(m, chosen.values) for m in (prediction, truth)]
            masks = masks if counted is None else [m & counted for m in masks]
            expected = score_class(
                *masks,
                spacing,
                chosen.tolerance_mm,
                annotated=chosen.name != "not looked for",
                lesion=chosen.lesion,
            )
            one, other = dataclasses.astuple(score), dataclasses.astuple(expected)
            assert one[0] == other[0]
            assert one[1:] == pytest.approx(other[1:], nan_ok=True)
    statuses = ["scored"] * 3 + ["missed", "true_negative", "not_annotated"]
    assert [score.status for score in found] == statuses


def test_scoring_changes_no_map() -> None:
    truth = cube((9, 9, 9), (1, 2, 3), 4).astype(np.uint8)
    prediction = np.roll(truth, 1, 0)
    for labels in (truth, prediction):
        labels.flags.writeable = False
    kept = truth.copy()
    score_labels(prediction, truth, [task_class("a", 1)], (1, 1, 1), annotated=[1])
    assert (truth == kept).all()


# One slice: contours, not the surfaces of a slab one voxel thick.


def disc(middle: tuple[float, float], radius: float, shape: tuple[int, int]) -> Mask:
    h, w = np.indices(shape)
    return np.asarray(np.hypot(h - middle[0], w - middle[1]) < radius)


@pytest.mark.parametrize("across", range(3))
@pytest.mark.parametrize("thickness", [0.3, 1.0, 40.0])
def test_shifted_discs_are_compared_by_their_contours(across: int, thickness: float) -> None:
    """Moved by 10 mm a circle lies off the other by up to 10 |cos|, within 2 mm for few angles."""
    shape = (140, 150)
    truth, prediction = disc((70, 70), 50, shape), disc((70, 80), 50, shape)
    masks = [np.expand_dims(mask, across) for mask in (prediction, truth)]
    spacing = np.insert([1.0, 1.0], across, thickness)
    found = score_class(*masks, spacing, 2.0)
    # Every angle's distance: from a point of one circle to the other, all round.
    angles = np.linspace(0, 2 * np.pi, 20000, endpoint=False)
    x, y = 50 * np.cos(angles) + 10, 50 * np.sin(angles)
    exact = np.abs(np.hypot(x, y) - 50)
    assert found.nsd == pytest.approx((exact <= 2).mean(), abs=0.05)
    assert found.hd95 == pytest.approx(np.percentile(exact, 95), abs=0.3)
    assert found.assd == pytest.approx(exact.mean(), abs=0.4)  # a staircase is longer
    plain = score_class(*(mask[None] for mask in (prediction, truth)), (1, 1, 1), 2.0)
    assert numbers(found)[:4] == numbers(plain)[:4]  # in whatever direction, however thick
    assert found.volume_true_ml == pytest.approx(thickness * plain.volume_true_ml)


def test_concentric_squares_have_closed_form() -> None:
    """All around 3 mm apart but at the corners, which are sqrt(18) mm apart."""
    a, b = np.zeros((2, 1, 260, 260), bool)
    a[0, 10:250, 10:250] = b[0, 13:247, 13:247] = True
    found = score_class(a, b, (7, 1, 1), 2.5)
    assert (found.nsd, found.hd95) == (0, pytest.approx(3))
    assert score_class(a, b, (7, 1, 1), 5).nsd == 1


def test_a_missed_slice_is_off_by_its_own_diagonal() -> None:
    truth = np.zeros((1, 30, 40), bool)
    truth[0, 3, 4] = True
    found = score_class(np.zeros_like(truth), truth, (25.0, 2.0, 1.0), 1.0)
    assert found.status == "missed" and found.hd95 == math.hypot(60, 40)


def test_what_is_one_slice_thick_in_a_volume_keeps_its_faces() -> None:
    """Scored in its box it is the same as within the whole image, and not a contour."""
    shape = (9, 140, 150)
    labels = np.zeros((2, *shape), np.uint8)
    labels[0, 4], labels[1, 4] = disc((70, 80), 50, shape[1:]), disc((70, 70), 50, shape[1:])
    chosen = TaskClass(name="a", values=(1,), tolerance_mm=2.0)
    (found,) = score_labels(labels[0], labels[1], [chosen], (1, 1, 1), annotated=[1])
    whole = score_class(labels[0] == 1, labels[1] == 1, (1, 1, 1), 2.0)
    assert numbers(found) == numbers(whole)
    assert found.nsd > 0.85  # the faces lie on each other
    flat = labels[:, 4:5]
    (slice_alone,) = score_labels(flat[0], flat[1], [chosen], (1, 1, 1), annotated=[1])
    assert slice_alone.nsd < 0.25
