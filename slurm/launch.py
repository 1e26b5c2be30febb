"""`voxelith launch`: a command as a job of a cluster, which comes back until it is done.

The script is text that an engineer can read, keep and submit by hand; it lies in the run's folder,
`launch/`, with what SLURM says of each start. The folder is made at submission and stays the same
over all starts, so a run goes on where it was whatever ended it.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from conf.compose import stages_for
from data_prep.errors import InputError, attempt
from data_prep.files import make_folder, read_note, write_json, write_text
from data_prep.references import without_secrets
from pretrain.events import step_of
from pretrain.preemption import REQUEUE_CODE
from slurm.plan import Save, added_up, plan
from slurm.settings import ClusterSettings, cluster_of, without_cluster

LAUNCHED = ("pretrain", "finetune")
"""Commands that are launched: those with a run that goes on where it was."""

NOTE = "job.json"
JOB_NOTES = ("crashes", "crashed-after", "running", "told", "saved")
"""What a batch script notes of its job, and of a step of prep under the step's name."""
SCRIPT_MODE = 0o600
"""Of what holds a command as it was typed: an address in it may have a password."""
AFTER = "--kill-on-invalid-dep=yes"
"""A job that can no longer start ends, visibly, instead of waiting for ever."""


@dataclass(frozen=True)
class Job:
    """A job before it is submitted.

    Attributes:
        run: folder of the run; of a recipe in stages that of its name, in which nothing is trained.
        words: of the command.
        script: text of the batch script; empty without a scheduler.
        stages: settings of each stage, in order; of a recipe without stages those of the run.
        checkpoints: bytes of one of each stage; of a pretraining alone.
        plans: of a finetuning alone, its own.
    """

    run: Path
    words: tuple[str, ...]
    script: str
    stages: tuple[Any, ...]
    checkpoints: tuple[int, ...] = ()
    plans: tuple[Any, ...] = ()

    @property
    def folder(self) -> Path:
        """Where script and logs lie."""
        return self.run / "launch"

    @property
    def runs(self) -> list[Path]:
        """The folders that are trained in, in order."""
        return [(one.runs / str(one.run)).resolve() for one in self.stages]


def plan_job(command: str, words: Sequence[str]) -> tuple[Job, ClusterSettings]:
    """What would be submitted; settings of command and cluster are checked as they would be there.

    Raises:
        InputError: something is wrong with the words, all of it.
    """
    if command not in LAUNCHED:
        raise InputError(f"launch {command}: launches {' or '.join(LAUNCHED)}, and prep")
    problems: list[str] = []
    cluster, rest, machine = _machine(words, problems)
    try:
        stages = stages_for(command, [*rest, *([] if problems else machine)])
    except InputError as error:
        raise InputError([*problems, *error.problems]) from error
    name, first = next(iter(stages.items()))
    if first.run is None:
        problems.append("run: missing; a run that is launched needs a name, run=NAME")
    if problems or cluster is None:
        raise InputError(problems)
    _refuse_idle(cluster, list(stages.values()))
    run = (first.runs / first.run.removesuffix(f".{name}")).resolve()
    job = Job(run, (command, *rest, *machine), "", tuple(stages.values()))
    if command == "pretrain":
        settings, sizes = _fitting(stages)
        job = replace(job, stages=settings, checkpoints=sizes)
    else:
        from finetune.train import make_plan

        job = replace(job, plans=(make_plan(first),))
    if cluster.kind == "slurm":
        job = replace(job, script=render(run, job.words, cluster, stages=job.runs))
    return job, cluster


def _machine(
    words: Sequence[str], problems: list[str]
) -> tuple[ClusterSettings | None, list[str], list[str]]:
    """The cluster, the words of the command, and those that tell it of the cluster."""
    found = attempt(problems, cluster_of, words)
    if found is None:
        return None, without_cluster(words), []
    cluster, rest = found
    typed = {word.partition("=")[0] for word in rest}
    if cluster.kind == "local":
        return cluster, rest, []
    taken = {"trainer.devices", "trainer.nodes"} & typed
    problems += [f"{key}: follows from cluster.nodes and gpus_per_node" for key in taken]
    machine = [f"trainer.devices={cluster.tasks}", f"trainer.nodes={cluster.nodes}"]
    if "trainer.accelerator" not in typed and cluster.gpus_per_node == 0:
        machine.append("trainer.accelerator=cpu")
    if "trainer.workers" not in typed:
        machine.append(f"trainer.workers={cluster.cpus_per_task - 1}")
    return cluster, rest, machine


