"""What keeps a loss in float32, whatever precision the networks before it run in.

Autocast would give matrix products bfloat16's three digits, and an exponential of a similarity over
a temperature of 0.05 has none left then.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

P = ParamSpec("P")
R = TypeVar("R")


def in_float32(function: Callable[P, R]) -> Callable[P, R]:
    """Runs a function of tensors without autocast; half-precision arguments become float32.

    float64 stays float64, so that tests can compare to more digits.
    """

    @functools.wraps(function)
    def widened(*args: P.args, **kwargs: P.kwargs) -> R:
        given = [*args, *kwargs.values()]
        kinds = {value.device.type for value in given if isinstance(value, Tensor)}
        # Tensors without values are run as the CPU's (estimate.py), and autocast is switched there.
        kind = next(iter(kinds - {"meta"}), "cpu")
        with torch.autocast(kind, enabled=False):
            return function(*map(_wide, args), **{k: _wide(v) for k, v in kwargs.items()})  # type: ignore[arg-type]

    return widened


def _wide(value: object) -> object:
    if isinstance(value, Tensor) and value.is_floating_point() and value.itemsize < 4:
        return value.float()
    return value


def unit(x: Tensor) -> Tensor:
    """Scales vectors along the last axis to length 1; zero stays zero, with a finite gradient."""
    return F.normalize(x, dim=-1, eps=1e-6)
