"""Middle slices of scans, to be looked at: copies beside what they are copies of."""

from __future__ import annotations

import io
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
from numpy.typing import NDArray

from data_prep.corpus import Corpus
from data_prep.errors import CorruptionError
from data_prep.exclusions import Exclusions
from data_prep.files import write_bytes
from data_prep.plan import Plan
from data_prep.scan import ScanJob, Scanned, read_case
from data_prep.shards import array_suffix
from data_prep.work import WorkFolder

MOST_PAIRS = 24
Picture = NDArray[np.float32]


def middle_slice(corpus: Corpus, i: int) -> Picture:
    """The axial slice in the middle of a sample's foreground, 0 to 1 between robust percentiles."""
    meta = corpus.meta(i)
    d = sum(meta["foreground_box"][0]) // 2
    _, _, h, w = (int(n) for n in corpus.shapes[i])
    codes = corpus.read(i, "image", (d, 0, 0), (1, h, w))
    return _shown(codes[0, 0], meta)


@dataclass(frozen=True)
class Copy:
    """A scan that is left out, and the sample of a corpus that it is a copy of."""

    sample: Scanned
    corpus: Corpus
    stays: str
    share: float


def copies_of(
    exclusions: Exclusions, jobs: Sequence[ScanJob], plan: Plan, work: WorkFolder
) -> list[Copy]:
    """Copies that a prep has left out, as many as are drawn: of its own samples, then of others."""
    own = Corpus.open(work.corpus)
    found = []
    for number, stays, share in plan.pairs[:MOST_PAIRS]:
        one, other = read_case(work, number), read_case(work, stays)
        if isinstance(one, Scanned) and isinstance(other, Scanned):
            found.append(Copy(one, own, other.key, share))
    excluded = {row.name for row in plan.left_out if row.code == "excluded"}
    for job in jobs:
        if len(found) == MOST_PAIRS or job.case.name not in excluded:
            continue
        one = read_case(work, job.number)
        near = exclusions.copy_of(one) if isinstance(one, Scanned) else None
        if isinstance(one, Scanned) and near is not None:
            path, key, share = near
            found.append(Copy(one, Corpus.open(path), key, share))
    return found


def draw_copies(copies: Sequence[Copy], work: WorkFolder, folder: Path) -> None:
    """Makes a folder of pictures: copies (left) and what stays (right).

    Each pair has its own, named by number, key of what stays and subject of the copy, so that the
    pictures of a subject can go.

    Args:
        copies: what is drawn.
        work: has the voxels of what is left out.
        folder: what is in it goes first.
    """
    shutil.rmtree(folder, ignore_errors=True)
    for n, copy in enumerate(copies):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            stays = middle_slice(copy.corpus, copy.corpus.position(copy.stays))
        except CorruptionError:  # of a corpus elsewhere, which need not be whole for this
            continue
        picture = _side_by_side(
            (_left_out(copy.sample, work), f"left out, {copy.share:.0%} of features"),
            (stays, copy.stays),
        )
        name = f"{n:02}.{copy.stays}.{copy.sample.meta['subject']}.png"
        write_bytes(folder / name, picture, mode=0o600)


def pictured(picture: Path) -> tuple[str, str]:
    """Whom a picture of `draw_copies` shows: key of what stays, subject of the copy."""
    _, stays, subject, _ = picture.name.split(".")
    return stays, subject


def _side_by_side(*shown: tuple[Picture, str]) -> bytes:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 2.6), layout="constrained")
    for axis, (picture, title) in zip(figure.subplots(1, len(shown)), shown, strict=True):
        axis.imshow(picture, cmap="gray", vmin=0, vmax=1)
        axis.set_title(title, fontsize=9)
        axis.set_axis_off()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=90)
    return buffer.getvalue()


def _left_out(sample: Scanned, work: WorkFolder) -> Picture:
    before = 0
    for suffix in sample.suffixes:
        if suffix == array_suffix("image"):
            break
        before += sample.sizes[suffix]
    with work.payloads(sample.number).open("rb") as file:
        file.seek(before)
        stored = blosc2.ndarray_from_cframe(file.read(sample.sizes[array_suffix("image")]))
    d = sum(sample.meta["foreground_box"][0]) // 2
    return _shown(np.asarray(stored[0:1, d : d + 1])[0, 0], sample.meta)


def _shown(codes: NDArray[np.int16], meta: dict[str, Any]) -> Picture:
    channel = meta["channels"][0]
    values = codes.astype(np.float32) * channel["slope"] + channel["intercept"]
    low, high = channel["statistics"]["p0_5"], channel["statistics"]["p99_5"]
    shown: Picture = np.clip((values - low) / max(high - low, 1e-6), 0, 1)
    return shown