def _refuse_idle(cluster: ClusterSettings, runs: Sequence[Any]) -> None:
    """Raises InputError where GPUs are asked for, and the settings of a run leave them idle."""
    asked = [f"cluster.gpus_per_node={cluster.gpus_per_node}"] if cluster.gpus_per_node else []
    asked += [f"cluster.gres={cluster.gres}"] if "gpu" in (cluster.gres or "") else []
    if asked and any(one.trainer.accelerator == "cpu" for one in runs):
        raise InputError(
            f"trainer.accelerator=cpu with {' and '.join(asked)}: the GPUs would be idle; give "
            "cluster.gpus_per_node=0 and no gres of GPUs, or trainer=auto where the recipe says cpu"
        )


def _fitting(stages: dict[str, Any]) -> tuple[tuple[Any, ...], tuple[int, ...]]:
    """Settings of this start and bytes of a checkpoint of each stage, if all of it fits together.

    Said here, not in a queue's log hours later.
    """
    import torch

    from pretrain.estimate import checkpoint_bytes
    from pretrain.stages import prepare_stages

    prepared = prepare_stages(stages, elsewhere=True)
    with torch.device("meta"):
        sizes = tuple(checkpoint_bytes(one.make(), one.settings.optimizer) for one in prepared)
    return tuple(one.settings for one in prepared), sizes


def render(
    run: Path,
    words: Sequence[str],
    cluster: ClusterSettings,
    elements: int = 0,
    stages: Sequence[Path] = (),
    at_once: bool = False,
) -> str:
    """The batch script of a run, or of the runs of a sweep as the elements of an array.

    Args:
        run: folder of the run, or of all runs of a sweep.
        words: of the command; of a sweep they are in files.
        cluster: what it gives.
        elements: runs of a sweep.
        stages: folders that are trained in, in order, where that is not `run`.
        at_once: it saves nothing on the way, so a signal that its time is nearly over would end it
            for nothing, and it has all cores for itself.
    """
    limit = f"%{cluster.array_limit}" if cluster.array_limit else ""
    return rendered(
        "job.sbatch.j2",
        cluster,
        words,
        run / "launch",
        run.name,
        array=f"0-{elements - 1}{limit}" if elements else "",
        run=shlex.quote(str(run)),
        stages=[shlex.quote(str(stage)) for stage in stages or [run]],
        at_once=at_once,
    )


