from __future__ import annotations

import gzip
from itertools import pairwise, permutations, product
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from phantoms import (
    ORIGIN_RAS,
    SHAPE_RAS,
    SPACING_RAS,
    oriented,
    ras_affine,
    ras_array,
    save,
    save_compressed_text,
    save_text,
    save_truncated,
)

from data_prep.images import Reject
from data_prep.volume import (
    NativeGrid,
    Volume,
    read_channels,
    read_known,
    read_label,
    read_nifti,
    volume_from_array,
    write_nifti,
)

ORIENTATIONS = [
    "".join(signs[axis] for axis in order)
    for order in permutations(range(3))
    for signs in product("RL", "AP", "SI")
]


def test_there_are_48_orientations() -> None:
    assert len(set(ORIENTATIONS)) == 48


@pytest.mark.parametrize("axcodes", ORIENTATIONS)
def test_phantom_lands_on_superior_posterior_left(axcodes: str, tmp_path: Path) -> None:
    path = tmp_path / "p.nii"
    nib.save(oriented(axcodes), path)
    volume = read_nifti(path)

    array = volume.array[0]
    x, y, z = SHAPE_RAS
    assert array.shape == (z, y, x)
    assert volume.spacing == pytest.approx(tuple(reversed(SPACING_RAS)))
    assert nib.aff2axcodes(volume.affine) == ("S", "P", "L")
    # D to superior raises z, H to posterior lowers y, W to the left lowers x.
    expected = ras_array().transpose(2, 1, 0)[:, ::-1, ::-1]
    np.testing.assert_array_equal(array, expected)
    # Every voxel is where it was in the world.
    at = volume.affine @ [3, 4, 5, 1]
    native = [SHAPE_RAS[0] - 1 - 5, SHAPE_RAS[1] - 1 - 4, 3]
    np.testing.assert_allclose(at[:3], np.array(ORIGIN_RAS) + np.array(SPACING_RAS) * native)


@pytest.mark.parametrize("axcodes", ORIENTATIONS)
def test_native_round_trip_is_exact(axcodes: str, tmp_path: Path) -> None:
    image = oriented(axcodes)
    image.set_sform(image.affine, code=2)
    nib.save(image, tmp_path / "p.nii.gz")
    volume = read_nifti(tmp_path / "p.nii.gz")
    assert volume.native.axcodes == axcodes

    native = NativeGrid.from_dict(volume.native.to_dict())
    write_nifti(volume.array[0], native, tmp_path / "back.nii.gz")
    back = nib.load(tmp_path / "back.nii.gz")
    np.testing.assert_array_equal(np.asanyarray(back.dataobj), np.asanyarray(image.dataobj))
    np.testing.assert_array_equal(back.affine, image.affine)
    assert (back.header["sform_code"], back.header["qform_code"]) == (2, 0)


def test_oblique_scans_keep_their_angles(tmp_path: Path) -> None:
    c, s = np.cos(0.3), np.sin(0.3)
    affine = ras_affine()
    affine[:3, :3] = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ affine[:3, :3]
    save(tmp_path / "o.nii.gz", ras_array(), affine)
    volume = read_nifti(tmp_path / "o.nii.gz")
    assert volume.spacing == pytest.approx(tuple(reversed(SPACING_RAS)), rel=1e-6)
    stored = np.asanyarray(nib.load(tmp_path / "o.nii.gz").dataobj)
    for index in [(0, 0, 0), (10, 8, 6), (2, 3, 4)]:
        i, j, k = (volume.native.from_stored @ [*index, 1])[:3].astype(int)
        assert volume.array[0][index] == stored[i, j, k]
        np.testing.assert_allclose(
            volume.affine @ [*index, 1], volume.native.affine @ [i, j, k, 1], atol=1e-9
        )


def test_resampled_grid_has_no_exact_native_array() -> None:
    grid = NativeGrid((4, 4, 4), np.eye(4), "RAS", 1, 1, np.diag([2.0, 1, 1, 1]))
    with pytest.raises(ValueError, match="resampled"):
        grid.to_native(np.zeros((4, 4, 4)))


def test_to_native_refuses_another_shape(tmp_path: Path) -> None:
    save(tmp_path / "p.nii", ras_array())
    volume = read_nifti(tmp_path / "p.nii")
    with pytest.raises(ValueError, match="canonical grid has"):
        volume.native.to_native(np.zeros((3, 3, 3)))


