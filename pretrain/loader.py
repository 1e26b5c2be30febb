"""Crops from a corpus: workers read and verify, the device does the arithmetic.

A worker returns int16 crops with the few numbers that make them physical; clipping, scaling, flips
and intensity changes happen batched on the device. Where a crop is resampled, turned or zoomed the
worker returns the box that its voxels come from, and the map (`geometry`). Each draw of a crop
(where it lies, its seed) is a function of (seed, epoch, position in the epoch's order, number of
the crop within its sample), never of the worker that makes it. Which crops make a sample, and
where they lie, is what `crops` and `places` say.
"""

from __future__ import annotations

import atexit
import ctypes
import math
import signal
import sys
import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from data_prep.corpus import Corpus
from data_prep.errors import CorruptionError, InputError, UnreachableError, last_error
from data_prep.preprocess import Preprocess
from pretrain.augment import Augment, biased, gained, mirrored, varied
from pretrain.crops import ONE, Crops
from pretrain.geometry import drawn_matrix, grid_of, moved, reach, zoomed
from pretrain.objective import Batch
from pretrain.places import Frame, Size, Voxel, inside
from pretrain.reading import Draw, Scan, read_crop
from pretrain.schedule import Schedule, generator
from pretrain.settings import AugmentSettings

TRIES = 16
"""Volumes that are tried for one sample; so many damaged ones in a row are no accident."""


