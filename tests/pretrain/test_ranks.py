"""A rank that fails, dies or hangs ends all, soon, and its cause is what one reads."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from rank_runs import begin, environment, machine, run, script
from test_loop import settings

FAULT = """
from pretrain.objectives.cnn_mae import CnnMAE
import signal
Path({folder!r}, f'pid-{{RANK}}').write_text(str(os.getpid()))
forward = CnnMAE.forward
def wrong_input(what):
    from data_prep.errors import CorruptionError
    raise CorruptionError('shard-7: damaged')
def broken(self, batch, progress):
    if batch.keys and RANK == {rank} and self.loop.step == 3:
        {fault}
    return forward(self, batch, progress)
CnnMAE.forward = broken
"""
# As where a device still waits for the others: nothing comes of this rank after what it has raised.
STUCK = "from pretrain.ranks import Ranks; Ranks.teardown = lambda self: time.sleep(1000); "
LAUNCHERS = {
    "lightning": [],
    "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"],
}


def broken(
    corpus: Path, folder: Path, fault: str, *, rank: int | str = 1, launcher: str = "lightning",
    devices: int = 2, **trainer: Any,
) -> tuple[int, str]:  # fmt: skip
    """Exit code and standard error of a run with a fault on one rank; nobody may be left of it."""
    chosen = settings(
        corpus, folder, "run", steps=2000, log_every=1, batch_size=6, save_every=2,
        trainer=machine(devices, **trainer),
    )  # fmt: skip
    changes = FAULT.format(folder=str(folder), rank=rank, fault=fault)
    process = begin([*LAUNCHERS[launcher], script(chosen, folder, changes)])
    _, said = process.communicate(timeout=500)
    until = time.monotonic() + 60
    pids = [int((folder / f"pid-{number}").read_text()) for number in range(devices)]
    while any(map(alive, pids)) and time.monotonic() < until:
        time.sleep(0.1)
    left = [pid for pid in pids if alive(pid)]
    assert not left, said
    return process.returncode, said


def test_each_rank_computes_in_the_threads_that_are_wanted(
    pretrain_corpus: Path, tmp_path: Path
) -> None:
    """Where nothing else is said Lightning gives each rank its share of the cores."""
    chosen = settings(
        pretrain_corpus, tmp_path, "run", steps=1, batch_size=2, trainer=machine(2, threads=3)
    )
    changes = (
        "os.environ.pop('OMP_NUM_THREADS', None)\n"
        "import torch\n"
        "from pretrain.objectives.cnn_mae import CnnMAE\n"
        "forward = CnnMAE.forward\n"
        "def noted(self, batch, progress):\n"
        f"    file = Path({str(tmp_path)!r}, f'threads-{{RANK}}')\n"
        "    file.write_text(str(torch.get_num_threads()))\n"
        "    return forward(self, batch, progress)\n"
        "CnnMAE.forward = noted\n"
    )
    done = run(chosen, tmp_path, changes)
    assert done.returncode == 0, done.stderr
    assert [(tmp_path / f"threads-{rank}").read_text() for rank in (0, 1)] == ["3", "3"]


def alive(pid: int) -> bool:
    """Whether a process runs or is stopped; one that nobody has waited for is dead."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def notes(folder: Path) -> dict[int, dict[str, Any]]:
    files = (folder / "run" / "failures").glob("rank-*.json")
    return {note["rank"]: note for note in (json.loads(file.read_text()) for file in files)}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_rank_that_fails_is_named_by_the_others(
    pretrain_corpus: Path, tmp_path: Path, launcher: str
) -> None:
    fault = "raise ValueError('on purpose')"
    stuck = STUCK if launcher == "lightning" else ""
    code, said = broken(pretrain_corpus, tmp_path, stuck + fault, launcher=launcher)
    assert code == 1
    named = [line for line in said.splitlines() if line.startswith("error: rank 1 on ")]
    if launcher == "torchrun" and not named:
        # Its agent may end the others before they have looked; then it tells who was first.
        assert "Root Cause" in said and "error: pretrain failed while running: on purpose" in said
    else:
        assert named[0].endswith("ended first, after step 3: ValueError: on purpose"), said
    assert "closed by peer" not in said
    assert notes(tmp_path)[1]["error"] == "ValueError: on purpose" and list(notes(tmp_path)) == [1]


def test_the_first_rank_may_fail_as_well(pretrain_corpus: Path, tmp_path: Path) -> None:
    """It takes with it also one that is stopped."""
    fault = "RANK == 2 and os.kill(os.getpid(), signal.SIGSTOP); RANK or 1 / 0"
    code, said = broken(pretrain_corpus, tmp_path, fault, rank="RANK", devices=3)
    assert code == 1 and "ended first, after step 3: ZeroDivisionError: division by zero" in said
    assert "closed by peer" not in said


def test_ranks_that_were_taken_for_dead_leave_nothing_for_those_that_took_over(
    pretrain_corpus: Path, tmp_path: Path
) -> None:
    """The folder is another start's by now, whose ranks believe what notes say."""
    fault = "(Path(__file__).parent / 'run' / 'lease.json').write_text('{\"token\": \"x\"}')"
    code, said = broken(pretrain_corpus, tmp_path, fault, rank=0)
    assert code == 1 and "error: " in said and "another process writes here now" in said, said
    assert notes(tmp_path) == {} and (tmp_path / "run" / "lease.json").exists()


