"""Crops from a corpus: workers read and verify, the device does the arithmetic.

A worker returns int16 crops with the few numbers that make them physical; clipping, scaling, flips
and intensity changes happen batched on the device. Where a crop is resampled, turned or zoomed the
worker returns the box that its voxels come from, and the map (`geometry`). Each draw of a crop
(where it lies, its seed) is a function of (seed, epoch, position in the epoch's order, number of
the crop within its sample), never of the worker that makes it.
"""

from __future__ import annotations

import math
import signal
from collections.abc import Collection, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from data_prep.corpus import Corpus
from data_prep.preprocess import Preprocess, intensity_coefficients
from pretrain.augment import Augment, gained, mirrored, varied
from pretrain.crops import ONE, Crops
from pretrain.geometry import Grid, Size, drawn_matrix, grid_of, moved, plan, reach
from pretrain.objective import Batch
from pretrain.schedule import Schedule, generator
from pretrain.settings import AugmentSettings


class Draw(NamedTuple):
    """What an index stands for: a volume, where its crop starts on the grid, a seed, a turn."""

    item: int
    meta: dict[str, Any]
    start: NDArray[np.int64]
    seed: int
    matrix: NDArray[np.float64] | None = None


class CropDataset(Dataset[dict[str, Any]]):
    """Positions of a schedule to raw crops.

    A sample is one volume and gives `crops` of it, each with a place and a seed of its own. Crop
    number c of the sample at position p of the schedule is item `p * crops.main + c`.

    Args:
        corpus: where the volumes are.
        samples: corpus positions that the schedule's sample ids stand for.
        schedule: the order.
        preprocess: whose intensity rule travels with each crop as four numbers per channel. Volumes
            of another spacing than its own are resampled to that.
        crop_size: (D, H, W) in voxels; volumes that are smaller are padded and marked invalid.
        label: read the segmentation too.
        foreground: chance that a labelled crop is centred on a voxel of a random class.
        classes: the label values of each class that counts as foreground; by default every value
            is a class of its own.
        crops: crops of a sample, as its objective declares.
        augment: how crops are rotated and scaled; the rest of it is left to the device.
    """

    def __init__(
        self,
        corpus: Corpus,
        samples: Sequence[int] | NDArray[np.int64],
        schedule: Schedule,
        preprocess: Preprocess,
        crop_size: Size,
        *,
        label: bool = False,
        foreground: float = 0.0,
        classes: Collection[Collection[int]] | None = None,
        crops: Crops = ONE,
        augment: AugmentSettings | None = None,
    ) -> None:
        self.corpus = corpus
        self.samples = np.asarray(samples, dtype=np.int64)
        self.schedule = schedule
        self.preprocess = preprocess
        self.crop_size = crop_size
        self.label = label
        self.foreground = foreground
        self.classes = classes and sorted([str(v) for v in values] for values in classes)
        self.crops = crops
        self.augment = augment or AugmentSettings()

    def __len__(self) -> int:
        return len(self.schedule) * self.crops.main

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._crop(*self.draw(index))

    def draw(self, index: int) -> Draw:
        """Where the crop of an index lies and the seed of all else in it; no voxel is read."""
        position, number = divmod(index, self.crops.main)
        epoch, within, sample = self.schedule.sample(position)
        rng = generator("crop", self.schedule.seed, epoch, within, number)
        item = int(self.samples[sample])
        meta = self.corpus.meta(item)
        centre = self._centre(rng, meta)
        seed = int(rng.integers(-(2**63), 2**63 - 1))
        grid = self._grid(item, meta)
        matrix = drawn_matrix(seed, self.augment, self.crop_size, grid.spacing)
        start = self._inside(grid.voxel(centre), grid, matrix)
        return Draw(item, meta, start, seed, matrix)

    def middle(self, item: int, number: int = 0) -> dict[str, Any]:
        """The crop in the middle of a volume's foreground: the same in every run, for pictures.

        With labels, in the middle of what is labelled. Further crops of a sample (`number` 1, ...)
        lie elsewhere in the volume, as the item and the number alone decide.
        """
        meta = self.corpus.meta(item)
        grid = self._grid(item, meta)
        if number:
            rng = generator("middle", item, number)
            start = self._inside(grid.voxel(self._centre(rng, meta)), grid)
            return settled(self._crop(item, meta, start, int(rng.integers(-(2**63), 2**63 - 1))))
        centre = np.array(meta["foreground_box"]).sum(1) // 2
        voxels = [v for found in meta["class_voxels"].values() for v in found] if self.label else []
        if voxels:
            centre = (np.min(voxels, axis=0) + np.max(voxels, axis=0)) // 2
        return settled(self._crop(item, meta, self._inside(grid.voxel(centre), grid), seed=item))

    def varied(self, count: int) -> list[int]:
        """Volumes to look at: one of each modality before any comes twice, the largest first."""
        volume = self.corpus.shapes.prod(axis=1)
        seen: dict[str, int] = {}
        order: list[tuple[int, int]] = []
        for item in sorted(map(int, self.samples[:4096]), key=lambda item: (-volume[item], item)):
            modality = str(self.corpus.modalities[item])
            seen[modality] = seen.get(modality, 0) + 1
            order.append((seen[modality], item))
        return [item for _, item in sorted(order)[:count]]

    def _grid(self, item: int, meta: dict[str, Any]) -> Grid:
        """The grid that crops of a volume lie on."""
        shape = self.corpus.shapes[item][1:]
        return grid_of(shape, meta["spacing"], self.preprocess.spacing_mm)

    def _crop(
        self,
        item: int,
        meta: dict[str, Any],
        start: NDArray[np.int64],
        seed: int,
        matrix: NDArray[np.float64] | None = None,
    ) -> dict[str, Any]:
        channels = meta["channels"]
        grid = self._grid(item, meta)
        lowest = [_code(c["statistics"]["min"], c) for c in channels]
        still = matrix is None and grid.native
        read = self._read if still else self._read_box
        return {
            "key": str(self.corpus.keys[item]),
            **read(item, start, lowest, matrix, grid),
            "value": torch.tensor([[c["slope"], c["intercept"]] for c in channels]),
            "window": torch.tensor([self._window(c) for c in channels]),
            "spacing": torch.tensor(grid.spacing, dtype=torch.float32),
            "seed": seed,
        }

    def _read(
        self, item: int, start: NDArray[np.int64], lowest: list[int], *_: object
    ) -> dict[str, Any]:
        """The crop itself."""
        shape = np.array(self.corpus.shapes[item][1:])
        crop = np.array(self.crop_size)
        inside = np.maximum(start, 0)
        stop = np.minimum(start + crop, shape)
        size, where = _triple(stop - inside), _triple(inside)
        pad = [(int(a), int(b)) for a, b in zip(inside - start, start + crop - stop, strict=True)]
        image = _padded(self.corpus.read(item, "image", where, size), pad, lowest)
        valid = _padded(np.ones((1, *size), dtype=bool), pad, [0])
        if self.corpus.sample_has(item, "mask"):
            hidden = self.corpus.read(item, "mask", where, size)
            valid &= _padded((hidden == 0)[None], pad, [0])
        out = {"image": torch.from_numpy(image), "valid": torch.from_numpy(valid)}
        if self.label:
            label = self.corpus.read(item, "seg", where, size).astype(np.int32)
            out["label"] = torch.from_numpy(_padded(label[None], pad, [0])[0])
        return out

    def _read_box(
        self,
        item: int,
        start: NDArray[np.int64],
        lowest: list[int],
        matrix: NDArray[np.float64] | None,
        grid: Grid,
    ) -> dict[str, Any]:
        """The box that the crop comes from, without padding, and how it is made of that."""
        shape = np.array(self.corpus.shapes[item][1:])
        first, extent, move = plan(start, self.crop_size, matrix, grid, shape, lowest)
        where, size = _triple(first), _triple(extent)
        out: dict[str, Any] = {
            "move": move,
            "image": torch.from_numpy(self.corpus.read(item, "image", where, size)),
            "valid": None,
        }
        if self.corpus.sample_has(item, "mask"):
            hidden = self.corpus.read(item, "mask", where, size)
            out["valid"] = torch.from_numpy((hidden == 0)[None])
        if self.label:
            label = self.corpus.read(item, "seg", where, size).astype(np.int32)
            out["label"] = torch.from_numpy(label)
        return out

    def _window(self, channel: dict[str, Any]) -> tuple[float, float, float, float]:
        """(low, high, shift, scale) of a channel: the preprocessing's own numbers."""
        rule = self.preprocess.intensity
        if rule is None:
            return -math.inf, math.inf, 0.0, 1.0
        return intensity_coefficients(rule, channel["modality"], channel["statistics"])

    def _centre(self, rng: np.random.Generator, meta: dict[str, Any]) -> NDArray[np.int64]:
        """The voxel of the volume that a crop is to lie around."""
        if self.label and rng.random() < self.foreground:
            voxels = meta["class_voxels"]
            # Of a class that is present, each voxel is as likely as any other: a class of many
            # values is drawn no more often than one of a single value, nor its small parts.
            classes = self.classes or [[value] for value in sorted(voxels)]
            there = [[v for v in values if voxels.get(v)] for values in classes]
            if there := [values for values in there if values]:
                chosen = there[rng.integers(len(there))]
                value = chosen[0]
                if len(chosen) > 1:
                    counts = np.array([meta["class_counts"][v] for v in chosen], dtype=float)
                    value = str(rng.choice(chosen, p=counts / counts.sum()))
                return np.array(voxels[value][rng.integers(len(voxels[value]))])
        # The centre falls into the foreground's box: air at the border teaches nothing.
        low, high = np.array(meta["foreground_box"]).T
        return rng.integers(low, np.maximum(high, low + 1))

    def _inside(
        self, centre: NDArray[np.int64], grid: Grid, matrix: NDArray[np.float64] | None = None
    ) -> NDArray[np.int64]:
        """Where the crop around a voxel starts, moved so that it leaves the volume nowhere.

        Negative where the volume is thinner than the crop. A zoomed crop is one of what it spans.
        """
        span = reach(self.crop_size, matrix, grid)
        start = centre - span // 2
        room = grid.shape - span
        # A gap is shared between both ends, the far end getting the odd voxel, as inference does.
        start = np.where(room >= 0, np.clip(start, 0, np.maximum(room, 0)), -(-room // 2))
        return start + (span - np.array(self.crop_size)) // 2


def _triple(values: NDArray[np.int64]) -> Size:
    d, h, w = (int(n) for n in values)
    return d, h, w


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


class _Crops(Sampler[list[int]]):
    """Positions of a schedule to items of the dataset: all crops of each sample."""

    def __init__(self, batches: list[range], crops: int) -> None:
        self.batches = batches
        self.crops = crops

    def __iter__(self) -> Iterator[list[int]]:
        n = self.crops
        return ([p * n + c for p in batch for c in range(n)] for batch in self.batches)

    def __len__(self) -> int:
        return len(self.batches)


def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
    """Stacks crops into a raw batch; keys stay a list, and seeds are known to the host as well.

    Where a crop is still a box, voxels stay a list too, with the move of each beside it.
    """
    moves = [item.get("move") for item in items]
    boxed = ("image", "valid", "label") if any(moves) else ()
    batch: dict[str, Any] = {
        name: [item[name] for item in items]
        if name in boxed
        else torch.stack([item[name] for item in items])
        for name in items[0]
        if name not in ("key", "seed", "move")
    }
    if boxed:
        batch["move"] = moves
    batch["seed"] = torch.tensor([item["seed"] for item in items], dtype=torch.int64)
    batch["seeds"] = [item["seed"] for item in items]
    batch["key"] = [item["key"] for item in items]
    return batch


def make_loader(
    dataset: CropDataset,
    *,
    batch_size: int,
    first_step: int,
    last_step: int,
    accumulate: int = 1,
    workers: int = 0,
    rank: int = 0,
    world: int = 1,
    nodes: int = 1,
    start_method: Literal["fork", "spawn", "forkserver"] | None = None,
) -> DataLoader[dict[str, Any]]:
    """Batches of one rank for the optimiser steps [first_step, last_step).

    `batch_size` counts samples: a batch of n holds n times the dataset's `crops`, sample by
    sample, and a sample's key once for each of its crops.

    With `accumulate` micro-batches a step, a step's samples are those of that many consecutive
    global micro-batches of `batch_size / accumulate`.
    """
    micro = batch_size // accumulate
    batches = dataset.schedule.batches(
        first_step * accumulate, last_step * accumulate, micro, rank, world, nodes
    )
    return DataLoader(
        dataset,
        batch_sampler=_Crops(batches, dataset.crops.main),
        num_workers=workers,
        collate_fn=collate,
        pin_memory=torch.cuda.is_available(),
        multiprocessing_context=start_method if workers else None,
        prefetch_factor=4 if workers else None,
        worker_init_fn=_leave_signals if workers else None,
    )


def _leave_signals(worker: int) -> None:
    """Workers live until the trainer ends them: a scheduler's signal to the whole group is its own.

    A worker that dies of it would end the trainer before it has saved.
    """
    for name in ("SIGTERM", "SIGUSR1", "SIGUSR2"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)


def to_device(raw: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """A raw batch on a device, where nobody else moves it; what is no tensor stays."""

    def sent(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) else value

    return {
        name: [sent(one) for one in value] if isinstance(value, list) else sent(value)
        for name, value in raw.items()
    }


def to_batch(raw: dict[str, Any], augment: Augment | None = None) -> Batch:
    """Raw crops to normalised float32, on whatever device they are.

    Resampling, physical value, clip, scale, mirror, intensity. Equal to `Preprocess.apply` on the
    same voxels when `augment` is None and no crop is turned.
    """
    if "move" in raw:
        raw = _straightened(raw)
    channel = (slice(None), slice(None), None, None, None)
    slope, intercept = raw["value"].unbind(-1)
    low, high, shift, scale = raw["window"].unbind(-1)
    image = raw["image"].float() * slope[channel] + intercept[channel]
    image = torch.clamp(image, low[channel], high[channel])
    image = (image - shift[channel]) * scale[channel]
    valid: Tensor = raw["valid"]
    label: Tensor | None = raw["label"].long() if "label" in raw else None
    if augment is not None:
        image, valid, label = mirrored(image, valid, label, raw["seed"], augment)
        change = augment.change
        if change.gain:
            image = gained(image, raw["seed"], change.gain)
        image = varied(image, valid, raw["seed"], raw["seeds"], change)
    return Batch(image, valid, raw["spacing"], raw["seed"], raw["key"], label)


def settled(item: dict[str, Any]) -> dict[str, Any]:
    """A crop that is still a box to the crop itself, where it is; any other stays as it is."""
    if "move" not in item:
        return item
    hidden = None if item["valid"] is None else ~item["valid"]
    image, valid, label = moved(item["image"], hidden, item.get("label"), item["move"])
    made = {**item, "image": image, "valid": valid} | ({} if label is None else {"label": label})
    del made["move"]
    return made


def _straightened(raw: dict[str, Any]) -> dict[str, Any]:
    """Boxes and crops to crops: each by itself, since boxes have sizes of their own."""
    names = [name for name in ("image", "valid", "label") if name in raw]
    made: dict[str, list[Tensor]] = {name: [] for name in names}
    for number, move in enumerate(raw["move"]):
        item: dict[str, Any] = {name: raw[name][number] for name in names}
        item = item if move is None else settled({**item, "move": move})
        item["image"] = item["image"].float()
        for name in names:
            made[name].append(item[name])
    return {**raw, **{name: torch.stack(voxels) for name, voxels in made.items()}}
