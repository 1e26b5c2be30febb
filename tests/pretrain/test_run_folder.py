"""One writer, whole files, a log without gaps."""

from __future__ import annotations

import csv
import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import pretrain.run_folder
from data_prep.errors import CorruptionError, InputError, LostLeaseError
from pretrain.run_folder import MetricsLog, RunFolder


def test_checkpoints_are_pruned_and_read_back_without_pickle(tmp_path: Path) -> None:
    checkpoints = RunFolder(tmp_path).checkpoints
    assert checkpoints.load() is None
    for step in (1, 5, 9):
        checkpoints.save(step, {"step": step, "weights": torch.full((3,), float(step))})
    assert [path.name for path in checkpoints.paths()] == ["step-00000005.pt", "step-00000009.pt"]
    state = checkpoints.load()
    assert state is not None and state["step"] == 9 and (state["weights"] == 9).all()
    assert not list(checkpoints.folder.glob(".*"))


def test_of_damaged_checkpoints_the_one_before_is_taken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], seed: int
) -> None:
    checkpoints = RunFolder(tmp_path).checkpoints
    for step in (3, 6):
        checkpoints.save(step, {"step": step, "weights": torch.arange(1000.0)})
    first, last = checkpoints.paths()
    data = bytearray(last.read_bytes())
    for broken in (bytes(data[:-40]), b"", flipped(data, seed)):
        last.write_bytes(broken)
        found = checkpoints.newest()
        assert found is not None and found[0] == first and found[1]["step"] == 3
        assert "step-00000006.pt" in capsys.readouterr().err
    checkpoints.save(4, {"step": 4})  # the run goes on from 3
    assert [path.name for path in checkpoints.paths()] == ["step-00000003.pt", "step-00000004.pt"]
    for path in checkpoints.paths():
        path.write_bytes(b"no")
    with pytest.raises(CorruptionError, match=r"step-00000003\.pt in .* cannot be read"):
        checkpoints.load()


@pytest.mark.parametrize("error", [OSError(errno.ESTALE, "stale"), MemoryError(), "torch"])
def test_what_the_system_refuses_is_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception | str
) -> None:
    """Or a run would go on from the state before, and delete the newer one, which is whole."""
    checkpoints = RunFolder(tmp_path).checkpoints
    for step in (3, 6):
        checkpoints.save(step, {"step": step})

    def refuse(*args: object, **kwargs: object) -> None:
        if isinstance(error, Exception):
            raise error
        torch.empty(2**60, dtype=torch.int8)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "load", refuse)
        with pytest.raises((OSError, MemoryError, RuntimeError)) as caught:
            checkpoints.load()
    assert not isinstance(caught.value, CorruptionError)
    state = checkpoints.load()
    assert state is not None and state["step"] == 6


def flipped(data: bytearray, seed: int) -> bytes:
    """With one bit changed within the weights."""
    at = data.index(torch.arange(1000.0).numpy().tobytes()) + seed % 4000
    return bytes(data[:at]) + bytes([data[at] ^ 1]) + bytes(data[at + 1 :])


def test_a_write_that_fails_leaves_the_old_state_and_no_rest(tmp_path: Path) -> None:
    checkpoints = RunFolder(tmp_path).checkpoints
    checkpoints.save(3, {"step": 3})
    with pytest.raises(Exception):  # noqa: B017 - whatever torch says of what it cannot save
        checkpoints.save(4, {"step": 4, "bad": (x for x in "generator")})
    assert [path.name for path in checkpoints.folder.iterdir()] == ["step-00000003.pt"]


def test_a_second_writer_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from pretrain.run_folder import RunFolder\n"
        "with RunFolder(Path(sys.argv[1])).lease(): print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    with pytest.raises(InputError, match=f"process {holder.pid} on"), RunFolder(tmp_path).lease():
        pass
    holder.kill()
    holder.wait()
    with RunFolder(tmp_path).lease():  # the killed writer's lease died with it
        assert json.loads((tmp_path / "lease.json").read_text())["pid"] == os.getpid()
    assert not (tmp_path / "lease.json").exists()


def test_another_hosts_lease_ends_when_its_heart_stops(tmp_path: Path) -> None:
    lease = {"host": "elsewhere", "pid": 1, "job": "77", "heartbeat": time.time()}
    (tmp_path / "lease.json").write_text(json.dumps(lease))
    with pytest.raises(InputError, match=r"on elsewhere \(job 77\)"), RunFolder(tmp_path).lease():
        pass
    lease["heartbeat"] -= 3600
    (tmp_path / "lease.json").write_text(json.dumps(lease))
    with RunFolder(tmp_path).lease():
        pass


