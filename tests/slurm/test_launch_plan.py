"""What a dry run foretells is what comes true, and a save that a cluster cuts off is warned of."""

from __future__ import annotations

import json
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
