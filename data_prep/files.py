"""Files appear whole or not at all."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from data_prep.errors import InputError


@contextmanager
def atomic(path: Path, mode: int = 0o644) -> Iterator[IO[bytes]]:
    """Opens a file for writing that replaces `path` when the block ends without an error.

    The temporary file lies beside it, since a rename from another file system is a copy; file and
    folder are synced, so that a machine that dies right after still has one or the other whole.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(mode)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def behind_link(path: Path) -> Path:
    """What a link leads to, there or not: its neighbours are those of what is written through it.

    Renaming a link moves the link and leaves what it leads to where it is.
    """
    return path.resolve() if path.is_symlink() else path


def make_folder(path: Path, key: str) -> None:
    """Makes a folder that results will go to, and tries whether it can be written.

    Raises:
        InputError: it cannot; found now rather than after the work.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise InputError(
            f"{key}={path}: cannot be written ({error.strerror}); choose another folder"
        ) from error


def check_free(path: Path) -> None:
    """Refuses a place where something is: a file, or a folder that is not empty."""
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise InputError(f"{path}: already exists; choose another folder or remove it")


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Gives a folder to fill, which becomes `path` when the block ends without an error.

    Raises:
        InputError: there is something at `path` already, or came there meanwhile.
    """
    check_free(path)
    make_folder(path.parent, "OUT")
    folder = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        yield folder
        for part in (folder, *folder.rglob("*")):
            part.chmod(0o755 if part.is_dir() else 0o644)
        try:
            folder.rename(path)  # an empty folder gives way
        except OSError:
            check_free(path)
            raise
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_bytes(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Writes a file atomically."""
    with atomic(path, mode) as file:
        file.write(data)


def write_text(path: Path, text: str, mode: int = 0o644) -> None:
    """Writes UTF-8 text atomically."""
    write_bytes(path, text.encode(), mode)


def write_once(path: Path, data: bytes) -> bytes:
    """Writes a file that only its owner can read, unless it is there.

    Gives what is there, the same to all who try at once.
    """
    if not path.exists():
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            os.fchmod(file.fileno(), 0o600)
            with contextlib.suppress(FileExistsError):
                os.link(file.name, path)
    return path.read_bytes()


def write_json(path: Path, value: Any) -> None:
    """Writes indented JSON atomically, keys in the order given."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def sync(path: Path) -> None:
    """Has on the disk what was written to a file."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def append_line(path: Path, value: Any) -> None:
    """Appends a line of JSON, by one write; it is on the disk before the program goes on."""
    with path.open("a") as file:
        # What a killed process left of a line is none, and must not swallow this one.
        file.write(("" if _ends_whole(path) else "\n") + json.dumps(value) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The tables in a file of lines of JSON, without what is no such line; empty without a file."""
    try:
        text = path.read_text()
    except FileNotFoundError:
        return []
    found = []
    for line in text.splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue  # of a process that was killed while it wrote
    return [one for one in found if isinstance(one, dict)]


def _ends_whole(path: Path) -> bool:
    with path.open("rb") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return True
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


def read_table(path: Path) -> dict[str, Any]:
    """The table in a JSON file of ours that must be there.

    Raises:
        InputError: it is not, or no table can be read.
    """
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise InputError(
            f"{path}: cannot be read ({why}); restore it, or start again what made it"
        ) from error
    if not isinstance(found, dict):
        raise InputError(
            f"{path}: holds {json.dumps(found):.40}, expected a table of names and values; restore "
            "it, or start again what made it"
        )
    return found


def read_note(path: Path) -> dict[str, Any]:
    """The table in a small JSON file; empty where there is none, or no table that can be read."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def legible(name: str) -> str:
    """A text with names of files so that it can be shown: bytes that are no UTF-8 are replaced."""
    return os.fsencode(name).decode(errors="replace")


def write_csv(path: Path, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table that only its owner can read; names of files keep bytes that are no UTF-8."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    write_bytes(path, text.getvalue().encode("utf-8", "surrogateescape"), mode=0o600)


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a table of `write_csv`; none where there is no file."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        return list(csv.DictReader(file))
