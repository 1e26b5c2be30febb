"""Resampling a CT by cubic B-splines, and preparing it: beside nnU-Net's preprocessing.

    python benchmarks/resampling.py SCAN [--output docs/results/resampling]

SCAN is a CT file, best of 512x512x300 (benchmarks/large_ct.py makes one). nnU-Net v2 of PyPI must
be installed. One process and thread each, the sides in turn:

resampling   the array in memory to another spacing: nnU-Net's resample_data_or_seg_to_shape
             (order 3, as its plans say for CT), and ours: cubic splines too, and a windowed sinc
             along an axis that shrinks.
whole        from the file to what is stored: nnU-Net's preprocessor (reading by SimpleITK, crop,
             normalising, resampling, blosc2) and one case of `voxelith prep` (reading, checks,
             fingerprint, sketch, resampling, statistics, blosc2), with and without resampling.
phantom      cosines of waves of 6 mm and more, sampled and resampled: error against the same
             cosines at the new points, in the middle of the volume, as a share of their spread.
aliases      the same with waves along axes that the new voxels cannot hold, from 2.1 mm to
             1.4 new voxels: what is left of them, as a share of their spread.

Writes machine, versions and raw seconds as json, and a table.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from line import ROOT

from data_prep.files import write_json, write_text
from data_prep.layouts.case import Case
from data_prep.preprocess import as_physical, resample_sharply
from data_prep.request import versions
from data_prep.scan import ScanJob, Scanned, scan
from data_prep.volume import read_nifti, volume_from_array
from data_prep.work import WorkFolder
from pretrain.bench import machine

SPACINGS = ((1.0, 1.0, 1.0), (1.5, 1.5, 1.5), (0.8, 0.7, 0.7))
PHANTOM = ((1.0, 1.0, 1.0), ((0.8, 0.8, 0.8), (1.3, 1.3, 1.3), (1.6, 1.6, 1.6)))
"""Spacing of the phantom, and those that it is resampled to."""
WAVES_MM = (6.0, 40.0)
ALIASES = ((1.6, 1.6, 1.6), (2.5, 2.5, 2.5))
"""Spacings that are too coarse for waves of 2.1 mm and more."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("scan", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "results" / "resampling")
    chosen = parser.parse_args()
    volume = as_physical(read_nifti(chosen.scan, "CT"))
    rows: dict[str, dict[str, list[float]]] = {}
    for spacing in SPACINGS:
        shape = resample_sharply(volume, spacing).array.shape[1:]
        name = " x ".join(f"{n:g}" for n in spacing)
        sides = {
            "voxelith": lambda s=spacing: resample_sharply(volume, s),
            "nnU-Net": lambda s=spacing, n=shape: nnunet_resample(
                volume.array, n, volume.spacing, s
            ),
        }
        rows[name] = timed(sides, chosen.repeats)
    whole = timed(
        {
            "voxelith": lambda: ours(chosen.scan, SPACINGS[0]),
            "voxelith, native": lambda: ours(chosen.scan, None),
            "nnU-Net": lambda: nnunet(chosen.scan, SPACINGS[0]),
        },
        chosen.repeats,
    )
    result = {
        "scan": {"shape": list(volume.array.shape[1:]), "spacing": list(volume.spacing)},
        "resampling": rows,
        "whole": whole,
        "phantom": {f"{target[0]:g}": phantom(target, WAVES_MM) for target in PHANTOM[1]},
        "aliases": {
            f"{target[0]:g}": phantom(target, (2.1, 1.4 * target[0]), holds=False)
            for target in ALIASES
        },
        "machine": {**machine(torch.device("cpu")), "load": os.getloadavg()[0]},
        "versions": versions() | {name: version(name) for name in ("nnunetv2", "scipy")},
    }
    chosen.output.mkdir(parents=True, exist_ok=True)
    write_json(chosen.output / "resampling.json", result)
    write_text(chosen.output / "resampling.md", text(result))
    print(text(result))


