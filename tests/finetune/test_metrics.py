"""Closed forms, the edge-case table, invariances, and the public reference implementation."""

import math
import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from finetune.metrics import distances, score_class, surface

PARITY = Path(os.environ.get("VOXELITH_PARITY_DIR", Path(__file__).parents[3] / "shared/parity"))


def cube(shape: tuple[int, int, int], start: tuple[int, int, int], side: int) -> np.ndarray:
    mask = np.zeros(shape, bool)
    mask[tuple(slice(s, s + side) for s in start)] = True
    return mask


def test_agrees_with_surface_distance() -> None:
    file = PARITY / "surface_metrics.safetensors"
    if not file.exists():
        pytest.skip("set VOXELITH_PARITY_DIR to the folder with surface_metrics.safetensors")
    data = load_file(file)
    cases = sorted({name.split(".")[0] for name in data})
    assert cases
    for case in cases:
        prediction, truth = data[f"{case}.prediction"], data[f"{case}.reference"]
        for name in data:
            if not name.startswith(f"{case}.nsd_"):
                continue
            tolerance = float(name.removeprefix(f"{case}.nsd_").removesuffix("mm"))
            found = score_class(prediction, truth, data[f"{case}.spacing_mm"], tolerance)
            assert found.dsc == pytest.approx(float(data[f"{case}.dice"]), rel=1e-12)
            assert found.hd95 == pytest.approx(float(data[f"{case}.hd95_mm"]), rel=0.01)
            assert found.nsd == pytest.approx(float(data[name]), rel=0.01)


def test_shifted_cube_has_closed_form() -> None:
    spacing = (2.0, 1.0, 0.5)
    a, b = cube((40, 40, 40), (10, 10, 10), 12), cube((40, 40, 40), (13, 10, 10), 12)
    found = score_class(a, b, spacing, tolerance_mm=1.0)
    assert found.dsc == pytest.approx(9 / 12)
    assert found.volume_pred_ml == found.volume_true_ml == pytest.approx(12**3 * 1.0 / 1000)
    assert found.hd95 == pytest.approx(6.0)


def test_distances_are_those_of_brute_force() -> None:
    rng = np.random.default_rng(3)
    a, b = (surface(rng.random((7, 8, 6)) > 0.8, (2.0, 0.9, 1.4)) for _ in range(2))
    brute = np.linalg.norm(a.points[:, None] - b.points[None], axis=2).min(axis=1)
    assert distances(a, b) == pytest.approx(brute)
    within = brute <= 1.5
    share = a.areas[within].sum()
    assert 0 < share < a.areas.sum()


def test_identical_masks_score_perfectly() -> None:
    mask = cube((9, 10, 11), (2, 0, 3), 5)  # touches the border
    found = score_class(mask, mask, (1.0, 1.0, 3.0), 0.5)
    assert (found.status, found.dsc, found.nsd, found.hd95) == ("scored", 1.0, 1.0, 0.0)


def test_surface_area_of_a_sphere() -> None:
    grid = np.indices((64, 64, 64)) - 31.5
    radius, exact = 14.4, 4 * math.pi * 14.4**2
    # A binary mask's surface is a staircase: its area is some percent too large, more so where
    # voxels are longer. Counting voxel faces instead would give 50 %.
    for spacing, excess in [((1.0, 1.0, 1.0), 1.10), ((2.0, 1.0, 0.5), 1.17)]:
        scaled = grid * np.array(spacing)[:, None, None, None]
        area = surface((scaled**2).sum(0) < radius**2, spacing).areas.sum()
        assert exact < area < excess * exact


def test_area_of_a_slab_is_exact_per_axis() -> None:
    mask = np.zeros((20, 20, 20), bool)
    mask[8:12] = True
    spacing = (3.0, 0.7, 1.1)
    found = surface(mask, spacing)
    flat = np.isin(found.points[:, 0], [8 * 3.0, 12 * 3.0])
    inner = flat & ((found.points[:, 1:] > 0).all(1))
    inner &= (found.points[:, 1] < 20 * 0.7 - 1e-9) & (found.points[:, 2] < 20 * 1.1 - 1e-9)
    assert found.areas[inner] == pytest.approx(0.7 * 1.1)


def test_edge_cases_are_decided_as_documented() -> None:
    full, empty = cube((8, 8, 8), (2, 2, 2), 4), np.zeros((8, 8, 8), bool)
    spacing = (3.0, 1.0, 2.0)
    worst = math.dist((0, 0, 0), (24, 8, 16))
    both = score_class(empty, empty, spacing, 1)
    assert both.status == "true_negative"
    assert all(math.isnan(v) for v in (both.dsc, both.nsd, both.hd95))
    invented = score_class(full, empty, spacing, 1)
    assert (invented.status, invented.dsc, invented.nsd) == ("false_positive", 0, 0)
    assert invented.hd95 == pytest.approx(worst)
    assert invented.volume_pred_ml == pytest.approx(64 * 6 / 1000)
    missed = score_class(empty, full, spacing, 1)
    assert (missed.status, missed.dsc, missed.nsd) == ("missed", 0, 0)
    assert missed.hd95 == pytest.approx(worst)
    unknown = score_class(full, empty, spacing, 1, annotated=False)
    assert unknown.status == "not_annotated"
    assert all(math.isnan(v) for v in (unknown.dsc, unknown.nsd, unknown.hd95))


def test_flips_and_permutations_change_nothing() -> None:
    rng = np.random.default_rng(0)
    a, b = (rng.random((2, 12, 9, 11)) > 0.6).astype(bool)
    spacing = np.array([2.5, 1.0, 0.7])
    expected = score_class(a, b, spacing, 1.2)
    for axes in [(0, 1, 2), (2, 0, 1), (1, 0, 2)]:
        for flip in [(), (0,), (1, 2), (0, 1, 2)]:
            moved = [np.flip(m.transpose(axes), flip) for m in (a, b)]
            found = score_class(moved[0], moved[1], spacing[list(axes)], 1.2)
            for name in ("dsc", "nsd", "hd95", "volume_pred_ml"):
                assert getattr(found, name) == pytest.approx(getattr(expected, name))


def test_swapping_prediction_and_truth_changes_nothing() -> None:
    rng = np.random.default_rng(1)
    a, b = (rng.random((2, 9, 9, 9)) > 0.7).astype(bool)
    one, other = score_class(a, b, (1, 2, 3), 1), score_class(b, a, (1, 2, 3), 1)
    assert (one.dsc, one.nsd, one.hd95) == pytest.approx((other.dsc, other.nsd, other.hd95))


def test_tolerance_survives_float32_spacing() -> None:
    a, b = cube((20, 20, 20), (5, 5, 5), 8), cube((20, 20, 20), (6, 5, 5), 8)
    spacing = np.array([0.8, 0.8, 0.8], np.float32)  # 0.800000012
    assert score_class(a, b, spacing, 0.8).nsd == 1.0


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match="must be the same"):
        score_class(np.zeros((3, 3, 3), bool), np.zeros((3, 3, 4), bool), (1, 1, 1), 1)
