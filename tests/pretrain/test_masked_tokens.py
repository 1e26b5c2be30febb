from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pretrain.masked_tokens import hidden_in_some, hidden_rows, most_hidden
from pretrain.masking import random_hidden

GRID = (2, 3, 4)


def seeds(count: int, seed: int = 0) -> Tensor:
    return torch.arange(count) * 7919 + seed * 1_000_003


def hiding(hidden: Tensor, crops: int = 2) -> Tensor:
    """How many crops of each sample hide tokens."""
    return hidden.any(1).view(-1, crops).sum(1)


@pytest.mark.parametrize("samples", [1, 2, 7])
def test_one_of_two_crops_is_masked(seed: int, samples: int) -> None:
    """Half of all crops, as in DINOv2: floor(2 B * 0.5)."""
    hidden = hidden_in_some(seeds(2 * samples, seed), GRID, 0.5, 0.2, 0.75)
    assert hidden.shape == (2 * samples, 24)
    assert (hiding(hidden) == 1).all()


@pytest.mark.parametrize(("share", "crops"), [(0.5, 2), (0.3, 2), (0.8, 2), (1.0, 2), (0.4, 3)])
def test_the_number_of_masked_crops_is_rounded_at_random(share: float, crops: int) -> None:
    found = hiding(hidden_in_some(seeds(1200 * crops), GRID, share, 0.2, 0.75, crops), crops)
    assert set(found.tolist()) <= {math.floor(share * crops), math.ceil(share * crops)}
    assert abs(found.float().mean().item() / crops - share) < 0.03


def test_the_largest_draw_does_not_round_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """1 + (1 - 2^-24) is 2 in float32: two crops would hide where one is to."""
    last = 1 - 2.0**-24
    monkeypatch.setattr(
        "pretrain.masked_tokens.uniform", lambda s, shape, _: torch.full((len(s), *shape), last)
    )
    for grid in ((6, 6, 6), (7, 7, 7), (2, 3, 4)):
        for share in (0.5, 0.7, 1.0):
            hidden = hidden_in_some(seeds(8), grid, share, 0.2, 0.75)
            assert (hiding(hidden) == math.floor(2 * share)).all()
            most = math.floor(0.75 * math.prod(grid) + 1e-3)
            assert hidden.sum(1).max() in (most - 1, most)
            assert hidden.sum() <= most_hidden(4, grid, share, 0.75)


def test_ratios_are_uniform() -> None:
    N = 10 * 10 * 10
    hidden = hidden_in_some(seeds(2000), (10, 10, 10), 0.5, 0.2, 0.75)
    ratios = hidden.sum(1)[hidden.any(1)].sort().values / N
    assert len(ratios) == 1000 and ratios[0] >= 0.2 - 1 / N and ratios[-1] <= 0.75
    expected = torch.linspace(0.2, 0.75, 1000)
    assert (ratios - expected).abs().max() < 0.55 * 0.06  # Kolmogorov, far beyond 1 in 1000


def test_every_crop_has_its_turn() -> None:
    hidden = hidden_in_some(seeds(2000), GRID, 0.5, 0.2, 0.75)
    assert abs(hidden.any(1).view(-1, 2).float().mean(0)[0].item() - 0.5) < 0.05
    # A masked first crop hides no more, and no other tokens, than a masked second one.
    share = torch.stack([hidden[c::2][hidden[c::2].any(1)].float().mean(0) for c in range(2)])
    assert (share - 0.475).abs().max() < 0.08


def test_a_sample_hides_the_same_tokens_in_any_batch() -> None:
    """So ranks, micro-batches and resumed runs agree."""
    whole = hidden_in_some(seeds(16), GRID, 0.5, 0.2, 0.75)
    assert torch.equal(whole, hidden_in_some(seeds(16), GRID, 0.5, 0.2, 0.75))
    for sample in (0, 3, 7):
        rows = slice(2 * sample, 2 * sample + 2)
        alone = hidden_in_some(seeds(16)[rows], GRID, 0.5, 0.2, 0.75)
        assert torch.equal(alone, whole[rows])
    assert not torch.equal(whole, hidden_in_some(seeds(16, 1), GRID, 0.5, 0.2, 0.75))
    assert not torch.equal(whole[whole.any(1)][0], random_hidden(seeds(1), GRID, 0.5)[0])


@pytest.mark.parametrize("samples", [1, 3, 6])
@pytest.mark.parametrize("share", [0.2, 0.5, 0.9, 1.0])
@pytest.mark.parametrize(("low", "high"), [(0.2, 0.75), (0.1, 0.5), (0.5, 0.5), (0.9, 1.0)])
def test_no_draw_hides_more_than_is_planned(
    samples: int, share: float, low: float, high: float
) -> None:
    bound = most_hidden(samples, (6, 6, 6), share, high)
    for s in range(30):
        found = hidden_in_some(seeds(2 * samples, s), (6, 6, 6), share, low, high).sum()
        assert found <= bound


def test_rows_are_the_hidden_tokens_in_order(seed: int) -> None:
    hidden = hidden_in_some(seeds(6, seed), GRID, 0.5, 0.2, 0.75)
    M = most_hidden(3, GRID, 0.5, 0.75)
    rows = hidden_rows(hidden, M)
    number = int(hidden.sum())
    assert rows.token.shape == rows.counted.shape == rows.weight.shape == (M,)
    assert torch.equal(rows.token[:number], hidden.flatten().nonzero()[:, 0])
    assert rows.counted.tolist() == [True] * number + [False] * (M - number)
    sums = torch.zeros(6).index_add(0, rows.token // 24, rows.weight)
    torch.testing.assert_close(sums, hidden.any(1).float())  # each masked crop weighs 1
    assert not rows.weight[number:].any()
