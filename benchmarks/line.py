"""What benchmarks of the whole line share: commands as a user gives them, and lists for `prep`."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def voxelith(*words: str) -> None:
    """Says a command, and runs it in a process of its own."""
    print(f"$ voxelith {' '.join(words)}", flush=True)
    command = [sys.executable, "-W", "ignore", "-m", "voxelith", *words]
    subprocess.run(command, cwd=ROOT, check=True)


def quietly(*words: str) -> tuple[float, str]:
    """Runs a command on one thread and says nothing; returns its seconds and standard output."""
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "voxelith", *words],
        cwd=ROOT,
        check=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    return time.perf_counter() - began, done.stdout


def sample_corpus(work: Path) -> Path:
    """The sample scans as a corpus, made once."""
    corpus = work / "corpus"
    if not (corpus / "corpus.json").exists():
        quietly("prep", "input=samples/pretrain.csv", f"output={corpus}", "keys=names")
    return corpus


def write_list(file: Path, columns: list[str], rows: list[list[Any]]) -> None:
    """A list of scans as `voxelith prep` reads it, or any other table."""
    with file.open("w", newline="") as stream:
        csv.writer(stream).writerows([columns, *rows])


def prep(corpus: Path, *words: str) -> None:
    """The corpus of the list beside it, once."""
    if not (corpus / "corpus.json").exists():
        voxelith("prep", f"input={corpus.with_suffix('.csv')}", f"output={corpus}", "keys=names",
                 *words)  # fmt: skip
