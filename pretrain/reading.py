"""A crop's voxels out of a corpus: what a worker does once it knows where the crop lies.

It returns stored codes with the few numbers that make them physical. A crop that lies on the
volume's own grid is read as it is; of any other the box that it comes from, and the map (`Move`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from data_prep.corpus import Corpus
from data_prep.preprocess import Preprocess, intensity_coefficients
from pretrain.geometry import Grid, extent, plan
from pretrain.places import Box, Group, Size


class Scan(NamedTuple):
    """A volume that crops are taken from: its number in the corpus, its JSON, its grid."""

    item: int
    meta: dict[str, Any]
    grid: Grid

    @property
    def foreground(self) -> Box:
        """The foreground's box on the grid; one voxel along each axis at least."""
        low, high = np.array(self.meta["foreground_box"]).T
        return Box(self.grid.voxel(low), self.grid.voxel(np.maximum(high - 1, low)) + 1)


class Draw(NamedTuple):
    """What an index stands for: a volume, where its crop lies on the volume's grid, its seeds.

    Attributes:
        item: of the corpus.
        meta: of the volume.
        grid: of the volume.
        group: that the crop belongs to.
        start: where the crop lies before it is turned, and zoomed, about its middle.
        seed: of the crop.
        pose: seed of how it is mirrored and turned; `seed` but where crops are posed alike.
        matrix: grid voxels per crop voxel [3, 3]; None: as many.
        zoom: the part of it that the place asks for [3].
    """

    item: int
    meta: dict[str, Any]
    grid: Grid
    group: Group
    start: NDArray[np.int64] | NDArray[np.float64]
    seed: int
    pose: int
    matrix: NDArray[np.float64] | None
    zoom: NDArray[np.float64]

    @property
    def box(self) -> NDArray[np.float64]:
        """The corners of what it covers on the grid, were it not turned [2, 3]."""
        middle = self.start + np.array(self.group.size) / 2
        half = extent(self.group.size, self.matrix, self.grid) / 2
        return np.stack([middle - half, middle + half])


def read_crop(
    corpus: Corpus, draw: Draw, preprocess: Preprocess, *, label: bool = False
) -> dict[str, Any]:
    """Reads and verifies one crop; see `pretrain.loader.collate` for what becomes of it.

    Args:
        corpus: where the volume is.
        draw: where the crop lies.
        preprocess: whose intensity rule travels with the crop as four numbers per channel.
        label: read the segmentation too.
    """
    channels, grid, group = draw.meta["channels"], draw.grid, draw.group
    lowest = [_code(c["statistics"]["min"], c) for c in channels]
    still = draw.matrix is None and grid.native
    # Of a crop that lies wholly beyond its volume there is nothing to read, but a box beside it.
    beside = (draw.start + group.size <= 0).any() or (draw.start >= grid.shape).any()
    read = _read if still and not beside else _read_box
    crop = {
        "key": str(corpus.keys[draw.item]),
        **read(corpus, draw, lowest, label),
        "value": _tensor([[c["slope"], c["intercept"]] for c in channels]),
        "window": _tensor([_window(c, preprocess) for c in channels]),
        "spacing": _tensor(grid.spacing * draw.zoom),
        "box": _tensor(draw.box),
        "modality": tuple(c["modality"] for c in channels),
        "seed": draw.seed,
    }
    if group.name:
        crop["group"] = group.name
    if draw.pose != draw.seed:
        crop["pose"] = draw.pose
    if not group.changed:
        crop["changed"] = False
    return crop


def _read(corpus: Corpus, draw: Draw, lowest: list[int], label: bool) -> dict[str, Any]:
    """The crop itself."""
    item, start = draw.item, draw.start.astype(np.int64)
    shape = np.array(corpus.shapes[item][1:])
    crop = np.array(draw.group.size)
    inside = np.maximum(start, 0)
    stop = np.minimum(start + crop, shape)
    size, where = _triple(stop - inside), _triple(inside)
    pad = [(int(a), int(b)) for a, b in zip(inside - start, start + crop - stop, strict=True)]
    image = _padded(corpus.read(item, "image", where, size), pad, lowest)
    out: dict[str, Any] = {"image": torch.from_numpy(image), "valid": None}
    if corpus.sample_has(item, "mask"):
        hidden = corpus.read(item, "mask", where, size)
        out["valid"] = torch.from_numpy(_padded((hidden == 0)[None], pad, [0]))
    elif any(a or b for a, b in pad):
        out["valid"] = torch.from_numpy(_padded(np.ones((1, *size), dtype=bool), pad, [0]))
    if label:
        values = _signed(corpus.read(item, "seg", where, size))
        out["label"] = torch.from_numpy(_padded(values[None], pad, [0])[0])
    return out


def _read_box(corpus: Corpus, draw: Draw, lowest: list[int], label: bool) -> dict[str, Any]:
    """The box that the crop comes from, without padding, and how it is made of that."""
    item = draw.item
    shape = np.array(corpus.shapes[item][1:])
    first, sides, move = plan(
        draw.start, draw.group.size, draw.matrix, draw.grid, shape, lowest, draw.zoom
    )
    where, size = _triple(first), _triple(sides)
    out: dict[str, Any] = {
        "move": move,
        "image": torch.from_numpy(corpus.read(item, "image", where, size)),
        "valid": None,
    }
    if corpus.sample_has(item, "mask"):
        hidden = corpus.read(item, "mask", where, size)
        out["valid"] = torch.from_numpy((hidden == 0)[None])
    if label:
        values = _signed(corpus.read(item, "seg", where, size))
        out["label"] = torch.from_numpy(values)
    return out


def _window(channel: dict[str, Any], preprocess: Preprocess) -> tuple[float, float, float, float]:
    """(low, high, shift, scale) of a channel: the preprocessing's own numbers."""
    rule = preprocess.intensity
    if rule is None:
        return -math.inf, math.inf, 0.0, 1.0
    return intensity_coefficients(rule, channel["modality"], channel["statistics"])


def _tensor(values: Any) -> torch.Tensor:
    """float32; several times as fast as torch.tensor of lists."""
    return torch.from_numpy(np.array(values, dtype=np.float32))


def _triple(values: NDArray[np.int64]) -> Size:
    d, h, w = (int(n) for n in values)
    return d, h, w


def _signed(values: NDArray[Any]) -> NDArray[Any]:
    """Label values as what torch can compare: it has no such operations for uint16."""
    return values if values.dtype == np.uint8 else values.astype(np.int32)


def _code(value: float, channel: dict[str, Any]) -> int:
    """The stored int16 that stands for a physical value."""
    code = round((value - channel["intercept"]) / channel["slope"])
    return int(np.clip(code, -32768, 32767))


def _padded(array: NDArray[Any], pad: list[tuple[int, int]], values: Sequence[int]) -> NDArray[Any]:
    """Pads [C, d, h, w] with one value per channel."""
    if not any(a or b for a, b in pad):
        return np.ascontiguousarray(array)
    shape = [n + a + b for n, (a, b) in zip(array.shape[1:], pad, strict=True)]
    out = np.empty((len(array), *shape), dtype=array.dtype)
    out[:] = np.array(values, dtype=array.dtype)[:, None, None, None]
    inner = tuple(slice(a, n - b) for n, (a, b) in zip(shape, pad, strict=True))
    out[(slice(None), *inner)] = array
    return out
