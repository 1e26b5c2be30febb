"""One answer per scan: classification and regression on pooled features.

The deepest map is averaged over the cells, as `Encoder.features` gives its vector, and a linear
head answers. Targets are values of whole cases, looked up by the keys of a batch.
B batch, E channels of the deepest map, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from data_prep.errors import InputError
from finetune.supervised import Supervised
from pretrain.backbones.backbone import Backbone
from pretrain.objective import Batch, Losses


class PooledHead(nn.Module):
    """The mean of the deepest map over the cells that lie in the volume, and a linear map of it."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.out_channels = out_channels
        self.head = nn.Linear(channels, out_channels)
        nn.init.normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)

    def forward(self, features: list[Tensor], valid: Tensor) -> Tensor:
        """Scores [B, out_channels]; a cell counts by its share of valid voxels."""
        cells = features[-1]  # [B, E, d, h, w]
        d, h, w = cells.shape[2:]
        share = F.adaptive_avg_pool3d(valid.to(cells.dtype), (d, h, w))
        total = share.sum((2, 3, 4)).clamp(min=1e-6)
        return self.head((cells * share).sum((2, 3, 4)) / total)


class Pooled(Supervised):
    """Base of both; subclasses say what is lost between scores and targets.

    Args:
        encoder: gives the maps.
        targets: of each case that is trained on, by its key.
        out_channels: scores per scan.
    """

    def __init__(
        self, *, encoder: Backbone, targets: Mapping[str, float], out_channels: int
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = PooledHead(encoder.channels[-1], out_channels)
        self.targets = dict(targets)

    def scores(self, image: Tensor, valid: Tensor) -> Tensor:
        """Scores [B, out_channels] of crops [B, C, D, H, W] with valid [B, 1, D, H, W]."""
        scores: Tensor = self.decoder(self.encoder(image), valid)
        return scores.float()

    def wanted(self, batch: Batch) -> Tensor:
        """The batch's targets [B] on its device."""
        found = torch.tensor([float(self.targets[key]) for key in batch.keys])
        return found.to(batch.image.device, non_blocking=True)


class Classification(Pooled):
    """Which of K classes a scan belongs to: softmax cross-entropy.

    Raises:
        InputError: a target is no class.
    """

    def __init__(self, *, encoder: Backbone, targets: Mapping[str, float], classes: int) -> None:
        wrong = sorted(key for key, t in targets.items() if t not in range(classes))
        if wrong:
            raise InputError(
                f"targets of {', '.join(wrong[:5])}: expected a class from 0 to {classes - 1}, "
                f"found {targets[wrong[0]]}"
            )
        super().__init__(encoder=encoder, targets=targets, out_channels=classes)

    def forward(self, batch: Batch, progress: float) -> Losses:
        """Mean cross-entropy over the batch."""
        scores = self.scores(batch.image, batch.valid)
        loss = F.cross_entropy(scores, self.wanted(batch).long())
        return Losses(loss, {"cross_entropy": loss})

    def probabilities(self, image: Tensor, valid: Tensor) -> Tensor:
        """[B, K] for crops."""
        return self.scores(image, valid).softmax(1)


class Regression(Pooled):
    """A number per scan: squared error, in units of the targets' standard deviation.

    Raises:
        InputError: the targets are not finite or all the same.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, *, encoder: Backbone, targets: Mapping[str, float]) -> None:
        values = torch.tensor(list(targets.values()), dtype=torch.float64)
        deviation = float(values.std(correction=0)) if len(values) else math.nan
        if not deviation > 0 or not math.isfinite(deviation):
            raise InputError(
                f"targets of {len(values)} cases: a regression needs finite numbers that differ, "
                f"found a standard deviation of {deviation}"
            )
        super().__init__(encoder=encoder, targets=targets, out_channels=1)
        self.register_buffer("mean", values.mean().float())
        self.register_buffer("deviation", torch.tensor(deviation))

    def forward(self, batch: Batch, progress: float) -> Losses:
        """Mean squared error over the batch; the part `mse` is in squared units of the target."""
        scaled = (self.wanted(batch) - self.mean) / self.deviation
        loss = (self.scores(batch.image, batch.valid)[:, 0] - scaled).square().mean()
        return Losses(loss, {"mse": loss * self.deviation**2})

    def values(self, image: Tensor, valid: Tensor) -> Tensor:
        """[B] in the units of the targets."""
        return self.scores(image, valid)[:, 0] * self.deviation + self.mean
