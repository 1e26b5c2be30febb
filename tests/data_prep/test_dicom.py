"""DICOM series: the right volume whatever files are called, or the reason why there is none."""

from __future__ import annotations

import csv
import errno
import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK
from dicom_series import changed, write_frames, write_series, written_raw
from phantoms import everything, oriented, ras_array
from pydicom import Dataset, dcmread
from pydicom.uid import DeflatedExplicitVRLittleEndian

from data_prep import dicom
from data_prep.build import prep
from data_prep.corpus import Corpus
from data_prep.dicom import Found, find_series, is_dicom
from data_prep.errors import InputError, without_names
from data_prep.generations import append, remove
from data_prep.images import Reject, SeriesFiles
from data_prep.layouts.find import find_cases
from data_prep.settings import PrepSettings, RemoveSettings
from data_prep.volume import read_channels, read_nifti

OBLIQUE = np.array(
    [[0.74, -0.3, 0.6, -31.0], [0.25, 0.68, 1.2, 12.0], [-0.12, 0.2, 2.4, 60.0], [0, 0, 0, 1]]
)


def square(affine: np.ndarray) -> np.ndarray:
    """The same spacings with axes at right angles."""
    made = affine.copy()
    axes, _ = np.linalg.qr(affine[:3, :3])
    axes *= np.sign(np.diag(axes.T @ affine[:3, :3]))
    made[:3, :3] = axes * np.linalg.norm(affine[:3, :3], axis=0)
    return made


def volumes(folder: Path) -> list[SeriesFiles]:
    found = find_series([path for path in sorted(folder.rglob("*")) if path.is_file()])
    return [volume for one in found for volume in one.volumes]


def only(folder: Path) -> Found:
    (found,) = find_series([path for path in sorted(folder.rglob("*")) if path.is_file()])
    return found


@pytest.mark.parametrize("axcodes", ["RAS", "LPS", "LPI", "SRA", "PIR", "ALS"])
def test_a_series_is_the_nifti_that_it_was_made_of(axcodes: str, tmp_path: Path, seed: int) -> None:
    """In any orientation, under names that say nothing, in folders that say nothing either."""
    image = oriented(axcodes)
    nib.save(image, tmp_path / "x.nii.gz")
    expected = read_nifti(tmp_path / "x.nii.gz", "MR")
    rng = np.random.default_rng(seed)
    count = image.shape[2]
    names = [f"{n:x}" for n in rng.permutation(10_000)[:count]]
    files = write_series(
        tmp_path / "d", np.asarray(image.dataobj), image.affine, modality="MR", names=names
    )
    for number, path in enumerate(files):
        (tmp_path / "d" / str(number % 3)).mkdir(exist_ok=True)
        path.rename(tmp_path / "d" / str(number % 3) / path.name)
    (volume,) = volumes(tmp_path / "d")
    found = read_channels([volume])
    np.testing.assert_array_equal(found.array, expected.array)
    np.testing.assert_allclose(found.affine, expected.affine, atol=1e-6)
    assert found.modality == ("MR",)


def test_an_oblique_series_keeps_its_angles(tmp_path: Path) -> None:
    affine = square(OBLIQUE)
    write_series(tmp_path, ras_array(), affine, scales=[(1.0, -1024.0)] * 11)
    (volume,) = volumes(tmp_path)
    found = read_channels([volume])
    assert (found.slope, found.intercept, found.modality) == ((1.0,), (-1024.0,), ("CT",))
    np.testing.assert_allclose(found.native.affine, affine, atol=1e-6)
    native = found.native.to_native(found.array[0])
    np.testing.assert_array_equal(native, ras_array())


def test_slopes_that_differ_by_slice_are_applied(tmp_path: Path) -> None:
    scales = [(0.5 + k, 10.0 * k) for k in range(11)]
    write_series(tmp_path, ras_array(), square(OBLIQUE), modality="MR", scales=scales)
    (volume,) = volumes(tmp_path)
    found = read_channels([volume])
    expected = ras_array() * np.array([a for a, _ in scales]) + np.array([b for _, b in scales])
    np.testing.assert_allclose(found.native.to_native(found.physical()[0]), expected, rtol=1e-6)


