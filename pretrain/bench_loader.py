"""`voxelith bench loader`: what the corpus, its storage and this machine's cores give.

Samples are read, verified and decompressed by workers as in a training, and nobody computes on
them. Each number of workers is measured with the files' pages in memory as they happen to be; the
last again after these pages were dropped, so that every byte comes from storage: that is what a
corpus costs that is larger than the memory. Of a corpus elsewhere shards come ahead of time as in a
training, where there is a shelf for them; what is on it already does not come again, so that there
the last try has an empty one of its own: that is what the first epoch costs.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch

from data_prep.corpus import open_corpus
from data_prep.errors import InputError
from data_prep.progress import bar
from data_prep.remote import Shelf
from pretrain.ahead import Ahead
from pretrain.bench import machine, written
from pretrain.loader import Batches, CropDataset, make_loader
from pretrain.run_folder import versions
from pretrain.settings import BenchSettings
from pretrain.train import corpus_channels, corpus_for, make_dataset, plan_objective

if TYPE_CHECKING:
    from multiprocessing.sharedctypes import Synchronized


def bench_loader(settings: BenchSettings) -> dict[str, Any]:
    """Measures samples per second for 1, 2, 4, ... workers, up to `trainer.workers`.

    Raises:
        InputError: no corpus, or wrong settings.
        CorruptionError: a shard is damaged.
    """
    if settings.corpus is None:
        raise InputError("bench loader: corpus: missing; give corpus=DIR, the one to read")
    corpus = corpus_for(settings)
    crops = plan_objective(settings, corpus_channels(corpus))().crops
    dataset = make_dataset(settings, corpus, crops)
    load = os.getloadavg()[0]
    most = settings.trainer.workers or 1
    counts = [n for n in (2**k for k in range(9)) if n < most] + [most]
    micro = settings.micro_batch
    print(
        f"{corpus}: {len(corpus):,} volumes; a sample is {crops.main} of "
        f"{'x'.join(map(str, settings.crop_size))}"
        + (f" and {crops.total - crops.main} smaller" if crops.total > crops.main else "")
        + f"; batches of {micro}, {settings.seconds:g} s each"
    )
    measured, step = [], 0
    came = multiprocessing.Value("q", 0)
    files = corpus.shard_files() if hasattr(os, "posix_fadvise") else []
    tries = [(n, "") for n in counts]
    tries += [(most, "pages dropped")] * bool(files) + [(most, "empty shelf")] * bool(corpus.shelf)
    with bar(total=len(tries), desc="loader", unit="try") as shown, contextlib.ExitStack() as stack:
        for workers, cold in tries:
            if cold == "pages dropped":
                drop_pages(files)
            if cold == "empty shelf":
                assert corpus.shelf is not None
                folder = TemporaryDirectory(dir=corpus.shelf.folder, prefix=".bench-")
                empty = Shelf(Path(stack.enter_context(folder)), corpus.shelf.limit)
                corpus = open_corpus(settings.corpus, "corpus", empty)
                dataset = make_dataset(settings, corpus, crops)
            for remote in corpus.remotes:
                remote.tally = came
            found = _measure(dataset, micro, workers, settings.seconds, step, bool(cold), came)
            measured.append({"workers": workers, "cold": cold, **found})
            step += found["batches"]
            shown.update()
    print("\n".join(map(_line, measured)))
    print(_fed(measured, settings.gpu_rate))
    return written(
        settings,
        {
            "measured": measured,
            "sample": {"crops": crops.total, "crop_size": list(settings.crop_size)},
            "machine": {**machine(torch.device("cpu")), "load_before": load},
            "versions": versions(),
        },
    )


def _measure(
    dataset: CropDataset,
    batch: int,
    workers: int,
    seconds: float,
    step: int,
    cold: bool,
    came: Synchronized[int],
) -> dict[str, Any]:
    """Rates after every worker has delivered; where it is cold, from the beginning.

    What is read first stays where it is, so of a small corpus nothing would be cold afterwards.
    `step`: batches that were given before. `came`: bytes that came from elsewhere.
    """
    loader = make_loader(
        dataset, batch_size=batch, first_step=step, last_step=step + 10**5, workers=workers
    )
    batches = iter(loader)
    assert isinstance(batches, Batches)
    processes = batches.pids
    began, before, given, replaced = time.perf_counter(), (0, came.value), 0, 0
    warming = 0 if cold else workers
    ahead = Ahead(
        dataset, lambda: step + given, last=step + 10**5, batch_size=batch
    )  # now that workers are there: no fork follows
    try:
        if warming:
            for _ in range(workers):
                next(batches)
                given += 1
            began, before = time.perf_counter(), (_read(processes), came.value)
        while given == warming or time.perf_counter() - began < seconds:
            replaced += len(next(batches).get("damage", ()))
            given += 1
        spent = time.perf_counter() - began
    finally:
        ahead.end()
    return {
        "samples_per_second": (given - warming) * batch / spent,
        "storage_bytes_per_second": (_read(processes) - before[0]) / spent,
        "fetched_bytes_per_second": (came.value - before[1]) / spent,
        "memory_per_worker": max(map(private_bytes, processes)),
        "replaced": replaced,
        "batches": given,
    }


def _line(found: dict[str, Any]) -> str:
    state = f", {found['cold']}" if found["cold"] else ""
    fetched = found["fetched_bytes_per_second"]
    who = "worker" if found["workers"] == 1 else "workers"
    return (
        f"{found['workers']:>4} {who}{state}: {found['samples_per_second']:.4g} samples/s, "
        f"{found['storage_bytes_per_second'] / 1e6:.3g} MB/s from storage, "
        + (f"{fetched / 1e6:.3g} MB/s from elsewhere, " if fetched else "")
        + f"{found['memory_per_worker'] / 2**20:.0f} MiB a worker"
        + (f"; {found['replaced']} samples were damaged and replaced" if found["replaced"] else "")
    )


def _fed(measured: Sequence[dict[str, Any]], rate: float | None) -> str:
    """How many GPUs the slowest of the tries with most workers feeds."""
    last = [one for one in measured if one["workers"] == measured[-1]["workers"]]
    least = min(one["samples_per_second"] for one in last)
    if rate is None:
        return (
            f"with {last[0]['workers']} workers {least:.4g} samples/s; how many GPUs that feeds: "
            "give gpu_rate=SAMPLES_PER_SECOND of one, from `voxelith bench step` there"
        )
    each = least / last[0]["workers"]
    return (
        f"with {last[0]['workers']} workers {least:.4g} samples/s: {least / rate:.3g} GPUs at "
        f"{rate:g} samples/s; a GPU takes {rate / each:.3g} workers"
    )


def drop_pages(files: Sequence[Path]) -> None:
    """Lets the kernel forget files; what a process has mapped and touched of them stays."""
    for file in files:
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _read(processes: Sequence[int]) -> int:
    """Bytes that processes have had read from storage, by system calls or by touching a map."""
    return sum(
        int(value) for pid in processes for value in _found(pid, "io", r"^read_bytes: (\d+)")
    )


def private_bytes(pid: int) -> int:
    """Bytes of memory that a process has for itself: not what it shares with who has forked it."""
    return 1024 * sum(map(int, _found(pid, "smaps_rollup", r"^Private_Dirty:\s+(\d+)")))


def _found(pid: int, name: str, pattern: str) -> Iterator[str]:
    with contextlib.suppress(OSError):  # no Linux, or not allowed
        yield from re.findall(pattern, Path(f"/proc/{pid}/{name}").read_text(), re.MULTILINE)
