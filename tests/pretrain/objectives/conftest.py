from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from pretrain.objective import Batch


@pytest.fixture
def make_batch() -> Callable[..., Batch]:
    def make(shape: tuple[int, int, int], size: int = 2, channels: int = 1, seed: int = 0) -> Batch:
        """Smooth images, different in every sample and along every axis, plus a little noise."""
        random = torch.Generator().manual_seed(seed)
        axes = torch.meshgrid(*(torch.linspace(0, 1, n) for n in shape), indexing="ij")
        waves = torch.randn(size, channels, 3, generator=random) * 6
        phase = torch.stack(axes)[None, None] * waves[..., None, None, None]
        image = phase.sum(2).sin() + 0.05 * torch.randn(size, channels, *shape, generator=random)
        return Batch(
            image=image,
            valid=torch.ones(size, 1, *shape, dtype=torch.bool),
            spacing=torch.ones(size, 3),
            seeds=torch.arange(size) + 1000 * seed,
        )

    return make