def timed(sides: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each side, the sides in turn."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, work in sides.items():
            began = time.perf_counter()
            work()
            found[name].append(time.perf_counter() - began)
    return found


def nnunet_resample(
    array: np.ndarray, shape: Sequence[int], before: Sequence[float], after: Sequence[float]
) -> np.ndarray:
    """As nnU-Net's plans ask for images: cubic, and nearest across thick slices."""
    from nnunetv2.preprocessing.resampling.default_resampling import (
        resample_data_or_seg_to_shape,
    )

    return np.asarray(
        resample_data_or_seg_to_shape(
            array, shape, before, after, is_seg=False, order=3, order_z=0, force_separate_z=None
        )
    )


def ours(path: Path, spacing: tuple[float, float, float] | None) -> None:
    """One case of a prep, until its payloads are on the disk."""
    with tempfile.TemporaryDirectory() as folder:
        work = WorkFolder(Path(folder))
        work.make()
        case = Case(path.name, (path,), modality="CT")
        job = ScanJob(0, case, "key", "subject", work, "CT", False, spacing=spacing)
        assert isinstance(scan(job), Scanned)


def nnunet(path: Path, spacing: Sequence[float]) -> None:
    """nnU-Net's preprocessing of a case, until it is on the disk."""
    from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
    from nnunetv2.preprocessing.cropping.cropping import crop_to_nonzero
    from nnunetv2.preprocessing.normalization.default_normalization_schemes import (
        CTNormalization,
    )
    from nnunetv2.preprocessing.resampling.default_resampling import compute_new_shape
    from nnunetv2.training.dataloading.nnunet_dataset import (
        comp_blosc2_params,
        nnUNetDatasetBlosc2,
    )

    data, properties = SimpleITKIO().read_images([str(path)])
    cropped, seg, _ = crop_to_nonzero(data.astype(np.float32))
    told = {"mean": 0.0, "std": 300.0, "percentile_00_5": -1000.0, "percentile_99_5": 1000.0}
    normalised = CTNormalization(False, told).run(cropped[0], seg[0])[None]
    shape = compute_new_shape(cropped.shape[1:], properties["spacing"], spacing)
    made = nnunet_resample(normalised, shape, properties["spacing"], spacing).astype(np.float32)
    with tempfile.TemporaryDirectory() as folder:
        blocks, chunks = comp_blosc2_params(made.shape, (96, 96, 96))
        nnUNetDatasetBlosc2.save_case(
            made,
            np.zeros(made.shape, dtype=np.int16),
            {},
            str(Path(folder) / "case"),
            chunks=chunks,
            blocks=blocks,
            chunks_seg=chunks,
            blocks_seg=blocks,
        )


def phantom(
    target: tuple[float, float, float], waves_mm: tuple[float, float], holds: bool = True
) -> dict[str, float]:
    """Root mean square error in the middle, as a share of the phantom's standard deviation.

    What is wanted of waves that the new voxels cannot hold is nothing.
    """
    rng = np.random.default_rng(0)
    # A cube of voxels holds shorter waves along its diagonals than along its axes.
    waves = rng.normal(size=(40, 3)) if holds else np.eye(3)[rng.integers(0, 3, 40)]
    waves *= (
        2 * np.pi / rng.uniform(*waves_mm, 40)[:, None] / np.linalg.norm(waves, axis=1)[:, None]
    )
    phases = rng.uniform(0, 2 * np.pi, 40)

    def values(
        shape: Sequence[int], spacing: Sequence[float], first: Sequence[float]
    ) -> np.ndarray:
        axes = [f + s * np.arange(n) for n, s, f in zip(shape, spacing, first, strict=True)]
        total = np.zeros(shape)
        for wave, phase in zip(waves, phases, strict=True):
            parts = [np.exp(1j * w * a) for w, a in zip(wave, axes, strict=True)]
            total += np.real(np.exp(1j * phase) * np.einsum("i,j,k->ijk", *parts))
        return total

    spacing = PHANTOM[0]
    shape = (96, 96, 96)
    array = values(shape, spacing, (0, 0, 0)).astype(np.float32)
    mine = resample_sharply(volume_from_array(array, spacing, "MR"), target)
    new = mine.array.shape[1:]
    theirs = nnunet_resample(array[None], new, spacing, target)[0]
    errors = {}
    for name, made, step in (
        ("voxelith", mine.array[0], target),
        # nnU-Net stretches the volume to whole voxels.
        ("nnU-Net", theirs, [n * s / m for n, s, m in zip(shape, spacing, new, strict=True)]),
    ):
        first = [(b - a) / 2 for a, b in zip(spacing, step, strict=True)]
        right = values(new, step, first)
        inside = tuple(slice(n // 6, n - n // 6) for n in new)
        off = made - right if holds else made
        errors[name] = float(np.sqrt(np.mean(off[inside] ** 2)) / right.std())
    return errors


def text(found: dict[str, Any]) -> str:
    """The tables."""
    shape = " x ".join(map(str, found["scan"]["shape"]))
    spacing = " x ".join(f"{n:.2g}" for n in found["scan"]["spacing"])
    lines = [
        "# Resampling and preparing a CT",
        "",
        f"{shape} voxels of {spacing} mm (d, h, w); one process and thread; median seconds of "
        f"{len(found['whole']['voxelith'])} (lowest to highest). {found['machine']['processor']}, "
        f"load {found['machine']['load']:.1f}; "
        + ", ".join(f"{name} {number}" for name, number in found["versions"].items()),
        "",
        "| | voxelith | nnU-Net | times |",
        "|---|---|---|---|",
    ]
    for name, sides in found["resampling"].items():
        lines.append(f"| resampled to {name} mm | {_row(sides)} |")
    lines.append(f"| file to stored, 1 x 1 x 1 mm | {_row(found['whole'])} |")
    native = found["whole"]["voxelith, native"]
    lines.append(f"| file to stored, as it is | {_spread(native)} | | |")
    lines += [
        "",
        f"As it is: {1 / statistics.median(native):.3f} volumes a second and process.",
        "",
        "Error on a phantom of waves of 6 mm and more, voxels of 1 mm, as a share of its spread:",
        "",
        "| resampled to | voxelith | nnU-Net |",
        "|---|---|---|",
    ]
    for name, errors in found["phantom"].items():
        lines.append(f"| {name} mm | {errors['voxelith']:.3%} | {errors['nnU-Net']:.3%} |")
    lines += [
        "",
        "What comes back as other waves, of waves along an axis, from 2.1 mm to 1.4 new voxels:",
        "",
        "| resampled to | voxelith | nnU-Net |",
        "|---|---|---|",
    ]
    for name, errors in found["aliases"].items():
        lines.append(f"| {name} mm | {errors['voxelith']:.2%} | {errors['nnU-Net']:.1%} |")
    return "\n".join(lines) + "\n"


def _row(sides: dict[str, list[float]]) -> str:
    mine, theirs = sides["voxelith"], sides["nnU-Net"]
    times = statistics.median(theirs) / statistics.median(mine)
    return f"{_spread(mine)} | {_spread(theirs)} | {times:.1f}"


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


if __name__ == "__main__":
    main()
