"""What a dry run foretells is what comes true, and a save that a cluster cuts off is warned of."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

import voxelith
from pretrain.events import Events
from slurm import discover
from slurm.discover import read_cluster
from slurm.plan import Save
from slurm.settings import ClusterSettings

TINY = [
    "backbone=resenc_small", "objective=cnn_mae", "crop_size=[8,12,8]", "backbone.features=[4,6]",
    "backbone.strides=[1,2]", "backbone.blocks=[1,1]", "objective.block=4", "steps=2",
    "batch_size=2", "warmup=1", "trainer=cpu", "trainer.workers=0", "health.every=0",
]  # fmt: skip


def test_a_checkpoint_is_as_large_as_foretold(
    pretrain_corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*TINY, f"corpus={pretrain_corpus}", f"runs={tmp_path}", "run=a", "cluster=local"]
    # Large enough that what a file has besides its tensors does not count.
    words[3] = "backbone.features=[32,64]"
    assert voxelith.main(["launch", "pretrain", *words, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert not (tmp_path / "a").exists()
    told = float(re.search(r"each ([\d.e-]+) GB", said)[1])  # type: ignore[index]
    info = json.loads((pretrain_corpus / "corpus.json").read_text())
    volumes = re.search(r"corpus   (\d+) volumes in (\d+) shards", said)
    assert volumes is not None and int(volumes[2]) == len(info["shards"])
    assert f"4 samples, {4 / int(volumes[1]):,.3g} epochs" in said
    assert "EFLOP" in said and "GiB of a task (float32" in said
    assert voxelith.main(["launch", "pretrain", *words]) == 0
    (saved,) = (tmp_path / "a" / "checkpoints").glob("step-*.pt")
    assert told * 1e9 == pytest.approx(saved.stat().st_size, rel=0.1)
    assert Save.of(1, tmp_path / "a").seconds is not None


def test_a_save_that_does_not_fit_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    cluster = ClusterSettings(kind="slurm", signal="USR2@180", partition="gpu")
    slurm = read_cluster(
        "JobRequeue = 1\nKillWait                = 30 sec\n",
        "PartitionName=gpu GraceTime=60 PreemptMode=REQUEUE\n",
        "gpu|n|8|1000|gpu:8\n",
    )
    monkeypatch.setattr(discover, "discover", lambda: slurm)
    monkeypatch.setattr("shutil.which", lambda name: name)
    assert Save.of(10**12, run).warnings(cluster) == []  # nothing was measured
    (tmp_path / "doctor").mkdir()
    (tmp_path / "doctor" / "doctor.json").write_text('{"mb_per_s": 100.0}')
    (grace,) = Save.of(10**10, run).warnings(cluster)
    assert "10 GB / 100 MB/s (launch doctor) = 100 s" in grace and "longer than the 90 s" in grace
    limit, _ = Save.of(2 * 10**10, run).warnings(cluster)
    assert "longer than the 180 s of cluster.signal" in limit and "USR2@460" in limit
    Events(run).saved(100, 20.0, 2 * 10**10)  # its own, once it has saved
    assert Save.of(2 * 10**10, run).warnings(cluster) == []


def test_the_steps_before_a_save_take_their_time_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    cluster = ClusterSettings(kind="slurm", signal="USR2@180")
    run = tmp_path / "run"
    run.mkdir()
    Events(run).saved(100, 120.0, 10**10)
    assert Save.of(10**10, run).warnings(cluster) == []
    (run / "metrics.csv").write_text("step,seconds_per_step\n10,1.0\n20,40.0\n21,\n")
    (limit,) = Save.of(10**10, run).warnings(cluster)
    assert "after two steps of 40 s" in limit and "USR2@460" in limit


def test_what_the_doctor_measured_is_found_where_runs_lie_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    scratch = tmp_path / "scratch" / "run"
    assert Save.of(1, scratch).mb_per_s is None
    for place, speed in ((tmp_path / "runs", 100.0), (scratch.parent, 50.0)):
        (place / "doctor").mkdir(parents=True)
        (place / "doctor" / "doctor.json").write_text(json.dumps({"mb_per_s": speed}))
        assert Save.of(1, scratch).mb_per_s == speed  # that of the same storage comes first


def test_a_slurm_that_does_not_answer_ends_no_launch(
    pretrain_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    for name in ("scontrol", "sinfo"):
        (tmp_path / name).write_text(
            "#!/bin/sh\necho 'Unable to contact\ncontroller' >&2; exit 1\n"
        )
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (tmp_path / "doctor").mkdir()
    (tmp_path / "doctor" / "doctor.json").write_text('{"mb_per_s": 1e-6}')
    words = [*TINY, f"corpus={pretrain_corpus}", f"runs={tmp_path}", "run=a"]
    words.append("cluster.gpus_per_node=0")
    assert voxelith.main(["launch", "pretrain", *words, "--dry-run"]) == 0
    said = capsys.readouterr().out
    warned = [line for line in said.splitlines() if line.startswith("warning: ")]
    assert len(warned) == 2 and "of cluster.signal" in warned[0]
    assert "is not known here: scontrol show config: Unable to contact controller" in warned[1]


def test_chains_and_finetunings_are_planned_and_warned_of_too(
    pretrain_corpus: Path, labelled_corpus: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr("shutil.which", lambda name: None)
    release = Path(__file__).parent.parent / "releases" / "encoder-7253723"
    (tmp_path / "doctor").mkdir()
    (tmp_path / "doctor" / "doctor.json").write_text('{"mb_per_s": 1e-6}')
    cluster = "cluster.gpus_per_node=0"
    finetune = [
        "task=hippocampus", f"corpus={labelled_corpus}", f"ckpt={release}", "labels=2", "steps=2",
        "batch_size=1", "warmup=1", "trainer.threads=1", "crop_size=[16,24,16]",
        f"runs={tmp_path}",
    ]  # fmt: skip
    for how in (["-m"], ["run=one"]):
        assert voxelith.main(["launch", "finetune", *how, *finetune, cluster, "--dry-run"]) == 0
        said = capsys.readouterr().out
        assert "hours of one worker" in said and "warning: a save (" in said
    pretrain = [*TINY, f"corpus={pretrain_corpus}", f"runs={tmp_path}", "run=a"]
    stages = [["pretrain", *pretrain], ["finetune", "-m", *finetune]]
    lines = "".join(f"  - {' '.join(words)}\n" for words in stages)
    (tmp_path / "work.yaml").write_text(f"cluster: {cluster}\nstages:\n{lines}")
    assert voxelith.main(["launch", "chain", str(tmp_path / "work.yaml"), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "EFLOP" in said and "hours of one worker" in said
    assert said.count("warning: a save (") == 2
