"""Image files of any format, opened without their voxels: NIfTI, NRRD, MetaImage, DICOM series.

Whatever a header says is looked at before a byte of voxels is read, so a file that claims more than
it can hold costs nothing. NIfTI is nibabel's to read, NRRD and MetaImage are SimpleITK's, DICOM is
`data_prep.dicom`.
"""

from __future__ import annotations

import gzip
import os
import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError

NIFTI = (".nii.gz", ".nii")
ITK = (".nrrd", ".nhdr", ".mha", ".mhd")
SUFFIXES = (*NIFTI, *ITK)
DETACHED = (".nhdr", ".mhd")
BESIDE = (".raw", ".raw.gz", ".zraw", ".img.raw")
"""Of headers that are files of their own, and of their voxels."""

PACKED = (".gz", ".bz2", ".zst")
# deflate cannot pack more than about 1032 to 1, so a header that claims more is lying.
GZIP_MAXIMUM_RATIO = 1100
_HEADER_BYTES = 2**16
# Of metres and micrometres, as NIfTI headers count units; one that names none means millimetres.
_MILLIMETRES = {1: 1000.0, 3: 0.001}
_MORE_BYTES = 2**26
"""Of a compressed file behind its voxels, at most."""

FloatArray = np.ndarray[Any, np.dtype[np.float64]]


class Reject(Exception):  # noqa: N818 - a verdict on one scan, not a program error
    """One scan cannot become a sample: `code` is a stable word, `detail` says what was found."""

    def __init__(self, code: str, detail: str) -> None:
        self.code = code
        self.detail = detail
        super().__init__(f"{code}: {detail}")

    def __reduce__(self) -> tuple[type[Reject], tuple[str, str]]:
        return type(self), (self.code, self.detail)


@dataclass(frozen=True)
class SeriesFiles:
    """One volume of a DICOM series: its files, and which of the volumes that they hold."""

    files: tuple[Path, ...]
    volume: int = 0

    @property
    def name(self) -> str:
        """Of the first file."""
        return self.files[0].name


@dataclass(frozen=True)
class Image:
    """An image as its file has it.

    Attributes:
        shape: (I, J, K, volumes); a vector image counts its components.
        flat: whether it has two axes only.
        affine: (i, j, k) to RAS millimetres (4, 4).
        forms: qform and sform code of NIfTI.
        modality: as its header says; None: it does not.
        read: gives stored voxels in an order that `shape` tells, with slope and intercept.
    """

    shape: tuple[int, int, int, int]
    flat: bool
    affine: FloatArray
    forms: tuple[int, int]
    modality: str | None
    read: Callable[[], tuple[np.ndarray, float, float]]


def open_image(source: Path | SeriesFiles) -> Image:
    """Opens an image; its voxels are read by `Image.read`.

    Raises:
        Reject: it is none, or damaged, or its voxels are no single real numbers.
    """
    if isinstance(source, SeriesFiles):
        return _dicom(source)
    if source.name.lower().endswith(ITK):
        return _itk(source)
    return _nifti(source)


def _dicom(source: SeriesFiles) -> Image:
    from data_prep.dicom import read_series

    series = read_series(source.files)[source.volume]
    return Image((*series.shape, 1), False, series.affine, (0, 2), series.modality, series.values)


# NIfTI.


def _nifti(path: Path) -> Image:
    try:
        size = path.stat().st_size
        image = nib.load(path)
    except ImageFileError as error:
        if path.name.lower().endswith(".gz"):
            _check_stream(path)
        raise Reject("not_an_image", "the file is not NIfTI") from error
    except EOFError as error:
        raise Reject("truncated", "the compressed stream ends too early") from error
    except (zlib.error, gzip.BadGzipFile) as error:
        raise Reject("unreadable", f"the compression is damaged ({error})") from error
    except (OSError, ValueError, HeaderDataError) as error:
        raise Reject("unreadable", _plain(error, path)) from error
    if not isinstance(image, nib.Nifti1Pair):
        raise Reject("not_an_image", f"{type(image).__name__} is not NIfTI")
    dtype = image.get_data_dtype()
    if dtype.fields is not None or dtype.kind == "c":
        raise Reject("rgb_or_complex", f"voxels are {dtype}, one real number each is needed")
    shape = _shape(image.shape)
    if isinstance(image, nib.Nifti1Image):
        packed = path.name.lower().endswith(PACKED)
        _check_claim(shape, dtype.itemsize, size, packed)
    forms = int(image.header["qform_code"]), int(image.header["sform_code"])
    affine = np.array(image.affine, dtype=np.float64)
    affine[:3] *= _MILLIMETRES.get(int(image.header["xyzt_units"]) & 7, 1.0)
    flat = len(image.shape) < 3
    return Image(shape, flat, affine, forms, None, lambda: _nifti_values(image, path))


def _unpacked(stored: Any, path: Path) -> np.ndarray:
    """The voxels of a compressed file, read to its end: there is the sum that tells of damage."""
    raw = np.empty(stored.shape, dtype=stored.dtype, order="F")
    view = raw.reshape(-1, order="F").view(np.uint8).data
    with gzip.open(path) as stream:
        stream.seek(stored.offset)
        there = 0
        while there < len(view):
            came = stream.readinto(view[there:])
            if not came:
                raise Reject("truncated", f"{there} of {len(view)} bytes of voxels are there")
            there += came
        more = 0
        while piece := stream.read(2**20):
            more += len(piece)
            if more > _MORE_BYTES:
                raise Reject("unreadable", "it goes on for long behind its voxels")
    return raw


