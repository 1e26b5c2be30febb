"""Image files of any format, opened without their voxels: NIfTI, NRRD, MetaImage, DICOM series.

Whatever a header says is looked at before a byte of voxels is read, so a file that claims more than
it can hold costs nothing. NIfTI is nibabel's to read, NRRD is SimpleITK's, MetaImage is
`data_prep.metaimage`, DICOM is `data_prep.dicom`.
"""

from __future__ import annotations

import errno
import gzip
import math
import os
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError

NIFTI = (".nii.gz", ".nii")
NRRD = (".nrrd", ".nhdr")
META = (".mha", ".mhd")
SUFFIXES = (*NIFTI, *NRRD, *META)
DETACHED = (".nhdr", ".mhd")
BESIDE = (".raw", ".raw.gz", ".zraw", ".img.raw")
"""Of headers that are files of their own, and of their voxels."""

PACKED = (".gz", ".bz2", ".zst")
# deflate cannot pack more than about 1032 to 1, so a header that claims more is lying.
GZIP_MAXIMUM_RATIO = 1100
MAX_VOXELS = 2**32
"""Of one file, or one channel after resampling: 8 volumes of 512x512x2000."""
# What is packed more tightly than any image may become this large.
IMAGE_RATIO, TIGHT_BYTES = 200, 2**30
HEADER_BYTES = 2**16
"""Within which a header in words has to end."""
# Of metres and micrometres, as NIfTI headers count units; one that names none means millimetres.
_MILLIMETRES = {1: 1000.0, 3: 0.001}
_MORE_BYTES = 2**26
"""Of a compressed file behind its voxels, at most."""

GZIP, ZLIB_OR_GZIP, DEFLATE = 16 + zlib.MAX_WBITS, 32 + zlib.MAX_WBITS, -zlib.MAX_WBITS
"""Compressed streams, as zlib counts them; gzip alone goes on with another stream behind one."""
_PACKED_PIECE, _PIECE = 2**17, 2**20
"""Bytes that are read at once, and that they become at most."""

FloatArray = np.ndarray[Any, np.dtype[np.float64]]


class Reject(Exception):  # noqa: N818 - a verdict on one scan, not a program error
    """One scan cannot become a sample: `code` is a stable word, `detail` says what was found."""

    def __init__(self, code: str, detail: str) -> None:
        self.code = code
        self.detail = detail
        super().__init__(f"{code}: {detail}")

    def __reduce__(self) -> tuple[type[Reject], tuple[str, str]]:
        return type(self), (self.code, self.detail)


OF_THE_FILE = (
    errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EISDIR, errno.EINVAL,
)  # fmt: skip
"""What the system says of a file that is not there, or is none; all else may pass, or be mended."""


