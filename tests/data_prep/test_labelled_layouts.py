"""Labelled data sets as they lie on disk, through prep: every voxel and value where it belongs."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from phantoms import oriented, ras_affine, ras_array, save
from seeds import SEED

from data_prep.build import prep
from data_prep.corpus import Corpus
from data_prep.errors import InputError
from data_prep.layouts.find import find_cases
from data_prep.layouts.folders import TOTALSEGMENTATOR
from data_prep.layouts.nnunet import name_values
from data_prep.settings import PrepSettings
from data_prep.volume import (
    Reject,
    canonical_array,
    canonical_transform,
    check_label_grid,
    read_channels,
)

SHAPE = (12, 10, 14)
DATA = Path(__file__).parents[3] / "shared" / "data"
shared = pytest.mark.skipif(not DATA.is_dir(), reason="../shared/data is not here")


def run(source: Path, output: Path, **options: Any) -> Corpus:
    settings = {"processes": 1, "keys": "names", **options}
    result = prep(PrepSettings(input=source, output=output, **settings), say=lambda line: None)
    assert not any("books" in note for note in result.notes)
    corpus = Corpus.open(output)
    if source.is_dir():
        # Every file of the input ended as something; a case that only a list knows is no file.
        there = {p.relative_to(source).as_posix() for p in source.rglob("*") if p.is_file()}
        only_listed = set(quarantine(output)) - there
        total = corpus.info["counts"]["files"]["total"]
        assert total == len(there) + len(only_listed)
    return corpus


def quarantine(output: Path) -> dict[str, tuple[str, str]]:
    with (output.with_name(output.name + ".private") / "quarantine.csv").open() as file:
        return {row["input"]: (row["code"], row["detail"]) for row in csv.DictReader(file)}


def image(rng: np.random.Generator, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    return rng.integers(0, 900, shape).astype(np.int16)


def stored(array: np.ndarray) -> np.ndarray:
    """An array of the phantoms' RAS grid as a corpus holds it."""
    return canonical_array(array, canonical_transform(ras_affine(), array.shape))


@pytest.fixture
def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.fixture
def nnunet(tmp_path: Path, rng: np.random.Generator) -> Path:
    """Three cases of two channels, regions and an ignore label; one test case with a label."""
    root = tmp_path / "Dataset001_Two"
    for case in ("p1_a", "p1_b", "p2_a"):
        for channel in range(2):
            save(root / "imagesTr" / f"{case}_{channel:04d}.nii.gz", image(rng))
        label = rng.integers(0, 5, SHAPE).astype(np.uint8)
        save(root / "labelsTr" / f"{case}.nii.gz", label)
    for channel in range(2):
        save(root / "imagesTs" / f"t_{channel:04d}.nii.gz", image(rng))
    (root / "dataset.json").write_text(
        json.dumps(
            {
                "channel_names": {"0": "T2", "1": "ADC"},
                "labels": {
                    "background": 0,
                    "whole": [1, 2, 3],
                    "core": [2, 3],
                    "enhancing": 3,
                    "ignore": 4,
                },
                "regions_class_order": [1, 2, 3],
                "numTraining": 3,
                "file_ending": ".nii.gz",
            }
        )
    )
    return root


def test_nnunet_channels_regions_and_ignore(nnunet: Path, tmp_path: Path) -> None:
    corpus = run(nnunet, tmp_path / "c")
    assert corpus.keys == ["p1_a", "p1_b", "p2_a"]
    assert corpus.shapes[:, 0].tolist() == [2, 2, 2]
    for number, key in enumerate(corpus.keys):
        for c, name in enumerate(("T2", "ADC")):
            path = nnunet / "imagesTr" / f"{key}_{c:04d}.nii.gz"
            np.testing.assert_array_equal(corpus.read(number)[c], read_channels([path]).array[0])
            channel = corpus.meta(number)["channels"][c]
            assert (channel["name"], channel["modality"]) == (name, "MR")
            assert channel["statistics"]["max"] == corpus.read(number)[c].max()
        # Values that are ignored are neither background nor a class.
        assert corpus.meta(number)["annotated"] == [1, 2, 3]
    rows = {row["value"]: (row["name"], row["regions"], row["ignore"]) for row in corpus.classes}
    assert rows == {
        0: ("background", [], False),
        1: ("whole", ["whole"], False),
        2: ("core", ["core", "whole"], False),
        3: ("enhancing", ["core", "whole"], False),
        4: ("ignore", [], True),
    }
    assert quarantine(tmp_path / "c")["imagesTs/t_0000.nii.gz"][0] == "label_missing"


