"""Moved crops: the right voxels in the right place, the same whoever makes them."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import ndimage
from sync_counter import DEVICE, SyncCounter
from torch import Tensor

from data_prep.corpus import Corpus
from data_prep.preprocess import Preprocess, smoothing
from pretrain.augment import Augment
from pretrain.geometry import Grid, drawn_matrix, grid_of, moved, plan, reach, thin_axes
from pretrain.loader import CropDataset, collate, make_loader, to_batch, to_device, valid_of
from pretrain.schedule import Schedule
from pretrain.settings import AugmentSettings

SPATIAL = AugmentSettings(rotate=0.2, scale=0.2)
ALWAYS = AugmentSettings(rotate=1.0, scale=1.0)
ONE = np.ones(3)


def dataset_of(
    path: Path, crop: tuple[int, int, int] = (16, 24, 20), spacing: object = None, **options: object
) -> CropDataset:
    corpus = Corpus.open(path)
    schedule = Schedule(corpus.shards, seed=3, lanes=4)
    preprocess = Preprocess.default(spacing)  # type: ignore[arg-type]
    return CropDataset(corpus, np.arange(len(corpus)), schedule, preprocess, crop, **options)


def smooth_volume(seed: int, shape: tuple[int, int, int], sigma: float = 1.5) -> np.ndarray:
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=shape), sigma)
    return (noise / noise.std() * 2000).astype(np.int16)


def made(
    volume: np.ndarray,
    start: tuple[int, int, int],
    size: tuple[int, int, int],
    matrix: np.ndarray | None,
    grid: Grid,
    label: np.ndarray | None = None,
    hidden: np.ndarray | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """A crop through its box, as worker and device make it."""
    shape = np.array(volume.shape)
    first, extent, move = plan(np.array(start), size, matrix, grid, shape, [-3000])
    box = tuple(slice(a, a + n) for a, n in zip(first, extent, strict=True))
    return moved(
        torch.from_numpy(volume[box].copy())[None],
        None if hidden is None else torch.from_numpy(hidden[box].copy())[None],
        None if label is None else torch.from_numpy(label[box].copy()),
        move,
    )


def test_a_move_that_is_none_gives_the_voxels_themselves(seed: int) -> None:
    volume = smooth_volume(seed, (17, 23, 19))
    label = (volume > 0).astype(np.int32) + (volume > 900)
    grid = grid_of(volume.shape, ONE, None)
    codes, valid, found = made(volume, (3, 4, 5), (8, 9, 10), None, grid, label)
    cut = (slice(3, 11), slice(4, 13), slice(5, 15))
    assert (codes[0] - torch.from_numpy(volume[cut])).abs().max() < 0.05
    assert found is not None and np.array_equal(found.numpy(), label[cut]) and valid.all()


@pytest.mark.parametrize(("axis", "plane"), [(0, (1, 2)), (1, (0, 2)), (2, (0, 1))])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_quarter_turn_is_rot90(seed: int, axis: int, plane: tuple[int, int], sign: int) -> None:
    volume = smooth_volume(seed, (26, 25, 27))
    label = (volume > 0).astype(np.int32) + 2 * (volume > 900)
    size = [9, 9, 9]
    size[axis] = 6
    matrix = np.eye(3)
    a, b = plane
    matrix[a, a] = matrix[b, b] = math.cos(sign * math.pi / 2)
    matrix[a, b], matrix[b, a] = sign, -sign
    grid = grid_of(volume.shape, ONE, None)
    codes, valid, found = made(volume, (8, 7, 9), tuple(size), matrix, grid, label)
    cut = tuple(slice(s, s + n) for s, n in zip((8, 7, 9), size, strict=True))
    expected = torch.rot90(torch.from_numpy(volume[cut].copy()), sign, plane)
    assert (codes[0] - expected).abs().max() < 0.1 and valid.all()
    assert found is not None
    assert torch.equal(found, torch.rot90(torch.from_numpy(label[cut].copy()), sign, plane))


def oracle(
    volume: np.ndarray, start: tuple[int, int, int], size: tuple[int, int, int],
    matrix: np.ndarray, factors: np.ndarray,
) -> np.ndarray:  # fmt: skip
    """The whole volume smoothed and transformed by scipy, whose positions are worked out here."""
    middle = (np.array(size) - 1) / 2
    smooth = ndimage.gaussian_filter(volume.astype(np.float64), smoothing(factors), mode="nearest")
    on_grid = np.array(start) + middle - matrix @ middle
    return ndimage.affine_transform(
        smooth,
        np.diag(factors) @ matrix,
        offset=(on_grid + 0.5) * factors - 0.5,
        output_shape=size,
        order=1,
        mode="nearest",
    )


@pytest.mark.parametrize("wanted", [None, (0.8, 1.5, 0.7), (2.2, 1.3, 0.9)])
def test_equals_scipy_on_the_whole_volume(seed: int, wanted: tuple[float, ...] | None) -> None:
    """Rotation, scale and spacing at once, on a grid of three spacings: boxes lack no corner."""
    volume = smooth_volume(seed, (40, 44, 48))
    label = np.digitize(volume, [-1500, 0, 1200]).astype(np.int32)
    spacing = np.array([1.1, 0.9, 1.0])
    grid = grid_of(volume.shape, spacing, wanted)
    size = (7, 10, 8)
    start = tuple(int(n) for n in (grid.shape - size) // 2)
    for number in range(4):
        matrix = drawn_matrix(seed * 100 + number, ALWAYS, size, grid.spacing)
        assert matrix is not None
        codes, valid, found = made(volume, start, size, matrix, grid, label)
        expected = oracle(volume, start, size, matrix, grid.factors)
        inside = valid[0].numpy()
        assert inside.mean() > 0.9
        np.testing.assert_allclose(codes[0].numpy()[inside], expected[inside], atol=0.5)
        # Labels: the class of the largest share, where there is a clear one.
        shares = np.stack(
            [_unsmoothed((label == k).astype(float), start, size, matrix, grid) for k in range(4)]
        )
        ordered = np.sort(shares, axis=0)
        clear = inside & (ordered[-1] - ordered[-2] > 0.01)
        assert clear.mean() > 0.8 and found is not None
        assert np.array_equal(found.numpy()[clear], shares.argmax(0)[clear])


def _unsmoothed(
    volume: np.ndarray, start: tuple[int, ...], size: tuple[int, ...], matrix: np.ndarray,
    grid: Grid,
) -> np.ndarray:  # fmt: skip
    middle = (np.array(size) - 1) / 2
    offset = (np.array(start) + middle - matrix @ middle + 0.5) * grid.factors - 0.5
    whole = np.diag(grid.factors) @ matrix
    return ndimage.affine_transform(
        volume, whole, offset=offset, output_shape=size, order=1, mode="nearest"
    )


@pytest.mark.parametrize("spacing", [(2.0, 1.5, 1.0), (0.7, 0.8, 1.3)])
def test_a_whole_resampled_volume_equals_the_numpy_reference(
    pretrain_corpus: Path, spacing: tuple[float, float, float]
) -> None:
    """The device's resampling and `Preprocess.apply` agree on CT and on MRI, ends included."""
    corpus = Corpus.open(pretrain_corpus)
    for modality in ("CT", "MR"):
        chosen = [i for i in range(len(corpus)) if corpus.modalities[i] == modality]
        item = min(chosen, key=lambda i: int(corpus.shapes[i].prod()))
        expected = Preprocess.default(spacing).apply(corpus.volume(item))
        d, h, w = expected.array.shape[1:]
        dataset = dataset_of(pretrain_corpus, (d + 3, h, w + 2), spacing)
        position = next(p for p in range(len(corpus)) if dataset.schedule.sample(p)[2] == item)
        batch = to_batch(collate([dataset[position]]))
        inside = batch.valid[0, 0].numpy()
        assert inside.sum() == d * h * w
        found = batch.image[0, 0].numpy()
        assert np.abs(found[inside] - expected.array[0].ravel()).max() < 1e-3
        assert found[~inside].max() <= expected.array.min() + 1e-3
        assert batch.spacing[0].tolist() == pytest.approx(
            np.where(np.abs(np.array(spacing) / corpus.spacings[item] - 1) < 0.01,
                     corpus.spacings[item], spacing)
        )  # fmt: skip


