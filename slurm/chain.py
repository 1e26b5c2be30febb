"""`voxelith launch chain`: a file of commands as jobs, each of which waits for the one before.

    cluster: cluster.partition=gpu cluster.account=lab
    stages:
      - pretrain corpus=/data/c run=a experiment=mae
      - export runs/a releases/a
      - finetune -m task=hippocampus corpus=/data/l ckpt=releases/a labels=4,16 runs=sweep
      - table sweep output=table

A stage is what one would type after `voxelith launch`, or after `voxelith` for what has no run.
What no run goes on from (a table, a release) takes one task without GPUs for an hour, unless its
words say more. Launched again, a chain begins at its first stage that is not finished.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from conf.compose import stage_names
from data_prep.errors import InputError, near
from data_prep.files import make_folder, read_note, write_json
from slurm.launch import (
    AFTER,
    LAUNCHED,
    NOTE,
    Launched,
    Sweep,
    cancel_job,
    facts_of,
    foretell,
    last_words,
    machine_words,
    plan_job,
    plan_sweep,
    refuse_second,
    render,
    shown,
    states_of,
    submit,
    submit_sweep,
)
from slurm.settings import CLUSTER, cluster_of, without_cluster

CHAIN = "chain.json"

STEPS = ("export", "check", "table", "report", "evaluate", "predict", "features")
"""Commands without a run that goes on: done, or to be done again."""

MODEST = ("cluster.cpus_per_task=4", "cluster.memory=16G")
"""What they take where neither their words nor those of all stages say more."""

SMALL = (
    "cluster.nodes=1", "cluster.gpus_per_node=0", "cluster.gres=null", "cluster.tasks_per_node=1",
    "cluster.time=01:00:00",
)  # fmt: skip
"""And where their own words do not."""


@dataclass(frozen=True)
class Stage:
    """A stage before it is submitted.

    Attributes:
        name: its number and command.
        words: of the command, without those of the cluster.
        folder: in whose `launch/` its script lies.
        script: text of it; empty where the stage is a sweep.
        sweep: the runs of it, if it is one.
        makes: where its results will be.
        finished: whether they are there.
        later: what cannot be checked before an earlier stage is done.
        foretell: what it takes and where time is too short, to be called with `planned=`.
    """

    name: str
    words: list[str]
    folder: Path
    script: str = ""
    sweep: Sweep | None = None
    makes: list[Path] = field(default_factory=list)
    finished: bool = False
    later: list[str] = field(default_factory=list)
    foretell: Callable[..., list[str]] | None = None

    def __str__(self) -> str:
        said = f"{self.name}: {'finished' if self.finished else shlex.join(shown(self.words))}"
        return "\n".join([said, *(f"  checked when it starts: {one}" for one in self.later)])

    def submit(self, after: str | None) -> str:
        """Submits it, to start when the job `after` has ended well."""
        options = [f"--dependency=afterok:{after}", AFTER] if after else []
        if self.sweep is not None:
            return submit_sweep(self.sweep, self.words, *options)
        make_folder(self.folder / "launch", "output")
        stages = self.makes if self.words[0] in LAUNCHED else ()
        return submit(self.folder / "launch", self.script, self.words, *options, stages=stages)


def chain(file: Path, output: Path | None = None, *, dry_run: bool = False) -> dict[str, Any]:
    """Submits the stages of a file that are not finished.

    Args:
        file: YAML, see above.
        output: folder of the chain; by default that of the file's name beside it.
        dry_run: say what would be submitted, and submit nothing.

    Raises:
        InputError: wrong words in any stage, or the chain is under way.
        RuntimeError: SLURM refuses a stage; those before it are cancelled.
    """
    folder = (output or file.with_suffix("")).resolve()
    stages = plan_chain(file, folder)
    for stage in stages:
        print(stage)
        if stage.foretell is not None and not stage.finished:
            for line in stage.foretell(planned=dry_run):
                print(line)
    waiting = [stage for stage in stages if not stage.finished]
    if dry_run:
        for stage in waiting:
            print(stage.script or (stage.sweep.script if stage.sweep else ""), end="")
    if dry_run or not waiting:
        return {"chain": str(folder), "jobs": {}, "to_start": [stage.name for stage in waiting]}
    for stage in waiting:
        refuse_second(stage.folder)
    make_folder(folder, "output")
    jobs: dict[str, str] = {}
    try:
        for stage in waiting:
            jobs[stage.name] = stage.submit(list(jobs.values())[-1] if jobs else None)
    except BaseException:
        for job in jobs.values():
            subprocess.run(["scancel", job], capture_output=True)
        raise
    said = [
        {"name": stage.name, "folder": str(stage.folder), "job": jobs.get(stage.name)}
        for stage in stages
    ]
    write_json(folder / CHAIN, {"stages": said})
    print(f"{len(jobs)} jobs, each after the one before; voxelith launch status {folder}")
    return {"chain": str(folder), "jobs": jobs, "to_start": [stage.name for stage in waiting]}


def plan_chain(file: Path, folder: Path) -> list[Stage]:
    """The stages of a file, checked as far as what earlier ones make allows.

    Raises:
        InputError: everything that is wrong, by stage.
    """
    common, lines = _read(file)
    stages: list[Stage] = []
    problems: list[str] = []
    for number, line in enumerate(lines, 1):
        try:
            command, *words = shlex.split(line) or [""]
        except ValueError as error:
            problems.append(f"stage {number}: {line!r}: {error}")
            continue
        name = f"{number}-{command}"
        try:
            stages.append(_plan(name, command, words, common, stages, folder))
        except InputError as error:
            problems += [f"stage {number} ({command}): {problem}" for problem in error.problems]
            # What it would make is not missed by the stages after it.
            stages.append(Stage(name, words, folder, makes=_makes(command, words)))
    if problems:
        raise InputError(problems)
    return stages


def _read(file: Path) -> tuple[list[str], list[str]]:
    import yaml  # type: ignore[import-untyped]

    try:
        told = yaml.safe_load(file.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise InputError(f"{file}: cannot be read ({error})") from error
    expected = "expected `stages:`, a list of commands, and maybe `cluster:`, words of all of them"
    if not isinstance(told, dict) or not isinstance(told.get("stages"), list):
        raise InputError(f"{file}: {expected}")
    problems = [
        f"{file}: {k}: no such key; {expected}" for k in told.keys() - {"cluster", "stages"}
    ]
    problems += [
        f"{file}: stage {n}: expected a line such as `export runs/a releases/a`, found {stage!r}"
        for n, stage in enumerate(told["stages"], 1)
        if not isinstance(stage, str)
    ]
    try:
        common = shlex.split(str(told.get("cluster") or ""))
    except ValueError as error:
        raise InputError(f"{file}: cluster: {told['cluster']!r}: {error}") from error
    problems += [
        f"{file}: cluster: {word}: expected cluster=NAME, cluster.KEY=VALUE or --config-dir=DIR"
        for word in common
        if not word.startswith((*CLUSTER, "--config-dir="))
    ]
    if problems or not told["stages"]:
        raise InputError(problems or f"{file}: stages: is empty; {expected}")
    return common, told["stages"]


def _plan(
    name: str, command: str, words: list[str], common: list[str], before: list[Stage], folder: Path
) -> Stage:
    if command in LAUNCHED:
        all_words = [*common, *(word for word in words if word != "-m")]
        is_sweep = command == "finetune" and "-m" in words
        return (_plan_sweep if is_sweep else _plan_run)(name, command, all_words, before)
    if command not in STEPS:
        raise InputError(f"no such stage; {near(command, (*LAUNCHED, *STEPS))}")
    cluster, rest = cluster_of([*MODEST, *common, *SMALL, *words])
    _local_is_none(cluster)
    own = {word for word in rest if word.startswith("--config-dir")}
    rest = [word for word in rest if word not in own or word in words]
    _check_step(command, rest, before)
    stage_folder = folder / name
    launched = stage_folder / "launch"
    same = read_note(launched / NOTE).get("words") == shown([command, *rest])
    done = same and (launched / "done").exists()
    makes = _makes(command, rest)
    if command == "export":
        done = any(makes[0].glob("*"))
    ready = all(stage.finished for stage in before)
    if command == "export" and done and not ready:
        raise InputError(
            f"{rest[1]}: is there already, and a stage before it is still to run; remove it, or "
            "give another folder"
        )
    script = render(stage_folder, (command, *rest), cluster, at_once=True)
    return Stage(name, [command, *rest], stage_folder, script, makes=makes, finished=done and ready)


def _plan_run(name: str, command: str, words: list[str], before: list[Stage]) -> Stage:
    try:
        job, cluster = plan_job(command, words)
    except InputError as error:
        later = _later(error, before)
        cluster, said = machine_words(words)
        told = dict(word.split("=", 1) for word in said if "=" in word)
        if "run" not in told:
            raise InputError(
                "run: missing; a run that is launched needs a name, run=NAME"
            ) from None
        run = (Path(told.get("runs", "runs")) / told["run"]).resolve()
        makes = _makes(command, said)
        script = render(run, (command, *said), cluster, stages=makes)
        return Stage(name, [command, *said], run, script, makes=makes, later=later)
    _local_is_none(cluster)
    ready = all(stage.finished for stage in before)
    done = all(
        _is_done(command, run, one.steps) for run, one in zip(job.runs, job.stages, strict=True)
    )
    return Stage(
        name,
        list(job.words),
        job.run,
        job.script,
        makes=job.runs,
        finished=done and ready,
        foretell=partial(foretell, job, cluster),
    )


def _is_done(command: str, run: Path, steps: int) -> bool:
    from pretrain.run_folder import Checkpoints

    if command == "finetune":
        return (run / "rows.csv").is_file()
    return Checkpoints(run / "checkpoints").last_step() >= steps


def _plan_sweep(name: str, command: str, words: list[str], before: list[Stage]) -> Stage:
    try:
        sweep = plan_sweep(words)
        later: list[str] = []
    except InputError as error:
        later = _later(error, before)
        sweep = unknown_sweep(words)
    return Stage(
        name,
        [command, "-m", *words],
        sweep.runs,
        sweep=sweep,
        makes=[sweep.runs],
        finished=not sweep.elements,  # runs know of which checkpoint they are
        later=later,
        foretell=partial(sweep.foretell, machine_words(words)[0]),
    )


def unknown_sweep(words: Sequence[str]) -> Sweep:
    """A sweep whose checkpoint is still to be made: how many runs it has at most is known.

    Scratch twins are shared by checkpoints of one architecture, so that there may be fewer; the
    elements beyond end at once (`element`).
    """
    from finetune.experiments import expanded
    from finetune.sweep import expand

    cluster, said = machine_words(words)
    combinations = expand(expanded(said))
    runs = Path(combinations[0].get("runs", "runs")).resolve()
    most = sum(2 if one.get("init", "pretrained") == "pretrained" else 1 for one in combinations)
    elements = [
        [str(runs / "launch" / f"element-{n}"), "launch", "element", str(n), *said]
        for n in range(most)
    ]
    return Sweep(runs, render(runs, said, cluster, most), elements, most)


def element(number: int, words: Sequence[str]) -> dict[str, Any]:
    """Runs one run of a sweep, by its number; nothing, where the sweep has fewer or it is finished.

    Raises:
        InputError: whatever is wrong in any run, now that the checkpoint is there.
        SystemExit: as the run ended.
    """
    from finetune.experiments import expanded
    from finetune.sweep import is_finished, plan_jobs
    from voxelith import main

    found = plan_jobs(expanded(words))
    if number >= len(found) or is_finished(found[number].folder, found[number].plan):
        print(f"element {number} of {len(found)} runs: nothing to do")
        return {}
    job = found[number]
    if os.environ.get("SLURM_PROCID", "0") == "0":
        # Where the batch script looks for the newest checkpoint after a crash.
        place = job.folder.path.resolve()
        link = place.parent / "launch" / f"element-{number}" / "checkpoints"
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(place / "checkpoints")
    code = main(["finetune", f"run={job.name}", *job.words])
    if code:
        raise SystemExit(code)
    return {"run": str(job.folder.path)}


# What is known of a stage before those before it have run.


def _makes(command: str, words: Sequence[str]) -> list[Path]:
    told = dict(word.split("=", 1) for word in words if "=" in word)
    if command in LAUNCHED:
        runs = Path(told.get("runs", "runs")).resolve()
        if "-m" in words or "run" not in told:
            return [runs]
        try:
            names = stage_names(command, without_cluster(words))
        except InputError:
            names = [""]
        return [runs / (f"{told['run']}.{name}" if name else told["run"]) for name in names]
    plain = [word for word in words if "=" not in word and not word.startswith("--")]
    if command == "export":
        return [Path(plain[1]).resolve()] if len(plain) > 1 else []
    return [Path(told["output"]).resolve()] if "output" in told else []


def _resolved(path: str) -> Path:
    return Path(path).resolve()


def _made(path: str, before: Sequence[Stage]) -> bool:
    place = Path(path).resolve()
    return any(place == one or one in place.parents for stage in before for one in stage.makes)


def _later(error: InputError, before: Sequence[Stage]) -> list[str]:
    """What is wrong only because an earlier stage has not run yet; raises where there is more."""
    missing = {}
    rest = []
    for problem in error.problems:
        found = re.match(r"(?:[\w, -]+: )?(\w+)=(.*?): ", problem)  # of some stages of a recipe
        if found and _made(found[2], before) and not Path(found[2]).exists():
            missing[found[1]] = found[2]
        else:
            rest.append(problem)
    if rest:
        raise InputError(rest) from None
    return [f"{key}={path} and what has to fit it" for key, path in missing.items()]


def _check_step(command: str, words: Sequence[str], before: Sequence[Stage]) -> None:
    """What can be said of a step's words: of the paths it takes, and of its settings."""
    from conf.compose import SETTINGS, settings_for
    from data_prep.references import is_reference

    if command in SETTINGS:
        try:
            settings_for(command, list(words))
        except InputError as error:
            _later(error, before)
        return
    plain = [word for word in words if "=" not in word and not word.startswith("--")]
    if command == "export" and len(plain) != 2:
        raise InputError(f"takes RUN OUT, {len(plain)} given")
    problems = [
        f"{path}: is not there, and no stage before makes it"
        for path in (plain[:1] if command == "export" else plain)
        if not (Path(path).exists() or _made(path, before) or _is_named(path, is_reference))
    ]
    if not plain:
        problems.append("says nothing to work on")
    for stage in before:
        if len(stage.makes) > 1 and stage.folder in map(_resolved, plain):
            named = " or ".join(one.name for one in stage.makes)
            problems.append(f"{stage.folder}: is trained in stages, each a run: give {named}")
    if problems:
        raise InputError(problems)


