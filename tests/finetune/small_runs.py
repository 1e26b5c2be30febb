"""A release of a few thousand weights and settings that finetune it in a second."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from data_prep.corpus import Corpus
from data_prep.preprocess import Preprocess
from data_prep.splits import split_from, write_split
from finetune.settings import FinetuneSettings
from pretrain.arguments import build_backbone
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


def make_release(folder: Path, kind: str) -> Release:
    """A release of random weights, as if it had been pretrained."""
    torch.manual_seed(5)
    config = {
        "format": 1,
        "name": f"tiny-{kind}",
        "kind": "encoder",
        "backbone": BACKBONES[kind],
        "objective": {"name": "cnn_mae.CnnMAE", "args": {}},
        "crop_size": [8, 16, 32],
        "modalities": ["CT", "MR"],
        "preprocess": Preprocess.default().to_dict(),
        "training": {"steps": 0, "seed": 5},
        "data": {},
        "versions": {},
    }
    seen = {"format": 1, "values": ["dhash-0:0"]}
    write_release(folder, encoder=backbone(kind), config=config, fingerprints=seen, card="A test\n")
    return load_release(folder)


def add_few_split(path: Path) -> None:
    """The labelled corpus gets a split of four cases to train on and one to score."""
    corpus = Corpus.open(path)
    if "few" in corpus.splits:
        return
    official = corpus.split("official")["parts"]
    part = dict.fromkeys(official["train"][:4], "train")
    part |= dict.fromkeys(official["test"][:1], "test")
    parts = [part.get(key, "") for key in corpus.keys]
    write_split(split_from("few", corpus.keys, corpus.subjects, parts), path / "splits")


def settings(release: Release, corpus: Path, runs: Path, **changes: Any) -> FinetuneSettings:
    chosen = {
        "task": TASK, "corpus": corpus, "ckpt": release.path, "labels": 2, "split": "few",
        "runs": runs, "run": "r", "steps": 12, "batch_size": 2, "lr": 3e-3, "overlap": 0.0,
        "save_every": 1000, "log_every": 4, "crop_size": [8, 16, 32],
        "trainer": {"accelerator": "cpu", "precision": "32-true", "workers": 0},
    }  # fmt: skip
    return FinetuneSettings.model_validate(chosen | changes)
