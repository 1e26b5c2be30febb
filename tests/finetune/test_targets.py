"""Which value is whose: targets of whole scans from a CSV, and what a task may say of them."""

from __future__ import annotations

import csv
import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from pydantic import ValidationError
from scan_runs import SIDE, VOLUME, truth_of, write_targets
from test_predictions import folder, key_of  # noqa: F401
from test_settings import settings

from data_prep.corpus import Corpus
from data_prep.errors import InputError
from finetune.rows import Row, read_rows, write_rows
from finetune.scan_task import ScanTask
from finetune.settings import EvaluateSettings, TaskSettings, choose_task, config_hash
from finetune.targets import read_targets

CONF = Path(__file__).parents[2] / "conf"
REGRESSION, SIDES = ScanTask.model_validate(VOLUME), ScanTask.model_validate(SIDE)


def read(corpus: Path, file: Path, task: ScanTask = REGRESSION) -> Any:
    found = Corpus.open(corpus)
    return read_targets(file, task, found, list(found.keys))


def test_values_and_classes_are_read_by_key(labelled_corpus: Path, tmp_path: Path) -> None:
    truth = truth_of(labelled_corpus)
    file = write_targets(tmp_path / "t.csv", truth)
    found = read(labelled_corpus, file)
    assert found.values == pytest.approx({key: one["ml"] for key, one in truth.items()})
    sides = read(labelled_corpus, file, SIDES)
    assert sides.recipe() == dict(sorted((key, one["side"]) for key, one in truth.items()))
    assert set(sides.values.values()) == {0.0, 1.0}


def test_everything_that_is_wrong_is_told_together(labelled_corpus: Path, tmp_path: Path) -> None:
    truth: dict[str, dict[str, Any]] = truth_of(labelled_corpus)
    keys = list(truth)
    truth[keys[0]]["ml"] = "nan"
    truth[keys[1]]["ml"] = ""
    for key in keys[2:9]:
        del truth[key]
    file = write_targets(tmp_path / "t.csv", truth)
    with file.open("a") as stream:
        stream.write(f"elsewhere,1,odd\n{keys[10]},2,odd\n")
    with pytest.raises(InputError) as caught:
        read(labelled_corpus, file)
    said = "\n".join(caught.value.problems)
    assert len(caught.value.problems) == 4
    assert f"7 of {len(keys)} cases of the split have no row ({keys[2]}, {keys[3]}" in said
    assert ", ...)" in said
    assert "1 rows are of no case" in said and "(elsewhere)" in said
    assert f"1 cases have more than one row ({keys[10]}); leave one" in said
    assert f"ml of 2 cases is not a finite number ({keys[0]}: nan, {keys[1]}: empty)" in said
    truth = truth_of(labelled_corpus)
    truth[keys[0]]["side"] = "Odd"
    with pytest.raises(InputError, match=rf"not one of the classes.*odd, even \({keys[0]}: Odd\)"):
        read(labelled_corpus, write_targets(file, truth), SIDES)


def test_a_file_of_something_else_is_named(labelled_corpus: Path, tmp_path: Path) -> None:
    file = tmp_path / "t.csv"
    file.write_text("case,ML\na,1\n")
    with pytest.raises(InputError, match=r"targets=.*t\.csv: has no column key and ml; it has"):
        read(labelled_corpus, file)
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="cannot be read"):
        read(labelled_corpus, file)


def test_scans_may_go_by_their_own_names(folder: Path, tmp_path: Path) -> None:  # noqa: F811
    """Keys are hashes, and the key map lies beside the corpus; in all folders the scan is ct."""
    corpus = Corpus.open(folder / "corpus")
    keys = key_of(folder)
    file = tmp_path / "t.csv"
    file.write_text("key,ml\ns1,1\ns2/ct.nii.gz,2\n" + f"{keys['s3']},3\n")
    found = read_targets(file, REGRESSION, corpus, list(corpus.keys))
    assert found.values == {keys["s1"]: 1.0, keys["s2"]: 2.0, keys["s3"]: 3.0}
    file.write_text("key,ml\nct,1\n")
    with pytest.raises(InputError, match=r"1 rows may be of several cases \(ct\)"):
        read_targets(file, REGRESSION, corpus, list(corpus.keys))


