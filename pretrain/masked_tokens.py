"""Which tokens of which crops iBOT hides, and their rows in a tensor whose shape is known before.

How many tokens are hidden is drawn on the device, so no host could wait for it to learn a shape:
rows are as many as can be at most, and those beyond the hidden ones are padding without weight.
Zhou et al. 2021, arXiv:2111.07832, with the shares of DINOv2 (Oquab et al. 2023, arXiv:2304.07193).
In 3D tokens are drawn one by one, not in blocks, as in 3DINO.

Shape legend: B samples, g crops of each, N tokens of a crop, M rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pretrain.draws import uniform
from pretrain.masking import MASK_STREAM

# Which crops hide, how many of them, how much, and what: each is a draw of its own.
_CROP_STREAM, _NUMBER_STREAM, _RATIO_STREAM = MASK_STREAM + 1, MASK_STREAM + 2, MASK_STREAM + 3


def hidden_in_some(
    seeds: Tensor, grid: Sequence[int], share: float, low: float, high: float, crops: int = 2
) -> Tensor:
    """Hides tokens in some of the crops of each sample, in each another share of them.

    Of g crops, g * share hide, rounded down or up at random where that is no whole number: one of
    two, always, with a share of 0.5. All is drawn from the sample's own seeds, so that a sample
    hides the same tokens whichever rank, batch or micro-batch it is in.

    Args:
        seeds: int64 [B * g], sample by sample.
        grid: tokens along (d, h, w), N in all.
        share: of the crops that hide tokens.
        low: smallest ratio of hidden tokens.
        high: largest.
        crops: of a sample, g.

    Returns:
        bool [B * g, N], True = hidden; floor(N * ratio) of a chosen crop.
    """
    N = math.prod(grid)
    first = seeds[::crops]
    wanted = round(crops * share, 6)
    whole = math.floor(wanted)
    chosen = whole + (uniform(first, (1,), _NUMBER_STREAM) < wanted - whole)  # [B, 1]
    place = _places(uniform(first, (crops,), _CROP_STREAM))  # [B, g]
    ratio = low + (high - low) * uniform(seeds, (), _RATIO_STREAM)  # [B * g]
    count = torch.where((place < chosen).flatten(), (N * ratio).floor(), 0)
    return _places(uniform(seeds, (N,), MASK_STREAM)) < count[:, None]


def _places(noise: Tensor) -> Tensor:
    """The place of each value in the order of its row; ties are broken alike on all devices."""
    return noise.argsort(dim=1, stable=True).argsort(dim=1)


def most_hidden(samples: int, grid: Sequence[int], share: float, high: float) -> int:
    """The largest number of tokens that `hidden_in_some` can hide in so many pairs of crops."""
    chosen = math.ceil(round(2 * share, 6))
    # Ratios are drawn in float32, which may round up to the edge and beyond.
    return samples * chosen * math.floor(math.prod(grid) * high + 1e-3)


class HiddenRows(NamedTuple):
    """Hidden tokens of a batch, crop by crop, then padding.

    token: int64 [M], its number among the tokens of all crops; counted: bool [M], False for
    padding; weight: [M], one over the number of hidden tokens in the token's crop, 0 for padding.
    """

    token: Tensor
    counted: Tensor
    weight: Tensor


def hidden_rows(hidden: Tensor, rows: int) -> HiddenRows:
    """Finds the hidden ones of bool [crops, N] without waiting for their number.

    Args:
        hidden: True = hidden; at most `rows` of them are.
        rows: M, as `most_hidden` gives it.
    """
    token = (~hidden).flatten().to(torch.uint8).argsort(stable=True)[:rows]
    counted = hidden.flatten().index_select(0, token)
    crop = token.div(hidden.shape[1], rounding_mode="floor")
    number = hidden.sum(1).clamp(min=1).index_select(0, crop)
    return HiddenRows(token, counted, counted / number)
