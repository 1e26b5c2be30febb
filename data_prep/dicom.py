"""DICOM: files of any names in any folders to volumes, by what their headers say.

Slices are grouped by series and sorted by where they lie, never by name or number. A series that
has several volumes (echoes, b-values, times) is taken apart where one field of its headers does so
exactly. What cannot be one volume on one grid is refused with what was found. Of a header nothing
is read but numbers, modality and the codes named here, and of the patient's number a digest, by
which scans of one subject are known as such; no name, date or text leaves this file, also not in
what pydicom warns of. Whatever is wrong with a header is a refusal of its file or series.

Frames of a multi-frame object are slices as well. Frames that pydicom cannot decompress by itself
(JPEG, JPEG-LS, JPEG 2000) are SimpleITK's to read.
"""

from __future__ import annotations

import hashlib
import logging
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_prep.images import (
    DEFLATE,
    HEADER_BYTES,
    MAX_VOXELS,
    TIGHT_BYTES,
    Reject,
    SeriesFiles,
    inflated,
    of_the_system,
)
from data_prep.progress import bar

MAGIC_OFFSET, MAGIC = 128, b"DICM"
SUFFIXES = (".dcm", ".ima", ".dicom")
"""Of files without the magic number, as old scanners wrote them."""

MODALITIES = ("CT", "MR")
TURNED = 1e-3
"""Difference between the direction cosines of slices of one orientation: they come rounded."""
SAME_PLACE = 1e-2
"""Millimetres below which two slices lie in one place."""
UNEVEN = 0.1
"""Share of the usual distance by which one may differ; beyond 1.5 of it a slice is missing."""

REVISION = 2
"""Counted up when the same files give another scan than before."""

ASIDE = 0.5
"""Share of a pixel that a slice may lie beside the line from the first to the last."""

APART = (
    "EchoTime", "TemporalPositionIdentifier", "DiffusionBValue", "InversionTime", "TriggerTime",
    "AcquisitionNumber", "ImageType", "StackID",
)  # fmt: skip
"""Fields that tell the volumes of one series apart, in the order in which they are tried."""

HEADER = (
    "SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "PatientID",
    "Modality", "Rows", "Columns", "SamplesPerPixel", "PixelSpacing", "SliceThickness",
    "ImagePositionPatient", "ImageOrientationPatient", "RescaleSlope", "RescaleIntercept",
    "NumberOfFrames", "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence",
    "BitsAllocated", *APART,
)  # fmt: skip


@dataclass(frozen=True)
class Slice:
    """A plane of voxels, and where it lies.

    Attributes:
        file: that holds it.
        frame: its number there.
        shape: columns and rows.
        position: of the first voxel, LPS millimetres [3].
        directions: of growing column and row number, LPS [2, 3].
        spacing: millimetres between columns, between rows.
        thickness: in millimetres, 1 where nothing is said.
        scale: slope and intercept of its values.
        apart: its values of the fields `APART`.
    """

    file: Path
    frame: int
    shape: tuple[int, int]
    position: NDArray[np.float64]
    directions: NDArray[np.float64]
    spacing: tuple[float, float]
    thickness: float
    scale: tuple[float, float]
    apart: tuple[str, ...]

    @property
    def normal(self) -> NDArray[np.float64]:
        """Direction that the slice faces."""
        return np.cross(*self.directions)

    @property
    def place(self) -> tuple[object, ...]:
        """All that is said of it; equal for copies."""
        numbers = [self.position, self.directions, np.array([*self.spacing, *self.scale])]
        return self.frame, self.shape, self.apart, *(part.tobytes() for part in numbers)


