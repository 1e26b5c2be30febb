"""One input file at a time: judge it, encode it, measure it. Pure, so any process can do it.

The encoded payloads of a good scan go to the work folder, and what later steps need to know of
them into a note beside them.
"""

from __future__ import annotations

import base64
import errno
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from data_prep.deface import defaced
from data_prep.files import atomic, write_bytes
from data_prep.fingerprint import fingerprint
from data_prep.images import Reject, of_the_system
from data_prep.intensity import (
    INT16,
    channel_statistics,
    encode,
    equal_neighbours,
    histogram,
)
from data_prep.layouts.case import Case, LeftOut
from data_prep.preprocess import as_physical, resample, resample_sharply
from data_prep.settings import MINIMUM_SLICES
from data_prep.shards import PAYLOADS, array_suffix, canonical_json, encode_array, table_suffix
from data_prep.sketch import Sketch, sketch
from data_prep.volume import CT_PADDING_HU, Statistics, Volume, read_channels, read_label
from data_prep.work import WorkFolder

FORMAT = 1
# A picture with fewer distinct values is a label map or a mask that goes by another name. So is one
# with not many more of which neighbours are mostly equal: 0.75 of those in a map of 150 parts of
# the brain at 1 mm, at most 0.25 of those in scans.
MINIMUM_VALUES = 8
LABEL_VALUES = 1024
LABEL_EQUAL = 0.65
# Voxels kept per class for drawing crops around it; more would only repeat each other.
CLASS_VOXELS = 64
# The body on CT, and the share of the robust range that counts as signal on MR.
BODY_HU = -500.0
SIGNAL_SHARE = 0.05
# A slab belongs to the foreground box if this share of it is foreground: noise alone is less.
SLAB_SHARE = 0.001
# Of one voxel, and of the whole volume along an axis: from small animals to whole bodies.
SPACING_MM = (0.02, 50.0)
EXTENT_MM = (1.0, 3000.0)
# Of CT without its padding: values above are those of metal alone, and fat is below 0 HU in all
# that has bone. A share of the voxels may be anything.
METAL_HU = 5000.0
BONE_HU = 500.0
FEW = 1e-3


Overlap = Literal["refuse", "last", "bits"]


@dataclass(frozen=True)
class ScanJob:
    """One case and what scanning needs to know.

    `values` are the permitted label values; `organs` the value of each structure that has a mask
    of its own, and `overlap` what becomes of voxels in two of them.
    """

    number: int
    case: Case
    key: str
    subject: str
    work: WorkFolder
    modality: str | None
    labelled: bool
    values: frozenset[int] | None = None
    organs: tuple[tuple[str, int], ...] = ()
    overlap: Overlap = "refuse"
    minimum: int = MINIMUM_SLICES
    spacing: tuple[float, float, float] | None = None
    upright: bool = False
    deface: str | None = None
    crop: bool = False
    empty_labels: bool = False

    @property
    def guessed(self) -> bool:
        """Whether nothing but its values says of which modality it is."""
        return self.modality is None and self.case.series is None


@dataclass(frozen=True)
class Scanned:
    """A scan that can become a sample: its KEY.json so far, and the sizes of its payloads."""

    number: int
    key: str
    meta: dict[str, Any]
    sizes: dict[str, int] = field(default_factory=dict)
    guessed: bool = False
    sketch: str = ""

    @property
    def look(self) -> Sketch:
        """Of the whole scan, for finding it again."""
        return Sketch.from_bytes(base64.b64decode(self.sketch))

    @property
    def suffixes(self) -> list[str]:
        """Of its members, in the order in which they lie in the work folder and in the shard."""
        return [
            suffix
            for payload in PAYLOADS
            for suffix in (table_suffix(payload), array_suffix(payload))
            if suffix in self.sizes
        ]


class UnreadError(Exception):
    """The system, and not the file, is why a case cannot be read: nothing can be said of it.

    The message has no names; `detail` has the file's.
    """

    def __init__(self, message: str, detail: str) -> None:
        self.detail = detail
        super().__init__(message)


