"""Crops per second in one process and thread, beside the loaders of others, in one run.

    python benchmarks/loader.py WORK --scans CT [CT ...] [--size 96] [--output docs/results/loader]

`CT`: real scans that CTs of 512x512x300 are made of (see large_ct.py), four of them; with
--as-they-are the scans themselves. All sides hold the same volumes, draw a volume and a place at
random, and end in a float32 batch of two crops, clipped and scaled as nnU-Net does with CT, with
labels where the name says so, in the whole numbers that they are stored in:

voxelith          CropDataset, collate, to_batch: int16 codes in a tar, each chunk's hash checked
blosc2 as nnssl   one file a volume, float32, ZSTD 8, blocks and chunks by nnssl's rule, mmap
nnU-Net           nnunetv2's dataset and cropping, image alone; float32, LZ4HC 5
nnU-Net loader    nnunetv2's loader as it is, without transforms: image and label
MONAI             LoadImage and RandSpatialCrop from NIfTI; CacheDataset and PersistentDataset
TorchIO           Queue, 8 crops a volume
bare              decompression alone of the blocks that voxelith's crops touch, files open; then
                  with the arithmetic that the others end in as well

`cold` has the pages of the files dropped before; `warm` not. Sides take turns, so that a busy
machine slows all, and each begins with batches that do not count. Writes machine, versions, bytes
on disk and raw seconds as json, and a table.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import re
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import blosc2
import nibabel as nib
import numpy as np
import torch
from large_ct import write
from line import ROOT
from numpy.typing import NDArray
from scipy import ndimage

from data_prep.build import prep
from data_prep.corpus import Corpus
from data_prep.files import write_json, write_text
from data_prep.preprocess import Preprocess
from data_prep.settings import PrepSettings
from data_prep.shards import encode_array
from pretrain.bench import machine
from pretrain.bench_loader import drop_pages
from pretrain.loader import CropDataset, collate, normalised, to_batch
from pretrain.run_folder import versions
from pretrain.schedule import Schedule

BATCH = 2
WARMUP = 6
VOLUMES = 4
WINDOW = (-1000.0, 1000.0)
MEAN, STD = 0.0, 1000.0
SLOW = ("MONAI", "TorchIO")
"""They read whole files, to begin with or for every crop: measured once, by few batches."""

Batch = Callable[[], torch.Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--scans", type=Path, nargs="+", required=True)
    parser.add_argument("--as-they-are", action="store_true")
    parser.add_argument("--size", type=int, nargs="+", default=(96, 160))
    parser.add_argument("--batches", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "results" / "loader")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    blosc2.set_nthreads(1)
    raw = chosen.work / "Dataset001_CT"
    if not raw.exists():
        make_scans(raw, chosen.scans, chosen.as_they_are)
    corpus = make_corpus(raw, chosen.work / "corpus")
    found = {
        "sizes": [
            measure(raw, corpus, chosen.work, size, chosen.batches, chosen.repeats)
            for size in chosen.size
        ],
        "disk": disk(raw, chosen.work),
        "scans": [scan.name for scan in chosen.scans],
        "as_they_are": chosen.as_they_are,
        "batch": BATCH,
        "machine": {**machine(torch.device("cpu")), "load": os.getloadavg()[0]},
        "versions": versions() | peers(),
    }
    chosen.output.mkdir(parents=True, exist_ok=True)
    write_json(chosen.output / "loader.json", found)
    write_text(chosen.output / "loader.md", text(found))
    print(text(found))


def make_scans(raw: Path, scans: Sequence[Path], as_they_are: bool) -> None:
    """A data set of nnU-Net's layout."""
    made = raw.with_name("made")
    for number in range(VOLUMES):
        write(scans[number % len(scans)], made, number, as_they_are)
    for name in ("imagesTr", "labelsTr"):
        (raw / name).mkdir(parents=True, exist_ok=True)
    for number in range(VOLUMES):
        (made / f"{number:03d}.nii.gz").rename(raw / "imagesTr" / f"ct_{number:03d}_0000.nii.gz")
        (made / f"{number:03d}_seg.nii.gz").rename(raw / "labelsTr" / f"ct_{number:03d}.nii.gz")
    made.rmdir()
    told = {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0, "soft": 1, "dense": 2},
        "numTraining": VOLUMES,
        "file_ending": ".nii.gz",
    }
    (raw / "dataset.json").write_text(json.dumps(told))


