"""Raw scans to a corpus in three steps: scan every file, plan the shards, write them.

The result depends on the input, the options, the salt and the library versions alone, never on
the number of processes. Nothing appears at `output` until everything is there.
"""

from __future__ import annotations

import csv
import glob
import io
import json
import os
import shutil
import socket
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from data_prep.corpus import CORPUS_FILE, FINGERPRINTS_FILE, FORMAT, INDEX_FILE, shard_name
from data_prep.errors import InputError
from data_prep.files import write_bytes
from data_prep.fingerprint import as_text
from data_prep.folds import splits_of_folds, splits_of_numbers
from data_prep.layouts.case import Case, Layout, LeftOut, case_id
from data_prep.naming import (
    KEYMAP_COLUMNS,
    KEYMAP_FILE,
    choose_salt,
    key_names,
    keyed_hash,
    private_folder,
    slug,
)
from data_prep.progress import bar
from data_prep.request import (
    check_request,
    class_rows,
    class_table,
    combined_rows,
    excluded_names,
    existing_result,
    nothing_left,
    versions,
)
from data_prep.scan import ScanJob, Scanned, scan
from data_prep.settings import PrepResult, PrepSettings
from data_prep.shards import PAYLOADS, array_suffix, canonical_json, table_suffix
from data_prep.splits import make_split, split_from, write_split
from data_prep.write import WriteJob, assign_shards, write_fingerprints, write_index, write_shard

# Below this many cases starting processes costs more than it saves.
CASES_PER_PROCESS = 4

Say = Callable[[str], None]
Mapper = Callable[..., Iterable[Any]]


def prep(settings: PrepSettings, say: Say = print) -> PrepResult:
    """Write the corpus that `settings` describe.

    Args:
        settings: Input, output and options.
        say: Receives the report line by line.

    Raises:
        InputError: with all problems of the request; nothing was written then.
    """
    layout, labelled, request = check_request(settings)
    say(f"input: {layout.description}; {len(layout.cases)} images")
    existing = existing_result(settings, request)
    if existing is not None:
        say(
            f"{settings.output} already is this corpus ({existing.samples} samples); nothing to "
            "do. overwrite=true writes it again."
        )
        return existing
    classes = class_table(settings, layout) if labelled else None
    excluded = excluded_names(settings.exclude)
    private = private_folder(settings.output)
    salt = choose_salt(settings, private)
    work = _work_folder(settings.output)
    try:
        spool = work / "spool"
        spool.mkdir()
        jobs = _jobs(settings, layout, labelled, classes, salt, spool)
        with _workers(_processes(settings, len(jobs))) as each:
            scanned = list(bar(iterable=each(scan, jobs), desc="scan", total=len(jobs)))
            kept, left_out = _survivors(jobs, scanned, excluded)
            left_out = [*layout.left_out, *left_out]
            if not kept:
                raise InputError(nothing_left(settings, layout, left_out))
            result = _write(settings, layout, jobs, kept, left_out, classes, work, each)
        _publish(settings, private, work, jobs, kept, left_out, salt, request, result)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    _report(result, layout, kept, left_out, say)
    return result


def _work_folder(output: Path) -> Path:
    """A new hidden folder beside the output; removes what a killed prep left on this machine."""
    mine = f".{output.name}.prep-{socket.gethostname()}-"
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        for path in output.parent.glob(f"{glob.escape(mine)}*"):
            pid = path.name.removeprefix(mine)
            if pid.isdigit() and Path("/proc").is_dir() and not Path(f"/proc/{pid}").exists():
                shutil.rmtree(path, ignore_errors=True)
        work = output.parent / f"{mine}{os.getpid()}"
        work.mkdir(mode=0o700)
    except OSError as error:
        raise InputError(f"output={output}: cannot be written ({error.strerror})") from error
    return work


