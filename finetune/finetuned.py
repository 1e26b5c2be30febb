"""A finetuned network and how it looks at scans: what segmenters and answerers have in common."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from data_prep.preprocess import Preprocess
from finetune.infer import Size
from finetune.supervised import Supervised
from pretrain.loop import autocast_of, machine_precision
from pretrain.settings import TrainerSettings

Precision = Literal["auto", "32-true", "bf16-mixed"]


@dataclass(frozen=True)
class Finetuned:
    """A finetuned network and how it looks at scans."""

    model: Supervised
    preprocess: Preprocess
    task: Any
    window: Size
    """The size of the crops it was trained on. Instance norms and padded borders tell a network
    where it is: on windows half as long again, one of few labels went from 70 Dice to 25."""
    overlap: float
    modalities: tuple[str, ...]
    tta: bool = False
    """Whether windows are also seen mirrored, along the axes that the task allows."""
    precision: Precision = "32-true"
    """Of the network's layers; sums over windows are float32."""
    window_batch: int = 1

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.model.parameters()).device

    @property
    def channels(self) -> int:
        """Scans of a case that it takes at a time."""
        return self.model.encoder.in_channels

    def seen(self, work: Callable[..., Tensor], *images: Tensor) -> Tensor:
        """What the network makes of windows, in its precision."""
        device = images[0].device
        with autocast_of(layer_precision(self.precision, device), device):
            return work(*images)


def layer_precision(precision: Precision, device: torch.device) -> str:
    """What `auto` comes to where the network is: bfloat16 on a GPU that has it."""
    if precision == "auto" and device.type != "cuda":
        return "32-true"
    return machine_precision(TrainerSettings(precision=precision))