def scan_case(job: ScanJob) -> tuple[str, str] | None:
    """Scans a case and notes what came of it; with that it is done.

    If the system kept it from being read it is not, and what it said is returned, with a detail
    that names the file.
    """
    begun = job.work.begun_note(job.number)
    begun.touch()
    try:
        note_case(job, scan(job))
    except UnreadError as error:
        return str(error), error.detail
    finally:  # only a process that dies leaves it
        begun.unlink(missing_ok=True)
    return None


def note_case(job: ScanJob, found: Scanned | LeftOut) -> None:
    """Notes what came of a case."""
    write_bytes(job.work.case_note(job.number), canonical_json(asdict(found)), mode=0o600)


def read_case(work: WorkFolder, number: int) -> Scanned | LeftOut:
    """What came of a case that is done."""
    note = json.loads(work.case_note(number).read_bytes())
    return LeftOut(**note) if "code" in note else Scanned(**note)


def scan(job: ScanJob) -> Scanned | LeftOut:
    """Judge and encode one case; whatever fails is a reason to leave it out, but for writing.

    Raises:
        UnreadError: it cannot be read now.
    """
    try:
        meta, payloads, look = _judged(job)
    except UnreadError:
        raise
    except Reject as error:
        return LeftOut(job.case.name, error.code, error.detail)
    except MemoryError:
        return LeftOut(job.case.name, "too_large", "there is not the memory that it needs")
    except Exception as error:  # one scan must not stop the others
        return LeftOut(job.case.name, "crashed", f"{type(error).__name__}: {error}")
    sizes = {}
    with atomic(job.work.payloads(job.number), mode=0o600) as file:
        for name in (name for name in PAYLOADS if name in payloads):
            frame, table = encode_array(payloads[name])
            for suffix, data in ((table_suffix(name), table), (array_suffix(name), frame)):
                sizes[suffix] = file.write(data)
    return Scanned(
        job.number,
        job.key,
        meta,
        sizes,
        guessed=job.guessed,
        sketch=base64.b64encode(look).decode(),
    )


def _judged(job: ScanJob) -> tuple[dict[str, Any], dict[str, np.ndarray], bytes]:
    """Of a case KEY.json, payloads and sketch; Reject says why it cannot be used."""
    try:
        volume, label, mask = _read(job)
    except Exception as error:
        system = of_the_system(error)
        if system and system.errno == errno.ENOMEM:  # of a file that is mapped: no other day helps
            raise MemoryError from error
        if system:
            raise UnreadError(system.strerror or "system error", str(system)) from error
        raise
    check_plausible(volume)
    if job.deface is not None:
        volume, mask = defaced(volume, mask, job.deface)
    coded = encode(volume)
    counts = [histogram(channel) for channel in coded.array]
    check_values(coded, counts)
    statistics = [
        channel_statistics(coded.array[c], coded.slope[c], coded.intercept[c], counts[c])
        for c in range(len(counts))
    ]
    found = fingerprint(coded.array, coded.slope, counts)
    look = sketch(coded).to_bytes()
    alone = [
        {"fingerprint": fingerprint(coded.array[c, None], [coded.slope[c]], [counts[c]])}
        # One of several channels may be a scan of its own elsewhere.
        if len(coded.array) > 1
        else {}
        for c in range(len(coded.array))
    ]
    if job.spacing is not None:
        if mask is not None:
            # A new voxel that any masked one reaches is masked: nothing anonymised slips through.
            hidden = replace(
                as_physical(coded),
                array=np.repeat(mask[None].astype(np.float32), len(coded.array), axis=0),
            )
            mask = (resample(hidden, job.spacing).array[0] > 0).astype(np.uint8)
        coded = encode(resample_sharply(coded, job.spacing))
    box = foreground_box(coded, statistics)
    if job.crop:
        coded, label, mask, box = _cropped(coded, label, mask, box)
    meta = {
        "format": FORMAT,
        "key": job.key,
        "subject": job.subject,
        "sequence": job.case.sequence,
        "group": dict(job.case.group),
        "source": job.case.source,
        "licence": job.case.licence,
        "shape": list(coded.array.shape),
        "spacing": list(coded.spacing),
        "affine": coded.affine.tolist(),
        "native": coded.native.to_dict(),
        "channels": [
            {
                "name": coded.names[c],
                "modality": coded.modality[c],
                "slope": coded.slope[c],
                "intercept": coded.intercept[c],
                "statistics": statistics[c],
                **alone[c],
            }
            for c in range(len(coded.array))
        ],
        "foreground_box": box,
        "fingerprint": found,
    }
    if job.guessed:
        meta["modality_guessed"] = True
    payloads = {"image": coded.array}
    if label is not None:
        payloads["seg"] = label
        meta["class_voxels"], meta["class_counts"] = class_voxels(label)
    if mask is not None:
        payloads["mask"] = mask
    meta["payloads"] = {name: str(array.dtype) for name, array in payloads.items()}
    if label is not None:
        meta["seg_encoding"] = "bits" if job.case.organs and job.overlap == "bits" else "values"
        if job.case.organs:
            # A structure without a mask was not looked for: it is not absent.
            have = {name for name, _ in job.case.organs}
            meta["annotated"] = [value for name, value in job.organs if name in have]
    return meta, payloads, look


