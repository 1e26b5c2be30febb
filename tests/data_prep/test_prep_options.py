"""What `voxelith prep` can be told to take, and what it refuses as implausible."""

from __future__ import annotations

import csv
import os
import shutil
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from phantoms import ras_affine, save
from pydantic import ValidationError
from scipy import ndimage
from scipy.spatial import cKDTree

from data_prep.build import prep
from data_prep.corpus import Corpus
from data_prep.errors import InputError
from data_prep.images import Reject, open_image
from data_prep.intensity import encode, histogram, volume_statistics
from data_prep.layouts.case import files_below
from data_prep.layouts.find import find_cases
from data_prep.preprocess import Preprocess
from data_prep.scan import EXTENT_MM, SPACING_MM, check_plausible, check_values
from data_prep.settings import PrepSettings
from data_prep.volume import (
    NativeGrid,
    Volume,
    check_label_grid,
    read_channels,
    read_label,
    read_nifti,
    volume_from_array,
    write_nifti,
)

SHAPE = (14, 12, 10)
MESSY = Path(__file__).parents[3] / "shared" / "data" / "messy"


@pytest.fixture
def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def made(source: Path, output: Path, **options: Any) -> Corpus:
    options = {"keys": "names", "processes": 1, **options}
    prep(PrepSettings(input=source, output=output, **options), say=lambda line: None)
    return Corpus.open(output)


def refused(output: Path) -> dict[str, str]:
    with (output.with_name(f"{output.name}.private") / "quarantine.csv").open() as file:
        return {row["input"]: row["code"] for row in csv.DictReader(file)}


def inputs(output: Path) -> dict[str, str]:
    """Key by the name in the input."""
    with (output.with_name(f"{output.name}.private") / "keymap.csv").open() as file:
        return {row["input"]: row["key"] for row in csv.DictReader(file)}


