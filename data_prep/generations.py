"""A corpus that changes: subjects are withdrawn, scans are added. Each change is a generation.

Shards without a withdrawn sample are linked and not written again; the changed corpus takes the
place of the old one in a single rename, like a new one. Its index, and so its hash, is another: a
run that is under way goes on only with the generation that it began with.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tarfile
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow as pa
from pydantic import ValidationError

from data_prep.build import next_generation, prep
from data_prep.corpus import (
    CORPUS_FILE,
    FINGERPRINTS_FILE,
    INDEX_FILE,
    Corpus,
    books,
    read_parquet,
    shard_name,
    with_sketches,
)
from data_prep.errors import (
    CorruptionError,
    FailedError,
    InputError,
    config_text,
    plain_message,
    some,
)
from data_prep.exclusions import write_excluded
from data_prep.files import (
    atomic,
    file_digest,
    read_csv,
    read_note,
    write_bytes,
    write_csv,
    write_once,
)
from data_prep.naming import (
    DUPLICATES,
    DUPLICATES_OF_BEFORE,
    EXCLUDED_FILE,
    KEYMAP_COLUMNS,
    KEYMAP_FILE,
    QUARANTINE_FILE,
    QUARANTINE_HEADER,
    REFUSED_FILE,
    REFUSED_FILES,
    REQUEST_FILE,
    SALT_FILE,
    SALTED_PATIENT,
    WITHDRAWN_FILE,
    keyed_hash,
    new_salt,
    private_folder,
    read_salt,
    read_withdrawn,
    salted_patient,
    slug,
)
from data_prep.pictures import pictured
from data_prep.progress import tell
from data_prep.publish import Say, counts_of, label_counts, take_place
from data_prep.request import check_request, existing_result
from data_prep.settings import SHAPING, PrepSettings, RemoveSettings
from data_prep.shards import ShardWriter, array_suffix, canonical_json, table_suffix
from data_prep.splits import PARTS, split_from, write_split
from data_prep.work import WorkFolder, hold, others, remove_folder, work_root
from data_prep.write import write_parquet

SUBJECT = "subject "
"""Begins a line of `WITHDRAWN_FILE` that names a subject: all that there is of it goes too."""
_COPY_OF = re.compile(r"duplicate of ([a-z0-9_-]+)\b(?! scan)")


def remove(settings: RemoveSettings, say: Say = tell) -> dict[str, Any]:
    """Withdraws subjects or single samples from a corpus; only their shards are written again.

    Raises:
        InputError: a name is unknown, or nothing would be left.
        CorruptionError: a shard that must be written again is damaged.
    """
    output, private = settings.output, private_folder(settings.output)
    request = canonical_json(["remove", settings.names])
    with hold(output, hashlib.sha256(request).hexdigest(), alone=True) as work:
        corpus = Corpus.open(output)
        names = _all_names(corpus, private, settings.names)
        gone = _rows_of(corpus, output, settings.names)
        kept = [i for i in range(len(corpus)) if i not in gone]
        written = 0
        if gone:
            _make_anew(work)
            _note_withdrawn(private, corpus, gone)
            change = {"added": 0, "removed": len(gone)}
            result = _put_together(work.corpus, [_Part(corpus, output, kept)], change)
            written = int(result["rewritten"])
            _note_index(output, result)
            take_place(work.corpus, output)
        work.remove()
        after = Corpus.open(output)
        forgotten = _forget(private, set(after.subjects), names)
        begun = [*others(output, work), *_left_over(_addition(output))]
    say(
        f"{output}: {len(gone)} samples withdrawn, {len(kept)} are left; {written} shards were "
        f"written again, {forgotten} rows of the quarantine are gone"
    )
    for folder in begun:
        say(
            f"of an unfinished prep of this output, may hold what was withdrawn: {folder} "
            "(rm -r removes it)"
        )
    return {
        "output": str(output),
        "removed": len(gone),
        "samples": len(kept),
        "shards_rewritten": written,
        "unfinished": [str(folder) for folder in begun],
        "index_hash": after.index_hash,
    }


def append(
    settings: PrepSettings, say: Say = tell, *, said: Collection[str] = SHAPING
) -> dict[str, Any]:
    """Adds the scans of another input as a new generation: prepared beside it, then put together.

    What the corpus has already, or had before it was withdrawn, stays out, copies too.

    Args:
        settings: of the addition.
        say: gets the lines that tell of it.
        said: the options of `SHAPING` that count as they are set; all others are the corpus's.

    Raises:
        InputError: as `prep`, or the input is of another kind than the corpus.
    """
    output = settings.output
    beside = _addition(output)
    request = hashlib.sha256(b"append").hexdigest()
    with hold(output, request, alone=True):
        corpus = Corpus.open(output)  # one that was moved away by a start that was killed is back
        settings = _as_it_was_made(settings, corpus, said)
        _refuse_other_options(settings, corpus)
        if settings.salt is None:  # a corpus without a secret may get scans that need one
            private = private_folder(output)
            private.mkdir(mode=0o700, exist_ok=True)
            write_once(private / SALT_FILE, new_salt())
        words = _beside(settings, corpus, beside)
        index = _prepared_before(words, corpus)
    index = index or _prepared(words, corpus, say)
    with hold(output, request, alone=True) as work:
        if index not in _additions(Corpus.open(output)):
            _join(output, beside, work)
        work.remove()
        _discard(beside)
        corpus = Corpus.open(output)
    added = _additions(corpus)[index]
    number = added["number"]
    say(f"{output}: {added['added']} volumes added as generation {number}, {len(corpus)} in all")
    return {
        "output": str(output),
        "added": added["added"],
        "samples": len(corpus),
        "generation": number,
        "index_hash": corpus.index_hash,
    }


def _addition(output: Path) -> Path:
    """Where an addition to a corpus is prepared."""
    return output.with_name(f".{output.name}.more")


def _folders(beside: Path) -> tuple[Path, Path, Path]:
    """All that there may be of an addition; last the one by which it is known."""
    return beside, work_root(beside), private_folder(beside)


def _left_over(beside: Path) -> list[Path]:
    """What there is of an addition, unless it is under way: then it ends by itself."""
    there = [path for path in _folders(beside) if path.exists()]
    if not there:
        return []
    try:
        with hold(beside, hashlib.sha256(b"remove").hexdigest(), alone=True):
            return there
    except InputError:
        return []


def _join(output: Path, beside: Path, work: WorkFolder) -> None:
    """Puts a corpus and what was prepared beside it together; no file of that is open afterwards.

    Raises:
        InputError: their labels do not go together; the addition is removed.
    """
    corpus, more = Corpus.open(output), Corpus.open(beside)
    _refuse_other_classes(corpus, more)
    _make_anew(work)
    both = ((corpus, output), (more, beside))
    parts = [_Part(one, path, range(len(one))) for one, path in both]
    change = {"added": len(more), "removed": 0, "index": more.index_hash}
    result = _put_together(work.corpus, parts, change)
    _join_private(private_folder(output), private_folder(beside), next_generation(corpus))
    _note_index(output, result)
    take_place(work.corpus, output)


def _prepared_before(words: PrepSettings, corpus: Corpus) -> str:
    """Hash of the index of an addition that a start that was killed has prepared; empty: none.

    It may even have put it together with the corpus. What one with another input has left goes.
    """
    beside, theirs = words.output, private_folder(words.output)
    if not beside.exists() and not theirs.exists():
        return ""
    request = check_request(words.model_copy(update={"output": corpus.path}))[2]
    note = read_note(theirs / REQUEST_FILE)
    asked = note.get("request") == request
    if asked and (note["index"] in _additions(corpus) or _answers(words, request)):
        return str(note["index"])
    if beside.exists():
        _discard(beside)
    return ""


def _prepared(words: PrepSettings, corpus: Corpus, say: Say) -> str:
    """Prepares an addition as a corpus beside the one that it is for; hash of its index.

    What is said names the places where things will stay.
    """
    beside, theirs = words.output, private_folder(words.output)
    private = private_folder(corpus.path)

    def lasting(text: str) -> str:
        return text.replace(str(theirs), str(private)).replace(str(beside), str(corpus.path))

    try:
        made = prep(words, lambda line: say(f"addition: {lasting(line)}"), onto=corpus)
    except (InputError, FailedError) as error:
        if (theirs / REFUSED_FILE).is_file():
            private.mkdir(mode=0o700, exist_ok=True)
            (theirs / REFUSED_FILE).replace(private / REFUSED_FILE)
            shutil.rmtree(theirs)
        if isinstance(error, FailedError):
            raise FailedError(lasting(str(error)), error.result) from error
        raise type(error)([lasting(problem) for problem in error.problems]) from error
    return made.index_hash


def _answers(settings: PrepSettings, request: str) -> bool:
    """Whether the corpus of a request is there, whole."""
    try:
        return existing_result(settings, request) is not None
    except InputError:
        return False


def _discard(beside: Path) -> None:
    """Removes an addition; last its private folder, by which it is known until then."""
    for folder in _folders(beside):
        remove_folder(folder)


def _beside(settings: PrepSettings, corpus: Corpus, beside: Path) -> PrepSettings:
    """The prep of an addition: with the corpus's salt."""
    return settings.model_copy(
        update={
            "append": False,
            "output": beside,
            "name": corpus.info["name"],
            "labels": corpus.labelled,
            "salt": settings.salt or private_folder(settings.output) / SALT_FILE,
        }
    )