def test_frames_of_one_file_are_slices(tmp_path: Path, seed: int) -> None:
    order = np.random.default_rng(seed).permutation(11)
    affine = square(OBLIQUE)
    write_frames(tmp_path / "x", ras_array(), affine, list(order))
    (volume,) = volumes(tmp_path)
    found = read_channels([volume])
    np.testing.assert_array_equal(found.native.to_native(found.array[0]), ras_array())
    np.testing.assert_allclose(found.native.affine, affine, atol=1e-6)
    assert (found.slope, found.intercept) == ((2.0,), (-100.0,))


@pytest.mark.parametrize("alike", [True, False])
def test_packed_frames_with_slopes_of_their_own_are_refused(
    alike: bool, tmp_path: Path, seed: int
) -> None:
    """They would be read with the first one's; plain ones are scaled one by one."""
    path = write_frames(tmp_path / "x", ras_array(), square(OBLIQUE), range(11))
    kept = dcmread(path)
    for k, frame in enumerate(kept.PerFrameFunctionalGroupsSequence):
        value = Dataset()
        value.RescaleSlope, value.RescaleIntercept = f"{1 if alike else 1 + k / 2}", "0"
        frame.PixelValueTransformationSequence = [value]
    del kept.SharedFunctionalGroupsSequence[0].PixelValueTransformationSequence
    kept.save_as(path)
    (plain,) = volumes(tmp_path)
    expected = read_channels([plain]).physical()
    writer = SimpleITK.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    writer.UseCompressionOn()
    writer.SetCompressor("JPEG2000")
    writer.SetFileName(str(tmp_path / "y.dcm"))
    writer.Execute(SimpleITK.GetImageFromArray(kept.pixel_array.astype(np.uint16)))
    packed = dcmread(tmp_path / "y.dcm")
    kept.file_meta.TransferSyntaxUID = packed.file_meta.TransferSyntaxUID
    kept.PixelData, kept.PixelRepresentation = packed.PixelData, 0
    kept["PixelData"].is_undefined_length = True
    (tmp_path / "packed").mkdir()
    kept.save_as(tmp_path / "packed" / "x")
    (one,) = volumes(tmp_path / "packed")
    if alike:
        np.testing.assert_array_equal(read_channels([one]).physical(), expected)
        return
    with pytest.raises(Reject, match="compressed, with 11 slopes") as error:
        read_channels([one])
    assert error.value.code == "unreadable"


def test_frames_that_do_not_say_where_they_lie_are_refused(tmp_path: Path) -> None:
    path = write_frames(tmp_path / "x", ras_array(), square(OBLIQUE), range(11))
    changed(path, {"PerFrameFunctionalGroupsSequence": None})
    refusal = only(tmp_path).refusal
    assert refusal is not None and refusal.code == "bad_geometry"


def compressed(files: list[Path], folder: Path, compressor: str) -> None:
    """The same slices in another folder, with their pixels packed."""
    folder.mkdir()
    for path in files:
        writer = SimpleITK.ImageFileWriter()
        writer.KeepOriginalImageUIDOn()
        writer.UseCompressionOn()
        writer.SetCompressor(compressor)
        writer.SetFileName(str(folder / path.name))
        # Unscaled: SimpleITK's image has slope and intercept applied.
        kept = dcmread(path)
        pixels = SimpleITK.GetImageFromArray(kept.pixel_array[None].astype(np.uint16))
        writer.Execute(pixels)
        # Of what it has written the pixels alone: the header is the plain file's.
        packed = dcmread(folder / path.name)
        assert packed.file_meta.TransferSyntaxUID.is_compressed
        kept.file_meta.TransferSyntaxUID = packed.file_meta.TransferSyntaxUID
        kept.PixelData, kept.PixelRepresentation = packed.PixelData, 0
        kept["PixelData"].is_undefined_length = True
        kept.save_as(folder / path.name)


