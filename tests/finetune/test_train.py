"""The whole of finetune on real scans, with a network of a few thousand weights."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from safetensors.numpy import load_file
from small_runs import add_split, write_encoder

from data_prep.corpus import Corpus
from data_prep.errors import InputError
from finetune.done_before import take_over
from finetune.evaluate import evaluate
from finetune.formats import make_table
from finetune.report import make_report
from finetune.rows import read_rows, write_rows
from finetune.settings import EvaluateSettings, FinetuneSettings
from finetune.table import read_table
from finetune.train import finetune, is_finished, make_plan
from pretrain.preemption import REQUEUE_CODE
from pretrain.run_folder import RunFolder

TASK = {
    "name": "hippocampus",
    "classes": [
        {"name": "anterior", "values": [1], "tolerance_mm": 1.0},
        {"name": "posterior", "values": [2], "tolerance_mm": 1.0},
    ],
    "flip": [False, False, True],
}
BACKBONE: dict[str, Any] = {
    "name": "resenc.ResEncUNetEncoder",
    "args": {"in_channels": 1, "features": [4, 8], "strides": [1, 2], "blocks": [1, 1]},
}


@dataclasses.dataclass
class Stage:
    """What the tests share: a corpus with a small split, a release, and both arms of one seed."""

    folder: Path
    corpus: Path
    release: Path
    test_keys: list[str]

    def settings(self, **changes: Any) -> FinetuneSettings:
        return FinetuneSettings.model_validate(
            {
                "task": TASK,
                "corpus": self.corpus,
                "ckpt": self.release,
                "labels": 2,
                "split": "tiny",
                "runs": self.folder / "runs",
                "steps": 8,
                "batch_size": 2,
                "lr": 5e-3,
                "warmup": 2,
                "crop_size": [32, 48, 32],
                "trainer": {"accelerator": "cpu", "precision": "32-true", "workers": 0},
                **changes,
            }
        )

    def run(self, init: str, seed: int = 0) -> Path:
        return finetune(self.settings(init=init, seed=seed, run=f"{init}-{seed}"))


@pytest.fixture(scope="module")
def stage(labelled_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Stage:
    folder = tmp_path_factory.mktemp("finetune")
    add_split(labelled_corpus, "tiny", 6, 4)
    corpus = Corpus.open(labelled_corpus)
    test = corpus.split("tiny")["parts"]["test"]
    release = write_encoder(folder / "release", BACKBONE, prints=[corpus.fingerprints()[test[0]]])
    return Stage(folder, labelled_corpus, release, test)


@pytest.fixture(scope="module")
def arms(stage: Stage) -> list[Path]:
    return [stage.run(init, seed) for seed in (0, 1, 2) for init in ("pretrained", "scratch")]


def test_a_run_holds_all_that_it_should(stage: Stage, arms: list[Path]) -> None:
    run = arms[0]
    names = {path.name for path in run.iterdir()}
    assert names >= {
        "config.json", "run.json", "metrics.csv", "load_report.json", "model.json",
        "model.safetensors", "predictions", "rows.csv",
    }  # fmt: skip
    assert not names & {"lease.json", "checkpoints"}
    rows = read_rows(run / "rows.csv")
    assert [(r.case, r.class_name) for r in rows] == [
        (key, name) for key in stage.test_keys for name in ("anterior", "posterior")
    ]
    assert {r.arm for r in rows} == {"pretrained"}
    assert {(r.n_labels, r.seed, r.pretrain_seed, r.steps) for r in rows} == {(2, 0, 5, 8)}
    said = json.loads((run / "run.json").read_text())
    cost, corpus = said["cost"], Corpus.open(stage.corpus)
    people = {corpus.subjects[corpus.position(key)] for key in said["label_keys"]}
    assert said["label_subjects"] == len(people) == 1  # both sides of one
    alone = [json.loads((r / "run.json").read_text())["compared_by_voxels_alone"] for r in arms[:2]]
    assert alone == [list(stage.test_keys), []]  # phantoms are too small for sketches
    assert (said["precisions"], said["validation_seen"]) == (["32-true"], [])
    assert 0 < cost["train_seconds"] < 600 and 0 < cost["predict_seconds"] < 600
    assert cost["flops"] > 0 and cost["peak_mib"] > 0 and cost["parameters"] > 0
    assert {r.pretrain_recipe for r in rows} == {"abc/encoder"}
    assert {r.pretrain_recipe for r in read_rows(arms[1] / "rows.csv")} == {""}
    corpus = Corpus.open(stage.corpus)
    for key in stage.test_keys:
        image = nib.load(run / "predictions" / f"{key}.nii.gz")
        native = corpus.meta(corpus.position(key))["native"]
        assert list(image.shape) == native["shape"]
        assert np.allclose(image.affine, native["affine"])


def test_twins_differ_in_the_encoder_alone(stage: Stage, arms: list[Path]) -> None:
    rows = [read_rows(run / "rows.csv")[0] for run in arms[:2]]
    assert rows[0].config_hash == rows[1].config_hash
    facts = [json.loads((run / "run.json").read_text()) for run in arms[:2]]
    assert facts[0]["label_keys"] == facts[1]["label_keys"]
    reports = [json.loads((run / "load_report.json").read_text()) for run in arms[:2]]
    assert reports[0]["covered"] == 1.0 and reports[1]["covered"] == 0.0
    weights = set(load_file(arms[0] / "model.safetensors"))
    for report in reports:
        listed = [*report["copied"], *report["new"], *report["adapted"], *report["skipped"]]
        assert sorted(listed) == sorted(weights)
    assert all(name.startswith("decoder.") for name in reports[0]["new"])


def test_the_same_seed_gives_the_same_weights(stage: Stage, arms: list[Path]) -> None:
    again = finetune(stage.settings(seed=0, run="again"))
    one, other = (load_file(run / "model.safetensors") for run in (arms[0], again))
    assert all(np.array_equal(one[name], other[name]) for name in one)
    assert read_rows(again / "rows.csv") == read_rows(arms[0] / "rows.csv")


def test_a_finished_run_is_left_alone_and_another_is_refused(
    stage: Stage, arms: list[Path]
) -> None:
    before = (arms[0] / "rows.csv").stat().st_mtime_ns
    stage.run("pretrained", 0)
    assert (arms[0] / "rows.csv").stat().st_mtime_ns == before
    with pytest.raises(InputError, match=r"holds another run \(steps: 8 -> 9\); choose another"):
        finetune(stage.settings(seed=0, run=arms[0].name, steps=9))


def test_seen_cases_are_marked(stage: Stage, arms: list[Path]) -> None:
    rows = read_rows(arms[0] / "rows.csv")
    assert {r.case for r in rows if r.status == "tainted"} == {stage.test_keys[0]}
    assert all(r.status == r.outcome for r in rows if r.case != stage.test_keys[0])
    assert all(r.status == r.outcome for r in read_rows(arms[1] / "rows.csv"))


def test_evaluate_scores_kept_predictions_alike(
    stage: Stage, arms: list[Path], tmp_path: Path
) -> None:
    settings = {
        "predictions": arms[0] / "predictions",
        "corpus": stage.corpus,
        "task": TASK,
        "split": "tiny",
        "output": tmp_path / "scores",
    }
    path = evaluate(EvaluateSettings.model_validate(settings))
    ours = read_rows(arms[0] / "rows.csv")
    for one, other in zip(read_rows(path), ours, strict=True):
        assert (one.case, one.class_name, one.outcome) == (
            other.case,
            other.class_name,
            other.outcome,
        )
        for name in ("dsc", "nsd", "hd95", "assd", "volume_error_ml", "volume_error_relative"):
            assert np.allclose(getattr(one, name), getattr(other, name), equal_nan=True)
        assert (one.arm, one.status) == ("external", "unknown")
    with pytest.raises(InputError, match="4 of 4 cases"):
        evaluate(EvaluateSettings.model_validate({**settings, "predictions": tmp_path}))


def test_truth_itself_scores_perfectly(stage: Stage, samples: Path, tmp_path: Path) -> None:
    settings = {
        "predictions": samples / "hippocampus/labels",
        "corpus": stage.corpus,
        "task": TASK,
        "split": "tiny",
        "output": tmp_path,
    }
    rows = read_rows(evaluate(EvaluateSettings.model_validate(settings)))
    assert {(r.outcome, r.dsc, r.nsd, r.hd95) for r in rows} == {("scored", 1.0, 1.0, 0.0)}


def test_what_does_not_fit_is_refused_together(stage: Stage, pretrain_corpus: Path) -> None:
    wrong = {"name": "abdomen", "classes": [{"name": "liver", "values": [5], "tolerance_mm": 3}]}
    with pytest.raises(InputError, match=r"liver.*\[5\].*1 .*2 "):
        finetune(stage.settings(task=wrong))
    with pytest.raises(InputError, match="no labels"):
        finetune(stage.settings(corpus=pretrain_corpus))
    with pytest.raises(InputError, match="holds 6 cases"):
        finetune(stage.settings(labels="7"))
    with pytest.raises(InputError, match="no case in its validation part"):
        finetune(stage.settings(part="validation"))
    with pytest.raises(InputError, match="crop_size"):
        finetune(stage.settings(crop_size=[15, 24, 16], run="odd"))
    assert not (stage.folder / "runs/odd").exists()


def test_table_and_report_stand_on_their_own(
    stage: Stage, arms: list[Path], tmp_path: Path
) -> None:
    table = make_table(arms, tmp_path)
    group = table.groups[0]
    assert group.main.difference is not None
    assert (group.main.difference.cases, group.main.difference.draws) == (3, 3)
    assert any("1 test cases were seen" in note for note in group.notes)
    path = make_report([], arms, table, tmp_path, "demo budget: <no> evidence")
    page = path.read_text()
    assert len(page) < 10_000_000
    assert "demo budget: &lt;no&gt; evidence" in page
    assert "<strong>3 (" in page and "<span>Seeds</span><strong>3</strong>" in page
    # Nothing is fetched: every address is a data URI, and there is no script.
    addresses = re.findall(r'(?:src|href)\s*=\s*["\']?([^"\'\s>]+)', page)
    assert addresses and all(a.startswith("data:") for a in addresses)
    assert not re.search(r"<script|<link|@import|url\(", page)


def test_a_report_of_runs_whose_cases_were_all_seen_says_so(
    arms: list[Path], tmp_path: Path
) -> None:
    copies = []
    for run in arms:
        copy = tmp_path / run.name
        shutil.copytree(run, copy)
        rows = [dataclasses.replace(row, status="tainted") for row in read_rows(copy / "rows.csv")]
        write_rows(rows, copy / "rows.csv")
        copies.append(copy)
    page = make_report([], copies, read_table(copies), tmp_path / "report.html").read_text()
    assert "Every test case was seen in pretraining" in page


def test_scores_of_an_older_metric_are_made_anew_without_training(
    stage: Stage, arms: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(arms[0], tmp_path / arms[0].name))
    rows = read_rows(run / "rows.csv")
    old = [dataclasses.replace(row, metric_version=1, dsc=0.9) for row in rows]
    write_rows(old, run / "rows.csv")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    chosen = stage.settings(init="pretrained", seed=0, run=run.name).model_copy(
        update={"runs": tmp_path}
    )
    assert not is_finished(RunFolder(run), make_plan(chosen))
    assert finetune(chosen) == run
    assert "scored anew" in capsys.readouterr().out
    assert read_rows(run / "rows.csv") == rows
    after = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert {p for p in before if before[p] != after[p]} == {run / "rows.csv"}
    assert before.keys() == after.keys()
    # An older format as well; and what is not there is not made up.
    lines = (run / "rows.csv").read_text().splitlines()
    position = lines[0].split(",").index("format")
    old_lines = [line.split(",") for line in lines]
    for line in old_lines[1:]:
        line[position] = "1"
    (run / "rows.csv").write_text("".join(",".join(line) + "\n" for line in old_lines))
    with pytest.raises(InputError, match=r"row format 1, expected 2.*trains nothing"):
        read_table([run])
    finetune(chosen)
    assert read_rows(run / "rows.csv") == rows
    write_rows(old, run / "rows.csv")
    (run / "predictions" / f"{stage.test_keys[0]}.nii.gz").unlink()
    with pytest.raises(InputError, match=r"(?s)cannot be made anew.*" + stage.test_keys[0]):
        finetune(chosen)


def test_a_signal_while_it_predicts_keeps_what_is_predicted(stage: Stage, tmp_path: Path) -> None:
    """As a task of a job: preempted between two cases, it goes on with the next of them."""
    add_split(stage.corpus, "long", 2, 16)
    words = [
        f"corpus={stage.corpus}", f"ckpt={stage.release}", "task=hippocampus", "labels=2",
        "split=long", "steps=2", "warmup=1", "batch_size=2", "crop_size=[32,48,32]", "trainer=cpu",
        "trainer.workers=0", f"runs={tmp_path}", "lr=5e-3",
    ]  # fmt: skip
    command = [sys.executable, "-m", "voxelith", "finetune", *words]
    job = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_JOB_NAME": "x"}
    assert subprocess.run([*command, "run=whole"]).returncode == 0
    predicted = tmp_path / "cut" / "predictions"
    process = subprocess.Popen([*command, "run=cut"], env=os.environ | job)
    while process.poll() is None and not list(predicted.glob("[!.]*")):
        time.sleep(0.002)
    process.send_signal(signal.SIGUSR2)
    assert process.wait() == REQUEUE_CODE
    first = {path.name: path.stat().st_mtime_ns for path in predicted.glob("[!.]*")}
    assert 0 < len(first) < 16 and not (tmp_path / "cut" / "rows.csv").exists()
    assert subprocess.run([*command, "run=cut"], env=os.environ | job).returncode == 0
    assert {name: (predicted / name).stat().st_mtime_ns for name in first} == first
    whole, cut = (read_rows(tmp_path / name / "rows.csv") for name in ("whole", "cut"))
    assert len(whole) == 32 and str(cut) == str(whole)


def test_what_a_twin_of_another_recipe_was_trained_as_is_not_trained_again(
    stage: Stage, arms: list[Path]
) -> None:
    """Scratch at its own best is such a twin, seed for seed: its answers, under the arm's name."""
    other = {"init": "scratch", "lr": 1e-3, "recipe_of": "own"}
    other["search"] = {"lr": [1e-3, 2e-3, 5e-3], "draws": 1}
    taken = finetune(stage.settings(**other, own={"lr": 5e-3}, seed=1, run="own-1"))
    twin = stage.folder / "runs" / "scratch-1"
    said, whose = (json.loads((run / "run.json").read_text()) for run in (taken, twin))
    assert said["trained_in"] == twin.name and said["cost"] == whose["cost"]
    assert said["identity"]["recipe_hash"] == whose["identity"]["recipe_hash"]
    assert said["identity"]["config_hash"] != whose["identity"]["config_hash"]
    mine, theirs = read_rows(taken / "rows.csv"), read_rows(twin / "rows.csv")
    renamed = {"arm": "scratch", "config_hash": whose["identity"]["config_hash"]}
    assert {row.arm for row in mine} == {"scratch-own"}
    assert [dataclasses.replace(row, **renamed) for row in mine] == theirs
    for name in ("model.safetensors", "metrics.csv"):
        assert (taken / name).read_bytes() == (twin / name).read_bytes()
    shutil.rmtree(taken)
    # Of another rate, draw, number of looks or way to compute it is trained.
    threads = {"accelerator": "cpu", "precision": "32-true", "workers": 0, "threads": 1}
    changes = [{"own": {"lr": 2e-3}}, {"label_seed": 7}, {"validations": 4}, {"trainer": threads}]
    for n, change in enumerate(changes):
        chosen = {"own": {"lr": 5e-3}, "seed": 1, **other, **change}
        run = finetune(stage.settings(**chosen, run=f"own-1-{n}"))
        assert "trained_in" not in json.loads((run / "run.json").read_text())
        shutil.rmtree(run)


