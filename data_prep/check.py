"""Every byte of a corpus against what was written, with the name of what is wrong."""

from __future__ import annotations

import json
import tarfile
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from data_prep.corpus import CORPUS_FILE, FINGERPRINTS_FILE, INDEX_FILE, Corpus
from data_prep.download import download
from data_prep.errors import CorruptionError, InputError
from data_prep.files import file_digest
from data_prep.progress import bar
from data_prep.shards import PAYLOADS, TAR_HEADER, array_suffix, read_table, table_suffix
from data_prep.storage import Shard

MAXIMUM_PER_SHARD = 20


class _Copy(NamedTuple):
    """A shard's file here, and what to call it in messages."""

    path: Path
    name: str

    def __str__(self) -> str:
        return self.name


def check(path: str | Path) -> list[str]:
    """All damage in the corpus at `path`, a sentence each; an empty list if it is whole.

    Of a corpus elsewhere each shard comes, is looked at, and goes again.

    Compares the sha256 and size of every shard, each header of its tar with the index, and every
    region of every payload with its chunk table; then fingerprints and splits, and what lies there
    besides.

    Raises:
        InputError: there is no corpus, or of a format that this program cannot read.
        UnreachableError: a server does not answer.
    """
    try:
        corpus = Corpus.open(path)
    except CorruptionError as error:
        return error.problems
    problems = _unknown_files(corpus)
    samples: list[list[int]] = [[] for _ in corpus.info["shards"]]
    for i, shard in enumerate(corpus.shards):
        if 0 <= shard < len(samples):
            samples[int(shard)].append(i)
        else:
            problems.append(f"index: sample {corpus.keys[i]} lies in shard {shard}, unknown")
    for number in bar(iterable=range(len(samples)), desc="check", unit="shard"):
        with tempfile.TemporaryDirectory(prefix="voxelith-check-") as folder:
            try:
                here = _here(corpus.shard(number), Path(folder))
            except InputError as error:
                problems += error.problems
            else:
                problems += _shard_problems(corpus, number, samples[number], here)
    return problems + _side_problems(corpus)


def _here(shard: Shard, folder: Path) -> _Copy:
    """A shard's own file, or its copy in a folder."""
    if isinstance(shard.root, Path):
        return _Copy(shard.root / shard.name, str(shard))
    copy = folder / "shard.tar"
    download(
        shard.root.source, shard.name, copy, shown=str(shard), limit=shard.bytes, quiet=True,
        key="TMPDIR",
    )  # fmt: skip
    return _Copy(copy, str(shard))


def _unknown_files(corpus: Corpus) -> list[str]:
    known = {shard["name"] for shard in corpus.info["shards"]}
    known |= {f"splits/{name}.json" for name in corpus.splits}
    known |= {CORPUS_FILE, INDEX_FILE, FINGERPRINTS_FILE}
    found = {p.relative_to(corpus.path).as_posix() for p in corpus.path.rglob("*") if p.is_file()}
    return [
        f"{corpus.path}/{name}: not a {'shard' if name.startswith('shards/') else 'file'} of this "
        "corpus; remove it"
        for name in sorted(found - known)
    ]


def _shard_problems(corpus: Corpus, number: int, samples: list[int], here: _Copy) -> list[str]:
    """Size, sha256, members, and every region of every payload, so that damage has a name."""
    stated = corpus.info["shards"][number]
    problems = []
    if not here.path.is_file():
        return [f"{here}: missing; copy the shard again"]
    sha256 = file_digest(here.path)
    size = here.path.stat().st_size
    if size != stated["bytes"]:
        problems.append(f"{here}: {size} bytes, corpus.json says {stated['bytes']}")
    elif sha256 != stated["sha256"]:
        problems.append(f"{here}: sha256 differs from corpus.json; copy the shard again")
    if stated["samples"] != len(samples):
        problems.append(
            f"{here}: {len(samples)} samples in the index, corpus.json says {stated['samples']}"
        )
    details = _member_problems(corpus, here, samples)
    if size == stated["bytes"]:
        for i in samples:
            details += _sample_problems(corpus, here, i)
    if len(details) > MAXIMUM_PER_SHARD:
        more = len(details) - MAXIMUM_PER_SHARD
        details = [*details[:MAXIMUM_PER_SHARD], f"{here}: and {more} more"]
    return problems + details