@pytest.mark.parametrize("compressor", ["JPEG2000", "JPEGLS", "JPEG"])
def test_compressed_slices_are_those_that_were_not(compressor: str, tmp_path: Path) -> None:
    plain = write_series(tmp_path / "a", ras_array(), square(OBLIQUE), modality="MR")
    compressed(plain, tmp_path / "b", compressor)
    (one,), (other,) = volumes(tmp_path / "a"), volumes(tmp_path / "b")
    found, expected = read_channels([other]), read_channels([one])
    np.testing.assert_array_equal(found.physical(), expected.physical())
    np.testing.assert_allclose(found.affine, expected.affine, atol=1e-4)


@pytest.mark.parametrize("varying", [0.0, 0.5])
def test_a_series_may_be_packed_in_part(varying: float, tmp_path: Path, seed: int) -> None:
    """Of a packed slice slope and intercept are applied already, of its neighbour they are not."""
    scales = [(1.0 + varying * k, -1024.0) for k in range(11)]
    plain = write_series(tmp_path / "a", ras_array(), square(OBLIQUE), scales=scales)
    packed = np.random.default_rng(seed).permutation(plain)[: len(plain) // 2]
    compressed(list(packed), tmp_path / "b", "JPEG2000")
    for path in set(plain) - set(packed):
        shutil.copy(path, tmp_path / "b")
    (one,), (other,) = volumes(tmp_path / "a"), volumes(tmp_path / "b")
    found, expected = read_channels([other]), read_channels([one])
    np.testing.assert_array_equal(found.physical(), expected.physical())


def test_echoes_of_one_series_are_volumes_of_their_own(tmp_path: Path) -> None:
    affine = square(OBLIQUE)
    for number, echo in enumerate(("12.5", "4.5")):
        names = [f"{number}-{k}" for k in range(11)]
        write_series(
            tmp_path, ras_array() + 7 * number, affine, modality="MR", names=names,
            SeriesInstanceUID="1.2.3.4", EchoTime=echo, AcquisitionNumber="1",
        )  # fmt: skip
    found = volumes(tmp_path)
    assert len(found) == 2
    lowest = [read_channels([volume]).array.min() for volume in found]
    assert sorted(lowest) == [0, 7]


def _tilted() -> np.ndarray:
    affine = square(OBLIQUE)
    affine[:3, 2] += 0.3 * affine[:3, 1]
    return affine


@pytest.mark.parametrize("said, thick", [(4.5, 4.5), (None, 1.0), (0, 1.0)])
@pytest.mark.parametrize("frames", [False, True])
def test_a_single_slice_is_as_thick_as_it_says(
    said: float | None, thick: float, frames: bool, tmp_path: Path
) -> None:
    affine, array = square(OBLIQUE), np.arange(42).reshape(6, 7, 1)
    fields = {} if said is None else {"SliceThickness": said}
    if frames:
        write_frames(tmp_path / "one.dcm", array, affine, [0], **fields)
    else:
        write_series(tmp_path, array, affine, modality="MR", **fields)
    spacing = nib.affines.voxel_sizes(read_channels(volumes(tmp_path), minimum=1).affine)
    expected = [thick, *nib.affines.voxel_sizes(affine)[:2]]
    np.testing.assert_allclose(sorted(spacing), sorted(expected), rtol=1e-6)


def _one_moved(files: list[Path]) -> None:
    changed(files[4], {"ImagePositionPatient": [0.0, 0.0, 400.0]})


def _one_turned(files: list[Path]) -> None:
    changed(files[0], {"ImageOrientationPatient": [1, 0, 0, 0, 0, -1]})


def _one_larger(files: list[Path]) -> None:
    changed(files[3], {"Rows": 4, "Columns": 4, "PixelData": b"\0" * 32})


def _one_wide(files: list[Path]) -> None:
    changed(files[3], {"PixelSpacing": [2.0, 2.0]})


def _cut(files: list[Path]) -> None:
    files[5].write_bytes(files[5].read_bytes()[:-40])


def _pet(files: list[Path]) -> None:
    for path in files:
        changed(path, {"Modality": "PT"})


def _placeless(files: list[Path]) -> None:
    changed(files[2], {"ImagePositionPatient": None})


def _repeated(files: list[Path]) -> None:
    """Another picture in the place of one that is there."""
    (files[0].parent / "again").write_bytes(files[0].read_bytes())
    pixels = dcmread(files[3]).PixelData
    changed(files[0].parent / "again", {"PixelData": pixels, "SOPInstanceUID": "1.2.3.4.5"})


def _no_slope(files: list[Path]) -> None:
    changed(files[4], {"RescaleSlope": "0", "RescaleIntercept": "5"})


@pytest.mark.parametrize(
    ("spoil", "code"),
    [
        (_one_moved, "missing_slices"), (_one_turned, "mixed_orientation"),
        (_one_larger, "mixed_series"), (_one_wide, "mixed_series"), (_cut, "truncated"),
        (_pet, "unsupported_modality"), (_placeless, "bad_geometry"),
        (_repeated, "repeated_slices"), (_no_slope, "nan_or_inf"),
    ],
    ids=lambda value: value.__name__ if callable(value) else value,
)  # fmt: skip
def test_what_makes_no_volume_is_refused_by_code(
    spoil: Callable[[list[Path]], Any], code: str, tmp_path: Path
) -> None:
    files = write_series(tmp_path / "d", ras_array(), square(OBLIQUE))
    spoil(files)
    with pytest.raises(Reject) as refusal:
        found = only(tmp_path / "d")
        if found.refusal is not None:
            raise found.refusal
        read_channels(found.volumes)
    assert refusal.value.code == code
    assert str(tmp_path) not in refusal.value.detail


@pytest.mark.parametrize(
    ("name", "value", "code"),
    [
        ("RescaleSlope", b"1,0", "unreadable"), ("RescaleSlope", b"1\\2", "unreadable"),
        ("RescaleIntercept", b"abc", "unreadable"), ("RescaleSlope", b"nan", "nan_or_inf"),
        ("SamplesPerPixel", b"", "unreadable"), ("Rows", b"", "unreadable"),
        ("Columns", b"", "unreadable"), ("NumberOfFrames", b"abc", "unreadable"),
        ("NumberOfFrames", b"-3", "unreadable"), ("NumberOfFrames", b"99999999999", "truncated"),
        ("PixelSpacing", b"0,5\\0,5", "bad_geometry"), ("Modality", b"CT", "unreadable"),
        ("ImagePositionPatient", b"1\\2\\x", "bad_geometry"),
    ],
)  # fmt: skip
def test_a_broken_field_costs_its_series_and_nothing_else(
    name: str, value: bytes, code: str, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    """It is told by its name alone, with the file that has it; whatever pydicom makes of it."""
    files = write_series(tmp_path / "bad", ras_array(), square(OBLIQUE))
    write_series(tmp_path / "good", ras_array(), square(OBLIQUE))
    written_raw(files[4], name, value, "ZZ" if name == "Modality" else "")
    bad, good = find_series(sorted(tmp_path.glob("*/*")))
    assert len(good.volumes) == 1 and len(bad.files) == 11
    assert bad.refusal is not None and bad.refusal.code == code
    assert bad.refusal.detail.startswith("5.dcm: ")
    assert not value or value.decode() not in bad.refusal.detail
    assert not recwarn.list


def test_warnings_do_not_print_what_headers_hold(
    tmp_path: Path, recwarn: pytest.WarningsRecorder, caplog: pytest.LogCaptureFixture
) -> None:
    for path in write_series(tmp_path, ras_array(), square(OBLIQUE), SeriesInstanceUID="1.2.9"):
        for name in ("SeriesInstanceUID", "SOPInstanceUID", "PatientID", "AcquisitionNumber"):
            written_raw(path, name, b"Zzmueller^Hans \xff")
    recwarn.clear()
    caplog.clear()
    (found,) = find_series(sorted(tmp_path.iterdir()))
    assert found.refusal is None or "ueller" not in found.refusal.detail
    assert not recwarn.list and not caplog.records


def test_patients_stay_apart_whatever_numbers_series_have(tmp_path: Path) -> None:
    """Their slices adjoin, so nothing but the patient, or the folder, tells them apart."""
    for number, patient in enumerate(("A", "B")):
        affine = square(OBLIQUE)
        affine[:3, 3] += 11 * number * affine[:3, 2]
        same = {"SeriesInstanceUID": "1.2.9", "StudyInstanceUID": "1.2.8"}
        write_series(tmp_path / "same" / patient, ras_array(), affine, PatientID=patient, **same)
        for path in write_series(tmp_path / "none" / patient, ras_array(), affine, PatientID=""):
            changed(path, {"SeriesInstanceUID": None, "StudyInstanceUID": None})
    for kind in ("same", "none"):
        assert [len(volume.files) for volume in volumes(tmp_path / kind)] == [11, 11]


def test_a_list_that_names_series_keeps_their_patients(tmp_path: Path) -> None:
    """Two visits of one person are of one subject, also where the list does not say so."""
    for number, patient in enumerate(("4711", "4711", "4712")):
        write_series(
            tmp_path / f"v{number}", ras_array() + number, square(OBLIQUE), PatientID=patient
        )
    (tmp_path / "list.csv").write_text("image,subject\nv0,\nv1,\nv2,\n")
    layout = find_cases(tmp_path / "list.csv")
    one, other, third = (case.subject for case in layout.cases)
    assert one == other != third and layout.patients == {one, third}
    (tmp_path / "list.csv").write_text("image,subject\nv0,ours\nv1,ours\n")
    layout = find_cases(tmp_path / "list.csv")
    assert [case.subject for case in layout.cases] == ["ours", "ours"] and not layout.patients


def test_of_equal_slices_one_counts(tmp_path: Path) -> None:
    """A series that was saved twice, and a file that was copied, are a scan and its copies."""
    files = write_series(tmp_path / "a", ras_array(), square(OBLIQUE))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    shutil.copy(files[3], tmp_path / "a" / "copy")
    changed(tmp_path / "a" / "copy", {"SeriesDescription": "saved anew"})
    found = find_series([path for path in sorted(tmp_path.rglob("*")) if path.is_file()])
    (series,) = (one for one in found if one.refusal is None)
    assert len(series.volumes) == 1 and series.files == tuple(sorted(files))
    copies = {one.files: one.refusal for one in found if one.refusal is not None}
    assert len(copies) == 12
    assert {refusal.code for refusal in copies.values()} == {"duplicate"}
    refusal = copies[tmp_path / "b" / "7.dcm",]
    assert refusal.detail == "the same slice as a/7.dcm"


@pytest.mark.parametrize("bomb", [False, True])
def test_deflated_files_unpack_to_no_more_than_a_limit(
    bomb: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Below it they are what they were."""
    monkeypatch.setattr("data_prep.dicom.TIGHT_BYTES", 2**22)
    plain = write_series(tmp_path / "plain", ras_array(), square(OBLIQUE))
    (tmp_path / "packed").mkdir()
    for path in plain:
        made = dcmread(path)
        made.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
        if bomb:
            block = made.private_block(0x0019, "mine", create=True)
            block.add_new(1, "OB", bytes(2**23))
        made.save_as(tmp_path / "packed" / path.name)
    found = find_series(sorted((tmp_path / "packed").iterdir()))
    if bomb:
        assert {one.refusal and one.refusal.code for one in found} == {"too_large"}
        return
    one, other = read_channels(found[0].volumes), read_channels(volumes(tmp_path / "plain"))
    np.testing.assert_array_equal(one.array, other.array)


def test_slices_beside_the_others_are_no_grid(tmp_path: Path, seed: int) -> None:
    """Some are moved within their planes, of an upright stack or of one of a tilted gantry."""
    rng = np.random.default_rng(seed)
    for name, affine in (("upright", square(OBLIQUE)), ("tilted", _tilted())):
        files = write_series(tmp_path / name, ras_array(), affine)
        assert len(volumes(tmp_path / name)) == 1
        first, last = sorted(rng.choice(range(1, 11), 2, replace=False))
        for path in files[first:last]:
            across = np.array(dcmread(path).ImageOrientationPatient).reshape(2, 3)
            aside = rng.uniform(0.5, 30) * across[int(rng.integers(2))]
            place = np.array(dcmread(path).ImagePositionPatient) + aside
            changed(path, {"ImagePositionPatient": list(place.round(6))})
        refusal = only(tmp_path / name).refusal
        assert refusal is not None and refusal.code == "uneven_slices"
        assert "slices lie beside the line" in refusal.detail


def test_gaps_and_tilts_are_found_by_place(tmp_path: Path) -> None:
    write_series(tmp_path / "gap", ras_array(), square(OBLIQUE), skip=[3, 4])
    refusal = only(tmp_path / "gap").refusal
    assert refusal is not None and refusal.code == "missing_slices"
    assert "about 2 of 11" in refusal.detail
    # A series that ends early has no gap: nothing tells it from a short one.
    write_series(tmp_path / "short", ras_array(), square(OBLIQUE), skip=[9, 10])
    assert len(volumes(tmp_path / "short")) == 1
    write_series(tmp_path / "tilt", ras_array(), _tilted())
    with pytest.raises(Reject, match="sheared"):
        read_channels(volumes(tmp_path / "tilt"))


@pytest.mark.parametrize("moment", ["_dataset", "is_dicom"])
def test_a_series_is_not_taken_without_a_file_that_cannot_be_read_now(
    moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without its last slice it would be a shorter one, and nobody would know."""
    files = write_series(tmp_path / "in", ras_array(), square(OBLIQUE))
    module = "data_prep.layouts.piles" if moment == "is_dicom" else "data_prep.dicom"
    reads = getattr(dicom, moment)

    def fails(path: Path, *args: Any, **options: Any) -> Any:
        if path == files[-1]:
            monkeypatch.setattr(Path, "open", stale)
        try:
            return reads(path, *args, **options)
        finally:
            monkeypatch.setattr(Path, "open", opens)

    def stale(path: Path, *args: Any, **options: Any) -> Any:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))

    opens = Path.open
    monkeypatch.setattr(f"{module}.{moment}", fails)
    with pytest.raises(InputError, match="Stale file handle") as caught:
        find_cases(tmp_path / "in")
    (problem,) = caught.value.problems
    assert str(files[-1]) in problem and files[-1].name not in without_names(problem)
    monkeypatch.undo()
    assert len(find_cases(tmp_path / "in").cases[0].files) == len(files)


def test_files_are_dicom_by_what_they_hold(tmp_path: Path) -> None:
    (named,) = write_series(tmp_path, ras_array()[:, :, :1], square(OBLIQUE), names=["x.txt"])
    assert is_dicom(named)
    (tmp_path / "y.dat").write_bytes(b"no" * 200)
    assert not is_dicom(tmp_path / "y.dat")
    (tmp_path / "z.dcm").write_bytes(b"no" * 200)
    (found,) = find_series([tmp_path / "z.dcm"])
    assert found.refusal is not None and found.refusal.code in ("not_an_image", "unreadable")


def test_a_folder_of_series_becomes_a_corpus_and_keeps_no_word_of_its_headers(
    tmp_path: Path,
) -> None:
    """Two scans of one patient are of one subject; its number, name and dates are nowhere."""
    words = {
        "PatientName": "Musterfrau^Erika", "PatientBirthDate": "19640812",
        "InstitutionName": "Charlottenhospital", "StudyDescription": "Verdacht auf Zebra",
        "SeriesDescription": "Giraffenscan", "AccessionNumber": "A55512345",
        "PatientID": "ID77889900", "OperatorsName": "Bediener^Otto", "DeviceSerialNumber": "SN4711",
        "StudyDate": "20190307", "ReferringPhysicianName": "Hausarzt^Hanna",
    }  # fmt: skip
    for number in range(2):
        array = ras_array() + np.random.default_rng(number).integers(0, 90, ras_array().shape)
        array -= 1024  # to HU
        write_series(tmp_path / "in" / str(number), array, square(OBLIQUE), **words)
    settings = PrepSettings(input=tmp_path / "in", output=tmp_path / "c", processes=1)
    prep(settings, say=lambda line: None)
    corpus = Corpus.open(tmp_path / "c")
    assert len(corpus) == 2 and len(set(corpus.subjects)) == 1
    kept = everything(tmp_path / "c") + everything(tmp_path / "c.private")
    for text in words.values():
        for word in text.replace("^", " ").split():
            assert word.lower().encode() not in kept, word
    counts = corpus.info["counts"]["files"]
    assert counts["images"] == counts["total"] == 22


def series(folder: Path, patient: str, seed: int) -> None:
    noise = np.random.default_rng(seed).integers(0, 90, ras_array().shape)
    write_series(folder, ras_array() + noise - 1024, square(OBLIQUE), PatientID=patient)


def subjects(output: Path) -> dict[str, str]:
    """Subject by folder of the input."""
    with (output.with_name("c.private") / "keymap.csv").open() as file:
        return {row["input"].split("/")[0]: row["subject"] for row in csv.DictReader(file)}


def test_a_number_of_a_patient_is_not_found_by_counting_where_names_are_kept(
    tmp_path: Path,
) -> None:
    """And the patient is one subject: of several series, and of what is added later."""
    numbers = {"a": "4711", "b": "4711", "c": "815"}
    for seed, (name, number) in enumerate(numbers.items()):
        series(tmp_path / "in" / name, number, seed)
    output = tmp_path / "c"
    more = {"processes": 1, "keys": "names"}
    prep(PrepSettings(input=tmp_path / "in", output=output, **more), say=lambda line: None)
    first = subjects(output)
    assert first["a"] == first["b"] != first["c"]
    for seed, (name, number) in enumerate({"d": "4711", "e": "99"}.items(), start=7):
        series(tmp_path / "later" / name, number, seed)
    adding = PrepSettings(input=tmp_path / "later", output=output, append=True, **more)
    append(adding, say=lambda line: None)
    found = subjects(output)
    assert found["d"] == found["a"] and found["e"] not in first.values()
    assert set(Corpus.open(output).subjects) == set(found.values())
    kept = everything(output)
    counted = [hashlib.sha256(str(n).encode()).hexdigest()[:16].encode() for n in range(10_000)]
    assert not [digest for digest in counted if digest in kept]
    # Without its secret nothing can be added: the same patients would be others.
    (tmp_path / "c.private" / "salt").unlink()
    with pytest.raises(InputError, match="salt: missing"):
        append(adding, say=lambda line: None)


def test_patients_of_a_corpus_of_before_stay_who_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    series(tmp_path / "in" / "a", "4711", 0)
    output, more = tmp_path / "c", {"processes": 1, "keys": "names"}
    with monkeypatch.context() as before:
        before.setattr("data_prep.naming.salted_patient", lambda salt, digest: digest)
        prep(PrepSettings(input=tmp_path / "in", output=output, **more), say=lambda line: None)
    (tmp_path / "c.private" / "salt").unlink()
    for seed, (name, number) in enumerate({"b": "4711", "c": "815"}.items(), start=3):
        series(tmp_path / "later" / name, number, seed)
    adding = PrepSettings(input=tmp_path / "later", output=output, append=True, **more)
    append(adding, say=lambda line: None)
    found = subjects(output)
    assert found["b"] == found["a"] == hashlib.sha256(b"4711").hexdigest()[:16]
    assert found["c"].startswith("patient-")
    remove(RemoveSettings(output=output, remove=found["c"]), say=lambda line: None)
    assert set(Corpus.open(output).subjects) == {found["a"]}