@pytest.mark.parametrize("kind", ["copyfileobj", "copytree"])
def test_what_is_taken_over_is_whole_or_not_there(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed within a file, or a folder: half a network, or some answers, look like a run's own."""
    twin, run = tmp_path / "twin", RunFolder(tmp_path / "run")
    (twin / "predictions").mkdir(parents=True)
    (twin / "predictions" / "a.nii.gz").write_bytes(b"label map")
    (twin / "model.safetensors").write_bytes(b"weights")
    (twin / "run.json").write_text('{"cost": {}}')
    run.path.mkdir()

    def half(source: Any, target: Any, **_: object) -> None:
        if kind == "copytree":
            Path(target).mkdir(exist_ok=True)
            (Path(target) / "a.nii.gz").write_bytes(b"lab")
        else:
            target.write(b"wei")
        raise RuntimeError("killed")

    with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="killed"):
        patched.setattr(shutil, kind, half)
        take_over(twin, run)
    name = "predictions" if kind == "copytree" else "model.safetensors"
    assert not (run.path / name).exists()
    take_over(twin, run)
    assert (run.path / "model.safetensors").read_bytes() == b"weights"
    assert (run.path / "predictions" / "a.nii.gz").read_bytes() == b"label map"
    assert json.loads((run.path / "run.json").read_text()) == {"cost": {}, "trained_in": "twin"}


