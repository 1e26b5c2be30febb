"""From feature maps to the one vector of a crop that contrastive losses compare.

Shape legend: B crops, E_i channels of map i.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pretrain.backbones.backbone import Backbone


def mean_features(maps: Sequence[Tensor]) -> Tensor:
    """The mean over the cells of the deepest map: [B, E].

    One rule for all backbones. The cells of padding count: a crop is what the encoder sees.
    """
    return maps[-1].mean((2, 3, 4))


def is_pyramid(encoder: Backbone) -> bool:
    """Whether the maps of an encoder have several resolutions."""
    return len(set(encoder.strides)) > 1


class Projector(nn.Sequential):
    """An MLP from features [..., in_dim] to embeddings [..., out_dim], left behind afterwards.

    Linear layers with ReLU between them.

    Args:
        in_dim: width of the features.
        hidden_dim: width of the layers within.
        out_dim: width of the embeddings.
        layers: how many linear ones.
        norm: layer norm without weights behind each of them, the last one too.
    """

    def __init__(
        self, in_dim: int, hidden_dim: int, out_dim: int, *, layers: int = 2, norm: bool = False
    ) -> None:
        widths = [in_dim, *[hidden_dim] * (layers - 1), out_dim]
        parts: list[nn.Module] = []
        for number in range(layers):
            parts.append(nn.Linear(widths[number], widths[number + 1]))
            if norm:
                parts.append(nn.LayerNorm(widths[number + 1], elementwise_affine=False))
            if number < layers - 1:
                parts.append(nn.ReLU())
        super().__init__(*parts)


def by_sample(crops: Tensor, per_sample: int) -> Tensor:
    """Rows of crops, sample by sample, to [samples, per_sample, ...]."""
    return torch.unflatten(crops, 0, (-1, per_sample))
