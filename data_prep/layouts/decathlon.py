"""A Medical Segmentation Decathlon task, or one of MONAI's lists in its style.

Simpson et al. 2019, arXiv:1902.09063. dataset.json lists `training` pairs and `test` images;
MONAI's lists add `validation` pairs. Several modalities are the volumes of one 4D file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data_prep.errors import InputError, Naming
from data_prep.layouts.case import (
    BETWEEN_CHANNELS,
    Case,
    Layout,
    below,
    leave_out,
    modality_from_name,
    read_description,
    subject_from_name,
)


def from_decathlon(root: Path, files: list[Path]) -> Layout | None:
    """The cases of dataset.json; None if there is none or it is something else.

    Raises InputError if a path leads out of the folder, or a class has no usable name.
    """
    path = root / "dataset.json"
    try:
        data = read_description(path)
        rows = [("training", row) for row in data["training"]]
        rows += [("validation", row) for row in data.get("validation", [])]
        rows += [("test", row) for row in data.get("test", [])]
        named = [_names(row, part) for part, row in rows]
        classes = {int(value): str(name) for value, name in data.get("labels", {}).items()}
        stated = data.get("modality", {})
        channels = [str(stated[key]) for key in sorted(stated, key=int)]
    except (FileNotFoundError, IsADirectoryError, ValueError, KeyError, TypeError, AttributeError):
        return None
    layout = Layout("Medical Segmentation Decathlon task (dataset.json)", classes=classes or None)
    # Training pairs alone are no split: the test images of a task have no labels.
    split = any(part != "training" and label for part, _, label in named)
    listed: set[Path] = set()
    problems = []
    for row, (part, image_name, label_name) in enumerate(named, start=1):
        image, label = below(root, image_name), below(root, label_name)
        if image is None or (label_name and label is None):
            outside = "or its label lies outside the folder"
            problems.append(
                Naming(f"{path}: {image_name!r} {outside}", f"{path}: image {row} {outside}")
            )
            continue
        name = image.relative_to(root).as_posix()
        listed.update({image, label} if label else {image})
        layout.cases.append(
            Case(
                name,
                (image,),
                label,
                subject=subject_from_name(name),
                modality=modality_from_name(" ".join(channels)),
                sequence=BETWEEN_CHANNELS.join(channels) if len(channels) > 1 else "",
                split={"training": "train"}.get(part, part) if split else "",
            )
        )
    if problems:
        raise InputError(problems)
    rest = [file for file in files if file not in listed]
    leave_out(root, rest, layout, "not_listed", "dataset.json does not list it")
    layout.cases.sort(key=lambda case: case.name)
    return layout


def _names(row: Any, part: str) -> tuple[str, str, str]:
    """(part, image, label) of a row; test rows may be a bare name."""
    if isinstance(row, str):
        if part != "test":
            raise TypeError(row)
        return part, row, ""
    label = row.get("label", "") if part == "test" else row["label"]
    return part, str(row["image"]), str(label)
