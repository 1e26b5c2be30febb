"""Copies of a scan as they occur: each goes into a file and comes back by a reader."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
from dicom_series import write_series
from scipy import ndimage

from data_prep.dicom import find_series
from data_prep.volume import Volume, read_channels, read_nifti

CT_WINDOWS = ((40, 400), (50, 350), (-600, 1500), (400, 1800), (50, 500), (60, 300))
"""Centre and width: soft tissue, liver, lung, bone, mediastinum, and one more."""

Kind = Callable[[Volume, np.random.Generator, Path], Volume]


def physical(volume: Volume) -> Volume:
    """The first channel, in float32 physical values."""
    return replace(
        volume,
        array=volume.physical()[:1],
        modality=volume.modality[:1],
        names=volume.names[:1],
        slope=(1.0,),
        intercept=(0.0,),
    )


def _saved(array: np.ndarray, affine: np.ndarray, path: Path, modality: str | None) -> Volume:
    nib.save(nib.Nifti1Image(array, affine), path)
    return read_nifti(path, modality)


def resampled(volume: Volume, rng: np.random.Generator, folder: Path) -> Volume:
    """Other voxels, from 0.75 to 1.6 times the size, one factor or one for each axis."""
    volume = physical(volume)
    factors = (
        np.repeat(rng.uniform(0.75, 1.6), 3) if rng.random() < 0.5 else rng.uniform(0.75, 1.6, 3)
    )
    factors = np.where(np.array(volume.spacing) * factors > 6, 1.0, factors)
    smooth = ndimage.gaussian_filter(volume.array[0], np.where(factors > 1, factors * 0.4, 0))
    shape = [max(4, int((n - 1) / f) + 1) for n, f in zip(smooth.shape, factors, strict=True)]
    array = ndimage.affine_transform(smooth, factors, output_shape=tuple(shape), order=1)
    affine = volume.affine @ np.diag([*factors, 1.0])
    return _saved(array, affine, folder / "resampled.nii.gz", volume.modality[0])


def cropped(volume: Volume, rng: np.random.Generator, folder: Path, least: float = 0.7) -> Volume:
    """A box with 70 to 95 % of each axis, anywhere; its place in the scanner is lost."""
    volume = physical(volume)
    place = []
    for n in volume.array.shape[1:]:
        kept = int(np.ceil(n * rng.uniform(least, 0.95)))
        first = int(rng.integers(0, n - kept + 1))
        place.append(slice(first, first + kept))
    affine = volume.affine.copy()
    affine[:3, 3] = 0
    array = np.ascontiguousarray(volume.array[0][tuple(place)])
    return _saved(array, affine, folder / "cropped.nii.gz", volume.modality[0])


def windowed(volume: Volume, rng: np.random.Generator, folder: Path) -> Volume:
    """Eight bits of a window: one that radiologists use on CT, percentiles and a gamma on MR."""
    volume = physical(volume)
    array = volume.array[0]
    if volume.modality[0] == "CT":
        centre, width = CT_WINDOWS[rng.integers(len(CT_WINDOWS))]
        low, high, gamma = centre - width / 2, centre + width / 2, 1.0
    else:
        low, high = np.percentile(array, [rng.uniform(0, 2), rng.uniform(97, 99.8)])
        gamma = rng.uniform(0.7, 1.4)
    shown = np.clip((array - low) / max(high - low, 1e-6), 0, 1) ** gamma
    return _saved(np.rint(255 * shown).astype(np.uint8), volume.affine, folder / "w.nii.gz", "MR")


def reoriented(volume: Volume, rng: np.random.Generator, folder: Path) -> Volume:
    """Other axes in the file, and a header that says so."""
    volume = physical(volume)
    image = nib.Nifti1Image(volume.array[0], volume.affine)
    axes = rng.permutation(3)
    flips = rng.choice([1, -1], 3)
    image = image.as_reoriented(np.stack([axes, flips], axis=1))
    nib.save(image, folder / "reoriented.nii.gz")
    return read_nifti(folder / "reoriented.nii.gz", volume.modality[0])


def turned(volume: Volume, rng: np.random.Generator, folder: Path) -> Volume:
    """Other axes in the file, and a header that knows nothing of it."""
    volume = physical(volume)
    axes = rng.permutation(3)
    array = volume.array[0].transpose(axes)
    for axis in range(3):
        array = np.flip(array, axis) if rng.random() < 0.5 else array
    affine = np.diag([*np.array(volume.spacing)[axes], 1.0])
    return _saved(np.ascontiguousarray(array), affine, folder / "turned.nii.gz", volume.modality[0])


def through_dicom(volume: Volume, rng: np.random.Generator, folder: Path) -> Volume:
    """A DICOM series: whole numbers, CT in HU, MR over 4096 levels, slices in any order."""
    volume = physical(volume)
    array = volume.array[0].astype(np.float64)
    modality = volume.modality[0]
    if modality != "CT":
        array = (array - array.min()) / (array.max() - array.min()) * 4095
    stored = np.rint(array).astype(np.int16)
    matrix = volume.affine
    if np.linalg.det(matrix[:3, :3]) < 0:  # DICOM's slices follow the right-hand rule
        matrix = matrix @ np.array([[-1.0, 0, 0, stored.shape[0] - 1], *np.eye(4)[1:]])
        stored = stored[::-1]
    series = folder / "series"
    count = stored.shape[2]
    names = [f"{number}.dcm" for number in rng.permutation(count)]
    scales = [(1.0, 0.0)] * count
    files = write_series(series, stored, matrix, modality=modality, scales=scales, names=names)
    (found,) = find_series(sorted(files))
    (one,) = found.volumes
    return read_channels([one])


def mixed(volume: Volume, rng: np.random.Generator, folder: Path) -> Volume:
    """Cropped to 85 % or more of each axis, then resampled, then windowed."""
    return windowed(resampled(cropped(volume, rng, folder, 0.85), rng, folder), rng, folder)


KINDS: dict[str, Kind] = {
    "resampled": resampled,
    "cropped": cropped,
    "windowed": windowed,
    "reoriented": reoriented,
    "turned, header unaware": turned,
    "through DICOM": through_dicom,
    "cropped, resampled and windowed": mixed,
}
