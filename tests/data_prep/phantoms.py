"""Volumes whose every voxel knows where it is, so a wrong axis or flip cannot hide."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pyarrow.parquet as pq

# Three sizes, three spacings: no two axes can be exchanged unnoticed.
SHAPE_RAS = (7, 9, 11)
SPACING_RAS = (1.5, 0.75, 3.0)
ORIGIN_RAS = (-20.0, 35.0, 110.0)


def ras_affine() -> np.ndarray:
    affine = np.diag([*SPACING_RAS, 1.0])
    affine[:3, 3] = ORIGIN_RAS
    return affine


def ras_array(dtype: str = "int16") -> np.ndarray:
    """Value 100 x + 10 y + z at voxel (x, y, z): x to the right, y to anterior, z to superior."""
    x, y, z = np.meshgrid(*(np.arange(n) for n in SHAPE_RAS), indexing="ij")
    return (100 * x + 12 * y + z).astype(dtype)


def oriented(axcodes: str, dtype: str = "int16") -> nib.Nifti1Image:
    """The phantom stored with other axes; the same values at the same millimetres."""
    image = nib.Nifti1Image(ras_array(dtype), ras_affine())
    target = nib.orientations.axcodes2ornt(tuple(axcodes))
    return image.as_reoriented(
        nib.orientations.ornt_transform(nib.io_orientation(image.affine), target)
    )


def scan(rng: np.random.Generator, shape: tuple[int, int, int] = (12, 10, 14)) -> np.ndarray:
    return rng.integers(0, 900, shape).astype(np.int16)


def save(path: Path, array: np.ndarray, affine: np.ndarray | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, ras_affine() if affine is None else affine), path)
    return path


def save_truncated(path: Path, array: np.ndarray) -> Path:
    """A .nii.gz that ends half-way."""
    save(path, array)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    return path


def save_text(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"this is a letter, not a scan\n" * 40)
    return path


def save_compressed_text(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(b"this is a letter, not a scan\n" * 40))
    return path


def everything(folder: Path) -> bytes:
    """All bytes of a folder, of columnar files and frames what is in them."""
    out = io.BytesIO()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        out.write(str(path.relative_to(folder)).encode() + path.read_bytes())
        if path.suffix == ".parquet":
            out.write(json.dumps(pq.read_table(path).to_pylist(), default=str).encode())
        if path.suffix == ".tar":
            with tarfile.open(path) as tar:
                out.write(" ".join(tar.getnames()).encode())
    return out.getvalue().lower()
