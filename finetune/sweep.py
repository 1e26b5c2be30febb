"""`voxelith finetune -m`: all combinations of a sweep, side by side, and what became of each.

    voxelith finetune -m task=hippocampus corpus=DIR ckpt=a,b labels=4,16,all seed=0,1,2 runs=DIR

A comma gives a key several values; commas within brackets or quotes do not. Each pretrained run
needs its scratch twin, so twins that are missing are added, and checkpoints of one architecture
share them. A run is named after all that it is, so the same command started again leaves finished
runs as they are, goes on with interrupted ones and starts what is missing. The three arms are
`init=pretrained,scratch recipe_of=twin,own`.

`experiment=NAME` is a sweep of conf/sweep (`finetune.experiments`). `runs/sweep.csv`, the ledger,
has one row per run, and `runs/logs/` what each of them said.
"""

from __future__ import annotations

import contextlib
import csv
import fcntl
import io
import itertools
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any

from conf.compose import settings_for
from data_prep.corpus import Corpus
from data_prep.errors import FailedError, InputError, attempt
from data_prep.files import make_folder, write_text
from data_prep.progress import bar
from data_prep.references import is_reference
from finetune.experiments import expanded, with_family
from finetune.forecast import forecast
from finetune.plan import Plan
from finetune.settings import FinetuneSettings
from finetune.train import check_network, is_finished, make_plan
from pretrain.loop import check_machine
from pretrain.release import Release
from pretrain.run_folder import RunFolder
from pretrain.settings import TrainerSettings

VARIED = ("ckpt", "transfer", "labels", "seed", "label_seed")
"""Keys of which a sweep has many values; the rest is composed once for all of these.

No other setting has a say in whether their values are right, so each is checked once as well.
"""
NO_ARM = {"init": "pretrained", "recipe_of": "own"}
"""What only comes up when both keys are varied to get the three arms: the own recipe is scratch's.
"""
TWIN = {"init": "scratch", "transfer": "auto", "recipe_of": "twin"}
"""How a pretrained run's scratch twin is told."""
HOW = (
    "trainer", "window_batch", "validations", "log_every", "save_every", "save_minutes",
    "preview_every", "loggers",
)  # fmt: skip
"""How a run is done and watched: no part of what it is, so not of its name."""
LEDGER = "sweep.csv"
OPENS_QUOTE = ("", *"[{(,:")
"""What a quote may follow: nothing, where a value begins, or these."""


@dataclass(frozen=True)
class Entry:
    """A row of the ledger.

    `state` is waiting, running, done, failed, or stopped: the sweep itself was ended and the run
    with it. `starts` counts how often the run was started, `seconds` is the last start's.
    """

    run: str
    task: str
    checkpoint: str
    init: str
    labels: str
    seed: int
    state: str = "waiting"
    starts: int = 0
    began: str = ""
    seconds: float = 0.0
    note: str = ""


@dataclass(frozen=True)
class Job:
    """A run of the sweep: the words that start it and what they come to."""

    name: str
    words: tuple[str, ...]
    plan: Plan
    twin: bool
    """Whether it was added as the scratch twin of another one."""

    @property
    def folder(self) -> RunFolder:
        """Where it writes."""
        return RunFolder(self.plan.settings.runs / self.name)

    @property
    def entry(self) -> Entry:
        """Its row in a new ledger."""
        chosen = self.plan.settings
        return Entry(
            self.name,
            chosen.task.name,
            self.plan.checkpoint,
            chosen.init,
            chosen.labels,
            chosen.seed,
        )


