"""Validation while a run trains: it changes nothing, and tells what would be reported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from small_runs import killed_at, make_release, settings

from data_prep.corpus import Corpus
from data_prep.errors import CorruptionError
from data_prep.splits import split_from, write_split
from finetune.budget import CURVE, read_curve
from finetune.rows import read_rows
from finetune.settings import FinetuneSettings
from finetune.train import finetune
from pretrain.release import Release


@pytest.fixture(scope="module")
def corpus(labelled_corpus: Path) -> Path:
    found = Corpus.open(labelled_corpus)
    if "three" not in found.splits:
        official = found.split("official")["parts"]
        part = dict.fromkeys(official["train"][:4], "train")
        part |= dict.fromkeys(official["test"][:2], "validation")
        part |= {official["test"][-1]: "test"}
        parts = [part.get(key, "") for key in found.keys]
        write_split(split_from("three", found.keys, found.subjects, parts), found.path / "splits")
    return labelled_corpus


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Release:
    return make_release(tmp_path_factory.mktemp("release") / "r", "vit")


def chosen(release: Release, corpus: Path, runs: Path, **changes: Any) -> FinetuneSettings:
    usual = {"split": "three", "validations": 4, "warmup": 2}
    return settings(release, corpus, runs, **(usual | changes))


def test_a_run_is_the_same_with_and_without(release: Release, corpus: Path, tmp_path: Path) -> None:
    """Drop path draws, batches are read ahead: neither may notice who looks in between."""
    with_it = finetune(chosen(release, corpus, tmp_path, run="with"))
    without = finetune(chosen(release, corpus, tmp_path, run="without", validations=0))
    files = [(run / "model.safetensors").read_bytes() for run in (with_it, without)]
    assert files[0] == files[1]
    rows = [read_rows(run / "rows.csv") for run in (with_it, without)]
    assert repr(rows[0]) == repr(rows[1])
    assert not (without / CURVE).exists()
    curve = read_curve(with_it)
    assert curve is not None
    assert list(curve.steps) == [3, 6, 9, 12]


@pytest.mark.parametrize("ema", [None, 0.9])
def test_the_last_value_is_what_the_run_reports(
    release: Release, corpus: Path, tmp_path: Path, ema: float | None
) -> None:
    """On the same cases; with an average of the weights, the average's."""
    given = chosen(release, corpus, tmp_path, part="validation", ema=ema, lr=3e-2, steps=40)
    run = finetune(given)
    cases: dict[str, list[float]] = {}
    for row in read_rows(run / "rows.csv"):
        cases.setdefault(row.case, []).append(row.dsc)
    reported = 100 * float(np.nanmean([np.nanmean(dice) for dice in cases.values()]))
    curve = read_curve(run)
    assert curve is not None
    assert len(cases) == 2
    assert curve.dice[-1] == pytest.approx(reported, abs=1e-3)  # six digits are written
    assert reported > 1, "a network that finds nothing compares nothing"


def test_a_killed_run_has_each_look_once(release: Release, corpus: Path, tmp_path: Path) -> None:
    given = chosen(release, corpus, tmp_path, steps=16, save_every=6)
    whole = finetune(given.model_copy(update={"run": "whole"}))
    with killed_at(10):  # looks at 4 and 8, a checkpoint at 6
        finetune(given)
    run = finetune(given)
    found, wanted = read_curve(run), read_curve(whole)
    assert found is not None and wanted is not None
    assert (found.steps, found.dice) == (wanted.steps, wanted.dice)


def test_a_split_without_a_validation_part_is_said(
    release: Release, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from small_runs import add_few_split

    add_few_split(corpus)
    run = finetune(chosen(release, corpus, tmp_path, split="few", steps=4))
    assert "has no validation part" in capsys.readouterr().out
    assert read_curve(run) is None


def test_too_few_looks_are_refused(release: Release, corpus: Path, tmp_path: Path) -> None:
    for times in (1, 3, 13):
        with pytest.raises(ValidationError, match=r"needs two; give 0, or 4 up to steps=12"):
            chosen(release, corpus, tmp_path, validations=times)


def test_a_look_that_had_nothing_to_score_is_no_damage(tmp_path: Path) -> None:
    (tmp_path / CURVE).write_text("step,dice\n3,nan\n6,1\n9,2\n12,3\n")
    assert read_curve(tmp_path) is None


def test_a_damaged_curve_is_named(tmp_path: Path) -> None:
    (tmp_path / CURVE).write_text("step,dice\n1,2\n3,x\n")
    with pytest.raises(CorruptionError, match=r"validation\.csv: no curve"):
        read_curve(tmp_path)


def test_the_mode_of_what_is_frozen_comes_back(release: Release, corpus: Path) -> None:
    """A look amid a phase with a frozen encoder, and an average beside it."""
    from finetune.train import build_model, make_plan

    model, _ = build_model(make_plan(chosen(release, corpus, Path("runs"), ema=0.5)))
    model.train()
    model.hold("encoder")
    own = model.encoder
    with model.reported():
        assert model.encoder is not own
        with torch.no_grad():
            assert model.encoder is model.average["encoder"]  # type: ignore[index]
    assert model.encoder is own
    assert not model.encoder.training
    assert model.decoder.training