def check_plausible(volume: Volume) -> None:
    """Refuses what a header or unit must have got wrong.

    Raises:
        Reject: spacing or extent is that of no scan.
    """
    spacing = volume.spacing
    # A single slice is as thick as it is.
    extent = [n * s for n, s in zip(volume.array.shape[1:], spacing, strict=True) if n > 1]
    if wrong := _outside(spacing, SPACING_MM):
        raise Reject("implausible_spacing", wrong)
    if wrong := _outside(extent, EXTENT_MM):
        raise Reject("implausible_extent", wrong)


def check_values(coded: Volume, counts: Sequence[np.ndarray]) -> None:
    """Refuses label maps that go by another name, and what is said to be CT and is not in HU.

    Args:
        coded: The scan as int16 codes.
        counts: The `histogram` of each channel.

    Raises:
        Reject: values are those of no scan.
    """
    for channel, found, modality in zip(coded.array, counts, coded.modality, strict=True):
        values = int(np.count_nonzero(found))
        if values < MINIMUM_VALUES:
            raise Reject("looks_like_a_label", f"it holds only {values} values")
        if values <= LABEL_VALUES and (equal := equal_neighbours(channel, found)) > LABEL_EQUAL:
            raise Reject(
                "looks_like_a_label",
                f"it holds {values} values, and {equal:.0%} of what lies side by side is equal",
            )
        if modality == "CT" and (wrong := _wrong_units(found)):
            raise Reject(
                "implausible_values",
                f"{wrong} and are said to be CT; fat is at -100 HU and the body above "
                f"{BODY_HU:g}: another window or intercept, or modality=MR",
            )


def _wrong_units(counts: np.ndarray) -> str:
    """Why values are no HU, from the histogram of CT; empty if they may be."""
    hu = np.arange(INT16.min, INT16.max + 1)
    low, high = hu[counts > 0][[0, -1]]
    if low >= 0 or high <= BODY_HU:
        return f"values go from {low} to {high}"
    seen = np.where(hu > CT_PADDING_HU, counts, 0)  # without what is padding, or air
    below = np.cumsum(seen) / seen.sum()
    top = int(hu[np.searchsorted(below, 0.995)])
    if top > METAL_HU:
        return f"values of one voxel in 200 are {top} and more"
    if below[hu == -1] < FEW and top > BONE_HU:
        return f"values are hardly ever below 0 but for padding, and go to {top}"
    return ""