def test_a_channel_is_known_again_where_it_is_a_scan_of_its_own(
    nnunet: Path, tmp_path: Path
) -> None:
    """Who was pretrained on one channel alone has seen the case of both."""
    both = run(nnunet, tmp_path / "both")
    alone = tmp_path / "alone"
    alone.mkdir()
    for channel in range(2):
        path = nnunet / "imagesTr" / f"p1_b_{channel:04d}.nii.gz"
        (alone / f"scan{channel}.nii.gz").write_bytes(path.read_bytes())
    one = run(alone, tmp_path / "one")
    seen = set(one.fingerprints().values())
    assert not seen & set(both.fingerprints().values())
    assert {key for key, prints in both.scan_prints().items() if prints & seen} == {"p1_b"}
    assert one.scan_prints() == {key: {value} for key, value in one.fingerprints().items()}
    assert len(set().union(*both.scan_prints().values())) == 9


def test_names_of_values_are_those_of_the_smallest_region() -> None:
    kits = {"background": (0,), "kidney": (1, 2, 3), "masses": (2, 3), "tumor": (2,)}
    assert name_values(kits) == {0: "background", 1: "kidney", 2: "tumor", 3: "masses"}
    assert name_values({"a": (1, 2)}) == {1: "a", 2: "a 2"}


def test_nnunet_test_labels_make_an_official_split(nnunet: Path, tmp_path: Path) -> None:
    save(nnunet / "labelsTs" / "t.nii.gz", np.ones(SHAPE, np.uint8))
    corpus = run(nnunet, tmp_path / "c", subjects=r"^(p[0-9])_")
    parts = corpus.split("official")["parts"]
    assert parts == {"train": ["p1_a", "p1_b", "p2_a"], "validation": [], "test": ["t"]}
    assert corpus.subjects == ["p1", "p1", "p2", "t"]


def test_nnunet_version_one_and_a_missing_channel(nnunet: Path, tmp_path: Path) -> None:
    (nnunet / "imagesTr" / "p1_b_0001.nii.gz").unlink()
    (nnunet / "dataset.json").write_text(
        json.dumps(
            {
                "modality": {"0": "T2", "1": "ADC"},
                "labels": {"0": "background", "1": "a", "2": "b", "3": "c", "4": "d"},
                "training": [
                    {"image": "./imagesTr/p1_a.nii.gz", "label": "./labelsTr/p1_a.nii.gz"}
                ],
            }
        )
    )
    corpus = run(nnunet, tmp_path / "c")
    assert corpus.keys == ["p1_a", "p2_a"]
    assert [row["name"] for row in corpus.classes] == ["background", "a", "b", "c", "d"]
    code, detail = quarantine(tmp_path / "c")["imagesTr/p1_b_0000.nii.gz"]
    assert code == "channel_count"
    assert "p1_b has channels [0], dataset.json names 2" in detail
    assert quarantine(tmp_path / "c")["labelsTr/p1_b.nii.gz"][0] == "image_left_out"


def test_nnunet_descriptions_are_checked(nnunet: Path) -> None:
    (nnunet / "dataset.json").write_text(
        json.dumps({"channel_names": {"x": "T2"}, "labels": {"a": "one"}, "file_ending": ".png"})
    )
    with pytest.raises(InputError) as caught:
        find_cases(nnunet)
    text = "\n".join(caught.value.problems)
    for part in ("channel_names", "file_ending .png", "value 'a'"):
        assert part in text


