"""A plan adds up what was measured, leaves nothing behind, and is of the run that was asked for."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_runs import environment
from test_loop import RESENC, settings
from test_stages import words as recipe_words

from data_prep.errors import InputError
from pretrain.plan import STEPS, Measured, _loader_alone, added_up, as_text, plan
from pretrain.run_folder import RunFolder
from pretrain.settings import PlanSettings
from pretrain.train import prepare
from voxelith import main

ONE = Measured(
    steps=STEPS, ranks=1, per_step=2.0, data_wait=0.25, start=30.0, look=4.0, picture=3.0,
    save=5.0, checkpoint=1000, preview=10, memory=2**30, loader=20.0, parameters=250_000_000,
)  # fmt: skip


def chosen(corpus: Path, runs: Path, **changes: Any) -> PlanSettings:
    base = settings(corpus, runs, "planned").model_dump()
    return PlanSettings.model_validate(base | changes)


def test_a_plan_is_the_sum_of_its_parts(pretrain_corpus: Path, tmp_path: Path) -> None:
    asked = chosen(
        pretrain_corpus, tmp_path, steps=10_000, save_every=500, save_minutes=60, preview_every=1000
    )
    found = added_up(asked, ONE)
    assert found.parts == {
        "start": 30,
        "computing": 15_000,
        "waiting for data": 5_000,
        "saving": 20 * 5,
        # Looks cost at most 2 %: every 100 steps of 2 s, and at both ends; a picture also before.
        "looks and pictures": 102 * 4 + 11 * 3,
    }
    assert found.seconds == sum(found.parts.values())
    assert found.device_hours == found.seconds / 3600
    assert found.disk == 3 * 1000 + 11 * 10
    # The clock saves more often where steps are slow: every 300 of them in ten minutes.
    by_clock = added_up(asked.model_copy(update={"save_minutes": 10.0}), ONE)
    assert by_clock.saves == 34


def test_a_loader_is_counted_in_samples_whatever_crops_they_have(
    pretrain_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a step is: VoCo's samples have ten crops and more."""
    now = itertools.count()
    monkeypatch.setattr("pretrain.plan.time.perf_counter", lambda: float(next(now)))
    pairs = {"_target_": "pretrain.objectives.simclr.SimCLR", "hidden_dim": 8, "out_dim": 8}
    found = [
        _loader_alone(prepare(chosen(pretrain_corpus, tmp_path, **more)))
        for more in ({}, {"objective": pairs})
    ]
    assert found == [4 * (STEPS - 1)] * 2  # in a second by this clock, after the first batch


def test_gradients_between_nodes_are_told_as_a_bound(pretrain_corpus: Path, tmp_path: Path) -> None:
    machine = {"accelerator": "cpu", "devices": 8, "nodes": 8, "workers": 4}
    asked = chosen(pretrain_corpus, tmp_path, trainer=machine, batch_size=256)
    text = as_text("", asked, added_up(asked, ONE))
    # A ring moves 2 (N - 1) / N of the bytes into each node: 1.97 GB at 12.5 GB/s.
    assert "a step gains at most 0.16 s (8%) at 100 Gbit/s Ethernet" in text
    assert "on 64 ranks" in text and "on 1 of 64 ranks" in text
    # The loader of a rank gives 20 samples/s, and a step takes 4 of them in 2 s.
    assert "10 times what it takes" in text
    more = as_text("", asked, added_up(asked, replace(ONE, ranks=64)))
    assert "not measured" not in more


def test_the_first_steps_are_those_of_the_run_and_nothing_stays(
    pretrain_corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = chosen(pretrain_corpus, tmp_path / "runs", steps=1000, preview_every=100)
    (found,) = plan({"": asked})["stages"].values()
    one = found["measured"]
    assert one["steps"] == STEPS and one["per_step"] > 0 and 0 <= one["data_wait"] < 1
    assert one["checkpoint"] > 10_000 and one["look"] > 0 and one["picture"] > 0
    assert one["start"] > 0 and one["loader"] > 0 and one["memory"] > 2**24
    assert found["seconds"] > 1000 * one["per_step"]
    assert list((tmp_path / "runs").iterdir()) == []
    said = capsys.readouterr().out
    assert re.search(r"planned: [\d.e-]+ hours for 1,000 steps of 4 samples on 1 rank,", said)


def test_a_plan_does_not_take_another_ones_folder(pretrain_corpus: Path, tmp_path: Path) -> None:
    """Both are called `planned` where nobody gives a name."""
    asked = chosen(pretrain_corpus, tmp_path / "runs")
    other = tmp_path / "runs" / f".plan-{asked.run}"
    with RunFolder(other).lease():
        (other / "x").mkdir()
        with pytest.raises(InputError, match="is being written by process"):
            plan({"": asked})
        assert (other / "x").is_dir()


def test_threads_are_set_where_a_training_starts_and_not_by_looking_at_it(
    pretrain_corpus: Path, tmp_path: Path
) -> None:
    before = torch.get_num_threads()
    machine = {"accelerator": "cpu", "workers": 0, "threads": before + 1}
    try:
        ready = prepare(chosen(pretrain_corpus, tmp_path, steps=1, trainer=machine))
        assert torch.get_num_threads() == before
        ready.train()
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)


def test_two_ranks_plan_a_recipe_in_stages(pretrain_corpus: Path, tmp_path: Path) -> None:
    words = ["plan", *recipe_words(pretrain_corpus, tmp_path)[1:]]
    words += ["trainer.devices=2", "batch_size=4"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [sys.executable, *torchrun, "-m", "voxelith", *words],
        env=environment(), text=True, capture_output=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for told in (r"global: .* 3 steps of 4", r"local: .* 400 steps of 4", "all 2 stages: "):
        assert len(re.findall(told, done.stdout)) == 1, done.stdout
    assert list((tmp_path / "runs").iterdir()) == []


def test_a_rank_keeps_its_micro_batch_where_there_are_fewer(
    pretrain_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pretrain.plan import _short

    for name in ("SLURM_PROCID", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    machine = {"accelerator": "cpu", "devices": 8, "nodes": 4, "workers": 0, "threads": 1000}
    asked = chosen(pretrain_corpus, tmp_path, trainer=machine, batch_size=128, accumulate=2)
    short = _short(asked, tmp_path)
    assert (short.trainer.devices, short.trainer.nodes, short.accumulate) == (1, 1, 2)
    assert short.batch_size == 4  # two micro-batches of two, as on each of the 32 ranks
    monkeypatch.setenv("SLURM_PROCID", "0")  # in a job of the cluster it is measured on all
    assert _short(asked, tmp_path).batch_size == 128


def test_what_is_wrong_is_said_before_anything_runs(
    pretrain_corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"corpus={pretrain_corpus}", f"runs={tmp_path / 'runs'}", "lr=-1", "objectiv=mae"]
    assert main(["plan", *words]) == 2
    said = capsys.readouterr().err
    assert "lr" in said and "objectiv" in said and not (tmp_path / "runs").exists()
    assert RESENC["_target_"] not in said
