"""What a task finds where it runs: the part of `voxelith launch doctor` that is the job's.

Each finding is a line of the job's log, which arrives even where the folder does not. Nothing is
judged here; `slurm.doctor` does, who sees all tasks.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib
import json
import math
import os
import platform
import shutil
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from data_prep.errors import InputError
from data_prep.files import atomic, make_folder, write_json
from data_prep.references import without_secrets
from pretrain.preemption import Ask, Preempted, Preemption, job_id

MARK = "examined: "
"""Begins a line with a finding."""

MALICIOUS = {name: ("2.6.2", "2.6.3") for name in ("lightning", "pytorch-lightning")}
"""Uploads that steal credentials when they are imported."""

NOTES = "examined"
"""Folder of what tasks write for each other."""

SIGNAL_SECONDS = 60
SHARED_SECONDS = 60
READ_SECONDS = 10
REDUCED_BYTES = 64 * 2**20
SAVED_BYTES = 256 * 2**20
LINE = 900
"""Characters of a finding: srun keeps no longer lines together."""


@dataclass(frozen=True)
class Task:
    """A task of the job, and what it was asked to look at."""

    folder: Path
    number: int
    tasks: int
    nodes: int
    start: int
    job: str
    gpus: int
    workers: int
    corpus: Path | None
    crop_size: tuple[int, int, int]

    @classmethod
    def here(cls, words: Sequence[str]) -> Task:
        """From the words that `slurm.doctor` wrote into the script, and SLURM's environment."""
        told = dict(word.split("=", 1) for word in words)
        environment = os.environ
        if "SLURM_PROCID" not in environment:
            raise InputError(
                "launch examine: is a task of a job that `voxelith launch doctor` made"
            )
        sides = [int(side) for side in told["crop_size"].split(",")]
        return cls(
            folder=Path(told["folder"]),
            number=int(environment["SLURM_PROCID"]),
            tasks=int(environment["SLURM_NTASKS"]),
            nodes=int(environment["SLURM_NNODES"]),
            start=int(environment.get("SLURM_RESTART_COUNT", "0")),
            job=job_id(environment),
            gpus=int(told["gpus"]),
            workers=int(told["workers"]),
            corpus=Path(told["corpus"]) if "corpus" in told else None,
            crop_size=(sides[0], sides[1], sides[2]),
        )

    def note(self, name: str, number: int | None = None) -> Path:
        """A file for the other tasks; of this job alone."""
        number = self.number if number is None else number
        return self.folder / NOTES / f"{self.job}-{name}-{number}.json"

    def wait_for(
        self, name: str, seconds: float, numbers: Sequence[int] | None = None
    ) -> list[int]:
        """Waits for notes of tasks, of all of them by default; returns those that never came."""
        numbers = range(self.tasks) if numbers is None else numbers
        end = time.monotonic() + seconds
        while True:
            # Listed, not asked one by one: NFS remembers for a while that a file was not there.
            there = {file.name for file in (self.folder / NOTES).iterdir()}
            missing = [n for n in numbers if self.note(name, n).name not in there]
            if not missing or time.monotonic() > end:
                return missing
            time.sleep(0.1)

    def tell(self, check: str, **facts: Any) -> None:
        """Writes a finding into the log."""
        said = {"task": self.number, "host": socket.gethostname(), "start": self.start}
        print(MARK + json.dumps({**said, "check": check, **facts}), flush=True)


