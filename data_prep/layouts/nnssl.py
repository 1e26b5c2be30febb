"""nnssl's pretrain_data.json, in which OpenMind comes (Wald et al. 2024, arXiv:2412.17041).

A collection of data sets of subjects of sessions of images, each with a modality, and masks: where
an image was anonymised, which carries no loss, and where its anatomy is, which is not needed here.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from data_prep.layouts.case import GROUPS, Case, Layout, leave_out, modality_from_name

FILE = "pretrain_data.json"
# MR by the names of its sequences, as OpenMind has them: T1w, inplaneT2, MP2RAGE, FA, MD, ...
_CT = ("CT", "CBCT")
_OTHER = ("PET", "SPECT", "US", "XA", "MG")


def from_nnssl(root: Path, files: list[Path]) -> Layout | None:
    """The images of pretrain_data.json; None if there is none or it is something else.

    Paths may begin with `$name`: an environment variable, or where there is none this folder.
    """
    try:
        data = json.loads((root / FILE).read_text(encoding="utf-8"))
        rows = [
            (str(name), str(subject_id), subject, image)
            for name, dataset in data["datasets"].items()
            for subject_id, subject in dataset["subjects"].items()
            for session in subject["sessions"].values()
            for image in session["images"]
        ]
        cases = [_case(root, *row) for row in rows]
        masks = {_file(root, str(mask)) for *_, image in rows for mask in _masks(image).values()}
    except (ValueError, KeyError, TypeError, AttributeError, OSError):
        return None
    layout = Layout(f"nnssl collection ({FILE})", sorted(cases, key=lambda case: case.name))
    used = {file for case in cases for file in case.files}
    layout.ignored += [f.relative_to(root).as_posix() for f in files if f in masks - used]
    rest = [file for file in files if file not in used | masks]
    leave_out(root, rest, layout, "not_listed", f"{FILE} does not list it")
    return layout


def _case(root: Path, dataset: str, subject_id: str, subject: Any, image: Any) -> Case:
    file = _file(root, str(image["image_path"]))
    mask = _masks(image).get("anonymization_mask")
    name = file.relative_to(root).as_posix() if file.is_relative_to(root) else str(file)
    told = subject.get("subject_info") or {}
    sequence = str(image.get("modality") or "")
    return Case(
        name=name,
        images=(file,),
        mask=None if mask is None else _file(root, str(mask)),
        id=str(image.get("name") or ""),
        # Numbers of subjects begin anew in each data set.
        subject=f"{dataset}/{subject_id}",
        modality=_modality(sequence, name),
        sequence=sequence.replace(";", ","),
        source=dataset[:64],
        group=tuple((key, str(told[key])[:64]) for key in GROUPS if key in told),
    )


def _masks(image: Any) -> dict[str, Any]:
    return {k: v for k, v in (image.get("associated_masks") or {}).items() if v is not None}


def _modality(sequence: str, name: str) -> str | None:
    word = sequence.upper()
    if word in _CT:
        return "CT"
    if word in _OTHER:
        return word
    return "MR" if word else modality_from_name(name)


def _file(root: Path, stated: str) -> Path:
    first, _, rest = stated.partition("/")
    if not first.startswith("$"):
        return root / stated
    place = os.environ.get(first[1:])
    if place is not None:
        return Path(place) / rest
    # Of their own folders some last part is this one: $nnssl_raw/Dataset745_OpenMind/ds1/x.nii.gz.
    parts = Path(rest).parts
    whole = [root.joinpath(*parts[n:]) for n in range(max(1, len(parts)))]
    return next((one for one in whole if one.is_file()), root / rest)
