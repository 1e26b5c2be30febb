"""Crops per second from a server that fails: beside one that does not, and a local disk.

    python benchmarks/remote.py WORK --scans CT [CT ...] [--output docs/results/remote]

CTs of 512x512x300 (see large_ct.py) in shards of one or two, behind a web server of this machine,
or in a bucket of an S3 server (moto), behind a server that passes its answers on. Ranges of the
touched chunks, or whole shards onto a shelf that is empty at first; without faults, and with 5 % of
requests answered with 503, 1 % of bodies cut and 5 % of answers 0.2 s late. Each
side is read at full speed, and by a trainer whose step takes --step seconds, where what counts is
the share of time that it waits for data. All sides must give the same crops, byte for byte.

Server, workers and the reader share the cores of this machine. Writes machine, versions, raw
seconds and the server's counts as json, and a table.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import xxhash

from data_prep.build import prep
from data_prep.corpus import Corpus
from data_prep.files import write_json, write_text
from data_prep.remote import Shelf
from data_prep.settings import PrepSettings
from pretrain.ahead import Ahead
from pretrain.bench import machine
from pretrain.loader import make_loader
from pretrain.run_folder import versions

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from bucket_server import ADDRESS, CREDENTIALS, bucket_server
from fault_server import FaultServer
from line import ROOT
from loader import crops_of, make_scans

BATCH, STEPS, WORKERS = 4, 40, 4
FAULTS = {"busy": 0.05, "cut": 0.01, "slow": 0.05, "pause": 0.2}
WAYS = ("ranges", "shelf", "s3 ranges", "s3 shelf")
SIDES = ("local", *(f"{way}{faults}" for way in WAYS for faults in ("", ", faults")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--scans", type=Path, nargs="+", required=True)
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--step", type=float, default=0.5)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "results" / "remote")
    chosen = parser.parse_args()
    raw, corpus = chosen.work / "Dataset001_CT", chosen.work / "in-shards"
    if not raw.exists():
        make_scans(raw, chosen.scans, False)
    if not corpus.exists():
        prep(PrepSettings(input=raw, output=corpus, processes=1, keys="names", shard_mib=100))
    measured: dict[str, dict[str, list[Any]]] = {
        side: {"full": [], "waited": [], "faults": []} for side in SIDES
    }
    digests = set()
    os.environ |= CREDENTIALS
    with bucket_server(corpus, chosen.work / "moto.log") as bucket:
        for repeat in range(chosen.repeats):
            for side in SIDES:
                for kind, step in (("full", 0.0), ("waited", chosen.step)):
                    with opened(corpus, side, repeat, bucket) as (found, counts):
                        seconds, waited, digest = read(found, chosen.size, step)
                    digests.add(digest)
                    rate = BATCH * STEPS / seconds
                    measured[side][kind].append(rate if kind == "full" else waited / seconds)
                    measured[side]["faults"].append(counts())
    assert len(digests) == 1, "sides gave other crops"
    result = {
        "measured": measured,
        "size": chosen.size,
        "batch": BATCH,
        "steps": STEPS,
        "workers": WORKERS,
        "step_seconds": chosen.step,
        "shards": len(Corpus.open(corpus).shard_files()),
        "faults": FAULTS,
        "machine": {**machine(torch.device("cpu")), "load": os.getloadavg()[0]},
        "versions": versions(),
    }
    chosen.output.mkdir(parents=True, exist_ok=True)
    write_json(chosen.output / "remote.json", result)
    write_text(chosen.output / "remote.md", text(result))
    print(text(result))


@contextmanager
def opened(path: Path, side: str, seed: int, bucket: str) -> Iterator[tuple[Corpus, Any]]:
    """The corpus as a side sees it, and what its server counted."""
    if side == "local":
        yield Corpus.open(path), lambda: {}
        return
    faults: dict[str, Any] = dict(FAULTS) if side.endswith("faults") else {}
    in_bucket = side.startswith("s3")
    if in_bucket:
        faults["behind"] = bucket
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    server = context.Process(target=serve, args=(path, seed, faults, there), daemon=True)
    server.start()
    counts: dict[str, Any] = {}
    try:
        with tempfile.TemporaryDirectory() as folder:
            shelf = Shelf(Path(folder), 10**12) if "shelf" in side else None
            os.environ["AWS_ENDPOINT_URL"] = url = here.recv()
            yield Corpus.open(ADDRESS if in_bucket else url, shelf=shelf), lambda: counts
    finally:
        here.send("end")
        counts.update(here.recv())
        server.join()


def serve(path: Path, seed: int, faults: dict[str, Any], pipe: Connection) -> None:
    with FaultServer(path, seed, **faults) as server:
        pipe.send(server.url)
        pipe.recv()
        pipe.send(
            {
                "requests": sum(server.asked.values()),
                "bytes": sum(server.sent.values()),
                **server.faults,
            }
        )


def read(corpus: Corpus, size: int, step_seconds: float) -> tuple[float, float, str]:
    """Seconds in all, those that were waited, and a digest of all crops."""
    dataset = crops_of(corpus, size, False)
    done: list[int] = []
    ahead = Ahead(dataset, lambda: len(done), last=STEPS, batch_size=BATCH)
    loader = make_loader(dataset, batch_size=BATCH, first_step=0, last_step=STEPS, workers=WORKERS)
    digest, waited, began = xxhash.xxh3_64(), 0.0, time.perf_counter()
    batches = iter(loader)
    for step in range(STEPS):
        before = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - before
        digest.update(batch["image"].numpy().tobytes())
        time.sleep(step_seconds)
        done.append(step)
    seconds = time.perf_counter() - began
    ahead.end()
    return seconds, waited, digest.hexdigest()


def text(found: dict[str, Any]) -> str:
    faults = found["faults"]
    lines = [
        "# Crops from a server that fails",
        "",
        f"{found['steps']} batches of {found['batch']} crops of {found['size']}^3 out of CTs of "
        f"512x512x300 in {found['shards']} shards, {found['workers']} workers; server and workers "
        f"share the cores. Faults: {faults['busy']:.0%} of requests answered with 503, "
        f"{faults['cut']:.0%} of bodies cut, {faults['slow']:.0%} of answers {faults['pause']:g} s "
        "late; of s3 the server passes on what moto answers. All sides gave the same crops, byte "
        "for byte. Median (lowest to highest) of "
        f"{len(found['measured']['local']['full'])}; a shelf is empty at first, and the starts of "
        "workers count.",
        "",
        f"{found['machine']['processor']}, {found['machine']['cores']} cores, load "
        f"{found['machine']['load']:.1f}; "
        + ", ".join(f"{name} {number}" for name, number in found["versions"].items()),
        "",
        "| side | crops/s at full speed | share of time waited at "
        f"{found['step_seconds']:g} s a step | faults met |",
        "|---|---|---|---|",
    ]
    for side, values in found["measured"].items():
        counts = values["faults"]
        met = sum(one.get(name, 0) for one in counts for name in ("busy", "cut", "slow"))
        lines.append(
            f"| {side} | {spread(values['full'], '.1f')} | {spread(values['waited'], '.1%')} | "
            f"{met} of {sum(one.get('requests', 0) for one in counts)} |"
        )
    return "\n".join(lines) + "\n"


def spread(values: Sequence[float], form: str) -> str:
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:{form}} ({low:{form}} to {high:{form}})"


if __name__ == "__main__":
    main()
