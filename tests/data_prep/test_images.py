"""NRRD and MetaImage files: the volume that the same NIfTI gives, or why there is none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK
from phantoms import oriented, ras_array

from data_prep.build import prep
from data_prep.corpus import Corpus
from data_prep.images import Reject
from data_prep.settings import PrepSettings
from data_prep.volume import read_label, read_nifti

FORMATS = ("nrrd", "nhdr", "mha", "mhd")
SHARED = Path(__file__).parents[3] / "shared" / "data"
shared = pytest.mark.skipif(not SHARED.exists(), reason="the shared data is not there")


def written(image: nib.Nifti1Image, path: Path, packed: bool = False) -> Path:
    """A NIfTI image as another format, by ITK's own writers and with its own reading of axes."""
    nib.save(image, path.with_name("source.nii.gz"))
    theirs = SimpleITK.ReadImage(str(path.with_name("source.nii.gz")))
    SimpleITK.WriteImage(theirs, str(path), useCompression=packed)
    return path


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("axcodes", ["RAS", "LPS", "SPL", "IAR", "PSR"])
def test_a_file_gives_what_nifti_gives(
    form: str, packed: bool, axcodes: str, tmp_path: Path
) -> None:
    path = written(oriented(axcodes), tmp_path / f"x.{form}", packed)
    found, expected = read_nifti(path), read_nifti(tmp_path / "source.nii.gz")
    np.testing.assert_array_equal(found.array, expected.array)
    np.testing.assert_allclose(found.affine, expected.affine, atol=1e-5)
    assert found.native.shape == expected.native.shape
    label = read_label(path, expected)
    np.testing.assert_array_equal(label, expected.array[0])


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _elsewhere(path: Path) -> None:
    text = path.read_text().replace("x.raw", "../secret.raw")
    (path.parent.parent / "secret.raw").write_bytes(b"\1" * 5000)
    path.write_text(text)


def _linked(path: Path) -> None:
    (path.parent.parent / "secret.raw").write_bytes((path.parent / "x.raw").read_bytes())
    (path.parent / "x.raw").unlink()
    (path.parent / "x.raw").symlink_to(path.parent.parent / "secret.raw")


def _gone(path: Path) -> None:
    (path.parent / "x.raw").unlink()


def _absurd(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"DimSize = 7 9 11", b"DimSize = 70000 90000 11000"))


def _text(path: Path) -> None:
    path.write_text("a letter\n" * 30)


@pytest.mark.parametrize(
    ("form", "spoil", "codes"),
    [
        ("mha", _cut, {"truncated"}), ("nrrd", _cut, {"truncated"}),
        ("mhd", _elsewhere, {"unreadable"}), ("nhdr", _elsewhere, {"unreadable"}),
        ("mhd", _linked, {"missing_file"}), ("mhd", _gone, {"missing_file"}),
        ("nhdr", _gone, {"missing_file"}), ("mha", _absurd, {"truncated"}),
        ("nrrd", _text, {"not_an_image"}), ("mha", _text, {"not_an_image"}),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_refused_by_code(
    form: str, spoil: Callable[[Path], None], codes: set[str], tmp_path: Path
) -> None:
    (tmp_path / "d").mkdir()
    path = written(oriented("RAS"), tmp_path / "d" / f"x.{form}")
    spoil(path)
    with pytest.raises(Reject) as refusal:
        read_nifti(path)
    assert refusal.value.code in codes
    assert str(tmp_path) not in refusal.value.detail


def test_colours_and_more_axes_are_refused(tmp_path: Path) -> None:
    colours = SimpleITK.GetImageFromArray(np.zeros((6, 7, 8, 3), np.uint8), isVector=True)
    SimpleITK.WriteImage(colours, str(tmp_path / "x.nrrd"))
    with pytest.raises(Reject, match="rgb_or_complex"):
        read_nifti(tmp_path / "x.nrrd")
    series = SimpleITK.GetImageFromArray(np.zeros((2, 6, 7, 8), np.int16), isVector=False)
    SimpleITK.WriteImage(series, str(tmp_path / "y.nrrd"))
    with pytest.raises(Reject, match="not_3d"):
        read_nifti(tmp_path / "y.nrrd")
    flat = SimpleITK.GetImageFromArray(np.arange(56, dtype=np.int16).reshape(7, 8))
    SimpleITK.WriteImage(flat, str(tmp_path / "z.mha"))
    with pytest.raises(Reject, match="not_3d"):
        read_nifti(tmp_path / "z.mha")


def test_a_folder_of_all_formats_becomes_a_corpus(tmp_path: Path) -> None:
    """Files of voxels beside their headers are part of an image, and no strangers."""
    (tmp_path / "in").mkdir()
    for number, form in enumerate(FORMATS):
        image = oriented("RAS")
        array = np.random.default_rng(number).integers(0, 900, ras_array().shape)
        image = nib.Nifti1Image(array.astype(np.int16), image.affine)
        written(image, tmp_path / "in" / f"scan{number}.{form}")
        (tmp_path / "in" / "source.nii.gz").unlink()
    settings = PrepSettings(
        input=tmp_path / "in", output=tmp_path / "c", keys="names", processes=1, modality="MR"
    )
    prep(settings, say=lambda line: None)
    corpus = Corpus.open(tmp_path / "c")
    assert corpus.keys == ["scan0", "scan1", "scan2", "scan3"]
    counts = corpus.info["counts"]["files"]
    assert counts["images"] == 4 and counts["left_out"] == 0 and counts["total"] == 6


@shared
def test_real_files_are_what_itk_reads() -> None:
    files = [*(SHARED / "elastix_lung").glob("*.mha"), *(SHARED / "pyradiomics").glob("*.nrrd")]
    assert len(files) >= 8
    for path in files:
        image = SimpleITK.ReadImage(str(path))
        try:
            volume = read_nifti(path)
        except Reject as error:
            assert error.code == "constant" and np.ptp(SimpleITK.GetArrayFromImage(image)) == 0
            continue
        native = volume.native.to_native(volume.physical()[0])
        theirs = SimpleITK.GetArrayFromImage(image).T
        if volume.modality == ("CT",):
            theirs = np.maximum(theirs, -1024)  # padding
        np.testing.assert_allclose(native, theirs, atol=1e-3)
        index = (3, 5, 2)
        place = np.array(image.TransformIndexToPhysicalPoint(index)) * (-1, -1, 1)
        np.testing.assert_allclose((volume.native.affine @ (*index, 1))[:3], place, atol=1e-3)