def rendered(
    template: str,
    cluster: ClusterSettings,
    words: Sequence[str],
    folder: Path,
    name: str,
    **facts: Any,
) -> str:
    """A batch script: a template with its own facts and those that all of them need.

    Args:
        template: a file of this package.
        cluster: what it gives.
        words: of the command.
        folder: of the script, its logs and notes.
        name: what the job is called after; sbatch takes an option for ended at a space.
        facts: what else the template asks for.

    Raises:
        InputError: a container cannot see what the command works on.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    program, installed = "voxelith", ""  # in a container the image's own
    if cluster.container == "none" and Path(sys.argv[0]).name == "voxelith":
        program = shlex.quote(str(Path(sys.argv[0]).resolve()))
        if cluster.environment:
            program, installed = '"${program}"', program
    environment = Environment(
        loader=PackageLoader("slurm", "."),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
        keep_trailing_newline=True,
    )
    return environment.get_template(template).render(
        cluster=cluster,
        name=f"voxelith-{re.sub(r'[^A-Za-z0-9_.-]', '-', name)}",
        directory=shlex.quote(str(Path.cwd())),
        container=_container(cluster, [*words, str(folder)]),
        words=[shlex.quote(word) for word in words],
        folder=shlex.quote(str(folder)),
        program=program,
        installed=installed,
        requeue_code=REQUEUE_CODE,
        **facts,
    )


def _container(cluster: ClusterSettings, words: Sequence[str]) -> str:
    """What stands between srun and the command; in it paths mean what they mean here."""
    if cluster.container == "none":
        return ""
    assert cluster.image is not None
    image, directory = shlex.quote(cluster.image), shlex.quote(str(Path.cwd()))
    mounts = shlex.quote(_mounts(cluster, words))
    if cluster.container == "pyxis":
        lines = (
            f"--container-image={image}",
            f"--container-workdir={directory} --container-mounts={mounts}",
        )
    else:
        nvidia = " --nv" if cluster.gpus_per_node else ""
        lines = (f"apptainer exec{nvidia} --pwd {directory}", f"--bind {mounts} {image}")
    return "".join(f" \\\n    {line}" for line in lines)


def _mounts(cluster: ClusterSettings, words: Sequence[str]) -> str:
    """`cluster.mounts`, and what they leave out of what the command reads and writes.

    That is the working directory and each path in its words; of one that is still to be made, the
    folder that is there. Links lead out of a folder that is mounted, so their ends are as well.
    """
    given = cluster.mounts.split(",") if cluster.mounts else []
    seen = [Path(mount.split(":")[1 if ":" in mount else 0]) for mount in given]
    wanted = {Path.cwd()}
    for text in re.split(r"[\[\],]", ",".join(word.partition("=")[2] or word for word in words)):
        place = Path(os.path.normpath(Path.cwd() / text.strip(" '\"")))
        if not place.exists() and not text.startswith(("/", "..")):
            continue  # a word, or to be made in the working directory
        while not place.exists():
            place = place.parent
        wanted |= {place, place.resolve()}
    for place in sorted(wanted - {Path("/")}):  # a folder before what is in it
        if any(place.is_relative_to(other) for other in seen):
            continue
        if re.search("[:,]", str(place)):
            raise InputError(
                f"{place}: the container cannot mount a path with `:` or `,` in it; mount a folder "
                "above it with cluster.mounts, or rename it"
            )
        seen.append(place)
        given.append(f"{place}:{place}")
    return ",".join(given)


def launch(command: str, words: Sequence[str], *, dry_run: bool = False) -> dict[str, Any]:
    """Submits a job; of `cluster=local` runs it here.

    Raises:
        InputError: wrong words, no SLURM, or a job of this run is under way.
        RuntimeError: SLURM refuses it.
    """
    job, cluster = plan_job(command, words)
    print(summary(job, cluster))
    for line in foretell(job, cluster, planned=dry_run):
        print(line)
    if dry_run:
        print(job.script, end="")
        return {"run": str(job.run), "script": job.script, "job": None}
    if cluster.kind == "local":
        return _here(job)
    refuse_second(job.run)
    make_folder(job.folder, "runs")
    number = submit(job.folder, job.script, list(job.words), stages=job.runs)
    print(f"job {number}; voxelith launch status {job.run}")
    return {"run": str(job.run), "script": job.script, "job": number}


def foretell(job: Job, cluster: ClusterSettings, *, planned: bool) -> list[str]:
    """What a job takes, if it is `planned`, and where the cluster leaves it no time."""
    if job.plans:
        return _of_finetunings(job.plans, 1, cluster, planned=planned)
    saves = [Save.of(size, run) for size, run in zip(job.checkpoints, job.runs, strict=True)]
    said = []
    if planned:
        plans = [plan(one, cluster, save) for one, save in zip(job.stages, saves, strict=True)]
        for run, one in zip(job.runs, plans, strict=True):
            said += [f"  {run.name}:"] if len(plans) > 1 else []
            said.append(str(one))
        said += [added_up(plans)] if len(plans) > 1 else []
        saves = [
            replace(save, step=save.step or one.step)
            for save, one in zip(saves, plans, strict=True)
        ]
    if cluster.kind == "slurm":
        said += dict.fromkeys(line for save in saves for line in save.warnings(cluster))
    return said


@dataclass(frozen=True)
class Sweep:
    """What is not finished of a sweep, before it is submitted.

    Attributes:
        runs: folder of all runs.
        script: text of the batch script; empty if there is nothing to start.
        elements: of the array: the folder of each run, and the words that start it.
        size: all runs, finished ones too.
        plans: of those to start, as far as they are known.
    """

    runs: Path
    script: str
    elements: list[list[str]]
    size: int
    plans: Sequence[Any] = ()

    def foretell(self, cluster: ClusterSettings, *, planned: bool) -> list[str]:
        """What its runs take, if it is `planned`, and where the cluster leaves them no time."""
        at_once = min(cluster.array_limit or len(self.plans), len(self.plans))
        return _of_finetunings(self.plans, at_once, cluster, planned=planned)


def _of_finetunings(
    plans: Sequence[Any], at_once: int, cluster: ClusterSettings, *, planned: bool
) -> list[str]:
    """Hours and disk of runs, if they are `planned`, and where the cluster leaves them no time."""
    if not plans:
        return []
    said = []
    if planned:
        from finetune.forecast import forecast

        said.append(f"  {forecast(plans, at_once).text()}")
    if cluster.kind == "slurm":
        largest = max(plans, key=_checkpoint_of)
        save = Save.of(_checkpoint_of(largest), largest.settings.runs / "any")
        said += save.warnings(cluster)
    return said


def plan_sweep(words: Sequence[str]) -> Sweep:
    """What would be submitted of a sweep; the settings of all its runs are checked.

    Raises:
        InputError: wrong words of any run.
    """
    from finetune.experiments import expanded
    from finetune.sweep import is_finished, plan_jobs

    cluster, said = machine_words(words)
    found = plan_jobs(expanded(said))
    _refuse_idle(cluster, [job.plan.settings for job in found])
    runs = found[0].plan.settings.runs.resolve()
    waiting = [job for job in found if not is_finished(job.folder, job.plan)]
    elements = [
        [str(job.folder.path.resolve()), "finetune", f"run={job.name}", *job.words]
        for job in waiting
    ]
    script = render(runs, said, cluster, len(elements)) if elements else ""
    return Sweep(runs, script, elements, len(found), [job.plan for job in waiting])


def _checkpoint_of(plan: Any) -> int:
    """Bytes of a checkpoint of a finetuning, at least: what it adds to the release is not known."""
    moments = 1 if plan.settings.optimizer == "sgd" else 2
    return int((1 + moments) * (plan.release.path / "model.safetensors").stat().st_size)


def machine_words(words: Sequence[str]) -> tuple[ClusterSettings, list[str]]:
    """The cluster that a sweep or a chain names, and the words of its command for that.

    Raises:
        InputError: wrong words of the cluster, or none of SLURM.
    """
    problems: list[str] = []
    cluster, rest, machine = _machine(words, problems)
    if problems or cluster is None:
        raise InputError(problems)
    if cluster.kind == "local":
        raise InputError("cluster=local: has no jobs; leave out `launch`, and it runs here")
    return cluster, [*rest, *machine]


def submit_sweep(sweep: Sweep, words: list[str], *options: str) -> str:
    """Submits a sweep as an array, each run an element; returns the job's number.

    Raises:
        InputError: a word cannot be written into a file of lines.
        RuntimeError: SLURM refuses it.
    """
    folder = sweep.runs / "launch" / "jobs"
    for lines in sweep.elements:
        if any("\n" in line for line in lines):
            raise InputError(f"{lines[0]}: a word has a line's end in it; leave it out")
    make_folder(folder, "runs")
    for old in folder.glob("*.txt"):  # elements of an earlier launch, which may have had more
        old.unlink()
    for number, lines in enumerate(sweep.elements):
        write_text(folder / f"{number}.txt", "\n".join(lines) + "\n", SCRIPT_MODE)
        _forget(Path(lines[0]) / "launch")
    return submit(sweep.runs / "launch", sweep.script, words, *options)


def launch_sweep(words: Sequence[str], *, dry_run: bool = False) -> dict[str, Any]:
    """Submits what is not finished of a sweep of finetunings, as one array.

    Words are those of `voxelith finetune -m`. Each element is a run; launched again, exactly those
    that are not finished start.

    Raises:
        InputError: wrong words of any run, or a job of this sweep is under way.
        RuntimeError: SLURM refuses it.
    """
    sweep = plan_sweep(words)
    runs, waiting = sweep.runs, len(sweep.elements)
    print(
        f"sweep: {sweep.size} runs in {runs}, {sweep.size - waiting} are finished, "
        f"{waiting} to start"
    )
    for line in sweep.foretell(machine_words(words)[0], planned=dry_run):
        print(line)
    if dry_run:
        print(sweep.script, end="")
    if dry_run or not waiting:
        return {"runs": str(runs), "script": sweep.script, "job": None, "to_start": waiting}
    refuse_second(runs)
    array = submit_sweep(sweep, ["finetune", *words])
    print(f"job {array}, {waiting} elements; logs are in {runs / 'launch'}")
    return {"runs": str(runs), "script": sweep.script, "job": array, "to_start": waiting}


def _forget(folder: Path) -> None:
    """Removes what earlier jobs have noted in a launch folder: this one begins anew."""
    for old in ("done", *JOB_NOTES):
        (folder / old).unlink(missing_ok=True)


def refuse_second(run: Path) -> None:
    """Raises InputError where a job of the folder is under way, or SLURM is not here."""
    require_slurm()
    before = read_note(run / "launch" / NOTE).get("job")
    states = states_of(str(before)) if before else []
    if under_way := sorted(set(states) & set(ACTIVE)):
        raise InputError(
            f"{run}: its job {before} is {' and '.join(under_way)}; `voxelith launch cancel {run}` "
            "ends it"
        )


def shown(words: Iterable[str]) -> list[str]:
    """Words as they may be kept and said: an address among them without its password."""
    return [without_secrets(word) for word in words]


def require_slurm() -> None:
    """Raises InputError where no jobs can be submitted."""
    if shutil.which("sbatch") is None:
        raise InputError("launch: sbatch is not here; start it where jobs are submitted")


def submit(
    folder: Path, text: str, words: list[str], *options: str, stages: Sequence[Path] = ()
) -> str:
    """Writes a batch script into the folder and submits it; returns the job's number.

    Args:
        folder: `launch/` of a run.
        text: the script.
        words: that it was made of, for whoever asks.
        options: of sbatch beside those in the script, for this submission alone.
        stages: folders that are trained in, in order; where that is not the run's own alone.

    Raises:
        RuntimeError: SLURM refuses it.
    """
    script = folder / "job.sbatch"
    write_text(script, text, SCRIPT_MODE)
    _forget(folder)
    number = sbatch(script, *options)
    named = [stage.name for stage in stages]
    write_json(folder / NOTE, {"job": number, "words": shown(words), "stages": named})
    return number


def sbatch(script: Path, *options: str) -> str:
    """Submits a script that is written; returns the job's number, or raises RuntimeError."""
    done = subprocess.run(
        ["sbatch", "--parsable", *options, script], capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"sbatch refuses {script}: {done.stderr.strip()}")
    return done.stdout.strip().partition(";")[0]