def sweep(
    words: Sequence[str], *, jobs: int | None = None, twins: bool = True, dry_run: bool = False
) -> dict[str, Any]:
    """Runs what is not finished yet of all combinations of `words`.

    Args:
        words: of `voxelith finetune`, with several values between commas.
        jobs: runs at a time; by default as many as there are GPUs, or cores, for.
        twins: add the scratch twins that are missing.
        dry_run: say what would be started, and what it would cost, and start nothing.

    Returns:
        Names of runs by what became of them.

    Raises:
        InputError: wrong words, settings, checkpoints or corpora: of all combinations at once; or
            fewer GPUs than a run is to use.
        FailedError: not all runs are finished.
    """
    words = expanded(words)
    found = plan_jobs(words, twins=twins)
    runs, trainer = found[0].plan.settings.runs, found[0].plan.settings.trainer
    if trainer.nodes > 1:  # each run would wait here for ranks that nobody starts
        raise InputError(
            f"trainer.nodes={trainer.nodes}: a sweep starts its runs on this machine; leave it "
            "out, or give the sweep to a cluster with `voxelith launch finetune -m`"
        )
    waiting = [job for job in found if not is_finished(job.folder, job.plan)]
    if waiting and not dry_run:
        check_machine(trainer)
    devices = _devices(trainer)
    by_cores = max(1, len(os.sched_getaffinity(0)) // trainer.devices)
    jobs = min(jobs or len(devices) or by_cores, max(1, len(waiting)))
    added = sum(job.twin for job in found)
    print(
        f"sweep: {len(found)} runs in {runs}, {added} of them scratch twins that were added; "
        f"{len(found) - len(waiting)} are finished, {len(waiting)} to start, {jobs} at a time"
    )
    combinations = expand(words)
    if no_arm := len(combinations) - len(_arms(combinations)):
        print(
            f"sweep: {no_arm} combinations left out: init=pretrained with recipe_of=own is no arm, "
            "the own recipe is that of scratch"
        )
    if dry_run:
        for job in waiting:
            print(f"  {job.name}")
        if waiting:
            print(forecast([job.plan for job in waiting], jobs).text())
        return {"to_start": [job.name for job in waiting]}
    make_folder(runs / "logs", "runs")
    with _only_sweep(runs) as lock, Ledger(runs / LEDGER, found) as ledger:
        for job in found:
            if job not in waiting:
                ledger.update(job.name, state="done")
        _run_all(waiting, jobs, devices, ledger, lock)
        states = {
            state: [job.name for job in found if ledger[job.name].state == state]
            for state in ("done", "failed", "stopped")
        }
    for name in states["failed"]:
        print(f"  failed: {name}: {ledger[name].note} (logs/{name}.log)", file=sys.stderr)
    if states["failed"] or states["stopped"]:
        left = len(states["failed"]) + len(states["stopped"])
        raise FailedError(
            f"{left} of {len(found)} runs are not finished; the same command starts exactly those",
            states,
        )
    return states


def expand(words: Sequence[str]) -> list[dict[str, str]]:
    """Every combination of the values between commas; the last key changes fastest.

    Raises:
        InputError: a word is no key=value, or a key stands there twice.
    """
    values: dict[str, list[str]] = {}
    problems = []
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            problems.append(f"{word}: expected key=value")
        elif key in values:
            problems.append(f"{word}: {key} stands there twice; give its values between commas")
        elif key == "run":
            problems.append(f"{word}: names one run, and a sweep names its runs; leave it out")
        values[key] = [value] if key.startswith("--") else _between_commas(value)
    if problems:
        raise InputError(problems)
    return [dict(zip(values, each, strict=True)) for each in itertools.product(*values.values())]


def _arms(combinations: list[dict[str, str]]) -> list[dict[str, str]]:
    """The combinations that are an arm; NO_ARM is left out where scratch is asked for as well."""
    if all(combination.get("init") != "scratch" for combination in combinations):
        return combinations  # nobody gets the own recipe: a mistake, which its settings tell
    return [each for each in combinations if not NO_ARM.items() <= each.items()]


def plan_jobs(words: Sequence[str], *, twins: bool = True) -> list[Job]:
    """The runs of a sweep, twins included, each of them once.

    Raises:
        InputError: whatever is wrong in any combination.
    """
    problems: list[str] = []
    releases: dict[Path, Release] = {}
    corpora: dict[Path, Corpus] = {}
    checked: set[tuple[str, Any]] = set()
    jobs: dict[str, Job] = {}
    combinations = [with_family(each) for each in _arms(expand(words))]
    for combination, settings in _settings(combinations, problems):
        arms = [settings]
        if twins and settings.init == "pretrained":
            arms.append(settings.model_copy(update=TWIN))
        for arm in arms:
            try:
                plan = make_plan(arm, releases.get(arm.ckpt), corpora.get(arm.corpus))
            except InputError as error:
                problems += error.problems
                continue
            # Read once: each byte of a release is verified. One that was adapted to a corpus of
            # other channels fits that corpus alone.
            if plan.release.stored_channels is None:
                releases[arm.ckpt] = plan.release
            corpora[arm.corpus] = plan.corpus
            network = (plan.release.digest, plan.identity["recipe_hash"])
            if network not in checked:
                checked.add(network)
                attempt(problems, check_network, plan)
            varied = combination | {key: str(getattr(arm, key)) for key in TWIN}
            if is_reference(varied["ckpt"]):
                varied["ckpt"] = str(arm.ckpt)  # which is here by now, and may hold a password
            name = run_name(plan)
            said = tuple(f"{key}={value}" for key, value in varied.items())
            job = Job(name, said, plan, twin=arm is not settings)
            if name not in jobs or jobs[name].twin:  # an arm that was asked for is none added
                jobs[name] = job
            elif not job.twin and (differ := _apart(jobs[name].plan, plan)):
                problems.append(
                    f"{name}: two runs of the sweep would have this name, which does not say "
                    f"{', '.join(differ)}; vary it in sweeps with another runs= each"
                )
    if problems:
        raise InputError(list(dict.fromkeys(problems)))
    return list(jobs.values())


def _apart(first: Plan, second: Plan) -> list[str]:
    """What two plans of one name differ in, though it changes what is trained, kept or watched."""
    if first.identity != second.identity:
        return [k for k, v in first.identity.items() if second.identity.get(k) != v]
    one, other = (plan.settings.model_dump() for plan in (first, second))
    return [key for key in HOW if one[key] != other[key]]


def run_name(plan: Plan) -> str:
    """A name that says what is varied and, by hashes, all the rest: no two runs share one.

    Scratch takes nothing from a checkpoint but its architecture and preprocessing, which are part
    of the recipe, so that checkpoints which share those share the run.
    """
    chosen, identity = plan.settings, plan.identity
    arm = "scratch"
    if chosen.recipe_of == "own":
        # Departing from several shared recipes to the same one, it is the third arm of each.
        arm += f"-own-of={identity['config_hash'][:8]}"
    if chosen.init == "pretrained":
        arm = f"{chosen.ckpt.resolve().name}-{plan.release.digest[:6]}"
        arm += "" if plan.transfer == "encoder" else f"-{plan.transfer}"
    draw = f"-draw={chosen.label_draw}" if chosen.label_draw != chosen.seed else ""
    labels = chosen.labels.replace("%", "pct")
    split = "" if chosen.split == "auto" else f"-{chosen.split}"
    name = (
        f"{chosen.task.name}-{arm}-{identity['recipe_hash'][:8]}{split}-labels={labels}"
        f"-seed={chosen.seed}{draw}"
    )
    return re.sub(r"[^A-Za-z0-9._=-]+", "-", name)[-100:].lstrip("._=-")


def _settings(
    combinations: list[dict[str, str]], problems: list[str]
) -> Iterator[tuple[dict[str, str], FinetuneSettings]]:
    """Settings of each combination, all of whose mistakes are added to `problems`.

    Hydra takes half a second to compose one, so values of the keys that only fill a field are
    composed once each and put together here.
    """
    composed: dict[tuple[Any, ...], FinetuneSettings | None] = {}

    def compose(words: Mapping[str, str]) -> FinetuneSettings | None:
        key = tuple(words.items())
        if key not in composed:
            try:
                composed[key] = settings_for("finetune", [f"{k}={v}" for k, v in words.items()])
            except InputError as error:
                composed[key] = None
                problems.extend(error.problems)
        return composed[key]

    first: dict[tuple[Any, ...], dict[str, str]] = {}
    for combination in combinations:
        rest = tuple((k, v) for k, v in combination.items() if k not in VARIED)
        base = first.setdefault(rest, combination)
        settings = compose(base)
        changes: dict[str, Any] = {}
        for key in VARIED:
            if key in combination and combination[key] != base[key]:
                other = compose(base | {key: combination[key]})
                changes[key] = getattr(other, key, None)
                settings = settings if other else None
        if settings is not None:
            yield combination, settings.model_copy(update=changes)


def _between_commas(text: str) -> list[str]:
    """Splits at commas that no bracket or quote holds; an apostrophe in a word is no quote."""
    parts, start, depth, quote = [], 0, 0, ""
    for i, letter in enumerate(text):
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"" and text[start:i].rstrip()[-1:] in OPENS_QUOTE:
            quote = letter
        elif letter in "[{(":
            depth += 1
        elif letter in "]})":
            depth -= 1
        elif letter == "," and depth == 0:
            parts.append(text[start:i])
            start = i + 1
    return [*parts, text[start:]]


# The ledger.


class Ledger:
    """The rows of sweep.csv; each change is on disk before the next thing happens."""

    def __init__(self, path: Path, jobs: Sequence[Job]) -> None:
        self.path = path
        before = {entry.run: entry for entry in read_ledger(path)}
        for job in jobs:
            kept = before.get(job.name, job.entry)
            # What is not finished waits, whatever it was when the last sweep ended.
            before[job.name] = replace(kept, state="waiting", note="")
        self.entries = before
        self._lock = threading.Lock()

    def __enter__(self) -> Ledger:
        self._write()
        return self

    def __exit__(self, *_: object) -> None:
        self._write()

    def __getitem__(self, run: str) -> Entry:
        return self.entries[run]

    def update(self, run: str, **changes: Any) -> None:
        """Changes a row."""
        with self._lock:
            self.entries[run] = replace(self.entries[run], **changes)
            self._write()

    def _write(self) -> None:
        text = io.StringIO()
        writer = csv.DictWriter(text, [f.name for f in fields(Entry)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(entry) for entry in self.entries.values())
        write_text(self.path, text.getvalue())


def read_ledger(path: Path) -> list[Entry]:
    """The rows of a ledger; none if there is no such file.

    Raises:
        InputError: it is no ledger.
    """
    if not path.exists():
        return []
    kinds = {f.name: {"int": int, "float": float}.get(str(f.type), str) for f in fields(Entry)}
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return [
                Entry(**{n: kinds[n](v) for n, v in row.items()}) for row in csv.DictReader(file)
            ]
    except (TypeError, ValueError, KeyError) as error:
        raise InputError(
            f"{path}: is not the ledger of a sweep ({error}); move it away, the runs say for "
            "themselves what is finished"
        ) from error


@contextlib.contextmanager
def _only_sweep(runs: Path) -> Iterator[int]:
    """Holds the folder against a second sweep; yields the lock, a file descriptor.

    Runs inherit it, so it ends with the last process of the sweep, however that ends: runs that
    a killed sweep leaves behind are not started a second time beside themselves.
    """
    with (runs / ".sweep.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(
                f"runs={runs}: another sweep is at work there, or runs that it left when it was "
                "killed, each a process that its lease.json names; wait for them, end them, or "
                "choose another runs="
            ) from None
        yield file.fileno()


# Running.


def _devices(trainer: TrainerSettings) -> list[str]:
    """The GPUs of each run at a time, as CUDA_VISIBLE_DEVICES has them; none where all use CPUs."""
    if trainer.accelerator == "cpu":
        return []
    import torch

    if not torch.cuda.is_available():
        return []  # whatever is said to be visible
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    found = [name for name in visible.split(",") if name]
    found = found or [str(i) for i in range(torch.cuda.device_count())]
    each = trainer.devices
    return [",".join(found[i : i + each]) for i in range(0, len(found) - each + 1, each)]


def _run_all(jobs: list[Job], at_once: int, devices: list[str], ledger: Ledger, lock: int) -> None:
    """Keeps `at_once` runs going; a signal to the sweep goes to them, and they save and end."""
    started = _Started(lock)
    slots = list(range(at_once))
    queue = list(jobs)
    try:
        with (
            started.signals(),  # until the last run has ended
            ThreadPoolExecutor(at_once) as pool,
            bar(total=len(jobs), desc="sweep", unit="run") as progress,
        ):
            busy: dict[Any, int] = {}
            while busy or (queue and not started.stopping):
                while queue and slots and not started.stopping:
                    slot = slots.pop()
                    environment = (
                        {"CUDA_VISIBLE_DEVICES": devices[slot % len(devices)]} if devices else {}
                    )
                    busy[pool.submit(_run, queue.pop(0), environment, ledger, started)] = slot
                done, _ = wait(busy, return_when=FIRST_COMPLETED)
                for future in done:
                    slots.append(busy.pop(future))
                    future.result()
                    progress.update()
    finally:  # also where the terminal is gone that the bar writes to
        for job in queue:
            ledger.update(job.name, state="stopped")


class _Started:
    """The processes that are alive, so that a signal reaches them, and the lock they share."""

    def __init__(self, lock: int) -> None:
        self.lock = lock
        self.processes: set[subprocess.Popen[bytes]] = set()
        self.stopping = False

    @contextlib.contextmanager
    def signals(self) -> Iterator[None]:
        def stop(number: int, frame: FrameType | None) -> None:
            self.stopping = True
            for process in list(self.processes):
                process.send_signal(signal.SIGTERM)

        ends = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        try:
            # What is ignored stays so: nohup.
            chosen = [n for n in ends if signal.getsignal(n) != signal.SIG_IGN]
            before = {n: signal.signal(n, stop) for n in chosen}
        except ValueError:  # not in the main thread: whoever started us hears of signals
            before = {}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _run(job: Job, environment: dict[str, str], ledger: Ledger, started: _Started) -> None:
    """One run in a process of its own, whose output goes to its log."""
    runs = job.plan.settings.runs
    log = runs / "logs" / f"{job.name}.log"
    words = [*job.words, f"run={job.name}"]
    if not environment and job.plan.settings.trainer.threads is None:
        words.append("trainer.threads=1")  # runs side by side gain more than threads do
    paths = filter(None, (str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")))
    began = time.time()
    ledger.update(
        job.name,
        state="running",
        starts=ledger[job.name].starts + 1,
        began=datetime.fromtimestamp(began, UTC).isoformat(timespec="seconds"),
    )
    with log.open("wb") as file:
        process = subprocess.Popen(
            # -P: folders of where the sweep was started may have the names of our packages. Ours
            # are those that run here, whichever are installed.
            [sys.executable, "-P", "-m", "voxelith", "finetune", *words],
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment, "PYTHONPATH": os.pathsep.join(paths)},
            start_new_session=True,  # ctrl-c reaches the sweep alone, which tells them once
            pass_fds=(started.lock,),
        )
        started.processes.add(process)
        if started.stopping:
            process.send_signal(signal.SIGTERM)
        code = process.wait()
        started.processes.discard(process)
    finished = code == 0 and is_finished(job.folder, job.plan)
    state = "done" if finished else "stopped" if started.stopping else "failed"
    note = "" if finished else _last_line(log, code)
    ledger.update(job.name, state=state, seconds=round(time.time() - began, 1), note=note)


def _last_line(log: Path, code: int) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    said = next((line for line in reversed(lines) if line.startswith("error:")), "")
    if code < 0:
        return f"killed by signal {-code}"
    return (said.removeprefix("error: ") or (lines[-1] if lines else f"exit code {code}"))[:300]
