"""Global and local contrast of volumes whose anatomy is aligned, in two stages.

Chaitanya et al. 2020, arXiv:2006.10511, there for slices: volumes of one body part are cut into
partitions along the body, and partition p of two volumes shows similar anatomy. Stage one trains
the encoder: crops of different partitions are told apart. Stage two keeps the encoder as it is and
trains the first blocks of a U-Net's decoder: regions of their map are told apart. Finetuning takes
over the encoder after stage one, and these blocks as well after stage two.

In 3D a partition is a slab of the volume, one crop of which is taken, and a region is a cube.
The heads there: g1 flattens the deepest map, so it fits one crop size alone, here it takes the mean
as all heads of this package do; g2 has batch norm, here an instance norm, so that no crop depends
on another. Running statistics of a frozen encoder's batch norms stay as they are; there they go on
moving. Set sizes follow from the batch; see `pretrain.contrast`.

`experiment=contrastive` runs both stages.

Shape legend: V volumes, P slabs of each, C channels, R regions of a map, E width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from data_prep.errors import InputError
from pretrain.backbones.backbone import Backbone
from pretrain.contrast import (
    Lattice,
    local_contrast,
    partition_contrast,
    region_lattice,
    take_regions,
)
from pretrain.crops import Slabs
from pretrain.decoders import UNetDecoder, build_decoder, first_blocks
from pretrain.objective import Batch, Losses, Objective
from pretrain.projection import Pool, Projector, by_sample

SlabCount = Annotated[int, Field(ge=2, le=64)]
Temperature = Annotated[float, Field(gt=0, le=10)]


class GlobalContrast(Objective):
    """Stage one: the encoder tells the slabs of volumes apart.

    Args:
        encoder: any backbone.
        slabs: P, into which each volume is cut.
        across: whether the same slab of two volumes is a positive (G^D) or merely no negative
            (G^D-).
        temperature: of the similarities.
        hidden_dim: width of the head's middle.
        out_dim: E.
    """

    encoder: Backbone
    compares = True

    def __init__(
        self,
        *,
        encoder: Backbone,
        slabs: SlabCount = 4,
        across: bool = True,
        temperature: Temperature = 0.1,
        hidden_dim: Annotated[int, Field(ge=1, le=16384)] = 1024,
        out_dim: Annotated[int, Field(ge=2, le=4096)] = 128,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.crops = Slabs(count=slabs)
        self.across = across
        self.temperature = temperature
        self.pool = Pool(encoder)
        self.projector = Projector(self.pool.width, hidden_dim, out_dim, bias=False)

    def forward(self, batch: Batch, progress: float) -> Losses:
        """The mean loss over anchors and their positives."""
        embedded = self.projector(self.pool(self.encoder(batch.image)))
        first, second = _views(embedded, self.crops.count)  # [V, P, E] each
        loss = partition_contrast(first, second, self.temperature, across=self.across)
        return Losses(loss, {"partition_contrast": loss.detach()})


class LocalContrast(Objective):
    """Stage two: the first blocks of the decoder tell regions of their map apart.

    The encoder is frozen and in evaluation mode. The decoder is the one that segmentation puts on
    the encoder; what lies behind `blocks` is not trained, and no release has it.

    Args:
        encoder: with the weights of stage one, a backbone that segmentation gives a U-Net's
            decoder (ResEncUNetEncoder, UNetEncoder).
        blocks: of the decoder that are trained, from the coarsest.
        region: cells of a region along each axis.
        slabs: P, into which each volume is cut.
        across: whether the same region of the same slab of two volumes is a positive (L^D) or
            plays no part (L^R). Regions of two volumes are the same place only where these lie
            alike: without mirrors (`flip`), turns and zoom (`augment`).
        temperature: of the similarities.
        out_dim: E.

    Raises:
        InputError: the encoder has another decoder, or not that many blocks.
    """

    encoder: Backbone
    transfers = "network"

    def __init__(
        self,
        *,
        encoder: Backbone,
        blocks: Annotated[int, Field(ge=1, le=16)] = 3,
        region: Annotated[int, Field(ge=1, le=16)] = 3,
        slabs: SlabCount = 4,
        across: bool = False,
        temperature: Temperature = 0.1,
        out_dim: Annotated[int, Field(ge=2, le=4096)] = 128,
    ) -> None:
        super().__init__()
        self.encoder = encoder.requires_grad_(False)
        self.decoder = _unet(encoder)
        self.blocks = self.decoder_blocks = blocks
        available = len(self.decoder.stages)
        if blocks > available:
            raise InputError(
                f"objective.blocks={blocks}: the decoder of this encoder has {available} blocks; "
                "give that many or fewer"
            )
        trained = first_blocks(dict(self.decoder.named_parameters()), blocks)
        for name, parameter in self.decoder.named_parameters():
            parameter.requires_grad_(name in trained)
        self.crops = Slabs(count=slabs, aligned=True)
        self.region = region
        self.compares = self.across = across
        self.temperature = temperature
        width = encoder.channels[-1 - blocks]
        self.projector = nn.Sequential(
            nn.Conv3d(width, width, 1, bias=False),
            nn.InstanceNorm3d(width, affine=True),
            nn.ReLU(),
            nn.Conv3d(width, width, 1, bias=False),
        )
        self.region_projector = nn.Linear(width * region**3, out_dim, bias=False)

    def train(self, mode: bool = True) -> LocalContrast:
        """As every module's; the encoder stays in evaluation mode."""
        super().train(mode)
        self.encoder.eval()
        return self

    def compile_parts(self) -> list[nn.Module]:
        """Returns what a step calls; the rest of the decoder is never run."""
        blocks = self.blocks
        used = [*self.decoder.transpconvs[:blocks], *self.decoder.stages[:blocks]]
        return [*self.encoder.compile_parts(), *used, self.projector]

    def forward(self, batch: Batch, progress: float) -> Losses:
        """The mean loss over regions and pairs of maps.

        Raises:
            ValueError: the map is too small for its regions; it says which crop or blocks would do.
        """
        with torch.no_grad():
            features = self.encoder(batch.image)
        x = self.projector(self.decoder.decoded(features, self.blocks)[0])
        lattice = self._lattice(x, batch.image.shape[2:])
        regions = self.region_projector(take_regions(x, lattice.starts, self.region))  # [., R, E]
        first, second = _views(regions, self.crops.count)  # [V, P, R, E] each
        loss = local_contrast(
            first, second, lattice.neighbours, self.temperature, across=self.across
        )
        return Losses(loss, {"local_contrast": loss.detach()})

    def _lattice(self, x: Tensor, crop: Sequence[int]) -> Lattice:
        try:
            return region_lattice(x.shape[2:], self.region, device=x.device)
        except ValueError as error:
            raise ValueError(f"{error}: {self._advice(crop)}") from error

    def _advice(self, crop: Sequence[int]) -> str:
        """What would do in place of these blocks and this crop."""
        grids = self.encoder.grids(crop)
        fitting = []
        for blocks in range(1, len(self.decoder.stages) + 1):
            try:
                region_lattice(grids[-1 - blocks], self.region)
            except ValueError:
                continue
            fitting.append(f"objective.blocks={blocks}")
        # Sides that the encoder takes, with room for the regions in the map of these blocks.
        unit, stride = self.encoder.strides[-1], self.encoder.strides[-1 - self.blocks]
        longest = max(range(3), key=lambda axis: crop[axis] / stride[axis])
        sides = []
        for axis in range(3):
            room = (5 if axis == longest else 3) * self.region * stride[axis]
            sides.append(math.ceil(max(room, crop[axis]) / unit[axis]) * unit[axis])
        larger = f"crop_size=[{','.join(map(str, sides))}]"
        return f"give {' or '.join([larger, *fitting])}"


def _views(rows: Tensor, slabs: int) -> tuple[Tensor, Tensor]:
    """Rows of crops to the slabs of both views, [V, P, ...] each."""
    first, second = by_sample(by_sample(rows, slabs), 2).unbind(1)
    return first, second


def _unet(encoder: Backbone) -> UNetDecoder:
    """The decoder of segmentation; its outputs do not matter here.

    Raises:
        InputError: it is no U-Net's.
    """
    fits = "choose a CNN, such as backbone=resenc_small"
    try:
        decoder = build_decoder(encoder, encoder.in_channels)
    except (ValueError, InputError) as error:
        raise InputError(f"objective=contrastive_local: {error}; {fits}") from error
    if not isinstance(decoder, UNetDecoder):
        raise InputError(
            f"objective=contrastive_local trains the first blocks of a U-Net's decoder, and "
            f"{type(encoder).__name__} has a {type(decoder).__name__}: {fits}; "
            "objective=contrastive_global takes any"
        )
    return decoder
