"""One scan in memory: in any orientation to canonical axes, and back to its native grid.

Arrays are `[C, D, H, W]` with axcodes S, P, L: D runs to superior, H to posterior, W to left.
`affine` maps (d, h, w) to RAS millimetres. Reading only permutes and flips axes, so nothing is
interpolated and `NativeGrid.to_native` undoes it exactly; an oblique scan stays oblique.
"""

from __future__ import annotations

import gzip
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from data_prep.errors import some
from data_prep.files import write_bytes
from data_prep.images import FloatArray, Image, Reject, SeriesFiles, open_image
from data_prep.settings import MINIMUM_SLICES

AXCODES = "SPL"
MODALITIES = ("CT", "MR")
Statistics = dict[str, float]
"""Of a channel, as `intensity.channel_statistics` names them."""
# Cosine between two axes above which the grid counts as sheared (0.3 degrees); header rounding
# stays below 1e-4, a gantry tilt is several degrees.
SHEAR_TOLERANCE = 5e-3
# A gantry tilts by up to 30 degrees; axes that nearly coincide would give a grid without end.
SHEAR_LARGEST = 45.0
# Share of a voxel by which two grids may differ and still count as one.
GRID_TOLERANCE = 0.1
# Air on CT is -1000 HU; signed MR maps (phase, ADC) stay far above -500.
CT_MINIMUM_HU = -500.0
CT_AIR_SHARE = 1e-3
# Below it nothing is physical: scanners fill what they have not seen with -2000, -3024 and others.
CT_PADDING_HU = -1024.0


