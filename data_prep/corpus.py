"""Reading a corpus (format 1): a lazy index, and crops read and verified in place.

Opening costs one small JSON and one columnar file, however many volumes there are. A crop is read
out of the memory-mapped tar: exactly the chunks that it touches are checked against the chunk
table and decompressed, by one thread. No torch in here.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import blosc2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from data_prep.errors import CorruptionError, InputError, attempt, named
from data_prep.fingerprint import as_text
from data_prep.references import is_reference
from data_prep.remote import Remote, Shelf
from data_prep.shards import PAYLOADS, canonical_json, read_table, touched_chunks
from data_prep.storage import Frame, Place, Root, Shard, Storage, shown
from data_prep.volume import NativeGrid, Volume

if TYPE_CHECKING:
    from data_prep.sketch import Sketch

FORMAT = 1
CORPUS_FILE = "corpus.json"
INDEX_FILE = "index.parquet"
FINGERPRINTS_FILE = "fingerprints.parquet"

T = TypeVar("T")

_SHARD = re.compile(r"shards/\d{6,}\.tar")

Triple = tuple[int, int, int]


def shard_name(number: int) -> str:
    """Path of a shard inside the corpus."""
    return f"shards/{number:06d}.tar"


class Corpus:
    """A finished corpus, here or elsewhere, or several as one; make one with `Corpus.open`.

    Safe to use after a fork (each process maps the shards anew) and to send to spawned workers (the
    path travels, not the data; of a corpus elsewhere the index, which came once). Samples are
    numbered in the order of the index, which is the order of their keys and of their bytes; those
    of several corpora follow one another, and have the corpus's number before their key: 1/KEY,
    2/KEY.

    Attributes:
        info: corpus.json; of several what they have together.
    """

    def __init__(
        self,
        roots: Sequence[Root],
        infos: Sequence[dict[str, Any]],
        tables: Sequence[pa.Table],
        shelf: Shelf | None = None,
    ) -> None:
        self._roots = list(roots)
        self._infos = list(infos)
        self._tables = list(tables)
        self.info = infos[0] if len(infos) == 1 else _together(roots, infos)
        self._table = tables[0] if len(tables) == 1 else _joined(infos, tables)
        self._storage = Storage(
            [
                Shard(root, shard["name"], int(shard["bytes"]), str(shard["sha256"]))
                for root, info in zip(roots, infos, strict=True)
                for shard in info["shards"]
            ],
            shelf,
        )
        self._columns: dict[str, np.ndarray] = {}

    @classmethod
    def open(cls, path: str | Root, *more: str | Root, shelf: Shelf | None = None) -> Corpus:
        """Open the corpus at `path`; `more` of them are opened as one with it.

        Args:
            path: a directory, or an address, `https://...` or `s3://...`.
            more: of these.
            shelf: where shards from elsewhere are kept; None: only the bytes that are read come.

        Raises:
            InputError: nothing is there, it is no corpus, or of a format this program cannot read;
                or several differ in kind or spacing.
            CorruptionError: the index is not the one that corpus.json describes.
            UnreachableError: a server does not answer.
        """
        roots = [_root(one) for one in (path, *more)]
        infos = [_read_info(one) for one in roots]
        tables = [_read_index(one, info) for one, info in zip(roots, infos, strict=True)]
        return cls(roots, infos, tables, shelf)

    @classmethod
    def together(cls, parts: Sequence[Corpus]) -> Corpus:
        """Opened corpora as one, with the shelf of the first.

        Raises:
            InputError: they differ in kind or spacing.
        """
        return cls(
            [root for part in parts for root in part._roots],
            [info for part in parts for info in part._infos],
            [table for part in parts for table in part._tables],
            parts[0]._storage.shelf,
        )

    def __reduce__(self) -> tuple[Callable[..., Corpus], tuple[Any, ...]]:
        if any(isinstance(root, Remote) for root in self._roots):
            return Corpus, (self._roots, self._infos, self._tables, self._storage.shelf)
        return Corpus.open, tuple(self._roots)

    @property
    def path(self) -> Path:
        """Of the corpus, the first one of several."""
        return Path(str(self._roots[0]))

    def __str__(self) -> str:
        return " and ".join(map(str, self._roots))

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def __repr__(self) -> str:
        return f"Corpus({str(self)!r}, {len(self)} {self.info['kind']} volumes)"

    @property
    def index_hash(self) -> str:
        """Sha256 of the index: the identity of this corpus in runs and checkpoints."""
        return str(self.info["index"]["sha256"])

    @property
    def labelled(self) -> bool:
        """Whether every volume has a `seg` payload."""
        return bool(self.info["kind"] == "labelled")

    @property
    def classes(self) -> list[dict[str, Any]]:
        """The class table, rows of value, name, regions, ignore; empty without labels."""
        return list(self.info["classes"])

    @cached_property
    def keys(self) -> list[str]:
        """The key of every sample, in order."""
        keys = self._table.column("key").to_pylist()
        if len(self._roots) > 1:
            return [f"{n}/{key}" for n, key in zip(self.corpora + 1, keys, strict=True)]
        return list(keys)

    @cached_property
    def corpora(self) -> np.ndarray:
        """Int64 `[n]`: which of several corpora each sample is of, from 0."""
        if len(self._roots) == 1:
            return np.zeros(len(self), dtype=np.int64)
        return self.column("corpus").astype(np.int64)

    @cached_property
    def subjects(self) -> list[str]:
        """The subject of every sample, in order."""
        return list(self._table.column("subject").to_pylist())

    @cached_property
    def modalities(self) -> list[str]:
        """CT or MR for every sample, in order."""
        return list(self._table.column("modality").to_pylist())

    def groups(self, by: str) -> list[str]:
        """What each sample belongs to: a column of text, or the number of its corpus from 1.

        Without an entry it is `unknown`, as counts have it.
        """
        if by == "corpus":
            return [str(n + 1) for n in self.corpora]
        return [name or "unknown" for name in self._table.column(by).to_pylist()]

    @cached_property
    def shapes(self) -> np.ndarray:
        """Int64 `[n, 4]`: channels, D, H, W."""
        return np.stack([self.column(f"shape_{axis}") for axis in "cdhw"], axis=1)

    @cached_property
    def spacings(self) -> np.ndarray:
        """Float64 `[n, 3]`: spacing (d, h, w) in mm."""
        return np.stack([self.column(f"spacing_{axis}") for axis in "dhw"], axis=1)

    @cached_property
    def shards(self) -> np.ndarray:
        """Int64 `[n]`: number of the shard that holds each sample."""
        return self.column("shard").astype(np.int64)

    @cached_property
    def _positions(self) -> dict[str, int]:
        return {key: i for i, key in enumerate(self.keys)}

    def column(self, name: str) -> np.ndarray:
        """One column of the index as an array `[n]`."""
        if name not in self._columns:
            self._columns[name] = self._table.column(name).to_numpy()
        return self._columns[name]

    def require_shards(self) -> None:
        """Looks whether every shard is there and has its size, before long work starts.

        Raises:
            CorruptionError: naming each shard that is not.
            InputError, UnreachableError: a remote one does not come.
        """
        self._storage.require()

    def shard(self, number: int) -> Shard:
        """Where a shard lies, and what it must be."""
        return self._storage.shards[number]

    def shard_files(self) -> list[Path]:
        """The shards that are files here, in order."""
        shards = self._storage.shards
        return [one.root / one.name for one in shards if isinstance(one.root, Path)]

    @property
    def remotes(self) -> list[Remote]:
        """Where shards come from, if from elsewhere."""
        return [root for root in self._roots if isinstance(root, Remote)]

    @property
    def shelf(self) -> Shelf | None:
        """Where shards from elsewhere are kept, if any are."""
        return self._storage.shelf if self.remotes else None

    def has_shard(self, shard: int) -> bool:
        """Whether a shard is here, or on the shelf."""
        return self._storage.has(shard)

    def bring(self, shard: int) -> None:
        """Has a shard from elsewhere come to the shelf before it is read.

        Raises:
            InputError, CorruptionError, UnreachableError: it does not come; who reads it is told.
        """
        self._storage.bring(shard)

    def position(self, key: str) -> int:
        """The number of the sample with this key; InputError if there is none."""
        try:
            return self._positions[key]
        except KeyError:
            raise InputError(f"{self}: no sample has the key {key!r}") from None

    def has(self, payload: str) -> bool:
        """Whether any sample has this payload: image, seg or mask."""
        return payload in PAYLOADS and bool((self.column(f"{payload}_size") > 0).any())

    def sample_has(self, i: int, payload: str) -> bool:
        """Whether sample `i` has this payload."""
        return payload in PAYLOADS and int(self.column(f"{payload}_size")[i]) > 0

    @cached_property
    def channel_names(self) -> tuple[str, ...]:
        """What the channels of its first scan are called, in order; none of a single one."""
        if not len(self) or self.shapes[0, 0] == 1:
            return ()
        return tuple(str(channel["name"]) for channel in self.meta(0)["channels"])

    def meta(self, i: int) -> dict[str, Any]:
        """KEY.json of sample `i`, verified."""
        return self._renewed(i, partial(self._meta, i))

    def _meta(self, i: int) -> dict[str, Any]:
        shard = int(self.shards[i])
        if self._storage.is_ranged(shard):
            self._frame(i, "image")  # which comes next, and brings this along
        (data,) = self._storage.pieces(shard, [self._span(i, "json")])
        if xxhash.xxh3_64_intdigest(data) != int(self.column("json_xxh3")[i]):
            raise self._damaged(i, "json", "is not what the index says")
        result: dict[str, Any] = json.loads(data)
        return result

    def read(
        self,
        i: int,
        payload: str = "image",
        start: Triple | None = None,
        size: Triple | None = None,
    ) -> np.ndarray:
        """A box of sample `i`: int16 codes `[C, d, h, w]` for image, `[d, h, w]` for seg and mask.

        Args:
            i: Number of the sample.
            payload: image, seg (class values) or mask (non-zero where voxels are not valid).
            start: First voxel (d, h, w); the origin when absent.
            size: Voxels (d, h, w); up to the far end when absent. The box must lie inside.

        Raises:
            CorruptionError: naming shard, key, payload and chunk.
        """
        if not self.sample_has(i, payload):
            raise InputError(f"{self}: sample {self.keys[i]} has no payload {payload!r}")
        channels, *full = (int(n) for n in self.shapes[i])
        lead = (channels,) if payload == "image" else ()
        first = (0, 0, 0) if start is None else tuple(map(int, start))
        last = tuple(full)
        if size is not None:
            last = tuple(a + int(n) for a, n in zip(first, size, strict=True))
        if any(a < 0 or a >= b or b > n for a, b, n in zip(first, last, full, strict=True)):
            raise ValueError(f"box {first} to {last} does not lie inside {tuple(full)}")
        return self._renewed(i, partial(self._box, i, payload, lead, full, first, last))

    def _box(
        self,
        i: int,
        payload: str,
        lead: tuple[int, ...],
        full: Sequence[int],
        first: tuple[int, ...],
        last: tuple[int, ...],
    ) -> np.ndarray:
        """Voxels [first, last) of a payload, of a shape `full` after `lead`."""
        frame, table = self._frame(i, payload)
        ends = (0, len(table) - 1)
        frame.need(ends)
        view = memoryview(frame.view)
        try:
            shape = (*lead, *full)
            if frame.array is None:
                for row, what in zip(table[[0, -1]].tolist(), ("header", "index"), strict=True):
                    self._verify(i, payload, what, view, frame.base, row)
                array = self._open_frame(i, payload, frame)
                if tuple(array.shape) != shape:
                    said = f"has shape {array.shape}, the index says {shape}"
                    raise self._damaged(i, payload, said)
                frame.array = array
            array = frame.array
            low, high = (0,) * len(lead) + first, lead + last
            chunks = touched_chunks(shape, tuple(array.chunks), low, high)
            frame.need(chunks + 1)
            for chunk, row in zip(chunks, table[chunks + 1].tolist(), strict=True):
                self._verify(i, payload, f"chunk {chunk}", view, frame.base, row)
        finally:
            view.release()
        box = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
        try:
            return np.asarray(array[box])
        except RuntimeError as error:
            raise self._damaged(i, payload, f"does not decompress ({error})") from error

    def volume(self, i: int) -> Volume:
        """The whole image of sample `i` as a `Volume` of int16 codes, with its native grid.

        What prep cut off, or resampled, is in its statistics: crops and whole scans are normalised
        alike.
        """
        meta = self.meta(i)
        channels = meta["channels"]
        return Volume(
            array=self.read(i),
            affine=np.asarray(meta["affine"], dtype=np.float64),
            modality=tuple(c["modality"] for c in channels),
            names=tuple(c["name"] for c in channels),
            native=NativeGrid.from_dict(meta["native"]),
            slope=tuple(c["slope"] for c in channels),
            intercept=tuple(c["intercept"] for c in channels),
            statistics=tuple(c["statistics"] for c in channels),
        )

    @property
    def splits(self) -> list[str]:
        """Names of the splits beside the shards."""
        return sorted(path.stem for path in (self.path / "splits").glob("*.json"))

    def split(self, name: str) -> dict[str, Any]:
        """The split `splits/NAME.json`, its hash verified: name, seed, groups, parts, hash."""
        path = self.path / "splits" / f"{name}.json"
        if name not in self.splits:
            known = ", ".join(self.splits) or "none"
            raise InputError(f"{self}: there is no split {name!r}; there are: {known}")
        try:
            data: dict[str, Any] = json.loads(path.read_bytes())
            stated = data.get("hash")
        except (ValueError, AttributeError) as error:
            raise CorruptionError(f"{path}: not a split ({error})") from error
        if stated != split_hash(data):
            raise CorruptionError(
                f"{path}: its content does not match its hash; give an edited split a new name "
                "with data_prep.splits.write_split"
            )
        return data

    def fingerprints(self) -> dict[str, str]:
        """Fingerprint per key, as comparable text `algorithm-version:hex`."""
        return dict(zip(self.keys, _texts(self._prints()), strict=True))

    def sketches(self) -> list[Sketch]:
        """What each scan is found again by; empty ones for corpora of before there were any."""
        return _sketches(self._prints())

    def _prints(self) -> pa.Table:
        """Fingerprints and sketches of all samples, verified."""
        tables = []
        for root, info in zip(self._roots, self._infos, strict=True):
            tables.append(with_sketches(_read_prints(root, info["fingerprints"]["sha256"])))
        found = pa.concat_tables(tables)
        if found.column("key").to_pylist() != self._table.column("key").to_pylist():
            raise CorruptionError(f"{self}: the fingerprints are of other samples")
        return found

    def scan_prints(self) -> dict[str, set[str]]:
        """Per key all fingerprints under which its scans may be known elsewhere.

        That of the sample, and of a sample with several channels that of each channel: who has
        seen one of them has seen the case. Then its sketch, which finds near-duplicates.
        """
        prints = self._prints()
        found = {key: {text} for key, text in zip(self.keys, _texts(prints), strict=True)}
        for key, look in zip(self.keys, _sketches(prints), strict=True):
            if look.is_comparable:
                found[key].add(look.to_text())
        for i in np.flatnonzero(self.shapes[:, 0] > 1):
            channels = self.meta(int(i))["channels"]
            found[self.keys[i]] |= {as_text(c["fingerprint"]) for c in channels}
        return found

    def _renewed(self, i: int, read: Callable[[], T]) -> T:
        """What `read` gives; where the disk has changed a shard that came here, it comes again."""
        try:
            return read()
        except CorruptionError:
            if not self._storage.renew(int(self.shards[i])):
                raise
            return read()

    def _frame(self, i: int, payload: str) -> tuple[Frame, np.ndarray]:
        def read(data: bytes) -> np.ndarray:
            if xxhash.xxh3_64_intdigest(data) != int(self.column(f"{payload}_chunks_xxh3")[i]):
                raise self._damaged(i, payload, "has a damaged chunk table")
            try:
                return read_table(data, int(self.column(f"{payload}_size")[i]))
            except CorruptionError as error:
                raise self._damaged(i, payload, f"is unreadable: {error}") from error

        members = (payload, f"{payload}_chunks", "json")
        place = Place(int(self.shards[i]), *(self._span(i, member) for member in members))
        return self._storage.frame(place, read)

    def _span(self, i: int, member: str) -> tuple[int, int]:
        start = int(self.column(f"{member}_offset")[i])
        return start, start + int(self.column(f"{member}_size")[i])

    def _verify(
        self,
        i: int,
        payload: str,
        what: str,
        view: memoryview,
        base: int,
        row: tuple[int, int, int],
    ) -> None:
        """Looks whether a region of a frame, a row of its chunk table, is what it was."""
        offset, count, xxh3 = row
        first = base + offset
        if xxhash.xxh3_64_intdigest(view[first : first + count]) != xxh3:
            raise self._damaged(i, payload, f"is damaged in its {what}")

    def _open_frame(self, i: int, payload: str, frame: Frame) -> Any:
        try:
            return blosc2.open(
                frame.path,
                mode="r",
                offset=frame.offset,
                mmap_mode="r",
                dparams=blosc2.DParams(nthreads=1),
            )
        except (RuntimeError, ValueError, OSError) as error:
            raise self._damaged(i, payload, f"does not open ({error})") from error

    def _damaged(self, i: int, payload: str, what: str) -> CorruptionError:
        return CorruptionError(
            f"{self._storage.shards[int(self.shards[i])]}: sample {self.keys[i]}, payload "
            f"{payload} {what}; copy the shard again (`voxelith check` lists all damage)"
        )


def open_corpus(path: Path | Sequence[Path], key: str, shelf: Shelf | None = None) -> Corpus:
    """Opens the corpus, or corpora, that a setting names and looks for the shards.

    Raises:
        InputError: it is not there, no corpus or not whole; each problem begins with `key=path`.
        UnreachableError: a server does not answer.
    """

    def work(root: Root) -> Corpus:
        corpus = Corpus.open(root, shelf=shelf)
        corpus.require_shards()
        return corpus

    def opened(one: Path) -> Corpus:
        return named(key, named(key, one, _root), work)

    if isinstance(path, Path):
        return opened(path)
    problems: list[str] = []
    parts = [attempt(problems, opened, one) for one in path]
    if problems:
        raise InputError(problems)
    return Corpus.together([part for part in parts if part is not None])


def books(info: Mapping[str, Any]) -> bytes:
    """The text of corpus.json, with a sum over its own content."""
    summed = {**info, "sha256": _info_sum(info)}
    return json.dumps(summed, indent=1, sort_keys=True).encode() + b"\n"


def _info_sum(info: Mapping[str, Any]) -> str:
    return _sum_without(info, "sha256")


def split_hash(data: Mapping[str, Any]) -> str:
    """Sha256 over a split without its hash, in canonical JSON."""
    return _sum_without(data, "hash")


def _sum_without(data: Mapping[str, Any], own: str) -> str:
    """Sha256 over a table, in canonical JSON, but for the key that the sum itself is under."""
    content = {name: value for name, value in data.items() if name != own}
    return hashlib.sha256(canonical_json(content)).hexdigest()


def read_parquet(data: bytes) -> pa.Table:
    """All columns, by this thread alone.

    `pq.read_table` starts Arrow's thread pool even for one thread; that now and then aborts the
    interpreter at exit (apache/arrow#34314) and does not survive a fork.
    """
    with pq.ParquetFile(pa.BufferReader(data), pre_buffer=False) as file:
        return file.read(use_threads=False)


def _root(path: str | Root) -> Root:
    if isinstance(path, Remote):
        return path
    return Remote(str(path)) if is_reference(str(path)) else Path(path)


def _read_file(root: Root, name: str) -> bytes | None:
    """A file of a corpus beside its shards; None where a directory has none."""
    if isinstance(root, Remote):
        return root.whole(name)
    try:
        return (root / name).read_bytes()
    except FileNotFoundError:
        return None


def _read_index(root: Root, info: Mapping[str, Any]) -> pa.Table:
    data, path = _read_file(root, INDEX_FILE), shown(root, INDEX_FILE)
    if data is None:
        raise InputError(
            f"{root}: the index {INDEX_FILE} is missing; copy the corpus again, or write it again "
            "with `voxelith prep`"
        )
    found = hashlib.sha256(data).hexdigest()
    if found != info["index"]["sha256"]:
        raise CorruptionError(
            f"{path}: sha256 is {found[:12]}..., corpus.json says "
            f"{info['index']['sha256'][:12]}...; the index is damaged or of another corpus"
        )
    try:
        return read_parquet(data)
    except pa.ArrowException as error:
        raise CorruptionError(f"{path}: not a Parquet file ({error})") from error


def _texts(prints: pa.Table) -> list[str]:
    return [as_text(row) for row in prints.select(["algorithm", "version", "value"]).to_pylist()]


def with_sketches(prints: pa.Table) -> pa.Table:
    """Fingerprints with a column of sketches, empty ones for corpora of before there were any."""
    if "sketch" in prints.column_names:
        return prints
    return prints.append_column("sketch", pa.array([b""] * len(prints), pa.binary()))


def _sketches(prints: pa.Table) -> list[Sketch]:
    from data_prep.sketch import Sketch

    return [Sketch.from_bytes(data) for data in prints.column("sketch").to_pylist()]


def _read_prints(root: Root, sha256: str) -> pa.Table:
    data = _read_file(root, FINGERPRINTS_FILE)
    if data is None:
        raise InputError(f"{root}: {FINGERPRINTS_FILE} is missing")
    if hashlib.sha256(data).hexdigest() != sha256:
        raise CorruptionError(
            f"{shown(root, FINGERPRINTS_FILE)}: its sha256 is not the one in corpus.json"
        )
    return read_parquet(data)


def _together(roots: Sequence[Root], infos: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What several corpora have together.

    Raises:
        InputError: they differ in what all volumes of a corpus have in common.
    """
    problems = []
    for name, values in (
        ("kind", [info["kind"] for info in infos]),
        ("spacing", [info["options"].get("spacing") for info in infos]),
    ):
        if any(value != values[0] for value in values):
            said = ", ".join(f"{root}: {value}" for root, value in zip(roots, values, strict=True))
            problems.append(f"several corpora as one need the same {name}, found {said}")
    if problems:
        raise InputError(problems)
    counts: dict[str, Counter[str]] = {"modality": Counter(), "source": Counter()}
    counts["licence"] = Counter()
    for info in infos:
        for name, found in counts.items():
            found.update(info["counts"][name])
    hashes = "".join(info["index"]["sha256"] for info in infos)
    return {
        "kind": infos[0]["kind"],
        "classes": [],
        "options": {"spacing": infos[0]["options"].get("spacing")},
        "counts": {name: dict(sorted(found.items())) for name, found in counts.items()},
        "shards": [shard for info in infos for shard in info["shards"]],
        "index": {"sha256": hashlib.sha256(hashes.encode()).hexdigest()},
    }


def _joined(infos: Sequence[Mapping[str, Any]], tables: Sequence[pa.Table]) -> pa.Table:
    """Rows of several corpora; shards are counted on, and a column says which corpus it is."""
    made, first = [], 0
    for number, (info, table) in enumerate(zip(infos, tables, strict=True)):
        shard = pa.array(table.column("shard").to_numpy() + np.int32(first), type=pa.int32())
        table = table.set_column(table.column_names.index("shard"), "shard", shard)
        made.append(table.append_column("corpus", pa.array([number] * len(table), pa.int32())))
        first += len(info["shards"])
    return pa.concat_tables(made)


def _missing(info: Mapping[str, Any]) -> list[str]:
    """What every corpus.json has and this one has not."""
    missing = [name for name in ("kind", "classes", "options", "counts") if name not in info]
    parts = {
        "index": ("sha256",),
        "fingerprints": ("sha256",),
        "shards": ("name", "bytes", "sha256", "samples"),
    }
    for name, keys in parts.items():
        found = info.get(name)
        rows = found if isinstance(found, list) and name == "shards" else [found]
        if not all(isinstance(row, dict) and row.keys() >= set(keys) for row in rows):
            missing.append(f"{name} with {', '.join(keys)}")
    return missing


def _read_info(root: Root) -> dict[str, Any]:
    if isinstance(root, Path) and not root.is_dir():
        raise InputError(f"{root}: no such directory; `voxelith prep` writes a corpus")
    path, data = shown(root, CORPUS_FILE), _read_file(root, CORPUS_FILE)
    if data is None:
        raise InputError(
            f"{root}: not a corpus, it has no {CORPUS_FILE}; `voxelith prep input={root} "
            "output=...` makes one from scans"
        )
    wanted = root.sha256 if isinstance(root, Remote) else None
    found = hashlib.sha256(data).hexdigest()
    if wanted not in (None, found):
        raise CorruptionError(
            f"{path}: sha256 is {found}, the address says #sha256={wanted}; it is another corpus, "
            "or was changed on its way; look at where the address is from"
        )
    try:
        info = json.loads(data)
    except ValueError as error:
        raise CorruptionError(f"{path}: not JSON ({error})") from error
    if not isinstance(info, dict) or info.get("format") != FORMAT:
        version = info.get("format") if isinstance(info, dict) else None
        raise InputError(
            f"{path}: format {version!r}, this program reads {FORMAT}; update voxelith"
        )
    # Corpora of before have no sum, and do not name their splits.
    if ("sha256" in info or "splits" in info) and info.get("sha256") != _info_sum(info):
        raise CorruptionError(
            f"{path}: its content is not that which its sha256 is of; copy it again"
        )
    if missing := _missing(info):
        raise CorruptionError(f"{path}: lacks {', '.join(missing)}")
    strange = [s["name"] for s in info["shards"] if not _SHARD.fullmatch(str(s["name"]))]
    if strange:
        raise CorruptionError(f"{path}: no name of a shard: {', '.join(map(repr, strange[:3]))}")
    return info
