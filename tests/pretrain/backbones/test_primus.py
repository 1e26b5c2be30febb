"""Primus as a configuration of ViT3D, against dynamic-network-architectures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import hydra.utils
import pytest
import torch
from omegaconf import OmegaConf
from seeds import SEED
from torch import Tensor, nn

import conf
from pretrain.arguments import build_backbone
from pretrain.backbones.vit import ViT3D
from pretrain.decoders import PatchDecoder, build_decoder

CONF = Path(conf.__file__).parent / "backbone"
SHAPE, PATCH, GRID = (16, 12, 32), (8, 4, 8), (2, 3, 4)
TINY: dict[str, Any] = {
    "embed_dim": 48,
    "depth": 3,
    "num_heads": 2,
    "patch_size": PATCH,
    "position_grid": GRID,
    "drop_path": 0.0,
}


def primus(size: str, **changes: Any) -> ViT3D:
    return hydra.utils.instantiate(OmegaConf.load(CONF / f"primus_{size}.yaml"), **changes)


@pytest.fixture(scope="module")
def theirs() -> nn.Module:
    architectures = pytest.importorskip("dynamic_network_architectures.architectures.primus")
    torch.manual_seed(SEED)
    network = architectures.Primus(
        input_channels=2,
        embed_dim=TINY["embed_dim"],
        patch_embed_size=PATCH,
        num_classes=3,
        eva_depth=TINY["depth"],
        eva_numheads=TINY["num_heads"],
        input_shape=SHAPE,
        init_values=0.1,
        scale_attn_inner=True,
    )
    with torch.no_grad():  # so that no norm or factor is the identity
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return network.eval()


def encoder_weights(network: nn.Module) -> dict[str, Tensor]:
    """Their names to ours: two prefixes and the shape of the position."""
    mine = {}
    for name, tensor in network.state_dict().items():
        if name == "eva.pos_embed":
            # Their rows are in C order of the axes as given, which are our (d, h, w).
            mine["pos_embed.weight"] = tensor.view(*GRID, -1)
        elif name.startswith("eva."):
            mine[name.removeprefix("eva.")] = tensor
        elif name.startswith("down_projection."):
            mine[name.replace("down_projection", "patch_embed")] = tensor
    return mine


def decoder_weights(network: nn.Module) -> dict[str, Tensor]:
    names = {n: t for n, t in network.state_dict().items() if n.startswith("up_projection.")}
    last = max(int(name.split(".")[2]) for name in names)
    old, head = "up_projection.decode.", f"up_projection.decode.{last}."
    return {
        name.replace(head, "head.") if name.startswith(head) else name.replace(old, "stages."): t
        for name, t in names.items()
    }


def test_features_and_logits_are_theirs(theirs: nn.Module) -> None:
    encoder = primus("m", in_channels=2, **TINY).eval()
    encoder.load_state_dict(encoder_weights(theirs), strict=True)
    decoder = build_decoder(encoder, 3)
    assert isinstance(decoder, PatchDecoder)
    decoder.load_state_dict(decoder_weights(theirs), strict=True)
    image = torch.randn(2, 2, *SHAPE, generator=torch.Generator().manual_seed(SEED + 1))
    seen: list[Tensor] = []
    theirs.up_projection.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    with torch.no_grad():
        logits = theirs(image)
        maps = encoder(image)
        torch.testing.assert_close(maps[-1], seen[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(decoder(image, maps), logits, rtol=1e-5, atol=1e-5)


def test_their_order_of_axes_is_ours(theirs: nn.Module) -> None:
    """An order that swaps two axes would not pass: the features tell on a grid of three sizes."""
    encoder = primus("m", in_channels=2, **TINY).eval()
    weights = encoder_weights(theirs)
    right = weights["pos_embed.weight"]
    weights["pos_embed.weight"] = right.flatten(0, 2).view(3, 2, 4, -1).transpose(0, 1)
    encoder.load_state_dict(weights, strict=True)
    image = torch.randn(1, 2, *SHAPE)
    with torch.no_grad():
        swapped = encoder(image)[-1]
        encoder.pos_embed.weight.copy_(right)
        assert (encoder(image)[-1] - swapped).abs().max() > 1e-2


def test_a_release_may_name_a_primus() -> None:
    """Its arguments are plain data and within the bounds of the signature."""
    args = OmegaConf.to_container(OmegaConf.load(CONF / "primus_s.yaml"))
    assert isinstance(args, dict)
    del args["_target_"]
    args = json.loads(json.dumps(args | {"position_grid": [1, 2, 3], "depth": 2}))
    made = build_backbone("vit.ViT3D", args, "backbone")
    assert isinstance(made, ViT3D)
    assert made.pos_embed.grid == (1, 2, 3)


@pytest.mark.parametrize("size", ["s", "b", "m", "l"])
def test_sizes_are_theirs(size: str) -> None:
    architectures = pytest.importorskip("dynamic_network_architectures.architectures.primus")
    with torch.device("meta"):
        kind = getattr(architectures, f"Primus{size.upper()}")
        network = kind(1, 4, (8, 8, 8), (64, 32, 16))
        encoder = primus(size, position_grid=(8, 4, 2))
        decoder = build_decoder(encoder, 4)

    def count(*parts: nn.Module) -> int:
        return sum(p.numel() for part in parts for p in part.parameters())

    assert count(encoder) == count(network.eva, network.down_projection)
    assert count(decoder) == count(network.up_projection)


@pytest.mark.parametrize("patch", [2, 8, (8, 4, 8), (1, 16, 16)])
@pytest.mark.parametrize("outputs", [1, 14])
def test_the_patch_decoder_is_theirs(patch: int | tuple[int, int, int], outputs: int) -> None:
    blocks = pytest.importorskip(
        "dynamic_network_architectures.building_blocks.patch_encode_decode"
    )
    sides = (patch,) * 3 if isinstance(patch, int) else patch
    network = nn.ModuleDict({"up_projection": blocks.PatchDecode(sides, 72, outputs)})
    decoder = PatchDecoder(72, patch, outputs)
    decoder.load_state_dict(decoder_weights(network), strict=True)
    x = torch.randn(2, 72, 2, 1, 3)
    with torch.no_grad():
        expected = network["up_projection"](x)
        torch.testing.assert_close(decoder(x, [x]), expected, rtol=1e-5, atol=1e-5)
    assert expected.shape == (2, outputs, 2 * sides[0], sides[1], 3 * sides[2])


def test_a_small_primus_starts_as_eva_does() -> None:
    torch.manual_seed(SEED)
    encoder = primus("s", embed_dim=240, num_heads=4, depth=4, position_grid=(2, 2, 2))
    for number, block in enumerate(encoder.blocks, start=1):
        assert block.attn.q_proj.weight.std().item() == pytest.approx(0.02, rel=0.05)
        expected = 0.02 / (2 * number) ** 0.5
        assert block.attn.proj.weight.std().item() == pytest.approx(expected, rel=0.05)
        assert block.mlp.fc2.weight.std().item() == pytest.approx(expected, rel=0.05)
        assert (block.gamma_1 == 0.1).all()
        assert not block.attn.q_proj.bias.any()
        assert block.attn.k_proj.bias is None
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in encoder.blocks]
    assert rates == pytest.approx([0, 0.2 / 3, 0.4 / 3, 0.2])
