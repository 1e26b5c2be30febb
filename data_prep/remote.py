"""A corpus that lies elsewhere: behind https:// or in an s3:// bucket.

Either shards come whole, each once for all processes of a machine, into a cache of bounded size
(`Shelf`); or only the bytes of the chunks that a crop touches come, and nothing is kept, which
suits a corpus larger than the disk. What arrives is verified in both ways: a shard by its sha256,
chunks by their tables, as on a local disk.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import re
import sys
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar

from data_prep.download import (
    Bucket,
    PassingError,
    Source,
    TooLargeError,
    check_redirect,
    download,
    folder_source,
    reason,
    retried,
)
from data_prep.errors import CorruptionError, InputError
from data_prep.files import file_digest
from data_prep.references import parse

if TYPE_CHECKING:
    from multiprocessing.sharedctypes import Synchronized

T = TypeVar("T")

SMALL = 4 * 2**30
"""Bytes that corpus.json, the index or fingerprints may have."""

PAUSES = (0.05, 0.25, 1.0, 2.0, 4.0, 8.0)
"""Seconds between tries of a range: the first ones short, for a server that is merely busy."""

GAP = 2**16
"""Ranges with fewer bytes between them are asked for as one."""

_NAME = re.compile(r"(?P<sha256>[0-9a-f]{64})\.(?P<kind>tar|arrived(\.part(\.json)?)?)")
"""Of files on a shelf."""

WAIT_SECONDS = 0.2
TOUCH_SECONDS = 30.0


class _ShortError(PassingError):
    """An answer that is whole and has less than was asked for: the file may be shorter."""


class Remote:
    """Files of a corpus below an address. Safe after a fork; sent to other processes by address.

    Args:
        address: `https://...` or `s3://...`, which may hold a password or a signature.

    Attributes:
        tally: who measures counts the bytes of shards here that come, forked processes included.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        wanted = parse(address)
        if wanted.kind == "hub":
            raise InputError(f"{wanted.shown}: a corpus is read from https:// or s3://")
        self._wanted = wanted
        self._files: tuple[int, Any] | None = None
        self.tally: Synchronized[int] | None = None

    def __reduce__(self) -> tuple[type[Remote], tuple[str]]:
        return Remote, (self.address,)

    def __str__(self) -> str:
        return self._wanted.shown

    def counted(self, came: int) -> None:
        """Adds bytes to the tally, if there is one."""
        if self.tally is not None:
            with self.tally.get_lock():
                self.tally.value += came

    @property
    def sha256(self) -> str | None:
        """Of corpus.json, if the address says what it must be."""
        return self._wanted.sha256

    def shown(self, name: str) -> str:
        """The address of a file, without what is secret."""
        return self._wanted.shown_of(name)

    @cached_property
    def source(self) -> Source:
        """For whole files."""
        return folder_source(self._wanted)

    def whole(self, name: str, limit: int = SMALL) -> bytes:
        """All bytes of a file.

        Raises:
            InputError: it is not there, not for us, or too large.
            UnreachableError: tries came to nothing.
        """

        def attempt() -> bytes:
            got = self.source.open(name, 0, None)
            with closing(got.stream):
                try:
                    data = got.stream.read(limit + 1)
                except Exception as error:
                    raise PassingError(reason(error)) from None
            if len(data) > limit:
                raise InputError(f"{self.shown(name)}: has more than {limit:,} bytes")
            if got.total is not None and len(data) < got.total:
                raise PassingError(f"the connection ended after {len(data):,} bytes")
            return data

        return retried(attempt, self.shown(name))

    def ranges(self, name: str, spans: Sequence[tuple[int, int]], size: int) -> list[bytes]:
        """Bytes [start, stop) of a file of `size` bytes, for each span, asked for together.

        Raises:
            InputError: the file is not there, or not for us, or the server gives no ranges.
            CorruptionError: the server has less of it, or more.
            UnreachableError: tries came to nothing.
        """
        merged = _merged(spans)
        came: dict[tuple[int, int], bytes] = {}

        def attempt() -> None:
            missing = [span for span in merged if span not in came]
            problem: PassingError | None = None
            lengths.append(None)
            for span, answer in zip(missing, self._asked(name, missing), strict=True):
                try:
                    came[span] = self._checked(name, span, answer)
                except _ShortError as error:
                    problem, lengths[-1] = error, self._length(name)
                except PassingError as error:
                    problem = error
            now = lengths[-1]
            if now not in (None, size) and lengths[-2:-1] == [now]:  # nor did it last time
                raise CorruptionError(
                    f"{self.shown(name)}: has {now} bytes, corpus.json says {size}; copy the shard "
                    "there again"
                )
            if problem is not None:
                raise problem

        lengths: list[int | None] = []
        retried(attempt, self.shown(name), lambda: len(came), PAUSES)
        self.counted(sum(map(len, came.values())))
        out = []
        for start, stop in spans:
            low, data = next((a, came[a, b]) for a, b in merged if a <= start and stop <= b)
            out.append(data[start - low : stop - low])
        return out

    def _length(self, name: str) -> int | None:
        """Bytes that the server says a file has."""
        got = self.source.open(name, 0, None)
        got.stream.close()
        return got.total

    def _asked(self, name: str, spans: Sequence[tuple[int, int]]) -> list[Any]:
        paths = [self._wanted.url_of(name)] * len(spans)
        starts, stops = [a for a, _ in spans], [b for _, b in spans]
        answers: list[Any] = self._filesystem().cat_ranges(paths, starts, stops, on_error="return")
        return answers

    def _checked(self, name: str, span: tuple[int, int], answer: Any) -> bytes:
        shown, wanted = self.shown(name), span[1] - span[0]
        if isinstance(answer, FileNotFoundError):
            raise InputError(f"{shown}: is not there; copy the corpus again")
        code = getattr(answer, "status", None)
        if isinstance(answer, PermissionError) or code in (401, 403):
            raise InputError(f"{shown}: access is denied; a signed address may have run out")
        if code == 416:  # it begins behind the file's end
            raise _ShortError(f"0 of {wanted:,} bytes came")
        if isinstance(answer, BaseException):
            if isinstance(answer, InputError) or not isinstance(answer, Exception):
                raise answer
            raise PassingError(f"the server answers {code}" if code else reason(answer))
        if len(answer) > wanted:
            raise InputError(
                f"{shown}: the server answers a request for {wanted:,} bytes with {len(answer):,}, "
                "so it gives no ranges; give shards room on this machine: remote.cache_gb=N"
            )
        if len(answer) < wanted:
            raise _ShortError(f"{len(answer):,} of {wanted:,} bytes came")
        return bytes(answer)

    def _filesystem(self) -> Any:
        """fsspec's, one for each process: its connections do not survive a fork."""
        if isinstance(self.source, Bucket):
            return self.source.files
        if self._files is None or self._files[0] != os.getpid():
            self._files = (os.getpid(), _http(self._wanted.headers))
        return self._files[1]


