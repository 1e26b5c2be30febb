"""MetaImage (.mha, .mhd), header and voxels.

SimpleITK's reader takes damaged voxels for whole ones, and of some headers it dies or never ends.
So nothing of a file reaches it: what this one does not know is refused. Axes are LPS.
"""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np

from data_prep.images import (
    HEADER_BYTES,
    ZLIB_OR_GZIP,
    Image,
    Reject,
    beside,
    check_claim,
    four_sides,
    unpacked,
)

TYPES = {
    "CHAR": "i1", "UCHAR": "u1", "SHORT": "i2", "USHORT": "u2", "INT": "i4", "UINT": "u4",
    "LONG": "i4", "ULONG": "u4", "LONG_LONG": "i8", "ULONG_LONG": "u8", "FLOAT": "f4",
    "DOUBLE": "f8",
}  # fmt: skip
"""Of `ElementType = MET_...`: kind and bytes; a LONG has four."""

MOST_AXES = 5
_BETWEEN = re.compile(rb"[=:]")

Fields = dict[str, str]


def open_metaimage(path: Path) -> Image:
    """Opens a file; its voxels are read by `Image.read`.

    Raises:
        Reject: it is none, or its voxels are elsewhere or no single real numbers.
    """
    fields, end = _header(path)
    axes = _whole(fields, "ndims", 1)[0]
    if not 1 <= axes <= MOST_AXES:
        raise Reject("not_3d", f"{axes} axes, from 1 to {MOST_AXES} are read")
    sides = _whole(fields, "dimsize", axes)
    if min(sides) < 1:
        raise Reject("unreadable", f"it is said to have {' x '.join(map(str, sides))} voxels")
    kind = fields.get("elementtype", "").removeprefix("MET_")
    numbers = _whole(fields, "elementnumberofchannels", 1, "1")[0]
    if numbers != 1 or kind.endswith("_ARRAY"):
        raise Reject("rgb_or_complex", "voxels have several values, one real number is needed")
    if kind not in TYPES:
        raise Reject("unreadable", "its voxels are of a type that is not known")
    voxels = path
    if fields["elementdatafile"].upper() != "LOCAL":
        voxels, end = beside(path, fields["elementdatafile"]), 0
    big = _is_true(fields, "binarydatabyteordermsb") or _is_true(fields, "elementbyteordermsb")
    dtype = np.dtype(TYPES[kind]).newbyteorder(">" if big else "<")
    shape = four_sides(sides)
    packed = _is_true(fields, "compresseddata")
    check_claim(shape, dtype.itemsize, voxels.stat().st_size, packed)
    if not _is_true(fields, "binarydata", "True"):
        raise Reject("unreadable", "its voxels are written as text")
    count = math.prod(sides) * dtype.itemsize
    skipped = _whole(fields, "headersize", 1, "0")[0]
    if skipped:  # of the file with the voxels; below 0 they are its end
        end = skipped if skipped > 0 else voxels.stat().st_size - count

    def read() -> tuple[np.ndarray, float, float]:
        if packed:
            raw = unpacked(voxels, count, begin=end, kind=ZLIB_OR_GZIP)
        else:
            raw = _plain(voxels, end, count)
        return raw.view(dtype), 1.0, 0.0

    return Image(shape, axes < 3, _affine(fields, axes), (0, 2), None, read)


def _header(path: Path) -> tuple[Fields, int]:
    """Fields by their names in lower case, and where what follows them begins."""
    with path.open("rb") as file:
        head = file.read(HEADER_BYTES)
    fields: Fields = {}
    end = 0
    for line in head.split(b"\n"):
        end += len(line) + 1
        name, *value = (part.strip().decode("utf-8", "replace") for part in _BETWEEN.split(line, 1))
        fields[name.lower()] = "".join(value)
        if value and name.lower() == "elementdatafile":
            return fields, end
    raise Reject("not_an_image", f"the file is no {path.suffix} image, or its header does not end")


def _whole(fields: Fields, name: str, count: int, otherwise: str = "") -> list[int]:
    found = fields.get(name, otherwise).split()
    if len(found) != count or not all(re.fullmatch(r"-?\d{1,12}", text) for text in found):
        raise Reject("unreadable", f"{name} of its header is not {count} whole numbers")
    return [int(text) for text in found]


def _real(fields: Fields, names: tuple[str, ...], otherwise: np.ndarray) -> np.ndarray:
    """Numbers of the first of the names that is there."""
    for name in names:
        if name in fields:
            try:
                return np.array(fields[name].split(), dtype=np.float64).reshape(otherwise.shape)
            except ValueError as error:
                raise Reject("bad_geometry", f"{name} is not {otherwise.size} numbers") from error
    return otherwise


def _is_true(fields: Fields, name: str, otherwise: str = "False") -> bool:
    return fields.get(name, otherwise)[:1].lower() in ("t", "y", "1")


def _affine(fields: Fields, axes: int) -> np.ndarray:
    """(i, j, k) to RAS millimetres (4, 4)."""
    spacing = _real(fields, ("elementspacing", "elementsize"), np.ones(axes))
    # A row is the direction of an axis.
    turn = _real(fields, ("transformmatrix", "rotation", "orientation"), np.eye(axes)).T
    origin = _real(fields, ("offset", "position", "origin"), np.zeros(axes))
    affine, space = np.eye(4), min(axes, 3)
    affine[:space, :space] = (turn * spacing)[:space, :space]
    affine[:space, 3] = origin[:space]
    affine[:2] *= -1
    return affine


def _plain(path: Path, offset: int, count: int) -> np.ndarray:
    raw = np.fromfile(path, np.uint8, count, offset=max(offset, 0))
    if len(raw) < count:
        raise Reject("truncated", f"{len(raw)} of {count} bytes of voxels are there")
    return raw
