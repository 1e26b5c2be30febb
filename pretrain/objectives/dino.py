"""DINO: a student learns to say of any crop what its own moving average says of other crops.

DINO (Caron et al. 2021, arXiv:2104.14294): crops of one region, two global and some local ones, are
to be assigned alike to prototypes; only the teacher's assignments of global crops are targets. iBOT
(Zhou et al. 2021, arXiv:2111.07832): the same for hidden tokens of a global crop, told from the
rest. KoLeo spreads the class tokens of a batch. Sums and weights are those of DINOv2 (Oquab et al.
2023, arXiv:2304.07193). Gram anchoring (Siméoni et al. 2025, arXiv:2508.10104), if asked for, holds
the similarities between patches to those of an earlier teacher.

In 3D, as in 3DINO (arXiv:2501.11755): crops are shares of a region's area in its fine axes and of
its length along the third, and hidden tokens are drawn one by one. Written from the formulas.

Crops of one shape pass the encoder at once: the student has two passes, global and local, the
teacher one. Together with KoLeo two samples are the least that a rank can take.

Shape legend: B samples, n local crops of each, N patches of a global crop, E width, K prototypes,
M rows of hidden tokens with padding.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Annotated, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from data_prep.errors import InputError
from pretrain.attention import cls_attention
from pretrain.backbones.backbone import Backbone
from pretrain.backbones.vit import TokenBackbone
from pretrain.crops import MultiCrop
from pretrain.distillation import Centring, cls_loss, ibot_loss, sinkhorn, target_information
from pretrain.heads import ProjectionHead
from pretrain.masked_tokens import HiddenRows, hidden_in_some, hidden_rows, most_hidden
from pretrain.masking import enlarge, patchify
from pretrain.objective import INHERITED, Batch, Losses, Objective
from pretrain.ramps import cosine, warm
from pretrain.regularisers import gram_loss, koleo, resize_tokens
from pretrain.teacher import Teacher

Share = Annotated[float, Field(gt=0, le=1)]
Ratio = Annotated[float, Field(gt=0, lt=1)]
Momentum = Annotated[float, Field(ge=0, le=1)]
Temperature = Annotated[float, Field(gt=0, le=10)]
Weight = Annotated[float, Field(ge=0, le=100)]
Width = Annotated[int, Field(ge=1, le=65536)]
Voxels = Annotated[int, Field(ge=1, le=2048)]
Size = tuple[Voxels, Voxels, Voxels]
Aspect = Annotated[float, Field(gt=0, le=10)]

EVEN = 0.01
"""Nats: a class token's loss this near to ln K, or targets that tell less, are a collapse."""


