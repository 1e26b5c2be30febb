"""Numbers of the reference implementations, from files that lie outside the repository."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import safe_open
from torch import Tensor

ROOT = Path(__file__).parents[2]
FOLDER = Path(os.environ.get("VOXELITH_PARITY_DIR", ROOT.parent / "shared" / "parity"))

Numbers = tuple[dict[str, Tensor], dict[str, str]]


@pytest.fixture(scope="session")
def parity() -> Callable[[str], Numbers]:
    def read(name: str) -> Numbers:
        """Tensors and metadata of NAME.safetensors; skips where there is no such file."""
        path = FOLDER / f"{name}.safetensors"
        if not path.exists():
            pytest.skip(f"no reference numbers: {path} does not exist (VOXELITH_PARITY_DIR)")
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118

    return read
