"""`voxelith plan`: hours, memory and disk of a pretraining, from the first steps of a real one.

The run itself is started, on its corpus and through its own loop, for a few steps: with as many of
the wanted devices as this machine has, each with the micro-batch that it will have. What is not a
step (the start, looks at features, pictures, saves) is counted apart, and all of it added up for
the steps that were asked for. What this machine cannot show, gradients between more ranks than it
has, is told as a bound.
"""

from __future__ import annotations

import math
import os
import shutil
import sys
import time
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_only

from data_prep.machine import cores
from pretrain.events import Events
from pretrain.health import interval
from pretrain.loader import make_loader
from pretrain.run_folder import Checkpoints, MetricsLog, RunFolder
from pretrain.settings import PlanSettings, PretrainSettings
from pretrain.stages import follows
from pretrain.train import Prepared, make_dataset, plan_objective, prepare

STEPS = 30
SETTLED = 10
"""Steps before the first that counts: caches fill, libraries choose their kernels."""
ROWS = 5
"""Steps of a logged row; each row makes the host wait for the device."""
NETWORKS = {"100 Gbit/s Ethernet": 12.5e9, "400 Gbit/s InfiniBand": 50e9}
"""Bytes a second into a node, of what nodes are often joined by."""


@dataclass(frozen=True)
class Measured:
    """What the first steps cost; seconds and bytes.

    Attributes:
        steps: that were made.
        ranks: that made them together.
        per_step: of one optimiser step, its share of waiting for data included.
        data_wait: that share.
        start: from the command to the first step, what first steps take longer included.
        look: at the features.
        picture: of the fixed samples.
        save: of a checkpoint.
        checkpoint: its size.
        preview: size of a picture.
        memory: of rank 0: on a GPU the most that tensors took, on a CPU what it has resident.
        loader: crops that the loader of a rank gives in a second, if nobody computes.
        parameters: that are trained.
    """

    steps: int
    ranks: int
    per_step: float
    data_wait: float
    start: float
    look: float
    picture: float
    save: float
    checkpoint: int
    preview: int
    memory: float
    loader: float
    parameters: int


@dataclass(frozen=True)
class Plan:
    """What a whole run will take.

    Attributes:
        seconds: of one uninterrupted start, from the command to its end.
        parts: what of it goes where.
        device_hours: of all ranks.
        disk: bytes in the run's folder at most, while a checkpoint is written.
        saves: checkpoints that are written.
        measured: what this follows from.
    """

    seconds: float
    parts: dict[str, float]
    device_hours: float
    disk: int
    saves: int
    measured: Measured


def plan(stages: Mapping[str, PlanSettings]) -> dict[str, Any]:
    """Measures each stage of a recipe, and says what all of them will take.

    Raises:
        InputError: wrong settings or corpus; what `prepare` finds.
    """
    one = next(iter(stages.values()))
    folder, first = one.runs / f".plan-{one.run}", one.init
    plans: dict[str, Plan] = {}
    before: Path | None = None
    main = rank_zero_only.rank == 0
    began = _process_began()  # imports and checks are a part of the first start
    with RunFolder(folder).lease() if main else nullcontext():
        if main:
            _clear(folder)  # of one that was killed
        try:
            for name, settings in stages.items():
                if follows(settings, first, before):
                    settings = settings.model_copy(update={"init": before})
                prepared = prepare(_short(settings, folder))
                prepared.train()
                before = prepared.run.path
                if main:  # the others train the next stage with it
                    plans[name] = added_up(settings, _measure(prepared, time.time() - began))
                    print(as_text(name, settings, plans[name]))
                began = time.time()
        finally:
            if main:
                _clear(folder)
    if main:
        with suppress(OSError):  # of the next plan already
            folder.rmdir()
    if not main:
        sys.exit(0)  # rank 0 tells
    total = sum(found.seconds for found in plans.values())
    if len(plans) > 1:
        print(f"all {len(plans)} stages: {total / 3600:.3g} hours")
    return {"seconds": total, "stages": {name: asdict(found) for name, found in plans.items()}}


