from __future__ import annotations

import itertools

import pytest
import torch

from pretrain.masking import (
    block_hidden,
    enlarge,
    kept,
    patchify,
    random_hidden,
    spread,
    triple,
    unpatchify,
    visible_first,
)

SEEDS = torch.tensor([0, 1, -5, 2**40])


@pytest.mark.parametrize(
    ("count", "ratio", "visible"),
    [
        (1000, 0.9, 100),  # floating point says 99
        (216, 0.75, 54),
        (512, 0.75, 128),
        (1000, 0.75, 250),
        (24, 0.75, 6),
        (10, 0.75, 2),
        (7, 0.6, 2),
        (100, 0.07, 93),
        (1, 1e-9, 0),
    ],
)
def test_kept_is_a_floor_of_decimals(count: int, ratio: float, visible: int) -> None:
    if visible:
        assert kept(count, ratio) == visible
    else:
        with pytest.raises(ValueError, match="leaves none of 1 parts visible"):
            kept(count, ratio)


def test_kept_agrees_with_percent_arithmetic() -> None:
    for count, percent in itertools.product((8, 27, 96, 1000, 8000), range(1, 88)):
        assert kept(count, percent / 100) == count * (100 - percent) // 100


@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.1, 1.5])
def test_kept_refuses_a_ratio_outside(ratio: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        kept(10, ratio)


@pytest.mark.parametrize("grid", [(2, 3, 4), (1, 1, 5), (6, 6, 6)])
@pytest.mark.parametrize("ratio", [0.3, 0.75])
def test_every_sample_hides_the_same_number(grid: tuple[int, int, int], ratio: float) -> None:
    hidden = random_hidden(SEEDS, grid, ratio)
    count = grid[0] * grid[1] * grid[2]
    assert hidden.shape == (4, count)
    assert hidden.dtype == torch.bool
    assert (hidden.sum(1) == count - kept(count, ratio)).all()


def test_masks_follow_the_seed_alone() -> None:
    hidden = random_hidden(SEEDS, (4, 4, 4), 0.5)
    assert torch.equal(hidden[1:2], random_hidden(SEEDS[1:2], (4, 4, 4), 0.5))
    assert not torch.equal(hidden[0], hidden[1])


def test_every_part_is_hidden_equally_often() -> None:
    share = random_hidden(torch.arange(4000), (2, 3, 4), 0.75).float().mean(0)
    assert (share - 0.75).abs().max() < 0.03


def test_visible_first_sorts_and_is_a_permutation() -> None:
    hidden = random_hidden(SEEDS, (2, 3, 4), 0.75)
    order = visible_first(hidden)
    restore = order.argsort(1)
    assert torch.equal(order.gather(1, restore), torch.arange(24).expand(4, -1))
    for row, where in zip(order, hidden, strict=True):
        assert torch.equal(row[:6], (~where).nonzero()[:, 0])
        assert torch.equal(row[6:], where.nonzero()[:, 0])


def test_patchify_follows_c_order_of_grid_and_patch() -> None:
    patch, grid, channels = (2, 1, 3), (2, 3, 4), 2
    shape = [g * p for g, p in zip(grid, patch, strict=True)]
    x = torch.randn(2, channels, *shape)
    rows = patchify(x, patch)
    assert rows.shape == (2, 24, 2 * 6)
    for n, (d, h, w) in enumerate(itertools.product(*map(range, grid))):
        cut = x[:, :, 2 * d : 2 * d + 2, h : h + 1, 3 * w : 3 * w + 3]
        assert torch.equal(rows[:, n], cut.flatten(1))
    assert torch.equal(unpatchify(rows, grid, patch), x)


def test_a_patch_row_meets_a_convolution_weight() -> None:
    conv = torch.nn.Conv3d(2, 5, (2, 1, 3), (2, 1, 3), bias=False)
    x = torch.randn(1, 2, 4, 3, 12)
    rows = patchify(x, (2, 1, 3)) @ conv.weight.flatten(1).T
    assert torch.allclose(rows, conv(x).flatten(2).transpose(1, 2), atol=1e-6)


def test_block_mask_hides_whole_blocks() -> None:
    hidden = block_hidden(SEEDS, (32, 48, 64), 16, 0.75)
    assert hidden.shape == (4, 1, 32, 48, 64)
    blocks = patchify(hidden, (16, 16, 16))
    assert torch.equal(blocks.all(-1), blocks.any(-1))
    assert torch.equal(blocks.all(-1), random_hidden(SEEDS, (2, 3, 4), 0.75))


def test_spread_inverts_looking_at_whole_patches() -> None:
    hidden = random_hidden(SEEDS, (2, 3, 4), 0.6)
    voxels = spread(hidden, (2, 3, 4), (3, 1, 2))
    assert voxels.shape == (4, 1, 6, 3, 8)
    for d, h, w in itertools.product(range(6), range(3), range(8)):
        assert torch.equal(voxels[:, 0, d, h, w], hidden[:, d // 3 * 12 + h * 4 + w // 2])


def test_750_of_1000_blocks() -> None:
    blocks = patchify(block_hidden(SEEDS[:2], (160, 160, 160), 16, 0.75), (16, 16, 16))
    assert blocks.all(-1).sum(1).tolist() == [750, 750]
    assert torch.equal(blocks.all(-1), blocks.any(-1))


def test_enlarge_repeats_cells() -> None:
    cells = torch.arange(2 * 2 * 3 * 4).view(2, 1, 2, 3, 4)
    found = enlarge(cells, (2, 1, 3))
    assert found.shape == (2, 1, 4, 3, 12)
    for d, h, w in itertools.product(range(4), range(3), range(12)):
        assert torch.equal(found[..., d, h, w], cells[..., d // 2, h, w // 3])


def test_blocks_that_do_not_fit_are_cut_at_the_far_end() -> None:
    hidden = block_hidden(SEEDS, (5, 4, 6), (2, 4, 4), 0.5)
    assert hidden.shape == (4, 1, 5, 4, 6)
    grid = random_hidden(SEEDS, (3, 1, 2), 0.5).view(4, 3, 1, 2)
    for d, h, w in itertools.product(range(5), range(4), range(6)):
        assert torch.equal(hidden[:, 0, d, h, w], grid[:, d // 2, h // 4, w // 4])


def test_triple() -> None:
    assert triple(4) == (4, 4, 4)
    assert triple([1, 2, 3]) == (1, 2, 3)
    with pytest.raises(ValueError, match="three"):
        triple([1, 2])


def test_masks_need_no_values() -> None:
    # Meta tensors have none: any wait of the host for the device would raise.
    seeds = SEEDS.to("meta")
    assert visible_first(random_hidden(seeds, (2, 3, 4), 0.75)).shape == (4, 24)
    assert block_hidden(seeds, (8, 8, 8), 4, 0.5).shape == (4, 1, 8, 8, 8)
