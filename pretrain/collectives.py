"""The one place where pretraining's ranks speak with each other.

An objective knows nothing of ranks; what it takes a mean over is the batch of all of them. Each
function is the identity in one process and waits for no device. All ranks must call it alike and
in the same order, so it belongs into `forward`, never into a preview, which rank 0 draws alone.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Number of ranks that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's number among those that train together."""
    return dist.get_rank() if world_size() > 1 else 0


def is_of_another_rank(error: BaseException) -> bool:
    """Whether an error is what a rank sees of another one's end: a connection that broke."""
    if isinstance(error, dist.DistError):
        return True
    said = ("gloo", "NCCL", "Connection closed by peer", "Timed out waiting")
    return type(error) is RuntimeError and any(words in str(error) for words in said)


class Agreement:
    """What the ranks want, known to all of them one question later, so that none waits for it.

    Each asks at the same places. The answer to a question is the largest number of the one before;
    it travels between processors, beside what devices say to each other.
    """

    def __init__(self, wait_minutes: float = 30) -> None:
        wait = timedelta(minutes=wait_minutes, seconds=60)
        several = world_size() > 1
        self._group: Any = dist.new_group(backend="gloo", timeout=wait) if several else None
        self._wishes = torch.zeros(1, dtype=torch.int64)
        self._under_way: Any = None

    def ask(self, wish: int) -> int:
        """Says what this rank wants, and hears the largest wish of all when they last said so."""
        if self._group is None:
            return wish
        heard = self.last()
        self._wishes = torch.tensor([wish])
        self._under_way = dist.all_reduce(
            self._wishes, dist.ReduceOp.MAX, group=self._group, async_op=True
        )
        return heard

    def last(self) -> int:
        """The answer to the last question; 0 if there was none."""
        if self._under_way is None:
            return 0
        self._under_way.wait()
        self._under_way = None
        return int(self._wishes)


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


def global_max(own: Tensor) -> Tensor:
    """Largest value of each element over all ranks, without a gradient."""
    own = own.detach()
    if world_size() == 1 or own.is_meta:
        return own
    largest = own.clone()
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return largest


def gather(own: Tensor) -> Tensor:
    """Rows of all ranks, [B, ...] to [W * B, ...], rank by rank, with a gradient.

    Each rank takes the mean over its own anchors of a loss that looks at the rows of all. A row
    then has a gradient from every rank's loss: their sum, which DDP divides by the ranks, is that
    of the joint batch. All ranks must have equally many rows.
    """
    ranks = world_size()
    if ranks == 1:
        return own
    if own.is_meta:
        return own.repeat(ranks, *[1] * (own.ndim - 1))
    return _Gather.apply(own)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor) -> Tensor:
        own = own.contiguous()
        rows = [torch.empty_like(own) for _ in range(world_size())]
        dist.all_gather(rows, own)
        return torch.cat(rows)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total.chunk(world_size())[rank()]


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
        count: how many summands it has, or the sum of their weights; a scalar.

    Returns:
        A scalar; 0 where nothing counts on any rank.
    """
    ranks = world_size()
    count = count.detach()
    if ranks > 1 and not count.is_meta:  # the trial step on meta tensors is each rank's own
        count = count.clone()
        dist.all_reduce(count)
        total = total * ranks
    return total / torch.where(count > 0, count, 1)
