"""One answer per scan: classification and regression on pooled features.

The deepest map is averaged over the cells, as `Encoder.features` gives its vector, and a head
answers. Targets are values of whole cases, looked up by the keys of a batch.
B batch, E channels of the deepest map, K numbers of an answer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from data_prep.errors import InputError, some
from finetune.protocol import DecoderKind
from finetune.scan_task import ScanTask
from finetune.supervised import Supervised
from pretrain.augment import mirrors
from pretrain.backbones.backbone import Backbone
from pretrain.numerics import in_float32
from pretrain.objective import Batch, Losses


class PooledHead(nn.Module):
    """The mean of the deepest map over the cells that lie in the volume, and what is made of it.

    Args:
        channels: E.
        out_channels: K.
        hidden: width of a hidden layer; 0: none, a linear map.
    """

    def __init__(self, channels: int, out_channels: int, hidden: int = 0) -> None:
        super().__init__()
        self.out_channels = out_channels
        last = nn.Linear(hidden or channels, out_channels)
        nn.init.normal_(last.weight, std=0.01)
        nn.init.zeros_(last.bias)
        self.head: nn.Module = last
        if hidden:
            self.head = nn.Sequential(nn.Linear(channels, hidden), nn.GELU(), last)

    @property
    def last(self) -> nn.Linear:
        """The layer that gives the scores."""
        found = self.head[-1] if isinstance(self.head, nn.Sequential) else self.head
        assert isinstance(found, nn.Linear)
        return found

    def forward(self, features: list[Tensor], valid: Tensor) -> Tensor:
        """Scores [B, out_channels]; a cell counts by its share of valid voxels.

        In float32: a regression's last layer answers in its unit, where bfloat16 has steps of 8
        from 1024 on.
        """
        return self._scores(features[-1], valid)

    @in_float32
    def _scores(self, cells: Tensor, valid: Tensor) -> Tensor:
        """As `forward`, of the deepest map [B, E, d, h, w]."""
        d, h, w = cells.shape[2:]
        share = F.adaptive_avg_pool3d(valid.to(cells.dtype), (d, h, w))
        total = share.sum((2, 3, 4)).clamp(min=1e-6)
        scores: Tensor = self.head((cells * share).sum((2, 3, 4)) / total)
        return scores


class Pooled(Supervised):
    """Base of both; subclasses say what is lost between scores and targets, and what is answered.

    Args:
        encoder: gives the maps.
        task: what is asked.
        decoder: linear (auto), or mlp with a hidden layer as wide as the pooled features.
        targets: of each case that is trained on, by its key; none for a network that is only used.
    """

    def __init__(
        self,
        *,
        encoder: Backbone,
        task: ScanTask,
        decoder: DecoderKind = "auto",
        targets: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        channels = encoder.channels[-1]
        self.decoder = PooledHead(channels, task.outputs, channels if decoder == "mlp" else 0)
        self.targets = dict(targets or {})

    def scores(self, image: Tensor, valid: Tensor) -> Tensor:
        """Scores [B, K] of crops [B, C, D, H, W] with valid [B, 1, D, H, W]."""
        scores: Tensor = self.decoder(self.encoder(image), valid)
        return scores.float()

    def answers(self, image: Tensor, valid: Tensor) -> Tensor:
        """What is said of crops, [B, K]: a probability of each class, or a value in its unit."""
        raise NotImplementedError

    def wanted(self, batch: Batch) -> Tensor:
        """The batch's targets [B] on its device."""
        found = torch.tensor([float(self.targets[key]) for key in batch.keys])
        return found.to(batch.image.device, non_blocking=True)


