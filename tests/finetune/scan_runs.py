"""Tasks of whole scans on the sample hippocampi: their volume, and the side they are of."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from small_runs import settings

from data_prep.corpus import Corpus
from finetune.settings import FinetuneSettings
from pretrain.release import Release

VOLUME = {"name": "volume", "target": "ml", "kind": "regression", "unit": "ml"}
SIDE: dict[str, Any] = {
    "name": "side",
    "target": "side",
    "kind": "classification",
    "classes": ["odd", "even"],
    "flip": [False, False, True],
    "swap": [["odd", "even"]],
}


def truth_of(path: Path) -> dict[str, dict[str, Any]]:
    """Volume and side of each hippocampus of a labelled corpus."""
    corpus = Corpus.open(path)
    return {
        key: {
            "ml": float((corpus.read(i, "seg") > 0).sum() * np.prod(corpus.spacings[i]) / 1000),
            "side": "odd" if int(key[-3:]) % 2 else "even",
        }
        for i, key in enumerate(corpus.keys)
    }


def write_targets(file: Path, truth: Mapping[str, Mapping[str, Any]]) -> Path:
    """A CSV of targets."""
    names = list(next(iter(truth.values())))
    with file.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["key", *names])
        writer.writerows([key, *(values[n] for n in names)] for key, values in truth.items())
    return file


def scan_settings(
    release: Release, corpus: Path, runs: Path, task: Mapping[str, Any], targets: Path, **more: Any
) -> FinetuneSettings:
    """Settings of a run of seconds."""
    usual: dict[str, Any] = {"labels": 3, "crop_size": [16, 32, 32], "steps": 6}
    return settings(release, corpus, runs, task=task, targets=targets, **(usual | more))
