"""A release's encoder in the forms of others; each is written whole and checked, or not at all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pretrain.release import Release


def _nnssl(release: Release, output: Path) -> dict[str, Any]:
    from pretrain.foreign.nnssl_file import write_nnssl

    return {"folder": str(write_nnssl(release, output))}


def _torch(release: Release, output: Path) -> dict[str, Any]:
    from pretrain.portable import write_torch_export

    return write_torch_export(release, output)


def _onnx(release: Release, output: Path) -> dict[str, Any]:
    from pretrain.portable import write_onnx

    return write_onnx(release, output)


def _monai(release: Release, output: Path) -> dict[str, Any]:
    from pretrain.bundle import write_bundle

    return write_bundle(release, output)


FORMS: Mapping[str, Callable[[Release, Path], dict[str, Any]]] = {
    "nnssl": _nnssl,
    "torch": _torch,
    "onnx": _onnx,
    "monai": _monai,
}
"""What `voxelith export REF OUT form=` writes beside releases: nnssl's checkpoint for nnU-Net,
torch.export's program, ONNX, a MONAI bundle."""