def test_channels_must_lie_on_one_grid(nnunet: Path, tmp_path: Path) -> None:
    moved = ras_affine()
    moved[2, 3] += 2
    path = nnunet / "imagesTr" / "p1_a_0001.nii.gz"
    save(path, ras_array()[:, :, :9])
    save(nnunet / "imagesTr" / "p2_a_0001.nii.gz", image(np.random.default_rng(SEED + 9)), moved)
    run(nnunet, tmp_path / "c")
    found = quarantine(tmp_path / "c")
    assert found["imagesTr/p1_a_0000.nii.gz"][0] == "channel_geometry_mismatch"
    code, detail = found["imagesTr/p2_a_0000.nii.gz"]
    assert code == "channel_geometry_mismatch"
    assert "p2_a_0001" in detail and "2.00 mm" in detail


def test_channels_may_be_stored_along_other_axes(tmp_path: Path) -> None:
    import nibabel as nib

    one = save(tmp_path / "a.nii.gz", ras_array())
    nib.save(oriented("PIR"), tmp_path / "b.nii.gz")
    volume = read_channels([one, tmp_path / "b.nii.gz"], "MR", ["a", "b"])
    np.testing.assert_array_equal(volume.array[0], volume.array[1])


def test_channels_of_different_kinds_keep_their_values(tmp_path: Path) -> None:
    whole = save(tmp_path / "a.nii.gz", ras_array("uint16"))
    broken = save(tmp_path / "b.nii.gz", (ras_array() / 7).astype(np.float32))
    volume = read_channels([whole, broken], "MR", ["a", "b"])
    np.testing.assert_array_equal(volume.physical()[0], stored(ras_array()))
    np.testing.assert_allclose(volume.physical()[1], stored(ras_array()) / 7, rtol=1e-6)


def test_decathlon_volumes_become_channels(tmp_path: Path, rng: np.random.Generator) -> None:
    names = ["FLAIR", "T1w", "t1gd", "T2w"]
    arrays = {case: image(rng, (*SHAPE, 4)) for case in "abc"}
    for case, array in arrays.items():
        save(tmp_path / "in" / "imagesTr" / f"{case}.nii.gz", array)
        save(tmp_path / "in" / "labelsTr" / f"{case}.nii.gz", rng.integers(0, 3, SHAPE, np.uint8))
    save(tmp_path / "in" / "imagesTr" / "d.nii.gz", image(rng, (*SHAPE, 3)))
    save(tmp_path / "in" / "labelsTr" / "d.nii.gz", rng.integers(0, 3, SHAPE, np.uint8))
    pairs = {c: {"image": f"imagesTr/{c}.nii.gz", "label": f"labelsTr/{c}.nii.gz"} for c in "abcd"}
    (tmp_path / "in" / "dataset.json").write_text(
        json.dumps(
            {
                "modality": {str(n): name for n, name in enumerate(names)},
                "labels": {"0": "background", "1": "edema", "2": "core"},
                "training": [pairs["a"], pairs["b"], pairs["d"]],
                "validation": [pairs["c"]],
                "test": [],
            }
        )
    )
    corpus = run(tmp_path / "in", tmp_path / "c")
    for number, key in enumerate(corpus.keys):
        expected = np.stack([stored(arrays[key][..., c]) for c in range(4)])
        np.testing.assert_array_equal(corpus.read(number), expected)
        assert [c["name"] for c in corpus.meta(number)["channels"]] == names
    parts = corpus.split("official")["parts"]
    assert parts == {"train": ["a", "b"], "validation": ["c"], "test": []}
    code, detail = quarantine(tmp_path / "c")["imagesTr/d.nii.gz"]
    assert code == "not_3d"
    assert "4 volumes" in detail and "14, 3)" in detail