def _additions(corpus: Corpus) -> dict[str, dict[str, Any]]:
    """What was added to a corpus, by the hash of its index when it came."""
    return {one["index"]: one for one in corpus.info["generations"] if "index" in one}


def _make_anew(work: WorkFolder) -> None:
    shutil.rmtree(work.path, ignore_errors=True)
    work.make()


@dataclass(frozen=True)
class _Part:
    """A corpus on this disk, and which of its samples are wanted."""

    corpus: Corpus
    root: Path
    rows: Sequence[int]


def _rows_of(corpus: Corpus, output: Path, names: Sequence[str]) -> set[int]:
    """Samples by key, subject, or what the input called one of them."""
    keymap = private_folder(output) / KEYMAP_FILE
    called: dict[str, set[str]] = {}
    for row in read_csv(keymap):
        for column in KEYMAP_COLUMNS[2:]:
            called.setdefault(row.get(column) or "", set()).add(row["key"])
    found: set[int] = set()
    problems = []
    private = private_folder(output)
    before = read_withdrawn(private)
    left_out = read_csv(private / QUARANTINE_FILE)
    quarantined = {row.get(column) for row in left_out for column in ("input", "subject")}
    for name in names:
        keys = called.get(name, set())
        rows = {
            i
            for i, (key, subject) in enumerate(zip(corpus.keys, corpus.subjects, strict=True))
            if name in (key, subject) or key in keys
        }
        # A start that was killed had withdrawn them, and not forgotten their names.
        known = keys and keys <= before
        if not rows and not known and not quarantined & _all_names(corpus, private, [name]):
            problems.append(
                f"remove={name}: is no key or subject of {output}, and no name in {keymap.name} or "
                f"{QUARANTINE_FILE} of its private folder"
            )
        found |= rows
    if len(found) == len(corpus):
        problems.append(f"remove: nothing would be left of {output}; delete it instead")
    if problems:
        raise InputError(problems)
    return found