def _member_problems(corpus: Corpus, here: _Copy, samples: list[int]) -> list[str]:
    """The tar's own words about each member, where the index says it lies; and all between them.

    Not by a tar reader, to which the first damaged header is the end of the file.
    """
    problems, end = [], 0
    size = here.path.stat().st_size
    places = sorted(
        (int(corpus.column(f"{column}_offset")[i]), int(corpus.column(f"{column}_size")[i]), i, suf)
        for i in samples
        for suf, column in _members(corpus, i)
    )
    with here.path.open("rb") as file:
        for offset, count, i, suffix in places:
            name = f"{corpus.keys[i]}.{suffix}"
            if offset + count > size:
                problems.append(f"{here}: member {name} is missing, or its end is")
                continue
            file.seek(offset - TAR_HEADER)
            try:
                header = tarfile.TarInfo.frombuf(file.read(TAR_HEADER), "ascii", "strict")
            except tarfile.HeaderError as error:
                problems.append(f"{here}: the header of member {name} is damaged ({error})")
            else:
                if (header.name, header.size) != (name, count):
                    problems.append(
                        f"{here}: where the index has member {name} of {count} bytes lies "
                        f"{header.name} of {header.size}"
                    )
            if offset - TAR_HEADER != end:
                problems.append(f"{here}: before member {name} lies what is not in the index")
            end = offset + count + -count % TAR_HEADER
        file.seek(end)
        if size > end and any(file.read()):
            problems.append(f"{here}: after byte {end} lies what is not in the index")
    return problems


def _members(corpus: Corpus, i: int) -> list[tuple[str, str]]:
    """(suffix in the tar, column in the index) of all members of a sample."""
    members = [("json", "json")]
    for payload in PAYLOADS:
        if corpus.sample_has(i, payload):
            members += [
                (table_suffix(payload), f"{payload}_chunks"),
                (array_suffix(payload), payload),
            ]
    return members


def _sample_problems(corpus: Corpus, here: _Copy, i: int) -> list[str]:
    key = corpus.keys[i]
    problems = []
    data = {}
    with here.path.open("rb") as file:
        for suffix, column in _members(corpus, i):
            file.seek(int(corpus.column(f"{column}_offset")[i]))
            data[suffix] = file.read(int(corpus.column(f"{column}_size")[i]))
    if xxhash.xxh3_64_intdigest(data["json"]) != int(corpus.column("json_xxh3")[i]):
        problems.append(f"{here}: sample {key}: {key}.json is damaged")
    else:
        problems += _meta_problems(corpus, here, i, json.loads(data["json"]))
    for payload in PAYLOADS:
        if array_suffix(payload) not in data:
            continue
        table_data, frame = data[table_suffix(payload)], data[array_suffix(payload)]
        stated = int(corpus.column(f"{payload}_chunks_xxh3")[i])
        if xxhash.xxh3_64_intdigest(table_data) != stated:
            problems.append(f"{here}: sample {key}, payload {payload}: its chunk table is damaged")
            continue
        try:
            table = read_table(table_data, len(frame))
        except CorruptionError as error:
            problems.append(f"{here}: sample {key}, payload {payload}: {error}")
            continue
        for row, region in enumerate(table):
            first = int(region["offset"])
            part = memoryview(frame)[first : first + int(region["bytes"])]
            if xxhash.xxh3_64_intdigest(part) != int(region["xxh3"]):
                last = len(table) - 1
                what = {0: "header", last: "index"}.get(row, f"chunk {row - 1}")
                problems.append(f"{here}: sample {key}, payload {payload}: {what} is damaged")
    return problems


def _meta_problems(corpus: Corpus, here: _Copy, i: int, meta: dict[str, Any]) -> list[str]:
    """KEY.json against the row of the index."""
    pairs = {
        "key": (meta.get("key"), corpus.keys[i]),
        "subject": (meta.get("subject"), corpus.subjects[i]),
        "shape": (meta.get("shape"), corpus.shapes[i].tolist()),
        "spacing": (meta.get("spacing"), corpus.spacings[i].tolist()),
    }
    return [
        f"{here}: sample {corpus.keys[i]}: {name} is {one!r}, the index says {other!r}"
        for name, (one, other) in pairs.items()
        if one != other
    ]


def _side_problems(corpus: Corpus) -> list[str]:
    """Fingerprints and splits."""
    problems = []
    try:
        corpus.fingerprints()
    except InputError as error:
        problems += error.problems
    known = set(corpus.keys)
    told: dict[str, str] = corpus.info.get("splits", {})  # others were drawn since
    # Of a corpus elsewhere splits are not read: nothing trains or scores by them from there.
    for name in sorted({*corpus.splits, *told}) if corpus.path.is_dir() else ():
        try:
            split = corpus.split(name)
            parts = split["parts"]
        except InputError as error:
            problems += error.problems
            continue
        if split["hash"] != told.get(name, split["hash"]):
            problems.append(
                f"{corpus}: split {name} is another than corpus.json tells; copy it again, or "
                "give it a name of its own"
            )
        strange = sorted({key for keys in parts.values() for key in keys} - known)
        if strange:
            problems.append(
                f"{corpus}: split {name} names {len(strange)} unknown keys, as {strange[0]}"
            )
    return problems
