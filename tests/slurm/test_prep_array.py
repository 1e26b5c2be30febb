"""A corpus by arrays of a real SLURM, whatever ends their elements: the bytes of a quiet prep."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lab import Lab, call

import voxelith
from data_prep.build import prep
from data_prep.errors import InputError
from data_prep.settings import PrepSettings
from slurm.prep import cancel, launch_prep, logs, status

CPU = ["cluster.cpus_per_task=1", "cluster.memory=900", "cluster.partition=main"]
WORDS = ["keys=names", "shard_mib=1"]


def words(source: Path, output: Path, *more: str) -> list[str]:
    return [f"input={source}", f"output={output}", *WORDS, *CPU, *more]


def tree(root: Path) -> dict[str, bytes]:
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def quiet(samples: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What one process writes that nobody disturbs."""
    output = tmp_path_factory.mktemp("quiet") / "c"
    settings = PrepSettings(
        input=samples / "pretrain.csv", output=output, keys="names", shard_mib=1
    )
    prep(settings, say=lambda _: None)
    return tree(output)


def test_scripts_are_readable_and_chained(samples: Path, tmp_path: Path) -> None:
    output = tmp_path / "my corpora" / "c"
    given = words(
        samples / "pretrain.csv", output, "cluster.array=8", "cluster.array_limit=4",
        "cluster.account=lab", "cluster.cpus_per_task=3", "subjects=it's (.*)",
    )  # fmt: skip
    given.remove("cluster.cpus_per_task=1")
    scripts = launch_prep(given, dry_run=True)["scripts"]
    assert list(scripts) == ["scan", "plan", "write", "publish"]
    for step, script in scripts.items():
        lines = [line for line in script.splitlines() if line.startswith("#SBATCH --")]
        file = tmp_path / "job.sh"
        file.write_text(script)
        subprocess.run(["bash", "-n", file], check=True)
        array = "#SBATCH --array=1-8%4" in lines
        assert array == (step in ("scan", "write"))
        assert f"#SBATCH --cpus-per-task={3 if array else 1}" in lines
        assert "gpu" not in script and "#SBATCH --account=lab" in lines
        shown = script.replace("srun --cpus", "printf '%s\\n' --cpus")
        said = subprocess.run(
            ["bash", "-c", f"scontrol() {{ :; }}; cd() {{ :; }}; {shown}"],
            capture_output=True, text=True, env={"PATH": "/usr/bin:/bin", "SLURM_JOB_ID": "1",
            "SLURM_JOB_NODELIST": "n", "SLURM_CPUS_PER_TASK": "3", "SLURM_ARRAY_JOB_ID": "1",
            "SLURM_ARRAY_TASK_ID": "5"},
        ).stdout.splitlines()  # fmt: skip
        assert said[said.index("prep") :] == [
            "prep", f"input={samples / 'pretrain.csv'}", f"output={output}", *WORDS,
            "subjects=it's (.*)", "processes=3", f"step={step}", *(["part=5/8"] if array else []),
        ]  # fmt: skip
    assert not output.parent.exists()


def test_more_parts_than_cases_are_not_made(samples: Path, tmp_path: Path) -> None:
    given = words(samples / "abdomen.csv", tmp_path / "c", "cluster.array=50")
    assert "--array=1-1\n" in launch_prep(given, dry_run=True)["scripts"]["scan"]


def test_mistakes_are_told_at_once(samples: Path, tmp_path: Path) -> None:
    given = words(
        samples / "pretrain.csv", tmp_path / "c", "cluster.array=many", "cluster.gpus_per_node=1",
        "cluster.tim=3", "step=scan", "modality=PET",
    )  # fmt: skip
    with pytest.raises(InputError) as found:
        launch_prep(given)
    said = "\n".join(found.value.problems)
    for part in (
        "cluster.array=many: the number of parts is needed",
        "cluster.gpus_per_node: prep takes one task and no GPU",
        "cluster.tim: no such key; did you mean time?",
        "step: launch starts all steps",
        "modality=PET",
    ):
        assert part in said, said
    with pytest.raises(InputError, match="no job of it was launched"):
        voxelith.COMMANDS["launch"].run(["status", str(tmp_path / "c")])


def test_an_addition_is_sent_to_the_command_that_makes_it(samples: Path, tmp_path: Path) -> None:
    """Not to overwrite=true, which would replace the corpus."""
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "corpus.json").write_text("{}")
    given = words(samples / "pretrain.csv", tmp_path / "c", "append=true")
    with pytest.raises(InputError) as error:
        launch_prep(given, dry_run=True)
    (said,) = error.value.problems
    assert "append=true: launch makes" in said and "`voxelith prep append=true`" in said


def test_without_a_scheduler_it_runs_here(
    samples: Path, tmp_path: Path, quiet: dict[str, bytes]
) -> None:
    given = [f"input={samples / 'pretrain.csv'}", f"output={tmp_path / 'c'}", *WORDS]
    assert voxelith.main(["launch", "prep", *given, "cluster=local"]) == 0
    assert tree(tmp_path / "c") == quiet


