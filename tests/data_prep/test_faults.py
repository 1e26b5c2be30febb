"""Faults of every kind planted among good scans: each ends as a row under its own code."""

from __future__ import annotations

import csv
import gzip
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK
from dicom_series import write_series, written_raw
from phantoms import SHAPE_RAS, ras_affine, save
from scipy import ndimage

from data_prep.build import prep
from data_prep.check import check
from data_prep.corpus import Corpus
from data_prep.preprocess import as_physical, resample
from data_prep.settings import PrepSettings
from data_prep.volume import read_nifti

SAMPLES = Path(__file__).parents[2] / "samples" / "ixi"
Rng = np.random.Generator
Plant = Callable[[Path, Rng], None]


def noise(rng: Rng, shape: tuple[int, ...] = SHAPE_RAS, low: int = 0) -> np.ndarray:
    return rng.integers(low, low + 900, shape).astype(np.int16)


def damaged(folder: Path, rng: Rng) -> None:
    """A byte of the compressed stream is another."""
    path = save(folder / "damaged.nii.gz", noise(rng, (30, 30, 30)))
    data = bytearray(path.read_bytes())
    for _ in range(3):
        data[int(rng.integers(len(data) // 2, len(data) - 20))] ^= int(rng.integers(1, 256))
    path.write_bytes(data)


def cut(folder: Path, rng: Rng) -> None:
    path = save(folder / "cut.nii.gz", noise(rng))
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * rng.uniform(0.3, 0.9))])


def claims(folder: Path, rng: Rng) -> None:
    """A few bytes that would unpack to terabytes, says the header."""
    image = nib.Nifti1Image(noise(rng), ras_affine())
    data = bytearray(image.to_bytes())
    struct.pack_into("<4h", data, 40, 3, 30000, 30000, 30000)
    (folder / "claims.nii.gz").write_bytes(gzip.compress(bytes(data)))


def text(folder: Path, rng: Rng) -> None:
    (folder / "text.nii.gz").write_bytes(bytes(rng.integers(32, 127, 2000, dtype=np.uint8)))


def strange(folder: Path, rng: Rng) -> None:
    (folder / "strange.bin").write_bytes(rng.bytes(500))


def lost(folder: Path, rng: Rng) -> None:
    (folder / "lost.nii.gz").symlink_to(folder / "nowhere.nii.gz")


def picture(folder: Path, rng: Rng) -> None:
    save(folder / "picture.nii.gz", noise(rng, (40, 40)))


def film(folder: Path, rng: Rng) -> None:
    save(folder / "film.nii.gz", noise(rng, (9, 9, 9, 5)))


def colours(folder: Path, rng: Rng) -> None:
    kind = np.dtype([(c, "u1") for c in "RGB"])
    array = rng.integers(0, 255, (9, 9, 9, 3), dtype=np.uint8).view(kind)[..., 0]
    nib.save(nib.Nifti1Image(array, ras_affine()), folder / "colours.nii.gz")


def waves(folder: Path, rng: Rng) -> None:
    array = (rng.normal(size=(9, 9, 9)) + 1j).astype(np.complex64)
    nib.save(nib.Nifti1Image(array, ras_affine()), folder / "waves.nii.gz")


def thin(folder: Path, rng: Rng) -> None:
    save(folder / "thin.nii.gz", noise(rng, (30, 30, 3)))


def flat(folder: Path, rng: Rng) -> None:
    save(folder / "flat.nii.gz", np.full(SHAPE_RAS, int(rng.integers(-5, 5)), np.int16))


def hole(folder: Path, rng: Rng) -> None:
    array = noise(rng).astype(np.float32)
    array.flat[rng.integers(array.size)] = rng.choice([np.nan, np.inf, -np.inf])
    save(folder / "hole.nii.gz", array)


def axisless(folder: Path, rng: Rng) -> None:
    affine = ras_affine()
    affine[:3, int(rng.integers(3))] = 0
    image = nib.Nifti1Image(noise(rng), None)
    image.header.set_sform(affine, code=1)
    nib.save(image, folder / "axisless.nii.gz")


def tilted(folder: Path, rng: Rng) -> None:
    affine = ras_affine()
    affine[1, 2] = rng.uniform(0.2, 1.0)
    save(folder / "tilted.nii.gz", noise(rng), affine)


