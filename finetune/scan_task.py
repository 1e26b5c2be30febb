"""What `task=` says where whole scans have an answer: which class they are of, or a number.

Such a task is told from one of segmentation by its keys, `target` above all. No torch in here.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from finetune.sides import named_side

Text = Annotated[str, Field(min_length=1, max_length=64)]


class ScanAbout(BaseModel):
    """What a user must know of a data set before training on it; nothing here is computed with.

    Attributes:
        source: Where scans and targets come from: an address, a DOI, an arXiv number.
        licence: Of the data.
        layout: What `voxelith prep` reads, as a file of data_prep/layouts.
        prepare: How the scans become a corpus and the targets a CSV.
        split: The official split, and how it comes in.
        targets: Where the targets' meaning was read.
    """

    model_config = ConfigDict(extra="forbid")

    source: Annotated[str, Field(min_length=8)]
    licence: Annotated[str, Field(min_length=3)]
    layout: Literal["decathlon", "nnunet", "folders", "bids", "lists", "piles"]
    prepare: Annotated[str, Field(min_length=3)]
    split: Annotated[str, Field(min_length=3)]
    targets: Annotated[str, Field(min_length=3)]


class ScanTask(BaseModel):
    """A file of conf/task: what is asked of whole scans.

    Attributes:
        target: The column of the targets that is learnt.
        kind: Whether it names a class or is a number.
        classes: Of a classification: the values that the column has.
        unit: Of a regression: what the number counts, such as years or ml.
        flip: Axes (D, H, W) along which a mirrored scan is still a correct example.
        swap: Of a classification: pairs of classes that a mirror along W exchanges.
        about: Where the data set comes from, and under which licence.
    """

    model_config = ConfigDict(extra="forbid", coerce_numbers_to_str=True)

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    target: Text
    kind: Literal["classification", "regression"]
    classes: Annotated[tuple[Text, ...], Field(max_length=255)] = ()
    unit: Annotated[str, Field(max_length=32)] = ""
    flip: tuple[bool, bool, bool] = (False, False, False)
    swap: tuple[tuple[Text, Text], ...] = ()
    about: ScanAbout | None = None

    @property
    def outputs(self) -> int:
        """Numbers that a network gives for a scan: a probability of each class, or the value."""
        return len(self.classes) if self.kind == "classification" else 1

    @property
    def columns(self) -> tuple[str, ...]:
        """What these numbers are called in files of answers."""
        return self.classes if self.kind == "classification" else (self.target,)

    @property
    def asks(self) -> str:
        """The task in words."""
        if self.kind == "regression":
            return f"{self.target} in {self.unit}"
        return f"{self.target}: {', '.join(self.classes)}"

    def mirrored_classes(self) -> list[int]:
        """For each class index, which it is once left and right are mirrored."""
        partner = dict(self.swap) | {b: a for a, b in self.swap}
        return [self.classes.index(partner.get(name, name)) for name in self.classes]

    @model_validator(mode="after")
    def _kind_has_its_keys(self) -> Self:
        if self.kind == "regression":
            if self.classes or self.swap:
                raise ValueError("classes and swap belong to kind: classification")
            if not self.unit:
                raise ValueError("a regression needs unit, such as years or ml")
            return self
        if self.unit:
            raise ValueError("unit belongs to kind: regression")
        if len(self.classes) < 2:
            raise ValueError(
                f"a classification needs classes, two or more values that the column "
                f"{self.target} has; found {list(self.classes)}"
            )
        if len(set(self.classes)) < len(self.classes):
            raise ValueError("two classes have the same name")
        return self

    @model_validator(mode="after")
    def _mirrors_are_correct(self) -> Self:
        """A mirror along an axis may not turn a class into another under its old name."""
        swapped = [name for pair in self.swap for name in pair]
        if twice := sorted({name for name in swapped if swapped.count(name) > 1}):
            raise ValueError(f"swap: {', '.join(twice)} have more than one partner")
        if strange := sorted(set(swapped) - set(self.classes)):
            raise ValueError(f"swap: {', '.join(strange)} are no classes of the task")
        for axis, chosen in enumerate(self.flip):
            for name in self.classes if chosen else ():
                if named_side(name, self.classes, axis) and not (axis == 2 and name in swapped):
                    raise ValueError(
                        f"flip: a mirror along {'DHW'[axis]} makes {name} wrong; set it to false"
                        + (", or name its partner in swap" if axis == 2 else "")
                    )
        return self
