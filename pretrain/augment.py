"""What crops are changed by on the device, besides geometry: mirrors and intensity.

Order and ranges are those of nnU-Net v2's default trainer and its batchgeneratorsv2 (Isensee et al.
2021, Nature Methods 18): noise, blur, brightness, contrast, low resolution, gamma of the negative,
gamma. What differs: invalid voxels take no part (statistics skip them, blur and low resolution
leave them out of their means), a blur always has seven weights instead of three to seven, mirrors
come first, and draws are functions of a sample's seed. Before all of them comes, for MR alone, the
bias field of a coil: a factor whose logarithm is a polynomial (Van Leemput et al. 1999, IEEE TMI
18; as in NiftyNet, TorchIO and MONAI), here of Legendre's.

The host knows the seeds (`raw["seeds"]`), so it knows what is to be done to which sample: only that
is computed, sample by sample, and nothing waits for the device. C channels, D, H, W voxels.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional as F

from pretrain.draws import uniform
from pretrain.geometry import convolved, gaussian, thin_axes
from pretrain.settings import AugmentSettings

FLIP, GAIN = 1, 2
NOISE, NOISE_FIELD, BLUR, BRIGHTNESS, CONTRAST = range(82, 87)
LOW_RESOLUTION, INVERTED_GAMMA, GAMMA, BIAS_FIELD = range(87, 91)
"""Streams of the draws; `pretrain.geometry` has 80 and 81."""

NOISE_SD = (0.0, 0.1)
SIGMA = (0.5, 1.0)  # voxels
FACTOR = (0.75, 1.25)
SHRUNK = (0.5, 1.0)
EXPONENT = (0.7, 1.5)
COEFFICIENT = (-0.2, 0.2)
DEGREES = tuple(d for d in product(range(4), repeat=3) if 0 < sum(d) <= 3)
"""Degrees along D, H, W of the polynomials that a bias field is made of."""
PER_CHANNEL = 0.5
"""Chance that a sample's blur or low resolution meets a channel."""

BLUR_RADIUS = 3
TINY = 1e-7


@dataclass(frozen=True)
class Augment:
    """Changes made to a batch on the device.

    Args:
        flip: which of the axes D, H, W are mirrored, each with probability 1/2.
        change: what else is done; its geometry is done to crops before.
        swap: pairs of label values that change places where W (left and right) is mirrored.
    """

    flip: tuple[bool, bool, bool] = (False, False, False)
    change: AugmentSettings = field(default_factory=AugmentSettings)
    swap: tuple[tuple[int, int], ...] = ()


