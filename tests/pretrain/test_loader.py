"""Crops: right voxels, right values, the same whoever reads them."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from data_prep.corpus import Corpus
from data_prep.preprocess import Preprocess
from pretrain import loader
from pretrain.augment import Augment
from pretrain.crops import Crops
from pretrain.loader import CropDataset, collate, make_loader, to_batch, valid_of
from pretrain.schedule import Schedule

CROP = (16, 24, 16)


def dataset_of(path: Path, crop: tuple[int, int, int] = CROP, **options: object) -> CropDataset:
    corpus = Corpus.open(path)
    schedule = Schedule(corpus.shards, seed=3, lanes=4)
    return CropDataset(
        corpus, np.arange(len(corpus)), schedule, Preprocess.default(), crop, **options
    )


def test_a_whole_volume_crop_equals_the_numpy_reference(pretrain_corpus: Path) -> None:
    """The device's arithmetic and `Preprocess.apply` agree on CT and on MRI, padding included."""
    corpus = Corpus.open(pretrain_corpus)
    for modality in ("CT", "MR"):
        item = corpus.modalities.index(modality)
        shape = tuple(int(n) for n in corpus.shapes[item][1:])
        crop = (shape[0] + 3, shape[1], shape[2] + 2)
        dataset = dataset_of(pretrain_corpus, crop)
        position = next(p for p in range(len(corpus)) if dataset.schedule.sample(p)[2] == item)
        batch = to_batch(collate([dataset[position]]))
        inside = batch.valid[0, 0]
        assert int(inside.sum()) == np.prod(shape)
        expected = Preprocess.default().apply(corpus.volume(item)).array[0]
        found = batch.image[0, 0].numpy()
        np.testing.assert_allclose(found[inside.numpy()], expected.ravel(), rtol=1e-5, atol=1e-5)
        # Padding is the darkest the volume has.
        assert np.unique(found[~inside.numpy()]).size == 1
        assert found[~inside.numpy()].max() <= expected.min() + 1e-6


def test_crops_are_boxes_of_their_volume(pretrain_corpus: Path) -> None:
    dataset = dataset_of(pretrain_corpus)
    for position in range(6):
        raw = dataset[position]
        item = dataset.corpus.position(raw["key"])
        whole = dataset.corpus.read(item)[0]
        crop = raw["image"][0].numpy()
        assert crop.shape == CROP
        where = valid_of(raw)[0].numpy()
        size = [int(where.any(axis=axes).sum()) for axes in ((1, 2), (0, 2), (0, 1))]
        inner = crop[where].reshape(size)
        corner = np.argwhere(whole == inner[0, 0, 0])
        assert any(
            (whole[tuple(slice(c, c + n) for c, n in zip(start, size, strict=True))]).shape
            == inner.shape
            and (
                whole[tuple(slice(c, c + n) for c, n in zip(start, size, strict=True))] == inner
            ).all()
            for start in corner
        )


@pytest.mark.parametrize(("workers", "method"), [(1, "fork"), (2, "spawn"), (2, "forkserver")])
def test_workers_and_start_methods_change_nothing(
    pretrain_corpus: Path, workers: int, method: str
) -> None:
    dataset = dataset_of(pretrain_corpus)
    alone = list(make_loader(dataset, batch_size=4, first_step=7, last_step=12))
    helped = list(
        make_loader(
            dataset,
            batch_size=4,
            first_step=7,
            last_step=12,
            workers=workers,
            start_method=method,  # type: ignore[arg-type]
        )
    )
    assert len(alone) == len(helped) == 5
    for one, other in zip(alone, helped, strict=True):
        assert one["key"] == other["key"]
        assert all(torch.equal(one[name], other[name]) for name in ("image", "seed"))
        assert torch.equal(valid_of(one), valid_of(other))


