"""A run's folder: one writer, atomic checkpoints, a log without gaps.

runs/NAME/
config.json            what was asked for, resolved
run.json               command, versions, commit, corpus index hash
lease.json             who writes here now, with a heartbeat
metrics.csv            one row per logged step
checkpoints/step-00000100.pt
previews/              pictures
init.json              where its first weights come from, unless they are random
load_report.json       which of its tensors those are
fingerprints.json      what a pretraining has seen, of a corpus behind a password
events.jsonl           starts, saves with their seconds, ends
metrics.jsonl          all that trackers are told, validation and looks at features too
failures/              steps whose loss or gradient was not finite, and what ended which rank
health.csv             one row per look at the features
"""

from __future__ import annotations

import contextlib
import csv
import fcntl
import json
import os
import platform
import secrets
import socket
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from data_prep.errors import CorruptionError, InputError, LostLeaseError
from data_prep.files import (
    atomic,
    make_folder,
    read_note,
    read_table,
    sync,
    write_json,
    write_text,
)
from data_prep.images import of_the_system
from data_prep.references import without_secrets
from pretrain.events import step_of

HEARTBEAT_SECONDS = 30
STALE_SECONDS = 300
"""A lease whose heart has not beaten for this long belongs to a dead job."""


class Checkpoints:
    """Numbered training states in a folder, written whole and read without pickle."""

    KEEP = 2

    def __init__(self, folder: Path, keep: int = KEEP) -> None:
        self.folder = folder
        self.keep = keep

    def paths(self) -> list[Path]:
        """All checkpoints, oldest first."""
        return sorted(self.folder.glob("step-*.pt"))

    def last_step(self) -> int:
        """The step of the newest one; 0 if there is none."""
        paths = self.paths()
        return step_of(paths[-1]) if paths else 0

    def save(self, step: int, state: dict[str, Any]) -> Path:
        """Writes a state and deletes the oldest beyond `keep`, in this order.

        What is there of later steps could not be read, or the run would have gone on from there.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"step-{step:08d}.pt"
        # Straight to the file: a second copy in memory would cost as much as model and optimiser.
        with atomic(path) as file:
            torch.save(state, file)
        paths = self.paths()
        here = paths.index(path)
        for other in [*paths[here + 1 :], *paths[: max(0, here + 1 - self.keep)]]:
            other.unlink()
        return path

    def load(self) -> dict[str, Any] | None:
        """The newest state that can be read, or None if there is none."""
        found = self.newest()
        return None if found is None else found[1]

    def newest(self) -> tuple[Path, dict[str, Any]] | None:
        """The newest state that can be read, and its file.

        Raises:
            CorruptionError: there are some, and none can be read.
        """
        paths = self.paths()
        for before, path in reversed(list(zip([None, *paths], paths, strict=False))):
            try:
                return path, load_checkpoint(path)
            except CorruptionError as error:
                if before is None:
                    raise
                print(f"warning: {error}; taking {before.name}", file=sys.stderr)
        return None


def load_checkpoint(path: Path) -> dict[str, Any]:
    """A training state, every byte of it checked.

    Raises:
        CorruptionError: the file is damaged, or not there.
        OSError: the system did not let it be read now, which says nothing of the file.
        MemoryError: there is not the memory for it; RuntimeError where torch says so.
    """
    try:
        with zipfile.ZipFile(path) as archive:  # torch does not look at the sums that it writes
            damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(damaged)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        if of_the_system(error) or isinstance(error, MemoryError) or "allocate" in str(error):
            raise
        raise CorruptionError(
            f"{path.name} in {path.parent} cannot be read ({type(error).__name__})"
        ) from error
    return dict(state)


class RunFolder:
    """The folder of one run; use `open` to become its writer."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = Checkpoints(path / "checkpoints")
        self._token = ""

    @property
    def config_path(self) -> Path:
        """Where the resolved configuration is."""
        return self.path / "config.json"

    def config(self) -> dict[str, Any]:
        """The resolved configuration that the run was started with."""
        if not self.config_path.exists():
            raise InputError(
                f"{self.path} is not a run folder: it has no config.json; "
                "give the folder that `voxelith pretrain` or `voxelith finetune` made"
            )
        return read_table(self.config_path)

    def pretraining(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Configuration and facts, run.json, of a pretraining; InputError if it is none."""
        config = self.config()
        if "objective" not in config:
            raise InputError(f"{self.path}: is no pretraining run; give one that `pretrain` made")
        return config, read_table(self.path / "run.json")

    @contextlib.contextmanager
    def lease(self) -> Iterator[None]:
        """Holds the folder for this process; a second writer is refused.

        Raises:
            InputError: another process holds it, or it cannot be written.
        """
        make_folder(self.path, "runs")
        file = self._lease
        mine = {
            "host": socket.gethostname(),
            **_process(os.getpid()),
            "job": os.environ.get("SLURM_JOB_ID"),
            "restart": int(os.environ.get("SLURM_RESTART_COUNT", "0")),
            "token": secrets.token_hex(8),
        }
        _take(file, mine)
        self._token = mine["token"]
        for rest in self.checkpoints.folder.glob(".step-*"):
            rest.unlink()  # of a writer that was killed while it wrote
        stop = threading.Event()

        def beat() -> None:
            while not stop.wait(HEARTBEAT_SECONDS):
                # A file system that hiccups must not end the heartbeat, nor a lost lease steal.
                with contextlib.suppress(OSError):
                    if read_note(file).get("token") == mine["token"]:
                        write_json(file, {**mine, "heartbeat": time.time()})

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._token = ""
            stop.set()
            thread.join()
            if read_note(file).get("token") == mine["token"]:
                file.unlink(missing_ok=True)

    def check_lease(self) -> None:
        """Before more is written: a process that stood still, or lost its scheduler, may live on.

        Of a folder without a lease nothing is lost, and a file system that hiccups takes none away.

        Raises:
            LostLeaseError: another process holds the folder now, or did.
        """
        if not self._token:
            return
        try:
            held = json.loads(self._lease.read_text())
        except FileNotFoundError:
            held = {}
        except (OSError, ValueError):
            return
        if held.get("token") != self._token:
            raise LostLeaseError(
                f"{self.path}: another process writes here now, which took this one for dead "
                f"(no heartbeat for {STALE_SECONDS} s, or its job was started again); this one ends"
            )

    def held(self) -> bool:
        """Whether a process writes here that is alive, as far as can be told."""
        return _holder(self._lease) is not None

    @property
    def _lease(self) -> Path:
        return self.path / "lease.json"

    def describe(self, config: dict[str, Any], command: list[str], **facts: Any) -> None:
        """Writes what was asked for and with what it runs."""
        write_json(self.config_path, _shown(config))
        said = [without_secrets(word) for word in command]
        told = {"command": said, "versions": versions(), "commit": commit(), **facts}
        write_json(self.path / "run.json", told)


def _shown(config: Any) -> Any:
    """Settings without what is secret in addresses."""
    if isinstance(config, dict):
        return {name: _shown(value) for name, value in config.items()}
    if isinstance(config, list):
        return [_shown(value) for value in config]
    return without_secrets(config) if isinstance(config, str) else config


def _take(file: Path, mine: dict[str, Any]) -> None:
    """Writes the lease if nobody holds it; of several takers one gets it."""
    folder = os.open(file.parent, os.O_RDONLY)
    try:
        # Exact on one machine. Where the file system knows no locks, takers on several machines
        # that find the same dead lease within the same instant are left to the scheduler.
        with contextlib.suppress(OSError):
            fcntl.flock(folder, fcntl.LOCK_EX)
        _refuse_if_held(file)
        write_json(file, {**mine, "heartbeat": time.time()})
    finally:
        os.close(folder)


def _holder(file: Path) -> dict[str, Any] | None:
    """Who holds a lease and may be alive."""
    held = read_note(file)
    if not {"host", "pid", "heartbeat"} <= held.keys():
        return None  # no lease: leases are written whole
    # Containers of one host may share its name and not its processes.
    here = {"host": socket.gethostname(), "processes": _process(os.getpid())["processes"]}
    told = {name: held.get(name, here[name]) for name in here}
    if told == here and not _alive(held):
        return None  # killed here: its lease died with it
    return held if time.time() - held["heartbeat"] < STALE_SECONDS else None


def _refuse_if_held(file: Path) -> None:
    held = _holder(file)
    if held is None:
        return
    job = os.environ.get("SLURM_JOB_ID")
    restart = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    if job and held.get("job") == job and restart > int(held.get("restart", 0)):
        return  # requeued: a later start of the same job
    age = time.time() - held["heartbeat"]
    owner = f"process {held['pid']} on {held['host']}"
    if held.get("job"):
        owner += f" (job {held['job']})"
    raise InputError(
        f"{file.parent} is being written by {owner}, heartbeat {age:.0f} s ago; wait for it, "
        f"stop it, or choose another run=NAME (a dead job's lease ends after {STALE_SECONDS} s)"
    )


def _process(pid: int) -> dict[str, Any]:
    """Which process that is: of what namespace, and since when, for numbers are given again."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
        processes = str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return {"pid": pid, "processes": "", "since": ""}
    return {"pid": pid, "processes": processes, "since": stat.rpartition(")")[2].split()[19]}


def _alive(held: dict[str, Any]) -> bool:
    """Whether the process that a lease of this machine names is there."""
    try:
        os.kill(held["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    since = _process(held["pid"])["since"]
    return not since or bool(held.get("since", since) == since)


def versions() -> dict[str, str]:
    """What results depend on."""
    found = {"python": platform.python_version()}
    for name in ("voxelith", "torch", "lightning", "monai", "timm", "numpy", "blosc2"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def commit() -> str | None:
    """The commit of the checkout that runs, with `-dirty` where files differ; None if installed."""
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():
        return None
    words = [
        "git",
        "-C",
        str(root),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=12",
        "--exclude=*",
    ]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(words, capture_output=True, text=True, timeout=20, check=True)
        return done.stdout.strip()
    return None


class MetricsLog:
    """metrics.csv: a header, then one row per logged step.

    A resumed run drops the rows after its checkpoint first, so that no step is twice in the file
    and none is missing.
    """

    def __init__(self, path: Path, resumed_step: int = 0) -> None:
        self.path = path
        self._columns: list[str] | None = None
        if path.exists():
            with path.open(newline="") as file:
                # A killed run may have left half a row at the end.
                rows = [
                    row
                    for row in csv.DictReader(file)
                    if None not in row
                    and None not in row.values()
                    and int(row["step"]) <= resumed_step
                ]
            if rows:
                self._columns = list(rows[0])
                lines = [",".join(self._columns), *(",".join(row.values()) for row in rows)]
                write_text(path, "\n".join(lines) + "\n")
            else:
                path.unlink()

    def rows(self) -> list[dict[str, float]]:
        """What the file holds."""
        if not self.path.exists():
            return []
        with self.path.open(newline="") as file:
            return [
                {name: float(value or "nan") for name, value in row.items()}
                for row in csv.DictReader(file)
            ]

    def save(self) -> None:
        """Has the rows on the disk: a checkpoint that covers them is to be there after them."""
        if self.path.exists():
            sync(self.path)

    def write(self, row: dict[str, float | int]) -> None:
        """Appends a row; what the header does not name yet becomes a column, empty before."""
        text = ""
        if self._columns is None:
            self._columns = list(row)
            text = ",".join(self._columns) + "\n"
        new = [name for name in row if name not in self._columns]
        if new:
            head, *rest = self.path.read_text().splitlines()
            self._columns += new
            widened = [",".join([head, *new]), *(line + "," * len(new) for line in rest)]
            write_text(self.path, "\n".join(widened) + "\n")
        cells = [_cell(row.get(name, "")) for name in self._columns]
        with self.path.open("a") as file:
            file.write(text + ",".join(cells) + "\n")


def _cell(value: float | int | str) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
