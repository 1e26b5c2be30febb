"""What `voxelith prep`, `check` and `report` say of a folder of anything, as it is.

    python benchmarks/whole_folder.py DATA [--report report.html] [--output docs/results]

Prep with nothing said but the folder, then `voxelith check` and `voxelith report`. Writes what they
print, seconds and machine to whole_folder.md; paths in it read DATA and CORPUS. The report's slices
are under the licences of their sources, so it goes where it is told to, or nowhere.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from line import ROOT

from data_prep.files import write_text
from pretrain.bench import machine
from pretrain.run_folder import versions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--report", type=Path)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "results")
    chosen = parser.parse_args()
    data = chosen.data.resolve()
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder) / "corpus"
        lines = []
        report = Path(folder) / "report.html"
        commands = (
            ["prep", f"input={data}", f"output={corpus}"],
            ["check", str(corpus)],
            ["report", str(corpus), f"output={report}"],
        )
        for words in commands:
            began = time.perf_counter()
            done = subprocess.run(
                [Path(sys.executable).parent / "voxelith", *words],
                check=True, capture_output=True, text=True,
            )  # fmt: skip
            seconds = time.perf_counter() - began
            said = f"$ voxelith {' '.join(words)}\n{done.stdout}# {seconds:.0f} s"
            said = said.replace(str(data), "DATA").replace(str(corpus), "CORPUS")
            lines.append(said.replace(f"{folder}/", ""))
        page = report.read_text()
        assert str(data) not in page and folder not in page
        if chosen.report:
            write_text(chosen.report, page)
    here = machine(torch.device("cpu"))
    text = (
        f"# A folder of anything\n\n{here['processor']}, {here['cores']} cores, load "
        f"{os.getloadavg()[0]:.1f}; python {versions()['python']}, voxelith "
        f"{versions()['voxelith']}. The report has {len(page) / 1e6:.1f} MB and "
        f"{page.count('data:image/')} pictures.\n\n```\n" + "\n\n".join(lines)
    )
    write_text(chosen.output / "whole_folder.md", text + "\n```\n")
    print(text)


if __name__ == "__main__":
    main()