def test_integers_keep_their_codes_slope_and_intercept(tmp_path: Path) -> None:
    image = nib.Nifti1Image(ras_array("uint8"), ras_affine())
    image.header.set_slope_inter(0.352, 6.68)
    nib.save(image, tmp_path / "s.nii.gz")
    stored = nib.load(tmp_path / "s.nii.gz")
    volume = read_nifti(tmp_path / "s.nii.gz")
    assert volume.array.dtype == np.uint8
    np.testing.assert_allclose(
        volume.native.to_native(volume.physical()[0]), stored.get_fdata(), rtol=1e-6
    )


def test_big_endian_files_read_as_native_integers(tmp_path: Path) -> None:
    header = nib.Nifti1Header(endianness=">")
    header.set_data_dtype(">i2")
    nib.save(nib.Nifti1Image(ras_array(), ras_affine(), header), tmp_path / "b.nii")
    volume = read_nifti(tmp_path / "b.nii")
    assert volume.array.dtype == np.dtype("int16")
    assert volume.array.max() == ras_array().max()


@pytest.mark.parametrize(("low", "modality"), [(-1000, "CT"), (0, "MR"), (-200, "MR")])
def test_modality_is_guessed_from_air(low: int, modality: str, tmp_path: Path) -> None:
    save(tmp_path / "m.nii.gz", (ras_array() + low).astype(np.int16))
    assert read_nifti(tmp_path / "m.nii.gz").modality == (modality,)


def test_an_array_is_read_as_its_file(tmp_path: Path, seed: int) -> None:
    """Padding of CT counts in statistics and blends into tissue: it is air in both."""
    hu = np.random.default_rng(seed).normal(0, 300, (9, 8, 7)).astype(np.float32)
    hu[:2], hu[2:4] = -3024, -1000
    image = nib.Nifti1Image(hu, np.diag([-1.0, -1.0, 1.0, 1.0]))
    nib.save(image, tmp_path / "x.nii.gz")
    read = read_nifti(tmp_path / "x.nii.gz", "CT")
    given = volume_from_array(hu.transpose(2, 1, 0)[::-1], (1, 1, 1), "CT")
    assert sorted(given.array.ravel()) == sorted(read.physical().ravel())
    assert given.array.min() == -1024
    assert volume_from_array(hu, (1, 1, 1), "MR").array.min() == -3024


def test_channels_of_a_network_of_one_modality_are_read_as_it_was_trained(tmp_path: Path) -> None:
    """Maps of perfusion are no CT by their values, and prep called all channels of that set so."""
    ct = np.full((8, 8, 8), 40.0, np.float32)
    ct[:4], ct[0] = -1000, -2000
    perfusion = np.abs(ct) / 20
    for n, values in enumerate((ct, perfusion, ct + 1)):
        save(tmp_path / f"{n}.nii.gz", values)
    files = [tmp_path / f"{n}.nii.gz" for n in range(3)]
    assert read_channels(files).modality == ("CT", "MR", "CT")
    found = read_known(files, ["CT"])
    assert found.modality == ("CT",) * 3
    assert (found.array == read_channels(files, "CT").array).all()
    # Of a network of MR a channel of phases may look like CT, and its values stay what they are.
    phase = read_known([files[1], files[0]], ["MR"])
    assert phase.modality == ("MR", "MR") and phase.physical()[1].min() == -2000
    with pytest.raises(Reject, match="those of CT"):
        read_known([files[0], files[2]], ["MR"])
    assert read_known([files[1]], ["CT", "MR"], "CT").modality == ("CT",)


