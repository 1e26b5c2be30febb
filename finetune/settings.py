"""What `voxelith finetune` and `voxelith evaluate` can be told. No torch in here."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)

from data_prep.settings import MUST_EXIST, RELEASE
from finetune.protocol import DecoderKind, Freeze, LoRASettings, Own, Phase, Search
from finetune.scan_task import ScanTask
from finetune.sides import named_side
from pretrain.settings import LoopSettings, RunName, Side

WindowBatch = Annotated[int, Field(ge=1, le=256)]
"""Windows that the network gets at a time; the result is the same but for rounding."""

RECIPE_VERSION = 2
"""Raised when the same settings no longer give the same training, or the same hash.

2: the precision is part of the recipe, and partly annotated cases are not trained on.
3, for tasks alone whose classes have several label values: crops are drawn by class, not by value.
"""

FREE = frozenset(
    {
        "corpus", "ckpt", "targets", "init", "seed", "label_seed", "split", "run", "runs",
        "trainer",
        "log_every", "save_every", "save_minutes", "preview_every", "loggers",
        "transfer", "protocol", "family",
        "recipe_of", "own", "search", "window_batch",
        "validations",
    }
)  # fmt: skip
"""Settings that arms and draws of one recipe may differ in, the trainer's precision excepted; see
`FinetuneSettings.recipe`."""


Value = Annotated[int, Field(ge=1, le=65535)]


class TaskClass(BaseModel):
    """One structure to segment: label values that belong to it, and how exact is exact enough.

    `lesion` says that it is made of any number of lesions, which are also counted one by one.
    """

    model_config = ConfigDict(extra="forbid")

    name: Annotated[str, Field(min_length=1, max_length=64)]
    values: Annotated[tuple[Value, ...], Field(min_length=1)]
    tolerance_mm: Annotated[float, Field(gt=0, le=50)]
    lesion: bool = False


class TaskAbout(BaseModel):
    """What a user must know of a data set before training on it; nothing here is computed with.

    Attributes:
        source: Where the data set comes from: an address, a DOI, an arXiv number.
        licence: Of the data.
        layout: What `voxelith prep` reads, as a file of data_prep/layouts.
        prepare: Words for `voxelith prep` and anything to do before it.
        split: The official split, and how it comes in.
        class_map: Where the label values were read.
        tolerances: Where the tolerances of the surface Dice come from; `ours` where nobody
            publishes any.
    """

    model_config = ConfigDict(extra="forbid")

    source: Annotated[str, Field(min_length=8)]
    licence: Annotated[str, Field(min_length=3)]
    layout: Literal["decathlon", "nnunet", "folders", "bids", "lists", "piles"]
    prepare: str = ""
    split: Annotated[str, Field(min_length=3)]
    class_map: Annotated[str, Field(min_length=3)]
    tolerances: Annotated[str, Field(min_length=3)]


class TaskSettings(BaseModel):
    """A file of conf/task: what is segmented in a data set.

    Attributes:
        classes: What the network tells apart; a label value belongs to one class at most.
        regions: What is scored instead of the classes: unions of them, which may overlap, such as
            the tumour core within the whole tumour. Training stays on the classes; that of
            nnU-Net on regions, a sigmoid for each, is not offered.
        ignore: A label value whose voxels count neither in training nor in scores.
        flip: Axes (D, H, W) along which a mirrored crop is still a correct example.
        swap: Pairs of label values that a mirror along W exchanges: left and right kidney.
        about: Where the data set comes from, and under which licence.
    """

    model_config = ConfigDict(extra="forbid")

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    classes: Annotated[tuple[TaskClass, ...], Field(min_length=1, max_length=255)]
    regions: tuple[TaskClass, ...] = ()
    ignore: Annotated[int, Field(ge=1, le=65535)] | None = None
    flip: tuple[bool, bool, bool] = (False, False, False)
    swap: tuple[tuple[Value, Value], ...] = ()
    about: TaskAbout | None = None

    @property
    def scored(self) -> tuple[TaskClass, ...]:
        """What rows are about: the regions, or the classes of a task without any."""
        return self.regions or self.classes

    def mirrored_classes(self) -> list[int]:
        """For each class index, background first, which it is once left and right are mirrored.

        Raises:
            ValueError: the mirrored label values of a class are no class; no task that was read.
        """
        partner = dict(self.swap) | {b: a for a, b in self.swap}
        sides = [frozenset(c.values) for c in self.classes]
        order = [0]
        for chosen, values in zip(self.classes, sides, strict=True):
            other = frozenset(partner.get(value, value) for value in values)
            if other not in sides:
                raise ValueError(
                    f"swap: class {chosen.name}, mirrored left to right, has the label values "
                    f"{sorted(other)}, which are no class; correct swap"
                )
            order.append(sides.index(other) + 1)
        return order

    @model_validator(mode="after")
    def _values_are_distinct(self) -> Self:
        values = [value for c in self.classes for value in c.values]
        values += [] if self.ignore is None else [self.ignore]
        twice = sorted({value for value in values if values.count(value) > 1})
        if twice:
            raise ValueError(f"label values {twice} belong to more than one class")
        for group in (self.classes, self.regions):
            names = [c.name for c in group]
            if len(set(names)) < len(names):
                raise ValueError("two classes have the same name")
        return self

    @model_validator(mode="after")
    def _regions_are_unions_of_classes(self) -> Self:
        for region in self.regions:
            chosen = set(region.values)
            inside = {value for c in self.classes if chosen >= set(c.values) for value in c.values}
            if chosen != inside:
                raise ValueError(
                    f"region {region.name}: values {sorted(chosen - inside)} are no whole classes, "
                    "and a prediction holds nothing smaller"
                )
        return self

    @model_validator(mode="after")
    def _mirrors_are_correct(self) -> Self:
        """A mirror along an axis may not turn a class into another under its old name."""
        class_of = {value: c.name for c in self.classes for value in c.values}
        swapped = [value for pair in self.swap for value in pair]
        twice = sorted({value for value in swapped if swapped.count(value) > 1})
        if twice:
            raise ValueError(f"swap: values {twice} have more than one partner")
        for pair in self.swap:
            lone = [value for value in pair if value not in class_of]
            if len(lone) == 1 or self.ignore in pair:
                raise ValueError(f"swap: of {list(pair)}, {lone or [self.ignore]} is in no class")
        self.mirrored_classes()
        names = [c.name for c in self.classes]
        for axis in (2, 1, 0):
            for c in self.classes:
                safe = axis == 2 and set(c.values) <= set(swapped)
                if self.flip[axis] and not safe and named_side(c.name, names, axis):
                    raise ValueError(
                        f"flip: a mirror along {'DHW'[axis]} makes {c.name} wrong; set it to false"
                        + (", or name its partner in swap" if axis == 2 else "")
                    )
        return self


def choose_task(given: Any) -> TaskSettings | ScanTask:
    """A task of whole scans where it has the keys of one, else one of segmentation; checked.

    Raises:
        ValidationError: of the one that was meant alone.
    """
    if isinstance(given, TaskSettings | ScanTask):
        return given
    scan = isinstance(given, dict) and not {"target", "kind"}.isdisjoint(given)
    return (ScanTask if scan else TaskSettings).model_validate(given)


def _only_segmentation(given: Any) -> Any:
    """Refuses a task of whole scans where there is nothing that it could be used for."""
    if isinstance(choose_task(given), ScanTask):
        raise ValueError(
            "is a task of whole scans, and what is scored here are label maps; "
            "`voxelith finetune` scores its own answers"
        )
    return given


Task = Annotated[TaskSettings | ScanTask, BeforeValidator(choose_task)]
"""A task of either kind."""


class TaskFacts(BaseModel):
    """What a finetuned run and its release say of the network beside its encoder.

    `tta`: windows are also seen mirrored along the task's flip axes.
    """

    model_config = ConfigDict(extra="forbid")

    task: Task
    decoder: DecoderKind = "auto"
    overlap: Annotated[float, Field(ge=0, lt=1)]
    tta: bool = False


class FinetuneSettings(LoopSettings):
    """The keys of conf/finetune.yaml.

    `transfer` auto is what the release says: the encoder, or the decoder but for its head as well,
    or, of a release that was finetuned for the same classes, all of the network.
    `adapt_channels` null is repeat where one channel becomes several, and nothing else.
    `crop_size` null takes the checkpoint's; `run` null names the run after its arm, labels and
    seed; `label_seed` null is `seed`. `split` auto takes `official` where the corpus has it, else
    `default`. With `phases`, `freeze`, `warmup` and `schedule` are those of the training that
    follows them. `fit` descent trains; ridge and knn make a probe of frozen features in closed
    form, from `steps` x `batch_size` crops. `recipe_of` own is scratch with the changes
    of `own`.
    """

    task: Task
    corpus: Annotated[Path, MUST_EXIST]
    ckpt: Annotated[Path, MUST_EXIST, RELEASE]
    targets: Annotated[Path | None, MUST_EXIST] = None
    init: Literal["pretrained", "scratch"] = "pretrained"
    transfer: Literal["auto", "encoder", "network"] = "auto"
    adapt_channels: Literal["repeat", "first"] | None = None
    labels: str = "all"
    label_seed: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    split: str = "auto"
    part: Literal["validation", "test"] = "test"
    run: RunName | None = None
    runs: Path = Path("runs")
    spacing: Literal["checkpoint", "native"] = "checkpoint"
    crop_size: tuple[Side, Side, Side] | None = None  # type: ignore[assignment]
    foreground: Annotated[float, Field(ge=0, le=1)] = 0.5
    overlap: Annotated[float, Field(ge=0, lt=1)] = 0.5
    tta: bool = False
    window_batch: WindowBatch = 1
    validations: Annotated[int, Field(ge=0, le=1000)] = 0
    protocol: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")] = "tiny"
    family: Literal["any", "cnn", "vit"] = "any"
    fit: Literal["descent", "ridge", "knn"] = "descent"
    decoder: DecoderKind = "auto"
    deep_supervision: bool = False
    freeze: Freeze = "none"
    phases: Annotated[tuple[Phase, ...], Field(max_length=16)] = ()
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    lora: LoRASettings | None = None
    recipe_of: Literal["twin", "own"] = "twin"
    own: Own | None = None
    search: Search | None = None

    @model_validator(mode="after")
    def _phases_leave_steps(self) -> Self:
        before = sum(phase.steps for phase in self.phases)
        if before >= self.steps:
            raise ValueError(
                f"phases take {before} of {self.steps} steps and leave none for the training "
                "that follows; make steps larger"
            )
        return self

    @model_validator(mode="after")
    def _curves_have_an_end(self) -> Self:
        if 0 < self.validations < 4 or self.validations > self.steps:
            raise ValueError(
                f"validations={self.validations}: whether training has ended is read from its last "
                f"quarter, which needs two; give 0, or 4 up to steps={self.steps}"
            )
        return self

    @model_validator(mode="after")
    def _parts_go_together(self) -> Self:
        if self.fit != "descent" and (
            self.lora or self.phases or self.ema or self.freeze != "encoder"
        ):
            raise ValueError(
                f"fit={self.fit} reads frozen features and trains nothing: it goes with "
                "freeze=encoder, and without phases, lora and ema"
            )
        wanted = {"ridge": "linear", "knn": "knn"}.get(self.fit)
        if self.decoder != wanted if wanted else self.decoder == "knn":
            raise ValueError(
                f"fit={self.fit} with decoder={self.decoder}: ridge fits decoder=linear, knn fits "
                "decoder=knn, and descent fits every other"
            )
        if self.lora and self.freeze != "none":
            raise ValueError(
                f"lora with freeze={self.freeze}: adapters keep the encoder's own weights as they "
                "are already; give freeze=none"
            )
        return self

    @model_validator(mode="after")
    def _task_has_what_it_takes(self) -> Self:
        problems = []
        if not isinstance(self.task, ScanTask):
            if self.targets is not None:
                problems.append(
                    f"targets={self.targets}: belong to a task of whole scans, and "
                    f"{self.task.name} is one of segmentation; leave them out"
                )
        else:
            if self.targets is None:
                problems.append(
                    f"targets: missing; task {self.task.name} is of whole scans and needs a CSV "
                    f"with the columns key and {self.task.target}: give targets=FILE"
                )
            if self.fit != "descent":
                problems.append(
                    f"fit={self.fit}: a probe of voxels, and task {self.task.name} is of whole "
                    "scans; take protocol=probe_linear, or fit=descent with freeze=encoder"
                )
            elif self.decoder not in ("auto", "linear", "mlp"):
                problems.append(
                    f"decoder={self.decoder}: labels voxels, and task {self.task.name} is of whole "
                    "scans; give auto or linear (a linear map of the pooled features), or mlp"
                )
            if self.transfer == "network":
                problems.append(
                    f"transfer=network: a decoder of voxels has no place in task {self.task.name}, "
                    "which is of whole scans; give transfer=encoder or auto"
                )
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @model_validator(mode="after")
    def _own_recipe_is_found_fairly(self) -> Self:
        if self.recipe_of == "twin":
            return self
        if self.fit != "descent":
            raise ValueError(f"recipe_of=own: fit={self.fit} has no rate that could be chosen")
        if self.init != "scratch":
            raise ValueError(
                "recipe_of=own is scratch at its own best; the recipe of the pretrained arm is the "
                "shared one: give init=scratch"
            )
        if self.own is None or self.search is None:
            raise ValueError(
                "recipe_of=own needs own.lr, the rate that validation chose, and search.lr, the "
                "rates that both arms could choose from, with search.draws"
            )
        strange = [lr for lr in (self.lr, self.own.lr) if lr not in self.search.lr]
        if strange:
            raise ValueError(
                f"rates {strange} are not among search.lr={list(self.search.lr)}: what one arm may "
                "choose, the other must have been given too; add them"
            )
        return self

    @property
    def arm(self) -> str:
        """What rows call this run: pretrained, its twin scratch, or scratch at its own best."""
        return "scratch-own" if self.recipe_of == "own" else self.init

    @property
    def label_draw(self) -> int:
        """The seed of the label draw."""
        return self.seed if self.label_seed is None else self.label_seed

    def effective(self) -> FinetuneSettings:
        """The settings that are trained with: scratch at its own best departs from what is shared.

        Nothing is frozen, adapted or slowed down there, for there is nothing to keep.
        """
        if self.recipe_of == "twin" or self.own is None:
            return self
        changes = self.own.model_dump(exclude_none=True)
        plain = {"phases": (), "freeze": "none", "lora": None, "layer_decay": 1.0}
        return self.model_copy(update={**plain, **changes})

    @model_validator(mode="before")
    @classmethod
    def _labels_as_text(cls, data: Any) -> Any:
        if isinstance(data, dict) and isinstance(data.get("labels"), int):
            return {**data, "labels": str(data["labels"])}
        return data

    @field_validator("labels")
    @classmethod
    def _labels_make_sense(cls, labels: str) -> str:
        share = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)%", labels)
        sensible = 0 < float(share[1]) <= 100 if share else re.fullmatch("all|[1-9][0-9]*", labels)
        if not sensible:
            raise ValueError('expected "all", a number of cases such as 16, or a share such as 10%')
        return labels

    @property
    def run_name(self) -> str:
        """The run's name: as given, or told from what runs beside one another differ in."""
        if self.run is not None:
            return self.run
        ckpt = re.sub(r"[^A-Za-z0-9._-]+", "-", self.ckpt.resolve().name)
        labels = self.labels.replace("%", "pct")
        arm = self.arm if self.transfer == "auto" else f"{self.arm}-{self.transfer}"
        name = f"{self.task.name}-{ckpt}-{self.protocol}-{arm}-labels={labels}-seed={self.seed}"
        return name[-100:].lstrip("._=-")

    def recipe(self, **resolved: Any) -> dict[str, Any]:
        """All that arms share: what is left when arm, weights and draws are taken away.

        Of a task of whole scans, the targets are part of it and not the file that they come from.

        Names (of the protocol, of its family of networks) do not count, only what they stand for,
        nor does how scratch may depart from it; of `effective()` settings it is what was trained.
        Of the trainer, the precision alone counts, as it was set: twins are rounded alike.

        Args:
            resolved: what the settings only point to (architecture, index and split hashes, ...).
        """
        dump = self.model_dump(mode="json", exclude={"task": {"about"}})
        kept = {k: v for k, v in dump.items() if k not in FREE}
        if self.adapt_channels is None:  # as before there was the key
            del kept["adapt_channels"]
        if not kept["augment"].get("bias_field", True):
            del kept["augment"]["bias_field"]
        precision = self.trainer.precision
        labelled = self.task.classes if isinstance(self.task, TaskSettings) else ()
        version = 3 if any(len(c.values) > 1 for c in labelled) else RECIPE_VERSION
        return {"recipe_version": version, "precision": precision, **kept, **resolved}


