"""The probe: right cases, right algebra, and a score that knows good features from noise."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from data_prep.corpus import Corpus
from data_prep.errors import InputError
from data_prep.preprocess import Preprocess
from data_prep.splits import split_from, write_split
from pretrain.probe import (
    PENALTY,
    Moments,
    Probe,
    apply,
    dice_of,
    neighbour_recall,
    probe_cases,
    ridge,
    sample,
)

CROP = (24, 32, 24)


@pytest.fixture(scope="module")
def probe(labelled_corpus: Path) -> Probe:
    return Probe.open(labelled_corpus, 1, Preprocess.default(), CROP)


# Which cases.


def test_cases_are_of_train_subjects_alone(labelled_corpus: Path) -> None:
    corpus = Corpus.open(labelled_corpus)
    items = probe_cases(corpus)
    split = corpus.split("official")
    assert len(items) == 8 == len({corpus.subjects[i] for i in items})
    assert {corpus.keys[i] for i in items} <= set(split["parts"]["train"])
    apart = set(split["groups"]["test"]) | set(split["groups"]["validation"])
    assert not {corpus.subjects[i] for i in items} & apart


def test_a_copy_of_a_test_case_is_not_used(
    labelled_corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same voxels under the name of a training subject: told by their fingerprint."""
    corpus = Corpus.open(labelled_corpus)
    prints = corpus.fingerprints()
    copied = corpus.keys[probe_cases(corpus)[0]]
    tested = corpus.split("official")["parts"]["test"][0]
    monkeypatch.setattr(Corpus, "fingerprints", lambda self: {**prints, copied: prints[tested]})
    assert copied not in {corpus.keys[i] for i in probe_cases(corpus)}


def test_a_subject_of_two_parts_is_not_used(
    labelled_corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Splits are by subject; one of somebody else's making may not be."""
    corpus = Corpus.open(labelled_corpus)
    split = corpus.split("official")
    torn = corpus.keys[probe_cases(corpus)[0]]
    subject = corpus.subjects[corpus.position(torn)]
    other = next(k for k in split["parts"]["train"]
                 if k != torn and corpus.subjects[corpus.position(k)] == subject)  # fmt: skip
    parts = {**split["parts"], "test": [*split["parts"]["test"], other]}
    monkeypatch.setattr(Corpus, "split", lambda self, name: {**split, "parts": parts})
    assert torn not in {corpus.keys[i] for i in probe_cases(corpus)}


def test_corpora_that_cannot_serve_are_refused(
    pretrain_corpus: Path, labelled_corpus: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"health\.probe=.*holds no labels"):
        Probe.open(pretrain_corpus, 1, Preprocess.default(), CROP)
    with pytest.raises(InputError, match="channels"):
        Probe.open(labelled_corpus, 2, Preprocess.default(), CROP)
    copy = shutil.copytree(labelled_corpus, tmp_path / "corpus")
    corpus = Corpus.open(copy)
    parts = ["test"] * len(corpus)
    parts[0] = "train"
    same = [i for i, s in enumerate(corpus.subjects) if s == corpus.subjects[0]]
    for i in same:
        parts[i] = "train"
    write_split(split_from("official", corpus.keys, corpus.subjects, parts), copy / "splits")
    with pytest.raises(InputError, match="has 1 subjects"):
        Probe.open(copy, 1, Preprocess.default(), CROP)


# The algebra.


def test_ridge_solves_its_equation(seed: int) -> None:
    """Against least squares on the stacked, standardised, weighted rows of all cases."""
    rng = np.random.default_rng(seed)
    cases = []
    for n in (30, 50):
        w = rng.uniform(0.5, 2, n)
        x = rng.normal(size=(n, 5)) * [1, 10, 0.1, 3, 1] + [0, 5, 0, -2, 100]
        cases.append((x, rng.normal(size=(n, 3)), w / w.sum()))
    slope, bias = ridge([Moments.of(*case) for case in cases])
    x, y = (np.concatenate([case[i] for case in cases]) for i in (0, 1))
    w = np.concatenate([case[2] for case in cases]) / 2
    mean, scale = w @ x, np.sqrt(w @ (x - w @ x) ** 2)
    z, t, root = (x - mean) / scale, y - w @ y, np.sqrt(w)[:, None]
    a = np.concatenate([z * root, np.sqrt(PENALTY) * np.eye(5)])
    b = np.concatenate([t * root, np.zeros((5, 3))])
    expected = np.linalg.lstsq(a, b, rcond=None)[0]
    np.testing.assert_allclose(x @ slope + bias, z @ expected + w @ y, rtol=1e-6, atol=1e-8)


def test_a_feature_that_does_not_vary_does_no_harm(seed: int) -> None:
    x = np.random.default_rng(seed).normal(size=(40, 3))
    x[:, 1] = 4.0
    slope, bias = ridge([Moments.of(x, x[:, :1], np.full(40, 1 / 40))])
    assert np.isfinite(slope).all() and np.isfinite(bias).all()


def test_rules_applied_to_maps_are_those_of_the_voxels(seed: int) -> None:
    """Interpolating features and then applying the rule, or the other way round: the same."""
    torch.manual_seed(seed)
    maps = [torch.randn(4, 4, 6, 3), torch.randn(5, 2, 3, 2)]
    shape = (8, 12, 6)
    voxels = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1).reshape(-1, 3)
    features = sample(maps, voxels, shape)
    whole = torch.cat(
        [F.interpolate(m[None], shape, mode="trilinear", align_corners=False)[0] for m in maps]
    )
    torch.testing.assert_close(features, whole.flatten(1).T, rtol=1e-4, atol=1e-5)
    slope, bias = np.random.default_rng(seed).normal(size=(9, 3)), np.array([0.1, 0, -0.1])
    expected = (features.double().numpy() @ slope + bias).argmax(1)
    found = apply(maps, slope, bias, shape).flatten().numpy()
    assert (found == expected).mean() > 0.999  # but for ties within rounding


