"""Reading a corpus (format 1): a lazy index, and crops read and verified in place.

Opening costs one small JSON and one columnar file, however many volumes there are. A crop is read
out of the memory-mapped tar: exactly the chunks that it touches are checked against the chunk
table and decompressed, by one thread. No torch in here.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import re
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from data_prep.errors import CorruptionError, InputError, attempt, named
from data_prep.fingerprint import as_text
from data_prep.shards import PAYLOADS, canonical_json, read_table, touched_chunks
from data_prep.volume import NativeGrid, Volume

FORMAT = 1
CORPUS_FILE = "corpus.json"
INDEX_FILE = "index.parquet"
FINGERPRINTS_FILE = "fingerprints.parquet"

# Open shards per process; an mmap holds a file descriptor, and limits start at 1024.
OPEN_SHARDS = 64

_SHARD = re.compile(r"shards/\d{6,}\.tar")

Triple = tuple[int, int, int]


def shard_name(number: int) -> str:
    """Path of a shard inside the corpus."""
    return f"shards/{number:06d}.tar"


@dataclass(frozen=True)
class Shard:
    """Where a shard lies and how large it must be."""

    path: Path
    bytes: int


class Corpus:
    """A finished corpus on a local disk, or several as one; make one with `Corpus.open`.

    Safe to use after a fork (each process maps the shards anew) and to send to spawned workers
    (the path travels, not the data). Samples are numbered in the order of the index, which is the
    order of their keys and of their bytes; those of several corpora follow one another, and have
    the corpus's number before their key: 1/KEY, 2/KEY.

    Attributes:
        paths: of the corpora.
        info: corpus.json; of several what they have together.
    """

    def __init__(
        self, paths: Sequence[Path], infos: Sequence[dict[str, Any]], tables: Sequence[pa.Table]
    ) -> None:
        self.paths = tuple(paths)
        self._infos = list(infos)
        self.info = infos[0] if len(infos) == 1 else _together(paths, infos)
        self._table = tables[0] if len(tables) == 1 else _joined(infos, tables)
        self._shards = [
            Shard(path / shard["name"], int(shard["bytes"]))
            for path, info in zip(paths, infos, strict=True)
            for shard in info["shards"]
        ]
        self._columns: dict[str, np.ndarray] = {}
        self._maps: OrderedDict[int, mmap.mmap] = OrderedDict()
        self._pid = os.getpid()

    @classmethod
    def open(cls, path: str | Path, *more: str | Path) -> Corpus:
        """Open the corpus directory at `path`; `more` of them are opened as one with it.

        Raises:
            InputError: nothing is there, it is no corpus, or of a format this program cannot read;
                or several differ in kind or spacing.
            CorruptionError: the index is not the one that corpus.json describes.
        """
        paths = [Path(one) for one in (path, *more)]
        infos = [_read_info(one) for one in paths]
        tables = [_read_index(one, info) for one, info in zip(paths, infos, strict=True)]
        return cls(paths, infos, tables)

    def __reduce__(self) -> tuple[Callable[..., Corpus], tuple[Path, ...]]:
        return Corpus.open, self.paths

    @property
    def path(self) -> Path:
        """Of the corpus, the first one of several."""
        return self.paths[0]

    def __str__(self) -> str:
        return " and ".join(map(str, self.paths))

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
        if len(self.paths) > 1:
            return [f"{n}/{key}" for n, key in zip(self.corpora + 1, keys, strict=True)]
        return list(keys)

    @cached_property
    def corpora(self) -> np.ndarray:
        """Int64 `[n]`: which of several corpora each sample is of, from 0."""
        if len(self.paths) == 1:
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
        """What each sample belongs to: a column of text, or the number of its corpus from 1."""
        if by == "corpus":
            return [str(n + 1) for n in self.corpora]
        return list(self._table.column(by).to_pylist())

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
        """
        problems = []
        for shard in self._shards:
            found = shard.path.stat().st_size if shard.path.is_file() else None
            if found != shard.bytes:
                what = "is missing" if found is None else f"has {found} bytes"
                problems.append(
                    f"{shard.path}: {what}, corpus.json says {shard.bytes} bytes; copy it again"
                )
        if problems:
            raise CorruptionError(problems)

    def position(self, key: str) -> int:
        """The number of the sample with this key; InputError if there is none."""
        try:
            return self._positions[key]
        except KeyError:
            raise InputError(f"{self.path}: no sample has the key {key!r}") from None

    def has(self, payload: str) -> bool:
        """Whether any sample has this payload: image, seg or mask."""
        return payload in PAYLOADS and bool((self.column(f"{payload}_size") > 0).any())

    def sample_has(self, i: int, payload: str) -> bool:
        """Whether sample `i` has this payload."""
        return payload in PAYLOADS and int(self.column(f"{payload}_size")[i]) > 0

    def meta(self, i: int) -> dict[str, Any]:
        """KEY.json of sample `i`, verified."""
        data = self._bytes(i, "json", self.column("json_offset")[i], self.column("json_size")[i])
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
            raise InputError(f"{self.path}: sample {self.keys[i]} has no payload {payload!r}")
        channels, *full = (int(n) for n in self.shapes[i])
        lead = (channels,) if payload == "image" else ()
        first = tuple(int(s) for s in start) if start is not None else (0, 0, 0)
        last = tuple(
            a + int(n) for a, n in zip(first, size if size is not None else full, strict=True)
        )
        if size is None:
            last = tuple(full)
        if any(a < 0 or a >= b or b > n for a, b, n in zip(first, last, full, strict=True)):
            raise ValueError(f"box {first} to {last} does not lie inside {tuple(full)}")
        offset = int(self.column(f"{payload}_offset")[i])
        table = self._table_of(i, payload)
        view = memoryview(self._map(int(self.shards[i])))
        try:
            for row, what in ((0, "header"), (len(table) - 1, "index")):
                self._verify(i, payload, what, view, offset, table[row])
            frame = self._open_frame(i, payload, offset)
            shape = (*lead, *full)
            if tuple(frame.shape) != shape:
                raise self._damaged(i, payload, f"has shape {frame.shape}, the index says {shape}")
            low, high = (0,) * len(lead) + first, lead + last
            for chunk in touched_chunks(shape, tuple(frame.chunks), low, high):
                self._verify(i, payload, f"chunk {chunk}", view, offset, table[chunk + 1])
        finally:
            view.release()
        box = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
        try:
            return np.asarray(frame[box])
        except RuntimeError as error:
            raise self._damaged(i, payload, f"does not decompress ({error})") from error

    def volume(self, i: int) -> Volume:
        """The whole image of sample `i` as a `Volume` of int16 codes, with its native grid."""
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
            raise InputError(f"{self.path}: there is no split {name!r}; there are: {known}")
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
        rows: list[dict[str, Any]] = []
        for path, info in zip(self.paths, self._infos, strict=True):
            rows += _read_prints(path, info["fingerprints"])
        stated = [row["key"] for row in rows]
        if stated != self._table.column("key").to_pylist():
            raise CorruptionError(f"{self}: the fingerprints are of other samples")
        return {key: as_text(row) for key, row in zip(self.keys, rows, strict=True)}

    def scan_prints(self) -> dict[str, set[str]]:
        """Per key all fingerprints under which its scans may be known elsewhere.

        That of the sample, and of a sample with several channels that of each channel: who has
        seen one of them has seen the case.
        """
        found = {key: {value} for key, value in self.fingerprints().items()}
        for i in np.flatnonzero(self.shapes[:, 0] > 1):
            channels = self.meta(int(i))["channels"]
            found[self.keys[i]] |= {as_text(c["fingerprint"]) for c in channels}
        return found

    def _map(self, shard: int) -> mmap.mmap:
        if os.getpid() != self._pid:
            # After a fork the maps are the parent's; leave them to it and start afresh.
            self._maps, self._pid = OrderedDict(), os.getpid()
        if shard in self._maps:
            self._maps.move_to_end(shard)
            return self._maps[shard]
        path, expected = self._shards[shard].path, self._shards[shard].bytes
        try:
            with path.open("rb") as file:
                found = os.fstat(file.fileno()).st_size
                if found != expected:
                    raise CorruptionError(
                        f"{path} has {found} bytes, corpus.json says {expected}; copy the shard "
                        "again"
                    )
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError:
            raise CorruptionError(f"{path} is missing; copy the shard again") from None
        self._maps[shard] = mapped
        if len(self._maps) > OPEN_SHARDS:
            # Not closed: another thread may be reading; it unmaps when the last reader lets go.
            self._maps.popitem(last=False)
        return mapped

    def _bytes(self, i: int, payload: str, offset: int, size: int) -> bytes:
        data = self._map(int(self.shards[i]))[int(offset) : int(offset) + int(size)]
        if len(data) != int(size):
            raise self._damaged(i, payload, "lies outside its shard")
        return data

    def _table_of(self, i: int, payload: str) -> np.ndarray:
        prefix = f"{payload}_chunks"
        data = self._bytes(
            i, prefix, self.column(f"{prefix}_offset")[i], self.column(f"{prefix}_size")[i]
        )
        if xxhash.xxh3_64_intdigest(data) != int(self.column(f"{prefix}_xxh3")[i]):
            raise self._damaged(i, payload, "has a damaged chunk table")
        try:
            return read_table(data, int(self.column(f"{payload}_size")[i]))
        except CorruptionError as error:
            raise self._damaged(i, payload, f"is unreadable: {error}") from error

    def _verify(
        self, i: int, payload: str, what: str, view: memoryview, offset: int, row: np.void
    ) -> None:
        first = offset + int(row["offset"])
        region = view[first : first + int(row["bytes"])]
        if xxhash.xxh3_64_intdigest(region) != int(row["xxh3"]):
            raise self._damaged(i, payload, f"is damaged in its {what}")

    def _open_frame(self, i: int, payload: str, offset: int) -> Any:
        try:
            return blosc2.open(
                str(self._shards[int(self.shards[i])].path),
                mode="r",
                offset=offset,
                mmap_mode="r",
                dparams=blosc2.DParams(nthreads=1),
            )
        except (RuntimeError, ValueError, OSError) as error:
            raise self._damaged(i, payload, f"does not open ({error})") from error

    def _damaged(self, i: int, payload: str, what: str) -> CorruptionError:
        return CorruptionError(
            f"{self._shards[int(self.shards[i])].path}: sample {self.keys[i]}, payload "
            f"{payload} {what}; copy the shard again (`voxelith check` lists all damage)"
        )