@pytest.mark.parametrize("padding", [-1027, -2000, -3024])
@pytest.mark.parametrize(
    ("dtype", "slope", "intercept"),
    [
        ("int16", 1, 0),
        ("uint16", 1, -4096),
        ("int16", 2, -3000),
        ("int16", -1, 100),
        ("int16", 0.3, 11),
        ("float32", 1, 0),
        ("float64", -2.5, 7),
        ("int32", 1, -1024),
    ],
)
def test_padding_of_ct_is_air(
    padding: int, dtype: str, slope: float, intercept: float, tmp_path: Path
) -> None:
    """All below -1024 HU is -1024, to half a stored step, and nothing else changes."""
    hu = np.linspace(-1030, 1500, np.prod(SHAPE_RAS)).reshape(SHAPE_RAS)
    hu[:2] = padding
    stored = (hu - intercept) / slope
    image = nib.Nifti1Image(
        (stored if dtype.startswith("float") else np.rint(stored)).astype(dtype), ras_affine()
    )
    image.header.set_slope_inter(slope, intercept)
    nib.save(image, tmp_path / "p.nii")
    was = nib.load(tmp_path / "p.nii").get_fdata()
    found = read_nifti(tmp_path / "p.nii", "CT")
    back = found.native.to_native(found.physical()[0])
    assert -1024 <= back.min() < -1024 + abs(slope)
    air = was < -1024
    assert air.sum() >= 2 * SHAPE_RAS[1] * SHAPE_RAS[2] and np.ptp(back[air]) == 0
    np.testing.assert_allclose(back[~air], was[~air], rtol=1e-6, atol=1e-3)
    kept = read_nifti(tmp_path / "p.nii", "MR")
    np.testing.assert_allclose(kept.native.to_native(kept.physical()[0]), was, rtol=1e-6, atol=1e-3)


@pytest.mark.parametrize(("slope", "intercept"), [(0.1, -10000), (-0.1, -10000), (1, -9000)])
def test_values_that_are_all_below_air_stay(slope: float, intercept: float, tmp_path: Path) -> None:
    """They are no CT, and one value for all would hide that."""
    image = nib.Nifti1Image(ras_array(), ras_affine())
    image.header.set_slope_inter(slope, intercept)
    nib.save(image, tmp_path / "p.nii")
    np.testing.assert_array_equal(
        read_nifti(tmp_path / "p.nii", "CT").array, read_nifti(tmp_path / "p.nii", "MR").array
    )


def _with_nan() -> np.ndarray:
    array = ras_array("float32")
    array[1, 2, 3] = np.nan
    return array


def _sheared() -> np.ndarray:
    affine = ras_affine()
    affine[1, 2] = 0.6
    return affine


