"""The surface that every backbone offers to objectives, decoders and whoever wants features."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


class Backbone(nn.Module):
    """An encoder of crops [B, in_channels, D, H, W] into feature maps, finest first.

    Subclasses set the three attributes and implement `grids` and `forward`.
    """

    in_channels: int
    """Channels of the image."""

    channels: tuple[int, ...]
    """Channels of each feature map."""

    strides: tuple[tuple[int, int, int], ...]
    """Voxels of the image along (d, h, w) for one cell of each feature map."""

    def grids(self, shape: Sequence[int]) -> list[tuple[int, int, int]]:
        """Returns the (d, h, w) size of each feature map for an image whose last axes are `shape`.

        Raises:
            ValueError: if the backbone cannot take such a crop; the message says which it can.
        """
        raise NotImplementedError

    def no_weight_decay(self) -> set[str]:
        """Returns the names of parameters to keep from decay besides biases and norms."""
        return set()

    def forward(self, x: Tensor) -> list[Tensor]:
        """Returns the feature maps [B, C_i, D_i, H_i, W_i], finest first."""
        raise NotImplementedError
