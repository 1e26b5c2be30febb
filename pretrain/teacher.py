"""A teacher: the moving average of a student, which no gradient reaches.

Tarvainen and Valpola 2017, arXiv:1703.01780; for self-distillation Grill et al. 2020,
arXiv:2006.07733.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from data_prep.errors import InputError

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Teacher(nn.Module):
    """A copy of a student (`module`) that is always in evaluation mode.

    Every part of the student that makes targets needs one: the encoder and each head.

    Args:
        student: what is copied, values and all.
    """

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self.module = copy.deepcopy(student).requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Teacher:
        """Stays in evaluation mode, so that nothing is dropped and no statistics move."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module gives, without a gradient."""
        return self.module(*args, **kwargs)

    @torch.no_grad()
    def update(self, student: nn.Module, momentum: float) -> None:
        """Weights become momentum * own + (1 - momentum) * the student's; buffers are copied.

        It belongs after the optimiser's step. Buffers (running statistics) are averages already.
        """
        own: list[Tensor] = list(self.module.parameters())
        theirs: list[Tensor] = list(student.parameters())
        torch._foreach_lerp_(own, theirs, 1 - momentum)
        for buffer, new in zip(self.module.buffers(), student.buffers(), strict=True):
            buffer.copy_(new)

    def compile_parts(self) -> list[nn.Module]:
        """Returns what is compiled one by one: what the student compiles, of the copy."""
        own = getattr(self.module, "compile_parts", None)
        return list(own()) if callable(own) else [self.module]

    @torch.no_grad()
    def checksum(self) -> Tensor:
        """A number that changes with any bit of weights and buffers: equal on ranks that agree.

        Returns:
            An int64 scalar on the weights' device; nothing waits for it.
        """
        total = torch.zeros((), dtype=torch.int64, device=next(self.module.parameters()).device)
        for values in [*self.module.parameters(), *self.module.buffers()]:
            bits = values.contiguous().flatten().view(_INTEGERS[values.itemsize]).long()
            # Odd factors, so that equal values at other places do not make up for each other.
            total = 3 * total + (bits * torch.arange(1, 2 * len(bits), 2, device=bits.device)).sum()
        return total


def checksums(module: nn.Module) -> dict[str, Tensor]:
    """The checksum of each teacher in a module, by its name there."""
    return {
        name: part.checksum() for name, part in module.named_modules() if isinstance(part, Teacher)
    }


def check_restored(module: nn.Module, saved: Mapping[str, int], where: str) -> None:
    """Looks whether teachers are, bit for bit, those that a checkpoint was made of.

    Args:
        module: with its weights from the checkpoint.
        saved: the checkpoint's own checksums; empty in one of before there were any.
        where: the run, for the message.

    Raises:
        InputError: they are not.
    """
    found = {name: int(total) for name, total in checksums(module).items()}
    different = sorted(name for name in saved if found.get(name) != saved[name])
    if different:
        raise InputError(
            f"{where}: the teacher {', '.join(different)} of its checkpoint is not the one that "
            "was saved; remove the newest checkpoint to go on from the one before"
        )
