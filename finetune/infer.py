"""Whole scans through a network that was trained on crops, in bounded memory.

Windows overlap and are blended with Gaussian weights, as in nnU-Net (Isensee et al. 2021) and
MONAI, whose numbers these are. The volume is walked from the bottom up: once no further window can
touch a slice, its classes are decided and its logits forgotten, so the logits held at a time span
one window along D, however tall the scan.

What a scan of V voxels and C channels holds at once: the scan itself, its float32 input (4 C V
bytes, twice while it is padded), uint8 classes (V), and on the device logits of one slab, 4 K d H W
bytes for windows d slices high. Nothing else grows with V.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_prep.preprocess import Preprocess
from data_prep.volume import Volume
from finetune.settings import TaskSettings
from pretrain.encoder import window_starts

Size = tuple[int, int, int]
Network = Callable[[Tensor], Tensor]


def segment(
    network: Network,
    volume: Volume,
    preprocess: Preprocess,
    window: Size,
    overlap: float,
    device: torch.device,
    batch: int = 1,
) -> NDArray[np.uint8]:
    """Class indices [D, H, W] on the volume's own canonical grid; arguments as `native_scores`."""
    out = np.zeros(volume.array.shape[1:], np.uint8)
    slices = native_scores(network, volume, preprocess, window, overlap, device, batch)
    for into, scores in zip(out, slices, strict=True):
        into[...] = scores.argmax(0).to(torch.uint8).cpu().numpy()
    return out


def native_scores(
    network: Network,
    volume: Volume,
    preprocess: Preprocess,
    window: Size,
    overlap: float,
    device: torch.device,
    batch: int = 1,
) -> Iterator[Tensor]:
    """Yields [K, H, W] for each slice of the volume's own canonical grid; the largest class wins.

    These are logits. Where the preprocessing resamples they are probabilities, which are brought
    back to the volume's grid linearly before the class is chosen, so that borders are not as coarse
    as the network's grid.

    Args:
        network: maps [B, C, *window] to logits [B, K, *window].
        volume: a scan in physical values.
        preprocess: what the network was trained with.
        window: (d, h, w) in voxels of the network's grid.
        overlap: of neighbouring windows, from 0 to below 1.
        device: where the network is.
        batch: windows that it gets at a time.
    """
    ready = preprocess.apply(volume)
    shape = volume.array.shape[1:]
    image = torch.from_numpy(np.ascontiguousarray(ready.array, np.float32))
    slices = sliding_window(network, image, window, overlap, device, batch)
    step = np.linalg.inv(volume.affine) @ ready.affine  # index of `ready` to index of `volume`
    factors, offset = np.diag(step)[:3], step[:3, 3]
    if np.allclose(factors, 1, atol=1e-6) and np.allclose(offset, 0, atol=1e-4):
        # Padding lies at the far ends and falls away.
        for logits in itertools.islice(slices, shape[0]):
            yield logits[:, : shape[1], : shape[2]]
        return
    rows, columns = (
        _interpolation(shape[a], image.shape[a + 1], factors[a], offset[a]).to(device)
        for a in (1, 2)
    )
    flat = (rows @ logits.softmax(0) @ columns.T for logits in slices)  # [K, H, W] each
    yield from _at_positions(flat, _position(shape[0], image.shape[1], factors[0], offset[0]))


def sliding_window(
    network: Network,
    image: Tensor,
    window: Size,
    overlap: float,
    device: torch.device,
    batch: int = 1,
) -> Iterator[Tensor]:
    """Yields logits [K, H, W] of one slice along D after the other, float32 on the device.

    Args:
        network: maps [B, C, *window] to [B, K, *window].
        image: [C, D, H, W] on the CPU; smaller than the window is padded with its minimum.
        window: (d, h, w) in voxels.
        overlap: of neighbouring windows, from 0 to below 1.
        device: where the network is.
        batch: windows that it gets at a time.
    """
    image, kept = filled(image, window)
    depth, height, width = image.shape[1:]
    along = [starts(n, w, overlap) for n, w in zip(image.shape[1:], window, strict=True)]
    corners = list(itertools.product(along[1], along[2]))
    weight = gaussian(window).to(device)
    total: Tensor | None = None
    mass = torch.zeros(1, window[0], height, width, device=device)
    for d, onward in zip(along[0], [*along[0][1:], depth], strict=True):
        for first in range(0, len(corners), batch):
            places = [
                (slice(None), slice(None), slice(h, h + window[1]), slice(w, w + window[2]))
                for h, w in corners[first : first + batch]
            ]
            crops = torch.stack([image[:, d : d + window[0]][place] for place in places])
            logits = network(crops.to(device)).float()  # [B, K, d, h, w]
            if total is None:
                total = mass.new_zeros(logits.shape[1], *mass.shape[1:])
            for place, found in zip(places, logits, strict=True):
                total[place] += found * weight
                mass[place] += weight
        assert total is not None
        for i in range(max(kept[0].start - d, 0), min(kept[0].stop - d, onward - d)):
            yield (total[:, i] / mass[:, i])[:, kept[1], kept[2]]
        _advance(total, onward - d)
        _advance(mass, onward - d)


