"""Masked modelling with a U-Net: blank blocks of the input, rebuild their voxels.

The plain MAE of nnssl (Wald et al. 2024, "Revisiting MAE pre-training for 3D medical image
segmentation", arXiv:2410.23132): blocks of voxels are set to 0 of the normalised image, an
encoder-decoder with skips sees what is left, and the loss is the mean squared error over hidden
voxels, raw and over the whole batch. Convolutions slide over the blanks, so hidden voxels are
known to be hidden but their values are not seen. With z-scored MRI 0 means average tissue, with
CT windowed to [-1, 1] the middle of the window.

nnssl hides floor(ratio * N) of N blocks, this shows floor((1 - ratio) * N) as all masks here do:
the same at its 750 of 1000, one block more hidden where the product is not whole. nnssl divides by
hidden voxels, this by hidden values: the same for one channel.

Shape legend: B batch, C channels, D H W voxels.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from data_prep.errors import InputError
from pretrain.backbones.backbone import Backbone
from pretrain.decoders import unet_decoder
from pretrain.losses import masked_mse
from pretrain.masking import block_hidden, shown
from pretrain.objective import Batch, Losses, Objective


class CnnMAE(Objective):
    """Masked blocks into a U-Net.

    The decoder is a U-Net's. For ResEnc and the plain U-Net it is the one that segmentation uses,
    so all of it but its last layer can be transferred along with the encoder; PCT-Net, STU-Net and
    SwinUNETR have their own there.

    Args:
        encoder: a backbone whose feature maps form a pyramid, as those of all but ViTs do.
        block: voxels of a hidden block, one number or (d, h, w).
        mask_ratio: share of the blocks to hide.
        convs_per_stage: convolutions of each decoder stage; None: as finetuning has them.

    Raises:
        InputError: if the encoder's feature maps do not form a pyramid.
    """

    encoder: Backbone

    def __init__(
        self,
        *,
        encoder: Backbone,
        block: Annotated[int, Field(ge=1)]
        | tuple[
            Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]
        ] = 16,
        mask_ratio: Annotated[float, Field(gt=0, lt=1)] = 0.75,
        convs_per_stage: Annotated[int, Field(ge=1)] | None = None,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        try:
            self.decoder = unet_decoder(encoder, encoder.in_channels, convs_per_stage)
        except ValueError as error:
            raise InputError(
                f"objective=cnn_mae needs a pyramid of feature maps and {type(encoder).__name__} "
                "has none: choose a CNN, such as backbone=resenc_small, or objective=mae"
            ) from error
        self.block = block
        self.mask_ratio = mask_ratio

    def forward(self, batch: Batch, progress: float) -> Losses:
        """Returns the mean squared error over hidden, valid voxels."""
        hidden, output = self.predict(batch)
        counted = (hidden & batch.valid).expand_as(output)
        loss = masked_mse(output, batch.image, counted)
        return Losses(loss, {"mse": loss.detach()})

    def predict(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Returns the mask, bool [B, 1, D, H, W], and the rebuilt image [B, C, D, H, W]."""
        shape = batch.image.shape[2:]
        hidden = block_hidden(batch.seeds, shape, self.block, self.mask_ratio)
        seen = batch.image.masked_fill(hidden, 0.0)
        return hidden, self.decoder(seen, self.encoder(seen))

    @torch.no_grad()
    def preview(self, batch: Batch) -> dict[str, Tensor]:
        """Returns "input", "visible" (hidden voxels NaN) and "output", in units of the input.

        The output shows the prediction in hidden blocks and the input elsewhere.
        """
        hidden, output = self.predict(batch)
        return shown(batch.image, hidden, output)