def open_corpus(path: Path | Sequence[Path], key: str) -> Corpus:
    """Opens the corpus, or corpora, that a setting names and looks for the shards.

    Raises:
        InputError: it is not there, no corpus or not whole; each problem begins with `key=path`.
    """

    def work(path: Path) -> Corpus:
        corpus = Corpus.open(path)
        corpus.require_shards()
        return corpus

    if isinstance(path, Path):
        return named(key, path, work)
    problems: list[str] = []
    for one in path:
        attempt(problems, named, key, one, work)
    if problems:
        raise InputError(problems)
    return Corpus.open(*path)


def split_hash(data: dict[str, Any]) -> str:
    """Sha256 over a split without its hash, in canonical JSON."""
    content = {name: value for name, value in data.items() if name != "hash"}
    return hashlib.sha256(canonical_json(content)).hexdigest()


def _read_parquet(data: bytes) -> pa.Table:
    """All columns, by this thread alone.

    `pq.read_table` starts Arrow's thread pool even for one thread; that now and then aborts the
    interpreter at exit (apache/arrow#34314) and does not survive a fork.
    """
    with pq.ParquetFile(pa.BufferReader(data), pre_buffer=False) as file:
        return file.read(use_threads=False)


def _read_index(root: Path, info: Mapping[str, Any]) -> pa.Table:
    path = root / info["index"]["file"]
    if not path.is_file():
        raise InputError(
            f"{root}: the index {path.name} is missing; copy the corpus again, or write it again "
            "with `voxelith prep`"
        )
    data = path.read_bytes()
    found = hashlib.sha256(data).hexdigest()
    if found != info["index"]["sha256"]:
        raise CorruptionError(
            f"{path}: sha256 is {found[:12]}..., corpus.json says "
            f"{info['index']['sha256'][:12]}...; the index is damaged or of another corpus"
        )
    try:
        return _read_parquet(data)
    except pa.ArrowException as error:
        raise CorruptionError(f"{path}: not a Parquet file ({error})") from error


