from __future__ import annotations

from typing import Any

import pytest
import torch
from monai.networks.nets import SwinUNETR
from seeds import SEED
from torch import nn

from pretrain.backbones.swin_unetr import SwinUNETRDecoder, SwinUNETREncoder
from pretrain.decoders import build_decoder, unet_decoder
from pretrain.foreign import converted
from pretrain.objective import Objective
from pretrain.objectives.contrastive import GlobalContrast
from pretrain.objectives.simclr import SimCLR
from pretrain.objectives.voco import VoCo
from pretrain.optim import parameter_groups

SHAPE = (32, 64, 96)  # 1x2x3 cells of the deepest map, 16x32x48 of the first stage


def small(**changes: object) -> SwinUNETREncoder:
    torch.manual_seed(SEED)
    args: dict = {"feature_size": 12, "heads": (2, 2, 2, 4), "depths": (2, 1, 2, 1), "window": 4}
    return SwinUNETREncoder(**(args | changes))


def pair(**changes: Any) -> tuple[SwinUNETREncoder, SwinUNETRDecoder, SwinUNETR]:
    """Ours with the weights of MONAI's whole network, which are drawn so that all of them count."""
    ours = small(**changes)
    theirs = SwinUNETR(
        in_channels=ours.in_channels,
        out_channels=3,
        feature_size=12,
        num_heads=(2, 2, 2, 4),
        depths=(2, 1, 2, 1),
        window_size=changes.get("window", 4),
        use_v2=changes.get("use_v2", False),
    )
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.1)
    stored = theirs.state_dict()
    ours.load_state_dict(converted(stored, ours)[0], strict=True)
    # Only the last convolution of the decoder has another name here.
    halves = {name: name.replace("out.", "head.") for name in stored if name[0] in "do"}
    own = ours.own_decoder(3)
    own.load_state_dict({name: stored[theirs] for theirs, name in halves.items()}, strict=True)
    return ours.eval(), own.eval(), theirs.eval()


@pytest.mark.parametrize(
    "changes", [{}, {"use_v2": True, "in_channels": 2}, {"window": (3, 5, 7)}], ids=str
)
def test_the_whole_network_is_monais(changes: dict[str, Any]) -> None:
    encoder, decoder, theirs = pair(**changes)
    image = torch.randn(2, encoder.in_channels, *SHAPE)
    with torch.no_grad():
        found, expected = decoder(image, encoder(image)), theirs(image)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@torch.no_grad()
def test_refined_maps_are_those_that_voco_pools() -> None:
    """GAP of 5 scales: 48 * (1 + 1 + 2 + 4 + 16) = 1152 for the base size."""
    encoder, _, theirs = pair(use_v2=True)
    image = torch.randn(1, 1, *SHAPE)
    hidden = theirs.swinViT(image)
    expected = [
        theirs.encoder1(image),
        theirs.encoder2(hidden[0]),
        theirs.encoder3(hidden[1]),
        theirs.encoder4(hidden[2]),
        theirs.encoder10(hidden[4]),
    ]
    maps = encoder(image)
    for found, wanted in zip([maps[i] for i in encoder.refined], expected, strict=True):
        assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-5)
    assert torch.allclose(maps[4], hidden[3], rtol=1e-5, atol=1e-5)
    with torch.device("meta"):
        voco = VoCo(encoder=SwinUNETREncoder())
    assert voco.projector[0].in_features == 1152


@pytest.mark.parametrize("objective", [SimCLR, GlobalContrast])
def test_objectives_on_embeddings_take_the_refined_maps(objective: type[Objective]) -> None:
    """On the deepest alone the other refining blocks would have no gradient: DDP would stop."""
    encoder = small()
    made = objective(encoder=encoder)  # type: ignore[call-arg]
    assert made.pool.maps == encoder.refined
    made.pool(encoder(torch.randn(2, 1, *SHAPE))).square().sum().backward()
    assert all(p.grad is not None for p in encoder.parameters())


def test_maps_have_the_declared_surface() -> None:
    encoder = small(use_v2=True)
    image = torch.randn(1, 1, *SHAPE)
    maps = encoder(image)
    assert encoder.channels == (12, 12, 24, 48, 96, 192)
    assert encoder.strides == tuple((2**i,) * 3 for i in range(6))
    assert [tuple(m.shape[1:]) for m in maps] == [
        (c, *grid) for c, grid in zip(encoder.channels, encoder.grids(image.shape), strict=True)
    ]
    assert isinstance(build_decoder(encoder, 2), SwinUNETRDecoder)
    for decoder in (build_decoder(encoder, 2), unet_decoder(encoder, 2)):
        assert decoder(image, maps).shape == (1, 2, *SHAPE)


def test_gradient_reaches_every_parameter() -> None:
    encoder = small(use_v2=True)
    decoder = encoder.own_decoder(2)
    image = torch.randn(1, 1, *SHAPE)
    decoder(image, encoder(image)).square().mean().backward()
    for module in (encoder, decoder):
        assert [n for n, p in module.named_parameters() if p.grad is None] == []
        weights = [(n, p) for n, p in module.named_parameters() if p.ndim > 1]
        assert [n for n, p in weights if p.grad is not None and not p.grad.any()] == []


def test_each_parameter_is_in_one_layer_from_the_image_on() -> None:
    encoder = small(use_v2=True)
    layers = encoder.layers()
    assert len(layers) == 5
    parts = [[part for part in layer if isinstance(part, nn.Module)] for layer in layers]
    found = [id(p) for layer in parts for part in layer for p in part.parameters()]
    assert sorted(found) == sorted(id(p) for p in encoder.parameters())
    order: list[int] = []
    for number, layer in enumerate(parts):
        first = next(m for m in layer[0].modules() if not list(m.children()))
        first.register_forward_pre_hook(lambda *_, n=number: order.append(n))
    encoder(torch.randn(1, 1, *SHAPE))
    assert order == [0, 1, 2, 3, 4]


def test_tables_of_positions_do_not_decay() -> None:
    encoder = small()
    tables = [p for n, p in encoder.named_parameters() if n.endswith("position_bias_table")]
    spared = {id(p) for p in parameter_groups(encoder, 0.1)[1]["params"]}  # type: ignore[attr-defined]
    assert len(tables) == 6
    assert all(id(p) in spared and p.ndim == 2 for p in tables)


def test_crops_that_do_not_fit_are_explained() -> None:
    with pytest.raises(ValueError, match=r"\[32, 64, 80\].*\[32, 32, 32\].*for example \[32, 64, "):
        small()(torch.zeros(1, 1, 32, 64, 80))
    with pytest.raises(ValueError, match="single cell in SwinUNETR"):
        small()(torch.zeros(1, 1, 32, 32, 32))


def test_heads_must_divide_their_channels() -> None:
    with pytest.raises(ValueError, match="heads=5 does not divide the 24 channels"):
        small(heads=(2, 5, 2, 4))
