"""Arrays on other axes than S, P, L, which all volumes here have: for encoders trained on others.

Axes are told by their codes, the ends that they run to: nibabel's and MONAI's RAS is the array
whose first axis runs to the right, the second to the front and the third to the head.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator
from torch import Tensor

OURS = "SPL"
_PAIRS = {end: pair for pair in ("SI", "PA", "LR") for end in pair}


def _checked(axes: str) -> str:
    if sorted(_PAIRS.get(end, "") for end in axes) != sorted(("SI", "PA", "LR")):
        raise ValueError(
            f"{axes!r}: three codes are expected, one of S and I, one of P and A and one of L and "
            "R, in the order of the array's axes, such as RAS"
        )
    return axes


Axes = Annotated[str, AfterValidator(_checked)]
"""Codes of an array's axes."""


def turned(x: Tensor, axes: str) -> Tensor:
    """An array whose last three axes are S, P, L, on others."""
    order, mirrored = _way(axes)
    first = x.ndim - 3
    there = x.permute(*range(first), *(first + axis for axis in order))
    return there.flip([first + axis for axis in mirrored])


def turned_back(x: Tensor, axes: str) -> Tensor:
    """The inverse of `turned`."""
    order, mirrored = _way(axes)
    first = x.ndim - 3
    back = [order.index(axis) for axis in range(3)]
    here = x.flip([first + axis for axis in mirrored])
    return here.permute(*range(first), *(first + axis for axis in back))


def _way(axes: str) -> tuple[list[int], list[int]]:
    """Our axis for each of theirs, and which of theirs run the other way."""
    ours = [_PAIRS[end] for end in OURS]
    order = [ours.index(_PAIRS[end]) for end in axes]
    return order, [theirs for theirs, own in enumerate(order) if axes[theirs] != OURS[own]]
