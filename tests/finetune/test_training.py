"""A report of a run at any time: begun, under way, killed, ended by an error, done."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_prep.errors import InputError
from finetune import report
from finetune.costs import duration
from finetune.report import make_report
from finetune.training import sort_runs, training_section
from pretrain.events import Events
from pretrain.run_folder import RunFolder
from voxelith import main

WORDS = [
    "backbone=resenc_small", "objective=cnn_mae", "objective.block=4", "crop_size=[8,12,8]",
    "backbone.features=[4,6]", "backbone.strides=[1,2]", "backbone.blocks=[1,1]", "batch_size=2",
    "steps=400", "warmup=2", "log_every=1", "save_every=10", "preview_every=10", "trainer=cpu",
    "trainer.workers=0",
]  # fmt: skip


def words(page: Path) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page.read_text()))


def test_a_pretraining_is_shown_under_way_killed_and_done(
    pretrain_corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "runs" / "first"
    said = ["pretrain", f"corpus={pretrain_corpus}", "run=first", f"runs={tmp_path / 'runs'}"]
    process = subprocess.Popen(
        [sys.executable, "-m", "voxelith", *said, *WORDS],
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    page = tmp_path / "report.html"
    while process.poll() is None and not list(run.glob("checkpoints/step-00000010.pt")):
        time.sleep(0.01)
    assert main(["report", str(run), f"output={page}"]) == 0
    assert re.search(r"Under way: step \d+ of 400, about [\d.]+ (s|min) left", words(page))
    process.kill()
    process.wait()
    assert main(["report", str(run), f"output={page}"]) == 0
    assert re.search(r"Killed at or after step \d+ of 400; the newest checkpoint", words(page))
    saved = RunFolder(run).checkpoints.last_step()
    (run / "checkpoints" / f"step-{saved:08d}.pt").rename(run / "checkpoints/step-00000400.pt")
    with Events(run).start(saved, ranks=1):
        Events(run).write("finished", 400)
    assert main(["report", str(tmp_path / "runs"), f"output={page}"]) == 0
    text = words(page)
    assert "Finished: 400 steps." in text and "Dashed lines" in text
    assert re.search(r"CnnMAE on ResEncUNetEncoder: 400 steps, batches of 2 crops", text)
    assert "voxelith.py pretrain" in text and str(pretrain_corpus) in text  # how to repeat it
    assert text.count("killed") == 1 and "What became of its features" in text
    assert "All scores" not in text and "What pretraining was worth" not in text


def test_each_end_is_said(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text('{"steps": 10, "crop_size": [8, 8, 8], "batch_size": 2}')
    assert "Not under way: step 0 of 10" in training_section(run)["state"]
    with pytest.raises(FloatingPointError), Events(run).start(0, ranks=2):
        raise FloatingPointError
    section = training_section(run)
    assert section["state"].startswith("Ended by FloatingPointError at step 0 of 10")
    Events(run).write("start", 0, ranks=2, job="7")
    with RunFolder(run).lease():
        assert training_section(run)["starts"][-1]["end"] == "under way"
    assert [start["end"] for start in training_section(run)["starts"]] == [
        "FloatingPointError",
        "killed",
    ]
    page = make_report([run], [], None, tmp_path)
    assert "FloatingPointError" in words(page)


def test_what_is_no_run_is_named(tmp_path: Path) -> None:
    (tmp_path / "queued" / "launch").mkdir(parents=True)
    (tmp_path / "queued" / "launch" / "job.json").write_text('{"job": "3"}')
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError) as caught:
        sort_runs([tmp_path / "queued", tmp_path / "empty", tmp_path / "gone"])
    one, two, three = caught.value.problems
    assert "has not started yet" in one and "voxelith launch status" in one
    assert "no config.json" in two and "no such folder" in three


def test_a_finetuning_that_is_yet_to_predict_is_not_finished(tmp_path: Path) -> None:
    """Trained to the end, and killed or at work before all test cases have their scores."""
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.json").write_text('{"steps": 10, "crop_size": [8, 8, 8], "batch_size": 2}')
    (run / "checkpoints/step-00000010.pt").touch()
    assert training_section(run)["state"] == (
        "Trained: 10 steps; not all test cases are predicted yet, and the same command goes on "
        "with them."
    )
    with RunFolder(run).lease():
        assert training_section(run)["state"].endswith("predicted yet, and this is under way.")


def test_pictures_beyond_the_budget_are_left_out_and_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the later trainings first; the page is written all the same."""
    runs = [tmp_path / name for name in ("first", "second", "third")]
    for run in runs:
        (run / "previews").mkdir(parents=True)
        (run / "config.json").write_text('{"steps": 9, "crop_size": [8, 8, 8], "batch_size": 2}')
        for name in ("step-00000003.png", "strip.png"):
            (run / "previews" / name).write_bytes(os.urandom(30_000))
        (run / "health.csv").write_text("step,std,pooled_std,rank,pooled_rank\n1,1,1,2,2\n")
    page = make_report(runs, [], None, tmp_path)
    whole = page.read_text()
    assert whole.count("What the network rebuilds") == 3 and "left out" not in whole
    monkeypatch.setattr(report, "MAX_BYTES", len(whole) - 1)
    make_report(runs, [], None, tmp_path)
    assert page.read_text().count("What the network rebuilds") == 2
    assert page.read_text().count("Features of fixed slices") == 2
    assert "Of 1 training the pictures are left out" in words(page)
    assert len(page.read_text()) < len(whole)
    monkeypatch.setattr(report, "MAX_BYTES", 10)
    make_report(runs, [], None, tmp_path)
    assert "Of 3 trainings the pictures are left out" in words(page)
    assert "in previews/ of each run" in words(page) and "rebuilds" not in words(page)


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.41, "0.41 s"), (59, "59 s"), (119, "120 s"), (3600, "60 min"), (7300, "2 h"),
     (200000, "2.3 days")],
)  # fmt: skip
def test_a_span_in_words(seconds: float, said: str) -> None:
    assert duration(seconds) == said
