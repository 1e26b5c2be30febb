"""`voxelith launch doctor`: a short job that tries all that a long one needs, and what it found.

The job is rendered from the template of every other one, with the same nodes, tasks, container and
lines of shell. Its tasks look (`slurm.examine`) and are sent the signal of `--signal`; the job is
requeued once, and what all of it comes to is judged here.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from conf.compose import take_option
from data_prep.errors import FailedError, InputError, attempt, near
from data_prep.files import make_folder, write_json
from data_prep.references import is_reference
from slurm import discover
from slurm.examine import MARK, NOTES, malicious, versions
from slurm.launch import facts_of, log_of, refuse_second, render, submit
from slurm.plan import OUTPUT, REPORT
from slurm.settings import ClusterSettings, cluster_of, without_cluster

MINUTES = 20
"""The job's time limit; it takes about two of them, and more where storage is slow."""

ENDED = ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL",
         "DEADLINE", "")  # fmt: skip
"""States from which a job does not come back; of one that SLURM has forgotten there is none."""

Judgement = Literal["pass", "warning", "fail"]
Found = dict[int, dict[str, Any]]
"""What each task found in a check."""


@dataclass(frozen=True)
class Check:
    """A line of the result: what was found, and how to mend it."""

    name: str
    result: Judgement
    found: str
    mend: str = ""

    def __str__(self) -> str:
        mend = f"\n{'':<22}{self.mend}" if self.mend else ""
        return f"{self.result:<8} {self.name:<12} {self.found}{mend}"


def doctor(words: Sequence[str], *, dry_run: bool = False) -> dict[str, Any]:
    """Submits the job, waits for it and says what it found.

    Raises:
        InputError: wrong words, or no SLURM here.
        RuntimeError: SLURM refuses the job.
        FailedError: a check failed.
    """
    cluster, told = _read(words)
    folder = Path(told["output"]).resolve()
    script = render(folder, _examine_words(folder, cluster, told), _short(cluster))
    if dry_run:
        print(script, end="")
        return {"output": str(folder), "script": script, "job": None}
    refuse_second(folder)
    make_folder(folder / "launch", "output")
    shutil.rmtree(folder / NOTES, ignore_errors=True)
    (folder / REPORT).unlink(missing_ok=True)
    job = submit(folder / "launch", script, ["doctor", *words])
    print(f"job {job}: about two minutes, and the queue; Ctrl-C cancels it")
    end = _wait(folder, job, cluster)
    log, slurm = log_of(folder, job), discover.discover()
    found = findings(log)
    checks = [
        *judge(found, cluster, versions(), end, log),
        *_judge_requeue(found, cluster, slurm, end, log),
        *_judge_grace(cluster, slurm),
    ]
    shutil.rmtree(folder / NOTES, ignore_errors=True)
    for check in checks:
        print(check)
    result = {
        "job": job,
        "mb_per_s": _save_speed(found),
        "checks": [asdict(check) for check in checks],
    }
    write_json(folder / REPORT, result)
    failed = [check.name for check in checks if check.result == "fail"]
    print(f"{folder / REPORT}: {len(checks)} checks, {len(failed)} failed")
    if failed:
        raise FailedError(f"launch doctor: failed: {', '.join(failed)}", result)
    return result


def _read(words: Sequence[str]) -> tuple[ClusterSettings, dict[str, str]]:
    problems: list[str] = []
    told = {"corpus": "", "crop_size": "[96,96,96]", "output": str(OUTPUT)}
    found = attempt(problems, cluster_of, words)
    cluster, rest = found or (None, without_cluster(words))
    for word in take_option(rest, "--config-dir")[0]:
        key, equals, value = word.partition("=")
        if not equals or key not in told:
            problems.append(f"{word}: no such option; {near(key, told)}")
        told[key] = value
    sides = told["crop_size"].strip("[]").replace(" ", "").split(",")
    if len(sides) != 3 or not all(side.isdecimal() and int(side) for side in sides):
        problems.append(f"crop_size={told['crop_size']}: expected voxels, such as [96,96,96]")
    told["crop_size"] = ",".join(sides)
    if cluster is not None and cluster.kind == "local":
        problems.append("launch doctor: cluster=local has no jobs; give a cluster of SLURM")
    if problems or cluster is None:
        raise InputError(problems)
    return cluster, told


def _examine_words(
    folder: Path, cluster: ClusterSettings, told: Mapping[str, str]
) -> tuple[str, ...]:
    corpus = told["corpus"]
    if corpus and not is_reference(corpus):
        corpus = str(Path(corpus).resolve())
    return (
        "launch", "examine", f"folder={folder}", f"gpus={cluster.gpus_per_node}",
        f"workers={cluster.cpus_per_task - 1}", f"crop_size={told['crop_size']}",
        *([f"corpus={corpus}"] if corpus else []),
    )  # fmt: skip


