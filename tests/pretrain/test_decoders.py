from __future__ import annotations

import math

import pytest
import torch
from seeds import SEED

from pretrain.backbones.vit import ViT3D
from pretrain.decoders import PatchDecoder, UNetDecoder, UNETRDecoder, build_decoder

PYRAMID = ((4, 6, 8), ((1, 1, 1), (2, 2, 2), (2, 4, 4)))


def pyramid(size: tuple[int, int, int] = (4, 8, 12)) -> list[torch.Tensor]:
    torch.manual_seed(SEED)
    return [
        torch.randn(2, c, *(n // s for n, s in zip(size, stride, strict=True)), requires_grad=True)
        for c, stride in zip(*PYRAMID, strict=True)
    ]


def untouched(module: torch.nn.Module) -> list[str]:
    # A bias before an instance norm is removed by it, so its gradient is zero.
    return [n for n, p in module.named_parameters() if p.grad is None]


def test_unet_returns_the_resolution_of_the_image() -> None:
    decoder, features = UNetDecoder(*PYRAMID, out_channels=3), pyramid()
    output = decoder(torch.zeros(2, 1, 4, 8, 12), features)
    assert output.shape == (2, 3, 4, 8, 12)
    output.square().mean().backward()
    assert untouched(decoder) == []
    assert all(f.grad is not None and f.grad.any() for f in features)


def test_unet_convolutions_per_stage() -> None:
    one, two = (UNetDecoder(*PYRAMID, out_channels=1, convs_per_stage=n) for n in (1, 2))
    assert [len(stage.convs) for stage in one.stages] == [1, 1]
    assert [len(stage.convs) for stage in two.stages] == [2, 2]


def test_unet_names_are_those_of_nnunet() -> None:
    names = set(UNetDecoder(*PYRAMID, out_channels=1).state_dict())
    assert {"transpconvs.0.weight", "stages.1.convs.0.conv.weight", "head.weight"} <= names


def test_unet_interpolates_what_is_coarser_than_the_image() -> None:
    channels, strides = (4, 8), ((2, 2, 2), (4, 4, 4))
    features = [torch.randn(1, 4, 4, 6, 8), torch.randn(1, 8, 2, 3, 4)]
    output = UNetDecoder(channels, strides, 2)(torch.zeros(1, 1, 8, 12, 16), features)
    assert output.shape == (1, 2, 8, 12, 16)


@pytest.mark.parametrize("strides", [((4, 4, 4),) * 2, ((2, 2, 2), (3, 4, 4))])
def test_unet_needs_a_pyramid(strides: tuple) -> None:
    with pytest.raises(ValueError, match="grow coarser"):
        UNetDecoder((4, 4), strides, 1)


@pytest.mark.parametrize(
    ("patch", "sources"),
    [
        (2, []),
        (4, [[0, 1, 2]]),
        (8, [[0, 1], [2]]),
        (12, [[0, 1], [2]]),
        (16, [[0], [1], [2]]),
        ((2, 16, 8), [[0], [1], [2]]),
        (32, [[0], [1], [2], []]),
    ],
)
def test_unetr_takes_any_patch(patch: int | tuple[int, int, int], sources: list) -> None:
    torch.manual_seed(SEED)
    sides = (patch,) * 3 if isinstance(patch, int) else patch
    grid = (2, 1, 1)
    image = torch.randn(1, 2, *(g * p for g, p in zip(grid, sides, strict=True)))
    image.requires_grad_()
    features = [torch.randn(1, 12, *grid, requires_grad=True) for _ in range(4)]
    decoder = UNETRDecoder(2, 12, patch, 3, feature_size=2)
    assert decoder.sources == sources
    powers = [2 ** (side.bit_length() - 1) for side in sides]
    assert [math.prod(up.stride[axis] for up in decoder.ups) for axis in range(3)] == powers
    output = decoder(image, features)
    assert output.shape == (1, 3, *image.shape[2:])
    output.square().mean().backward()
    assert untouched(decoder) == []
    used = {tap for taps in sources for tap in taps} | {3}
    assert {i for i, f in enumerate(features) if f.grad is not None and f.grad.any()} == used
    assert image.grad is not None and image.grad.any()


def test_unetr_keeps_the_axes_in_place() -> None:
    """A change of one token moves the output there and nowhere far away along no other axis."""
    torch.manual_seed(0)
    decoder = UNETRDecoder(1, 12, 4, 1, feature_size=4).eval()
    image = torch.zeros(1, 1, 8, 12, 16)
    features = [torch.zeros(1, 12, 2, 3, 4) for _ in range(4)]
    features[3] = torch.randn(1, 12, 2, 3, 4)
    output = decoder(image, features)
    for token in [(0, 1, 3), (1, 2, 0)]:
        changed = [f.clone() for f in features]
        changed[3][0, :, *token] += 5
        moved = (decoder(image, changed) - output).abs().view(2, 4, 3, 4, 4, 4).mean((1, 3, 5))
        assert torch.unravel_index(moved.argmax(), moved.shape) == token


def test_unetr_refuses_other_numbers_of_maps() -> None:
    with pytest.raises(ValueError, match="found 2"):
        UNETRDecoder(1, 12, 4, 1)(torch.zeros(1, 1, 4, 4, 4), [torch.zeros(1, 12, 1, 1, 1)] * 2)
    with pytest.raises(ValueError, match="one voxel"):
        UNETRDecoder(1, 12, 1, 1)


@pytest.mark.parametrize("patch", [2, 8, (2, 16, 8), (1, 8, 8)])
def test_patch_decoder_makes_each_patch_of_its_own_token(
    patch: int | tuple[int, int, int],
) -> None:
    torch.manual_seed(SEED)
    sides = (patch,) * 3 if isinstance(patch, int) else patch
    decoder = PatchDecoder(24, patch, 3)
    x = torch.randn(2, 24, 2, 3, 4, requires_grad=True)
    output = decoder(x, [x])
    assert output.shape == (2, 3, 2 * sides[0], 3 * sides[1], 4 * sides[2])
    token = [slice(n * s, (n + 1) * s) for n, s in zip((1, 0, 2), sides, strict=True)]
    output[(0, slice(None), *token)].square().sum().backward()
    assert x.grad is not None
    reached = x.grad.abs().sum(1).nonzero()
    assert reached.tolist() == [[0, 1, 0, 2]]
    assert untouched(decoder) == []


def test_patch_decoder_takes_the_deepest_map_alone() -> None:
    decoder = PatchDecoder(24, 4, 2)
    maps = [torch.randn(1, 24, 1, 2, 3) for _ in range(4)]
    assert torch.equal(decoder(maps[0], maps), decoder(maps[0], maps[3:]))


@pytest.mark.parametrize("patch", [12, 1, (8, 6, 8)])
def test_patch_decoder_refuses_what_doubling_does_not_reach(
    patch: int | tuple[int, int, int],
) -> None:
    with pytest.raises(ValueError, match="powers of two"):
        PatchDecoder(24, patch, 1)


def test_a_vit_says_which_decoder_it_takes() -> None:
    sizes: dict = {"patch_size": 4, "embed_dim": 24, "depth": 4, "num_heads": 2}
    assert isinstance(build_decoder(ViT3D(**sizes), 3), UNETRDecoder)
    assert isinstance(build_decoder(ViT3D(**sizes, decoder="patch"), 3), PatchDecoder)