def metres(folder: Path, rng: Rng) -> None:
    affine = ras_affine() * 0.001
    affine[3, 3] = 1
    save(folder / "metres.nii.gz", noise(rng), affine)


def street(folder: Path, rng: Rng) -> None:
    save(folder / "street.nii.gz", noise(rng, (90, 9, 9)), np.diag([40.0, 2, 2, 1]))


def unscaled(folder: Path, rng: Rng) -> None:
    save(folder / "unscaled_ct.nii.gz", noise(rng))


def tracer(folder: Path, rng: Rng) -> None:
    save(folder / "tracer_pet.nii.gz", noise(rng))


def classes(folder: Path, rng: Rng) -> None:
    save(folder / "classes.nii.gz", rng.integers(0, 5, SHAPE_RAS).astype(np.int16))


def named(folder: Path, rng: Rng) -> None:
    save(folder / "named_seg.nii.gz", noise(rng))


def again(folder: Path, rng: Rng) -> None:
    """A good one in other axes and as numbers of another kind."""
    image = nib.load(folder / "good0.nii.gz")
    flipped = image.as_reoriented(np.array([[1, -1], [0, 1], [2, -1]]))
    array = np.asarray(flipped.dataobj).astype(np.float32)
    nib.save(nib.Nifti1Image(array, flipped.affine), folder / "more_again.nii.gz")


def coarser(folder: Path, rng: Rng) -> None:
    (folder / "head.nii.gz").symlink_to(SAMPLES / "IXI013-HH-1212_T1.nii.gz")
    spacing = tuple(rng.uniform(2.2, 3.0, 3))
    copy = resample(as_physical(read_nifti(folder / "head.nii.gz")), spacing)
    save(folder / "more_coarser.nii.gz", np.rint(copy.array[0]).astype(np.int16), copy.affine)


def named_out(folder: Path, rng: Rng) -> None:
    save(folder / "out.nii.gz", noise(rng))


def series(folder: Path, rng: Rng, name: str, **more: Any) -> list[Path]:
    return write_series(
        folder / name, noise(rng, (9, 9, 12), -1024), np.diag([2.0, 2, 3, 1]), **more
    )


def gap(folder: Path, rng: Rng) -> None:
    series(folder, rng, "gap", skip=[int(rng.integers(2, 10))])


def uneven(folder: Path, rng: Rng) -> None:
    for path in series(folder, rng, "uneven")[1:-1]:
        made = pydicom.dcmread(path)
        x, y, z = (float(v) for v in made.ImagePositionPatient)
        made.ImagePositionPatient = [x, y, z + float(rng.uniform(-0.6, 0.6))]
        made.save_as(path)


def twice(folder: Path, rng: Rng) -> None:
    files = series(folder, rng, "twice")
    made = pydicom.dcmread(files[int(rng.integers(len(files)))])
    made.SOPInstanceUID = pydicom.uid.generate_uid()
    made.file_meta.MediaStorageSOPInstanceUID = made.SOPInstanceUID
    pixels = np.frombuffer(made.PixelData, "<i2") + 1
    made.PixelData = pixels.astype("<i2").tobytes()
    made.save_as(folder / "twice" / "more.dcm")


def localizer(folder: Path, rng: Rng) -> None:
    uid = pydicom.uid.generate_uid()
    series(folder, rng, "localizer", SeriesInstanceUID=uid)
    turned = np.array([[0, 0, 3.0, 0], [2.0, 0, 0, 0], [0, 2.0, 0, 0], [0, 0, 0, 1]])
    names = [f"b{k}.dcm" for k in range(12)]
    write_series(
        folder / "localizer", noise(rng, (9, 9, 12), -1024), turned,
        SeriesInstanceUID=uid, names=names,
    )  # fmt: skip


def letter(folder: Path, rng: Rng) -> None:
    """A DICOM report: nothing to see."""
    (path, *rest) = series(folder, rng, "letter")
    for other in rest:
        other.unlink()
    made = pydicom.dcmread(path)
    for name in ("PixelData", "Rows", "Columns"):
        delattr(made, name)
    made.Modality = "SR"
    made.save_as(path)


def headless(folder: Path, rng: Rng) -> None:
    """An NRRD header whose voxels are not beside it."""
    image = SimpleITK.GetImageFromArray(noise(rng))
    SimpleITK.WriteImage(image, str(folder / "headless.nhdr"))
    for voxels in folder.glob("headless.raw*"):
        voxels.unlink()


