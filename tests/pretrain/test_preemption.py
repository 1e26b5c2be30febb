"""Signals are heard by the main process alone, agreed on by all ranks, and end a job as it must."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from test_loop import settings, start, steps, weights

from pretrain.preemption import (
    PATIENCE_SECONDS,
    REQUEUE_CODE,
    Ask,
    Preempted,
    Preemption,
    end_of_job,
    in_slurm,
    job_id,
)
from pretrain.train import pretrain

TASK = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_JOB_NAME": "x"}


def test_handlers_are_put_back_unless_the_run_was_preempted() -> None:
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)]
    with Preemption() as heard:
        assert heard.asked is Ask.NOTHING
        os.kill(os.getpid(), signal.SIGTERM)
        assert heard.asked is Ask.STOP
        os.kill(os.getpid(), signal.SIGUSR2)
        os.kill(os.getpid(), signal.SIGTERM)
        assert heard.asked is Ask.REQUEUE  # what was asked for stays
    after = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)]
    assert before == after
    try:
        with pytest.raises(Preempted), Preemption():
            raise Preempted(Ask.STOP, 3)
        os.kill(os.getpid(), signal.SIGTERM)  # a second one does not end the process
    finally:
        for number, handler in zip(
            (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2), before, strict=True
        ):
            signal.signal(number, handler)


def test_a_forked_child_does_not_hear() -> None:
    with Preemption() as heard:
        child = os.fork()
        if not child:
            os.kill(os.getpid(), signal.SIGUSR1)
            os._exit(int(heard.asked))
        _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0


def test_a_signal_that_comes_before_the_training_is_heeded_at_its_first_step(
    pretrain_corpus: Path, tmp_path: Path
) -> None:
    run = tmp_path / "runs" / "early"
    words = [
        f"corpus={pretrain_corpus}", "run=early", f"runs={tmp_path / 'runs'}", "objective=cnn_mae",
        "backbone=resenc_small", "backbone.features=[4,6]", "backbone.strides=[1,2]",
        "backbone.blocks=[1,1]", "objective.block=4", "crop_size=[8,12,8]", "batch_size=2",
        "steps=40", "warmup=2", "trainer=cpu", "trainer.workers=0",
    ]  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-m", "voxelith", "pretrain", *words], env=os.environ | TASK
    )
    status = Path(f"/proc/{process.pid}/status")

    def hears() -> bool:
        caught = next(line for line in status.read_text().splitlines() if "SigCgt" in line)
        return bool(int(caught.split()[1], 16) & 1 << (signal.SIGUSR2 - 1))

    while not hears():
        time.sleep(0.001)
    assert not run.exists()
    process.send_signal(signal.SIGUSR2)
    assert process.wait() == REQUEUE_CODE
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000001.pt"]


@pytest.mark.parametrize("name", ["SIGUSR1", "SIGTERM"])
def test_a_signal_saves_and_the_run_ends_the_same(
    pretrain_corpus: Path, tmp_path: Path, name: str
) -> None:
    whole = pretrain(settings(pretrain_corpus, tmp_path, "whole", save_every=1000))
    chosen = settings(pretrain_corpus, tmp_path, "cut", save_every=1000, log_every=1)
    process = start(chosen, tmp_path)
    run = tmp_path / "cut"
    while process.poll() is None and not (run / "metrics.csv").exists():
        time.sleep(0.002)
    process.send_signal(getattr(signal, name))
    wanted = REQUEUE_CODE if name == "SIGUSR1" else 128 + signal.SIGTERM
    assert process.wait() == wanted
    pretrain(chosen)
    assert steps(run) == list(range(1, 41))  # no row twice, none missing
    one, other = weights(whole), weights(run)
    assert all(torch.equal(one[n], other[n]) for n in one)


def test_slow_steps_are_saved_by_the_clock(pretrain_corpus: Path, tmp_path: Path) -> None:
    run = pretrain(
        settings(
            pretrain_corpus, tmp_path, "slow", steps=3, save_every=1000, save_minutes=1e-9,
            log_every=1000,
        )
    )  # fmt: skip
    assert [p.stem for p in sorted((run / "checkpoints").iterdir())] == [
        "step-00000002",
        "step-00000003",
    ]


def test_what_slurm_tells_is_read() -> None:
    assert in_slurm(TASK) and not in_slurm({}) and not in_slurm({"SLURM_JOB_ID": "7"})
    assert not in_slurm({**TASK, "SLURM_JOB_NAME": "bash"})
    assert job_id(TASK) == "7"
    assert job_id({**TASK, "SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "3"}) == "5_3"


def test_a_job_ends_as_the_scheduler_wants_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []
    calls, tools = tmp_path / "calls", tmp_path / "bin"
    tools.mkdir()
    tool = tools / "scontrol"
    tool.write_text(f'#!/bin/sh\necho "$@" >> {calls}\n')
    tool.chmod(0o755)

    def ended(ask: Ask, **environment: str) -> int:
        slept.clear()
        calls.unlink(missing_ok=True)
        return end_of_job(Preempted(ask, 9), environment=environment, sleep=slept.append)

    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    assert (ended(Ask.STOP), slept, calls.exists()) == (143, [], False)  # no SLURM
    assert (ended(Ask.REQUEUE), slept, calls.exists()) == (85, [], False)
    # TERM: stays alive, and never calls scontrol: it may be the user's scancel.
    assert (ended(Ask.STOP, **TASK), slept, calls.exists()) == (143, [PATIENCE_SECONDS], False)
    assert (ended(Ask.REQUEUE, **TASK), slept) == (85, [PATIENCE_SECONDS])
    assert calls.read_text() == "requeue 7\n"
    note = tmp_path / "saved"  # for the next start of the batch script
    ended(Ask.STOP, **TASK, VOXELITH_SAVED=str(note))
    assert note.exists()
    ended(Ask.STOP, **TASK, VOXELITH_SAVED=str(tmp_path / "absent" / "saved"))
    ended(Ask.REQUEUE, **{**TASK, "SLURM_PROCID": "1"})
    assert slept and not calls.exists()  # one rank asks for all
    tool.write_text("#!/bin/sh\nexit 1\n")
    assert (ended(Ask.REQUEUE, **TASK), slept) == (85, [])  # the batch script requeues
    monkeypatch.setenv("PATH", str(tmp_path))
    assert (ended(Ask.REQUEUE, **TASK), slept) == (85, [])


RANK = """
import os, sys, time
from datetime import timedelta
import torch.distributed as dist
from pretrain.collectives import Agreement
rank = int(sys.argv[1])
dist.init_process_group("gloo", rank=rank, world_size=2, timeout=timedelta(seconds=60))
agreement = Agreement()
heard = [agreement.ask(3 if (step, rank) == (2, 1) else 0) for step in range(5)]
time.sleep(0.2 * rank)
print(heard, agreement.last())
dist.destroy_process_group()
"""


def test_ranks_hear_of_each_other_one_step_later() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks: list[Any] = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank)], env=environment, stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    assert [rank.communicate()[0] for rank in ranks] == ["[0, 0, 0, 3, 0] 0\n"] * 2


def test_a_signal_between_the_making_of_a_training_and_its_begin_is_heard() -> None:
    """While the checkpoint is read, the module's own handler hears it."""
    code = (
        "import os, signal, pretrain.preemption as p\n"
        "p.listen()\n"
        "made = p.Preemption()\n"
        "os.kill(os.getpid(), signal.SIGUSR2)\n"
        "with made:\n"
        "    print(made.asked.name)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | TASK, capture_output=True, text=True
    )
    assert done.stdout.strip() == "REQUEUE", done.stderr
