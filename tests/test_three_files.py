"""An objective of one's own is three files in a folder of one's own: none of ours is touched."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

OBJECTIVE = '''
"""Predict the mean of each crop from the deepest features."""

from typing import Annotated

import torch
from pydantic import Field
from torch import nn

from pretrain.backbones.backbone import Backbone
from pretrain.objective import Batch, Losses, Objective


class Mean(Objective):
    def __init__(
        self, *, encoder: Backbone, weight: Annotated[float, Field(gt=0, le=10)] = 1.0
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.channels[-1], 1)
        self.weight = weight

    def forward(self, batch: Batch, progress: float) -> Losses:
        found = self.head(self.encoder(batch.image)[-1].mean((2, 3, 4)))
        error = (found[:, 0] - batch.image.mean((1, 2, 3, 4))).square().mean()
        return Losses(self.weight * error, {"mean_error": error.detach()})
'''
CONFIG = "_target_: mine.Mean\nweight: 2.0\n"
TEST = """
import torch

from mine import Mean
from pretrain.backbones.resenc import ResEncUNetEncoder
from pretrain.objective import Batch


def test_weight_scales_the_loss():
    encoder = ResEncUNetEncoder(features=(4, 8), strides=(1, 2), blocks=(1, 1))
    image, seeds = torch.randn(2, 1, 4, 6, 8), torch.arange(2)
    batch = Batch(image, torch.ones_like(image, dtype=torch.bool), torch.ones(2, 3), seeds)
    loss, parts = Mean(encoder=encoder, weight=3.0)(batch, 0.0)
    assert torch.isclose(loss, 3 * parts["mean_error"])
"""


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    folder = tmp_path / "mine"
    (folder / "conf" / "objective").mkdir(parents=True)
    (folder / "mine.py").write_text(OBJECTIVE)
    (folder / "conf" / "objective" / "mean.yaml").write_text(CONFIG)
    (folder / "test_mine.py").write_text(TEST)
    return folder


def python(*words: str, mine: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": f"{mine}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *words], cwd=mine, env=environment, capture_output=True, text=True
    )


def test_it_trains_by_its_name(mine: Path, pretrain_corpus: Path, tmp_path: Path) -> None:
    words = [
        "-m", "voxelith", "pretrain", "--config-dir", "conf", "objective=mean",
        "backbone=resenc_small", f"corpus={pretrain_corpus}", "run=mine", f"runs={tmp_path}",
        "trainer=cpu", "crop_size=[16,16,16]", "steps=2", "batch_size=2", "log_every=1",
    ]  # fmt: skip
    wrong = python(*words, "objective.weight=11", "objective.wait=1", mine=mine)
    assert wrong.returncode == 2
    assert "objective.weight=11: must be less than or equal to 10" in wrong.stderr
    assert "objective.wait: unknown; did you mean weight?" in wrong.stderr
    done = python(*words, mine=mine)
    assert done.returncode == 0, done.stderr
    header, first, *_ = (tmp_path / "mine" / "metrics.csv").read_text().splitlines()
    row = dict(zip(header.split(","), first.split(","), strict=True))
    assert float(row["loss"]) == pytest.approx(2 * float(row["mean_error"]), rel=1e-4)
    config = json.loads((tmp_path / "mine" / "config.json").read_text())
    assert config["objective"] == {"_target_": "mine.Mean", "weight": 2.0}


def test_its_test_runs_beside_it(mine: Path) -> None:
    done = python("-m", "pytest", "-q", "-p", "no:cacheprovider", "test_mine.py", mine=mine)
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout
