"""A 2D encoder is a 3D one on crops of one slice, all the way to features of a scan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib import pyplot as plt
from seeds import SEED

import voxelith
from pretrain.export import export
from pretrain.settings import PretrainSettings
from pretrain.train import pretrain

SIZES = {"embed_dim": 24, "depth": 4, "num_heads": 2}


@pytest.mark.parametrize(
    "backbone",
    [
        {"_target_": "pretrain.backbones.vit.ViT3D", "patch_size": [1, 8, 8], **SIZES},
        {"_target_": "pretrain.backbones.slice_vit.SliceViT", "patch_size": 8, **SIZES},
    ],
    ids=["vit", "slice_vit"],
)
def test_slices_pretrain_preview_export_and_encode(
    pretrain_corpus: Path, tmp_path: Path, backbone: dict[str, Any]
) -> None:
    run = pretrain(
        PretrainSettings.model_validate(
            {
                "corpus": pretrain_corpus,
                "run": "slices",
                "runs": tmp_path,
                "backbone": backbone,
                "objective": {
                    "_target_": "pretrain.objectives.mae.MAE",
                    "decoder_dim": 24,
                    "decoder_depth": 1,
                    "decoder_heads": 2,
                },
                "trainer": {"accelerator": "cpu", "workers": 0, "threads": 1},
                "crop_size": (1, 32, 32),
                "steps": 2,
                "batch_size": 4,
                "lr": 1e-3,
                "preview_every": 2,
            }
        )
    )
    pictures = sorted(path.name for path in (run / "previews").glob("*.png"))
    assert pictures == ["step-00000000.png", "step-00000002.png", "strip.png"]

    # No line is drawn as a picture: three kinds beside each other, and no empty columns.
    height, width = plt.imread(run / "previews" / "step-00000002.png").shape[:2]
    assert width / height < 1.2

    release = export(run, tmp_path / "release")
    encoder = voxelith.load_encoder(release.path)
    scan = np.random.default_rng(SEED).normal(size=(3, 40, 48)) * 300
    features = encoder.features(scan, spacing=(5.0, 1.0, 1.0), modality="CT")
    assert features.map.shape == (24, 3, 5, 6)
    # Each slice is encoded by itself: another one next to it changes nothing.
    scan[2] += 50
    again = encoder.features(scan, spacing=(5.0, 1.0, 1.0), modality="CT").map
    assert np.array_equal(again[:, :2], features.map[:, :2])
    assert not np.array_equal(again[:, 2], features.map[:, 2])
