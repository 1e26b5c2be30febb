"""Runs the small recipes of conf/experiment on the sample scans: `make recipes`.

    python benchmarks/recipes.py [NAME ...] [--output docs/results/recipes] [--work DIR]

Each is a pretraining by the command line, in a process of one thread, watched by a probe on the
labelled hippocampi. Keeps of each run its log (NAME.csv), what became of its features
(NAME-health.csv) and its last pictures (NAME.png, NAME-strip.png), and writes README.md and
NAME.json with machine, versions and raw values. Minutes of training on 36 volumes: they show
that a recipe is healthy, and nothing about what it is worth.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from line import ROOT, sample_corpus

from conf.compose import recipes, stages_for
from data_prep.files import write_json, write_text
from pretrain.bench import machine
from pretrain.run_folder import versions
from pretrain.settings import PretrainSettings

SMALL = recipes(small=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", default=SMALL, metavar="NAME")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "results" / "recipes")
    parser.add_argument("--work", type=Path, help="corpora and runs are made, and left, here")
    parser.add_argument("--beside", type=int, default=2, help="runs at once, of one thread each")
    chosen = parser.parse_args()
    unknown = sorted(set(chosen.names) - set(SMALL))
    if unknown:
        parser.error(f"no such recipe: {', '.join(unknown)}; there are {', '.join(SMALL)}")
    chosen.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as made:
        work = chosen.work.resolve() if chosen.work else Path(made)
        names = ("pretrain", "hippocampus")
        corpora = {name: sample_corpus(work, name, "shard_mib=1") for name in names}
        waiting, running = list(chosen.names), {}
        failed: list[str] = []
        while waiting or running:
            while waiting and len(running) < chosen.beside:
                name = waiting.pop(0)
                running[name] = (_start(name, corpora, work), time.perf_counter())
                print(f"{name}: started", flush=True)
            for name, (process, began) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[name]
                seconds = time.perf_counter() - began
                if process.returncode:
                    failed.append(name)
                    print(f"{name}: failed, see {work / name}.log", flush=True)
                else:
                    for run, settings in _runs(name).items():
                        row = _keep(run, settings, seconds, work, chosen.output)
                        print(f"{run}: {json.dumps(row)}", flush=True)
            time.sleep(0.2)
        if failed:
            for name in failed:
                print((work / f"{name}.log").read_text()[-2000:], file=sys.stderr)
            sys.exit(f"error: {', '.join(failed)} failed")
    _summarise(chosen.output)


def _start(name: str, corpora: dict[str, Path], work: Path) -> subprocess.Popen[bytes]:
    words = [
        f"experiment={name}", f"corpus={corpora['pretrain']}", f"run={name}",
        f"runs={work / 'runs'}", f"health.probe={corpora['hippocampus']}", "health.every=50",
        "trainer.threads=1", "resume=never",
    ]  # fmt: skip
    with (work / f"{name}.log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "voxelith", "pretrain", *words],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=log,
        )


def _runs(name: str) -> dict[str, PretrainSettings]:
    """What a recipe runs, by name: itself, or each of its stages."""
    stages = stages_for("pretrain", ["corpus=c", f"run={name}", f"experiment={name}"])
    return {settings.run: settings for settings in stages.values()}


def _keep(
    name: str, settings: PretrainSettings, seconds: float, work: Path, output: Path
) -> dict[str, Any]:
    """Copies the run's logs and pictures, and writes its row; seconds are of the whole recipe."""
    run = work / "runs" / name
    shutil.copyfile(run / "metrics.csv", output / f"{name}.csv")
    shutil.copyfile(run / "health.csv", output / f"{name}-health.csv")
    pictures = sorted((run / "previews").glob("step-*.png"))
    if pictures:
        shutil.copyfile(pictures[-1], output / f"{name}.png")
    if (run / "previews" / "strip.png").exists():
        shutil.copyfile(run / "previews" / "strip.png", output / f"{name}-strip.png")
    losses, health = _rows(run / "metrics.csv"), _rows(run / "health.csv")
    facts = json.loads((run / "run.json").read_text())
    row = {
        "objective": settings.objective["_target_"].rpartition(".")[2],
        "backbone": settings.backbone["_target_"].rpartition(".")[2],
        "parameters": facts["parameters"],
        "steps": settings.steps,
        "batch_size": settings.batch_size,
        "seconds": round(seconds, 1),
        "seconds_per_step": [float(r["seconds_per_step"]) for r in losses],
        "loss": [float(r["loss"]) for r in losses],
        "health": [{k: float(v) for k, v in r.items()} for r in health],
    }
    result = {"machine": machine(torch.device("cpu")), "versions": versions(), **row}
    write_json(output / f"{name}.json", result)
    return {k: row[k] for k in ("seconds", "steps")} | {
        "loss": [row["loss"][0], row["loss"][-1]],
        "probe_dice": [row["health"][0]["probe_dice"], row["health"][-1]["probe_dice"]],
    }


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _summarise(output: Path) -> None:
    found = {f.stem: json.loads(f.read_text()) for f in sorted(output.glob("*_small*.json"))}
    first = next(iter(found.values()))
    lines = [
        "# The small recipes",
        "",
        f"Made by `make recipes` on {first['machine']['processor']}, one thread a run, two runs",
        f"at once, torch {first['versions']['torch']}, float32. 36 volumes of `samples/`, one seed",
        "each. They show that the recipes run and learn their own task, and nothing about what the",
        "encoders are worth: minutes on these scans leave some probes (linear, 8 hippocampi of the",
        "training part, Dice at voxel resolution) below those of the untrained encoder, and the",
        "spread between seeds is not measured. The first look is at untrained weights, in later",
        "stages at those of the stage before. Seconds are of runs beside other work.",
        "",
        "| recipe | objective, encoder | parameters | steps x batch | seconds | loss, first to "
        "last | RankMe of tokens | probe Dice, first to last |",
        "| --- | --- | --: | --: | --: | --: | --: | --: |",
    ]
    for name, one in found.items():
        begin, end = one["health"][0], one["health"][-1]
        cells = [
            f"[{name}]({name}.csv)",
            f"{one['objective']}, {one['backbone']}",
            f"{one['parameters'] / 1e6:.2f} M",
            f"{one['steps']} x {one['batch_size']}",
            f"{one['seconds']:.0f}",
            f"{one['loss'][0]:.3f} to {one['loss'][-1]:.3f}",
            f"{begin['rank']:.0f} to {end['rank']:.0f}",
            f"{100 * begin['probe_dice']:.1f} to {100 * end['probe_dice']:.1f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "Each has its log, health, last reconstructions (.png) and colours of its tokens"]
    lines += ["(-strip.png) in this folder.", ""]
    write_text(output / "README.md", "\n".join(lines))
    print(f"{output / 'README.md'}")


if __name__ == "__main__":
    main()
