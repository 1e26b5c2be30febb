"""What a pretraining is going to take, said before it waits in a queue."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.files import read_note
from slurm import discover
from slurm.settings import ClusterSettings

OUTPUT, REPORT = Path("runs") / "doctor", "doctor.json"
"""Where `voxelith launch doctor` puts what it found, unless it is told."""

SPEED = 100e12
"""FLOP/s of a GPU that hours are told for: a third of what an A100 can do in bf16."""


@dataclass(frozen=True)
class Save:
    """What is known of a save of the planned run.

    Attributes:
        bytes: of a checkpoint.
        seconds: that the last save of this run took; None before the first.
        mb_per_s: that `voxelith launch doctor` measured where runs are kept; None if it did not.
        step: seconds of a step of this run, or as they are reckoned; None before either is known.
    """

    bytes: int
    seconds: float | None
    mb_per_s: float | None
    step: float | None = None

    @classmethod
    def of(cls, size: int, run: Path) -> Save:
        """From the notes in the run's folder and beside it."""
        from pretrain.events import Events

        reports = (run.parent / OUTPUT.name / REPORT, OUTPUT / REPORT)
        speeds = [note["mb_per_s"] for note in map(read_note, reports) if note.get("mb_per_s")]
        return cls(size, Events(run).last_save(), next(iter(speeds), None), _seconds_per_step(run))

    @property
    def expected(self) -> float | None:
        """Seconds that it takes, measured or reckoned; None if nothing was measured."""
        if self.seconds is not None:
            return self.seconds
        return self.bytes / 1e6 / self.mb_per_s if self.mb_per_s else None

    @property
    def needed(self) -> float | None:
        """Seconds from the signal to the end of a save; None if nothing was measured.

        The step under way ends, and one more, since ranks agree a step late.
        """
        return None if self.expected is None else self.expected + 2 * (self.step or 0.0)

    def __str__(self) -> str:
        said = f"{self.bytes / 1e9:.3g} GB"
        if self.seconds is not None:
            return f"{said}, the last save took {self.seconds:.3g} s"
        if self.mb_per_s:
            return f"{said} / {self.mb_per_s:g} MB/s (launch doctor) = {self.expected:.3g} s"
        return f"{said}; launch doctor measures how long a save takes"

    def warnings(self, cluster: ClusterSettings) -> list[str]:
        """Where the cluster leaves less time than it takes."""
        if self.needed is None:
            return []
        found = []
        steps = f", after two steps of {self.step:.3g} s," if self.step else ""
        name, _, seconds = cluster.signal.partition("@")
        if self.needed > int(seconds):
            found.append(
                f"warning: a save ({self}){steps} takes longer than the {seconds} s of "
                f"cluster.signal before a time limit; give "
                f"cluster.signal={name}@{2 * int(self.needed) + 60}"
            )
        try:
            here = shutil.which("scontrol") and shutil.which("sinfo")
            slurm = discover.discover() if here else None
        except RuntimeError as error:
            said = " ".join(str(error).split())
            return [*found, f"warning: how long a preempted job has is not known here: {said}"]
        chosen = discover.partition_of(slurm, cluster.partition) if slurm else None
        if slurm and chosen and chosen.preempt in ("REQUEUE", "CANCEL"):
            grace = discover.grace(slurm, chosen)
            if self.needed > grace:
                found.append(
                    f"warning: a save ({self}){steps} takes longer than the {grace} s (GraceTime + "
                    f"KillWait) that partition {chosen.name} leaves a preempted job: what was "
                    "trained since the last save is lost then; lower save_minutes"
                )
        return found


def _seconds_per_step(run: Path) -> float | None:
    """Of a run that has been started before."""
    try:
        with (run / "metrics.csv").open(newline="") as file:
            rows = [row.get("seconds_per_step") for row in csv.DictReader(file)]
        return next((float(row) for row in reversed(rows) if row), None)
    except (OSError, ValueError):
        return None


@dataclass(frozen=True)
class Plan:
    """What a pretraining takes.

    Attributes:
        steps: of it.
        operations: of all of them.
        step: seconds of a step at that speed; None where CPUs train.
        disk: bytes in its folder at most.
        lines: data, steps, operations, memory and disk, to read.
    """

    steps: int
    operations: float
    step: float | None
    disk: int
    lines: tuple[str, ...]

    def __str__(self) -> str:
        return "\n".join(self.lines)


def added_up(plans: Sequence[Plan]) -> str:
    """What several stages take together, in a line."""
    operations = sum(one.operations for one in plans)
    return (
        f"  together {sum(one.steps for one in plans):,} steps, {_compute(operations)}; "
        f"disk {sum(one.disk for one in plans) / 1e9:.3g} GB"
    )


def _compute(operations: float) -> str:
    return (
        f"{operations / 1e18:.3g} EFLOP, {operations / SPEED / 3600:,.3g} GPU-hours at "
        f"{SPEED / 1e12:.0f} TFLOP/s a GPU"
    )


def plan(settings: Any, cluster: ClusterSettings, save: Save) -> Plan:
    """Data, steps, operations, memory and disk of a pretraining; takes some seconds."""
    from pretrain.estimate import GIB, estimate
    from pretrain.run_folder import Checkpoints
    from pretrain.train import corpus_channels, corpus_for

    corpus = corpus_for(settings)
    shards = corpus.info["shards"]
    size = sum(int(shard["bytes"]) for shard in shards)
    seen = settings.steps * settings.batch_size
    on_gpus = cluster.gpus_per_node > 0 or settings.trainer.accelerator != "cpu"
    precision = settings.trainer.precision
    told = estimate(
        settings,
        corpus_channels(corpus),
        "cuda" if on_gpus else "cpu",
        ("float32" if precision == "32-true" or not on_gpus else "bf16",),
        (settings.trainer.checkpointing,),
    )
    operations = float(told.flops_per_step) * settings.steps
    keep = Checkpoints.KEEP
    (memory,) = told.memory
    where = f"a {'GPU' if on_gpus else 'task'} ({memory.precision}, estimated; libraries add to it)"
    lines = (
        f"  corpus   {len(corpus):,} volumes in {len(shards):,} shards, {size / 1e9:.3g} GB",
        f"  training {seen:,} samples, {seen / len(corpus):,.3g} epochs",
        f"  compute  {_compute(operations)}",
        f"  memory   {memory.peak / GIB:.3g} GiB of {where}",
        f"  disk     {keep} checkpoints, {keep + 1} while one is written, each {save}",
    )
    step = float(told.flops_per_step) / settings.ranks / SPEED if on_gpus else None
    return Plan(settings.steps, operations, step, (keep + 1) * save.bytes, lines)