def test_bad_files_are_rejected_by_code(tmp_path: Path) -> None:
    array = ras_array()
    rgb = np.zeros(SHAPE_RAS, dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    lying = save(tmp_path / "lie.nii", array)
    lying.write_bytes(lying.read_bytes()[:500])
    cases = {
        "not_an_image": [
            save_text(tmp_path / "t.nii"),
            save_text(tmp_path / "t.nii.gz"),
            save_compressed_text(tmp_path / "z.nii.gz"),
        ],
        "unreadable": [tmp_path / "absent.nii.gz"],
        "truncated": [
            save_truncated(tmp_path / "h.nii.gz", np.tile(array, (4, 4, 4)) % 251 * 7),
            lying,
        ],
        "nan_or_inf": [save(tmp_path / "n.nii.gz", _with_nan())],
        "not_3d": [
            save(tmp_path / "4.nii.gz", np.stack([array, array], -1)),
            save(tmp_path / "2.nii.gz", array[..., 0]),
        ],
        "rgb_or_complex": [
            save(tmp_path / "r.nii.gz", rgb),
            save(tmp_path / "c.nii.gz", array.astype(np.complex64)),
        ],
        "sheared": [save(tmp_path / "s.nii.gz", array, _sheared())],
        "constant": [save(tmp_path / "k.nii.gz", np.full(SHAPE_RAS, 3, np.int16))],
        "too_few_slices": [save(tmp_path / "f.nii.gz", array[:, :, :3])],
    }
    for code, paths in cases.items():
        for path in paths:
            with pytest.raises(Reject) as caught:
                read_nifti(path)
            assert caught.value.code == code, (path.name, caught.value)
            assert str(tmp_path) not in caught.value.detail


@pytest.mark.parametrize("between", [0, 512, 300_000])
def test_a_file_of_several_streams_is_read_whole(between: int, tmp_path: Path, seed: int) -> None:
    """As bgzip and pigz write them; zeros may lie between and behind."""
    rng = np.random.default_rng(seed)
    array = rng.integers(-900, 900, (60, 50, 40)).astype(np.int16)
    whole = save(tmp_path / "whole.nii.gz", array)
    plain = gzip.decompress(whole.read_bytes())
    cuts = [0, *sorted(rng.integers(400, len(plain), 2)), len(plain)]
    streams = [gzip.compress(plain[a:b]) for a, b in pairwise(cuts)]
    parts = tmp_path / "parts.nii.gz"
    parts.write_bytes(b"".join(stream + bytes(between) for stream in streams))
    np.testing.assert_array_equal(read_nifti(parts, "MR").array, read_nifti(whole, "MR").array)

    last = bytearray(streams[-1])
    last[-6] ^= 1  # of its sum
    for spoilt, code in ((last, "unreadable"), (streams[-1][:-9], "truncated")):
        parts.write_bytes(b"".join(streams[:-1]) + spoilt)
        with pytest.raises(Reject, match=f"^{code}:"):
            read_nifti(parts, "MR")
    parts.write_bytes(whole.read_bytes() + b"no stream")
    with pytest.raises(Reject, match=r"^unreadable: the compression is damaged"):
        read_nifti(parts, "MR")


def test_other_modalities_are_rejected(tmp_path: Path) -> None:
    path = save(tmp_path / "p.nii.gz", ras_array())
    with pytest.raises(Reject, match="unsupported_modality"):
        read_nifti(path, modality="PET")


def test_a_trailing_axis_of_one_is_no_fourth_dimension(tmp_path: Path) -> None:
    path = save(tmp_path / "p.nii.gz", ras_array()[..., None])
    assert read_nifti(path).array.shape == (1, 11, 9, 7)


def test_label_of_another_orientation_fits_its_image(tmp_path: Path) -> None:
    nib.save(oriented("RAS"), tmp_path / "i.nii.gz")
    nib.save(oriented("PIR", "uint16"), tmp_path / "l.nii.gz")
    volume = read_nifti(tmp_path / "i.nii.gz")
    label = read_label(tmp_path / "l.nii.gz", volume)
    assert label.dtype == np.uint16
    np.testing.assert_array_equal(label, volume.array[0])


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ("shape", "label_geometry_mismatch"),
        ("origin", "label_geometry_mismatch"),
        ("fraction", "label_values"),
        ("negative", "label_values"),
    ],
)
def test_wrong_labels_are_rejected(change: str, code: str, tmp_path: Path) -> None:
    volume = read_nifti(save(tmp_path / "i.nii.gz", ras_array()))
    label, affine = (ras_array() % 3).astype(np.float32), ras_affine()
    if change == "shape":
        label = label[:-1]
    elif change == "origin":
        affine[0, 3] += 0.5
    elif change == "fraction":
        label[0, 0, 0] = 0.5
    else:
        label[0, 0, 0] = -1
    with pytest.raises(Reject) as caught:
        read_label(save(tmp_path / "l.nii.gz", label, affine), volume)
    assert caught.value.code == code


def test_float_labels_of_whole_numbers_are_fine(tmp_path: Path) -> None:
    volume = read_nifti(save(tmp_path / "i.nii.gz", ras_array()))
    label = read_label(save(tmp_path / "l.nii.gz", (ras_array() % 3).astype(np.float64)), volume)
    assert label.dtype == np.uint8
    np.testing.assert_array_equal(label, volume.array[0] % 3)


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    volume = read_nifti(save(tmp_path / "in" / "i.nii.gz", ras_array()))
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(ValueError, match="canonical"):
        write_nifti(np.zeros((2, 2, 2), np.uint8), volume.native, out / "p.nii.gz")
    assert list(out.iterdir()) == []


def test_a_volume_needs_numbers_for_each_channel() -> None:
    native = NativeGrid((4, 4, 4), np.eye(4), "SPL", 0, 1, np.eye(4))
    with pytest.raises(ValueError, match="each channel"):
        Volume(np.zeros((2, 4, 4, 4)), np.eye(4), ("MR",), ("a",), native)


def test_real_samples_round_trip(samples: Path, tmp_path: Path) -> None:
    for name in ("ixi", "totalsegmentator", "fnndsc"):
        for path in sorted((samples / name).glob("*.nii.gz"))[:1]:
            volume = read_nifti(path)
            stored = np.asanyarray(nib.load(path).dataobj.get_unscaled())
            if volume.modality == ("CT",):
                stored = np.maximum(stored, -1024)  # padding
            np.testing.assert_array_equal(volume.native.to_native(volume.array[0]), stored)
