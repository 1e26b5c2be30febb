"""DICOM series written for tests, by pydicom, from a volume and where it lies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.tag import Tag
from pydicom.uid import (
    CTImageStorage,
    EnhancedMRImageStorage,
    ExplicitVRLittleEndian,
    MRImageStorage,
    generate_uid,
)

FLIP = np.array([-1.0, -1.0, 1.0])


def dataset(modality: str, series: str, storage: str = "") -> FileDataset:
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = storage or {"CT": CTImageStorage}.get(modality, MRImageStorage)
    meta.MediaStorageSOPInstanceUID = generate_uid()
    made = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    made.SOPClassUID, made.SOPInstanceUID = meta.MediaStorageSOPClassUID, generate_uid()
    made.Modality, made.SeriesInstanceUID = modality, series
    made.StudyInstanceUID, made.PatientID = "1.2.3", "P-17"
    made.PhotometricInterpretation, made.SamplesPerPixel = "MONOCHROME2", 1
    made.BitsAllocated = made.BitsStored = 16
    made.HighBit, made.PixelRepresentation = 15, 1
    return made


def place(affine: np.ndarray, k: int) -> tuple[list[float], list[float], list[float]]:
    """Position, orientation and pixel spacing of slice k of a volume (i, j, k) to RAS mm."""
    columns = affine[:3, :3] * FLIP[:, None]
    spacing = np.linalg.norm(columns, axis=0)
    position = (affine @ (0, 0, k, 1))[:3] * FLIP
    across = columns[:, :2] / spacing[:2]
    return list(position), [*across[:, 0], *across[:, 1]], [spacing[1], spacing[0]]


def write_series(
    folder: Path,
    array: np.ndarray,
    affine: np.ndarray,
    *,
    modality: str = "CT",
    scales: Sequence[tuple[float, float]] | None = None,
    names: Sequence[str] | None = None,
    skip: Sequence[int] = (),
    **fields: Any,
) -> list[Path]:
    """A file for each slice `[I, J]` of an array `[I, J, K]`, in the order of K."""
    folder.mkdir(parents=True, exist_ok=True)
    series = fields.pop("SeriesInstanceUID", generate_uid())
    files = []
    for k in range(array.shape[2]):
        if k in skip:
            continue
        made = dataset(modality, series)
        made.ImagePositionPatient, made.ImageOrientationPatient, made.PixelSpacing = place(
            affine, k
        )
        made.Columns, made.Rows = array.shape[:2]
        made.InstanceNumber = k + 1
        if scales is not None:
            made.RescaleSlope, made.RescaleIntercept = map(str, scales[k])
        for name, value in fields.items():
            setattr(made, name, value)
        made.PixelData = np.ascontiguousarray(array[:, :, k].T).astype("<i2").tobytes()
        path = folder / (names[k] if names else f"{k + 1}.dcm")
        made.save_as(path, enforce_file_format=True)
        files.append(path)
    return files


def write_frames(
    path: Path, array: np.ndarray, affine: np.ndarray, order: Sequence[int], **shared: Any
) -> Path:
    """All slices as frames of one file, in an order of their own."""
    made = dataset("MR", generate_uid(), EnhancedMRImageStorage)
    made.Columns, made.Rows = array.shape[:2]
    made.NumberOfFrames = len(order)
    group = Dataset()
    measures, orientation, value = Dataset(), Dataset(), Dataset()
    _, orientation.ImageOrientationPatient, measures.PixelSpacing = place(affine, 0)
    value.RescaleSlope, value.RescaleIntercept = "2", "-100"
    group.PixelMeasuresSequence, group.PlaneOrientationSequence = [measures], [orientation]
    group.PixelValueTransformationSequence = [value]
    made.SharedFunctionalGroupsSequence = [group]
    frames = []
    for k in order:
        frame, position = Dataset(), Dataset()
        position.ImagePositionPatient = place(affine, k)[0]
        frame.PlanePositionSequence = [position]
        frames.append(frame)
    made.PerFrameFunctionalGroupsSequence = frames
    for name, given in shared.items():
        setattr(made, name, given)
    pixels = np.stack([array[:, :, k].T for k in order])
    made.PixelData = np.ascontiguousarray(pixels).astype("<i2").tobytes()
    made.save_as(path, enforce_file_format=True)
    return path


def changed(path: Path, values: Mapping[str, Any]) -> None:
    """Sets, or with None takes away, fields of a file."""
    made = pydicom.dcmread(path)
    for name, value in values.items():
        if value is None:
            delattr(made, name)
        else:
            setattr(made, name, value)
    made.save_as(path)


def written_raw(path: Path, name: str, value: bytes, kind: str = "") -> None:
    """Sets the bytes of a field, whatever DICOM says of them; under another type if given."""
    tag = Tag(pydicom.datadict.tag_for_keyword(name))
    kind = kind or pydicom.datadict.dictionary_VR(tag)
    value += b" " * (len(value) % 2)
    made = pydicom.dcmread(path)
    made._dict[tag] = RawDataElement(tag, kind, len(value), value, 0, False, True)
    made.save_as(path)
