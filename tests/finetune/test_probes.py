"""Probes in closed form: the rule is that of the watching probe, the scores are finetuning's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from seeds import SEED
from small_runs import TASK, add_few_split, backbone, make_release, settings
from torch import Tensor

from data_prep.corpus import Corpus
from data_prep.preprocess import Preprocess
from finetune.decoders import LinearDecoder, NeighbourDecoder
from finetune.model_file import load_network
from finetune.probes import fit_probe
from finetune.rows import read_rows
from finetune.segmentation import Segmentation
from finetune.settings import TaskSettings
from finetune.train import finetune
from pretrain.loader import CropDataset, valid_of
from pretrain.probe import NEIGHBOURS, Moments, apply, choose_voxels, counted_maps, ridge, sample
from pretrain.schedule import Schedule, generator


@pytest.fixture(scope="module")
def dataset(labelled_corpus: Path) -> CropDataset:
    corpus = Corpus.open(labelled_corpus)
    samples = np.arange(4)
    schedule = Schedule(np.asarray(corpus.shards)[samples], 3)
    return CropDataset(
        corpus, samples, schedule, Preprocess.default(), (16, 24, 32), label=True, foreground=0.5
    )


def model_of(kind: str, decoder: Any) -> Segmentation:
    torch.manual_seed(SEED + 1)
    task = TaskSettings.model_validate(TASK)
    return Segmentation(encoder=backbone(kind), task=task, decoder=decoder).eval()


@pytest.mark.parametrize("kind", ["resenc", "vit"])
def test_a_ridge_probe_is_the_watching_probes_rule(kind: str, dataset: CropDataset) -> None:
    model = model_of(kind, "linear")
    fit_probe(model, dataset, 3)
    assert isinstance(model.decoder, LinearDecoder)
    maps, moments = [], []
    for position in range(3):
        raw = dataset[position]
        label = raw["label"].numpy().astype(np.int64)
        low, high, shift, scale = raw["window"][0]
        image = raw["image"].float() * raw["value"][0, 0] + raw["value"][0, 1]
        image = (image.clamp(float(low), float(high)) - shift) * scale
        with torch.no_grad():
            found = model.encoder(image[None])
        maps = [found[i][0] for i in counted_maps(model.encoder.strides)]
        counted = valid_of(raw)[0].numpy()
        present = [int(c) for c in np.unique(label[counted])]
        rng = generator("probe", 3, position)
        voxels, weight = choose_voxels(label, counted, present, rng)
        x = sample(maps, voxels, label.shape).double().numpy()
        moments.append(Moments.of(x, np.eye(3)[label[tuple(voxels.T)]], weight))
    slope, bias = ridge(moments)
    expected = apply(maps, slope, bias, (16, 24, 32))
    scores = model.logits(image[None])[0].argmax(0)
    assert (scores == expected).float().mean() > 0.999  # but for rounding at a tie
    assert len(expected.unique()) > 1


def test_neighbours_vote_as_a_slow_oracle_counts(dataset: CropDataset) -> None:
    model = model_of("vit", "knn")
    fit_probe(model, dataset, 6)
    decoder = model.decoder
    assert isinstance(decoder, NeighbourDecoder)
    filled = decoder.classes >= 0
    assert 100 < filled.sum() < decoder.BANK
    assert torch.allclose(decoder.bank[filled].norm(dim=1), torch.ones(()), atol=1e-5)
    image = torch.randn(1, 1, 8, 16, 32, generator=torch.Generator().manual_seed(SEED + 2))
    features = model.encoder(image)
    found = decoder(image, features).exp()
    assert torch.allclose(found.sum(1), torch.ones(()), atol=1e-4)
    deepest = features[-1][0]
    for cell in ((0, 0, 0), (0, 1, 3)):
        x = (deepest[(slice(None), *cell)] - decoder.mean) / decoder.scale
        cosine = (decoder.bank @ (x / x.norm())).tolist()
        known = [(c, int(k)) for c, k in zip(cosine, decoder.classes, strict=True) if k >= 0]
        votes = [0.0] * 3
        for similarity, k in sorted(known, reverse=True)[:NEIGHBOURS]:
            votes[k] += np.exp(similarity / 0.07)
        low = decoder._votes(decoder.scaled(deepest.flatten(1).T))
        at = cell[0] * 8 + cell[1] * 4 + cell[2]
        assert low[at].tolist() == pytest.approx([v / sum(votes) for v in votes], abs=1e-4)


def test_a_bank_of_one_class_votes_for_it_however_little_fills_it() -> None:
    decoder = NeighbourDecoder((4,), [(8, 8, 8)], 3)
    decoder.bank[:12, 0] = 1.0
    decoder.classes[:12] = 2
    opposite = torch.zeros(1, 4, 1, 1, 2)
    opposite[:, 0] = -3.0  # less alike than the empty rest, which must not be asked
    out = decoder(torch.zeros(1, 1, 8, 8, 16), [opposite])
    assert torch.allclose(out[:, 2], torch.zeros(()), atol=1e-5)


@pytest.mark.parametrize(("fit", "decoder"), [("ridge", "linear"), ("knn", "knn")])
def test_a_probe_is_scored_as_every_run(
    labelled_corpus: Path, tmp_path: Path, fit: str, decoder: str
) -> None:
    add_few_split(labelled_corpus)
    release = make_release(tmp_path / "release", "resenc")
    before = release.build_encoder()
    release.load(before)
    heads = []
    for init in ("pretrained", "scratch"):
        given = settings(
            release, labelled_corpus, tmp_path, fit=fit, decoder=decoder, freeze="encoder",
            protocol=f"probe_{fit}", steps=8, batch_size=1, init=init, run=None,
        )  # fmt: skip
        run = finetune(given)
        rows = read_rows(run / "rows.csv")
        heads.append(rows[0])
        loaded = load_network(run, "cpu").model
        if init == "pretrained":
            state: dict[str, Tensor] = loaded.encoder.state_dict()
            assert all(torch.equal(state[n], v) for n, v in before.state_dict().items())
    assert {row.protocol for row in heads} == {f"probe_{fit}"}
    assert [row.arm for row in heads] == ["pretrained", "scratch"]
    assert heads[0].config_hash == heads[1].config_hash and heads[0].steps == 8
