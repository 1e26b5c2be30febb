"""`voxelith launch prep`: a corpus made by an array of tasks, on CPUs.

Four jobs, each after the one before has ended well: an array that scans, a plan, an array that
writes shards, and the publishing. What is done is kept in prep's own work folder, so a part that is
requeued, or the whole launched again, does what is missing. Scripts and logs lie beside the output,
in OUTPUT.launch, since nothing is at the output until all is there.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from conf.compose import settings_for
from data_prep.errors import InputError, attempt
from data_prep.files import make_folder, read_note, write_json, write_text
from data_prep.work import work_root
from slurm.launch import (
    ACTIVE,
    AFTER,
    JOB_NOTES,
    NOTE,
    SCRIPT_MODE,
    cancel_job,
    last_words,
    rendered,
    require_slurm,
    sbatch,
    shown,
    states_of,
)
from slurm.settings import ClusterSettings, cluster_of, without_cluster

STEPS = {"scan": "scanned", "plan": "", "write": "written", "publish": ""}
"""The steps in order; of those that are arrays, where prep notes what is done."""

PARTS = 8
"""Elements of an array unless cluster.array says another number."""


def launch_folder(output: Path) -> Path:
    """Where scripts and logs of a launched prep lie."""
    output = output.resolve()
    return output.with_name(f"{output.name}.launch")


def launch_prep(words: Sequence[str], *, dry_run: bool = False) -> dict[str, Any]:
    """Submits the steps of a prep, chained; of `cluster=local` runs it here.

    Args:
        words: of `voxelith prep`, with those of the cluster; `cluster.array=N` is the number of
            elements of each array.
        dry_run: prints the scripts alone.

    Raises:
        InputError: wrong words, no SLURM, or jobs of this output are under way.
        RuntimeError: SLURM refuses one; none is left in the queue then.
    """
    cluster, parts, rest, settings = _told(words)
    if cluster.kind == "local":
        return _here(rest)
    from data_prep.request import check_request, existing_result

    layout, _, request = check_request(settings)
    folder, cases = launch_folder(settings.output), len(layout.cases)
    parts = min(parts, cases)
    print(
        f"prep: {settings.output}, {cases} images in {parts} parts of {cluster.cpus_per_task} CPUs"
    )
    if existing_result(settings, request) is not None:
        print("It already is this corpus; nothing to do. overwrite=true writes it again.")
        return {"output": str(settings.output), "jobs": {}, "scripts": {}}
    scripts = {step: _script(step, settings.output, rest, cluster, parts) for step in STEPS}
    if dry_run:
        print("\n".join(scripts.values()), end="")
        return {"output": str(settings.output), "jobs": {}, "scripts": scripts}
    require_slurm()
    if under_way := [job for job in _jobs(folder).values() if set(states_of(job)) & set(ACTIVE)]:
        raise InputError(
            f"{settings.output}: its jobs {', '.join(under_way)} are under way; "
            f"`voxelith launch cancel {settings.output}` ends them"
        )
    make_folder(folder, "output")
    for note in JOB_NOTES:
        for old in folder.glob(f"*.{note}"):
            old.unlink()
    jobs = _submit(folder, scripts)
    write_json(folder / NOTE, {"jobs": jobs, "cases": cases, "words": shown(["prep", *rest])})
    print(f"jobs {', '.join(jobs.values())}; voxelith launch status {settings.output}")
    return {"output": str(settings.output), "jobs": jobs, "scripts": scripts}


def _told(words: Sequence[str]) -> tuple[ClusterSettings, int, list[str], Any]:
    """The cluster, the parts, the words of prep and their settings; InputError with all."""
    problems: list[str] = []
    given = [word for word in words if word.startswith("cluster.array=")]
    count = given[-1].partition("=")[2] if given else str(PARTS)
    if len(given) > 1 or not re.fullmatch(r"[1-9]\d{0,3}", count):
        problems.append(f"{' '.join(given)}: the number of parts is needed, once, 1 to 9999")
    found = attempt(problems, cluster_of, [word for word in words if word not in given])
    typed = {word.partition("=")[0] for word in words}
    for key in sorted(typed & {"step", "part"}):
        problems.append(f"{key}: launch starts all steps and all parts; leave it out")
    for key in ("cluster.nodes", "cluster.gpus_per_node", "cluster.tasks_per_node", "cluster.gres"):
        if key in typed:
            problems.append(f"{key}: prep takes one task and no GPU; cluster.array=N makes N parts")
    rest = without_cluster(words) if found is None else found[1]
    if found is not None and found[0].kind == "slurm" and "processes" not in typed:
        rest.append(f"processes={found[0].cpus_per_task}")
    settings = attempt(problems, settings_for, "prep", rest)
    if settings is not None and settings.append:
        problems.append(
            "append=true: launch makes whole corpora; `voxelith prep append=true` with the same "
            "words adds to one"
        )
    if problems or found is None:
        raise InputError(problems)
    cpu = {"nodes": 1, "gpus_per_node": 0, "tasks_per_node": 1, "gres": None}
    return found[0].model_copy(update=cpu), int(count), rest, settings


def _script(
    step: str, output: Path, words: Sequence[str], cluster: ClusterSettings, parts: int
) -> str:
    return rendered(
        "prep.sbatch.j2",
        cluster,
        ("prep", *words, f"step={step}"),
        launch_folder(output),
        output.name,
        step=step,
        parts=parts if STEPS[step] else 0,
        limit=f"%{cluster.array_limit}" if cluster.array_limit else "",
        work=shlex.quote(str(work_root(output.resolve()))),
        finished=STEPS[step],
        at_once=False,
    )


def _submit(folder: Path, scripts: dict[str, str]) -> dict[str, str]:
    jobs: dict[str, str] = {}
    for step, text in scripts.items():
        script = folder / f"{step}.sbatch"
        write_text(script, text, SCRIPT_MODE)
        after = [f"--dependency=afterok:{job}" for job in list(jobs.values())[-1:]]
        options = [*after, AFTER] if after else []
        try:
            jobs[step] = sbatch(script, *options)
        except RuntimeError:
            if jobs:
                subprocess.run(["scancel", *jobs.values()], capture_output=True)
            raise
    return jobs


def _here(words: Sequence[str]) -> dict[str, Any]:
    from voxelith import main

    code = main(["prep", *words])
    if code:
        raise SystemExit(code)
    return {"jobs": {}, "scripts": {}}


# What became of it.


def jobs_of_prep(output: Path) -> ModuleType | None:
    """This module, which answers for the jobs of an output; None if no prep of it was launched."""
    return sys.modules[__name__] if _jobs(launch_folder(output)) else None


def status(output: Path) -> dict[str, Any]:
    """The jobs of each step with SLURM's states, and how far the prep has come."""
    folder = launch_folder(output)
    note = read_note(folder / NOTE)
    # Where several requests have left something, the one that is worked on.
    work = max(work_root(output.resolve()).glob("*/scanned"), key=_changed, default=None)
    numbers = {
        name: sum(1 for _ in (work.parent / name).glob("[0-9]*.json"))
        for name in ("scanned", "written")
        if work is not None
    }
    return {
        "output": str(output),
        "published": (output / "corpus.json").is_file(),
        "cases": note.get("cases"),
        **numbers,
        "jobs": {
            step: {"job": job, **(dict(Counter(states_of(job))) or {"state": "unknown"})}
            for step, job in _jobs(folder).items()
        },
        "crashes": sum(int(file.read_text()) for file in folder.glob("*.crashes")),
        "logs": str(folder / "*.log"),
    }


def logs(output: Path, lines: int = 40) -> str:
    """The end of what the job that spoke last has said."""
    folder = launch_folder(output)
    return last_words(list(folder.glob("*.log")), str(folder), lines)


def cancel(output: Path) -> str:
    """Ends all jobs of an output; what is done is kept, and a launch goes on from there."""
    jobs = list(_jobs(launch_folder(output)).values())
    cancel_job(*jobs)
    return ", ".join(jobs)


def _jobs(folder: Path) -> dict[str, str]:
    found = read_note(folder / NOTE).get("jobs")
    return {str(step): str(job) for step, job in found.items()} if isinstance(found, dict) else {}


def _changed(path: Path) -> int:
    return path.stat().st_mtime_ns
