"""A pretraining as a job of the lab, and what must be true of it whatever ended its starts."""

from __future__ import annotations

import csv
import json
import re
import sys
from pathlib import Path

import torch
from lab import Lab

from slurm.launch import launch, log_of, logs, status

STEPS = 200
TINY = {
    "backbone.features": "[4,6]", "backbone.strides": "[1,2]", "backbone.blocks": "[1,1]",
    "objective.block": 4,
}  # fmt: skip

RECORDER = """\
#!{python}
# The command, and a line for each step: which samples came to the objective of this rank.
import json
import os
import sys

import voxelith
from pretrain.objectives.cnn_mae import CnnMAE

forward = CnnMAE.forward
file = open(__file__ + "-" + os.environ["SLURM_PROCID"], "a")


def recording(self, batch, progress):
    if batch.image.device.type != "meta":  # the try before the start
        print(json.dumps([self.loop.step, list(batch.keys)]), file=file, flush=True)
    return forward(self, batch, progress)


CnnMAE.forward = recording
sys.exit(voxelith.main())
"""


class Run:
    """A launched pretraining of two tasks."""

    def __init__(self, lab: Lab, corpus: Path, runs: Path, name: str, **changes: object) -> None:
        self.lab, self.path = lab, runs / name
        self.recorder = runs / f"{name}.recorder" / "voxelith"
        self.recorder.parent.mkdir(parents=True)
        self.recorder.write_text(RECORDER.format(python=sys.executable))
        self.recorder.chmod(0o755)
        settings = {
            "corpus": corpus, "run": name, "runs": runs, "backbone": "resenc_small",
            "objective": "cnn_mae", "crop_size": "[8,12,8]", **TINY, "steps": STEPS,
            "batch_size": 4,
            "warmup": 5, "log_every": 1, "save_every": 100000, "cluster.gpus_per_node": 0,
            "cluster.tasks_per_node": 2, "cluster.cpus_per_task": 1, "cluster.memory": 3000,
            "cluster.partition": "main", "cluster.time": "00:10:00", "health.every": 0,
            "trainer.threads": 1,
            "cluster.environment": f"['export PATH={self.recorder.parent}:$PATH']",
        } | {key.replace("__", "."): value for key, value in changes.items()}  # fmt: skip
        found = launch("pretrain", [f"{key}={value}" for key, value in settings.items()])
        self.job = str(found["job"])

    @property
    def rows(self) -> list[int]:
        file = self.path / "metrics.csv"
        if not file.exists():
            return []
        with file.open(newline="") as opened:
            return [int(row["step"]) for row in csv.DictReader(opened) if row.get("step")]

    @property
    def restarts(self) -> int:
        return int(self.lab.job(self.job)["Restarts"])

    @property
    def log(self) -> Path:
        return log_of(self.path, self.job)

    @property
    def starts(self) -> list[str]:
        """What each start said first."""
        return re.findall(rf"^start \d+ of job {self.job} .*", self.log.read_text(), re.MULTILINE)

    def until_step(self, step: int) -> None:
        self.lab.until(lambda: self.rows[-1:] >= [step], 120, f"step {step} of {self.path.name}")

    def until_state(self, state: str, seconds: float = 200) -> None:
        try:
            ends = {state, "FAILED", "COMPLETED", "CANCELLED", "TIMEOUT"}
            self.lab.until(lambda: self.lab.state(self.job) in ends, seconds, state)
            assert self.lab.state(self.job) == state
        except AssertionError as error:
            raise AssertionError(f"{error}\n{logs(self.path)}\n{status(self.path)}") from None

    def samples(self) -> dict[tuple[int, int], list[str]]:
        """Keys that each rank was given at each step; a step that was done again had the same."""
        found: dict[tuple[int, int], list[str]] = {}
        for rank in (0, 1):
            for line in Path(f"{self.recorder}-{rank}").read_text().splitlines():
                step, keys = json.loads(line)
                assert found.setdefault((rank, step), keys) == keys, (rank, step)
        return found

    def weights(self) -> dict[str, torch.Tensor]:
        (path,) = sorted((self.path / "checkpoints").glob(f"step-{STEPS:08d}.pt"))
        return dict(torch.load(path, weights_only=True)["objective"])


def same(run: Run, whole: Run, restarts: int = 1) -> None:
    run.until_state("COMPLETED")
    assert len(run.starts) == restarts + 1, run.log.read_text()
    assert run.rows == list(range(1, STEPS + 1))  # none twice, none missing
    assert len(run.samples()) == 2 * STEPS
    assert run.samples() == whole.samples()
    one, other = whole.weights(), run.weights()
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def environment(pid: str) -> bytes:
    return Path(f"/proc/{pid}/environ").read_bytes()