class Launched:
    """A prep whose jobs are in the queue."""

    def __init__(self, lab: Lab, source: Path, output: Path, *more: str) -> None:
        self.lab, self.output = lab, output
        self.jobs = launch_prep(words(source, output, *more))["jobs"]

    def until_ended(self, step: str, seconds: float = 240) -> None:
        ends = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT"}
        try:
            self.lab.until(lambda: ends >= self.states(step), seconds, step)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{status(self.output)}\n{logs(self.output)}") from None

    def states(self, step: str) -> set[str]:
        return set(status(self.output)["jobs"][step]) - {"job"}

    def element(self, step: str, part: int) -> dict[str, str]:
        return self.lab.job(f"{self.jobs[step]}_{part}")

    def held(self) -> int:
        """The process of element 2 of 3, stopped after its first case or a little later."""
        folder = self.output.parent / f".{self.output.name}.prep"
        end = time.monotonic() + 120
        while not any(int(p.stem) % 3 == 1 for p in folder.glob("*/scanned/[0-9]*.json")):
            assert time.monotonic() < end, status(self.output)
            time.sleep(0.002)
        words = f"output={self.output} .*step=scan part=2/3$"
        pids = subprocess.run(["pgrep", "-f", words], capture_output=True, text=True).stdout
        (pid,) = (
            int(p) for p in pids.split() if "python" in Path(f"/proc/{p}/exe").readlink().name
        )
        os.kill(pid, signal.SIGSTOP)
        return pid


def crash(run: Launched) -> None:
    os.kill(run.held(), signal.SIGKILL)


def near_limit(run: Launched) -> None:
    pid = run.held()
    call("scancel", "--signal=USR2", f"{run.jobs['scan']}_2")
    waiting = Path(f"/proc/{pid}/status")
    run.lab.until(lambda: "ShdPnd:\t0000000000000000" not in waiting.read_text(), 30, "USR2")
    os.kill(pid, signal.SIGCONT)


def preempt(run: Launched) -> None:
    run.held()  # SLURM sends SIGCONT, then SIGTERM
    more = ("-p", "urgent", "-n2", "--mem=3500", "--time=1", "-o", "/dev/null")
    call("sbatch", "--parsable", *more, "--wrap=sleep 1")


@pytest.mark.slurm
@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize(("end", "crashes"), [(crash, 1), (near_limit, 0), (preempt, 0)])
def test_an_element_that_ends_comes_back(
    lab: Lab, samples: Path, tmp_path: Path, quiet: dict[str, bytes],
    end: Callable[[Launched], None], crashes: int,
) -> None:  # fmt: skip
    run = Launched(lab, samples / "pretrain.csv", tmp_path / "c", "cluster.array=3")
    given = words(samples / "pretrain.csv", tmp_path / "c", "cluster.array=3")
    with pytest.raises(InputError, match=r"its jobs .* are under way; .*launch cancel"):
        launch_prep(given)
    end(run)
    lab.until(lambda: int(run.element("scan", 2)["Restarts"]) == 1, 120, "requeued")
    run.until_ended("publish")
    assert run.states("publish") == {"COMPLETED"}, logs(run.output)
    facts: dict[str, Any] = status(run.output)
    assert facts["published"] and facts["crashes"] == crashes
    assert tree(run.output) == quiet
    assert {path.name for path in tmp_path.iterdir()} == {"c", "c.private", "c.launch"}
    assert launch_prep(given)["jobs"] == {}


@pytest.mark.slurm
@pytest.mark.slow
@pytest.mark.timeout(400)
def test_what_no_restart_mends_ends_the_chain(
    lab: Lab, samples: Path, tmp_path: Path, quiet: dict[str, bytes]
) -> None:
    """An element that always fails; cancelled, then launched again without the fault."""
    with pytest.raises(RuntimeError, match=r"sbatch refuses .*partition"):
        launch_prep(
            [*words(samples / "pretrain.csv", tmp_path / "c")[:-1], "cluster.partition=absent"]
        )
    wrong = 'if [ "${SLURM_ARRAY_TASK_ID:-}" = 2 ]; then srun() { return 9; }; fi'
    run = Launched(
        lab, samples / "pretrain.csv", tmp_path / "c", "cluster.array=3",
        f"cluster.environment={[wrong]!r}",
    )  # fmt: skip
    run.until_ended("scan")
    assert run.states("scan") == {"COMPLETED", "FAILED"}
    run.until_ended("publish")
    assert run.states("publish") == {"CANCELLED"} and not run.output.exists()
    said = (tmp_path / "c.launch" / f"scan-{run.jobs['scan']}_2.log").read_text()
    assert "exit code 9, the second time after 0 of this part: not started again" in said
    facts = status(run.output)
    assert (facts["cases"], facts["scanned"], facts["crashes"]) == (36, 24, 1)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob(".c.prep/*/scanned/*")}
    again = Launched(lab, samples / "pretrain.csv", tmp_path / "c", "cluster.array=2")
    cancel(again.output)
    again.until_ended("publish")
    assert {path: path.stat().st_mtime_ns for path in before} == before
    last = Launched(lab, samples / "pretrain.csv", tmp_path / "c", "cluster.array=2")
    last.until_ended("publish")
    assert tree(last.output) == quiet
