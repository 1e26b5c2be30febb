"""Encoders that leave hidden blocks out: both families, against slow oracles."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain.backbones.convolution import ConvNorm, InstanceNorm, Pyramid
from pretrain.backbones.resenc import ResEncUNetEncoder, ResidualBlock
from pretrain.backbones.unet import UNetEncoder
from pretrain.masking import enlarge, random_hidden

GRID = (2, 3, 4)  # blocks
STRIDES = (1, (1, 2, 2), 2)  # cells of (1, 1, 1), (1, 2, 2), (2, 4, 4) voxels
SHAPE = (8, 12, 16)  # blocks of 4 voxels
FAMILIES = {
    "resenc": lambda **args: ResEncUNetEncoder(blocks=(1, 2, 1), **args),
    "unet": lambda **args: UNetEncoder(convs=(2, 2, 1), **args),
}
each_family = pytest.mark.parametrize("family", FAMILIES)


def make(family: str, **changes: object) -> Pyramid:
    torch.manual_seed(0)
    args: dict = {"features": (4, 6, 8), "strides": STRIDES}
    encoder = FAMILIES[family](**(args | changes))
    for name, parameter in encoder.named_parameters():
        if "norm" in name or "bias" in name:  # ones and zeros would hide what they do
            nn.init.normal_(parameter, std=0.5)
    return encoder


def blocks(ratio: float = 0.75, size: int = 2, grid: tuple[int, int, int] = GRID) -> Tensor:
    """A mask of blocks [B, 1, gd, gh, gw]."""
    return random_hidden(torch.arange(size), grid, ratio).view(-1, 1, *grid)


def uneven() -> Tensor:
    """Samples that show 6, 1, 24 and 17 of 24 blocks."""
    hidden = blocks(size=4)
    hidden[1] = True
    hidden[1, 0, 1, 2, 0] = False
    hidden[2] = False
    hidden[3].flatten()[7:] = False
    return hidden


def image(size: int = 2, channels: int = 1) -> Tensor:
    return torch.randn(size, channels, *SHAPE, generator=torch.Generator().manual_seed(1))


def oracle(encoder: Pyramid, x: Tensor, hidden: Tensor) -> list[Tensor]:
    """Sample by sample: zero after every step, gather visible cells to normalise them."""

    def blank(y: Tensor, seen: Tensor) -> Tensor:
        return torch.where(seen, y, 0.0)

    def norm(y: Tensor, seen: Tensor, layer: nn.InstanceNorm3d) -> Tensor:
        out = torch.zeros_like(y)
        for channel in range(len(y)):
            cells = y[channel][seen[0]]
            spread = ((cells - cells.mean()).square().mean() + 1e-5).sqrt()
            cells = (cells - cells.mean()) / spread * layer.weight[channel] + layer.bias[channel]
            out[channel][seen[0]] = cells
        return out

    def conv(y: Tensor, seen: Tensor, layer: ConvNorm) -> Tensor:
        c = layer.conv
        y = blank(F.conv3d(y[None], c.weight, c.bias, c.stride, c.padding)[0], seen)
        y = norm(y, seen, layer.norm)
        return F.leaky_relu(y, 0.01) if isinstance(layer.nonlin, nn.LeakyReLU) else y

    def residual(y: Tensor, seen: Tensor, layer: ResidualBlock) -> Tensor:
        skip = y
        for part in layer.skip:
            skip = conv(skip, seen, part) if isinstance(part, ConvNorm) else blank(part(skip), seen)
        y = conv(conv(y, seen, layer.conv1), seen, layer.conv2)
        return F.leaky_relu(y + skip, 0.01)

    maps: list[list[Tensor]] = [[] for _ in encoder.strides]
    for sample, mask in zip(x, hidden, strict=True):
        voxels = ~enlarge(mask[None], [s // g for s, g in zip(SHAPE, GRID, strict=True)])[0]
        y = blank(sample, voxels)
        if encoder.stem is not None:
            y = conv(y, voxels, encoder.stem.convs[0])
        for level, (stage, stride) in enumerate(zip(encoder.stages, encoder.strides, strict=True)):
            seen = voxels[:, :: stride[0], :: stride[1], :: stride[2]]
            for part in stage[0].convs if encoder.stem is None else stage.blocks:
                y = (residual if isinstance(part, ResidualBlock) else conv)(y, seen, part)
            maps[level].append(y)
    return [torch.stack(level) for level in maps]


@each_family
@pytest.mark.parametrize("mask", [blocks, uneven])
def test_maps_equal_a_slow_oracle(family: str, mask: Callable[[], Tensor]) -> None:
    encoder, hidden = make(family), mask()
    x = image(len(hidden))
    for found, expected in zip(encoder(x, hidden), oracle(encoder, x, hidden), strict=True):
        assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)


@each_family
def test_hidden_voxels_never_change_a_map(family: str) -> None:
    encoder, hidden, x = make(family), blocks(), image()
    voxels = enlarge(hidden, 4)
    for other in (torch.randn_like(x) * 100, torch.full_like(x, torch.nan)):
        changed = torch.where(voxels, other, x)
        for found, expected in zip(encoder(changed, hidden), encoder(x, hidden), strict=True):
            assert torch.equal(found, expected)


@each_family
def test_hidden_voxels_have_no_gradient(family: str) -> None:
    encoder, hidden = make(family), blocks()
    x = image().masked_fill(enlarge(hidden, 4), torch.inf).requires_grad_()
    sum(level.square().sum() for level in encoder(x, hidden)).backward()
    assert x.grad is not None
    assert (x.grad[enlarge(hidden, 4)] == 0).all()
    assert (x.grad[~enlarge(hidden, 4)] != 0).all()


@each_family
def test_hidden_cells_are_zero_after_every_layer(family: str) -> None:
    encoder, hidden = make(family), blocks()
    expected = {tuple(seen.shape[2:]): seen for seen in encoder.visible(hidden, SHAPE)}
    looked: list[str] = []

    def look(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
            seen = expected[tuple(output.shape[2:])].expand_as(output)
            assert (output[~seen] == 0).all(), name
            assert (output[seen] != 0).float().mean() > 0.9, name
            looked.append(name)

        return hook

    layers = (InstanceNorm, nn.AvgPool3d, nn.LeakyReLU, ResidualBlock)
    for name, module in encoder.named_modules():
        if isinstance(module, layers):
            module.register_forward_hook(look(name))
    for found, seen in zip(encoder(image(), hidden), encoder.visible(hidden, SHAPE), strict=True):
        assert (found[~seen.expand_as(found)] == 0).all()
    assert len(looked) >= 10


@each_family
def test_a_mask_that_hides_nothing_gives_the_dense_maps(family: str) -> None:
    encoder, x = make(family), image()
    nothing = torch.zeros_like(blocks())
    for found, expected in zip(encoder(x, nothing), encoder(x), strict=True):
        assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)


@each_family
def test_a_sample_does_not_depend_on_its_neighbours(family: str) -> None:
    encoder, hidden, x = make(family), uneven(), image(4)
    together = encoder(x, hidden)
    for i in range(4):
        for found, expected in zip(encoder(x[i : i + 1], hidden[i : i + 1]), together, strict=True):
            assert torch.allclose(found[0], expected[i], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("affine", [False, True])
def test_norm_gives_visible_cells_mean_0_and_variance_1(affine: bool) -> None:
    norm, seen = InstanceNorm(3, affine=affine), ~uneven()
    x = torch.randn(4, 3, *GRID) * 7 + 100
    seen[1, 0, 0] = True  # one visible cell would have no variance
    y = norm(torch.where(seen, x, torch.nan), seen)
    for sample, mask in zip(y.detach(), seen, strict=True):
        for channel in sample:
            assert channel[mask[0]].mean().abs() < 1e-5
            assert channel[mask[0]].var(unbiased=False) == pytest.approx(1, abs=1e-3)
            assert (channel[~mask[0]] == 0).all()


def test_norm_survives_a_sample_of_which_nothing_is_visible() -> None:
    x = torch.randn(2, 3, *GRID, requires_grad=True)
    seen = torch.ones(2, 1, *GRID, dtype=torch.bool)
    seen[0] = False
    y = InstanceNorm(3, affine=True)(x, seen)
    y.square().sum().backward()
    assert (y[0] == 0).all()
    assert x.grad is not None and x.grad.isfinite().all() and (x.grad[0] == 0).all()


def test_statistics_are_float32_under_autocast() -> None:
    norm, seen = InstanceNorm(2, affine=True), ~enlarge(blocks(), 4)
    x = (torch.randn(2, 2, *SHAPE) + 30).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = norm(x, seen)
    assert low.dtype == torch.bfloat16
    assert torch.allclose(low.float(), norm(x.float(), seen), rtol=1e-2, atol=1e-2)


@each_family
def test_bfloat16_follows_float32(family: str) -> None:
    encoder, hidden, x = make(family), blocks(), image()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = encoder(x, hidden)
    for found, expected in zip(low, encoder(x, hidden), strict=True):
        assert torch.cosine_similarity(found.float().flatten(), expected.flatten(), dim=0) > 0.999


def test_cells_larger_than_a_block_are_all_visible() -> None:
    """160^3 in blocks of 16: 10^3 blocks, 5^3 cells of the sixth stage."""
    encoder = ResEncUNetEncoder(features=(1,) * 6, blocks=(1,) * 6)
    hidden = blocks(size=1, grid=(10, 10, 10))
    assert hidden.sum() == 750
    seen = encoder.visible(hidden, (160, 160, 160))
    assert encoder.grids((160, 160, 160))[-1] == (5, 5, 5)
    assert seen[5] is None
    for mask, size in zip(seen[:5], (160, 80, 40, 20, 10), strict=True):
        assert mask is not None
        assert mask.shape == (1, 1, size, size, size)
        assert mask.sum() == 250 * (size // 10) ** 3
    assert seen[4] is not None
    assert torch.equal(seen[4], ~hidden)


@each_family
def test_a_stage_of_larger_cells_is_dense(family: str) -> None:
    """Blocks of (4, 4, 4) voxels in cells of (2, 8, 8): larger along two axes."""
    encoder = make(family, strides=(1, (1, 2, 2), (2, 4, 4)))
    shape = (8, 16, 24)
    hidden = blocks(grid=(2, 4, 6))
    x = torch.randn(2, 1, *shape)
    *_, middle, last = encoder(x, hidden)
    assert encoder.visible(hidden, shape)[2] is None
    assert last.shape[2:] == (4, 2, 3)
    assert (last != 0).all()
    dense = encoder.stages[2](middle)
    assert torch.equal(last, dense)


@each_family
def test_blocks_that_do_not_fit_are_explained(family: str) -> None:
    encoder = make(family)
    with pytest.raises(ValueError, match=r"blocks of \[4, 6, 8\].*cells of \[2, 4, 4\]"):
        encoder(torch.zeros(1, 1, 8, 12, 16), torch.zeros(1, 1, 2, 2, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"\[3, 3, 4\] blocks.*\[8, 12, 16\] voxels"):
        encoder(torch.zeros(1, 1, *SHAPE), torch.zeros(1, 1, 3, 3, 4, dtype=torch.bool))


@each_family
def test_checkpointing_changes_nothing(family: str) -> None:
    encoder, hidden, x = make(family), blocks(), image()

    def gradients() -> dict[str, Tensor]:
        encoder.zero_grad()
        sum(level.square().mean() for level in encoder(x, hidden)).backward()
        return {n: p.grad.clone() for n, p in encoder.named_parameters() if p.grad is not None}

    plain = gradients()
    encoder.set_grad_checkpointing()
    again = gradients()
    assert plain.keys() == again.keys()
    assert all(torch.equal(plain[name], again[name]) for name in plain)


@each_family
def test_the_mask_compiles_without_a_break(family: str) -> None:
    encoder, hidden, x = make(family), blocks(), image()
    traced = torch.compile(encoder, backend="eager", fullgraph=True)
    for found, expected in zip(traced(x, hidden), encoder(x, hidden), strict=True):
        assert torch.equal(found, expected)


@each_family
def test_no_values_are_needed(family: str) -> None:
    encoder = make(family).to("meta")
    maps = encoder(image().to("meta"), blocks().to("meta"))
    sum(level.sum() for level in maps).backward()
    assert [tuple(m.shape[2:]) for m in maps] == encoder.grids(SHAPE)