def _put_together(root: Path, parts: Sequence[_Part], generation: dict[str, Any]) -> dict[str, Any]:
    """Writes a corpus of the wanted samples of some: shards linked or written again, and books."""
    shards: list[dict[str, Any]] = []
    tables, prints, rewritten = [], [], 0
    for part in parts:
        table, looks = (
            read_parquet((part.root / name).read_bytes()).take(pa.array(part.rows))
            for name in (INDEX_FILE, FINGERPRINTS_FILE)
        )
        looks = with_sketches(looks)
        numbers = table.column("shard").to_pylist()
        keys_of: dict[int, set[str]] = {}
        for number, key in zip(numbers, table.column("key").to_pylist(), strict=True):
            keys_of.setdefault(number, set()).add(key)
        places: dict[str, dict[str, int]] = {}
        renumbered = {}
        for number, info in enumerate(part.corpus.info["shards"]):
            keys = keys_of.get(number)
            if not keys:
                continue
            renumbered[number] = len(shards)
            name = shard_name(len(shards))
            if len(keys) == info["samples"]:
                _link(part.root / info["name"], root / name)
                shards.append({**info, "name": name})
                continue
            rewritten += 1
            places |= _rewritten(part.root / info["name"], info["sha256"], root / name, keys)
            shards.append(
                {
                    "name": name,
                    "bytes": (root / name).stat().st_size,
                    "sha256": file_digest(root / name),
                    "samples": len(keys),
                }
            )
        tables.append(_moved(table, [renumbered[n] for n in numbers], places))
        prints.append(looks)
    index = write_parquet(root / INDEX_FILE, pa.concat_tables(tables))
    print_file = write_parquet(root / FINGERPRINTS_FILE, pa.concat_tables(prints))
    first = parts[0].corpus.info
    before = first["generations"]
    classes, splits = _classes(parts), _splits(parts)
    info = {
        **first,
        "shards": shards,
        "index": {"file": INDEX_FILE, "sha256": index},
        "fingerprints": {"file": FINGERPRINTS_FILE, "sha256": print_file},
        "generations": [*before, {"number": len(before) + 1, **generation}],
        "splits": {str(split["name"]): str(split["hash"]) for split in splits},
        "classes": classes,
        "counts": _counts(parts, classes),
    }
    for split in splits:
        write_split(split, root / "splits")
    write_bytes(root / CORPUS_FILE, books(info))
    return {"index": index, "rewritten": rewritten}


