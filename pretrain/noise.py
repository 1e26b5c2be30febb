"""Batches of noise in the shape that a loader delivers: for estimates, benchmarks and checks."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pretrain.crops import Crops
from pretrain.places import Box, Frame, Group, Place, Size
from pretrain.schedule import generator
from pretrain.settings import LoopSettings

SIDES = 4
"""Crops that a volume of noise holds along each axis."""


def raw_batch(
    settings: LoopSettings,
    channels: int,
    samples: int,
    crops: Crops,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """What the loader would deliver for samples of noise: int16 codes, and how to read them.

    Every crop has its own seed and lies where its layout places it in a volume of its sample, of
    isotropic voxels of 1 mm. None is a box that has to be resampled first.

    Args:
        settings: whose `crop_size` counts.
        channels: of the crops.
        samples: each with all crops of the layout.
        crops: the layout.
        device: where the tensors are.
    """
    size = settings.crop_size
    places = [[_place(crops, n, size, s) for n in range(crops.total)] for s in range(samples)]
    made: dict[str, dict[str, Any]] = {}
    first = 0
    for group in crops.groups(size):
        last = first + group.crops
        numbers = [s * crops.total + n for s in range(samples) for n in range(first, last)]
        boxes = [_corners(place) for sample in places for place in sample[first:last]]
        made[group.name] = _noise(group, channels, numbers, boxes, device)
        first = last
    batch = made.pop("")
    return batch | ({"others": made} if made else {})


def _noise(
    group: Group,
    channels: int,
    numbers: list[int],
    boxes: list[list[list[int]]],
    device: torch.device | str,
) -> dict[str, Any]:
    n, shape = len(numbers), group.size
    raw: dict[str, Tensor] = {
        "image": torch.empty(n, channels, *shape, dtype=torch.int16).random_(-1000, 1000),
        "valid": torch.ones(n, 1, *shape, dtype=torch.bool),
        "value": torch.tensor([1.0, 0.0]).expand(n, channels, 2).contiguous(),
        "window": torch.tensor([-1000.0, 1000.0, 0.0, 1e-3]).expand(n, channels, 4),
        "spacing": torch.ones(n, 3),
        "box": torch.tensor(boxes, dtype=torch.float32),
        "seed": torch.tensor(numbers, dtype=torch.int64),
    }
    return {name: value.to(device) for name, value in raw.items()} | {
        "key": [f"noise-{i}" for i in range(n)],
        "seeds": numbers,
        "modality": [("CT",) * channels] * n,
        "changed": group.changed,
    }


def _place(crops: Crops, number: int, size: Size, sample: int) -> Place:
    shape = SIDES * np.array(size)

    def around(rng: np.random.Generator) -> Any:
        return rng.integers(0, shape)

    volume = Box(np.zeros(3, dtype=np.int64), shape)
    own = around(generator("noise", sample, number))
    shared = partial(generator, "noise", sample)
    return crops.place(number, size, Frame(shape, np.ones(3), volume, own, shared, around))


def _corners(place: Place) -> list[list[int]]:
    low = place.centre - place.span // 2
    return [low.tolist(), (low + place.span).tolist()]
