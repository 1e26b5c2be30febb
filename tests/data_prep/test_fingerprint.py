from __future__ import annotations

from pathlib import Path

import numpy as np
from phantoms import ras_affine, ras_array, save

from data_prep.fingerprint import as_text, fingerprint
from data_prep.intensity import encode
from data_prep.volume import read_nifti


def _print(path: Path) -> str:
    coded = encode(read_nifti(path, modality="MR"))
    return as_text(fingerprint(coded.array, coded.slope))


def test_one_scan_stored_in_many_ways_has_one_fingerprint(tmp_path: Path) -> None:
    array = ras_array()
    flipped = ras_affine()
    flipped[0, 0] *= -1
    flipped[0, 3] += (array.shape[0] - 1) * ras_affine()[0, 0]
    files = [
        save(tmp_path / "a.nii.gz", array),
        save(tmp_path / "b.nii", array.astype(np.float64)),
        save(tmp_path / "c.nii.gz", (array / 7.0 - 20).astype(np.float32)),
        save(tmp_path / "d.nii.gz", array[::-1], flipped),
    ]
    assert len({_print(path) for path in files}) == 1


def test_one_voxel_or_another_shape_changes_it(tmp_path: Path) -> None:
    array = ras_array()
    other = array.copy()
    other[3, 3, 3] += 1
    files = [
        save(tmp_path / "a.nii.gz", array),
        save(tmp_path / "b.nii.gz", other),
        save(tmp_path / "c.nii.gz", array.reshape(9, 7, 11)),
    ]
    assert len({_print(path) for path in files}) == 3


def test_sign_of_the_slope_does_not_matter() -> None:
    codes = np.arange(-60, 60, dtype=np.int16).reshape(1, 4, 5, 6)
    assert fingerprint(codes, (2.0,)) == fingerprint(-codes, (-0.5,))
    assert fingerprint(codes, (1.0,)) != fingerprint(codes, (-1.0,))


def test_text_names_the_algorithm() -> None:
    text = as_text(fingerprint(np.zeros((1, 4, 4, 4), np.int16), (1.0,)))
    assert text.startswith("voxel-blake2b-1:")
