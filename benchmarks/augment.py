"""A batch through the device's augmentation, beside MONAI's transforms of the same kind.

    python benchmarks/augment.py [--size 96 96 96] [--batch 4] [--output augment.json]

Both sides turn, zoom and change the same volume with nnU-Net's chances and ranges, in one run on
one thread of the CPU: ours `to_batch` on int16 boxes as the loader delivers them, MONAI's
dictionary transforms on float32 volumes in memory, sample by sample, as in a worker. MONAI's side
does less: no mirrors, and labels from the nearest voxel. Reading is left out, but how much would be
read is told: voxels of the boxes per voxel of the crops. Writes machine, versions and raw seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import ndimage

from conf.compose import settings_for
from pretrain.augment import Augment
from pretrain.geometry import drawn_matrix, grid_of, plan
from pretrain.loader import collate, to_batch
from pretrain.run_folder import versions

SPACING = np.ones(3)
CLASSES = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, nargs=3, default=(96, 96, 96))
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("augment.json"))
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    size = tuple(chosen.size)
    words = ["corpus=none", "run=none", "augment=nnunet"]
    settings = settings_for("pretrain", words).augment
    rng = np.random.default_rng(0)
    shape = tuple(2 * n for n in size)
    noise = ndimage.gaussian_filter(rng.normal(size=shape).astype(np.float32), 2)
    volume = (noise / noise.std() * 300).astype(np.int16)
    label = np.digitize(volume, np.linspace(-300, 300, CLASSES - 1)).astype(np.int32)

    seeds = [[b * chosen.batch + i for i in range(chosen.batch)] for b in range(chosen.batches)]
    batches = [
        collate([item(volume, label, size, seed, settings) for seed in row]) for row in seeds
    ]
    plain = [collate([item(volume, label, size, seed, None) for seed in row]) for row in seeds]
    augment = Augment((True, True, True), settings)
    theirs = monai_transform(size)
    scans = [
        {"image": torch.from_numpy(volume[None] / 300.0).float(), "label": torch.from_numpy(label)}
    ]
    scans[0]["label"] = scans[0]["label"][None]

    def ours() -> None:
        for raw in batches:
            to_batch(raw, augment)

    def nothing() -> None:
        for raw in plain:
            to_batch(raw)

    def monai() -> None:
        for _ in range(chosen.batches * chosen.batch):
            theirs({name: value.clone() for name, value in scans[0].items()})

    runs: dict[str, Callable[[], None]] = {"ours": ours, "plain crops": nothing, "monai": monai}
    for run in runs.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(chosen.repeats):  # in turns, so that a busy machine slows all
        for name, run in runs.items():
            began = time.perf_counter()
            run()
            seconds[name].append((time.perf_counter() - began) / chosen.batches)
    best = {name: min(values) for name, values in seconds.items()}
    result = {
        "crop": list(size),
        "batch": chosen.batch,
        "seconds_per_batch": {name: round(value, 4) for name, value in best.items()},
        "ours_over_monai_time": round(best["ours"] / best["monai"], 3),
        "voxels_read_per_crop_voxel": read(size, settings),
        "seconds": seconds,
        "machine": {"processor": platform.machine(), "cores": os.cpu_count()},
        "versions": versions(),
    }
    chosen.output.write_text(json.dumps(result, indent=2) + "\n")
    shown = ("seconds_per_batch", "ours_over_monai_time", "voxels_read_per_crop_voxel")
    print(json.dumps({name: result[name] for name in shown}))


def item(
    volume: np.ndarray, label: np.ndarray, size: Any, seed: int, settings: Any
) -> dict[str, Any]:
    """A crop from the middle of a volume, as `CropDataset` makes one."""
    start = (np.array(volume.shape) - size) // 2
    matrix = None if settings is None else drawn_matrix(seed, settings, size, SPACING)
    made: dict[str, Any] = {
        "key": str(seed),
        "value": torch.tensor([[1.0, 0.0]]),
        "window": torch.tensor([[-1000.0, 1000.0, 0.0, 1 / 300]]),
        "spacing": torch.ones(3),
        "seed": seed,
        "valid": None,
    }
    first, extent = start, np.array(size)
    if matrix is None:
        made["valid"] = torch.ones((1, *size), dtype=torch.bool)
    else:
        grid = grid_of(volume.shape, SPACING.tolist(), None)
        shape = np.array(volume.shape)
        first, extent, made["move"] = plan(start, size, matrix, grid, shape, [0])
    box = tuple(slice(a, a + n) for a, n in zip(first, extent, strict=True))
    made["image"] = torch.from_numpy(volume[box].copy())[None]
    made["label"] = torch.from_numpy(label[box].copy())
    return made


def read(size: Any, settings: Any, count: int = 2000) -> dict[str, float]:
    """Voxels in the boxes of crops per voxel of the crops, in volumes without an end."""
    shape = tuple(6 * n for n in size)
    grid, start = grid_of(shape, SPACING.tolist(), None), (np.array(shape) - size) // 2
    shares = []
    for seed in range(count):
        matrix = drawn_matrix(seed, settings, size, SPACING)
        extent = np.array(size)
        if matrix is not None:
            _, extent, _ = plan(start, size, matrix, grid, np.array(shape), [0])
        shares.append(float(np.prod(extent / np.array(size))))
    return {"mean": round(float(np.mean(shares)), 3), "largest": round(max(shares), 3)}


def monai_transform(size: Any) -> Callable[[dict[str, Any]], Any]:
    """nnU-Net's chances and ranges in MONAI's words; each axis has a zoom of its own there."""
    from monai import transforms as T

    pi = float(np.pi)
    keys, modes = ("image", "label"), ("bilinear", "nearest")
    return T.Compose(
        [
            # Rotation and scale come together there: a chance that either happens.
            T.RandAffined(
                keys, prob=0.36, rotate_range=(pi / 6,) * 3, scale_range=((-0.3, 0.4),) * 3,
                spatial_size=size, mode=modes, padding_mode="border", cache_grid=True,
            ),
            T.RandGaussianNoised("image", prob=0.1, std=0.1),
            T.RandGaussianSmoothd("image", (0.5, 1), (0.5, 1), (0.5, 1), prob=0.1),
            T.RandScaleIntensityd("image", 0.25, prob=0.15),
            T.RandScaleIntensityFixedMeand("image", prob=0.15, factors=0.25, preserve_range=True),
            T.RandSimulateLowResolutiond("image", prob=0.125, zoom_range=(0.5, 1)),
            T.RandAdjustContrastd("image", prob=0.1, gamma=(0.7, 1.5), retain_stats=True,
                                  invert_image=True),
            T.RandAdjustContrastd("image", prob=0.3, gamma=(0.7, 1.5), retain_stats=True),
        ]
    )  # fmt: skip


if __name__ == "__main__":
    main()