def _link(old: Path, new: Path) -> None:
    try:
        os.link(old, new)
    except OSError:  # another file system, or one without links
        shutil.copyfile(old, new)


def _rewritten(old: Path, sha256: str, new: Path, keys: set[str]) -> dict[str, dict[str, int]]:
    """Writes a shard with some of its samples; gives where their members lie now.

    One sample after the other, as their members lie there: a shard may be larger than the memory.
    """
    if file_digest(old) != sha256:
        raise CorruptionError(f"{old}: its sha256 is not the one in corpus.json; copy it again")
    places = {}
    with tarfile.open(old) as tar, atomic(new) as file:
        writer = ShardWriter(file)
        for key, members in groupby(tar, key=lambda member: member.name.partition(".")[0]):
            if key in keys:
                found = writer.add(key, dict(_stored(tar, member) for member in members))
                places[key] = {suffix: member.offset for suffix, member in found.items()}
        writer.close()
    return places


def _stored(tar: tarfile.TarFile, member: tarfile.TarInfo) -> tuple[str, bytes]:
    """A member of a sample: its suffix, and what it holds."""
    file = tar.extractfile(member)
    assert file is not None
    return member.name.partition(".")[2], file.read()


def _moved(table: pa.Table, shards: list[int], places: dict[str, dict[str, int]]) -> pa.Table:
    """The index with new numbers of shards, and new offsets of what was written again."""
    keys = table.column("key").to_pylist()
    columns = {}
    for name in table.column_names:
        column = table.column(name)
        if name == "shard":
            column = pa.array(shards, type=column.type)
        elif name.endswith("_offset"):
            suffix = _suffix(name.removesuffix("_offset"))
            values = [
                old if old < 0 or key not in places else places[key][suffix]
                for key, old in zip(keys, column.to_pylist(), strict=True)
            ]
            column = pa.array(values, type=column.type)
        columns[name] = column
    return pa.table(columns)


def _suffix(member: str) -> str:
    if member == "json":
        return member
    payload = member.removesuffix("_chunks")
    return table_suffix(payload) if payload != member else array_suffix(payload)


def _classes(parts: Sequence[_Part]) -> list[dict[str, Any]]:
    """The class table of all: additions may have what was not there before."""
    rows = {row["value"]: row for part in reversed(parts) for row in part.corpus.classes}
    return [row for _, row in sorted(rows.items())]


def _counts(parts: Sequence[_Part], classes: list[dict[str, Any]]) -> dict[str, Any]:
    """What corpus.json counts, of the wanted samples; what became of files is that of all preps."""
    metas = [part.corpus.meta(i) for part in parts for i in part.rows]
    told = [part.corpus.info["counts"] for part in parts]
    keys = {meta["key"] for meta in metas}
    found = counts_of(metas) | {
        name: dict(sum((Counter(one[name]) for one in told), Counter()))
        for name in ("rejected", "files")
    }
    small = [key for one in told for key in one.get("not_comparable", [])]
    found["not_comparable"] = [key for key in small if key in keys]
    if parts[0].corpus.labelled:
        found |= label_counts(metas, classes)
    return found


