"""`voxelith launch init`: what a cluster gives, asked of SLURM itself, as settings of a cluster."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_prep.errors import InputError, near
from data_prep.files import make_folder, write_text


@dataclass(frozen=True)
class Partition:
    """A partition, and the least that its nodes have.

    Attributes:
        name: of it.
        default: whether jobs go there that name none.
        limit: the longest time, as sbatch takes it; None: none.
        cpus: of a node.
        memory_mb: of a node.
        gpus: of a node.
        gpu_type: as gres names it; empty where it does not.
        nodes: how many.
        preempt: what becomes of a job that another one pushes out: REQUEUE, CANCEL, ...
        grace: seconds between the signal and the kill then.
    """

    name: str
    default: bool
    limit: str | None
    cpus: int
    memory_mb: int
    gpus: int
    gpu_type: str
    nodes: int
    preempt: str
    grace: int


@dataclass(frozen=True)
class Cluster:
    """What SLURM says of itself.

    Attributes:
        version: of SLURM.
        requeues: whether jobs may be put back in the queue (JobRequeue).
        kill_wait: seconds between SIGTERM and SIGKILL at a time limit.
        sends_signal: whether a preempted job gets the signal of `--signal` first.
        partitions: all of them.
    """

    version: str
    requeues: bool
    kill_wait: int
    sends_signal: bool
    partitions: list[Partition] = field(default_factory=list)


def discover() -> Cluster:
    """Asks scontrol and sinfo.

    Raises:
        InputError: SLURM is not here.
        RuntimeError: it does not answer.
    """
    if shutil.which("scontrol") is None or shutil.which("sinfo") is None:
        raise InputError("launch init: scontrol and sinfo are not here; ask where jobs start from")
    config = _ask("scontrol", "show", "config")
    partitions = _ask("scontrol", "-o", "show", "partition")
    nodes = _ask("sinfo", "-h", "-N", "-o", "%R|%N|%c|%m|%G")
    return read_cluster(config, partitions, nodes)


def _ask(*words: str) -> str:
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"})
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)}: {done.stderr.strip() or 'no answer'}")
    return done.stdout


def read_cluster(config: str, partitions: str, nodes: str) -> Cluster:
    """What `scontrol show config`, `show partition` and sinfo's list of nodes say.

    Args:
        config: of scontrol.
        partitions: of scontrol, one a line.
        nodes: of sinfo: partition, node, CPUs, memory in MB and gres, separated by bars.
    """
    said = {k: v.strip() for k, v in re.findall(r"^(\w+)\s*= (.*)$", config, re.MULTILINE)}
    found: dict[str, list[tuple[int, int, int, str]]] = {}
    for line in nodes.splitlines():
        partition, _, cpus, memory, gres = line.strip().split("|")
        found.setdefault(partition, []).append((_int(cpus), _int(memory), *_gpus(gres)))
    parameters = f"{said.get('SlurmctldParameters', '')} {said.get('PreemptParameters', '')}"
    return Cluster(
        version=said.get("SLURM_VERSION", "unknown"),
        requeues=said.get("JobRequeue", "0") == "1",
        kill_wait=_int(said.get("KillWait", "0")),
        sends_signal="send_user_signal" in parameters,
        partitions=[
            _partition(dict(re.findall(r"(\w+)=(\S*)", line)), found, said)
            for line in partitions.splitlines()
            if line.strip()
        ],
    )


def _partition(
    facts: Mapping[str, str],
    nodes: Mapping[str, Iterable[tuple[int, int, int, str]]],
    config: Mapping[str, str],
) -> Partition:
    name = facts["PartitionName"]
    of_it = list(nodes.get(name, [])) or [(1, 0, 0, "")]
    limit = facts.get("MaxTime", "UNLIMITED")
    kinds = {kind for *_, kind in of_it}
    return Partition(
        name=name,
        default=facts.get("Default") == "YES",
        limit=None if limit in ("UNLIMITED", "INFINITE") else limit,
        cpus=min(cpus for cpus, *_ in of_it),
        memory_mb=min(memory for _, memory, *_ in of_it),
        gpus=min(gpus for _, _, gpus, _ in of_it),
        gpu_type=kinds.pop() if len(kinds) == 1 else "",
        nodes=_int(facts.get("TotalNodes", "1")),
        preempt=facts.get("PreemptMode", config.get("PreemptMode", "OFF")),
        grace=_int(facts.get("GraceTime", "0")),
    )


def _int(text: str) -> int:
    found = re.match(r"\d+", text)
    return int(found[0]) if found else 0


def _gpus(gres: str) -> tuple[int, str]:
    """GPUs of a node and their type, from gres such as gpu:a100:8(S:0-1) or gpu:1g.10gb:7."""
    total, kinds = 0, set()
    for kind, count in re.findall(r"\bgpu:(?:([^:,()]+):)?(\d+)(?=[,(]|$)", gres):
        total += int(count)
        kinds.add(kind)
    return total, kinds.pop() if len(kinds) == 1 else ""


def warnings(cluster: Cluster, chosen: Partition, *, tried: bool = False) -> list[str]:
    """What stands in the way of a job that is to come back.

    Args:
        cluster: what SLURM says of itself.
        chosen: partition of the job.
        tried: whether one was requeued there already, or not.
    """
    found = []
    if not cluster.requeues and not tried:
        found.append(
            "JobRequeue=0: a job must ask to be requeued, which launched ones do (--requeue); "
            "`voxelith launch doctor` tries whether that is enough here"
        )
    if chosen.preempt == "CANCEL":
        found.append(
            f"partition {chosen.name}: PreemptMode=CANCEL ends preempted jobs for good; launch "
            "again by hand, the run goes on"
        )
    if chosen.preempt in ("REQUEUE", "CANCEL") and chosen.grace < 60 and not cluster.sends_signal:
        found.append(
            f"partition {chosen.name}: GraceTime={chosen.grace} s is all that a preempted job has "
            "to end its step and save; save_minutes bounds what is lost if that is too little"
        )
    return found


def partition_of(cluster: Cluster, name: str | None) -> Partition | None:
    """The partition of that name, or the default one."""
    found = [one for one in cluster.partitions if one.name == name or (not name and one.default)]
    return found[0] if found else None


def grace(cluster: Cluster, chosen: Partition) -> int:
    """Seconds that a preempted job has from SLURM's first signal to its kill."""
    return chosen.grace + cluster.kill_wait


