"""What `voxelith prep` can be told, and what it tells."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml  # type: ignore[import-untyped]
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Millimetres = Annotated[float, Field(ge=0.05, le=100)]


MUST_EXIST = "must exist"
"""Marks a setting that names a file or folder to read."""


class PrepSettings(BaseModel):
    """Settings of one prep; `conf/prep.yaml` holds the same defaults.

    Attributes:
        input: A folder of scans, or a CSV that lists them.
        output: The corpus directory to write; `<output>.private/` beside it gets what must stay.
        name: Name of the corpus in corpus.json; the output directory's name when absent.
        classes: Names of the label values, as a mapping or a YAML/JSON file with one.
        labels: Whether the corpus is labelled; by default it is when the input has labels.
        keys: `hmac` replaces file and subject names; `names` keeps them, for public data.
        salt: File with the secret for `hmac`; by default one is made in `<output>.private/`.
        processes: Worker processes; 0 means one per available core. Never changes the bytes.
        shard_mib: Size at which a shard is closed.
        overwrite: Replace a finished corpus at `output`.
        exclude: File with keys or fingerprints to leave out, one a line.
        modality: `auto` takes it from the list, the names, or the intensities.
        spacing: Resample to this spacing (d, h, w) in mm; unlabelled corpora only.
    """

    model_config = ConfigDict(extra="forbid")

    input: Annotated[Path, MUST_EXIST]
    output: Path
    name: str | None = Field(default=None, min_length=1, max_length=64)
    classes: dict[Annotated[int, Field(ge=0, le=65535)], str] | Path | None = None
    labels: bool | None = None
    keys: Literal["hmac", "names"] = "hmac"
    salt: Path | None = None
    processes: int = Field(default=0, ge=0, le=1024)
    shard_mib: float = Field(default=1024, gt=0, le=65536)
    overwrite: bool = False
    exclude: Path | None = None
    modality: Literal["auto", "CT", "MR"] = "auto"
    spacing: tuple[Millimetres, Millimetres, Millimetres] | None = None

    @field_validator("classes", mode="before")
    @classmethod
    def _mapping_on_the_command_line(cls, value: Any) -> Any:
        """`classes={1: anterior}` arrives as text there, since it could be a path."""
        if not isinstance(value, str) or not value.strip().startswith("{"):
            return value
        try:
            return yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ValueError("a mapping such as {1: anterior, 2: posterior} is needed") from error

    @model_validator(mode="after")
    def _labels_stay_native(self) -> PrepSettings:
        if self.labels and self.spacing is not None:
            raise ValueError(
                "spacing: a labelled corpus is never resampled, so that scores are those of the "
                "scans as they are; leave spacing out (finetune resamples on the way in)"
            )
        return self


@dataclass(frozen=True)
class PrepResult:
    """What a prep did; `files` accounts for every file of the input."""

    output: Path
    private: Path
    kind: str
    layout: str
    samples: int
    subjects: int
    shards: int
    bytes: int
    files: dict[str, int] = field(default_factory=dict)
    rejected: dict[str, int] = field(default_factory=dict)
    modalities: dict[str, int] = field(default_factory=dict)
    splits: list[str] = field(default_factory=list)
    index_hash: str = ""
    already_there: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {**asdict(self), "output": str(self.output), "private": str(self.private)}
