"""What 64 GPUs need of network and loader, on paper, from what was measured on fewer.

    python benchmarks/at_64_gpus.py CORPUS

Gradient bytes are those of docs/results/collectives, the step's time that of docs/results/gpu, and
the crops/s of a worker are measured here: what a worker does with a volume of CORPUS, of which
those count that hold the recipe's crop. Writes docs/results/scaling/at_64_gpus.json and .md. The
machine must be quiet.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from line import ROOT

from data_prep.corpus import Corpus
from data_prep.files import write_json, write_text
from data_prep.preprocess import Preprocess
from pretrain.bench import machine
from pretrain.loader import CropDataset
from pretrain.run_folder import versions
from pretrain.schedule import Schedule

RESULTS = ROOT / "docs" / "results"
OUT = RESULTS / "scaling"
NODES, LOCAL = 8, 8
CROP = (96, 96, 96)
LINKS = {"100 Gbit/s": 12.5e9, "400 Gbit/s": 50e9, "8 x 400 Gbit/s": 400e9}
"""Bytes a second into a node."""


def worker_rate(path: Path, crops: int, repeats: int) -> dict[str, Any]:
    """Crops a second of one worker from a warm cache, and what it read."""
    corpus = Corpus.open(path)
    large = np.flatnonzero((corpus.shapes[:, 1:] >= CROP).all(1))
    if not len(large):
        raise SystemExit(f"{path}: no volume holds a crop of {list(CROP)}")
    schedule = Schedule(np.asarray(corpus.shards)[large], seed=0)
    dataset = CropDataset(corpus, large, schedule, Preprocess.default(None), CROP)
    rates = []
    for number in range(repeats + 1):
        began = time.perf_counter()
        for index in range(number * crops, (number + 1) * crops):
            dataset[index]
        rates.append(crops / (time.perf_counter() - began))
    return {
        "each": rates[1:],  # the first fills the cache
        "median": statistics.median(rates[1:]),
        "shapes": corpus.shapes[large].tolist(),
        "corpus": corpus.index_hash,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--crops", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=5)
    chosen = parser.parse_args()
    load = os.getloadavg()[0]
    rate = worker_rate(chosen.corpus, chosen.crops, chosen.repeats)
    (step,) = (
        one
        for one in json.loads((RESULTS / "gpu" / "mae.json").read_text())["measured"]
        if one["variant"] == "bf16"
    )
    seconds, samples = step["seconds_per_step"]["median"], step["samples"]
    full = json.loads((RESULTS / "collectives" / "collectives.json").read_text())["full"]
    into_a_node = {row["recipe"]: 2 * (NODES - 1) / NODES * row["bytes"] for row in full}
    need = LOCAL * samples / seconds
    facts = {
        "load_before": load, "worker": rate, "step": {"seconds": seconds, "samples": samples},
        "bytes_into_a_node": into_a_node, "crops_per_second_of_a_node": need,
        "machine": machine(torch.device("cpu")), "versions": versions(),
    }  # fmt: skip
    OUT.mkdir(parents=True, exist_ok=True)
    write_json(OUT / "at_64_gpus.json", facts)
    write_text(OUT / "at_64_gpus.md", page(facts))
    print(page(facts))


def page(facts: dict[str, Any]) -> str:
    step, rate, need = facts["step"], facts["worker"], facts["crops_per_second_of_a_node"]
    shapes = np.array(rate["shapes"])[:, 1:]
    low, high = ("x".join(map(str, side)) for side in (shapes.min(0), shapes.max(0)))
    slowest, fastest = min(rate["each"]), max(rate["each"])
    into = facts["bytes_into_a_node"]
    rows = [
        f"| {recipe} | {count / 1e9:.2f} | "
        + " | ".join(f"{1000 * count / speed:,.0f}" for speed in LINKS.values())
        + " |"
        for recipe, count in into.items()
    ]
    shares = ", ".join(
        f"{into['mae'] / speed / step['seconds']:.2f} at {link}" for link, speed in LINKS.items()
    )
    crop = "x".join(map(str, CROP))
    text = f"""# 64 GPUs, on paper

`python benchmarks/at_64_gpus.py CORPUS`. {NODES} nodes of {LOCAL} GPUs; nothing here ran on
more than
one GPU.

## All-reduce

A ring over nodes moves 2 (N - 1) / N of a recipe's gradients into each node: float32, once a step
however many micro-batches it has ([counted](../collectives/collectives.md)). DDP begins while the
backward pass still runs, so this bounds what a step may gain.

| recipe | GB into a node | {" | ".join(f"ms at {link}" for link in LINKS)} |
| --- | ---: | {" | ".join("---:" for _ in LINKS)} |
{chr(10).join(rows)}

`mae` (ViT-L/16, {step["samples"]} samples a GPU) took {1000 * step["seconds"]:.0f} ms a step
on an H200
in bf16 ([gpu](../gpu/mae.json)). Its gradients need that many steps' time: {shares}. Where
that is not
well below 1, more samples a GPU or more micro-batches make it matter less (by the estimate 512
samples
fit 80 GB); the convolutional recipes, with a tenth of the weights and slower steps, are far
from it.

## Loader

At that step a node takes {need:,.0f} crops/s of {crop}. A worker gives {rate["median"]:.0f} (median
of {len(rate["each"])} repeats, {slowest:.0f} to {fastest:.0f}; {facts["machine"]["processor"]}, one
thread, warm cache, {len(shapes)} volumes of {low} to {high}): {need / rate["median"]:.0f} such
workers
a node, {need / rate["median"] / LOCAL:.0f} a GPU. A ViT-L that sees a quarter of its patches
at 64 samples
is the recipe that asks most of a loader; `s3d` (2 samples in 248 ms,
[log](../gpu/mae-and-s3d.log)) takes
{LOCAL * 2 / 0.248:.0f} crops/s a node. `voxelith plan` measures both on a machine of one's own.
"""
    return text


if __name__ == "__main__":
    main()
