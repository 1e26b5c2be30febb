"""Crops that are stated in millimetres: as many of them of every volume, and of new scans."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from test_geometry import dataset_of
from test_loop import settings

from data_prep.corpus import Corpus
from pretrain.loader import collate, to_batch
from pretrain.release import load_release
from pretrain.train import make_dataset, pretrain
from voxelith import main

VOXELS, MM = (8, 12, 8), (20.0, 18.0, 16.0)


def test_each_crop_spans_what_was_asked_for(pretrain_corpus: Path, tmp_path: Path) -> None:
    corpus = Corpus.open(pretrain_corpus)
    assert len(np.unique(corpus.spacings, axis=0)) > 1  # else it would say nothing
    dataset = make_dataset(settings(pretrain_corpus, tmp_path, "x", crop_mm=MM), corpus)
    spacing = np.divide(MM, VOXELS)
    same = dataset_of(pretrain_corpus, VOXELS, tuple(spacing))
    same.schedule, same.augment = dataset.schedule, dataset.augment
    for index in range(len(dataset)):
        batch = to_batch(collate([dataset[index]]))
        assert batch.image.shape[2:] == VOXELS
        np.testing.assert_allclose(batch.spacing[0].numpy(), spacing, rtol=1e-3)
        assert batch.box is not None
        low, high = batch.box[0].numpy()
        np.testing.assert_allclose((high - low) * batch.spacing[0].numpy(), MM, rtol=1e-3)
        assert torch.equal(batch.image, to_batch(collate([same[index]])).image)


def test_the_release_asks_it_of_new_scans(
    pretrain_corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = settings(pretrain_corpus, tmp_path, "x", crop_mm=MM, steps=2, warmup=1)
    pretrain(chosen)
    assert "larger than every volume" not in capsys.readouterr().out
    assert main(["export", str(tmp_path / "x"), str(tmp_path / "out")]) == 0
    found = load_release(tmp_path / "out").preprocess.spacing_mm
    np.testing.assert_allclose(np.asarray(found), np.divide(MM, VOXELS))
    # Another extent is another run.
    other = settings(pretrain_corpus, tmp_path, "x", crop_mm=(20.0, 18.0, 8.0), steps=3)
    with pytest.raises(Exception, match=r"crop_mm: \[20"):
        pretrain(other)
    with pytest.raises(ValidationError, match=r"is 150 x 1.5 x 2 mm a voxel, expected 0.05 to 100"):
        settings(pretrain_corpus, tmp_path, "x", crop_mm=(1200, 18, 16))
    # What is too large is told on the grid that it is of.
    wide = settings(pretrain_corpus, tmp_path, "y", crop_mm=(0.8, 1.2, 0.8), steps=1, warmup=0)
    pretrain(wide)
    assert "larger than every volume" not in capsys.readouterr().out
    long = settings(pretrain_corpus, tmp_path, "z", crop_mm=(700, 18, 16), steps=1, warmup=0)
    pretrain(long)
    assert "larger than every volume of the corpus along D (8 of" in capsys.readouterr().out
