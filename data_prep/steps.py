"""The steps of a prep, each of which does what of it is not done yet: alone, or a part of it.

What one step needs of another is in the work folder, so they may be run by one process or by many
tasks one after another. Bytes do not depend on who did what.
"""

from __future__ import annotations

import errno
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from multiprocessing import active_children, get_context, parent_process
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from data_prep.errors import FailedError, InputError
from data_prep.exclusions import Exclusions, read_exclusions
from data_prep.layouts.case import Layout, LeftOut
from data_prep.machine import cores
from data_prep.naming import DUPLICATES
from data_prep.pictures import copies_of, draw_copies
from data_prep.plan import Plan, make_plan, read_plan, write_plan
from data_prep.progress import bar
from data_prep.publish import Say, complete, publish, report
from data_prep.request import note_refused
from data_prep.scan import ScanJob, Scanned, note_case, read_case, scan_case
from data_prep.settings import PrepResult, PrepSettings
from data_prep.work import WorkFolder
from data_prep.write import WriteJob, read_shard_note, write_shard

# Below this many cases starting processes costs more than it saves.
CASES_PER_PROCESS = 4

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

Mapper = Callable[..., Iterable[Any]]


@dataclass(frozen=True)
class Prep:
    """A request that is under way in its work folder."""

    settings: PrepSettings
    layout: Layout
    request: str
    jobs: list[ScanJob]
    classes: list[dict[str, Any]] | None
    salt: bytes
    work: WorkFolder
    excluded: tuple[Path, ...]
    onto: Path | None = None
    """The corpus that is added to; it is one of `excluded`."""

    @cached_property
    def exclusions(self) -> Exclusions:
        """What must stay out, read once."""
        exact = self.settings.duplicates == "exact"
        return read_exclusions(self.excluded, [self.onto] if exact and self.onto else [])


@dataclass(frozen=True)
class Done:
    """What one start did of a step: its own part, how much of that was done before."""

    step: str
    part: str
    total: int
    before: int


def scan_cases(prep: Prep, each: Mapper) -> Done:
    """Scans the cases that are not scanned; of one that ends processes a row is all that remains.

    Who was being scanned when a process died is scanned alone: whoever dies then was the cause.

    Raises:
        FailedError: with all cases that the system did not let be read; the others are done.
    """
    mine = prep.jobs[prep.settings.share]
    todo = _not_scanned(prep, mine)
    done = len(mine) - len(todo)
    while todo:
        suspects = prep.work.begun()
        for job in [job for job in todo if job.number in suspects]:
            _scan_alone(job)
        left = _not_scanned(prep, todo)
        try:
            said = _each(each, scan_case, left, "scan")
            if unread := [(job, why) for job, why in zip(left, said, strict=True) if why]:
                raise FailedError(_unread(prep, unread))
            break
        except BrokenProcessPool:
            todo = _not_scanned(prep, left)
            if len(todo) == len(left) and not prep.work.begun():
                raise  # no case is to blame
    return Done("scan", prep.settings.part or "1/1", len(mine), done)


def _unread(prep: Prep, unread: Sequence[tuple[ScanJob, tuple[str, str]]]) -> str:
    """What to do about cases that the system did not let be read; they are named in a file."""
    rows = [[job.case.name, "unread", detail] for job, (_, detail) in unread]
    counts = Counter(said for _, (said, _) in unread)
    said = ", ".join(f"{said}: {count}" for said, count in sorted(counts.items()))
    return (
        f"scan: {len(unread)} cases cannot be read now ({said}). That may pass or be mended, so "
        f"they are not left out; all others are done. {note_refused(prep.settings, rows)} names "
        "them. When they can be read, start the same command again; what never can be has to be "
        "taken out of the input, which is scanned anew then"
    )


def _not_scanned(prep: Prep, jobs: Sequence[ScanJob]) -> list[ScanJob]:
    there = prep.work.scanned()
    return [job for job in jobs if job.number not in there]


def _scan_alone(job: ScanJob) -> None:
    """Scans a case in a process of its own, and leaves it out if that dies too."""
    try:
        with _pool(1) as pool:
            pool.submit(scan_case, job).result()
    except BrokenProcessPool:
        note_case(
            job,
            LeftOut(
                job.case.name,
                "crashed",
                "its process died twice, the second time with nothing else to do: it is damaged as "
                "no reader expects, or needs more memory than there is",
            ),
        )


def plan_shards(prep: Prep) -> Plan:
    """The plan; made and noted if it is not yet.

    Raises:
        InputError: cases have not been scanned, or none is of use.
    """
    work = prep.work
    if work.plan.exists():
        return read_plan(work)
    there = work.scanned()
    missing = [job.number for job in prep.jobs if job.number not in there]
    if missing:
        raise InputError(_missing("case", missing, len(prep.jobs), "scanned", "scan"))
    scanned = [read_case(work, job.number) for job in prep.jobs]
    try:
        plan = make_plan(
            prep.settings, prep.layout, prep.jobs, scanned, prep.classes, prep.exclusions
        )
    except InputError:
        work.remove()  # what is not there cannot be gone on with
        raise
    write_plan(work, plan)
    return plan


