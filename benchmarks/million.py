"""A corpus of 1,000,000 volumes: seconds and memory until the first batch is there.

    python benchmarks/million.py WORK [--count 1000000] [--output docs/results/million]

The index of the sample scans' corpus, its rows repeated, all in the same shards; a process of its
own opens it, plans the epoch and reads a batch. Names, spacings, places, sizes and hashes are
random, as they are in a real index, whose file and buffers are as large; but for the rows of that
batch, which are read. Writes machine, versions, seconds and peak memory, that of the imports apart.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from line import ROOT

from data_prep.build import prep
from data_prep.corpus import books
from data_prep.files import write_json, write_text
from data_prep.settings import PrepSettings
from pretrain.bench import machine
from pretrain.run_folder import versions

SAMPLES = Path(__file__).parents[1] / "samples" / "pretrain.csv"
READ = """
import json, re, sys, time
from pathlib import Path

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

from conf.compose import settings_for
from pretrain.loader import make_loader, to_batch
from pretrain.train import corpus_for, make_dataset
words = ["experiment=mae_small", f"corpus={sys.argv[1]}", "run=none", "trainer=cpu"]
settings = settings_for("pretrain", words)
found, before, began = {"memory_of_imports": peak()}, peak(), time.perf_counter()
def mark(name):
    global began
    found[name] = time.perf_counter() - began
    began = time.perf_counter()
corpus = corpus_for(settings)
mark("open")
dataset = make_dataset(settings, corpus)
mark("dataset")
loader = iter(make_loader(dataset, batch_size=settings.batch_size, first_step=0, last_step=1000))
batch = to_batch(next(loader))
mark("first batch")
assert len(set(batch.keys)) == settings.batch_size
found["memory"] = peak() - before
found["keys"] = list(batch.keys)
print(json.dumps(found))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "results" / "million")
    chosen = parser.parse_args()
    folder = chosen.work / "corpus"
    if not folder.exists():
        prep(PrepSettings(input=SAMPLES, output=folder))
    large = chosen.work / f"corpus-{chosen.count}"
    if not large.exists():
        large.mkdir(parents=True)
        (large / "shards").symlink_to((folder / "shards").resolve())
        repeat(folder, large, chosen.count)
        repeat(folder, large, chosen.count, read=measure(large)["keys"])
    runs = [measure(large) for _ in range(chosen.repeats)]
    for run in runs:
        del run["keys"]
    found: dict[str, Any] = {
        "volumes": chosen.count,
        "index_bytes": (large / "index.parquet").stat().st_size,
        "runs": runs,
        "machine": {**machine(torch.device("cpu")), "load": os.getloadavg()[0]},
        "versions": versions(),
    }
    chosen.output.mkdir(parents=True, exist_ok=True)
    write_json(chosen.output / "million.json", found)
    write_text(chosen.output / "million.md", text(found))
    print(text(found))


def repeat(folder: Path, large: Path, count: int, read: Sequence[str] = ()) -> None:
    """Writes an index of `count` rows; places and hashes are random but in rows that are `read`."""
    rng = np.random.default_rng(0)
    table = pq.read_table(folder / "index.parquet")
    table = table.take(pa.array(np.arange(count) % len(table)))
    names = rng.integers(0, 2**63, (2, count))
    keys = pa.array([f"{number:016x}" for number in names[0]])
    stays = pc.is_in(keys, pa.array(read, pa.string())).to_numpy(zero_copy_only=False)
    if not read:
        stays[:] = True
    columns = {"key": keys, "subject": pa.array([f"{number:016x}" for number in names[1]])}
    for name in table.column_names:
        values = table[name].to_numpy()
        if name.startswith("spacing"):
            columns[name] = pa.array(values * rng.uniform(0.9, 1.1, count))
        elif name.endswith(("_offset", "_size", "_xxh3")):
            other = rng.integers(0, 2**40, count).astype(values.dtype)
            columns[name] = pa.array(np.where(stays | (values <= 0), values, other))
    for name, column in columns.items():
        table = table.set_column(table.column_names.index(name), name, column)
    pq.write_table(table, large / "index.parquet", compression="zstd")
    info = json.loads((folder / "corpus.json").read_text())
    digest = hashlib.sha256((large / "index.parquet").read_bytes()).hexdigest()
    info["index"]["sha256"] = digest
    (large / "corpus.json").write_bytes(books(info))


def measure(large: Path) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", READ, str(large)], check=True, capture_output=True, text=True
    )
    return dict(json.loads(done.stdout.splitlines()[-1]))


def text(found: dict[str, Any]) -> str:
    lines = [
        f"# A corpus of {found['volumes']:,} volumes until its first batch",
        "",
        f"{found['machine']['processor']}, load {found['machine']['load']:.1f}; index of "
        f"{found['index_bytes'] / 1e6:.0f} MB. Seconds, and peak memory beyond what the imports "
        "take, of each run.",
        "",
        "| open | dataset | first batch | all | memory, MiB | imports, MiB |",
        "|---|---|---|---|---|---|",
    ]
    for run in found["runs"]:
        parts = [run[name] for name in ("open", "dataset", "first batch")]
        memory = [run[name] / 2**20 for name in ("memory", "memory_of_imports")]
        cells = [f"{value:.2f}" for value in (*parts, sum(parts))]
        lines.append(f"| {' | '.join(cells + [f'{one:.0f}' for one in memory])} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