def make_corpus(raw: Path, folder: Path) -> Corpus:
    if not folder.exists():
        prep(PrepSettings(input=raw, output=folder, processes=1, keys="names"))
    return Corpus.open(folder)


# What each side holds, and how it makes a batch.


class Side:
    """A way to the same crops.

    Attributes:
        make: gives the function that makes the next batch.
        files: that it reads.
    """

    def __init__(self, make: Callable[[], Batch], files: Sequence[Path]) -> None:
        self.make = make
        self.files = files

    @property
    def bytes(self) -> int:
        """On disk."""
        return sum(file.stat().st_size for file in self.files)


def ours(corpus: Corpus, size: int, label: bool) -> Side:
    def make() -> Batch:
        fresh = Corpus.open(corpus.path)
        dataset = crops_of(fresh, size, label)
        at = iter(range(10**9))

        def batch() -> torch.Tensor:
            first = next(at) * BATCH
            raw = collate(dataset.__getitems__(list(range(first, first + BATCH))))
            raw.pop("label", None)  # it stays in the numbers that it came in, as nnU-Net's does
            return to_batch(raw).image

        return batch

    return Side(make, corpus.shard_files())


def crops_of(corpus: Corpus, size: int, label: bool) -> CropDataset:
    preprocess = Preprocess.default()  # of CT the window above, onto [-1, 1]
    more: dict[str, Any] = {"label": True, "foreground": 1 / 3} if label else {}
    return CropDataset(
        corpus,
        range(len(corpus)),
        Schedule(corpus.shards, seed=0),
        preprocess,
        (size,) * 3,
        **more,
    )


def bare(corpus: Corpus, size: int, arithmetic: bool) -> Side:
    """The boxes of `ours` out of frames that stay open."""

    def make() -> Batch:
        fresh = Corpus.open(corpus.path)
        dataset = crops_of(fresh, size, False)
        frames = [
            blosc2.open(
                str(fresh.shard_files()[int(fresh.shards[i])]),
                mode="r",
                offset=int(fresh.column("image_offset")[i]),
                mmap_mode="r",
                dparams=blosc2.DParams(nthreads=1),
            )
            for i in range(len(fresh))
        ]
        draws = iter(map(dataset.draw, range(10**9)))

        def crop() -> NDArray[np.int16]:
            draw = next(draws)
            # As large as a crop that lies in the volume: `ours` pads what is beyond.
            low = np.clip(draw.start, 0, np.array(fresh.shapes[draw.item][1:]) - size)
            box = tuple(slice(int(a), int(a) + size) for a in low)
            return np.asarray(frames[draw.item][(slice(None), *box)])

        value = torch.tensor([1.0, 0.0]).expand(BATCH, 1, 2)
        window = torch.tensor([*WINDOW, MEAN, 1 / STD]).expand(BATCH, 1, 4)

        def batch() -> torch.Tensor:
            codes = torch.from_numpy(np.stack([crop() for _ in range(BATCH)]))
            return normalised(codes, value, window) if arithmetic else codes

        return batch

    return Side(make, corpus.shard_files())


def as_nnunet(file: Path) -> NDArray[np.float32]:
    """[1, z, y, x], as nnU-Net stores a CT."""
    image = np.asarray(nib.load(file).dataobj, dtype=np.float32).transpose(2, 1, 0)
    return ((np.clip(image, *WINDOW) - MEAN) / STD)[None]