def _here(job: Job) -> dict[str, Any]:
    from voxelith import main

    code = main(list(job.words))
    if code:
        raise SystemExit(code)
    return {"run": str(job.run), "script": None, "job": None}


def summary(job: Job, cluster: ClusterSettings) -> str:
    """What is going to happen, in lines."""
    ranks = cluster.tasks * cluster.nodes
    lines = [f"{job.words[0]}: {job.run}"]
    if cluster.kind == "slurm":
        devices = f"{cluster.nodes} nodes of {cluster.tasks} tasks"
        kind = "GPUs" if cluster.gpus_per_node else "CPU tasks"
        lines.append(
            f"  {devices}, {ranks} {kind}; {cluster.time} a start, at most "
            f"{ranks * cluster.hours:.3g} {'GPU' if cluster.gpus_per_node else 'task'}-hours each"
        )
    for settings in job.stages:
        micro = settings.batch_size // (ranks * settings.micro_steps)
        name = f"{settings.run}: " if len(job.stages) > 1 else ""
        lines.append(
            f"  {name}{settings.steps:,} steps of {settings.batch_size} samples: {micro} for each "
            f"task, {settings.micro_steps} times a step; saved every {settings.save_every} steps, "
            f"{settings.save_minutes:g} minutes at most"
        )
    return "\n".join(lines)


