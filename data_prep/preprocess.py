"""Preprocessing as data: a versioned list of named operations, and its numpy reference.

A release carries this list, so that features never depend on a remembered recipe. The device
applies the same operations batched and is tested equal to `Preprocess.apply`; both take their
intensity numbers from `intensity_coefficients`, the one owner of the rules.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from scipy import ndimage, sparse

from data_prep.errors import InputError
from data_prep.images import MAX_VOXELS, Reject
from data_prep.intensity import encode, volume_statistics
from data_prep.settings import Millimetres
from data_prep.volume import Statistics, Volume

VERSION = 1
# Spacings closer than this (relative) are the same: resampling would only blur.
SPACING_TOLERANCE = 0.01
# Floor of the standard deviation, in physical units, for scans that are constant after clipping.
EPSILON = 1e-8
MAX_PAD = 2**27
"""Voxels that the smallest scan is padded to, at most: 512 cubed."""

_PIECE = 2**18
"""Voxels of an array that is resampled which are worked on at once: 1 MiB."""

_REACH, _KAISER = 5, 7.0
"""Of the window over the sinc that an axis shrinks by: new voxels to each side, and its beta."""


class _Operation(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Reorient(_Operation):
    """Permute and flip to canonical axes; every `Volume` already is on them."""

    op: Literal["reorient"]
    axcodes: Literal["SPL"]


class Resample(_Operation):
    """Linear interpolation to a spacing (d, h, w) in mm, or none."""

    op: Literal["resample"]
    spacing_mm: tuple[Millimetres, Millimetres, Millimetres] | None


class Rule(_Operation):
    """How the values of a modality become those of the network.

    `window` maps [low, high] onto `onto`, `percentile` the volume's own 0.5 and 99.5 percentiles;
    `zscore` uses the volume's robust statistics. What lies outside is clipped.
    """

    rule: Literal["window", "percentile", "zscore"]
    low: float | None = None
    high: float | None = None
    onto: tuple[float, float] | None = None
    """Where the ends go; [-1, 1] if it does not say."""

    @model_validator(mode="after")
    def _window_has_ends(self) -> Rule:
        if self.rule == "window":
            if self.low is None or self.high is None or self.low >= self.high:
                raise ValueError("a window needs low < high")
        elif (self.low, self.high) != (None, None):
            raise ValueError("low and high belong to a window")
        if self.rule == "zscore" and self.onto is not None:
            raise ValueError("onto belongs to a window or to percentiles")
        if self.onto is not None and self.onto[0] >= self.onto[1]:
            raise ValueError("onto needs its lower end first")
        return self


class Intensity(_Operation):
    """One rule per modality."""

    op: Literal["intensity"]
    CT: Rule
    MR: Rule


class Pad(_Operation):
    """Pad at the far ends to multiples of (d, h, w) with the smallest normalised value."""

    op: Literal["pad"]
    multiple: tuple[
        Annotated[int, Field(ge=1, le=1024)],
        Annotated[int, Field(ge=1, le=1024)],
        Annotated[int, Field(ge=1, le=1024)],
    ]
    value: Literal["minimum"]

    @model_validator(mode="after")
    def _multiple_is_sane(self) -> Pad:
        if math.prod(self.multiple) > MAX_PAD:
            raise ValueError(f"multiples of {list(self.multiple)}: more than {MAX_PAD} voxels")
        return self


Operation = Annotated[Reorient | Resample | Intensity | Pad, Field(discriminator="op")]
_OPERATIONS: TypeAdapter[list[Reorient | Resample | Intensity | Pad]] = TypeAdapter(list[Operation])

DEFAULT_INTENSITY: dict[str, Any] = {
    "op": "intensity",
    "CT": {"rule": "window", "low": -1000.0, "high": 1000.0},
    "MR": {"rule": "zscore"},
}


@dataclass(frozen=True)
class Preprocess:
    """A validated list of operations, applied in order.

    Statistics for `zscore` are those of the whole native volume, before any resampling, and come
    from its int16 codes: a NIfTI and its copy in a corpus give the same numbers.
    """

    operations: tuple[dict[str, Any], ...]

    def __post_init__(self) -> None:
        parsed = _parse(self.operations)
        plain = [operation.model_dump(exclude_none=True, mode="json") for operation in parsed]
        for kept, operation in zip(plain, parsed, strict=True):
            if isinstance(operation, Resample):
                kept.setdefault("spacing_mm", None)
        object.__setattr__(self, "operations", tuple(plain))

    @classmethod
    def default(
        cls,
        spacing_mm: Sequence[float] | None = None,
        multiple: Sequence[int] | None = None,
        intensity: Mapping[str, Any] | None = None,
    ) -> Preprocess:
        """CT window [-1000, 1000] HU to [-1, 1], MR robust z-score; resample and pad on request.

        Args:
            spacing_mm: (d, h, w) to resample to.
            multiple: (d, h, w) to pad to.
            intensity: other rules, by modality.
        """
        operations: list[dict[str, Any]] = [
            {"op": "reorient", "axcodes": "SPL"},
            {"op": "resample", "spacing_mm": list(spacing_mm) if spacing_mm else None},
            {**DEFAULT_INTENSITY, **(intensity or {})},
        ]
        if multiple:
            operations.append({"op": "pad", "multiple": list(multiple), "value": "minimum"})
        return cls(tuple(operations))

    def to_dict(self) -> dict[str, Any]:
        """Plain data for config.json."""
        return {"version": VERSION, "operations": [dict(o) for o in self.operations]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Preprocess:
        """The inverse of `to_dict`; raises InputError on anything it does not know."""
        unknown = sorted(set(data) - {"version", "operations"})
        if unknown:
            raise InputError(f"preprocess has unknown keys {unknown}; it has version, operations")
        if data.get("version") != VERSION:
            raise InputError(
                f"preprocess has version {data.get('version')!r}, this program reads {VERSION}; "
                "update voxelith to read newer files"
            )
        operations = data.get("operations")
        if not isinstance(operations, list):
            raise InputError("preprocess.operations is not a list")
        return cls(tuple(operations))

    @property
    def spacing_mm(self) -> tuple[float, float, float] | None:
        """The spacing (d, h, w) that volumes are resampled to, or None."""
        for operation in _parse(self.operations):
            if isinstance(operation, Resample) and operation.spacing_mm is not None:
                return operation.spacing_mm
        return None

    @property
    def intensity(self) -> dict[str, Any] | None:
        """The intensity operation, as `intensity_coefficients` takes it."""
        return next((o for o in self.operations if o["op"] == "intensity"), None)

    def shape_of(self, shape: Sequence[int], spacing: Sequence[float]) -> list[int]:
        """Voxels (d, h, w) that `apply` gives of a volume on canonical axes."""
        made = [int(n) for n in shape]
        for operation in _parse(self.operations):
            if isinstance(operation, Resample) and operation.spacing_mm is not None:
                made = resampled_shape(made, spacing_factors(spacing, operation.spacing_mm))
            elif isinstance(operation, Pad):
                made = [n + -n % m for n, m in zip(made, operation.multiple, strict=True)]
        return made

    def apply(self, volume: Volume) -> Volume:
        """The numpy reference: a float32 volume `[C, D, H, W]` with its affine kept right.

        Args:
            volume: A scan on canonical axes; its statistics are computed if it does not know them.

        Raises:
            Reject: it would become larger than any scan is.
        """
        coded = encode(volume)
        made = self.shape_of(volume.array.shape[1:], volume.spacing)
        if math.prod(made) > MAX_VOXELS:
            raise Reject(
                "too_large",
                f"{volume.array.shape[1:]} voxels become {made}, more than {MAX_VOXELS}",
            )
        known = volume.statistics or volume_statistics(coded)
        result = as_physical(coded)
        for operation in _parse(self.operations):
            if isinstance(operation, Resample) and operation.spacing_mm is not None:
                result = resample(result, operation.spacing_mm)
            elif isinstance(operation, Intensity):
                plain = operation.model_dump()
                # In place and slice by slice: the array is this function's own, and may be large.
                for c, modality in enumerate(result.modality):
                    coefficients = intensity_coefficients(plain, modality, known[c])
                    for values in result.array[c]:
                        values[...] = normalise(values, coefficients)
            elif isinstance(operation, Pad):
                result = pad(result, operation.multiple)
        return result


def intensity_coefficients(
    operation: Mapping[str, Any], modality: str, statistics: Statistics
) -> tuple[float, float, float, float]:
    """(low, high, shift, scale) of one channel: clip to [low, high], then (x - shift) * scale.

    Args:
        operation: An `intensity` operation.
        modality: `CT` or `MR`.
        statistics: Of the whole native volume, in physical units.
    """
    rule = operation[modality]
    low, high = statistics["p0_5"], statistics["p99_5"]
    if rule["rule"] == "window":
        low, high = float(rule["low"]), float(rule["high"])
    if rule["rule"] in ("window", "percentile"):
        bottom, top = rule.get("onto") or (-1.0, 1.0)
        scale = (top - bottom) / max(high - low, EPSILON)
        return low, high, low - bottom / scale, scale
    return low, high, statistics["clipped_mean"], 1 / max(statistics["clipped_std"], EPSILON)


def normalise(values: np.ndarray, coefficients: tuple[float, float, float, float]) -> np.ndarray:
    """Apply `intensity_coefficients` to float32 physical values."""
    low, high, shift, scale = (np.float32(number) for number in coefficients)
    return (np.clip(values, low, high) - shift) * scale


def as_physical(volume: Volume) -> Volume:
    """The volume with float32 physical values in place of codes."""
    channels = len(volume.array)
    return replace(
        volume, array=volume.physical(), slope=(1.0,) * channels, intercept=(0.0,) * channels
    )


def spacing_factors(spacing: Sequence[float], spacing_mm: Sequence[float]) -> np.ndarray:
    """Voxels of a volume per voxel of its resampled self, (d, h, w); 1 where it stays untouched."""
    factors = np.asarray(spacing_mm, dtype=np.float64) / np.asarray(spacing)
    factors[np.abs(factors - 1) < SPACING_TOLERANCE] = 1.0
    return factors


def resampled_shape(shape: Sequence[int], factors: Sequence[float] | np.ndarray) -> list[int]:
    """Voxels (d, h, w) of a volume once it is resampled."""
    return [max(1, round(int(n) / f)) for n, f in zip(shape, factors, strict=True)]


def _checked_shape(shape: Sequence[int], factors: np.ndarray) -> list[int]:
    made = resampled_shape(shape, factors)
    if math.prod(made) > MAX_VOXELS:
        raise Reject("too_large", f"{tuple(shape)} voxels become {made}, more than {MAX_VOXELS}")
    return made


def smoothing(factors: np.ndarray) -> np.ndarray:
    """Sigma (d, h, w), in voxels of the volume, of the Gaussian that goes before resampling."""
    return np.maximum(0.0, (factors - 1) / 2)


def resample(volume: Volume, spacing_mm: Sequence[float]) -> Volume:
    """Resample a float32 volume linearly to a spacing (d, h, w) in mm.

    The near face of the field of view stays where it is; the far face moves by less than a voxel.
    Axes that shrink by a factor f are smoothed first by a Gaussian of (f - 1) / 2 voxels, as
    scikit-image's anti-aliasing does. An axis whose spacing fits within 1 % stays untouched.

    Raises:
        Reject: it would become larger than any scan is.
    """
    factors = spacing_factors(volume.spacing, spacing_mm)
    if (factors == 1).all():
        return volume
    shape = _checked_shape(volume.array.shape[1:], factors)
    # Voxel i of the result is centred at source index (i + 1/2) f - 1/2.
    offset = factors / 2 - 0.5
    sigma = smoothing(factors)
    channels = []
    for channel in volume.array.astype(np.float32, copy=False):
        smooth = ndimage.gaussian_filter(channel, sigma, mode="nearest") if sigma.any() else channel
        channels.append(
            ndimage.affine_transform(
                smooth, factors, offset=offset, output_shape=tuple(shape), order=1, mode="nearest"
            )
        )
    return _on_grid(volume, np.stack(channels), factors)


def resample_sharply(volume: Volume, spacing_mm: Sequence[float]) -> Volume:
    """As `resample`, with what the new voxels can hold: what a corpus is resampled with, for good.

    An axis that grows is interpolated by cubic B-splines. One that shrinks goes through a sinc
    under a Kaiser window, five new voxels to each side: waves of 3.4 new voxels and more come
    through within 0.3 %, and of those of 1.4 and less no more than that is left (decision 37).
    Slices that shrink come before their pixels. Codes become float32 ones of the same slope and
    intercept, within the range that they had.

    Raises:
        Reject: it would become larger than any scan is.
    """
    factors = spacing_factors(volume.spacing, spacing_mm)
    if (factors == 1).all():
        return volume
    before = volume.array.shape[1:]
    after = _checked_shape(before, factors)
    ways = [
        None if factor == 1 else _along(old, new, factor)
        for old, new, factor in zip(before, after, factors, strict=True)
    ]
    channels = []
    for channel in volume.array:
        made = channel
        for step in (_across, _within) if factors[0] > 1 else (_within, _across):  # shrink first
            made = step(made, ways)
        channels.append(np.clip(made, channel.min(), channel.max(), out=made))
    # No second copy of a large scan.
    array = channels[0][None] if len(channels) == 1 else np.stack(channels)
    return _on_grid(volume, array, factors)


def _along(before: int, after: int, factor: float) -> sparse.csr_array:
    """Filter and interpolation of one axis as a matrix `[after, before]`; ends go on beyond it."""
    if factor < 1:
        matrix = ndimage.affine_transform(
            np.eye(before),
            (factor, 1.0),
            offset=(factor / 2 - 0.5, 0.0),
            output_shape=(after, before),
            order=3,
            mode="nearest",
        )
        # A B-spline's prefilter reaches on for ever and falls by a factor of 3.7 each voxel.
        matrix[np.abs(matrix) < 1e-6] = 0
    else:
        centres = (np.arange(after) + 0.5) * factor - 0.5
        beyond = math.ceil(_REACH * factor)
        apart = (centres[:, None] - np.arange(-beyond, before + beyond)) / factor
        window = np.i0(_KAISER * np.sqrt(np.maximum(0.0, 1 - (apart / _REACH) ** 2)))
        weights = np.where(np.abs(apart) < _REACH, np.sinc(apart) * window, 0.0)
        matrix = weights[:, beyond:-beyond].copy()
        matrix[:, 0] += weights[:, :beyond].sum(axis=1)
        matrix[:, -1] += weights[:, -beyond:].sum(axis=1)
    matrix /= matrix.sum(axis=1, keepdims=True)
    return sparse.csr_array(matrix.astype(np.float32))


Ways = Sequence[sparse.csr_array | None]


def _across(array: np.ndarray, ways: Ways) -> np.ndarray:
    """The slices of `[D, H, W]` resampled, in columns that the cache holds."""
    if ways[0] is None:
        return array
    made = np.empty((ways[0].shape[0], *array.shape[1:]), dtype=np.float32)
    columns, into = array.reshape(len(array), -1), made.reshape(len(made), -1)
    step = max(64, _PIECE // len(array))
    for first in range(0, columns.shape[1], step):
        piece = np.s_[:, first : first + step]
        into[piece] = ways[0] @ columns[piece].astype(np.float32, copy=False)
    return made


def _within(array: np.ndarray, ways: Ways) -> np.ndarray:
    """Each slice of `[D, H, W]` resampled by itself."""
    _, down, right = ways
    if down is None and right is None:
        return array
    h, w = (
        n if way is None else way.shape[0] for n, way in zip(array.shape[1:], ways[1:], strict=True)
    )
    made = np.empty((len(array), h, w), dtype=np.float32)
    for plane, into in zip(array, made, strict=True):
        plane = plane.astype(np.float32, copy=False)
        plane = plane if down is None else down @ plane
        into[:] = plane if right is None else (right @ plane.T).T
    return made


def _on_grid(volume: Volume, array: np.ndarray, factors: np.ndarray) -> Volume:
    """The volume with resampled values, and where they lie."""
    step = np.eye(4)
    step[:3, :3] = np.diag(factors)
    step[:3, 3] = factors / 2 - 0.5
    native = replace(volume.native, from_stored=volume.native.from_stored @ step)
    return replace(volume, array=array, affine=volume.affine @ step, native=native)


def pad(volume: Volume, multiple: Sequence[int]) -> Volume:
    """Pad at the far ends to multiples of (d, h, w) voxels with the volume's smallest value."""
    far = [-n % m for n, m in zip(volume.array.shape[1:], multiple, strict=True)]
    if not any(far):
        return volume
    d, h, w = volume.array.shape[1:]
    larger = (len(volume.array), d + far[0], h + far[1], w + far[2])
    padded = np.empty(larger, volume.array.dtype)
    for into, channel in zip(padded, volume.array, strict=True):
        into[...] = channel.min()
        into[:d, :h, :w] = channel
    return replace(volume, array=padded)


def _parse(operations: Sequence[Any]) -> list[Reorient | Resample | Intensity | Pad]:
    try:
        return _OPERATIONS.validate_python(list(operations))
    except ValidationError as error:
        problems = []
        for item in error.errors():
            where = ".".join(str(part) for part in item["loc"])
            problems.append(f"preprocess.operations.{where}: {item['msg']}, got {item['input']!r}")
        raise InputError(problems) from error