@pytest.fixture
def folders(tmp_path: Path, rng: np.random.Generator) -> Path:
    """TotalSegmentator's layout: disjoint masks, one structure missing in one case, splits."""
    root = tmp_path / "ts"
    for case in ("s1", "s2", "s3"):
        save(root / case / "ct.nii.gz", image(rng) - 1000)
        label = rng.integers(0, 4, SHAPE)
        for value, organ in ((1, "spleen"), (2, "liver"), (3, "aorta")):
            if (case, organ) != ("s2", "aorta"):
                mask = (label == value).astype(np.uint8)
                save(root / case / "segmentations" / f"{organ}.nii.gz", mask)
    (root / "meta.csv").write_text(
        "image_id;age;split\ns1;60;train\ns2;61;val\ns3;62;test\ns4;1;test\n"
    )
    return root


def test_masks_in_folders_become_one_label_map(folders: Path, tmp_path: Path) -> None:
    corpus = run(folders, tmp_path / "c")
    assert corpus.keys == ["s1", "s2", "s3"]
    assert corpus.modalities == ["CT"] * 3
    # The values are TotalSegmentator's own, since all of the names are.
    assert {row["name"]: row["value"] for row in corpus.classes} == {
        "background": 0, "spleen": 1, "liver": 5, "aorta": 52,
    }  # fmt: skip
    for number, key in enumerate(corpus.keys):
        label = corpus.read(number, "seg")
        for name, value in (("spleen", 1), ("liver", 5), ("aorta", 52)):
            path = folders / key / "segmentations" / f"{name}.nii.gz"
            if path.exists():
                mask = read_channels([path], minimum=1).array[0]
                np.testing.assert_array_equal(label == value, mask == 1)
            else:
                assert value not in label
    # A structure whose mask is missing was not looked for.
    assert [corpus.meta(n)["annotated"] for n in range(3)] == [[1, 5, 52], [1, 5], [1, 5, 52]]
    parts = corpus.split("official")["parts"]
    assert parts == {"train": ["s1"], "validation": ["s2"], "test": ["s3"]}
    assert quarantine(tmp_path / "c")["s4"][0] == "missing_file"


def test_the_totalsegmentator_table_is_the_official_one() -> None:
    assert len(TOTALSEGMENTATOR) == len(set(TOTALSEGMENTATOR)) == 117
    where = {name: n for n, name in enumerate(TOTALSEGMENTATOR, start=1)}
    assert {n: where[n] for n in ("vertebrae_L5", "vertebrae_T1", "vertebrae_C1", "heart")} == {
        "vertebrae_L5": 27, "vertebrae_T1": 43, "vertebrae_C1": 50, "heart": 51,
    }  # fmt: skip
    assert (where["rib_left_1"], where["rib_right_12"], where["costal_cartilages"]) == (
        92,
        115,
        117,
    )


def test_overlapping_masks(folders: Path, tmp_path: Path) -> None:
    path = folders / "s1" / "segmentations"
    both = np.zeros(SHAPE, np.uint8)
    both[2:6, 3:7, 4:9] = 1
    save(path / "liver.nii.gz", both)
    other = np.zeros(SHAPE, np.uint8)
    other[4:8, 3:7, 4:9] = 1
    save(path / "spleen.nii.gz", other)
    save(path / "aorta.nii.gz", np.zeros(SHAPE, np.uint8))

    run(folders, tmp_path / "c")
    code, detail = quarantine(tmp_path / "c")["s1/ct.nii.gz"]
    assert code == "label_overlap"
    assert "liver shares 40 voxels with spleen" in detail
    assert "overlap=last" in detail

    corpus = run(folders, tmp_path / "last", overlap="last")
    label = corpus.read(0, "seg")
    assert (np.count_nonzero(label == 5), np.count_nonzero(label == 1)) == (80, 40)

    names = {1: "spleen", 2: "liver", 3: "aorta"}
    corpus = run(folders, tmp_path / "bits", overlap="bits", classes=names)
    assert {row["value"]: row["name"] for row in corpus.classes} == {
        0: "background", 1: "spleen", 2: "liver", 4: "aorta", 3: "spleen + liver",
    }  # fmt: skip
    label = corpus.read(0, "seg")
    assert corpus.meta(0)["seg_encoding"] == "bits"
    np.testing.assert_array_equal(label & 2 > 0, stored(both) > 0)
    np.testing.assert_array_equal(label & 1 > 0, stored(other) > 0)
    assert corpus.meta(0)["annotated"] == [1, 2, 4, 3]
    assert corpus.meta(1)["annotated"] == [1, 2, 3]

    with pytest.raises(InputError, match="16 bits"):
        run(folders, tmp_path / "d", overlap="bits")
    with pytest.raises(InputError, match="no value is called aorta"):
        run(folders, tmp_path / "d", classes={1: "spleen", 2: "liver"})