def _http(headers: Mapping[str, str]) -> Any:
    import aiohttp
    import fsspec

    async def redirected(session: Any, context: Any, found: Any) -> None:
        check_redirect(str(found.url), str(found.response.headers.get("Location", "")))

    trace = aiohttp.TraceConfig()
    trace.on_request_redirect.append(redirected)
    return fsspec.filesystem(
        "http",
        skip_instance_cache=True,
        encoded=True,
        headers=headers,
        client_kwargs={
            "timeout": aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=30),
            "trust_env": True,
            "trace_configs": [trace],
        },
    )


def _merged(spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Fewer spans that cover these, over short gaps."""
    merged: list[tuple[int, int]] = []
    for start, stop in sorted(spans):
        if merged and start <= merged[-1][1] + GAP:
            merged[-1] = (merged[-1][0], max(merged[-1][1], stop))
        else:
            merged.append((start, stop))
    return merged


class Sparse:
    """A frame of which some regions have come: memory for these alone, and a path to open it by.

    Args:
        size: bytes of the frame.
    """

    def __init__(self, size: int) -> None:
        if sys.platform == "linux":
            self._file = os.memfd_create("frame")
            self.path = f"/proc/self/fd/{self._file}"
        else:
            self._file, self.path = tempfile.mkstemp(prefix="voxelith-frame-")
        os.ftruncate(self._file, size)
        self.view = mmap.mmap(self._file, size)
        self.there: set[int] = set()

    def put(self, region: int, offset: int, data: bytes) -> None:
        """A region that has come."""
        self.view[offset : offset + len(data)] = data
        self.there.add(region)

    def __del__(self) -> None:
        os.close(self._file)
        if not self.path.startswith("/proc/"):
            Path(self.path).unlink(missing_ok=True)


@dataclass(frozen=True)
class Shelf:
    """Shards of remote corpora on this machine, by their sha256, the least recently used go first.

    However many processes ask, a shard comes once. Files are whole or not there. In use, what was
    evicted can be read until it is closed.

    Attributes:
        folder: where they lie.
        limit: bytes that all of them may have, those under way included.
    """

    folder: Path
    limit: int

    def get(self, remote: Remote, name: str, size: int, sha256: str) -> Path:
        """The local path of a file of a corpus.

        Raises:
            InputError: it is not there, or there is no room for it.
            CorruptionError: its bytes are not those that corpus.json says, twice in a row.
            UnreachableError: tries came to nothing.
        """
        path = self.folder / f"{sha256}.tar"
        if path.exists():
            return path
        # It holds images: others of the machine see them only where someone has made it so.
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        coming = path.with_suffix(".coming")
        with self._alone(sha256):
            if path.exists():  # another process was faster
                return path
            self._make_room(coming, size)
            try:
                self._fetch(remote, name, path, size, sha256)
            finally:
                coming.unlink(missing_ok=True)
        return path

    def has(self, sha256: str) -> bool:
        """Whether a file is there."""
        return (self.folder / f"{sha256}.tar").exists()

    def touch(self, sha256: str) -> None:
        """Says that a file is in use."""
        path = self.folder / f"{sha256}.tar"
        try:
            if time.time() - path.stat().st_mtime > TOUCH_SECONDS:
                os.utime(path)
        except OSError:
            pass  # evicted, or of a cache that others may write

    def drop(self, sha256: str, file: IO[bytes], shown: str) -> None:
        """Removes an opened file whose bytes have changed, unless another has its place by now."""
        print(
            f"WARNING: {self.folder}: {shown} is no longer what came from there, and comes again; "
            "look after this disk",
            file=sys.stderr,
        )
        path = self.folder / f"{sha256}.tar"
        with self._alone(sha256), contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                path.unlink()

    def _fetch(self, remote: Remote, name: str, path: Path, size: int, sha256: str) -> None:
        shown = remote.shown(name)
        arrived = path.with_suffix(".arrived")
        for _ in range(2):
            try:
                download(
                    remote.source, name, arrived, shown=shown, limit=size, quiet=True,
                    key="remote.folder",
                )  # fmt: skip
            except TooLargeError as error:
                problems = error.problems
                continue
            found = file_digest(arrived)
            if found == sha256 and arrived.stat().st_size == size:
                arrived.replace(path)
                remote.counted(size)
                return
            arrived.unlink()
            problems = [
                f"{shown}: came twice with other bytes than corpus.json says (sha256 "
                f"{found[:12]}..., expected {sha256[:12]}...); it is damaged where it lies"
            ]
        raise CorruptionError(problems)

    def check(self, largest: int) -> None:
        """Looks whether a corpus's largest shard fits.

        Raises:
            InputError: it does not.
        """
        if largest > self.limit:
            raise InputError(
                f"remote.cache_gb={self.limit / 1e9:g}: a shard has {largest / 1e9:.3g} GB; raise "
                "it, or give 0 to fetch only what crops touch"
            )

    def _make_room(self, coming: Path, size: int) -> None:
        """Removes what was used longest ago, until there is room; waits for what others fetch."""
        self.check(size)
        while True:
            with self._alone("room"):
                others = [path for path in self.folder.glob("*.coming") if path != coming]
                under_way = {path.stem: self._under_way(path) for path in others}
                mine = {coming.stem, *(stem for stem, bytes_ in under_way.items() if bytes_)}
                # Afterwards: one that was done in between counts twice rather than not at all. What
                # a fetch left that failed is as good as a shard; nobody goes on with it unless it
                # is said to be coming, which only who has this lock can say.
                kept = sorted(_facts(self._kept(mine)))
                taken = sum(under_way.values()) + sum(bytes_ for _, bytes_, _ in kept)
                while kept and taken + size > self.limit:
                    _, freed, oldest = kept.pop(0)
                    oldest.unlink(missing_ok=True)
                    taken -= freed
                if taken + size <= self.limit:
                    coming.write_text(str(size))
                    return
            time.sleep(WAIT_SECONDS)

    def _kept(self, mine: Collection[str]) -> Iterator[Path]:
        """Shards, and what came of others but these."""
        for path in self.folder.iterdir():
            found = _NAME.fullmatch(path.name)
            if found and (found["kind"] == "tar" or found["sha256"] not in mine):
                yield path

    def _under_way(self, coming: Path) -> int:
        """Bytes that a process fetches; none where it was killed, and what it left is removed."""
        with self._locks(coming.stem) as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                with contextlib.suppress(FileNotFoundError, ValueError):  # or it is done just now
                    return int(coming.read_text())
                return 0
            for left in self.folder.glob(f"{coming.stem}.*"):
                if left.suffix != ".tar":
                    left.unlink(missing_ok=True)
            return 0

    @contextmanager
    def _alone(self, name: str) -> Iterator[None]:
        with self._locks(name) as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    @contextmanager
    def _locks(self, name: str) -> Iterator[int]:
        folder = self.folder / "locks"
        folder.mkdir(exist_ok=True)
        lock = os.open(folder / f"{name}.lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            yield lock
        finally:
            # Not by closing alone: a process forked meanwhile has it open as well, and so holds it.
            fcntl.flock(lock, fcntl.LOCK_UN)
            os.close(lock)


def _facts(paths: Iterator[Path]) -> Iterator[tuple[float, int, Path]]:
    for path in paths:
        try:
            facts = path.stat()
        except FileNotFoundError:
            continue
        yield facts.st_mtime, facts.st_size, path
