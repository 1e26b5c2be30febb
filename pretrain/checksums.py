"""Whether all ranks train the same network: sums of every tensor, compared where a row is logged.

DDP gives all ranks the same gradient, and nobody looks whether their weights are still the same
afterwards: a flipped bit, another library or a forgotten collective makes of one training several
that average their gradients, and nothing crashes. A sum of a tensor's memory, read as integers, is
one pass over it on the device. The sums travel with the means of a logged row, in its one message.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase


def shared_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters, trained or not, and buffers that are the same on all ranks between two steps.

    Running statistics of a norm are not among them: each rank has those of its own batch until the
    next step begins with rank 0's.
    """
    yield from module.named_parameters()
    for prefix, part in module.named_modules():
        if not isinstance(part, _NormBase):
            for name, buffer in part.named_buffers(recurse=False):
                yield f"{prefix}.{name}" if prefix else name, buffer


@torch.no_grad()
def tensor_sums(module: nn.Module) -> dict[str, Tensor]:
    """For each tensor that ranks share, the sum of its memory: int64, on its device, not awaited.

    Sums of integers do not depend on the order and wrap around, so equal bits give equal sums on
    any device, and one changed bit another one.
    """
    return {name: _memory_sum(tensor) for name, tensor in shared_tensors(module)}


def _memory_sum(tensor: Tensor) -> Tensor:
    held = tensor.detach().contiguous().flatten().view(torch.uint8)
    if held.storage_offset() % 8:
        held = held.clone()
    whole = len(held) // 8 * 8  # as words of 64 bits nothing is copied to be summed
    total = held[:whole].view(torch.int64).sum()
    return total + held[whole:].sum() if whole < len(held) else total


def halves(sums: Mapping[str, Tensor], like: Tensor) -> Tensor:
    """Sums as numbers that float64 holds exactly: two for each, of 32 bits."""
    if not sums:
        return like.new_empty(0)
    table = torch.stack(list(sums.values()))
    return torch.stack([table >> 32, table & 0xFFFFFFFF], 1).flatten().to(like)


def check_equal(names: Sequence[str], table: Sequence[Sequence[float]], step: int) -> None:
    """Looks whether all ranks have the same tensors.

    Args:
        names: of the tensors.
        table: `halves` of each rank.
        step: that is done, for the message.

    Raises:
        RuntimeError: they have not.
    """
    different = {rank: row for rank, row in enumerate(table) if row != table[0]}
    if not different:
        return
    first, *rest = [
        name
        for n, name in enumerate(names)
        if any(row[2 * n : 2 * n + 2] != table[0][2 * n : 2 * n + 2] for row in different.values())
    ]
    ranks = ", ".join(map(str, different))
    more = f" (and {len(rest)} more of {len(names)} tensors)" if rest else ""
    raise RuntimeError(
        f"step {step}: {first}{more} of rank {ranks} is not that of rank 0, so ranks train "
        "different networks: a device's memory, library versions, or a value that each rank "
        "computes by itself where pretrain.collectives should have been asked; nothing is saved of "
        "it, the last checkpoint is from before: go on from there, on other devices if it happens "
        "again"
    )
