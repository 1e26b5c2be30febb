"""The fused volume is that of PyMIC, for the labels that PyMIC drew."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pretrain.objectives.volume_fusion import fuse


def test_fused_volumes_are_those_of_the_reference(parity: Callable[[str], Any]) -> None:
    tensors, metadata = parity("volume_fusion_blend")
    label = tensors["input.label"]
    found = fuse(
        tensors["input.foreground"], tensors["input.background"], label[:, 0], int(metadata["K"])
    )
    expected = tensors["expected.fused"]
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    for k, whole in ((0, "input.background"), (int(metadata["K"]), "input.foreground")):
        assert (found == tensors[whole])[label == k].all()