def _outside(values: Sequence[float], limits: tuple[float, float]) -> str:
    """What is wrong with millimetres along (d, h, w); empty if nothing is."""
    low, high = limits
    if all(low <= value <= high for value in values):
        return ""
    shown = " x ".join(f"{value:.4g}" for value in values)
    return f"{shown} mm (d, h, w), not within {low:g} to {high:g}"


def _cropped(
    volume: Volume, label: np.ndarray | None, mask: np.ndarray | None, box: list[list[int]]
) -> tuple[Volume, np.ndarray | None, np.ndarray | None, list[list[int]]]:
    """All of a case within the foreground box, grown by what is labelled; the box counts anew."""
    ends = np.array(box)
    for axis, others in enumerate(((1, 2), (0, 2), (0, 1))):
        if label is not None and label.any():
            slabs = np.flatnonzero(label.any(axis=others))
            ends[axis] = min(ends[axis, 0], slabs[0]), max(ends[axis, 1], slabs[-1] + 1)
    inside = tuple(slice(int(low), int(high)) for low, high in ends)
    step = np.eye(4)
    step[:3, 3] = ends[:, 0]
    array = np.ascontiguousarray(volume.array[:, *inside])
    d, h, w = array.shape[1:]
    native = replace(volume.native, from_stored=volume.native.from_stored @ step, cropped=(d, h, w))
    return (
        replace(volume, array=array, affine=volume.affine @ step, native=native),
        None if label is None else np.ascontiguousarray(label[inside]),
        None if mask is None else np.ascontiguousarray(mask[inside]),
        (np.array(box) - ends[:, :1]).tolist(),
    )


def foreground_box(volume: Volume, statistics: list[Statistics]) -> list[list[int]]:
    """[[d0, d1], [h0, h1], [w0, w1]], half-open: where the body or any signal is.

    Foreground is above -500 HU on CT, and on MR above the 0.5 % percentile by 5 % of the range up
    to the 99.5 % percentile. The whole volume if that finds nothing.
    """
    found = np.zeros(volume.array.shape[1:], dtype=bool)
    for c, modality in enumerate(volume.modality):
        low, high = statistics[c]["p0_5"], statistics[c]["p99_5"]
        threshold = BODY_HU if modality == "CT" else low + SIGNAL_SHARE * (high - low)
        # Compare codes, which needs no float copy of the volume.
        code = (threshold - volume.intercept[c]) / volume.slope[c]
        found |= volume.array[c] > code if volume.slope[c] > 0 else volume.array[c] < code
    box: list[list[int]] = []
    for axis in range(3):
        others = tuple(a for a in range(3) if a != axis)
        slabs = np.flatnonzero(found.mean(axis=others) >= SLAB_SHARE)
        box.append([int(slabs[0]), int(slabs[-1]) + 1] if len(slabs) else [0, found.shape[axis]])
    return box


def class_voxels(label: np.ndarray) -> tuple[dict[str, list[list[int]]], dict[str, int]]:
    """Up to 64 evenly chosen voxels [d, h, w] per class, and the count of all; no background."""
    counts = np.zeros(65536, dtype=np.int64)
    for slab in label:
        counts += np.bincount(slab.ravel(), minlength=65536)
    counts[0] = 0
    classes = np.flatnonzero(counts)
    wanted = {
        int(value): np.linspace(0, n - 1, min(CLASS_VOXELS, n)).round().astype(np.int64)
        for value, n in zip(classes, counts[classes], strict=True)
    }
    voxels: dict[str, list[list[int]]] = {str(value): [] for value in wanted}
    seen = np.zeros(65536, dtype=np.int64)
    for d, slab in enumerate(label):
        flat = slab.ravel()
        order = np.argsort(flat, kind="stable")
        present, first = np.unique(flat[order], return_index=True)
        for value, group in zip(present, np.split(order, first[1:]), strict=True):
            if value == 0:
                continue
            ranks = wanted[int(value)] - seen[value]
            seen[value] += len(group)
            for place in group[ranks[(ranks >= 0) & (ranks < len(group))]]:
                h, w = divmod(int(place), slab.shape[1])
                voxels[str(value)].append([d, h, w])
    return voxels, {str(value): int(counts[value]) for value in classes}


