"""A job looks at a real cluster: all is well on the lab, and each planted fault has its line."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from lab import Lab, call

import voxelith
from data_prep.corpus import Corpus
from data_prep.errors import CorruptionError, FailedError, InputError
from slurm.doctor import doctor
from slurm.examine import CHECKS, Task, malicious

BIN = Path(sys.executable).parent
CLUSTER = [
    "cluster.gpus_per_node=0", "cluster.tasks_per_node=2", "cluster.cpus_per_task=1",
    "cluster.memory=3000", "cluster.partition=main", "crop_size=[8,12,8]",
]  # fmt: skip


def checks(result: dict[str, Any]) -> dict[str, tuple[str, str]]:
    return {one["name"]: (one["result"], one["found"]) for one in result["checks"]}


@pytest.mark.slurm
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_all_is_well_also_where_jobs_must_ask_to_be_requeued(
    lab: Lab, pretrain_corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*CLUSTER, f"corpus={pretrain_corpus}", f"output={tmp_path / 'doctor'}"]
    lab.change("JobRequeue=1", "JobRequeue=0")
    try:
        assert voxelith.main(["launch", "doctor", *words, "--json"]) == 0
    finally:
        lab.change("JobRequeue=0", "JobRequeue=1")
    result = json.loads(capsys.readouterr().out)
    found = checks(result)
    assert found.pop("preemption")[0] == "warning"  # the lab's grace is ten seconds
    names = {"versions", "gpus", "folder", "save", "corpus", "wandb", "all-reduce", "signal"}
    assert found.keys() == names | {"requeue"}
    assert {how for how, _ in found.values()} == {"pass"}, found
    assert "gloo, 2 tasks" in found["all-reduce"][1] and "locks hold" in found["folder"][1]
    assert result["mb_per_s"] > 0 and "crops/s" in found["corpus"][1]
    assert lab.job(result["job"])["Restarts"] == "1"
    left = {path.name for path in (tmp_path / "doctor").iterdir()}
    assert left == {"launch", "doctor.json"}


def wrapped(tmp_path: Path, lines: str) -> str:
    """A line of shell after which the second task's command begins with other lines."""
    folder = tmp_path / "wrapper"
    folder.mkdir()
    script = folder / "voxelith"
    script.write_text(
        f'#!/bin/bash\nif [ "$SLURM_PROCID" = 1 ]; then\n{lines}\nfi\n'
        f'exec {BIN / "voxelith"} "$@"\n'
    )
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return f"export PATH={folder}:$PATH"


def failed(tmp_path: Path, environment: list[str], *words: str) -> dict[str, tuple[str, str]]:
    given = [*CLUSTER, f"output={tmp_path / 'doctor'}", f"cluster.environment={environment!r}"]
    with pytest.raises(FailedError) as error:
        doctor([*given, *words])
    return checks(error.value.result)


@pytest.mark.slurm
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_each_fault_of_a_task_has_its_line(lab: Lab, tmp_path: Path) -> None:
    """The second task has another version, no corpus and no ear; the job may not be requeued."""
    other = tmp_path / "path" / "numpy-1.0.0.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: numpy\nVersion: 1.0.0\n")
    environment = [
        wrapped(tmp_path, f"export PYTHONPATH={other.parent}:$PYTHONPATH\ntrap '' USR2"),
        "scontrol update JobId=$SLURM_JOB_ID Requeue=0",
    ]
    found = failed(tmp_path, environment, f"corpus={tmp_path / 'none'}")
    assert found["versions"][0] == "fail"
    assert "task 1: numpy 1.0.0, here" in found["versions"][1]
    assert found["corpus"][0] == "fail" and "tasks 0, 1: corpus=" in found["corpus"][1]
    assert found["signal"] == ("fail", "USR2 was not heard by task 1")
    assert found["requeue"][0] == "fail" and "did not start a second time" in found["requeue"][1]
    assert found["folder"][0] == found["all-reduce"][0] == "pass"


@pytest.mark.slurm
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(os.geteuid() != 0, reason="mounts need root")
@pytest.mark.parametrize("options", ["rw", "ro"])
def test_a_folder_that_is_another_one_for_a_task(lab: Lab, tmp_path: Path, options: str) -> None:
    folder = tmp_path / "doctor"
    mount = f"mount -t tmpfs -o {options} none {folder}"
    environment = [
        wrapped(
            tmp_path,
            '[ "$1" = launch ] && [ -z "$MOUNTED" ] && export MOUNTED=1 && '
            f'exec unshare -m bash -c \'{mount}; exec "$0" "$@"\' "$0" "$@"',
        )
    ]
    found = failed(tmp_path, environment)
    assert found["folder"][0] == "fail"
    wanted = {"rw": "task 1 does not see task 0", "ro": "task 1: output="}[options]
    assert wanted in found["folder"][1]
    assert found["all-reduce"][0] == "pass"


