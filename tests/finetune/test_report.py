from __future__ import annotations

import base64
import dataclasses
import io
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from arm_rows import make_rows, scratch_own
from matplotlib.colors import to_rgb
from matplotlib.image import imread
from numpy.typing import NDArray
from small_runs import TASK

from data_prep.corpus import Corpus
from data_prep.volume import write_nifti
from finetune.cells import mean_score
from finetune.figures import CLASS_COLOURS, Overlay, draw_cases
from finetune.report import make_report
from finetune.rows import Row, write_rows
from finetune.search import read_searches
from finetune.table import read_table
from finetune.train import _told


def write_runs(folder: Path, rows: list[Row]) -> list[Path]:
    """Run folders as the report reads them, one for each arm and seed; their corpus is gone."""
    runs: dict[Path, list[Row]] = {}
    for row in rows:
        runs.setdefault(folder / f"{row.arm}-{row.seed}", []).append(row)
    for run, members in runs.items():
        run.mkdir()
        write_rows(members, run / "rows.csv")
        facts = {
            "corpus": {"path": str(folder / "gone"), "index_hash": "abc"},
            "identity": {"config_hash": members[0].config_hash},
            "parameters": 1000,
            "versions": {"torch": "2"},
            "command": ["voxelith", "finetune", f"run={run.name}"],
        }
        (run / "run.json").write_text(json.dumps(facts))
        (run / "config.json").write_text("{}")
    return list(runs)


@pytest.mark.parametrize("third", [False, True])
def test_the_third_arm_is_shown_where_there_is_one(third: bool, tmp_path: Path) -> None:
    rows = make_rows("scratch") + make_rows("pretrained", 0.05)
    runs = write_runs(tmp_path, rows + (scratch_own(0.05) if third else []))
    table = read_table(runs)
    page = make_report([], runs, table, tmp_path / "report.html").read_text()
    words = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page))
    main = table.groups[0].main
    assert ("Scratch at its own best" in words) == third
    assert ("Scratch, own best Difference to it" in words) == third
    if third:
        assert main.own is not None and main.against_own is not None
        d = f"{main.against_own.mean:+.1f}".replace("-", "−")
        assert f"Scratch at its own best {main.own.mean:.1f}" in words
        assert f"Difference to it {d}" in words
        # The verdict is about the scratch that is harder to beat, and so is the sentence below it.
        assert "No clear difference" in words
        assert "of the difference to scratch at its own best holds zero" in words
    else:
        assert "Pretraining helped" in words
        assert "The 95 % interval lies on one side of zero" in words


def test_weights_without_values_and_changed_ones_are_called_out(tmp_path: Path) -> None:
    """At the top, and each of them below; runs that agree are told once, the others not at all."""
    rows = make_rows("scratch") + make_rows("pretrained", 0.05)
    runs = write_runs(tmp_path, rows)
    table = read_table(runs)
    plain = make_report([], runs, table, tmp_path / "plain.html").read_text()
    assert "Weights without values" not in plain and "Adapted weights" not in plain
    assert "not taken as they are" not in plain
    constant = [f"encoder.<i>{n}" for n in range(5)]
    adapted = {"encoder.stem.weight": "1 to 3 channels: 1/3 each"}
    note = {"covered": 0.97, "constant": constant, "adapted": adapted}
    for run in runs:
        pretrained = run.name.startswith("pretrained")
        (run / "load_report.json").write_text(json.dumps(note if pretrained else {"covered": 0.0}))
        said = {"features_equal_release": pretrained}
        (run / "step_zero.json").write_text(json.dumps(said))
    page = make_report([], runs, table, tmp_path / "report.html").read_text()
    top, _, rest = page.partition("<section")
    assert top.count('class="notice"') == 2
    assert "5 tensors of the checkpoint with one number throughout" in top
    assert "encoder.&lt;i&gt;0" in top and "encoder.&lt;i&gt;4" not in top
    assert "1 tensor changed to fit these data" in top
    assert "encoder.stem.weight (1 to 3 channels: 1/3 each)" in top
    assert "encoder.&lt;i&gt;4</td><td>without values" in rest and "<i>" not in page
    assert "encoder.stem.weight</td><td>adapted: 1 to 3 channels: 1/3 each" in rest
    names = ", ".join(sorted(run.name for run in runs if run.name.startswith("pretrained")))
    assert f'<p class="lead">{names}</p>' in rest and rest.count("not taken as they are") == 1
    cells = re.findall(r"<td class=\"n\">(?:97|0)%</td><td class=\"n\">([^<]*)</td>", rest)
    assert sorted(set(cells)) == ["others", "the release&#39;s"]


