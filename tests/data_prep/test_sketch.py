"""Sketches: what changes them, what they do not hold, and the copies that prep finds by them."""

from __future__ import annotations

import base64
import csv
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from dicom_series import write_series
from plants import KINDS, resampled, windowed
from scipy import ndimage

from data_prep.build import prep
from data_prep.corpus import Corpus
from data_prep.errors import InputError
from data_prep.layouts.case import Case
from data_prep.plan import _without_near_duplicates
from data_prep.scan import ScanJob, Scanned
from data_prep.settings import PrepResult, PrepSettings
from data_prep.sketch import (
    FEWEST,
    NEAR,
    Sketch,
    SketchIndex,
    _turns,
    similarity,
    sketch,
)
from data_prep.volume import Volume, read_nifti, volume_from_array
from data_prep.work import WorkFolder

SAMPLES = Path(__file__).parents[2] / "samples"
REAL = (
    "ixi/IXI013-HH-1212_T1.nii.gz",
    "ixi/IXI014-HH-1236_T1.nii.gz",
    "ixi/IXI033-HH-1259_T1.nii.gz",
    "fnndsc/FNNDSC_andrei_abdomen_3mm.nii.gz",
)


def spots(rng: np.random.Generator, shape: tuple[int, int, int] = (60, 64, 68)) -> np.ndarray:
    """Texture of two sizes, as MR."""
    coarse = ndimage.gaussian_filter(rng.normal(size=shape), 4)
    fine = ndimage.gaussian_filter(rng.normal(size=shape), 1.6)
    return (1000 + 300 * coarse / coarse.std() + 200 * fine / fine.std()).astype(np.float32)


def volume(array: np.ndarray, spacing: tuple[float, float, float] = (2.0, 2.0, 2.0)) -> Volume:
    return volume_from_array(array, spacing, "MR")


@pytest.fixture(scope="module")
def scans() -> list[Volume]:
    return [read_nifti(SAMPLES / name) for name in REAL]


@pytest.mark.parametrize("kind", KINDS)
def test_copies_of_real_scans_are_found_and_others_are_not(
    kind: str, scans: list[Volume], tmp_path: Path, seed: int
) -> None:
    index = SketchIndex([sketch(scan) for scan in scans])
    for n in (0, 3):
        copy = KINDS[kind](scans[n], np.random.default_rng((seed, n)), tmp_path)
        assert [number for number, _ in index.find(sketch(copy))] == [n]


def test_turns_and_mirrorings_only_exchange_bits(seed: int) -> None:
    array = spots(np.random.default_rng(seed))
    whole = sketch(volume(array))
    seen = set()
    for order in itertools.permutations(range(3)):
        for flips in itertools.product((False, True), repeat=3):
            moved = array.transpose(order)
            axes = [axis for axis, flip in enumerate(flips) if flip]
            turned = sketch(volume(np.flip(moved, axes)))
            shares = [similarity(turned, whole, [turn]) for turn in range(48)]
            assert max(shares) > 0.95 and sorted(shares)[-2] < NEAR
            seen.add(int(np.argmax(shares)))
    assert len(seen) == 48


def test_scale_offset_and_any_growing_curve_change_nothing_much(seed: int) -> None:
    array = spots(np.random.default_rng(seed))
    whole = sketch(volume(array))
    assert similarity(sketch(volume(3 * array - 500)), whole) == 1
    unit = (array - array.min()) / np.ptp(array)
    assert similarity(sketch(volume(unit**1.7)), whole) > 0.5
    codes = volume_from_array(np.rint(array).astype(np.int16), (2.0, 2.0, 2.0), "MR")
    # A falling code is what a negative slope makes a rising value.
    negative = Volume(
        -codes.array, codes.affine, codes.modality, codes.names, codes.native, (-1.0,), (0.0,)
    )
    assert similarity(sketch(negative), sketch(codes)) == 1


