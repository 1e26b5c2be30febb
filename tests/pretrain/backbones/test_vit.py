from __future__ import annotations

import itertools
import math

import pytest
import torch

from pretrain.backbones.vit import ViT3D, sincos_position
from pretrain.masking import patchify, random_hidden


def small(**changes: object) -> ViT3D:
    torch.manual_seed(0)
    args: dict = {"patch_size": (2, 4, 3), "embed_dim": 24, "depth": 4, "num_heads": 2}
    return ViT3D(**(args | changes))


IMAGE = torch.randn(2, 1, 4, 12, 12, generator=torch.Generator().manual_seed(1))  # grid 2x3x4
HIDDEN = random_hidden(torch.tensor([3, 4]), (2, 3, 4), 0.75)


@pytest.mark.parametrize("dim", [24, 32, 7])
def test_position_equals_a_slow_oracle(dim: int) -> None:
    grid, count = (2, 3, 4), dim // 6
    found = sincos_position(grid, dim)
    assert found.shape == (24, dim)
    for row, cell in zip(found, itertools.product(*map(range, grid)), strict=True):
        expected: list[float] = []
        for coordinate in cell:
            angles = [coordinate / 10000 ** (i / count) for i in range(count)]
            expected += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
        expected += [0.0] * (dim - 6 * count)
        assert torch.allclose(row, torch.tensor(expected), atol=1e-6)


def test_position_tells_all_cells_apart() -> None:
    distance = torch.cdist(sincos_position((4, 5, 6), 48), sincos_position((4, 5, 6), 48))
    assert (distance + torch.eye(120) * 9 > 0.1).all()


def test_position_needs_six_columns() -> None:
    with pytest.raises(ValueError, match="found 5"):
        sincos_position((1, 1, 1), 5)


def test_maps_have_the_declared_surface() -> None:
    vit = small()
    maps = vit(IMAGE)
    assert vit.in_channels == 1
    assert vit.taps == (1, 2, 3, 4)
    assert vit.channels == (24,) * 4
    assert vit.strides == ((2, 4, 3),) * 4
    assert [m.shape for m in maps] == [(2, 24, 2, 3, 4)] * 4
    assert vit.grids(IMAGE.shape) == [(2, 3, 4)] * 4


@pytest.mark.parametrize(
    ("depth", "taps"), [(12, (3, 6, 9, 12)), (8, (2, 4, 6, 8)), (2, (1, 1, 2, 2)), (1, (1,) * 4)]
)
def test_default_taps_are_quarters(depth: int, taps: tuple[int, ...]) -> None:
    assert small(depth=depth).taps == taps


def test_taps_are_block_outputs_and_the_last_one_is_normed() -> None:
    vit = small(taps=(1, 4))
    seen: list[torch.Tensor] = []
    for block in vit.blocks:
        block.register_forward_hook(lambda *args: seen.append(args[-1]))
    first, last = vit(IMAGE)
    assert torch.equal(first.flatten(2).transpose(1, 2), seen[0])
    assert torch.equal(last.flatten(2).transpose(1, 2), vit.norm(seen[3]))


@pytest.mark.parametrize("taps", [(0, 1), (2, 1), (1, 5)])
def test_taps_outside_the_blocks_are_refused(taps: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="taps"):
        small(taps=taps)


def test_embedding_is_the_convolution_it_looks_like() -> None:
    vit = small(in_channels=2)
    x = torch.randn(2, 2, 4, 12, 12)
    rows = vit.patch_embed(patchify(x, vit.patch_size))
    expected = vit.patch_embed.proj(x).flatten(2).transpose(1, 2)
    assert torch.allclose(rows, expected, atol=1e-5)


def test_tokens_of_everything_are_the_deepest_map() -> None:
    vit = small()
    assert torch.equal(vit.tokens(IMAGE), vit(IMAGE)[-1].flatten(2).transpose(1, 2))


@pytest.mark.parametrize("cls_token", [False, True])
def test_visible_tokens_equal_a_slow_oracle(cls_token: bool) -> None:
    """Embed everything, add positions, then drop: the order that the paper's code has."""
    vit = small(cls_token=cls_token)
    found = vit.tokens(IMAGE, HIDDEN, keep=6)
    assert found.shape == (2, 6 + cls_token, 24)
    everything = vit.patch_embed(patchify(IMAGE, vit.patch_size))
    everything = everything + sincos_position((2, 3, 4), 24)
    for sample, hidden, expected in zip(everything, HIDDEN, found, strict=True):
        x = sample[~hidden][None]
        if vit.cls_token is not None:
            x = torch.cat([vit.cls_token[None, None], x], dim=1)
        for block in vit.blocks:
            x = block(x)
        assert torch.allclose(vit.norm(x)[0], expected, atol=1e-5)


def test_keep_may_be_read_from_the_mask() -> None:
    vit = small()
    assert torch.equal(vit.tokens(IMAGE, HIDDEN), vit.tokens(IMAGE, HIDDEN, keep=6))


def test_hidden_voxels_are_never_read() -> None:
    vit = small()
    image = IMAGE.clone().requires_grad_()
    vit.tokens(image, HIDDEN, keep=6).square().sum().backward()
    assert image.grad is not None
    gradient = patchify(image.grad, vit.patch_size).abs().sum(-1)
    assert (gradient[HIDDEN] == 0).all()
    assert (gradient[~HIDDEN] > 0).all()

    rows = patchify(IMAGE, vit.patch_size).masked_fill(HIDDEN[:, :, None], float("nan"))
    ruined = rows.view(2, 2, 3, 4, 2, 4, 3).permute(0, 1, 4, 2, 5, 3, 6).reshape(IMAGE.shape)
    assert torch.equal(vit.tokens(ruined, HIDDEN, 6), vit.tokens(IMAGE, HIDDEN, 6))


@pytest.mark.parametrize("cls_token", [False, True])
def test_gradient_reaches_every_parameter(cls_token: bool) -> None:
    vit = small(cls_token=cls_token)
    vit(IMAGE)[-1].square().sum().backward()
    assert [n for n, p in vit.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_one_set_of_weights_serves_several_crops() -> None:
    vit = small()
    assert vit(torch.randn(1, 1, 8, 4, 9))[0].shape == (1, 24, 4, 1, 3)


def test_a_crop_that_does_not_fit_is_explained() -> None:
    with pytest.raises(ValueError, match=r"\[5, 12, 12\].*\[2, 4, 3\].*\[4, 12, 12\]"):
        small()(torch.zeros(1, 1, 5, 12, 12))
    with pytest.raises(ValueError, match="multiple"):
        small().grid((0, 4, 3))


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(ValueError, match="num_heads=5"):
        small(num_heads=5)


def test_no_values_are_needed_to_know_the_shapes() -> None:
    vit = small().to("meta")
    assert vit.tokens(IMAGE.to("meta"), HIDDEN.to("meta"), keep=6).shape == (2, 6, 24)
    assert vit(IMAGE.to("meta"))[0].shape == (2, 24, 2, 3, 4)


def test_bfloat16_follows_float32() -> None:
    vit = small().eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = vit.tokens(IMAGE, HIDDEN, 6)
    full = vit.tokens(IMAGE, HIDDEN, 6)
    assert torch.cosine_similarity(low.float().flatten(), full.flatten(), dim=0) > 0.999


def test_drop_path_grows_with_depth_and_rests_in_eval() -> None:
    vit = small(drop_path=0.3)
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in vit.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3])
    vit.eval()
    assert torch.equal(vit(IMAGE)[-1], vit(IMAGE)[-1])
