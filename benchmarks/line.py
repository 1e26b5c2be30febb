"""What benchmarks of the whole line share: commands as a user gives them, and lists for `prep`."""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def voxelith(*words: str) -> None:
    """Says a command, and runs it in a process of its own; where it fails, that ends this one."""
    print(f"$ voxelith {' '.join(words)}", flush=True)
    command = [sys.executable, "-W", "ignore", "-m", "voxelith", *words]
    if code := subprocess.run(command, cwd=ROOT).returncode:
        sys.exit(code)


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


def sample_corpus(work: Path, name: str = "pretrain", *words: str) -> Path:
    """A list of the sample scans as a corpus, made once."""
    corpus = work / "corpora" / name
    if not (corpus / "corpus.json").exists():
        quietly("prep", f"input=samples/{name}.csv", f"output={corpus}", "keys=names", *words)
    return corpus


def write_list(file: Path, columns: list[str], rows: list[list[Any]]) -> None:
    """A list of scans as `voxelith prep` reads it, or any other table."""
    with file.open("w", newline="") as stream:
        csv.writer(stream).writerows([columns, *rows])


def hippocampi(data: Path) -> list[list[Any]]:
    """Image, label, subject and modality of each scan of `msd_task04_hippocampus`."""
    rows = []
    for image in sorted((data / "msd_task04_hippocampus" / "images").glob("*.nii.gz")):
        found = re.search(r"_(\d+)", image.name)
        assert found is not None
        # Two sides of a person have an odd id and the next even one.
        subject = f"s{(int(found[1]) + 1) // 2:03d}"
        rows.append([image, image.parents[1] / "labels" / image.name, subject, "MR"])
    return rows


def heads(data: Path) -> list[list[Any]]:
    """The same of `ixi_t1_dlmuse`."""
    folder = data / "ixi_t1_dlmuse"
    return [
        [t1, folder / "dlmuse_seg" / t1.name.replace("_T1.", "_T1_DLMUSE."), t1.name[:6], "MR"]
        for t1 in sorted((folder / "t1").glob("*.nii.gz"))
    ]


def prep(corpus: Path, *words: str) -> None:
    """The corpus of the list beside it, once."""
    if not (corpus / "corpus.json").exists():
        voxelith("prep", f"input={corpus.with_suffix('.csv')}", f"output={corpus}", "keys=names",
                 *words)  # fmt: skip
