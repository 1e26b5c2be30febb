"""Numbers of the reference implementations; see the README beside them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import safe_open
from torch import Tensor

ROOT = Path(__file__).parents[2]
Parity = Callable[[str], tuple[dict[str, Tensor], dict[str, str]]]


@pytest.fixture(scope="session")
def parity_dir() -> Path:
    """The folder with the numbers: VOXELITH_PARITY_DIR or ../shared/parity."""
    return Path(os.environ.get("VOXELITH_PARITY_DIR", ROOT / "../shared/parity"))


@pytest.fixture(scope="session")
def parity(parity_dir: Path) -> Parity:
    """Loads (tensors, metadata) by the file's stem; a test is skipped where there is no file."""

    def load(name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
        path = parity_dir / f"{name}.safetensors"
        if not path.exists():
            pytest.skip(f"no reference numbers: {path} does not exist (VOXELITH_PARITY_DIR)")
        with safe_open(path, "pt") as file:
            names = list(file.keys())
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}

    return load
