"""Cases of a corpus: voxels that do not count, classes that were not annotated, the native grid."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep.corpus import Corpus
from data_prep.preprocess import as_physical, resample
from data_prep.sketch import sketch
from data_prep.volume import read_nifti
from finetune.evaluate import Origin, Seen, comparable, doubt, score_case, task_problems
from finetune.settings import TaskSettings


@pytest.fixture(scope="module")
def corpus(labelled_corpus: Path) -> Corpus:
    return Corpus.open(labelled_corpus)


def task(*classes: dict[str, Any], ignore: int | None = None) -> TaskSettings:
    named = [{"name": f"class {i}", "tolerance_mm": 1, **c} for i, c in enumerate(classes)]
    return TaskSettings.model_validate({"name": "t", "classes": named, "ignore": ignore})


def test_ignored_voxels_count_neither_for_nor_against(corpus: Corpus) -> None:
    truth = corpus.read(0, "seg")
    assert {1, 2} <= set(np.unique(truth).tolist())
    over = np.where(truth == 2, 1, truth)
    chosen = task({"values": (1,), "lesion": True}, ignore=2)
    (found,) = score_case(corpus, 0, chosen, over)
    assert (found.dsc, found.nsd, found.hd95, found.assd) == (1, 1, 0, 0)
    assert (found.volume_error_ml, found.lesion_fp, found.lesion_pq) == (0, 0, 1)
    (counted,) = score_case(corpus, 0, task({"values": (1,)}), over)
    assert counted.dsc < 1 and counted.volume_error_ml > 0


def test_a_task_that_numbers_the_classes_otherwise_is_refused(corpus: Corpus) -> None:
    """Also where each of its values occurs: AMOS and BTCV have the same organs, in other places."""
    names = {int(c["value"]): str(c["name"]) for c in corpus.classes if c["value"]}
    (one, first), (two, second) = names.items()
    right = task({"name": first.upper(), "values": (one,)}, {"name": second, "values": (two,)})
    assert task_problems(corpus, right) == []
    assert task_problems(corpus, task({"name": first, "values": (one, two)})) == []
    assert task_problems(corpus, task({"name": "else", "values": (two,)})) == []
    swapped = task({"name": first, "values": (two,)}, {"name": second, "values": (one,)})
    (problem,) = task_problems(corpus, swapped)
    assert f"{first} is {two} in the task and {one} in the corpus" in problem
    assert f"{second} is {one} in the task and {two} in the corpus" in problem


def test_what_the_corpus_ignores_has_to_be_ignored(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    classes = [{**c, "ignore": c["value"] == 2} for c in corpus.classes]
    monkeypatch.setattr(Corpus, "classes", classes)
    (problem,) = task_problems(corpus, task({"values": (1,)}))
    assert "task.ignore=2" in problem
    assert task_problems(corpus, task({"values": (1,)}, ignore=2)) == []
    assert task_problems(corpus, task({"values": (1, 2)})) == []


def test_a_class_of_several_values_is_their_union(corpus: Corpus) -> None:
    truth = corpus.read(0, "seg")
    found = score_case(corpus, 0, task({"values": (1, 2), "lesion": True}), np.where(truth, 1, 0))
    assert (found[0].dsc, found[0].lesion_tp, found[0].lesion_pq) == (1, 1, 1)


def test_the_worst_distance_is_the_diagonal_of_the_image(corpus: Corpus) -> None:
    truth, meta = corpus.read(0, "seg"), corpus.meta(0)
    found = score_case(corpus, 0, task({"values": (1,)}, {"values": (2,)}), truth * (truth == 1))
    affine = np.asarray(meta["native"]["affine"])
    ends = affine[:3, :3] @ np.diag(meta["native"]["shape"])
    assert [score.status for score in found] == ["scored", "missed"]
    assert found[1].hd95 == found[1].assd == pytest.approx(np.linalg.norm(ends))


def test_what_was_not_annotated_is_not_judged(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a case of a data set whose labels are partial."""
    truth, meta = corpus.read(0, "seg"), corpus.meta(0)
    assert sorted(meta["annotated"]) == [1, 2]
    monkeypatch.setattr(corpus, "meta", lambda i: meta | {"annotated": [1]})
    found = score_case(corpus, 0, task({"values": (1,)}, {"values": (2,)}), truth)
    assert [score.status for score in found] == ["scored", "not_annotated"]
    assert math.isnan(found[1].dsc)


def test_a_copy_of_what_was_seen_taints_as_well(tmp_path: Path) -> None:
    samples = Path(__file__).parents[2] / "samples" / "ixi"
    mine, other = (
        read_nifti(samples / f"IXI{n}_T1.nii.gz") for n in ("013-HH-1212", "014-HH-1236")
    )
    copy = sketch(resample(as_physical(mine), (2.4, 2.4, 2.4))).to_text()
    origin = Origin("pretrained", seen=comparable({"voxel-blake2b-1:00", copy}))
    assert doubt(origin, {"voxel-blake2b-1:11", sketch(mine).to_text()}) == "tainted"
    assert doubt(origin, {"voxel-blake2b-1:11", sketch(other).to_text()}) == ""
    assert doubt(origin, {"voxel-blake2b-1:00"}) == "tainted"
    # Sketches of another version cannot be compared: what was seen is not known.
    assert comparable({"voxel-blake2b-1:00", "local-bits-2:AA"}) is None
    assert doubt(Origin("pretrained"), {sketch(mine).to_text()}) == "unknown"


def test_where_copies_cannot_be_looked_for_is_told() -> None:
    voxels, copies = {"voxel-blake2b-1:11"}, {"voxel-blake2b-1:11", "local-bits-1:AA"}
    assert Seen({"voxel-blake2b-1:00"}).by_voxels_alone(copies)  # of before there were sketches
    seen = Seen({"voxel-blake2b-1:00", "local-bits-1:AA"})
    assert seen.by_voxels_alone(voxels) and not seen.by_voxels_alone(copies)
    assert not Seen().by_voxels_alone(voxels)  # scratch has seen nothing
