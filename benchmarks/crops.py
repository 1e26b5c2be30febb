"""Crops per second out of a corpus, beside bare blosc2 on the same bytes, in one run.

    python benchmarks/crops.py CORPUS [--size 64 64 64] [--count 300] [--output crops.json]

Both sides read the same boxes of the same volumes in one thread from a warm cache: ours checks the
hash of every chunk that it touches, bare blosc2 opens the frame in place and slices it. The ratio
is the price of integrity. Writes machine, versions and the raw seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from pathlib import Path

import blosc2
import numpy as np

from data_prep.corpus import Corpus, shard_name
from pretrain.run_folder import versions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--size", type=int, nargs=3, default=(64, 64, 64))
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("crops.json"))
    chosen = parser.parse_args()

    corpus = Corpus.open(chosen.corpus)
    size = tuple(chosen.size)
    rng = np.random.default_rng(0)
    large = [i for i in range(len(corpus)) if (corpus.shapes[i, 1:] >= chosen.size).all()]
    if not large:
        parser.error(f"no volume of {chosen.corpus} holds a crop of {list(chosen.size)}")
    boxes = []
    for _ in range(chosen.count):
        i = large[rng.integers(len(large))]
        start = [
            int(rng.integers(n - s + 1)) for n, s in zip(corpus.shapes[i, 1:], size, strict=True)
        ]
        boxes.append((i, tuple(start)))

    def ours() -> int:
        return sum(int(corpus.read(i, "image", start, size)[0, 0, 0, 0]) for i, start in boxes)

    def bare() -> int:
        total = 0
        for i, start in boxes:
            frame = blosc2.open(
                str(corpus.path / shard_name(int(corpus.shards[i]))),
                mode="r",
                offset=int(corpus.column("image_offset")[i]),
                mmap_mode="r",
                dparams=blosc2.DParams(nthreads=1),
            )
            where = tuple(slice(a, a + s) for a, s in zip(start, size, strict=True))
            total += int(np.asarray(frame[(slice(None), *where)])[0, 0, 0, 0])
        return total

    assert ours() == bare(), "both sides must read the same voxels"
    seconds: dict[str, list[float]] = {"ours": [], "blosc2": []}
    for _ in range(chosen.repeats):  # in turns, so that a busy machine slows both
        for name, run in (("ours", ours), ("blosc2", bare)):
            began = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - began)
    best = {name: min(values) for name, values in seconds.items()}
    result = {
        "crop": list(chosen.size),
        "crops": chosen.count,
        "crops_per_second": {name: round(chosen.count / value, 1) for name, value in best.items()},
        "ours_over_blosc2_time": round(best["ours"] / best["blosc2"], 3),
        "seconds": seconds,
        "machine": {"processor": platform.machine(), "cores": os.cpu_count()},
        "versions": versions(),
        "corpus": corpus.index_hash,
    }
    chosen.output.write_text(json.dumps(result, indent=2) + "\n")
    print(
        json.dumps({name: result[name] for name in ("crops_per_second", "ours_over_blosc2_time")})
    )


if __name__ == "__main__":
    main()