def test_texture_drawn_apart_is_told_apart(seed: int) -> None:
    rng = np.random.default_rng(seed)
    looks = [sketch(volume(spots(rng))) for _ in range(6)]
    assert all(look.is_comparable for look in looks)
    assert max(similarity(a, b) for a, b in itertools.combinations(looks, 2)) < NEAR


def test_nothing_says_where_a_feature_lay(seed: int) -> None:
    """The same parts in another arrangement give the same sketch: it is a bag, and sorted."""
    rng = np.random.default_rng(seed)
    gap = np.full((40, 40, 24), 1000, dtype=np.float32)
    parts = [spots(rng, (40, 40, 40)) for _ in range(3)]
    for part in parts:  # fades into the gap
        window = np.hanning(40) ** 0.5
        part[...] = 1000 + (part - 1000) * np.einsum("i,j,k->ijk", window, window, window)

    def row(order: tuple[int, ...]) -> Sketch:
        pieces = [piece for n in order for piece in (gap, parts[n])]
        return sketch(volume(np.concatenate([*pieces, gap], axis=2)))

    one, other = row((0, 1, 2)), row((2, 0, 1))
    grids = [(g, len(b)) for g, b in one.sets]
    assert [(g, len(b)) for g, b in other.sets] == grids
    for (_, a), (_, b) in zip(one.sets, other.sets, strict=True):
        assert np.array_equal(a, np.unique(a, axis=0))
        common = {row.tobytes() for row in a} & {row.tobytes() for row in b}
        assert len(common) > 0.8 * len(a)


def test_scans_that_are_too_small_or_flat_are_not_comparable(seed: int) -> None:
    small = sketch(volume(spots(np.random.default_rng(seed), (12, 12, 12))))
    flat = sketch(volume(np.full((60, 60, 60), 7.0, dtype=np.float32)))
    assert not small.is_comparable and not flat.is_comparable
    assert similarity(small, small) == 0 and SketchIndex([small, flat]).find(flat) == []
    assert SketchIndex([]).find(small) == []


def test_bytes_give_the_same_sketch_and_others_are_refused(seed: int) -> None:
    look = sketch(volume(spots(np.random.default_rng(seed))))
    data = look.to_bytes()
    again = Sketch.from_bytes(data)
    assert again.to_bytes() == data and similarity(again, look) == 1
    assert Sketch.from_bytes(b"").sets == ()
    for wrong in (data[:-1], data + b"x", b"\xff" * 40, data[:4]):
        with pytest.raises(ValueError, match=r"sketch"):
            Sketch.from_bytes(wrong)


def test_the_index_finds_what_looking_at_all_of_them_finds(seed: int) -> None:
    rng = np.random.default_rng(seed)
    looks = []
    for _ in range(40):
        looks.append(rng.integers(0, 256, (int(rng.integers(FEWEST, 60)), 18), dtype=np.uint8))
    for n in range(20):  # some are copies with a few features, turned, with a few bits changed
        rows = looks[n][: int(len(looks[n]) * rng.uniform(0.1, 1.0))]
        source, inverted = (table[int(rng.integers(48))] for table in _turns())
        bits = np.unpackbits(rows, axis=1)[:, source] ^ inverted
        bits ^= rng.random(bits.shape) < 0.015
        looks.append(np.concatenate([np.packbits(bits, axis=1), looks[39 - n][:10]]))
    sketches = [Sketch(((2.0, np.unique(bits, axis=0)),)) for bits in looks]
    index = SketchIndex(sketches)
    for wanted in sketches[::4]:
        all_of_them = {n: similarity(wanted, other) for n, other in enumerate(sketches)}
        assert dict(index.find(wanted)) == {n: s for n, s in all_of_them.items() if s >= NEAR}
    assert list(index.find_all(sketches)) == [index.find(wanted) for wanted in sketches]


