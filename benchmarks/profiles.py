"""Where the time of a step goes, for each small recipe on this machine: docs/results/profiles.md.

    python benchmarks/profiles.py [NAME ...] [--output docs/results]

`voxelith bench step profile=true` for each, in a process of one thread. Shares are of an eager
float32 step; on a GPU, `make gpu` measures the full recipes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from conf.compose import recipes
from data_prep.files import write_json, write_text

ROOT = Path(__file__).parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", default=recipes(small=True), metavar="NAME")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "results")
    chosen = parser.parse_args()
    found = {name: _profile(name) for name in chosen.names}
    write_json(chosen.output / "profiles.json", found)
    table = _table(found)
    write_text(chosen.output / "profiles.md", table)
    print(table)


def _table(found: dict[str, Any]) -> str:
    groups = sorted({g for one in found.values() for g in one["measured"][0]["profile"]})
    first = next(iter(found.values()))
    lines = [
        "# Where the time of a step goes",
        "",
        f"Made by `python benchmarks/profiles.py` on {first['machine']['processor']}, one thread,",
        f"torch {first['versions']['torch']}, float32, eager. Memory is what the step adds to the",
        "process. Raw values are in profiles.json.",
        "",
        f"| recipe | s a step [quartiles] | samples/s | GFLOP/s | MiB | {' | '.join(groups)} |",
        "| --- |" + " --: |" * (4 + len(groups)),
    ]
    for name, one in found.items():
        step = one["measured"][0]
        seconds = step["seconds_per_step"]
        cells = [
            name,
            f"{seconds['median']:.3f} [{seconds['low']:.3f}, {seconds['high']:.3f}]",
            f"{step['samples_per_second']:.1f}",
            f"{step['flops_per_second'] / 1e9:.0f}",
            f"{(step['memory_peak'] - step['memory_idle']) / 2**20:.0f}",
            *(f"{step['profile'].get(group, 0):.0%}" for group in groups),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _profile(name: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "step.json"
        subprocess.run(
            [
                sys.executable, "-W", "ignore", "-m", "voxelith", "bench", "step",
                f"experiment={name}", "profile=true", "trainer.threads=1", f"output={file}",
            ],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        found: dict[str, Any] = json.loads(file.read_text())
        return found


if __name__ == "__main__":
    main()
