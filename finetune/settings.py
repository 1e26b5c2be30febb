"""What `voxelith finetune` and `voxelith evaluate` can be told. No torch in here."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from pretrain.settings import LoopSettings, RunName, Side

WindowBatch = Annotated[int, Field(ge=1, le=256)]
"""Windows that the network gets at a time; the result is the same but for rounding."""

RECIPE_VERSION = 1
"""Raised when the same settings no longer give the same training."""


class TaskClass(BaseModel):
    """One structure to segment: label values that belong to it, and how exact is exact enough."""

    model_config = ConfigDict(extra="forbid")

    name: Annotated[str, Field(min_length=1, max_length=64)]
    values: Annotated[tuple[Annotated[int, Field(ge=1, le=65535)], ...], Field(min_length=1)]
    tolerance_mm: Annotated[float, Field(gt=0, le=50)]


class TaskSettings(BaseModel):
    """A file of conf/task: what is segmented in a data set.

    `flip` names the axes (D, H, W) along which a mirrored crop is still a correct example;
    `ignore` is a label value whose voxels count neither in training nor in scores.
    """

    model_config = ConfigDict(extra="forbid")

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    classes: Annotated[tuple[TaskClass, ...], Field(min_length=1, max_length=255)]
    ignore: Annotated[int, Field(ge=1, le=65535)] | None = None
    flip: tuple[bool, bool, bool] = (False, False, False)

    @model_validator(mode="after")
    def _values_are_distinct(self) -> Self:
        values = [value for c in self.classes for value in c.values]
        values += [] if self.ignore is None else [self.ignore]
        twice = sorted({value for value in values if values.count(value) > 1})
        if twice:
            raise ValueError(f"label values {twice} belong to more than one class")
        names = [c.name for c in self.classes]
        if len(set(names)) < len(names):
            raise ValueError("two classes have the same name")
        return self


class SegmentationFacts(BaseModel):
    """What a finetuned run and its release say of the network beside its encoder.

    `tta`: windows are also seen mirrored along the task's flip axes.
    """

    model_config = ConfigDict(extra="forbid")

    task: TaskSettings
    overlap: Annotated[float, Field(ge=0, lt=1)]
    tta: bool = False


class FinetuneSettings(LoopSettings):
    """The keys of conf/finetune.yaml.

    `transfer` auto is what the release says: the encoder, or the decoder but for its head as well.
    `crop_size` null takes the checkpoint's; `run` null names the run after its arm, labels and
    seed; `label_seed` null is `seed`. `split` auto takes `official` where the corpus has it, else
    `default`.
    """

    task: TaskSettings
    corpus: Path
    ckpt: Path
    init: Literal["pretrained", "scratch"] = "pretrained"
    transfer: Literal["auto", "encoder", "network"] = "auto"
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
        """The run's name: as given, or told from what is varied in a sweep."""
        if self.run is not None:
            return self.run
        ckpt = re.sub(r"[^A-Za-z0-9._-]+", "-", self.ckpt.resolve().name)
        labels = self.labels.replace("%", "pct")
        arm = self.init if self.transfer == "auto" else f"{self.init}-{self.transfer}"
        name = f"{self.task.name}-{ckpt}-{arm}-labels={labels}-seed={self.seed}"
        return name[-100:].lstrip("._=-")

    def recipe(self, **resolved: Any) -> dict[str, Any]:
        """All that twins share: what is left when arm, weights and draws are taken away.

        Args:
            resolved: what the settings only point to (architecture, index and split hashes, ...).
        """
        free = {
            "corpus", "ckpt", "init", "seed", "label_seed", "split", "run", "runs", "trainer",
            "log_every", "save_every", "preview_every", "loggers", "transfer", "window_batch",
        }  # fmt: skip
        kept = {k: v for k, v in self.model_dump(mode="json").items() if k not in free}
        return {"recipe_version": RECIPE_VERSION, **kept, **resolved}


class EvaluateSettings(BaseModel):
    """The keys of conf/evaluate.yaml: any predictions against a labelled corpus.

    `predictions` holds KEY.nii.gz files with label values on the native grid of each case, or files
    with the names that the scans had: told by `keymap`, the keymap.csv that prep wrote beside the
    corpus, where keys are not made of names.
    """

    model_config = ConfigDict(extra="forbid")

    predictions: Path
    corpus: Path
    task: TaskSettings
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

    ckpt: Path
    input: Path
    output: Path
    tta: bool | None = None
    window_batch: WindowBatch = 1
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
