"""One row of the results from what the project itself carries: `make results-small`, 20 minutes.

    python benchmarks/results_small.py [--work DIR] [--jobs 2] [--publish]

The released encoder is finetuned on 2 labelled hippocampi of `samples/`, five draws, beside its
scratch twin, with the recipe of docs/results/protocol.md, and scored on the sample scans of those
subjects that the protocol tests on (28 scans of 14 subjects; none of them was pretrained on, which
the leakage gate verifies by fingerprint). Prints the row that comes out beside the published one.
Another CPU rounds differently, so the numbers may move by some tenths; without bf16 instructions it
takes about twice as long. `--publish` keeps what comes out as docs/results/small.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
from pathlib import Path

import torch
from line import ROOT, prep, voxelith, write_list
from proof import CELLS, FINETUNING, PRIMARY, RATE, RELEASE, TASKS, place_of

from data_prep.files import write_json
from pretrain.bench import machine
from pretrain.run_folder import versions

PUBLISHED = ROOT / "docs" / "results" / "small"
DRAWS = (0, 1, 2, 3, 4)
LAST_TESTED = "6926bae66ed2"
"""Where the protocol's order of subjects, by hash, leaves the part that it tests on."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "results-small")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--publish", action="store_true")
    chosen = parser.parse_args()
    work = chosen.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    make_corpus(work / "hippocampus")
    data_set, budget, _ = CELLS[PRIMARY]
    voxelith("finetune", "-m", *TASKS[data_set], *FINETUNING, *budget, f"lr={RATE}",
             f"corpus={work / data_set}", f"ckpt={RELEASE}", f"seed={','.join(map(str, DRAWS))}",
             f"runs={work / 'runs'}", f"jobs={chosen.jobs}")  # fmt: skip
    voxelith("table", str(work / "runs"), f"output={work / 'table'}")
    if chosen.publish:
        PUBLISHED.mkdir(parents=True, exist_ok=True)
        for name in ("table.md", "table.csv", "table.json"):
            shutil.copy(work / "table" / name, PUBLISHED / name)
        write_json(
            PUBLISHED / "machine.json",
            {"machine": machine(torch.device("cpu")), "versions": versions()},
        )
    print(f"\nhere:      {sentence(work / 'table')}\npublished: {sentence(PUBLISHED)}")


def make_corpus(corpus: Path) -> None:
    """The sample hippocampi in the protocol's parts: those that it tests on, and its pool."""
    with (ROOT / "samples" / "hippocampus.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    parts = [
        [ROOT / "samples" / row["image"], ROOT / "samples" / row["label"], row["subject"],
         row["modality"], row["licence"], part_of(row["subject"])]
        for row in rows
    ]  # fmt: skip
    columns = ["image", "label", "subject", "modality", "licence", "split"]
    write_list(corpus.with_suffix(".csv"), columns, parts)
    prep(corpus, "classes=hippocampus", "shard_mib=4")


def part_of(subject: str) -> str:
    """Of the sample scans none is of the twelve subjects that the protocol validates on."""
    place = place_of("hippocampus", f"s{subject.removeprefix('h')}")
    return "test" if place[:12] <= LAST_TESTED else "train"


def sentence(table: Path) -> str:
    """The verdict with its numbers."""
    file = table / "table.json"
    if not file.exists():
        return "nothing yet"
    return str(json.loads(file.read_text())["groups"][0]["sentence"])


if __name__ == "__main__":
    main()
