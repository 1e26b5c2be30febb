"""A folder for each case: TotalSegmentator's and AbdomenAtlas' masks, KiTS' and ACDC's label maps.

- ID/ct.nii.gz with ID/segmentations/ORGAN.nii.gz, a mask per structure, and meta.csv with splits
- ID/imaging.nii.gz with ID/segmentation.nii.gz: KiTS
- ID/X.nii.gz with ID/X_gt.nii.gz: ACDC, the frames of one subject
"""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

from data_prep.errors import InputError, Naming
from data_prep.layouts.case import (
    Case,
    Layout,
    LeftOut,
    is_image,
    leave_out,
    looks_like_a_label,
    modality_from_name,
    stem,
)
from data_prep.splits import SPELLINGS

MASKS = "segmentations"
META = "meta.csv"

# The classes of TotalSegmentator's CT data set, version 2, in the order of their label values
# (Wasserthal et al. 2023, arXiv:2208.05868; its own table of classes).
SPINE = ["L5", "L4", "L3", "L2", "L1", *(f"T{n}" for n in range(12, 0, -1))]
SPINE += [f"C{n}" for n in range(7, 0, -1)]
TOTALSEGMENTATOR = (
    "spleen", "kidney_right", "kidney_left", "gallbladder", "liver", "stomach", "pancreas",
    "adrenal_gland_right", "adrenal_gland_left", "lung_upper_lobe_left", "lung_lower_lobe_left",
    "lung_upper_lobe_right", "lung_middle_lobe_right", "lung_lower_lobe_right", "esophagus",
    "trachea", "thyroid_gland", "small_bowel", "duodenum", "colon", "urinary_bladder", "prostate",
    "kidney_cyst_left", "kidney_cyst_right", "sacrum", "vertebrae_S1",
    *(f"vertebrae_{level}" for level in SPINE),
    "heart", "aorta", "pulmonary_vein", "brachiocephalic_trunk", "subclavian_artery_right",
    "subclavian_artery_left", "common_carotid_artery_right", "common_carotid_artery_left",
    "brachiocephalic_vein_left", "brachiocephalic_vein_right", "atrial_appendage_left",
    "superior_vena_cava", "inferior_vena_cava", "portal_vein_and_splenic_vein",
    "iliac_artery_left", "iliac_artery_right", "iliac_vena_left", "iliac_vena_right",
    "humerus_left", "humerus_right", "scapula_left", "scapula_right", "clavicula_left",
    "clavicula_right", "femur_left", "femur_right", "hip_left", "hip_right", "spinal_cord",
    "gluteus_maximus_left", "gluteus_maximus_right", "gluteus_medius_left",
    "gluteus_medius_right", "gluteus_minimus_left", "gluteus_minimus_right", "autochthon_left",
    "autochthon_right", "iliopsoas_left", "iliopsoas_right", "brain", "skull",
    *(f"rib_{side}_{number}" for side in ("left", "right") for number in range(1, 13)),
    "sternum", "costal_cartilages",
)  # fmt: skip


def from_folders(root: Path, files: list[Path]) -> Layout | None:
    """The cases of a data set with a folder for each; None if the input is something else.

    Structures get TotalSegmentator's label values if all of them are its own, else numbers from 1
    in the order of their names.
    """
    inside: dict[Path, list[Path]] = {}
    for path in files:
        if is_image(path) and path.parent != root:
            inside.setdefault(path.parent, []).append(path)
    layout = Layout("folder for each case")
    used: set[Path] = set()
    for folder, images in sorted(inside.items()):
        if folder.name == MASKS:
            continue
        masks = inside.get(folder / MASKS)
        found = _masked(root, folder, images, masks) if masks else _mapped(root, folder, images)
        layout.cases += found
        used.update(path for case in found for path in case.files)
    if not layout.cases:
        return None
    names = sorted({name for case in layout.cases for name, _ in case.organs})
    if names:
        official = set(names) <= set(TOTALSEGMENTATOR)
        order = TOTALSEGMENTATOR if official else tuple(names)
        layout.classes = {n: name for n, name in enumerate(order, start=1) if name in names}
    _read_meta(root, layout)
    leave_out(
        root, [f for f in files if f not in used], layout, "not_listed", "belongs to no case's pair"
    )
    layout.cases.sort(key=lambda case: case.name)
    return layout


def _masked(root: Path, folder: Path, images: list[Path], masks: list[Path]) -> list[Case]:
    """The one image of a folder with the masks below it."""
    scans = [path for path in images if not looks_like_a_label(path.name)]
    if len(scans) != 1:
        return []
    organs = tuple(sorted((stem(path), path) for path in masks))
    return [replace(_case(root, folder, scans[0]), organs=organs)]


def _mapped(root: Path, folder: Path, images: list[Path]) -> list[Case]:
    """KiTS' imaging and segmentation, or ACDC's frames with their ground truth."""
    by_stem = {stem(path): path for path in images}
    if set(by_stem) == {"imaging", "segmentation"}:
        case = _case(root, folder, by_stem["imaging"])
        return [replace(case, label=by_stem["segmentation"])]
    return [
        replace(
            _case(root, folder, path), label=by_stem[f"{name}_gt"], id=name, subject=folder.name
        )
        for name, path in by_stem.items()
        if f"{name}_gt" in by_stem
    ]


def _case(root: Path, folder: Path, image: Path) -> Case:
    name = image.relative_to(root).as_posix()
    return Case(name, (image,), id=folder.name, modality=modality_from_name(image.name))


def _read_meta(root: Path, layout: Layout) -> None:
    """The splits of meta.csv (image_id and split), whatever separates its columns."""
    path = root / META
    if not path.is_file():
        return
    # Its notes may be of any encoding; names are those of folders, byte by byte.
    text = path.read_text(encoding="utf-8-sig", errors="surrogateescape")
    first = text.splitlines()[0] if text.strip() else ""
    try:
        rows = list(csv.DictReader(text.splitlines(), delimiter=";" if ";" in first else ","))
    except csv.Error as error:
        raise InputError(f"{path}: not readable as CSV ({error})") from error
    parts = {
        row["image_id"]: (row.get("split") or "").strip().lower()
        for row in rows
        if row.get("image_id")
    }
    strange = sorted({part for part in parts.values() if part and part not in SPELLINGS})
    if strange:
        use = "train, val or test is needed"
        raise InputError(
            Naming(f"{path}: split {', '.join(strange)}; {use}", f"{path}: another split; {use}")
        )
    layout.cases = [
        replace(case, split=SPELLINGS.get(parts.get(case.id, ""), "")) for case in layout.cases
    ]
    have = {case.id for case in layout.cases}
    absent = sorted(name for name, part in parts.items() if part and name not in have)
    for name in absent:
        layout.left_out.append(LeftOut(name, "missing_file", f"{META} lists it, no folder has it"))
