"""Self-distillation with prototypes: targets from a teacher's logits, losses of the student's.

DINO: Caron et al. 2021, arXiv:2104.14294 (the pairs of crops, centring). iBOT: Zhou et al. 2021,
arXiv:2111.07832 (the same for hidden tokens). Sinkhorn-Knopp: Cuturi 2013, arXiv:1306.0895, as
used by SwAV (Caron et al. 2020, arXiv:2006.09882). Sums and weights follow DINOv2: Oquab et al.
2023, arXiv:2304.07193. Nothing depends on the crops being volumes.

A student that reaches its teacher's even guess has a loss of ln K: that is collapse.

Shape legend: B samples of this rank, n local crops, K prototypes, M rows of hidden tokens with
padding, T temperature.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from pretrain.collectives import global_max, global_sum
from pretrain.numerics import in_float32


@torch.no_grad()
@in_float32
def sinkhorn(
    logits: Tensor, temperature: float, counted: Tensor | None = None, iterations: int = 3
) -> Tensor:
    """Targets that use all prototypes alike: Sinkhorn-Knopp over the rows of all ranks.

    exp(logits / T) has its columns and rows scaled in turn, to equal sums over prototypes and to
    sums of 1 over rows. The factors are kept as logarithms, so that nothing over- or underflows
    and a constant added to all logits changes nothing. How many rows there are cancels: the last
    step makes each row sum to 1.

    Args:
        logits: the teacher's, [B, K]; the crops of a sample are rows like any other.
        temperature: of the teacher.
        counted: bool [B], False for rows that are padding; ranks may have unequally many.
        iterations: how often columns and rows are scaled.

    Returns:
        [B, K]; rows that count sum to 1, padding is 0.
    """
    padding = torch.zeros_like(logits[:, 0], dtype=torch.bool) if counted is None else ~counted
    padding = padding[:, None]  # [B, 1]
    scores = logits.masked_fill(padding, 0) / temperature
    # A row that is divided by infinity weighs nothing.
    rows = torch.zeros_like(scores[:, :1]).masked_fill(padding, torch.inf)  # [B, 1]
    columns = torch.zeros_like(scores[:1])  # [1, K]
    for _ in range(iterations):
        columns = _log_sum_of_all_ranks((scores - rows).logsumexp(0, keepdim=True))
        rows = (scores - columns).logsumexp(1, keepdim=True).masked_fill(padding, torch.inf)
    return (scores - columns - rows).exp()


def _log_sum_of_all_ranks(own: Tensor) -> Tensor:
    """The logarithm of the sum of exp(own) over ranks; the lowest number where the sum is 0."""
    lowest = torch.finfo(own.dtype).min
    largest = global_max(own).clamp(min=lowest)
    return (largest + global_sum((own - largest).exp()).log()).clamp(min=lowest)


class Centring(nn.Module):
    """The other way to targets: softmax((logits - centre) / T), the centre a moving mean.

    A batch is centred by those before it: the delay of one step that DINOv2 has. What is seen in
    training moves the centre in `update`, once per optimiser step, whatever the number of
    micro-batches; the mean is over the rows of all of them and of all ranks.

    Args:
        prototypes: K.
        momentum: share of the old centre that is kept.
    """

    centre: Tensor

    def __init__(self, prototypes: int, momentum: float = 0.9) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("centre", torch.zeros(prototypes))
        # Of this rank, hence no buffer: DDP would overwrite it with rank 0's.
        self._seen: Tensor | None = None

    @torch.no_grad()
    @in_float32
    def forward(self, logits: Tensor, temperature: float, counted: Tensor | None = None) -> Tensor:
        """Maps the teacher's logits [B, K] to targets, 0 where bool [B] `counted` is False."""
        if counted is None:
            counted = torch.ones_like(logits[:, 0], dtype=torch.bool)
        padding = ~counted[:, None]  # [B, 1]
        logits = logits.masked_fill(padding, 0)
        if self.training:
            sums = torch.cat([logits.sum(0), counted.sum()[None]])  # [K + 1], one message
            self._seen = sums if self._seen is None else self._seen + sums
        return ((logits - self.centre) / temperature).softmax(1).masked_fill(padding, 0)

    @torch.no_grad()
    def update(self) -> None:
        """Moves the centre towards the mean of what was seen since the last call, on any rank."""
        if self._seen is None:
            return
        total, count = global_sum(self._seen).split([len(self.centre), 1])
        moved = self.centre.lerp(total / count.clamp(min=1), 1 - self.momentum)
        self.centre.copy_(torch.where(count > 0, moved, self.centre))
        self._seen = None


@in_float32
def soft_cross_entropy(target: Tensor, logits: Tensor, temperature: float) -> Tensor:
    """-sum_k target_k ln softmax(logits / T)_k along the last axis; no gradient to the target."""
    return -(target.detach() * (logits / temperature).log_softmax(-1)).sum(-1)


@in_float32
def target_information(targets: Tensor) -> tuple[Tensor, Tensor]:
    """How sharp targets [B, K] are, and how much they tell of their rows, both in nats.

    The mean entropy of a row, ln K if all are even; and the entropy of the mean row less that,
    which is 0 if all rows are the same, even or sharp alike: then there is nothing to learn.
    """
    entropy = torch.special.entr(targets).sum(1).mean()
    return entropy, torch.special.entr(targets.mean(0)).sum() - entropy


class CropLoss(NamedTuple):
    """The mean over pairs, and the sums over pairs of local and of crossed global crops."""

    loss: Tensor
    local: Tensor
    crossed: Tensor


def cls_loss(
    teacher: Tensor, student_global: Tensor, student_local: Tensor, temperature: float
) -> CropLoss:
    """DINO's loss: every student's crop predicts the teacher's targets of the other global crops.

    The pairs are n local crops with 2 global ones, and each global crop with the other one, never
    with itself: 2 n + 2 in all. Each is a mean over samples; ranks have equally many.

    Args:
        teacher: targets of the global crops [B, 2, K].
        student_global: logits of the same crops [B, 2, K].
        student_local: logits [B, n, K]; n may be 0.
        temperature: of the student.
    """
    # Cross-entropy is linear in its target: the pairs of a local crop are one with the sum.
    both = teacher.sum(1, keepdim=True)
    local = soft_cross_entropy(both, student_local, temperature).sum(1).mean()
    crossed = soft_cross_entropy(teacher.flip(1), student_global, temperature).sum(1).mean()
    return CropLoss((local + crossed) / (2 * student_local.shape[1] + 2), local, crossed)


@in_float32
def ibot_loss(
    teacher: Tensor, student: Tensor, weight: Tensor, crops: int, temperature: float
) -> Tensor:
    """The loss of iBOT: the student tells from its context what the teacher sees in hidden tokens.

    A crop's loss is the mean over its hidden tokens, the loss is the mean over crops; one without
    hidden tokens counts as 0. Ranks have equally many crops, whatever they hide.

    Args:
        teacher: targets of the hidden tokens [M, K].
        student: logits of the same tokens [M, K].
        weight: [M], one over the number of hidden tokens in the token's crop; 0 for padding,
            which then has no gradient even where it is not finite.
        crops: number of global crops of this rank, hidden tokens or not.
        temperature: of the student.
    """
    padding = weight == 0
    student = student.masked_fill(padding[:, None], 0)
    teacher = teacher.masked_fill(padding[:, None], 0)
    return (weight * soft_cross_entropy(teacher, student, temperature)).sum() / crops
