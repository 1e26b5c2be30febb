"""What benchmarks of the whole line share: commands as a user gives them, and lists for `prep`."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def voxelith(*words: str) -> None:
    """Says a command, and runs it in a process of its own."""
    print(f"$ voxelith {' '.join(words)}", flush=True)
    command = [sys.executable, "-W", "ignore", "-m", "voxelith", *words]
    subprocess.run(command, cwd=ROOT, check=True)


def write_list(file: Path, columns: list[str], rows: list[list[Any]]) -> None:
    """A list of scans as `voxelith prep` reads it, or any other table."""
    with file.open("w", newline="") as stream:
        csv.writer(stream).writerows([columns, *rows])


def prep(corpus: Path, *words: str) -> None:
    """The corpus of the list beside it, once."""
    if not (corpus / "corpus.json").exists():
        voxelith("prep", f"input={corpus.with_suffix('.csv')}", f"output={corpus}", "keys=names",
                 *words)  # fmt: skip