def _splits(parts: Sequence[_Part]) -> list[dict[str, Any]]:
    """The splits of the first corpus, for the wanted samples of all.

    A subject stays in its part. New ones go where a split of the same name among theirs puts them,
    and into no part where there is none.
    """
    first = parts[0].corpus
    made = []
    for name in first.splits:
        before = first.split(name)
        home = {subject: p for p in PARTS for subject in before["groups"][p]}
        part_of = {key: p for p in PARTS for key in before["parts"][p]}
        for part in parts[1:]:
            theirs = part.corpus.split(name) if name in part.corpus.splits else None
            for i in part.rows:
                key, subject = part.corpus.keys[i], part.corpus.subjects[i]
                found = [p for p in PARTS if theirs and key in theirs["parts"][p]]
                part_of[key] = home.get(subject) or next(iter(found), "")
        keys = [part.corpus.keys[i] for part in parts for i in part.rows]
        subjects = [part.corpus.subjects[i] for part in parts for i in part.rows]
        placed = [part_of.get(key, "") for key in keys]
        made.append(split_from(name, keys, subjects, placed, before["seed"]))
    return made


def _as_it_was_made(settings: PrepSettings, corpus: Corpus, said: Collection[str]) -> PrepSettings:
    """The settings with the corpus's options where nothing was said.

    `deface` is never taken over: it names code that is run, which no file may choose.

    Raises:
        InputError: an option does not go with what was said.
    """
    made = corpus.info["options"]
    unsaid = (SHAPING & made.keys()) - {"deface", *said}
    try:
        return PrepSettings.model_validate(
            settings.model_dump() | {name: made[name] for name in unsaid}
        )
    except ValidationError as error:
        options = ", ".join(f"{name}={config_text(made[name])}" for name in sorted(unsaid))
        raise InputError(
            f"{settings.output}: was made with {options}, which does not go with what was given: "
            f"{plain_message(error.errors())}"
        ) from error


def _refuse_other_options(settings: PrepSettings, corpus: Corpus) -> None:
    """What all volumes of a corpus have in common, an addition must have as well."""
    mine = settings.shaping
    if settings.labels is not None:
        mine["labels"] = settings.labels
    # Of before some options were not noted.
    theirs = {name: value for name, value in corpus.info["options"].items() if name in mine}
    problems = [
        f"{name}={config_text(mine[name])}: {settings.output} was made with "
        f"{name}={config_text(value)}; an addition is made as that was"
        for name, value in theirs.items()
        if mine[name] != value
    ]
    salt = private_folder(settings.output) / SALT_FILE
    salted = settings.keys == "hmac" or any(map(SALTED_PATIENT.fullmatch, corpus.subjects))
    if salted and settings.salt is None and not salt.is_file():
        problems.append(
            f"salt: missing; {settings.output} was made with one that is not in {salt.parent}. "
            "With another, subjects would get other names"
        )
    if problems:
        raise InputError(problems)


def _refuse_other_classes(corpus: Corpus, more: Corpus) -> None:
    """A label value has one meaning in all of a corpus."""
    names = {row["value"]: row["name"] for row in corpus.classes}
    values = {row["name"]: row["value"] for row in corpus.classes}
    strange = [
        f"{row['value']}: {row['name']}"
        for row in more.classes
        if names.get(row["value"], row["name"]) != row["name"]
        or values.get(row["name"], row["value"]) != row["value"]
    ]
    if strange:
        _discard(more.path)
        raise InputError(
            f"classes={{{some(strange)}}}: {corpus.path} has other names or values "
            "for these; classes= gives the labels of an addition those of the corpus"
        )