# What became of it.

ACTIVE = ("PENDING", "RUNNING", "CONFIGURING", "COMPLETING", "SUSPENDED", "REQUEUED")


@dataclass(frozen=True)
class Launched:
    """A job that was submitted.

    Attributes:
        run: folder of the run, or of all runs of a sweep.
        job: its number; of a run of a sweep that of its element.
        folder: with its logs.
        stages: folders that are trained in, in order.
    """

    run: Path
    job: str
    folder: Path
    stages: list[Path]

    @classmethod
    def of(cls, run: Path) -> Launched:
        """The job of a run, of a sweep, of a run of one, or of a stage of a recipe.

        Raises:
            InputError: there is none.
        """
        note = read_note(run / "launch" / NOTE)
        if "job" in note:
            stages = [run.with_name(name) for name in note.get("stages") or [run.name]]
            return cls(run, str(note["job"]), run / "launch", stages)
        sweep = run.parent / "launch"
        job = read_note(sweep / NOTE).get("job")
        for file in (sweep / "jobs").glob("*.txt"):
            element = Path(file.read_text().partition("\n")[0])
            # Of a chain, which run an element is was found when it started: see `element` there.
            places = (element.resolve(), (element / "checkpoints").resolve().parent)
            if job and run.resolve() in places:
                return cls(run, f"{job}_{file.stem}", sweep, [run])
        whole = run.with_name(run.name.rpartition(".")[0] or run.name)
        if run.name in read_note(whole / "launch" / NOTE).get("stages", []):
            return cls.of(whole)
        raise InputError(f"{run}: no job of it was launched; `voxelith launch` does that")

    @property
    def is_sweep(self) -> bool:
        """Whether it is an array of runs."""
        return (self.folder / "jobs").is_dir() and "_" not in self.job

    @property
    def logs(self) -> list[Path]:
        """What its starts have said, of a sweep each of its runs; the newest last."""
        return _by_time(
            [*self.folder.glob(f"job-{self.job}.log"), *self.folder.glob(f"job-{self.job}_*.log")]
        )