def examine(words: Sequence[str]) -> dict[str, Any]:
    """Looks at everything, waits for the signal and asks to be requeued; then says what is left.

    Raises:
        Preempted: the first start is over.
    """
    task = Task.here(words)
    if task.start:
        task.tell("again", missing=task.wait_for("shared", SHARED_SECONDS))
        return {}
    hearing = Preemption()
    hearing.install()
    found = versions()
    task.tell("versions", versions=found)
    if malicious(found):
        raise InputError(f"{malicious(found)}: not imported, and nothing else was looked at")
    shared = False
    for name, check in CHECKS.items():
        try:
            facts = check(task)
            task.tell(name, **facts)
            shared |= name == "folder" and not facts["missing"]
        except Exception as error:
            said = str(error) or type(error).__name__
            task.tell(name, error=without_secrets(said)[: LINE // 3])
    task.tell("ready")
    _tell_of_signal(task, hearing, shared)
    raise Preempted(Ask.REQUEUE, 0)


def _tell_of_signal(task: Task, hearing: Preemption, shared: bool) -> None:
    end = time.monotonic() + SIGNAL_SECONDS
    while hearing.asked is Ask.NOTHING and time.monotonic() < end:
        time.sleep(0.1)
    task.tell("signal", heard=hearing.asked.name)
    # The first to ask for a requeue ends the others.
    if shared:
        write_json(task.note("heard"), {})
        task.wait_for("heard", SIGNAL_SECONDS)
    else:
        time.sleep(5)


# What a result depends on.


def versions() -> dict[str, str]:
    """Of Python and of what trains, without importing any of it; and a digest of our own code."""
    found = {"python": platform.python_version()}
    for name in ("voxelith", "torch", "lightning", "pytorch-lightning", "numpy"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {**found, "code": code_digest()}


def malicious(found: dict[str, str]) -> str:
    """The upload among them that must not be imported; empty if there is none."""
    return ", ".join(f"{n} {found[n]}" for n, bad in MALICIOUS.items() if found.get(n) in bad)


def code_digest() -> str:
    """Tells our sources as they are found here from others, decoys of the same name among them."""
    total = hashlib.sha256()
    for name in ("conf", "data_prep", "finetune", "pretrain", "slurm", "voxelith"):
        file = importlib.import_module(name).__file__
        assert file is not None
        place = Path(file)
        files = sorted(place.parent.rglob("*.py")) if place.name == "__init__.py" else [place]
        for one in files:
            total.update(f"{name}/{one.relative_to(place.parent)}\n".encode())
            total.update(one.read_bytes())
    return total.hexdigest()[:12]


# The checks.


def _gpus(task: Task) -> dict[str, Any]:
    if not task.gpus:
        return {"count": 0}
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    facts = [torch.cuda.get_device_properties(n) for n in range(count)]
    return {
        "count": count,
        "names": sorted({one.name for one in facts}),
        "gib": round(min((one.total_memory for one in facts), default=0) / 2**30, 1),
        "bf16": count > 0 and torch.cuda.is_bf16_supported(including_emulation=False),
    }


def _folder(task: Task) -> dict[str, Any]:
    """Whether what one task renames into place is there for all, and whether locks hold."""
    make_folder(task.folder / NOTES, "output")
    began = time.monotonic()
    write_json(task.note("shared"), {"task": task.number})
    missing = task.wait_for("shared", SHARED_SECONDS)
    seconds = time.monotonic() - began
    free = shutil.disk_usage(task.folder).free / 1e9
    facts: dict[str, Any] = {"missing": missing, "seconds": round(seconds, 1), "gb": round(free)}
    return facts | ({} if missing else {"locks": _locks(task)})


def _locks(task: Task) -> str:
    path = task.folder / NOTES / f"{task.job}-lock"
    try:
        with path.open("a") as mine:
            if task.number == 0:
                fcntl.flock(mine, fcntl.LOCK_EX)
                write_json(task.note("locked"), {})
                others = list(range(1, task.tasks))
                task.wait_for("tried", SHARED_SECONDS, others)
                return "hold" if others or not _can_lock(path) else "are not seen by others"
            if task.wait_for("locked", SHARED_SECONDS, [0]):
                return "cannot be tried: task 0 has none"
            taken = _can_lock(path)
            write_json(task.note("tried"), {})
            return "are not seen by others" if taken else "hold"
    except OSError as error:
        return f"fail ({error.strerror})"


def _can_lock(path: Path) -> bool:
    with path.open("a") as other:
        try:
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def _save(task: Task) -> dict[str, Any]:
    """How fast a checkpoint would be written, by the task that does."""
    if task.number:
        return {}
    piece = os.urandom(2**24)
    path = task.folder / NOTES / f"{task.job}-save"
    began = time.perf_counter()
    with atomic(path) as file:
        for _ in range(SAVED_BYTES // len(piece)):
            file.write(piece)
    seconds = time.perf_counter() - began
    path.unlink()
    return {"mb_per_s": round(SAVED_BYTES / 1e6 / seconds, 1)}


def _corpus(task: Task) -> dict[str, Any]:
    """Reads crops as a run does, every chunk verified, all tasks at once."""
    if task.corpus is None:
        return {}
    import numpy as np

    from data_prep.corpus import open_corpus
    from data_prep.preprocess import Preprocess
    from pretrain.loader import CropDataset, make_loader
    from pretrain.schedule import Schedule
    from pretrain.train import corpus_spacing

    corpus = open_corpus(task.corpus, "corpus")
    dataset = CropDataset(
        corpus,
        np.arange(len(corpus)),
        Schedule(np.asarray(corpus.shards), seed=0),
        Preprocess.default(corpus_spacing(corpus)),
        task.crop_size,
    )
    loader = make_loader(
        dataset,
        batch_size=2 * task.tasks,
        first_step=0,
        last_step=10_000,
        workers=task.workers,
        rank=task.number,
        world=task.tasks,
        nodes=task.nodes,
    )
    crops, began = 0, 0.0
    for batch in loader:
        if not began:
            began = time.perf_counter()  # what starting the workers takes does not count
            continue
        crops += len(batch["key"])
        if time.perf_counter() - began > READ_SECONDS:
            break
    seconds = time.perf_counter() - began
    return {"volumes": len(corpus), "crops_per_s": round(crops / seconds, 2)}


def _wandb(task: Task) -> dict[str, Any]:
    if task.number:
        return {}
    import wandb

    folder = task.folder / NOTES / f"{task.job}-wandb"
    folder.mkdir(exist_ok=True)
    run = wandb.init(
        project="voxelith", dir=folder, mode="offline", settings={"console": "off", "silent": True}
    )
    run.log({"loss": 1.0})
    run.finish()
    return {"bytes": sum(file.stat().st_size for file in folder.rglob("*.wandb"))}


def _all_reduce(task: Task) -> dict[str, Any]:
    """A sum over all tasks, on the devices and at the address that a training would take."""
    if task.tasks == 1:
        return {"alone": True}
    from datetime import timedelta

    import torch
    import torch.distributed as dist
    from lightning.pytorch.plugins.environments import SLURMEnvironment

    place = SLURMEnvironment(auto_requeue=False)
    device = torch.device("cuda", place.local_rank()) if task.gpus else torch.device("cpu")
    if task.gpus:
        torch.cuda.set_device(device)
    backend = "nccl" if task.gpus else "gloo"
    dist.init_process_group(
        backend,
        init_method=f"tcp://{place.main_address}:{place.main_port}",
        rank=task.number,
        world_size=task.tasks,
        timeout=timedelta(seconds=120),
    )
    try:
        best, right = math.inf, True
        for _ in range(4):  # the first makes connections
            total = torch.full((REDUCED_BYTES // 4,), task.number + 1.0, device=device)
            dist.barrier()
            began = time.perf_counter()
            dist.all_reduce(total)
            right &= bool((total == task.tasks * (task.tasks + 1) / 2).all())  # waits for it
            best = min(best, time.perf_counter() - began)
        # A run agrees on ends beside the device, over gloo, whose interface may be another one.
        sign = torch.ones(1)
        beside: Any = dist.new_group(backend="gloo")
        dist.all_reduce(sign, group=beside)
        right &= bool(sign == task.tasks)
    finally:
        dist.destroy_process_group()
    # Bytes that each task sends, at the least.
    sent = 2 * (task.tasks - 1) / task.tasks * REDUCED_BYTES
    return {
        "backend": backend,
        "right": right,
        "seconds": round(best, 4),
        "gb_per_s": round(sent / best / 1e9, 2),
    }


CHECKS: dict[str, Callable[[Task], dict[str, Any]]] = {
    "gpus": _gpus,
    "folder": _folder,
    "save": _save,
    "corpus": _corpus,
    "wandb": _wandb,
    "all-reduce": _all_reduce,
}
"""In this order, by every task; what may hang comes last."""
