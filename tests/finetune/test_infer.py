"""Windows, blending and the way back to the scan's own grid."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from data_prep.preprocess import Preprocess
from data_prep.volume import read_nifti
from finetune.infer import gaussian, segment, sliding_window

CPU = torch.device("cpu")


def local(x: Tensor) -> Tensor:
    """A network whose output at a voxel depends on its place in the window: blending shows."""
    ramp = torch.linspace(0, 1, x.shape[-1])
    return torch.cat(
        [x * ramp, F.avg_pool3d(x, 3, 1, 1), x.mean((2, 3, 4), keepdim=True) + 0 * x], 1
    )


@pytest.mark.parametrize("size", [(16, 12, 20), (40, 31, 22), (9, 30, 21), (8, 7, 9)])
@pytest.mark.parametrize("overlap", [0.25, 0.5])
def test_equals_monai(size: tuple[int, int, int], overlap: float) -> None:
    from monai.inferers import SlidingWindowInferer

    window = (16, 12, 20)
    image = torch.rand(1, *size, generator=torch.Generator().manual_seed(0))
    image.view(-1)[0] = 0  # we pad with the minimum, MONAI with 0
    ours = torch.cat(list(sliding_window(local, image, window, overlap, CPU)), 1)
    peer = SlidingWindowInferer(window, overlap=overlap, mode="gaussian")
    expected = peer(image[None], local)[0]
    assert ours.shape == expected.shape
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_logits_held_at_a_time_do_not_grow_with_the_scan() -> None:
    image = torch.rand(1, 200, 12, 12)
    slabs = [slab.shape[1] for slab in sliding_window(local, image, (16, 12, 12), 0.5, CPU)]
    assert sum(slabs) == 200
    assert max(slabs) <= 16


def test_voxelwise_network_comes_through_untouched() -> None:
    image = torch.rand(1, 23, 17, 30)
    found = torch.cat(list(sliding_window(lambda x: 2 * x, image, (8, 8, 8), 0.5, CPU)), 1)
    torch.testing.assert_close(found, 2 * image)


def test_weights_are_symmetric_and_never_vanish() -> None:
    weight = gaussian((32, 48, 33))
    assert weight.min() >= 1e-3 and weight.max() <= 1
    torch.testing.assert_close(weight, weight.flip(0, 1, 2))


def _threshold(x: Tensor) -> Tensor:
    return torch.cat([-x, x], 1)


def test_a_scan_is_labelled_on_its_own_grid(samples) -> None:  # type: ignore[no-untyped-def]
    volume = read_nifti(samples / "hippocampus/images/hippocampus_019.nii.gz", modality="MR")
    exact = Preprocess.default(None, (16, 16, 16))
    truth = exact.apply(volume).array[0] > 0
    d, h, w = volume.array.shape[1:]
    found = segment(_threshold, volume, exact, (32, 32, 32), 0.5, CPU)
    assert found.shape == (d, h, w)
    assert np.array_equal(found.astype(bool), truth[:d, :h, :w])


def test_resampled_predictions_come_back_in_place(samples) -> None:  # type: ignore[no-untyped-def]
    """A ball of 30 mm, labelled on a coarser anisotropic grid, returns where it was."""
    from dataclasses import replace

    volume = read_nifti(samples / "hippocampus/images/hippocampus_019.nii.gz", modality="MR")
    shape = (46, 52, 40)
    grid = np.indices(shape) - np.array([20, 30, 22])[:, None, None, None]
    distance = np.sqrt((grid**2).sum(0)).astype(np.float32)
    volume = replace(volume, array=(1000 - 20 * distance)[None])
    for spacing in [(2.0, 1.5, 1.0), (0.7, 0.8, 1.3), (1.6, 1.6, 1.6)]:
        coarse = Preprocess.default(spacing, (8, 8, 8))
        ready = coarse.apply(volume).array[0]
        values = ready[
            tuple(
                min(int(c / s), n - 1)
                for c, s, n in zip((20, 30, 22), spacing, ready.shape, strict=True)
            )
        ]
        level = float(np.sort(ready.ravel())[::-1][int((4 / 3 * np.pi * 15**3) / np.prod(spacing))])
        assert level < values
        found = segment(
            lambda x, level=level: 50 * torch.cat([level - x, x - level], 1),
            volume,
            coarse,
            (24, 24, 24),
            0.5,
            CPU,
        )
        assert found.shape == shape
        inside = found.astype(bool)
        middle = np.argwhere(inside).mean(0)
        assert middle == pytest.approx([20, 30, 22], abs=0.35)
        truth = distance < 15
        dice = 2 * (inside & truth).sum() / (inside.sum() + truth.sum())
        assert dice > 0.95
