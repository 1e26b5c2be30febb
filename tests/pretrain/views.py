"""An objective of several groups of crops, for runs that must carry them everywhere."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from pydantic import Field
from torch import nn

from pretrain.crops import MultiCrop, Size
from pretrain.objective import Batch, Losses, Objective


class Views(Objective):
    """Local crops are to look like the global crops of their sample, and the `gram` ones alike."""

    def __init__(
        self,
        *,
        encoder: Any,
        local: Annotated[int, Field(ge=0)] = 2,
        local_size: Size = (4, 8, 4),
        key: str = "",
        after: int = 0,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.channels[-1], 4)
        self.key, self.after = key, after
        self.crops = MultiCrop(
            local=local, local_size=tuple(local_size), region=(16, 24, 16), gram_size=(16, 24, 16)
        )

    def forward(self, batch: Batch, progress: float) -> Losses:
        samples = len(batch.image) // self.crops.main
        whole, local, gram = (
            self.head(self.encoder(group.image)[-1].flatten(2).mean(2)).unflatten(0, (samples, -1))
            for group in (batch, batch.others["local"], batch.others["gram"])
        )
        teacher = whole.detach().mean(1, keepdim=True)
        loss = whole.square().mean() + sum((x - teacher).square().mean() for x in (local, gram))
        if self.key in batch.keys and self.loop.step >= self.after:
            loss = loss * torch.nan
        return Losses(loss, {"mse": loss})
