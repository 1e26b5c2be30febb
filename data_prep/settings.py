"""What `voxelith prep` can be told, and what it tells."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml  # type: ignore[import-untyped]
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)

from data_prep.files import behind_link

MINIMUM_SLICES = 4
"""Fewer along any axis are a localiser or a stack of pictures, no volume; cardiac MR has 6."""

NEVER_RESAMPLED = (
    "a labelled corpus is never resampled, so that scores are those of the scans as they are; "
    "leave it out, or set labels=false (finetune resamples on the way in)"
)

SHAPING = {
    "keys", "spacing", "sheared", "crop", "deface", "minimum_slices", "empty_labels", "overlap",
    "duplicates",
}  # fmt: skip

FINEST, COARSEST = 0.05, 100.0
"""Millimetres that a voxel may have."""

Millimetres = Annotated[float, Field(ge=FINEST, le=COARSEST)]


MUST_EXIST = "must exist"
"""Marks a setting that names a file or folder to read."""

REFERENCE = "reference"
"""Marks one whose path may also be a reference or the name of a known checkpoint, to be fetched."""

ADDRESS = "address"
"""Marks one that may also be the address of a corpus, which is read where it lies."""

RELEASE = "release"
"""Marks such a one that must be a release: what is known of others is made one."""


def several(value: Any) -> Any:
    """A list of paths in the words of the command line, `[/data/a,/data/b]`; else the value."""
    if isinstance(value, str) and re.fullmatch(r"\[.+\]", value):
        return [one.strip().strip("'\"") for one in value[1:-1].split(",")]
    return value


def _own_place(output: Path) -> Path:
    place = behind_link(output)
    private, left = (one.with_name(f"{one.name}.private") for one in (place, output))
    if left.exists() and not private.exists():
        raise ValueError(
            f"is a link to {place}, and its private folder lies beside the link; move it: "
            f"mv {left} {private}"
        )
    return place


Place = Annotated[Path, AfterValidator(_own_place)]
"""Where a corpus itself lies, not a link to it: what belongs to it is beside it."""


class PrepSettings(BaseModel):
    """Settings of one prep; `conf/prep.yaml` holds the same defaults.

    Attributes:
        input: A folder of scans, or a CSV that lists them.
        output: The corpus directory to write; `<output>.private/` beside it gets what must stay.
        layout: What the folder is laid out like, where `auto` takes it for something else; `pile`
            is any folder of unlabelled scans.
        name: Name of the corpus in corpus.json; the output directory's name when absent.
        classes: Names of the label values, as a mapping, a YAML/JSON file with one, or the name or
            file of a task in conf/task; a label with another value is refused.
        labels: Whether the corpus is labelled; by default it is when the input has labels.
        keys: `hmac` replaces file and subject names; `names` keeps them, for public data, but of
            DICOM no number of a patient.
        salt: File with the secret for `hmac`, and for patients of DICOM; by default one is made in
            `<output>.private/`.
        processes: Worker processes; 0 means one per available core. Never changes the bytes.
        shard_mib: Size at which a shard is closed.
        overwrite: Replace a finished corpus at `output`.
        exclude: What must stay out: files with keys or fingerprints, one a line; corpora, such as
            those of test sets, or of one a split (DIR/splits/official.json), for its test and
            validation samples; releases, for what they were trained on. Near-duplicates of
            their scans stay out too.
        duplicates: Whether near-duplicates (resampled, cropped, turned, windowed copies) are left
            out as well as equal scans, or only these.
        modality: `auto` takes it from the list, the names, or the intensities.
        spacing: Resample to this spacing (d, h, w) in mm, or a number for all three axes;
            unlabelled corpora only.
        sheared: What becomes of scans whose axes are not at right angles, as from a tilted gantry:
            they are refused, or resampled onto a grid of right angles (unlabelled corpora only).
        volumes: What a file of several volumes (4D) is where nothing names its channels: refused,
            a scan whose `channels` are the volumes, or several scans, `apart`.
        crop: `foreground` keeps the box of the body or signal, and of all labelled voxels.
        deface: `module:function` that says which voxels of a scan are its face; they go, and are
            not valid (see data_prep/deface.py).
        empty_labels: Whether a label map without any structure is refused, or kept as a negative.
        channels: Names of the channels where the input does not tell them: BIDS suffixes, or what
            the volumes of 4D files are.
        subjects: Regular expression that finds the subject in the id of a case, `patient[0-9]+`;
            its first group if it has one. Only for inputs that name no subjects.
        overlap: What becomes of voxels that lie in the masks of two structures: the case is
            refused, the structure with the larger label value gets them, or each structure gets
            a bit of its own.
        minimum_slices: Fewest slices along any axis; 1 lets single slices and 2D files in.
        append: Add what the input has to the corpus at `output`, as a new generation.
        step: One step alone, for those who divide the work: `scan`, `plan`, `write`, `publish`.
        part: `3/8` does the third of eight parts of the step; together they are all of it.
    """

    model_config = ConfigDict(extra="forbid")

    input: Annotated[Path, MUST_EXIST]
    output: Place
    layout: Literal["auto", "nnssl", "nnunet", "decathlon", "folders", "pairs", "bids", "pile"] = (
        "auto"
    )
    name: str | None = Field(default=None, min_length=1, max_length=64)
    classes: dict[Annotated[int, Field(ge=0, le=65535)], str] | Path | None = None
    labels: bool | None = None
    keys: Literal["hmac", "names"] = "hmac"
    salt: Path | None = None
    processes: int = Field(default=0, ge=0, le=1024)
    shard_mib: float = Field(default=1024, gt=0, le=65536)
    overwrite: bool = False
    exclude: Annotated[Path | tuple[Path, ...] | None, BeforeValidator(several), MUST_EXIST] = None
    duplicates: Literal["all", "exact"] = "all"
    modality: Literal["auto", "CT", "MR"] = "auto"
    spacing: tuple[Millimetres, Millimetres, Millimetres] | None = None
    sheared: Literal["refuse", "resample"] = "refuse"
    volumes: Literal["refuse", "channels", "apart"] = "refuse"
    crop: Literal["none", "foreground"] = "none"
    deface: Annotated[str, Field(pattern=r"^[\w.]+:\w+$")] | None = None
    empty_labels: Literal["refuse", "keep"] = "refuse"
    channels: tuple[Annotated[str, Field(pattern=r"^[^;]{1,64}$")], ...] = ()
    subjects: str | None = None
    overlap: Literal["refuse", "last", "bits"] = "refuse"
    minimum_slices: int = Field(default=MINIMUM_SLICES, ge=1, le=64)
    append: bool = False
    step: Literal["scan", "plan", "write", "publish"] | None = None
    part: str | None = None

    @property
    def excluded(self) -> tuple[Path, ...]:
        """All paths of `exclude`."""
        return (self.exclude,) if isinstance(self.exclude, Path) else self.exclude or ()

    @property
    def share(self) -> slice:
        """What `part` takes of a list."""
        first, _, count = (self.part or "1/1").partition("/")
        return slice(int(first) - 1, None, int(count))

    @property
    def subject_pattern(self) -> re.Pattern[str] | None:
        """The expression of `subjects`."""
        return None if self.subjects is None else re.compile(self.subjects)

    @field_validator("spacing", mode="before")
    @classmethod
    def _one_for_all_axes(cls, value: Any) -> Any:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return (value,) * 3 if number else value

    @field_validator("subjects")
    @classmethod
    def _is_an_expression(cls, value: str | None) -> str | None:
        try:
            re.compile(value or "")
        except re.error as error:
            raise ValueError(
                f"a regular expression such as patient[0-9]+ is needed ({error})"
            ) from error
        return value

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

    @field_validator("part")
    @classmethod
    def _is_a_part(cls, value: str | None) -> str | None:
        if value is None:
            return None
        found = re.fullmatch(r"([1-9]\d{0,4})/([1-9]\d{0,4})", value)
        if found is None or int(found[1]) > int(found[2]):
            raise ValueError("a part such as 3/8 is needed, the third of eight")
        return value

    @model_validator(mode="after")
    def _parts_are_of_a_step(self) -> PrepSettings:
        if self.part is not None and self.step not in ("scan", "write"):
            raise ValueError(
                f"part={self.part}: step=scan and step=write have parts; say which, or leave part "
                "out"
            )
        return self

    @model_validator(mode="after")
    def _additions_are_whole(self) -> PrepSettings:
        if self.append and (self.step is not None or self.overwrite):
            raise ValueError("append: excludes step and overwrite; leave them out")
        return self

    @model_validator(mode="after")
    def _labels_stay_native(self) -> PrepSettings:
        if self.labels and self.resamples:
            raise ValueError(f"{self.resamples}: {NEVER_RESAMPLED}")
        return self

    @property
    def shaping(self) -> dict[str, Any]:
        """The options that decide what samples there are and what is in them.

        What the input is (`layout`, `modality`, `channels`, ...) may differ from addition to
        addition; these may not.
        """
        return self.model_dump(mode="json", include=SHAPING)

    @property
    def resamples(self) -> str:
        """The settings that give volumes another grid, as words for a message; empty: none."""
        asked = {"spacing": self.spacing is not None, "sheared": self.sheared == "resample"}
        return " and ".join(name for name, given in asked.items() if given)


class RemoveSettings(BaseModel):
    """What `voxelith prep output=CORPUS remove=...` can be told.

    Attributes:
        output: The corpus.
        remove: Keys or subjects of it, or what its input called them; or a file of these, one a
            line.
    """

    model_config = ConfigDict(extra="forbid")

    output: Annotated[Place, MUST_EXIST]
    remove: Annotated[str | tuple[str, ...], BeforeValidator(several), Field(min_length=1)]

    @property
    def names(self) -> list[str]:
        """All names."""
        given = [self.remove] if isinstance(self.remove, str) else list(self.remove)
        found = []
        for one in given:
            path, lines = Path(one), [one]
            if path.is_file():
                lines = path.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
            found += [line.strip() for line in lines if line.strip()]
        return found


class SplitSettings(BaseModel):
    """What `voxelith split` can be told; `conf/split.yaml` holds the same defaults.

    Attributes:
        corpus: A labelled corpus; its splits/ gets `fold-0`, `fold-1`, ... or lends them.
        folds: Number of folds to make.
        seed: Another seed is another draw.
        keep: A corpus whose folds are kept for the subjects that it has; new subjects fill up.
        read: splits_final.json to take the folds from, instead of drawing them.
        write: splits_final.json to write from the corpus' folds, instead of making any.
    """

    model_config = ConfigDict(extra="forbid")

    corpus: Path
    folds: int = Field(default=5, ge=2, le=100)
    seed: int = Field(default=0, ge=0, lt=2**31)
    keep: Path | None = None
    read: Path | None = None
    write: Path | None = None

    @model_validator(mode="after")
    def _one_purpose(self) -> SplitSettings:
        given = [name for name in ("keep", "read", "write") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} exclude each other; give one of them")
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
    notes: list[str] = field(default_factory=list)
    already_there: bool = False

    @classmethod
    def of(
        cls,
        info: Mapping[str, Any],
        output: Path,
        private: Path,
        *,
        splits: list[str],
        notes: Sequence[str] = (),
        already_there: bool = False,
    ) -> PrepResult:
        """What a corpus.json tells of the prep that made it."""
        counts, shards = info["counts"], info["shards"]
        return cls(
            output=output,
            private=private,
            kind=info["kind"],
            layout=info["layout"],
            samples=counts["samples"],
            subjects=counts["subjects"],
            shards=len(shards),
            bytes=sum(shard["bytes"] for shard in shards),
            files=counts["files"],
            rejected=counts["rejected"],
            modalities=counts["modality"],
            splits=splits,
            index_hash=info["index"]["sha256"],
            notes=list(notes),
            already_there=already_there,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {**asdict(self), "output": str(self.output), "private": str(self.private)}
