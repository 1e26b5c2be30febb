"""Segmentation as an objective: an encoder, a decoder that fits it, Dice and cross-entropy.

Soft Dice after Milletari et al. 2016, arXiv:1606.04797, in the form of nnU-Net (Isensee et al.
2021): without background, summed over the batch before dividing, plus cross-entropy, 1 to 1.
B batch, K classes with background, D, H, W voxels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from finetune.settings import TaskSettings
from pretrain.backbones.backbone import Backbone
from pretrain.decoders import build_decoder, full_outputs
from pretrain.losses import IGNORE, cross_entropy, dice_loss
from pretrain.objective import Batch, Losses, Objective


class Segmentation(Objective):
    """Labels every voxel with one of the task's classes, or background (0)."""

    def __init__(self, *, encoder: Backbone, task: TaskSettings) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = build_decoder(encoder, len(task.classes) + 1)
        self.register_buffer("class_of", class_table(task), persistent=False)

    def logits(self, image: Tensor) -> Tensor:
        """Maps [B, C, D, H, W] to [B, K, D, H, W]."""
        logits: Tensor = self.decoder(image, self.encoder(image))
        return logits

    def forward(self, batch: Batch, progress: float) -> Losses:
        """Dice and cross-entropy over the voxels that are valid and not ignored.

        A decoder with outputs at several scales learns at all of them, as in its publication;
        `logits` gives the finest.
        """
        assert batch.label is not None
        target = to_classes(batch.label, self.class_of)  # [B, D, H, W]
        target = target.masked_fill(~batch.valid[:, 0], IGNORE)
        outputs = full_outputs(self.decoder, batch.image, self.encoder(batch.image))
        dice = torch.stack([dice_loss(x.float(), target) for x in outputs]).mean()
        entropy = torch.stack([cross_entropy(x.float(), target) for x in outputs]).mean()
        return Losses(dice + entropy, {"dice": dice, "cross_entropy": entropy})


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