@dataclass(frozen=True)
class Series:
    """A volume: slices from first to last, of one modality.

    Attributes:
        slices: in the order of the third axis.
        modality: CT or MR.
    """

    slices: tuple[Slice, ...]
    modality: str

    @property
    def shape(self) -> tuple[int, int, int]:
        """Columns, rows, slices."""
        return (*self.slices[0].shape, len(self.slices))

    @property
    def affine(self) -> NDArray[np.float64]:
        """(column, row, slice) to RAS millimetres (4, 4); sheared where the gantry was tilted."""
        first, last = self.slices[0], self.slices[-1]
        count = len(self.slices)
        step = first.normal * first.thickness
        if count > 1:  # what is between slices may be more or less than what they are thick
            step = (last.position - first.position) / (count - 1)
        affine = np.eye(4)
        affine[:3, 0] = first.directions[0] * first.spacing[0]
        affine[:3, 1] = first.directions[1] * first.spacing[1]
        affine[:3, 2] = step
        affine[:3, 3] = first.position
        affine[:2] *= -1  # left and posterior grow there, right and anterior here
        return affine

    def values(self) -> tuple[np.ndarray, float, float]:
        """Stored voxels `[I, J, K]` with slope and intercept; float32 physical if these vary.

        Raises:
            Reject: pixel data is cut off or of a kind that cannot be read.
        """
        scales = {one.scale for one in self.slices}
        planes = self._planes()
        if len(scales) == 1 and all(stored for _, stored in planes):
            ((slope, intercept),) = scales
            return np.stack([plane for plane, _ in planes], axis=2), slope, intercept
        # What decompresses several frames applies the first one's slope to all.
        applied = defaultdict(set)
        for one, (_, stored) in zip(self.slices, planes, strict=True):
            if not stored:
                applied[one.file].add(one.scale)
        for file, told in applied.items():
            if len(told) > 1:
                raise Reject(
                    "unreadable",
                    f"{file.name}: its frames are compressed, with {len(told)} slopes or "
                    "intercepts, and would be read with one; decompress it (gdcmconv --raw)",
                )
        physical = np.empty(self.shape, np.float32)
        for k, (plane, stored) in enumerate(planes):
            slope, intercept = self.slices[k].scale if stored else (1.0, 0.0)
            physical[:, :, k] = plane.astype(np.float32) * slope + intercept
        return physical, 1.0, 0.0

    def _planes(self) -> list[tuple[np.ndarray, bool]]:
        """`[I, J]` of each slice, and whether it is as stored: else slope and all are applied."""
        files: dict[Path, tuple[np.ndarray, bool]] = {}
        planes = []
        for one in self.slices:
            if one.file not in files:
                if len(files) > 1:  # all frames of one file follow each other, or nearly
                    files.pop(next(iter(files)))
                files[one.file] = _pixels(one.file)
            frames, stored = files[one.file]
            plane = frames[one.frame] if len(frames) > one.frame else None
            if plane is None or plane.shape != one.shape[::-1]:
                raise Reject("truncated", f"{one.file.name}: pixels are not those of its header")
            planes.append((plane.T, stored))
        return planes


def is_dicom(path: Path) -> bool:
    """Whether a file is DICOM, by its magic number or else by its name.

    Raises:
        OSError: the system does not let it be read.
    """
    try:
        with path.open("rb") as file:
            file.seek(MAGIC_OFFSET)
            return file.read(4) == MAGIC or path.name.lower().endswith(SUFFIXES)
    except OSError as error:
        if of_the_system(error):
            raise
        return False


@dataclass(frozen=True)
class Found:
    """Files of one series: the volumes that they make, or why they make none.

    Attributes:
        files: sorted by name.
        subject: a digest of the patient's number; empty where there is none.
        volumes: the files of each.
        refusal: None where there are volumes.
    """

    files: tuple[Path, ...]
    subject: str
    volumes: tuple[SeriesFiles, ...] = ()
    refusal: Reject | None = None