def of_the_system(error: BaseException | None) -> OSError | None:
    """The error of the system that another one comes of, if it says nothing of the file itself.

    A server that does not answer, too many open files, a right that is missing: no verdict on a
    scan may be founded on these.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno and error.errno not in OF_THE_FILE:
            return error
        error = error.__cause__ or error.__context__
    return None


@dataclass(frozen=True)
class SeriesFiles:
    """One volume of a DICOM series.

    Attributes:
        files: Those that hold it.
        volume: Which of the volumes that these hold.
        first: The first file of the whole series, which is the same for all of its volumes.
    """

    files: tuple[Path, ...]
    volume: int
    first: Path

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
    try:
        if source.name.lower().endswith(META):
            from data_prep.metaimage import open_metaimage

            return open_metaimage(source)
        return _nrrd(source) if source.name.lower().endswith(NRRD) else _nifti(source)
    except OSError as error:
        raise Reject("unreadable", _plain(error, source)) from error


def _dicom(source: SeriesFiles) -> Image:
    from data_prep.dicom import read_series

    series = read_series(source.files)[source.volume]
    return Image((*series.shape, 1), False, series.affine, (0, 2), series.modality, series.values)


# NIfTI.


@contextmanager
def _whole_stream() -> Iterator[None]:
    """Says what is wrong with a compressed stream that is read within."""
    try:
        yield
    except EOFError as error:
        raise Reject("truncated", "the compressed stream ends too early") from error
    except (zlib.error, gzip.BadGzipFile) as error:
        raise Reject("unreadable", f"the compression is damaged ({error})") from error


def _nifti(path: Path) -> Image:
    try:
        with _whole_stream():
            size = path.stat().st_size
            image = nib.load(path)
    except ImageFileError as error:
        if path.name.lower().endswith(".gz"):
            _check_stream(path)
        raise Reject("not_an_image", "the file is not NIfTI") from error
    except (OSError, ValueError, HeaderDataError) as error:
        raise Reject("unreadable", _plain(error, path)) from error
    if not isinstance(image, nib.Nifti1Pair):
        raise Reject("not_an_image", f"{type(image).__name__} is not NIfTI")
    dtype = image.get_data_dtype()
    if dtype.fields is not None or dtype.kind == "c":
        raise Reject("rgb_or_complex", f"voxels are {dtype}, one real number each is needed")
    shape = four_sides(image.shape)
    if isinstance(image, nib.Nifti1Image):
        packed = path.name.lower().endswith(PACKED)
        check_claim(shape, dtype.itemsize, size, packed)
    forms = int(image.header["qform_code"]), int(image.header["sform_code"])
    affine = np.array(image.affine, dtype=np.float64)
    affine[:3] *= _MILLIMETRES.get(int(image.header["xyzt_units"]) & 7, 1.0)
    flat = len(image.shape) < 3
    return Image(shape, flat, affine, forms, None, lambda: _nifti_values(image, path))


def inflated(file: BinaryIO, kind: int) -> Iterator[bytes]:
    """What a compressed stream holds, piece by piece to its end: there is the sum of its bytes.

    Raises:
        Reject: it is cut or damaged.
    """
    packed = file.read(_PACKED_PIECE)
    try:
        while True:
            stream = zlib.decompressobj(kind)
            while not stream.eof:
                if piece := stream.decompress(packed, _PIECE):
                    yield piece
                elif not packed:
                    raise Reject("truncated", "the compressed stream ends too early")
                packed = stream.unconsumed_tail or (b"" if stream.eof else file.read(_PACKED_PIECE))
            if kind != GZIP:
                return
            packed = (stream.unused_data or file.read(_PACKED_PIECE)).lstrip(b"\0")
            while not packed:  # zeros may lie between streams
                if not (more := file.read(_PACKED_PIECE)):
                    return
                packed = more.lstrip(b"\0")
    except zlib.error as error:
        raise Reject("unreadable", f"the compression is damaged ({error})") from error


def unpacked(
    path: Path, count: int, begin: int = 0, kind: int = GZIP, more: int = 0
) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """As many bytes of the compressed stream of a file, which is read to its end.

    Args:
        path: Of the file.
        count: Bytes that are wanted.
        begin: Where in the file the stream begins.
        kind: Of the stream.
        more: Bytes that may come behind them.

    Raises:
        Reject: it is cut or damaged, or holds more than that.
    """
    raw, there = np.empty(count, np.uint8), 0
    with path.open("rb") as file:
        file.seek(begin)
        for piece in inflated(file, kind):
            wanted = min(len(piece), max(0, count - there))
            raw[there : there + wanted] = np.frombuffer(piece, np.uint8, wanted)
            there += len(piece)
            if there > count + more:
                raise Reject("unreadable", f"it unpacks to more than the {count} bytes of it")
    if there < count:
        raise Reject("truncated", f"{there} of {count} bytes are there")
    return raw


def _check_stream(path: Path) -> None:
    """Says what is wrong with a compressed stream whose header nibabel could not find."""
    with path.open("rb") as file:
        if file.read(2) != b"\x1f\x8b":
            raise Reject(
                "not_an_image", "it is not compressed, as its name says; plain NIfTI is named .nii"
            )
    with _whole_stream(), gzip.open(path) as stream:
        stream.read(HEADER_BYTES)


def _nifti_values(image: Any, path: Path) -> tuple[np.ndarray, float, float]:
    try:
        with _whole_stream():
            if path.name.lower().endswith(".gz") and isinstance(image, nib.Nifti1Image):
                stored = image.dataobj
                size = math.prod(stored.shape) * stored.dtype.itemsize
                data = unpacked(path, stored.offset + size, more=_MORE_BYTES)[stored.offset :]
                raw = data.view(stored.dtype).reshape(stored.shape, order="F")
            else:
                raw = np.asanyarray(image.dataobj.get_unscaled())
    except (OSError, ValueError) as error:
        # nibabel says "Expected N bytes, got M bytes" and "mmap length is greater than file size".
        code = "truncated" if "xpected" in str(error) or "mmap" in str(error) else "unreadable"
        raise Reject(code, _plain(error, path)) from error
    return raw, float(image.dataobj.slope), float(image.dataobj.inter)


# NRRD.


def _nrrd(path: Path) -> Image:
    import SimpleITK

    SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)
    fields = _nrrd_header(path)
    voxels = beside(path, fields["datafile"]) if "datafile" in fields else path
    reader = SimpleITK.ImageFileReader()
    reader.SetImageIO("NrrdImageIO")
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        if re.search("parsing spac(e|ings)", str(error)):
            raise Reject("bad_geometry", "its header does not say where its voxels lie") from error
        raise Reject("not_an_image", f"the file is no {path.suffix} image") from error
    components, axes = reader.GetNumberOfComponents(), reader.GetDimension()
    pixel = SimpleITK.GetPixelIDValueAsString(reader.GetPixelID())
    volumes = components if "list" in fields.get("kinds", "").split() and axes == 3 else 1
    if components > volumes or "complex" in pixel:
        raise Reject("rgb_or_complex", f"voxels are {pixel}, one real number each is needed")
    shape = four_sides((*reader.GetSize(), volumes) if volumes > 1 else reader.GetSize())
    bits = int((re.search(r"\d+", pixel) or ["64"])[0])
    packed = fields.get("encoding", "")[:2].lower() in ("gz", "bz")
    check_claim(shape, bits // 8, voxels.stat().st_size, packed)
    affine = np.eye(4)
    space = min(axes, 3)
    directions = np.array(reader.GetDirection()).reshape(axes, axes)[:space, :space]
    affine[:space, :space] = directions * np.array(reader.GetSpacing()[:space])
    affine[:space, 3] = reader.GetOrigin()[:space]
    affine[:2] *= -1  # ITK counts to left and posterior
    if not np.isfinite(affine).all() or np.linalg.det(affine) == 0:
        raise Reject("bad_geometry", "the affine is not invertible")
    return Image(shape, axes < 3, affine, (0, 2), None, lambda: _nrrd_values(reader, path))


def _nrrd_values(reader: Any, path: Path) -> tuple[np.ndarray, float, float]:
    import SimpleITK

    try:
        array = np.asarray(SimpleITK.GetArrayFromImage(reader.Execute()))
    except RuntimeError as error:
        raise Reject("truncated", f"the voxels of {path.name} cannot all be read") from error
    several = reader.GetNumberOfComponents() > 1
    return (array.transpose(2, 1, 0, 3) if several else array.transpose()), 1.0, 0.0


def _nrrd_header(path: Path) -> dict[str, str]:
    """Fields by their names in lower case, without spaces.

    Raises:
        Reject: it has no end, or says a thing twice.
    """
    with path.open("rb") as file:
        head = file.read(HEADER_BYTES)
    if not head.startswith(b"NRRD"):
        raise Reject("not_an_image", f"the file is no {path.suffix} image")
    top, end, _ = head.replace(b"\r\n", b"\n").replace(b"\r", b"\n").partition(b"\n\n")
    if not end and len(head) == HEADER_BYTES:
        raise Reject("unreadable", f"its header does not end within {HEADER_BYTES} bytes")
    fields: dict[str, str] = {}
    for line in top.decode("utf-8", "replace").split("\n")[1:]:
        name, colon, value = line.partition(":")
        if not colon or value.startswith("=") or line.startswith("#"):
            continue
        name = re.sub(r"\s", "", name.lower())
        if name in fields:
            raise Reject("unreadable", "its header says a thing twice")
        fields[name] = value.strip()
    return fields


# All.


def beside(path: Path, name: str) -> Path:
    """The file beside a header that has its voxels.

    Raises:
        Reject: it is not there, or lies elsewhere, or is several.
    """
    if not path.name.lower().endswith(DETACHED):
        raise Reject(
            "unreadable", f"its voxels are not in it, as those of {path.suffix} have to be"
        )
    if name.upper().startswith("LIST") or "%" in name:
        raise Reject("unreadable", "its voxels are in a list of files; join them into one")
    if name in ("", "-", ".", "..") or "/" in name or "\\" in name or "\0" in name:
        raise Reject(
            "unreadable", "its voxels lie in another folder; only those beside it are read"
        )
    voxels = path.with_name(name)
    if not voxels.is_file() or voxels.is_symlink():
        raise Reject("missing_file", f"{name}, the voxels of {path.name}, is not there")
    return voxels


def four_sides(shape: Sequence[int]) -> tuple[int, int, int, int]:
    """Voxels along three axes, and the number of volumes."""
    sides = [int(n) for n in shape] + [1] * (3 - len(shape))
    return sides[0], sides[1], sides[2], math.prod(sides[3:])


def check_claim(shape: Sequence[int], itemsize: int, size: int, packed: bool) -> None:
    """Refuses a header that claims more than a file of this size can hold, or anybody needs.

    Raises:
        Reject: `truncated` or `too_large`.
    """
    voxels = math.prod(int(n) for n in shape)
    claimed = voxels * itemsize
    if claimed > size * (GZIP_MAXIMUM_RATIO if packed else 1):
        raise Reject("truncated", f"the header claims {claimed} bytes, the file has {size}")
    if voxels > MAX_VOXELS:
        raise Reject("too_large", f"{voxels} voxels, more than {MAX_VOXELS}")
    if claimed > max(TIGHT_BYTES, size * IMAGE_RATIO):
        raise Reject("too_large", f"{size} bytes would unpack to {claimed}: no image is packed so")


def _plain(error: Exception, path: Path) -> str:
    """The message without the file's path, which a report names already."""
    text = str(error).replace(str(path), path.name) or type(error).__name__
    return text.replace(os.linesep, " ")
