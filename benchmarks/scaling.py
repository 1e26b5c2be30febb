"""Two ranks beside one, a thread each: how many more steps of the same global batch they make.

    python benchmarks/scaling.py --work DIR

MAE on a ViT, on the sample scans, by the real command; runs of one and of two ranks take turns, and
the steps after the first ten count. Gradients are summed by gloo. Writes docs/results/scaling/. The
machine must be quiet, and have two cores.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

from line import ROOT, quietly, sample_corpus

from data_prep.files import write_json, write_text

OUT = ROOT / "docs" / "results" / "scaling"
WORDS = ["experiment=mae_small", "trainer=cpu", "trainer.threads=1", "trainer.workers=0",
         "warmup=5", "steps=40", "log_every=5", "preview_every=0", "health.every=0",
         "save_every=1000"]  # fmt: skip
SETTLED = 10


def seconds(work: Path, ranks: int, batch: int) -> list[float]:
    """Seconds of a step, for each logged row."""
    name = f"ranks-{ranks}-{time.time_ns()}"
    corpus = sample_corpus(work)
    quietly("pretrain", f"corpus={corpus}", f"run={name}", f"runs={work / 'runs'}", *WORDS,
            f"batch_size={batch}", f"trainer.devices={ranks}")  # fmt: skip
    with (work / "runs" / name / "metrics.csv").open(newline="") as file:
        rows = [(int(r["step"]), float(r["seconds_per_step"])) for r in csv.DictReader(file)]
    return [spent for step, spent in rows if step > SETTLED]


def measured(work: Path, repeats: int, batch: int) -> dict[str, Any]:
    found: dict[str, list[list[float]]] = {"1": [], "2": []}
    for _ in range(repeats):
        for ranks in (1, 2):
            found[str(ranks)].append(seconds(work, ranks, batch))
    ratios = [
        statistics.median(one) / statistics.median(two)
        for one, two in zip(found["1"], found["2"], strict=True)
    ]
    return {"batch_size": batch, "seconds_per_step": found, "ratios": ratios}


def parameters() -> int:
    from conf.compose import settings_for
    from pretrain.train import build_objective

    said = ["corpus=.", "run=x", "experiment=mae_small"]
    return sum(p.numel() for p in build_objective(settings_for("pretrain", said), 1).parameters())


def page(facts: dict[str, Any]) -> str:
    one, two = (
        statistics.median(map(statistics.median, facts["seconds_per_step"][n])) for n in "12"
    )
    ratios, machine = facts["ratios"], facts["machine"]
    return f"""# Two ranks beside one

`python benchmarks/scaling.py --work DIR`: `{" ".join(facts["words"])}`, global batch
{facts["batch_size"]}, {facts["parameters"]:,} parameters, {facts["gradient_bytes"] / 1e6:.1f} MB of
gradients a step over gloo; {machine["processor"]}, {machine["cores"]} cores, one thread a
rank; torch
{facts["versions"]["torch"]}; load before {facts["load_before"]:.2f}.

Steps/s of two ranks over those of one: {statistics.median(ratios):.2f} (median of
{len(ratios)} pairs
in turns, {min(ratios):.2f} to {max(ratios):.2f}). A step takes {one:.3f} s on one and
{two:.3f} s on two.

What 64 GPUs need: [on paper](at_64_gpus.md).
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batch", type=int, default=64)
    chosen = parser.parse_args()
    work = chosen.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    load = os.getloadavg()[0]
    found = measured(work, chosen.repeats, chosen.batch)

    import torch

    from pretrain.bench import machine
    from pretrain.run_folder import versions

    weights = parameters()
    facts = {
        **found, "parameters": weights, "gradient_bytes": 4 * weights, "load_before": load,
        "words": WORDS, "machine": machine(torch.device("cpu")), "versions": versions(),
    }  # fmt: skip
    OUT.mkdir(parents=True, exist_ok=True)
    write_json(OUT / "scaling.json", facts)
    write_text(OUT / "scaling.md", page(facts))
    print(json.dumps({k: facts[k] for k in ("ratios", "parameters", "gradient_bytes")}))


if __name__ == "__main__":
    main()
