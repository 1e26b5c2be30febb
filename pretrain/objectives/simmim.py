"""SimMIM: put a token in place of hidden patches and read their voxels off the encoder's output.

Xie et al. 2021, arXiv:2111.09886. The encoder sees all tokens, of which those of hidden patches are
one learned vector, put in place before the position is added; a single linear layer predicts raw
voxels, and the loss is the mean absolute error over hidden ones. Hidden blocks may be larger than a
patch: 32 voxels on patches of 16, share 0.6, in the paper.

nnssl's SimMIM for Primus differs in all of that (`objective=simmim_primus`): blocks of one patch,
share 0.75, squared error, transposed convolutions for a head.

Shape legend: B batch, C channels, N patches, E width, P = C * pd * ph * pw values of a patch.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from data_prep.errors import InputError
from pretrain.backbones.backbone import Backbone
from pretrain.backbones.vit import TokenBackbone, as_tokens, init_transformer
from pretrain.decoders import PatchDecoder
from pretrain.losses import masked_l1, masked_mse
from pretrain.masking import block_hidden, shown, spread, triple, unpatchify
from pretrain.objective import Batch, Losses, Objective

Voxels = Annotated[int, Field(ge=1)]


class SimMIM(Objective):
    """Masked image modelling with a mask token at the input and a light head.

    Args:
        encoder: a backbone with tokens (ViT3D, SliceViT).
        block: voxels of a hidden block, one number or (d, h, w); a multiple of the patch. Where
            blocks do not divide the crop, the last ones are cut.
        mask_ratio: share of the blocks to hide.
        error: l1 or mse.
        head: linear, or patch, the transposed convolutions of Primus.

    Raises:
        InputError: if the encoder has no tokens, its patch does not divide the block, or the head
            cannot reach the patch by doubling.
    """

    encoder: TokenBackbone

    def __init__(
        self,
        *,
        encoder: Backbone,
        block: Voxels | tuple[Voxels, Voxels, Voxels] = 32,
        mask_ratio: Annotated[float, Field(gt=0, lt=1)] = 0.6,
        error: Literal["l1", "mse"] = "l1",
        head: Literal["linear", "patch"] = "linear",
    ) -> None:
        super().__init__()
        self.encoder = as_tokens(encoder, "simmim")
        patch = self.encoder.patch_size
        pairs = list(zip(triple(block), patch, strict=True))
        if any(b % p for b, p in pairs):
            less, more = [max(b // p, 1) * p for b, p in pairs], [-(-b // p) * p for b, p in pairs]
            raise InputError(
                f"objective.block={block} must be a multiple of the backbone's patch_size="
                f"{list(patch)} along each axis, such as {less} or {more}; one that divides "
                "crop_size too leaves no block cut"
            )
        self.unit = triple([b // p for b, p in zip(triple(block), patch, strict=True)])
        self.mask_ratio = mask_ratio
        self.error = error
        width, channels = self.encoder.embed_dim, self.encoder.in_channels
        self.mask_token = nn.Parameter(torch.empty(width))
        self.head: nn.Module
        if head == "linear":
            self.head = nn.Linear(width, channels * patch[0] * patch[1] * patch[2])
            init_transformer(self.head)
        else:
            try:
                self.head = PatchDecoder(width, patch, channels)
            except ValueError as problem:
                raise InputError(f"objective.head=patch: {problem}; or head=linear") from problem
        nn.init.trunc_normal_(self.mask_token, std=0.02, a=-0.02, b=0.02)

    def forward(self, batch: Batch, progress: float) -> Losses:
        """Returns the error over hidden, valid voxels."""
        hidden, output = self.predict(batch)
        counted = (hidden & batch.valid).expand_as(output)
        measure = masked_l1 if self.error == "l1" else masked_mse
        loss = measure(output, batch.image, counted)
        return Losses(loss, {self.error: loss.detach()})

    def predict(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Returns the mask, bool [B, 1, D, H, W], and the rebuilt image [B, C, D, H, W]."""
        encoder = self.encoder
        grid, patch = encoder.grid(batch.image.shape), encoder.patch_size
        hidden = block_hidden(batch.seeds, grid, self.unit, self.mask_ratio).flatten(1)  # [B, N]
        tokens = encoder.tokens(batch.image, hidden, mask_token=self.mask_token)
        tokens = tokens[:, encoder.prefix_tokens :]  # [B, N, E]
        if isinstance(self.head, PatchDecoder):
            output = self.head(batch.image, [tokens.transpose(1, 2).unflatten(2, grid)])
        else:
            output = unpatchify(self.head(tokens), grid, patch)
        return spread(hidden, grid, patch), output

    @torch.no_grad()
    def preview(self, batch: Batch) -> dict[str, Tensor]:
        """Returns "input", "visible" (hidden voxels NaN) and "output", in units of the input.

        The output shows the prediction in hidden blocks and the input elsewhere.
        """
        hidden, output = self.predict(batch)
        return shown(batch.image, hidden, output)