def test_it_matters_not_who_asks_whom(scans: list[Volume], seed: int) -> None:
    looks = [sketch(scan) for scan in scans]
    rng = np.random.default_rng(seed)
    for grid, bits in [pair for look in looks for pair in look.sets if len(pair[1]) >= FEWEST][:4]:
        # Copies with many bits changed, and others near to them, so that ties are frequent.
        near = [
            Sketch(((grid, np.packbits(np.unpackbits(bits, axis=1) ^ flips, axis=1)),))
            for flips in (rng.random((3, len(bits), 144)) < 0.06).astype(np.uint8)
        ]
        both = Sketch(
            ((grid, np.unique(np.concatenate([n.sets[0][1] for n in near[:2]]), axis=0)),)
        )
        for one, other in ((near[0], near[2]), (both, near[2]), (both, Sketch(((grid, bits),)))):
            assert similarity(one, other, {0}) == similarity(other, one, {0})


def test_what_most_scans_have_makes_no_candidates(seed: int) -> None:
    rng = np.random.default_rng(seed)
    common = rng.integers(0, 256, (20, 18), dtype=np.uint8)
    sketches = []
    for _ in range(400):
        own = rng.integers(0, 256, (40, 18), dtype=np.uint8)
        sketches.append(Sketch(((2.0, np.unique(np.concatenate([common, own]), axis=0)),)))
    index = SketchIndex(sketches)
    assert list(index.candidates(sketches[5:7])) == [[(5, 0)], [(6, 0)]]
    assert next(SketchIndex(sketches[:200]).candidates(sketches[5:6]))[1:]  # of few, it tells


