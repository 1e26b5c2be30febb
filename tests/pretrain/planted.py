"""An objective that goes wrong where a test says, for runs that must notice."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from pretrain.objective import Batch, Losses
from pretrain.objectives.cnn_mae import CnnMAE


class Trap(nn.Module):
    """Gives back what it gets, but for the rows that are to go wrong."""

    def forward(self, x: Tensor, rows: list[int], what: str) -> Tensor:
        if what == "output":
            x = x.clone()
            x[rows, 0, 0, 0, 0] = torch.inf
        if what == "gradient":
            zero = torch.zeros_like(x)
            zero[rows] = (x[rows] * 0).sqrt()  # 0, with a slope that is not finite
            x = x + zero
        return x


class Planted(CnnMAE):
    """Wrong on one volume, once `after` steps are done: in a module, its gradient or the loss."""

    def __init__(
        self,
        *,
        encoder: Any,
        block: int = 4,
        what: Literal["output", "gradient", "loss"] = "output",
        key: str = "",
        after: int = 0,
    ) -> None:
        super().__init__(encoder=encoder, block=block)
        self.trap = Trap()
        self.what, self.key, self.after = what, key, after
        self.rows: list[int] = []

    def forward(self, batch: Batch, progress: float) -> Losses:
        due = bool(batch.keys) and self.loop.step >= self.after
        self.rows = [i for i, key in enumerate(batch.keys) if key == self.key]
        self.rows = self.rows if due else []
        losses = super().forward(batch, progress)
        if self.rows and self.what == "loss":
            losses = Losses(losses.loss * torch.nan, {"mse": losses.parts["mse"] * torch.nan})
        return losses

    def predict(self, batch: Batch) -> tuple[Tensor, Tensor]:
        features = self.encoder(batch.image)
        if self.rows:
            features[-1] = self.trap(features[-1], self.rows, self.what)
        hidden, _ = super().predict(batch)
        return hidden, self.decoder(batch.image, features)
