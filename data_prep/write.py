"""Spooled samples into shards, and the columns that say where everything lies."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from data_prep.files import write_bytes
from data_prep.scan import Scanned, spool_path
from data_prep.shards import PAYLOADS, Member, ShardWriter, array_suffix, table_suffix


@dataclass(frozen=True)
class WriteJob:
    """One shard: its number and its samples in order, (case number, key, KEY.json, suffixes)."""

    number: int
    folder: Path
    spool: Path
    samples: list[tuple[int, str, bytes, list[str]]]


@dataclass(frozen=True)
class Written:
    """One finished shard: size, sha256, and per sample the places and xxh3 of its members."""

    number: int
    bytes: int
    sha256: str
    places: list[dict[str, Member]]
    hashes: list[dict[str, int]]


def assign_shards(sizes: Sequence[int], target: int) -> list[list[int]]:
    """Sample numbers per shard, in order; a shard closes before it would pass `target` bytes."""
    plan: list[list[int]] = []
    filled = 0
    for i, size in enumerate(sizes):
        if not plan or filled + size > target:
            plan.append([])
            filled = 0
        plan[-1].append(i)
        filled += size
    return plan


def write_shard(job: WriteJob) -> Written:
    """Write one shard from the spool, and free what it used there."""
    path = job.folder / f"{job.number:06d}.tar"
    places, hashes = [], []
    with path.open("wb") as file:
        writer = ShardWriter(file)
        for number, key, meta, suffixes in job.samples:
            members = {"json": meta}
            for suffix in suffixes:
                spooled = spool_path(job.spool, number, suffix)
                members[suffix] = spooled.read_bytes()
                spooled.unlink()
            places.append(writer.add(key, members))
            hashes.append(
                {
                    suffix: xxhash.xxh3_64_intdigest(data)
                    for suffix, data in members.items()
                    if suffix == "json" or suffix.endswith(".npy")
                }
            )
        writer.close()
        file.flush()
        os.fsync(file.fileno())
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return Written(job.number, path.stat().st_size, sha256, places, hashes)


def write_index(path: Path, kept: Sequence[Scanned], written: Sequence[Written]) -> str:
    """The columnar index, one row per sample in order; gives its sha256."""
    where = [
        (shard.number, places, hashes)
        for shard in written
        for places, hashes in zip(shard.places, shard.hashes, strict=True)
    ]
    text, whole, hashed = pa.string(), pa.int64(), pa.uint64()
    columns: dict[str, pa.Array] = {}

    def column(name: str, values: list[Any], kind: pa.DataType) -> None:
        columns[name] = pa.array(values, type=kind)

    metas = [sample.meta for sample in kept]
    column("key", [sample.key for sample in kept], text)
    column("subject", [meta["subject"] for meta in metas], text)
    column("shard", [number for number, _, _ in where], pa.int32())
    column("modality", [meta["channels"][0]["modality"] for meta in metas], text)
    for name in ("sequence", "source", "licence"):
        column(name, [meta[name] for meta in metas], text)
    for a, axis in enumerate("cdhw"):
        column(f"shape_{axis}", [meta["shape"][a] for meta in metas], whole)
    for a, axis in enumerate("dhw"):
        column(f"spacing_{axis}", [meta["spacing"][a] for meta in metas], pa.float64())
    absent = Member(-1, 0)
    for payload in PAYLOADS:
        for name, suffix in (
            (payload, array_suffix(payload)),
            (f"{payload}_chunks", table_suffix(payload)),
        ):
            members = [places.get(suffix, absent) for _, places, _ in where]
            column(f"{name}_offset", [member.offset for member in members], whole)
            column(f"{name}_size", [member.size for member in members], whole)
        hashes = [found.get(table_suffix(payload), 0) for _, _, found in where]
        column(f"{payload}_chunks_xxh3", hashes, hashed)
    column("json_offset", [places["json"].offset for _, places, _ in where], whole)
    column("json_size", [places["json"].size for _, places, _ in where], whole)
    column("json_xxh3", [found["json"] for _, _, found in where], hashed)
    return _write_parquet(path, columns)


def write_fingerprints(path: Path, kept: Sequence[Scanned]) -> str:
    """The fingerprints, one row per sample in order; gives the file's sha256."""
    prints = [sample.meta["fingerprint"] for sample in kept]
    return _write_parquet(
        path,
        {
            "key": pa.array([sample.key for sample in kept], type=pa.string()),
            "algorithm": pa.array([p["algorithm"] for p in prints], type=pa.string()),
            "version": pa.array([p["version"] for p in prints], type=pa.int32()),
            "value": pa.array([p["value"] for p in prints], type=pa.string()),
        },
    )


def _write_parquet(path: Path, columns: dict[str, pa.Array]) -> str:
    # A buffer of Arrow's own: writing to a Python file would take its thread pool.
    buffer = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), buffer, compression="zstd")
    data = buffer.getvalue().to_pybytes()
    write_bytes(path, data)
    return hashlib.sha256(data).hexdigest()