def test_threads_change_no_bit(tmp_path: Path) -> None:
    code = (
        "import sys, hashlib; from data_prep.volume import read_nifti; "
        "from data_prep.sketch import sketch; "
        "print(hashlib.sha256(sketch(read_nifti(sys.argv[1])).to_bytes()).hexdigest())"
    )
    found = set()
    for threads in ("1", "4"):
        environment = os.environ | {"OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads}
        words = [sys.executable, "-c", code, str(SAMPLES / REAL[3])]
        root = Path(__file__).parents[2]
        done = subprocess.run(words, env=environment, cwd=root, capture_output=True, check=True)
        found.add(done.stdout)
    assert len(found) == 1


# In prep.


def run(source: Path, output: Path, **options: Any) -> tuple[PrepResult, list[str]]:
    lines: list[str] = []
    given = {"processes": 1, "keys": "names", **options}
    return prep(PrepSettings(input=source, output=output, **given), say=lines.append), lines


def left_out(output: Path) -> dict[str, tuple[str, str]]:
    with (output.with_name(output.name + ".private") / "quarantine.csv").open() as file:
        return {row["input"]: (row["code"], row["detail"]) for row in csv.DictReader(file)}


@pytest.fixture
def folder(scans: list[Volume], tmp_path: Path, seed: int) -> Path:
    """Three heads, two copies of the first, and a scan that is too small to compare."""
    rng = np.random.default_rng(seed)
    place = tmp_path / "in"
    place.mkdir()
    for name in REAL[:3]:
        (place / Path(name).name).symlink_to(SAMPLES / name)
    for number, plant in enumerate((resampled, windowed)):
        copy = plant(scans[0], rng, tmp_path)
        image = nib.Nifti1Image(copy.physical()[0], copy.affine)
        nib.save(image, place / f"copy{number}.nii.gz")
    small = rng.integers(0, 900, (9, 9, 9)).astype(np.int16)
    nib.save(nib.Nifti1Image(small, np.eye(4)), place / "small.nii.gz")
    return place


def test_near_duplicates_are_left_out_with_what_they_are_of(folder: Path, tmp_path: Path) -> None:
    result, lines = run(folder, tmp_path / "c")
    rows = left_out(tmp_path / "c")
    first = "IXI013-HH-1212_T1.nii.gz"
    # The first in the input stays, here a copy: names are sorted, capitals before small letters.
    assert set(rows) == {"copy0.nii.gz", "copy1.nii.gz"} and first not in rows
    assert {code for code, _ in rows.values()} == {"near_duplicate"}
    assert all("a near-duplicate of ixi013-hh-1212_t1 (" in detail for _, detail in rows.values())
    assert result.samples == 4 and result.files["left_out"] == 2
    corpus = Corpus.open(tmp_path / "c")
    assert corpus.info["counts"]["not_comparable"] == ["small"]
    assert any("too small to be compared" in line for line in lines)
    by_key = dict(zip(corpus.keys, corpus.sketches(), strict=True))
    assert not by_key["small"].is_comparable and sum(s.is_comparable for s in by_key.values()) == 3


def test_exact_alone_keeps_near_duplicates(folder: Path, tmp_path: Path) -> None:
    result, _ = run(folder, tmp_path / "c", duplicates="exact")
    assert result.samples == 6 and left_out(tmp_path / "c") == {}


def test_a_test_scan_stays_and_its_copy_in_training_goes(folder: Path, tmp_path: Path) -> None:
    rows = ["image,subject,split"]
    for number, name in enumerate(sorted(path.name for path in folder.iterdir())):
        part = "test" if name == "copy1.nii.gz" else "train"
        rows.append(f"{name},s{number},{part}")
    (folder / "list.csv").write_text("\n".join(rows))
    run(folder / "list.csv", tmp_path / "c")
    found = left_out(tmp_path / "c")
    assert set(found) == {"IXI013-HH-1212_T1.nii.gz", "copy0.nii.gz"}
    assert {code for code, _ in found.values()} == {"duplicate_across_splits"}
    assert all("which is in test, this in train" in detail for _, detail in found.values())


def test_scans_of_a_test_corpus_and_of_a_release_stay_out(folder: Path, tmp_path: Path) -> None:
    test = tmp_path / "test"
    test.mkdir()
    (test / "a.nii.gz").symlink_to(SAMPLES / REAL[0])
    run(test, tmp_path / "held")
    second = sketch(read_nifti(SAMPLES / REAL[1])).to_text()
    release = tmp_path / "release"
    release.mkdir()
    data = {"format": 1, "values": ["voxel-blake2b-1:00", second]}
    (release / "fingerprints.json").write_text(json.dumps(data))
    run(folder, tmp_path / "c", exclude=f"[{tmp_path / 'held'},{release}]")
    rows = left_out(tmp_path / "c")
    assert {name: code for name, (code, _) in rows.items()} == dict.fromkeys(
        ("IXI013-HH-1212_T1.nii.gz", "IXI014-HH-1236_T1.nii.gz", "copy0.nii.gz", "copy1.nii.gz"),
        "excluded",
    )
    assert rows["IXI013-HH-1212_T1.nii.gz"][1] == "named by exclude="
    assert "a near-duplicate of a of held (" in rows["copy0.nii.gz"][1]
    assert "a near-duplicate of a scan of release (" in rows["IXI014-HH-1236_T1.nii.gz"][1]
    assert Corpus.open(tmp_path / "c").keys == ["ixi033-hh-1259_t1", "small"]


def test_what_a_split_holds_out_stays_out_and_its_training_scans_do_not(
    folder: Path, tmp_path: Path, seed: int
) -> None:
    heads = [Path(name).name for name in REAL[:3]]
    order = np.random.default_rng(seed).permutation(["test", "validation", "train"])
    parts = dict(zip(heads, order, strict=True))
    rows = ["image,label,split"]
    for name, part in parts.items():
        image, label = nib.load(folder / name), tmp_path / f"label-{name}"
        array = np.zeros(image.shape, np.uint8)
        array[5:9, 5:9, 5:9] = 1
        nib.save(nib.Nifti1Image(array, image.affine), label)
        rows.append(f"{folder / name},{label},{part}")
    (tmp_path / "list.csv").write_text("\n".join(rows))
    run(tmp_path / "list.csv", tmp_path / "set")
    split = tmp_path / "set" / "splits" / "official.json"

    run(folder, tmp_path / "c", exclude=split)
    found = left_out(tmp_path / "c")
    copies = ["copy0.nii.gz", "copy1.nii.gz"] if parts[heads[0]] != "train" else []
    held = [name for name in heads if parts[name] != "train"]
    codes = {name: code for name, (code, _) in found.items() if code != "near_duplicate"}
    assert codes == dict.fromkeys(held + copies, "excluded")
    assert {found[name][1] for name in held} == {"named by exclude="}
    assert all(" of set (" in found[name][1] for name in copies)

    split.write_text(split.read_text().replace("validation", "train"))
    with pytest.raises(InputError, match="does not match its hash"):
        run(folder, tmp_path / "d", exclude=split)


def test_what_is_no_list_corpus_or_release_is_told_at_once(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "fingerprints.json").write_text('{"format": 1}')
    with pytest.raises(InputError) as caught:
        run(folder, tmp_path / "c", exclude=(tmp_path / "bad", folder))
    assert len(caught.value.problems) == 2
    assert f"exclude={tmp_path / 'bad'}: its fingerprints.json" in caught.value.problems[0]
    assert "a list of keys or fingerprints, a corpus or a release" in caught.value.problems[1]


@pytest.mark.parametrize("count", [20, 70])
def test_of_many_copies_of_a_scan_one_stays(count: int, seed: int) -> None:
    """Also where more of them are left out than are compared with each."""
    rng = np.random.default_rng(seed)
    bits = rng.integers(0, 2, (128, 144), dtype=np.uint8)
    jobs, samples = [], []
    for n in range(count):
        noisy = np.packbits(bits ^ (rng.random(bits.shape) < 0.03), axis=1)
        look = Sketch(((2.0, np.unique(noisy, axis=0)),))
        case = Case(f"{n}.nii.gz", (Path(f"{n}.nii.gz"),))
        jobs.append(ScanJob(n, case, f"k{n}", f"s{n}", WorkFolder(Path()), None, False))
        text = base64.b64encode(look.to_bytes()).decode()
        samples.append(Scanned(n, f"k{n}", {}, sketch=text))
    kept, left_out, pairs = _without_near_duplicates(jobs, samples)
    assert [sample.number for sample in kept] == [0] and len(left_out) == count - 1
    assert {other for _, other, _ in pairs} == {0}


def test_volumes_of_one_file_are_alike_and_stay(
    scans: list[Volume], tmp_path: Path, seed: int
) -> None:
    array = scans[0].physical()[0]
    noise = np.random.default_rng(seed).normal(scale=2, size=(3, *array.shape))
    four = np.moveaxis(array + noise, 0, -1)
    (tmp_path / "in").mkdir()
    nib.save(nib.Nifti1Image(four, scans[0].affine), tmp_path / "in" / "echoes.nii.gz")
    result, _ = run(tmp_path / "in", tmp_path / "c", volumes="apart")
    assert result.samples == 3
    (tmp_path / "in" / "one.nii.gz").symlink_to(SAMPLES / REAL[0])
    result, _ = run(tmp_path / "in", tmp_path / "d", volumes="apart")
    assert result.samples == 3 and left_out(tmp_path / "d")["one.nii.gz"][0] == "near_duplicate"


def test_volumes_of_one_series_are_alike_and_stay(
    scans: list[Volume], tmp_path: Path, seed: int
) -> None:
    """Echoes are files of their own; the same scan in another series is a copy."""
    image = nib.load(SAMPLES / REAL[0])
    array = np.asarray(image.dataobj).astype(np.int16)
    noise = np.random.default_rng(seed).integers(-2, 3, (3, *array.shape)).astype(np.int16)
    for number, echo in enumerate(("10", "80", "10")):
        write_series(
            tmp_path / "in" / f"{number}", array + noise[number], image.affine, modality="MR",
            SeriesInstanceUID="1.2.3.5" if number == 2 else "1.2.3.4", EchoTime=echo,
        )  # fmt: skip
    result, _ = run(tmp_path / "in", tmp_path / "c")
    assert result.samples == 2 and result.rejected["near_duplicate"] == 1
    assert left_out(tmp_path / "c")["2/1.dcm"][0] == "near_duplicate"