def _short(cluster: ClusterSettings) -> ClusterSettings:
    """The same cluster for a short job that a crash ends."""
    time = f"00:{MINUTES}:00" if cluster.hours > MINUTES / 60 else cluster.time
    return cluster.model_copy(update={"time": time, "max_restarts": 0})


# While it waits and runs.


def findings(log: Path) -> list[dict[str, Any]]:
    """What tasks have written into the log so far; half a line is not there yet."""
    found = []
    for line in log.read_text(errors="replace").splitlines() if log.exists() else []:
        if line.startswith(MARK):
            try:
                found.append(dict(json.loads(line.removeprefix(MARK))))
            except ValueError:
                continue
    return found


def _wait(folder: Path, job: str, cluster: ClusterSettings) -> dict[str, str]:
    """Waits for the job's end, and sends its signal when all tasks are ready for it."""
    tasks, signalled, said, facts = cluster.tasks * cluster.nodes, False, "", {"JobState": ""}
    try:
        while True:
            facts = facts_of(job) or {"JobState": ""}
            found = findings(log_of(folder, job))
            now = _progress(facts, found, tasks)
            if now != said:
                print(f"job {job}: {now}", flush=True)
                said = now
            if not signalled and sum(one["check"] == "ready" for one in found) == tasks:
                name = cluster.signal.partition("@")[0]
                subprocess.run(["scancel", f"--signal={name}", job], capture_output=True)
                signalled = True
            if facts["JobState"] in ENDED:
                return facts
            if "held" in facts.get("Reason", "").lower() and found:
                subprocess.run(["scancel", job], capture_output=True)
                return facts
            time.sleep(1)
    except KeyboardInterrupt:
        done = subprocess.run(["scancel", job], capture_output=True)
        how = "is cancelled" if done.returncode == 0 else f"runs on; `scancel {job}` ends it"
        print(f"job {job} {how}")
        raise


def _progress(facts: Mapping[str, str], found: Sequence[dict[str, Any]], tasks: int) -> str:
    state = facts["JobState"] or "not known any more"
    if state == "PENDING":
        return f"PENDING ({facts.get('Reason', '')})"
    of_start = [one for one in found if one["start"] == int(facts.get("Restarts", 0))]
    newest = of_start[-1]["check"] if of_start else ""
    return f"{state}, {tasks} tasks{f', last heard of: {newest}' if newest else ''}"


# What it comes to.


def judge(
    found: Sequence[dict[str, Any]],
    cluster: ClusterSettings,
    here: dict[str, str],
    end: Mapping[str, str],
    log: Path,
) -> list[Check]:
    """One line for each check.

    Args:
        found: by all tasks.
        cluster: that was asked for.
        here: versions where the job was submitted.
        end: what SLURM said of the job last.
        log: of the job.
    """
    first: dict[str, Found] = {}
    for one in found:
        if one["start"] == 0:
            first.setdefault(one["check"], {})[one["task"]] = one
    if not found:
        return [
            Check(
                "job",
                "fail",
                f"no task said anything; state {end['JobState'] or 'unknown'}",
                f"look into {log} here and on the node: a container or a line of "
                "cluster.environment that fails, or a folder that this machine does not share",
            )
        ]
    tasks = cluster.tasks * cluster.nodes
    judged = [_judge_versions(first.get("versions", {}), here, cluster)]
    for name, judge_one in JUDGES.items():
        facts = first.get(name, {})
        silent = [n for n in range(tasks) if n not in facts]
        errors = {n: str(one["error"]) for n, one in facts.items() if "error" in one}
        if silent:
            judged.append(
                Check(name, "fail", f"{_tasks(silent)} said nothing", f"the reason is in {log}")
            )
        elif errors:
            state: Judgement = "warning" if name == "wandb" else "fail"
            judged.append(Check(name, state, _by_text(errors), MENDS[name]))
        else:
            judged.append(judge_one(facts, cluster))
    return judged


def _by_text(errors: Mapping[int, str]) -> str:
    by: dict[str, list[int]] = {}
    for number, text in errors.items():
        by.setdefault(text, []).append(number)
    return "; ".join(f"{_tasks(numbers)}: {text}" for text, numbers in by.items())


def _tasks(numbers: Iterable[int]) -> str:
    listed = [str(n) for n in sorted(numbers)]  # they come as they were heard
    return f"task{'s' if len(listed) > 1 else ''} {', '.join(listed)}"