def test_batches_ahead_have_a_bound_in_bytes(
    pretrain_corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = dataset_of(pretrain_corpus)
    batch = 4 * math.prod(dataset.crop_size) * 3  # int16, and whether it is valid
    for limit, expected in ((10**9, 4), (2 * 3 * batch, 3), (2 * batch - 1, 1)):
        monkeypatch.setattr(loader, "AHEAD_BYTES", limit)
        made = make_loader(dataset, batch_size=8, first_step=0, last_step=1, workers=2, world=2)
        assert made.prefetch_factor == expected


def test_two_ranks_read_what_one_reads(pretrain_corpus: Path) -> None:
    dataset = dataset_of(pretrain_corpus)
    joint = [raw["key"] for raw in make_loader(dataset, batch_size=6, first_step=0, last_step=9)]
    split = [
        make_loader(dataset, batch_size=6, first_step=0, last_step=9, rank=rank, world=2)
        for rank in range(2)
    ]
    for whole, parts in zip(joint, zip(*split, strict=True), strict=True):
        assert sorted(whole) == sorted(key for part in parts for key in part["key"])


def test_accumulation_keeps_the_samples_of_a_step(pretrain_corpus: Path) -> None:
    dataset = dataset_of(pretrain_corpus)
    plain = [raw["key"] for raw in make_loader(dataset, batch_size=6, first_step=2, last_step=5)]
    micro = [
        raw["key"]
        for raw in make_loader(dataset, batch_size=6, first_step=2, last_step=5, accumulate=3)
    ]
    joined = [[key for keys in micro[i : i + 3] for key in keys] for i in range(0, 9, 3)]
    assert joined == plain


def test_mirrored_images_labels_and_validity_stay_together(labelled_corpus: Path) -> None:
    dataset = dataset_of(labelled_corpus, (40, 64, 48), label=True, foreground=1.0)
    raw = collate([dataset[i] for i in range(16)])
    plain = to_batch(raw)
    flipped = to_batch(raw, Augment(flip=(True, True, True)))
    assert plain.label is not None and flipped.label is not None
    changed = 0
    for b in range(16):
        axes = [
            axes
            for axes in ([], [0], [1], [2], [0, 1], [0, 2], [1, 2], [0, 1, 2])
            if torch.equal(flipped.image[b, 0], plain.image[b, 0].flip(axes))
        ]
        assert len(axes) == 1
        assert torch.equal(flipped.label[b], plain.label[b].flip(axes[0]))
        assert torch.equal(flipped.valid[b, 0], plain.valid[b, 0].flip(axes[0]))
        changed += bool(axes[0])
    assert 8 < changed < 16  # 1 in 8 stays as it is


def test_an_axis_that_may_not_flip_does_not(labelled_corpus: Path) -> None:
    dataset = dataset_of(labelled_corpus)
    raw = collate([dataset[i] for i in range(12)])
    plain, flipped = to_batch(raw), to_batch(raw, Augment(flip=(False, False, True)))
    turned = [not torch.equal(a, b) for a, b in zip(plain.image, flipped.image, strict=True)]
    assert any(turned) and not all(turned)
    for before, after, changed in zip(plain.image, flipped.image, turned, strict=True):
        assert torch.equal(after, before.flip(3) if changed else before)


def test_foreground_crops_hold_their_class(labelled_corpus: Path) -> None:
    """Every crop that is drawn for the foreground holds some; plain ones need not."""
    dataset = dataset_of(labelled_corpus, (8, 8, 8), label=True, foreground=1.0)
    drawn = [bool((dataset[i]["label"] > 0).any()) for i in range(40)]
    plain = dataset_of(labelled_corpus, (8, 8, 8), label=True, foreground=0.0)
    by_chance = [bool((plain[i]["label"] > 0).any()) for i in range(40)]
    assert all(drawn) and not all(by_chance)


@pytest.mark.parametrize("spacing", [None, (2.0, 2.0, 2.0)])
def test_anonymised_voxels_are_not_valid(
    samples: Path, tmp_path: Path, spacing: tuple[float, float, float] | None
) -> None:
    """A mask beside a scan reaches the batch voxel by voxel, also where prep resampled both."""
    import nibabel as nib

    from data_prep.build import prep
    from data_prep.settings import PrepSettings

    scan = sorted((samples / "hippocampus" / "images").iterdir())[0]
    image = nib.load(scan)
    face = np.zeros(image.shape, np.uint8)
    face[:, -12:, :] = 1  # RAS: the anterior 12 voxels, the first along H
    nib.save(nib.Nifti1Image(face, image.affine), tmp_path / "face.nii.gz")
    (tmp_path / "list.csv").write_text(f"image,mask\n{scan},face.nii.gz\n")
    prep(
        PrepSettings(
            input=tmp_path / "list.csv",
            output=tmp_path / "corpus",
            keys="names",
            processes=1,
            spacing=spacing,
        )
    )
    corpus = Corpus.open(tmp_path / "corpus")
    d, h, w = (int(n) for n in corpus.shapes[0][1:])
    batch = to_batch(collate([dataset_of(tmp_path / "corpus", (d, h, w))[0]]))
    hidden = ~batch.valid[0, 0]
    share = 12 if spacing is None else 6
    assert hidden[:, :share].all()
    assert not hidden[:, share + (spacing is not None) :].any()


def test_only_the_tasks_classes_draw_crops(labelled_corpus: Path) -> None:
    corpus = Corpus.open(labelled_corpus)
    dataset = CropDataset(
        corpus,
        np.arange(len(corpus)),
        Schedule(corpus.shards, seed=3, lanes=4),
        Preprocess.default(),
        (8, 8, 8),
        label=True,
        foreground=1.0,
        classes=[[2]],
    )
    assert all((dataset[i]["label"] == 2).any() for i in range(40))


def test_crops_are_drawn_by_class_and_not_by_label_value(labelled_corpus: Path, seed: int) -> None:
    """Twelve values of a cortex and one of a stem: each class gets half, each voxel its share."""
    corpus = Corpus.open(labelled_corpus)
    schedule = Schedule(corpus.shards, seed=3, lanes=4)
    options = {"label": True, "foreground": 1.0, "classes": [range(1, 13), [40], [41]]}
    crops = CropDataset(
        corpus, np.arange(len(corpus)), schedule, Preprocess.default(), (8, 8, 8), **options
    )
    counts = {**{str(v): 10 * v for v in range(1, 13)}, "40": 5, "99": 10**6}
    voxels = {value: [[int(value), 0, 0], [int(value), 1, 0]] for value in counts}
    meta = {"class_voxels": {**voxels, "41": []}, "class_counts": counts}
    rng = np.random.default_rng(seed)
    drawn = np.array([crops._centre(rng, meta)[0] for _ in range(4000)])
    assert (drawn == 40).mean() == pytest.approx(0.5, abs=0.04)
    assert set(drawn) <= {*range(1, 13), 40}
    within = drawn[drawn < 40]
    for value in (1, 6, 12):
        assert (within == value).mean() == pytest.approx(value / 78, abs=0.04)


def test_forked_workers_read_after_the_parent_decompressed(pretrain_corpus: Path) -> None:
    dataset = dataset_of(pretrain_corpus)
    dataset[0]  # the parent decompresses first: with blosc2's threads, children would hang here
    loader = make_loader(
        dataset, batch_size=4, first_step=0, last_step=6, workers=2, start_method="fork"
    )
    assert len(list(loader)) == 6


def test_crops_of_a_sample_lie_in_one_volume_and_differ(pretrain_corpus: Path) -> None:
    """Sample by sample, each crop with a place and a seed of its own; the first is the lone one."""
    lone, three = dataset_of(pretrain_corpus), dataset_of(pretrain_corpus, crops=Crops(3))
    assert len(three) == 3 * len(lone)
    steps = {"batch_size": 4, "first_step": 2, "last_step": 6}
    many = list(make_loader(three, **steps))
    for one, raw in zip(make_loader(lone, **steps), many, strict=True):
        assert raw["key"] == [key for key in one["key"] for _ in range(3)]
        assert len(raw["image"]) == len(raw["seed"]) == len(raw["spacing"]) == 12
        for name in ("image", "seed"):
            assert torch.equal(raw[name][::3], one[name])
        assert torch.equal(valid_of(raw)[::3], valid_of(one))
    seeds = torch.cat([raw["seed"] for raw in many])
    assert len(seeds.unique()) == len(seeds)
    moved = [not torch.equal(raw["image"][i], raw["image"][i + 1]) for raw in many for i in (0, 3)]
    assert sum(moved) > len(moved) // 2  # volumes no larger than the crop have but one


@pytest.mark.parametrize("workers", [0, 2])
def test_crops_do_not_depend_on_workers_ranks_or_the_first_step(
    pretrain_corpus: Path, workers: int
) -> None:
    dataset = dataset_of(pretrain_corpus, crops=Crops(2))
    whole = list(make_loader(dataset, batch_size=4, first_step=0, last_step=6))
    late = make_loader(dataset, batch_size=4, first_step=3, last_step=6, workers=workers)
    for one, other in zip(whole[3:], late, strict=True):
        assert torch.equal(one["image"], other["image"]) and torch.equal(one["seed"], other["seed"])
    ranks = [
        make_loader(
            dataset, batch_size=4, first_step=0, last_step=6, workers=workers, rank=rank, world=2
        )
        for rank in range(2)
    ]
    for joint, first, second in zip(whole, *ranks, strict=True):
        pairs = [joint["seed"][i : i + 2].tolist() for i in range(0, 8, 2)]
        split = [[r["seed"][i : i + 2].tolist() for i in (0, 2)] for r in (first, second)]
        assert split == [pairs[0::2], pairs[1::2]]


def test_labelled_crops_of_a_sample_keep_their_own_labels(labelled_corpus: Path) -> None:
    dataset = dataset_of(labelled_corpus, (8, 8, 8), label=True, foreground=1.0, crops=Crops(2))
    drawn = [dataset[i] for i in range(24)]
    assert all((raw["label"] > 0).any() for raw in drawn)
    assert [raw["key"] for raw in drawn[::2]] == [raw["key"] for raw in drawn[1::2]]
    assert any(
        not torch.equal(a["label"], b["label"])
        for a, b in zip(drawn[::2], drawn[1::2], strict=True)
    )


def test_pictures_show_the_same_crops_in_every_run(pretrain_corpus: Path) -> None:
    one, other = dataset_of(pretrain_corpus, crops=Crops(2)), dataset_of(pretrain_corpus)
    for number in (0, 1):
        a, b = one.middle(3, number), other.middle(3, number)
        assert torch.equal(a["image"], b["image"]) and a["seed"] == b["seed"]
    assert one.middle(3, 1)["seed"] != one.middle(3, 2)["seed"] != one.middle(4, 1)["seed"]


END = {
    "held": "sys.held = batches",
    "collected": "held = [batches]; held.append(held); del batches, held; gc.collect()",
}


@pytest.mark.parametrize("end", END)
def test_a_program_ends_whoever_holds_on_to_its_workers(pretrain_corpus: Path, end: str) -> None:
    """An error's traceback does, or a cycle with one, whose queues the collector may close first.

    And workers heed no signal by which Python would end them.
    """
    code = f"""
import gc, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_loader import dataset_of, make_loader
dataset = dataset_of({str(pretrain_corpus)!r})
batches = iter(make_loader(dataset, batch_size=2, first_step=0, last_step=9, workers=2))
next(batches)
{END[end]}
sys.exit(7)
"""
    process = subprocess.run([sys.executable, "-c", code], timeout=120)
    assert process.returncode == 7
