"""Cases in which a class was not looked for: they may hold it, so nothing learns from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from seeds import SEED
from small_runs import make_release, settings

from data_prep.build import prep
from data_prep.errors import InputError
from data_prep.settings import PrepSettings
from finetune.rows import read_rows
from finetune.settings import FinetuneSettings
from finetune.train import finetune, make_plan

CLASSES = {
    name: {"name": name, "values": [value], "tolerance_mm": 1.0}
    for name, value in (("spleen", 1), ("liver", 5), ("aorta", 52))
}
TRAIN = {
    "a": ("spleen", "liver", "aorta"), "b": ("liver", "aorta"), "c": ("spleen", "liver", "aorta"),
    "d": ("liver",),
}  # fmt: skip
TEST = {"t": ("liver", "aorta")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder per case with a mask per structure, as far as somebody drew it; and a release."""
    root = tmp_path_factory.mktemp("partial")
    rng = np.random.default_rng(SEED)
    lines = ["image_id;split"]
    for case, organs in {**TRAIN, **TEST}.items():
        (root / "in" / case / "segmentations").mkdir(parents=True)
        label = rng.integers(0, 4, (12, 18, 34)).astype(np.uint8)
        image = (label * 50 + rng.integers(0, 9, label.shape) - 100).astype(np.int16)
        nib.save(nib.Nifti1Image(image, np.eye(4)), root / "in" / case / "ct.nii.gz")
        for value, organ in enumerate(CLASSES, start=1):
            if organ in organs:
                mask = nib.Nifti1Image((label == value).astype(np.uint8), np.eye(4))
                nib.save(mask, root / "in" / case / "segmentations" / f"{organ}.nii.gz")
        lines.append(f"{case};{'train' if case in TRAIN else 'test'}")
    (root / "in/meta.csv").write_text("\n".join(lines) + "\n")
    prep(PrepSettings(input=root / "in", output=root / "corpus", keys="names", processes=1))
    make_release(root / "release", "unet")
    return root


def asked(folder: Path, *classes: str, **changes: Any) -> FinetuneSettings:
    from pretrain.release import load_release

    task = {"name": "organs", "classes": [CLASSES[name] for name in classes]}
    chosen = {"task": task, "labels": "all", "split": "auto", "steps": 1, **changes}
    return settings(load_release(folder / "release"), folder / "corpus", folder / "runs", **chosen)


def test_cases_with_a_class_missing_are_not_trained_on(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = finetune(asked(folder, *CLASSES))
    facts = json.loads((run / "run.json").read_text())
    assert sorted(facts["label_keys"]) == ["a", "c"]
    assert facts["partly_annotated"] == {"b": ["spleen"], "d": ["spleen", "aorta"]}
    said = capsys.readouterr().out
    assert "2 training cases are left out" in said
    assert "(missing: spleen in 2, aorta in 1)" in said
    # Tested are all cases, each on the classes that were looked for in it.
    rows = read_rows(run / "rows.csv")
    assert {r.case for r in rows} == {"t"}
    assert {r.class_name for r in rows if r.outcome == "not_annotated"} == {"spleen"}


@pytest.mark.parametrize("labels", ["1", "2", "50%"])
def test_labels_are_drawn_among_the_complete_cases(folder: Path, labels: str) -> None:
    for seed in range(5):
        plan = make_plan(asked(folder, *CLASSES, labels=labels, seed=seed))
        assert len(plan.train_keys) == (2 if labels == "2" else 1)
        assert set(plan.train_keys) <= {"a", "c"}
    with pytest.raises(InputError, match="holds 2 cases with all classes annotated"):
        make_plan(asked(folder, *CLASSES, labels=3))


def test_a_task_of_what_was_annotated_uses_all(folder: Path) -> None:
    plan = make_plan(asked(folder, "liver"))
    assert sorted(plan.train_keys) == ["a", "b", "c", "d"] and not plan.partial


def test_folds_of_one_recipe_may_leave_out_different_cases(folder: Path) -> None:
    plan = make_plan(asked(folder, *CLASSES))
    corpus, part = plan.corpus, {**plan.corpus.split("official")}
    part["parts"] = {**part["parts"], "train": ["a", "b"]}
    corpus.split = lambda name: part  # type: ignore[method-assign]
    other = make_plan(asked(folder, *CLASSES), corpus=corpus)
    assert list(other.partial) == ["b"] and list(plan.partial) == ["b", "d"]
    assert other.recipe == plan.recipe


def test_no_complete_case_is_an_error(folder: Path) -> None:
    plan = make_plan(asked(folder, *CLASSES))
    # As if only those had been put in that lack something.
    corpus, part = plan.corpus, {**plan.corpus.split("official")}
    part["parts"] = {**part["parts"], "train": ["b", "d"]}
    corpus.split = lambda name: part  # type: ignore[method-assign]
    with pytest.raises(
        InputError,
        match=r"none of the 2 training cases.*task organs \(missing: spleen in 2, aorta in 1\)",
    ):
        make_plan(asked(folder, *CLASSES), corpus=corpus)