class CropDataset(Dataset[dict[str, Any]]):
    """Positions of a schedule to raw crops.

    A sample is one volume and gives `crops` of it, each with a place and a seed of its own. Crop
    number c of the sample at position p of the schedule is item `p * crops.total + c`.

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
        skip: let another volume, drawn from the same key, take the place of one that is damaged;
            otherwise reading it is an error.
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
        skip: bool = False,
    ) -> None:
        self.corpus = corpus
        self.samples = np.asarray(samples, dtype=np.int64)
        self.schedule = schedule
        self.preprocess = preprocess
        self._spacing = preprocess.spacing_mm
        self.crop_size = crop_size
        self.label = label
        self.foreground = foreground
        self.classes = classes and sorted([str(v) for v in values] for values in classes)
        self.crops = crops
        self.augment = augment or AugmentSettings()
        self.skip = skip

    @property
    def used(self) -> NDArray[np.int64]:
        """The volumes that come up at all: those that come 0 times in an epoch are left out."""
        times = self.schedule.times
        return self.samples if times is None else self.samples[times > 0]

    def __len__(self) -> int:
        return len(self.schedule) * self.crops.total

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._read(self.draw(index))

    def _read(self, draw: Draw) -> dict[str, Any]:
        return read_crop(self.corpus, draw, self.preprocess, label=self.label)

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        if not self.skip:
            return [self[index] for index in indices]
        of_sample: dict[int, list[int]] = {}
        for index in indices:
            position, number = divmod(index, self.crops.total)
            of_sample.setdefault(position, []).append(number)
        return [crop for item in of_sample.items() for crop in self._undamaged(*item)]

    def _undamaged(self, position: int, numbers: list[int]) -> list[dict[str, Any]]:
        """Crops of a sample, all of one volume: the scheduled one, or the first that is whole."""
        epoch, within, sample = self.schedule.sample(position)
        damage: list[tuple[str, str]] = []
        for attempt in range(TRIES):
            try:
                crops = [self._read(self._drawn(epoch, within, sample, n)) for n in numbers]
            except CorruptionError as error:
                key = self.corpus.keys[int(self.samples[sample])]
                damage += [(key, problem) for problem in error.problems]
                again = generator("instead", self.schedule.seed, epoch, within, attempt)
                order = self.schedule.order(epoch)
                sample = int(order[again.integers(len(order))])
            else:
                if damage:
                    crops[0]["damage"] = damage
                return crops
        raise CorruptionError([problem for _, problem in damage])

    def draw(self, index: int) -> Draw:
        """Where the crop of an index lies and the seed of all else in it; no voxel is read."""
        position, number = divmod(index, self.crops.total)
        return self._drawn(*self.schedule.sample(position), number)

    def _drawn(self, epoch: int, within: int, sample: int, number: int) -> Draw:
        scan, key = self._scan(int(self.samples[sample])), (self.schedule.seed, epoch, within)
        return self._draw(
            scan,
            number,
            self.crops,
            lambda n: self._own(scan, generator("crop", *key, n)),
            partial(generator, "sample", *key),
            self.augment,
        )

    def middle(self, item: int, number: int = 0, crops: Crops = ONE) -> dict[str, Any]:
        """The crop in the middle of a volume's foreground: the same in every run, for pictures.

        With labels, in the middle of what is labelled. Further crops of a sample (`number` 1, ...)
        lie elsewhere in the volume, and those of another layout than independent crops where it
        places them, as the item and the number alone decide.
        """
        scan = self._scan(item)

        def own(n: int) -> tuple[Voxel, int]:
            drawn = self._own(scan, generator("middle", item, n))
            return drawn if n else (self._middle(scan), item)

        shared = partial(generator, "middle", item)
        draw = self._draw(scan, number, crops, own, shared, AugmentSettings())
        return settled(read_crop(self.corpus, draw, self.preprocess, label=self.label))

    def _scan(self, item: int) -> Scan:
        meta = self.corpus.meta(item)
        grid = grid_of(self.corpus.shapes[item][1:], meta["spacing"], self._spacing)
        return Scan(item, meta, grid)

    def _own(self, scan: Scan, rng: np.random.Generator) -> tuple[Voxel, int]:
        """A crop's own voxel of the foreground, on the grid, and its seed."""
        centre = self._around(scan, rng)
        return centre, int(rng.integers(-(2**63), 2**63 - 1))

    def _around(self, scan: Scan, rng: np.random.Generator) -> Voxel:
        """A voxel of the grid that a crop is to lie around."""
        return scan.grid.voxel(self._centre(rng, scan.meta))

    def _middle(self, scan: Scan) -> Voxel:
        """The middle of the foreground, or of what is labelled."""
        centre = np.array(scan.meta["foreground_box"]).sum(1) // 2
        labelled = scan.meta["class_voxels"].values() if self.label else []
        if voxels := [v for found in labelled for v in found]:
            centre = (np.min(voxels, axis=0) + np.max(voxels, axis=0)) // 2
        return scan.grid.voxel(centre)

    def _draw(
        self,
        scan: Scan,
        number: int,
        crops: Crops,
        own: Callable[[int], tuple[Voxel, int]],
        shared: Callable[[], np.random.Generator],
        augment: AugmentSettings,
    ) -> Draw:
        """Places crop `number` of a sample of `crops`.

        Args:
            scan: the volume.
            number: of the crop within the sample.
            crops: the layout.
            own: voxel of the foreground and seed of each crop of the sample.
            shared: a fresh generator of the whole sample.
            augment: how crops are rotated and scaled.
        """
        grid = scan.grid
        centre, seed = own(number)
        around = partial(self._around, scan)
        frame = Frame(grid.shape, grid.spacing, scan.foreground, centre, shared, around)
        place = crops.place(number, self.crop_size, frame)
        size = place.group.size
        posed = place.posed or size
        pose = seed if place.pose is None else own(place.pose)[1]
        turn = drawn_matrix(pose, augment, posed, grid.spacing * place.span / posed)
        matrix = zoomed(turn, place.span, posed, size)
        sides = reach(size, matrix, grid)
        rest = sides - posed
        start: NDArray[Any] = inside(place.centre, sides, place.within)
        # A random scale moves a crop by half a voxel at most; what a layout zooms fills its box.
        start = start + (rest // 2 if (place.span == posed).all() else rest / 2)
        if size != posed:
            start = start + np.subtract(posed, size) / 2
        return Draw(*scan, place.group, start, seed, pose, matrix, place.span / size)

    def pictured(self, count: int, crops: Crops = ONE) -> list[dict[str, Any]]:
        """All crops in the middle of so many volumes; see `varied`.

        Where damaged volumes are skipped, the next takes the place of one.

        Raises:
            CorruptionError: a volume is damaged, or all of them are.
        """
        found: list[list[dict[str, Any]]] = []
        damage: list[str] = []
        for item in self.varied(len(self.used)):
            try:
                found.append([self.middle(item, n, crops) for n in range(crops.total)])
            except CorruptionError as error:
                if not self.skip:
                    raise
                damage += error.problems
            if len(found) == count:
                break
        for problem in damage:
            print(f"WARNING: {problem}; another volume is looked at", file=sys.stderr)
        if not found:
            raise CorruptionError(damage)
        return [crop for each in found for crop in each]

    def varied(self, count: int) -> list[int]:
        """Volumes to look at: one of each modality before any comes twice, the largest first."""
        volume = self.corpus.shapes.prod(axis=1)
        seen: dict[str, int] = {}
        order: list[tuple[int, int]] = []
        for item in sorted(map(int, self.used[:4096]), key=lambda item: (-volume[item], item)):
            modality = str(self.corpus.modalities[item])
            seen[modality] = seen.get(modality, 0) + 1
            order.append((seen[modality], item))
        return [item for _, item in sorted(order)[:count]]

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

    Where a crop is still a box, voxels stay a list too, with the move of each beside it. Most crops
    lie within their scan, so that all of their voxels are valid: of a batch of such there is no
    `valid`, which would be a third of its bytes; `valid_of` makes it where it is needed. For each
    sample whose place another volume took, `damage` lists keys and problems of those that could
    not. Further groups are raw batches of their own in `others`, under their names.
    """
    groups: dict[str, list[dict[str, Any]]] = {}
    for item in items:
        groups.setdefault(item.get("group", ""), []).append(item)
    batch = _stacked(groups.pop(""))
    if groups:
        batch["others"] = {name: _stacked(found) for name, found in groups.items()}
    return batch


def _stacked(items: list[dict[str, Any]]) -> dict[str, Any]:
    moves = [item.get("move") for item in items]
    boxed = ("image", "label") if any(moves) else ()
    batch: dict[str, Any] = {
        name: [item[name] for item in items]
        if name in boxed
        else torch.stack([item[name] for item in items])
        for name in ("image", "label", "value", "window", "spacing", "box")
        if name in items[0]
    }
    if boxed:
        batch["valid"] = [item["valid"] for item in items]
    elif any(item["valid"] is not None for item in items):
        batch["valid"] = torch.stack([valid_of(item) for item in items])
    if boxed:
        batch["move"] = moves
    for name in ("seed", "pose"):
        if any(name in item for item in items):
            own = [item.get(name, item["seed"]) for item in items]
            batch[name] = torch.tensor(own, dtype=torch.int64)
    if "changed" in items[0]:
        batch["changed"] = items[0]["changed"]
    batch["modality"] = [item["modality"] for item in items]
    batch["seeds"] = [item["seed"] for item in items]
    batch["key"] = [item["key"] for item in items]
    damage = [item["damage"] for item in items if "damage" in item]
    if damage:
        batch["damage"] = damage
    return batch


def valid_of(raw: dict[str, Any]) -> Tensor:
    """Which voxels of a raw crop or batch are valid, bool [(B,) 1, D, H, W]."""
    valid: Tensor | None = raw.get("valid")
    if valid is not None:
        return valid
    *lead, _, d, h, w = raw["image"].shape
    return torch.ones(*lead, 1, d, h, w, dtype=torch.bool, device=raw["image"].device)


class _Loader(DataLoader[dict[str, Any]]):
    """Ends its workers where the program ends, whatever still holds on to an iterator.

    At its end Python asks processes to end by SIGTERM and waits for them; workers heed none, and an
    error's traceback often holds the iterator that would end them.
    """

    def __iter__(self) -> Any:
        batches = super().__iter__()
        if not self.num_workers:
            return batches
        _running.add(batches)
        return Batches(batches)


class Batches:
    """What workers deliver; their errors say what is wrong, as if they were this process's own.

    Attributes:
        pids: of the workers.
    """

    def __init__(self, batches: Any) -> None:
        self._batches = batches
        _workers.update(batches._workers)
        self.pids: list[int] = [worker.pid for worker in batches._workers]

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> dict[str, Any]:
        try:
            batch: dict[str, Any] = next(self._batches)
        except InputError as error:  # its text is the worker's traceback
            raise type(error)([last_error(problem) for problem in error.problems]) from None
        except UnreachableError as error:
            raise UnreachableError(last_error(str(error))) from None
        return batch


AHEAD, AHEAD_BYTES = 4, 4 * 2**30
"""Batches ahead of each worker, and what those of all workers of a rank may take: shared memory is
the job's own, eight ranks share a node, and a batch of large crops is hundreds of MB."""

_running: weakref.WeakSet[Any] = weakref.WeakSet()
_workers: weakref.WeakSet[Any] = weakref.WeakSet()


@atexit.register  # after multiprocessing's own, so called before it
def _end_workers() -> None:
    for batches in list(_running):
        batches._shutdown_workers()
    # Of an iterator in a cycle, as an error's traceback makes one, the collector may close the
    # queues before the iterator can tell its workers to end; and they heed no SIGTERM.
    for worker in list(_workers):
        if worker.is_alive():
            worker.kill()


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
    timeout: float = 0,
    start_method: Literal["fork", "spawn", "forkserver"] | None = None,
) -> DataLoader[dict[str, Any]]:
    """Batches of one rank for the optimiser steps [first_step, last_step).

    `batch_size` counts samples: a batch of n holds n times the dataset's `crops`, sample by
    sample, and a sample's key once for each of its crops.

    With `accumulate` micro-batches a step, a step's samples are those of that many consecutive
    global micro-batches of `batch_size / accumulate`. A batch that workers do not deliver within
    `timeout` seconds is an error; 0: they have all the time.
    """
    micro = batch_size // accumulate
    batches = dataset.schedule.batches(
        first_step * accumulate, last_step * accumulate, micro, rank, world, nodes
    )
    return _Loader(
        dataset,
        batch_sampler=_Crops(batches, dataset.crops.total),
        num_workers=workers,
        collate_fn=collate,
        pin_memory=torch.cuda.is_available(),
        multiprocessing_context=start_method if workers else None,
        prefetch_factor=_ahead(dataset, micro // world, workers) if workers else None,
        timeout=timeout if workers else 0,
        worker_init_fn=_begin_worker if workers else None,
    )


def _ahead(dataset: CropDataset, samples: int, workers: int) -> int:
    """Batches that each worker holds ready: four, or as many as all may hold."""
    voxels = sum(
        group.crops * math.prod(group.size) for group in dataset.crops.groups(dataset.crop_size)
    )
    # Voxels as int16, and which of them are valid.
    size = samples * voxels * (2 * int(dataset.corpus.shapes[0, 0]) + 1)
    return max(1, min(AHEAD, AHEAD_BYTES // (workers * size)))


_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of prctl(2)


def _begin_worker(worker: int) -> None:
    """Workers live until the trainer ends them: a scheduler's signal to the whole group is its own.

    A worker that dies of it would end the trainer before it has saved. With the trainer it dies,
    also where it waits for a file system that does not answer.
    """
    for name in ("SIGTERM", "SIGUSR1", "SIGUSR2"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PARENT_DEATH_SIGNAL, signal.SIGKILL)


def to_device(raw: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """A raw batch on a device, where nobody else moves it; what is no tensor stays."""

    def sent(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: sent(one) for name, one in value.items()}
        if type(value) is list:  # a move is a tuple of numbers
            return [sent(one) for one in value]
        return value.to(device) if isinstance(value, Tensor) else value

    return {name: sent(value) for name, value in raw.items()}


def to_batch(raw: dict[str, Any], augment: Augment | None = None) -> Batch:
    """Raw crops to normalised float32, on whatever device they are.

    Resampling, physical value, clip, scale, mirror, intensity, each further group for itself.
    Equal to `Preprocess.apply` on the same voxels when `augment` is None and no crop is turned.
    """
    if "move" in raw:
        raw = _straightened(raw)
    image = normalised(raw["image"], raw["value"], raw["window"])
    valid = valid_of(raw)
    label: Tensor | None = raw["label"].long() if "label" in raw else None
    if augment is not None:
        image, valid, label = mirrored(image, valid, label, raw.get("pose", raw["seed"]), augment)
        change = augment.change
        if raw.get("changed", True):
            if change.bias_field:
                _, _, shift, scale = raw["window"].unbind(-1)
                image = biased(
                    image,
                    -shift * scale,
                    raw["seed"],
                    raw["seeds"],
                    raw["modality"],
                    change.bias_field,
                )
            if change.gain:
                image = gained(image, raw["seed"], change.gain)
            image = varied(image, valid, raw["seed"], raw["seeds"], change)
    others = {name: to_batch(group, augment) for name, group in raw.get("others", {}).items()}
    return Batch(
        image,
        valid,
        raw["spacing"],
        raw["seed"],
        raw["key"],
        label,
        raw.get("box"),
        others,
        raw["modality"],
    )


PIECE = 2**16
"""Voxels of a channel that pass through a CPU's cache at once."""


def normalised(codes: Tensor, value: Tensor, window: Tensor) -> Tensor:
    """Codes to physical values, clipped and scaled, float32 [B, C, D, H, W].

    Args:
        codes: [B, C, D, H, W].
        value: slope and intercept, [B, C, 2].
        window: low, high, shift, scale, [B, C, 4].
    """
    slope, intercept = value[..., None].unbind(2)
    low, high, shift, scale = window[..., None].unbind(2)
    # (clip(slope * code + intercept) - shift) * scale in two operations less on each voxel.
    factor, offset = slope * scale, (intercept - shift) * scale
    low, high = (low - shift) * scale, (high - shift) * scale
    image = torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
    flat = codes.flatten(2)
    # On a CPU each pass over all of it would go to memory and back.
    size = PIECE if codes.device.type == "cpu" else flat.shape[2]
    for made, stored in zip(image.flatten(2).split(size, 2), flat.split(size, 2), strict=True):
        made.copy_(stored)
        made.mul_(factor).add_(offset)
        # Not clamp, which with a bound for each sample is ten times as slow on a CPU.
        torch.maximum(made, low, out=made)
        torch.minimum(made, high, out=made)
    return image


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
        if move is None:
            item["valid"] = valid_of(item)
        else:
            item = settled({**item, "move": move})
        item["image"] = item["image"].float()
        for name in names:
            made[name].append(item[name])
    return {**raw, **{name: torch.stack(voxels) for name, voxels in made.items()}}
