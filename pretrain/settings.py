"""What a training loop and `voxelith pretrain` can be told. No torch in here."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)

from data_prep.errors import InputError, differences
from data_prep.preprocess import Rule
from data_prep.settings import (
    ADDRESS,
    COARSEST,
    FINEST,
    MUST_EXIST,
    REFERENCE,
    RELEASE,
    several,
)
from pretrain.ramps import cosine

Side = Annotated[int, Field(ge=1, le=2048)]


class TrainerSettings(BaseModel):
    """The machine: what does not change the result, beyond rounding."""

    model_config = ConfigDict(extra="forbid")

    accelerator: Literal["auto", "cpu", "gpu", "cuda", "mps"] = "auto"
    devices: Annotated[int, Field(ge=1)] = 1
    nodes: Annotated[int, Field(ge=1)] = 1
    precision: Literal["auto", "32-true", "bf16-mixed"] = "auto"
    workers: Annotated[int, Field(ge=0, le=256)] = 2
    threads: Annotated[int, Field(ge=1)] | None = None
    compile: bool = False
    checkpointing: bool = False
    wait_minutes: Annotated[float, Field(gt=0)] = 30.0


Chance = Annotated[float, Field(ge=0, le=1)]
Length = Annotated[float, Field(gt=0, le=4096)]
Zoom = Annotated[float, Field(ge=0.25, le=4)]


class AugmentSettings(BaseModel):
    """A file of conf/augment: how crops are changed besides mirroring, and with what chance.

    `rotate` turns about each axis by up to `degrees`; `scale` lets a crop span `zoom` times as many
    voxels, drawn once or for each axis. From `bias_field` on, chances alone: what they stand for is
    in `pretrain.augment`, from `noise` on with the ranges of nnU-Net.
    """

    model_config = ConfigDict(extra="forbid")

    rotate: Chance = 0.0
    degrees: Annotated[float, Field(gt=0, le=180)] = 30.0
    scale: Chance = 0.0
    zoom: tuple[Zoom, Zoom] = (0.7, 1.4)
    zoom_per_axis: bool = False
    gain: Annotated[float, Field(ge=0, lt=1)] = 0.0
    bias_field: Chance = 0.0
    noise: Chance = 0.0
    blur: Chance = 0.0
    brightness: Chance = 0.0
    contrast: Chance = 0.0
    low_resolution: Chance = 0.0
    inverted_gamma: Chance = 0.0
    gamma: Chance = 0.0

    @model_validator(mode="after")
    def _zoom_has_an_order(self) -> Self:
        if self.zoom[0] > self.zoom[1]:
            raise ValueError(f"zoom={list(self.zoom)}: the smaller factor comes first")
        return self


class LoopSettings(BaseModel):
    """How long and how fast; shared by pretraining and finetuning."""

    model_config = ConfigDict(extra="forbid")

    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    crop_size: tuple[Side, Side, Side]
    steps: Annotated[int, Field(ge=1)]
    batch_size: Annotated[int, Field(ge=1)]
    accumulate: Annotated[int, Field(ge=1)] | None = 1
    optimizer: Literal["adamw", "adam", "sgd"] = "adamw"
    lr: Annotated[float, Field(gt=0, lt=10)]
    weight_decay: Annotated[float, Field(ge=0, lt=10)] = 0.05
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (
        0.9,
        0.95,
    )
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.99
    schedule: Literal["cosine", "poly", "halving"] = "cosine"
    warmup: Annotated[int, Field(ge=0)] = 0
    halve_every: Annotated[int, Field(ge=1)] | None = None
    clip: Annotated[float, Field(gt=0)] | None = 1.0
    augment: AugmentSettings = AugmentSettings(gain=0.1)
    log_every: Annotated[int, Field(ge=1)] = 10
    save_every: Annotated[int, Field(ge=1)] = 500
    save_minutes: Annotated[float, Field(gt=0)] = 15.0
    preview_every: Annotated[int, Field(ge=0)] = 0
    loggers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ()
    trainer: TrainerSettings = TrainerSettings()

    @model_validator(mode="before")
    @classmethod
    def _gain_was_a_key_of_its_own(cls, data: Any) -> Any:
        return with_augment(data) if isinstance(data, dict) else data

    @field_validator("crop_size", mode="before")
    @classmethod
    def _crop_has_three_sides(cls, size: Any) -> Any:
        if size is not None and (not isinstance(size, list | tuple) or len(size) != 3):
            raise ValueError("expected voxels along D, H and W, such as [96,96,96]")
        return size

    @model_validator(mode="after")
    def _halving_has_a_pace(self) -> Self:
        if (self.schedule == "halving") != (self.halve_every is not None):
            raise ValueError(
                f"schedule={self.schedule} with halve_every={self.halve_every}: halve_every is the "
                "number of steps after which schedule=halving halves the rate; give both or neither"
            )
        return self

    @model_validator(mode="after")
    def _batch_divides(self) -> Self:
        parts = self.ranks * self.micro_steps
        if self.batch_size % parts:
            fit = ranks_that_fit(self.batch_size, self.micro_steps)
            raise ValueError(
                f"batch_size={self.batch_size} is the global batch of one optimiser step and must "
                f"be a multiple of devices x nodes x accumulate = {parts}; with "
                f"accumulate={self.micro_steps} it divides among "
                f"{', '.join(map(str, fit)) or 'no number of'} ranks (devices x nodes)"
            )
        return self

    @property
    def ranks(self) -> int:
        """Processes that train together."""
        return self.trainer.devices * self.trainer.nodes

    @property
    def micro_steps(self) -> int:
        """Micro-batches of a step on each rank."""
        return self.accumulate or 1

    @property
    def micro_batch(self) -> int:
        """Samples that a rank takes at once: what its memory depends on."""
        return self.batch_size // (self.ranks * self.micro_steps)

    def decay(self, step: int) -> float:
        """The weight decay at a step."""
        return self.weight_decay


def ranks_that_fit(batch_size: int, micro_steps: int) -> list[int]:
    """Numbers of ranks among which a batch divides."""
    share, rest = divmod(batch_size, micro_steps)
    return [] if rest else [n for n in range(1, share + 1) if share % n == 0]


def with_augment(config: dict[str, Any]) -> dict[str, Any]:
    """A config of before `augment`, when `gain` stood alone, in today's words."""
    if "gain" not in config or "augment" in config:
        return config
    rest = {name: value for name, value in config.items() if name != "gain"}
    return {**rest, "augment": {"gain": config["gain"]}}