def test_one_run_has_one_score_wherever_it_is_told(tmp_path: Path) -> None:
    """Subjects have unequally many cases, a case lacks a class, and pretraining has seen one."""
    told = {"c0": ("s0", 0.5, 0.7), "c1": ("s1", 0.9, math.nan), "c2": ("s1", 0.8, 0.6)}
    told["c3"] = ("s2", 0.1, 0.1)
    rows = [
        dataclasses.replace(
            make_rows("pretrained")[n], case=case, subject=subject, dsc=dice,
            status="tainted" if case == "c3" else "scored",
        )
        for case, (subject, *found) in told.items()
        for n, dice in enumerate(found)
    ]  # fmt: skip
    mean = 100 * np.mean([0.6, np.mean([0.9, 0.7])])  # over rows 52.9, over cases 57.5
    assert mean_score(rows) == pytest.approx(mean) == pytest.approx(70)
    (run,) = write_runs(tmp_path, rows)
    facts = json.loads((run / "run.json").read_text()) | {"trained": {"lr": 0.01}}
    (run / "run.json").write_text(json.dumps(facts))
    table = read_table([run])
    assert table.groups[0].main.pretrained is not None
    assert table.groups[0].main.pretrained.mean == pytest.approx(mean)
    (search,) = read_searches(tmp_path).values()
    assert search.best("pretrained") == pytest.approx((0.01, mean))
    page = make_report([], [run], table, tmp_path / "report.html").read_text()
    assert '<td class="n">Dice 70.0</td><td class="n">3</td>' in page
    assert _told(rows) == "Dice 70.0 over 3 cases (1 that pretraining has seen left out)"


def test_cases_are_drawn_of_runs_whose_predictions_and_corpus_are_there(
    labelled_corpus: Path, tmp_path: Path
) -> None:
    """One label value is the largest of a byte: values are no bytes while they are looked up."""
    corpus = Corpus.open(labelled_corpus)
    keys = dict(zip([f"c{n}" for n in range(3)], corpus.keys, strict=False))
    rows = make_rows("scratch", seeds=2, cases=3) + make_rows("pretrained", seeds=2, cases=3)
    runs = write_runs(tmp_path, [dataclasses.replace(row, case=keys[row.case]) for row in rows])
    for run in runs:
        facts = json.loads((run / "run.json").read_text())
        facts["corpus"] = {"path": str(labelled_corpus), "index_hash": corpus.index_hash}
        (run / "run.json").write_text(json.dumps(facts))
        (run / "config.json").write_text(json.dumps({"task": TASK | {"ignore": 255}}))
        (run / "predictions").mkdir()
        for key in keys.values():
            volume = corpus.volume(corpus.position(key))
            labels = corpus.read(corpus.position(key), "seg").astype(np.uint8)
            labels[:2] = 255
            write_nifti(labels, volume.native, run / "predictions" / f"{key}.nii.gz")
    table = read_table(runs)

    def page() -> str:
        return make_report([], runs, table, tmp_path / "report.html").read_text()

    assert "test case of the pretrained arm (seed 0, 4 labels), every arm" in page()
    next((tmp_path / "pretrained-0" / "predictions").iterdir()).unlink()
    assert "test case of the pretrained arm (seed 1, 4 labels), every arm" in page()
    shutil.rmtree(tmp_path / "scratch-1" / "predictions")
    assert "test case of the pretrained arm (seed 1, 4 labels)." in page()
    for run in runs:
        (run / "run.json").write_text(
            (run / "run.json").read_text().replace(corpus.index_hash, "x")
        )
    assert "beside the truth" not in page()


def pixels(prediction: NDArray[np.uint8], truth: NDArray[np.uint8], colour: str) -> int:
    """How many pixels of a colour the picture of a black image has, without those of the legend."""
    black = np.zeros(truth.shape, np.float32)
    case = Overlay("worst", black, (1, 1, 1), truth, {"scratch": prediction}, {"scratch": 50.0})
    code = draw_cases([case], ["a"]).removeprefix("data:image/png;base64,")
    picture = imread(io.BytesIO(base64.b64decode(code)))[..., :3]
    picture = picture[: picture.shape[0] * 3 // 4]
    return int((abs(picture - np.array(to_rgb(colour))) < 0.02).all(axis=-1).sum())


def test_cases_are_drawn_with_contours_of_truth_and_prediction() -> None:
    truth = np.zeros((24, 24, 24), np.uint8)
    truth[6:14, 6:14, 6:14] = 1
    shifted, nothing = np.roll(truth, 2, axis=(0, 1, 2)), np.zeros_like(truth)
    assert pixels(shifted, truth, CLASS_COLOURS[0]) > 1000
    assert pixels(nothing, truth, CLASS_COLOURS[0]) == 0
    assert pixels(nothing, truth, "white") > pixels(nothing, nothing, "white") + 1000