def mirrored(
    image: Tensor, valid: Tensor, label: Tensor | None, seeds: Tensor, augment: Augment
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Mirrors each sample along axes of its own; sides of a label stay sides of the patient."""
    draw = mirrors(seeds)
    for axis, wanted in enumerate(augment.flip):
        if wanted:
            flip = draw[:, axis, None, None, None, None]
            image = torch.where(flip, image.flip(axis + 2), image)
            valid = torch.where(flip, valid.flip(axis + 2), valid)
            if label is not None:
                other = label.flip(axis + 1)
                if axis == 2 and augment.swap:
                    other = _swapped(other, augment.swap)
                label = torch.where(flip[:, 0], other, label)
    return image, valid, label


def mirrors(seeds: Tensor) -> Tensor:
    """Along which of D, H, W each sample is mirrored, bool [B, 3], where its task allows it."""
    return uniform(seeds, (3,), FLIP) < 0.5


def _swapped(label: Tensor, pairs: tuple[tuple[int, int], ...]) -> Tensor:
    table = _swap_table(pairs, label.device)
    return torch.where(label < len(table), table[label.clamp(max=len(table) - 1)], label)


@functools.lru_cache(maxsize=8)  # made once: a table sent with each batch would be waited for
def _swap_table(pairs: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    table = torch.arange(max(value for pair in pairs for value in pair) + 1)
    for a, b in pairs:
        table[a], table[b] = b, a
    return table.to(device)


def gained(image: Tensor, seeds: Tensor, gain: float) -> Tensor:
    """`x (1 + a) + b` with a and b of each sample uniform in [-gain, gain]."""
    draw = (uniform(seeds, (2,), GAIN) * 2 - 1) * gain
    a, b = (column[:, None, None, None, None] for column in draw.unbind(1))
    return image * (1 + a) + b


def biased(
    image: Tensor,
    zero: Tensor,
    seeds: Tensor,
    known: Sequence[int],
    modality: Sequence[Sequence[str]],
    chance: float,
) -> Tensor:
    """Multiplies physical values of some samples by a smooth field, one for all their MR channels.

    Args:
        image: normalised, [B, C, D, H, W] float32; changed in place.
        zero: [B, C], the normalised value of a physical zero.
        seeds: int64 [B] on the device.
        known: the same seeds on the host.
        modality: of each channel of each sample; what is not MR stays.
        chance: that a sample has one.
    """
    low, high = COEFFICIENT
    host = torch.tensor(known, dtype=torch.int64)
    for i, (happens,) in enumerate(uniform(host, (1,), BIAS_FIELD).tolist()):
        channels = [c for c, name in enumerate(modality[i]) if name == "MR"]
        if happens >= chance or not channels:
            continue
        draws = uniform(seeds[i : i + 1], (1 + len(DEGREES),), BIAS_FIELD)[0, 1:]
        factor = bias_field(image.shape[2:], low + (high - low) * draws)
        for c in channels:
            image[i, c].sub_(zero[i, c]).mul_(factor).add_(zero[i, c])
    return image


def bias_field(size: Sequence[int], coefficients: Tensor) -> Tensor:
    """The exponential of a sum of products of Legendre polynomials over [-1, 1], [D, H, W].

    Args:
        size: (D, H, W).
        coefficients: of each of `DEGREES`.
    """
    d, h, w = (_legendre(n, coefficients) for n in size)
    planes = [torch.zeros_like(d[0][:, None] * h[0]) for _ in range(4)]
    for (i, j, k), coefficient in zip(DEGREES, coefficients, strict=True):
        planes[k].add_(coefficient * d[i][:, None] * h[j])
    # Sums, not a product of matrices, which mixed precision would round.
    total = planes[0][:, :, None] * w[0]
    for plane, row in zip(planes[1:], w[1:], strict=True):
        total.addcmul_(plane[:, :, None], row)
    return total.exp_()


def _legendre(count: int, like: Tensor) -> list[Tensor]:
    """The polynomials of degree 0 to 3 at as many places from -1 to 1; of one place, its middle."""
    end = float(count > 1)
    x = torch.linspace(-end, end, count, dtype=like.dtype, device=like.device)
    return [torch.ones_like(x), x, (3 * x**2 - 1) / 2, (5 * x**3 - 3 * x) / 2]


def varied(
    image: Tensor, valid: Tensor, seeds: Tensor, known: Sequence[int], chosen: AugmentSettings
) -> Tensor:
    """Changes the intensities of each sample as its seed says.

    Args:
        image: normalised, [B, C, D, H, W] float32; changed in place.
        valid: [B, 1, D, H, W].
        seeds: int64 [B] on the device.
        known: the same seeds on the host.
        chosen: the chances.
    """
    host = torch.tensor(known, dtype=torch.int64)
    for chance, stream, change in (
        (chosen.noise, NOISE, _noisy),
        (chosen.blur, BLUR, _blurred),
        (chosen.brightness, BRIGHTNESS, _brighter),
        (chosen.contrast, CONTRAST, _contrasted),
        (chosen.low_resolution, LOW_RESOLUTION, _coarsened),
        (chosen.inverted_gamma, INVERTED_GAMMA, _negative_gamma),
        (chosen.gamma, GAMMA, _gamma),
    ):
        if not chance:
            continue
        # Whether, then up to four numbers for each channel.
        draws = uniform(host, (1 + 4 * image.shape[1],), stream).tolist()
        for i, (happens, *numbers) in enumerate(draws):
            if happens < chance:
                table = [numbers[c : c + 4] for c in range(0, len(numbers), 4)]
                image[i] = change(image[i], valid[i], table, seeds[i : i + 1])
    return image


Numbers = list[list[float]]
"""Draws in [0, 1): four for each channel."""


def _within(bounds: tuple[float, float], number: float) -> float:
    return bounds[0] + (bounds[1] - bounds[0]) * number


def _around_one(bounds: tuple[float, float], number: float) -> float:
    """Below 1 as often as above, uniform on either side."""
    low, high = bounds
    return _within((low, 1.0), 2 * number) if number < 0.5 else _within((1.0, high), 2 * number - 1)


def _noisy(image: Tensor, valid: Tensor, numbers: Numbers, seed: Tensor) -> Tensor:
    """One field of Gaussian noise for all channels."""
    sd = _within(NOISE_SD, numbers[0][0])
    count = math.prod(image.shape[1:])
    # Box and Muller: two uniform numbers make two normal ones.
    u, v = uniform(seed, (2, (count + 1) // 2), NOISE_FIELD)[0].unbind(0)
    radius, angle = (-2 * torch.log1p(-u)).sqrt(), 2 * math.pi * v
    noise = torch.cat([radius * angle.cos(), radius * angle.sin()])[:count]
    return image + sd * noise.reshape(image.shape[1:])


def _blurred(image: Tensor, valid: Tensor, numbers: Numbers, seed: Tensor) -> Tensor:
    """A Gaussian of another width along each axis, for some channels."""

    def change(x: Tensor, draws: list[float]) -> Tensor:
        for axis, number in enumerate(draws):
            kernel = gaussian(_within(SIGMA, number), BLUR_RADIUS)
            x = convolved(x, kernel, axis - 3)
        return x

    return _some_channels(image, valid, numbers, change)


def _coarsened(image: Tensor, valid: Tensor, numbers: Numbers, seed: Tensor) -> Tensor:
    """Fewer voxels, each the nearest one, and back linearly, for some channels."""
    size = image.shape[1:]
    thin = thin_axes(size)

    def change(x: Tensor, draws: list[float]) -> Tensor:
        scale = _within(SHRUNK, draws[0])
        few = [n if t else max(1, round(n * scale)) for n, t in zip(size, thin, strict=True)]
        small = F.interpolate(x[None], few, mode="nearest-exact")
        return F.interpolate(small, list(size), mode="trilinear", align_corners=False)[0]

    return _some_channels(image, valid, numbers, change)


def _some_channels(
    image: Tensor,
    valid: Tensor,
    numbers: Numbers,
    change: Callable[[Tensor, list[float]], Tensor],
) -> Tensor:
    """Applies a weighted mean of voxels to some channels, over the valid ones alone."""
    weight = valid.float()
    channels = []
    for channel, (happens, *draws) in zip(image.split(1), numbers, strict=True):
        if happens < PER_CHANNEL:
            mean = change(channel * weight, draws) / change(weight, draws).clamp(min=TINY)
            channel = torch.where(valid, mean, channel)
        channels.append(channel)
    return torch.cat(channels)


def _brighter(image: Tensor, valid: Tensor, numbers: Numbers, seed: Tensor) -> Tensor:
    """Times a factor."""
    factors = [_within(FACTOR, draws[0]) for draws in numbers]
    return torch.stack([x * factor for x, factor in zip(image, factors, strict=True)])


def _contrasted(image: Tensor, valid: Tensor, numbers: Numbers, seed: Tensor) -> Tensor:
    """Away from the mean, or towards it, within the values that were there."""
    channels = []
    for x, draws in zip(image, numbers, strict=True):
        mean, _, low, high = _statistics(x, valid[0])
        changed = (x - mean) * _within(FACTOR, draws[0]) + mean
        channels.append(torch.minimum(torch.maximum(changed, low), high))
    return torch.stack(channels)


def _gamma(image: Tensor, valid: Tensor, numbers: Numbers, seed: Tensor) -> Tensor:
    """A power of the values between their ends; mean and deviation stay."""
    channels = []
    for x, draws in zip(image, numbers, strict=True):
        mean, sd, low, high = _statistics(x, valid[0])
        unit = ((x - low) / (high - low).clamp(min=TINY)).clamp(0, 1)
        changed = unit ** _around_one(EXPONENT, draws[0]) * (high - low) + low
        new_mean, new_sd, _, _ = _statistics(changed, valid[0])
        channels.append((changed - new_mean) * (sd / new_sd.clamp(min=TINY)) + mean)
    return torch.stack(channels)


def _negative_gamma(image: Tensor, valid: Tensor, numbers: Numbers, seed: Tensor) -> Tensor:
    return -_gamma(-image, valid, numbers, seed)


def _statistics(x: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean, deviation, least and largest of the valid voxels; zeros if there is none."""
    count = valid.sum().clamp(min=1)
    mean = torch.where(valid, x, 0.0).sum() / count
    inner = torch.where(valid, x, mean)
    sd = ((inner - mean) ** 2).sum().div(count).sqrt()
    return mean, sd, inner.amin(), inner.amax()
