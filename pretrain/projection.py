"""From feature maps to the one vector of a crop that contrastive losses compare.

Shape legend: B crops, E_i channels of map i.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pretrain.backbones.backbone import Backbone
from pretrain.collectives import gather
from pretrain.numerics import in_float32


class Pool:
    """Means over the cells of the maps that stand for a crop, side by side.

    It is the deepest map, one rule for all backbones. Where maps end in parts of their own, it is
    those that do (SwinUNETR's, as VoCo has it): a loss on the deepest alone would never train the
    others. The cells of padding count: a crop is what the encoder sees.

    Args:
        encoder: whose maps.
        every: all maps of any other pyramid.

    Attributes:
        maps: numbers of the maps.
        width: of the features, the sum of their E_i.
    """

    def __init__(self, encoder: Backbone, *, every: bool = False) -> None:
        count = len(encoder.channels)
        pyramid = len(set(encoder.strides)) > 1
        self.maps: Sequence[int] = (count - 1,)
        if pyramid and encoder.refined is not None:
            self.maps = encoder.refined
        elif pyramid and every:
            self.maps = range(count)
        self.width = sum(encoder.channels[i] for i in self.maps)

    def __call__(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps [B, E_i, D_i, H_i, W_i] to features [B, width]."""
        return torch.cat([maps[i].mean((2, 3, 4)) for i in self.maps], 1)


class JointNorm(nn.Module):
    """Batch norm without weights and running statistics, over the rows of all ranks.

    Ioffe and Szegedy 2015, arXiv:1502.03167. Means of feature maps differ little between crops,
    so that all cosines are near 1 at the start, where they have no gradient; without their common
    part they are about 0. It is the same in training and in evaluation, and for any number of
    ranks; micro-batches have statistics of their own.
    """

    EPS = 1e-5

    def forward(self, x: Tensor) -> Tensor:
        """Each feature of [..., E] to mean 0 and variance 1."""
        return _normed(x, self.EPS)


@in_float32
def _normed(x: Tensor, eps: float) -> Tensor:
    variance, mean = torch.var_mean(gather(x.flatten(0, -2)), 0, correction=0)
    return (x - mean) * torch.rsqrt(variance + eps)


class Projector(nn.Sequential):
    """An MLP from features [..., in_dim] to embeddings [..., out_dim], left behind afterwards.

    Linear layers with ReLU between them.

    Args:
        in_dim: width of the features.
        hidden_dim: width of the layers within.
        out_dim: width of the embeddings.
        layers: how many linear ones.
        norm: `JointNorm` behind each of them but the last.
        last_norm: and behind the last one.
        bias: whether they add one.
    """

    def __init__(
        self,
        in_dim: int,
        hidden_dim: int,
        out_dim: int,
        *,
        layers: int = 2,
        norm: bool = False,
        last_norm: bool = False,
        bias: bool = True,
    ) -> None:
        widths = [in_dim, *[hidden_dim] * (layers - 1), out_dim]
        parts: list[nn.Module] = []
        for number in range(layers):
            parts.append(nn.Linear(widths[number], widths[number + 1], bias=bias))
            last = number == layers - 1
            if last_norm if last else norm:
                parts.append(JointNorm())
            if not last:
                parts.append(nn.ReLU())
        super().__init__(*parts)


def by_sample(crops: Tensor, per_sample: int) -> Tensor:
    """Rows of crops, sample by sample, to [samples, per_sample, ...]."""
    return torch.unflatten(crops, 0, (-1, per_sample))
