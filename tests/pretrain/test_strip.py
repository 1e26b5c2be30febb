"""The strip of colours: right places, one basis, few columns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pretrain.backbones.backbone import Backbone
from pretrain.crops import Crops
from pretrain.objective import Batch
from pretrain.previews import worth_drawing
from pretrain.strip import add_to_strip, basis, fine_map, map_to_show, thinned


class Places(Backbone):
    """Features that are the mean coordinates of a cell, a fixed factor and a constant."""

    in_channels = 3
    channels = (4,)

    def __init__(self, stride: tuple[int, int, int]) -> None:
        super().__init__()
        self.strides = (stride,)
        self.factor = 1.0

    def grids(self, shape: Any) -> list[tuple[int, int, int]]:
        d, h, w = (n // s for n, s in zip(shape[-3:], self.strides[0], strict=True))
        return [(d, h, w)]

    def forward(self, x: Tensor) -> list[Tensor]:
        mean = torch.nn.functional.avg_pool3d(x, self.strides[0])
        return [torch.cat([mean * self.factor, torch.ones_like(mean[:, :1])], dim=1)]


def coordinates(shape: tuple[int, int, int]) -> Tensor:
    return torch.stack(torch.meshgrid(*(torch.arange(float(n)) for n in shape), indexing="ij"))[
        None
    ]


def test_a_coarse_map_becomes_twice_as_fine_in_the_right_places() -> None:
    """Non-cubic grid and stride: each fine cell away from the edge names its own centre."""
    shape, stride = (16, 24, 32), (4, 8, 4)
    found, fine = fine_map(Places(stride), coordinates(shape), 0)
    assert tuple(fine) == (2, 4, 2) and found.shape == (1, 4, 8, 6, 16)
    for axis in range(3):
        centres = (torch.arange(found.shape[2 + axis]) + 0.5) * float(fine[axis]) - 0.5
        along = found[0, axis].movedim(axis, 0).flatten(1)[1:-1]
        torch.testing.assert_close(along, centres[1:-1, None].expand_as(along))


def test_a_fine_map_stays_as_it_is() -> None:
    image = coordinates((16, 16, 16))
    found, stride = fine_map(Places((2, 2, 2)), image, 0)
    assert tuple(stride) == (2, 2, 2)
    assert torch.equal(found, Places((2, 2, 2))(image)[0])


def test_which_map_is_shown() -> None:
    assert map_to_show([(6, 6, 6)] * 4) == 3  # a ViT: the last
    assert map_to_show([(96,) * 3, (48,) * 3, (24,) * 3, (12,) * 3, (6,) * 3, (3,) * 3]) == 3
    assert map_to_show([(4, 6, 4), (2, 3, 2)]) == 0


def test_few_steps_are_kept_and_about_evenly() -> None:
    kept: list[int] = []
    for step in range(0, 1001, 10):
        kept.append(step)
        for other in thinned(kept):
            kept.remove(other)
    assert len(kept) == 7 and kept[0] == 0 and kept[-1] == 1000
    gaps = np.diff(kept)[:-1]  # the newest comes when it comes
    assert gaps.max() <= 2 * gaps.min()
    assert thinned([0, 5, 9]) == []


def test_the_basis_is_that_of_the_largest_spread(seed: int) -> None:
    rng = np.random.default_rng(seed)
    true, _ = np.linalg.qr(rng.normal(size=(10, 10)))
    x = rng.normal(size=(3000, 10)) * [9, 6, 4, *[0.1] * 7] @ true.T
    axes, low, high = basis(x)
    for i in range(3):
        assert abs(axes[:, i] @ true[:, i]) == pytest.approx(1, abs=0.01)
        assert axes[np.abs(axes[:, i]).argmax(), i] > 0
    assert (low < 0).all() and (high > 0).all()
    narrow, _, _ = basis(rng.normal(size=(50, 2)))
    assert narrow.shape == (2, 3) and np.isfinite(narrow).all()


class Holder:
    def __init__(self, encoder: Backbone) -> None:
        self.encoder = self.released = encoder
        self.crops = Crops()


def test_a_killed_runs_later_previews_go(tmp_path: Path) -> None:
    encoder = Places((4, 4, 4))
    image = coordinates((16, 24, 16)).repeat(2, 1, 1, 1, 1)
    batch = Batch(image, image[:, :1] > -1, torch.ones(2, 3), torch.arange(2), ["a", "b"])
    holder: Any = Holder(encoder)
    for step in (0, 10, 20, 30):
        encoder.factor = 1.0 + step
        add_to_strip(holder, batch, tmp_path, step)
    first = (tmp_path / "strip.png").stat().st_size
    add_to_strip(holder, batch, tmp_path, 20)
    steps = sorted(path.name for path in (tmp_path / "tokens").iterdir())
    assert steps == ["step-00000000.npz", "step-00000010.npz", "step-00000020.npz"]
    assert first > 5000 and (tmp_path / "strip.png").is_file()
    with np.load(tmp_path / "tokens" / "step-00000000.npz") as file:
        # Superior is up in the coronal plane: the first row has the largest d.
        assert file["0-coronal"][0, 0, 0] > file["0-coronal"][-1, 0, 0]
        assert file["0-axial"].shape == (12, 8, 4) and file["1-sagittal"].shape == (8, 12, 4)


@pytest.mark.parametrize(
    ("shape", "drawn"),
    [
        ((4, 5, 6), [0, 1, 2]),
        ((1, 5, 6), [0]),
        ((4, 1, 6), [1]),
        ((4, 5, 1), [2]),
        ((1, 1, 6), [0]),
    ],
)
def test_planes_that_are_lines_are_not_drawn(shape: tuple[int, int, int], drawn: list[int]) -> None:
    assert worth_drawing(shape) == drawn
