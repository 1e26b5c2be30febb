"""The one place where pretraining's ranks speak with each other.

An objective knows nothing of ranks; what it takes a mean over is the batch of all of them. Each
function is the identity in one process and waits for no device. All ranks must call it alike and
in the same order, so it belongs into `forward`, never into a preview, which rank 0 draws alone.
"""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Number of ranks that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def global_sum(own: Tensor) -> Tensor:
    """Sum over all ranks, whose gradient, averaged over ranks by DDP, is that of the joint batch.

    For what is not a mean: a ratio of sums, as in Dice. Every rank has the same value and hence
    the same loss, so each must weigh its own share by the number of ranks.
    """
    ranks = world_size()
    if ranks == 1 or own.is_meta:
        return own
    total = own.detach().clone()
    dist.all_reduce(total)
    return total + ranks * (own - own.detach())


def global_mean(total: Tensor, count: Tensor) -> Tensor:
    """Mean over the batch of all ranks, from this rank's sum and its number of summands.

    Ranks hide equally much but have different shares of padding, so the mean of their means is
    not the mean. DDP averages gradients over W ranks; hence each returns
    W * total / (count of all), whose average over ranks, for value and gradient alike, is
    (total of all) / (count of all): what one process with the joint batch computes.

    The micro-batches of one optimiser step are averaged with equal weight, not by count: the
    first one's backward pass runs before the last one's voxels are known.

    Args:
        total: sum over what counts, a scalar with gradient.
        count: how many summands it has, an integer scalar.

    Returns:
        A scalar; 0 where nothing counts on any rank.
    """
    ranks = world_size()
    count = count.detach()
    if ranks > 1 and not count.is_meta:  # the trial step on meta tensors is each rank's own
        count = count.clone()
        dist.all_reduce(count)
        total = total * ranks
    return total / count.clamp(min=1)
