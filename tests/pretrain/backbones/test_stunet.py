from __future__ import annotations

from pathlib import Path

import hydra.utils
import pytest
import torch
from omegaconf import OmegaConf
from seeds import SEED
from torch import Tensor
from torch.nn import functional as F

import conf
from pretrain.backbones.stunet import Block, STUNetEncoder, from_published
from pretrain.decoders import build_decoder

CONF = Path(conf.__file__).parent


def small(**changes: object) -> STUNetEncoder:
    torch.manual_seed(SEED)
    args: dict = {"features": (4, 6, 8), "strides": (1, 2, (1, 2, 2)), "blocks": (1, 2, 1)}
    return STUNetEncoder(**(args | changes))


def norm(x: Tensor) -> Tensor:
    mean, var = x.mean((2, 3, 4), keepdim=True), x.var((2, 3, 4), unbiased=False, keepdim=True)
    return (x - mean) / (var + 1e-5).sqrt()


def test_maps_and_output_have_the_declared_grids() -> None:
    encoder = small(in_channels=2)
    image = torch.randn(2, 2, 4, 8, 12)
    maps = encoder(image)
    assert encoder.strides == ((1, 1, 1), (2, 2, 2), (2, 4, 4))
    assert [tuple(m.shape[1:]) for m in maps] == [(4, 4, 8, 12), (6, 2, 4, 6), (8, 2, 2, 3)]
    assert encoder.grids(image.shape) == [tuple(m.shape[2:]) for m in maps]
    assert build_decoder(encoder, 3)(image, maps).shape == (2, 3, 4, 8, 12)


@pytest.mark.parametrize(("size", "out"), [((4, 6, 6), (4, 3, 3)), ((2, 4, 8), (2, 2, 4))])
def test_a_first_block_is_the_written_formula(
    size: tuple[int, int, int], out: tuple[int, int, int]
) -> None:
    """The shortcut reads the first voxel of each cell and has no norm behind it."""
    torch.manual_seed(SEED)
    block = Block(3, 5, (1, 2, 2), project=True)
    assert block.shortcut is not None
    x = torch.randn(2, 3, *size)
    first, second, short = block.conv1.conv, block.conv2.conv, block.shortcut
    y = F.leaky_relu(norm(F.conv3d(x, first.weight, first.bias, (1, 2, 2), 1)), 0.01)
    y = norm(F.conv3d(y, second.weight, second.bias, 1, 1))
    y = y + F.conv3d(x[..., ::2, ::2], short.weight, short.bias)
    assert y.shape[2:] == out
    assert torch.allclose(block(x), F.leaky_relu(y, 0.01), atol=1e-5)


def test_a_decoder_stage_repeats_convolves_and_joins() -> None:
    """As published: nearest first, then the 1x1x1 convolution, then the skip behind it."""
    encoder = small(features=(4, 6), strides=(1, (1, 2, 2)), blocks=(1, 1))
    decoder = encoder.own_decoder(2)
    for parameter in decoder.parameters():  # biases begin at zero and norms at one
        torch.nn.init.normal_(parameter, std=0.3)
    image = torch.randn(2, 1, 3, 4, 8)
    fine, coarse = encoder(image)
    up = decoder.ups[0](F.interpolate(coarse, scale_factor=(1, 2, 2), mode="nearest"))
    expected = decoder.head(decoder.stages[0](torch.cat([up, fine], dim=1)))
    assert torch.allclose(decoder(image, [fine, coarse]), expected, atol=1e-5)


def test_no_weight_depends_on_strides() -> None:
    """What makes the whole network transfer to a task of another resolution."""
    one, other = small(), small(strides=(1, (1, 2, 2), (2, 2, 1)))
    other.load_state_dict(one.state_dict())
    theirs = other.own_decoder(2)
    theirs.load_state_dict(one.own_decoder(2).state_dict())
    image = torch.randn(1, 1, 4, 8, 12)
    assert theirs(image, other(image)).shape == (1, 2, 4, 8, 12)


def test_gradient_reaches_every_weight() -> None:
    encoder = small()
    decoder = encoder.own_decoder(2)
    image = torch.randn(2, 1, 4, 8, 12)
    decoder(image, encoder(image)).square().mean().backward()
    for module in (encoder, decoder):
        assert [n for n, p in module.named_parameters() if p.grad is None] == []
        weights = [(n, p) for n, p in module.named_parameters() if p.ndim > 1]
        assert [n for n, p in weights if p.grad is not None and not p.grad.any()] == []


def test_hidden_voxels_are_never_read_and_hidden_cells_are_zero() -> None:
    """Biases that are not zero: that of a shortcut reaches every cell."""
    encoder = small(strides=(1, 2, 2))
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    image = torch.randn(2, 1, 8, 8, 12)
    hidden = torch.rand(2, 1, 2, 2, 3, generator=torch.Generator().manual_seed(SEED + 1)) < 0.5
    ruined = image.masked_fill(F.interpolate(hidden.float(), image.shape[2:]) > 0, float("nan"))
    maps = encoder(image, hidden)
    for found, again in zip(maps, encoder(ruined, hidden), strict=True):
        assert torch.equal(found, again)
        cells = F.interpolate(hidden.float(), found.shape[2:]) > 0
        assert not found.masked_select(cells.expand_as(found)).any()
        assert found.masked_select(~cells.expand_as(found)).any()


def test_a_crop_that_does_not_fit_is_explained() -> None:
    with pytest.raises(ValueError, match=r"\[4, 8, 10\].*\[2, 4, 4\].*for example \[10, 4, 8\]"):
        small()(torch.zeros(1, 1, 4, 8, 10))
    with pytest.raises(ValueError, match="single cell"):
        small()(torch.zeros(1, 1, 2, 4, 4))


def test_stages_must_agree() -> None:
    with pytest.raises(ValueError, match="3, 3 and 2"):
        small(blocks=(1, 1))


@pytest.mark.parametrize(
    ("name", "millions"),
    [("stunet_s", 14.60), ("stunet_b", 58.26), ("stunet_l", 440.30), ("stunet_h", 1457.33)],
)
def test_sizes_are_the_published_ones(name: str, millions: float) -> None:
    """To the last digit that is published, with its heads for 104 organs and background."""
    with torch.device("meta"):
        encoder = hydra.utils.instantiate(OmegaConf.load(CONF / "backbone" / f"{name}.yaml"))
        decoder = encoder.own_decoder(105)
    coarser = sum(105 * (width + 1) for width in encoder.channels[1:-1])
    found = sum(p.numel() for part in (encoder, decoder) for p in part.parameters()) + coarser
    assert found / 1e6 == pytest.approx(millions, abs=0.005)


def test_published_names_of_another_network_are_refused() -> None:
    known = {"conv_blocks_context.0.0.conv1.weight": torch.zeros(1)}
    assert list(from_published(known).encoder) == ["stages.0.0.conv1.conv.weight"]
    for name in ("tu.0.weight", "conv_blocks_context.0.0.conv4.weight", "seg_outputs.0.gamma"):
        with pytest.raises(ValueError, match=name):
            from_published({**known, name: torch.zeros(1)})
