"""Every file of conf/task, and what a task must not say."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from omegaconf import OmegaConf
from pydantic import ValidationError

from data_prep.corpus import Corpus
from data_prep.layouts.folders import TOTALSEGMENTATOR
from finetune.evaluate import Origin, Split, score
from finetune.settings import TaskSettings

FILES = sorted((Path(__file__).parents[2] / "conf" / "task").glob("*.yaml"))
# Those of whole scans are in test_targets.py.
TASKS = [path for path in FILES if "\ntarget: " not in path.read_text()]
EXPECTED = {
    "btcv", "amos_ct", "amos_mr", "kits23", "lits", "acdc", "word", "isles22", "atlas2",
    "totalsegmentator", "ixi_dlmuse", "chaos_liver", "hippocampus", "msd01_brain_tumour",
    "msd02_heart", "msd03_liver", "msd05_prostate", "msd06_lung", "msd07_pancreas",
    "msd08_hepatic_vessel", "msd09_spleen", "msd10_colon",
}  # fmt: skip


def load(name: str) -> TaskSettings:
    (path,) = (path for path in TASKS if path.stem == name)
    return TaskSettings.model_validate(OmegaConf.to_container(OmegaConf.load(path)))


def test_the_data_sets_of_the_field_are_there() -> None:
    assert {path.stem for path in TASKS} >= EXPECTED


@pytest.mark.parametrize("name", [path.stem for path in TASKS])
def test_every_preset_is_whole(name: str) -> None:
    task = load(name)
    values = [value for c in task.classes for value in c.values]
    assert len(set(values)) == len(values)
    assert all(c.tolerance_mm > 0 for c in (*task.classes, *task.regions))
    assert task.about is not None
    assert len(task.about.source) >= 8 and len(task.about.licence) >= 3
    assert re.search(r"arXiv:|doi:|https?://", task.about.source)
    name_of = {value: c.name for c in task.classes for value in c.values}
    for one, other in task.swap:
        names = {name_of[one], name_of[other]}
        sides = {re.sub("left|right", "SIDE", n) for n in names}
        assert len(sides) == 1, f"{names} are no two sides of one thing"
        # kidneys 2 and 3 may be one class; else one is left and the other right.
        assert len(names) == 1 or {re.search("left|right", n)[0] for n in names} == {
            "left",
            "right",
        }
    # Whoever turns the mirror along W on finds every side paired, or is refused.
    sided = {c.name for c in task.classes if re.search(r"(^|_)(left|right)(_|$)", c.name)}
    swapped = {name_of[value] for pair in task.swap for value in pair}
    if name not in (
        "acdc",
        "totalsegmentator",
        "totalsegmentator_organs",
        "totalsegmentator_cardiac",
    ):
        assert sided <= swapped
    # Front and back, top and bottom are never mirror images of each other.
    assert task.flip[:2] == (False, False)


def test_sides_without_a_partner_are_what_they_are() -> None:
    """Lobes of the lung and the one atrial appendage: no mirror can be right for them."""
    task = load("totalsegmentator")
    swapped = {value for pair in task.swap for value in pair}
    lone = {c.name for c in task.classes if re.search("left|right", c.name)} - {
        c.name for c in task.classes if swapped >= set(c.values)
    }
    assert lone == {"lung_middle_lobe_right", "atrial_appendage_left"}
    with pytest.raises(ValidationError, match="makes lung_middle_lobe_right wrong"):
        TaskSettings.model_validate({**task.model_dump(), "flip": (False, False, True)})


def test_totalsegmentator_values_are_those_that_prep_gives() -> None:
    task = load("totalsegmentator")
    assert [c.name for c in task.classes] == list(TOTALSEGMENTATOR)
    assert [c.values for c in task.classes] == [(n,) for n in range(1, 118)]
    groups = ("organs", "vertebrae", "cardiac", "muscles", "ribs")
    parts = [c for g in groups for c in load(f"totalsegmentator_{g}").classes]
    assert [c.name for c in parts] == list(TOTALSEGMENTATOR)
    assert all(TOTALSEGMENTATOR[c.values[0] - 1] == c.name for c in parts)


def test_known_class_numbers() -> None:
    """The same organ has another number in each data set."""
    for name, numbers in {
        "btcv": {"spleen": 1, "right_kidney": 2, "liver": 6, "pancreas": 11},
        "amos_ct": {"left_kidney": 3, "liver": 6, "pancreas": 10, "prostate_or_uterus": 15},
        "amos_mr": {"left_kidney": 3, "liver": 6, "pancreas": 10, "prostate_or_uterus": 15},
        "word": {"liver": 1, "left_kidney": 3, "right_kidney": 4, "left_head_of_femur": 15},
        "acdc": {"right_ventricle": 1, "myocardium": 2, "left_ventricle": 3},
        "kits23": {"kidney": 1, "tumor": 2, "cyst": 3},
    }.items():
        found = {c.name: c.values for c in load(name).classes}
        assert {n: found[n] for n in numbers} == {n: (v,) for n, v in numbers.items()}


def task(**changes: Any) -> dict[str, Any]:
    classes = [
        {"name": name, "values": [value], "tolerance_mm": 1.0}
        for value, name in enumerate(("kidney_left", "kidney_right", "liver"), start=1)
    ]
    return {"name": "t", "classes": classes, **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"flip": (False, False, True)}, "mirror along W makes kidney_left wrong"),
        ({"swap": [(1, 2), (2, 3)]}, r"values \[2\] have more than one partner"),
        ({"swap": [(1, 1)]}, r"values \[1\] have more than one partner"),
        ({"swap": [(1, 9)]}, r"\[9\] is in no class"),
        ({"swap": [(1, 2)], "ignore": 2}, "more than one class"),
        (
            {"regions": [{"name": "r", "values": [1, 9], "tolerance_mm": 1.0}]},
            r"values \[9\] are no whole classes",
        ),
    ],
)
def test_tasks_that_would_corrupt_labels_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TaskSettings.model_validate(task(**changes))


@pytest.mark.parametrize(
    ("axis", "name"), [(1, "anterior"), (1, "horn_posterior"), (0, "upper_lobe"), (2, "Left lung")]
)
def test_no_mirror_goes_through_a_named_direction(axis: int, name: str) -> None:
    flip = [n == axis for n in range(3)]
    classes = [{"name": name, "values": [1], "tolerance_mm": 1.0}]
    with pytest.raises(ValidationError, match=f"mirror along {'DHW'[axis]} makes {name} wrong"):
        TaskSettings.model_validate({"name": "t", "classes": classes, "flip": flip})
    for other in {0, 1, 2} - {axis}:
        flip = [n == other for n in range(3)]
        TaskSettings.model_validate({"name": "t", "classes": classes, "flip": flip})


LATERAL = [
    ("kidney_L", "kidney_R"), ("kidney_l", "kidney_r"), ("kidneyL", "kidneyR"),
    ("L kidney", "R kidney"), ("LeftLung", "RightLung"), ("lungLeft", "lungRight"),
    ("lung-left", "lung-right"), ("LEFT.LUNG", "RIGHT.LUNG"), ("LLung", "RLung"),
    ("Left-Hippocampus", "Right-Hippocampus"), ("lung_left2", "lung_right2"), ("rib3L", "rib3R"),
    ("ctx-lh-cuneus", "ctx-rh-cuneus"), ("lobe_L_two", "lobe_R_two"),
]  # fmt: skip


def of_names(names: Sequence[str], **changes: Any) -> dict[str, Any]:
    classes = [{"name": n, "values": [v], "tolerance_mm": 1} for v, n in enumerate(names, start=1)]
    return {"name": "t", "classes": classes, "flip": (False, False, True), **changes}


@pytest.mark.parametrize("names", LATERAL, ids=" ".join)
def test_sides_are_seen_however_they_are_written(names: tuple[str, str]) -> None:
    for order in (names, names[::-1]):
        with pytest.raises(ValidationError, match=f"along W makes {re.escape(order[0])} wrong"):
            TaskSettings.model_validate(of_names(order))
    TaskSettings.model_validate(of_names(names, swap=[(1, 2)]))
    TaskSettings.model_validate(of_names(names, flip=(True, True, False)))


@pytest.mark.parametrize("name", ["kidney_L", "R-kidney", "LeftLung", "lungRight"])
def test_a_side_alone_is_one_too(name: str) -> None:
    with pytest.raises(ValidationError, match=f"along W makes {name} wrong"):
        TaskSettings.model_validate(of_names([name]))


@pytest.mark.parametrize(
    "name",
    ["vertebrae_L5", "L5", "lesion R type", "liver", "bright", "cleft", "LV", "T1", "artery"],
)
def test_other_letters_are_no_sides(name: str) -> None:
    TaskSettings.model_validate(of_names([name, "spine"]))


def test_swapped_sides_may_be_mirrored() -> None:
    found = TaskSettings.model_validate(task(flip=(False, False, True), swap=[(1, 2)]))
    assert found.swap == ((1, 2),)
    # Sides in one class need no swap, and pairs that the task leaves out are no harm.
    classes = [{"name": "kidneys", "values": [1, 2], "tolerance_mm": 1.0}]
    TaskSettings.model_validate(task(classes=classes, flip=(False, False, True), swap=[(4, 5)]))


def test_a_wrong_mirror_is_said_in_a_line() -> None:
    from conf.compose import settings_for
    from data_prep.errors import InputError

    words = ["task=totalsegmentator", "corpus=c", "ckpt=k", "task.flip=[false,false,true]"]
    with pytest.raises(InputError) as caught:
        settings_for("finetune", words)
    (problem,) = (p for p in caught.value.problems if "mirror along W" in p)
    assert "lung_middle_lobe_right" in problem
    assert len(problem) < 300


def test_regions_are_scored_as_unions(labelled_corpus: Path) -> None:
    """Anterior within the whole: rows of both, from one prediction with disjoint values."""
    corpus = Corpus.open(labelled_corpus)
    classes = [
        {"name": "anterior", "values": [1], "tolerance_mm": 1.0},
        {"name": "posterior", "values": [2], "tolerance_mm": 1.0},
    ]
    regions = [
        {"name": "whole", "values": [1, 2], "tolerance_mm": 2.0},
        {"name": "anterior", "values": [1], "tolerance_mm": 1.0},
    ]
    found = TaskSettings.model_validate({"name": "t", "classes": classes, "regions": regions})
    key = corpus.keys[0]
    truth = corpus.read(0, "seg")

    def exchanged(_: str) -> np.ndarray:
        return np.array([0, 2, 1], np.uint8)[truth]

    rows = score(corpus, Split("s", "h", "test", (key,)), found, exchanged, Origin(arm="x"))
    assert [(row.class_name, row.dsc) for row in rows] == [("whole", 1.0), ("anterior", 0.0)]
    assert [row.nsd_tolerance_mm for row in rows] == [2.0, 1.0]


def test_what_is_told_about_a_data_set_changes_no_recipe() -> None:
    from test_settings import settings

    from finetune.settings import config_hash

    base = settings()
    other = base.task.model_copy(update={"about": None})
    assert base.task.about is not None
    assert config_hash(base.recipe()) == config_hash(
        base.model_copy(update={"task": other}).recipe()
    )
