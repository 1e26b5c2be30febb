"""The bytes of a corpus's shards: of files here, of a cache of remote ones, or of ranges.

What a process has open is its own: after a fork it is opened anew.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from data_prep.errors import CorruptionError, InputError
from data_prep.remote import Remote, Shelf, Sparse

OPEN_SHARDS = 64
"""Open shards per process; an mmap holds a file descriptor, and limits start at 1024."""

OPEN_FRAMES = 16
"""Frames per process that stay open: crops of one volume often follow one another."""

HEAD, TAIL = 1024, 4096
"""Bytes at both ends of a frame that come with its chunk table; most headers and indices fit."""


Span = tuple[int, int]
"""Bytes [start, stop) of a file."""


Root = Path | Remote
"""Of a corpus: its directory or its address."""


def shown(root: Root, name: str) -> str:
    """What to call a file of a corpus in messages."""
    return root.shown(name) if isinstance(root, Remote) else str(root / name)


@dataclass(frozen=True)
class Shard:
    """Where a shard lies, and what it must be."""

    root: Root
    name: str
    bytes: int
    sha256: str

    def __str__(self) -> str:
        return shown(self.root, self.name)


class Place(NamedTuple):
    """Where a payload lies: the shard's number, and bytes in it.

    Attributes:
        shard: its number.
        frame: of the payload's frame.
        table: of its chunk table.
        beside: of what will be asked for as well, and comes along where each request counts.
    """

    shard: int
    frame: Span
    table: Span
    beside: Span


@dataclass
class Frame:
    """A payload's frame, all of it or the regions that were asked for.

    Attributes:
        view: bytes that hold it.
        base: where it begins in them.
        path: of a file that blosc2 may open.
        offset: where it begins in that.
        holder: keeps that file open.
        need: makes regions of it be there, by their rows of the chunk table.
        array: what blosc2 has opened of it, of one thread alone.
    """

    view: mmap.mmap
    base: int
    path: str
    offset: int
    holder: object
    need: Callable[[Iterable[int]], None] = field(default=lambda rows: None)
    array: Any = None


@dataclass
class _Opened:
    view: mmap.mmap
    file: IO[bytes]
    path: str

    def is_kept(self) -> bool:
        return os.fstat(self.file.fileno()).st_nlink > 0


class Storage:
    """All shards of a corpus, or of several.

    Args:
        shards: by number.
        shelf: cache of remote shards; None: only ranges of them come.
    """

    def __init__(self, shards: Sequence[Shard], shelf: Shelf | None = None) -> None:
        self.shards = list(shards)
        self.shelf = shelf
        self._refused: dict[int, list[str]] = {}
        self._forget()

    def _forget(self) -> None:
        self._opened: OrderedDict[int, _Opened] = OrderedDict()
        self._mapped: OrderedDict[tuple[int, int, int], tuple[Frame, np.ndarray]] = OrderedDict()
        self._frames: OrderedDict[tuple[int, int], tuple[Sparse, np.ndarray]] = OrderedDict()
        self._beside: OrderedDict[tuple[int, int, int], bytes] = OrderedDict()
        self._lock = threading.Lock()  # for threads that read at once; of this process, as all here
        self._pid = os.getpid()

    def require(self) -> None:
        """Looks whether every shard here is there and has its size, before long work starts.

        Of remote ones the first alone is asked for: each is verified when it is read.

        Raises:
            CorruptionError: naming each shard that is not.
            InputError, UnreachableError: a remote one does not come.
        """
        problems = []
        for shard in self.shards:
            if not isinstance(shard.root, Path):
                continue
            path = shard.root / shard.name
            found = path.stat().st_size if path.is_file() else None
            if found != shard.bytes:
                what = "is missing" if found is None else f"has {found} bytes"
                problems.append(
                    f"{path}: {what}, corpus.json says {shard.bytes} bytes; copy it again"
                )
        if problems:
            raise CorruptionError(problems)
        for root in {shard.root for shard in self.shards if isinstance(shard.root, Remote)}:
            mine = [shard for shard in self.shards if shard.root is root]
            largest = max(mine, key=lambda shard: shard.bytes)
            if self.shelf is None:
                root.ranges(mine[0].name, [(0, 512)], mine[0].bytes)
            else:
                self.shelf.check(largest.bytes)

    def pieces(self, number: int, spans: Sequence[Span]) -> list[bytes]:
        """Bytes [start, stop) of a shard for each span."""
        opened = self._open(number)
        if opened is not None:
            return [opened.view[start:stop] for start, stop in spans]
        found = [self._beside.get((number, *span)) for span in spans]
        missing = [span for span, data in zip(spans, found, strict=True) if data is None]
        came = iter(self._ranges(number, missing) if missing else [])
        return [next(came) if data is None else data for data in found]

    def _ranges(self, number: int, spans: Sequence[Span]) -> list[bytes]:
        shard = self.shards[number]
        assert isinstance(shard.root, Remote)
        return shard.root.ranges(shard.name, spans, shard.bytes)

    def has(self, number: int) -> bool:
        """Whether a shard is here, or on the shelf."""
        shard = self.shards[number]
        if isinstance(shard.root, Path):
            return True
        return self.shelf is not None and self.shelf.has(shard.sha256)

    def bring(self, number: int) -> None:
        """Has a remote shard come to the shelf, if there is one."""
        if self.shelf is not None and isinstance(self.shards[number].root, Remote):
            self._shelved(number)

    def renew(self, number: int) -> bool:
        """Takes a shard off the shelf that is no longer what came; False where there is none such.

        Whoever reads it next has it come again.
        """
        shard = self.shards[number]
        if self.shelf is None or isinstance(shard.root, Path):
            return False
        with self._lock:
            opened = self._opened.get(number)
            if opened is None:
                return True  # of another thread, by now
            if hashlib.sha256(opened.view).hexdigest() == shard.sha256:
                return False
            self.shelf.drop(shard.sha256, opened.file, str(shard))
            del self._opened[number]
        return True

    def is_ranged(self, number: int) -> bool:
        """Whether of a shard only ranges come."""
        return self.shelf is None and isinstance(self.shards[number].root, Remote)

    def frame(
        self, place: Place, read_table: Callable[[bytes], np.ndarray]
    ) -> tuple[Frame, np.ndarray]:
        """A frame and its chunk table, whose bytes `read_table` verifies and reads."""
        start = place.frame[0]
        opened = self._open(place.shard)
        if opened is not None:
            return self._frame_of(opened, place, read_table)
        key = (place.shard, start)
        with self._lock:
            if key not in self._frames:
                self._frames[key] = self._begin(place, read_table)
                if len(self._frames) > OPEN_FRAMES:
                    self._frames.popitem(last=False)
            self._frames.move_to_end(key)
            sparse, table = self._frames[key]
        need = partial(self._fetch, place.shard, start, sparse, table)
        return Frame(sparse.view, 0, sparse.path, 0, sparse, need), table

    def _frame_of(
        self, opened: _Opened, place: Place, read_table: Callable[[bytes], np.ndarray]
    ) -> tuple[Frame, np.ndarray]:
        start = place.frame[0]
        key = (threading.get_ident(), place.shard, start)
        with self._lock:
            found = self._mapped.pop(key, None)
            if found is None or found[0].holder is not opened:
                table = read_table(opened.view[slice(*place.table)])
                found = Frame(opened.view, start, opened.path, start, opened), table
            self._mapped[key] = found
            if len(self._mapped) > OPEN_FRAMES:
                self._mapped.popitem(last=False)
            return found

    def _begin(
        self, place: Place, read_table: Callable[[bytes], np.ndarray]
    ) -> tuple[Sparse, np.ndarray]:
        """Table, both ends of a frame and what is beside it, by one request or two at once."""
        start, stop = place.frame
        ends = (start, min(start + HEAD, stop)), (max(stop - TAIL, start), stop)
        spans = [place.table, *ends, place.beside]
        stored, head, tail, near = self._ranges(place.shard, spans)
        self._beside[place.shard, *place.beside] = near
        if len(self._beside) > 4 * OPEN_FRAMES:
            self._beside.popitem(last=False)
        sparse, table = Sparse(stop - start), read_table(stored)
        sparse.view[: len(head)] = head  # blosc2 looks at the first chunk's own header to open
        for row in (0, len(table) - 1):
            first, count = int(table[row]["offset"]), int(table[row]["bytes"])
            for low, data in ((0, head), (ends[1][0] - start, tail)):
                if low <= first and first + count <= low + len(data):
                    sparse.put(row, first, data[first - low : first - low + count])
        return sparse, table

    def _fetch(
        self, number: int, start: int, sparse: Sparse, table: np.ndarray, rows: Iterable[int]
    ) -> None:
        missing = [r for r in map(int, rows) if r not in sparse.there and table[r]["bytes"]]
        if not missing:
            return
        firsts = [int(table[row]["offset"]) for row in missing]
        counts = [int(table[row]["bytes"]) for row in missing]
        spans = [(start + a, start + a + n) for a, n in zip(firsts, counts, strict=True)]
        for row, first, data in zip(missing, firsts, self._ranges(number, spans), strict=True):
            sparse.put(row, first, data)

    def _open(self, number: int) -> _Opened | None:
        """The file of a shard; None where there is none, and only ranges come."""
        if os.getpid() != self._pid:
            self._forget()  # what is open is the parent's; leave it to it
        shard = self.shards[number]
        if isinstance(shard.root, Remote) and self.shelf is None:
            return None
        with self._lock:
            return self._opened_of(number, shard)

    def _opened_of(self, number: int, shard: Shard) -> _Opened:
        if number in self._opened:
            self._opened.move_to_end(number)
            if self.shelf is not None and isinstance(shard.root, Remote):
                self.shelf.touch(shard.sha256)
            return self._opened[number]
        opened = _map(shard, self._file(number))
        if isinstance(shard.root, Remote):
            # What was evicted meanwhile takes room for as long as it is open.
            for old in [n for n, one in self._opened.items() if not one.is_kept()]:
                del self._opened[old]
                for key in [key for key in self._mapped if key[1] == old]:
                    del self._mapped[key]
        self._opened[number] = opened
        if len(self._opened) > OPEN_SHARDS:
            # Not closed: another thread may be reading; it unmaps when the last reader lets go.
            self._opened.popitem(last=False)
        return opened

    def _shelved(self, number: int) -> Path:
        """The path of a remote shard, which comes if it must; one that is refused is not again."""
        shard = self.shards[number]
        assert self.shelf is not None and isinstance(shard.root, Remote)
        if number in self._refused:
            raise CorruptionError(self._refused[number])
        try:
            return self.shelf.get(shard.root, shard.name, shard.bytes, shard.sha256)
        except CorruptionError as error:
            self._refused[number] = error.problems
            raise

    def _file(self, number: int) -> IO[bytes]:
        shard = self.shards[number]
        if isinstance(shard.root, Path):
            try:
                return (shard.root / shard.name).open("rb")
            except FileNotFoundError:
                raise CorruptionError(f"{shard} is missing; copy the shard again") from None
        assert self.shelf is not None
        for _ in range(10):
            try:
                file = self._shelved(number).open("rb")
            except FileNotFoundError:
                continue  # evicted between the two
            if os.fstat(file.fileno()).st_size == shard.bytes:
                return file
            self.shelf.drop(shard.sha256, file, str(shard))
            file.close()
        raise InputError(
            f"{self.shelf.folder}: shards go as fast as they come; raise remote.cache_gb, or give 0"
        )


def _map(shard: Shard, file: IO[bytes]) -> _Opened:
    found = os.fstat(file.fileno()).st_size
    if found != shard.bytes:
        raise CorruptionError(
            f"{shard} has {found} bytes, corpus.json says {shard.bytes}; copy the shard again"
        )
    view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    # By its descriptor a file can be opened again, also when it was evicted.
    remote = sys.platform == "linux" and isinstance(shard.root, Remote)
    return _Opened(view, file, f"/proc/self/fd/{file.fileno()}" if remote else file.name)
