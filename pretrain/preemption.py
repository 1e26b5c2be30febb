"""Ended by a scheduler, and lost no more than the step that was under way.

A signal handler sets a flag, in the main process of a rank and nowhere else: saving inside a
handler meets a model in the middle of a step, and workers that a handler was forked into would save
as well (both happen to Lightning's own requeueing, which is off here). Ranks agree on what they do
at the end of an optimiser step; the flag of one is the flag of all.

SLURM says two things. USR1 or USR2 (`#SBATCH --signal`): the time limit is near; the job is to be
put back in the queue. TERM: the job was preempted, or cancelled by its user. The two cannot be told
apart, and SLURM itself requeues what it preempts, but not what ended by itself, whatever its exit
code: so the state is saved, and the process waits to be killed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from enum import IntEnum
from pathlib import Path
from types import FrameType
from typing import Any

REQUEUE_CODE = 85
"""Exit code of a run that is to be started again: the batch script requeues by it."""

SAVED = "VOXELITH_SAVED"
"""Environment variable with the path of the note that a preempted run has saved its state."""

PATIENCE_SECONDS = 3600
"""How long a job waits for the end that SLURM has announced."""


class Ask(IntEnum):
    """What is to be done at the end of a step; of several ranks' wishes the largest counts."""

    NOTHING = 0
    SAVE = 1
    STOP = 2
    REQUEUE = 3


SIGNALS = {
    signal.SIGTERM: Ask.STOP,
    signal.SIGUSR1: Ask.REQUEUE,
    signal.SIGUSR2: Ask.REQUEUE,
}


_asked = Ask.NOTHING


def listen() -> None:
    """Hears signals from a task's first moment to its last, also where no training could stop.

    Imports and checks take longer than some jobs have, and what follows a training takes long as
    well: a signal that arrived meanwhile would end the process, which is a crash and not what was
    asked for. A training heeds it at its first step (`Preemption` takes over meanwhile), and what
    follows by `heed`. Outside of a job's task nothing changes.
    """
    for number in SIGNALS if in_slurm() else ():
        signal.signal(number, _hear)


def _hear(number: int, frame: FrameType | None) -> None:
    global _asked
    _asked = max(_asked, SIGNALS[signal.Signals(number)])


def heed(step: int) -> None:
    """Ends a run between two pieces of the work that follows its last step, if it was asked to.

    Raises:
        Preempted: a signal has come, and all that is done is kept.
    """
    if _asked is not Ask.NOTHING:
        raise Preempted(_asked, step)


class Preempted(SystemExit):
    """The state is saved, and the run ends before its last step.

    Attributes:
        ask: why.
        step: that was saved.
        exit_code: of the process.
    """

    def __init__(self, ask: Ask, step: int) -> None:
        self.exit_code = REQUEUE_CODE if ask is Ask.REQUEUE else 128 + int(signal.SIGTERM)
        super().__init__(self.exit_code)
        self.ask = ask
        self.step = step


class Preemption:
    """Hears signals while a run trains; the handlers of before are put back afterwards.

    Where the run is preempted they stay, so that a signal which comes once more, as SLURM's do,
    does not end the process before it was meant to.
    """

    def __init__(self) -> None:
        self.asked = _asked
        self._process = os.getpid()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Preemption:
        self.asked = max(self.asked, _asked)  # since it was made, before a handler was its own
        self.install()
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is None or not issubclass(kind, Preempted):
            for number, handler in self._before.items():
                signal.signal(number, handler)
            if _hear in self._before.values():
                global _asked
                _asked = max(_asked, self.asked)  # in the last step, too late for it

    def install(self) -> None:
        """Hears the signals, as long as the process lives where `with` is not used."""
        if threading.current_thread() is not threading.main_thread():
            return  # Python allows no other thread to; whoever started us hears of signals
        for number in SIGNALS:
            current = signal.getsignal(number)
            # nohup and the like: who started us does not want us to hear it.
            if current == signal.SIG_IGN:
                continue
            self._before[number] = current
            signal.signal(number, self._hear)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() == self._process:  # not a forked child, which inherits handlers
            self.asked = max(self.asked, SIGNALS[signal.Signals(number)])


def in_slurm(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process is a task of a SLURM job, and not of somebody's shell in one."""
    interactive = environment.get("SLURM_JOB_NAME") in ("bash", "interactive")
    return "SLURM_JOB_ID" in environment and "SLURM_PROCID" in environment and not interactive


def job_id(environment: Mapping[str, str] = os.environ) -> str:
    """What scontrol calls this job; an element of an array by its place in that."""
    array = environment.get("SLURM_ARRAY_JOB_ID")
    element = environment.get("SLURM_ARRAY_TASK_ID")
    if array and element:
        return f"{array}_{element}"
    return environment["SLURM_JOB_ID"]


def end_of_job(
    preempted: Preempted,
    *,
    environment: Mapping[str, str] = os.environ,
    sleep: Callable[[float], object] = time.sleep,
) -> int:
    """Ends a process whose run was preempted, as the scheduler wants it; see above.

    Returns:
        The exit code, where nobody has killed the process.
    """
    said = f"preempted at step {preempted.step}: the state is saved"
    first = environment.get("SLURM_PROCID", "0") == "0"
    if first and SAVED in environment:
        with contextlib.suppress(OSError):  # not there in a container that does not mount it
            Path(environment[SAVED]).touch()  # for the batch script, which may not live to be told
    if not in_slurm(environment):
        print(f"{said}; the same command goes on", file=sys.stderr)
        return preempted.exit_code
    if preempted.ask is Ask.REQUEUE:
        if shutil.which("scontrol") is None:
            print(f"{said}; scontrol is not here, the batch script requeues", file=sys.stderr)
            return preempted.exit_code
        if first and not _requeued(job_id(environment)):
            return preempted.exit_code
    if first:
        print(f"{said}; waiting for the end of the job", file=sys.stderr, flush=True)
    sleep(PATIENCE_SECONDS)
    return preempted.exit_code


def _requeued(job: str) -> bool:
    done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True)
    if done.returncode:
        print(
            f"scontrol requeue {job}: {(done.stderr or done.stdout).strip()}; the batch script "
            "requeues",
            file=sys.stderr,
        )
    return done.returncode == 0
