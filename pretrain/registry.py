"""Checkpoints that are known by name: ours and public ones.

What is not known is None and said so: a revision that was not seen is the branch that the
repository's owner moves, and the first download pins its hash. Read on 2026-11-26 from the
projects' pages and from what others load; nothing was downloaded.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import samples
from data_prep.errors import InputError, near

RELEASES = Path(samples.__path__[0]) / "releases"


@dataclass(frozen=True)
class Known:
    """A checkpoint by name.

    Attributes:
        name: to fetch it by.
        about: what it is.
        licence: of the weights, as their page states it; what is only the code's says so.
        page: where its makers tell of it.
        repo: on the Hugging Face hub; None: it is nowhere where it could be fetched from.
        file: within that; empty for a release of ours.
        revision: a commit; None: what the branch main holds at the first download.
        sha256: of the file, or the release's digest; None: the first download pins it.
        note: what else its user must know.
        comes_with: whether the package itself has it, a release of ours in samples/releases.
        told: what a scan must become, which no file of weights says: keys of `pretrain.adopt.Told`,
            from the makers' own code or paper; None of releases, which say it themselves.
    """

    name: str
    about: str
    licence: str
    page: str
    repo: str | None = None
    file: str = ""
    revision: str | None = None
    sha256: str | None = None
    note: str = ""
    comes_with: bool = False
    told: dict[str, Any] | None = None

    @property
    def reference(self) -> str | None:
        """What it is fetched by: an address, or the folder of what the package has."""
        if self.comes_with:
            return str(RELEASES / self.name)
        if self.repo is None:
            return None
        revision = f"@{self.revision}" if self.revision else ""
        sha256 = f"#sha256={self.sha256}" if self.sha256 else ""
        return f"hf://{self.repo}{revision}" + (f"/{self.file}" if self.file else "") + sha256


OURS: tuple[Known, ...] = (
    Known(
        "resenc-small-cnn-mae",
        "ResEnc U-Net of 2 M parameters by masked blocks on 144 scans, most of them hippocampi",
        "CC BY-SA 4.0",
        "docs/results/protocol.md",
        sha256="f4713304fc6145118f90a32c9f1792a102963ce493ac6d03061caadcd54ae555",
        note="made on two CPU cores in half an hour: small, and no foundation model",
        comes_with=True,
    ),
)
"""Releases of voxelith."""

_NNSSL = "https://github.com/MIC-DKFZ/nnssl"
_VOCO = "https://github.com/Luffy03/Large-Scale-Medical"
_STUNET = "https://github.com/uni-medical/STU-Net"

_UNIT = {"rule": "window", "low": -175.0, "high": 250.0, "onto": [0.0, 1.0]}

_OPENMIND = {
    "modalities": ["MR"],
    "crop_size": [160, 160, 160],
    "spacing_mm": [1.0, 1.0, 1.0],
    "MR": {"rule": "zscore"},
}
"""nnssl: 1 mm, a z-score of each image; ours clips at the 0.5 and 99.5 percentiles before."""

_MONAI_CT = {"modalities": ["CT"], "spacing_mm": [1.5, 1.5, 1.5], "CT": _UNIT, "axes": "RAS"}
"""MONAI's loaders of abdominal CT: RAS, 1.5 mm, [-175, 250] HU onto [0, 1]."""

