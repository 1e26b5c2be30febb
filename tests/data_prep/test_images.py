"""NRRD and MetaImage files: the volume that the same NIfTI gives, or why there is none."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK
from phantoms import oriented, ras_array

from data_prep.build import prep
from data_prep.corpus import Corpus
from data_prep.errors import InputError
from data_prep.images import Reject, check_claim
from data_prep.metaimage import TYPES
from data_prep.settings import PrepSettings
from data_prep.volume import read_channels, read_label, read_nifti

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


@pytest.mark.parametrize("form", ["nhdr", "mhd"])
def test_voxels_beside_a_header_are_of_the_request(form: str, tmp_path: Path) -> None:
    """A prep of a scan whose voxels were half copied is not the one of when they are whole."""
    (tmp_path / "in").mkdir()
    written(oriented("RAS"), tmp_path / "in" / f"x.{form}")
    (tmp_path / "in" / "source.nii.gz").rename(tmp_path / "in" / "y.nii.gz")
    (voxels,) = (p for p in (tmp_path / "in").glob("x.*") if p.suffix != f".{form}")
    whole = voxels.read_bytes()
    voxels.write_bytes(whole[: len(whole) // 2])
    settings = PrepSettings(
        input=tmp_path / "in", output=tmp_path / "c", processes=1, duplicates="exact"
    )
    prep(settings)
    assert Corpus.open(tmp_path / "c").info["counts"]["rejected"] == {"truncated": 1}
    voxels.write_bytes(whole)
    with pytest.raises(InputError, match="overwrite=true"):
        prep(settings)
    prep(settings.model_copy(update={"overwrite": True}))
    assert "truncated" not in Corpus.open(tmp_path / "c").info["counts"]["rejected"]


@pytest.mark.parametrize("kind", ["i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8"])
@pytest.mark.parametrize("big", [False, True])
def test_metaimages_of_all_types_are_what_itk_reads(
    kind: str, big: bool, tmp_path: Path, seed: int
) -> None:
    """Whatever words its header has for geometry; the oracle is the library's own reader."""
    rng = np.random.default_rng(seed)
    dtype = np.dtype(kind).newbyteorder(">" if big else "<")
    array = rng.integers(0, 120, (5, 6, 7)).astype(dtype)  # (k, j, i)
    named = rng.choice([word for word, code in TYPES.items() if code == kind])
    turn, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    words = {
        "ObjectType": "Image",
        "NDims": "3",
        "BinaryData": "True",
        str(rng.choice(["BinaryDataByteOrderMSB", "ElementByteOrderMSB"])): str(big),
        str(rng.choice(["TransformMatrix", "Rotation", "Orientation"])): text(turn.ravel()),
        str(rng.choice(["Offset", "Position", "Origin"])): text(rng.normal(size=3) * 90),
        str(rng.choice(["ElementSpacing", "ElementSize"])): text(rng.uniform(0.5, 4, 3)),
        "DimSize": "7 6 5",
        "ElementType": f"MET_{named}",
        "ElementDataFile": "LOCAL",
    }
    lines = [f"{word} = {value}\n" for word, value in words.items()]
    path = tmp_path / "x.mha"
    path.write_bytes("".join(lines).encode() + array.tobytes())
    theirs = SimpleITK.ReadImage(str(path))
    volume = read_nifti(path, "MR")
    native = volume.native.to_native(volume.physical()[0])
    np.testing.assert_array_equal(native, SimpleITK.GetArrayFromImage(theirs).T)
    for index in ((0, 0, 0), (6, 5, 4), (1, 3, 2)):
        place = np.array(theirs.TransformIndexToPhysicalPoint(index)) * (-1, -1, 1)
        np.testing.assert_allclose((volume.native.affine @ (*index, 1))[:3], place, atol=1e-4)


def text(values: np.ndarray) -> str:
    return " ".join(map(str, values))


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


def _says(old: str, new: str, length: int = 5000) -> Callable[[Path], None]:
    """A header in which words are others; what follows it is long enough for all it may claim."""

    def spoil(path: Path) -> None:
        data = path.read_bytes()
        assert old.encode() in data
        path.write_bytes(data.replace(old.encode(), new.encode()) + bytes(length))

    return spoil