def test_kits_and_acdc_folders(tmp_path: Path, rng: np.random.Generator) -> None:
    kits = tmp_path / "kits"
    for case in ("case_00000", "case_00001"):
        save(kits / case / "imaging.nii.gz", image(rng) - 1000)
        save(kits / case / "segmentation.nii.gz", rng.integers(0, 4, SHAPE, np.uint8))
    corpus = run(kits, tmp_path / "c1")
    assert (corpus.keys, corpus.modalities) == (["case_00000", "case_00001"], ["CT", "CT"])
    acdc = tmp_path / "acdc"
    for patient in ("patient001", "patient002"):
        for frame in ("frame01", "frame12"):
            save(acdc / patient / f"{patient}_{frame}.nii.gz", image(rng))
            label = rng.integers(0, 4, SHAPE, np.uint8)
            save(acdc / patient / f"{patient}_{frame}_gt.nii.gz", label)
        save(acdc / patient / f"{patient}_4d.nii.gz", image(rng, (*SHAPE, 2)))
    corpus = run(acdc, tmp_path / "c2", modality="MR")
    assert corpus.keys[0] == "patient001_frame01"
    assert corpus.subjects == ["patient001"] * 2 + ["patient002"] * 2
    assert quarantine(tmp_path / "c2")["patient001/patient001_4d.nii.gz"][0] == "not_listed"


def test_bids_sessions_and_derivatives(tmp_path: Path, rng: np.random.Generator) -> None:
    root = tmp_path / "bids"
    for subject, session in (("01", "1"), ("01", "2"), ("02", "1")):
        name = f"sub-{subject}_ses-{session}"
        folder = root / f"sub-{subject}" / f"ses-{session}" / "anat"
        save(folder / f"{name}_T1w.nii.gz", image(rng))
        save(folder / f"{name}_FLAIR.nii.gz", image(rng))
        derived = root / "derivatives" / "manual" / f"sub-{subject}" / f"ses-{session}"
        save(derived / f"{name}_dseg.nii.gz", rng.integers(0, 3, SHAPE, np.uint8))
        save(derived / f"{name}_desc-preproc_T1w.nii.gz", image(rng))
    save(root / "sub-03" / "anat" / "sub-03_T1w.nii.gz", image(rng))
    corpus = run(root, tmp_path / "c")
    assert corpus.keys == ["sub-01_ses-1", "sub-01_ses-2", "sub-02_ses-1"]
    assert corpus.subjects == ["01", "01", "02"]
    assert corpus.meta(0)["channels"][0]["name"] == "T1w"
    assert quarantine(tmp_path / "c")["sub-03/anat/sub-03_T1w.nii.gz"][0] == "label_missing"

    corpus = run(root, tmp_path / "both", channels=["FLAIR", "T1w"])
    path = root / "sub-02/ses-1/anat/sub-02_ses-1_FLAIR.nii.gz"
    np.testing.assert_array_equal(corpus.read(2)[0], read_channels([path]).array[0])
    assert [c["name"] for c in corpus.meta(2)["channels"]] == ["FLAIR", "T1w"]

    # ISLES: no T1w, so somebody has to say which images the labels belong to.
    isles = tmp_path / "isles" / "sub-s1" / "ses-1" / "dwi"
    for suffix in ("dwi", "adc"):
        save(isles / f"sub-s1_ses-1_{suffix}.nii.gz", image(rng))
    derived = tmp_path / "isles" / "derivatives" / "sub-s1" / "ses-1"
    save(derived / "sub-s1_ses-1_msk.nii.gz", rng.integers(0, 2, SHAPE, np.uint8))
    with pytest.raises(InputError, match=r"channels=\[dwi,adc\]"):
        find_cases(tmp_path / "isles")
    (case,) = find_cases(tmp_path / "isles", ["dwi", "adc"]).cases
    assert (case.subject, case.channels, len(case.images)) == ("s1", ("dwi", "adc"), 2)