def find_series(files: Sequence[Path]) -> list[Found]:
    """Takes DICOM files apart by series, whatever their names and folders; in order of names.

    Of copies of a slice the first counts, and the others are refused one by one.

    Raises:
        OSError: the system does not let one be read, without which its series would be another.
    """
    series: dict[tuple[str, ...], list[_Read]] = defaultdict(list)
    found = []
    for path in bar(iterable=files, desc="DICOM", unit="file"):
        try:
            read = _read(path)
        except Reject as error:
            if system := of_the_system(error):
                raise system from None
            found.append(Found((path,), "", refusal=error))
        else:
            series[read.series].append(read)
    for all_reads in series.values():
        reads, copies = _once(sorted(all_reads, key=lambda one: one.file))
        own, subject = tuple(one.file for one in reads), reads[-1].subject
        for copy, first in copies:
            said = f"the same slice as {first.file.parent.name}/{first.file.name}"
            found.append(Found((copy.file,), subject, refusal=Reject("duplicate", said)))
        try:
            volumes = tuple(_files_of(_volumes(reads)))
        except Reject as error:
            found.append(Found(own, subject, refusal=error))
        else:
            found.append(Found(own, subject, volumes))
    return sorted(found, key=lambda one: one.files)


def _once(reads: Sequence[_Read]) -> tuple[list[_Read], list[tuple[_Read, _Read]]]:
    """Files each of which says something of its own; and copies, with what they are copies of."""
    kept, copies = [], []
    same: dict[tuple[object, ...], list[_Read]] = defaultdict(list)
    for read in reads:
        alike = same[read.instance, *(one.place for one in read.slices)] if read.slices else []
        first = next((one for one in alike if _same_pixels(one.file, read.file)), None)
        if first is not None:
            copies.append((read, first))
            continue
        kept.append(read)
        alike.append(read)
    return kept, copies


def _same_pixels(one: Path, other: Path) -> bool:
    try:
        values = [_dataset(path, specific_tags=["PixelData"]).PixelData for path in (one, other)]
    except Exception as error:  # whatever is wrong with it, reading finds and says
        if system := of_the_system(error):
            raise system from None
        return False
    return bool(values[0] == values[1])


def _files_of(volumes: Sequence[Series]) -> Iterable[SeriesFiles]:
    """Of volumes that lie in the same files, which of them is meant."""
    seen: Counter[tuple[Path, ...]] = Counter()
    first = min(one.file for volume in volumes for one in volume.slices)
    for volume in volumes:
        files = tuple(sorted({one.file for one in volume.slices}))
        yield SeriesFiles(files, seen[files], first)
        seen[files] += 1


def read_series(files: Sequence[Path]) -> list[Series]:
    """The volumes of one series, each on one grid.

    Raises:
        Reject: they make no volume; the code says why.
    """
    return _volumes([_read(path) for path in files])


class _Read(NamedTuple):
    """What the header of a file says; `refusal` is why it is part of no volume.

    Series are kept apart by the patient too, and without a number of their own by the folder: some
    who remove names give one number to all, or none.
    """

    file: Path
    series: tuple[str, ...]
    instance: str
    subject: str
    modality: str = ""
    slices: tuple[Slice, ...] = ()
    refusal: Reject | None = None


@contextmanager
def _quiet() -> Iterator[None]:
    """Without pydicom's warnings and log, which tell what headers hold."""
    log = logging.getLogger("pydicom")
    before, log.disabled = log.disabled, True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.disabled = before


@_quiet()
def _read(path: Path) -> _Read:
    header = _header(path)
    study, series, instance, patient = (
        str(_value(header, name) or "")
        for name in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "PatientID")
    )
    subject = ""
    if patient:
        subject = hashlib.sha256(patient.encode(errors="surrogateescape")).hexdigest()[:16]
    key = (study, series, subject, "" if series else str(path.parent))
    try:
        modality = str(_value(header, "Modality") or "")
        if modality not in MODALITIES:
            shown = modality if modality.isalpha() and len(modality) <= 16 else "unknown"
            raise Reject("unsupported_modality", f"{shown} is neither CT nor MR")
        if _whole(header, "SamplesPerPixel", 1) != 1:
            raise Reject("rgb_or_complex", "voxels have several values, one real number is needed")
        slices = tuple(_frames(path, header))
    except Reject as error:
        return _Read(path, key, instance, subject, refusal=error)
    return _Read(path, key, instance, subject, modality, slices)