def write_shards(prep: Prep, each: Mapper) -> Done:
    """Writes the shards that are not written; InputError without a plan."""
    work = prep.work
    if not work.plan.exists():
        raise InputError("step=write: there is no plan yet; start step=plan first")
    plan = read_plan(work)
    mine = list(enumerate(plan.shards))[prep.settings.share]
    there = work.written()
    todo = [WriteJob(n, work, cases, plan.known) for n, cases in mine if n not in there]
    _each(each, write_shard, todo, "write")
    return Done("write", prep.settings.part or "1/1", len(mine), len(mine) - len(todo))


def publish_corpus(prep: Prep, say: Say) -> PrepResult:
    """Lets the corpus appear at its place; InputError if shards are missing."""
    work = prep.work
    if not work.plan.exists():
        raise InputError("step=publish: there is no plan yet; start step=plan first")
    plan = read_plan(work)
    there = work.written()
    missing = [number for number in range(len(plan.shards)) if number not in there]
    if missing:
        raise InputError(_missing("shard", missing, len(plan.shards), "written", "write"))
    kept = [
        s for cases in plan.shards for n in cases if isinstance(s := read_case(work, n), Scanned)
    ]
    written = [read_shard_note(work, number) for number in range(len(plan.shards))]
    result, left_out = complete(
        prep.settings, prep.layout, prep.jobs, kept, written, plan, prep.exclusions, work.corpus
    )
    result.private.mkdir(mode=0o700, exist_ok=True)
    copies = copies_of(prep.exclusions, prep.jobs, plan, work)
    draw_copies(copies, work, result.private / DUPLICATES)
    publish(
        prep.settings,
        prep.layout,
        work,
        prep.jobs,
        kept,
        left_out,
        prep.salt,
        prep.request,
        result,
    )
    report(result, kept, left_out, say, named=prep.settings.keys == "names")
    return result


def _missing(what: str, numbers: Sequence[int], total: int, done: str, step: str) -> str:
    shown = ", ".join(str(number + 1) for number in numbers[:5])
    more = f" and {len(numbers) - 5} more" if len(numbers) > 5 else ""
    are, plural = ("has", "") if len(numbers) == 1 else ("have", "s")
    return (
        f"{what}{plural} {shown}{more} of {total} {are} not been {done}: start step={step} again, "
        "with the same words"
    )


def _each(each: Mapper, work: Callable[[Any], Any], jobs: Sequence[Any], what: str) -> list[Any]:
    try:
        return list(bar(iterable=each(work, jobs), desc=what, total=len(jobs))) if jobs else []
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise FailedError(
            f"{what}: there is no room left to write to ({error.strerror}); make some beside the "
            "output and start the same command again"
        ) from error


@contextmanager
def workers(settings: PrepSettings, cases: int) -> Iterator[Mapper]:
    """A `map` over worker processes, in order; over this process if there is to be only one.

    After a worker has died the next call has new ones.
    """
    processes = _processes(settings, cases)
    if processes == 1:
        yield map
        return
    with ExitStack() as stack:
        pools: list[ProcessPoolExecutor] = []

        def each(work: Callable[[Any], Any], jobs: Sequence[Any]) -> Iterator[Any]:
            if not pools:
                pools.append(stack.enter_context(_pool(processes)))
            try:
                yield from pools[0].map(work, jobs)
            except Exception:
                # A worker that is started while the pool breaks fails in ways of its own: its pipes
                # are closed, or their numbers are other pipes' now. A broken pool says it is.
                try:
                    pools[0].submit(int)
                except BrokenProcessPool:
                    pools.clear()
                    # The pool ends those that it knew when one died. One that was just being
                    # started would wait for work for ever, and this process for it.
                    for worker in active_children():
                        worker.kill()
                    raise
                raise

        try:
            yield each
        except BrokenProcessPool as error:
            raise RuntimeError(
                "a worker process died, most likely for want of memory; try fewer "
                f"(processes={processes // 2})"
            ) from error


def _pool(processes: int) -> ProcessPoolExecutor:
    # Spawned, not forked: whatever threads the parent runs cannot hang a child.
    return ProcessPoolExecutor(
        processes, mp_context=get_context("spawn"), initializer=_end_with_parent
    )


def _processes(settings: PrepSettings, cases: int) -> int:
    wanted = settings.processes or cores()
    if settings.processes == 0:
        wanted = min(wanted, cases // CASES_PER_PROCESS)
    return max(1, min(wanted, cases))


def _end_with_parent() -> None:
    """Ends this worker when its parent is killed; it would wait for work for ever."""
    parent = parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
