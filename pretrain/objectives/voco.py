"""VoCo: a crop is to tell where it lies by how similar it is to a grid of bases.

Wu et al. 2024, arXiv:2402.17300 (CVPR) and arXiv:2410.09890 (Large-Scale-Medical). Bases tile a
region of the volume; random crops of it overlap them by a known share, the target of the cosine
between a crop's embedding and each base's. Two forms, by name:

- `large_scale_medical`: cross-entropy of overlap and cosine; cosines of bases are squared.
- `nnssl`: the logarithm where there is an overlap, the square where there is none, as in the first
  release, too; cosines of bases are not squared.

Losses add up: `intra`, a crop against the bases of its volume; `inter`, against those of another
volume, where the teacher's pair is the target of the student's (of the second paper); `bases`,
which are to be orthogonal.

The teacher is the moving average of the projector alone; the encoder is shared. Large-Scale-Medical
moves it before it is used in the forward pass, here it moves after the optimiser's step: the same
weights in each forward pass, but for micro-batches, before each of which it would move there. It
begins as the student; there it begins as another random projector. With `momentum=0` it is the
student itself, held fixed, as in nnssl.

The target follows from where crops were cut, before they are mirrored or turned: what a place is
shall not depend on that. Overlaps are of 3D boxes. The partner in `inter` is i + B/2 of B samples,
the same for any number of ranks, there the next one; with two samples they are one.

The projector has batch norm behind all layers but the last, without weights and running
statistics, as in Large-Scale-Medical; nnssl norms each embedding by itself. It cannot be left out:
with layer norm in its place all crops became one point within 50 steps (`bases` at 1), since
cosines near 1 have no gradient. There statistics are each GPU's, here those of the batch of all
ranks, so that a step is that of the joint batch; `accumulate` changes them. Dropout, which there
drops whole crops, is left out.

Shape legend: B samples, T random crops and N bases of each, E width.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from pretrain.backbones.backbone import Backbone
from pretrain.crops import Bases
from pretrain.objective import Batch, Losses, Objective
from pretrain.overlap import (
    base_similarity,
    overlap_cross_entropy,
    overlap_fractions,
    overlap_log_loss,
    predicted_overlap,
)
from pretrain.projection import Pool, Projector, by_sample
from pretrain.teacher import Teacher

Cells = Annotated[int, Field(ge=1, le=8)]


class VoCo(Objective):
    """The overlap of random crops with bases, from embeddings.

    The features of a crop are the means of all maps of a pyramid side by side, as in the paper, or
    of the deepest map where all have one resolution (ViT).

    Args:
        encoder: any backbone.
        form: of the losses; see above.
        targets: T, random crops of a sample.
        grid: bases along (D, H, W).
        inter: whether volumes are compared with each other; samples then come in twos.
        momentum: of the teacher, at each step.
        hidden_dim: width of the projector.
        out_dim: width of the embedding.

    Raises:
        ValueError: if there is one base only, which has nothing to be told from.
    """

    encoder: Backbone
    mixes = True  # batch norm

    def __init__(
        self,
        *,
        encoder: Backbone,
        form: Literal["large_scale_medical", "nnssl"] = "large_scale_medical",
        targets: Annotated[int, Field(ge=1, le=64)] = 2,
        grid: tuple[Cells, Cells, Cells] = (1, 3, 3),
        inter: bool = True,
        momentum: Annotated[float, Field(ge=0, le=1)] = 0.9,
        hidden_dim: Annotated[int, Field(ge=1, le=16384)] = 1024,
        out_dim: Annotated[int, Field(ge=2, le=16384)] = 1024,
    ) -> None:
        super().__init__()
        self.crops = Bases(count=targets, grid=grid)
        if self.crops.main == targets + 1:
            raise ValueError(f"grid={list(grid)}: gives one base; give two or more")
        self.encoder = encoder
        self.form = form
        self.inter = inter
        self.batch_multiple = 2 if inter else 1
        self.momentum = momentum
        self.pool = Pool(encoder, every=True)
        self.projector = Projector(self.pool.width, hidden_dim, out_dim, layers=3, norm=True)
        self.teacher = Teacher(self.projector)

    def forward(self, batch: Batch, progress: float) -> Losses:
        """Returns the sum of its parts."""
        count = self.crops.count
        features = by_sample(self.features(batch.image), self.crops.main)  # [B, T + N, F]
        student: Tensor = self.projector(features)
        teacher: Tensor = self.teacher(features)
        crops, bases = student[:, :count], student[:, count:]
        fixed = teacher[:, count:]
        target = self.targets(batch)

        published = self.form == "large_scale_medical"
        assigned = overlap_cross_entropy if published else overlap_log_loss
        parts = {
            "intra": assigned(target, predicted_overlap(crops, fixed)),
            "bases": base_similarity(bases, squared=published),
        }
        if self.inter:
            half = len(features) // 2
            guess = predicted_overlap(teacher[:, :count], fixed.roll(half, 0))
            parts["inter"] = assigned(guess, predicted_overlap(crops, bases.roll(half, 0)))
        loss = torch.stack([*parts.values()]).sum()
        return Losses(loss, {name: part.detach() for name, part in parts.items()})

    def features(self, image: Tensor) -> Tensor:
        """What the projector takes, [crops, F]."""
        return self.pool(self.encoder(image))

    def targets(self, batch: Batch) -> Tensor:
        """The share of each crop that lies in each base, [B, T, N]."""
        assert batch.box is not None
        boxes = by_sample(batch.box, self.crops.main)
        return overlap_fractions(boxes[:, : self.crops.count], boxes[:, self.crops.count :])

    def after_step(self, progress: float) -> None:
        """The teacher follows."""
        self.teacher.update(self.projector, self.momentum)
