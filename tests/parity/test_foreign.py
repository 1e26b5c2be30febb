"""Public checkpoints, opened as files alone, give the features of their reference.

What no tensor shows and no file says (heads of sizes that were not published, strides) is in the
metadata of the expected numbers.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pretrain.backbones.slice_vit import SliceViT
from pretrain.backbones.stunet import STUNetEncoder, from_published
from pretrain.backbones.vit import ViT3D
from pretrain.foreign import Foreign, open_foreign
from pretrain.foreign.stored import read_stored

from .test_hi_end_mae import built, reconstruction

NAMES = {
    "nnssl_resenc_checkpoint_final": "nnssl or nnU-Net ResEnc",
    "hi_end_mae_10k_layout": "Hi-End-MAE",
    "3dino_layout": "3DINO",
    "meddinov3_layout": "DINOv3 or MedDINOv3",
    "stunet_layout": "STU-Net",
}

Facts = dict[str, str]
Numbers = dict[str, Tensor]


def nothing(facts: Facts) -> dict[str, Any]:
    return {}


def of_hi_end(facts: Facts) -> dict[str, Any]:
    depth = int(facts["depth"])
    return {"num_heads": int(facts["heads"]), "taps": list(range(1, depth + 1))}


def of_dino(facts: Facts) -> dict[str, Any]:
    return {"num_heads": int(facts["num_heads"])}


def of_meddinov3(facts: Facts) -> dict[str, Any]:
    eps = {"layernorm": 1e-6, "layernormbf16": 1e-5}[facts["norm_layer"]]
    return {"norm_eps": eps, "taps": list(range(1, int(facts["depth"]) + 1))}


def of_stunet(facts: Facts) -> dict[str, Any]:
    return {"strides": [[1, 1, 1], *json.loads(facts["pool_op_kernel_sizes"])]}


CASES: dict[str, tuple[str, Callable[[Facts], dict[str, Any]]]] = {
    "nnssl_resenc_checkpoint_final": ("nnssl_resenc_features", nothing),
    "hi_end_mae_10k_layout": ("hi_end_mae", of_hi_end),
    "3dino_layout": ("3dino_features", of_dino),
    "meddinov3_layout": ("meddinov3_features", of_meddinov3),
    "stunet_layout": ("stunet_output", of_stunet),
}


@pytest.fixture
def file(request: pytest.FixtureRequest, parity_dir: Path) -> Path:
    path = parity_dir / f"{request.param}.pth"
    if not path.exists():
        pytest.skip(f"no reference numbers: {path} does not exist (VOXELITH_PARITY_DIR)")
    return path


def every(*names: str) -> Any:
    return pytest.mark.parametrize("file", names or list(CASES), indirect=True)


def opened(file: Path, parity: Callable[[str], Any]) -> tuple[Foreign, Numbers]:
    expected, told = CASES[file.stem]
    numbers, facts = parity(expected)
    return open_foreign(file, told(facts)), numbers


def close(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    worst = float((found - expected).abs().max() / expected.abs().max())
    print(f"largest relative difference {worst:.1e}")
    assert worst <= 1e-5


@every()
def test_it_is_recognised_and_every_tensor_reported_once(
    file: Path, parity: Callable[[str], Any], tmp_path: Path
) -> None:
    (found, _), stored = opened(file, parity), read_stored(file)
    assert found.layout == NAMES[file.stem]
    report = found.report
    own = [*report.copied, *report.adapted]
    assert sorted(own) == sorted(found.build().state_dict()) == sorted(found.state)
    assert (report.new, report.covered, report.constant) == ([], 1.0, [])
    sources = [report.sources.get(name, name) for name in own]
    skipped = [name for name in report.skipped if not name.endswith(".*")]
    assert sorted({*sources, *skipped}) == sorted(stored.weights)
    assert not set(sources) & set(skipped)
    other = tmp_path / "another_name.pth"
    other.write_bytes(file.read_bytes())
    renamed = open_foreign(other, CASES[file.stem][1](parity(CASES[file.stem][0])[1]))
    assert renamed.backbone == found.backbone


@every("nnssl_resenc_checkpoint_final")
@torch.no_grad()
def test_resenc(file: Path, parity: Callable[[str], Any]) -> None:
    found, numbers = opened(file, parity)
    maps = found.build()(numbers["input.x"])
    assert len(maps) == sum(name.startswith("expected.stage") for name in numbers)
    for stage, each in enumerate(maps):
        close(each, numbers[f"expected.stage{stage}"])
    plan = torch.load(file, weights_only=True)["nnssl_adaptation_plan"]
    assert found.facts["nnssl_adaptation_plan"] == plan
    assert found.preprocessing is not None
    assert found.preprocessing["crop_size"] == plan["recommended_downstream_patchsize"]


@every("hi_end_mae_10k_layout")
@torch.no_grad()
def test_hi_end_mae(file: Path, parity: Callable[[str], Any]) -> None:
    """Its whole forward, with the encoder from the file and the decoder as published."""
    found, numbers = opened(file, parity)
    encoder = found.build()
    assert isinstance(encoder, ViT3D)
    model, batch = built(numbers, parity("hi_end_mae")[1], encoder)
    assert model.encoder is encoder
    close(model(batch, 0.0).loss, numbers["expected.loss"])
    close(reconstruction(model, batch), numbers["expected.reconstruction"])


@every("3dino_layout")
@torch.no_grad()
def test_3dino(file: Path, parity: Callable[[str], Any]) -> None:
    found, numbers = opened(file, parity)
    encoder = found.build()
    assert isinstance(encoder, ViT3D)
    tokens = encoder.tokens(numbers["input.x"])
    close(tokens[:, 0], numbers["expected.cls"])
    close(tokens[:, encoder.prefix_tokens :], numbers["expected.patch_tokens"])


@every("meddinov3_layout")
@torch.no_grad()
def test_meddinov3(file: Path, parity: Callable[[str], Any]) -> None:
    found, numbers = opened(file, parity)
    encoder, image = found.build(), numbers["input.x"][:, :, None]
    assert isinstance(encoder, SliceViT)
    tokens, maps = encoder.tokens(image), encoder(image)
    close(tokens[:, 0], numbers["expected.cls"])
    close(tokens[:, encoder.prefix_tokens :], numbers["expected.patch_tokens"])
    assert len(maps) == sum(name.startswith("expected.layer") for name in numbers)
    for number, each in enumerate(maps):
        close(each.flatten(2).transpose(1, 2), numbers[f"expected.layer{number}"])


@every("meddinov3_layout")
@torch.no_grad()
def test_one_channel_is_that_channel_repeated(file: Path, parity: Callable[[str], Any]) -> None:
    told = of_meddinov3(parity("meddinov3_features")[1])
    colour, grey = open_foreign(file, told), open_foreign(file, told | {"in_channels": 1})
    assert list(grey.report.adapted) == ["patch_embed.proj.weight"]
    image = parity("meddinov3_features")[0]["input.x"][:, :1, None]
    encoder = colour.build()
    repeated = image.expand(-1, encoder.in_channels, 1, -1, -1)
    close(grey.build()(image)[-1], encoder(repeated)[-1])


@every("stunet_layout")
@torch.no_grad()
def test_stunet(file: Path, parity: Callable[[str], Any]) -> None:
    """Its logits, through the decoder of the same file."""
    found, numbers = opened(file, parity)
    encoder = found.build()
    assert isinstance(encoder, STUNetEncoder)
    weights = from_published(read_stored(file).weights).decoder
    decoder = encoder.own_decoder(len(weights["head.bias"])).eval()
    decoder.load_state_dict(weights)
    close(decoder(numbers["input.x"], encoder(numbers["input.x"])), numbers["expected.logits"])