class Classification(Pooled):
    """Which of K classes a scan belongs to: softmax cross-entropy.

    Where a crop is mirrored left to right, classes that the task swaps change places.

    Raises:
        InputError: a target is no class.
    """

    def __init__(
        self,
        *,
        encoder: Backbone,
        task: ScanTask,
        decoder: DecoderKind = "auto",
        targets: Mapping[str, float] | None = None,
    ) -> None:
        known = dict(targets or {})
        wrong = sorted(key for key, t in known.items() if t not in range(task.outputs))
        if wrong:
            raise InputError(
                f"targets of {some(wrong)}: expected a class from 0 to "
                f"{task.outputs - 1}, found {known[wrong[0]]}"
            )
        super().__init__(encoder=encoder, task=task, decoder=decoder, targets=known)
        self.mirrored = task.flip[2] and bool(task.swap)
        self.register_buffer("other", torch.tensor(task.mirrored_classes()), persistent=False)

    def wanted(self, batch: Batch) -> Tensor:
        """The batch's classes [B], of the crops as they are now."""
        found = super().wanted(batch).long()
        if not self.mirrored or not self.training:
            return found
        return torch.where(mirrors(batch.seeds)[:, 2], self.other[found], found)

    def forward(self, batch: Batch, progress: float) -> Losses:
        """Mean cross-entropy over the batch."""
        scores = self.scores(batch.image, batch.valid)
        loss = F.cross_entropy(scores, self.wanted(batch))
        return Losses(loss, {"cross_entropy": loss})

    def answers(self, image: Tensor, valid: Tensor) -> Tensor:
        """Probabilities [B, K] of crops."""
        return self.scores(image, valid).softmax(1)


class Regression(Pooled):
    """A number per scan: squared error, in units of the targets' standard deviation.

    Raises:
        InputError: the targets are not finite or all the same.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(
        self,
        *,
        encoder: Backbone,
        task: ScanTask,
        decoder: DecoderKind = "auto",
        targets: Mapping[str, float] | None = None,
    ) -> None:
        mean, deviation = (0.0, 1.0) if targets is None else standard(targets)
        super().__init__(encoder=encoder, task=task, decoder=decoder, targets=targets)
        self.register_buffer("mean", torch.tensor(mean), persistent=False)
        self.register_buffer("deviation", torch.tensor(deviation), persistent=False)

    def forward(self, batch: Batch, progress: float) -> Losses:
        """Mean squared error over the batch; the part `mse` is in squared units of the target."""
        scaled = (self.wanted(batch) - self.mean) / self.deviation
        loss = (self.scores(batch.image, batch.valid)[:, 0] - scaled).square().mean()
        return Losses(loss, {"mse": loss * self.deviation**2})

    def answers(self, image: Tensor, valid: Tensor) -> Tensor:
        """Values [B, 1] in the unit of the targets."""
        return self.scores(image, valid) * self.deviation + self.mean

    def finish(self) -> None:
        """As every supervised objective's; the head then answers in the unit by itself."""
        super().finish()
        head = self.decoder
        assert isinstance(head, PooledHead)
        with torch.no_grad():
            head.last.weight.mul_(self.deviation)
            head.last.bias.mul_(self.deviation).add_(self.mean)
            self.mean.fill_(0.0)
            self.deviation.fill_(1.0)


def standard(targets: Mapping[str, float]) -> tuple[float, float]:
    """Mean and standard deviation of the targets.

    Raises:
        InputError: they are not finite or all the same, so that nothing can be learnt from them.
    """
    values = np.array(list(targets.values()), np.float64)
    deviation = float(values.std()) if len(values) else math.nan
    if not deviation > 0 or not math.isfinite(deviation):
        raise InputError(
            f"targets of {len(values)} cases: a regression needs finite numbers that differ, "
            f"found a standard deviation of {deviation}"
        )
    return float(values.mean()), deviation


def pooled(
    task: ScanTask,
    encoder: Backbone,
    decoder: DecoderKind,
    targets: Mapping[str, float] | None = None,
) -> Pooled:
    """The network of a task; arguments as `Pooled` has them."""
    kind = Classification if task.kind == "classification" else Regression
    return kind(encoder=encoder, task=task, decoder=decoder, targets=targets)
