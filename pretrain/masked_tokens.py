"""Which tokens of which crops iBOT hides, and their rows in a tensor whose shape is known before.

How many tokens are hidden is drawn on the device, so no host could wait for it to learn a shape:
rows are as many as can be at most, and those beyond the hidden ones are padding without weight.
Zhou et al. 2021, arXiv:2111.07832, with the stratified shares of DINOv2 (Oquab et al. 2023,
arXiv:2304.07193). In 3D tokens are drawn one by one, not in blocks, as in 3DINO.

Shape legend: B crops, N tokens of a crop, M rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pretrain.draws import uniform
from pretrain.masking import MASK_STREAM

# Whether a crop hides, how much, and what are draws of their own.
_CROP_STREAM, _SHARE_STREAM = MASK_STREAM + 1, MASK_STREAM + 2


def stratified_hidden(
    seeds: Tensor, grid: Sequence[int], share: float, low: float, high: float
) -> Tensor:
    """Hides tokens in floor(B * share) of the crops, and in each another share of them.

    [low, high] is cut into as many equal bins as crops are chosen, and each takes its ratio from
    one: a batch has few and many hidden tokens alike. Which crops, and which bins, is drawn among
    the crops of the call.

    Args:
        seeds: int64 [B].
        grid: tokens along (d, h, w), N in all.
        share: of the crops that hide tokens.
        low: smallest ratio of hidden tokens.
        high: largest.

    Returns:
        bool [B, N], True = hidden; floor(N * ratio) of a chosen crop.
    """
    B, N = len(seeds), math.prod(grid)
    chosen = _chosen(B, share)
    # The place of each crop in a random order: the first ones hide, the first the least.
    place = uniform(seeds, (), _CROP_STREAM).argsort(stable=True).argsort()  # [B]
    width = (high - low) / max(chosen, 1)
    ratio = low + width * (place + uniform(seeds, (), _SHARE_STREAM))
    count = torch.where(place < chosen, (N * ratio).floor(), 0)  # [B]
    order = uniform(seeds, (N,), MASK_STREAM).argsort(dim=1, stable=True).argsort(dim=1)
    return order < count[:, None]


def most_hidden(crops: int, grid: Sequence[int], share: float, low: float, high: float) -> int:
    """The largest number of tokens that `stratified_hidden` can hide in so many crops."""
    chosen = _chosen(crops, share)
    edges = (low + (high - low) * (i + 1) / chosen for i in range(chosen))
    # Ratios are drawn in float32, which may round up to a bin's edge and beyond.
    return sum(math.floor(math.prod(grid) * edge + 1e-3) for edge in edges)


def _chosen(crops: int, share: float) -> int:
    return math.floor(crops * share + 1e-6)


class HiddenRows(NamedTuple):
    """Hidden tokens of a batch, crop by crop, then padding.

    token: int64 [M], its number among the B * N; counted: bool [M], False for padding; weight:
    [M], one over the number of hidden tokens in the token's crop, 0 for padding.
    """

    token: Tensor
    counted: Tensor
    weight: Tensor


def hidden_rows(hidden: Tensor, rows: int) -> HiddenRows:
    """Finds the hidden ones of bool [B, N] without waiting for their number.

    Args:
        hidden: True = hidden; at most `rows` of them are.
        rows: M, as `most_hidden` gives it.
    """
    token = (~hidden).flatten().to(torch.uint8).argsort(stable=True)[:rows]
    counted = hidden.flatten().index_select(0, token)
    crop = token.div(hidden.shape[1], rounding_mode="floor")
    number = hidden.sum(1).clamp(min=1).index_select(0, crop)
    return HiddenRows(token, counted, counted / number)
