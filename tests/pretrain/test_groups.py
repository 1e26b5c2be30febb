"""Every layout through the loader: right voxels, groups side by side, the same for all ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import ndimage
from sync_counter import DEVICE, SyncCounter

from data_prep.corpus import Corpus
from data_prep.preprocess import Preprocess, intensity_coefficients, normalise
from pretrain.augment import Augment
from pretrain.crops import Bases, Crops, MultiCrop, Pairs, Slabs
from pretrain.loader import CropDataset, collate, make_loader, to_batch, to_device
from pretrain.objective import Batch
from pretrain.overlap import overlap_fractions
from pretrain.reading import Scan
from pretrain.schedule import Schedule
from pretrain.settings import AugmentSettings

SIZE = (12, 16, 10)
MULTI = MultiCrop(local=3, local_size=(6, 8, 6), region=(20, 24, 20), gram_size=(18, 24, 15))
LAYOUTS = [Crops(2), Pairs(2), MULTI, Bases(2, (2, 1, 2)), Slabs(3), Slabs(2, aligned=True)]
EACH = pytest.mark.parametrize("crops", LAYOUTS, ids=[type(c).__name__ for c in LAYOUTS])
ALL = AugmentSettings(rotate=1.0, scale=1.0, gain=0.2, noise=1.0, blur=1.0, gamma=1.0)
MIRROR = Augment((True, True, True), AugmentSettings(gain=0.2, noise=1.0))


def dataset_of(path: Path, crops: Crops, size: Any = SIZE, **options: Any) -> CropDataset:
    corpus = Corpus.open(path)
    schedule = Schedule(corpus.shards, seed=3, lanes=4)
    preprocess = options.pop("preprocess", Preprocess.default())
    return CropDataset(
        corpus, np.arange(len(corpus)), schedule, preprocess, size, crops=crops, **options
    )


def sample(dataset: CropDataset, position: int, augment: Augment | None = None) -> Batch:
    total = dataset.crops.total
    items = [dataset[position * total + n] for n in range(total)]
    return to_batch(collate(items), augment)


def flat(batch: Batch) -> dict[str, Batch]:
    return {"": batch, **batch.others}


def same(one: Batch, other: Batch) -> None:
    assert one.keys == other.keys and one.others.keys() == other.others.keys()
    for name in ("image", "valid", "spacing", "seeds", "box"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    for name in one.others:
        same(one.others[name], other.others[name])


@EACH
def test_groups_have_their_shapes_sample_by_sample(pretrain_corpus: Path, crops: Crops) -> None:
    dataset = dataset_of(pretrain_corpus, crops)
    assert len(dataset) == len(dataset.schedule) * crops.total
    (raw,) = make_loader(dataset, batch_size=3, first_step=1, last_step=2)
    batch = to_batch(raw)
    for group in crops.groups(SIZE):
        found = flat(batch)[group.name]
        assert found.image.shape == (3 * group.crops, 1, *group.size)
        assert found.valid.shape == found.image.shape and found.valid.any()
        assert found.box is not None and found.box.shape == (3 * group.crops, 2, 3)
        assert found.box.dtype == torch.float32
        keys = [dataset.corpus.keys[dataset.schedule.sample(p)[2]] for p in range(3, 6)]
        assert found.keys == [key for key in keys for _ in range(group.crops)]
    seeds = torch.cat([group.seeds for group in flat(batch).values()])
    assert len(seeds.unique()) == 3 * crops.total
    draws = [dataset.draw(3 * crops.total + n) for n in range(crops.total)]
    expected = torch.tensor(np.array([draw.box for draw in draws]), dtype=torch.float32)
    boxes = [group.box for group in flat(batch.of([0], 3)).values() if group.box is not None]
    assert torch.equal(torch.cat(boxes), expected)


@EACH
@pytest.mark.parametrize(("workers", "world"), [(0, 1), (2, 2)])
def test_ranks_workers_and_the_first_step_change_nothing(
    pretrain_corpus: Path, crops: Crops, workers: int, world: int
) -> None:
    dataset = dataset_of(pretrain_corpus, crops, augment=ALL)
    whole = list(make_loader(dataset, batch_size=4, first_step=0, last_step=3))
    ranks = [
        make_loader(
            dataset, batch_size=4, first_step=1, last_step=3, workers=workers, rank=r, world=world
        )
        for r in range(world)
    ]
    for joint, *parts in zip(whole[1:], *ranks, strict=True):
        batch = to_batch(joint, MIRROR)
        for rank, part in enumerate(parts):
            same(to_batch(part, MIRROR), batch.of(range(rank, 4, world), 4))


@EACH
def test_native_crops_are_the_voxels_of_their_boxes(pretrain_corpus: Path, crops: Crops) -> None:
    """`box` says which voxels a crop holds; beyond the volume nothing is valid."""
    dataset = dataset_of(pretrain_corpus, crops)
    seen = 0
    for position in range(4):
        batch = sample(dataset, position)
        corpus = dataset.corpus
        item = corpus.position(batch.keys[0])
        whole = dataset.preprocess.apply(corpus.volume(item)).array[0]
        for group in flat(batch).values():
            assert group.box is not None
            for image, valid, box in zip(group.image, group.valid, group.box, strict=True):
                low, high = box.round().int().numpy()
                if not np.array_equal(high - low, image.shape[1:]):
                    continue  # zoomed; see below
                first, last = np.maximum(low, 0), np.minimum(high, whole.shape)
                part = whole[tuple(map(slice, first, last))]
                inner = tuple(map(slice, first - low, last - low))
                assert valid.sum() == part.size and valid[(0, *inner)].all()
                np.testing.assert_allclose(image[(0, *inner)].numpy(), part, atol=1e-4)
                seen += 1
    assert seen or crops is MULTI


@pytest.mark.parametrize("spacing", [None, (1.4, 0.8, 1.1)])
def test_a_base_that_lies_beyond_its_volume_is_padding(
    pretrain_corpus: Path, spacing: tuple[float, float, float] | None
) -> None:
    """All outer ones do, where a volume is shorter than a crop; and none stops a run."""
    layout, size = Bases(1, (1, 3, 3)), (12, 130, 120)
    dataset = dataset_of(pretrain_corpus, layout, size, preprocess=Preprocess.default(spacing))
    seen = 0
    for position in range(8):
        batch = sample(dataset, position)
        volume = dataset.corpus.volume(dataset.corpus.position(batch.keys[0]))
        if np.any(np.array(dataset.preprocess.apply(volume).array.shape[2:]) > size[1:]):
            continue  # some bases lie in it
        seen += 1
        crop, *bases = batch.valid.flatten(1).any(1).tolist()
        assert crop and bases == [n == 4 for n in range(9)]
        lowest = batch.image[batch.valid].min()
        beyond = batch.image[~batch.valid]
        torch.testing.assert_close(beyond, beyond[:1].expand_as(beyond))
        assert beyond[0] <= lowest + 1e-4
        half = to_batch(collate([dataset[10 * position + n] for n in (0, 5)]))
        assert torch.equal(half.image, batch.image[[0, 5]])
        assert torch.equal(half.valid, batch.valid[[0, 5]])
    assert seen


def test_overlaps_with_the_bases_sum_to_one(pretrain_corpus: Path) -> None:
    """Of the boxes, whatever is mirrored afterwards."""
    dataset = dataset_of(pretrain_corpus, Bases(2, (1, 3, 3)))
    for position in range(6):
        batch = sample(dataset, position, MIRROR)
        assert batch.box is not None
        boxes = batch.box[None]
        shares = overlap_fractions(boxes[:, :2], boxes[:, 2:])
        torch.testing.assert_close(shares.sum(-1), torch.ones(1, 2))


@pytest.mark.parametrize("spacing", [None, (1.4, 0.8, 1.1)])
def test_a_zoomed_crop_is_its_box_resampled_by_the_preprocessing(
    pretrain_corpus: Path, spacing: tuple[float, float, float] | None
) -> None:
    """The slow way smooths and interpolates the whole volume."""
    layout = MultiCrop(local=0, region=None, area=(1.0, 1.0), length=(1.0, 1.0), aspect=(0.1, 10.0))
    dataset = dataset_of(pretrain_corpus, layout, preprocess=Preprocess.default(spacing))
    looked_at = 0
    for position in range(len(dataset.corpus)):
        draw = dataset.draw(2 * position)
        box = draw.box
        batch = sample(dataset, position)
        np.testing.assert_allclose(box, np.stack(Scan(*draw[:3]).foreground), atol=1e-9)
        factors = draw.zoom * draw.grid.factors
        expected = slowly(dataset, draw.item, box[0] * draw.grid.factors, factors)
        found = batch.image[0, 0]
        assert batch.valid[0].all()
        np.testing.assert_allclose(found.numpy(), expected, atol=4e-3)
        np.testing.assert_allclose(batch.spacing[0], draw.meta["spacing"] * factors, rtol=1e-5)
        looked_at += 1
    assert looked_at > 3


def slowly(dataset: CropDataset, item: int, low: np.ndarray, factors: np.ndarray) -> np.ndarray:
    """Smoothing by `data_prep`'s rule and scipy's linear interpolation, of the whole volume."""
    volume = dataset.corpus.volume(item)
    codes = volume.array[0].astype(np.float64)
    sigma = np.maximum(0, (factors - 1) / 2)
    smooth = ndimage.gaussian_filter(codes, sigma, mode="nearest")
    made = ndimage.affine_transform(
        smooth, factors, offset=low + factors / 2 - 0.5, output_shape=SIZE, order=1, mode="nearest"
    )
    rule = dataset.preprocess.intensity
    assert rule is not None
    numbers = intensity_coefficients(
        rule, volume.modality[0], dataset.corpus.meta(item)["channels"][0]["statistics"]
    )
    physical = made * volume.slope[0] + volume.intercept[0]
    return normalise(physical.astype(np.float32), numbers)


def test_a_crop_of_everything_is_the_resampled_volume(pretrain_corpus: Path) -> None:
    """Foreground or not: a crop that covers a whole volume is `resample` of it."""
    layout = MultiCrop(
        local=0, region=(500, 500, 500), area=(1.0, 1.0), length=(1.0, 1.0), aspect=(0.1, 10.0)
    )
    dataset = dataset_of(pretrain_corpus, layout)
    for position in range(3):
        batch = sample(dataset, position)
        item = dataset.corpus.position(batch.keys[0])
        volume = dataset.corpus.volume(item)
        spacing = np.array(volume.spacing) * volume.array.shape[1:] / SIZE
        expected = Preprocess.default(spacing.tolist()).apply(volume).array[0]
        assert expected.shape == SIZE
        np.testing.assert_allclose(batch.image[0, 0].numpy(), expected, atol=4e-3)
        assert batch.box is not None
        assert batch.box[0].tolist() == [[0, 0, 0], list(volume.array.shape[1:])]


def test_gram_crops_are_mirrored_as_the_global_ones_and_not_changed(
    pretrain_corpus: Path,
) -> None:
    """On the same grid they would be the same voxels, and here they are the ones before changes."""
    layout = MultiCrop(local=2, local_size=SIZE, gram_size=SIZE)
    dataset = dataset_of(pretrain_corpus, layout)
    mirrored = 0
    for position in range(6):
        plain = sample(dataset, position)
        still = sample(dataset, position, Augment((True, True, True)))
        changed = sample(dataset, position, MIRROR)
        assert torch.equal(plain.image, plain.others["gram"].image)
        assert torch.equal(still.image, still.others["gram"].image)
        assert torch.equal(still.image, changed.others["gram"].image)
        assert not torch.equal(still.image, changed.image)
        assert not torch.equal(still.others["local"].image, changed.others["local"].image)
        mirrored += not torch.equal(plain.image, still.image)
        assert not set(plain.seeds.tolist()) & set(plain.others["gram"].seeds.tolist())
    assert mirrored > 2


@pytest.mark.parametrize("gram", [SIZE, (18, 24, 15), (12, 32, 40)])
def test_gram_crops_are_turned_as_the_global_ones(
    pretrain_corpus: Path, gram: tuple[int, int, int]
) -> None:
    """One map of the unit cube, whatever the grid: corners and middle lie at the same places."""
    layout = MultiCrop(local=0, gram_size=gram)
    for augment in (ALL, None):
        dataset = dataset_of(pretrain_corpus, layout, augment=augment)
        for position in range(5):
            draws = [dataset.draw(4 * position + n) for n in range(4)]
            for one, other in ((draws[0], draws[2]), (draws[1], draws[3])):
                assert other.pose == one.seed != other.seed and one.pose == one.seed
                for corner in np.ndindex(2, 2, 2):
                    ends = []
                    for draw in (one, other):
                        size = np.array(draw.group.size)
                        middle = draw.start + size / 2
                        matrix = np.eye(3) if draw.matrix is None else draw.matrix
                        ends.append(middle + matrix @ ((np.array(corner) - 0.5) * size))
                    np.testing.assert_allclose(*ends, atol=1e-9)
                np.testing.assert_allclose(one.box, other.box, atol=1e-9)


def test_aligned_views_differ_in_intensities_alone(pretrain_corpus: Path) -> None:
    for augment in (None, AugmentSettings(rotate=1.0, scale=1.0)):
        dataset = dataset_of(pretrain_corpus, Slabs(3, aligned=True), augment=augment)
        for position in range(4):
            still = sample(dataset, position, Augment((True, True, True)))
            changed = sample(dataset, position, MIRROR)
            assert torch.equal(still.image[:3], still.image[3:])
            assert torch.equal(still.valid[:3], still.valid[3:])
            assert torch.equal(changed.valid, still.valid)
            assert not torch.equal(changed.image[:3], changed.image[3:])
            assert len(still.seeds.unique()) == 6
            assert still.box is not None and torch.equal(still.box[:3], still.box[3:])


def test_scaled_crops_stay_in_their_slab(pretrain_corpus: Path) -> None:
    """And in the plane within the volume: a scale moves a crop as little as it can."""
    chosen = AugmentSettings(scale=1.0)
    dataset = dataset_of(pretrain_corpus, Slabs(4), (16, 12, 12), augment=chosen)
    for position in range(8):
        for number in range(8):
            draw = dataset.draw(8 * position + number)
            low, high = (int(end[0]) for end in Scan(*draw[:3]).foreground)
            ends = [low + k * (high - low) / 4 for k in (number % 4, number % 4 + 1)]
            # Scaled crops start at whole voxels: their middle moves by up to half a voxel, and
            # their span is rounded up.
            assert ends[0] - 1 <= draw.box[:, 0].mean() <= ends[1] + 1
            assert (draw.box[0, 1:] >= -1).all()
            assert (draw.box[1, 1:] <= draw.grid.shape[1:] + 1).all()


def test_views_of_a_pair_show_the_same_where_they_overlap(pretrain_corpus: Path) -> None:
    dataset = dataset_of(pretrain_corpus, Pairs(1, 0.6))
    for position in range(6):
        batch = sample(dataset, position)
        assert batch.box is not None
        low = batch.box[:, 0].max(0).values
        high = batch.box[:, 1].min(0).values
        assert ((high - low) >= 0.6 * torch.tensor(SIZE) - 1e-4).all()
        parts = []
        for image, box in zip(batch.image, batch.box, strict=True):
            a, b = (low - box[0]).int().tolist(), (high - box[0]).int().tolist()
            parts.append(image[(0, *map(slice, a, b))])
        assert torch.equal(*parts)


def test_masks_of_zoomed_crops_hide_all_that_they_touch(
    samples: Path, tmp_path: Path, seed: int
) -> None:
    """A hidden voxel may hold anything: no valid voxel of a crop depends on it."""
    import nibabel as nib

    from data_prep.build import prep
    from data_prep.settings import PrepSettings

    scan = sorted((samples / "hippocampus" / "images").iterdir())[0]
    image = nib.load(scan)
    face = np.zeros(image.shape, np.uint8)
    low = np.random.default_rng(seed).integers(4, 12, 3)
    face[tuple(slice(a, a + 9) for a in low)] = 1
    nib.save(nib.Nifti1Image(face, image.affine), tmp_path / "face.nii.gz")
    (tmp_path / "list.csv").write_text(f"image,mask\n{scan},face.nii.gz\n")
    prep(
        PrepSettings(
            input=tmp_path / "list.csv", output=tmp_path / "corpus", keys="names", processes=1
        )
    )
    layout = MultiCrop(
        local=0, region=(500, 500, 500), area=(1.0, 1.0), length=(1.0, 1.0), aspect=(0.1, 10.0)
    )
    dataset = dataset_of(tmp_path / "corpus", layout)
    raw = collate([dataset[0], dataset[1]])
    hidden = ~raw["valid"][0] if isinstance(raw["valid"], list) else None
    assert hidden is not None and hidden.any()
    plain = to_batch(raw)
    raw["image"][0] = torch.where(hidden, 3000, raw["image"][0])
    ruined = to_batch(raw)
    assert torch.equal(plain.valid, ruined.valid) and 0.2 < plain.valid.float().mean() < 1
    difference = (plain.image - ruined.image).abs()
    assert difference[plain.valid].max() < 0.05 < difference[~plain.valid].max()


def test_labelled_crops_draw_what_they_drew(labelled_corpus: Path) -> None:
    """A layout of one crop places as its centre is drawn: of a class, of a region or anywhere."""
    for layout in (Crops(2), Pairs(1)):
        dataset = dataset_of(labelled_corpus, layout, (8, 8, 8), label=True, foreground=1.0)
        first = [dataset[2 * i] for i in range(12)]
        assert all((raw["label"] > 0).any() for raw in first)


def test_slices_lie_in_one_slice_through_the_loader(pretrain_corpus: Path) -> None:
    layout = MultiCrop(local=2, local_size=(1, 8, 8), gram_size=(1, 24, 24))
    dataset = dataset_of(pretrain_corpus, layout, (1, 16, 16), augment=ALL)
    for position in range(5):
        boxes = [g.box for g in flat(sample(dataset, position, MIRROR)).values()]
        depths = torch.cat([box[:, :, 0] for box in boxes if box is not None])
        assert len(depths.unique(dim=0)) == 1 and (depths[:, 1] - depths[:, 0] == 1).all()


@EACH
def test_pictures_are_of_whole_samples_and_not_turned(pretrain_corpus: Path, crops: Crops) -> None:
    plain, turned = (dataset_of(pretrain_corpus, crops, augment=a) for a in (None, ALL))
    for number in range(crops.total):
        one, other = plain.middle(1, number, crops), turned.middle(1, number, crops)
        assert torch.equal(one["image"], other["image"]) and "move" not in one
    lone = dataset_of(pretrain_corpus, Crops())
    assert torch.equal(plain.middle(1)["image"], lone.middle(1)["image"])  # what health looks at


def test_a_batch_with_groups_never_waits(pretrain_corpus: Path) -> None:
    dataset = dataset_of(pretrain_corpus, MULTI, augment=ALL)
    augment = Augment((True, True, True), ALL)
    raw = collate([dataset[n] for n in range(MULTI.total)])
    moved = to_device(raw, torch.device(DEVICE))
    with SyncCounter() as counter:
        batch = to_batch(moved, augment)
    assert counter.found == []
    assert batch.others["local"].image.device.type == DEVICE


def test_some_samples_of_a_batch(pretrain_corpus: Path) -> None:
    dataset = dataset_of(pretrain_corpus, MULTI)
    whole = to_batch(collate([dataset[n] for n in range(3 * MULTI.total)]))
    for position in range(3):
        same(whole.of([position], 3), sample(dataset, position))
