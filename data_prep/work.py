"""What a prep has done so far, so that one that was killed goes on where it was.

Beside the output lies `.OUTPUT.prep/`, closed to everybody else since it holds image data; in it a
folder for each request: input listing, options, versions. A case that is done is a file of payloads
and a note, a shard that is done its tar and a note; the note comes last, and each file appears
whole or not at all. A case that is begun has a note of that until its end, by which one that ends
processes is known. What is in them follows from the request alone, so tasks can work side by side.
"""

from __future__ import annotations

import errno
import fcntl
import glob
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from data_prep.errors import InputError

NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)
DONE = ".done"


@dataclass(frozen=True)
class WorkFolder:
    """The folder of one request; cases and shards are named by their numbers, from 0."""

    path: Path

    @property
    def corpus(self) -> Path:
        """The corpus as far as it is written; it becomes the output by one rename."""
        return self.path / "corpus"

    @property
    def plan(self) -> Path:
        """Which case goes into which shard, and what was left out."""
        return self.path / "plan.json"

    @property
    def salt(self) -> Path:
        """The secret of this prep, the same for all tasks, until it goes to the private folder."""
        return self.path / "salt"

    def case_note(self, case: int) -> Path:
        """What scanning found out about a case; there if and only if it is done."""
        return self.path / "scanned" / f"{case:09d}.json"

    def begun_note(self, case: int) -> Path:
        """There while a case is scanned, and for good if its process died of it."""
        return self.path / "begun" / f"{case:09d}.json"

    def payloads(self, case: int) -> Path:
        """The encoded payloads of a case, one after another, until they are in their shard."""
        return self.path / "payloads" / f"{case:09d}"

    def shard_note(self, shard: int) -> Path:
        """What lies where in a shard; there if and only if it is done."""
        return self.path / "written" / f"{shard:06d}.json"

    def shard(self, shard: int) -> Path:
        """The shard itself."""
        return self.corpus / "shards" / f"{shard:06d}.tar"

    def scanned(self) -> set[int]:
        """Cases that are done."""
        return _numbers(self.path / "scanned")

    def begun(self) -> set[int]:
        """Cases that are being scanned, or were when a process died."""
        return _numbers(self.path / "begun")

    def written(self) -> set[int]:
        """Shards that are done."""
        return _numbers(self.path / "written")

    def make(self) -> None:
        """Makes the folders, where they are not there yet."""
        for folder in ("begun", "scanned", "payloads", "written", "corpus/shards"):
            (self.path / folder).mkdir(parents=True, exist_ok=True)

    @property
    def is_published(self) -> bool:
        """Whether the corpus has gone to its place, and this folder only waits to be removed."""
        return self.plan.exists() and not self.corpus.exists()

    def remove(self) -> None:
        """Removes it, as `remove_folder` does."""
        remove_folder(self.path)


def remove_folder(path: Path) -> None:
    """Removes a folder at once for all who look, then its bytes, and those that a kill left."""
    done = path.with_suffix(DONE)
    shutil.rmtree(done, ignore_errors=True)
    if path.exists():
        path.rename(done)
        shutil.rmtree(done, ignore_errors=True)


def _numbers(folder: Path) -> set[int]:
    # NFS may show a listing of a minute ago, unless this machine has changed the folder since.
    with tempfile.TemporaryFile(dir=folder):
        pass
    return {int(path.stem) for path in folder.glob("[0-9]*.json")}


def work_root(output: Path) -> Path:
    """The hidden folder beside an output that holds its unfinished preps."""
    return output.parent / f".{output.name}.prep"


def replaced(output: Path) -> Path:
    """Where the corpus of before lies for the instant in which the new one takes its place."""
    return work_root(output) / "replaced"


def others(output: Path, work: WorkFolder) -> list[Path]:
    """Folders that other requests for this output have left, or are working in."""
    root = work_root(output)
    known = {work.path, work.path.with_suffix(DONE), replaced(output)}
    # Before, they lay beside the output, named by host and process.
    found = [*root.glob("*/"), *root.parent.glob(f"{glob.escape(root.name)}-*/")]
    return sorted(path for path in found if path not in known)


@contextmanager
def hold(output: Path, request: str, *, alone: bool, patience: float = 0) -> Iterator[WorkFolder]:
    """Gives the work folder of a request, and keeps out who must not work beside this process.

    The lock is the kernel's, so it ends with its process whatever ends that. Who takes it writes
    its name into the file.

    Args:
        output: The corpus to be.
        request: Digest of the request.
        alone: Nobody else may work for this output: a whole prep, or its last step. The other steps
            share it among themselves.
        patience: Seconds to wait for those who hold it.

    Raises:
        InputError: somebody holds it, or the folder cannot be made.
    """
    root = work_root(output)
    handle = _locked(output, root, alone, time.monotonic() + patience)
    work = WorkFolder(root / request[:16])
    try:
        if alone:
            _settle(output)
            shutil.rmtree(work.path.with_suffix(DONE), ignore_errors=True)
        yield work
    finally:
        # Nothing is kept here any more: away with it, unless others are just coming in.
        if not any(root.glob("*/")) and _try_lock(handle, alone=True):
            with suppress(OSError):
                (root / "lock").unlink()
                root.rmdir()
        os.close(handle)


def _settle(output: Path) -> None:
    """Ends what a prep that was killed in the middle of replacing a corpus has left."""
    old = replaced(output)
    if old.exists():
        if output.exists():
            shutil.rmtree(old)
        else:
            old.rename(output)


def _locked(output: Path, root: Path, alone: bool, end: float) -> int:
    """The lock as an open file; whoever held it before may have removed it meanwhile."""
    while True:
        try:
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
            handle = os.open(root / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise InputError(f"output={output}: cannot be written ({error.strerror})") from error
        got = _try_lock(handle, alone)
        with suppress(FileNotFoundError):
            if got and os.fstat(handle).st_ino == (root / "lock").stat().st_ino:
                os.ftruncate(handle, 0)
                os.pwrite(handle, _own_name().encode(), 0)
                return handle
        other = os.pread(handle, 200, 0).decode(errors="replace") or "one that just begins"
        os.close(handle)
        if not got and time.monotonic() > end:
            raise InputError(
                f"output={output}: is being prepared by others, the last to begin was {other}; "
                "wait for them, or stop them and start again: what is done is kept"
            )
        if not got:
            time.sleep(0.5)


def _try_lock(handle: int, alone: bool) -> bool:
    """Whether the lock is ours now; where the file system knows no locks it always is."""
    try:
        fcntl.flock(handle, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in NO_LOCKS
    return True


def _own_name() -> str:
    job = os.environ.get("SLURM_JOB_ID")
    return f"process {os.getpid()} on {socket.gethostname()}" + (f" (job {job})" if job else "")