def elsewhere(folder: Path, rng: Rng) -> None:
    """One whose voxels are said to lie in another folder."""
    image = SimpleITK.GetImageFromArray(noise(rng))
    SimpleITK.WriteImage(image, str(folder / "elsewhere.nhdr"))
    (voxels,) = folder.glob("elsewhere.raw*")
    header = folder / "elsewhere.nhdr"
    header.write_text(header.read_text().replace(voxels.name, "../../etc/passwd"))
    voxels.unlink()


def unnoticed(folder: Path, rng: Rng) -> None:
    """A byte of the voxels is another, and the library that reads them does not mind."""
    path = folder / "unnoticed.mha"
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(noise(rng, (20, 20, 20))), str(path), True)
    data = bytearray(path.read_bytes())
    data[int(rng.integers(len(data) // 2, len(data) - 20))] ^= int(rng.integers(1, 256))
    path.write_bytes(data)


def deadly(folder: Path, rng: Rng) -> None:
    """A header that ends the process of the library that reads it."""
    path = folder / "deadly.mha"
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(noise(rng)), str(path))
    path.write_bytes(path.read_bytes().replace(b"NDims = 3", b"NDims = -1"))


def outside(folder: Path, rng: Rng) -> None:
    """A file outside the input, by the other spelling of the field that names voxels."""
    image = SimpleITK.GetImageFromArray(noise(rng))
    SimpleITK.WriteImage(image, str(folder / "outside.nhdr"))
    (voxels,) = folder.glob("outside.raw*")
    voxels.rename(folder.parent / voxels.name)
    header = folder / "outside.nhdr"
    text = header.read_text().replace("data file: ", f"# {'x' * 5000}\ndatafile: ../")
    header.write_text(text)


def vast(folder: Path, rng: Rng) -> None:
    """A file with holes, which takes no room on the disk."""
    image = nib.Nifti1Image(noise(rng), ras_affine())
    data = bytearray(image.to_bytes())
    struct.pack_into("<4h", data, 40, 3, 2048, 2048, 1025)
    path = folder / "vast.nii"
    path.write_bytes(data)
    os.truncate(path, 352 + 2 * 2048 * 2048 * 1025)


def parcels(folder: Path, rng: Rng) -> None:
    """Many classes, under a name that says nothing."""
    blocks = rng.permutation(64).reshape(4, 4, 4) * 7
    save(folder / "parcels.nii.gz", blocks.repeat(6, 0).repeat(6, 1).repeat(6, 2).astype(np.int16))


def offset(folder: Path, rng: Rng) -> None:
    """CT without its intercept, which padding would hide."""
    array = noise(rng, (14, 14, 14)) + 300
    array[:3] = -2000
    save(folder / "offset_ct.nii.gz", array)


def copied(folder: Path, rng: Rng) -> None:
    files = series(folder, rng, "copied")
    (folder / "copied" / "copy.dcm").write_bytes(files[int(rng.integers(len(files)))].read_bytes())


def comma(folder: Path, rng: Rng) -> None:
    """A number as it is written in some countries."""
    files = series(folder, rng, "comma")
    written_raw(files[int(rng.integers(len(files)))], "RescaleSlope", b"1,0")


FAULTS: dict[Plant, tuple[str, str]] = {
    damaged: ("damaged.nii.gz", "unreadable"),
    cut: ("cut.nii.gz", "truncated"),
    claims: ("claims.nii.gz", "truncated"),
    text: ("text.nii.gz", "not_an_image"),
    strange: ("strange.bin", "not_an_image"),
    lost: ("lost.nii.gz", "missing_file"),
    picture: ("picture.nii.gz", "not_3d"),
    film: ("film.nii.gz", "not_3d"),
    colours: ("colours.nii.gz", "rgb_or_complex"),
    waves: ("waves.nii.gz", "rgb_or_complex"),
    thin: ("thin.nii.gz", "too_few_slices"),
    flat: ("flat.nii.gz", "constant"),
    hole: ("hole.nii.gz", "nan_or_inf"),
    axisless: ("axisless.nii.gz", "bad_geometry"),
    tilted: ("tilted.nii.gz", "sheared"),
    metres: ("metres.nii.gz", "implausible_spacing"),
    street: ("street.nii.gz", "implausible_extent"),
    unscaled: ("unscaled_ct.nii.gz", "implausible_values"),
    tracer: ("tracer_pet.nii.gz", "unsupported_modality"),
    classes: ("classes.nii.gz", "looks_like_a_label"),
    named: ("named_seg.nii.gz", "looks_like_a_label"),
    again: ("more_again.nii.gz", "duplicate"),
    coarser: ("more_coarser.nii.gz", "near_duplicate"),
    named_out: ("out.nii.gz", "excluded"),
    gap: ("gap/1.dcm", "missing_slices"),
    uneven: ("uneven/1.dcm", "uneven_slices"),
    twice: ("twice/1.dcm", "repeated_slices"),
    localizer: ("localizer/1.dcm", "mixed_orientation"),
    letter: ("letter/1.dcm", "not_an_image"),
    headless: ("headless.nhdr", "missing_file"),
    elsewhere: ("elsewhere.nhdr", "unreadable"),
    unnoticed: ("unnoticed.mha", "unreadable"),
    deadly: ("deadly.mha", "not_3d"),
    outside: ("outside.nhdr", "unreadable"),
    vast: ("vast.nii", "too_large"),
    parcels: ("parcels.nii.gz", "looks_like_a_label"),
    offset: ("offset_ct.nii.gz", "implausible_values"),
    copied: ("copied/copy.dcm", "duplicate"),
    comma: ("comma/1.dcm", "unreadable"),
}


def test_each_fault_has_its_own_code_and_good_scans_stay(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    folder = tmp_path / "in"
    for number in range(4):
        smooth = ndimage.gaussian_filter(noise(rng, (14, 15, 16)).astype(float), 1)
        save(folder / f"good{number}.nii.gz", smooth.astype(np.int16))
    for plant in FAULTS:
        plant(folder, rng)
    (tmp_path / "exclude.txt").write_text("out\n")
    settings = PrepSettings(
        input=folder, output=tmp_path / "c", keys="names", exclude=tmp_path / "exclude.txt",
        processes=1,
    )  # fmt: skip
    result = prep(settings, say=lambda line: None)
    assert not any("books" in note for note in result.notes)
    with (tmp_path / "c.private" / "quarantine.csv").open() as file:
        rows = {row["input"]: row["code"] for row in csv.DictReader(file)}
    found = {name: rows.get(name, "kept") for name, _ in FAULTS.values()}
    assert found == dict(FAULTS.values())
    corpus = Corpus.open(tmp_path / "c")
    assert (
        corpus.keys == ["copied-1", "good0", "good1", "good2", "good3", "head"]
        and check(corpus.path) == []
    )
    # Every file is a sample, a part of one, or a row.
    files = result.files
    assert files["total"] == sum(not p.is_dir() for p in folder.rglob("*"))
    parts = ("images", "labels", "masks", "left_out", "ignored")
    assert files["total"] == sum(files[part] for part in parts)
    assert len(set(dict(FAULTS.values()).values())) >= 22


LABEL_FAULTS = {
    "shifted": "label_geometry_mismatch",
    "other": "label_geometry_mismatch",
    "halves": "label_values",
    "negative": "label_values",
    "empty": "empty_label",
    "absent": "label_missing",
    "broken": "label_unreadable",
}


@pytest.mark.parametrize("fault", LABEL_FAULTS)
def test_each_fault_of_a_label_has_its_code(fault: str, tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    folder = tmp_path / "in"
    label = (noise(rng) > 450).astype(np.uint8)
    for name in ("good", "bad"):
        save(folder / "images" / f"{name}.nii.gz", noise(rng))
        save(folder / "labels" / f"{name}.nii.gz", label)
    path = folder / "labels" / "bad.nii.gz"
    affine = ras_affine()
    affine[:3, 3] += 5
    if fault == "shifted":
        save(path, label, affine)
    elif fault == "other":
        save(path, label[:-1])
    elif fault == "halves":
        save(path, label * np.float32(0.5))
    elif fault == "negative":
        save(path, -label.astype(np.int16))
    elif fault == "empty":
        save(path, 0 * label)
    elif fault == "absent":
        path.unlink()
    else:
        path.write_bytes(rng.bytes(300))
    settings = PrepSettings(
        input=folder, output=tmp_path / "c", keys="names", labels=True, processes=1
    )
    result = prep(settings, say=lambda line: None)
    assert not any("books" in note for note in result.notes)
    assert Corpus.open(tmp_path / "c").keys == ["good"]
    assert LABEL_FAULTS[fault] in result.rejected
