"""A release of a few thousand weights and settings that finetune it in a second."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nibabel as nib
import pytest
import torch

from data_prep.build import prep
from data_prep.corpus import Corpus
from data_prep.preprocess import Preprocess
from data_prep.settings import PrepSettings
from data_prep.splits import split_from, write_split
from finetune.segmentation import Segmentation
from finetune.settings import FinetuneSettings
from pretrain.arguments import build_backbone
from pretrain.objective import Batch, Losses
from pretrain.release import Release, load_release, write_release

TASK = {
    "name": "hippocampus",
    "classes": [
        {"name": "anterior", "values": [1], "tolerance_mm": 1.0},
        {"name": "posterior", "values": [2], "tolerance_mm": 1.0},
    ],
}
BACKBONES: dict[str, dict[str, Any]] = {
    "resenc": {
        "name": "resenc.ResEncUNetEncoder",
        "args": {"features": [4, 8, 8, 8], "strides": [1, 2, 2, 2], "blocks": [1, 1, 1, 1]},
    },
    "unet": {
        "name": "unet.UNetEncoder",
        "args": {"features": [4, 8, 8], "strides": [1, 2, 2], "convs": [1, 1, 1]},
    },
    "vit": {
        "name": "vit.ViT3D",
        "args": {
            "patch_size": 8,
            "embed_dim": 24,
            "depth": 4,
            "num_heads": 2,
            "cls_token": True,
            "register_tokens": 2,
            "position": "learned",
            "position_grid": [2, 3, 4],
            "drop_path": 0.3,
        },
    },
    "primus": {
        "name": "vit.ViT3D",
        "args": {
            "patch_size": 8, "embed_dim": 24, "depth": 4, "num_heads": 2, "rope": True,
            "mlp": "swiglu", "inner_norm": True, "decoder": "patch",
        },
    },
    "pct_net": {
        "name": "pct_net.PCTNetEncoder",
        "args": {
            "features": [4, 4, 8, 8, 8], "heads": [2, 2, 4], "windows": [2, 2, 2],
            "depths": [1, 1, 1], "resolution_mode": 2,
        },
    },
}  # fmt: skip


def backbone(kind: str) -> Any:
    chosen = BACKBONES[kind]
    return build_backbone(chosen["name"], chosen["args"], "test")


def write_encoder(
    folder: Path,
    described: dict[str, Any],
    *,
    prints: Sequence[str] = (),
    seed: int = 5,
    **changes: Any,
) -> Path:
    """Writes a release of random weights, as if it had been pretrained.

    Args:
        folder: that is made.
        described: the backbone as config.json has it.
        prints: fingerprints of what it is said to have seen.
        seed: of the weights.
        changes: of keys of config.json.
    """
    torch.manual_seed(seed)
    config = {
        "format": 1,
        "name": "tiny-mae",
        "kind": "encoder",
        "backbone": described,
        "objective": {"name": "cnn_mae.CnnMAE", "args": {}},
        "crop_size": [16, 24, 16],
        "modalities": ["CT", "MR"],
        "preprocess": Preprocess.default().to_dict(),
        "training": {"steps": 0, "seed": seed, "recipe_hash": "abc"},
        "data": {},
        "versions": {},
        **changes,
    }
    write_release(
        folder,
        encoder=build_backbone(described["name"], described["args"], "test"),
        config=config,
        fingerprints={"format": 1, "values": list(prints)},
        card="A test.\n",
    )
    return folder


def make_release(folder: Path, kind: str) -> Release:
    """A release of one of the backbones above."""
    changes = {"name": f"tiny-{kind}", "crop_size": [8, 16, 32]}
    write_encoder(folder, BACKBONES[kind], prints=["dhash-0:0"], **changes)
    return load_release(folder)


@contextmanager
def killed_at(step: int) -> Iterator[None]:
    """A training in here ends without warning in the forward pass of a step."""
    original = Segmentation.forward

    def forward(self: Segmentation, batch: Batch, progress: float) -> Losses:
        if self.loop.step == step:
            raise RuntimeError("killed")
        return original(self, batch, progress)

    with pytest.MonkeyPatch.context() as patched, pytest.raises(RuntimeError, match="killed"):
        patched.setattr(Segmentation, "forward", forward)
        yield


def add_split(path: Path, name: str, train: int, test: int) -> None:
    """A labelled corpus gets a split of the first cases of its official one."""
    corpus = Corpus.open(path)
    if name in corpus.splits:
        return
    official = corpus.split("official")["parts"]
    part = dict.fromkeys(official["train"][:train], "train")
    part |= dict.fromkeys(official["test"][:test], "test")
    parts = [part.get(key, "") for key in corpus.keys]
    write_split(split_from(name, corpus.keys, corpus.subjects, parts), path / "splits")


def add_few_split(path: Path) -> None:
    """The labelled corpus gets a split of four cases to train on and one to score."""
    add_split(path, "few", 4, 1)


def settings(release: Release, corpus: Path, runs: Path, **changes: Any) -> FinetuneSettings:
    chosen = {
        "task": TASK, "corpus": corpus, "ckpt": release.path, "labels": 2, "split": "few",
        "runs": runs, "run": "r", "steps": 12, "batch_size": 2, "lr": 3e-3, "overlap": 0.0,
        "save_every": 1000, "log_every": 4, "crop_size": [8, 16, 32],
        "trainer": {"accelerator": "cpu", "precision": "32-true", "workers": 0},
    }  # fmt: skip
    return FinetuneSettings.model_validate(chosen | changes)


def two_channels(samples: Path, folder: Path, names: Sequence[str], train: int) -> Path:
    """A labelled corpus of scans with two channels, the second the first turned dark.

    Its split `few` has so many to train on and one to test.
    """
    raw = folder / "raw"
    for part in ("imagesTr", "labelsTr"):
        (raw / part).mkdir(parents=True)
    for image in sorted((samples / "hippocampus/images").iterdir())[: train + 1]:
        case = image.name.removesuffix(".nii.gz")
        shutil.copy(image, raw / "imagesTr" / f"{case}_0000.nii.gz")
        dark = nib.Nifti1Image(255 - nib.load(image).get_fdata(), nib.load(image).affine)
        nib.save(dark, raw / "imagesTr" / f"{case}_0001.nii.gz")
        shutil.copy(samples / "hippocampus/labels" / image.name, raw / "labelsTr")
    told = {
        "channel_names": dict(zip("01", names, strict=True)), "numTraining": train + 1,
        "labels": {"background": 0, "anterior": 1, "posterior": 2}, "file_ending": ".nii.gz",
    }  # fmt: skip
    (raw / "dataset.json").write_text(json.dumps(told))
    prep(PrepSettings(input=raw, output=folder / "corpus", processes=1))
    corpus = Corpus.open(folder / "corpus")
    parts = ["test", *["train"] * train]
    write_split(split_from("few", corpus.keys, corpus.subjects, parts), corpus.path / "splits")
    return corpus.path
