"""Raw scans to a corpus in four steps: scan every file, plan the shards, write them, publish.

The result depends on the input, the options, the salt and the library versions alone, never on
the number of processes or tasks, or on how often it was killed. Nothing appears at `output` until
everything is there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from data_prep.corpus import Corpus
from data_prep.errors import InputError
from data_prep.exclusions import exclusion_digest
from data_prep.layouts.case import Layout
from data_prep.naming import (
    EXCLUDED_FILE,
    WITHDRAWN_FILE,
    choose_salt,
    key_names,
    keyed_hash,
    private_folder,
    read_withdrawn,
    subject_name,
)
from data_prep.progress import tell
from data_prep.publish import Say
from data_prep.request import check_request, class_table, existing_result
from data_prep.scan import ScanJob
from data_prep.settings import PrepResult, PrepSettings
from data_prep.shards import canonical_json
from data_prep.steps import Prep, plan_shards, publish_corpus, scan_cases, workers, write_shards
from data_prep.work import WorkFolder, hold, others, work_root

PATIENCE_SECONDS = 120
"""How long the last step waits for tasks whose machine died: its file server tells that late."""


def prep(settings: PrepSettings, say: Say = tell, onto: Corpus | None = None) -> PrepResult:
    """Write the corpus that `settings` describe; one that was killed goes on where it was.

    Args:
        settings: Input, output and options, and no single step.
        say: Receives the report line by line.
        onto: What this is an addition to: its scans stay out, and its keys are taken.

    Raises:
        InputError: with all problems of the request; no corpus was written then.
    """
    with _begun(settings, say, onto) as begun:
        if isinstance(begun, PrepResult):
            return begun
        with workers(settings, len(begun.jobs)) as each:
            scan_cases(begun, each)
            plan_shards(begun)
            write_shards(begun, each)
        return publish_corpus(begun, say)


def prep_step(settings: PrepSettings, say: Say = tell) -> dict[str, Any]:
    """Do the one step that `settings` name, or its part; what is done already stays.

    Raises:
        InputError: as `prep`, or what the step needs is missing.
    """
    with _begun(settings, say) as begun:
        if isinstance(begun, PrepResult):
            return begun.to_dict()
        if settings.step == "publish":
            return publish_corpus(begun, say).to_dict()
        if settings.step == "plan":
            plan = plan_shards(begun)
            count = sum(map(len, plan.shards))
            say(
                f"plan: {count} samples in {len(plan.shards)} shards, {len(plan.left_out)} left out"
            )
            return {"step": "plan", "samples": count, "shards": len(plan.shards)}
        step = scan_cases if settings.step == "scan" else write_shards
        with workers(settings, len(begun.jobs[settings.share])) as each:
            done = step(begun, each)
        what = "cases" if done.step == "scan" else "shards"
        say(f"{done.step}, part {done.part}: {done.total} {what}, {done.before} were there already")
        return asdict(done)


def next_generation(corpus: Corpus | None) -> int:
    """Number of the generation that follows those of a corpus; the first without one."""
    return 1 + (len(corpus.info["generations"]) if corpus else 0)


def _private(settings: PrepSettings, onto: Corpus | None) -> Path:
    """The private folder of the corpus that is written or added to."""
    return private_folder(onto.path if onto else settings.output)


@contextmanager
def _begun(
    settings: PrepSettings, say: Say, onto: Corpus | None = None
) -> Iterator[Prep | PrepResult]:
    """A prep that is under way in its work folder, or what came of it, if it is done already."""
    layout, labelled, request = check_request(settings)
    say(f"input: {layout.description}; {len(layout.cases)} images")
    known = [onto.path] if onto else []
    withdrawn = _private(settings, onto) / WITHDRAWN_FILE
    if withdrawn.is_file():
        known.append(withdrawn)
        say(f"what was withdrawn stays out: {withdrawn}")
    if onto and (before := _private(settings, onto) / EXCLUDED_FILE).is_file():
        known.append(before)
        say(f"what exclude= kept out of it stays out: {before}")
    # Without unfinished work there is nothing to hold, or to write to.
    idle = not work_root(settings.output).exists()
    existing = _existing(settings, request, say) if idle else None
    if existing is not None:
        yield existing
        return
    alone = settings.step in (None, "publish")
    patience = 0 if settings.step is None else PATIENCE_SECONDS
    # What was begun before others were withdrawn, or added, is not gone on with.
    task = canonical_json([request, *map(exclusion_digest, known)])
    digest = hashlib.sha256(task).hexdigest()
    with hold(settings.output, digest, alone=alone, patience=patience) as work:
        for other in others(settings.output, work):
            say(f"of another prep of this output, unfinished: {other} (rm -r removes it)")
        existing = _ended_meanwhile(settings, request, work, say)
        if existing is not None:
            if alone:
                work.remove()
            yield existing
            return
        try:
            excluded = (*settings.excluded, *known)
            yield _prepared(settings, layout, labelled, request, work, excluded, onto)
        except BaseException:
            if work.path.exists():
                say(
                    f"What is done is kept in {work.path}: the same command goes on; rm -r gives "
                    "it up."
                )
            raise
        if alone:
            work.remove()


def _existing(settings: PrepSettings, request: str, say: Say) -> PrepResult | None:
    existing = existing_result(settings, request)
    if existing is not None:
        say(
            f"{settings.output} already is this corpus ({existing.samples} samples); nothing to "
            "do. overwrite=true writes it again."
        )
    return existing


def _ended_meanwhile(
    settings: PrepSettings, request: str, work: WorkFolder, say: Say
) -> PrepResult | None:
    """As `_existing`, now that nobody else can end it; also of one that was killed at its end."""
    if not work.is_published:
        return _existing(settings, request, say)
    try:
        existing = _existing(settings.model_copy(update={"overwrite": False}), request, say)
    except InputError:
        existing = None
    if existing is None:
        raise InputError(
            f"output={settings.output}: this prep had ended, and its corpus is not there any more; "
            f"remove {work.path} and start again"
        )
    return existing


def _prepared(
    settings: PrepSettings,
    layout: Layout,
    labelled: bool,
    request: str,
    work: WorkFolder,
    excluded: tuple[Path, ...],
    onto: Corpus | None,
) -> Prep:
    if settings.step in (None, "scan"):
        work.make()
    elif not work.path.exists():
        raise InputError(
            f"step={settings.step}: nothing of this prep has been scanned; start step=scan first. "
            "Other words, or an input that has changed since, are another prep"
        )
    if onto is not None:  # those of a corpus of before there was a salt for them keep their names
        layout.patients.difference_update(onto.subjects)
    salt = choose_salt(settings, private_folder(settings.output), work.salt, layout.patients)
    classes = class_table(settings, layout) if labelled else None
    jobs = _jobs(settings, layout, labelled, classes, salt, work, onto)
    added_to = onto.path if onto else None
    return Prep(settings, layout, request, jobs, classes, salt, work, excluded, added_to)


def _jobs(
    settings: PrepSettings,
    layout: Layout,
    labelled: bool,
    classes: list[dict[str, Any]] | None,
    salt: bytes,
    work: WorkFolder,
    onto: Corpus | None,
) -> list[ScanJob]:
    generation = next_generation(onto)
    # Of a name that was withdrawn too: its key is kept out whoever has it.
    taken = {*(onto.keys if onto else ()), *read_withdrawn(_private(settings, onto))}
    names = key_names(layout.cases, taken, generation) if settings.keys == "names" else {}
    masks = {name for case in layout.cases for name, _ in case.organs}
    organs = tuple((r["name"], r["value"]) for r in classes or [] if r["name"] in masks)
    jobs = []

    def named(subject: str) -> str:
        return subject_name(settings, salt, subject, layout.patients)

    for number, case in enumerate(layout.cases):
        if settings.keys == "names":
            key = names[case.name]
            subject = named(case.subject) if case.subject else key
        else:
            of = f"{generation}\0" if generation > 1 else ""
            key = keyed_hash(salt, "key", of + case.name)
            subject = named(case.subject or f"\0{of}{case.name}")
        jobs.append(
            ScanJob(
                number=number,
                case=case if labelled else replace(case, label=None, organs=()),
                key=key,
                subject=subject,
                work=work,
                modality=case.modality if settings.modality == "auto" else settings.modality,
                labelled=labelled,
                values=frozenset(row["value"] for row in classes) if classes else None,
                organs=organs,
                overlap=settings.overlap,
                minimum=settings.minimum_slices,
                spacing=settings.spacing,
                upright=settings.sheared == "resample",
                deface=settings.deface,
                crop=settings.crop == "foreground",
                empty_labels=settings.empty_labels == "keep",
            )
        )
    return jobs
