"""More that ends a start on a real cluster, and signals that come while another is heeded."""

from __future__ import annotations

import os
import re
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest
from lab import Lab, call
from launched import STEPS, Run, same

from pretrain.events import Events
from slurm.launch import render
from slurm.settings import ClusterSettings

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(400)]


def tasks(run: Run) -> list[int]:
    """The two processes that train: what slurmstepd has started."""
    found = call("pgrep", "-f", f"voxelith pretrain .*run={run.path.name} .*{run.path.parent}")
    return [pid for pid in map(int, found.split()) if parent(pid) == "slurmstepd"]


def of_job(run: Run) -> list[int]:
    """Every process that a job has started, its script among them."""
    mark = f"SLURM_JOB_ID={run.job}\0".encode()
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if mark in (folder / "environ").read_bytes() + b"\0":
                found.append(int(folder.name))
    return found


def parent(pid: int) -> str:
    with suppress(FileNotFoundError):
        status = Path(f"/proc/{pid}/status").read_text()
        (above,) = re.findall(r"^PPid:\s+(\d+)$", status, re.MULTILINE)
        return Path(f"/proc/{above}/comm").read_text().strip()
    return ""


def test_a_real_time_limit_is_near(
    lab: Lab, whole: Run, pretrain_corpus: Path, tmp_path: Path
) -> None:
    """SLURM sends the signal; the tasks stand still until it has, since they would be done."""
    run = Run(lab, pretrain_corpus, tmp_path, "timed", **{
        "cluster.time": "00:02:00", "cluster.signal": "USR2@60",
    })  # fmt: skip
    run.until_step(20)
    pids = tasks(run)
    assert len(pids) == 2
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)

    def pending(pid: int) -> bool:
        with suppress(FileNotFoundError):
            return waits(pid)
        return True  # SLURM lets processes go on that it sends a signal

    def waits(pid: int) -> bool:
        text = Path(f"/proc/{pid}/status").read_text()
        (waiting,) = (line.split()[1] for line in text.splitlines() if line.startswith("ShdPnd"))
        return bool(int(waiting, 16) & 1 << (signal.SIGUSR2 - 1))

    lab.until(lambda: all(map(pending, pids)), 100, "USR2 of SLURM")
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
    lab.until(lambda: run.restarts == 1, 60, "requeued")
    same(run, whole)


@pytest.mark.slow
def test_a_time_limit_within_a_step_is_not_the_end(lab: Lab, tmp_path: Path) -> None:
    """A task that is told and does not get to the end of its step; `--requeue` is not for that."""
    cluster = ClusterSettings(
        kind="slurm", partition="main", time="00:01:00", signal="USR2@20", cpus_per_task=1
    )
    script = render(tmp_path / "late", ("pretrain",), cluster)
    busy = "bash -c 'trap : USR2; while :; do sleep 1; done'"
    stands = re.compile(r"^(srun .*\\\n) +\S+ .*&$", re.MULTILINE)
    script, count = stands.subn(rf"\1 {busy} &", script)
    assert count == 1
    (tmp_path / "late" / "launch").mkdir(parents=True)
    (tmp_path / "job.sbatch").write_text(script)
    job = call("sbatch", "--parsable", str(tmp_path / "job.sbatch")).strip()

    def shown() -> str:
        return call("scontrol", "show", "job", "-o", job)

    lab.until(lambda: " Restarts=1 " in shown(), 240, "requeued")
    assert (tmp_path / "late" / "launch" / "told").exists()
    call("scancel", job)
    lab.until(lambda: "JobState=CANCELLED" in shown(), 60, "cancelled")


def test_a_requeue_from_outside(
    lab: Lab, whole: Run, pretrain_corpus: Path, tmp_path: Path
) -> None:
    run = Run(lab, pretrain_corpus, tmp_path, "outside")
    run.until_step(20)
    call("scontrol", "requeue", run.job)
    same(run, whole)
    first, second = Events(run.path).starts()
    assert first.end == "preempted" and second.step == first.last >= 20


def test_signals_that_come_while_another_is_heeded(
    lab: Lab, whole: Run, pretrain_corpus: Path, tmp_path: Path
) -> None:
    """A time limit that is near, and preempted while the state is saved, several times."""
    run = Run(lab, pretrain_corpus, tmp_path, "burst")
    run.until_step(20)
    pids, end = tasks(run), time.monotonic() + 2
    while time.monotonic() < end:
        for name in (signal.SIGUSR2, signal.SIGTERM):
            for pid in pids:
                with suppress(ProcessLookupError):  # SLURM has ended it
                    os.kill(pid, name)
        time.sleep(0.003)
    lab.until(lambda: run.restarts == 1, 60, "requeued")
    same(run, whole)


def test_a_slurmd_that_is_killed_and_comes_back_ends_nothing(
    lab: Lab, whole: Run, pretrain_corpus: Path, tmp_path: Path
) -> None:
    run = Run(lab, pretrain_corpus, tmp_path, "slurmd")
    run.until_step(20)
    lab.kill_slurmd()
    time.sleep(2)
    lab.start_slurmd()
    same(run, whole, restarts=0)


def test_a_node_that_fails_is_a_start_that_ended(
    lab: Lab, whole: Run, pretrain_corpus: Path, tmp_path: Path
) -> None:
    """All that runs there is gone at once, as with a node that loses its power.

    The batch script, its srun and the tasks too: a script that outlived them would see them die,
    and ask for a start of its own.
    """
    run = Run(lab, pretrain_corpus, tmp_path, "node", save_every=10)
    run.until_step(25)
    lab.kill_slurmd()
    steps = call("pgrep", "-f", rf"slurmstepd: \[{run.job}\.").split()
    for pid in [*map(int, steps), *of_job(run)]:
        with suppress(ProcessLookupError):  # its parent went before
            os.kill(pid, signal.SIGKILL)
    assert run.rows[-1] < STEPS
    # Of a node that comes back SLURM asks after jobs that began 20 s before, and no younger ones.
    time.sleep(25)
    lab.start_slurmd()
    lab.until(lambda: run.restarts == 1, 60, "requeued")
    same(run, whole)
