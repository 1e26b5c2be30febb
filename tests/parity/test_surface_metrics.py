"""Scores are those of google-deepmind/surface-distance: Dice exactly, surfaces within 1 %.

The 1 % is for distances that equal the tolerance up to float noise, where it and we may round to
either side; everything else is equal.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from finetune.metrics import score_class


def test_scores_are_those_of_surface_distance(parity: Callable[[str], Any]) -> None:
    tensors, _ = parity("surface_metrics")
    values = {name: tensor.numpy() for name, tensor in tensors.items()}
    compared = 0
    for case in sorted({name.split(".")[0] for name in values}):
        masks = values[f"{case}.prediction"].astype(bool), values[f"{case}.reference"].astype(bool)
        for name in values:
            if not name.startswith(f"{case}.nsd_"):
                continue
            tolerance = float(name.removeprefix(f"{case}.nsd_").removesuffix("mm"))
            found = score_class(*masks, values[f"{case}.spacing_mm"], tolerance)
            assert found.dsc == pytest.approx(float(values[f"{case}.dice"]), rel=1e-12)
            assert found.hd95 == pytest.approx(float(values[f"{case}.hd95_mm"]), rel=0.01)
            assert found.nsd == pytest.approx(float(values[name]), rel=0.01)
            compared += 1
    assert compared


def test_random_masks_score_as_with_the_package(seed: int) -> None:
    """Densities and spacings that no file of numbers holds."""
    theirs = pytest.importorskip("surface_distance", reason="needs the package surface-distance")
    rng = np.random.default_rng(seed)
    for _ in range(10):
        spacing = tuple(rng.uniform(0.4, 4.0, 3))
        masks = rng.random((2, 11, 12, 13)) < rng.uniform(0.01, 0.95, (2, 1, 1, 1))
        masks[:, 5, 5, 5] = True
        tolerance = rng.uniform(0.3, 6.0)
        apart = theirs.compute_surface_distances(masks[1], masks[0], spacing)
        areas = [apart[f"surfel_areas_{side}"].sum() for side in ("gt", "pred")]
        means = theirs.compute_average_surface_distance(apart)
        nsd = theirs.compute_surface_dice_at_tolerance(apart, tolerance)
        found = score_class(*masks, spacing, tolerance)
        assert found.dsc == theirs.compute_dice_coefficient(masks[1], masks[0])
        assert found.nsd == pytest.approx(nsd, rel=1e-9)
        assert found.hd95 == pytest.approx(theirs.compute_robust_hausdorff(apart, 95), rel=1e-9)
        assert found.assd == pytest.approx(np.average(means, weights=areas), rel=1e-9)


def test_a_slice_scores_as_with_the_package_in_two_dimensions(seed: int) -> None:
    """Noise and discs; what the slice is thick changes nothing."""
    theirs = pytest.importorskip("surface_distance", reason="needs the package surface-distance")
    rng = np.random.default_rng(seed)
    h, w = np.indices((40, 50))
    for round_ in range(12):
        spacing = tuple(rng.uniform(0.4, 4.0, 2))
        masks = rng.random((2, 40, 50)) < rng.uniform(0.01, 0.95, (2, 1, 1))
        if round_ % 2:
            masks = np.stack([np.hypot(h - 20, w - n) < 14 for n in rng.uniform(16, 34, 2)])
        masks[:, 5, 5] = True
        tolerance = rng.uniform(0.3, 6.0)
        apart = theirs.compute_surface_distances(masks[1], masks[0], spacing)
        lengths = [apart[f"surfel_areas_{side}"].sum() for side in ("gt", "pred")]
        means = theirs.compute_average_surface_distance(apart)
        found = score_class(*masks[:, None], (rng.uniform(0.1, 30), *spacing), tolerance)
        nsd = theirs.compute_surface_dice_at_tolerance(apart, tolerance)
        assert found.nsd == pytest.approx(nsd, rel=1e-9)
        assert found.hd95 == pytest.approx(theirs.compute_robust_hausdorff(apart, 95), rel=1e-9)
        assert found.assd == pytest.approx(np.average(means, weights=lengths), rel=1e-9)