def _flipped(path: Path) -> None:
    """One byte of the compressed voxels is another."""
    packed = next((p for p in path.parent.glob("x.zraw")), path)
    data = bytearray(packed.read_bytes())
    data[-len(data) // 5] ^= 0x55
    packed.write_bytes(data)


def _moved_stream(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data.replace(b"LOCAL\n", b"LOCAL\n "))


def _secret(path: Path, *names: str) -> None:
    """Voxels that are none of the input's business, and a header long enough to claim them."""
    (path.parent.parent / "secret.raw").write_bytes(b"\1\2" * 5000)
    text = path.read_text()
    for old, new in zip(names[::2], names[1::2], strict=True):
        assert old in text
        text = text.replace(old, new)
    path.write_text(text)


def _other_spelling(path: Path) -> None:
    _secret(path, "data file: x.raw", f"# {'x' * 5000}\ndatafile: ../secret.raw")


def _absolute(path: Path) -> None:
    secret = path.parent.parent / "secret.raw"
    _secret(path, "data file: x.raw", f"# {'x' * 5000}\nDataFile: {secret}")


def _late(path: Path) -> None:
    _secret(path, "data file: x.raw", f"# {'x' * 70_000}\ndata file: ../secret.raw")


def _late_meta(path: Path) -> None:
    _secret(path, "NDims", f"Comment = {'x' * 70_000}\nNDims", "x.raw", "../secret.raw")


def _attached(path: Path) -> None:
    """A header that holds no voxels under the name of one that does."""
    voxels = path.with_suffix(".raw")
    voxels.write_bytes(bytes(range(256)) * 20)
    if path.suffix == ".mha":
        head = path.read_bytes().partition(b"LOCAL")[0] + f"{voxels.name}\n".encode()
    else:
        head = path.read_bytes().partition(b"\n\n")[0] + f"\ndata file: {voxels.name}\n\n".encode()
    path.write_bytes(head + bytes(5000))


def _typed(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"DimSize = 7 9 11", b"DimSize = 7 9"))


NO_DIRECTION = "TransformMatrix = 0 0 0 0 0 0 0 0 0"


