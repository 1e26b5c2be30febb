"""Runs whose samples have several groups of crops: refused, told, trained, looked at, replayed."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from test_replay import KEY, settings
from test_replay import first as first_fault

from data_prep.errors import InputError
from pretrain.bench import bench_step
from pretrain.crops import Bases, Pairs
from pretrain.estimate import bare_loop, estimate
from pretrain.failures import Shape
from pretrain.noise import raw_batch
from pretrain.overlap import overlap_fractions
from pretrain.replay import Replay, replay
from pretrain.run_folder import RunFolder
from pretrain.settings import BenchSettings, TrainerSettings
from pretrain.train import build_objective, pretrain

VIEWS = {"_target_": "tests.pretrain.views.Views"}
SIZE = (8, 12, 8)


def test_a_size_that_does_not_fit_is_named(pretrain_corpus: Path, tmp_path: Path) -> None:
    """At the start, before anything is written."""
    for wrong, said in (
        ([4, 9, 4], r"objective\.local_size=\[4, 9, 4\]"),
        ([1, 8, 8], "local_size"),
        ([0, 8, 8], "local_size"),
    ):
        chosen = settings(pretrain_corpus, tmp_path, objective=VIEWS | {"local_size": wrong})
        with pytest.raises(InputError, match=said):
            pretrain(chosen)
    with pytest.raises(InputError, match=r"crop_size=\[8, 12, 9\]"):
        pretrain(settings(pretrain_corpus, tmp_path, objective=VIEWS, crop_size=(8, 12, 9)))
    assert not (tmp_path / "run").exists()


def test_costs_count_all_groups(pretrain_corpus: Path, tmp_path: Path) -> None:
    chosen = settings(pretrain_corpus, tmp_path, objective=VIEWS | {"local": 3})
    found = estimate(chosen, precisions=("float32",))
    assert found.crops == ((2, SIZE), (3, (4, 8, 4)), (2, (16, 24, 16)))
    assert found.voxels == 2 * 768 + 3 * 128 + 2 * 6144
    assert "2 of 8x12x8 and 3 of 4x8x4 and 2 of 16x24x16: 14,208 voxels a sample" in found.text()
    fewer = estimate(chosen.model_copy(update={"objective": VIEWS | {"local": 1}}), precisions=())
    assert found.flops_per_sample > fewer.flops_per_sample
    told = chosen.model_dump() | {"device": "cpu", "channels": 1, "repeats": 1, "discard": 1}
    known = {name: told[name] for name in BenchSettings.model_fields if name in told}
    (measured,) = bench_step(BenchSettings.model_validate(known))["measured"]
    seconds = measured["seconds_per_step"]["median"]
    assert measured["voxels_per_second"] * seconds == pytest.approx(4 * found.voxels)


def test_noise_has_the_groups_and_boxes_of_its_layout(
    pretrain_corpus: Path, tmp_path: Path
) -> None:
    chosen = settings(pretrain_corpus, tmp_path, objective=VIEWS)
    objective = build_objective(chosen, 1)
    loop = bare_loop(chosen, objective)
    batch = loop.to_batch(raw_batch(chosen, 1, 3, objective.crops))
    shapes = {name: tuple(group.image.shape) for name, group in batch.others.items()}
    assert shapes == {"local": (6, 1, 4, 8, 4), "gram": (6, 1, 16, 24, 16)}
    assert batch.box is not None and torch.equal(batch.box, batch.others["gram"].box)  # type: ignore[arg-type]
    seeds = torch.cat([group.seeds for group in (batch, *batch.others.values())])
    assert len(seeds.unique()) == len(seeds) == 18
    bases = loop.to_batch(raw_batch(chosen, 1, 3, Bases(2, (1, 2, 2)))).box
    assert bases is not None
    boxes = bases.unflatten(0, (3, 6))
    shares = overlap_fractions(boxes[:, :2], boxes[:, 2:]).sum(-1)
    torch.testing.assert_close(shares, torch.ones(3, 2))
    pairs = loop.to_batch(raw_batch(chosen, 1, 2, Pairs(2))).box
    assert pairs is not None and len(pairs.flatten(1).unique(dim=0)) == 8


def test_a_run_trains_shows_and_is_replayed(pretrain_corpus: Path, tmp_path: Path) -> None:
    """With workers as without; the replayed step is the step, bit for bit."""
    chosen = settings(
        pretrain_corpus, tmp_path, objective=VIEWS, steps=6, save_every=3, accumulate=2,
        preview_every=6, health={"every": 3}, log_every=1, batch_size=4,
        trainer={"accelerator": "cpu", "workers": 2, "threads": 1},
    )  # fmt: skip
    run = RunFolder(pretrain(chosen))
    made = Replay(run)
    report = made.to(6, Shape(4, 2, 1, 1), "32-true")
    assert report["start"] == 3 and not report["found"]
    saved = run.checkpoints.load()
    found = made.objective.state_dict()
    assert saved is not None
    assert all(torch.equal(found[name], saved["objective"][name]) for name in found)
    assert (run.path / "previews" / "strip.png").is_file()
    with (run.path / "metrics.csv").open() as file:
        whole = list(csv.DictReader(file))
    alone = {"accelerator": "cpu", "workers": 0, "threads": 1}
    pretrain(chosen.model_copy(update={"run": "again", "trainer": TrainerSettings(**alone)}))
    with (tmp_path / "again" / "metrics.csv").open() as file:
        assert [row["loss"] for row in csv.DictReader(file)] == [row["loss"] for row in whole]


def test_a_fault_names_all_crops_of_its_sample(pretrain_corpus: Path, tmp_path: Path) -> None:
    chosen = settings(pretrain_corpus, tmp_path, objective=VIEWS | {"key": KEY, "after": 7})
    step, _, _ = first_fault(chosen)
    with pytest.raises(FloatingPointError, match=f"of step {step}"):
        pretrain(chosen)
    folder = tmp_path / "run" / "failures" / f"step-{step:08d}"
    failure = json.loads((folder / "failure.json").read_text())
    assert len(failure["samples"]) == 4 * 6
    assert [s["crop"] for s in failure["samples"]] == [*range(6)] * 4
    report = replay(tmp_path / "run")
    assert report["found"] and report["module"] == "loss"
    bad = [s for s in report["samples"] if s["bad"]]
    assert {s["key"] for s in bad} == {KEY} and {s["crop"] for s in bad} == set(range(6))
    named = {(s["position"], s["crop"], s["seed"], *s["origin"]) for s in failure["samples"]}
    assert {(s["position"], s["crop"], s["seed"], *s["origin"]) for s in bad} <= named
    assert (folder / "replay.png").stat().st_size > 5000