class EvaluateSettings(BaseModel):
    """The keys of conf/evaluate.yaml: any predictions against a labelled corpus.

    `predictions` holds KEY.nii.gz files with label values on the native grid of each case, or files
    with the names or paths that the scans had, or the names of the cases: told by `keymap`, the
    keymap.csv that prep wrote beside the corpus.
    """

    model_config = ConfigDict(extra="forbid")

    predictions: Annotated[Path, MUST_EXIST]
    corpus: Annotated[Path, MUST_EXIST]
    task: Annotated[TaskSettings, BeforeValidator(_only_segmentation)]
    output: Path
    split: str = "auto"
    part: Literal["train", "validation", "test"] = "test"
    keymap: Path | None = None
    name: str = ""


class PredictSettings(BaseModel):
    """The keys of conf/predict.yaml: a finetuned run or its release over a folder of scans.

    `tta` null is what the network was scored with. `resume` leaves scans alone whose output is
    there; files appear whole, so what is there is finished, whichever network made it.
    """

    model_config = ConfigDict(extra="forbid")

    ckpt: Annotated[Path, MUST_EXIST, RELEASE]
    input: Annotated[Path, MUST_EXIST]
    output: Path
    tta: bool | None = None
    window_batch: WindowBatch = 1
    modality: Literal["CT", "MR"] | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "32-true", "bf16-mixed"] = "auto"
    resume: bool = False


class DemoSettings(BaseModel):
    """The keys of conf/demo.yaml."""

    model_config = ConfigDict(extra="forbid")

    output: Path = Path("voxelith-demo")
    pretrain_steps: Annotated[int, Field(ge=1)] = 160
    finetune_steps: Annotated[int, Field(ge=1)] = 80
    labels: Annotated[int, Field(ge=1)] = 8
    seeds: Annotated[int, Field(ge=1, le=100)] = 3


def config_hash(recipe: dict[str, Any]) -> str:
    """A short hash of a recipe; rows of twins carry the same one."""
    text = json.dumps(recipe, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
