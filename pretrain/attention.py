"""Where a CLS token looks: its attention to the patches, for pictures.

Caron et al. 2021, arXiv:2104.14294, showed that in DINO these maps find objects.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from pretrain.backbones.vit import TokenBackbone


@torch.no_grad()
def cls_attention(encoder: TokenBackbone, image: Tensor) -> Tensor:
    """Attention of the first prefix token in the last block.

    The fused attention of training returns no weights. Its queries and keys are caught on their
    way into it, turned and normed as they are, whatever the kind of block.

    Args:
        encoder: whose first prefix token is the CLS token; in the mode that it is in.
        image: [B, C, D, H, W].

    Returns:
        float32 [B, heads, N], N patches in the grid's order; what prefix tokens get is left out.
    """
    with _Caught() as caught:
        encoder.tokens(image)
    query, key = (x.float() for x in caught.last)  # [B, heads, K + N, A]
    weights = (query[:, :, :1] @ key.mT * query.shape[-1] ** -0.5).softmax(-1)
    return weights[:, :, 0, encoder.prefix_tokens :]


class _Caught(TorchFunctionMode):
    """Keeps queries and keys of the last fused attention within it."""

    last: tuple[Tensor, Tensor]

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            self.last = args[0], args[1]
        return func(*args, **(kwargs or {}))