def test_a_requeued_job_takes_its_own_lease_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lease = {"host": "elsewhere", "pid": 1, "job": "77", "heartbeat": time.time()}
    (tmp_path / "lease.json").write_text(json.dumps(lease))
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    with pytest.raises(InputError), RunFolder(tmp_path).lease():
        pass  # another step of the same start of the job
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with RunFolder(tmp_path).lease():
        pass


@pytest.mark.parametrize("other", [{"processes": "pid:[1]"}, {"since": "1"}])
def test_a_number_alone_is_no_process(tmp_path: Path, other: dict[str, str]) -> None:
    """Containers that share a host's name count processes on their own, and numbers come again."""
    with RunFolder(tmp_path).lease():
        lease = json.loads((tmp_path / "lease.json").read_text())
    dead = next(pid for pid in range(2**22, 1, -1) if not Path(f"/proc/{pid}").exists())
    pid = dead if "processes" in other else os.getpid()
    (tmp_path / "lease.json").write_text(json.dumps({**lease, **other, "pid": pid}))
    # One that cannot be seen from here may live; one that is younger than its lease is another.
    assert RunFolder(tmp_path).held() is ("processes" in other)
    (tmp_path / "lease.json").write_text(json.dumps({**lease, "pid": pid}))
    assert RunFolder(tmp_path).held() is ("since" in other)


def test_a_lease_is_lost_to_another_and_not_to_a_hiccup(tmp_path: Path) -> None:
    run, file = RunFolder(tmp_path), tmp_path / "lease.json"
    run.check_lease()  # what nobody holds is not lost
    with run.lease():
        mine = file.read_text()
        run.check_lease()
        file.unlink()
        file.mkdir()
        run.check_lease()
        file.rmdir()
        for now in (None, mine.replace('"token": "', '"token": "x')):  # the other may have ended
            if now is not None:
                file.write_text(now)
            with pytest.raises(LostLeaseError):
                run.check_lease()
        file.write_text(mine)


def test_of_many_takers_one_gets_the_lease(tmp_path: Path) -> None:
    """Also when all of them find a dead writer's lease."""
    dead = {"host": "elsewhere", "pid": 1, "job": None, "heartbeat": time.time() - 3600}
    (tmp_path / "lease.json").write_text(json.dumps(dead))
    code = (
        "import sys; from pathlib import Path; from pretrain.run_folder import RunFolder\n"
        "from data_prep.errors import InputError\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        "try:\n"
        "    with RunFolder(Path(sys.argv[1])).lease():\n"
        "        print('held', flush=True); sys.stdin.readline()\n"
        "except InputError: print('refused', flush=True)"
    )
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    takers = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], **pipes) for _ in range(4)
    ]
    assert [taker.stdout.readline() for taker in takers] == ["ready\n"] * 4
    for taker in takers:
        taker.stdin.write("go\n")
        taker.stdin.flush()
    said = sorted(taker.stdout.readline().strip() for taker in takers)
    for taker in takers:
        taker.communicate()
    assert said == ["held", "refused", "refused", "refused"]


def test_a_lease_that_is_none_is_not_honoured(tmp_path: Path) -> None:
    (tmp_path / "lease.json").write_text("[]")
    with RunFolder(tmp_path).lease():
        pass


def test_a_run_says_of_which_commit_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    RunFolder(tmp_path).describe({}, [])
    said = json.loads((tmp_path / "run.json").read_text())["commit"]
    root = Path(pretrain.run_folder.__file__).parents[1]
    if (root / ".git").exists():
        words = ["git", "-C", str(root), "rev-parse", "HEAD"]
        head = subprocess.run(words, capture_output=True, text=True, check=True).stdout
        assert len(said.removesuffix("-dirty")) == 12 and head.startswith(said[:12])
    # An installed package is of none, wherever it lies.
    monkeypatch.setattr(pretrain.run_folder, "__file__", str(tmp_path / "pretrain" / "x.py"))
    assert pretrain.run_folder.commit() is None


def test_a_resumed_log_has_each_step_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    log = MetricsLog(path)
    for step in (1, 10, 20, 30):
        log.write({"step": step, "loss": 1 / step})
    with path.open("a") as file:
        file.write("2")  # killed while it wrote a row
    log = MetricsLog(path, resumed_step=20)  # the checkpoint is from step 20
    for step in (30, 40):
        log.write({"step": step, "loss": 2.0, "unknown": 1.0})
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["1", "10", "20", "30", "40"]
    assert [float(row["loss"]) for row in rows][-2:] == [2.0, 2.0]