def _read(job: ScanJob) -> tuple[Volume, np.ndarray | None, np.ndarray | None]:
    """Image, label and mask of a case on canonical axes; Reject says why it cannot be used."""
    case = job.case
    for path in case.files:
        if not path.is_file():
            raise Reject("missing_file", f"{path.name} does not exist")
        if case.series is None:  # libraries make of what may be wrong here that it is no image
            path.open("rb").close()
    if job.labelled and not case.label_files:
        raise Reject("label_missing", "the corpus is labelled and this image has no label")
    try:
        images = (case.series,) if case.series else case.images
        volume = read_channels(
            images, job.modality, case.channels, job.minimum, case.frame, job.upright
        )
    except (Reject, MemoryError):
        raise
    except Exception as error:
        # Headers in the wild break nibabel in many ways; one scan must not stop the others.
        raise Reject("unreadable", f"{type(error).__name__}: {error}") from error
    label = mask = None
    problems: list[Reject] = []
    try:
        if job.labelled:
            label = _label(job, volume)
            if not (job.empty_labels or label.any()):
                raise Reject(
                    "empty_label", "it marks no voxel (empty_labels=keep takes it as a negative)"
                )
    except Reject as error:
        problems.append(error)
    try:
        if case.mask is not None:
            marked = _on_grid_of(volume, case.mask, "mask", upright=job.upright)
            mask = (marked != 0).astype(np.uint8)
    except Reject as error:
        problems.append(error)
    if problems:
        said = "; ".join(error.detail for error in problems)
        raise Reject(problems[0].code, said) from problems[0]
    return volume, label, mask


def _label(job: ScanJob, volume: Volume) -> np.ndarray:
    """The label map of a case, or the one that its masks make."""
    if job.case.label is not None:
        return _on_grid_of(volume, job.case.label, "label", job.values)
    values = dict(job.organs)
    merged = np.zeros(volume.array.shape[1:], dtype=np.uint16)
    problems: list[Reject] = []
    shared: list[str] = []
    for name, path in sorted(job.case.organs, key=lambda organ: values[organ[0]]):
        try:
            inside = _on_grid_of(volume, path, "label") != 0
        except Reject as error:
            problems.append(Reject(error.code, f"{name}: {error.detail}"))
            continue
        if job.overlap == "bits":
            merged[inside] |= values[name]
            continue
        taken = np.unique(merged[inside])
        if job.overlap == "refuse" and taken.any():
            others = [other for other, value in job.organs if value in taken[taken > 0]]
            count = int(np.count_nonzero(merged[inside]))
            shared.append(f"{name} shares {count} voxels with {', '.join(others[:3])}")
        merged[inside] = values[name]
    if shared:
        ways = "overlap=last gives them to the later one, overlap=bits keeps both"
        problems.append(Reject("label_overlap", f"{'; '.join(shared[:5])} ({ways})"))
    if problems:
        said = "; ".join(error.detail for error in problems)
        raise Reject(problems[0].code, said) from problems[0]
    return merged if merged.max() > 255 else merged.astype(np.uint8)


def _on_grid_of(
    volume: Volume,
    path: Path,
    what: str,
    permitted: frozenset[int] | None = None,
    upright: bool = False,
) -> np.ndarray:
    try:
        return read_label(path, volume, permitted, upright)
    except Reject as error:
        if error.code.startswith("label_"):
            raise Reject(error.code.replace("label", what, 1), error.detail) from error
        raise Reject(f"{what}_unreadable", f"{error.code}: {error.detail}") from error
    except MemoryError:
        raise
    except Exception as error:
        raise Reject(f"{what}_unreadable", f"{type(error).__name__}: {error}") from error
