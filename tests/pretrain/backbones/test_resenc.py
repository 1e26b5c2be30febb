from __future__ import annotations

import pytest
import torch
from seeds import SEED
from torch.nn import functional as F

from pretrain.backbones.resenc import ResEncUNetEncoder, ResidualBlock
from pretrain.masking import triple


def small(**changes: object) -> ResEncUNetEncoder:
    torch.manual_seed(SEED)
    args: dict = {"features": (4, 6, 8), "strides": (1, 2, (1, 2, 2)), "blocks": (1, 2, 1)}
    return ResEncUNetEncoder(**(args | changes))


def test_maps_have_the_declared_surface() -> None:
    encoder = small(in_channels=2)
    x = torch.randn(2, 2, 4, 8, 12)
    maps = encoder(x)
    assert encoder.channels == (4, 6, 8)
    assert encoder.strides == ((1, 1, 1), (2, 2, 2), (2, 4, 4))
    assert [tuple(m.shape[1:]) for m in maps] == [(4, 4, 8, 12), (6, 2, 4, 6), (8, 2, 2, 3)]
    assert encoder.grids(x.shape) == [tuple(m.shape[2:]) for m in maps]


def test_gradient_reaches_every_parameter() -> None:
    encoder = small()
    encoder(torch.randn(2, 1, 4, 8, 12))[-1].square().mean().backward()
    # A bias before an instance norm is removed by it: its gradient is there, but zero.
    assert [n for n, p in encoder.named_parameters() if p.grad is None] == []
    weights = {n: p for n, p in encoder.named_parameters() if not n.endswith("conv.bias")}
    assert [n for n, p in weights.items() if p.grad is not None and not p.grad.any()] == []


def test_a_strided_block_is_the_written_formula() -> None:
    torch.manual_seed(SEED)
    block = ResidualBlock(3, 5, (1, 2, 2))
    x = torch.randn(2, 3, 4, 6, 6)

    def norm(y: torch.Tensor) -> torch.Tensor:
        mean, var = y.mean((2, 3, 4), keepdim=True), y.var((2, 3, 4), unbiased=False, keepdim=True)
        return (y - mean) / (var + 1e-5).sqrt()

    c1, c2, c3 = block.conv1.conv, block.conv2.conv, block.skip[1].conv
    y = F.leaky_relu(norm(F.conv3d(x, c1.weight, c1.bias, (1, 2, 2), 1)), 0.01)
    y = norm(F.conv3d(y, c2.weight, c2.bias, 1, 1))
    pooled = x.unflatten(4, (3, 2)).unflatten(3, (3, 2)).mean((4, 6))
    y = F.leaky_relu(y + norm(F.conv3d(pooled, c3.weight)), 0.01)
    assert torch.allclose(block(x), y, atol=1e-5)


def test_a_crop_that_does_not_fit_is_explained() -> None:
    with pytest.raises(ValueError, match=r"\[4, 8, 10\].*\[2, 4, 4\].*for example \[10, 4, 8\]"):
        small()(torch.zeros(1, 1, 4, 8, 10))
    with pytest.raises(ValueError, match="single cell"):
        small()(torch.zeros(1, 1, 2, 4, 4))


def test_stages_must_agree() -> None:
    with pytest.raises(ValueError, match="3, 3 and 2"):
        small(blocks=(1, 1))


def test_the_scale_of_the_input_does_not_matter_behind_the_stem() -> None:
    encoder = small()
    x = torch.randn(1, 1, 4, 8, 12)
    assert torch.allclose(encoder(x)[-1], encoder(3 * x)[-1], atol=1e-3)


@pytest.mark.parametrize("strides", [(1, 2, 2), (1, (1, 2, 2), 2), ((1, 2, 2), (2, 1, 2), 2)])
def test_features_are_those_of_dynamic_network_architectures(strides: tuple) -> None:
    unet = pytest.importorskip("dynamic_network_architectures.architectures.unet")
    torch.manual_seed(SEED)
    features, blocks = [4, 6, 6], [1, 2, 3]
    theirs = unet.ResidualEncoderUNet(
        input_channels=2,
        n_stages=3,
        features_per_stage=features,
        conv_op=torch.nn.Conv3d,
        kernel_sizes=3,
        strides=[list(triple(s)) for s in strides],
        n_blocks_per_stage=blocks,
        num_classes=1,
        n_conv_per_stage_decoder=1,
        conv_bias=True,
        norm_op=torch.nn.InstanceNorm3d,
        norm_op_kwargs={"eps": 1e-5, "affine": True},
        nonlin=torch.nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
    ).encoder
    for parameter in theirs.parameters():  # norms begin as ones and zeros, which would hide them
        torch.nn.init.normal_(parameter, std=0.3)
    ours = small(in_channels=2, features=features, strides=strides, blocks=blocks)
    known = {n: t for n, t in theirs.state_dict().items() if ".all_modules." not in n}
    ours.load_state_dict(known, strict=True)
    x = torch.randn(2, 2, 8, 24, 16)
    for found, expected in zip(ours(x), theirs(x), strict=True):
        assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)
