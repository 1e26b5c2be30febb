"""Scanned samples into shards, and the columns that say where everything lies."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from data_prep.files import atomic, file_digest, write_bytes
from data_prep.scan import Scanned, read_case
from data_prep.shards import (
    PAYLOADS,
    Member,
    ShardWriter,
    array_suffix,
    canonical_json,
    table_suffix,
)
from data_prep.work import WorkFolder


@dataclass(frozen=True)
class WriteJob:
    """One shard: its number, its cases in order, and the label values that were looked for."""

    number: int
    work: WorkFolder
    cases: list[int]
    known: list[int] | None


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


def sample_json(meta: dict[str, Any], known: list[int] | None) -> bytes:
    """KEY.json of a sample; with labels it says which of the `known` values were looked for."""
    if known is not None:
        meta = {**meta, "annotated": _annotated(meta, known)}
    return canonical_json(meta)


def _annotated(meta: dict[str, Any], known: list[int]) -> list[int]:
    """Label values that were looked for in a case: all known ones, unless it lacks masks."""
    looked_for = meta.get("annotated", known)
    if meta["seg_encoding"] == "values":
        return sorted(looked_for)
    planes = sum(looked_for)
    return [value for value in known if not value & ~planes]


def write_shard(job: WriteJob) -> None:
    """Writes one shard and notes what lies where; then frees what it used of the work folder."""
    path = job.work.shard(job.number)
    places, hashes = [], []
    with atomic(path) as file:
        writer = ShardWriter(file)
        for number in job.cases:
            sample = read_case(job.work, number)
            assert isinstance(sample, Scanned)  # or the plan would have no place for it
            members = {"json": sample_json(sample.meta, job.known)}
            with job.work.payloads(number).open("rb") as payloads:
                members |= {name: payloads.read(sample.sizes[name]) for name in sample.suffixes}
            places.append(writer.add(sample.key, members))
            hashes.append(
                {
                    suffix: xxhash.xxh3_64_intdigest(data)
                    for suffix, data in members.items()
                    if suffix == "json" or suffix.endswith(".npy")
                }
            )
        writer.close()
    written = Written(job.number, path.stat().st_size, file_digest(path), places, hashes)
    write_bytes(job.work.shard_note(job.number), canonical_json(asdict(written)), mode=0o600)
    for number in job.cases:
        job.work.payloads(number).unlink(missing_ok=True)


def read_shard_note(work: WorkFolder, number: int) -> Written:
    """What lies where in a shard that is done."""
    note = json.loads(work.shard_note(number).read_bytes())
    places = [{name: Member(**m) for name, m in sample.items()} for sample in note["places"]]
    return Written(**{**note, "places": places})


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
    return write_parquet(path, columns)


def write_fingerprints(path: Path, kept: Sequence[Scanned]) -> str:
    """Fingerprints and sketches, one row per sample in order; gives the file's sha256."""
    prints = [sample.meta["fingerprint"] for sample in kept]
    return write_parquet(
        path,
        {
            "key": pa.array([sample.key for sample in kept], type=pa.string()),
            "algorithm": pa.array([p["algorithm"] for p in prints], type=pa.string()),
            "version": pa.array([p["version"] for p in prints], type=pa.int32()),
            "value": pa.array([p["value"] for p in prints], type=pa.string()),
            "sketch": pa.array([sample.look.to_bytes() for sample in kept], type=pa.binary()),
        },
    )


def write_parquet(path: Path, columns: dict[str, pa.Array] | pa.Table) -> str:
    """A columnar file, atomically; gives its sha256."""
    # A buffer of Arrow's own: writing to a Python file would take its thread pool.
    buffer = pa.BufferOutputStream()
    table = columns if isinstance(columns, pa.Table) else pa.table(columns)
    pq.write_table(table.combine_chunks(), buffer, compression="zstd")
    data = buffer.getvalue().to_pybytes()
    write_bytes(path, data)
    return hashlib.sha256(data).hexdigest()
