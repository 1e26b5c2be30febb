"""Ranks end together: where one dies, fails or hangs, all end soon, and say why.

A rank that fails leaves a note in the run folder before its connections close:

failures/rank-00001.json    number, host, step, what was raised, exit code

What the others then see is a broken connection, or nothing at all: NCCL waits for a rank that is
gone. So a thread of each process looks for notes of others, for processes that this one has started
and that are dead, for the one that has started it, and for a step that does not end. Whatever it
finds ends the process: first by the error that comes by itself, a few seconds later without asking.
"""

from __future__ import annotations

import atexit
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

from lightning.fabric.utilities.distributed import _set_num_threads_if_needed
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from lightning.pytorch.utilities import rank_zero_only

from data_prep.errors import CorruptionError, InputError, LostLeaseError, NeighbourError
from data_prep.files import read_note, write_json
from data_prep.references import without_secrets
from pretrain.collectives import is_of_another_rank

LOOK_SECONDS = 1.0
GRACE_SECONDS = 5.0
"""How long a process may take to end by itself once it is known that it must."""

_children: list[subprocess.Popen[bytes]] = []
"""Ranks 1, 2, ... of this machine, where this process is the one that has started them."""


class Ranks(DDPStrategy):
    """DDP whose processes are watched by `Neighbours`.

    Args:
        neighbours: that watch.
        threads: in which each rank computes by now; None: ranks of a machine share its cores.
    """

    def __init__(self, neighbours: Neighbours, threads: int | None = None, **kwargs: Any) -> None:
        # Longer than the watch, which says more of what hangs. Gradients lie in DDP's buckets: a
        # second copy of them would cost as much as the weights.
        wait = timedelta(minutes=neighbours.wait_minutes, seconds=60)
        super().__init__(timeout=wait, gradient_as_bucket_view=True, **kwargs)
        self.neighbours = neighbours
        self.threads = threads

    def _configure_launcher(self) -> None:
        assert self.cluster_environment is not None
        given = self.cluster_environment, self.num_processes, self.num_nodes
        self._launcher = _Launcher(*given, shares_cores=self.threads is None)

    def setup_environment(self) -> None:
        """Learns the rank before it waits for others."""
        assert self.cluster_environment is not None
        self.neighbours.rank = self.node_rank * self.num_processes + self.local_rank
        super().setup_environment()

    def on_exception(self, exception: BaseException) -> None:
        """Leaves the note while connections are open: others look for it when these close."""
        super().on_exception(exception)
        self.neighbours.note(exception)


class _Launcher(_SubprocessScriptLauncher):
    """Lightning's without its observer, which kills all processes and does not say why."""

    def __init__(self, *of_lightning: Any, shares_cores: bool) -> None:
        super().__init__(*of_lightning)
        self.shares_cores = shares_cores

    def launch(
        self, function: Callable[..., Any], *args: Any, trainer: Any = None, **more: Any
    ) -> Any:
        self.cluster_environment.validate_settings(
            num_devices=self.num_processes, num_nodes=self.num_nodes
        )
        if not self.cluster_environment.creates_processes_externally:
            self._call_children_scripts()
            _children.extend(self.procs)
            atexit.register(_end_children)
        if self.shares_cores:
            _set_num_threads_if_needed(num_processes=self.num_processes)
        return function(*args, **more)


def _end_children() -> None:
    """No process outlives the one that has started it, stopped ones neither."""
    until = time.monotonic() + 2 * GRACE_SECONDS
    for child in _children:
        with suppress(subprocess.TimeoutExpired):
            child.wait(max(0.0, until - time.monotonic()))
    for child in _children:
        if child.poll() is None:
            child.kill()
            child.wait()


