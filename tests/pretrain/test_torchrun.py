"""The command under torchrun: its processes train together, and as many as the settings say."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

BIN = Path(sys.executable).parent
# A batch script has these; the processes that torchrun starts in it are no tasks of the job.
IN_A_JOB = {
    "SLURM_JOB_ID": "7", "SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0", "SLURM_NODELIST": "localhost", "SLURM_JOB_NAME": "a",
}  # fmt: skip


def torchrun(
    corpus: Path, runs: Path, run: str, *more: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    words = [
        f"corpus={corpus}", f"run={run}", f"runs={runs}", "backbone=resenc_small",
        "objective=cnn_mae", "crop_size=[8,12,8]", "backbone.features=[4,6]",
        "backbone.strides=[1,2]", "backbone.blocks=[1,1]", "objective.block=4", "steps=4",
        "batch_size=4", "warmup=1", "trainer=cpu", "trainer.workers=0", "health.every=0",
        "log_every=1",
    ]  # fmt: skip
    start = [BIN / "torchrun", "--standalone", "--nproc-per-node=2", BIN / "voxelith"]
    return subprocess.run(
        [*start, "pretrain", *words, *more],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


def test_two_processes_train_as_two_ranks_of_one_run(pretrain_corpus: Path, tmp_path: Path) -> None:
    done = torchrun(pretrain_corpus, tmp_path, "two", "trainer.devices=2", **IN_A_JOB)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("MEMBER: 1/2") == done.stderr.count("MEMBER: 2/2") == 1
    assert done.stdout.count("step 4 of 4") == 1  # one of them speaks
    assert [path.name for path in tmp_path.iterdir()] == ["two"]
    with (tmp_path / "two" / "metrics.csv").open(newline="") as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["1", "2", "3", "4"]
    assert json.loads((tmp_path / "two" / "config.json").read_text())["trainer"]["devices"] == 2


def test_another_number_of_processes_is_refused(pretrain_corpus: Path, tmp_path: Path) -> None:
    done = torchrun(pretrain_corpus, tmp_path, "one")
    assert done.returncode != 0
    assert "torchrun started 2 processes on this node, 2 in all" in done.stderr
    assert "give trainer.devices=2 trainer.nodes=1" in done.stderr
    assert not (tmp_path / "one").exists()
