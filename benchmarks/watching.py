"""What watching a run costs: its looks at the features, a probe included, as a share of its time.

    python benchmarks/watching.py --work DIR [--steps 2500]

Trains `mae_small` on the sample scans with a probe on the sample hippocampi and keeps its
health.csv, whose last `share` is the answer: seconds of all looks over those of the run. Some eight
minutes of one core.
"""

from __future__ import annotations

import argparse
import csv
import shutil
from pathlib import Path

import torch
from line import ROOT, quietly, sample_corpus

from data_prep.files import write_bytes, write_json
from pretrain.bench import machine
from pretrain.run_folder import versions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "results")
    chosen = parser.parse_args()
    work = chosen.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    probe, run = sample_corpus(work, "hippocampus", "classes=hippocampus"), work / "run"
    shutil.rmtree(run, ignore_errors=True)
    quietly("pretrain", "experiment=mae_small", f"corpus={sample_corpus(work)}", f"runs={work}",
            "run=run", f"steps={chosen.steps}", f"health.probe={probe}",
            "trainer.threads=1")  # fmt: skip
    chosen.output.mkdir(parents=True, exist_ok=True)
    log = (run / "health.csv").read_bytes()
    looks = list(csv.DictReader(log.decode().splitlines()))
    share = float(looks[-1]["share"])
    write_bytes(chosen.output / "health_overhead.csv", log)
    write_json(
        chosen.output / "health_overhead.json",
        {
            "looks": len(looks),
            "seconds_of_looks": sum(float(look["seconds"]) for look in looks),
            "share": share,
            "steps": chosen.steps,
            "machine": machine(torch.device("cpu")),
            "versions": versions(),
        },
    )
    print(f"{len(looks)} looks, {share:.1%} of the time of {chosen.steps} steps")


if __name__ == "__main__":
    main()