def _value(place: Any, name: str) -> Any:
    """A field, or None; Reject names the field alone, as its value may be anything."""
    try:
        return place.get(name)
    except Exception as error:  # values in the wild break pydicom in many ways
        raise Reject("unreadable", f"{name} cannot be read ({type(error).__name__})") from error


def _whole(header: Any, name: str, otherwise: int | None = None) -> int:
    value: Any = _value(header, name) if name in header else otherwise
    try:
        number = int(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise Reject("unreadable", f"{name} is not a whole number") from error
    if number < 1:
        raise Reject("unreadable", f"{name} is less than 1")
    return number


def _volumes(reads: Sequence[_Read]) -> list[Series]:
    refusals = [(one.file.name, one.refusal) for one in reads if one.refusal is not None]
    if refusals:
        name, refusal = refusals[0]
        # One of many spoils them all, so it is named.
        where = f"{name}: " if len(refusals) < len(reads) else ""
        raise Reject(refusal.code, where + refusal.detail)
    modalities = {one.modality for one in reads}
    if len(modalities) > 1:
        raise Reject("mixed_series", "it holds CT and MR")
    (modality,) = modalities
    slices = [plane for one in reads for plane in one.slices]
    shapes = {one.shape for one in slices}
    if len(shapes) > 1:
        sizes = ", ".join(f"{i}x{j}" for i, j in sorted(shapes))
        raise Reject("mixed_series", f"its slices have {len(shapes)} sizes: {sizes}")
    if max(float(np.abs(s.directions - slices[0].directions).max()) for s in slices) > TURNED:
        kinds = len({tuple(np.round(s.directions, 2).ravel()) for s in slices})
        raise Reject("mixed_orientation", f"its slices face {kinds} ways, as a localizer's do")
    if len(slices) * float(np.prod(slices[0].shape)) > MAX_VOXELS:
        raise Reject("too_large", f"{len(slices)} slices, more than {MAX_VOXELS} voxels")
    spacings = np.array([one.spacing for one in slices])
    if np.ptp(spacings, axis=0).max() > 1e-3 * spacings.min():
        raise Reject("mixed_series", "its slices have several spacings")
    return [Series(_sorted(part), modality) for part in _apart(slices)]


def _frames(path: Path, header: Any) -> list[Slice]:
    """One slice of a plain file, one for each frame of a multi-frame object."""
    count = _whole(header, "NumberOfFrames", 1)
    voxels = count * _whole(header, "Columns") * _whole(header, "Rows")
    if voxels > max(TIGHT_BYTES, 1000 * path.stat().st_size):
        raise Reject("truncated", f"the header claims {voxels} voxels")
    each = _value(header, "PerFrameFunctionalGroupsSequence") or [None]
    shared = _value(header, "SharedFunctionalGroupsSequence") or [None]
    if count > 1 and each[0] is None:
        raise Reject("bad_geometry", f"its {count} frames do not say where they lie")
    if len(each) != count:
        raise Reject("truncated", f"{count} frames, and places of {len(each)}")
    return [_slice(path, n, [own, shared[0], header]) for n, own in enumerate(each)]


GROUPS = {
    "ImagePositionPatient": "PlanePositionSequence",
    "ImageOrientationPatient": "PlaneOrientationSequence",
    "PixelSpacing": "PixelMeasuresSequence",
    "SliceThickness": "PixelMeasuresSequence",
    "RescaleSlope": "PixelValueTransformationSequence",
    "RescaleIntercept": "PixelValueTransformationSequence",
    "EffectiveEchoTime": "MREchoSequence",
    "DiffusionBValue": "MRDiffusionSequence",
    "TemporalPositionIndex": "FrameContentSequence",
    "StackID": "FrameContentSequence",
}
"""Where the functional groups of a multi-frame object have what else stands in the header."""

OF_FRAMES = {
    "EchoTime": "EffectiveEchoTime",
    "TemporalPositionIdentifier": "TemporalPositionIndex",
}


def _slice(path: Path, frame: int, places: list[Any]) -> Slice:
    def told(name: str) -> Any:
        for place in places:
            for key in (name, OF_FRAMES.get(name, name)):
                if place is None:
                    continue
                group = _value(place, GROUPS[key]) if key in GROUPS else None
                value = _value(group[0] if group else place, key)
                if value is not None:
                    return value
        return None

    def numbers(name: str, count: int) -> NDArray[np.float64]:
        value = told(name)
        try:
            found = np.array([float(v) for v in value], dtype=np.float64)
        except (TypeError, ValueError):
            found = np.empty(0)
        if found.shape != (count,) or not np.isfinite(found).all():
            raise Reject("bad_geometry", f"a slice has no {name} of {count} numbers")
        return found

    directions = numbers("ImageOrientationPatient", 6).reshape(2, 3)
    gram = directions @ directions.T
    if np.abs(gram - np.eye(2)).max() > 1e-2:
        raise Reject("bad_geometry", "the directions of a slice are not at right angles")
    between_rows, between_columns = numbers("PixelSpacing", 2)

    def number(name: str, otherwise: float) -> float:
        value = told(name)
        try:
            return otherwise if value is None else float(value)
        except (TypeError, ValueError) as error:
            raise Reject("unreadable", f"{name} is not a number") from error

    slope, intercept = number("RescaleSlope", 1.0), number("RescaleIntercept", 0.0)
    if not np.isfinite([slope, intercept]).all() or slope == 0:
        raise Reject("nan_or_inf", "the slope or intercept of a slice is no finite number, or 0")
    thickness = number("SliceThickness", 1.0)
    header = places[-1]
    return Slice(
        file=path,
        frame=frame,
        shape=(_whole(header, "Columns"), _whole(header, "Rows")),
        position=numbers("ImagePositionPatient", 3),
        directions=directions,
        spacing=(float(between_columns), float(between_rows)),
        thickness=thickness if np.isfinite(thickness) and thickness > 0 else 1.0,
        scale=(slope, intercept),
        apart=tuple("" if (v := told(name)) is None else str(v) for name in APART),
    )


def _apart(slices: list[Slice]) -> list[list[Slice]]:
    """One volume, or those that a field of the headers tells apart."""
    repeated = _repeated(slices)
    if not repeated:
        return [slices]
    for number in range(len(APART)):
        parts: dict[str, list[Slice]] = defaultdict(list)
        for one in slices:
            parts[one.apart[number]].append(one)
        counts = {len(part) for part in parts.values()}
        if len(parts) > 1 and len(counts) == 1 and not any(map(_repeated, parts.values())):
            return [parts[key] for key in sorted(parts)]
    raise Reject(
        "repeated_slices",
        f"{repeated} of its {len(slices)} slices lie where another does, and no field of their "
        "headers tells volumes apart",
    )


def _places(slices: Sequence[Slice]) -> NDArray[np.float64]:
    """How far each slice lies along the way that the first one faces, mm."""
    return np.array([one.position @ slices[0].normal for one in slices])


def _repeated(slices: Sequence[Slice]) -> int:
    return int((np.diff(np.sort(_places(slices))) < SAME_PLACE).sum())


def _sorted(slices: list[Slice]) -> tuple[Slice, ...]:
    """By place; refuses gaps, and slices beside the line of the others, which may be tilted."""
    places = _places(slices)
    order = np.argsort(places)
    ordered = tuple(slices[n] for n in order)
    gaps = np.diff(places[order])
    if len(gaps):
        usual = float(np.median(gaps))
        if gaps.max() > 1.5 * usual:
            missing = int(np.rint(gaps / usual - 1).sum())
            raise Reject(
                "missing_slices",
                f"about {missing} of {len(slices) + missing} slices are not there: distances go "
                f"from {gaps.min():.2f} to {gaps.max():.2f} mm",
            )
        if np.abs(gaps - usual).max() > UNEVEN * usual:
            raise Reject(
                "uneven_slices", f"distances go from {gaps.min():.2f} to {gaps.max():.2f} mm"
            )
        way = np.array([one.position - ordered[0].position for one in ordered])
        share = (places[order] - places[order][0]) / gaps.sum()
        aside = np.abs((way - share[:, None] * way[-1]) @ ordered[0].directions.T)
        wrong = (aside > ASIDE * np.array(ordered[0].spacing)).any(axis=1)
        if wrong.any():
            raise Reject(
                "uneven_slices",
                f"{wrong.sum()} of {len(slices)} slices lie beside the line from the first to the "
                f"last, by up to {aside.max():.2f} mm",
            )
    return ordered


# Files.


_LENGTH = re.compile(rb"\x02\0\0\0UL\x04\0(....)", re.DOTALL)
_DEFLATED = re.compile(rb"(\x02\0\x10\0UI..1\.2\.840\.10008\.1\.2\.1)\.99", re.DOTALL)
"""Transfer syntax of files that are compressed as a whole, but for what tells that."""


def _dataset(path: Path, **options: Any) -> Any:
    import pydicom

    with path.open("rb") as file:
        head = file.read(HEADER_BYTES)
        deflated = _DEFLATED.search(head) is not None
        file.seek(0)
        return pydicom.dcmread(_plain(file, head) if deflated else file, force=True, **options)


def _plain(file: BinaryIO, head: bytes) -> BinaryIO:
    """The same as a file that is not compressed: pydicom would unpack whatever there is."""
    length = _LENGTH.search(head)
    if length is None:
        raise Reject("unreadable", "it is deflated, and does not say from where on")
    file.seek(length.end() + int.from_bytes(length[1], "little"))
    whole = BytesIO()
    whole.write(_DEFLATED.sub(rb"\1\0\0\0", head[: file.tell()]))
    for piece in inflated(file, DEFLATE):
        if whole.write(piece) and whole.tell() > TIGHT_BYTES:
            raise Reject("too_large", f"it would unpack to more than {TIGHT_BYTES} bytes")
    whole.seek(0)
    return whole


def _header(path: Path) -> Any:
    try:
        header = _dataset(path, stop_before_pixels=True, specific_tags=list(HEADER))
        if "SOPClassUID" not in header or "Rows" not in header:
            raise Reject("not_an_image", "the file is DICOM without an image, or none")
    except Reject:
        raise
    except Exception as error:  # headers in the wild break pydicom in many ways
        raise Reject("unreadable", f"its header cannot be read ({type(error).__name__})") from error
    return header


@_quiet()
def _pixels(path: Path) -> tuple[np.ndarray, bool]:
    """`[frames, rows, columns]`, and whether they are as stored: else slope and all are applied."""
    import pydicom

    named = "unknown transfer syntax"
    try:
        data = _dataset(path)
        syntax = getattr(data.file_meta, "TransferSyntaxUID", None)
        if syntax is None:  # a file without its first part, as some scanners write
            data.file_meta.TransferSyntaxUID = pydicom.uid.ImplicitVRLittleEndian
        elif syntax.is_transfer_syntax:
            named = syntax.name
            if syntax.is_compressed and syntax != pydicom.uid.RLELossless:
                return _decompressed(path), False
        pixels = data.pixel_array
    except (Reject, MemoryError):
        raise
    except Exception as error:
        said = str(error)
        code = "truncated" if "bytes" in said or "end of" in said.lower() else "unreadable"
        kind = type(error).__name__
        raise Reject(code, f"{path.name}: its pixels cannot be read ({named}, {kind})") from error
    return (pixels[None] if pixels.ndim == 2 else pixels), True


def _decompressed(path: Path) -> np.ndarray:
    import SimpleITK

    image = SimpleITK.ReadImage(str(path))
    return np.asarray(SimpleITK.GetArrayFromImage(image))
