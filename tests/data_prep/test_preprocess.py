from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from phantoms import ras_affine, ras_array, save
from scipy import ndimage
from seeds import SEED

from data_prep.corpus import Corpus
from data_prep.errors import InputError
from data_prep.images import Reject
from data_prep.preprocess import (
    Preprocess,
    as_physical,
    intensity_coefficients,
    normalise,
    pad,
    resample,
    resample_sharply,
)
from data_prep.volume import NativeGrid, Volume, read_nifti, volume_from_array

WINDOW = {
    "op": "intensity",
    "CT": {"rule": "window", "low": -1000, "high": 1000},
    "MR": {"rule": "zscore"},
}
STATISTICS = {
    "min": 0.0, "max": 9.0, "p0_5": 1.0, "p50": 4.0, "p99_5": 8.0,
    "clipped_mean": 4.0, "clipped_std": 2.0,
}  # fmt: skip


def volume(array: np.ndarray, spacing: tuple[float, float, float] = (2.0, 1.0, 1.0)) -> Volume:
    affine = np.zeros((4, 4))
    affine[[2, 1, 0], [0, 1, 2]] = np.array(spacing) * [1, -1, -1]
    affine[:, 3] = [10, 20, 30, 1]
    d, h, w = array.shape
    native = NativeGrid((d, h, w), affine, "SPL", 0, 1, np.eye(4))
    return Volume(array[None].astype(np.float32), affine, ("MR",), ("MR",), native)


@pytest.mark.parametrize("way", [resample, resample_sharply])
def test_a_volume_does_not_grow_beyond_all_scans(way: Callable[..., Volume]) -> None:
    large = volume(np.zeros((60, 60, 60)), (5.0, 5.0, 5.0))
    with pytest.raises(Reject, match=r"too_large.*\[6000, 6000, 6000\]"):
        way(large, (0.05, 0.05, 0.05))


def test_window_maps_its_ends_to_minus_one_and_one() -> None:
    values = np.array([-3000, -1000, 0, 500, 1000, 3000], dtype=np.float32)
    found = normalise(values, intensity_coefficients(WINDOW, "CT", STATISTICS))
    np.testing.assert_allclose(found, [-1, -1, 0, 0.5, 1, 1])


def test_window_maps_its_ends_to_where_it_is_told() -> None:
    rule = {"CT": {"rule": "window", "low": -175.0, "high": 250.0, "onto": [0.0, 1.0]}}
    operation = Preprocess.default(intensity=rule).intensity
    assert operation is not None and operation["MR"] == {"rule": "zscore"}
    values = np.array([-1000, -175, 37.5, 250, 1000], dtype=np.float32)
    found = normalise(values, intensity_coefficients(operation, "CT", STATISTICS))
    np.testing.assert_allclose(found, [0, 0, 0.5, 1, 1], atol=1e-6)


def test_percentiles_are_mapped_onto_their_ends() -> None:
    rule = {"MR": {"rule": "percentile", "onto": [0.0, 2.0]}}
    operation = Preprocess.default(intensity=rule).intensity
    assert operation is not None and operation["MR"] == rule["MR"]
    low, high = STATISTICS["p0_5"], STATISTICS["p99_5"]
    values = np.array([low - 9, low, (low + high) / 2, high, high + 9], dtype=np.float32)
    found = normalise(values, intensity_coefficients(operation, "MR", STATISTICS))
    np.testing.assert_allclose(found, [0, 0, 1, 2, 2], atol=1e-6)
    flat = {**STATISTICS, "p0_5": 3.0, "p99_5": 3.0}
    found = normalise(np.float32([1, 3, 5]), intensity_coefficients(operation, "MR", flat))
    assert np.isfinite(found).all() and len(set(found)) == 1


@pytest.mark.parametrize(
    "rule",
    [
        {"rule": "percentile", "low": 1.0},
        {"rule": "percentile", "onto": [1.0, 0.0]},
        {"rule": "zscore", "onto": [0.0, 1.0]},
        {"rule": "window", "low": 2.0, "high": 1.0},
    ],
)
def test_rules_that_say_too_much_or_the_wrong_way_round_are_refused(rule: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"preprocess\.operations"):
        Preprocess.default(intensity={"MR": rule})


