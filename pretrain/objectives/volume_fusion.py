"""Volume Fusion: mix two crops block by block, and segment how much of each is in a voxel.

Wang et al. 2023, "MIS-FM", arXiv:2306.16925. A voxel of the fused volume is
X = (k/K) F + (1 - k/K) B, with F a foreground crop, B a background crop, and k in 0..K drawn for
each block; the network tells k, so pretraining is a segmentation with K + 1 classes, and the whole
network, its decoder too, starts a downstream segmentation.

Three forms, by name:

- `boxes`, as published in 2023 (version A): 10 to 40 boxes of mixed sizes with their centres
  anywhere in the crop, clipped at its borders, each with k from 1..K; later boxes overwrite earlier
  ones. F and B are crops of two volumes.
- `boxes_nnssl`, as nnssl does it: 10 to 39 boxes that lie fully inside, with sides from 8 voxels to
  5/8 of the crop and k from 0..K, so a box of 0 erases what lies beneath.
- `grid`, as PyMIC does it since (version B): one block size for the whole crop, a grid of such
  blocks at a random offset, floor(0.7 n) of the n blocks in the foreground with k from 1..K each. F
  and B are two crops of the same volume.

Sizes of the first and the third form were published for crops of 64x128x128. For another crop they
are scaled along each axis with its side and rounded (at least 1 voxel), so a box covers the same
share of any crop. Boxes have 8 to 40 voxels along d and 8 to 80 along h and w. The grid's blocks
are those of PyMIC's LUNA demo, 5 to 20 along d and 8 to 32 along h and w; where a config names no
sizes, PyMIC's class takes 8 to 32 along all three axes.

The reference takes the sample before in the batch as F, which depends on how a batch is split over
ranks, and is the sample itself in a batch of one. Here sample i of a rank's micro-batch of n goes
with sample i + n/2, and the other way round: ranks stride through the global batch, so these are
the same pairs for every number of ranks. (`accumulate` decides who is in a micro-batch, so it does
change them.)

Both crops are normalised alike, or their brightness alone would tell k. With `contrast`, each is
changed before the fusion as in the reference: a random pair of percentiles goes to 0.1 and 0.9 of
the grey range, a random gamma follows, and a quarter of the pairs is inverted, both crops together.
The reference leaves the result in [0, 1]; here it is spread over the range that the two crops had
together, so that the encoder is trained on the units that the release's preprocessing gives. The
reference's random zoom of crops (0.7 to 1.5 per axis) is not part of this objective.

Shape legend: B crops, S pairs, C channels, D H W voxels, M boxes or blocks, K coefficients above 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from pretrain.backbones.backbone import Backbone
from pretrain.crops import Crops
from pretrain.decoders import build_decoder, full_outputs
from pretrain.draws import uniform
from pretrain.losses import IGNORE, cross_entropy, dice_loss
from pretrain.objective import Batch, Losses, Objective

Form = Literal["boxes", "boxes_nnssl", "grid"]

REFERENCE_CROP = (64, 128, 128)
FOREGROUND_SHARE = 0.7

# Streams of `uniform`; no other use may share them.
_COUNT, _SIZE, _PLACE, _ORDER, _COEFFICIENT = 32, 33, 34, 35, 36
_PERCENTILE, _GAMMA, _INVERT = 37, 38, 39


class Sizes(NamedTuple):
    """Smallest and largest block along (d, h, w) in voxels, both included."""

    low: tuple[int, int, int]
    high: tuple[int, int, int]

    def scaled(self, shape: Sequence[int]) -> Sizes:
        """The same shares of a crop of another shape than the reference's, halves rounded up."""
        sides = list(zip(shape, REFERENCE_CROP, strict=True))

        def scale(sizes: tuple[int, int, int]) -> tuple[int, int, int]:
            d, h, w = (
                max(1, (2 * n * side + reference) // (2 * reference))
                for n, (side, reference) in zip(sizes, sides, strict=True)
            )
            return d, h, w

        return Sizes(scale(self.low), scale(self.high))


def _nnssl_sizes(shape: Sequence[int]) -> Sizes:
    """From 8 voxels to five eighths of the crop; crops below 13 voxels have but the largest."""
    d, h, w = (max(1, side * 5 // 8) for side in shape)
    return Sizes((min(8, d), min(8, h), min(8, w)), (d, h, w))


BOXES = Sizes((8, 8, 8), (40, 80, 80))
BLOCKS = Sizes((5, 8, 8), (20, 32, 32))


def draw_boxes(
    seeds: Tensor,
    shape: Sequence[int],
    coefficients: int,
    sizes: Sizes,
    *,
    counts: tuple[int, int] = (10, 40),
    lowest: int = 1,
    inside: bool = False,
) -> Tensor:
    """Labels of overlapping boxes, of which the later overwrites the earlier.

    Args:
        seeds: int64 [S].
        shape: voxels of the crop along (d, h, w).
        coefficients: K; a box has a label from lowest..K.
        sizes: of the boxes.
        counts: fewest and most boxes of a crop; at most 52, the bits of a float64.
        lowest: smallest label of a box: 1, or 0 for boxes that may erase.
        inside: boxes lie in the crop as a whole; else their centres do, and they are clipped.

    Returns:
        int64 [S, D, H, W] in 0..K.
    """
    most = counts[1]
    count = _integers(uniform(seeds, (1,), _COUNT), counts[0], most)  # [S, 1]
    size_draw, place_draw = uniform(seeds, (3, most), _SIZE), uniform(seeds, (3, most), _PLACE)
    label = _integers(uniform(seeds, (most,), _COEFFICIENT), lowest, coefficients)  # [S, M]
    # Bit m of `cover` says whether box m covers a voxel, so the highest bit is the last writer.
    box = torch.arange(most, device=seeds.device)
    bit = torch.where(box < count, torch.ones_like(box) << box, 0)[:, :, None]  # [S, M, 1]
    covers = []
    for axis, side in enumerate(shape):
        size = _integers(size_draw[:, axis], sizes.low[axis], sizes.high[axis])  # [S, M]
        if inside:
            start = _integers(place_draw[:, axis], 0, side - size)
        else:
            start = _integers(place_draw[:, axis], 0, side - 1) - size // 2
        voxel = torch.arange(side, device=seeds.device)
        within = (voxel >= start[..., None]) & (voxel < (start + size)[..., None])  # [S, M, side]
        covers.append(torch.where(within, bit, 0).sum(1))  # [S, side]
    d, h, w = covers
    cover = d[:, :, None, None] & h[:, None, :, None] & w[:, None, None, :]  # [S, D, H, W]
    last = torch.frexp(cover.double()).exponent.long()  # 1 + the highest bit; 0 where there is none
    table = torch.cat([torch.zeros_like(label[:, :1]), label], dim=1)  # [S, 1 + M]
    return table.gather(1, last.flatten(1)).view_as(last)


def draw_grid(
    seeds: Tensor,
    shape: Sequence[int],
    coefficients: int,
    sizes: Sizes,
    *,
    share: float = FOREGROUND_SHARE,
) -> Tensor:
    """Labels of a grid of equal blocks, a fixed share of which is foreground.

    A side of n voxels holds n // b whole blocks of b voxels from an offset in 0..(n mod b).

    Args:
        seeds: int64 [S].
        shape: voxels of the crop along (d, h, w).
        coefficients: K; a foreground block has a label from 1..K.
        sizes: of the blocks of a crop, all alike.
        share: of the n blocks floor(share * n) are foreground (exactly: 63 of 90 at 0.7, where
            floating point alone would give 62).

    Returns:
        int64 [S, D, H, W] in 0..K; 0 outside the grid too.
    """
    size_draw, place_draw = uniform(seeds, (3,), _SIZE), uniform(seeds, (3,), _PLACE)
    most = 1
    total = torch.ones_like(seeds)  # [S] blocks of the grid
    block = torch.zeros_like(seeds)[:, None, None, None]  # becomes [S, D, H, W]
    within = torch.ones_like(block, dtype=torch.bool)
    for axis, side in enumerate(shape):
        size = _integers(size_draw[:, axis], sizes.low[axis], sizes.high[axis])  # [S]
        number = side // size
        offset = _integers(place_draw[:, axis], 0, side % size)
        cell = torch.arange(side, device=seeds.device) - offset[:, None]  # [S, side]
        view = [len(seeds), 1, 1, 1]
        view[1 + axis] = side
        within = within & ((cell >= 0) & (cell < (number * size)[:, None])).view(view)
        along = cell.div(size[:, None], rounding_mode="floor").view(view)
        block = block * number[:, None, None, None] + along
        total = total * number
        most *= side // sizes.low[axis]
    noise = uniform(seeds, (most,), _ORDER)  # [S, M]
    index = torch.arange(most, device=seeds.device)
    noise = torch.where(index < total[:, None], noise, 2.0)  # blocks that do not exist come last
    order = noise.argsort(dim=1, stable=True)
    chosen = (total.double() * share + 1e-6).floor().long()[:, None]  # [S, 1]
    foreground = torch.zeros_like(order).scatter(1, order, (index < chosen).long())
    label = foreground * _integers(uniform(seeds, (most,), _COEFFICIENT), 1, coefficients)
    block = torch.where(within, block, 0)
    return torch.where(within, label.gather(1, block.flatten(1)).view_as(block), 0)


def _integers(draw: Tensor, low: int | Tensor, high: int | Tensor) -> Tensor:
    """Uniform numbers in [0, 1) to integers in low..high, both included."""
    # A draw has 24 bits, so a product with a range below 2^24 never rounds up to the range.
    return low + (draw * (high - low + 1)).floor().long()


def fuse(foreground: Tensor, background: Tensor, label: Tensor, coefficients: int) -> Tensor:
    """X = (k/K) F + (1 - k/K) B for k = label; exactly B where it is 0 and exactly F where it is K.

    Args:
        foreground: F [S, C, D, H, W].
        background: B [S, C, D, H, W].
        label: integer [S, D, H, W] in 0..K.
        coefficients: K.
    """
    weight = (label[:, None].to(background.dtype) / coefficients).expand_as(background)
    # `lerp` is exact at both ends and gives back what F and B agree on; the sum of products is not.
    return torch.lerp(background, foreground, weight)


def stretch(image: Tensor, valid: Tensor, seeds: Tensor) -> Tensor:
    """Random contrast of each crop: percentiles to 0.1 and 0.9, then a gamma.

    The lower percentile is uniform in 0.1..2, the upper in 98..99.9, the exponent in 0.7..1.5; the
    tails go linearly to 0 and 1. All channels share the draws and have percentiles of their own.
    Percentiles are those of every s-th valid voxel, with the odd s that leaves about 2^16 of them.

    Args:
        image: [B, C, D, H, W].
        valid: bool [B, 1, D, H, W]; other voxels do not count.
        seeds: int64 [B].

    Returns:
        [B, C, D, H, W] in [0, 1]; a crop without any contrast becomes constant.
    """
    draw = uniform(seeds, (2,), _PERCENTILE)
    shares = torch.stack([0.001 + 0.019 * draw[:, 0], 0.98 + 0.019 * draw[:, 1]], dim=1)  # [B, 2]
    lowest, highest = (bound[..., None] for bound in _range(image, valid))  # [B, C, 1]
    values = image.flatten(2)  # [B, C, N]
    p0, p1 = _percentiles(values, valid.flatten(2), shares).unbind(-1)  # [B, C]
    p0, p1 = p0[..., None], p1[..., None]
    middle = 0.1 + 0.8 * _share(values, p0, p1)
    low, high = 0.1 * _share(values, lowest, p0), 0.9 + 0.1 * _share(values, p1, highest)
    out = torch.where(values < p0, low, torch.where(values > p1, high, middle))
    gamma = 0.7 + 0.8 * uniform(seeds, (1, 1), _GAMMA)  # [B, 1, 1]
    return out.pow(gamma).view_as(image)


def _share(values: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Where values lie between two bounds, 0 to 1; 0 if the bounds are one."""
    span = high - low
    return torch.where(span > 0, (values - low) / torch.where(span > 0, span, 1.0), 0.0).clamp(0, 1)


def _range(image: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Lowest and highest valid value of each channel, both [B, C]; 0 where nothing is valid."""
    low = torch.where(valid, image, torch.inf).amin((2, 3, 4))
    high = torch.where(valid, image, -torch.inf).amax((2, 3, 4))
    some = valid.flatten(2).any(2)
    return torch.where(some, low, 0.0), torch.where(some, high, 0.0)


def _percentiles(values: Tensor, valid: Tensor, shares: Tensor) -> Tensor:
    """Interpolated quantiles [B, C, Q] of [B, C, N] at shares [B, Q], over the valid voxels."""
    step = max(1, values.shape[2] // 2**16) | 1  # odd: else whole columns would never be seen
    sample, counts = values[..., ::step], valid[..., ::step]
    ranked = torch.where(counts, sample, torch.inf).sort(dim=2).values
    last = (counts.sum(2, keepdim=True) - 1).clamp(min=0)  # [B, 1, 1]
    place = (shares[:, None] * last).expand(-1, values.shape[1], -1)  # [B, C, Q]
    below = place.floor().long()
    above = torch.minimum(below + 1, last)
    found = torch.lerp(ranked.gather(2, below), ranked.gather(2, above), place - below)
    return torch.where(found.isfinite(), found, 0.0)  # no voxel of the sample is valid


class Fused(NamedTuple):
    """What the network sees and what it is to tell: image [S, C, D, H, W], target [S, D, H, W]."""

    image: Tensor
    label: Tensor
    target: Tensor


class VolumeFusion(Objective):
    """Segments the mixing coefficients of fused crops, with Dice and cross-entropy.

    Dice counts background, as both references do. Each pair has its own by default, as in nnssl:
    then the loss does not depend on who else is in the batch; PyMIC sums over the batch. PyMIC
    weighs both losses 0.5, nnssl 1. A decoder that has outputs at several scales (PCT-Net) learns
    at all of them: each is interpolated to the crop, and the losses are averaged.

    Args:
        encoder: any backbone; its decoder is the one that segmentation takes.
        form: how labels are drawn and which crops are mixed.
        coefficients: K, the number of coefficients above 0.
        contrast: change the contrast of both crops before they are mixed.
        dice_weight: of Dice.
        entropy_weight: of the cross-entropy.
        batch_dice: sum Dice over the batch before dividing.
    """

    transfers = "network"

    def __init__(
        self,
        *,
        encoder: Backbone,
        form: Form = "boxes",
        coefficients: Annotated[int, Field(ge=1, le=64)] = 4,
        contrast: bool = True,
        dice_weight: Annotated[float, Field(ge=0, le=100)] = 0.5,
        entropy_weight: Annotated[float, Field(ge=0, le=100)] = 0.5,
        batch_dice: bool = False,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = build_decoder(encoder, coefficients + 1)
        self.form = form
        self.coefficients = coefficients
        self.contrast = contrast
        self.dice_weight = dice_weight
        self.entropy_weight = entropy_weight
        self.batch_dice = self.mixes = batch_dice
        self.crops = Crops(2 if form == "grid" else 1)
        self.batch_multiple = 1 if form == "grid" else 2

    def forward(self, batch: Batch, progress: float) -> Losses:
        """Returns the weighted Dice and cross-entropy over voxels that are valid in both crops.

        Raises:
            ValueError: if the crops do not come in pairs.
        """
        if len(batch.image) % 2:
            raise ValueError(f"crops are fused in pairs, found {len(batch.image)} of them")
        fused = self.fused(batch)
        outputs = full_outputs(self.decoder, fused.image, self.encoder(fused.image))
        dices = [
            dice_loss(x.float(), fused.target, background=True, over_batch=self.batch_dice)
            for x in outputs
        ]
        dice = torch.stack(dices).mean()
        entropy = torch.stack([cross_entropy(x.float(), fused.target) for x in outputs]).mean()
        loss = self.dice_weight * dice + self.entropy_weight * entropy
        return Losses(loss, {"dice": dice.detach(), "cross_entropy": entropy.detach()})

    def fused(self, batch: Batch) -> Fused:
        """Pairs and fuses the crops of a batch; the target is the label, or -1 where not valid."""
        image, valid = batch.image.float(), batch.valid
        changed = stretch(image, valid, batch.seeds) if self.contrast else image
        background, foreground = self._pair(changed)
        behind, before = self._pair(valid)
        seeds, _ = self._pair(batch.seeds)
        valid = behind & before  # [S, 1, D, H, W]
        if self.contrast:
            invert = uniform(seeds, (1, 1, 1, 1), _INVERT) < 0.25
            background = torch.where(invert, 1 - background, background)
            foreground = torch.where(invert, 1 - foreground, foreground)
            low, high = self._joint_range(image, batch.valid)
            background = low + (high - low) * background
            foreground = low + (high - low) * foreground
        label = self.draw(seeds, image.shape[2:])
        fused = fuse(foreground, background, label, self.coefficients)
        return Fused(fused, label, label.masked_fill(~valid[:, 0], IGNORE))

    def draw(self, seeds: Tensor, shape: Sequence[int]) -> Tensor:
        """The label [S, D, H, W] of each pair, with sizes scaled to the crop."""
        if self.form == "grid":
            return draw_grid(seeds, shape, self.coefficients, BLOCKS.scaled(shape))
        if self.form == "boxes_nnssl":
            sizes = _nnssl_sizes(shape)
            return draw_boxes(
                seeds, shape, self.coefficients, sizes, counts=(10, 39), lowest=0, inside=True
            )
        return draw_boxes(seeds, shape, self.coefficients, BOXES.scaled(shape))

    def _pair(self, crops: Tensor) -> tuple[Tensor, Tensor]:
        """Background and foreground of each pair, from what is given for each crop [B, ...]."""
        if self.form == "grid":
            first, second = crops.unflatten(0, (-1, 2)).unbind(1)
            return first, second
        return crops, crops.roll(-(len(crops) // 2), 0)

    def _joint_range(self, image: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Lowest and highest value of both crops of each pair, [S, C, 1, 1, 1]."""
        lows, highs = _range(image, valid)
        low, high = torch.minimum(*self._pair(lows)), torch.maximum(*self._pair(highs))
        return low[..., None, None, None], high[..., None, None, None]

    @torch.no_grad()
    def preview(self, batch: Batch) -> dict[str, Tensor]:
        """Returns "fused", "label" and "predicted" [S, 1 or C, D, H, W].

        Classes are grey: k/K of the way from the darkest to the brightest voxel of the fused
        volume. A batch of one crop has no partner for it and shows nothing.
        """
        if len(batch.image) < 2:
            return {}
        fused = self.fused(batch)
        logits = self.decoder(fused.image, self.encoder(fused.image))
        low = fused.image.amin((1, 2, 3, 4), keepdim=True)
        span = fused.image.amax((1, 2, 3, 4), keepdim=True) - low

        def grey(classes: Tensor) -> Tensor:
            return low + span * classes[:, None] / self.coefficients

        return {
            "fused": fused.image,
            "label": grey(fused.label),
            "predicted": grey(logits.argmax(1)),
        }
