from __future__ import annotations

import pytest
import torch
from seeds import SEED
from torch.nn import functional as F

from pretrain.backbones.unet import UNetEncoder
from pretrain.decoders import build_decoder
from pretrain.masking import triple


def small(**changes: object) -> UNetEncoder:
    torch.manual_seed(SEED)
    args: dict = {"features": (4, 6, 8), "strides": (1, 2, (1, 2, 2)), "convs": (2, 2, 1)}
    return UNetEncoder(**(args | changes))


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
    assert [n for n, p in encoder.named_parameters() if p.grad is None] == []
    # A bias before an instance norm is removed by it: its gradient is there, but zero.
    weights = {n: p for n, p in encoder.named_parameters() if not n.endswith("conv.bias")}
    assert [n for n, p in weights.items() if p.grad is not None and not p.grad.any()] == []


def test_the_first_convolution_of_a_stage_strides() -> None:
    encoder = small(features=(4, 6), strides=(1, (1, 2, 2)), convs=(1, 2))
    x = torch.randn(2, 1, 2, 8, 12)
    first, second = encoder.stages[1][0].convs
    y = encoder(x)[0]
    for layer, stride in ((first, (1, 2, 2)), (second, 1)):
        y = F.conv3d(y, layer.conv.weight, layer.conv.bias, stride, 1)
        y = F.leaky_relu(F.instance_norm(y, eps=1e-5), 0.01)
    assert torch.allclose(encoder(x)[1], y, atol=1e-5)


def test_stages_must_agree() -> None:
    with pytest.raises(ValueError, match="3, 3 and 2"):
        small(convs=(1, 1))


@pytest.mark.parametrize("strides", [(1, 2, 2), (1, (1, 2, 2), 2), ((1, 2, 2), (2, 1, 2), 2)])
def test_network_is_that_of_dynamic_network_architectures(strides: tuple) -> None:
    """Encoder and decoder, with the last layer called `head` here."""
    unet = pytest.importorskip("dynamic_network_architectures.architectures.unet")
    torch.manual_seed(SEED)
    theirs = unet.PlainConvUNet(
        input_channels=2,
        n_stages=3,
        features_per_stage=[4, 6, 6],
        conv_op=torch.nn.Conv3d,
        kernel_sizes=3,
        strides=[list(triple(s)) for s in strides],
        n_conv_per_stage=2,
        num_classes=3,
        n_conv_per_stage_decoder=2,
        conv_bias=True,
        norm_op=torch.nn.InstanceNorm3d,
        norm_op_kwargs={"eps": 1e-5, "affine": True},
        nonlin=torch.nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
    )
    for parameter in theirs.parameters():  # norms begin as ones and zeros, which would hide them
        torch.nn.init.normal_(parameter, std=0.3)
    theirs.encoder.return_skips = True
    known = {n: t for n, t in theirs.state_dict().items() if ".all_modules." not in n}

    ours = small(in_channels=2, features=(4, 6, 6), strides=strides, convs=(2, 2, 2))
    encoder = {n.removeprefix("encoder."): t for n, t in known.items() if n.startswith("encoder.")}
    ours.load_state_dict(encoder, strict=True)
    x = torch.randn(2, 2, 8, 24, 16)
    maps = ours(x)
    for found, expected in zip(maps, theirs.encoder(x), strict=True):
        assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)

    decoder = build_decoder(ours, 3)
    names = {
        n.removeprefix("decoder.").replace("seg_layers.1.", "head."): t
        for n, t in known.items()
        if n.startswith(("decoder.stages.", "decoder.transpconvs.", "decoder.seg_layers.1."))
    }
    decoder.load_state_dict(names, strict=True)
    if triple(strides[0]) == (1, 1, 1):
        assert torch.allclose(decoder(x, maps), theirs(x), rtol=1e-5, atol=1e-5)
    else:  # theirs stays at the resolution of the finest map, ours returns to the image's
        fine = F.interpolate(theirs(x), size=x.shape[2:], mode="trilinear", align_corners=False)
        assert torch.allclose(decoder(x, maps), fine, rtol=1e-5, atol=1e-5)