def test_dice_counts_what_counts() -> None:
    label = np.array([[[0, 1, 1, 2]]])
    predicted = np.array([[[1, 1, 0, 2]]])
    everywhere = np.ones_like(label, bool)
    assert dice_of(predicted, label, everywhere) == [0.5, 1.0]
    assert dice_of(predicted, label, label != 2) == [0.5]
    assert dice_of(np.zeros_like(label), label, everywhere) == [0.0, 0.0]


def test_neighbours_are_of_other_cases(seed: int) -> None:
    """Features that name the case say nothing of the class; those that name the class all."""
    rng = np.random.default_rng(seed)
    groups, classes = np.repeat(np.arange(4), 60), np.tile([0, 0, 1], 80)
    noise = rng.normal(size=(240, 8)) * 0.1
    told = noise + np.eye(8)[classes]
    assert neighbour_recall(told, classes, groups) == 1.0
    private = rng.normal(size=(8, 8))[groups * 2 + classes] + noise
    assert neighbour_recall(private, classes, groups) < 0.9
    assert 0.35 < neighbour_recall(noise, classes, groups) < 0.65


# The whole.


def scored(probe: Probe, maps: Any) -> dict[str, float]:
    """With an encoder that is a function of the image and of the label beside it."""
    probe.score(lambda image: [image[:, :, ::4, ::4, ::4]], [(4, 4, 4)], torch.device("cpu"))
    cases = iter(probe._cases)

    def encode(image: Tensor) -> list[Tensor]:
        label = torch.from_numpy(next(cases).label)
        return [maps(image, F.one_hot(label, 3).permute(3, 0, 1, 2)[None].float())]

    return probe.score(encode, [(4, 4, 4)], torch.device("cpu"))


def test_features_that_know_the_classes_score_and_noise_does_not(probe: Probe, seed: int) -> None:
    def knows(image: Tensor, classes: Tensor) -> Tensor:
        return F.avg_pool3d(classes, 4)

    made = torch.Generator().manual_seed(seed)  # other noise for each case

    def noise(image: Tensor, classes: Tensor) -> Tensor:
        return torch.randn((1, 16, *(s // 4 for s in CROP)), generator=made)

    best, worst = scored(probe, knows), scored(probe, noise)
    assert best["probe_dice"] > 0.75  # what is left is the cells' size
    assert best["probe_knn"] > 0.8
    assert worst["probe_dice"] < 0.4 and worst["probe_knn"] < 0.6
    again = scored(probe, knows)
    assert again == best


def test_features_that_are_not_finite_have_no_score(probe: Probe) -> None:
    found = scored(probe, lambda image, classes: F.avg_pool3d(classes, 4) * torch.nan)
    assert all(np.isnan(value) for value in found.values())


def test_crops_lie_around_what_is_labelled(probe: Probe) -> None:
    scored(probe, lambda image, classes: F.avg_pool3d(classes, 4))
    for case in probe._cases:
        held = np.argwhere(case.label > 0)
        assert len(held) > 300
        assert (np.abs(held.mean(0) - np.array(CROP) / 2) < np.array(CROP) / 4).all()
        assert case.weight.sum() == pytest.approx(1)
        # Half of the voxels are of the classes, whatever their share of the crop.
        assert (case.target[:, 0] == 1).sum() == 256 and (case.target[:, 0] == 0).sum() == 256


def test_a_probe_with_test_cases_alone_starts_nothing(
    pretrain_corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from voxelith import main

    words = [f"corpus={pretrain_corpus}", "run=x", f"runs={tmp_path}/runs", "crop_size=[32,48,32]"]
    more = ["backbone=vit_ti", f"health.probe={pretrain_corpus}", "trainer=cpu"]
    assert main(["pretrain", *words, *more]) == 2
    assert "holds no labels" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
    assert main(["pretrain", *words, "health.evry=3"]) == 2
    assert "did you mean health.every?" in capsys.readouterr().err