def nnssl_blocks(shape: Sequence[int], patch: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The rule of nnssl: blocks for a first-level cache of 32 KiB, chunks for a third's 1.4 MB."""
    block = [2 ** math.ceil(math.log2(patch))] * 3
    while math.prod(block) * 4 > 0.8 * 32 * 1024:
        block[int(np.argmax(block))] //= 2
    chunk = list(block)
    while math.prod(chunk) * 4 < 0.8 * 1_441_792:
        grows = [axis for axis in range(3) if chunk[axis] < min(shape[axis], 1.5 * patch)]
        if not grows:
            break
        axis = min(grows, key=lambda axis: chunk[axis] / block[axis])
        chunk[axis] = min(chunk[axis] + block[axis], shape[axis])
    return (1, *block), (1, *chunk)


def nnssl(raw: Path, folder: Path, size: int) -> Side:
    if not folder.exists():
        folder.mkdir(parents=True)
        for file in sorted((raw / "imagesTr").iterdir()):
            data = as_nnunet(file)
            blocks, chunks = nnssl_blocks(data.shape[1:], size)
            blosc2.asarray(
                data, urlpath=str(folder / f"{file.name[:6]}.b2nd"), chunks=chunks, blocks=blocks,
                cparams={"codec": blosc2.Codec.ZSTD, "clevel": 8, "nthreads": 2},
            )  # fmt: skip
    files = sorted(folder.glob("*.b2nd"))

    def make() -> Batch:
        rng = np.random.default_rng(0)

        def crop() -> torch.Tensor:
            array = blosc2.open(
                str(files[rng.integers(len(files))]), mode="r", mmap_mode="r",
                dparams={"nthreads": 1},
            )  # fmt: skip
            low = [int(rng.integers(n - size + 1)) for n in array.shape[1:]]
            box = tuple(slice(a, a + size) for a in low)
            return torch.from_numpy(array[(slice(None), *box)])

        return lambda: torch.stack([crop() for _ in range(BATCH)])

    return Side(make, files)


def nnunet(raw: Path, folder: Path, size: int) -> dict[str, Side]:
    """As nnunetv2 of PyPI stores and reads it; nothing where it is not installed."""
    try:
        from acvl_utils.cropping_and_padding.bounding_boxes import crop_and_pad_nd
        from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
        from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
        from nnunetv2.training.dataloading.nnunet_dataset import (
            comp_blosc2_params,
            nnUNetDatasetBlosc2,
        )
        from nnunetv2.utilities.label_handling.label_handling import LabelManager
    except ImportError:
        return {}
    told = json.loads((raw / "dataset.json").read_text())["labels"]
    labels = LabelManager(told, None)
    if not folder.exists():
        folder.mkdir(parents=True)
        for file in sorted((raw / "imagesTr").iterdir()):
            data, name = as_nnunet(file), file.name[:6]
            seg = np.asarray(nib.load(raw / "labelsTr" / f"{name}.nii.gz").dataobj)
            seg = seg.transpose(2, 1, 0)[None].astype(np.int16)
            places = DefaultPreprocessor._sample_foreground_locations(seg, [1, 2], verbose=False)
            blocks, chunks = comp_blosc2_params(data.shape, (size,) * 3)
            seg_blocks, seg_chunks = comp_blosc2_params(
                seg.shape, (size,) * 3, bytes_per_pixel=seg.itemsize
            )
            nnUNetDatasetBlosc2.save_case(
                data, seg, {"class_locations": places}, str(folder / name), chunks, blocks,
                seg_chunks, seg_blocks,
            )  # fmt: skip
    images = sorted(f for f in folder.glob("*.b2nd") if not f.name.endswith("_seg.b2nd"))

    def image() -> Batch:
        rng = np.random.default_rng(0)
        dataset = nnUNetDatasetBlosc2(str(folder))
        names = dataset.identifiers

        def crop() -> torch.Tensor:
            data, *_ = dataset.load_case(names[rng.integers(len(names))])
            low = [int(rng.integers(n - size + 1)) for n in data.shape[1:]]
            box = [[a, a + size] for a in low]
            return torch.from_numpy(crop_and_pad_nd(data, box, 0)).float()

        return lambda: torch.stack([crop() for _ in range(BATCH)])

    def whole() -> Batch:
        np.random.seed(0)  # noqa: NPY002 (what that loader draws from)
        patch = (size,) * 3
        loader = nnUNetDataLoader(
            nnUNetDatasetBlosc2(str(folder)), BATCH, patch, patch, labels,
            oversample_foreground_percent=1 / 3, probabilistic_oversampling=True,
        )  # fmt: skip
        return lambda: next(loader)["data"]

    return {
        "nnU-Net, image": Side(image, images),
        "nnU-Net loader, image and label": Side(whole, sorted(folder.iterdir())),
    }


def monai(raw: Path, work: Path, size: int) -> dict[str, Side]:
    from monai import data
    from monai import transforms as T

    files = sorted((raw / "imagesTr").iterdir())
    first = [
        T.LoadImage(image_only=True, ensure_channel_first=True, dtype=np.float32),
        T.ScaleIntensityRange(*WINDOW, *((v - MEAN) / STD for v in WINDOW), clip=True),
    ]
    crop = T.RandSpatialCrop((size,) * 3, random_size=False)

    def over(dataset: Callable[[], Any]) -> Callable[[], Batch]:
        def make() -> Batch:
            held, rng = dataset(), np.random.default_rng(0)
            crop.set_random_state(0)
            return lambda: torch.stack(
                [held[int(rng.integers(len(files)))].as_tensor() for _ in range(BATCH)]
            )

        return make

    names = list(map(str, files))
    both = T.Compose([*first, crop])
    cache = work / "monai"
    sides = {
        "MONAI LoadImage": Side(over(lambda: data.Dataset(names, both)), files),
        "MONAI CacheDataset": Side(
            over(lambda: data.CacheDataset(names, both, progress=False)), files
        ),
    }
    kept = data.PersistentDataset(names, both, cache)
    for number in range(len(names)):
        kept[number]  # what it stores is made once
    stored = sorted(cache.glob("*.pt"))
    sides["MONAI PersistentDataset"] = Side(over(lambda: kept), stored)
    return sides


def torchio(raw: Path, size: int) -> dict[str, Side]:
    try:
        import torchio as tio
    except ImportError:
        return {}
    files = sorted((raw / "imagesTr").iterdir())
    scale = tio.Compose([
        tio.Clamp(*WINDOW),
        tio.Lambda(lambda x: (x.float() - MEAN) / STD),
    ])  # fmt: skip

    def make() -> Batch:
        torch.manual_seed(0)
        subjects = tio.SubjectsDataset(
            [tio.Subject(ct=tio.ScalarImage(file)) for file in files], transform=scale
        )
        queue = tio.Queue(subjects, max_length=16, samples_per_volume=8,
                          sampler=tio.UniformSampler(size), num_workers=0)  # fmt: skip
        batches = iter(tio.SubjectsLoader(queue, batch_size=BATCH, num_workers=0))

        def batch() -> torch.Tensor:
            nonlocal batches
            try:
                return next(batches)["ct"][tio.DATA]
            except StopIteration:
                batches = iter(tio.SubjectsLoader(queue, batch_size=BATCH, num_workers=0))
                return next(batches)["ct"][tio.DATA]

        return batch

    return {"TorchIO Queue": Side(make, files)}


# Disk.


def disk(raw: Path, work: Path) -> dict[str, dict[str, float]]:
    """Bits a voxel of a volume: on its own grid, and resampled, as nnU-Net does with most data.

    What was resampled is no whole number any more; nnU-Net keeps all of its float32, prep rounds it
    to what the scanner gave, 1 HU.
    """
    file = sorted((raw / "imagesTr").iterdir())[0]
    own = np.asarray(nib.load(file).dataobj, dtype=np.float32).transpose(2, 1, 0)
    found = {}
    for name, values in (("own grid", own), ("resampled", ndimage.zoom(own, 1 / 1.2, order=3))):
        frame, table = encode_array(np.rint(values).astype(np.int16)[None])
        found[name] = {"voxelith": 8 * (len(frame) + len(table)) / values.size}
        scaled = ((np.clip(values, *WINDOW) - MEAN) / STD)[None]
        for side, size in nnunet_bytes(scaled, work / "disk").items():
            found[name][side] = 8 * size / values.size
    return found


def nnunet_bytes(data: NDArray[np.float32], folder: Path) -> dict[str, int]:
    """Of an image as nnU-Net stores it; nothing where it is not installed."""
    try:
        from nnunetv2.training.dataloading.nnunet_dataset import (
            comp_blosc2_params,
            nnUNetDatasetBlosc2,
        )
    except ImportError:
        return {}
    folder.mkdir(exist_ok=True)
    blocks, chunks = comp_blosc2_params(data.shape, (96,) * 3)
    seg = np.zeros(data.shape, np.int16)
    nnUNetDatasetBlosc2.save_case(
        data, seg, {}, str(folder / "case"), chunks, blocks, chunks, blocks
    )
    size = (folder / "case.b2nd").stat().st_size
    shutil.rmtree(folder)
    return {"nnU-Net": size}


# Times.


def measure(
    raw: Path, corpus: Corpus, work: Path, size: int, batches: int, repeats: int
) -> dict[str, Any]:
    sides = {
        "voxelith, image": ours(corpus, size, False),
        "blosc2 as nnssl, image": nnssl(raw, work / f"nnssl-{size}", size),
        **nnunet(raw, work / f"nnunet-{size}", size),
        "voxelith, image and label": ours(corpus, size, True),
        "bare decompression": bare(corpus, size, False),
        "bare, and arithmetic": bare(corpus, size, True),
        **monai(raw, work, size),
        **torchio(raw, size),
    }
    seconds: dict[str, dict[str, list[float]]] = {name: {"warm": [], "cold": []} for name in sides}
    storage: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(repeats):
        for name, side in sides.items():
            slow = name.startswith(SLOW)
            if slow and repeat:
                continue
            # A queue of 16 crops is filled twice.
            count = (16 if name.startswith("TorchIO") else 4) if slow else batches
            batch = side.make()
            # What comes first pays for memory and caches that the side before has used otherwise.
            for _ in range(1 if slow else WARMUP):
                made = batch()
            assert made.shape == (BATCH, 1, size, size, size), (name, made.shape)
            kept = torch.int16 if name == "bare decompression" else torch.float32
            assert made.dtype == kept, name
            seconds[name]["warm"].append(timed(batch, count))
            if not slow:
                # Nobody may have them mapped: such pages stay.
                del batch
                gc.collect()
                drop_pages(side.files)
                before, batch = read_bytes(), side.make()
                seconds[name]["cold"].append(timed(batch, count))
                storage[name].append((read_bytes() - before) / (count * BATCH))
            del batch
            gc.collect()
    return {
        "size": size,
        "seconds_per_crop": seconds,
        "cold_storage_bytes_per_crop": storage,
        "stages_ms": stages(corpus, size, batches),
        "bytes": {name: side.bytes for name, side in sides.items()},
        "voxels": int(corpus.shapes.prod(axis=1).sum()),
    }


def read_bytes() -> int:
    """That this process has had read from storage."""
    return int(re.findall(r"^read_bytes: (\d+)", Path("/proc/self/io").read_text(), re.M)[0])


def stages(corpus: Corpus, size: int, batches: int) -> dict[str, float]:
    """Where our time goes, warm: milliseconds a crop of each stage."""
    dataset = crops_of(Corpus.open(corpus.path), size, False)
    spent: dict[str, float] = {}

    def watched(name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **more: Any) -> Any:
            began = time.perf_counter()
            try:
                return work(*args, **more)
            finally:
                spent[name] = spent.get(name, 0) + time.perf_counter() - began

        return run

    reading = watched("reading", dataset.__getitems__)
    stacking, arithmetic = watched("stacking", collate), watched("arithmetic", to_batch)
    hashing = patch.object(Corpus, "_verify", watched("hashes", Corpus._verify))
    boxes = watched("decompression", blosc2.NDArray.__getitem__)
    with hashing, patch.object(blosc2.NDArray, "__getitem__", boxes):
        for number in range(WARMUP + batches):
            if number == WARMUP:
                spent.clear()
            arithmetic(stacking(reading(list(range(number * BATCH, (number + 1) * BATCH)))))
    spent["places, index, padding"] = (
        spent.pop("reading") - spent["hashes"] - spent["decompression"]
    )
    return {name: 1e3 * value / (batches * BATCH) for name, value in spent.items()}


def timed(batch: Batch, count: int) -> float:
    """Seconds per crop."""
    began = time.perf_counter()
    for _ in range(count):
        batch()
    return (time.perf_counter() - began) / (count * BATCH)


def peers() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("nnunetv2", "monai", "torchio"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed: left out"
    return found


def text(found: dict[str, Any]) -> str:
    lines = [
        "# Crops per second in one process and thread",
        "",
        ("Real CTs" if found["as_they_are"] else "CT of 512x512x300 made of real ones")
        + f" ({', '.join(found['scans'])}); batches of two crops, float32, clipped and scaled. "
        "Median of the repeats (lowest to highest). Times over voxelith's: more than 1 is slower. "
        "MB read: from storage, a crop.",
        "",
        f"{found['machine']['processor']}, {found['machine']['cores']} cores, load "
        f"{found['machine']['load']:.1f}; "
        + ", ".join(f"{name} {number}" for name, number in found["versions"].items()),
    ]
    for one in found["sizes"]:
        lines += [
            "",
            f"## {one['size']}^3",
            "",
            "| side | crops/s, warm | time / ours | crops/s, cold | time / ours | MB read, cold | "
            "bits per voxel |",
            "|---|---|---|---|---|---|---|",
        ]
        median = {
            (name, state): statistics.median(values)
            for name, states in one["seconds_per_crop"].items()
            for state, values in states.items()
            if values
        }
        for name, states in one["seconds_per_crop"].items():
            mine = "voxelith, image" + (" and label" if "label" in name else "")
            cells = []
            for state, values in states.items():
                if values:
                    rates = sorted(1 / value for value in values)
                    ratio = median[name, state] / median[mine, state]
                    cells += [
                        f"{1 / median[name, state]:.1f} ({rates[0]:.1f} to {rates[-1]:.1f})",
                        f"{ratio:.2f}",
                    ]
                else:
                    cells += ["", ""]
            bits = 8 * one["bytes"][name] / one["voxels"]
            read = one["cold_storage_bytes_per_crop"][name]
            cells.append(f"{statistics.median(read) / 1e6:.2f}" if read else "")
            lines.append(f"| {name} | {' | '.join(cells)} | {bits:.2f} |")
    lines += ["", "## Where our time goes", "", "Milliseconds a crop, image, warm.", ""]
    names = list(found["sizes"][0]["stages_ms"])
    lines += [f"| | {' | '.join(names)} |", "|---|" + "---|" * len(names)]
    for one in found["sizes"]:
        cells = [f"{one['stages_ms'][name]:.2f}" for name in names]
        lines.append(f"| {one['size']}^3 | {' | '.join(cells)} |")
    lines += ["", "## Bits a voxel of a volume", "", "| | " + " | ".join(found["disk"]) + " |"]
    lines.append("|---|" + "---|" * len(found["disk"]))
    for side in next(iter(found["disk"].values())):
        bits = [f"{one[side]:.2f}" for one in found["disk"].values()]
        lines.append(f"| {side} | {' | '.join(bits)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