class Neighbours:
    """What a rank knows of the others while it trains; a context around the training.

    Args:
        run: the run folder, which all ranks see.
        ranks: how many there are.
        wait_minutes: the longest that a step may take.
    """

    def __init__(self, run: Path, ranks: int, wait_minutes: float) -> None:
        self.folder = run / "failures"
        self.ranks = ranks
        self.wait_minutes = wait_minutes
        self.rank = rank_zero_only.rank or 0
        self.step = 0
        self._began: float | None = None
        self._ending = False
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Neighbours:
        if self.ranks > 1:
            # Those of an earlier start say nothing of this one.
            self._old = {path: _mark(path) for path in self._notes()}
            if self.rank == 0:
                for path in self._old:
                    path.unlink(missing_ok=True)
            self._parent = os.getppid() if _was_started() else None
            self._thread = threading.Thread(target=self._watch, name="neighbours", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        if self._ending and self._thread is not None:
            self._thread.join()  # it has said why, and ends this process: once is enough
        try:
            if self._thread is not None and isinstance(error, Exception):
                self.note(error)
                if is_of_another_rank(error):
                    raise self._cause(error) from None
        finally:
            self._over.set()

    def beat(self, step: int) -> None:
        """Says that the training goes on; `step` is the last that is done."""
        self.step, self._began = step, time.monotonic()

    def note(self, error: BaseException) -> None:
        """Leaves what happened for the others, unless it is they who made it happen."""
        if not isinstance(error, Exception) or isinstance(error, LostLeaseError):
            # Preempted: all end, each in its time and with a code of its own. Or another start has
            # the folder, whose ranks would take the note for one of theirs.
            self._over.set()
        elif self.ranks > 1 and not is_of_another_rank(error):
            problems = error.problems if isinstance(error, InputError) else None
            said = "\n".join(problems) if problems else f"{type(error).__name__}: {error}"
            self._write(self.rank, said, problems)

    def _write(self, rank: int, said: str, problems: list[str] | None = None) -> None:
        path = self._path(rank)
        with suppress(OSError):  # a full disk may be what happened
            if _mark(path) not in (None, self._old.get(path)):
                return  # this start's first
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(
                path,
                {
                    "rank": rank,
                    "host": socket.gethostname(),
                    "step": self.step,
                    "error": without_secrets(said),
                    "problems": problems and [without_secrets(one) for one in problems],
                },
            )

    def _path(self, rank: int) -> Path:
        return self.folder / f"rank-{rank:05d}.json"

    def _notes(self) -> list[Path]:
        return sorted(self.folder.glob("rank-*.json"))

    def _found(self) -> Exception | None:
        """What another rank's note of this start says, the first one's."""
        new = {path: _mark(path) for path in self._notes() if path != self._path(self.rank)}
        new = {path: mark for path, mark in new.items() if mark != self._old.get(path)}
        for path in sorted(new, key=lambda path: new[path] or 0):
            note = read_note(path)
            if not note:
                continue
            who = f"rank {note['rank']} on {note['host']}"
            if note["problems"]:
                return CorruptionError([f"{who}: {problem}" for problem in note["problems"]])
            return NeighbourError(f"{who} ended first, after step {note['step']}: {note['error']}")
        return None

    def _cause(self, error: BaseException) -> Exception:
        """Waits for the note of the rank that broke the connection."""
        until = time.monotonic() + GRACE_SECONDS
        while time.monotonic() < until:
            found = self._found()  # or that the watch has written in its place
            if found is not None:
                return found
            time.sleep(0.1)
        return NeighbourError(
            f"rank {self.rank} lost the connection to another rank after step {self.step}, and "
            "none has said why: a process was killed (out of memory?), or its machine failed; see "
            f"what whoever started the ranks says of it ({str(error).splitlines()[0]})"
        )

    def _look_at_children(self) -> None:
        """Speaks for a dead process that could not."""
        for number, child in enumerate(_children, start=1):
            code = child.poll()
            if code:
                how = f"was killed by {_signal(-code)}" if code < 0 else f"ended with code {code}"
                why = " (out of memory?)" if code == -signal.SIGKILL else ""
                problems = [f"{how}; it says above what is wrong"] if code == 2 else None
                self._write(self.rank + number, f"its process {how}{why}", problems)

    def _watch(self) -> None:
        while not self._over.wait(LOOK_SECONDS):
            with suppress(OSError):
                self._look_at_children()
                found = self._found()
                if found is not None:
                    self._leave(found)
            if self._parent is not None and os.getppid() != self._parent:
                self._leave(NeighbourError("the process that has started this one is gone"))
            waited = time.monotonic() - self._began if self._began is not None else 0.0
            if waited > 60 * self.wait_minutes:
                self._stuck()

    def _stuck(self) -> NoReturn:
        said = (
            f"no step for {self.wait_minutes:g} minutes (trainer.wait_minutes) after step "
            f"{self.step}; a rank hangs, or does what takes longer; each says where it is"
        )
        self._write(self.rank, said)
        self._end(NeighbourError(said))

    def _leave(self, cause: Exception) -> None:
        """Ends this process, if it does not end by itself."""
        if not self._over.wait(GRACE_SECONDS):
            self._end(cause)

    def _end(self, cause: Exception) -> NoReturn:
        self._ending = True
        lines = cause.problems if isinstance(cause, InputError) else [str(cause)]
        said = "\n  ".join(lines)
        print(f"rank {self.rank} is at {_where()}\nerror: {said}", file=sys.stderr, flush=True)
        _end_children()
        os._exit(2 if isinstance(cause, InputError) else 1)


def _was_started() -> bool:
    """Whether Lightning's launcher or torchrun has started this process as one of several."""
    return os.environ.get("LOCAL_RANK", "0") != "0" or "TORCHELASTIC_RUN_ID" in os.environ


def _where() -> str:
    """The calls that the main thread is in, the innermost last."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    stack = traceback.extract_stack(frame)
    return " > ".join(f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in stack[-4:])


def _mark(path: Path) -> int | None:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return None


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
