"""The head of self-distillation: an MLP to a sphere, and prototypes on it.

Caron et al. 2021, arXiv:2104.14294; sizes as in DINOv2 (Oquab et al. 2023, arXiv:2304.07193).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain.numerics import in_float32, unit


class ProjectionHead(nn.Module):
    """Maps features [..., in_dim] to logits of prototypes [..., K].

    Three linear layers with GELU between them, length 1, then the scaled cosine with each
    prototype; the scales, 1 at the start, are trained as in DINOv2. Lengths and the last product
    are float32: logits are divided by temperatures down to 0.04, which makes 10 % of a probability
    of bfloat16's last digit.

    Args:
        in_dim: width of the features.
        prototypes: K.
        hidden_dim: width of the MLP.
        bottleneck_dim: width of the space that the prototypes lie in.
    """

    def __init__(
        self,
        in_dim: int,
        prototypes: int,
        *,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
    ) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(in_dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, bottleneck_dim),
        )
        self.prototypes = nn.Parameter(torch.empty(prototypes, bottleneck_dim))
        self.scale = nn.Parameter(torch.ones(prototypes))
        for module in self.mlp:
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.prototypes, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [..., in_dim] to [..., K]."""
        return _scaled_cosines(self.mlp(x), self.prototypes, self.scale)


@in_float32
def _scaled_cosines(x: Tensor, prototypes: Tensor, scale: Tensor) -> Tensor:
    return F.linear(unit(x), unit(prototypes) * scale[:, None])