def _read_prints(root: Path, stated: Mapping[str, str]) -> list[dict[str, Any]]:
    path = root / stated["file"]
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"{root}: {path.name} is missing") from None
    if hashlib.sha256(data).hexdigest() != stated["sha256"]:
        raise CorruptionError(f"{path}: its sha256 is not the one in corpus.json")
    return list(_read_parquet(data).to_pylist())


def _together(paths: Sequence[Path], infos: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
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
            said = ", ".join(f"{path}: {value}" for path, value in zip(paths, values, strict=True))
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


def _read_info(root: Path) -> dict[str, Any]:
    if "://" in str(root) or str(root).startswith(("http:/", "https:/", "s3:/")):
        raise InputError(f"{root}: only local corpora can be opened; copy it to a disk first")
    if not root.is_dir():
        raise InputError(f"{root}: no such directory; `voxelith prep` writes a corpus")
    path = root / CORPUS_FILE
    if not path.is_file():
        raise InputError(
            f"{root}: not a corpus, it has no {CORPUS_FILE}; `voxelith prep input={root} "
            "output=...` makes one from scans"
        )
    try:
        info = json.loads(path.read_bytes())
    except ValueError as error:
        raise CorruptionError(f"{path}: not JSON ({error})") from error
    if not isinstance(info, dict) or info.get("format") != FORMAT:
        found = info.get("format") if isinstance(info, dict) else None
        raise InputError(f"{path}: format {found!r}, this program reads {FORMAT}; update voxelith")
    missing = [
        name for name in ("kind", "classes", "shards", "index", "fingerprints") if name not in info
    ]
    if missing:
        raise CorruptionError(f"{path}: lacks {', '.join(missing)}")
    strange = [s["name"] for s in info["shards"] if not _SHARD.fullmatch(str(s["name"]))]
    if strange:
        raise CorruptionError(f"{path}: no name of a shard: {', '.join(map(repr, strange[:3]))}")
    return info
