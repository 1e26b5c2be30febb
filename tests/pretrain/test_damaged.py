"""Damaged volumes stop a run, or others take their place: told, counted, always the same."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage
from seeds import SEED
from test_loop import settings

from data_prep.corpus import Corpus
from data_prep.errors import CorruptionError
from pretrain.crops import Pairs
from pretrain.loader import CropDataset, make_loader
from pretrain.loop import Loop
from pretrain.run_folder import RunFolder
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
        assert line["key"] == key and f"sample {key}," in line["damage"] and line["rank"] == 0
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


@pytest.fixture(scope="module")
def chunky(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of volumes of many chunks each, of which crops touch different ones."""
    folder, rng = tmp_path_factory.mktemp("chunky"), np.random.default_rng(SEED)
    (folder / "in").mkdir()
    for number in range(12):
        coarse = rng.normal(size=(22, 22, 22))
        voxels = (ndimage.zoom(coarse, 3, order=1) * 300).astype(np.int16)
        image = nib.Nifti1Image(voxels, np.diag([1.0, 1.0, 1.0, 1.0]))
        nib.save(image, folder / "in" / f"v{number:02d}.nii.gz")
    words = [f"input={folder}/in", f"output={folder}/c", "keys=names", "modality=CT"]
    # A process of its own: prep forks, and this one has trained, with threads that a fork lacks.
    subprocess.run([sys.executable, "-m", "voxelith", "prep", *words], check=True)
    return folder / "c"


def loop_over(corpus: Corpus, run: Path) -> Loop:
    """A start of a run on a corpus, of one of its ranks; nothing is trained."""
    run.mkdir(exist_ok=True)
    dataset = make_dataset(settings(corpus.path, run.parent, run.name), corpus)
    dataset.skip = True
    return Loop(settings(corpus.path, run.parent, run.name), dataset, RunFolder(run))


def read(loop: Loop, first: int, last: int) -> float:
    """Has a loop take batches as its training would; returns samples that others took the place of.

    Once an epoch each volume comes, and crops of 8x12x8 touch one or two of its eight chunks.
    """
    before = loop._replaced
    for batch in make_loader(loop.dataset, batch_size=4, first_step=first, last_step=last):
        loop.to_batch(batch)
    return 4 * (loop._replaced - before)


def keys_in(run: Path) -> list[str]:
    lines = (run / "damaged.jsonl").read_text().splitlines()
    return [json.loads(line)["key"] for line in lines if line.endswith("}")]


def test_a_volume_counts_once_however_many_of_its_chunks_are_damaged(
    chunky: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second volume would be one too many of twelve."""
    shutil.copytree(chunky, tmp_path / "c")
    corpus = Corpus.open(tmp_path / "c")
    _, table = corpus._frame(7, "image")
    assert sum(table[1:-1]["bytes"] > 0) >= 8
    damage(corpus, 7)
    loop = loop_over(corpus, tmp_path / "x")
    assert round(read(loop, 0, 60)) == 20  # epochs of twelve volumes
    assert keys_in(tmp_path / "x") == [corpus.keys[7]]
    assert capsys.readouterr().err.count("another volume takes its place") == 1


def test_another_start_goes_on_counting(
    chunky: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(chunky, tmp_path / "c")
    corpus = Corpus.open(tmp_path / "c")
    damage(corpus, 7)
    read(loop_over(corpus, tmp_path / "x"), 0, 3)
    file = tmp_path / "x" / "damaged.jsonl"
    file.write_text(file.read_text() + '{"step": 4, "ra')  # what a kill left
    read(loop_over(corpus, tmp_path / "x"), 0, 6)
    assert keys_in(tmp_path / "x") == [corpus.keys[7]]
    assert capsys.readouterr().err.count("another volume takes its place") == 1
    damage(corpus, 7)  # mends it
    damage(corpus, 3)
    with pytest.raises(CorruptionError, match="2 volumes in all, more than damaged=skip bears"):
        read(loop_over(corpus, tmp_path / "x"), 6, 9)
    assert keys_in(tmp_path / "x") == [corpus.keys[7], corpus.keys[3]]


def test_ranks_count_together(chunky: Path, tmp_path: Path) -> None:
    """Also where no rank has met as many as are too many."""
    corpus = Corpus.open(chunky)
    first, second = (loop_over(corpus, tmp_path / "x") for _ in range(2))
    one, two = ((key, f"sample {key} is damaged") for key in corpus.keys[:2])
    first._note_damage([[one], [one, one]], 4)
    assert first._replaced == 2 / 4  # samples, not what was tried for them
    second._note_damage([[one]], 4)
    with pytest.raises(CorruptionError, match=rf"{one[1]}\n{two[1]}\n2 volumes in all"):
        second._note_damage([[two]], 4)
    third = loop_over(corpus, tmp_path / "x")
    with pytest.raises(CorruptionError, match=rf"{one[1]}\n{two[1]}\n2 volumes in all"):
        third._note_damage([[two]], 4)
    assert len(keys_in(tmp_path / "x")) == 2


@pytest.mark.parametrize("looks", ["health.every=10", "preview_every=10"])
def test_a_damaged_volume_is_not_looked_at_either(
    pretrain_corpus: Path, tmp_path: Path, looks: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The largest, which features and pictures are taken of first."""
    shutil.copytree(pretrain_corpus, tmp_path / "c")
    corpus = Corpus.open(tmp_path / "c")
    first = int(corpus.shapes.prod(axis=1).argmax())
    damage(corpus, first)
    given = [word for word in WORDS if word.split("=")[0] != looks.split("=")[0]]
    words = [f"corpus={tmp_path}/c", "run=x", f"runs={tmp_path}", *given, looks]
    assert main(["pretrain", *words, "trainer.workers=0"]) == 2
    assert corpus.keys[first] in capsys.readouterr().err
    assert main(["pretrain", *words, "trainer.workers=0", "damaged=skip"]) == 0
    said = capsys.readouterr().err
    assert f"sample {corpus.keys[first]}," in said and "another volume is looked at" in said


def test_a_step_with_a_volume_in_anothers_place_is_replayed(
    damaged: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"corpus={damaged[0]}", "run=x", f"runs={tmp_path}", *WORDS, "damaged=skip"]
    assert main(["pretrain", *words, "trainer.workers=0"]) == 0
    (line,) = map(json.loads, (tmp_path / "x" / "damaged.jsonl").read_text().splitlines())
    shutil.rmtree(tmp_path / "x" / "checkpoints")  # so that it begins at the first step
    capsys.readouterr()
    assert main(["replay", str(tmp_path / "x"), f"step={line['step'] + 1}"]) == 0