def test_bids_does_not_guess_between_images(tmp_path: Path, rng: np.random.Generator) -> None:
    folder = tmp_path / "sub-01" / "anat"
    for run_number in (1, 2):
        save(folder / f"sub-01_run-{run_number}_T1w.nii.gz", image(rng))
    save(folder / "sub-01_label-L_desc-T1lesion_mask.nii.gz", np.ones(SHAPE, np.uint8))
    with pytest.raises(InputError, match="2 images end in _T1w"):
        find_cases(tmp_path)


def test_lists_take_channels_folds_and_groups(tmp_path: Path, rng: np.random.Generator) -> None:
    rows = ["image,label,subject,sequence,fold,sex,site"]
    for n in range(4):
        for channel in ("a", "b"):
            save(tmp_path / f"{n}{channel}.nii.gz", image(rng))
        save(tmp_path / f"{n}l.nii.gz", rng.integers(0, 3, SHAPE, np.uint8))
        rows.append(f"{n}a.nii.gz;{n}b.nii.gz,{n}l.nii.gz,s{n},T1w;FLAIR,{n % 2},f,x")
    (tmp_path / "list.csv").write_text("\n".join(rows))
    corpus = run(tmp_path / "list.csv", tmp_path / "c")
    assert corpus.shapes[:, 0].tolist() == [2] * 4
    assert corpus.meta(0)["group"] == {"sex": "f", "site": "x"}
    assert corpus.splits == ["default", "fold-0", "fold-1"]
    assert corpus.split("fold-1")["parts"]["validation"] == ["1a", "3a"]
    assert corpus.split("fold-1")["parts"]["train"] == ["0a", "2a"]
    rows[1] = rows[1].replace("T1w;FLAIR,0", "T1w,zero")
    rows[2] = rows[2].replace("1a.nii.gz;1b.nii.gz", "1a.nii.gz").replace("T1w;FLAIR", "T1w")
    (tmp_path / "list.csv").write_text("\n".join(rows))
    with pytest.raises(InputError) as caught:
        find_cases(tmp_path / "list.csv")
    text = "\n".join(caught.value.problems)
    for part in ("2 images and 1 names", "fold 'zero'", "differ in their number of channels"):
        assert part in text


def test_slices_come_in_when_asked_for(tmp_path: Path, rng: np.random.Generator) -> None:
    root = tmp_path / "in"
    save(root / "images" / "flat.nii.gz", image(rng, (20, 24)))
    save(root / "labels" / "flat.nii.gz", rng.integers(0, 3, (20, 24), np.uint8))
    save(root / "images" / "slice.nii.gz", image(rng, (20, 24, 1)))
    save(root / "labels" / "slice.nii.gz", rng.integers(0, 3, (20, 24, 1), np.uint8))
    with pytest.raises(InputError, match="minimum_slices=1"):
        run(root, tmp_path / "c")
    corpus = run(root, tmp_path / "c", minimum_slices=1)
    assert corpus.shapes.tolist() == [[1, 1, 24, 20]] * 2
    assert corpus.read(0, "seg").shape == (1, 24, 20)
    # A prediction of a slice is looked at as one of a volume is.
    grid = np.array(corpus.meta(0)["affine"])
    for label in (root / "labels").iterdir():
        check_label_grid(label, (1, 24, 20), grid)
        with pytest.raises(Reject, match="label_geometry_mismatch"):
            check_label_grid(label, (1, 20, 24), grid)


