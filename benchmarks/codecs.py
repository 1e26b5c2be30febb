"""Bytes, writing and crops with codecs, filters and blocks: what shards are made of.

    python benchmarks/codecs.py --scans SCAN [SCAN ...] [--large CT] [--output docs/results/codecs]

Each scan as it is (with --labels each label map, as single bytes), and of the CT after `--large`
one of 512x512x300 (see large_ct.py). Crops of
96^3 (64^3 where that does not fit) at random places, one thread, from memory; the lowest of some
repeats in which all take turns, so that a busy machine slows all. Writes machine, versions and all
values as json, and a table.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import time
from pathlib import Path
from typing import Any

import blosc2
import nibabel as nib
import numpy as np
import torch
from large_ct import large
from line import ROOT
from numpy.typing import NDArray

from data_prep.files import write_json, write_text
from pretrain.bench import machine
from pretrain.run_folder import versions

CODECS = (
    (blosc2.Codec.ZSTD, 1, blosc2.Filter.SHUFFLE),
    (blosc2.Codec.ZSTD, 1, blosc2.Filter.BITSHUFFLE),
    (blosc2.Codec.LZ4, 5, blosc2.Filter.SHUFFLE),
    (blosc2.Codec.LZ4, 5, blosc2.Filter.BITSHUFFLE),
    (blosc2.Codec.LZ4, 9, blosc2.Filter.BITSHUFFLE),
    (blosc2.Codec.LZ4HC, 5, blosc2.Filter.SHUFFLE),
    (blosc2.Codec.LZ4HC, 5, blosc2.Filter.BITSHUFFLE),
    (blosc2.Codec.LZ4HC, 9, blosc2.Filter.BITSHUFFLE),
    (blosc2.Codec.LZ4HC, 5, blosc2.Filter.NOFILTER),
)
LAYOUTS = (
    (64, (16, 32, 32)),
    (64, (16, 16, 32)),
    (48, (16, 16, 24)),
    (32, (16, 16, 32)),
    (32, (16, 32, 32)),
    (32, (32, 32, 32)),
)
"""Chunks, that are verified and fetched whole, and blocks, that are decompressed whole."""
CROPS = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scans", type=Path, nargs="+", required=True)
    parser.add_argument("--large", type=Path)
    parser.add_argument("--labels", action="store_true")
    parser.add_argument("--repeats", type=int, default=12)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "results" / "codecs")
    chosen = parser.parse_args()
    blosc2.set_nthreads(1)
    kept = np.uint8 if chosen.labels else np.int16
    volumes: dict[str, Any] = {f.name.split(".")[0]: voxels(f).astype(kept) for f in chosen.scans}
    if chosen.large:
        volumes["512x512x300"] = large(voxels(chosen.large), 0)
    found = {
        "volumes": {
            name: measure(np.ascontiguousarray(volume.transpose(2, 1, 0)), chosen.repeats)
            for name, volume in volumes.items()
        },
        "machine": {**machine(torch.device("cpu")), "load": os.getloadavg()[0]},
        "versions": versions() | {"blosc2": blosc2.__version__},
    }
    chosen.output.mkdir(parents=True, exist_ok=True)
    write_json(chosen.output / "codecs.json", found)
    write_text(chosen.output / "codecs.md", text(found))
    print(text(found))


def voxels(file: Path) -> NDArray[np.float32]:
    return np.asarray(nib.load(file).dataobj, dtype=np.float32)


def measure(volume: NDArray[Any], repeats: int) -> dict[str, Any]:
    size = 96 if min(volume.shape) >= 96 else 64
    rng = np.random.default_rng(0)
    starts = [[int(rng.integers(n - size + 1)) for n in volume.shape] for _ in range(CROPS)]
    boxes = [tuple(slice(a, a + size) for a in start) for start in starts]
    rows, arrays = [], []
    for (codec, level, filter_), (chunk, block) in itertools.product(CODECS, LAYOUTS):
        began = time.perf_counter()
        array = blosc2.asarray(
            volume,
            chunks=tuple(min(chunk, n) for n in volume.shape),
            blocks=block,
            contiguous=True,
            cparams=blosc2.CParams(codec=codec, clevel=level, filters=[filter_], nthreads=1),
            dparams=blosc2.DParams(nthreads=1),
        )
        took = time.perf_counter() - began
        arrays.append(array)
        touched = [
            math.prod(-(-side.stop // chunk) - side.start // chunk for side in box) for box in boxes
        ]
        bits = 8 * array.schunk.cbytes / volume.size
        rows.append(
            {
                "codec": f"{codec.name} {level}",
                "filter": filter_.name,
                "chunk": chunk,
                "block": list(block),
                "bits_per_voxel": bits,
                "chunks_per_crop": sum(touched) / CROPS,
                "bytes_per_crop": sum(touched) / CROPS * chunk**3 * bits / 8,
                "write_mb_per_second": volume.nbytes / took / 1e6,
                "crop_seconds": [],
            }
        )
    for _ in range(repeats):
        for row, array in zip(rows, arrays, strict=True):
            began = time.perf_counter()
            for box in boxes:
                array[box]
            row["crop_seconds"].append((time.perf_counter() - began) / CROPS)
    return {"shape": list(volume.shape), "crop": size, "rows": rows}


def text(found: dict[str, Any]) -> str:
    lines = [
        "# What shards are made of",
        "",
        "Bits per voxel / MB/s of writing / milliseconds of a crop (lowest) / MB of the chunks "
        "that it touches; one thread.",
        f"{found['machine']['processor']}, load {found['machine']['load']:.1f}; "
        + ", ".join(f"{name} {number}" for name, number in found["versions"].items()),
        "",
    ]
    names = list(found["volumes"])
    titles = [
        f"{name} {'x'.join(map(str, one['shape']))}, crops of {one['crop']}^3"
        for name, one in found["volumes"].items()
    ]
    lines += [
        f"| codec, filter, chunk, block | {' | '.join(titles)} |",
        "|---" * (len(names) + 1) + "|",
    ]
    for rows in zip(*(found["volumes"][name]["rows"] for name in names), strict=True):
        one = rows[0]
        block = "x".join(map(str, one["block"]))
        what = f"{one['codec']}, {one['filter']}, {one['chunk']}^3, {block}"
        cells = [
            f"{row['bits_per_voxel']:.2f} / {row['write_mb_per_second']:.0f} / "
            f"{1e3 * min(row['crop_seconds']):.2f} / {row['bytes_per_crop'] / 1e6:.1f}"
            for row in rows
        ]
        lines.append(f"| {what} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
