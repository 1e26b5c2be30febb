"""The ResEnc U-Net against a checkpoint in nnssl's layout and its encoder's features."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pretrain.backbones.resenc import ResEncUNetEncoder
from pretrain.decoders import UNetDecoder


@pytest.fixture(scope="module")
def stored(parity_dir: Path) -> dict[str, Any]:
    path = parity_dir / "nnssl_resenc_checkpoint_final.pth"
    if not path.exists():
        pytest.skip(f"no reference numbers: {path} does not exist (VOXELITH_PARITY_DIR)")
    return torch.load(path, map_location="cpu", weights_only=True)


def weights(stored: dict[str, Any], prefix: str) -> dict[str, Tensor]:
    """What lies under a prefix, without the second names that the layers have there."""
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in stored["network_weights"].items()
        if name.startswith(prefix) and ".all_modules." not in name
    }


def make_encoder(stored: dict[str, Any]) -> ResEncUNetEncoder:
    plan = stored["nnssl_adaptation_plan"]["architecture_plans"]["arch_kwargs"]
    found = weights(stored, "encoder.")
    encoder = ResEncUNetEncoder(
        in_channels=found["stem.convs.0.conv.weight"].shape[1],
        features=tuple(plan["features_per_stage"]),
        strides=tuple(tuple(s) for s in plan["strides"]),
        blocks=tuple(plan["n_blocks_per_stage"]),
    )
    encoder.load_state_dict(found, strict=True)
    return encoder.eval()


def test_features(stored: dict[str, Any], parity: Callable[..., Any]) -> None:
    numbers, _ = parity("nnssl_resenc_features")
    maps = make_encoder(stored)(numbers["input.x"])
    for stage, found in enumerate(maps):
        assert torch.allclose(found, numbers[f"expected.stage{stage}"], rtol=1e-5, atol=1e-5)
    assert len(maps) == sum(name.startswith("expected.") for name in numbers)


def test_sparse_features_of_a_mask_that_hides_nothing(
    stored: dict[str, Any], parity: Callable[..., Any]
) -> None:
    numbers, _ = parity("nnssl_resenc_features")
    image, encoder = numbers["input.x"], make_encoder(stored)
    hidden = torch.zeros(len(image), 1, *encoder.grids(image.shape)[-1], dtype=torch.bool)
    for stage, found in enumerate(encoder(image, hidden)):
        assert torch.allclose(found, numbers[f"expected.stage{stage}"], rtol=1e-5, atol=1e-5)


def test_the_decoder_has_the_reference_names(stored: dict[str, Any]) -> None:
    encoder = make_encoder(stored)
    plan = stored["nnssl_adaptation_plan"]["architecture_plans"]["arch_kwargs"]
    (convs,) = set(plan["n_conv_per_stage_decoder"])
    found = weights(stored, "decoder.")
    last = f"seg_layers.{len(encoder.channels) - 2}."
    known = {
        name.replace(last, "head."): tensor
        for name, tensor in found.items()
        if not name.startswith(("encoder.", "seg_layers.")) or name.startswith(last)
    }
    decoder = UNetDecoder(encoder.channels, encoder.strides, len(known["head.bias"]), convs)
    decoder.load_state_dict(known, strict=True)