def _jobs(
    settings: PrepSettings,
    layout: Layout,
    labelled: bool,
    classes: list[dict[str, Any]] | None,
    salt: bytes,
    spool: Path,
) -> list[ScanJob]:
    names = key_names(layout.cases) if settings.keys == "names" else {}
    masks = {name for case in layout.cases for name, _ in case.organs}
    organs = tuple((r["name"], r["value"]) for r in classes or [] if r["name"] in masks)
    jobs = []
    for number, case in enumerate(layout.cases):
        if settings.keys == "names":
            key = names[case.name]
            subject = slug(case.subject) if case.subject else key
        else:
            key = keyed_hash(salt, "key", case.name)
            subject = keyed_hash(salt, "subject", case.subject or f"\0{case.name}")
        jobs.append(
            ScanJob(
                number=number,
                case=case if labelled else replace(case, label=None, organs=()),
                key=key,
                subject=subject,
                spool=spool,
                modality=case.modality if settings.modality == "auto" else settings.modality,
                labelled=labelled,
                values=frozenset(row["value"] for row in classes) if classes else None,
                organs=organs,
                overlap=settings.overlap,
                minimum=settings.minimum_slices,
                spacing=settings.spacing,
            )
        )
    return jobs


def _processes(settings: PrepSettings, cases: int) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    wanted = settings.processes or cores or 1
    if settings.processes == 0:
        wanted = min(wanted, cases // CASES_PER_PROCESS)
    return max(1, min(wanted, cases))


@contextmanager
def _workers(processes: int) -> Iterator[Mapper]:
    """A `map` over worker processes, in order; over this process if there is to be only one."""
    if processes == 1:
        yield map
        return
    # Spawned, not forked: whatever threads the parent runs cannot hang a child.
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        try:
            yield pool.map
        except BrokenProcessPool as error:
            raise RuntimeError(
                "a worker process died, most likely for want of memory; try fewer "
                f"(processes={processes // 2})"
            ) from error


def _survivors(
    jobs: Sequence[ScanJob], scanned: Sequence[Scanned | LeftOut], excluded: set[str]
) -> tuple[list[Scanned], list[LeftOut]]:
    """Samples sorted by key, and files left out.

    Of equal scans one stays: one of the test part before one of the validation part before any
    other, so that a duplicate costs training and not the test; then the first in the input.
    """
    kept: dict[str, Scanned] = {}
    left_out: list[LeftOut] = []
    rank = {"test": 0, "validation": 1}
    order = sorted(range(len(jobs)), key=lambda n: (rank.get(jobs[n].case.split, 2), n))
    for job, result in ((jobs[n], scanned[n]) for n in order):
        if isinstance(result, LeftOut):
            left_out.append(result)
            continue
        print_text = as_text(result.meta["fingerprint"])
        if excluded & {result.key, print_text, result.meta["fingerprint"]["value"]}:
            left_out.append(LeftOut(job.case.name, "excluded", "named by the exclude file"))
        elif print_text in kept:
            left_out.append(_duplicate(job, result, kept[print_text], jobs))
        else:
            kept[print_text] = result
    return sorted(kept.values(), key=lambda sample: sample.key), left_out


def _duplicate(job: ScanJob, sample: Scanned, first: Scanned, jobs: Sequence[ScanJob]) -> LeftOut:
    """The verdict on a scan that another case has already; says what makes it worse."""
    here, there = job.case.split or "no part", jobs[first.number].case.split or "no part"
    code, detail = "duplicate", f"duplicate of {first.key}"
    if here != there:
        code, detail = "duplicate_across_splits", f"{detail}, which is in {there}, this in {here}"
    if sample.meta.get("class_counts") != first.meta.get("class_counts"):
        detail += "; their labels differ"
    return LeftOut(job.case.name, code, detail)


def _write(
    settings: PrepSettings,
    layout: Layout,
    jobs: Sequence[ScanJob],
    kept: Sequence[Scanned],
    left_out: list[LeftOut],
    classes: list[dict[str, Any]] | None,
    work: Path,
    each: Mapper,
) -> PrepResult:
    """Write all files of the corpus to `work/corpus`; adds labels without a sample to the books."""
    labelled = jobs[0].labelled
    if labelled and classes is None:
        values = {int(v) for sample in kept for v in sample.meta["class_counts"]}
        classes = class_rows({0: "background", **{v: f"class_{v}" for v in values}})
    if labelled and classes and any(s.meta["seg_encoding"] == "bits" for s in kept):
        classes = combined_rows(classes, {int(v) for s in kept for v in s.meta["class_counts"]})
    known = [row["value"] for row in classes or [] if row["value"] and not row["ignore"]]

    root = work / "corpus"
    (root / "shards").mkdir(parents=True)
    samples = []
    for sample in kept:
        meta = sample.meta
        if labelled:
            meta = {**meta, "annotated": _annotated(meta, known)}
        samples.append((sample.number, sample.key, canonical_json(meta), _suffixes(sample)))
    sizes = [
        len(data) + sum(sample.sizes.values())
        for sample, (_, _, data, _) in zip(kept, samples, strict=True)
    ]
    plan = assign_shards(sizes, int(settings.shard_mib * 2**20))
    write_jobs = [
        WriteJob(number, root / "shards", work / "spool", [samples[i] for i in members])
        for number, members in enumerate(plan)
    ]
    written = list(bar(iterable=each(write_shard, write_jobs), desc="write", total=len(plan)))

    index_hash = write_index(root / INDEX_FILE, kept, written)
    prints_hash = write_fingerprints(root / FINGERPRINTS_FILE, kept)
    splits = _write_splits(root, layout, jobs, kept, labelled)
    files = _account(layout, jobs, kept, left_out)
    rejected = dict(sorted(Counter(row.code for row in left_out).items()))
    metas = [sample.meta for sample in kept]
    counts = {
        "samples": len(kept),
        "subjects": len({meta["subject"] for meta in metas}),
        "modality": _count(c["modality"] for m in metas for c in m["channels"][:1]),
        "source": _count(meta["source"] for meta in metas),
        "licence": _count(meta["licence"] for meta in metas),
        "rejected": rejected,
        "files": files,
    }
    if labelled:
        counts |= _label_counts(kept, classes or [])
    info = {
        "format": FORMAT,
        "name": settings.name or settings.output.name,
        "kind": "labelled" if labelled else "unlabelled",
        "layout": _public_layout(layout),
        "classes": classes or [],
        "options": {
            "keys": settings.keys,
            "labels": labelled,
            "modality": settings.modality,
            "shard_mib": settings.shard_mib,
            "spacing": list(settings.spacing) if settings.spacing else None,
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
        "generations": [{"number": 1, "added": len(kept), "removed": 0}],
    }
    write_bytes(root / CORPUS_FILE, json.dumps(info, indent=1, sort_keys=True).encode() + b"\n")
    return PrepResult(
        output=settings.output,
        private=private_folder(settings.output),
        kind=str(info["kind"]),
        layout=layout.description,
        samples=len(kept),
        subjects=len({meta["subject"] for meta in metas}),
        shards=len(written),
        bytes=sum(shard.bytes for shard in written),
        files=files,
        rejected=rejected,
        modalities=_count(m["channels"][0]["modality"] for m in metas),
        splits=splits,
        index_hash=index_hash,
        notes=_label_notes(counts),
    )


def _annotated(meta: dict[str, Any], known: list[int]) -> list[int]:
    """Label values that were looked for in a case: all known ones, unless it lacks masks."""
    looked_for = meta.get("annotated", known)
    if meta["seg_encoding"] == "values":
        return sorted(looked_for)
    planes = sum(looked_for)
    return [value for value in known if not value & ~planes]


def _label_counts(kept: Sequence[Scanned], classes: list[dict[str, Any]]) -> dict[str, Any]:
    """Cases by class, and those whose label is empty: sound, but worth a look."""
    found = [{int(value) for value in sample.meta["class_counts"]} for sample in kept]
    return {
        "cases_by_class": {
            row["name"]: sum(row["value"] in values for values in found)
            for row in classes
            if row["value"]
        },
        "empty_labels": [s.key for s, values in zip(kept, found, strict=True) if not values],
    }


def _label_notes(counts: dict[str, Any]) -> list[str]:
    notes = []
    empty = counts.get("empty_labels", [])
    if empty:
        shown = ", ".join(empty[:5]) + (", ..." if len(empty) > 5 else "")
        notes.append(f"{len(empty)} labels are empty: {shown}")
    absent = [name for name, n in counts.get("cases_by_class", {}).items() if not n]
    if absent:
        shown = ", ".join(absent[:8]) + (", ..." if len(absent) > 8 else "")
        notes.append(f"no case has a voxel of {shown}")
    return notes


def _suffixes(sample: Scanned) -> list[str]:
    return [
        suffix
        for payload in PAYLOADS
        for suffix in (table_suffix(payload), array_suffix(payload))
        if suffix in sample.sizes
    ]


def _write_splits(
    root: Path, layout: Layout, jobs: Sequence[ScanJob], kept: Sequence[Scanned], labelled: bool
) -> list[str]:
    """What the input says, `official` and `fold-N`; else `default` by subject, with labels."""
    keys = [sample.key for sample in kept]
    subjects = [sample.meta["subject"] for sample in kept]
    cases = [jobs[sample.number].case for sample in kept]
    splits = []
    if any(case.split for case in cases):
        splits.append(split_from("official", keys, subjects, [case.split for case in cases]))
    elif labelled:
        splits.append(make_split(keys, subjects))
    if labelled and layout.folds is not None:
        key_of = {case_id(job.case): job.key for job in jobs}
        splits += splits_of_folds(layout.folds, key_of, keys, subjects)
    elif labelled and any(case.fold is not None for case in cases):
        splits += splits_of_numbers([case.fold for case in cases], keys, subjects)
    for split in splits:
        write_split(split, root / "splits")
    return [str(split["name"]) for split in splits]


def _account(
    layout: Layout, jobs: Sequence[ScanJob], kept: Sequence[Scanned], left_out: list[LeftOut]
) -> dict[str, int]:
    """How every file of the input ended; unused labels are added to `left_out`."""
    stored = [jobs[sample.number].case for sample in kept]
    used = {path for case in stored for path in case.images}
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
    counts["left_out"] = len(left_out)
    counts["ignored"] = ignored
    counts["total"] = sum(counts.values())
    return counts


def _beside(case: Case, path: Path) -> str:
    """A label's name in the terms of the input: relative to the same root as its image's."""
    root = Path(str(case.images[0])[: -len(case.name)] or ".")
    try:
        return path.relative_to(root).as_posix()
    except ValueError:
        return path.name


def _count(values: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(value or "unknown" for value in values).items()))


def _public_layout(layout: Layout) -> str:
    """The layout without the name of a list, which is the user's own."""
    return "list" if layout.description.startswith("list ") else layout.description


def _publish(
    settings: PrepSettings,
    private: Path,
    work: Path,
    jobs: Sequence[ScanJob],
    kept: Sequence[Scanned],
    left_out: Sequence[LeftOut],
    salt: bytes,
    request: str,
    result: PrepResult,
) -> None:
    """Write the private folder, then let the corpus appear at its place in one rename."""
    private.mkdir(mode=0o700, exist_ok=True)
    private.chmod(0o700)
    if settings.keys == "hmac" and settings.salt is None:
        write_bytes(private / "salt", salt + b"\n", mode=0o600)
    keymap = [
        [job.key, job.subject, job.case.name, job.case.subject, case_id(job.case)]
        for job in (jobs[sample.number] for sample in kept)
    ]
    _write_csv(private / KEYMAP_FILE, KEYMAP_COLUMNS, keymap)
    rows = sorted([row.name, row.code, row.detail] for row in left_out)
    _write_csv(private / "quarantine.csv", ["input", "code", "detail"], rows)

    output = settings.output
    old = None
    if output.exists():
        old = work / "old"
        output.rename(old)
    try:
        (work / "corpus").rename(output)
    except OSError:
        if old is not None:
            old.rename(output)
        raise
    write_bytes(
        private / "request.json",
        canonical_json({"request": request, "index": result.index_hash}),
        mode=0o600,
    )


def _write_csv(path: Path, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    write_bytes(path, text.getvalue().encode("utf-8"), mode=0o600)


def _report(
    result: PrepResult,
    layout: Layout,
    kept: Sequence[Scanned],
    left_out: Sequence[LeftOut],
    say: Say,
) -> None:
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
        say(f"  left out, {code}: {count}, for example {example.name} ({example.detail})")
    if left_out:
        say(f"  all of them: {result.private / 'quarantine.csv'}")
    for note in result.notes:
        say(note)
    if result.splits:
        say(f"split: {', '.join(result.splits)} ({result.output / 'splits'})")