def noise(rng: np.random.Generator, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    return rng.integers(0, 900, shape).astype(np.int16)


# One number for all axes.


def test_one_spacing_is_that_of_all_axes(tmp_path: Path, rng: np.random.Generator) -> None:
    save(tmp_path / "in" / "a.nii.gz", noise(rng))
    one = made(tmp_path / "in", tmp_path / "one", spacing=1.5)
    three = made(tmp_path / "in", tmp_path / "three", spacing=(1.5, 1.5, 1.5))
    assert one.meta(0)["spacing"] == pytest.approx([1.5] * 3)
    np.testing.assert_array_equal(one.read(0), three.read(0))


@pytest.mark.parametrize("spacing", [0, -1.0, True, "fine", (1.0, 1.0)])
def test_a_spacing_that_is_none_is_refused(spacing: Any, tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="spacing"):
        PrepSettings(input=tmp_path, output=tmp_path / "c", spacing=spacing)


@pytest.mark.parametrize(("unit", "millimetres"), [("meter", 1000.0), ("micron", 0.001)])
def test_the_unit_of_a_nifti_header_counts(
    unit: str, millimetres: float, tmp_path: Path, rng: np.random.Generator
) -> None:
    array, affine = noise(rng), tilted(0.0)
    save(tmp_path / "mm.nii.gz", array, affine)
    affine[:3] /= millimetres
    image = nib.Nifti1Image(array, affine)
    image.header.set_xyzt_units(unit)
    nib.save(image, tmp_path / "other.nii.gz")
    mine, other = (read_nifti(tmp_path / f"{name}.nii.gz") for name in ("mm", "other"))
    np.testing.assert_allclose(other.affine, mine.affine, rtol=1e-5)
    # What is written on its grid says millimetres, so it lies where the scan does.
    write_nifti(other.array[0], other.native, tmp_path / "again.nii.gz")
    np.testing.assert_allclose(read_nifti(tmp_path / "again.nii.gz").affine, mine.affine, rtol=1e-5)


# Sheared grids.


def tilted(shear: float, spacing: tuple[float, ...] = (1.0, 1.25, 2.0)) -> np.ndarray:
    """RAS axes of which the slices move along each other by `shear` voxels of the second."""
    affine = np.diag([*spacing, 1.0])
    affine[1, 2] = shear * spacing[1]
    affine[:3, 3] = (-7.0, 11.0, 23.0)
    return affine


def at(affine: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Millimetres `[3, ...]` of all voxels."""
    index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"))
    return np.einsum("ij,j...->i...", affine[:3, :3], index) + affine[:3, 3, None, None, None]


def ramp(place: np.ndarray) -> np.ndarray:
    """A linear function of millimetres, which linear interpolation keeps exactly."""
    x, y, z = place
    return 500 + 3 * x - 2 * y + 5 * z


@pytest.mark.parametrize("shear", [0.3, -0.55, 0.77])
@pytest.mark.parametrize("turn", [0.0, 0.4])
@pytest.mark.parametrize("axcodes", ["RAS", "LPI", "SRA", "PIL"])
def test_an_upright_scan_has_each_value_where_it_was(
    shear: float, turn: float, axcodes: str, tmp_path: Path
) -> None:
    c, s = np.cos(turn), np.sin(turn)
    oblique = np.eye(4)
    oblique[:3, :3] = [[1, 0, 0], [0, c, -s], [0, s, c]]
    affine = oblique @ tilted(shear)
    image = nib.Nifti1Image(ramp(at(affine, SHAPE)).astype(np.float32), affine)
    start = nib.io_orientation(tilted(0))
    move = nib.orientations.ornt_transform(start, nib.orientations.axcodes2ornt(tuple(axcodes)))
    nib.save(image.as_reoriented(move), tmp_path / "a.nii.gz")
    with pytest.raises(Reject, match="sheared=resample"):
        read_nifti(tmp_path / "a.nii.gz")

    volume = read_channels([tmp_path / "a.nii.gz"], "MR", upright=True)
    unit = volume.affine[:3, :3] / volume.spacing
    np.testing.assert_allclose(unit.T @ unit, np.eye(3), atol=1e-5)
    native = nib.load(tmp_path / "a.nii.gz")
    inside = np.ones(volume.array.shape[1:], dtype=bool)
    index = np.linalg.solve(native.affine, volume.affine)
    np.testing.assert_allclose(index, volume.native.from_stored, atol=1e-5)
    for axis, places in enumerate(at(index, volume.array.shape[1:])):
        inside &= (places >= 0) & (places <= native.shape[axis] - 1)
    assert inside.sum() > 0.8 * np.prod(SHAPE)
    expected = ramp(at(volume.affine, volume.array.shape[1:]))
    np.testing.assert_allclose(volume.array[0][inside], expected[inside], atol=5e-3)
    # Nothing of the scan is lost beyond the new grid.
    corners = np.array(list(product(*[(0, n - 1) for n in SHAPE], [1]))).T
    corners = np.linalg.solve(volume.affine, affine @ corners)[:3]
    last = np.array(volume.array.shape[1:])[:, None] - 1
    assert corners.min() > -0.01 and (last - corners).min() > -0.01
    with pytest.raises(ValueError, match="resampled"):
        volume.native.to_native(volume.array[0])


@pytest.mark.parametrize("shear", [1, -1, 2])
def test_a_shear_by_whole_voxels_moves_slices_and_changes_none(
    shear: int, tmp_path: Path, rng: np.random.Generator
) -> None:
    """Of spacings that no header holds exactly, so that rounding shows, above all at edges."""
    affine, array = tilted(shear, (1.1, 0.7, 1.9)), noise(rng) + 1
    save(tmp_path / "a.nii.gz", array, affine)
    volume = read_channels([tmp_path / "a.nii.gz"], "MR", upright=True)
    more = abs(shear) * (SHAPE[2] - 1)
    expected = np.full((SHAPE[0], SHAPE[1] + more, SHAPE[2]), array.min())
    for k in range(SHAPE[2]):
        first = shear * k + (more if shear < 0 else 0)
        expected[:, first : first + SHAPE[1], k] = array[:, :, k]
    np.testing.assert_array_equal(volume.array[0], expected.transpose(2, 1, 0)[:, ::-1, ::-1])
    assert volume.array.dtype == np.int16
    assert volume.spacing == pytest.approx((1.9, 0.7, 1.1), rel=1e-5)


def test_outside_a_sheared_scan_is_its_smallest_value_whatever_the_slope(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    image = nib.Nifti1Image(noise(rng), tilted(1))
    image.header.set_slope_inter(-1, 300)
    nib.save(image, tmp_path / "a.nii.gz")
    volume = read_channels([tmp_path / "a.nii.gz"], "MR", upright=True)
    physical = volume.physical()[0]
    assert physical[0, 0, 0] == physical.min() == nib.load(tmp_path / "a.nii.gz").get_fdata().min()


def test_padding_is_air_before_a_sheared_grid_blends_it(tmp_path: Path) -> None:
    array = np.full(SHAPE, 100, np.int16)
    array[:, :6] = -3024
    array[0, 11] = -1024
    save(tmp_path / "a.nii.gz", array, tilted(0.5))
    (values,) = read_channels([tmp_path / "a.nii.gz"], "CT", upright=True).array
    # Half of air and half of tissue: (-1024 + 100) / 2, and nothing of what lies below air.
    assert values.min() == -1024 and np.count_nonzero(values == -462) > SHAPE[0] * 3


def test_axes_that_nearly_coincide_are_not_resampled(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    for shear in (1000.0, 1.7):
        path = save(tmp_path / "a.nii.gz", noise(rng), tilted(shear))
        with pytest.raises(Reject, match=r"sheared.*more than any scanner tilts"):
            read_channels([path], "MR", upright=True)


def test_a_corpus_takes_sheared_scans_if_told_and_labelled_ones_never(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    save(tmp_path / "in" / "a.nii.gz", noise(rng), tilted(0.6))
    save(tmp_path / "in" / "b.nii.gz", noise(rng))
    assert made(tmp_path / "in", tmp_path / "c").keys == ["b"]
    assert refused(tmp_path / "c") == {"a.nii.gz": "sheared"}
    assert made(tmp_path / "in", tmp_path / "d", sheared="resample").keys == ["a", "b"]

    save(tmp_path / "labelled" / "images" / "a.nii.gz", noise(rng), tilted(0.6))
    save(tmp_path / "labelled" / "labels" / "a.nii.gz", np.eye(14, 12)[..., None] * np.ones(10))
    with pytest.raises(InputError, match=r"sheared: a labelled corpus is never resampled"):
        made(tmp_path / "labelled", tmp_path / "e", sheared="resample")
    with pytest.raises(ValidationError, match=r"spacing and sheared: a labelled corpus"):
        made(tmp_path / "in", tmp_path / "f", labels=True, sheared="resample", spacing=1)
    taken = made(tmp_path / "labelled", tmp_path / "g", sheared="resample", labels=False)
    assert taken.keys == ["a"] and not taken.labelled


def test_a_mask_moves_with_its_sheared_scan(tmp_path: Path, rng: np.random.Generator) -> None:
    """What a masked voxel reaches is masked, and so is what lies outside the scan."""
    mask = np.zeros(SHAPE, np.uint8)
    mask[3:6, 4:7, 2:5] = 1
    save(tmp_path / "a.nii.gz", noise(rng), tilted(0.5))
    save(tmp_path / "m.nii.gz", mask, tilted(0.5))
    (tmp_path / "list.csv").write_text("image,mask\na.nii.gz,m.nii.gz\n")
    corpus = made(tmp_path / "list.csv", tmp_path / "c", sheared="resample")
    found = corpus.read(0, "mask")
    found = found.reshape(found.shape[-3:])
    index = np.array(corpus.meta(0)["native"]["from_stored"])
    i, j, k = at(index, found.shape)
    reached = (np.abs(i - 4) < 2) & (np.abs(j - 5) < 2) & (np.abs(k - 3) < 2)
    outside = (j < 0) | (j > SHAPE[1] - 1)
    np.testing.assert_array_equal(found == 1, reached | outside)


@pytest.mark.skipif(not MESSY.exists(), reason="the shared data is not there")
def test_a_real_tilted_gantry_becomes_upright() -> None:
    source = MESSY / "dicom" / "failing" / "gantrytilting"
    (case,) = find_cases(source).cases
    assert case.series is not None
    with pytest.raises(Reject, match="sheared"):
        read_channels([case.series])
    volume = read_channels([case.series], upright=True)
    unit = volume.affine[:3, :3] / volume.spacing
    np.testing.assert_allclose(unit.T @ unit, np.eye(3), atol=1e-4)
    assert volume.modality == ("CT",) and volume.physical().min() >= -1024
    # Its slices are those of the files, each moved within its plane.
    sheared = open_image(case.series)
    raw, slope, intercept = sheared.read()
    slices = np.maximum(raw.reshape(sheared.shape[:3], order="F") * slope + intercept, -1024)
    matrix = volume.native.from_stored
    (depth,) = np.flatnonzero(np.abs(matrix[2, :3]) > 0.5)
    physical = np.moveaxis(volume.physical()[0], depth, 0)
    assert len(physical) == slices.shape[2]
    for n, found in enumerate(physical):
        k = round(float(matrix[2, depth] * n + matrix[2, 3]))
        assert abs(float(found.max() - slices[:, :, k].max())) < 40


# Files of several volumes.


def four(rng: np.random.Generator, count: int = 3) -> np.ndarray:
    return noise(rng, (*SHAPE, count))


def test_volumes_apart_are_scans_of_one_subject(tmp_path: Path, rng: np.random.Generator) -> None:
    array = four(rng)
    save(tmp_path / "in" / "a.nii.gz", array)
    save(tmp_path / "in" / "b.nii.gz", noise(rng))
    corpus = made(tmp_path / "in", tmp_path / "c", volumes="apart")
    keys = inputs(tmp_path / "c")
    assert sorted(keys) == [f"a.nii.gz (volume {n})" for n in (1, 2, 3)] + ["b.nii.gz"]
    for n in range(3):
        volume = corpus.volume(corpus.position(keys[f"a.nii.gz (volume {n + 1})"]))
        np.testing.assert_array_equal(volume.native.to_native(volume.array[0]), array[..., n])
    assert len(set(corpus.subjects)) == 2
    counts = corpus.info["counts"]["files"]
    assert (counts["images"], counts["left_out"], counts["total"]) == (2, 0, 2)


def test_volumes_as_channels_are_one_scan(tmp_path: Path, rng: np.random.Generator) -> None:
    array = four(rng)
    save(tmp_path / "in" / "a.nii.gz", array)
    corpus = made(tmp_path / "in", tmp_path / "c", volumes="channels")
    volume = corpus.volume(0)
    assert len(corpus) == 1 and volume.names == ("0", "1", "2")
    for n in range(3):
        np.testing.assert_array_equal(volume.native.to_native(volume.array[n]), array[..., n])


def test_a_bad_volume_of_a_file_costs_itself_alone(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    """The books count files: one that has samples is no file left out."""
    array = four(rng, 4).astype(np.float32)
    array[..., 1] = 7
    array[0, 0, 0, 2] = np.nan
    save(tmp_path / "in" / "a.nii.gz", array)
    save(tmp_path / "in" / "b.nii.gz", np.zeros((*SHAPE, 2), np.int16))
    corpus = made(tmp_path / "in", tmp_path / "c", volumes="apart")
    assert refused(tmp_path / "c") == {
        "a.nii.gz (volume 2)": "constant",
        "a.nii.gz (volume 3)": "nan_or_inf",
        "b.nii.gz (volume 1)": "constant",
        "b.nii.gz (volume 2)": "constant",
    }
    assert sorted(inputs(tmp_path / "c")) == ["a.nii.gz (volume 1)", "a.nii.gz (volume 4)"]
    counts = corpus.info["counts"]["files"]
    assert (counts["images"], counts["left_out"], counts["total"]) == (1, 1, 2)


def test_names_of_channels_win_over_volumes(tmp_path: Path, rng: np.random.Generator) -> None:
    save(tmp_path / "in" / "a.nii.gz", four(rng, 2))
    for volumes in ("refuse", "channels", "apart"):
        corpus = made(tmp_path / "in", tmp_path / volumes, volumes=volumes, channels=("T1", "T2"))
        assert corpus.volume(0).names == ("T1", "T2")


def test_one_name_is_that_of_every_volume_apart(tmp_path: Path, rng: np.random.Generator) -> None:
    save(tmp_path / "a.nii.gz", four(rng, 2))
    (tmp_path / "list.csv").write_text("image,sequence,subject\na.nii.gz,bold,s7\n")
    corpus = made(tmp_path / "list.csv", tmp_path / "c", volumes="apart")
    assert [corpus.volume(i).names for i in range(2)] == [("bold",)] * 2
    assert set(corpus.subjects) == {"s7"}


def test_volumes_are_refused_unless_told(tmp_path: Path, rng: np.random.Generator) -> None:
    save(tmp_path / "in" / "a.nii.gz", four(rng))
    save(tmp_path / "in" / "b.nii.gz", noise(rng))
    save(tmp_path / "in" / "c.nii.gz", noise(rng)[..., None])
    made(tmp_path / "in", tmp_path / "out")
    assert refused(tmp_path / "out") == {"a.nii.gz": "not_3d"}
    layout = find_cases(tmp_path / "in", volumes="apart")
    assert [case.frame for case in layout.cases] == [0, 1, 2, None, None]


# Cropping.

ORIENTATIONS = ["RAS", "LPS", "SPL", "IAR", "PSR", "ARI"]


def body(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """CT of a body in air, RAS, and a label that reaches out of it at one corner."""
    image = np.full((16, 15, 14), -1000, np.int16)
    image[4:12, 3:11, 5:12] = rng.integers(-100, 300, (8, 8, 7))
    label = np.zeros(image.shape, np.uint8)
    label[5:9, 4:8, 6:10] = 1
    label[13, 8, 2] = 2
    return image, label


def turned(array: np.ndarray, axcodes: str) -> nib.Nifti1Image:
    image = nib.Nifti1Image(array, ras_affine())
    move = nib.orientations.axcodes2ornt(tuple(axcodes))
    return image.as_reoriented(
        nib.orientations.ornt_transform(nib.io_orientation(image.affine), move)
    )


@pytest.mark.parametrize("axcodes", ORIENTATIONS)
def test_a_crop_keeps_every_labelled_voxel_where_it_was(
    axcodes: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    image, label = (turned(array, axcodes) for array in body(rng))
    for name, stored in (("images", image), ("labels", label)):
        (tmp_path / "in" / name).mkdir(parents=True)
        nib.save(stored, tmp_path / "in" / name / "a.nii.gz")
    whole = made(tmp_path / "in", tmp_path / "whole")
    corpus = made(tmp_path / "in", tmp_path / "c", crop="foreground")
    volume, meta = corpus.volume(0), corpus.meta(0)
    # Superior, posterior, left: body 5 to 12, 3 to 11, 4 to 12 of 14, 15, 16 from the other end.
    assert volume.array.shape == (1, 12 - 2, 11 - 3, 14 - 4)
    assert meta["foreground_box"] == [[3, 10], [0, 8], [2, 10]]

    seg = corpus.read(0, "seg")
    seg = seg.reshape(seg.shape[-3:])
    native = NativeGrid.from_dict(meta["native"])
    np.testing.assert_array_equal(native.to_native(seg), np.asanyarray(label.dataobj))
    back = native.to_native(volume.array[0])
    kept = native.to_native(np.ones_like(seg)) == 1
    np.testing.assert_array_equal(back[kept], np.asanyarray(image.dataobj)[kept])
    assert (back[~kept] == 0).all() and kept.sum() == seg.size
    for index in [(0, 0, 0), (9, 7, 9), (2, 5, 3)]:
        stored = native.from_stored @ [*index, 1]
        np.testing.assert_allclose(volume.affine @ [*index, 1], image.affine @ stored, atol=1e-4)

    # The scan is the same, and so are its numbers and classes.
    before = whole.meta(0)
    for name in ("fingerprint", "channels", "class_counts"):
        assert meta[name] == before[name]
    for value, places in meta["class_voxels"].items():
        assert all(seg[tuple(place)] == int(value) for place in places)
    # The foreground is where it was.
    moved = np.array(meta["foreground_box"])[:, 0] - np.array(before["foreground_box"])[:, 0]
    shift = np.linalg.solve(volume.affine, np.array(before["affine"]))[:3, 3]
    np.testing.assert_allclose(moved, shift, atol=1e-4)


def test_labels_of_the_whole_scan_fit_a_cropped_one(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    """Predictions are written on the grid of the file, and read back for scores."""
    image, label = body(rng)
    save(tmp_path / "in" / "images" / "a.nii.gz", image)
    save(tmp_path / "in" / "labels" / "a.nii.gz", label)
    corpus = made(tmp_path / "in", tmp_path / "c", crop="foreground")
    volume, seg = corpus.volume(0), corpus.read(0, "seg")
    seg = seg.reshape(seg.shape[-3:])
    write_nifti(seg, volume.native, tmp_path / "p.nii.gz")
    for path in (tmp_path / "p.nii.gz", tmp_path / "in" / "labels" / "a.nii.gz"):
        np.testing.assert_array_equal(read_label(path, volume), seg)
        check_label_grid(path, seg.shape, volume.affine, volume.native)
    off = ras_affine()
    off[0, 3] += 1
    wrong = save(tmp_path / "w.nii.gz", label, off)
    with pytest.raises(Reject, match="label_geometry_mismatch"):
        read_label(wrong, volume)
    with pytest.raises(Reject, match="label_geometry_mismatch"):
        check_label_grid(wrong, seg.shape, volume.affine, volume.native)


def test_a_crop_of_a_resampled_scan_has_its_voxels_in_place(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    save(tmp_path / "in" / "a.nii.gz", body(rng)[0])
    whole = made(tmp_path / "in", tmp_path / "w", spacing=1.0).volume(0)
    part = made(tmp_path / "in", tmp_path / "c", spacing=1.0, crop="foreground").volume(0)
    d, h, w = np.rint(np.linalg.solve(whole.affine, part.affine)[:3, 3]).astype(int)
    inside = whole.array[:, d:, h:, w:][:, : part.array.shape[1], : part.array.shape[2]]
    assert part.array.size < whole.array.size
    np.testing.assert_array_equal(part.array, inside[..., : part.array.shape[3]])
    with pytest.raises(ValueError, match="resampled"):
        part.native.to_native(part.array[0])


def test_a_crop_is_normalised_as_its_whole_scan_is(tmp_path: Path, samples: Path) -> None:
    """As crops for training are; by its own numbers air that was cut off would move every voxel."""
    scan = samples / "ixi" / "IXI013-HH-1212_T1.nii.gz"
    (tmp_path / "in").mkdir()
    shutil.copy(scan, tmp_path / "in")
    corpus = made(tmp_path / "in", tmp_path / "c", crop="foreground")
    part, whole = corpus.volume(0), read_nifti(scan)
    d, h, w = np.rint(np.linalg.solve(whole.affine, part.affine)[:3, 3]).astype(int)
    assert part.array.size < whole.array.size
    for rule in ("zscore", "percentile"):
        preprocess = Preprocess.default(intensity={"MR": {"rule": rule}})
        shape = part.array.shape
        inside = preprocess.apply(whole).array[:, d:, h:, w:][:, : shape[1], : shape[2]]
        np.testing.assert_array_equal(preprocess.apply(part).array, inside[..., : shape[3]])
        assert corpus.meta(0)["channels"][0]["statistics"] != volume_statistics(part)[0]


# Empty labels.


def test_an_empty_label_is_refused_unless_kept(tmp_path: Path, rng: np.random.Generator) -> None:
    for name, label in (("a", rng.integers(0, 2, SHAPE)), ("b", np.zeros(SHAPE))):
        save(tmp_path / "in" / "images" / f"{name}.nii.gz", noise(rng))
        save(tmp_path / "in" / "labels" / f"{name}.nii.gz", label.astype(np.uint8))
    assert made(tmp_path / "in", tmp_path / "c").keys == ["a"]
    assert refused(tmp_path / "c")["images/b.nii.gz"] == "empty_label"
    kept = made(tmp_path / "in", tmp_path / "d", empty_labels="keep", crop="foreground")
    assert kept.keys == ["a", "b"] and not kept.read(1, "seg").any()


# What no scan has.


def plain(spacing: tuple[float, float, float], shape: tuple[int, ...] = (4, 5, 6)) -> Any:
    values = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    return volume_from_array(values, spacing, "MR")


@pytest.mark.parametrize(
    ("spacing", "shape", "code"),
    [
        ((SPACING_MM[0] * 0.98, 1, 1), (4, 5, 6), "implausible_spacing"),
        ((1, 1, SPACING_MM[1] * 1.02), (4, 5, 6), "implausible_spacing"),
        ((1e-3, 1e-3, 3e-3), (64, 64, 64), "implausible_spacing"),
        ((EXTENT_MM[0] / 4 * 0.98, 1, 1), (4, 5, 6), "implausible_extent"),
        ((1, EXTENT_MM[1] / 100 * 1.02, 1), (4, 100, 6), "implausible_extent"),
        ((SPACING_MM[0] * 1.02, 1, 1), (64, 5, 6), None),
        ((SPACING_MM[1] * 0.98, 1, 1), (4, 5, 6), None),
        ((EXTENT_MM[0] / 4 * 1.02, 1, 1), (4, 5, 6), None),
        ((1, EXTENT_MM[1] / 100 * 0.98, 1), (4, 100, 6), None),
        # A single slice is as thin as it is.
        ((0.5, 1, 1), (1, 8, 8), None),
    ],
)
def test_grids_of_no_scan_are_refused(
    spacing: tuple[float, float, float], shape: tuple[int, ...], code: str | None
) -> None:
    if code is None:
        check_plausible(plain(spacing, shape))
        return
    with pytest.raises(Reject) as caught:
        check_plausible(plain(spacing, shape))
    assert caught.value.code == code and "mm" in caught.value.detail


def check_all_values(volume: Volume) -> None:
    coded = encode(volume)
    check_values(coded, [histogram(channel) for channel in coded.array])


def is_judged_as_ct(path: Path, plausible: bool) -> None:
    """Values of MR may be any; those said to be CT are refused unless plausible."""
    check_all_values(read_nifti(path, "MR"))
    volume = read_nifti(path, "CT")
    if plausible:
        check_all_values(volume)
    else:
        with pytest.raises(Reject, match=r"implausible_values.*modality=MR"):
            check_all_values(volume)


@pytest.mark.parametrize(
    ("low", "high", "plausible"),
    [
        (-1000, 1000, True), (-1, 1000, True), (-1000, -499, True),
        (0, 1000, False), (24, 3000, False), (-3000, -500, False), (-1000, -600, False),
    ],
)  # fmt: skip
def test_values_of_no_ct_are_refused_by_what_they_mean(
    low: int, high: int, plausible: bool, tmp_path: Path
) -> None:
    """By HU, whatever the stored integers are; of MR nothing is known."""
    values = np.linspace(low, high, 600).round().astype(np.int16).reshape(10, 6, 10)
    for slope, intercept in ((1, 0), (1, -1024), (-1, 300)):
        image = nib.Nifti1Image(((values - intercept) // slope).astype(np.int16), ras_affine())
        image.header.set_slope_inter(slope, intercept)
        nib.save(image, tmp_path / "a.nii.gz")
        is_judged_as_ct(tmp_path / "a.nii.gz", plausible)


@pytest.mark.parametrize(
    ("low", "high", "strange", "plausible"),
    [
        (-900, 1500, {}, True),
        # Metal on an extended scale, and padding that some scanners write.
        (-900, 1500, {30_000: 8, -2000: 2000}, True),
        (-900, 1500, {9_000: 80}, False),
        # An intercept is missing, which padding hides; a skull that was taken away hides nothing.
        (100, 2500, {-2000: 2000}, False), (100, 2500, {-3024: 1}, False),
        (100, 2500, {-1500: 3000, -100: 2}, False),
        (1, 90, {-1024: 5000}, True),
    ],
)  # fmt: skip
def test_values_of_ct_are_judged_without_padding_and_by_shares(
    low: int, high: int, strange: dict[int, int], plausible: bool, tmp_path: Path, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    values = rng.integers(low, high, 8000).astype(np.int16)
    first = 0
    for value, count in strange.items():
        values[first : first + count] = value
        first += count
    save(tmp_path / "a.nii.gz", values.reshape(20, 20, 20))
    is_judged_as_ct(tmp_path / "a.nii.gz", plausible)


def test_label_maps_of_many_classes_are_known_by_their_values(tmp_path: Path, seed: int) -> None:
    """And scans of few values are not taken for them: of 8 bits, windowed, with slices doubled."""
    rng = np.random.default_rng(seed)
    centres = rng.uniform(0, 40, (60, 3))
    places = np.stack(np.meshgrid(*[np.arange(40)] * 3, indexing="ij"), axis=-1)
    classes = rng.permutation(900)[:60] + 1
    parcels = classes[cKDTree(centres).query(places)[1]]
    parcels[np.linalg.norm(places - 20, axis=-1) > 18] = 0
    smooth = ndimage.gaussian_filter(rng.normal(size=(40, 40, 40)), 3)
    smooth = (smooth - smooth.min()) / np.ptp(smooth) * 250
    grainy = smooth + rng.normal(0, 4, smooth.shape)
    window = np.clip((grainy - 125) * 30 + 128, 0, 255)
    scans = (smooth, grainy, window, grainy[::2].repeat(2, axis=0))
    for array in scans:
        save(tmp_path / "a.nii.gz", array.round().astype(np.int16))
        check_all_values(read_nifti(tmp_path / "a.nii.gz", "MR"))
    for kind in (np.int16, np.float32):
        save(tmp_path / "a.nii.gz", parcels.astype(kind))
        with pytest.raises(Reject, match=r"looks_like_a_label: it holds \d\d values, and \d\d%"):
            check_all_values(read_nifti(tmp_path / "a.nii.gz", "MR"))


def test_a_sample_says_that_its_modality_was_guessed(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    save(tmp_path / "in" / "x.nii.gz", noise(rng))
    save(tmp_path / "in" / "t1" / "y.nii.gz", noise(rng))
    corpus = made(tmp_path / "in", tmp_path / "c")
    said = {key: corpus.meta(i).get("modality_guessed", False) for i, key in enumerate(corpus.keys)}
    assert said == {"x": True, "y": False}


def test_implausible_scans_are_in_the_books(tmp_path: Path, rng: np.random.Generator) -> None:
    metres = np.diag([0.001, 0.001, 0.002, 1])
    save(tmp_path / "in" / "metres.nii.gz", noise(rng), metres)
    save(tmp_path / "in" / "long.nii.gz", noise(rng), np.diag([1, 1, 49, 1]) * 1.0)
    save(tmp_path / "in" / "wide.nii.gz", noise(rng, (4, 4, 64)), np.diag([1, 1, 49, 1.0]))
    save(tmp_path / "in" / "ct" / "window.nii.gz", noise(rng))
    corpus = made(tmp_path / "in", tmp_path / "c")
    assert corpus.keys == ["long"]
    assert refused(tmp_path / "c") == {
        "metres.nii.gz": "implausible_spacing",
        "wide.nii.gz": "implausible_extent",
        "ct/window.nii.gz": "implausible_values",
    }


# Links and folders.


def linked(tmp_path: Path, make: Callable[[Path], None]) -> list[str]:
    """Names found below tmp_path/in after `make` has changed it."""
    root = tmp_path / "in"
    for name in ("a/x.txt", "a/b/y.txt", "z.txt"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    make(root)
    return [path.relative_to(root).as_posix() for path in files_below(root)]


PLAIN = ["a/b/y.txt", "a/x.txt", "z.txt"]


def test_links_to_folders_and_files_elsewhere_are_followed(tmp_path: Path) -> None:
    (tmp_path / "other" / "deep").mkdir(parents=True)
    (tmp_path / "other" / "deep" / "w.txt").write_text("w")

    def make(root: Path) -> None:
        (root / "far").symlink_to(tmp_path / "other")
        (root / "w.txt").symlink_to(tmp_path / "other" / "deep" / "w.txt")
        (root / ".hidden").symlink_to(tmp_path / "other")

    assert linked(tmp_path, make) == sorted([*PLAIN, "far/deep/w.txt", "w.txt"])


@pytest.mark.parametrize(
    ("link", "target"), [("a/b/up", "in/a"), ("a/top", "in"), ("here", "in"), ("out", "beside")]
)
def test_a_link_to_a_folder_that_holds_it_is_not_followed(
    link: str, target: str, tmp_path: Path
) -> None:
    """Nor one that comes back by way of a folder elsewhere."""
    (tmp_path / "beside").mkdir()
    (tmp_path / "beside" / "back").symlink_to(tmp_path / "in")
    found = linked(tmp_path, lambda root: (root / link).symlink_to(tmp_path / target))
    assert found == PLAIN


def test_a_link_to_itself_is_a_name_without_a_file(tmp_path: Path) -> None:
    found = linked(tmp_path, lambda root: (root / "self").symlink_to(root / "self"))
    assert found == sorted([*PLAIN, "self"])


def test_folders_linked_to_each_other_are_seen_once(tmp_path: Path) -> None:
    def make(root: Path) -> None:
        for one, other in product(range(7), repeat=2):
            (root / f"d{one}").mkdir(exist_ok=True)
            (root / f"d{one}" / "f.txt").write_text("f")
            if one != other:
                (root / f"d{one}" / f"l{other}").symlink_to(root / f"d{other}")
        (root / "aa").symlink_to(root / "d0")  # as short: its own name counts
        (root / "short").symlink_to(root / "a" / "b")

    expected = ["a/x.txt", *(f"d{n}/f.txt" for n in range(7)), "short/y.txt", "z.txt"]
    assert linked(tmp_path, make) == expected


def test_the_input_itself_may_be_a_link(tmp_path: Path) -> None:
    linked(tmp_path, lambda root: (root / "a" / "loop").symlink_to(root))
    (tmp_path / "link").symlink_to(tmp_path / "in")
    found = files_below(tmp_path / "link")
    assert [path.relative_to(tmp_path / "link").as_posix() for path in found] == PLAIN


def test_pipes_are_no_files(tmp_path: Path) -> None:
    assert linked(tmp_path, lambda root: os.mkfifo(root / "p.nii.gz")) == PLAIN


def test_a_link_to_nothing_is_a_missing_file(tmp_path: Path, rng: np.random.Generator) -> None:
    save(tmp_path / "in" / "a.nii.gz", noise(rng))
    save(tmp_path / "store" / "b.nii.gz", noise(rng))
    (tmp_path / "in" / "b.nii.gz").symlink_to(tmp_path / "store" / "b.nii.gz")
    for name in ("x.nii.gz", "y.mha", "IM0001"):
        (tmp_path / "in" / name).symlink_to(tmp_path / "gone" / name)
    corpus = made(tmp_path / "in", tmp_path / "c", volumes="apart")
    assert corpus.keys == ["a", "b"]
    assert refused(tmp_path / "c") == {
        "x.nii.gz": "missing_file",
        "y.mha": "missing_file",
        "IM0001": "not_an_image",
    }


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every folder")
@pytest.mark.parametrize("mode", [0o000, 0o400, 0o100])
def test_all_folders_that_cannot_be_read_are_named(mode: int, tmp_path: Path) -> None:
    closed = [tmp_path / "in" / "a" / "b", tmp_path / "in" / "c"]
    for folder in closed:
        folder.mkdir(parents=True)
        (folder / "x.nii.gz").write_bytes(b"")
        (folder / "d").mkdir()
    try:
        for folder in closed:
            folder.chmod(mode)
        with pytest.raises(InputError) as caught:
            files_below(tmp_path / "in")
    finally:
        for folder in closed:
            folder.chmod(0o700)
    assert sorted(p.split(":")[0] for p in caught.value.problems) == [str(f) for f in closed]