def _is_named(path: str, is_reference: Any) -> bool:
    from pretrain.registry import KNOWN

    return is_reference(path) or path in KNOWN


def _local_is_none(cluster: Any) -> None:
    if cluster.kind == "local":
        raise InputError("cluster=local has no jobs that wait for each other; give one of SLURM")


# What became of it.


def status(folder: Path) -> dict[str, Any]:
    """What SLURM says of each stage."""
    found: dict[str, Any] = {"chain": str(folder)}
    for stage in read_note(folder / CHAIN)["stages"]:
        found[stage["name"]] = _state(stage)
    return found


def _state(stage: dict[str, Any]) -> str:
    if stage["job"] is None:
        return "finished before"
    states = states_of(stage["job"])
    if not states:
        done = (Path(stage["folder"]) / "launch" / "done").exists()
        said = "COMPLETED" if done else "unknown: SLURM does not know it any more"
    elif len(set(states)) == 1:
        said = states[0]
        if said == "PENDING":
            said += f" ({facts_of(stage['job']).get('Reason', '')})"
    else:
        said = " and ".join(f"{number} {state}" for state, number in Counter(states).items())
    return f"{said}, job {stage['job']}, {stage['folder']}"


def logs(folder: Path, lines: int = 40) -> str:
    """The end of what the stage that spoke last has said, and its file."""
    jobs = [stage for stage in read_note(folder / CHAIN)["stages"] if stage["job"]]
    files = [file for one in jobs for file in Launched.of(Path(one["folder"])).logs]
    return last_words(files, str(folder), lines)


def cancel(folder: Path) -> list[str]:
    """Ends all jobs of a chain that have not ended, the last first."""
    jobs = [str(one["job"]) for one in read_note(folder / CHAIN)["stages"] if one["job"]]
    for job in reversed(jobs):
        cancel_job(job)
    return jobs


def is_chain(folder: Path) -> bool:
    """Whether a folder is that of a chain."""
    return (folder / CHAIN).is_file()