def _note_withdrawn(private: Path, corpus: Corpus, gone: set[int]) -> None:
    """Notes what must not come back; names are kept until it is gone."""
    prints = corpus.scan_prints()
    keys = [corpus.keys[i] for i in gone]
    lines = read_withdrawn(private) | {one for key in keys for one in (key, *prints[key])}
    lines |= {f"{SUBJECT}{corpus.subjects[i]}" for i in gone}
    text = "".join(f"{line}\n" for line in sorted(lines))
    private.mkdir(mode=0o700, exist_ok=True)
    write_bytes(private / WITHDRAWN_FILE, text.encode(), mode=0o600)


def _forget(private: Path, left: set[str], names: set[str]) -> int:
    """Takes what was withdrawn out of the private folder: names, rows and pictures.

    Those of the withdrawn samples and of all that are copies of them; of subjects of whom nothing
    is left all rows. Gives the number of rows of the quarantine that went.

    Args:
        private: the folder.
        left: the subjects that the corpus still has.
        names: what was asked for, which may be in the quarantine alone.
    """
    gone = read_withdrawn(private)
    subjects = {one.removeprefix(SUBJECT) for one in gone if one.startswith(SUBJECT)} - left
    keymap = _rows(private / KEYMAP_FILE, KEYMAP_COLUMNS)
    names = names | {row[2] for row in keymap if row[0] in gone}
    quarantine = _rows(private / QUARANTINE_FILE, QUARANTINE_HEADER)
    kept = [
        (name, code, detail, subject)
        for name, code, detail, subject in quarantine
        if name not in names
        and subject not in names | subjects
        and gone.isdisjoint(_COPY_OF.findall(detail))
    ]
    if len(kept) < len(quarantine):
        write_csv(private / QUARANTINE_FILE, QUARANTINE_HEADER, kept)
    for picture in (private / DUPLICATES).glob("*.png"):
        stays, subject = pictured(picture)
        if stays in gone or subject in names | subjects:
            picture.unlink()
    for rest in (
        private / DUPLICATES_OF_BEFORE,
        *private.glob(REFUSED_FILES),
        *private.glob("*.html"),
    ):
        rest.unlink(missing_ok=True)  # whom they show or name cannot be taken out of them
    # Last, since it says which names are to go.
    if any(row[0] in gone for row in keymap):
        known = [row for row in keymap if row[0] not in gone]
        write_csv(private / KEYMAP_FILE, KEYMAP_COLUMNS, known)
    return len(quarantine) - len(kept)


def _all_names(corpus: Corpus, private: Path, names: Sequence[str]) -> set[str]:
    """Names, and what the corpus calls them if they are those of subjects."""
    salt = read_salt(private / SALT_FILE) if (private / SALT_FILE).is_file() else None
    if corpus.info["options"]["keys"] == "names":
        patients = {salted_patient(salt, name) for name in names if salt}
        return {*names, *map(slug, names)} | patients
    return {*names, *(keyed_hash(salt, "subject", name) for name in names if salt)}


def _join_private(private: Path, more: Path, generation: int) -> None:
    """Adds names, quarantine and pictures of an addition to those of its corpus."""
    private.mkdir(mode=0o700, exist_ok=True)
    for name, columns in (
        (KEYMAP_FILE, KEYMAP_COLUMNS),
        (QUARANTINE_FILE, QUARANTINE_HEADER),
    ):
        rows = _rows(private / name, columns)
        new = _rows(more / name, columns)
        write_csv(private / name, columns, [*rows, *(row for row in new if row not in rows)])

    if (more / EXCLUDED_FILE).is_file():
        write_excluded(private / EXCLUDED_FILE, [more / EXCLUDED_FILE])
    for picture in (more / DUPLICATES).glob("*.png"):
        (private / DUPLICATES).mkdir(mode=0o700, exist_ok=True)
        picture.replace(private / DUPLICATES / f"{generation}-{picture.name}")


def _rows(path: Path, columns: Sequence[str]) -> list[list[str]]:
    return [[row.get(column) or "" for column in columns] for row in read_csv(path)]


def _note_index(output: Path, result: dict[str, Any]) -> None:
    """The prep that made the corpus knows it again: it would say that nothing is to do."""
    file = private_folder(output) / REQUEST_FILE
    note = read_note(file)
    if note:
        write_bytes(file, canonical_json({**note, "index": result["index"]}), mode=0o600)
