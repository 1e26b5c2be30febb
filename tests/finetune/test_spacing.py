"""Finetuning at the checkpoint's spacing: crops, windows and scores show the same object in mm."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from small_runs import write_encoder

from data_prep.build import prep
from data_prep.corpus import Corpus
from data_prep.preprocess import Preprocess
from data_prep.settings import PrepSettings
from finetune.rows import read_rows
from finetune.settings import FinetuneSettings
from finetune.train import build_model, finetune, make_plan, train
from pretrain.loader import CropDataset, collate, to_batch
from pretrain.loop import Loop
from pretrain.run_folder import RunFolder
from pretrain.schedule import Schedule

BACKBONE: dict[str, Any] = {
    "name": "resenc.ResEncUNetEncoder",
    "args": {"in_channels": 1, "features": [6, 12], "strides": [1, 2], "blocks": [1, 1]},
}
TASK = {
    "name": "organs",
    "classes": [
        {"name": "left", "values": [1], "tolerance_mm": 2.0},
        {"name": "right", "values": [2], "tolerance_mm": 2.0},
    ],
}
CHECKPOINT_MM = (1.5, 1.5, 1.5)
# RAS: x to the right, y to anterior, z to superior; other spacings than the checkpoint's.
SPACINGS_RAS = [(1.0, 1.2, 3.0), (1.25, 1.0, 2.5), (1.0, 1.0, 2.0)]
FIELD_MM = np.array([48.0, 42.0, 60.0])


def boxes(seed: int) -> dict[int, np.ndarray]:
    """Ends in mm [3, 2] of a large low organ on the left (1) and a small high one on the right."""
    move = np.random.default_rng(seed).integers(0, 4, 3)[:, None].astype(float)
    left = np.array([[3.0, 21.0], [6.0, 24.0], [6.0, 30.0]])
    right = np.array([[30.0, 42.0], [18.0, 33.0], [36.0, 51.0]])
    return {1: left + move, 2: right + move}


def painted(seed: int, spacing: tuple[float, float, float]) -> tuple[np.ndarray, np.ndarray]:
    """Image and label [x, y, z]: a voxel belongs to a box if its centre lies in it."""
    shape = np.round(FIELD_MM / spacing).astype(int)
    centres = np.meshgrid(
        *((np.arange(n) + 0.5) * s for n, s in zip(shape, spacing, strict=True)), indexing="ij"
    )
    label = np.zeros(shape, np.uint8)
    for value, ends in boxes(seed).items():
        inside = [(c > a) & (c < b) for c, (a, b) in zip(centres, ends, strict=True)]
        label[np.logical_and.reduce(inside)] = value
    noise = np.random.default_rng(seed).normal(size=shape) * 15
    return (np.array([0, 400, -400])[label] + noise).astype(np.int16), label


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("phantoms")
    lines = ["image,label,subject,split"]
    for number in range(6):
        spacing = SPACINGS_RAS[number % 3]
        image, label = painted(number, spacing)
        affine = np.diag([*spacing, 1.0])
        for kind, array in (("image", image), ("label", label)):
            nib.save(nib.Nifti1Image(array, affine), folder / f"{kind}{number}.nii.gz")
        part = "train" if number < 3 else "test"
        lines.append(f"image{number}.nii.gz,label{number}.nii.gz,s{number},{part}")
    (folder / "list.csv").write_text("\n".join(lines) + "\n")
    prep(
        PrepSettings(input=folder / "list.csv", output=folder / "corpus", keys="names", processes=1)
    )
    return folder / "corpus"


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_encoder(
        tmp_path_factory.mktemp("spacing") / "release",
        BACKBONE,
        crop_size=[24, 20, 16],
        preprocess=Preprocess.default(CHECKPOINT_MM).to_dict(),
    )


def settings(corpus: Path, release: Path, runs: Path, **changes: Any) -> FinetuneSettings:
    return FinetuneSettings.model_validate(
        {
            "task": TASK,
            "corpus": corpus,
            "ckpt": release,
            "runs": runs,
            "steps": 160,
            "batch_size": 2,
            "lr": 1e-2,
            "warmup": 5,
            "foreground": 0.8,
            "trainer": {"accelerator": "cpu", "precision": "32-true", "workers": 0},
            **changes,
        }
    )


def test_crops_hold_objects_of_their_true_size_and_side(corpus: Path) -> None:
    """Extents in mm to half a voxel of either grid; left is left, above is above, on each axis."""
    opened = Corpus.open(corpus)
    size = (48, 48, 48)
    dataset = CropDataset(
        opened, np.arange(6), Schedule(opened.shards, 0, 4), Preprocess.default(CHECKPOINT_MM),
        size, label=True,
    )  # fmt: skip
    for index in range(6):
        batch = to_batch(collate([dataset[index]]))
        number = int(batch.keys[0].removeprefix("image"))
        assert batch.label is not None
        label, image = batch.label[0], batch.image[0, 0]
        native = SPACINGS_RAS[number % 3]
        centre = {}
        for value, ends in boxes(number).items():
            found = (label == value).nonzero().double()
            spread = (found.amax(0) - found.amin(0) + 1) * 1.5
            for axis, ras in ((0, 2), (1, 1), (2, 0)):
                true = ends[ras, 1] - ends[ras, 0]
                assert abs(float(spread[axis]) - true) <= 1.5 + native[ras]
            centre[value] = found.mean(0)
            around = (label == 0) & batch.valid[0, 0]
            contrast = image[label == value].median() - image[around].median()
            assert (contrast > 0) == (value == 1)
        # D runs to superior, H to posterior, W to left.
        offset = (centre[2] - centre[1]) * 1.5
        expected = [boxes(number)[2].mean(1)[a] - boxes(number)[1].mean(1)[a] for a in (2, 1, 0)]
        for axis, (mm, sign) in enumerate(zip(expected, (1, -1, -1), strict=True)):
            assert abs(float(offset[axis]) - sign * mm) < 1.0


def test_a_model_trained_on_resampled_crops_scores_on_the_native_grid(
    corpus: Path, release: Path, tmp_path: Path
) -> None:
    """What training learns at the checkpoint's spacing lies in place in native predictions."""
    chosen = settings(corpus, release, tmp_path, augment={"rotate": 0.2, "scale": 0.2})
    run = finetune(chosen)
    rows = read_rows(run / "rows.csv")
    assert len(rows) == 6 and min(row.dsc for row in rows) > 0.85
    opened = Corpus.open(corpus)
    for key in {row.case for row in rows}:
        native = opened.meta(opened.position(key))["native"]
        image = nib.load(run / "predictions" / f"{key}.nii.gz")
        assert list(image.shape) == native["shape"] and np.allclose(image.affine, native["affine"])
    model = json.loads((run / "model.json").read_text())
    assert model["preprocess"] == Preprocess.default(CHECKPOINT_MM).to_dict()


