"""Peak memory and time of prep for one CT of 512x512x1000 and its label, by what is asked of it.

    python benchmarks/prep_memory.py CT.nii.gz

CT.nii.gz is any real CT; benchmarks/large_ct.py makes a large one of it. Each kind of prep runs in
a process of its own (processes=1) that does nothing else; its peak is what the kernel has counted
(VmHWM), imports included. Writes docs/results/prep_memory.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import large_ct
import torch

from data_prep.files import write_json, write_text
from data_prep.request import versions
from pretrain.bench import machine

SHAPE = (512, 512, 1000)
ROOT = Path(__file__).parents[1]
OUTPUT = ROOT / "docs" / "results" / "prep_memory"
KINDS = {
    "as it is": ("labels=false",),
    "with its label": ("labels=true",),
    "at 1.5 mm": ("labels=false", "spacing=1.5"),
    "cropped to the body": ("labels=false", "crop=foreground"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("ct", type=Path)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        large_ct.SHAPE = SHAPE
        large_ct.write(chosen.ct, root / "made", seed=0)
        for kind, ending in (("images", ""), ("labels", "_seg")):
            (root / "in" / kind).mkdir(parents=True)
            (root / "made" / f"000{ending}.nii.gz").rename(root / "in" / kind / "ct.nii.gz")
        runs = [measured(root, name, options) for name, options in KINDS.items()]
    result = {
        "shape": SHAPE,
        "voxels_mib": SHAPE[0] * SHAPE[1] * SHAPE[2] * 2 / 2**20,
        "runs": runs,
        "machine": machine(torch.device("cpu")),
        "versions": versions(),
    }
    OUTPUT.mkdir(parents=True, exist_ok=True)
    write_json(OUTPUT / "prep_memory.json", result)
    write_text(OUTPUT / "prep_memory.md", text(result))
    print(text(result))


def measured(root: Path, name: str, options: tuple[str, ...]) -> dict[str, Any]:
    """One prep, alone in a process of its own."""
    output = root / name.replace(" ", "-")
    command = [sys.executable, "-c", _RUN, f"input={root / 'in'}", f"output={output}"]
    began = time.perf_counter()
    done = subprocess.run(
        [*command, "processes=1", *options],
        cwd=ROOT,
        check=True,
        stdout=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )
    seconds = time.perf_counter() - began
    peak = int(done.stdout.split()[-1])
    stored = sum(path.stat().st_size for path in output.rglob("*.tar"))
    return {
        "name": name,
        "options": list(options),
        "peak_mib": peak / 2**10,
        "seconds": seconds,
        "stored_mib": stored / 2**20,
    }


_RUN = """
import re, sys
from pathlib import Path
import voxelith
status = voxelith.main(["prep", *sys.argv[1:]])
# Not getrusage, whose peak is also that of who has started this.
print(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
sys.exit(status)
"""


def text(result: dict[str, Any]) -> str:
    """The result as a table."""
    shape = "x".join(map(str, result["shape"]))
    rows = [
        f"| {run['name']} (`{' '.join(run['options'])}`) | {run['peak_mib'] / 1024:.1f} "
        f"| {run['seconds']:.0f} | {run['stored_mib']:.0f} |"
        for run in result["runs"]
    ]
    return "\n".join(
        [
            f"# One CT of {shape} through prep",
            "",
            f"The voxels alone are {result['voxels_mib']:.0f} MiB as int16. One process, one "
            "thread; from .nii.gz to a corpus that is verified, imports included. "
            f"{result['machine']['processor']}.",
            "",
            "| prep | peak memory, GiB | seconds | stored, MiB |",
            "| --- | --- | --- | --- |",
            *rows,
            "",
            "`python benchmarks/prep_memory.py CT.nii.gz` writes this page.",
            "",
        ]
    )


if __name__ == "__main__":
    main()