def _judge_versions(found: Found, here: dict[str, str], cluster: ClusterSettings) -> Check:
    bad = {n: malicious(one["versions"]) for n, one in found.items()}
    if any(bad.values()) or malicious(here):
        where = _tasks(n for n in bad if bad[n]) if any(bad.values()) else "this machine"
        upload = next((b for b in bad.values() if b), malicious(here))
        return Check(
            "versions",
            "fail",
            f"{upload} on {where}: a malicious upload that steals credentials when imported",
            "pip install 'lightning>=2.6.6', and change what that environment had access to",
        )
    other: dict[str, list[int]] = {}
    for n, one in found.items():
        for name in {**here, **one["versions"]}:
            there, ours = one["versions"].get(name, "none"), here.get(name, "none")
            if there != ours:
                other.setdefault(f"{name} {there}, here {ours}", []).append(n)
    if not other:
        said = ", ".join(f"{n} {v}" for n, v in here.items() if n != "code")
        return Check("versions", "pass", f"{said} on all tasks and here, and the same code")
    said = "; ".join(f"{_tasks(numbers)}: {what}" for what, numbers in other.items())
    uneven = any(len(numbers) < len(found) for numbers in other.values())
    if cluster.container != "none" and not uneven:
        return Check(
            "versions", "warning", said, "the image has others than this machine checks by"
        )
    return Check(
        "versions",
        "fail",
        said,
        "one environment for all: look at cluster.environment, PYTHONPATH and folders named as "
        "our packages are in the working directory",
    )


def _judge_gpus(found: Found, cluster: ClusterSettings) -> Check:
    if not cluster.gpus_per_node:
        return Check("gpus", "pass", "none asked for (cluster.gpus_per_node=0)")
    counts = sorted({one["count"] for one in found.values()})
    names = sorted({name for one in found.values() for name in one.get("names", [])})
    least = min(one.get("gib", 0) for one in found.values())
    said = f"{' or '.join(map(str, counts))} of {cluster.gpus_per_node} seen by each task"
    if counts != [cluster.gpus_per_node]:
        return Check("gpus", "fail", said, MENDS["gpus"])
    said += f": {' and '.join(names)}, {least} GiB"
    if len(names) > 1:
        return Check("gpus", "warning", said, "cluster.constraint= makes them alike")
    if not all(one["bf16"] for one in found.values()):
        return Check("gpus", "warning", f"{said}, no bf16", "precision=auto takes float32 there")
    return Check("gpus", "pass", f"{said}, bf16")


def _judge_folder(found: Found, cluster: ClusterSettings) -> Check:
    unseen = {n: one["missing"] for n, one in found.items() if one["missing"]}
    if unseen:
        said = "; ".join(f"task {n} does not see {_tasks(of)}" for n, of in unseen.items())
        return Check("folder", "fail", f"is not the same for all tasks: {said}", MENDS["folder"])
    slowest = max(one["seconds"] for one in found.values())
    free = min(one["gb"] for one in found.values())
    said = f"a renamed file was there for all after {slowest:g} s; {free:,} GB free"
    locks = sorted({str(one["locks"]) for one in found.values()} - {"hold"})
    if locks:
        mend = "never launch the same run twice at the same time; nothing else needs locks"
        return Check("folder", "warning", f"{said}; file locks {', '.join(locks)}", mend)
    return Check("folder", "pass", f"{said}; file locks hold")


def _judge_save(found: Found, cluster: ClusterSettings) -> Check:
    speed = found[0]["mb_per_s"]
    seconds = int(cluster.signal.partition("@")[2])
    return Check(
        "save",
        "pass",
        f"{speed:g} MB/s: in the {seconds} s before a time limit {speed * seconds / 1e3:,.1f} GB",
    )


def _judge_corpus(found: Found, cluster: ClusterSettings) -> Check:
    if "volumes" not in found[0]:
        return Check("corpus", "pass", "none given (corpus=DIR)")
    rates = [one["crops_per_s"] for one in found.values()]
    return Check(
        "corpus",
        "pass",
        f"{found[0]['volumes']:,} volumes; {min(rates):g} to {max(rates):g} crops/s a task with "
        f"{cluster.cpus_per_task - 1} workers, {sum(rates):.4g} in all, each verified: enough for "
        f"GPUs that take {min(rates):g} samples/s or less (voxelith bench step)",
    )


def _judge_wandb(found: Found, cluster: ClusterSettings) -> Check:
    if not found[0]["bytes"]:
        return Check("wandb", "warning", "offline mode left no file", MENDS["wandb"])
    return Check("wandb", "pass", "offline, a run was written (WANDB_MODE=offline)")