def _clear(folder: Path) -> None:
    for run in folder.glob("*/"):
        shutil.rmtree(run, ignore_errors=True)


def _short(settings: PlanSettings, folder: Path) -> PretrainSettings:
    """The run's first steps: alike for each rank, on the ranks that are there."""
    machine = settings.trainer
    devices, nodes = machine.devices, machine.nodes
    launched = {"SLURM_PROCID", "TORCHELASTIC_RUN_ID"} & os.environ.keys()
    if not launched:
        devices, nodes = min(devices, _there(settings)), 1
    share = devices * nodes / settings.ranks
    changed = {
        **settings.model_dump(),
        "runs": folder,
        "steps": STEPS,
        "batch_size": round(settings.batch_size * share),
        "trainer": machine.model_copy(update={"devices": devices, "nodes": nodes}).model_dump(),
        "warmup": min(settings.warmup, STEPS - 1),
        "log_every": ROWS,
        "save_every": STEPS,
        "preview_every": STEPS if settings.preview_every else 0,
        "loggers": (),
    }
    return PretrainSettings.model_validate(changed)


def _there(settings: PretrainSettings) -> int:
    if settings.trainer.accelerator != "cpu" and torch.cuda.is_available():
        return torch.cuda.device_count()
    return max(1, cores() // (settings.trainer.threads or 1))


def _measure(prepared: Prepared, spent: float) -> Measured:
    """What a training that took so many seconds, its start included, has written down of them."""
    settings, run = prepared.settings, prepared.run
    rows = MetricsLog(run.path / "metrics.csv", STEPS).rows()
    late = [row for row in rows if row["step"] > SETTLED]
    per_step = sum(row["seconds_per_step"] for row in late) / len(late)
    looks = MetricsLog(run.path / "health.csv", STEPS).rows()
    events = Events(run.path)
    pictures = [float(e["seconds"]) for e in events.read() if e["event"] == "pictured"]
    (start,) = events.starts()
    apart = sum(row["seconds"] for row in looks) + sum(pictures) + sum(start.saves)
    images = [path.stat().st_size for path in (run.path / "previews").glob("step-*.png")]
    return Measured(
        steps=STEPS,
        ranks=settings.ranks,
        per_step=per_step,
        data_wait=sum(row["data_wait"] for row in late) / len(late),
        start=spent - apart - STEPS * per_step,
        look=min((row["seconds"] for row in looks), default=0.0),
        picture=min(pictures, default=0.0),
        save=start.saves[-1],
        checkpoint=start.bytes,
        preview=max(images, default=0),
        memory=max(row["memory_gib"] for row in rows) * 2**30,
        loader=_loader_alone(prepared),
        parameters=sum(p.numel() for p in prepared.make().parameters() if p.requires_grad),
    )


def _process_began() -> float:
    """When this process was started, in seconds since 1970."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        up = float(Path("/proc/uptime").read_text().split()[0])
        return time.time() - up + ticks / os.sysconf("SC_CLK_TCK")
    except OSError:  # no Linux
        return time.time()


def _loader_alone(prepared: Prepared) -> float:
    """Samples a second of one rank's loader, without training."""
    settings = prepared.settings
    crops = plan_objective(settings, prepared.channels)().crops
    ranks = settings.ranks
    loader = make_loader(
        make_dataset(settings, prepared.corpus, crops),
        batch_size=settings.batch_size,
        first_step=0,
        last_step=STEPS,
        accumulate=settings.micro_steps,
        workers=settings.trainer.workers,
        world=ranks,
        nodes=settings.trainer.nodes,
    )
    batches = iter(loader)
    # A batch has a key for each crop.
    given = [len(next(batches)["key"]) for _ in range(1 + settings.trainer.workers)]
    began, later = time.perf_counter(), 0
    for batch in batches:
        later += len(batch["key"])
    rate = later / (time.perf_counter() - began) if later else float(sum(given))
    return rate / crops.main


def added_up(settings: PretrainSettings, one: Measured) -> Plan:
    """What `settings.steps` steps take, if each is as those that were measured."""
    steps = settings.steps
    by_clock = max(1, math.floor(60 * settings.save_minutes / one.per_step))
    saves = math.ceil(steps / min(settings.save_every, by_clock))
    pictures = 1 + math.ceil(steps / settings.preview_every) if settings.preview_every else 0
    every = settings.health.every
    if every == "auto":
        every = interval(one.look, one.per_step)
    looks = 2 + steps // every if every else 0
    computing = steps * one.per_step * (1 - one.data_wait)
    parts = {
        "start": one.start,
        "computing": computing,
        "waiting for data": steps * one.per_step * one.data_wait,
        "saving": saves * one.save,
        "looks and pictures": looks * one.look + pictures * one.picture,
    }
    ranks = settings.ranks
    seconds = sum(parts.values())
    return Plan(
        seconds=seconds,
        parts=parts,
        device_hours=ranks * seconds / 3600,
        disk=(Checkpoints.KEEP + 1) * one.checkpoint + pictures * one.preview,
        saves=saves,
        measured=one,
    )


def as_text(name: str, settings: PretrainSettings, found: Plan) -> str:
    """The plan in lines."""
    one, machine = found.measured, settings.trainer
    ranks = settings.ranks
    shares = ", ".join(
        f"{part} {seconds / found.seconds:.1%}" for part, seconds in found.parts.items()
    )
    times = one.loader / max(1e-9, settings.batch_size / ranks / one.per_step)
    where = "rank 0's tensors" if torch.cuda.is_available() else "rank 0's process"
    lines = [
        f"{name or settings.run}: {found.seconds / 3600:.3g} hours for {settings.steps:,} steps of "
        f"{settings.batch_size} samples on {ranks} rank{'s' if ranks > 1 else ''}, "
        f"{found.device_hours:.3g} device-hours",
        f"  measured: {STEPS - SETTLED} of {one.steps} steps on {one.ranks} of {ranks} ranks, "
        f"{one.per_step:.4g} s a step; {shares}",
        f"  data: {one.data_wait:.1%} of a step is waiting; the loader of a rank "
        f"({machine.workers} workers) alone gives {one.loader:.4g} samples/s, "
        f"{times:.2g} times what it takes",
        f"  memory: {one.memory / 2**30:.2f} GiB of {where}; loader's workers apart",
        f"  disk: {found.disk / 2**30:.2f} GiB in the run's folder; a checkpoint of "
        f"{one.checkpoint / 2**20:,.0f} MiB takes {one.save:.2g} s, {found.saves} times",
    ]
    if ranks > one.ranks:
        lines.append(_between(settings, one, ranks))
    return "\n".join(lines)


def _between(settings: PretrainSettings, one: Measured, ranks: int) -> str:
    """What the gradients' way between ranks that are not here adds at most."""
    moved = 2 * (ranks - 1) / ranks * 4 * one.parameters
    nodes = settings.trainer.nodes
    if nodes == 1:
        return (
            f"  not measured: the sum of {4 * one.parameters / 2**20:,.0f} MiB of gradients over "
            f"{ranks} devices of a node, as a rule within the backward pass; plan on that node"
        )
    bounds = ", ".join(
        f"{moved / speed:.2g} s ({moved / speed / one.per_step:.0%}) at {network}"
        for network, speed in NETWORKS.items()
    )
    return (
        f"  not measured: the sum of {4 * one.parameters / 2**20:,.0f} MiB of gradients over "
        f"{nodes} nodes; a step gains at most {bounds}, if nothing of it hides behind the "
        "backward pass"
    )