class IntensitySettings(BaseModel):
    """How values of each modality are normalised; travels with the release."""

    model_config = ConfigDict(extra="forbid")

    CT: Rule = Rule(rule="window", low=-1000.0, high=1000.0)
    MR: Rule = Rule(rule="zscore")


class HealthSettings(BaseModel):
    """How a pretraining run is watched; none of it changes the weights."""

    model_config = ConfigDict(extra="forbid")

    every: Annotated[int, Field(ge=0)] | Literal["auto"] = "auto"
    stop: bool = False
    probe: Annotated[Path | None, MUST_EXIST] = None

    @field_validator("every", mode="before")
    @classmethod
    def _every_is_said_plainly(cls, every: Any) -> Any:
        if every != "auto" and not (type(every) is int and every >= 0):
            raise ValueError("expected auto, a number of steps, or 0 for never")
        return every

    @model_validator(mode="after")
    def _probe_is_used(self) -> Self:
        if self.probe is not None and self.every == 0:
            raise ValueError("every=0 never looks, so a probe has no use: leave one of them out")
        return self


def checked_name(name: str) -> str:
    """The name, if it is one that a folder and a release may have; else a ValueError."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._=-]{0,99}", name):
        raise ValueError(
            "a name has letters, digits and . _ = - only, at most 100 of them, and begins with a "
            "letter or digit; the folder that runs lie in is runs=DIR"
        )
    return name


RunName = Annotated[str, AfterValidator(checked_name)]


class SamplingSettings(BaseModel):
    """How often volumes come in an epoch.

    By default each once. With `by`, groups of volumes get the shares of an epoch that `weights`
    say, 2 twice as much as 1, whatever their sizes: within a group all volumes come equally often,
    and an epoch stays as long as the corpus is.

    Attributes:
        by: what makes a group: a column of the index, or which of several corpora, from 1.
        weights: of each group; one of 0 is left out.
    """

    model_config = ConfigDict(extra="forbid")

    by: Literal["source", "modality", "sequence", "corpus"] | None = None
    weights: dict[str, Annotated[float, Field(ge=0, le=1e6)]] = {}

    @field_validator("weights", mode="before")
    @classmethod
    def _names_are_text(cls, weights: Any) -> Any:
        return {str(k): v for k, v in weights.items()} if isinstance(weights, dict) else weights

    @model_validator(mode="after")
    def _weights_have_groups(self) -> Self:
        if (self.by is None) != (not self.weights):
            raise ValueError(
                "by and weights: give both, such as by=modality weights={CT: 1, MR: 2}"
            )
        return self


class RemoteSettings(BaseModel):
    """What of a corpus behind https:// or s3:// is kept on each node.

    Attributes:
        cache_gb: of shards, each fetched once; 0: only the bytes that crops touch are fetched, and
            nothing is kept.
        folder: where shards are kept, on a disk of the node.
    """

    model_config = ConfigDict(extra="forbid")

    cache_gb: Annotated[float, Field(ge=0)] = 0.0
    folder: Path | None = None


Corpora = Path | tuple[Path, ...]
SEVERAL = BeforeValidator(several)


FREE = frozenset(
    {
        "corpus", "runs", "resume", "trainer", "log_every", "save_every", "save_minutes",
        "preview_every", "loggers", "accumulate", "health", "init", "remote",
        "damaged",
    }
)  # fmt: skip
"""What is no part of what a run is: where it runs, how often it logs, where folders lie.