def status(run: Path) -> dict[str, Any]:
    """The job of a run: SLURM's state of it, starts, and how far the run has come."""
    launched = Launched.of(run)
    if launched.is_sweep:
        return _status_of_sweep(run, launched.job)
    facts, stages, notes = facts_of(launched.job), launched.stages, launched.run / "launch"
    begun = [stage for stage in stages if (stage / "config.json").is_file()]
    now = (begun or stages)[-1]
    steps = sorted((now / "checkpoints").glob("step-*.pt"))
    config = read_note(now / "config.json")
    staged = {"stage": f"{now.name}, {stages.index(now) + 1} of {len(stages)}"}
    return {
        "run": str(run),
        "job": launched.job,
        "state": facts.get("JobState", "unknown: SLURM does not know it any more"),
        "reason": facts.get("Reason", ""),
        "restarts": int(facts.get("Restarts", 0)),
        **(staged if len(stages) > 1 else {}),
        "saved_step": step_of(steps[-1]) if steps else 0,
        "steps": config.get("steps"),
        "crashes": int((notes / "crashes").read_text()) if (notes / "crashes").exists() else 0,
        "log": str(launched.folder / f"job-{launched.job}.log"),
    }


def _status_of_sweep(runs: Path, job: str) -> dict[str, Any]:
    states = Counter(states_of(job))
    folders = [path.parent for path in runs.glob("*/config.json")]
    return {
        "runs": str(runs),
        "job": job,
        "elements": dict(states) or "unknown: SLURM does not know them any more",
        "runs_finished": sum((folder / "rows.csv").is_file() for folder in folders),
        "runs_begun": len(folders),
        "logs": str(runs / "launch" / f"job-{job}_*.log"),
    }


def logs(run: Path, lines: int = 40) -> str:
    """The end of what the job has said; of a sweep, the run that spoke last, and its file."""
    launched = Launched.of(run)
    text = last_words(launched.logs, f"{launched.folder}/job-{launched.job}", lines)
    return text if launched.is_sweep else text.partition("\n")[2]


def last_words(files: Sequence[Path], missing: str, lines: int = 40) -> str:
    """The file that was written last, and its end; InputError, with a name of it, if none is."""
    if not files:
        raise InputError(f"{missing}: has no log yet; the job has not started")
    file = _by_time(files)[-1]
    return "\n".join([f"{file}:", *file.read_text(errors="replace").splitlines()[-lines:]])


def _by_time(files: Sequence[Path]) -> list[Path]:
    return sorted(files, key=lambda file: file.stat().st_mtime_ns)


def cancel(run: Path) -> str:
    """Ends a run's job for good; its state is saved first, where SLURM leaves time for it."""
    number = Launched.of(run).job
    cancel_job(number)
    return number


def cancel_job(*numbers: str) -> None:
    """Cancels jobs; raises RuntimeError where SLURM does not let it."""
    done = subprocess.run(["scancel", *numbers], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"scancel {' '.join(numbers)}: {done.stderr.strip()}")


def log_of(run: Path, job: str) -> Path:
    """Where the job of a folder says what it does."""
    return run / "launch" / f"job-{job}.log"


def states_of(job: str) -> list[str]:
    """The state of a job, or of each element of an array; none, if it was long ago."""
    return re.findall(r"JobState=(\S*)", _shown(job))


def facts_of(job: str) -> dict[str, str]:
    """What scontrol knows of a job; nothing, if it was long ago."""
    return dict(re.findall(r"(\w+)=(\S*)", _shown(job)))


def _shown(job: str) -> str:
    if shutil.which("scontrol") is None:
        raise InputError("launch: scontrol is not here; ask where jobs are submitted")
    done = subprocess.run(
        ["scontrol", "-o", "show", "job", job],
        capture_output=True,
        text=True,
        env={**os.environ, "LC_ALL": "C"},
    )
    return done.stdout if done.returncode == 0 else ""
