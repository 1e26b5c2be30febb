"""Middle slices of scans, to be looked at: copies beside what they are copies of."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import blosc2
import numpy as np
from numpy.typing import NDArray

from data_prep.corpus import Corpus
from data_prep.scan import Scanned
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


def draw_pairs(
    pairs: Sequence[tuple[int, int, float]],
    samples: Sequence[Scanned],
    work: WorkFolder,
    corpus: Corpus,
) -> bytes:
    """A PNG of copies (left) and of what stays (right).

    Args:
        pairs: numbers of both cases, and their similarity.
        samples: the cases that were scanned, by number.
        work: has the voxels of what is left out.
        corpus: has those of what stays.
    """
    from matplotlib.figure import Figure

    by_number = {sample.number: sample for sample in samples}
    shown = pairs[:MOST_PAIRS]
    figure = Figure(figsize=(7.2, 2.6 * len(shown)), layout="constrained")
    axes = figure.subplots(len(shown), 2, squeeze=False)
    for row, (number, stays, share) in zip(axes, shown, strict=True):
        key = by_number[stays].key
        row[0].imshow(_left_out(by_number[number], work), cmap="gray", vmin=0, vmax=1)
        row[1].imshow(middle_slice(corpus, corpus.position(key)), cmap="gray", vmin=0, vmax=1)
        row[0].set_title(f"left out, {share:.0%} of features", fontsize=9)
        row[1].set_title(key, fontsize=9)
    for axis in axes.flat:
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
