"""Random numbers without state: a pure function of (seed, stream, position).

A generator's state would have to be saved, and would depend on how work is split over ranks and
workers. Here each sample carries one 64-bit seed and every number that its augmentation or mask
needs is a hash of (seed, stream, position), so that a resumed run draws what the uninterrupted
one would have drawn, on any device. The hash is the finaliser of SplitMix64 (Steele, Lea and
Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def _signed(value: int) -> int:
    """The int64 with the low 64 bits of a number: torch multiplies and adds with wrap-around."""
    return ((value + (1 << 63)) % (1 << 64)) - (1 << 63)


_GAMMA = 0x9E3779B97F4A7C15
_MIX_1 = _signed(0xBF58476D1CE4E5B9)
_MIX_2 = _signed(0x94D049BB133111EB)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift: torch's >> on int64 keeps the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def uniform(seeds: Tensor, shape: tuple[int, ...], stream: int) -> Tensor:
    """Draws numbers in [0, 1) that depend on nothing but the arguments.

    Args:
        seeds: int64 [B], one per sample.
        shape: what each sample needs.
        stream: a small number that keeps independent uses apart (mask, flip, gain, ...).

    Returns:
        float32 [B, *shape] on the device of `seeds`.
    """
    count = math.prod(shape)
    position = torch.arange(1, count + 1, device=seeds.device, dtype=torch.int64)
    key = _mix(seeds[:, None] + _signed((2 * stream + 1) * _GAMMA))  # [B, 1]
    bits = _mix(key + position * _signed(_GAMMA))  # [B, count]
    # 24 bits fill a float32 mantissa exactly: the largest value is 1 - 2^-24, never 1.
    return (_shift_right(bits, 40).float() * 2.0**-24).reshape(len(seeds), *shape)
