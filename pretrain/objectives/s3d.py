"""Sparse masked modelling with a U-Net: an encoder that never reads hidden voxels.

S3D (Wald et al. 2024, "Revisiting MAE pre-training for 3D medical image segmentation",
arXiv:2410.23132), which is SparK (Tian et al. 2023, "Designing BERT for convolutional networks",
arXiv:2301.03580) in 3D. A plain CNN lets blanks erode what is visible: convolutions smear them
inwards and norm statistics drown in them. Here the encoder works on visible cells only; then each
scale is made dense again with a learned token where nothing was seen, and an ordinary U-Net decoder
rebuilds the voxels. The loss is the mean squared error over hidden voxels of the batch.

Where the sources differ:

- nnssl blanks the outputs of convolutions but not the image, so that a visible voxel at the rim of
  a block reads one voxel of its hidden neighbour. SparK blanks the image too, and so does this.
- nnssl hides 0.75 of the blocks and rebuilds raw voxels (the defaults); SparK hides 0.6 and
  rebuilds each block normalised by its own mean and variance (`mask_ratio`, `norm_target`).
- nnssl has two cheaper ways back to dense maps (`densify`).
- SparK's blocks are as large as the encoder's total stride. nnssl's are smaller; what is coarser
  than a block is then dense, and has no token.
- nnssl's norm on the way back has no weights, SparK's has.

Shape legend: B batch, C channels, D H W voxels, N blocks, P = C * bd * bh * bw values of one.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from data_prep.errors import InputError
from pretrain.backbones.backbone import Backbone, fitting_crop
from pretrain.backbones.convolution import InstanceNorm, Pyramid
from pretrain.decoders import unet_decoder
from pretrain.losses import masked_mse
from pretrain.masking import enlarge, patchify, random_hidden, shown, triple, unpatchify
from pretrain.objective import Batch, Losses, Objective
from pretrain.objectives.masked_patches import (
    PatchStatistics,
    constant,
    denormalise,
    normalise,
    patch_statistics,
)

Densification = Literal["conv", "token", "none"]


class Densify(nn.Module):
    """One scale from sparse to dense: norm of what is visible, a token elsewhere, a convolution.

    Args:
        channels: of the map.
        token: whether some of its cells are hidden, so that it needs a token.
        convolve: whether the norm before and the convolution after the token are there.
        project: whether the convolution is more than the identity.
    """

    def __init__(self, channels: int, *, token: bool, convolve: bool, project: bool) -> None:
        super().__init__()
        self.norm = InstanceNorm(channels) if convolve else None
        # One-dimensional, so that it is spared from weight decay as biases and norms are.
        self.token = nn.Parameter(torch.empty(channels)) if token else None
        if self.token is not None:
            nn.init.trunc_normal_(self.token, std=0.02, a=-0.02, b=0.02)
        self.conv = nn.Conv3d(channels, channels, 3, 1, 1) if convolve and project else None

    def forward(self, x: Tensor, visible: Tensor | None) -> Tensor:
        """Fills a map [B, C, D, H, W] where `visible`, bool [B, 1, D, H, W], is False."""
        if self.norm is not None:
            x = self.norm(x, visible)
        if self.token is not None and visible is not None:
            x = torch.where(visible, x, self.token.to(x.dtype).view(-1, 1, 1, 1))
        return x if self.conv is None else self.conv(x)


class S3D(Objective):
    """Sparse masked modelling with a convolutional encoder.

    Args:
        encoder: a backbone that leaves hidden blocks out (ResEncUNetEncoder, UNetEncoder).
        block: voxels of a hidden block, one number or (d, h, w); it must divide the crop, and be a
            multiple of every stride of the encoder that is no larger.
        mask_ratio: share of the blocks to hide.
        norm_target: predict blocks normalised by their own mean and variance instead of raw voxels.
        densify: what becomes of hidden cells before the decoder. "conv": norm, token, 3x3x3
            convolution (the identity at the finest scale), as in nnssl's S3D; "token": the token
            alone (its efficient variant); "none": they stay zero (its variant without token).
        convs_per_stage: convolutions of each decoder stage; None: as finetuning has them.

    Raises:
        InputError: if the encoder cannot leave blocks out or its maps do not form a pyramid.
    """

    encoder: Pyramid

    def __init__(
        self,
        *,
        encoder: Backbone,
        block: Annotated[int, Field(ge=1)]
        | tuple[
            Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]
        ] = 16,
        mask_ratio: Annotated[float, Field(gt=0, lt=1)] = 0.75,
        norm_target: bool = False,
        densify: Densification = "conv",
        convs_per_stage: Annotated[int, Field(ge=1)] | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(encoder, Pyramid):
            raise InputError(
                f"objective=s3d leaves hidden blocks out of convolutions and "
                f"{type(encoder).__name__} has none that could: choose a CNN, such as "
                "backbone=resenc_small, or objective=mae"
            )
        self.encoder = encoder
        self.block = triple(block)
        self.mask_ratio = mask_ratio
        self.norm_target = norm_target
        try:
            self.decoder = unet_decoder(encoder, encoder.in_channels, convs_per_stage)
        except ValueError as error:
            raise InputError(f"objective=s3d: {error}; choose other backbone.strides") from error
        self.densify = nn.ModuleList(
            Densify(
                channels,
                # A parameter that no gradient reaches would stop a distributed run.
                token=densify != "none"
                and all(s <= b for s, b in zip(stride, self.block, strict=True)),
                convolve=densify == "conv",
                project=scale > 0,
            )
            for scale, (channels, stride) in enumerate(
                zip(encoder.channels, encoder.strides, strict=True)
            )
        )

    def forward(self, batch: Batch, progress: float) -> Losses:
        """Returns the mean squared error over hidden, valid voxels."""
        hidden, output = self.predict(batch)
        target = batch.image.float()
        parts: dict[str, Tensor] = {}
        if self.norm_target:
            statistics = self._statistics(batch)
            rows = normalise(self._rows(target), statistics)
            target = unpatchify(rows, self._grid(target), self.block)
            # [B, N, 1]; a block of padding alone is none of the scan.
            blocks = self._rows(hidden & batch.valid).any(-1, keepdim=True)
            shares = (constant(statistics) & blocks).sum() / blocks.sum().clamp(min=1)
            parts["constant_patches"] = shares
        counted = (hidden & batch.valid).expand_as(output)
        loss = masked_mse(output, target, counted)
        return Losses(loss, {"mse": loss.detach(), **parts})

    def predict(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Returns the mask, bool [B, 1, D, H, W], and the rebuilt target [B, C, D, H, W]."""
        grid = self._grid(batch.image)
        blocks = random_hidden(batch.seeds, grid, self.mask_ratio).view(-1, 1, *grid)
        maps = self.encoder(batch.image, blocks)
        visible = self.encoder.visible(blocks, batch.image.shape)
        dense = [
            fill(found, seen) for fill, found, seen in zip(self.densify, maps, visible, strict=True)
        ]
        return enlarge(blocks, self.block), self.decoder(batch.image, dense)

    @torch.no_grad()
    def preview(self, batch: Batch) -> dict[str, Tensor]:
        """Returns "input", "visible" (hidden voxels NaN) and "output", in units of the input.

        The output shows the prediction in hidden blocks and the input elsewhere. A normalised
        prediction gets the mean and the spread of the true block.
        """
        hidden, output = self.predict(batch)
        output = output.float()
        if self.norm_target:
            rows = denormalise(self._rows(output), self._statistics(batch))
            output = unpatchify(rows, self._grid(output), self.block)
        return shown(batch.image, hidden, output)

    def _grid(self, image: Tensor) -> tuple[int, int, int]:
        """Blocks of a crop along (d, h, w)."""
        shape = [int(s) for s in image.shape[2:]]
        if any(s % b for s, b in zip(shape, self.block, strict=True)):
            strides = self.encoder.strides[-1]
            units = [math.lcm(b, s) for b, s in zip(self.block, strides, strict=True)]
            raise ValueError(
                f"blocks of {list(self.block)} voxels do not divide a crop of {shape} voxels; "
                f"change objective.block or crop_size, for example to {fitting_crop(shape, units)}"
            )
        return triple([s // b for s, b in zip(shape, self.block, strict=True)])

    def _rows(self, volume: Tensor) -> Tensor:
        """A volume [B, C, D, H, W] as blocks [B, N, P]."""
        return patchify(volume, self.block)

    def _statistics(self, batch: Batch) -> PatchStatistics:
        """Mean and variance [B, N, 1] of each block over its valid voxels."""
        valid = batch.valid.expand_as(batch.image)
        return patch_statistics(self._rows(batch.image.float()), self._rows(valid))
