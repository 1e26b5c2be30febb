"""Damaged volumes stop a run, or others take their place: told, counted, always the same."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest
from test_loop import settings

from data_prep.corpus import Corpus
from data_prep.errors import CorruptionError
from pretrain.crops import Pairs
from pretrain.loader import CropDataset, make_loader
from pretrain.train import make_dataset
from voxelith import main

WORDS = [
    "experiment=cnn_mae_small", "trainer=cpu", "crop_size=[32,32,32]", "batch_size=4", "steps=20",
    "warmup=1", "log_every=1", "save_every=5", "preview_every=0", "health.every=0",
]  # fmt: skip


def damage(corpus: Corpus, i: int, every: int = 1) -> None:
    """Flips a bit in every chunk of a volume's image, or in every second one, ..."""
    frame, table = corpus._frame(i, "image")
    path = corpus.shard_files()[int(corpus.shards[i])]
    with path.open("r+b") as file:
        for row in table[1:-1][::every]:
            at = frame.base + int(row["offset"])
            file.seek(at)
            (byte,) = file.read(1)
            file.seek(at)
            file.write(bytes([byte ^ bool(row["bytes"])]))


@pytest.fixture
def damaged(pretrain_corpus: Path, tmp_path: Path) -> tuple[Path, str]:
    """The corpus with damage in one volume's image, and the volume's key."""
    shutil.copytree(pretrain_corpus, tmp_path / "c")
    corpus = Corpus.open(tmp_path / "c")
    damage(corpus, 7)
    return tmp_path / "c", corpus.keys[7]


def test_by_default_damage_ends_the_run_and_names_the_volume(
    damaged: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus, key = damaged
    words = [f"corpus={corpus}", "run=x", f"runs={tmp_path}", *WORDS, "trainer.workers=1"]
    assert main(["pretrain", *words]) == 2
    assert f"sample {key}, payload image is damaged" in capsys.readouterr().err
    # Which may be gone on with, without it.
    assert main(["pretrain", *words, "damaged=skip"]) == 0


def test_others_take_the_place_and_it_is_told(
    damaged: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus, key = damaged
    words = [f"corpus={corpus}", f"runs={tmp_path}", *WORDS, "damaged=skip"]
    losses = {}
    for workers in (0, 2):
        run = tmp_path / f"w{workers}"
        assert main(["pretrain", *words, f"run={run.name}", f"trainer.workers={workers}"]) == 0
        assert capsys.readouterr().err.count("another volume takes its place") == 1
        (line,) = map(json.loads, (run / "damaged.jsonl").read_text().splitlines())
        assert f"sample {key}," in line["damage"] and line["rank"] == 0
        with (run / "metrics.csv").open() as file:
            rows = list(csv.DictReader(file))
        losses[workers] = [row["loss"] for row in rows]
        # 80 samples, 36 volumes: it came up twice or three times, a quarter of a batch each.
        shares = [float(row["replaced"]) for row in rows]
        assert shares[line["step"]] == 0.25 and 2 <= sum(share > 0 for share in shares) <= 3
    assert losses[0] == losses[2]


def test_all_crops_of_a_sample_are_of_the_volume_that_takes_its_place(
    pretrain_corpus: Path, tmp_path: Path
) -> None:
    """Also where the first crop of the damaged one can still be read."""
    path = tmp_path / "c"
    shutil.copytree(pretrain_corpus, path)
    corpus = Corpus.open(path)
    damage(corpus, 7, every=2)
    plain = make_dataset(settings(path, tmp_path, "x"), corpus)
    dataset = CropDataset(
        corpus, plain.samples, plain.schedule, plain.preprocess, (16, 16, 16),
        crops=Pairs(), skip=True,
    )  # fmt: skip
    seen = 0
    for batch in make_loader(dataset, batch_size=4, first_step=0, last_step=36):
        keys = batch["key"]
        assert keys[::2] == keys[1::2]
        seen += len(batch.get("damage", ()))
    assert seen
    batches = make_loader(dataset, batch_size=4, first_step=0, last_step=36)
    again = [key for batch in batches for key in batch["key"]]
    batches = make_loader(dataset, batch_size=4, first_step=0, last_step=36, workers=2)
    assert again == [key for batch in batches for key in batch["key"]]


def test_more_than_a_little_damage_ends_the_run_all_the_same(
    pretrain_corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(pretrain_corpus, tmp_path / "c")
    corpus = Corpus.open(tmp_path / "c")
    for i in range(20):
        damage(corpus, i)
    words = [f"corpus={tmp_path}/c", "run=x", f"runs={tmp_path}", *WORDS, "damaged=skip"]
    assert main(["pretrain", *words, "trainer.workers=0"]) == 2
    assert "in all, more than damaged=skip bears" in capsys.readouterr().err
    dataset = make_dataset(settings(tmp_path / "c", tmp_path, "x"), corpus)
    dataset.skip, dataset.samples = True, dataset.samples[7:8].repeat(36)  # nothing else is there
    with pytest.raises(CorruptionError, match="is damaged in"):
        dataset.__getitems__([0])