# Tasks.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "regression"}, "classes and swap belong to kind: classification"),
        ({"unit": "ml"}, "unit belongs to kind: regression"),
        ({"classes": ["odd"], "swap": []}, r"two or more values .* side has; found \['odd'\]"),
        ({"classes": ["odd", "odd"], "swap": []}, "two classes have the same name"),
        ({"swap": [["odd", "left"]]}, "swap: left are no classes"),
        ({"swap": [["odd", "even"], ["even", "odd"]]}, "even, odd have more than one partner"),
        ({"classes": ["left", "right"], "swap": []}, "along W makes left wrong; .* in swap"),
        (
            {"classes": ["front", "back"], "swap": [], "flip": [False, True, False]},
            "along H makes front wrong; set it to false$",
        ),
    ],
)
def test_scan_tasks_that_make_no_sense_are_refused(changes: Any, message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        ScanTask.model_validate(SIDE | changes)
    assert re.search(message, caught.value.errors()[0]["msg"])


def test_a_regression_has_a_unit() -> None:
    with pytest.raises(ValidationError, match="a regression needs unit"):
        ScanTask.model_validate({**VOLUME, "unit": ""})
    numbered = ScanTask.model_validate({**SIDE, "classes": [1, 2], "swap": [[1, 2]]})
    assert numbered.classes == ("1", "2") and numbered.mirrored_classes() == [1, 0]


def scan(**changes: Any) -> Any:
    return settings(**({"task": VOLUME, "targets": "t.csv"} | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"targets": None}, "targets: missing; task volume is of whole scans"),
        ({"fit": "ridge", "decoder": "linear", "freeze": "encoder"}, "fit=ridge: a probe of vox"),
        ({"fit": "knn", "decoder": "knn", "freeze": "encoder"}, "fit=knn: a probe of voxels"),
        ({"decoder": "unet"}, "decoder=unet: labels voxels"),
        ({"transfer": "network"}, "transfer=network: a decoder of voxels has no place"),
    ],
)
def test_what_a_scan_task_cannot_have_is_refused(changes: Any, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        scan(**changes)


def test_a_task_is_told_by_its_keys() -> None:
    assert isinstance(scan().task, ScanTask)
    assert isinstance(settings().task, TaskSettings)
    with pytest.raises(ValidationError, match="belong to a task of whole scans"):
        settings(targets="t.csv")
    # Errors are those of the task that was meant alone.
    with pytest.raises(ValidationError) as caught:
        scan(task={"name": "x", "kind": "regresion", "target": "ml"})
    assert [e["loc"] for e in caught.value.errors()] == [("task", "kind")]
    with pytest.raises(ValidationError) as caught:
        settings(task={"name": "x"})
    assert [e["loc"] for e in caught.value.errors()] == [("task", "classes")]
    with pytest.raises(ValidationError, match="is a task of whole scans, and what is scored here"):
        EvaluateSettings.model_validate(
            {"predictions": "p", "corpus": "c", "output": "o", "task": VOLUME}
        )


def test_targets_are_part_of_the_recipe_and_their_file_is_not() -> None:
    base = config_hash(scan().recipe(targets="t"))
    assert config_hash(scan(targets="elsewhere.csv").recipe(targets="t")) == base
    assert config_hash(scan().recipe(targets="u")) != base
    assert "targets" not in settings().recipe()  # hashes of segmentation stay what they were


def test_rows_of_before_are_read(tmp_path: Path) -> None:
    from arm_rows import make_rows

    write_rows(make_rows("scratch"), tmp_path / "rows.csv")
    added = {"pretrain_recipe", "truth", "answer", "unit"}
    with (tmp_path / "rows.csv").open() as file:
        records = list(csv.DictReader(file))
    names = [f.name for f in dataclasses.fields(Row) if f.name not in added]
    with (tmp_path / "old.csv").open("w") as file:
        writer = csv.DictWriter(file, names, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(records)
    assert repr(read_rows(tmp_path / "old.csv")) == repr(read_rows(tmp_path / "rows.csv"))
    with (tmp_path / "old.csv").open("w") as file:
        writer = csv.DictWriter(file, names[:-1], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(records)
    with pytest.raises(InputError, match=f"columns {names[-1]} are missing"):
        read_rows(tmp_path / "old.csv")


PRESETS = [p.stem for p in (CONF / "task").glob("*.yaml") if "\ntarget: " in p.read_text()]


@pytest.mark.parametrize("name", sorted({*PRESETS, "ixi_age", "ixi_sex"}))
def test_presets_of_whole_scans_are_whole(name: str) -> None:
    task = choose_task(OmegaConf.to_container(OmegaConf.load(CONF / f"task/{name}.yaml")))
    assert isinstance(task, ScanTask) and task.about is not None
    assert task.name == name and task.flip[:2] == (False, False)
    assert len(task.about.source) >= 8 and "://" in task.about.source