def test_resampled_crops_are_boxes_of_the_resampled_volume(labelled_corpus: Path) -> None:
    """What training sees is what inference cuts out of the whole resampled scan."""
    spacing, size = (1.6, 0.7, 1.25), (12, 16, 14)
    dataset = dataset_of(labelled_corpus, size, spacing, label=True, foreground=1.0)
    for index in range(4):
        draw = dataset.draw(index)
        batch = to_batch(collate([dataset[index]]))
        whole = dataset.preprocess.apply(dataset.corpus.volume(draw.item)).array[0]
        low = np.maximum(draw.start, 0)
        high = np.minimum(draw.start + size, whole.shape)
        part = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
        assert batch.label is not None and (batch.label > 0).any()
        inside = batch.valid[0, 0].numpy()
        np.testing.assert_allclose(
            batch.image[0, 0].numpy()[inside], whole[part].ravel(), atol=2e-3
        )


def test_labels_follow_what_they_label(seed: int) -> None:
    """A label made by a threshold is that of the turned image, but for the voxels at its border."""
    volume = smooth_volume(seed, (50, 52, 54), sigma=6)
    label = (volume > 300).astype(np.int32)
    looked_at = 0
    for wanted in (None, (2.0, 2.0, 2.0)):
        grid = grid_of(volume.shape, ONE, wanted)
        size = (16, 18, 17)
        start = tuple(int(n) for n in (grid.shape - size) // 2)
        for number in range(4):
            matrix = drawn_matrix(number, ALWAYS, size, ONE)
            codes, valid, found = made(volume, start, size, matrix, grid, label)
            assert found is not None
            sure = valid[0] & ((codes[0] - 300).abs() > 1200)
            assert torch.equal(found[sure] > 0, codes[0][sure] > 300)
            looked_at += int(sure.sum())
    assert looked_at > 100


def test_halving_moves_no_border(seed: int) -> None:
    """Positions lie between voxels then: the nearest voxel would shift all borders to one side."""
    label = np.zeros((40, 40, 40), np.int32)
    rng = np.random.default_rng(seed)
    for value in range(1, 5):
        low = rng.integers(2, 24, 3)
        high = low + rng.integers(6, 14, 3)
        label[tuple(slice(a, b) for a, b in zip(low, high, strict=True))] = value
    grid = grid_of(label.shape, ONE, (2.0, 2.0, 2.0))
    volume = np.zeros(label.shape, np.int16)
    flips: list[tuple[int, ...]] = [(0,), (1,), (2,), (0, 1, 2)]
    _, _, found = made(volume, (0, 0, 0), (20, 20, 20), None, grid, label)
    for axes in flips:
        _, _, other = made(volume, (0, 0, 0), (20, 20, 20), None, grid, np.flip(label, axes).copy())
        assert found is not None and other is not None
        assert torch.equal(other, found.flip(axes))
    # The oracle: votes of the eight voxels that make one, the higher value where votes are equal.
    votes = label.reshape(20, 2, 20, 2, 20, 2).transpose(0, 2, 4, 1, 3, 5).reshape(-1, 8)
    expected = [max(set(v), key=lambda x: (v.count(x), x)) for v in votes.tolist()]
    assert found is not None and found.flatten().tolist() == expected


def test_outside_the_volume_nothing_is_valid(seed: int) -> None:
    """Valid is where a crop's voxel lies in the volume; elsewhere it is the darkest, unlabelled."""
    volume = smooth_volume(seed, (12, 14, 16))
    label = np.ones(volume.shape, np.int32)
    grid = grid_of(volume.shape, ONE, None)
    size, start = (16, 18, 20), (-2, -2, -2)
    matrix = drawn_matrix(seed, ALWAYS, size, ONE)
    assert matrix is not None
    codes, valid, found = made(volume, start, size, matrix, grid, label)
    assert found is not None
    middle = (np.array(size) - 1) / 2
    for o in np.ndindex(*size):
        p = np.array(start) + middle + matrix @ (np.array(o) - middle)
        beyond = np.maximum(-0.5 - p, p - np.array(volume.shape) + 0.5).max()
        if abs(beyond) < 2e-3:
            continue  # a border is exact to a thousandth of a voxel
        inside = bool(beyond < 0)
        assert bool(valid[0][o]) == inside and int(found[o]) == inside
        assert inside or float(codes[0][o]) == -3000


def test_what_is_hidden_stays_hidden_and_without_influence(seed: int) -> None:
    volume = smooth_volume(seed, (24, 24, 24))
    hidden = np.zeros(volume.shape, bool)
    hidden[8:14, 9:15, 10:12] = True
    grid = grid_of(volume.shape, ONE, None)
    matrix = drawn_matrix(seed, ALWAYS, (10, 10, 10), ONE)
    codes, valid, _ = made(volume, (7, 7, 7), (10, 10, 10), matrix, grid, hidden=hidden)
    other = np.where(hidden, 30000, volume).astype(np.int16)
    changed, again, _ = made(other, (7, 7, 7), (10, 10, 10), matrix, grid, hidden=hidden)
    assert torch.equal(valid, again) and 0 < valid.float().mean() < 1
    # Positions are exact to 1e-3 of a voxel, and so is the share of a hidden one.
    assert (codes - changed)[valid].abs().max() <= 30000 * 2e-3
    assert (codes - changed)[~valid].abs().max() > 10000


def test_chances_and_ranges(seed: int) -> None:
    """Over many seeds: a fifth is turned, a fifth scaled, independently, within the ranges."""
    count = 3000
    turned = scaled = both = 0
    for number in range(count):
        matrix = drawn_matrix(seed * count + number, SPATIAL, (9, 8, 7), ONE)
        if matrix is None:
            continue
        zoom = np.linalg.norm(matrix, axis=0)
        assert np.allclose(zoom, zoom[0]) and 0.7 <= zoom[0] <= 1.4
        rotation = matrix / zoom
        assert np.allclose(rotation @ rotation.T, ONE * np.eye(3)) and np.linalg.det(rotation) > 0
        # R = Rd Rh Rw, whose angles are read off as those of Euler.
        second = math.asin(np.clip(rotation[0, 2], -1, 1))
        first = math.atan2(-rotation[1, 2], rotation[2, 2])
        third = math.atan2(-rotation[0, 1], rotation[0, 0])
        assert max(map(abs, map(math.degrees, (first, second, third)))) <= 30 + 1e-6
        is_turned, is_scaled = not np.allclose(rotation, np.eye(3)), abs(zoom[0] - 1) > 1e-9
        turned, scaled, both = turned + is_turned, scaled + is_scaled, both + is_turned * is_scaled
    deviation = math.sqrt(count * 0.2 * 0.8)
    assert abs(turned - 0.2 * count) < 4 * deviation and abs(scaled - 0.2 * count) < 4 * deviation
    assert abs(both - 0.04 * count) < 4 * math.sqrt(count * 0.04)


def test_zoom_of_each_axis_by_itself(seed: int) -> None:
    chosen = AugmentSettings(scale=1.0, zoom=(0.7, 1.5), zoom_per_axis=True)
    drawn = [drawn_matrix(seed + n, chosen, (8, 8, 8), ONE) for n in range(300)]
    zooms = np.array([np.diag(m) for m in drawn if m is not None])
    assert (zooms >= 0.7).all() and (zooms <= 1.5).all() and np.ptp(zooms, axis=1).min() > 0
    assert np.allclose(zooms.mean(0), 1.1, atol=0.06)


@pytest.mark.parametrize(
    ("size", "spacing", "thin"),
    [
        ((8, 8, 8), (1, 1, 1), (False, False, False)),
        ((1, 16, 16), (1, 1, 1), (True, False, False)),
        ((5, 16, 16), (1, 1, 1), (True, False, False)),
        ((6, 16, 16), (1, 1, 1), (False, False, False)),
        ((8, 8, 8), (1, 1, 3.5), (False, False, True)),
    ],
)
def test_flat_crops_turn_in_their_plane(
    size: tuple[int, int, int], spacing: tuple[float, ...], thin: tuple[bool, ...]
) -> None:
    assert thin_axes(size, spacing) == thin
    for number in range(20):
        matrix = drawn_matrix(number, ALWAYS, size, np.array(spacing))
        assert matrix is not None
        for axis, flat in enumerate(thin):
            own = np.array_equal(matrix[axis], np.eye(3)[axis])
            assert own == flat and (not flat or np.array_equal(matrix[:, axis], np.eye(3)[axis]))


def test_a_rotation_is_rigid_in_millimetres(seed: int) -> None:
    spacing = np.array([2.5, 1.0, 1.5])
    chosen = AugmentSettings(rotate=1.0)
    matrix = drawn_matrix(seed, chosen, (8, 8, 8), spacing)
    assert matrix is not None
    in_mm = np.diag(spacing) @ matrix @ np.diag(1 / spacing)
    assert np.allclose(in_mm @ in_mm.T, np.eye(3))
    grid = grid_of((30, 30, 30), spacing, None)
    assert reach((8, 8, 8), matrix, grid).tolist() == [8, 8, 8]


def test_crops_that_are_not_moved_are_those_of_a_run_without(labelled_corpus: Path) -> None:
    """Bit for bit; and those that are moved lie around the same voxel."""
    options = {"label": True, "foreground": 0.5}
    plain = dataset_of(labelled_corpus, **options)
    identity = AugmentSettings(scale=1.0, zoom=(1.0, 1.0))
    still = dataset_of(labelled_corpus, augment=identity, **options)
    some = dataset_of(labelled_corpus, augment=SPATIAL, **options)
    moves = 0
    for index in range(40):
        one, other, third = plain[index], still[index], some[index]
        assert one["seed"] == other["seed"] == third["seed"]
        assert all(torch.equal(one[n], other[n]) for n in ("image", "label", "spacing"))
        assert torch.equal(valid_of(one), valid_of(other))
        if "move" in third:
            moves += 1
        else:
            assert all(torch.equal(one[n], third[n]) for n in ("image", "label"))
            assert torch.equal(valid_of(one), valid_of(third))
    assert 5 < moves < 30  # 36 % are expected


def test_a_sample_is_the_same_in_every_batch(labelled_corpus: Path) -> None:
    """Bit for bit: alone, in other company, in another order, read by a worker, on another rank."""
    chosen = AugmentSettings(
        rotate=0.5, scale=0.5, gain=0.1, noise=0.5, blur=0.5, brightness=0.5, contrast=0.5,
        low_resolution=0.5, inverted_gamma=0.5, gamma=0.5,
    )  # fmt: skip
    augment = Augment((True, True, True), chosen, ((1, 2),))
    dataset = dataset_of(labelled_corpus, label=True, foreground=0.5, augment=chosen)
    joint = [to_batch(raw, augment) for raw in make_loader(dataset, batch_size=4, first_step=0,
                                                           last_step=3)]  # fmt: skip
    by_seed = {int(b.seeds[i]): (b, i) for b in joint for i in range(4)}
    assert len(by_seed) == 12

    def check(raw: dict[str, object]) -> int:
        batch = to_batch(raw, augment)
        assert batch.label is not None
        for i, seed in enumerate(batch.seeds.tolist()):
            whole, at = by_seed[seed]
            assert whole.label is not None
            assert torch.equal(batch.image[i], whole.image[at])
            assert torch.equal(batch.valid[i], whole.valid[at])
            assert torch.equal(batch.label[i], whole.label[at])
        return len(batch.image)

    assert sum(check(collate([dataset[index]])) for index in range(12)) == 12
    check(collate([dataset[index] for index in (11, 3, 7, 0, 5)]))
    for rank in range(2):
        ranked = make_loader(
            dataset, batch_size=4, first_step=0, last_step=3, rank=rank, world=2, workers=rank
        )
        assert sum(check(raw) for raw in ranked) == 6


def test_boxes_hold_no_more_than_they_need(pretrain_corpus: Path) -> None:
    """Ends of a box are voxels that the crop takes something of, or its smoothing does."""
    dataset = dataset_of(pretrain_corpus, (10, 12, 14), augment=ALWAYS)
    for index in range(8):
        raw = dataset[index]
        corners = np.array(list(np.ndindex(2, 2, 2))) * (np.array(raw["move"].size) - 1)
        at = corners @ np.array(raw["move"].matrix).T + np.array(raw["move"].offset)
        spread = np.ceil(at.max(0)) - np.floor(at.min(0)) + 1
        assert (np.array(raw["image"].shape[1:]) <= spread).all()


def test_a_moved_batch_never_waits(labelled_corpus: Path) -> None:
    chosen = AugmentSettings(
        rotate=1.0, scale=1.0, gain=0.1, noise=1.0, blur=1.0, brightness=1.0, contrast=1.0,
        low_resolution=1.0, inverted_gamma=1.0, gamma=1.0, bias_field=1.0,
    )  # fmt: skip
    augment = Augment((True, True, True), chosen, ((1, 2),))
    dataset = dataset_of(
        labelled_corpus, (8, 12, 10), (1.5, 1.5, 1.5), label=True, foreground=0.5, augment=chosen
    )
    raw = to_device(collate([dataset[index] for index in range(3)]), torch.device(DEVICE))
    to_batch(raw, augment)  # the table of sides is made once
    with SyncCounter() as counter:
        batch = to_batch(raw, augment)
    assert counter.found == []
    assert batch.image.shape == (3, 1, 8, 12, 10) and batch.label is not None


def test_mixed_precision_touches_no_crop(labelled_corpus: Path) -> None:
    chosen = AugmentSettings(
        rotate=1.0, scale=1.0, bias_field=1.0, noise=1.0, blur=1.0, low_resolution=1.0
    )
    dataset = dataset_of(labelled_corpus, (8, 12, 10), (1.5, 1.5, 1.5), augment=chosen)
    raw = collate([dataset[index] for index in range(3)])
    plain = to_batch(raw, Augment(change=chosen)).image
    with torch.autocast("cpu", torch.bfloat16):
        mixed = to_batch(raw, Augment(change=chosen)).image
    assert mixed.dtype == torch.float32 and torch.equal(plain, mixed)


def test_pictures_are_resampled_and_not_turned(labelled_corpus: Path) -> None:
    dataset = dataset_of(labelled_corpus, (8, 12, 10), (1.5, 1.5, 1.5), augment=ALWAYS, label=True)
    for number in (0, 1):
        raw = dataset.middle(2, number)
        assert raw["image"].shape == (1, 8, 12, 10) and raw["label"].shape == (8, 12, 10)
        assert raw["spacing"].tolist() == [1.5, 1.5, 1.5] and "move" not in raw
    still = dataset_of(labelled_corpus, (8, 12, 10), (1.5, 1.5, 1.5), label=True)
    assert torch.equal(still.middle(2)["image"], dataset.middle(2)["image"])
