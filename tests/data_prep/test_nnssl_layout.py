"""nnssl's collections, layouts that are forced, and lists that name folders of DICOM."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from dicom_series import write_series
from phantoms import ras_affine, ras_array, save, scan

from data_prep.build import prep
from data_prep.corpus import Corpus
from data_prep.errors import InputError
from data_prep.layouts.find import READERS, find_cases
from data_prep.settings import PrepResult, PrepSettings


def run(source: Path, output: Path, **options: Any) -> PrepResult:
    settings = PrepSettings(input=source, output=output, processes=1, keys="names", **options)
    return prep(settings, say=lambda line: None)


@pytest.fixture
def collection(tmp_path: Path, seed: int) -> Path:
    """Two data sets whose subjects have the same number; one image has an anonymisation mask."""
    rng = np.random.default_rng(seed)
    root = tmp_path / "in"
    datasets: dict[str, Any] = {}
    for name in ("ds1", "ds2"):
        path = root / name / "sub-01" / "anat" / "sub-01_T1w.nii.gz"
        save(path, scan(rng))
        mask = np.zeros((12, 10, 14), np.uint8)
        mask[:5] = 1
        masks = {"anonymization_mask": None, "anatomy_mask": None}
        if name == "ds2":
            for kind in ("anonymization_mask", "anatomy_mask"):
                save(path.with_name(f"{kind}.nii.gz"), mask)
                masks[kind] = f"$nnssl_raw/Dataset745_OpenMind/ds2/sub-01/anat/{kind}.nii.gz"
        image = {
            "name": path.name,
            "image_path": f"$nnssl_raw/Dataset745_OpenMind/{path.relative_to(root)}",
            "modality": "T1w",
            "image_info": {"manufacturer": "A"},
            "associated_masks": masks,
        }
        sessions = {"ses-DEFAULT": {"session_id": "ses-DEFAULT", "images": [image]}}
        info = {"sex": "F", "age": 31, "race": "no"}
        subject = {"subject_id": "sub-01", "sessions": sessions, "subject_info": info}
        datasets[name] = {"dataset_index": name, "name": None, "subjects": {"sub-01": subject}}
    data = {"collection_index": 746, "collection_name": "Dataset745_OpenMind"}
    (root / "pretrain_data.json").write_text(json.dumps(data | {"datasets": datasets}))
    save(root / "ds1" / "stranger.nii.gz", scan(rng))
    return root


def test_a_collection_has_its_subjects_masks_and_books(
    collection: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("nnssl_raw", raising=False)
    result = run(collection, tmp_path / "c")
    corpus = Corpus.open(tmp_path / "c")
    assert result.samples == 2 and len(set(corpus.subjects)) == 2
    assert result.rejected == {"not_listed": 1}
    files = result.files
    assert (files["images"], files["masks"], files["left_out"], files["ignored"]) == (2, 1, 1, 2)
    assert sum(files[n] for n in ("images", "masks", "left_out", "ignored")) == files["total"]
    metas = {corpus.meta(i)["source"]: i for i in range(2)}
    masked = corpus.read(metas["ds2"], "mask")
    # x of the first five voxels runs to the right: the last on the axis to the left.
    assert masked[..., -5:].all() and not masked[..., :-5].any()
    assert not corpus.sample_has(metas["ds1"], "mask")
    meta = corpus.meta(metas["ds1"])
    assert (meta["sequence"], meta["group"]) == ("T1w", {"sex": "F", "age": "31"})
    assert meta["channels"][0]["modality"] == "MR"


def test_what_is_wrong_with_a_mask_is_called_that(collection: Path, tmp_path: Path) -> None:
    mask = collection / "ds2" / "sub-01" / "anat" / "anonymization_mask.nii.gz"
    save(mask, np.ones((12, 10, 15), np.uint8))
    assert run(collection, tmp_path / "c").rejected["mask_geometry_mismatch"] == 1
    mask.write_bytes(b"no mask")
    assert run(collection, tmp_path / "d").rejected["mask_unreadable"] == 1


def test_a_variable_says_where_files_are(
    collection: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "raw" / "Dataset745_OpenMind"
    elsewhere.mkdir(parents=True)
    shutil.move(collection / "ds1", elsewhere)
    shutil.move(collection / "ds2", elsewhere)
    monkeypatch.setenv("nnssl_raw", str(tmp_path / "raw"))
    assert run(collection, tmp_path / "c").samples == 2
    monkeypatch.delenv("nnssl_raw")
    with pytest.raises(InputError, match=r"missing_file"):
        run(collection, tmp_path / "d")


@pytest.mark.parametrize("where", ["up", "whole", "variable", "unset", "mask"])
def test_paths_stay_where_they_may_be(
    where: str, collection: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = save(tmp_path / "secret" / "x.nii.gz", ras_array())
    (tmp_path / "raw" / "in").mkdir(parents=True)
    monkeypatch.setenv("raw", str(tmp_path / "raw"))
    monkeypatch.delenv("nothing", raising=False)
    path = collection / "pretrain_data.json"
    data = json.loads(path.read_text())
    sessions = data["datasets"]["ds1"]["subjects"]["sub-01"]["sessions"]
    (image,) = sessions["ses-DEFAULT"]["images"]
    stated = {
        "whole": str(secret),
        "variable": "$raw/../secret/x.nii.gz",
        "unset": "$nothing/../secret/x.nii.gz",
    }.get(where, "../secret/x.nii.gz")
    if where == "mask":
        image["associated_masks"]["anonymization_mask"] = stated
    else:
        image["image_path"] = stated
    path.write_text(json.dumps(data))
    with pytest.raises(InputError, match=r"x\.nii\.gz' lies outside"):
        find_cases(collection)


def test_whole_paths_within_are_taken(collection: Path) -> None:
    path = collection / "pretrain_data.json"
    text = path.read_text().replace("$nnssl_raw/Dataset745_OpenMind", str(collection))
    path.write_text(text)
    assert [case.name.split("/")[0] for case in find_cases(collection).cases] == ["ds1", "ds2"]


def test_a_layout_can_be_forced(collection: Path) -> None:
    assert find_cases(collection).description.startswith("nnssl")
    pile = find_cases(collection, forced="pile")
    assert pile.description.startswith("folder of scans") and len(pile.cases) == 3
    for name in READERS:
        if name != "nnssl":
            with pytest.raises(InputError, match=f"layout={name}: .*auto looks what fits"):
                find_cases(collection, forced=name)


def test_a_list_may_name_a_folder_of_dicom(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    array = ras_array() + rng.integers(0, 90, ras_array().shape) - 1024
    for name in ("one", "two", "both"):
        write_series(tmp_path / name / "a", array, ras_affine())
    write_series(tmp_path / "both" / "b", array + 1, ras_affine())
    label = (ras_array() > 400).astype(np.uint8)
    nib.save(nib.Nifti1Image(label, ras_affine()), tmp_path / "label.nii.gz")
    rows = "image,label,subject\none,label.nii.gz,s1\n"
    (tmp_path / "list.csv").write_text(rows)
    run(tmp_path / "list.csv", tmp_path / "c")
    corpus = Corpus.open(tmp_path / "c")
    (meta,) = (corpus.meta(i) for i in range(len(corpus)))
    assert meta["channels"][0]["modality"] == "CT" and corpus.labelled
    stored = corpus.read(0, "image")[0]
    expected = np.transpose(array, (2, 1, 0))[:, ::-1, ::-1]  # right, anterior, superior to S, P, L
    np.testing.assert_array_equal(stored, expected)
    (tmp_path / "empty").mkdir()
    (tmp_path / "list.csv").write_text(rows + "both,label.nii.gz,s2\nempty,label.nii.gz,s3\n")
    with pytest.raises(InputError) as caught:
        find_cases(tmp_path / "list.csv")
    first, second = caught.value.problems
    assert "line 3: both is a folder and holds 2 volumes of DICOM" in first
    assert "line 4: empty is a folder and holds 0 volumes of DICOM" in second
