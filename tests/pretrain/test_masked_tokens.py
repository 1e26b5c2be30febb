from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pretrain.masked_tokens import hidden_rows, most_hidden, stratified_hidden
from pretrain.masking import random_hidden

GRID = (2, 3, 4)


def seeds(count: int, seed: int = 0) -> Tensor:
    return torch.arange(count) * 7919 + seed * 1_000_003


@pytest.mark.parametrize("crops", [1, 2, 5, 8, 16])
def test_half_of_the_crops_are_masked(seed: int, crops: int) -> None:
    hidden = stratified_hidden(seeds(crops, seed), GRID, 0.5, 0.2, 0.75)
    assert hidden.shape == (crops, 24)
    assert hidden.any(1).sum() == crops // 2


def test_each_masked_crop_takes_its_ratio_from_a_bin_of_its_own(seed: int) -> None:
    N = 10 * 10 * 10
    hidden = stratified_hidden(seeds(20, seed), (10, 10, 10), 0.5, 0.2, 0.75)
    ratios = (hidden.sum(1).sort().values[10:]) / N
    edges = torch.linspace(0.2, 0.75, 11)
    assert (ratios >= edges[:-1] - 1 / N).all() and (ratios <= edges[1:] + 1e-6).all()


def test_every_crop_has_its_turn() -> None:
    """Neither the place in the batch decides what is hidden, nor how much."""
    counts = torch.stack(
        [stratified_hidden(seeds(4, s), GRID, 0.5, 0.2, 0.75).sum(1) for s in range(200)]
    )
    share = (counts > 0).float().mean(0)
    assert (share - 0.5).abs().max() < 0.12
    most = torch.stack([(row == row.max()).float() for row in counts]).mean(0)
    assert (most - 0.25).abs().max() < 0.12


def test_masks_are_a_function_of_the_seeds() -> None:
    first, again, other = (stratified_hidden(seeds(8, s), GRID, 0.5, 0.2, 0.75) for s in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert not torch.equal(first[first.any(1)][0], random_hidden(seeds(1), GRID, 0.5)[0])


@pytest.mark.parametrize("crops", [1, 2, 6, 9])
@pytest.mark.parametrize(("low", "high"), [(0.2, 0.75), (0.1, 0.5), (0.5, 0.5), (0.9, 1.0)])
def test_no_draw_hides_more_than_is_planned(crops: int, low: float, high: float) -> None:
    bound = most_hidden(crops, (6, 6, 6), 0.5, low, high)
    for s in range(30):
        assert stratified_hidden(seeds(crops, s), (6, 6, 6), 0.5, low, high).sum() <= bound
    if crops == 1:
        assert bound == 0


def test_the_largest_draws_are_what_is_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    last = 1 - 2.0**-24
    monkeypatch.setattr(
        "pretrain.masked_tokens.uniform", lambda s, shape, _: torch.full((len(s), *shape), last)
    )
    for grid in ((6, 6, 6), (7, 7, 7), (2, 3, 4)):
        for crops in range(2, 12):
            bound = most_hidden(crops, grid, 0.5, 0.2, 0.75)
            found = stratified_hidden(seeds(crops), grid, 0.5, 0.2, 0.75).sum()
            assert bound - crops <= found <= bound


def test_rows_are_the_hidden_tokens_in_order(seed: int) -> None:
    hidden = stratified_hidden(seeds(6, seed), GRID, 0.5, 0.2, 0.75)
    M = most_hidden(6, GRID, 0.5, 0.2, 0.75)
    rows = hidden_rows(hidden, M)
    number = int(hidden.sum())
    assert rows.token.shape == rows.counted.shape == rows.weight.shape == (M,)
    assert torch.equal(rows.token[:number], hidden.flatten().nonzero()[:, 0])
    assert rows.counted.tolist() == [True] * number + [False] * (M - number)
    sums = torch.zeros(6).index_add(0, rows.token // 24, rows.weight)
    torch.testing.assert_close(sums, hidden.any(1).float())  # each masked crop weighs 1
    assert not rows.weight[number:].any()
