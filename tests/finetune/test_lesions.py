"""Lesions against counts by hand and a slow oracle that compares every pair of components."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from numpy.typing import NDArray

from finetune.lesions import count_lesions
from finetune.metrics import score_class

Mask = NDArray[np.bool_]
SPACING = (3.0, 1.0, 2.0)


def blocks(*spans: tuple[int, int]) -> Mask:
    """Lesions of 2 x 2 voxels in section, each from one to another position along W."""
    mask = np.zeros((4, 4, 40), bool)
    for start, stop in spans:
        mask[1:3, 1:3, start:stop] = True
    return mask


def components(mask: Mask) -> list[set[tuple[int, ...]]]:
    """By flooding from voxel to voxel."""
    left = {tuple(int(i) for i in v) for v in np.argwhere(mask)}
    found = []
    while left:
        edge = [left.pop()]
        part = set(edge)
        while edge:
            at = edge.pop()
            for move in itertools.product((-1, 0, 1), repeat=3):
                voxel = tuple(a + m for a, m in zip(at, move, strict=True))
                if voxel in left:
                    left.remove(voxel)
                    part.add(voxel)
                    edge.append(voxel)
        found.append(part)
    return found


def test_counts_by_hand() -> None:
    truth = blocks((0, 4), (8, 12), (20, 24), (30, 34))
    # One exact, one half covered (IoU 1/2, which is not above 1/2), one missed, one covered to
    # three quarters, one invented.
    prediction = blocks((0, 4), (8, 10), (30, 33), (37, 39))
    found = count_lesions(prediction, truth)
    assert (found.tp, found.fp, found.fn) == (3, 1, 1)
    assert found.f1 == pytest.approx(6 / 8)
    assert found.rq == pytest.approx(2 / 4)  # IoU 1 and 3/4, of 4 + 4 lesions
    assert found.pq == pytest.approx((1 + 3 / 4) / 4)


def test_panoptic_quality_is_its_two_factors() -> None:
    found = count_lesions(blocks((0, 4), (8, 11)), blocks((0, 4), (8, 12), (20, 24)))
    recognition, segmentation = 2 / 2.5, (1 + 3 / 4) / 2
    assert found.rq == pytest.approx(recognition)
    assert found.pq == pytest.approx(recognition * segmentation)


def test_one_blob_over_all_is_detected_but_not_recognised() -> None:
    """Touching is enough for F1; that is why PQ stands beside it."""
    found = count_lesions(blocks((0, 40)), blocks((0, 2), (10, 12), (20, 22)))
    assert (found.tp, found.fp, found.fn, found.f1) == (3, 0, 0, 1.0)
    assert (found.rq, found.pq) == (0.0, 0.0)


def test_pieces_of_one_lesion_are_not_invented() -> None:
    found = count_lesions(blocks((0, 2), (4, 6), (8, 10)), blocks((0, 10)))
    assert (found.tp, found.fp, found.fn) == (1, 0, 0)
    assert found.pq == 0.0


def test_corners_join_voxels_into_one_lesion() -> None:
    truth = np.zeros((4, 4, 4), bool)
    truth[0, 0, 0] = truth[1, 1, 1] = truth[2, 2, 2] = True
    found = count_lesions(truth, truth)
    assert (found.tp, found.pq) == (1, 1.0)


def test_random_masks_match_a_slow_oracle(seed: int) -> None:
    rng = np.random.default_rng(seed)
    partial = 0
    for _ in range(12):
        truth = rng.random((6, 8, 9)) < rng.uniform(0.02, 0.1)
        prediction = truth & (rng.random(truth.shape) < 0.8) | (rng.random(truth.shape) < 0.02)
        truth[0, 0, 0] = True
        theirs, ours = components(truth), components(prediction)
        tp = sum(any(t & p for p in ours) for t in theirs)
        fp = sum(not any(t & p for t in theirs) for p in ours)
        ious = [len(t & p) / len(t | p) for t in theirs for p in ours]
        matched = [iou for iou in ious if iou > 0.5]
        partial += sum(iou < 1 for iou in matched)
        mean = (len(theirs) + len(ours)) / 2
        found = count_lesions(prediction, truth)
        assert (found.tp, found.fp, found.fn) == (tp, fp, len(theirs) - tp)
        assert found.rq == pytest.approx(len(matched) / mean)
        assert found.pq == pytest.approx(sum(matched) / mean)
    assert partial


def test_edge_cases_are_decided_as_documented() -> None:
    one, empty = blocks((0, 4), (10, 12)), blocks()

    def lesions(prediction: Mask, truth: Mask, **what: bool) -> tuple[float, ...]:
        s = score_class(prediction, truth, SPACING, 1, **{"lesion": True, **what})
        return (s.lesion_tp, s.lesion_fp, s.lesion_fn, s.lesion_f1, s.lesion_rq, s.lesion_pq)

    assert lesions(one, one) == (2, 0, 0, 1, 1, 1)
    assert lesions(one, empty) == (0, 2, 0, 0, 0, 0)
    assert lesions(empty, one) == (0, 0, 2, 0, 0, 0)
    both = lesions(empty, empty)
    assert both[:3] == (0, 0, 0) and all(math.isnan(v) for v in both[3:])
    for missing in ({"annotated": False}, {"lesion": False}):
        for masks in ((one, one), (one, empty), (empty, one), (empty, empty)):
            counts = lesions(*masks, **missing)
            assert counts[:3] == (-1, -1, -1) and all(math.isnan(v) for v in counts[3:])
