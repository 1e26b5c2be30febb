"""What the batch script makes of each end, with srun and scontrol as scripts that say what we want.

`bash` runs what is submitted; nothing in here needs a SLURM.
"""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from pretrain.preemption import REQUEUE_CODE
from slurm.launch import render
from slurm.prep import launch_prep
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
                "SLURM_RESTART_COUNT": str(restart), "SLURM_ARRAY_JOB_ID": "7",
                "SLURM_ARRAY_TASK_ID": "1",
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


CLUSTER = ClusterSettings(kind="slurm", max_restarts=3)


@pytest.fixture
def script(tmp_path: Path) -> str:
    return render(tmp_path / "run", ("pretrain",), CLUSTER)


KILLED = "kill -9 $PPID; exit 1"
"""A node that is lost, as far as the script sees it."""
ENDED = "exec &> /dev/null; kill $PPID; while kill -0 $PPID 2> /dev/null; do /bin/sleep 0.02; done"
"""What SLURM does to all of a job: of a preempted one, or one that has lost another node."""


def test_what_slurm_requeues_without_a_word_is_a_crash(
    node: Node, script: str, tmp_path: Path
) -> None:
    node.start(script, KILLED)
    for number in (1, 2):
        said = node.start(script, f"({saves(tmp_path / 'run', number)}); {KILLED}", restart=number)
        assert "not started again" not in said
    said = node.start(script, KILLED, restart=3)  # it had saved: again
    assert "not started again" not in said
    said = node.start(script, f"touch {tmp_path}/begun", restart=4)
    assert "ended without a word, the second time after" in said and said.endswith("code 1")
    assert not (tmp_path / "begun").exists()
    node.start(script, "exit 0")  # submitted by hand: a job that was never requeued
    assert (tmp_path / "run" / "launch" / "done").exists()


def test_what_is_lost_again_and_again_is_given_up(node: Node, script: str, tmp_path: Path) -> None:
    for number in range(4):
        said = node.start(script, f"({saves(tmp_path / 'run', number)}); {KILLED}", restart=number)
        assert "not started again" not in said
    said = node.start(script, "exit 0", restart=4)
    assert "ended without a word, after 3 restarts: not started again" in said


def test_a_run_that_was_preempted_and_has_saved_has_not_crashed(
    node: Node, script: str, tmp_path: Path
) -> None:
    for number in range(6):
        step = f"({saves(tmp_path / 'run', number)}); {ENDED}"
        assert "not started again" not in node.start(script, step, restart=number)
    for number in range(6, 12):  # and where the script did not hear of its end, or all was saved
        step = f'touch "$VOXELITH_SAVED"; {KILLED}'
        assert "not started again" not in node.start(script, step, restart=number)
    assert not (tmp_path / "run" / "launch" / "crashes").exists()


def test_what_slurm_ends_before_anything_is_saved_is_bounded(node: Node, script: str) -> None:
    for number in range(4):
        assert "not started again" not in node.start(script, ENDED, restart=number)
    said = node.start(script, ENDED, restart=4)
    assert "ended by SLURM before anything was saved, after 3 restarts: not started again" in said


def test_an_end_that_the_script_saw_is_not_one_without_a_word(
    node: Node, script: str, tmp_path: Path
) -> None:
    node.start(script, f"exit {REQUEUE_CODE}")
    assert node.requeued
    node.start(script, f"exit {REQUEUE_CODE}", restart=1)
    assert node.requeued and not (tmp_path / "run" / "launch" / "crashes").exists()


def test_all_that_was_saved_is_no_crash_whoever_was_killed_for_it(
    node: Node, script: str, tmp_path: Path
) -> None:
    """One task of several ends with the code, and SLURM kills the others, whose code is srun's."""
    for number in range(6):
        step = saves(tmp_path / "run", number, code=137)
        node.start(script, f'touch "$VOXELITH_SAVED"; {step}', restart=number)
        assert node.requeued
    assert not (tmp_path / "run" / "launch" / "crashes").exists()