def test_spacing_native_is_recorded_as_another_recipe(
    corpus: Path, release: Path, tmp_path: Path
) -> None:
    plans = [
        make_plan(settings(corpus, release, tmp_path, spacing=spacing))
        for spacing in ("checkpoint", "native")
    ]
    assert [plan.preprocess.spacing_mm for plan in plans] == [CHECKPOINT_MM, None]
    assert plans[0].identity["config_hash"] != plans[1].identity["config_hash"]


def test_training_mirrors_swap_the_sides_of_the_task(
    corpus: Path, release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The large organ is the left one; in a mirror image it lies on the right and is named so."""
    task = {**TASK, "flip": [False, False, True], "swap": [[1, 2]]}
    plan = make_plan(settings(corpus, release, tmp_path, task=task, crop_size=[56, 40, 48]))
    loops: list[Loop] = []
    monkeypatch.setattr(Loop, "fit", lambda self, model: loops.append(self))
    train(plan, RunFolder(tmp_path / "run"), *build_model(plan))
    (loop,) = loops
    seen = set()
    for index in range(12):
        batch = loop.to_batch(collate([loop.dataset[index]]))
        assert batch.label is not None
        label = batch.label[0]
        sizes = [int((label == value).sum()) for value in (1, 2)]
        if min(sizes) < 400:
            continue  # cut off at the crop's end
        large = 1 + int(sizes[1] > sizes[0])
        on_the_right = bool(
            torch.argwhere(label == large)[:, 2].double().mean()
            < torch.argwhere(label == 3 - large)[:, 2].double().mean()
        )
        assert large == (2 if on_the_right else 1)
        seen.add(on_the_right)
    assert seen == {True, False}