def test_zscore_clips_and_scales_with_the_given_statistics() -> None:
    values = np.array([0, 1, 4, 6, 8, 100], dtype=np.float32)
    found = normalise(values, intensity_coefficients(WINDOW, "MR", STATISTICS))
    np.testing.assert_allclose(found, [-1.5, -1.5, 0, 1, 2, 2])


def test_zscore_of_a_flat_scan_is_finite() -> None:
    flat = {**STATISTICS, "p0_5": 3.0, "p99_5": 3.0, "clipped_mean": 3.0, "clipped_std": 0.0}
    found = normalise(np.float32([1, 3, 5]), intensity_coefficients(WINDOW, "MR", flat))
    np.testing.assert_array_equal(found, [0, 0, 0])


def test_resampling_keeps_every_point_of_a_linear_ramp_in_place() -> None:
    d, h, w = np.meshgrid(*(np.arange(n) for n in (8, 12, 10)), indexing="ij")
    source = volume(d * 2.0 - 3.0 * h + 0.5 * w, spacing=(2.0, 1.0, 1.5))
    result = resample(source, (1.0, 1.25, 1.5))
    assert result.array.shape == (1, 16, 10, 10)
    assert result.spacing == pytest.approx((1.0, 1.25, 1.5))
    back = np.linalg.inv(source.affine) @ result.affine
    for index in [(4, 4, 5), (8, 5, 2), (11, 3, 7)]:  # inside: at the faces the ramp is cut
        i, j, k, _ = back @ [*index, 1]
        assert result.array[0][index] == pytest.approx(2.0 * i - 3.0 * j + 0.5 * k, abs=0.02)


def test_resampling_keeps_the_near_face_of_the_field_of_view() -> None:
    source = volume(np.random.default_rng(SEED).random((8, 12, 10)))
    result = resample(source, (4.0, 2.0, 0.5))
    np.testing.assert_allclose(
        source.affine @ [-0.5, -0.5, -0.5, 1], result.affine @ [-0.5, -0.5, -0.5, 1]
    )
    assert result.array.shape == (1, 4, 6, 20)
    np.testing.assert_allclose(
        result.native.affine @ result.native.from_stored @ [1, 2, 3, 1],
        result.affine @ [1, 2, 3, 1],
    )


@pytest.mark.parametrize("spacing", [(1.3, 0.8, 0.6), (3.0, 0.7, 1.0), (0.9, 1.0, 1.0)])
def test_axes_that_grow_are_interpolated_as_scipy_does(
    spacing: tuple[float, float, float], seed: int
) -> None:
    array = np.random.default_rng(seed).normal(size=(30, 40, 50)).astype(np.float32)
    volume = volume_from_array(array, (3.0, 1.0, 1.0), "MR")
    found = resample_sharply(volume, spacing)
    factors = np.array(spacing) / (3.0, 1.0, 1.0)
    expected = ndimage.affine_transform(
        array.astype(np.float64), factors, offset=factors / 2 - 0.5,
        output_shape=found.array.shape[1:], order=3, mode="nearest",
    )  # fmt: skip
    expected = np.clip(expected, array.min(), array.max())
    np.testing.assert_allclose(found.array[0], expected, atol=5e-5)
    linear = resample(volume, spacing)
    np.testing.assert_array_equal(found.affine, linear.affine)
    np.testing.assert_array_equal(found.native.from_stored, linear.native.from_stored)


def _summed(line: np.ndarray, factor: float) -> list[float]:
    """A sinc of five new voxels to each side under Kaiser's window, voxel by voxel."""
    made = []
    for k in range(max(1, round(len(line) / factor))):
        centre = (k + 0.5) * factor - 0.5
        total = weights = 0.0
        for i in range(int(centre - 5 * factor) - 1, int(centre + 5 * factor) + 2):
            t = (i - centre) / factor
            if abs(t) < 5:
                weight = np.sinc(t) * np.i0(7 * (1 - (t / 5) ** 2) ** 0.5)
                total += weight * line[min(max(i, 0), len(line) - 1)]
                weights += weight
        made.append(total / weights)
    return made