def filled(image: Tensor, window: Size) -> tuple[Tensor, tuple[slice, ...]]:
    """An image [C, D, H, W] as large as a window at least, and where in it the given one lies."""
    size = image.shape[1:]
    missing = [max(w - n, 0) for n, w in zip(size, window, strict=True)]
    kept = tuple(slice(n // 2, n // 2 + m) for n, m in zip(missing, size, strict=True))
    if any(missing):
        small, low = image, image.flatten(1).min(1).values[:, None, None, None]
        image = low.expand(-1, *(m + n for m, n in zip(size, missing, strict=True))).clone()
        image[(slice(None), *kept)] = small
    return image, kept


def _advance(slab: Tensor, n: int) -> None:
    """Drops the first n slices [:, D] and appends as many of zeros, in place."""
    left = slab.shape[1] - n
    # A copy onto itself must not overlap, so it goes in strides of at most n.
    for start in range(0, left, n):
        stop = min(start + n, left)
        slab[:, start:stop] = slab[:, start + n : stop + n]
    slab[:, left:] = 0


def mirrored(network: Network, flip: Sequence[bool], swap: Sequence[int] | None = None) -> Network:
    """A network that also looks at the mirrored window, and means the probabilities.

    All combinations of the axes are taken, as nnU-Net does, which means the logits. The result are
    logarithms of probabilities, so that they stand where logits do. Sums are paired axis by axis:
    the answer for a mirrored window is exactly the mirrored answer, bit for bit.

    Args:
        network: maps [B, C, D, H, W] to logits [B, K, D, H, W].
        flip: along which of D, H, W; none returns the network itself.
        swap: for each class, which it is when left and right (W) are mirrored.
    """
    axes = tuple(axis for axis, chosen in enumerate(flip) if chosen)
    if not axes:
        return network

    def summed(x: Tensor, axes: tuple[int, ...]) -> Tensor:
        if not axes:
            return network(x).float().softmax(1)
        *rest, axis = axes
        other = summed(x.flip(axis + 2), tuple(rest)).flip(axis + 2)
        if axis == 2 and swap is not None:
            other = other[:, list(swap)]
        return summed(x, tuple(rest)) + other

    def logits(x: Tensor) -> Tensor:
        mean = summed(x, axes) / 2 ** len(axes)
        return mean.clamp(min=torch.finfo(mean.dtype).tiny).log()

    return logits


def swapped_classes(task: TaskSettings) -> list[int] | None:
    """For each class index, background first, its twin on the other side; None if all stay."""
    order = task.mirrored_classes()
    return order if order != sorted(order) else None


def gaussian(window: Sequence[int]) -> Tensor:
    """Weights [d, h, w] of a window: 1 in the middle, sigma an eighth of each side."""
    weight = torch.ones(())
    for n in window:
        x = torch.arange(n) - (n - 1) / 2
        weight = weight[..., None] * torch.exp(-0.5 * (x / (n / 8)) ** 2)
    # A corner's weight would be 1e-11, lost in a sum of float32.
    return weight.clamp(min=max(1e-3, float(weight.min())))


def starts(length: int, window: int, overlap: float) -> list[int]:
    """Where the windows of an axis that is at least as long as one start."""
    return window_starts(length, window, max(1, int(window * (1 - overlap))))


def _at_positions(slices: Iterator[Tensor], positions: NDArray[np.float64]) -> Iterator[Tensor]:
    """Slices at fractional positions that never go back, blended of the two around each."""
    here, ahead, at = next(slices), None, 0
    for z in positions:
        while at + 1 <= z:
            here, ahead, at = (next(slices) if ahead is None else ahead), None, at + 1
        if z > at and ahead is None:
            ahead = next(slices)
        yield torch.lerp(here, ahead, float(z - at)) if z > at and ahead is not None else here


def _position(length: int, source: int, factor: float, offset: float) -> NDArray[np.float64]:
    """Where each of `length` indices lies among `source` others, held at the ends."""
    return np.clip((np.arange(length) - offset) / factor, 0, source - 1)


def _interpolation(length: int, source: int, factor: float, offset: float) -> Tensor:
    """[length, source] weights of linear interpolation to those positions."""
    position = _position(length, source, factor, offset)
    below = np.floor(position).astype(np.int64)
    above = np.minimum(below + 1, source - 1)
    share = torch.from_numpy(position - below).float()
    index = torch.arange(length)
    weights = torch.zeros(length, source)
    weights[index, torch.from_numpy(below)] += 1 - share
    weights[index, torch.from_numpy(above)] += share
    return weights