class DINO(Objective):
    """Self-distillation between crops, with hidden tokens, KoLeo and, if asked for, Gram anchoring.

    Weights of the loss: 1 for class tokens and hidden tokens each, the others as given. Schedules
    follow the progress of the training.

    Args:
        encoder: a ViT with a class token.
        prototypes: K of each head.
        hidden_dim: width of the heads' MLP.
        bottleneck_dim: width of the space of prototypes.
        ibot_head: own, or shared with the class tokens.
        targets: sinkhorn, or centring, by a moving mean with momentum 0.9.
        student_temperature: of the student's softmax.
        teacher_temperature: at the start, and from `teacher_warmup` on.
        teacher_warmup: share of the training in which it rises linearly.
        momentum: of the teacher, at the start and, by half a cosine, at the end.
        freeze: share of the training in which prototypes stay as they began.
        mask_share: of the global crops that hide tokens; one of two with 0.5.
        mask_ratio: least and largest share of hidden tokens in those.
        koleo_weight: of KoLeo, for each of the two global crops.
        gram_weight: of Gram anchoring; 0 leaves its teacher out.
        gram_refresh: steps after which the Gram teacher becomes the teacher of that time.
        gram_refreshes: how often it does.
        patch_rate: share of the rate for the patch embedding.
        layer_decay: share of the rate from a layer to the one below it.
        local: local crops of a sample, n.
        local_size: voxels of a local crop.
        region: voxels of what all crops of a sample are taken from; null: the foreground's box.
        area: share of the region's area in the fine axes, of a global crop: least and largest.
        length: share of its length along the third axis.
        local_area: as `area`, of a local crop.
        local_length: as `length`, of a local crop.
        aspect: height over width in the fine axes.
        gram_size: voxels of the Gram teacher's own crops; null: it sees the global ones.

    Raises:
        InputError: the encoder has no class token, or the least share is not the smaller one.
        ValueError: a range or a size of the crops is none.
    """

    encoder: TokenBackbone
    crops: MultiCrop
    compares = True

    def __init__(
        self,
        *,
        encoder: Backbone,
        prototypes: Annotated[int, Field(ge=2, le=2**20)] = 65536,
        hidden_dim: Width = 2048,
        bottleneck_dim: Width = 256,
        ibot_head: Literal["own", "shared"] = "own",
        targets: Literal["sinkhorn", "centring"] = "sinkhorn",
        student_temperature: Temperature = 0.1,
        teacher_temperature: tuple[Temperature, Temperature] = (0.04, 0.07),
        teacher_warmup: Annotated[float, Field(ge=0, le=1)] = 0.3,
        momentum: tuple[Momentum, Momentum] = (0.992, 1.0),
        freeze: Annotated[float, Field(ge=0, lt=1)] = 0.01,
        mask_share: Share = 0.5,
        mask_ratio: tuple[Ratio, Ratio] = (0.1, 0.5),
        koleo_weight: Weight = 0.1,
        gram_weight: Weight = 0.0,
        gram_refresh: Annotated[int, Field(ge=1)] = 10000,
        gram_refreshes: Annotated[int, Field(ge=0)] = 3,
        patch_rate: Share = 0.2,
        layer_decay: Share = 0.9,
        local: Annotated[int, Field(ge=0, le=64)] = 8,
        local_size: Size = (48, 48, 48),
        region: Size | None = None,
        area: tuple[Share, Share] = (0.48, 1.0),
        length: tuple[Share, Share] = (0.5, 1.0),
        local_area: tuple[Share, Share] = (0.16, 0.48),
        local_length: tuple[Share, Share] = (0.2, 0.5),
        aspect: tuple[Aspect, Aspect] = (0.9, 1.11),
        gram_size: Size | None = None,
    ) -> None:
        super().__init__()
        cls_token = getattr(encoder, "cls_token", None)
        if not isinstance(encoder, TokenBackbone) or cls_token is None:
            raise InputError(
                f"objective=dino teaches class tokens and {type(encoder).__name__} has none here: "
                "choose backbone=dino_b, on slices backbone=dinov3_b_2d, or give a ViT "
                "backbone.cls_token=true"
            )
        if mask_ratio[0] > mask_ratio[1]:
            raise InputError(f"objective.mask_ratio={list(mask_ratio)}: the smaller comes first")
        self.crops = MultiCrop(
            local=local, local_size=local_size, region=region, area=area, length=length,
            local_area=local_area, local_length=local_length, aspect=aspect,
            gram_size=gram_size if gram_weight else None,
        )  # fmt: skip
        self.batch_multiple = 2 if koleo_weight else 1
        self.student_temperature = student_temperature
        self.teacher_temperature = teacher_temperature
        self.teacher_warmup = teacher_warmup
        self.momentum = momentum
        self.freeze_share = freeze
        self.mask_share = mask_share
        self.mask_ratio = mask_ratio
        self.koleo_weight = koleo_weight
        self.gram_weight = gram_weight
        self.gram_refresh = gram_refresh
        self.gram_refreshes = gram_refreshes
        self.patch_rate = patch_rate
        self.layer_decay = layer_decay

        def head() -> ProjectionHead:
            return ProjectionHead(
                encoder.embed_dim, prototypes, hidden_dim=hidden_dim, bottleneck_dim=bottleneck_dim
            )

        self.encoder = encoder
        self.mask_token = nn.Parameter(torch.empty(encoder.embed_dim))
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        self.head = head()
        self.ibot_head = head() if ibot_head == "own" else None
        self.teacher = Teacher(self.encoder)
        self.teacher_head = Teacher(self.head)
        self.teacher_ibot_head = None if self.ibot_head is None else Teacher(self.ibot_head)
        self.gram = Teacher(self.encoder) if gram_weight else None
        centred = targets == "centring"
        self.centring = Centring(prototypes) if centred else None
        self.ibot_centring = Centring(prototypes) if centred else None

    # What is learned.

    def forward(self, batch: Batch, progress: float) -> Losses:
        """Returns the loss, its terms without their weights, and how much the targets tell."""
        grid = self.encoder.grid(batch.image.shape)
        hidden = self.hidden(batch)  # [2B, N]
        samples = len(hidden) // 2
        most = most_hidden(samples, grid, self.mask_share, self.mask_ratio[1])
        rows = hidden_rows(hidden, most)
        targets, hidden_targets = self.teach(batch, rows, progress)

        tokens = self.encoder.tokens(batch.image, hidden, mask_token=self.mask_token)
        cls, patches = self._split(tokens)
        shown = [batch.others["local"].image] if self.crops.local else []
        local = [self.encoder.tokens(image)[:, 0] for image in shown]
        logits = self.head(torch.cat([cls, *local]))  # [2B + nB, K]
        of_cls = cls_loss(
            _by_sample(targets, samples),
            _by_sample(logits[: 2 * samples], samples),
            _by_sample(logits[2 * samples :], samples),
            self.student_temperature,
        ).loss
        guessed = (self.ibot_head or self.head)(_taken(patches, rows))
        of_hidden = ibot_loss(
            hidden_targets, guessed, rows.weight, len(hidden), self.student_temperature
        )
        parts = {"cls": of_cls, "ibot": of_hidden}
        loss = of_cls + of_hidden
        if self.koleo_weight:
            both = _by_sample(cls, samples)
            parts["koleo"] = koleo(both[:, 0]) + koleo(both[:, 1])
            loss = loss + self.koleo_weight * parts["koleo"]
        if self.gram is not None:
            parts["gram"] = gram_loss(patches, self._anchor(batch, grid))
            loss = loss + self.gram_weight * parts["gram"]
        even = math.log(logits.shape[1])
        entropy, information = target_information(targets)
        parts |= {"cls_of_even": of_cls / even, "entropy": entropy / even}
        parts["information"] = information
        return Losses(loss, {name: value.detach() for name, value in parts.items()})

    def hidden(self, batch: Batch) -> Tensor:
        """Which tokens of the global crops are hidden, bool [2B, N]; never one of padding alone."""
        grid, patch = self.encoder.grid(batch.image.shape), self.encoder.patch_size
        drawn = hidden_in_some(batch.seeds, grid, self.mask_share, *self.mask_ratio)
        return drawn & patchify(batch.valid, patch).any(-1)

    @torch.no_grad()
    def teach(self, batch: Batch, rows: HiddenRows, progress: float) -> tuple[Tensor, Tensor]:
        """The teacher's targets of class tokens [2B, K] and of hidden tokens [M, K]."""
        temperature = warm(progress, *self.teacher_temperature, self.teacher_warmup)
        cls, patches = self._split(self.released.tokens(batch.image))
        logits = self.teacher_head(cls)
        of_hidden = (self.teacher_ibot_head or self.teacher_head)(_taken(patches, rows))
        if self.centring is None or self.ibot_centring is None:
            return sinkhorn(logits, temperature), sinkhorn(of_hidden, temperature, rows.counted)
        return (
            self.centring(logits, temperature),
            self.ibot_centring(of_hidden, temperature, rows.counted),
        )

    @torch.no_grad()
    def _anchor(self, batch: Batch, grid: tuple[int, int, int]) -> Tensor:
        """The Gram teacher's patches [2B, N, E] on the student's grid."""
        assert self.gram is not None
        image = (batch.others["gram"] if self.crops.gram_size else batch).image
        _, patches = self._split(cast(TokenBackbone, self.gram.module).tokens(image))
        return resize_tokens(patches, self.encoder.grid(image.shape), grid)

    def _split(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The class token [B, E] and the patches [B, N, E]; registers are left out."""
        return tokens[:, 0], tokens[:, self.encoder.prefix_tokens :]

    # How it is trained.

    def after_step(self, progress: float) -> None:
        """Moves teachers and centres, and takes the Gram teacher anew where that is due."""
        momentum = cosine(progress, *self.momentum)
        for teacher, student in self._teachers():
            teacher.update(student, momentum)
        for centring in (self.centring, self.ibot_centring):
            if centring is not None:
                centring.update()
        times, left = divmod(self.loop.step, self.gram_refresh)
        if self.gram is not None and not left and times <= self.gram_refreshes:
            self.gram.update(self.teacher.module, 0.0)

    def inherit(self, state: Mapping[str, Tensor], least: float = INHERITED) -> list[str]:
        """As every objective's; the Gram teacher is the teacher of the run that is taken over.

        What has no teacher (another objective's run, a release) teaches itself at first.
        """
        taken = super().inherit(state, least)
        if not any(name.startswith("teacher.") for name in taken):
            self.teacher.update(self.encoder, 0.0)
        if self.gram is not None:
            self.gram.update(self.teacher.module, 0.0)
        return taken

    def _teachers(self) -> list[tuple[Teacher, nn.Module]]:
        """Each teacher with its student."""
        found: list[tuple[Teacher, nn.Module]] = [
            (self.teacher, self.encoder),
            (self.teacher_head, self.head),
        ]
        if self.teacher_ibot_head is not None and self.ibot_head is not None:
            found.append((self.teacher_ibot_head, self.ibot_head))
        return found

    def _heads(self) -> list[ProjectionHead]:
        return [head for head in (self.head, self.ibot_head) if head is not None]

    @property
    def released(self) -> TokenBackbone:
        """The teacher's encoder."""
        return cast(TokenBackbone, self.teacher.module)

    def held(self, progress: float) -> Iterable[nn.Parameter]:
        """Prototypes and their scales, at first."""
        if progress >= self.freeze_share:
            return []
        return [p for head in self._heads() for p in (head.prototypes, head.scale)]

    def clip_parts(self) -> list[list[nn.Parameter]]:
        """The encoder with the mask token, and each head."""
        encoder = [*self.encoder.parameters(), self.mask_token]
        return [encoder, *(list(head.parameters()) for head in self._heads())]

    def lr_scales(self) -> dict[str, float]:
        """Layer-wise decay, and less for the patch embedding; the mask token is of its layer."""
        rates = self.encoder.layer_rates(self.layer_decay)
        found = {
            f"encoder.{name}": rate * (self.patch_rate if name.startswith("patch_embed.") else 1)
            for name, rate in rates.items()
        }
        return {**found, "mask_token": min(rates.values())}

    # How it is looked at.

    def alarm(self, means: Mapping[str, float]) -> str:
        """Whether the student guesses evenly, or the targets of all crops are the same."""
        even = math.log(len(self.head.prototypes))
        if abs(means["cls"] - even) < EVEN:
            return (
                f"cls, the loss of class tokens, is {means['cls']:.3f} and an even guess has ln K "
                f"= {even:.3f}: the student tells nothing of its crops"
            )
        if means["information"] < EVEN:
            return (
                f"the teacher's targets of all crops are the same (information "
                f"{means['information']:.4f} nats, entropy {means['entropy']:.3f} of ln K)"
            )
        return ""

    @torch.no_grad()
    def preview(self, batch: Batch) -> dict[str, Tensor]:
        """Returns "input" and "attention", the teacher's from CLS to patches, mean over heads.

        It is shown in the greys of the crop: dark is none, bright is 99 % of the largest.
        """
        image = batch.image
        seen = cls_attention(self.released, image).mean(1)
        seen = (seen / seen.quantile(0.99, dim=1, keepdim=True)).clamp(max=1)
        grid, patch = self.encoder.grid(image.shape), self.encoder.patch_size
        low, high = (f(image.flatten(1), dim=1)[:, None] for f in (torch.amin, torch.amax))
        cells = (low + (high - low) * seen).view(-1, 1, *grid)
        return {"input": image, "attention": enlarge(cells, patch)}


def _by_sample(rows: Tensor, samples: int) -> Tensor:
    """[B * crops, E] to [B, crops, E]."""
    return rows.reshape(samples, len(rows) // samples, rows.shape[-1])


def _taken(patches: Tensor, rows: HiddenRows) -> Tensor:
    """The hidden ones of [2B, N, E] as [M, E]."""
    return patches.flatten(0, 1).index_select(0, rows.token)