@pytest.mark.parametrize("spacing", [(4.0, 2.5, 1.0), (3.0, 1.02, 9.0), (70.0, 1.7, 0.5)])
def test_axes_that_shrink_go_through_a_windowed_sinc(
    spacing: tuple[float, float, float], seed: int
) -> None:
    array = np.random.default_rng(seed).normal(size=(12, 15, 18)).astype(np.float32)
    found = resample_sharply(volume_from_array(array, (3.0, 1.0, 1.0), "MR"), spacing).array[0]
    expected = array.astype(np.float64)
    for axis, (new, old) in enumerate(zip(spacing, (3.0, 1.0, 1.0), strict=True)):
        if new > old:
            expected = np.apply_along_axis(_summed, axis, expected, new / old)
    if spacing[2] < 1:
        expected = ndimage.affine_transform(
            expected, (1, 1, 0.5), offset=(0, 0, -0.25), output_shape=found.shape, order=3,
            mode="nearest",
        )  # fmt: skip
    expected = np.clip(expected, array.min(), array.max())
    np.testing.assert_allclose(found, expected, atol=5e-5)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("factor", [1.1, 1.6, 2.5, 4.0])
def test_what_new_voxels_hold_comes_through_and_nothing_else(
    axis: int, factor: float, seed: int
) -> None:
    """A wave that becomes shorter than two voxels would come back as another one."""
    rng = np.random.default_rng((seed, axis, int(10 * factor)))
    spacing = [1.0, 1.0, 1.0]
    spacing[axis] = factor
    new = (np.arange(round(200 / factor)) + 0.5) * factor - 0.5
    inside = slice(len(new) // 6, -(len(new) // 6))

    def error(voxels: float, kept: bool) -> float:
        phase = rng.uniform(0, 2 * np.pi)

        def wave(x: np.ndarray) -> np.ndarray:
            return np.cos(2 * np.pi * x / (voxels * factor) + phase)

        shape = [3, 3, 3]
        shape[axis] = 200
        line = wave(np.arange(200.0)).astype(np.float32)
        array = np.empty(shape, np.float32)
        rows = np.moveaxis(array, axis, 0)
        rows[:] = line[:, None, None]
        rows[:, 0, 0] = np.linspace(-2, 2, 200)  # so that nothing is cut at the ends of values
        scan = volume_from_array(array, (1.0, 1.0, 1.0), "MR")
        found = np.moveaxis(resample_sharply(scan, spacing).array[0], axis, 0)[:, 1, 1]
        off = found - (wave(new) if kept else 0.0)
        return float(np.sqrt(np.mean(off[inside] ** 2)))

    long = rng.uniform(3.4, 12, 4)
    short = rng.uniform(2 / factor, 1.4, 4) if factor > 1.5 else []  # of two old voxels, at least
    assert max(error(wave, True) for wave in long) < 0.003
    assert all(error(wave, False) < 0.005 for wave in short)


def test_codes_are_resampled_as_what_they_stand_for(seed: int) -> None:
    rng = np.random.default_rng(seed)
    plain = volume(rng.normal(size=(9, 10, 11)))
    codes = np.rint(plain.array * 1000).astype(np.int16)
    coded = replace(plain, array=codes, slope=(-0.01,), intercept=(4.0,))
    found = resample_sharply(coded, (3.0, 0.7, 1.0))
    assert found.array.dtype == np.float32
    expected = resample_sharply(as_physical(coded), (3.0, 0.7, 1.0))
    np.testing.assert_allclose(found.physical(), expected.array, atol=1e-4)


def test_each_channel_is_resampled_by_itself(seed: int) -> None:
    both = np.random.default_rng(seed).normal(size=(2, 9, 10, 11)).astype(np.float32)
    scan = volume(both[0])
    two = replace(
        scan, array=both, modality=("MR",) * 2, names=("a", "b"), slope=(1.0,) * 2,
        intercept=(0.0,) * 2,
    )  # fmt: skip
    found = resample_sharply(two, (3.0, 0.7, 1.0)).array
    for one, channel in zip(found, both, strict=True):
        alone = resample_sharply(replace(scan, array=channel[None]), (3.0, 0.7, 1.0)).array[0]
        np.testing.assert_array_equal(one, alone)


@pytest.mark.parametrize(("spacing", "most"), [(0.8, 2.5e-3), (1.3, 1e-3), (1.6, 1e-3)])
def test_waves_that_the_new_voxels_hold_come_through(spacing: float, most: float) -> None:
    """Of 6 mm and more; linear interpolation is ten times worse and more."""
    n = 60
    places = np.arange(n, dtype=np.float64)

    def value(x: np.ndarray) -> np.ndarray:
        return sum(np.cos(2 * np.pi * x / w + w) for w in (6.0, 7.3, 11.0, 23.0))

    along = [value(places + shift) for shift in (0, 3, 9)]
    array = along[0][:, None, None] + along[1][None, :, None] + along[2][None, None]
    volume = volume_from_array(array.astype(np.float32), (1.0, 1.0, 1.0), "MR")
    errors = []
    for how in (resample_sharply, resample):
        found = how(volume, (spacing,) * 3).array[0]
        new = (np.arange(len(found)) + 0.5) * spacing - 0.5
        parts = [value(new + shift) for shift in (0, 3, 9)]
        right = parts[0][:, None, None] + parts[1][None, :, None] + parts[2][None, None]
        inside = (slice(len(new) // 6, -(len(new) // 6)),) * 3
        errors.append(float(np.sqrt(np.mean((found - right)[inside] ** 2)) / right.std()))
    assert errors[0] < most and errors[1] > 10 * errors[0]


def test_resampling_makes_no_new_extremes() -> None:
    """Splines and sincs overshoot at an edge, as no air of -1100 HU is."""
    array = np.full((20, 20, 20), -1000.0, np.float32)
    array[10:] = 800.0
    volume = volume_from_array(array, (1.0, 1.0, 1.0), "CT")
    for spacing in (0.6, 1.3):
        found = resample_sharply(volume, (spacing, 1.0, 1.0)).array
        assert found.min() == -1000 and found.max() == 800


def test_resampling_to_the_same_spacing_changes_nothing() -> None:
    source = volume(np.random.default_rng(SEED).random((8, 6, 5)))
    assert resample(source, (2.01, 1.0, 0.995)) is source


def test_shrinking_does_not_alias() -> None:
    stripes = np.tile([0.0, 1.0], (8, 8, 16))  # alternates voxel by voxel along W
    result = resample(volume(stripes), (2.0, 1.0, 3.0))
    assert np.ptp(result.array[0, :, :, 1:-1]) < 0.2


def test_padding_is_at_the_far_ends_with_the_minimum() -> None:
    source = volume(np.random.default_rng(SEED).random((5, 8, 3)) + 1)
    result = pad(source, (4, 4, 4))
    assert result.array.shape == (1, 8, 8, 4)
    np.testing.assert_array_equal(result.array[:, :5, :, :3], source.array)
    assert (result.array[:, 5:] == source.array.min()).all()
    np.testing.assert_array_equal(result.affine, source.affine)


@pytest.mark.parametrize("spacing_mm", [None, (1.3, 0.7, 2.1), (2.01, 1.0, 1.0)])
def test_the_shape_is_known_without_the_voxels(spacing_mm: tuple[float, ...] | None) -> None:
    given = volume(np.zeros((11, 14, 9)))
    for multiple in (None, (8, 4, 2)):
        preprocess = Preprocess.default(spacing_mm, multiple)
        made = preprocess.apply(given).array.shape[1:]
        assert preprocess.shape_of(given.array.shape[1:], given.spacing) == list(made)


def test_statistics_are_of_the_native_volume_before_resampling(tmp_path: Path) -> None:
    scan = read_nifti(save(tmp_path / "s.nii.gz", ras_array()))
    plain = Preprocess.default().apply(scan).array
    resampled = Preprocess.default(spacing_mm=(6.0, 0.75, 1.5)).apply(scan).array
    values = ras_array().astype(np.float64)
    low, high = np.percentile(values, [0.5, 99.5])
    clipped = np.clip(values, low, high)
    expected = (clipped - clipped.mean()) / clipped.std()
    np.testing.assert_allclose(plain.max(), expected.max(), rtol=1e-5)
    # Blurring narrows the values; statistics taken afterwards would stretch them again.
    assert resampled.max() <= plain.max() + 1e-5
    assert resampled.std() < plain.std()


def test_a_corpus_and_its_nifti_give_the_same_numbers(labelled_corpus: Path, samples: Path) -> None:
    corpus = Corpus.open(labelled_corpus)
    recipe = Preprocess.default(spacing_mm=(1.5, 1.0, 1.0), multiple=(16, 16, 16))
    for key in corpus.keys[:3]:
        i = corpus.position(key)
        stored = recipe.apply(corpus.volume(i))
        file = recipe.apply(read_nifti(samples / "hippocampus" / "images" / f"{key}.nii.gz"))
        np.testing.assert_array_equal(stored.array, file.array)
        np.testing.assert_array_equal(stored.affine, file.affine)
        assert all(n % 16 == 0 for n in stored.array.shape[1:])


def test_dictionary_round_trip_survives_json() -> None:
    recipe = Preprocess.default(spacing_mm=(1, 1.5, 2), multiple=(16, 16, 16))
    again = Preprocess.from_dict(json.loads(json.dumps(recipe.to_dict())))
    assert again == recipe
    assert again.spacing_mm == (1.0, 1.5, 2.0)
    assert Preprocess.default().spacing_mm is None


@pytest.mark.parametrize(
    ("data", "named"),
    [
        ({"version": 2, "operations": []}, "version 2"),
        ({"version": 1, "operations": [], "extra": 1}, "extra"),
        ({"version": 1, "operations": "x"}, "not a list"),
        ({"version": 1, "operations": [{"op": "rotate"}]}, "rotate"),
        ({"version": 1, "operations": [{"op": "reorient", "axcodes": "RAS"}]}, "RAS"),
        ({"version": 1, "operations": [{"op": "resample", "spacing_mm": [1, 1, -1]}]}, "-1"),
        ({"version": 1, "operations": [{"op": "resample", "spacing_mm": None, "k": 3}]}, "k"),
        (
            {"version": 1, "operations": [{**WINDOW, "CT": {"rule": "window", "low": 5}}]},
            "low < high",
        ),
        ({"version": 1, "operations": [{**WINDOW, "_target_": "os.system"}]}, "_target_"),
    ],
)
def test_unknown_or_wrong_operations_are_refused(data: dict, named: str) -> None:
    with pytest.raises(InputError, match=named):
        Preprocess.from_dict(data)


def test_all_mistakes_are_listed_at_once() -> None:
    operations = ({"op": "rotate"}, {"op": "resample", "spacing_mm": [0, 1, 1]})
    with pytest.raises(InputError) as caught:
        Preprocess(operations)
    assert len(caught.value.problems) == 2


def test_oblique_and_flipped_files_are_prepared_alike(tmp_path: Path) -> None:
    flipped = ras_affine()
    flipped[0, 0] *= -1
    flipped[0, 3] += 6 * ras_affine()[0, 0]
    recipe = Preprocess.default(spacing_mm=(2, 2, 2))
    one = recipe.apply(read_nifti(save(tmp_path / "a.nii", ras_array())))
    other = recipe.apply(read_nifti(save(tmp_path / "b.nii", ras_array()[::-1], flipped)))
    np.testing.assert_array_equal(one.array, other.array)
    np.testing.assert_allclose(one.affine, other.affine)
