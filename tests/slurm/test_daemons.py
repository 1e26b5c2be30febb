"""Jobs of a real SLURM: whatever ends a start, the run comes back and ends as if nothing had been.

Two tasks train together by DDP on a CPU; weights are compared to the last bit.
"""

from __future__ import annotations

import csv
import subprocess
from pathlib import Path

import pytest
import torch
from lab import Lab, call

from data_prep.errors import InputError
from slurm.discover import init
from slurm.launch import cancel, launch, launch_sweep, logs, status
from slurm.settings import cluster_of

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(400)]
STEPS = 200
TINY = {
    "backbone.features": "[4,6]", "backbone.strides": "[1,2]", "backbone.blocks": "[1,1]",
    "objective.block": 4,
}  # fmt: skip


class Run:
    """A launched pretraining of two tasks."""

    def __init__(self, lab: Lab, corpus: Path, runs: Path, name: str, **changes: object) -> None:
        self.lab, self.path = lab, runs / name
        settings = {
            "corpus": corpus, "run": name, "runs": runs, "backbone": "resenc_small",
            "objective": "cnn_mae", "crop_size": "[8,12,8]", **TINY, "steps": STEPS,
            "batch_size": 4,
            "warmup": 5, "log_every": 1, "save_every": 100000, "cluster.gpus_per_node": 0,
            "cluster.tasks_per_node": 2, "cluster.cpus_per_task": 1, "cluster.memory": 3000,
            "cluster.partition": "main", "cluster.time": "00:10:00", "health.every": 0,
            "trainer.threads": 1,
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

    def until_step(self, step: int) -> None:
        self.lab.until(lambda: self.rows[-1:] >= [step], 120, f"step {step} of {self.path.name}")

    def until_state(self, state: str, seconds: float = 200) -> None:
        try:
            ends = {state, "FAILED", "COMPLETED", "CANCELLED", "TIMEOUT"}
            self.lab.until(lambda: self.lab.state(self.job) in ends, seconds, state)
            assert self.lab.state(self.job) == state
        except AssertionError as error:
            raise AssertionError(f"{error}\n{logs(self.path)}\n{status(self.path)}") from None

    def weights(self) -> dict[str, torch.Tensor]:
        (path,) = sorted((self.path / "checkpoints").glob(f"step-{STEPS:08d}.pt"))
        return dict(torch.load(path, weights_only=True)["objective"])


@pytest.fixture(scope="session")
def whole(lab: Lab, pretrain_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that nothing ends before its time."""
    run = Run(lab, pretrain_corpus, tmp_path_factory.mktemp("whole"), "whole")
    run.until_state("COMPLETED")
    assert run.restarts == 0 and run.rows == list(range(1, STEPS + 1))
    return run


def same(run: Run, whole: Run, restarts: int = 1) -> None:
    run.until_state("COMPLETED")
    assert run.restarts == restarts
    assert run.rows == list(range(1, STEPS + 1))  # none twice, none missing
    one, other = whole.weights(), run.weights()
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_cluster_is_read_from_slurm_itself(lab: Lab, tmp_path: Path) -> None:
    found = init(tmp_path, "here")
    assert found["partition"] == "main"
    (warning,) = found["warnings"]
    assert "GraceTime=10 s" in warning
    settings, _ = cluster_of(["cluster=here", f"--config-dir={tmp_path}"])
    assert (settings.gpus_per_node, settings.cpus_per_task, settings.memory) == (0, 2, "3800M")


@pytest.mark.parametrize("name", ["USR2", "USR1"])
def test_near_its_time_limit_a_job_saves_and_comes_back(
    lab: Lab, whole: Run, pretrain_corpus: Path, tmp_path: Path, name: str
) -> None:
    run = Run(lab, pretrain_corpus, tmp_path, "limit")
    run.until_step(20)
    call("scancel", f"--signal={name}", run.job)
    lab.until(lambda: run.restarts == 1, 60, "requeued")
    assert len(list((run.path / "checkpoints").glob("step-*.pt"))) == 1
    same(run, whole)
    assert "waiting for the end of the job" in logs(run.path, 1000)


def test_a_preempted_job_comes_back(
    lab: Lab, whole: Run, pretrain_corpus: Path, tmp_path: Path
) -> None:
    run = Run(lab, pretrain_corpus, tmp_path, "preempted")
    run.until_step(20)
    words = ("-p", "urgent", "-n2", "--mem=3500", "--time=1", "-o", "/dev/null")
    urgent = call("sbatch", "--parsable", *words, "--wrap=sleep 1").strip()
    lab.until(lambda: lab.state(urgent) == "COMPLETED", 90, "the urgent job")
    assert 20 <= status(run.path)["saved_step"] < STEPS
    same(run, whole)


def test_a_task_that_is_killed_is_a_crash_and_comes_back(
    lab: Lab, whole: Run, pretrain_corpus: Path, tmp_path: Path
) -> None:
    run = Run(lab, pretrain_corpus, tmp_path, "killed", save_every=10)
    run.until_step(25)
    found = call("pgrep", "-f", f"voxelith pretrain .*run=killed .*runs={tmp_path}").split()
    tasks = [pid for pid in found if b"SLURM_PROCID=1" in environment(pid)]
    call("kill", "-9", tasks[0])
    same(run, whole)
    assert status(run.path)["crashes"] == 1


def environment(pid: str) -> bytes:
    return Path(f"/proc/{pid}/environ").read_bytes()


def test_a_cancelled_job_does_not_come_back(
    lab: Lab, pretrain_corpus: Path, tmp_path: Path
) -> None:
    run = Run(lab, pretrain_corpus, tmp_path, "cancelled")
    run.until_step(10)
    cancel(run.path)
    lab.until(lambda: lab.state(run.job) == "CANCELLED", 60, "cancelled")
    with pytest.raises(AssertionError):
        lab.until(lambda: lab.state(run.job) != "CANCELLED", 15)
    assert run.restarts == 0
    assert status(run.path)["saved_step"] >= 10  # what it had is not lost


def test_an_array_starts_again_what_failed_alone(
    lab: Lab, labelled_corpus: Path, tmp_path: Path
) -> None:
    """Six finetunings, one of which fails; its seed is told by the words of its element."""
    release = Path(__file__).parent.parent / "releases" / "encoder-7253723"
    fails = tmp_path / "fails"
    fails.touch()
    wrong = f'if [ -e {fails} ] && [ "${{SLURM_ARRAY_TASK_ID:-}}" = 4 ]; then exit 9; fi'
    words = [
        "task=hippocampus", f"corpus={labelled_corpus}", f"ckpt={release}", "labels=2",
        "seed=0,1,2", "init=pretrained,scratch", f"runs={tmp_path / 'runs'}", "steps=2",
        "batch_size=1", "warmup=1", "trainer.threads=1", "crop_size=[16,24,16]",
        "cluster.gpus_per_node=0", "cluster.cpus_per_task=1", "cluster.memory=1900",
        "cluster.partition=main", "cluster.array_limit=2", "cluster.max_restarts=0",
        f"cluster.environment={[wrong]!r}",
    ]  # fmt: skip
    first = launch_sweep(words)
    assert first["to_start"] == 6 and "--array=0-5%2" in first["script"]
    with pytest.raises(InputError, match=r"its job \d+ is .*launch cancel"):
        launch_sweep(words)
    ends = {"COMPLETED", "FAILED"}
    runs = tmp_path / "runs"
    lab.until(lambda: set(status(runs)["elements"]) <= ends, 240, "the array")
    assert status(runs)["elements"] == {"COMPLETED": 5, "FAILED": 1}
    assert status(runs)["runs_finished"] == 5
    before = {path: path.stat().st_mtime_ns for path in runs.glob("*/rows.csv")}
    fails.unlink()
    again = launch_sweep(words)
    assert again["to_start"] == 1
    lab.until(lambda: set(status(runs)["elements"]) <= ends, 120, "the rest")
    assert status(runs)["runs_finished"] == 6
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    assert launch_sweep(words)["to_start"] == 0


def test_what_no_restart_mends_is_not_started_again(
    lab: Lab, pretrain_corpus: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "corpus"
    subprocess.run(["cp", "-r", pretrain_corpus, broken], check=True)
    run = Run(lab, broken, tmp_path / "runs", "wrong", cluster__environment=f"[rm -r {broken}]")
    run.until_state("FAILED", 90)
    assert run.restarts == 0 and "error: corpus=" in logs(run.path)
    crash = '["srun() { return 9; }"]'
    run = Run(lab, pretrain_corpus, tmp_path / "runs", "crash", cluster__environment=crash)
    run.until_state("FAILED", 120)
    assert run.restarts == 1
    assert "the second time after no checkpoint: not started again" in logs(run.path)