PUBLIC: tuple[Known, ...] = (
    Known(
        "openmind-resenc-l-mae",
        "OpenMind: ResEnc-L by MAE on 114k head and neck MRI",
        "CC BY 4.0",
        _NNSSL,
        "AnonRes/ResEncL-OpenMind-MAE",
        "checkpoint_final.pth",
        told=_OPENMIND,
    ),
    Known(
        "openmind-primus-m-mae",
        "OpenMind: Primus-M by MAE on 114k head and neck MRI",
        "CC BY 4.0 (on the card of the same makers' PrimusM-OpenMind-SimCLR)",
        _NNSSL,
        "AnonRes/PrimusM-OpenMind-MAE",
        "checkpoint_final.pth",
        told=_OPENMIND,
    ),
    *(
        Known(
            f"voco-{size.lower()}",
            f"VoCo: SwinUNETR {size}, {parameters} parameters, by VoCo on 160k CT",
            "Apache-2.0 is the code's; of the weights unknown",
            _VOCO,
            "Luffy503/VoCo",
            f"VoCo_{size}_SSL_head.pt",
            told={**_MONAI_CT, "crop_size": [96, 96, 96]},
        )
        for size, parameters in (("B", "53M"), ("L", "206M"), ("H", "818M"))
    ),
    Known(
        "3dino-vit-l",
        "3DINO: ViT-L by DINOv2 in 3D on CT and MRI",
        "CC BY-NC-ND 4.0",
        "https://github.com/AICONSlab/3DINO",
        "AICONSlab/3DINO-ViT",
        "3dino_vit_weights.pth",
        note="gated: accept its terms on the hub and log in (`hf auth login` or HF_TOKEN); trained "
        "on percentiles 0.05 and 99.95, on axes with the slice's plane first: RAS for axial scans",
        told={
            "modalities": ["CT", "MR"],
            "crop_size": [96, 96, 96],
            "spacing_mm": None,
            "CT": {"rule": "percentile"},
            "MR": {"rule": "percentile"},
            "axes": "RAS",
        },
    ),
    *(
        Known(
            f"stu-net-{size[0]}",
            f"STU-Net {size[0].upper()}: supervised on TotalSegmentator, 4000 epochs",
            "Apache-2.0 is the code's; of the weights unknown",
            _STUNET,
            "ziyanhuang/STU-Net",
            f"{size}_ep4k.model",
            note="nnU-Net's checkpoint: what is not weights in it may keep it from being read; "
            "values are scaled as TotalSegmentator's own networks scale them",
            told={
                "modalities": ["CT"],
                "crop_size": [128, 128, 128],
                "spacing_mm": [1.5, 1.5, 1.5],
                # Clipped, less a mean of -50.387, over a deviation of 503.392.
                "CT": {"rule": "window", "low": -1004.0, "high": 1588.0, "onto": [-1.894, 3.255]},
                "strides": [[1, 1, 1], *[[2, 2, 2]] * 5],
            },
        )
        for size in ("small", "base", "large", "huge")
    ),
    Known(
        "hi-end-mae",
        "Hi-End-MAE: ViT, patch 12, width 1536, on 10k CT",
        "Apache-2.0 is the project's; of the weights unknown",
        "https://github.com/FengheTan9/Hi-End-MAE",
        note="on Google Drive alone: download it by hand and give the file",
        told={**_MONAI_CT, "crop_size": [96, 96, 96]},
    ),
    Known(
        "meddinov3-b",
        "MedDINOv3: ViT-B/16 by DINOv3 on 3.9M slices of CT",
        "Apache-2.0",
        "https://github.com/ricklisz/MedDINOv3",
        "ricklisz123/MedDINOv3-ViTB-16-CT-3M",
        "model.pth",
        note="its makers confirm that test scans were among its data (MedDINOv3#4)",
        told={
            "modalities": ["CT"],
            "crop_size": [1, 224, 224],
            "spacing_mm": None,
            # (x - 65.108) / 178.017 of its demo, over the values that a CT can have.
            "CT": {"rule": "window", "low": -1024.0, "high": 3071.0, "onto": [-6.118, 16.885]},
            "in_channels": 1,
        },
    ),
)

KNOWN = {one.name: one for one in (*OURS, *PUBLIC)}


def known() -> list[dict[str, Any]]:
    """All of them as plain data."""
    return [
        {**asdict(one), "reference": one.reference, "ours": one in OURS} for one in KNOWN.values()
    ]


def as_text(facts: dict[str, Any]) -> str:
    """What is known and what the cache holds, for `voxelith fetch --list`."""
    lines = ["Ours:"]
    shown_public = False
    for one in facts["known"]:
        if not one["ours"] and not shown_public:
            lines.append("Public, of others:")
            shown_public = True
        where = "comes with voxelith" if one["comes_with"] else one["reference"]
        revision = one["revision"] or "main, not pinned: the first download pins what it holds"
        lines += [
            f"  {one['name']:<24} {one['about']}",
            f"  {'':<24} {where or 'no address to fetch from'}",
            f"  {'':<24} licence: {one['licence']}",
        ]
        if one["repo"]:
            lines.append(f"  {'':<24} revision: {revision}")
        if one["note"]:
            lines.append(f"  {'':<24} {one['note']}")
    lines.append(f"In the cache ({facts['cache']}):" + ("" if facts["kept"] else " nothing"))
    for pin in facts["kept"]:
        there = pin["path"] or "not there any more"
        lines.append(f"  {pin['reference']}  {pin['kind']}, sha256 {pin['digest'][:12]}, {there}")
    return "\n".join(lines)


def reference_of(name: str) -> str:
    """The reference of a checkpoint that is known by name, or the folder of one that is here.

    Raises:
        InputError: it is not known, or lies nowhere where it could be fetched from.
    """
    if name not in KNOWN:
        raise InputError(
            f"{name}: no such file, folder, reference or name; "
            f"{near(name, KNOWN, 'voxelith fetch --list shows the names')}"
        )
    one = KNOWN[name]
    if one.reference is None:
        raise InputError(f"{name}: {one.note} ({one.page})")
    return one.reference
