"""Finished shards become a corpus at its place: index, books, splits, names, and one rename."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from data_prep.corpus import CORPUS_FILE, FINGERPRINTS_FILE, FORMAT, INDEX_FILE, books, shard_name
from data_prep.deface import may_be_head
from data_prep.errors import some
from data_prep.exclusions import Exclusions, write_excluded
from data_prep.files import write_bytes, write_csv
from data_prep.folds import key_by_case, splits_of_folds, splits_of_numbers
from data_prep.layouts.case import Case, Layout, LeftOut, case_id, subject_from_name
from data_prep.naming import (
    EXCLUDED_FILE,
    KEYMAP_COLUMNS,
    KEYMAP_FILE,
    PRIVATE_FILES,
    QUARANTINE_FILE,
    QUARANTINE_HEADER,
    REFUSED_FILES,
    REQUEST_FILE,
    SALT_FILE,
    private_folder,
    subject_name,
)
from data_prep.plan import Plan
from data_prep.request import versions
from data_prep.scan import ScanJob, Scanned
from data_prep.settings import PrepResult, PrepSettings
from data_prep.shards import canonical_json
from data_prep.splits import make_split, split_from, write_split
from data_prep.work import WorkFolder, replaced
from data_prep.write import Written, write_fingerprints, write_index

Say = Callable[[str], None]


def complete(
    settings: PrepSettings,
    layout: Layout,
    jobs: Sequence[ScanJob],
    kept: Sequence[Scanned],
    written: Sequence[Written],
    plan: Plan,
    exclusions: Exclusions,
    root: Path,
) -> tuple[PrepResult, list[LeftOut]]:
    """Writes all that a corpus has besides its shards; gives all that was left out."""
    for rest in root.rglob(".*"):
        rest.unlink()  # of a start that was killed while it wrote
    labelled, classes, left_out = plan.labelled, plan.classes, list(plan.left_out)
    index_hash = write_index(root / INDEX_FILE, kept, written)
    prints_hash = write_fingerprints(root / FINGERPRINTS_FILE, kept)
    splits = _write_splits(root, layout, jobs, kept, labelled)
    files = _account(layout, jobs, kept, left_out)
    rejected = dict(sorted(Counter(row.code for row in left_out).items()))
    metas = [sample.meta for sample in kept]
    counts = counts_of(metas) | {
        "rejected": rejected,
        "files": files,
        # Too small to be looked for among other scans: neither clean nor duplicates.
        "not_comparable": [s.key for s in kept if not s.look.is_comparable],
    }
    if labelled:
        counts |= label_counts(metas, classes)
    info = {
        "format": FORMAT,
        "name": settings.name or settings.output.name,
        "kind": "labelled" if labelled else "unlabelled",
        "layout": layout.description,
        "classes": classes,
        "options": {
            **settings.shaping,
            "labels": labelled,
            "modality": settings.modality,
            "shard_mib": settings.shard_mib,
        },
        "versions": versions(),
        "counts": counts,
        "shards": [
            {
                "name": shard_name(shard.number),
                "bytes": shard.bytes,
                "sha256": shard.sha256,
                "samples": len(shard.places),
            }
            for shard in written
        ],
        "index": {"file": INDEX_FILE, "sha256": index_hash},
        "fingerprints": {"file": FINGERPRINTS_FILE, "sha256": prints_hash},
        "splits": splits,
        "generations": [{"number": 1, "added": len(kept), "removed": 0}],
    }
    write_bytes(root / CORPUS_FILE, books(info))
    result = PrepResult.of(
        info,
        settings.output,
        private_folder(settings.output),
        splits=list(splits),
        notes=[
            *_book_notes(layout, left_out, files["total"]),
            *_head_notes(metas),
            *_comparison_notes(counts),
            *exclusions.notes(),
            *_label_notes(counts),
        ],
    )
    return result, left_out


def counts_of(metas: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """How many samples there are, of what."""
    return {
        "samples": len(metas),
        "subjects": len({meta["subject"] for meta in metas}),
        "modality": _count(c["modality"] for m in metas for c in m["channels"][:1]),
        "source": _count(meta["source"] for meta in metas),
        "licence": _count(meta["licence"] for meta in metas),
    }


def label_counts(metas: Sequence[dict[str, Any]], classes: list[dict[str, Any]]) -> dict[str, Any]:
    """Cases by class, and those whose label is empty: sound, but worth a look."""
    found = [{int(value) for value in meta["class_counts"]} for meta in metas]
    return {
        "cases_by_class": {
            row["name"]: sum(row["value"] in values for values in found)
            for row in classes
            if row["value"]
        },
        "empty_labels": [m["key"] for m, values in zip(metas, found, strict=True) if not values],
    }


def _head_notes(metas: Sequence[dict[str, Any]]) -> list[str]:
    heads = sum(
        may_be_head(meta["channels"][0]["modality"], meta["shape"][1:], meta["spacing"])
        for meta in metas
        if "mask" not in meta["payloads"]
    )
    if not heads:
        return []
    return [
        f"{heads} volumes may be heads whose faces can be recognised: MR of 14 to 30 cm each way "
        "without a mask; deface=MODULE:FUNCTION takes faces away (docs/scans.md)"
    ]


def _comparison_notes(counts: dict[str, Any]) -> list[str]:
    keys = counts["not_comparable"]
    said = f"{len(keys)} too small to be compared with near-duplicates: {some(keys)}"
    return [said] if keys else []


def _label_notes(counts: dict[str, Any]) -> list[str]:
    notes = []
    empty = counts.get("empty_labels", [])
    if empty:
        notes.append(f"{len(empty)} labels are empty: {some(empty)}")
    absent = [name for name, n in counts.get("cases_by_class", {}).items() if not n]
    if absent:
        notes.append(f"no case has a voxel of {some(absent, 8)}")
    return notes


def _write_splits(
    root: Path, layout: Layout, jobs: Sequence[ScanJob], kept: Sequence[Scanned], labelled: bool
) -> dict[str, str]:
    """Hash by name: what the input says (`official`, `fold-N`), `default` where it has labels."""
    keys = [sample.key for sample in kept]
    subjects = [sample.meta["subject"] for sample in kept]
    cases = [jobs[sample.number].case for sample in kept]
    splits = []
    if any(case.split for case in cases):
        splits.append(split_from("official", keys, subjects, [case.split for case in cases]))
    elif labelled:
        splits.append(make_split(keys, subjects))
    if labelled and layout.folds is not None:
        with_labels = [job for job in jobs if job.case.label_files]
        key_of = key_by_case([(case_id(job.case), job.key) for job in with_labels])
        splits += splits_of_folds(layout.folds, key_of, keys, subjects)
    elif labelled and any(case.fold is not None for case in cases):
        splits += splits_of_numbers([case.fold for case in cases], keys, subjects)
    for split in splits:
        write_split(split, root / "splits")
    return {str(split["name"]): str(split["hash"]) for split in splits}


def _account(
    layout: Layout, jobs: Sequence[ScanJob], kept: Sequence[Scanned], left_out: list[LeftOut]
) -> dict[str, int]:
    """How every file of the input ended; unused labels are added to `left_out`."""
    stored = [jobs[sample.number].case for sample in kept]
    used = {path for case in stored for path in case.image_files}
    counts = {"images": len(used)}
    for what, paths in (
        ("labels", {path for case in stored for path in case.label_files}),
        ("masks", {case.mask for case in stored if case.mask is not None}),
    ):
        counts[what] = len(paths - used)
        used |= paths
    ignored = len(layout.ignored)
    lost: set[Path] = set()
    for case, job in zip(layout.cases, jobs, strict=True):
        # The first image of a case that is left out stands in the books already.
        for path in case.files[1:]:
            if path in used or path in lost:
                continue
            lost.add(path)
            if path in case.label_files and not job.labelled:
                ignored += 1
            else:
                left_out.append(
                    LeftOut(_beside(case, path), "image_left_out", f"belongs to {case.name}")
                )
    # Of a file with several volumes more than one may have a row, or others be samples.
    names = {row.name for row in left_out}
    seen = {path for case in stored for path in case.image_files}
    again = 0
    for case in layout.cases:
        if case.name in names:
            again += case.images[0] in seen
            seen.add(case.images[0])
    counts["left_out"] = len(left_out) - again
    counts["ignored"] = ignored
    counts["total"] = sum(counts.values())
    return counts


def _book_notes(layout: Layout, left_out: Sequence[LeftOut], total: int) -> list[str]:
    """Whether what became of files is of all that were found in a folder, and of each once."""
    if not layout.files:
        return []
    named = {row.name for row in left_out} - {case.name for case in layout.cases}
    named |= {*layout.ignored, *(_beside(c, path) for c in layout.cases for path in c.files)}
    lost = layout.files - named
    if not lost and total == len(named):
        return []
    return [
        f"the books do not add up, which is a mistake of voxelith: of {len(layout.files)} files "
        f"{len(lost)} are in no row, and {total} are counted where {len(named)} are named"
    ]


def _beside(case: Case, path: Path) -> str:
    """A label's name in the terms of the input: relative to the same root as its image's."""
    image, name = str(case.images[0]), str(Path(case.name))
    if not image.endswith(name):
        name = name.rpartition(" (volume")[0]
    root = Path(image[: len(image) - len(name)] or ".")
    try:
        return path.relative_to(root).as_posix()
    except ValueError:
        return str(path)


def _count(values: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(value or "unknown" for value in values).items()))


def publish(
    settings: PrepSettings,
    layout: Layout,
    work: WorkFolder,
    jobs: Sequence[ScanJob],
    kept: Sequence[Scanned],
    left_out: Sequence[LeftOut],
    salt: bytes,
    request: str,
    result: PrepResult,
) -> None:
    """Writes the private folder, then lets the corpus appear at its place in one rename.

    Killed at any moment, the same prep finds where it was: request and index are noted before the
    rename, and a corpus that was moved away goes back if no other took its place.
    """
    private = result.private
    private.mkdir(mode=0o700, exist_ok=True)
    private.chmod(0o700)
    for name in PRIVATE_FILES:
        for rest in private.glob(f".{name}.*"):
            rest.unlink()  # of a start that was killed while it wrote
    if salt and settings.salt is None:
        write_bytes(private / SALT_FILE, salt + b"\n", mode=0o600)
    keymap = [
        [job.key, job.subject, job.case.name, job.case.subject, case_id(job.case)]
        for job in (jobs[sample.number] for sample in kept)
    ]
    write_csv(private / KEYMAP_FILE, KEYMAP_COLUMNS, keymap)
    stored = {sample.number for sample in kept}
    others = [job for job in jobs if job.number not in stored]
    subjects = _subjects_left_out(settings, layout, others, left_out, salt)
    rows = sorted([row.name, row.code, row.detail, subjects.get(row.name, "")] for row in left_out)
    write_csv(private / QUARANTINE_FILE, QUARANTINE_HEADER, rows)
    for file in (*private.glob(REFUSED_FILES), private / EXCLUDED_FILE):
        file.unlink(missing_ok=True)
    write_excluded(private / EXCLUDED_FILE, settings.excluded)
    note = canonical_json({"request": request, "index": result.index_hash})
    write_bytes(private / REQUEST_FILE, note, mode=0o600)

    take_place(work.corpus, settings.output)


def _subjects_left_out(
    settings: PrepSettings,
    layout: Layout,
    jobs: Sequence[ScanJob],
    left_out: Sequence[LeftOut],
    salt: bytes,
) -> dict[str, str]:
    """The subject of each file that was left out, as the corpus would call it, where it is known.

    So that a subject that is withdrawn goes from the quarantine too.
    """
    found = {row.name: row.subject or subject_from_name(row.name) for row in left_out}
    found = {
        name: subject_name(settings, salt, subject, layout.patients) if subject else ""
        for name, subject in found.items()
    }
    for job in jobs:
        names = [job.case.name, *(_beside(job.case, path) for path in job.case.files[1:])]
        found |= {name: job.subject for name in names if name in found}
    return found


def take_place(corpus: Path, output: Path) -> None:
    """Lets a corpus appear at its place, in that of the one that was there."""
    old = replaced(output)
    if output.exists():
        output.rename(old)
    try:
        corpus.rename(output)
    except OSError:
        if old.exists():
            old.rename(output)
        raise
    shutil.rmtree(old, ignore_errors=True)


def report(
    result: PrepResult,
    kept: Sequence[Scanned],
    left_out: Sequence[LeftOut],
    say: Say,
    named: bool,
) -> None:
    """Says what became of every file of the input; with names of files only if `named`."""
    modalities = ", ".join(f"{n} {name}" for name, n in result.modalities.items())
    say(
        f"{result.output}: {result.samples} {result.kind} volumes of {result.subjects} subjects "
        f"({modalities}) in {result.shards} shards, {result.bytes / 2**20:.1f} MiB"
    )
    guessed = sum(sample.guessed for sample in kept)
    if guessed:
        say(f"modality guessed from the intensities for {guessed} volumes (modality= sets it)")
    files = result.files
    used = ", ".join(f"{files[n]} {n}" for n in ("images", "labels", "masks") if files[n])
    say(f"{files['total']} files: {used}, {files['left_out']} left out, {files['ignored']} ignored")
    for code, count in result.rejected.items():
        example = next(row for row in left_out if row.code == code)
        # Where names are replaced they stay out of logs as well.
        shown = f", for example {example.name} ({example.detail})" if named else ""
        say(f"  left out, {code}: {count}{shown}")
    if left_out:
        say(f"  all of them: {result.private / QUARANTINE_FILE}")
    for note in result.notes:
        say(note)
    if result.splits:
        say(f"split: {', '.join(result.splits)} ({result.output / 'splits'})")
