"""Scans without labels, in any folders; and images/ beside labels/ of the same names."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from data_prep.dicom import find_series, is_dicom
from data_prep.layouts.case import (
    Case,
    Layout,
    LeftOut,
    looks_like_a_label,
    may_be_dicom,
    modality_from_name,
    refused_label,
    sort_out,
    subject_from_name,
)

# Folders of images with the labels of the same names, and the part of an official split.
PAIRS = (
    ("images", "labels", "train"),
    ("imagesTr", "labelsTr", "train"),
    ("imagesVal", "labelsVal", "validation"),
    ("imagesVa", "labelsVa", "validation"),
    ("imagesTs", "labelsTs", "test"),
)


def from_pairs(root: Path, files: list[Path]) -> Layout | None:
    """`images/X.nii.gz` with `labels/X.nii.gz`, or imagesTr, imagesVal and imagesTs with theirs.

    None without two such folders. More than one pair of them is an official split.
    """
    there = [p for p in PAIRS if (root / p[0]).is_dir() and (root / p[1]).is_dir()]
    if not there:
        return None
    layout = Layout(f"{there[0][0]}/ with {there[0][1]}/ of the same names")
    images = sort_out(root, files, layout)
    by_name = {path.relative_to(root).as_posix(): path for path in images}
    used = set()
    for path in images:
        top, *rest = path.relative_to(root).parts
        if top in {labels for _, labels, _ in there}:
            continue
        found = [pair for pair in there if pair[0] == top]
        label = by_name.get("/".join((found[0][1], *rest))) if found else None
        if label is not None:
            used.add(label)
        split = found[0][2] if label is not None and len(there) > 1 else ""
        layout.cases.append(replace(_case(root, path, label), split=split))
    for pictures, labels, _ in there:
        for name, path in by_name.items():
            if name.startswith(f"{labels}/") and path not in used:
                layout.left_out.append(
                    LeftOut(name, "label_without_image", f"{pictures}/ has no file of this name")
                )
    return layout


def from_pile(root: Path, files: list[Path]) -> Layout:
    """Every image that does not look like a label."""
    layout = Layout("folder of scans without labels")
    dicom = [path for path in files if is_series_file(path)]
    _add_series(root, dicom, layout)
    taken = set(dicom)
    for path in sort_out(root, [path for path in files if path not in taken], layout):
        name = path.relative_to(root).as_posix()
        if looks_like_a_label(name):
            layout.left_out.append(refused_label(name))
        else:
            layout.cases.append(_case(root, path))
    return layout


def is_series_file(path: Path) -> bool:
    """Whether a file may be one of a DICOM series."""
    return may_be_dicom(path) and is_dicom(path)


def _add_series(root: Path, files: list[Path], layout: Layout) -> None:
    if not files:
        return
    layout.description += ", with DICOM series"
    for found in find_series(files):
        if found.subject:
            layout.patients.add(found.subject)
        names = [path.relative_to(root).as_posix() for path in found.files]
        for number, volume in enumerate(found.volumes):
            name = volume.files[0].relative_to(root).as_posix()
            if volume.volume:
                name += f" (volume {volume.volume + 1})"
            layout.cases.append(
                Case(
                    name=name,
                    images=volume.files[:1],
                    series=volume,
                    id=f"{Path(names[0]).parent.name}-{number + 1}",
                    subject=found.subject,
                )
            )
        if found.refusal is not None:
            code, detail = found.refusal.code, found.refusal.detail
            layout.left_out += [
                LeftOut(name, code, f"of the series of {names[0]}" if n else detail, found.subject)
                for n, name in enumerate(names)
            ]


def _case(root: Path, image: Path, label: Path | None = None) -> Case:
    name = image.relative_to(root).as_posix()
    return Case(
        name=name,
        images=(image,),
        label=label,
        subject=subject_from_name(name),
        modality=modality_from_name(name),
    )
