"""What the batch script makes of each end, with srun and scontrol as scripts that say what we want.

`bash` runs what is submitted; nothing in here needs a SLURM.
"""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from slurm.launch import render
from slurm.settings import ClusterSettings

RUNNING = "echo JobId=7 JobState=RUNNING Reason=None"


@dataclass
class Node:
    """Where a script runs: its folder of programs, and what scontrol was asked."""

    path: Path
    asked: list[str] = field(default_factory=list)

    def start(self, script: str, srun: str, show: str = RUNNING, restart: int = 0) -> str:
        """One start of a job; returns what it said."""
        bin_ = self.path / "bin"
        bin_.mkdir(exist_ok=True)
        asked = self.path / "asked"
        asked.write_text("")
        programs = {
            "srun": srun,
            "scontrol": f'echo "$@" >> {asked}\nif [ "$1" = show ]; then\n{show}\nfi',
            "sleep": ":",
        }
        for name, lines in programs.items():
            (bin_ / name).write_text(f"#!/bin/bash\n{lines}\n")
            (bin_ / name).chmod(0o755)
        done = subprocess.run(
            ["bash", "-c", script],
            capture_output=True,
            text=True,
            timeout=60,
            env={
                "PATH": f"{bin_}:{os.environ['PATH']}", "SLURM_JOB_ID": "7",
                "SLURM_JOB_NODELIST": "n1", "SLURM_CPUS_PER_TASK": "1",
                "SLURM_RESTART_COUNT": str(restart),
            },
        )  # fmt: skip
        self.asked = asked.read_text().splitlines()
        return f"{done.stdout}{done.stderr}code {done.returncode}"

    @property
    def requeued(self) -> bool:
        return "requeue 7" in self.asked


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return Node(tmp_path)


def saves(run: Path, step: int, code: int = 9) -> str:
    """A task that leaves a checkpoint and crashes."""
    folder = run / "checkpoints"
    return f"mkdir -p {folder}; touch {folder}/step-{step:08d}.pt; exit {code}"


def test_what_comes_in_any_stage_is_a_step_on(node: Node, tmp_path: Path) -> None:
    """The last stage goes on while the first one stays as it is; its name comes first or last."""
    stages = [tmp_path / "s.second", tmp_path / "s.first"]
    cluster = ClusterSettings(kind="slurm", max_restarts=9)
    script = render(tmp_path / "s", ("pretrain",), cluster, stages=stages)
    for number, (stage, step) in enumerate([(0, 300), (1, 20), (1, 40), (1, 60)]):
        said = node.start(script, saves(stages[stage], step))
        assert node.requeued, (number, said)
    said = node.start(script, "exit 9")
    assert "the second time after" in said and not node.requeued
    assert "s.first/checkpoints/step-00000060.pt" in said
