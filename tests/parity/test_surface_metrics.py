"""Scores are those of google-deepmind/surface-distance: Dice exactly, surfaces within 1 %."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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
