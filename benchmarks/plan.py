"""What `voxelith plan` says beside what the run then takes, from command to exit.

    python benchmarks/plan.py --work DIR

Small recipes on the sample scans, each planned and then trained, several times in turn; writes
docs/results/plan/. The machine must be quiet.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

from line import ROOT, quietly, sample_corpus

from data_prep.files import write_json, write_text

OUT = ROOT / "docs" / "results" / "plan"
RUNS = {
    "mae_small": ["steps=600", "save_every=100", "preview_every=200"],
    "cnn_mae_small": ["steps=200", "save_every=50", "preview_every=100"],
    "volume_fusion_small": ["steps=150", "save_every=50", "preview_every=0"],
}


def measure(work: Path, repeats: int) -> list[dict[str, Any]]:
    corpus = sample_corpus(work)
    rows = []
    for number in range(repeats):
        for recipe, words in RUNS.items():
            said = [
                f"corpus={corpus}", f"experiment={recipe}", "trainer=cpu", "trainer.workers=1",
                "warmup=10", f"runs={work / 'runs'}", *words,
            ]  # fmt: skip
            load = os.getloadavg()[0]
            spent, text = quietly("plan", "--json", *said)
            planned = json.loads(text.splitlines()[-1])
            taken, _ = quietly("pretrain", f"run={recipe}-{number}-{time.time_ns()}", *said)
            rows.append(
                {
                    "recipe": recipe, "words": words, "planned_seconds": planned["seconds"],
                    "taken_seconds": taken, "ratio": planned["seconds"] / taken,
                    "planning_seconds": spent, "load_before": load,
                    "measured": planned["stages"][""]["measured"],
                }
            )  # fmt: skip
            print(f"{recipe}: planned {planned['seconds']:.0f} s, took {taken:.0f} s", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=2)
    chosen = parser.parse_args()
    chosen.work.mkdir(parents=True, exist_ok=True)
    rows = measure(chosen.work.resolve(), chosen.repeats)

    import torch

    from pretrain.bench import machine
    from pretrain.run_folder import versions

    OUT.mkdir(parents=True, exist_ok=True)
    facts = {"machine": machine(torch.device("cpu")), "versions": versions(), "runs": rows}
    write_json(OUT / "plan.json", facts)
    lines = [
        "# What `voxelith plan` says, and what the run takes",
        "",
        f"`python benchmarks/plan.py --work DIR`; {facts['machine']['processor']}, "
        f"{facts['machine']['cores']} cores, one thread a run; torch {facts['versions']['torch']}. "
        "Seconds from command to exit, imports included.",
        "",
        "| recipe | words | planned | taken | planned / taken |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {r['recipe']} | {' '.join(r['words'])} | {r['planned_seconds']:.0f} | "
        f"{r['taken_seconds']:.0f} | {r['ratio']:.2f} |"
        for r in rows
    ]
    write_text(OUT / "plan.md", "\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