@pytest.mark.slurm
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_malicious_upload_is_not_imported(lab: Lab, tmp_path: Path) -> None:
    planted = tmp_path / "path" / "lightning-2.6.3.dist-info"
    planted.mkdir(parents=True)
    (planted / "METADATA").write_text("Metadata-Version: 2.1\nName: lightning\nVersion: 2.6.3\n")
    traces = tmp_path / "imported"
    package = planted.parent / "lightning"
    package.mkdir()
    (package / "__init__.py").write_text(f"open({str(traces)!r}, 'w')\n")
    found = failed(tmp_path, [f"export PYTHONPATH={planted.parent}:$PYTHONPATH"])
    assert (
        found["versions"][0] == "fail" and "lightning 2.6.3 on tasks 0, 1" in found["versions"][1]
    )
    assert found["gpus"] == ("fail", "tasks 0, 1 said nothing")
    assert not traces.exists()


@pytest.mark.slurm
@pytest.mark.slow
def test_an_interrupt_cancels_the_job(lab: Lab, tmp_path: Path) -> None:
    words = [*CLUSTER, f"output={tmp_path / 'doctor'}"]
    call("scontrol", "update", "PartitionName=main", "State=DOWN")
    try:
        waiting = subprocess.Popen(
            [BIN / "voxelith", "launch", "doctor", *words],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            # Where the tests run in the background, interrupts are ignored.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        assert waiting.stdout is not None
        job = re.search(r"job (\d+): about", waiting.stdout.readline())
        assert job is not None
        while "PENDING (Partition" not in waiting.stdout.readline():
            assert waiting.poll() is None
        waiting.send_signal(signal.SIGINT)
        rest, _ = waiting.communicate(timeout=60)
        assert f"job {job[1]} is cancelled" in rest and waiting.returncode == 1
        assert lab.state(job[1]) == "CANCELLED"
    finally:
        call("scontrol", "update", "PartitionName=main", "State=UP")


def test_clean_versions_are_no_upload() -> None:
    assert malicious({"lightning": "2.6.6", "torch": "2.6.3"}) == ""
    assert malicious({"pytorch-lightning": "2.6.2"}) == "pytorch-lightning 2.6.2"


def test_words_are_checked_before_a_job_waits(tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        doctor(["cluster.nods=2", "crop_size=9", "corpsu=a", "cluster=slurm"])
    said = "\n".join(error.value.problems)
    for part in ("did you mean nodes", "crop_size=9: expected", "did you mean corpus"):
        assert part in said, said
    with pytest.raises(InputError, match="has no jobs"):
        doctor(["cluster=local"])
    result = doctor([*CLUSTER, f"output={tmp_path / 'new'}"], dry_run=True)
    assert "#SBATCH --time=00:20:00" in result["script"] and not (tmp_path / "new").exists()


def test_outside_of_a_job_nothing_is_examined(capsys: pytest.CaptureFixture[str]) -> None:
    assert voxelith.main(["launch", "examine", "folder=/tmp"]) == 2
    assert "a job that `voxelith launch doctor` made" in capsys.readouterr().err


def test_what_a_worker_finds_damaged_is_named(pretrain_corpus: Path, tmp_path: Path) -> None:
    """Not by a traceback, whose beginning is all that would fit into a line."""
    shutil.copytree(pretrain_corpus, tmp_path / "c")
    for shard in Corpus.open(tmp_path / "c").shard_files():
        data = bytearray(shard.read_bytes())
        data[600::600] = bytes(byte ^ 1 for byte in data[600::600])
        shard.write_bytes(data)
    task = Task(
        folder=tmp_path, number=0, tasks=1, nodes=1, start=0, job="1", gpus=0, workers=1,
        corpus=tmp_path / "c", crop_size=(16, 16, 16),
    )  # fmt: skip
    with pytest.raises(
        CorruptionError, match=rf"^{tmp_path}/c/shards/\d+\.tar: sample \w+, payload"
    ):
        CHECKS["corpus"](task)


@pytest.mark.parametrize("corpus", ["https://host/a/b", "s3://bucket/a", "here"])
def test_the_address_of_a_corpus_stays_one(corpus: str, tmp_path: Path) -> None:
    words = [*CLUSTER, f"output={tmp_path / 'new'}", f"corpus={corpus}"]
    script = doctor(words, dry_run=True)["script"]
    wanted = str(Path("here").resolve()) if corpus == "here" else corpus
    assert f"corpus={wanted}" in script