def test_all_that_is_wrong_with_a_label_is_said(tmp_path: Path, rng: np.random.Generator) -> None:
    root = tmp_path / "in"
    moved = ras_affine()
    moved[0, 3] += 4
    for name in ("good", "bad"):
        save(root / "images" / f"{name}.nii.gz", image(rng))
    save(root / "labels" / "good.nii.gz", rng.integers(0, 3, SHAPE, np.uint8))
    save(root / "labels" / "bad.nii.gz", np.full(SHAPE, 7, np.uint8), moved)
    run(root, tmp_path / "c", classes={1: "a", 2: "b"})
    code, detail = quarantine(tmp_path / "c")["images/bad.nii.gz"]
    assert code == "label_geometry_mismatch"
    assert "4.00 mm" in detail and "holds 7, not in classes" in detail


def test_a_preset_names_the_values(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "in"
    for name, high in (("a", 4), ("b", 5)):
        save(root / name / "imaging.nii.gz", image(rng) - 1000)
        save(root / name / "segmentation.nii.gz", rng.integers(0, high, SHAPE, np.uint8))
    task = Path(__file__).parents[2] / "conf" / "task" / "kits23.yaml"
    corpus = run(root, tmp_path / "c", classes=task)
    assert [row["name"] for row in corpus.classes] == ["background", "kidney", "tumor", "cyst"]
    code, detail = quarantine(tmp_path / "c")["b/imaging.nii.gz"]
    assert code == "label_values" and detail.startswith("the label holds 4, not in classes; ")
    assert "leave classes out" in detail and "to keep every value (a task picks its own)" in detail
    # The name will do, also where the data lie in a folder of that name; a file comes first.
    (tmp_path / "kits23").mkdir()
    monkeypatch.chdir(tmp_path)
    by_name = run(root, tmp_path / "n", classes="kits23")
    assert by_name.classes == corpus.classes and len(by_name) == 1
    with pytest.raises(InputError, match=r"classes=kits32: .*name of a task.*did you mean kits23"):
        run(root, tmp_path / "m", classes="kits32")
    (tmp_path / "word").write_text("{1: a, 2: b, 3: c}")
    assert [row["name"] for row in run(root, tmp_path / "w", classes="word").classes][1:] == [
        *"abc"
    ]
    (tmp_path / "t.yaml").write_text("classes: [{name: x, values: [1, 2]}, {name: y, values: [3]}]")
    corpus = run(root, tmp_path / "d", classes=tmp_path / "t.yaml")
    assert [row["name"] for row in corpus.classes] == ["background", "x 1", "x 2", "y"]


def test_empty_labels_and_absent_classes_are_told(tmp_path: Path, rng: np.random.Generator) -> None:
    root, lines = tmp_path / "in", []
    for name, label in (("a", rng.integers(0, 2, SHAPE)), ("b", np.zeros(SHAPE))):
        save(root / "images" / f"{name}.nii.gz", image(rng))
        save(root / "labels" / f"{name}.nii.gz", label.astype(np.uint8))
    settings = PrepSettings(
        input=root,
        output=tmp_path / "c",
        keys="names",
        classes={1: "x", 2: "y"},
        empty_labels="keep",
        processes=1,
    )
    result = prep(settings, say=lines.append)
    assert result.notes[-2:] == ["1 labels are empty: b", "no case has a voxel of y"]
    assert set(result.notes) <= set(lines)
    counts = Corpus.open(tmp_path / "c").info["counts"]
    assert (counts["cases_by_class"], counts["empty_labels"]) == ({"x": 1, "y": 0}, ["b"])


def test_numbered_cases_are_not_taken_for_channels(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    """AMOS and WORD: amos_0001 in imagesTr, imagesVa and labels of the same names, no list."""
    root = tmp_path / "in"
    for part, ids in (("Tr", (1, 4)), ("Va", (8,)), ("Ts", (9,))):
        for number in ids:
            save(root / f"images{part}" / f"amos_{number:04d}.nii.gz", image(rng))
            if part != "Ts":
                label = rng.integers(0, 3, SHAPE, np.uint8)
                save(root / f"labels{part}" / f"amos_{number:04d}.nii.gz", label)
    save(root / "labelsVa" / "amos_0077.nii.gz", np.ones(SHAPE, np.uint8))
    corpus = run(root, tmp_path / "c")
    assert corpus.split("official")["parts"] == {
        "train": ["amos_0001", "amos_0004"], "validation": ["amos_0008"], "test": [],
    }  # fmt: skip
    assert {name: code for name, (code, _) in quarantine(tmp_path / "c").items()} == {
        "imagesTs/amos_0009.nii.gz": "label_missing",
        "labelsVa/amos_0077.nii.gz": "label_without_image",
    }


def test_several_channels_give_the_same_bytes_with_more_processes(
    nnunet: Path, folders: Path, tmp_path: Path
) -> None:
    for source in (nnunet, folders):
        trees = []
        for processes in (1, 2):
            corpus = run(source, tmp_path / f"{source.name}{processes}" / "c", processes=processes)
            trees.append(
                {p.relative_to(corpus.path): p.read_bytes() for p in corpus.path.rglob("*.*")}
            )
        assert trees[0] == trees[1]


def test_class_names_are_checked(tmp_path: Path, rng: np.random.Generator) -> None:
    save(tmp_path / "in" / "images" / "a.nii.gz", image(rng))
    save(tmp_path / "in" / "labels" / "a.nii.gz", rng.integers(0, 3, SHAPE, np.uint8))
    with pytest.raises(InputError) as caught:
        run(tmp_path / "in", tmp_path / "c", classes={1: "a", 2: "a", 3: " "})
    text = "\n".join(caught.value.problems)
    assert "a has several values" in text
    assert "value 3 is called ' '" in text


def test_a_duplicate_costs_training_and_not_the_test(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    rows = ["image,label,split"]
    same = image(rng)
    for n, part in enumerate(("train", "test", "train", "val", "train")):
        save(tmp_path / f"i{n}.nii.gz", same if n < 3 else image(rng))
        save(tmp_path / f"l{n}.nii.gz", rng.integers(0, 3, SHAPE, np.uint8))
        rows.append(f"i{n}.nii.gz,l{n}.nii.gz,{part}")
    (tmp_path / "list.csv").write_text("\n".join(rows))
    corpus = run(tmp_path / "list.csv", tmp_path / "c")
    assert corpus.keys == ["i1", "i3", "i4"]
    code, detail = quarantine(tmp_path / "c")["i0.nii.gz"]
    assert code == "duplicate_across_splits"
    assert "duplicate of i1, which is in test, this in train; their labels differ" in detail


@shared
def test_a_raw_folder_as_found(tmp_path: Path) -> None:
    """Two prostate cases without dataset.json, labels on another grid than the images."""
    root = DATA / "tcia_prostatex" / "nnUNet_raw_data" / "Task100_test"
    layout = find_cases(root)
    assert [(case.id, len(case.images)) for case in layout.cases] == [
        ("ProstateX-0000_07-07-2011", 2),
        ("ProstateX-0001_07-08-2011", 2),
    ]
    with pytest.raises(InputError) as caught:
        run(root, tmp_path / "c", modality="MR")
    assert str(caught.value).count("geometry_mismatch") >= 2


@shared
def test_a_real_mask_on_another_grid_is_refused(tmp_path: Path) -> None:
    folder = DATA / "open_ms_longitudinal"
    (scan,) = folder.rglob("*FLAIR*.nii.gz")
    (mask,) = folder.rglob("gt.nii.gz")
    (tmp_path / "list.csv").write_text(f"image,label,modality\n{scan},{mask},MR\n")
    with pytest.raises(InputError, match="label_geometry_mismatch, the label has"):
        run(tmp_path / "list.csv", tmp_path / "c")


def test_a_pile_of_4d_files_is_still_no_pile_of_channels(tmp_path: Path) -> None:
    path = save(tmp_path / "x.nii.gz", np.stack([ras_array()] * 3, -1))
    with pytest.raises(Reject, match="one 3D volume is needed"):
        read_channels([path])
    assert read_channels([path], "MR", ["a", "b", "c"]).array.shape[0] == 3
    with pytest.raises(Reject, match="2 volumes, one per name"):
        read_channels([path], "MR", ["a", "b"])
