"""What the input is: a CSV list, an images/labels folder, a Decathlon task, or a pile of scans."""

from __future__ import annotations

import csv
import io
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_prep.errors import InputError
from data_prep.splits import SPELLINGS

IMAGE_SUFFIXES = (".nii.gz", ".nii")
# Files that data sets ship beside their scans; they are counted, not judged.
SIDE_SUFFIXES = (
    ".json", ".csv", ".tsv", ".md", ".txt", ".rst", ".yaml", ".yml", ".bval", ".bvec", ".xml",
    ".html", ".pdf", ".xlsx",
)  # fmt: skip
SIDE_NAMES = ("license", "licence", "readme", "changes", "citation")
COLUMNS = (
    "image", "label", "mask", "subject", "modality", "sequence", "source", "licence", "split",
)  # fmt: skip
CT_WORDS = {"ct", "cta", "cect", "ldct"}
MR_WORDS = {
    "mr", "mri", "t1", "t1w", "t1c", "t1ce", "t1gd", "t2", "t2w", "t2s", "flair", "dwi", "adc",
    "swi", "bold", "dce", "tof", "mprage",
}  # fmt: skip
OTHER_WORDS = {"pet": "PET", "suv": "PET", "fdg": "PET", "spect": "SPECT"}
LABEL_WORDS = {
    "seg", "dseg", "aseg", "label", "labels", "mask", "masks", "segmentation", "segmentations",
    "gt", "groundtruth", "annotation", "annotations", "parcellation",
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One scan of the input; `name` is its path as the input gives it, never stored."""

    name: str
    image: Path
    label: Path | None = None
    mask: Path | None = None
    subject: str = ""
    modality: str | None = None
    sequence: str = ""
    source: str = ""
    licence: str = ""
    split: str = ""


@dataclass(frozen=True)
class LeftOut:
    """A file that is no sample: its name in the input, a stable code, and what was found."""

    name: str
    code: str
    detail: str


@dataclass
class Layout:
    """What was recognised in the input."""

    description: str
    cases: list[Case] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    classes: dict[int, str] | None = None


def find_cases(source: Path) -> Layout:
    """Recognise the layout of an input folder or list and name its cases, sorted.

    Raises InputError if the input is missing, empty, or a list with mistakes (all at once).
    """
    if not source.exists():
        raise InputError(f"input={source}: no such file or folder")
    if source.is_file():
        if source.suffix.lower() == ".csv":
            return _from_csv(source)
        raise InputError(
            f"input={source}: a folder of scans or a .csv list is needed; for one scan, give the "
            "folder that holds it"
        )
    files = _files(source)
    if not files:
        raise InputError(f"input={source}: the folder is empty")
    decathlon = source / "dataset.json"
    if decathlon.is_file():
        layout = _from_decathlon(source, decathlon)
        if layout is not None:
            return layout
    if (source / "images").is_dir() and (source / "labels").is_dir():
        return _from_pairs(source, files)
    return _from_pile(source, files)


def is_image(path: Path) -> bool:
    """Whether the name is that of a NIfTI file."""
    return path.name.lower().endswith(IMAGE_SUFFIXES)


def stem(path: Path) -> str:
    """The file name without .nii or .nii.gz."""
    lower = path.name.lower()
    for suffix in IMAGE_SUFFIXES:
        if lower.endswith(suffix):
            return path.name[: -len(suffix)]
    return path.stem


def words(name: str) -> list[str]:
    """Lower-case words of a relative path, split at everything but letters and digits."""
    lower = name.lower()
    for suffix in IMAGE_SUFFIXES:
        lower = lower.removesuffix(suffix)
    return [word for word in re.split(r"[^a-z0-9]+", lower) if word]


def modality_from_name(name: str) -> str | None:
    """CT, MR or another modality, if a word of the path says so; the file's own name wins."""
    for part in reversed(name.split("/")):
        found = words(part)
        for word in reversed(found):
            if word in OTHER_WORDS:
                return OTHER_WORDS[word]
            if word in CT_WORDS:
                return "CT"
            if word in MR_WORDS:
                return "MR"
    return None


def subject_from_name(name: str) -> str:
    """The subject of a BIDS path (`sub-01/...`), or an empty string."""
    found = re.search(r"(?:^|[/_])sub-([A-Za-z0-9]+)", name)
    return found.group(1) if found else ""


def _files(root: Path) -> list[Path]:
    """All files below a folder but hidden ones, in a fixed order."""
    return sorted(
        (
            path
            for path in root.rglob("*")
            if path.is_file()
            and not any(part.startswith(".") for part in path.relative_to(root).parts)
        ),
        key=lambda path: path.relative_to(root).as_posix(),
    )


def _is_side_file(path: Path) -> bool:
    lower = path.name.lower()
    return lower.endswith(SIDE_SUFFIXES) or lower.split(".")[0] in SIDE_NAMES


def _sort_out(root: Path, files: list[Path], layout: Layout) -> list[Path]:
    """The images among the files; side files and strangers go to the layout's books."""
    images = []
    for path in files:
        name = path.relative_to(root).as_posix()
        if is_image(path):
            images.append(path)
        elif _is_side_file(path):
            layout.ignored.append(name)
        else:
            layout.left_out.append(
                LeftOut(name, "not_an_image", "only .nii and .nii.gz files are read")
            )
    return images


def _case(root: Path, image: Path, label: Path | None = None) -> Case:
    name = image.relative_to(root).as_posix()
    return Case(
        name=name,
        image=image,
        label=label,
        subject=subject_from_name(name),
        modality=modality_from_name(name),
    )


def _from_pairs(root: Path, files: list[Path]) -> Layout:
    layout = Layout("images/ with labels/ of the same names")
    images = _sort_out(root, files, layout)
    labels = {
        path.relative_to(root / "labels").as_posix(): path
        for path in images
        if path.relative_to(root).parts[0] == "labels"
    }
    used = set()
    for path in images:
        top, *rest = path.relative_to(root).parts
        if top == "labels":
            continue
        label = labels.get("/".join(rest)) if top == "images" else None
        if label is not None:
            used.add(label)
        layout.cases.append(_case(root, path, label))
    for path in labels.values():
        if path not in used:
            name = path.relative_to(root).as_posix()
            layout.left_out.append(
                LeftOut(name, "label_without_image", "images/ has no file of this name")
            )
    return layout


def _from_decathlon(root: Path, path: Path) -> Layout | None:
    """A Medical Segmentation Decathlon task; None if the JSON is something else."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        rows = data["training"]
        pairs = [(str(row["image"]), str(row["label"])) for row in rows]
        tests = [str(row if isinstance(row, str) else row["image"]) for row in data.get("test", [])]
        classes = {int(value): str(name) for value, name in data.get("labels", {}).items()}
        stated = " ".join(str(name) for name in data.get("modality", {}).values())
    except (ValueError, KeyError, TypeError, AttributeError, OSError):
        return None
    layout = Layout("Medical Segmentation Decathlon task (dataset.json)", classes=classes or None)
    modality = modality_from_name(stated)
    listed: set[Path] = set()
    problems = []
    for image_name, label_name in [*pairs, *((name, "") for name in tests)]:
        image = _inside(root, image_name)
        label = _inside(root, label_name) if label_name else None
        if image is None or (label_name and label is None):
            problems.append(f"{path}: {image_name!r} or its label lies outside the folder")
            continue
        name = image.relative_to(root).as_posix()
        listed.update({image, label} if label else {image})
        layout.cases.append(
            Case(name, image, label, subject=subject_from_name(name), modality=modality)
        )
    if problems:
        raise InputError(problems)
    for file in _sort_out(root, [f for f in _files(root) if f not in listed], layout):
        name = file.relative_to(root).as_posix()
        layout.left_out.append(LeftOut(name, "not_listed", "dataset.json does not list it"))
    layout.cases.sort(key=lambda case: case.name)
    return layout


def _inside(root: Path, name: str) -> Path | None:
    """A path below the root, or None if the name leads out of it."""
    parts = Path(name).parts
    if Path(name).is_absolute() or ".." in parts:
        return None
    return root.joinpath(*parts)


def _from_pile(root: Path, files: list[Path]) -> Layout:
    layout = Layout("folder of scans without labels")
    for path in _sort_out(root, files, layout):
        name = path.relative_to(root).as_posix()
        if any(word in LABEL_WORDS or word.startswith("labels") for word in words(name)):
            layout.left_out.append(
                LeftOut(
                    name,
                    "looks_like_a_label",
                    "its name says label or mask; list it in a CSV to use it",
                )
            )
        else:
            layout.cases.append(_case(root, path))
    return layout


def _from_csv(path: Path) -> Layout:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"input={path}: not readable as UTF-8 text ({error})") from error
    reader = csv.DictReader(io.StringIO(text, newline=""))
    header = [str(name).strip() for name in reader.fieldnames or []]
    reader.fieldnames = header
    problems = []
    if "image" not in header:
        problems.append(f"{path}: has no column 'image'; the columns can be {', '.join(COLUMNS)}")
    for name in header:
        if name not in COLUMNS:
            problems.append(f"{path}: unknown column {name!r}; known are {', '.join(COLUMNS)}")
    if problems:
        raise InputError(problems)
    layout = Layout(f"list {path.name}")
    seen: dict[str, int] = {}
    for line, row in enumerate(reader, start=2):
        cells = {str(name): (value or "").strip() for name, value in row.items() if name}
        if not any(cells.values()):
            continue
        problems += _row_problems(f"{path}, line {line}", row, cells, seen, line)
        layout.cases.append(_row_case(path.parent, cells))
    if problems:
        raise InputError(problems)
    if not layout.cases:
        raise InputError(f"input={path}: the list is empty")
    return layout


def _row_problems(
    where: str, row: dict[Any, Any], cells: dict[str, str], seen: dict[str, int], line: int
) -> list[str]:
    problems = []
    if None in row:
        problems.append(f"{where}: more cells than columns; quote cells that hold commas")
    image = cells.get("image", "")
    if not image:
        problems.append(f"{where}: the image is missing")
    elif image in seen:
        problems.append(f"{where}: {image} is listed in line {seen[image]} already")
    seen.setdefault(image, line)
    split = cells.get("split", "")
    if split and split.lower() not in SPELLINGS:
        problems.append(f"{where}: split {split!r}; use train, validation or test")
    for name in ("sequence", "source", "licence"):
        if len(cells.get(name, "")) > 64:
            problems.append(f"{where}: {name} is longer than 64 characters")
    return problems


def _row_case(folder: Path, cells: dict[str, str]) -> Case:
    image = cells.get("image", "")
    modality = cells.get("modality", "").upper()
    return Case(
        name=image,
        image=folder / image,
        label=folder / cells["label"] if cells.get("label") else None,
        mask=folder / cells["mask"] if cells.get("mask") else None,
        subject=cells.get("subject", "") or subject_from_name(image),
        modality={"MRI": "MR", "": None}.get(modality, modality) or modality_from_name(image),
        sequence=cells.get("sequence", ""),
        source=cells.get("source", ""),
        licence=cells.get("licence", ""),
        split=SPELLINGS.get(cells.get("split", "").lower(), ""),
    )
