"""Which file is whose: by the names of files, cases and folders, and none that is uncertain."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from seeds import SEED
from small_runs import BACKBONES, backbone

from data_prep.build import prep
from data_prep.corpus import Corpus
from data_prep.errors import InputError
from data_prep.preprocess import Preprocess
from data_prep.settings import PrepSettings
from finetune.evaluate import evaluate
from finetune.model_file import write_network
from finetune.predict import predict
from finetune.predictions import find_predictions
from finetune.rows import read_rows
from finetune.segmentation import Segmentation
from finetune.segmenter import Segmenter
from finetune.settings import EvaluateSettings, PredictSettings, TaskSettings

TASK = {"name": "t", "classes": [{"name": "liver", "values": [5], "tolerance_mm": 1.0}]}
CASES = {"s1": "train", "s2": "test", "s3": "test"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder per case, in all of which the scan is called ct; keys are hashes."""
    root = tmp_path_factory.mktemp("cases")
    rng = np.random.default_rng(SEED)
    for case in CASES:
        mask = (rng.random((12, 18, 34)) < 0.2).astype(np.uint8)
        image = (mask * 50 + rng.integers(0, 9, mask.shape) - 100).astype(np.int16)
        (root / "in" / case / "segmentations").mkdir(parents=True)
        nib.save(nib.Nifti1Image(image, np.eye(4)), root / "in" / case / "ct.nii.gz")
        file = root / "in" / case / "segmentations/liver.nii.gz"
        nib.save(nib.Nifti1Image(mask, np.eye(4)), file)
    lines = ["image_id;split", *(f"{case};{part}" for case, part in CASES.items())]
    (root / "in/meta.csv").write_text("\n".join(lines) + "\n")
    prep(PrepSettings(input=root / "in", output=root / "corpus", processes=1))
    return root


def keymap(folder: Path) -> Path:
    return folder / "corpus.private/keymap.csv"


def key_of(folder: Path) -> dict[str, str]:
    with keymap(folder).open() as file:
        return {row["case"]: row["key"] for row in csv.DictReader(file)}


def put(folder: Path, predictions: Path, names: dict[str, str]) -> Path:
    """The truth of each case as its prediction, under these names."""
    for case, name in names.items():
        truth = nib.load(folder / "in" / case / "segmentations/liver.nii.gz")
        labels = (np.asarray(truth.dataobj) * 5).astype(np.uint8)
        (predictions / name).parent.mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(labels, truth.affine), predictions / name)
    return predictions


def dice(folder: Path, predictions: Path, output: Path) -> set[float]:
    asked = {"corpus": folder / "corpus", "predictions": predictions, "keymap": keymap(folder)}
    chosen = EvaluateSettings.model_validate({**asked, "task": TASK, "output": output})
    rows = read_rows(evaluate(chosen))
    assert len(rows) == 2
    return {row.dsc for row in rows}


@pytest.mark.parametrize(
    "name",
    ["{case}.nii.gz", "{case}/ct.nii.gz", "in/{case}/ct.nii.gz", "{key}.nii", "fold/{key}.nii"],
)
def test_files_are_found_by_key_by_case_and_by_path(
    folder: Path, tmp_path: Path, name: str
) -> None:
    names = {case: name.format(case=case, key=key) for case, key in key_of(folder).items()}
    assert dice(folder, put(folder, tmp_path / "p", names), tmp_path / "o") == {1.0}


def test_predictions_of_whole_scans_are_scored_on_cropped_ones(
    folder: Path, tmp_path: Path
) -> None:
    """Only the stored part is looked at, but it has all that is labelled."""
    root = tmp_path / "cropped"
    shutil.copytree(folder / "in", root / "in")
    for case in CASES:
        for name, background in (("ct", -1000), ("segmentations/liver", 0)):
            file = root / "in" / case / f"{name}.nii.gz"
            image = nib.load(file)
            array = np.pad(np.asanyarray(image.dataobj), 3, constant_values=background)
            nib.save(nib.Nifti1Image(array, image.affine), file)
    settings = {"input": root / "in", "output": root / "corpus", "processes": 1}
    prep(PrepSettings.model_validate({**settings, "crop": "foreground"}))
    assert Corpus.open(root / "corpus").shapes[:, 1:].max() == 34
    names = {case: f"{case}.nii.gz" for case in ("s2", "s3")}
    assert dice(root, put(root, tmp_path / "p", names), tmp_path / "o") == {1.0}


def test_one_file_is_not_taken_for_all(folder: Path, tmp_path: Path) -> None:
    predictions = put(folder, tmp_path / "p", {"s2": "ct.nii.gz"})
    with pytest.raises(InputError, match=r"ct.nii.gz: may be the case of s1/ct.nii.gz or of s2/ct"):
        dice(folder, predictions, tmp_path / "o")
    # Where both cases have their own it is nobody's, and a strange folder is no case.
    put(folder, predictions, {"s2": "s2/ct.nii.gz", "s3": "s3/ct.nii.gz", "s1": "s9/ct.nii.gz"})
    assert dice(folder, predictions, tmp_path / "o") == {1.0}
    (predictions / "s3/ct.nii.gz").unlink()
    (predictions / "ct.nii.gz").unlink()
    with pytest.raises(InputError, match="1 of 2 cases are missing"):
        dice(folder, predictions, tmp_path / "o")


def test_two_files_of_a_case_are_one_too_many(folder: Path, tmp_path: Path) -> None:
    predictions = put(folder, tmp_path / "p", {"s2": "s2.nii.gz", "s3": "s3.nii.gz"})
    put(folder, predictions, {"s2": "s2/ct.nii.gz"})
    with pytest.raises(InputError, match=r"s2.nii.gz and s2/ct.nii.gz are both|s2/ct.nii.gz and"):
        dice(folder, predictions, tmp_path / "o")


def test_without_the_keymap_it_is_asked_for(folder: Path, tmp_path: Path) -> None:
    predictions = put(folder, tmp_path / "p", {"s2": "s2.nii.gz", "s3": "s3.nii.gz"})
    corpus = Corpus.open(folder / "corpus")
    with pytest.raises(InputError, match=r"2 of 2 cases are missing.*keymap=FILE"):
        find_predictions(predictions, corpus, corpus.split("official")["parts"]["test"], None)


def test_what_predict_wrote_is_scored(folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(SEED)
    task = TaskSettings.model_validate(TASK)
    model = Segmentation(encoder=backbone("unet"), task=task).eval()
    segmenter = Segmenter(model, Preprocess.default(), task, (8, 16, 32), 0.0, ("CT",))
    (tmp_path / "run").mkdir()
    write_network(segmenter, BACKBONES["unet"], "auto", tmp_path / "run")
    scans = tmp_path / "scans"
    for case in CASES:
        (scans / case).mkdir(parents=True)
        shutil.copy(folder / "in" / case / "ct.nii.gz", scans / case)
    output = tmp_path / "p"
    predict(PredictSettings(ckpt=tmp_path / "run", input=scans, output=output, device="cpu"))
    found = dice(folder, output, tmp_path / "o")
    assert len(found) == 2 and max(found) < 1  # each is its own
