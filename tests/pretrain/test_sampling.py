"""Several corpora as one, and shares of an epoch for their groups."""

from __future__ import annotations

import json
import pickle
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from data_prep.build import prep
from data_prep.corpus import Corpus, open_corpus
from data_prep.errors import InputError
from data_prep.settings import PrepSettings
from pretrain.release import load_release
from pretrain.sampling import times_of
from pretrain.settings import SamplingSettings
from voxelith import main

WORDS = [
    "experiment=cnn_mae_small", "trainer=cpu", "trainer.workers=0",
    "crop_size=[32,32,32]", "batch_size=4", "steps=9", "warmup=1", "log_every=1", "save_every=1",
    "preview_every=0", "health.every=0",
]  # fmt: skip


@pytest.fixture(scope="module")
def other(samples: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The hippocampus scans of the other corpus once more, under the same names."""
    root = tmp_path_factory.mktemp("other")
    lines = (samples / "pretrain.csv").read_text().splitlines()
    chosen = [line for line in lines[1:] if "hippocampus" in line][:8]
    for line in chosen:
        name = line.split(",")[0]
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(samples / name, root / name)
    (root / "list.csv").write_text("\n".join([lines[0], *chosen]) + "\n")
    prep(PrepSettings(input=root / "list.csv", output=root / "c", keys="names", shard_mib=0.05))
    return root / "c"


def test_two_corpora_are_read_as_one(pretrain_corpus: Path, other: Path) -> None:
    one, two = Corpus.open(pretrain_corpus), Corpus.open(other)
    both = Corpus.open(pretrain_corpus, other)
    assert len(both) == len(one) + len(two)
    assert len(both.info["shards"]) == len(one.info["shards"]) + len(two.info["shards"])
    assert both.keys == [f"1/{key}" for key in one.keys] + [f"2/{key}" for key in two.keys]
    for i in (0, len(one) - 1, len(one), len(both) - 1):
        part, k = (one, i) if i < len(one) else (two, i - len(one))
        np.testing.assert_array_equal(both.read(i), part.read(k))
        assert both.meta(i) == part.meta(k)
    assert both.position("2/" + two.keys[3]) == len(one) + 3
    modality = Counter(one.info["counts"]["modality"]) + Counter(two.info["counts"]["modality"])
    assert both.info["counts"]["modality"] == modality
    assert set(both.fingerprints().values()) == set(one.fingerprints().values())
    again = pickle.loads(pickle.dumps(both))
    assert again.index_hash == both.index_hash
    hashes = {c.index_hash for c in (one, two, both, Corpus.open(other, pretrain_corpus))}
    assert len(hashes) == 4


def test_damage_names_the_file_of_its_corpus(
    pretrain_corpus: Path, other: Path, tmp_path: Path
) -> None:
    shutil.copytree(other, tmp_path / "c")
    shard = sorted((tmp_path / "c" / "shards").glob("*.tar"))[-1]
    shard.write_bytes(shard.read_bytes()[:-512])
    with pytest.raises(InputError) as found:
        open_corpus((pretrain_corpus, tmp_path / "c", tmp_path / "gone"), "corpus")
    said = str(found.value)
    assert f"corpus={tmp_path / 'c'}: {shard}: has" in said
    assert f"corpus={tmp_path / 'gone'}: no such directory" in said


def test_corpora_that_do_not_go_together_are_refused(
    pretrain_corpus: Path, labelled_corpus: Path
) -> None:
    with pytest.raises(InputError, match=r"need the same kind, found .*unlabelled.*: labelled"):
        Corpus.open(pretrain_corpus, labelled_corpus)


def test_groups_have_their_shares(pretrain_corpus: Path, other: Path) -> None:
    both = Corpus.open(pretrain_corpus, other)
    modality = np.array(both.groups("modality"))
    times = times_of(SamplingSettings(by="modality", weights={"CT": 1, "MR": 3}), both)
    assert times is not None
    assert times.sum() == pytest.approx(len(both))
    assert times[modality == "CT"].sum() == pytest.approx(len(both) / 4)
    assert len(set(times[modality == "CT"])) == 1  # within a group all alike
    by_corpus = times_of(SamplingSettings(by="corpus", weights={"1": 0, "2": 5}), both)
    assert by_corpus is not None and by_corpus[: -len(Corpus.open(other))].max() == 0
    assert times_of(SamplingSettings(), both) is None
    for weights in ({"CT": 1.0}, {"CT": 1.0, "MR": 1.0, "PT": 1.0}, {"CT": 0.0, "MR": 0.0}):
        with pytest.raises(InputError, match=r"volumes there are: CT \(\d+\), MR \(\d+\)"):
            times_of(SamplingSettings(by="modality", weights=weights), both)


def test_a_run_on_two_corpora_goes_on_and_is_exported_with_all_fingerprints(
    pretrain_corpus: Path, other: Path, tmp_path: Path
) -> None:
    runs = tmp_path / "runs"
    words = [
        f"corpus=[{pretrain_corpus},{other}]", "run=both", f"runs={runs}", *WORDS,
        "sampling.by=corpus", "sampling.weights={1: 1, 2: 3}",
    ]  # fmt: skip
    assert main(["pretrain", *words]) == 0
    whole = (runs / "both" / "metrics.csv").read_text().splitlines()
    for file in sorted((runs / "both" / "checkpoints").glob("step-*.pt"))[1:]:
        file.unlink()
    assert main(["pretrain", *words]) == 0
    again = (runs / "both" / "metrics.csv").read_text().splitlines()
    column = whole[0].split(",").index("loss")
    assert [r.split(",")[column] for r in whole] == [r.split(",")[column] for r in again]
    assert main(["export", str(runs / "both"), str(tmp_path / "release")]) == 0
    seen = set(load_release(tmp_path / "release").fingerprints)
    assert set(Corpus.open(pretrain_corpus, other).fingerprints().values()) <= seen
    config = json.loads((runs / "both" / "config.json").read_text())
    assert config["corpus"] == [str(pretrain_corpus), str(other)]
    # Other shares are another run.
    assert main(["pretrain", *words, "sampling.weights={1: 1, 2: 1}"]) == 2


def test_what_is_wrong_with_sampling_is_told_before_anything_starts(
    pretrain_corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"corpus=[{pretrain_corpus},gone]", "run=x", f"runs={tmp_path}/runs", *WORDS]
    assert main(["pretrain", *words, "sampling.by=modality"]) == 2
    said = capsys.readouterr().err
    assert "corpus=gone: is not there" in said and "sampling: by and weights: give both" in said
    words[0] = f"corpus={pretrain_corpus}"
    more = ["sampling.by=modality", "sampling.weights={CT: 1}"]
    assert main(["pretrain", *words, *more]) == 2
    assert "expected a weight for each modality of the corpus" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_what_has_no_weight_was_not_trained_on(pretrain_corpus: Path, tmp_path: Path) -> None:
    """Neither its modality nor its licence nor its test scans are the release's."""
    corpus = Corpus.open(pretrain_corpus)
    words = [
        f"corpus={pretrain_corpus}",
        "run=mr",
        f"runs={tmp_path}",
        *WORDS,
        "sampling.by=modality",
    ]
    assert main(["pretrain", *words, "sampling.weights={CT: 0, MR: 1}"]) == 0
    assert main(["export", str(tmp_path / "mr"), str(tmp_path / "release")]) == 0
    release = load_release(tmp_path / "release")
    heads = [i for i, name in enumerate(corpus.modalities) if name == "MR"]
    prints = corpus.scan_prints()
    assert release.modalities == ("MR",)
    data = release.config["data"]
    assert data["modality"] == {"MR": len(heads)} and data["samples"] == len(heads) < len(corpus)
    assert sum(data["licence"].values()) == len(heads)
    told = json.loads((tmp_path / "release" / "fingerprints.json").read_text())["values"]
    assert set(told) == set().union(*(prints[corpus.keys[i]] for i in heads))


def test_volumes_without_a_source_have_a_name_to_be_weighted_by(
    pretrain_corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = Corpus.open(pretrain_corpus)
    sources = ["", *corpus.groups("source")[1:]]
    table = corpus._table
    place = table.column_names.index("source")
    monkeypatch.setattr(corpus, "_table", table.set_column(place, "source", pa.array(sources)))
    names = set(corpus.groups("source"))
    assert "unknown" in names
    times = times_of(SamplingSettings(by="source", weights=dict.fromkeys(names, 1.0)), corpus)
    assert times is not None and times[0] > 0
