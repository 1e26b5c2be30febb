"""A CSV that lists the scans: the layout for whatever has no layout of its own."""

from __future__ import annotations

import csv
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

from data_prep.dicom import Found, find_series, is_dicom
from data_prep.errors import InputError, Naming, without_names
from data_prep.layouts.case import (
    BETWEEN_CHANNELS,
    GROUPS,
    Case,
    Layout,
    files_below,
    is_there,
    modality_from_name,
    subject_from_name,
)
from data_prep.splits import SPELLINGS

COLUMNS = (
    "image", "label", "mask", "subject", "modality", "sequence", "source", "licence", "split",
    "fold", *GROUPS,
)  # fmt: skip


def from_csv(path: Path) -> Layout:
    """The cases of a list with the columns above, of which only `image` is needed.

    A case of several channels has their files in one cell, `t1.nii.gz;flair.nii.gz`, and their
    names in `sequence`, `T1w;FLAIR`; one 4D file with several names is taken apart. An image may
    be a folder that holds one volume of DICOM.

    Raises InputError with all mistakes of the list.
    """
    try:
        return _listed(path)
    except InputError as error:
        # Its name is the user's own.
        raise InputError(
            [Naming(p, without_names(p).replace(str(path), "the list")) for p in error.problems]
        ) from error


def _listed(path: Path) -> Layout:
    header, rows = _read(path)
    problems: list[str] = []
    if "image" not in header:
        problems.append(f"{path}: has no column 'image'; the columns can be {', '.join(COLUMNS)}")
    for name in header:
        if name not in COLUMNS:
            known = f"known are {', '.join(COLUMNS)}"
            unknown = f"{path}: unknown column"
            problems.append(Naming(f"{unknown} {name!r}; {known}", f"{unknown}; {known}"))
    if problems:
        raise InputError(problems)
    layout = Layout("list")
    seen: dict[str, int] = {}
    counts: dict[int, int] = {}
    for line, row in enumerate(rows, start=2):
        cells = {str(name): (value or "").strip() for name, value in row.items() if name}
        if not any(cells.values()):
            continue
        wrong = _row_problems(f"{path}, line {line}", row, cells, seen, line)
        problems += wrong
        if not wrong:
            case = _row_case(path.parent, cells)
            if is_there(case.images[0], folder=True):
                found = _series_of(f"{path}, line {line}", case)
                if isinstance(found, list):
                    problems += found
                else:
                    case = replace(case, series=found.volumes[0])
                    if found.subject and not case.subject:  # as where series are looked for
                        layout.patients.add(found.subject)
                        case = replace(case, subject=found.subject)
            layout.cases.append(case)
            counts.setdefault(max(len(case.images), len(case.channels)), line)
    if len(counts) > 1:
        shown = ", ".join(f"{n} in line {line}" for n, line in sorted(counts.items()))
        problems.append(f"{path}: the cases differ in their number of channels ({shown})")
    if problems:
        raise InputError(problems)
    if not layout.cases:
        raise InputError(f"input={path}: the list is empty")
    return layout


def _read(path: Path) -> tuple[list[str], list[dict[Any, Any]]]:
    """The header and the rows of a list."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"input={path}: not readable as UTF-8 text ({error})") from error
    reader = csv.DictReader(io.StringIO(text, newline=""))
    try:
        reader.fieldnames = header = [str(name).strip() for name in reader.fieldnames or []]
        return header, list(reader)
    except csv.Error as error:
        raise InputError(
            f"{path}, after line {reader.line_num}: not readable as CSV ({error}); is a quote "
            "missing?"
        ) from error


def _row_problems(
    where: str, row: dict[Any, Any], cells: dict[str, str], seen: dict[str, int], line: int
) -> list[str]:
    problems: list[str] = []
    if None in row:
        problems.append(f"{where}: more cells than columns; quote cells that hold commas")
    image = cells.get("image", "")
    if not image:
        problems.append(f"{where}: the image is missing")
    elif image in seen:
        again = f"is listed in line {seen[image]} already"
        problems.append(Naming(f"{where}: {image} {again}", f"{where}: its image {again}"))
    seen.setdefault(image, line)
    split = cells.get("split", "")
    if split and split.lower() not in SPELLINGS:
        use = "use train, validation or test"
        problems.append(Naming(f"{where}: split {split!r}; {use}", f"{where}: split; {use}"))
    fold = cells.get("fold", "")
    if fold and not fold.isdigit():
        use = "use 0, 1, 2, ..., the fold that validates on it"
        problems.append(Naming(f"{where}: fold {fold!r}; {use}", f"{where}: fold; {use}"))
    images = len(image.split(BETWEEN_CHANNELS))
    names = len(cells.get("sequence", "").split(BETWEEN_CHANNELS))
    if images > 1 and names != images:
        problems.append(
            f"{where}: {images} images and {names} names in sequence; name each channel, T1w;FLAIR"
        )
    for name in ("sequence", "source", "licence", *GROUPS):
        if len(cells.get(name, "")) > 64:
            problems.append(f"{where}: {name} is longer than 64 characters")
    return problems


def _series_of(where: str, case: Case) -> Found | list[str]:
    """The one DICOM series, of one volume, of a folder that a row names, or what is wrong."""
    folder = case.images[0]
    found = find_series([path for path in files_below(folder) if is_dicom(path)])
    refused = [one.refusal for one in found if one.refusal]
    volumes = [volume for one in found for volume in one.volumes]
    if len(case.images) == 1 and len(volumes) == 1 and not refused:
        return next(one for one in found if one.volumes)
    holds = f"is a folder and holds {len(volumes)} volumes of DICOM"
    details = "".join(f"; {one.code}, {one.detail}" for one in refused)
    codes = "".join(f"; {one.code}" for one in refused)
    way = "name a folder of one volume, or let prep look for series itself: input=FOLDER"
    return [
        Naming(
            f"{where}: {case.name} {holds}{details}; {way}",
            f"{where}: its image {holds}{codes}; {way}",
        )
    ]


def _row_case(folder: Path, cells: dict[str, str]) -> Case:
    image = cells["image"]
    modality = cells.get("modality", "").upper()
    first, *_ = names = [part.strip() for part in image.split(BETWEEN_CHANNELS)]
    known = {"MRI": "MR", "": None}.get(modality, modality)
    return Case(
        name=first,
        images=tuple(folder / name for name in names),
        label=folder / cells["label"] if cells.get("label") else None,
        mask=folder / cells["mask"] if cells.get("mask") else None,
        subject=cells.get("subject", "") or subject_from_name(image),
        modality=known or modality_from_name(first),
        sequence=cells.get("sequence", ""),
        source=cells.get("source", ""),
        licence=cells.get("licence", ""),
        split=SPELLINGS.get(cells.get("split", "").lower(), ""),
        fold=int(cells["fold"]) if cells.get("fold") else None,
        group=tuple((name, cells[name]) for name in GROUPS if cells.get(name)),
    )
