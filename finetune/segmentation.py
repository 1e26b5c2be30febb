"""Segmentation as an objective: an encoder, a decoder that fits it, Dice and cross-entropy.

Soft Dice after Milletari et al. 2016, arXiv:1606.04797, in the form of nnU-Net (Isensee et al.
2021): without background, summed over the batch before dividing, plus cross-entropy, 1 to 1.
B batch, K classes with background, D, H, W voxels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from finetune.decoders import DeepUNetDecoder, choose_decoder
from finetune.protocol import DecoderKind
from finetune.settings import TaskSettings
from finetune.supervised import Supervised
from pretrain.backbones.backbone import Backbone
from pretrain.decoders import full_outputs
from pretrain.losses import IGNORE, cross_entropy, dice_loss
from pretrain.objective import Batch, Losses


class Segmentation(Supervised):
    """Labels every voxel with one of the task's classes, or background (0).

    Args:
        encoder: gives the maps.
        task: whose classes.
        decoder: which decoder makes labels of the maps.
        deep_supervision: whether coarser stages of a U-Net's decoder learn from labels too.
    """

    def __init__(
        self,
        *,
        encoder: Backbone,
        task: TaskSettings,
        decoder: DecoderKind = "auto",
        deep_supervision: bool = False,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = choose_decoder(
            encoder, len(task.classes) + 1, decoder, deep=deep_supervision
        )
        self.register_buffer("class_of", class_table(task), persistent=False)

    def logits(self, image: Tensor) -> Tensor:
        """Maps [B, C, D, H, W] to [B, K, D, H, W]."""
        logits: Tensor = self.decoder(image, self.encoder(image))
        return logits

    def forward(self, batch: Batch, progress: float) -> Losses:
        """Dice and cross-entropy over the voxels that are valid and not ignored.

        A decoder with outputs at several scales learns at all of them, as in its publication:
        PCT-Net's are interpolated to the image and count alike, those of a U-Net meet the labels
        at their own resolution (nearest) and count less the coarser they are. `logits` gives the
        finest.
        """
        assert batch.label is not None
        target = to_classes(batch.label, self.class_of)  # [B, D, H, W]
        target = target.masked_fill(~batch.valid[:, 0], IGNORE)
        features = self.encoder(batch.image)
        if isinstance(self.decoder, DeepUNetDecoder):
            outputs = self.decoder.outputs(batch.image, features)
            weights = self.decoder.output_weights
        else:
            outputs = full_outputs(self.decoder, batch.image, features)
            weights = (1 / len(outputs),) * len(outputs)
        dice = entropy = torch.zeros((), device=target.device)
        for weight, output in zip(weights, outputs, strict=True):
            own = shrunk(target, output.shape[2:])
            dice = dice + weight * dice_loss(output.float(), own)
            entropy = entropy + weight * cross_entropy(output.float(), own)
        return Losses(dice + entropy, {"dice": dice, "cross_entropy": entropy})

    def finish(self) -> None:
        """As every supervised objective's; heads that served training alone go too."""
        super().finish()
        if isinstance(self.decoder, DeepUNetDecoder):
            self.decoder.heads = nn.ModuleList()


def shrunk(target: Tensor, size: Sequence[int]) -> Tensor:
    """Class indices [B, D, H, W] at another resolution: those nearest to each cell's centre."""
    if target.shape[1:] == tuple(size):
        return target
    near = F.interpolate(target[:, None].float(), size=tuple(size), mode="nearest-exact")
    return near[:, 0].long()


def class_table(task: TaskSettings) -> Tensor:
    """int64 [V]: class index of each label value; the last entry stands for all larger values."""
    values = [value for c in task.classes for value in c.values]
    table = torch.zeros(max(*values, task.ignore or 0) + 2, dtype=torch.int64)
    for index, chosen in enumerate(task.classes, start=1):
        table[list(chosen.values)] = index
    if task.ignore is not None:
        table[task.ignore] = IGNORE
    return table


def to_classes(label: Tensor, table: Tensor) -> Tensor:
    """Label values of any shape to class indices; values that no class names are background."""
    return table[label.clamp(max=len(table) - 1)]
