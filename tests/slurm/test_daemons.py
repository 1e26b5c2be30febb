"""Jobs of a real SLURM: whatever ends a start, the run comes back and ends as if nothing had been.

Two tasks train together by DDP on a CPU; weights are compared to the last bit.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from lab import Lab, call
from launched import STEPS, Run, environment, same

from data_prep.errors import InputError
from slurm.discover import init
from slurm.launch import cancel, launch_sweep, logs, status
from slurm.settings import cluster_of

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(400)]


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


def test_a_cancelled_job_does_not_come_back(
    lab: Lab, pretrain_corpus: Path, tmp_path: Path
) -> None:
    run = Run(lab, pretrain_corpus, tmp_path, "cancelled")
    run.until_step(10)
    cancel(run.path)
    lab.until(lambda: lab.state(run.job) == "CANCELLED", 60, "cancelled")
    with pytest.raises(AssertionError, match="did not come true in 15 s"):
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
    # A task that was killed for the wrong input of another: srun gives the higher code of the two.
    killed = """['srun() { touch "${VOXELITH_REFUSED}"; return 143; }']"""
    run = Run(lab, pretrain_corpus, tmp_path / "runs", "killed", cluster__environment=killed)
    run.until_state("FAILED", 90)
    assert run.restarts == 0 and lab.job(run.job)["ExitCode"] == "2:0"
    crash = '["srun() { return 9; }"]'
    run = Run(lab, pretrain_corpus, tmp_path / "runs", "crash", cluster__environment=crash)
    run.until_state("FAILED", 120)
    assert run.restarts == 1
    assert "the second time after no checkpoint: not started again" in logs(run.path)