def _judge_reduction(found: Found, cluster: ClusterSettings) -> Check:
    if "alone" in found[0]:
        return Check("all-reduce", "pass", "one task alone")
    wrong = [n for n, one in found.items() if not one["right"]]
    if wrong:
        return Check("all-reduce", "fail", f"wrong sum on {_tasks(wrong)}", MENDS["all-reduce"])
    slowest = min(found.values(), key=lambda one: float(one["gb_per_s"]))
    return Check(
        "all-reduce",
        "pass",
        f"{slowest['backend']}, {len(found)} tasks: 64 MiB in {slowest['seconds']:g} s, "
        f"{slowest['gb_per_s']:g} GB/s",
    )


def _judge_signal(found: Found, cluster: ClusterSettings) -> Check:
    name = cluster.signal.partition("@")[0]
    deaf = [n for n, one in found.items() if one["heard"] == "NOTHING"]
    if deaf:
        return Check("signal", "fail", f"{name} was not heard by {_tasks(deaf)}", MENDS["signal"])
    return Check("signal", "pass", f"{name} was heard by the main process of all tasks")


def _judge_requeue(
    found: Sequence[dict[str, Any]],
    cluster: ClusterSettings,
    slurm: discover.Cluster,
    end: Mapping[str, str],
    log: Path,
) -> list[Check]:
    if not found:
        return []  # nothing ran
    again: Found = {one["task"]: one for one in found if one["check"] == "again"}
    if not again:
        said = f"the job did not start a second time; state {end['JobState'] or 'unknown'}"
        if reason := end.get("Reason", "None").replace("None", ""):
            said += f" ({reason})"
        refused = [line for line in _lines(log) if "requeue" in line and MARK not in line]
        said += f": {refused[-1].strip()}" if refused else ""
        said += "" if slurm.requeues else "; JobRequeue=0"
        mend = "ask the cluster's administrators whether jobs may be requeued (scontrol requeue)"
        return [Check("requeue", "fail", said, f"{mend}; else launch again by hand, it goes on")]
    silent = [n for n in range(cluster.tasks * cluster.nodes) if n not in again]
    if silent or any(one.get("missing") for one in again.values()):
        said = "the second start does not see what the first one wrote"
        return [Check("requeue", "fail", said, MENDS["folder"])]
    said = "requeued, and the second start saw what the first wrote"
    if any("scontrol is not here" in line for line in _lines(log)):
        said += "; by the batch script, since tasks have no scontrol"
    return [Check("requeue", "pass", said)]


def _lines(log: Path) -> list[str]:
    return log.read_text(errors="replace").splitlines() if log.exists() else []


def _save_speed(found: Sequence[dict[str, Any]]) -> float | None:
    return next((one["mb_per_s"] for one in found if "mb_per_s" in one), None)


def _judge_grace(cluster: ClusterSettings, slurm: discover.Cluster) -> list[Check]:
    """What stands in the way of coming back, as SLURM's own settings say."""
    chosen = discover.partition_of(slurm, cluster.partition)
    if chosen is None:
        return []
    against = discover.warnings(slurm, chosen, tried=True)
    grace = discover.grace(slurm, chosen)
    said = f"partition {chosen.name}, PreemptMode={chosen.preempt}"
    said += f": {grace} s (GraceTime + KillWait) from the signal to the kill"
    if against:
        return [Check("preemption", "warning", said, "; ".join(against))]
    return [Check("preemption", "pass", said)]


JUDGES = {
    "gpus": _judge_gpus,
    "folder": _judge_folder,
    "save": _judge_save,
    "corpus": _judge_corpus,
    "wandb": _judge_wandb,
    "all-reduce": _judge_reduction,
    "signal": _judge_signal,
}

MENDS = {
    "gpus": "cluster.gres= or cluster.partition= of nodes with GPUs; in a container, its option "
    "for them; a CPU build of torch sees none",
    "folder": "take a folder (output=, runs=) on storage that all nodes mount at the same path; in "
    "a container, name it in cluster.mounts",
    "save": "take a folder that can be written, with room",
    "corpus": "give the path as nodes see it; in a container, name it in cluster.mounts; `voxelith "
    "check` finds what is damaged",
    "wandb": "pip install wandb, or leave it out of loggers",
    "all-reduce": "a firewall between nodes, or the wrong network: NCCL_SOCKET_IFNAME or "
    "GLOO_SOCKET_IFNAME in cluster.environment; NCCL_DEBUG=INFO says more",
    "signal": "a line of cluster.environment or a wrapper that traps it, or a container that does "
    "not pass it on; the other of cluster.signal=USR1@180 and USR2@180 may get through",
}
