"""What a finetuning protocol is made of, beside the loop's own settings. No torch in here.

A protocol is a file of conf/protocol: rates, lengths, what is trained when, and what scratch may do
to be at its best. All of it is data, and what happens at a step follows from the step alone, so a
run that is killed in any phase goes on as if it had not been.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Freeze = Literal["none", "encoder"] | Annotated[int, Field(ge=1, le=1000)]
"""What of the encoder is not trained: nothing, all, or its first layers (`Backbone.layers`)."""

DecoderKind = Literal["auto", "unet", "unetr", "patch", "aggregate", "linear", "mlp", "knn"]

Rate = Annotated[float, Field(gt=0, lt=10)]


_ATTENTION = ("vit.", "slice_vit.", "swin_unetr.")
"""Modules of pretrain.backbones whose networks train at the rates of transformers."""


def family_of(backbone: str) -> Literal["cnn", "vit"]:
    """Whose rates a network needs, by the name of its backbone."""
    return "vit" if backbone.startswith(_ATTENTION) else "cnn"


class Phase(BaseModel):
    """Steps before the training proper, with a freeze and a rate schedule of their own.

    `lr_factor` times the protocol's rate is the peak; the rate rises to it linearly over `warmup`
    steps and then falls over the rest of the phase. Each phase begins with a fresh optimiser.
    """

    model_config = ConfigDict(extra="forbid")

    steps: Annotated[int, Field(ge=1)]
    freeze: Freeze
    warmup: Annotated[int, Field(ge=0)] = 0
    schedule: Literal["cosine", "poly"] = "poly"
    lr_factor: Annotated[float, Field(gt=0, le=10)] = 1.0


class LoRASettings(BaseModel):
    """Low-rank adapters in the encoder, whose own weights stay as they are.

    Hu et al. 2021, arXiv:2106.09685: W + (alpha / rank) B A, with B zero at the start.
    """

    model_config = ConfigDict(extra="forbid")

    rank: Annotated[int, Field(ge=1, le=256)] = 8
    alpha: Annotated[float, Field(gt=0, le=1024)] = 16.0


class Own(BaseModel):
    """How scratch departs from the shared recipe to be at its best; chosen on validation.

    What only makes sense with pretrained weights (phases, freezing, adapters, layer-wise decay) is
    left out of it; a key that is not given is as in the shared recipe.
    """

    model_config = ConfigDict(extra="forbid")

    lr: Rate
    weight_decay: Annotated[float, Field(ge=0, lt=10)] | None = None
    warmup: Annotated[int, Field(ge=0)] | None = None


class Search(BaseModel):
    """The rates among which each arm may choose on validation, and with how many label draws.

    The budget is the same for pretrained and for scratch: every candidate, every draw, once.
    """

    model_config = ConfigDict(extra="forbid")

    lr: Annotated[tuple[Rate, ...], Field(min_length=1, max_length=16)]
    draws: Annotated[int, Field(ge=1, le=100)]

    @model_validator(mode="after")
    def _candidates_are_distinct(self) -> Self:
        if len(set(self.lr)) < len(self.lr):
            raise ValueError(f"lr={list(self.lr)} names a candidate twice")
        return self

    @property
    def runs(self) -> int:
        """Trainings that each arm may spend."""
        return len(self.lr) * self.draws


def freeze_problem(freeze: Freeze, layers: int, where: str) -> str | None:
    """Why an encoder of so many layers cannot be frozen like that."""
    if isinstance(freeze, int) and freeze >= layers:
        return (
            f"{where}={freeze}: the encoder has {layers} layers; give fewer than that, or "
            f"{where}=encoder to freeze all of them"
        )
    return None


def frozen_layers(freeze: Freeze, layers: int) -> int:
    """How many of an encoder's layers, from the first, a freeze stands for."""
    if isinstance(freeze, int):
        return freeze
    return layers if freeze == "encoder" else 0


def phase_steps(phases: Sequence[Phase], steps: int) -> list[range]:
    """The steps of each phase and, last, of the training proper."""
    starts = [sum(phase.steps for phase in phases[:i]) for i in range(len(phases) + 1)]
    return [range(a, b) for a, b in zip(starts, [*starts[1:], steps], strict=True)]