The weights that it began from are a part, but not where they lie: see `pretrain.start`.
"""


class PretrainSettings(LoopSettings):
    """The keys of conf/pretrain.yaml."""

    corpus: Annotated[Corpora, SEVERAL, MUST_EXIST, ADDRESS]
    run: RunName
    runs: Path = Path("runs")
    accumulate: Annotated[int, Field(ge=1)] | None = None
    resume: Literal["auto", "never"] = "auto"
    init: Annotated[Path | None, MUST_EXIST, REFERENCE] = None
    adapt_channels: Literal["repeat", "first"] = "repeat"
    init_covers: Annotated[float, Field(gt=0, le=1)] = 0.95
    init_moments: bool = False
    backbone: dict[str, Any]
    objective: dict[str, Any]
    crop_mm: tuple[Length, Length, Length] | None = None
    intensity: IntensitySettings = IntensitySettings()
    lanes: Annotated[int | None, Field(ge=1, le=4096)] = None
    sampling: SamplingSettings = SamplingSettings()
    remote: RemoteSettings = RemoteSettings()
    damaged: Literal["stop", "skip"] = "stop"
    weight_decay_end: Annotated[float, Field(gt=0, lt=10)] | None = None
    flip: tuple[bool, bool, bool] = (True, True, True)
    health: HealthSettings = HealthSettings()

    @model_validator(mode="after")
    def _decay_has_a_start(self) -> Self:
        if self.weight_decay_end is not None and not self.weight_decay:
            raise ValueError(
                f"weight_decay_end={self.weight_decay_end} with weight_decay=0: the decay goes "
                "from the one to the other, so give both, or weight_decay alone"
            )
        return self

    @model_validator(mode="after")
    def _voxels_have_a_size(self) -> Self:
        spacing = self.spacing or (1.0,)
        if not FINEST <= min(spacing) <= max(spacing) <= COARSEST:
            raise ValueError(
                f"crop_mm={list(self.crop_mm or ())} with crop_size={list(self.crop_size)}: is "
                f"{' x '.join(f'{mm:.3g}' for mm in spacing)} mm a voxel, expected {FINEST:g} to "
                f"{COARSEST:g}"
            )
        return self

    @property
    def mixed_lanes(self) -> int:
        """Lanes of the schedule: where a batch has no more samples than lanes, each is of another.

        So a volume that comes often, by `sampling`, is not twice in a batch but by chance. A power
        of two divides among most numbers of nodes.
        """
        if self.lanes is not None:
            return self.lanes
        return min(max(64, 1 << (self.batch_size - 1).bit_length()), 4096)

    @property
    def spacing(self) -> tuple[float, float, float] | None:
        """Millimetres (d, h, w) that volumes are resampled to; None: they stay as they are."""
        if self.crop_mm is None:
            return None
        d, h, w = (mm / n for mm, n in zip(self.crop_mm, self.crop_size, strict=True))
        return d, h, w

    def decay(self, step: int) -> float:
        """Half a cosine from `weight_decay` to `weight_decay_end`, if there is one."""
        if self.weight_decay_end is None:
            return self.weight_decay
        return cosine(step / self.steps, self.weight_decay, self.weight_decay_end)

    def resumed(self, before: dict[str, Any]) -> Self:
        """These settings for a run that goes on, perhaps on another number of ranks.

        Where `accumulate` is not given, it becomes the least that leaves a rank no more samples at
        once than it had before. Asked again of what comes of it, that stays as it is.

        Args:
            before: the resolved configuration that the run was last started with.
        """
        if self.accumulate is not None:
            return self
        machine, share = before["trainer"], self.batch_size // self.ranks
        ranks = machine["devices"] * machine["nodes"]
        had = before["batch_size"] // (ranks * (before.get("accumulate") or 1))
        fitting = (n for n in range(1, share + 1) if share % n == 0 and share // n <= had)
        return self.model_copy(update={"accumulate": next(fitting)})

    def changed(self, before: dict[str, Any]) -> list[str]:
        """Settings that a resumed run must not change, and did: `key: old -> new`.

        What is `FREE` may change; all else is part of what the run is.
        """
        now = {n: v for n, v in self.model_dump(mode="json").items() if n not in FREE}
        before = with_augment(before)
        if "augment" in before:
            before = {**before, "augment": AugmentSettings.model_validate(before["augment"])}
        # A run of an older version does not name what was added since: it had the defaults.
        defaults = {n: f.get_default() for n, f in type(self).model_fields.items()}
        return differences({n: _plain(before.get(n, defaults[n])) for n in now}, now)


def _plain(value: Any) -> Any:
    return value.model_dump(mode="json") if isinstance(value, BaseModel) else value


class PlanSettings(PretrainSettings):
    """The keys of conf/plan.yaml: those of a pretraining, which needs no name yet."""

    run: RunName = "planned"


Variant = Literal["float32", "bf16", "float32-compiled", "bf16-compiled"]


class BenchSettings(PretrainSettings):
    """The keys of conf/bench.yaml: a pretraining, and how its step is measured."""

    corpus: Annotated[Corpora | None, SEVERAL, MUST_EXIST, ADDRESS] = None  # type: ignore[assignment]
    channels: Annotated[int, Field(ge=1, le=1024)] | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    variants: Annotated[tuple[Variant, ...], Field(min_length=1)] | None = None
    discard: Annotated[int, Field(ge=1)] = 3
    repeats: Annotated[int, Field(ge=1)] = 10
    profile: bool = False
    seconds: Annotated[float, Field(gt=0)] = 10
    gpu_rate: Annotated[float, Field(gt=0)] | None = None
    output: Path | None = None


def check_same(settings: PretrainSettings, before: dict[str, Any], run: Path) -> None:
    """Refuses to resume a run under other settings."""
    changed = settings.changed(before)
    if changed:
        raise InputError(
            f"{run}: cannot be resumed with other settings ({'; '.join(changed)}); restore them, "
            "or start another run=NAME"
        )


class FeaturesSettings(BaseModel):
    """The keys of conf/features.yaml: an encoder over a scan or a folder of scans."""

    model_config = ConfigDict(extra="forbid")

    ckpt: Annotated[Path, MUST_EXIST, RELEASE]
    input: Annotated[Path, MUST_EXIST]
    output: Path
    overlap: Annotated[float, Field(ge=0, lt=1)] = 0.5
    modality: Literal["CT", "MR"] | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    resume: bool = False