@pytest.mark.parametrize(
    ("form", "spoil", "codes"),
    [
        ("mha", _cut, {"truncated"}), ("nrrd", _cut, {"truncated"}),
        ("mhd", _elsewhere, {"unreadable"}), ("nhdr", _elsewhere, {"unreadable"}),
        ("mhd", _linked, {"missing_file"}), ("mhd", _gone, {"missing_file"}),
        ("nhdr", _gone, {"missing_file"}), ("mha", _absurd, {"truncated"}),
        ("nrrd", _text, {"not_an_image"}), ("mha", _text, {"not_an_image"}),
        ("nhdr", _other_spelling, {"unreadable"}), ("nhdr", _absolute, {"unreadable"}),
        ("nhdr", _late, {"unreadable"}), ("mhd", _late_meta, {"not_an_image"}),
        ("nrrd", _attached, {"unreadable"}), ("mha", _attached, {"unreadable"}),
        ("mha", _typed, {"unreadable"}),
        ("mha", _says("NDims = 3", "NDims = -1"), {"not_3d"}),
        ("mha", _says("NDims = 3", "NDims = 100000"), {"not_3d"}),
        ("mha", _says("NDims = 3", "NDims = 3e0"), {"unreadable"}),
        ("mha", _says("DimSize = 7", "DimSize = -7"), {"unreadable"}),
        ("mha", _says("DimSize = 7", "DimSize = 0"), {"unreadable"}),
        ("mha", _says("MET_SHORT", "MET_OTHER"), {"unreadable"}),
        ("mha", _says("MET_SHORT", "MET_SHORT_ARRAY"), {"rgb_or_complex"}),
        ("mha", _says("BinaryData = True", "BinaryData = False"), {"unreadable"}),
        ("mha", _says("ElementSpacing = ", "ElementSpacing = nan "), {"bad_geometry"}),
        ("mha", _says("Offset = ", "Offset = x "), {"bad_geometry"}),
        ("mha", _says("TransformMatrix =", f"{NO_DIRECTION}\nComment ="), {"bad_geometry"}),
        ("nrrd", _says("space directions: (", "space directions: (nan,0,0) ("), {"bad_geometry"}),
        ("nrrd", _says("space directions:", "space directions: (0,0,0) (0,1,0) (0,0,1)\n#"),
         {"bad_geometry"}),
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


@pytest.mark.parametrize(
    ("form", "spoil", "code"),
    [
        ("mha", _flipped, "unreadable"), ("mhd", _flipped, "unreadable"),
        ("nrrd", _flipped, "truncated"), ("mha", _cut, "truncated"),
        ("mha", _moved_stream, "unreadable"),
        ("mha", _says("DimSize = 7", "DimSize = 6"), "unreadable"),
        ("mha", _says("DimSize = 7", "DimSize = 8"), "truncated"),
    ],
)  # fmt: skip
def test_damage_of_packed_voxels_is_noticed(
    form: str, spoil: Callable[[Path], None], code: str, tmp_path: Path, seed: int
) -> None:
    """A sample is never made of other voxels than were stored."""
    array = np.random.default_rng(seed).integers(0, 900, (7, 30, 30)).astype(np.int16)
    (tmp_path / "d").mkdir()
    path = written(nib.Nifti1Image(array, np.eye(4)), tmp_path / "d" / f"x.{form}", packed=True)
    spoil(path)
    with pytest.raises(Reject) as refusal:
        read_nifti(path)
    assert refusal.value.code == code


def test_no_file_may_claim_more_than_anybody_needs(tmp_path: Path) -> None:
    check_claim((512, 512, 2000, 8), 2, 2**34, packed=False)
    check_claim((512, 512, 2000, 1), 2, 2**20, packed=True)  # a label map packs 1000 to 1
    check_claim((512, 512, 2000, 1), 4, 2**24, packed=True)
    for shape, size, packed in (
        ((512, 512, 2000, 9), 2**35, False),
        ((512, 512, 2000, 4), 2**22, True),
    ):
        with pytest.raises(Reject, match="too_large"):
            check_claim(shape, 2, size, packed)
    # A file may have holes, so its size costs nothing; it is refused before a voxel is read.
    header = nib.Nifti1Image(np.zeros((2, 2, 2), np.uint8), np.eye(4)).header
    header.set_data_shape((2048, 2048, 1025))
    header["vox_offset"], header["magic"] = 352, b"n+1"
    path = tmp_path / "x.nii"
    path.write_bytes(header.binaryblock + bytes(4))
    os.truncate(path, 2**33)
    with pytest.raises(Reject, match="too_large"):
        read_nifti(path)


def test_a_name_that_says_compressed_of_a_file_that_is_not(tmp_path: Path) -> None:
    nib.save(oriented("RAS"), tmp_path / "x.nii")
    with pytest.raises(Reject, match=r"not_an_image.*plain NIfTI is named \.nii"):
        read_nifti((tmp_path / "x.nii").rename(tmp_path / "x.nii.gz"))


def test_a_list_of_volumes_in_nrrd_is_one_of_volumes(tmp_path: Path, seed: int) -> None:
    """Its axis may be the first or the last, as programs for diffusion write it."""
    array = np.random.default_rng(seed).integers(0, 900, (5, 6, 7, 3)).astype(np.int16)
    where = {"first": (3, 0, 1, 2), "last": (0, 1, 2, 3)}
    for name, order in where.items():
        axes = ["(2,0,0)", "(0,2,0)", "(0,0,3)", "none"]
        kinds = ["space"] * 3 + ["list"]
        head = [
            "NRRD0005", "type: short", "dimension: 4", "space: left-posterior-superior",
            f"sizes: {text(np.array([array.shape[n] for n in order]))}",
            f"space directions: {' '.join(axes[n] for n in order)}",
            f"kinds: {' '.join(kinds[n] for n in order)}", "endian: little", "encoding: raw",
            "space origin: (0,0,0)", "", "",
        ]  # fmt: skip
        path = tmp_path / f"{name}.nrrd"
        path.write_bytes("\n".join(head).encode() + array.transpose(order).tobytes(order="F"))
        with pytest.raises(Reject, match="not_3d"):
            read_nifti(path)
        volume = read_channels([path], "MR", ["b0", "b1", "b2"])
        found = np.stack([volume.native.to_native(channel) for channel in volume.array], axis=3)
        np.testing.assert_array_equal(found, array)


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
