"""Windows, blending and the way back to the scan's own grid."""

import itertools
import math
import subprocess
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from seeds import SEED
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from data_prep.preprocess import Preprocess
from data_prep.volume import read_nifti, volume_from_array
from finetune.infer import (
    _advance,
    gaussian,
    mirrored,
    segment,
    sliding_window,
    swapped_classes,
)
from finetune.settings import TaskSettings

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]


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
    image = torch.rand(1, *size, generator=torch.Generator().manual_seed(SEED))
    image.view(-1)[0] = 0  # we pad with the minimum, MONAI with 0
    ours = torch.stack(list(sliding_window(local, image, window, overlap, CPU)), 1)
    peer = SlidingWindowInferer(window, overlap=overlap, mode="gaussian")
    expected = peer(image[None], local)[0]
    assert ours.shape == expected.shape
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


class Held(TorchDispatchMode):
    """The most bytes of tensors that were alive at once, beside one that was there before."""

    def __init__(self, given: Tensor) -> None:
        super().__init__()
        self.given = given.untyped_storage()._cdata
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata != self.given:
                    self.alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.alive = {k: v for k, v in self.alive.items() if not v[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return out


@pytest.mark.parametrize("overlap", [0.0, 0.5, 0.75])
def test_logits_held_at_a_time_do_not_grow_with_the_scan(overlap: float) -> None:
    """One slab of logits and its weights, whatever the height; nothing is held twice."""
    classes, window, side = 5, (8, 8, 8), 32
    peaks = []
    for depth in (16, 40):
        image = torch.rand(1, depth, side, side)
        with Held(image) as held:
            count = sum(
                1
                for _ in sliding_window(
                    lambda x: x.expand(-1, classes, -1, -1, -1), image, window, overlap, CPU
                )
            )
        assert count == depth
        peaks.append(held.peak)
    assert peaks[0] == peaks[1]
    slab = 4 * (classes + 1) * window[0] * side * side
    slices = 4 * (classes + 1) * side * side
    assert peaks[1] < slab + 4 * slices + 6 * 4 * classes * math.prod(window)


@pytest.mark.parametrize("multiple", [None, (8, 8, 8)])
def test_preprocessing_holds_the_scan_once_or_twice(multiple: tuple[int, int, int] | None) -> None:
    """float32 input of a scan whose axes are a view of the file's; padded, there is a second."""
    codes = np.random.default_rng(SEED).integers(-1000, 1000, (90, 70, 61), np.int16)
    volume = volume_from_array(np.zeros((4, 4, 4)), (1, 1, 1), "CT")
    volume = replace(volume, array=codes.T[None])
    preprocess = Preprocess.default(None, multiple)
    tracemalloc.start()
    ready = preprocess.apply(volume)
    held = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert ready.array.flags.c_contiguous and ready.array.dtype == np.float32
    assert held < (1 if multiple is None else 2.35) * 4 * codes.size + 2**20


SCRIPT = """
import resource, sys
import numpy as np, torch
from dataclasses import replace
from data_prep.preprocess import Preprocess
from data_prep.volume import volume_from_array
from finetune.infer import segment

def rss():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

shape, classes, window = (1000, 512, 512), 15, (32, 64, 64)
network = torch.nn.Conv3d(1, classes, 1)
volume = volume_from_array(np.zeros((4, 4, 4)), (1, 1, 1), "CT")
before = rss()
codes = np.empty(shape, np.int16)
rng = np.random.default_rng(SEED)
for slab in codes:
    slab[...] = rng.integers(-1000, 1000, shape[1:], np.int16)
with torch.inference_mode():
    found = segment(
        network, replace(volume, array=codes[None]), Preprocess.default(), window, 0.0,
        torch.device("cpu"),
    )
assert found.shape == shape and found.any()
print(rss() - before)
"""


@pytest.mark.slow
def test_a_large_scan_stays_within_its_bound() -> None:
    """512 x 512 x 1000 voxels, 15 classes: codes, float32 input, classes, one slab of logits."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True, cwd=ROOT
    )
    voxels = 512 * 512 * 1000
    slab = 4 * 16 * 32 * 512 * 512
    bound = (2 + 4 + 1) * voxels + slab
    assert int(done.stdout) < 1.15 * bound  # 2.4 GB and what allocators keep


@pytest.mark.parametrize("batch", [2, 3, 100])
def test_windows_in_batches_give_the_same(batch: int) -> None:
    image = torch.rand(1, 23, 17, 30)

    def found(batch: int) -> Tensor:
        return torch.stack(list(sliding_window(local, image, (8, 8, 8), 0.5, CPU, batch)))

    assert torch.equal(found(batch), found(1))


@pytest.mark.parametrize("n", [1, 3, 5, 8])
def test_slabs_move_on_in_place(n: int) -> None:
    slab = torch.rand(2, 8, 3, 3)
    expected = torch.cat([slab[:, n:], torch.zeros(2, n, 3, 3)], 1)
    _advance(slab, n)
    assert torch.equal(slab, expected)


def test_logits_of_half_precision_are_summed_in_float32() -> None:
    """bfloat16 holds 8 bits: sums and weights in it would be off by some 1e-2."""
    image = torch.rand(1, 20, 20, 20)
    windows = sliding_window(lambda x: (3 * x).bfloat16(), image, (8, 8, 8), 0.75, CPU)
    found = torch.stack(list(windows), 1)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, (3 * image).bfloat16().float(), rtol=1e-5, atol=1e-6)


def test_voxelwise_network_comes_through_untouched() -> None:
    image = torch.rand(1, 23, 17, 30)
    found = torch.stack(list(sliding_window(lambda x: 2 * x, image, (8, 8, 8), 0.5, CPU)), 1)
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


# Mirroring.

FLIPS = [flip for flip in itertools.product([False, True], repeat=3) if any(flip)]
SWAP = [0, 2, 1, 3]


def skewed(x: Tensor) -> Tensor:
    """A network of four classes that prefers sides, ends and neighbours: no symmetry to rely on."""
    torch.manual_seed(SEED)
    kernel = torch.randn(4, x.shape[1], 3, 3, 3, dtype=x.dtype)
    ramp = sum(
        torch.linspace(0, 1 + axis, n).reshape([n if a == axis else 1 for a in range(3)])
        for axis, n in enumerate(x.shape[2:])
    )
    assert isinstance(ramp, Tensor)
    return F.conv3d(x, kernel, padding=1) * (1 + ramp)


def turned(x: Tensor, flip: tuple[bool, ...]) -> Tensor:
    return x.flip([axis - 3 for axis, chosen in enumerate(flip) if chosen])


@pytest.mark.parametrize("flip", FLIPS)
@pytest.mark.parametrize("swap", [None, SWAP])
def test_a_mirrored_window_gives_exactly_the_mirrored_answer(
    flip: tuple[bool, bool, bool], swap: list[int] | None
) -> None:
    network = mirrored(skewed, flip, swap)
    x = torch.randn(2, 1, 4, 6, 5, generator=torch.Generator().manual_seed(SEED + 1))
    expected = network(x)
    for some in itertools.product(*([False, True] if f else [False] for f in flip)):
        found = turned(network(turned(x, some)), some)
        if some[2] and swap is not None:
            found = found[:, swap]
        assert torch.equal(found, expected)
    assert not torch.allclose(turned(skewed(turned(x, flip)), flip), skewed(x))


@pytest.mark.parametrize("flip", FLIPS)
def test_probabilities_are_averaged_over_all_combinations(flip: tuple[bool, bool, bool]) -> None:
    x = torch.randn(2, 1, 4, 6, 5, generator=torch.Generator().manual_seed(SEED + 1))
    every = list(itertools.product(*([False, True] if f else [False] for f in flip)))
    total = torch.zeros(2, 4, 4, 6, 5)
    for some in every:
        one = turned(skewed(turned(x, some)).softmax(1), some)
        total += one[:, SWAP] if some[2] else one
    found = mirrored(skewed, flip, SWAP)(x)
    torch.testing.assert_close(found.exp(), total / len(every))
    torch.testing.assert_close(found.softmax(1), total / len(every))


def test_without_axes_nothing_is_mirrored() -> None:
    assert mirrored(skewed, (False, False, False), SWAP) is skewed


@pytest.mark.parametrize("size", [(16, 12, 20), (32, 24, 30), (10, 12, 20)])
def test_a_mirrored_scan_is_labelled_as_the_mirror_image(size: tuple[int, int, int]) -> None:
    """Sizes at which windows lie symmetrically: all steps are whole, paddings even."""
    image = torch.randn(1, *size, generator=torch.Generator().manual_seed(SEED + 2))
    network = mirrored(skewed, (False, False, True), SWAP)

    def found(x: Tensor) -> Tensor:
        return torch.stack(list(sliding_window(network, x, (16, 12, 20), 0.5, CPU)), 1)

    expected = found(image)
    back = found(image.flip(3)).flip(3)[SWAP]
    torch.testing.assert_close(back, expected, rtol=1e-5, atol=1e-5)
    assert (back.argmax(0) == expected.argmax(0)).float().mean() > 0.999
    plain = torch.stack(list(sliding_window(skewed, image.flip(3), (16, 12, 20), 0.5, CPU)), 1)
    assert (plain.flip(3)[SWAP].argmax(0) == expected.argmax(0)).float().mean() < 0.9


class Swapping(TaskSettings):
    """A task with pairs of sides."""

    swap: tuple[tuple[int, int], ...] = ()


def sides(*classes: tuple[str, list[int]], swap: list[tuple[int, int]]) -> Swapping:
    listed = [{"name": name, "values": values, "tolerance_mm": 1} for name, values in classes]
    return Swapping.model_validate({"name": "t", "classes": listed, "swap": swap})


def test_classes_change_sides_with_their_label_values() -> None:
    kidneys = ("left", [2]), ("right", [3]), ("liver", [5])
    assert swapped_classes(sides(*kidneys, swap=[(3, 2)])) == [0, 2, 1, 3]
    assert swapped_classes(sides(*kidneys, swap=[])) is None
    # Both sides in one class: it stays what it is.
    assert swapped_classes(sides(("kidneys", [2, 3]), ("liver", [5]), swap=[(2, 3)])) is None
    several = ("l", [1, 7]), ("r", [8, 2]), ("rib l", [4]), ("rib r", [5])
    assert swapped_classes(sides(*several, swap=[(1, 2), (7, 8), (5, 4)])) == [0, 2, 1, 4, 3]
    with pytest.raises(ValueError, match=r"class left, mirrored left to right, .*\[3, 7\]"):
        swapped_classes(sides(("left", [2, 7]), ("right", [3]), swap=[(2, 3)]))