def _rename(twin: Path, name: str) -> None:
    (twin / name).rename(twin / "kept")


def _tell(twin: Path, **other: dict[str, str]) -> None:
    """Another version of something, or another device."""
    file = twin / "run.json"
    facts = json.loads(file.read_text())
    file.write_text(json.dumps(facts | {name: facts[name] | new for name, new in other.items()}))


UNLIKE: dict[str, Callable[[Path], None]] = {
    "unfinished": lambda twin: _rename(twin, "rows.csv"),
    "weights cleared": lambda twin: _rename(twin, "model.safetensors"),
    "answers cleared": lambda twin: next((twin / "predictions").iterdir()).unlink(),
    "another torch": lambda twin: _tell(twin, versions={"torch": "2.0"}),
    "another device": lambda twin: _tell(twin, cost={"device": "NVIDIA H200"}),
}


@pytest.mark.parametrize("unlike", UNLIKE)
def test_what_is_not_whole_or_was_computed_otherwise_is_not_taken_over(
    stage: Stage, arms: list[Path], unlike: str, tmp_path: Path
) -> None:
    """The run is trained, and gives what taking over gives."""
    other = {"init": "scratch", "lr": 1e-3, "recipe_of": "own", "own": {"lr": 5e-3}, "seed": 1}
    other["search"] = {"lr": [1e-3, 5e-3], "draws": 1}
    found = {}
    for name, change in (("alike", None), ("unlike", UNLIKE[unlike])):
        twin = tmp_path / name / "twin"
        shutil.copytree(arms[3], twin)
        if change is not None:
            change(twin)
        run = finetune(stage.settings(**other, runs=tmp_path / name, run="own"))
        taken = "trained_in" in json.loads((run / "run.json").read_text())
        assert taken == (change is None)
        found[name] = read_rows(run / "rows.csv")
    assert found["alike"] == found["unlike"]
