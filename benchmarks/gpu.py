"""Everything that needs a GPU, in one command: `make gpu`.

    python benchmarks/gpu.py [NAME ...] [KEY=VALUE ...] [--device cuda] [--output docs/results]

Runs the tests marked `gpu`, then measures a step of every full recipe of conf/experiment in
float32 and bf16, eager and compiled, at the largest micro-batch of the recipe that fits one device
by the estimate, beside what was estimated. A recipe runs in a process of its own, so that one that
fails leaves the others alone. With names, these recipes alone and no tests. Writes gpu.json (all
that was measured) and gpu.md (a table).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from conf.compose import recipes, settings_for
from data_prep.files import write_json, write_text
from pretrain.bench import machine
from pretrain.estimate import Precision, estimate
from pretrain.run_folder import versions
from pretrain.settings import PretrainSettings

ROOT = Path(__file__).parents[1]
SHARE = 0.85
"""Of the device's memory that the estimate may fill: workspaces and fragments need the rest."""


def main() -> None:
    chosen = _arguments()
    device = torch.device(chosen.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("error: there is no CUDA device here")
    chosen.output.mkdir(parents=True, exist_ok=True)
    names = [word for word in chosen.words if "=" not in word]
    words = [word for word in chosen.words if "=" in word]
    tests = _tests() if not names else "not run"
    measured: list[dict[str, Any]] = []
    result = {
        "machine": machine(device),
        "versions": versions(),
        "tests": tests,
        "recipes": measured,
    }
    sizes = _sizes(names or recipes(small=False), device, words)
    for name, samples in sizes.items():
        measured.append(_recipe(name, samples, device, words))
        # Written each time: whoever pays for a GPU by the minute may have to stop early.
        write_json(chosen.output / "gpu.json", result)
        write_text(chosen.output / "gpu.md", markdown(result))
    print(f"{chosen.output}: gpu.json, gpu.md")
    if any("error" in one for one in measured) or tests not in ("passed", "not run"):
        sys.exit(1)


def memory_line(
    settings: PretrainSettings, checkpointing: bool, precision: Precision = "bf16"
) -> tuple[float, float]:
    """Estimated peak on one device in bytes: what is fixed, and what each sample adds.

    Where activations outweigh the optimiser memory is a straight line; two estimates fix it.
    """
    peak = {}
    for samples in (256, 512):
        told = estimate(_on_one_device(settings, samples), precisions=(precision,))
        peak[samples] = told.memory[checkpointing].peak
    slope = (peak[512] - peak[256]) / 256
    return peak[256] - 256 * slope, slope


def _on_one_device(settings: PretrainSettings, samples: int) -> PretrainSettings:
    trainer = settings.trainer.model_copy(update={"devices": 1, "nodes": 1})
    changes = {"batch_size": samples, "accumulate": 1, "trainer": trainer}
    return settings.model_copy(update=changes)


def fitting_batch(settings: PretrainSettings, budget: float) -> int:
    """The largest even micro-batch up to the recipe's that the estimate puts within `budget`."""
    whole = _on_one_device(settings, settings.micro_batch)
    told = estimate(whole, precisions=("float32",))
    if told.memory[settings.trainer.checkpointing].peak <= budget:
        return settings.micro_batch
    fixed, slope = memory_line(settings, settings.trainer.checkpointing, "float32")
    room = int((budget - fixed) / slope) // 2 * 2
    return max(2, min(room, settings.micro_batch))


def _sizes(names: list[str], device: torch.device, words: list[str]) -> dict[str, int]:
    """Samples at once for each recipe; the estimates take CPUs alone, so all at the same time."""
    settings = {name: settings_for("bench", [f"experiment={name}", *words]) for name in names}
    if device.type != "cuda":
        return {name: one.micro_batch for name, one in settings.items()}
    budget = SHARE * torch.cuda.get_device_properties(device).total_memory
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        fitting = pool.map(fitting_batch, settings.values(), [budget] * len(names))
        return dict(zip(names, fitting, strict=True))


def _recipe(name: str, samples: int, device: torch.device, words: list[str]) -> dict[str, Any]:
    print(f"{name}: {samples} samples at once", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "step.json"
        size = [f"batch_size={samples}", "accumulate=1", "trainer.devices=1", "trainer.nodes=1"]
        done = subprocess.run(
            [
                sys.executable, "-m", "voxelith", "bench", "step", f"experiment={name}", *words,
                *size, f"device={device.type}", "profile=true", f"output={file}",
            ],
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
        )  # fmt: skip
        if done.returncode:
            return {"recipe": name, "samples": samples, "error": done.stderr[-2000:]}
        return {"recipe": name, "samples": samples, **json.loads(file.read_text())}


def _tests() -> str:
    done = subprocess.run([sys.executable, "-m", "pytest", "-m", "gpu", "tests"], cwd=ROOT)
    return {0: "passed", 5: "none found"}.get(done.returncode, f"failed ({done.returncode})")


def markdown(result: dict[str, Any]) -> str:
    """The table that docs/results/gpu.md shows."""
    found = result["machine"]
    lines = [
        "# Steps of the full recipes on one device",
        "",
        f"Made by `make gpu` on {found.get('gpu', found['processor'])}, "
        f"torch {result['versions']['torch']}. Tests marked `gpu`: {result['tests']}.",
        "",
        "| recipe | variant | samples at once | s a step | samples/s | TFLOP/s | MFU | device busy "
        "| peak GiB | estimated GiB |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for one in result["recipes"]:
        if "error" in one:
            said = (one["error"].strip().splitlines() or ["stopped"])[-1].replace("|", "/")
            lines.append(f"| {one['recipe']} | failed: {said} | {one['samples']} |" + " |" * 7)
            continue
        for row in one["measured"]:
            share = row["model_flops_utilisation"]
            cells = [
                one["recipe"],
                row["variant"],
                str(row["samples"]),
                f"{row['seconds_per_step']['median']:.4g}",
                f"{row['samples_per_second']:.4g}",
                f"{row['flops_per_second'] / 1e12:.3g}",
                "" if share is None else f"{share:.1%}",
                f"{row['busy']:.0%}" if "busy" in row else "",
                f"{row['memory_peak'] / 2**30:.2f}",
                f"{row['memory_estimated'] / 2**30:.2f}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("words", nargs="*", help="recipes, and key=value for each (repeats=5)")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "results")
    return parser.parse_args()


if __name__ == "__main__":
    main()