def test_wrong_input_of_one_rank_is_wrong_input(pretrain_corpus: Path, tmp_path: Path) -> None:
    code, said = broken(pretrain_corpus, tmp_path, "wrong_input(batch)", devices=3)
    assert code == 2
    assert said.count("shard-7: damaged") == 3 and "Traceback" not in said, said


def test_a_rank_that_is_slow_to_end_says_why_once(pretrain_corpus: Path, tmp_path: Path) -> None:
    """Its watch gives up on it at once, and the broken connection reaches it while that ends it.

    Rank 1 takes its time after its note, and rank 0 more to end what it has started.
    """
    fault = (
        "import pretrain.ranks as ranks; ranks.GRACE_SECONDS = 0.0; "
        "ranks._end_children = lambda: time.sleep(12); note = ranks.Neighbours.note; "
        "ranks.Neighbours.note = lambda s, e: (note(s, e), RANK and time.sleep(2)); "
        "RANK and wrong_input(batch)"
    )
    # On all ranks: `rank` stands in a comparison.
    code, said = broken(pretrain_corpus, tmp_path, fault, rank="RANK")
    assert code == 2
    assert said.count("shard-7: damaged") == 2 and "Traceback" not in said, said


KILL = "os.kill(os.getpid(), signal.SIGKILL)"
# What one does meanwhile: waits for the other in a collective, where the connection breaks, or not.
BUSY = ("pass", "time.sleep(1000)")


@pytest.mark.parametrize("other", BUSY)
def test_a_killed_rank_is_said_to_be_killed(
    pretrain_corpus: Path, tmp_path: Path, other: str
) -> None:
    fault = f"exec({KILL!r} if RANK else {other!r})"
    code, said = broken(pretrain_corpus, tmp_path, fault, rank="RANK")
    assert code == 1
    assert "ended first, after step 3: its process was killed by SIGKILL" in said, said
    assert "closed by peer" not in said and "Traceback" not in said


@pytest.mark.parametrize("other", BUSY)
def test_no_rank_outlives_the_first(pretrain_corpus: Path, tmp_path: Path, other: str) -> None:
    fault = f"exec({other!r} if RANK else {KILL!r})"
    code, said = broken(pretrain_corpus, tmp_path, fault, rank="RANK")
    assert code == -9
    assert "the process that has started" in said or "lost the connection" in said, said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "launcher"),
    [
        ("os.kill(os.getpid(), signal.SIGSTOP)", "lightning"),
        ("time.sleep(1000)", "lightning"),
        ("time.sleep(1000)", "torchrun"),
    ],
)
def test_a_rank_that_hangs_ends_all_in_time(
    pretrain_corpus: Path, tmp_path: Path, fault: str, launcher: str
) -> None:
    code, said = broken(pretrain_corpus, tmp_path, fault, launcher=launcher, wait_minutes=0.5)
    assert code == 1
    assert "no step for 0.5 minutes (trainer.wait_minutes) after step" in said, said
    if "sleep" in fault:  # it says itself where it is
        (line,) = [line for line in said.splitlines() if line.startswith("rank 1 is at ")]
        assert line.endswith(" broken"), said


def test_what_an_earlier_start_left_is_not_believed(pretrain_corpus: Path, tmp_path: Path) -> None:
    old = tmp_path / "run" / "failures" / "rank-00001.json"
    old.parent.mkdir(parents=True)
    old.write_text('{"rank": 1, "host": "x", "step": 1, "error": "old", "problems": null}')
    chosen = settings(pretrain_corpus, tmp_path, "run", steps=3, trainer=machine(2))
    # Rank 1 may look before rank 0 has removed it, and for longer than this run takes.
    late = (
        "import threading, pretrain.ranks as ranks\n"
        "ranks.LOOK_SECONDS = ranks.GRACE_SECONDS = 0.01\n"
        "enter, unlink = ranks.Neighbours.__enter__, Path.unlink\n"
        "def entered(self):\n"
        "    Path.unlink = lambda path, **more: threading.Timer(1, unlink, [path]).start()\n"
        "    try: return enter(self)\n"
        "    finally: Path.unlink = unlink\n"
        "ranks.Neighbours.__enter__ = entered\n"
    )
    command = [sys.executable, *LAUNCHERS["torchrun"], str(script(chosen, tmp_path, late))]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    assert not old.exists()


@pytest.mark.slow
def test_a_loader_that_never_returns_is_named(pretrain_corpus: Path, tmp_path: Path) -> None:
    chosen = settings(
        pretrain_corpus, tmp_path, "run", steps=2000, log_every=1,
        trainer=machine(2, workers=1, wait_minutes=1),
    )  # fmt: skip
    worker = tmp_path / "worker"
    slow = (
        "from pretrain.loader import CropDataset\n"
        "read = CropDataset.__getitem__\n"
        "def hanging(self, index):\n"
        "    if RANK == 1 and index > 40:\n"
        f"        Path({str(worker)!r}).write_text(str(os.getpid()))\n"
        "        time.sleep(1000)\n"
        "    return read(self, index)\n"
        "CropDataset.__getitem__ = hanging\n"
    )
    process = begin([script(chosen, tmp_path, slow)])
    _, said = process.communicate(timeout=500)
    assert process.returncode == 1
    assert not alive(int(worker.read_text()))
    assert "error: rank 1 on " in said and "DataLoader timed out after 30.0 seconds" in said, said