@dataclass(frozen=True)
class NativeGrid:
    """The voxel grid of the file that a volume came from.

    `from_stored` is a 4x4 matrix of indices: native (i, j, k, 1) = from_stored @ (d, h, w, 1).
    It is a signed permutation, unless an unlabelled volume was resampled. `cropped` is the shape of
    the stored array, where it is a part of the whole.
    """

    shape: tuple[int, int, int]
    affine: FloatArray
    axcodes: str
    qform_code: int
    sform_code: int
    from_stored: FloatArray
    cropped: tuple[int, int, int] | None = None

    def to_native(self, array: np.ndarray) -> np.ndarray:
        """Put an array `[D, H, W]` on the stored grid back onto the native grid, exactly.

        What was cropped away is 0. Raises ValueError if the volume was resampled, or if the shape
        is not that of the grid.
        """
        linear = self.from_stored[:3, :3]
        permutation = [int(np.argmax(np.abs(linear[:, k]))) for k in range(3)]
        signs = [linear[permutation[k], k] for k in range(3)]
        permutes = sorted(permutation) == [0, 1, 2] and np.count_nonzero(linear) == 3
        if not permutes or any(abs(s) != 1 for s in signs):
            raise ValueError("the stored grid is a resampled one; it has no exact native array")
        expected = self.cropped or tuple(self.shape[axis] for axis in permutation)
        if array.shape != expected:
            raise ValueError(f"array has shape {array.shape}, the canonical grid has {expected}")
        flipped = array[tuple(slice(None, None, -1 if s < 0 else 1) for s in signs)]
        native = np.transpose(flipped, np.argsort(permutation))
        if self.cropped is None:
            return native
        first = [round(float(n)) for n in self.from_stored[:3, 3]]
        for sign, axis in zip(signs, permutation, strict=True):
            first[axis] -= native.shape[axis] - 1 if sign < 0 else 0
        whole = np.zeros(self.shape, dtype=native.dtype)
        whole[tuple(slice(f, f + n) for f, n in zip(first, native.shape, strict=True))] = native
        return whole

    def cut(self, array: np.ndarray, affine: FloatArray) -> tuple[np.ndarray, FloatArray]:
        """Of an array on the canonical grid of the whole scan, the part that is stored.

        An array of another shape, or of a scan that is stored whole, is returned as it is.
        """
        if self.cropped is None:
            return array, affine
        matrix = canonical_transform(self.affine, self.shape)
        step = np.linalg.solve(matrix, self.from_stored)
        whole = tuple(round(float(n)) for n in np.abs(matrix[:3, :3].T) @ self.shape)
        if array.shape != whole or not np.allclose(step[:3, :3], np.eye(3)):
            return array, affine
        starts = [round(float(n)) for n in step[:3, 3]]
        inside = tuple(slice(s, s + n) for s, n in zip(starts, self.cropped, strict=True))
        return array[inside], affine @ step

    def to_dict(self) -> dict[str, Any]:
        """Plain data for KEY.json."""
        return {
            "shape": list(self.shape),
            "affine": self.affine.tolist(),
            "axcodes": self.axcodes,
            "qform_code": self.qform_code,
            "sform_code": self.sform_code,
            "from_stored": self.from_stored.tolist(),
            **({} if self.cropped is None else {"cropped": list(self.cropped)}),
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> NativeGrid:
        """The inverse of `to_dict`."""
        first, second, third = (int(n) for n in data["shape"])
        d, h, w = (int(n) for n in data.get("cropped", (0, 0, 0)))
        return cls(
            shape=(first, second, third),
            affine=np.asarray(data["affine"], dtype=np.float64),
            axcodes=str(data["axcodes"]),
            qform_code=int(data["qform_code"]),
            sform_code=int(data["sform_code"]),
            from_stored=np.asarray(data["from_stored"], dtype=np.float64),
            cropped=(d, h, w) if "cropped" in data else None,
        )


@dataclass(frozen=True)
class Volume:
    """A scan on a canonical grid: `array` `[C, D, H, W]`, `affine` (4, 4) from (d, h, w) to RAS mm.

    The physical value of a voxel is `array * slope + intercept`, per channel (HU for CT).
    `statistics` are those of each channel's whole scan, of which `array` may be a part.
    """

    array: np.ndarray
    affine: FloatArray
    modality: tuple[str, ...]
    names: tuple[str, ...]
    native: NativeGrid
    slope: tuple[float, ...] = field(default=(1.0,))
    intercept: tuple[float, ...] = field(default=(0.0,))
    statistics: tuple[Statistics, ...] | None = None

    def __post_init__(self) -> None:
        channels = self.array.shape[0] if self.array.ndim == 4 else -1
        lengths = {len(self.modality), len(self.names), len(self.slope), len(self.intercept)}
        if lengths != {channels}:
            raise ValueError(
                f"a volume is [C, D, H, W] with a modality, name, slope and intercept for each "
                f"channel; got shape {self.array.shape} and lengths {sorted(lengths)}"
            )

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Distance of neighbouring voxels along (d, h, w), in millimetres."""
        return spacing_of(self.affine)

    def physical(self) -> np.ndarray:
        """Float32 `[C, D, H, W]` of physical values."""
        slope = np.asarray(self.slope, dtype=np.float32)[:, None, None, None]
        intercept = np.asarray(self.intercept, dtype=np.float32)[:, None, None, None]
        values = self.array.astype(np.float32, order="C")  # a scan's own axes are a view of it
        values *= slope
        values += intercept
        return values


def spacing_of(affine: FloatArray) -> tuple[float, float, float]:
    """Voxel spacing in millimetres along the three axes of an affine (4, 4)."""
    d, h, w = np.sqrt((affine[:3, :3] ** 2).sum(axis=0))
    return float(d), float(h), float(w)


def canonical_transform(affine: FloatArray, shape: Sequence[int]) -> FloatArray:
    """Index matrix (4, 4): canonical (d, h, w, 1) to native (i, j, k, 1).

    The axes are matched to S, P, L by their nearest anatomical direction.
    """
    start = nib.orientations.io_orientation(affine)
    if not np.isfinite(start).all():
        raise Reject("bad_geometry", "the affine has a missing axis")
    move = nib.orientations.ornt_transform(start, nib.orientations.axcodes2ornt(tuple(AXCODES)))
    matrix = np.zeros((4, 4))
    matrix[3, 3] = 1
    for native_axis, (canonical_axis, sign) in enumerate(move):
        matrix[native_axis, int(canonical_axis)] = sign
        matrix[native_axis, 3] = 0 if sign > 0 else shape[native_axis] - 1
    return matrix


def canonical_array(native: np.ndarray, matrix: FloatArray) -> np.ndarray:
    """A view of a native array `[I, J, K]` on the canonical axes `[D, H, W]`."""
    permutation = [int(np.argmax(np.abs(matrix[:3, k]))) for k in range(3)]
    flips = [matrix[permutation[k], k] < 0 for k in range(3)]
    moved = np.transpose(native, permutation)
    return moved[tuple(slice(None, None, -1 if flip else 1) for flip in flips)]


def read_nifti(path: str | Path, modality: str | None = None) -> Volume:
    """Read one 3D image file of any orientation onto canonical axes, without interpolation.

    As `read_channels` with one channel.
    """
    return read_channels([Path(path)], modality)


def read_channels(
    paths: Sequence[Path | SeriesFiles],
    modality: str | None = None,
    names: Sequence[str] = (),
    minimum: int = MINIMUM_SLICES,
    frame: int | None = None,
    upright: bool = False,
) -> Volume:
    """Read one scan onto canonical axes: a 3D image for each channel, or one 4D file.

    Integer files keep their stored integers with slope and intercept; all others become float32
    physical values. The header of DICOM says the modality. Elsewhere, without `modality`, it is
    taken from the intensities: see `guess_modality`. On CT all below -1024 HU is padding, and air.

    Args:
        paths: One file, or volume of a DICOM series, per channel, all on one grid in any
            orientation; or one file.
        modality: Of all channels.
        names: Of the channels. With several of them, one file has to be 4D with as many volumes.
        minimum: Fewest slices along any axis; 1 lets single slices and 2D files in, as
            `[C, 1, H, W]`.
        frame: The one volume of a 4D file that is wanted.
        upright: Resample a sheared grid (a tilted gantry) onto one of right angles.

    Raises:
        Reject: the files are not finite scalar volumes on one orthogonal grid; the code says why.
    """
    if modality is not None and modality not in MODALITIES:
        raise Reject("unsupported_modality", f"{modality} is neither CT nor MR")
    within = len(names) if len(paths) == 1 and len(names) > 1 else 1
    channels, scales, grids, modalities = [], [], [], []
    for path in paths:
        image = _open(path, within, minimum, frame)
        raw, slope, intercept = _values(image, frame)
        for volume in np.moveaxis(raw, 3, 0):
            kind = image.modality or modality or guess_modality(volume, slope, intercept)
            if kind == "CT":  # before a sheared grid blends it with its neighbours
                volume = _padding_as_air(volume, slope, intercept)
            outside = (volume.min() if slope > 0 else volume.max()) if upright else None
            array, affine, native = _canonical(image, volume, outside)
            channels.append(array)
            scales.append((slope, intercept))
            grids.append((affine, native))
            modalities.append(kind)
    affine, native = grids[0]
    shape = channels[0].shape
    for path, array, (other, _) in zip(paths, channels, grids, strict=False):
        for code, detail in _grid_problems("channel", array.shape, other, shape, affine):
            raise Reject(code, f"{path.name}: {detail}")
    names = tuple(names) or tuple(modalities)
    for c, name in enumerate(names):
        _check_content(channels[c], name if len(channels) > 1 else "")
    return Volume(
        # In the order in which all that follows walks through it: a flipped view is slow to read.
        array=np.ascontiguousarray(channels[0])[None] if len(channels) == 1 else np.stack(channels),
        affine=affine,
        modality=tuple(modalities),
        names=names,
        native=native,
        slope=tuple(slope for slope, _ in scales),
        intercept=tuple(intercept for _, intercept in scales),
    )


def read_known(paths: Sequence[Path], known: Sequence[str], modality: str | None = None) -> Volume:
    """The volume of some files under a modality that a network knows: what prep made of such.

    Prep gives all channels of a case one modality, where a data set says one: so does this where
    the network knows one, whatever the values of a channel look like.

    Args:
        paths: of `read_channels`.
        known: modalities of the network.
        modality: of all channels; told by their values if absent.

    Raises:
        Reject: as `read_channels` and `as_known`.
    """
    volume = read_channels(paths, modality)
    if modality is None and len(known) == 1 and len(set(volume.modality)) > 1:
        return read_channels(paths, known[0])
    return as_known(volume, known)


def as_known(volume: Volume, known: Sequence[str]) -> Volume:
    """The volume under a modality that the network knows.

    Values down to -500 are CT and nothing else; all others may be either, so a network that knows
    one modality takes them for it.

    Raises:
        Reject: CT for a network that knows MR only.
    """
    if volume.modality[0] in known:
        return volume
    if "CT" in volume.modality:
        raise Reject(
            "unsupported_modality",
            f"its values are those of CT, and this network knows {' and '.join(known)} only",
        )
    names = tuple(known[0] for _ in volume.modality)
    return replace(volume, modality=names, names=names)


def volume_from_array(
    array: np.ndarray, spacing: Sequence[float], modality: str | None = None
) -> Volume:
    """A volume of physical values that are on S, P, L axes already.

    Args:
        array: `[D, H, W]` or `[C, D, H, W]`.
        spacing: mm along (d, h, w).
        modality: of all channels; taken from the intensities if absent.

    Raises:
        Reject: not three-dimensional, or not finite.
    """
    channels = array[None] if array.ndim == 3 else array
    if channels.ndim != 4:
        raise Reject(
            "not_3d", f"the array has shape {array.shape}; [D, H, W] or [C, D, H, W] wanted"
        )
    values = channels.astype(np.float32)
    if not np.isfinite(values).all():
        raise Reject("nan_or_inf", "the array holds values that are not finite numbers")
    if modality is None:
        modality = guess_modality(values, 1.0, 0.0)
    if modality == "CT":  # as of a file
        values = np.stack([_padding_as_air(channel, 1.0, 0.0) for channel in values])
    # Columns are the directions of S, P, L in RAS millimetres.
    affine = np.eye(4)
    affine[:3, :3] = np.array([[0, 0, -1.0], [0, -1.0, 0], [1.0, 0, 0]]) @ np.diag(spacing)
    d, h, w = values.shape[1:]
    native = NativeGrid((d, h, w), affine, AXCODES, 0, 1, np.eye(4))
    count = len(values)
    return Volume(
        array=values,
        affine=affine,
        modality=(modality,) * count,
        names=(modality,) * count,
        native=native,
        slope=(1.0,) * count,
        intercept=(0.0,) * count,
    )


def read_label(
    path: str | Path,
    like: Volume,
    permitted: Collection[int] | None = None,
    upright: bool = False,
) -> np.ndarray:
    """Read a label map onto the canonical grid of its image: `[D, H, W]`, uint8 or uint16.

    Args:
        path: The label map.
        like: Its image; of one that was cropped, the label map may be that of the whole scan.
        permitted: Values that it may hold; any class number if absent.
        upright: It is the mask of an image that may be sheared: 1 wherever a marked voxel
            reaches, and outside of it.

    Raises:
        Reject: the file is unreadable, lies on another grid than `like` (`label_geometry_mismatch`)
            or holds values that are no class numbers, or none of the permitted (`label_values`);
            the detail tells all that is wrong, the code the first.
    """
    image = _open(Path(path), minimum=1)
    raw, slope, intercept = _values(image)
    if upright:
        raw, slope, intercept = (raw * slope + intercept != 0).astype(np.float32), 1.0, 0.0
    array, affine, _ = _canonical(image, raw[..., 0], 1.0 if upright else None)
    array, affine = like.native.cut(np.ceil(array) if upright else array, affine)
    problems = _grid_problems("label", array.shape, affine, like.array.shape[1:], like.affine)
    values = array if (slope, intercept) == (1.0, 0.0) else array * slope + intercept
    if values.dtype.kind == "f":
        rounded = np.rint(values)
        if np.abs(values - rounded).max(initial=0.0) > 1e-3:
            problems.append(("label_values", "the label holds fractions, not class numbers"))
        values = rounded
    low, high = values.min(), values.max()
    if low < 0 or high > np.iinfo(np.uint16).max:
        problems.append(("label_values", f"the label holds values from {low} to {high}"))
    elif permitted is not None:
        strange = sorted({int(v) for v in np.unique(values)} - set(permitted))
        if strange:
            fix = (
                "name them there too, or leave classes out, if it was given, to keep every value "
                "(a task picks its own)"
            )
            problems.append(
                ("label_values", f"the label holds {some(strange, 8)}, not in classes; {fix}")
            )
    if problems:
        raise Reject(problems[0][0], "; ".join(detail for _, detail in problems))
    return np.ascontiguousarray(values, dtype=np.uint8 if high < 256 else np.uint16)


def check_label_grid(
    path: str | Path, shape: tuple[int, ...], affine: FloatArray, native: NativeGrid | None = None
) -> None:
    """Looks at the header of a label map alone: does it lie on this canonical grid?

    That of the whole scan will do where `native` says that a part of it is stored.

    Raises:
        Reject: as `read_label`, which looks at the values too.
    """
    image = _open(Path(path), minimum=1)
    nothing = np.broadcast_to(np.uint8(0), image.shape[:3])
    array, found, _ = _canonical(image, nothing)
    if native is not None:
        array, found = native.cut(array, found)
    for code, detail in _grid_problems("label", array.shape, found, shape, affine):
        raise Reject(code, detail)


def write_nifti(array: np.ndarray, native: NativeGrid, path: str | Path) -> None:
    """Write an array `[D, H, W]` on canonical axes as NIfTI on its native grid, atomically."""
    if array.dtype == np.bool_:
        array = array.astype(np.uint8)
    if array.dtype == np.int64:  # what argmax gives, and what few programs read
        array = array.astype(np.int32)
    image = nib.Nifti1Image(np.ascontiguousarray(native.to_native(array)), native.affine)
    image.header.set_xyzt_units("mm")
    # With both codes 0 readers fall back to the spacing alone, as they did for the input.
    image.set_qform(native.affine, code=native.qform_code)
    image.set_sform(native.affine, code=native.sform_code)
    data = image.to_bytes()
    target = Path(path)
    if target.name.lower().endswith(".gz"):
        data = gzip.compress(data, compresslevel=6, mtime=0)
    write_bytes(target, data)


def guess_modality(array: np.ndarray, slope: float, intercept: float) -> str:
    """CT or MR by the physical values: some air of a CT is in nearly every one, at -1000 HU.

    A few voxels of signed MRI may be as low, so a share of them counts.
    """
    ends = float(array.min()) * slope + intercept, float(array.max()) * slope + intercept
    if min(ends) > CT_MINIMUM_HU:
        return "MR"
    code = (CT_MINIMUM_HU - intercept) / slope
    air = np.count_nonzero(array <= code if slope > 0 else array >= code)
    return "CT" if air >= CT_AIR_SHARE * array.size else "MR"


def _padding_as_air(array: np.ndarray, slope: float, intercept: float) -> np.ndarray:
    low, high = array.min(), array.max()
    code = (CT_PADDING_HU - intercept) / slope
    if array.dtype.kind in "iu":
        code = math.ceil(code) if slope > 0 else math.floor(code)
    # With all values on one side nothing is padding, or nothing is CT and is told as it is.
    if not (low < code <= high if slope > 0 else low <= code < high):
        return array
    return (np.maximum if slope > 0 else np.minimum)(array, array.dtype.type(code))


def _open(
    source: Path | SeriesFiles,
    channels: int = 1,
    minimum: int = MINIMUM_SLICES,
    frame: int | None = None,
) -> Image:
    """The image, header read, voxels not yet."""
    image = open_image(source)
    sides = image.shape[:3]
    if frame is not None:
        channels = max(image.shape[3], frame + 1)
    if image.shape[3] != channels or (image.flat and minimum > 1):
        found = sides[: 3 - image.flat] + image.shape[3:] * (image.shape[3] > 1)
        wanted = "one 3D volume is" if channels == 1 else f"{channels} volumes, one per name, are"
        raise Reject("not_3d", f"the image has shape {found}; {wanted} needed")
    if min(sides) < minimum:
        raise Reject(
            "too_few_slices",
            f"shape {sides}; at least {minimum} an axis needed "
            "(prep: minimum_slices=1 takes slices)",
        )
    return image


def _values(image: Image, frame: int | None = None) -> tuple[np.ndarray, float, float]:
    """Stored voxels `[I, J, K, C]` with slope and intercept; float32 physical if not integers.

    With `frame` those of one volume: what is wrong with the others is theirs.
    """
    raw, slope, intercept = image.read()
    raw = raw.reshape(image.shape, order="F")
    if frame is not None:
        raw = raw[..., frame : frame + 1]
    if not np.isfinite([slope, intercept]).all() or slope == 0:
        raise Reject("nan_or_inf", f"the header's slope {slope} or intercept {intercept}")
    if raw.dtype.kind in "iub":
        return raw.astype(raw.dtype.newbyteorder("="), copy=False), slope, intercept
    values = np.empty(raw.shape, dtype=np.float32, order="F")
    bad = 0
    with np.errstate(over="ignore", invalid="ignore"):
        for k in range(raw.shape[2]):  # slab by slab: float64 copies of a scan are large
            values[:, :, k] = raw[:, :, k].astype(np.float64) * slope + intercept
            bad += int(np.count_nonzero(~np.isfinite(values[:, :, k])))
    if bad:
        raise Reject("nan_or_inf", f"{bad} voxels are not finite numbers")
    return values, 1.0, 0.0


def _canonical(
    image: Image, raw: np.ndarray, outside: float | None = None
) -> tuple[np.ndarray, FloatArray, NativeGrid]:
    """Array `[D, H, W]`, its affine, and the native grid it came from.

    With a value for what lies `outside`, a sheared grid is resampled to one of right angles.
    """
    affine, step = image.affine, np.eye(4)
    columns = affine[:3, :3]
    lengths = np.sqrt((columns**2).sum(axis=0))
    if not np.isfinite(affine).all() or (lengths < 1e-6).any():
        raise Reject("bad_geometry", "the affine is not invertible")
    cosines = (columns / lengths).T @ (columns / lengths) - np.eye(3)
    if np.abs(cosines).max() > SHEAR_TOLERANCE:
        degrees = float(np.degrees(np.arcsin(min(1.0, np.abs(cosines).max()))))
        found = f"the axes are {degrees:.1f} degrees away from right angles"
        if degrees > SHEAR_LARGEST:
            raise Reject("sheared", f"{found}, more than any scanner tilts")
        if outside is None:
            raise Reject("sheared", f"{found} (prep: sheared=resample takes it)")
        raw, step = _made_upright(raw, columns, outside)
        affine = affine @ step
    first, second, third = image.shape[:3]
    matrix = canonical_transform(affine, raw.shape)
    native = NativeGrid(
        shape=(first, second, third),
        affine=image.affine,
        axcodes="".join(nib.aff2axcodes(image.affine)),
        qform_code=image.forms[0],
        sform_code=image.forms[1],
        from_stored=step @ matrix,
    )
    # Adding 0 turns -0.0 into 0.0, which reads better in KEY.json.
    return canonical_array(raw, matrix), affine @ matrix + 0.0, native


def _made_upright(
    raw: np.ndarray, columns: FloatArray, outside: float
) -> tuple[np.ndarray, FloatArray]:
    """A sheared array on a grid of right angles that holds all of it, and index matrix from that.

    The first axis stays, the second is turned within their plane, the third becomes its normal:
    of CT from a tilted gantry the slices stay as they are and move along each other. `outside` is
    the value of what lies outside the scan.
    """
    from scipy import ndimage

    unit, _ = np.linalg.qr(columns)
    target = unit * (unit * columns).sum(axis=0)
    # Upper triangular with ones: shifts alone. Rounded, or those by whole voxels, which headers
    # hold to 7 digits, would blend neighbours and lose what lies on the edge.
    back = np.round(np.triu(np.linalg.solve(columns, target)), 6)
    corners = np.array(np.meshgrid(*[(0, n - 1) for n in raw.shape], indexing="ij")).reshape(3, -1)
    ends = np.linalg.solve(back, corners)
    low, high = np.floor(ends.min(axis=1) + 1e-6), np.ceil(ends.max(axis=1) - 1e-6)
    step = np.eye(4)
    step[:3, :3], step[:3, 3] = back, back @ low
    moved = ndimage.affine_transform(
        raw.astype(np.float32),
        back,
        offset=step[:3, 3],
        output_shape=tuple((high - low + 1).astype(int)),
        order=1,
        mode="constant",
        cval=float(outside),
    )
    return (np.rint(moved).astype(raw.dtype) if raw.dtype.kind in "iu" else moved), step


def _check_content(array: np.ndarray, channel: str) -> None:
    if array.min() == array.max():
        where = f" of channel {channel}" if channel else ""
        raise Reject("constant", f"every voxel{where} is {array.flat[0]}")


def _grid_problems(
    what: str,
    shape: tuple[int, ...],
    affine: FloatArray,
    wanted: tuple[int, ...],
    like: FloatArray,
) -> list[tuple[str, str]]:
    """Why a grid is not that of the image it belongs to, as (code, detail)."""
    code = f"{what}_geometry_mismatch"
    if shape != wanted:
        return [(code, f"the {what} has {shape} voxels (d, h, w), its image {wanted}")]
    shift = _largest_shift(affine, like, wanted)
    if shift > GRID_TOLERANCE * min(spacing_of(like)):
        return [(code, f"the {what}'s grid lies up to {shift:.2f} mm from its image's")]
    return []


def _largest_shift(one: FloatArray, other: FloatArray, shape: Sequence[int]) -> float:
    """Largest distance in mm between the same corner of two grids of one shape."""
    corners = np.array(np.meshgrid(*[(0, n - 1) for n in shape], [1], indexing="ij")).reshape(4, -1)
    return float(np.sqrt((((one - other) @ corners)[:3] ** 2).sum(axis=0)).max())
