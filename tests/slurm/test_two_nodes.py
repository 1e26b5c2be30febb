"""Two slurmd of one machine as two nodes: the rendezvous, shares of the data, one run."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from lab import CONF, Lab, call, free_ports
from launched import Run, same

from pretrain.events import Events

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(600)]
NODE = "NodeHostname={host} NodeAddr=127.0.0.1 CPUs=1 RealMemory=3200 State=UNKNOWN"


def two_nodes() -> str:
    """Nodes are called by names that lead here, where the first rank is looked for."""
    one, other = free_ports(2)
    nodes = f"NodeName={{host}} Port={one} {NODE}\nNodeName=localhost Port={other} {NODE}\n"
    text = re.sub(r"NodeName=.*?State=UNKNOWN\n", nodes, CONF, flags=re.DOTALL)
    text = text.replace("SlurmdPort={ports[1]}\n", "").replace("Nodes={host}", "Nodes=ALL")
    for part in ("spool", "run/slurmd", "log/slurmd"):
        text = text.replace(f"{{lab}}/{part}", f"{{lab}}/{part}-%n")
    return text


@dataclass
class Pair(Lab):
    """The lab with two nodes of a processor each."""

    def start_slurmd(self) -> None:
        names = re.findall(r"NodeName=(\S+)", self.conf.read_text())
        self.pids = (*(f"slurmd-{name}" for name in names), "slurmctld", "munged")
        for name in names:
            (self.path / f"spool-{name}").mkdir(exist_ok=True)
            call("slurmd", "-N", name)


@pytest.fixture(scope="module")
def pair(lab: Lab) -> Iterator[Pair]:
    import os

    before = os.environ["SLURM_CONF"]
    with tempfile.TemporaryDirectory(prefix="lab", ignore_cleanup_errors=True) as folder:
        made = Pair(Path(folder) / "l", two_nodes())
        try:
            made.start()
            made.until(lambda: call("sinfo", "-h", "-p", "main", "-o", "%D %T") == "2 idle\n", 30)
            yield made
        finally:
            made.stop()
            os.environ["SLURM_CONF"] = before


def test_a_run_on_two_nodes_is_requeued_and_is_the_run_on_one(
    pair: Pair, whole: Run, pretrain_corpus: Path, tmp_path: Path
) -> None:
    run = Run(pair, pretrain_corpus, tmp_path, "nodes", **{
        "cluster.nodes": 2, "cluster.tasks_per_node": 1, "cluster.memory": 3000,
    })  # fmt: skip
    run.until_step(20)
    assert call("squeue", "-h", "-j", run.job, "-o", "%D").strip() == "2"
    call("scancel", "--signal=USR2", run.job)
    # Ranks, and hence the samples of each, are those of two tasks on one node.
    same(run, whole)
    assert [start.ranks for start in Events(run.path).starts()] == [2, 2]


def test_one_of_two_nodes_fails(
    pair: Pair, whole: Run, pretrain_corpus: Path, tmp_path: Path
) -> None:
    run = Run(pair, pretrain_corpus, tmp_path, "lost", **{
        "cluster.nodes": 2, "cluster.tasks_per_node": 1, "cluster.memory": 3000, "save_every": 10,
    })  # fmt: skip
    run.until_step(25)
    found = call("pgrep", "-f", f"voxelith pretrain .*run=lost .*{run.path.parent}").split()
    one = next(p for p in found if b"SLURM_PROCID=1" in Path(f"/proc/{p}/environ").read_bytes())
    subprocess.run(["kill", "-9", one], check=True)
    same(run, whole)
