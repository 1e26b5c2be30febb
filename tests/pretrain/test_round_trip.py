"""What is released is what is loaded, to the last bit, for every backbone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_pairs import CROPS, names, preset, shrink
from torch import nn

import voxelith
from data_prep.preprocess import Preprocess
from pretrain.arguments import build_backbone, split_target
from pretrain.release import write_release


def distinct() -> list[str]:
    """Presets that differ once they are small."""
    found: dict[str, str] = {}
    for name in names("backbone"):
        found.setdefault(json.dumps(shrink(preset("backbone", name).backbone)), name)
    return list(found.values())


@pytest.mark.parametrize("name", distinct())
def test_features_are_the_same_bits(name: str, seed: int, tmp_path: Path) -> None:
    path, args = split_target(shrink(preset("backbone", name).backbone))
    called = path.removeprefix("pretrain.backbones.")
    torch.manual_seed(seed)
    encoder = build_backbone(called, args, "test").eval()
    with torch.no_grad():
        for parameter in encoder.parameters():  # those that begin at zero or one as well
            nn.init.normal_(parameter, std=0.1)
    for crop in CROPS:
        try:
            encoder.grids(crop)
        except ValueError:
            continue
        break
    config = {
        "format": 1, "name": name, "kind": "encoder", "backbone": {"name": called, "args": args},
        "objective": {"name": "mae.MAE", "args": {}}, "crop_size": list(crop),
        "modalities": ["MR"], "preprocess": Preprocess.default().to_dict(), "training": {},
        "data": {}, "versions": {},
    }  # fmt: skip
    prints = {"format": 1, "values": []}
    write_release(tmp_path / "r", encoder=encoder, config=config, fingerprints=prints, card="A.\n")
    loaded = voxelith.load_encoder(tmp_path / "r")
    assert loaded.report is not None and loaded.report.covered == 1.0
    assert sorted(loaded.report.copied) == sorted(encoder.state_dict())
    image = torch.randn(1, 1, *crop, generator=torch.Generator().manual_seed(seed))
    with torch.inference_mode():
        for found, expected in zip(loaded.module(image), encoder(image), strict=True):
            assert torch.equal(found, expected)
