"""nnssl's pretrain_data.json, in which OpenMind comes (Wald et al. 2024, arXiv:2412.17041).

A collection of data sets of subjects of sessions of images, each with a modality, and masks: where
an image was anonymised, which carries no loss, and where its anatomy is, which is not needed here.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_prep.errors import InputError, Naming
from data_prep.layouts.case import (
    GROUPS,
    Case,
    Layout,
    below,
    is_there,
    known_sequence,
    leave_out,
    modality_from_name,
    read_description,
)

FILE = "pretrain_data.json"
# MR by the names of its sequences, as OpenMind has them: T1w, inplaneT2, MP2RAGE, FA, MD, ...
_CT = ("CT", "CBCT")
_OTHER = ("PET", "SPECT", "US", "XA", "MG")


def from_nnssl(root: Path, files: list[Path]) -> Layout | None:
    """The images of pretrain_data.json; None if there is none or it is something else.

    Paths may begin with `$name`: an environment variable, or where there is none this folder. They
    lie in that folder.

    Raises InputError if a path leads out of it.
    """
    try:
        data = read_description(root / FILE)
        rows = [
            (str(name), str(subject_id), subject, image)
            for name, dataset in data["datasets"].items()
            for subject_id, subject in dataset["subjects"].items()
            for session in subject["sessions"].values()
            for image in session["images"]
        ]
        stated = {path: number for number, row in enumerate(rows, 1) for path in _stated(row[-1])}
        found = {path: _file(root, path) for path in stated}
        _refuse_outside(root / FILE, {p: n for p, n in stated.items() if found[p] is None})
        places = {path: file for path, file in found.items() if file is not None}
        cases = [_case(root, places, *row) for row in rows]
        masks = {places[mask] for *_, image in rows for mask in _masks(image).values()}
    except (FileNotFoundError, IsADirectoryError, ValueError, KeyError, TypeError, AttributeError):
        return None
    layout = Layout(f"nnssl collection ({FILE})", sorted(cases, key=lambda case: case.name))
    used = {file for case in cases for file in case.files}
    layout.ignored += [f.relative_to(root).as_posix() for f in files if f in masks - used]
    rest = [file for file in files if file not in used | masks]
    leave_out(root, rest, layout, "not_listed", f"{FILE} does not list it")
    return layout


def _refuse_outside(path: Path, outside: Mapping[str, int]) -> None:
    where = "lies outside the folder that it may lie in; copy the file there, or link to it"
    if outside:
        raise InputError(
            [
                Naming(f"{path}: {stated!r} {where}", f"{path}: a path of image {number} {where}")
                for stated, number in outside.items()
            ]
        )


def _case(
    root: Path,
    places: Mapping[str, Path],
    dataset: str,
    subject_id: str,
    subject: Any,
    image: Any,
) -> Case:
    file = places[str(image["image_path"])]
    mask = _masks(image).get("anonymization_mask")
    name = file.relative_to(root).as_posix() if file.is_relative_to(root) else str(file)
    told = subject.get("subject_info") or {}
    stated = str(image.get("modality") or "")
    return Case(
        name=name,
        images=(file,),
        mask=None if mask is None else places[mask],
        id=str(image.get("name") or ""),
        # Numbers of subjects begin anew in each data set.
        subject=f"{dataset}/{subject_id}",
        modality=_modality(stated, name),
        sequence=known_sequence(stated),
        source=dataset[:64],
        group=tuple((key, str(told[key])[:64]) for key in GROUPS if key in told),
    )


def _masks(image: Any) -> dict[str, str]:
    return {k: str(v) for k, v in (image.get("associated_masks") or {}).items() if v is not None}


def _stated(image: Any) -> list[str]:
    """All paths of an image."""
    return [str(image["image_path"]), *_masks(image).values()]


def _modality(stated: str, name: str) -> str | None:
    word = stated.upper()
    if word in _CT:
        return "CT"
    if word in _OTHER:
        return word
    return "MR" if word else modality_from_name(name)


def _file(root: Path, stated: str) -> Path | None:
    """Where a stated path is; None if it leads out of the folder that it may be in."""
    first, _, rest = stated.partition("/")
    if not first.startswith("$"):
        return below(root, stated)
    place = os.environ.get(first[1:])
    if place is not None:
        return below(Path(place), rest)
    # Of their own folders some last part is this one: $nnssl_raw/Dataset745_OpenMind/ds1/x.nii.gz.
    parts = Path(rest).parts
    whole = [below(root, "/".join(parts[n:])) for n in range(len(parts))]
    return next((one for one in whole if one and is_there(one)), below(root, rest))
