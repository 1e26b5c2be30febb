"""A SliceViT with MedDINOv3's weights, in its released layout, gives MedDINOv3's tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pretrain.backbones.slice_vit import SliceViT
from pretrain.foreign import load_foreign


@pytest.fixture(scope="module")
def file(parity_dir: Path) -> Path:
    path = parity_dir / "meddinov3_layout.pth"
    if not path.exists():
        pytest.skip(f"no reference numbers: {path} does not exist (VOXELITH_PARITY_DIR)")
    return path


def made(facts: dict[str, str], in_channels: int) -> SliceViT:
    depth = int(facts["depth"])
    return SliceViT(
        in_channels=in_channels,
        patch_size=int(facts["patch_size"]),
        embed_dim=int(facts["embed_dim"]),
        depth=depth,
        num_heads=int(facts["num_heads"]),
        mlp_ratio=float(facts["ffn_ratio"]),
        qkv_bias=facts["qkv_bias"] == "True",
        layer_scale=float(facts["layerscale_init"]),
        norm_eps={"layernorm": 1e-6, "layernormbf16": 1e-5}[facts["norm_layer"]],
        register_tokens=int(facts["n_storage_tokens"]),
        taps=tuple(range(1, depth + 1)),
    ).eval()


def close(found: Tensor, expected: Tensor) -> bool:
    return found.shape == expected.shape and bool(
        (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    )


@torch.no_grad()
def test_tokens_and_layers(file: Path, parity: Callable[[str], Any]) -> None:
    numbers, facts = parity("meddinov3_features")
    image = numbers["input.x"]
    encoder = made(facts, image.shape[1])
    load_foreign(encoder, file)
    tokens, maps = encoder.tokens(image[:, :, None]), encoder(image[:, :, None])
    assert close(tokens[:, 0], numbers["expected.cls"])
    assert close(tokens[:, encoder.prefix_tokens :], numbers["expected.patch_tokens"])
    for number, found in enumerate(maps):
        assert close(found.flatten(2).transpose(1, 2), numbers[f"expected.layer{number}"])
    assert len(maps) == sum(name.startswith("expected.layer") for name in numbers)


@torch.no_grad()
def test_one_channel_is_that_channel_repeated(file: Path, parity: Callable[[str], Any]) -> None:
    numbers, facts = parity("meddinov3_features")
    image = numbers["input.x"][:, :1, None]
    grey, colour = made(facts, 1), made(facts, numbers["input.x"].shape[1])
    assert list(load_foreign(grey, file).adapted) == ["patch_embed.proj.weight"]
    load_foreign(colour, file)
    assert close(grey.tokens(image), colour.tokens(image.expand(-1, colour.in_channels, 1, -1, -1)))


def test_every_tensor_is_in_the_report_once(file: Path, parity: Callable[[str], Any]) -> None:
    _, facts = parity("meddinov3_features")
    encoder = made(facts, 1)
    report = load_foreign(encoder, file)
    stored = torch.load(file, weights_only=True)["teacher"]
    assert sorted([*report.copied, *report.adapted]) == sorted(encoder.state_dict())
    assert len(report.copied) + len(report.adapted) + len(report.skipped) == len(stored)
    heads = {name for name in stored if not name.startswith("backbone.")}
    named = {"backbone.mask_token", "backbone.rope_embed.periods"}
    assert set(report.skipped) == heads | (named & stored.keys())
    assert (report.covered, report.new) == (1.0, [])