def _check_stream(path: Path) -> None:
    """Says what is wrong with a compressed stream whose header nibabel could not find."""
    with path.open("rb") as file:
        if file.read(2) != b"\x1f\x8b":
            return
    try:
        with gzip.open(path) as stream:
            stream.read(_HEADER_BYTES)
    except EOFError as error:
        raise Reject("truncated", "the compressed stream ends too early") from error
    except (zlib.error, gzip.BadGzipFile) as error:
        raise Reject("unreadable", f"the compression is damaged ({error})") from error


def _nifti_values(image: Any, path: Path) -> tuple[np.ndarray, float, float]:
    try:
        if path.name.lower().endswith(".gz") and isinstance(image, nib.Nifti1Image):
            raw = _unpacked(image.dataobj, path)
        else:
            raw = np.asanyarray(image.dataobj.get_unscaled())
    except EOFError as error:
        raise Reject("truncated", "the compressed stream ends too early") from error
    except (zlib.error, gzip.BadGzipFile) as error:
        raise Reject("unreadable", f"the compression is damaged ({error})") from error
    except (OSError, ValueError) as error:
        # nibabel says "Expected N bytes, got M bytes" and "mmap length is greater than file size".
        code = "truncated" if "xpected" in str(error) or "mmap" in str(error) else "unreadable"
        raise Reject(code, _plain(error, path)) from error
    return raw, float(image.dataobj.slope), float(image.dataobj.inter)


# NRRD and MetaImage.


def _itk(path: Path) -> Image:
    import SimpleITK

    SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)
    voxels = _voxel_file(path)
    reader = SimpleITK.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise Reject("not_an_image", f"the file is no {path.suffix} image") from error
    components, axes = reader.GetNumberOfComponents(), reader.GetDimension()
    pixel = SimpleITK.GetPixelIDValueAsString(reader.GetPixelID())
    if components > 1 or "complex" in pixel:
        raise Reject("rgb_or_complex", f"voxels are {pixel}, one real number each is needed")
    shape = _shape(reader.GetSize())
    bits = int((re.search(r"\d+", pixel) or ["64"])[0])
    claimed = voxels or path
    _check_claim(shape, bits // 8, claimed.stat().st_size, _is_packed(path, claimed))
    affine = np.eye(4)
    space = min(axes, 3)
    directions = np.array(reader.GetDirection()).reshape(axes, axes)[:space, :space]
    affine[:space, :space] = directions * np.array(reader.GetSpacing()[:space])
    affine[:space, 3] = reader.GetOrigin()[:space]
    affine[:2] *= -1  # ITK counts to left and posterior
    return Image(shape, axes < 3, affine, (0, 2), None, lambda: _itk_values(reader, path))


def _itk_values(reader: Any, path: Path) -> tuple[np.ndarray, float, float]:
    import SimpleITK

    try:
        array = SimpleITK.GetArrayFromImage(reader.Execute())
    except RuntimeError as error:
        raise Reject("truncated", f"the voxels of {path.name} cannot all be read") from error
    return np.asarray(array).transpose(), 1.0, 0.0


_DETACHED = re.compile(rb"(?im)^[ \t]*(?:ElementDataFile[ \t]*=|data file:)[ \t]*(.+?)[ \t]*\r?$")


def _header(path: Path) -> bytes:
    with path.open("rb") as file:
        head = file.read(_HEADER_BYTES)
    if path.name.lower().endswith((".nrrd", ".nhdr")):
        return head.replace(b"\r\n", b"\n").split(b"\n\n")[0]
    end = re.search(rb"(?im)^[ \t]*ElementDataFile[^\n]*", head)
    return head[: end.end()] if end else head[:0]


def _voxel_file(path: Path) -> Path | None:
    """The file beside a header that has its voxels; None: they follow in the same file.

    Raises:
        Reject: the header names one that is not there, or lies elsewhere, or several.
    """
    try:
        found = _DETACHED.search(_header(path))
    except OSError as error:
        raise Reject("unreadable", _plain(error, path)) from error
    if found is None or found[1].upper() == b"LOCAL":
        return None
    name = found[1].decode("utf-8", "replace")
    if name.upper().startswith("LIST") or "%" in name:
        raise Reject("unreadable", "its voxels are in a list of files; join them into one")
    if name in (".", "..") or "/" in name or "\\" in name:
        raise Reject(
            "unreadable", "its voxels lie in another folder; only those beside it are read"
        )
    voxels = path.with_name(name)
    if not voxels.is_file() or voxels.is_symlink():
        raise Reject("missing_file", f"{name}, the voxels of {path.name}, is not there")
    return voxels


def _is_packed(path: Path, voxels: Path) -> bool:
    if voxels.name.lower().endswith((*PACKED, ".zraw")):
        return True
    words = rb"(?im)^[ \t]*(?:CompressedData[ \t]*=[ \t]*true|encoding:[ \t]*(?:gz|bz))"
    return re.search(words, _header(path)) is not None


# All.


def _shape(shape: Sequence[int]) -> tuple[int, int, int, int]:
    sides = [int(n) for n in shape] + [1] * (3 - len(shape))
    volumes = [n for n in sides[3:] if n > 1]
    return sides[0], sides[1], sides[2], int(np.prod(volumes, dtype=np.int64))


def _check_claim(shape: Sequence[int], itemsize: int, size: int, packed: bool) -> None:
    claimed = int(np.prod(np.array(shape, dtype=object))) * itemsize
    if claimed > size * (GZIP_MAXIMUM_RATIO if packed else 1):
        raise Reject("truncated", f"the header claims {claimed} bytes, the file has {size}")


def _plain(error: Exception, path: Path) -> str:
    """The message without the file's path, which a report names already."""
    text = str(error).replace(str(path), path.name) or type(error).__name__
    return text.replace(os.linesep, " ")
