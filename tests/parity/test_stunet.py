"""STU-Net gives the logits of uni-medical's, from a file in nnU-Net's layout."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pretrain.backbones.stunet import STUNetDecoder, STUNetEncoder, from_published


@pytest.fixture(scope="module")
def published(parity_dir: Path) -> dict[str, Tensor]:
    path = parity_dir / "stunet_layout.pth"
    if not path.exists():
        pytest.skip(f"no reference numbers: {path} does not exist (VOXELITH_PARITY_DIR)")
    weights: dict[str, Tensor] = torch.load(path, weights_only=True)["network_weights"]
    return weights


def built(
    facts: dict[str, str], published: dict[str, Tensor]
) -> tuple[STUNetEncoder, STUNetDecoder]:
    weights = from_published(published)
    pools = json.loads(facts["pool_op_kernel_sizes"])
    encoder = STUNetEncoder(
        in_channels=published["conv_blocks_context.0.0.conv1.weight"].shape[1],
        features=tuple(json.loads(facts["dims"])),
        strides=(1, *(tuple(step) for step in pools)),
        blocks=tuple(json.loads(facts["depth"])),
    )
    decoder = encoder.own_decoder(len(weights.decoder["head.bias"]))
    encoder.load_state_dict(weights.encoder, strict=True)
    decoder.load_state_dict(weights.decoder, strict=True)
    return encoder.eval(), decoder.eval()


def test_logits(published: dict[str, Tensor], parity: Callable[[str], Any]) -> None:
    tensors, facts = parity("stunet_output")
    assert {k for kernel in json.loads(facts["conv_kernel_sizes"]) for k in kernel} == {3}
    encoder, decoder = built(facts, published)
    with torch.no_grad():
        found = decoder(tensors["input.x"], encoder(tensors["input.x"]))
    expected = tensors["expected.logits"]
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_every_published_tensor_is_accounted_for(published: dict[str, Tensor]) -> None:
    """Once each: under a name of ours, or among the heads of coarser scales."""
    weights = from_published(published)
    placed = [*weights.encoder.values(), *weights.decoder.values()]
    assert len(placed) + len(weights.skipped) == len(published)
    left = {id(t) for t in published.values()} - {id(t) for t in placed}
    assert left == {id(published[name]) for name in weights.skipped}
    assert all(name.startswith("seg_outputs.") for name in weights.skipped)