LATE = RUNNING.replace("RUNNING Reason=None", "COMPLETING Reason=TimeLimit Requeue=1")
"""A job whose time is over, which `--requeue` does not cover."""


@pytest.mark.parametrize(("show", "comes_back"), [(LATE, True), (RUNNING, False)])
def test_a_time_limit_that_came_before_the_end_of_a_step(
    node: Node, script: str, tmp_path: Path, show: str, comes_back: bool
) -> None:
    for number in range(4):
        assert "not started again" not in node.start(script, ENDED, show, restart=number)
        assert node.requeued == comes_back
    said = node.start(script, ENDED, show, restart=4)  # but not for ever
    assert "before anything was saved, after 3 restarts: not started again" in said


SILENT = "echo $(($(cat {0} 2> /dev/null) + 1)) > {0}; [ $(cat {0}) -gt {1} ] || exit 1"
"""A controller that gives no answer the first times."""


@pytest.mark.parametrize(("state", "requeued"), [("RUNNING", True), ("CANCELLED", False)])
def test_a_controller_that_does_not_answer_is_asked_again(
    node: Node, script: str, tmp_path: Path, state: str, requeued: bool
) -> None:
    show = f"{SILENT.format(tmp_path / 'times', 4)}; echo JobId=7 JobState={state}"
    said = node.start(script, "exit 9", show)
    assert node.requeued == requeued, said
    assert sum(line.startswith("show") for line in node.asked) == 5


def test_without_any_answer_it_asks_to_be_requeued_nevertheless(node: Node, script: str) -> None:
    assert "exit code 9: requeued" in node.start(script, "exit 9", "exit 1")
    assert node.requeued


def test_a_prep_that_slurm_requeues_without_a_word_is_bounded(
    node: Node, samples: Path, tmp_path: Path
) -> None:
    given = [
        f"input={samples / 'pretrain.csv'}", f"output={tmp_path / 'c'}", "keys=names",
        "cluster.array=2", "cluster.max_restarts=3",
    ]  # fmt: skip
    (tmp_path / "c.launch").mkdir()
    script = launch_prep(given, dry_run=True)["scripts"]["scan"]
    node.start(script, KILLED)
    done = tmp_path / ".c.prep" / "x" / "scanned"
    done.mkdir(parents=True)
    assert "not started" not in node.start(script, f"touch {done}/2.json; {KILLED}", restart=1)
    assert "not started" not in node.start(script, f"touch {done}/4.json; {ENDED}", restart=2)
    assert (tmp_path / "c.launch" / "scan-1.crashes").read_text() == "2\n"
    for number in (3, 4, 5):
        node.start(script, KILLED, restart=number)
    said = node.start(script, "exit 0", restart=6)
    assert "ended without a word, the second time after 2 of this part" in said


def test_a_prep_that_gets_nowhere_by_its_time_limit_is_bounded(
    node: Node, samples: Path, tmp_path: Path
) -> None:
    """Starts that have done something may go on for ever; a case that takes longer may not."""
    given = [
        f"input={samples / 'pretrain.csv'}", f"output={tmp_path / 'c'}", "keys=names",
        "cluster.array=2", "cluster.max_restarts=3",
    ]  # fmt: skip
    scripts = launch_prep(given, dry_run=True)["scripts"]
    (tmp_path / "c.launch").mkdir()
    done = tmp_path / ".c.prep" / "x" / "scanned"
    done.mkdir(parents=True)
    ends = ("exit 138", "exit 140", "kill -TERM $BASHPID")
    for number in range(9):
        said = node.start(scripts["scan"], f"touch {done}/{2 * number}.json; {ends[number % 3]}")
        assert node.asked[-1] == "requeue 7_1", said
    for script, job in ((scripts["scan"], "7_1"), (scripts["plan"], "7")):
        for number in range(3):
            said = node.start(script, ends[number])
            assert node.asked[-1] == f"requeue {job}", said
        said = node.start(script, "exit 140")
        assert "ended by SLURM before anything was done, after 3 restarts: not started" in said
        assert said.endswith("code 140") and not any("requeue" in line for line in node.asked)
