"""What `voxelith prep` makes of a folder of anything: its summary and its report, as they are.

    python benchmarks/whole_folder.py DATA [--output docs/results/whole_folder]

Prep with nothing said but the folder, then `voxelith check`. Writes what both print, seconds and
machine, and the report beside it; paths in them read DATA and CORPUS.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from data_prep.files import write_text
from pretrain.bench import machine
from pretrain.run_folder import versions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--output", type=Path, default=Path("docs/results/whole_folder"))
    chosen = parser.parse_args()
    data = chosen.data.resolve()
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder) / "corpus"
        lines = []
        for words in (["prep", f"input={data}", f"output={corpus}"], ["check", str(corpus)]):
            began = time.perf_counter()
            done = subprocess.run(
                [Path(sys.executable).parent / "voxelith", *words],
                check=True, capture_output=True, text=True,
            )  # fmt: skip
            seconds = time.perf_counter() - began
            said = f"$ voxelith {' '.join(words)}\n{done.stdout}# {seconds:.0f} s"
            lines.append(said.replace(str(data), "DATA").replace(str(corpus), "CORPUS"))
        report = (corpus / "report.html").read_text()
        chosen.output.mkdir(parents=True, exist_ok=True)
        assert str(data) not in report and folder not in report
        shutil.copy(corpus / "report.html", chosen.output / "report.html")
    here = machine(torch.device("cpu"))
    text = (
        f"# A folder of anything\n\n{here['processor']}, {here['cores']} cores, load "
        f"{os.getloadavg()[0]:.1f}; python {versions()['python']}, voxelith "
        f"{versions()['voxelith']}. The [report](report.html).\n\n```\n" + "\n\n".join(lines)
    )
    write_text(chosen.output / "whole_folder.md", text + "\n```\n")
    print(text)


if __name__ == "__main__":
    main()
