"""Awkward real files, row by row of the README beside them: what each became, and why."""

from __future__ import annotations

import csv
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK

from data_prep.build import prep
from data_prep.corpus import Corpus
from data_prep.settings import PrepSettings

MESSY = Path(__file__).parents[3] / "shared" / "data" / "messy"
pytestmark = pytest.mark.skipif(not MESSY.exists(), reason="the shared data is not there")

OUTCOMES = {
    # Two volumes, or more: which of them is meant, or that they are channels, has to be said.
    "nifti_4d/nibabel_example4d.nii.gz": "not_3d",
    "nifti_4d/nibabel_example_nifti2.nii.gz": "not_3d",
    "nifti_4d/nibabel_functional.nii": "not_3d",
    "nifti_4d/sct_dmri.nii.gz": "not_3d",
    "nifti_4d/sct_venc.nii.gz": "not_3d",
    "nifti_4d/dcm_qa_nih_EPI_PE=AP_3.nii": "not_3d",
    # Byte order, signs, slopes and oblique axes are no reason to leave a scan out.
    "nifti_odd/nibabel_anatomical.nii": "MR",
    "nifti_odd/nibabel_reoriented_anat_moved.nii": "MR",
    "nifti_odd/nibabel_someones_anatomy.nii.gz": "MR",
    "nifti_odd/nibabel_someones_epi.nii.gz": "MR",
    "nifti_odd/sct_mt1.nii.gz": "MR",
    "nifti_odd/niivue_shear.nii.gz": "sheared",
    "nifti_odd/niivue_ct_perfusion_rgb.nii.gz": "rgb_or_complex",
    "nifti_odd/niivue_complex.nii.gz": "rgb_or_complex",
    # By where its slices lie; no header says so.
    "dicom/failing/gantrytilting/001": "sheared",
    "dicom/failing/slicecount/001": "too_few_slices",
    "dicom/failing/sliceorientation/001": "mixed_orientation",
    "dicom/generic/rgb/001": "rgb_or_complex",
    "dicom/generic/compressed_rle/001": "MR",
    "dicom/generic/anatomical/002_non_isotropic": "MR",
    "dicom/ge/anatomical/001_single_slice": "too_few_slices",
    "dicom/hitachi/anatomical/001": "MR",
    "dicom/prostatex_missing_slice": "missing_slices",
    "dicom/hcrop_dicom/Study1": "MR",
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("messy") / "c"
    settings = PrepSettings(input=MESSY, output=output, keys="names", processes=1)
    result = prep(settings, say=lambda line: None)
    assert not any("books" in note for note in result.notes)
    return output


def outcomes(corpus: Path) -> dict[str, str]:
    """Of each input file: the code under which it was left out, or the modality of its sample."""
    private = corpus.with_name(f"{corpus.name}.private")
    found = {}
    with (private / "quarantine.csv").open() as file:
        found = {row["input"]: row["code"] for row in csv.DictReader(file)}
    opened = Corpus.open(corpus)
    with (private / "keymap.csv").open() as file:
        for row in csv.DictReader(file):
            found[row["input"]] = opened.modalities[opened.position(row["key"])]
    return found


def test_each_row_of_the_readme_has_its_outcome(made: Path) -> None:
    found = outcomes(made)
    for name, expected in OUTCOMES.items():
        mine = {code for file, code in found.items() if file == name or file.startswith(f"{name}/")}
        assert expected in mine and mine <= {expected, "image_left_out"}, name
    assert all(any(f == n or f.startswith(f"{n}/") for n in OUTCOMES) for f in found)


def test_the_books_add_up(made: Path) -> None:
    counts = Corpus.open(made).info["counts"]["files"]
    assert counts["total"] == sum(path.is_file() for path in MESSY.rglob("*"))
    assert counts["images"] + counts["left_out"] + counts["ignored"] == counts["total"]


def test_series_are_the_volumes_that_gdcm_reads(made: Path) -> None:
    """Of names that sort wrongly, oblique axes, pixels that are no squares, compressed ones."""
    corpus = Corpus.open(made)
    private = made.with_name(f"{made.name}.private")
    with (private / "keymap.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["input"].endswith(".dcm")]
    assert len(rows) == 4
    for row in rows:
        folder = str((MESSY / row["input"]).parent)
        names = SimpleITK.ImageSeriesReader.GetGDCMSeriesFileNames(folder)
        image = SimpleITK.ReadImage(names)
        volume = corpus.volume(corpus.position(row["key"]))
        native = volume.native.to_native(volume.physical()[0])
        theirs = SimpleITK.GetArrayFromImage(image).T
        forth = np.abs(native - theirs).max() <= max(volume.slope)
        assert forth or np.abs(native[..., ::-1] - theirs).max() <= max(volume.slope), row["input"]
        index = (3, 5, 0 if forth else theirs.shape[2] - 1, 1)
        place = np.array(image.TransformIndexToPhysicalPoint((3, 5, 0))) * (-1, -1, 1)
        np.testing.assert_allclose((volume.native.affine @ index)[:3], place, atol=0.02)


def test_values_are_those_that_nibabel_reads(made: Path) -> None:
    corpus = Corpus.open(made)
    for i, key in enumerate(corpus.keys):
        if "nibabel" not in key:
            continue
        (path,) = [p for p in MESSY.rglob("*.nii*") if key in p.name.lower().replace("-", "_")
                   or p.name.lower().split(".")[0] in key.replace("-", "_")]  # fmt: skip
        image = nib.load(path)
        expected = np.asarray(image.dataobj, dtype=np.float64)
        volume = corpus.volume(i)
        native = volume.native.to_native(volume.physical()[0])
        step = max(volume.slope)
        np.testing.assert_allclose(native, expected, atol=step)
