"""CT at the size that clinics have, 512x512x300, from smaller real ones: large, with their noise.

No CT of that size may be passed on with this project. So a real one is resampled to that size, and
noise is added as thin slices have it: 20 HU in the body and 8 in air, smoothed over neighbouring
voxels as a reconstruction kernel does, rounded, cut at -1024. Noise is most of what a CT takes to
store: interpolated voxels alone would be too easy.
"""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

SHAPE = (512, 512, 300)
SPACING = (0.75, 0.75, 1.0)
BODY_HU, AIR_HU = 20.0, 8.0
"""Standard deviation of the noise."""


def large(source: NDArray[np.float32], seed: int) -> NDArray[np.int16]:
    """A volume of SHAPE (x, y, z) that looks as `source` does."""
    factors = [wanted / had for wanted, had in zip(SHAPE, source.shape, strict=True)]
    made = ndimage.zoom(source, factors, order=1, grid_mode=True, mode="nearest")
    noise = np.random.default_rng(seed).standard_normal(SHAPE, dtype=np.float32)
    noise = ndimage.gaussian_filter(noise, (0.7, 0.7, 0.4))
    noise /= noise.std()
    made += noise * np.where(made > -500, BODY_HU, AIR_HU)
    return np.clip(np.rint(made), -1024, 3071).astype(np.int16)


def write(source: Path, target: Path, seed: int, as_it_is: bool = False) -> None:
    """NIfTI files of a large volume, made of a smaller scan, and its label: air, soft or dense.

    With `as_it_is` they are of the scan itself.
    """
    image = nib.load(source)
    made, affine = np.asarray(image.dataobj, dtype=np.float32), image.affine
    if as_it_is:
        made = np.rint(made).astype(np.int16)
    else:
        made, affine = large(made, seed), np.diag([*SPACING, 1.0])
    smooth = ndimage.uniform_filter(made.astype(np.float32), 5)
    label = np.digitize(smooth, [-300, 150]).astype(np.uint8)
    target.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(made, affine), target / f"{seed:03d}.nii.gz")
    nib.save(nib.Nifti1Image(label, affine), target / f"{seed:03d}_seg.nii.gz")
