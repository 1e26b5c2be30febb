"""What every full recipe costs, told by fake tensors: docs/results/recipe_costs.md.

    python benchmarks/recipe_costs.py [--output docs/results]

Memory in bf16 is a straight line in the samples that a device takes at once; two estimates fix it.
Takes three minutes on a CPU and needs no GPU. What the numbers hold: docs/gpu.md.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from gpu import ROOT, SHARE, memory_line

from conf.compose import recipes, settings_for
from data_prep.files import write_json, write_text
from pretrain.estimate import GIB, estimate
from pretrain.run_folder import versions

DEVICE = 80e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "results")
    output = parser.parse_args().output
    rows = [_row(name) for name in recipes(small=False)]
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / "recipe_costs.json", {"recipes": rows, "versions": versions()})
    write_text(output / "recipe_costs.md", _markdown(rows))
    print(_markdown(rows))


def _row(name: str) -> dict[str, Any]:
    settings = settings_for("bench", [f"experiment={name}"])
    told = estimate(settings, precisions=())
    row: dict[str, Any] = {
        "recipe": name,
        "gpus": settings.ranks,
        "batch_size": settings.batch_size,
        "samples_at_once": settings.micro_batch,
        "steps": settings.steps,
        "encoder_parameters": told.parameters,
        "other_parameters": told.other_parameters,
        "flops_per_sample": told.flops_per_sample,
        "flops_per_step": told.flops_per_step,
        "flops": told.flops_per_step * settings.steps,
    }
    for checkpointing in (False, True):
        fixed, slope = memory_line(settings, checkpointing)
        row["checkpointing" if checkpointing else "plain"] = {
            "fixed_bytes": fixed,
            "bytes_per_sample": slope,
            "samples_in_80_gb": max(0, int((SHARE * DEVICE - fixed) / slope)),
        }
    return row


def _markdown(rows: list[dict[str, Any]]) -> str:
    lines = [
        "# What the full recipes cost",
        "",
        "Told by `python benchmarks/recipe_costs.py` without a GPU; what the numbers hold and "
        "leave out stands in [docs/gpu.md](../gpu.md). Memory is in bf16 on one device: a fixed "
        "part and one for each sample, in GiB; `fit` samples at once fill "
        f"{SHARE:.0%} of 80 GB. `+ckpt`: with `trainer.checkpointing=true`. *GiB a GPU*: on the "
        "GPUs that the recipe names; where yours has less, raise `accumulate`. Of a recipe in "
        "stages it is the first.",
        "",
        "| recipe | GPUs | batch | steps | GiB a GPU | encoder M | rest M | GFLOP a sample "
        "| TFLOP a step | EFLOP in all | fixed | a sample | fit | a sample +ckpt | fit +ckpt |",
        "| --- |" + " ---: |" * 14,
    ]
    for row in rows:
        plain, again = row["plain"], row["checkpointing"]
        on_each = plain["fixed_bytes"] + plain["bytes_per_sample"] * row["samples_at_once"]
        cells = [
            row["recipe"],
            str(row["gpus"]),
            str(row["batch_size"]),
            str(row["steps"]),
            f"{on_each / GIB:.1f}",
            f"{row['encoder_parameters'] / 1e6:.1f}",
            f"{row['other_parameters'] / 1e6:.1f}",
            f"{row['flops_per_sample'] / 1e9:,.0f}",
            f"{row['flops_per_step'] / 1e12:,.1f}",
            f"{row['flops'] / 1e18:,.1f}",
            f"{plain['fixed_bytes'] / GIB:.1f}",
            f"{plain['bytes_per_sample'] / GIB:.2f}",
            str(plain["samples_in_80_gb"]),
            f"{again['bytes_per_sample'] / GIB:.2f}",
            str(again["samples_in_80_gb"]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
