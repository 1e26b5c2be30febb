"""NT-Xent is that of nnssl."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from pretrain.contrast import nt_xent


def test_nt_xent(parity: Callable[[str], Any]) -> None:
    tensors, metadata = parity("nt_xent")
    found = nt_xent(tensors["input.z1"], tensors["input.z2"], float(metadata["temperature"]))
    expected = next(t for name, t in tensors.items() if name.startswith("expected.loss"))
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
