"""Volume Fusion in whole runs: pairs over ranks, and batch norm's statistics over stops."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.settings import PretrainSettings
from pretrain.train import pretrain

RESENC = {
    "_target_": "pretrain.backbones.resenc.ResEncUNetEncoder",
    "features": [4, 8],
    "strides": [1, 2],
    "blocks": [1, 1],
}
PCT_NET = {
    "_target_": "pretrain.backbones.pct_net.PCTNetEncoder",
    "features": [4, 4, 8, 8, 8],
    "heads": [2, 2, 4],
    "windows": [2, 2, 2],
    "depths": [1, 1, 1],
    "resolution_mode": 2,
}


def settings(corpus: Path, runs: Path, run: str, devices: int, **changes: Any) -> PretrainSettings:
    chosen: dict[str, Any] = {
        "corpus": corpus,
        "run": run,
        "runs": runs,
        "backbone": RESENC,
        "objective": {"_target_": "pretrain.objectives.volume_fusion.VolumeFusion"},
        "trainer": {"accelerator": "cpu", "devices": devices, "workers": 0, "threads": 1},
        "crop_size": (8, 16, 32),
        "steps": 4,
        "batch_size": 4,
        "lr": 1e-3,
        "log_every": 1,
        "save_every": 2,
    }
    return PretrainSettings.model_validate(chosen | changes)


def start(chosen: PretrainSettings, folder: Path) -> Path:
    """The run in a process of its own, which starts its other ranks."""
    script = folder / f"{chosen.run}.py"
    script.write_text(
        "from pretrain.settings import PretrainSettings\n"
        "from pretrain.train import pretrain\n"
        "if __name__ == '__main__':\n"
        f"    pretrain(PretrainSettings.model_validate_json({chosen.model_dump_json()!r}))\n"
    )
    own = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run(
        [sys.executable, str(script)],
        check=True,
        stderr=subprocess.DEVNULL,
        env=os.environ | own,
        timeout=300,
    )
    return folder / chosen.run


def weights(run: Path) -> dict[str, torch.Tensor]:
    newest = sorted((run / "checkpoints").glob("step-*.pt"))[-1]
    found: dict[str, torch.Tensor] = torch.load(newest, weights_only=True)["objective"]
    return found


def losses(run: Path) -> list[float]:
    with (run / "metrics.csv").open() as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


@pytest.mark.parametrize("form", ["boxes", pytest.param("grid", marks=pytest.mark.slow)])
def test_two_ranks_fuse_the_pairs_of_one(pretrain_corpus: Path, tmp_path: Path, form: str) -> None:
    objective = {"_target_": "pretrain.objectives.volume_fusion.VolumeFusion", "form": form}
    two = start(settings(pretrain_corpus, tmp_path, "two", 2, objective=objective), tmp_path)
    one = pretrain(settings(pretrain_corpus, tmp_path, "one", 1, objective=objective))
    assert losses(two) == pytest.approx(losses(one), rel=1e-4)
    alone = weights(one)
    for name, value in weights(two).items():
        if value.ndim < 5:  # a bias before an instance norm has no gradient but rounding
            continue
        assert torch.allclose(value, alone[name], rtol=1e-2, atol=1e-4), name


def test_statistics_of_batch_norm_survive_a_stop_on_two_ranks(
    pretrain_corpus: Path, tmp_path: Path
) -> None:
    """Bit for bit, with accumulation, where ranks' own statistics differ between the steps."""
    chosen = settings(
        pretrain_corpus, tmp_path, "pct", 2, backbone=PCT_NET, batch_size=8, accumulate=2
    )
    run = start(chosen, tmp_path)
    whole = weights(run)
    (run / "checkpoints" / "step-00000004.pt").unlink()
    start(chosen, tmp_path)
    resumed = weights(run)
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    statistics = {n: v for n, v in whole.items() if n.endswith("running_mean")}
    assert statistics and all(value.any() for value in statistics.values())
    counts = {int(v) for n, v in whole.items() if n.endswith("num_batches_tracked")}
    assert counts == {4 * 2}