def init(output: Path, name: str = "mine", partition: str | None = None) -> dict[str, Any]:
    """Writes `output`/cluster/`name`.yaml for a partition and says what it found.

    Args:
        output: folder for `--config-dir`.
        name: of the cluster.
        partition: the default one, if it is not given.

    Raises:
        InputError: no SLURM, no such partition, or the file exists.
    """
    file = output / "cluster" / f"{name}.yaml"
    if file.exists():
        raise InputError(f"{file}: exists; choose another name= or remove it")
    cluster = discover()
    by_name = {one.name: one for one in cluster.partitions}
    if partition is not None and partition not in by_name:
        raise InputError(f"partition={partition}: no such partition; {near(partition, by_name)}")
    with_gpus = [one for one in cluster.partitions if one.gpus]
    default = [one for one in cluster.partitions if one.default]
    candidates = [one for one in default if one.gpus] or with_gpus or default
    chosen = by_name[partition] if partition else (candidates or cluster.partitions)[0]
    make_folder(file.parent, "output")
    write_text(file, _yaml(cluster, chosen))
    for one in cluster.partitions:
        gpus = f"{one.gpus} {one.gpu_type or 'GPUs'}, " if one.gpus else ""
        star = " (default)" if one.default else ""
        print(
            f"{'*' if one is chosen else ' '} {one.name}{star}: {one.nodes} nodes of {gpus}"
            f"{one.cpus} CPUs, {one.memory_mb / 1024:.0f} GiB; limit {one.limit or 'none'}; "
            f"preempted: {one.preempt}, grace {one.grace} s"
        )
    said = warnings(cluster, chosen)
    for warning in said:
        print(f"warning: {warning}")
    print(f"{file}: voxelith launch pretrain --config-dir {output} cluster={name} ...")
    return {"file": str(file), "partition": chosen.name, "warnings": said}


def _yaml(cluster: Cluster, chosen: Partition) -> str:
    tasks = chosen.gpus or 1
    limit = chosen.limit or "24:00:00"
    memory = f"{int(chosen.memory_mb * 0.95)}M" if chosen.memory_mb else "null"
    return f"""# Partition {chosen.name}, read from SLURM {cluster.version}: KillWait \
{cluster.kill_wait} s, preempted jobs: {chosen.preempt}, grace {chosen.grace} s.
# All keys: conf/cluster/slurm.yaml.
kind: slurm
nodes: 1
gpus_per_node: {chosen.gpus}
tasks_per_node: {"null" if chosen.gpus else 1}
cpus_per_task: {max(1, chosen.cpus // tasks)}
time: "{limit}"
memory: {memory}
partition: {chosen.name}
signal: USR2@180
"""
