"""Scans without labels, in any folders; and images/ beside labels/ of the same names."""

from __future__ import annotations

from pathlib import Path

from data_prep.layouts.case import (
    Case,
    Layout,
    LeftOut,
    looks_like_a_label,
    modality_from_name,
    sort_out,
    subject_from_name,
)


def from_pairs(root: Path, files: list[Path]) -> Layout | None:
    """`images/X.nii.gz` with `labels/X.nii.gz`; None without both folders."""
    if not ((root / "images").is_dir() and (root / "labels").is_dir()):
        return None
    layout = Layout("images/ with labels/ of the same names")
    images = sort_out(root, files, layout)
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


def from_pile(root: Path, files: list[Path]) -> Layout:
    """Every image that does not look like a label."""
    layout = Layout("folder of scans without labels")
    for path in sort_out(root, files, layout):
        name = path.relative_to(root).as_posix()
        if looks_like_a_label(name):
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


def _case(root: Path, image: Path, label: Path | None = None) -> Case:
    name = image.relative_to(root).as_posix()
    return Case(
        name=name,
        images=(image,),
        label=label,
        subject=subject_from_name(name),
        modality=modality_from_name(name),
    )
