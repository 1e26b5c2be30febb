"""nnU-Net's raw data, versions 2 and 1: a file per channel, CASE_0000.nii.gz, in imagesTr.

Isensee et al. 2021, arXiv:1904.08128. dataset.json of version 2 has `channel_names`, `labels`
{name: value}, or {name: [values]} for regions, `ignore` among them, and `file_ending`; that of
version 1 has `modality` and `labels` {value: name}.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_prep.errors import InputError
from data_prep.images import SUFFIXES
from data_prep.layouts.case import (
    BETWEEN_CHANNELS,
    Case,
    Layout,
    LeftOut,
    is_image,
    is_there,
    leave_out,
    modality_from_name,
    read_description,
    stem,
    subject_from_name,
)

CHANNEL = re.compile(r"(.+)_(\d{4})$")


def from_nnunet(root: Path, files: list[Path]) -> Layout | None:
    """The cases of imagesTr, and those of imagesTs; None if the folder is something else.

    Cases of imagesTs with labels in labelsTs make an official split: train and test.

    Raises InputError if dataset.json contradicts itself.
    """
    images = _channels_by_case(root / "imagesTr", files)
    if not images:
        return None
    path = root / "dataset.json"
    data = _read(path)
    if data is not None and "training" in data and _is_listed(root, data):
        return None
    labels = _by_stem(root / "labelsTr", files)
    if data is None and not images.keys() & labels.keys():
        return None  # amos_0001 is a case and no channel
    names, classes, regions = ([], None, {}) if data is None else _described(path, data)
    version = "dataset.json missing" if data is None else f"{len(names)} channels"
    layout = Layout(f"nnU-Net raw data ({version})", classes=classes, regions=regions)
    tests = _by_stem(root / "labelsTs", files)
    used = {path}
    for part, found, mapped in (
        ("train", images, labels),
        ("test", _channels_by_case(root / "imagesTs", files), tests),
    ):
        for case, channels in found.items():
            split = part if tests else ""
            used |= _add(root, layout, case, channels, names, mapped.get(case), split)
    orphans = [p for p in (*labels.values(), *tests.values()) if p not in used]
    leave_out(root, orphans, layout, "label_without_image", "no image has its name")
    used |= set(orphans)
    rest = [file for file in files if file not in used]
    leave_out(root, rest, layout, "not_listed", "no part of the data set's layout")
    layout.ignored += [path.name] if data is not None else []
    layout.cases.sort(key=lambda case: case.name)
    return layout


def _add(
    root: Path,
    layout: Layout,
    case: str,
    channels: dict[int, Path],
    names: list[str],
    label: Path | None,
    split: str,
) -> set[Path]:
    """Books one case; gives the files that it uses."""
    images = tuple(channels[number] for number in sorted(channels))
    name = images[0].relative_to(root).as_posix()
    wanted = list(range(len(names) or len(channels)))
    if sorted(channels) != wanted:
        detail = f"has channels {sorted(channels)}, dataset.json names {len(names)}"
        layout.left_out += [
            LeftOut(p.relative_to(root).as_posix(), "channel_count", f"{case} {detail}")
            for p in images
        ]
        if label is not None:
            layout.left_out.append(
                LeftOut(label.relative_to(root).as_posix(), "image_left_out", f"belongs to {case}")
            )
    else:
        layout.cases.append(
            Case(
                name,
                images,
                label,
                id=case,
                subject=subject_from_name(name),
                modality=modality_from_name(" ".join(names)) or modality_from_name(case),
                sequence=BETWEEN_CHANNELS.join(names) if len(names) > 1 else "",
                split=split,
            )
        )
    return {*images, *((label,) if label else ())}


def _channels_by_case(folder: Path, files: list[Path]) -> dict[str, dict[int, Path]]:
    """{case: {channel: file}}; empty unless every image of the folder has a channel number."""
    found: dict[str, dict[int, Path]] = {}
    for path in files:
        if path.parent != folder or not is_image(path):
            continue
        match = CHANNEL.match(stem(path))
        if match is None:
            return {}
        found.setdefault(match[1], {})[int(match[2])] = path
    return found


def _by_stem(folder: Path, files: list[Path]) -> dict[str, Path]:
    return {stem(path): path for path in files if path.parent == folder and is_image(path)}


def _is_listed(root: Path, data: Mapping[str, Any]) -> bool:
    """Whether the images that dataset.json lists exist: then it is a Decathlon task."""
    if "channel_names" in data:
        return False
    rows = data["training"]
    first = rows[0] if isinstance(rows, list) and rows else None
    return isinstance(first, dict) and is_there(root / str(first.get("image", "")))


def _read(path: Path) -> dict[str, Any] | None:
    try:
        data = read_description(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(data, dict):
        raise InputError(f"{path}: an object with channel_names and labels is needed")
    return data


def _described(
    path: Path, data: Mapping[str, Any]
) -> tuple[list[str], dict[int, str] | None, dict[str, tuple[int, ...]]]:
    """Channel names, names of label values and regions; InputError with all mistakes."""
    problems = []
    stated = data.get("channel_names", data.get("modality", {}))
    names: list[str] = []
    try:
        names = [str(stated[key]).replace(BETWEEN_CHANNELS, ",") for key in sorted(stated, key=int)]
    except (TypeError, ValueError):
        problems.append(f"{path}: channel_names={stated!r}; {{'0': 'CT'}} and so on is needed")
    ending = str(data.get("file_ending", ".nii.gz"))
    if not is_image(Path(f"x{ending}")):
        problems.append(f"{path}: file_ending {ending}; only {', '.join(SUFFIXES)} are read")
    values: dict[str, tuple[int, ...]] = {}
    labels = data.get("labels", {})
    for key, content in labels.items() if isinstance(labels, dict) else ():
        # Version 1 has {"1": "liver"}, version 2 has {"liver": 1}.
        name, value = (content, key) if isinstance(content, str) else (key, content)
        try:
            found = tuple(int(v) for v in (value if isinstance(value, list) else [value]))
        except (TypeError, ValueError, OverflowError):
            problems.append(f"{path}: label {name!r} has value {value!r}; whole numbers are needed")
            continue
        if name in values:
            problems.append(f"{path}: two labels are called {name!r}; give each its own name")
        values[str(name)] = found
    if not values:
        problems.append(f"{path}: labels={labels!r}; {{'background': 0, 'liver': 1}} is needed")
    if problems:
        raise InputError(problems)
    classes = name_values(values)
    regions = {name: v for name, v in values.items() if len(v) > 1}
    return names, classes, regions


def name_values(values: Mapping[str, tuple[int, ...]]) -> dict[int, str]:
    """One name for each label value: that of the smallest union that holds it.

    With whole tumour [1, 2, 3], core [2, 3] and enhancing 3, the values 1, 2, 3 are whole tumour,
    core and enhancing: what nnU-Net's order of regions comes to. Of unions of equal size that
    hold a value, the first names it; a further value of a union gets its number appended.
    """
    classes: dict[int, str] = {}
    for name, members in sorted(values.items(), key=lambda item: len(item[1])):
        for value in members:
            if value not in classes:
                taken = name in classes.values()
                classes[value] = f"{name} {value}" if taken else name
    return dict(sorted(classes.items()))
