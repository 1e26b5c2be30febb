"""The watch sees a collapse, sees none where there is none, and leaves the run as it was."""

from __future__ import annotations

import csv
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from data_prep.corpus import Corpus
from pretrain.events import Events
from pretrain.health import CollapseError, Health, Spread, collapse, rankme, spread
from pretrain.objective import Batch, Losses, Objective, evaluating
from pretrain.settings import HealthSettings, PretrainSettings
from pretrain.tracking import Journal, read_lines
from pretrain.train import make_dataset, pretrain
from voxelith import main

RESENC = {
    "_target_": "pretrain.backbones.resenc.ResEncUNetEncoder",
    "features": [4, 8],
    "strides": [1, 2],
    "blocks": [1, 1],
}
CNN_MAE = {"_target_": "pretrain.objectives.cnn_mae.CnnMAE", "block": 4}
VIT = {
    "_target_": "pretrain.backbones.vit.ViT3D",
    "patch_size": 4,
    "embed_dim": 24,
    "depth": 2,
    "num_heads": 2,
    "drop_path": 0.3,
}
MAE = {
    "_target_": "pretrain.objectives.mae.MAE",
    "decoder_dim": 24,
    "decoder_depth": 1,
    "decoder_heads": 2,
}


class Constant(Objective):
    """Pulls all features to one vector: the shortest way to a collapse."""

    def __init__(self, *, encoder: Any) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, batch: Batch, progress: float) -> Losses:
        deepest = self.encoder(batch.image)[-1]
        goal = torch.ones_like(deepest)
        loss = (deepest - goal).square().mean()
        return Losses(loss, {"distance": loss.detach()})


def settings(corpus: Path, runs: Path, run: str = "run", **changes: Any) -> PretrainSettings:
    chosen: dict[str, Any] = {
        "corpus": corpus,
        "run": run,
        "runs": runs,
        "backbone": RESENC,
        "objective": CNN_MAE,
        "trainer": {"accelerator": "cpu", "workers": 0, "threads": 1},
        "crop_size": (8, 12, 8),
        "steps": 12,
        "batch_size": 4,
        "lr": 1e-3,
        "warmup": 4,
        "log_every": 5,
        "save_every": 6,
        "health": {"every": 4},
    }
    return PretrainSettings.model_validate(chosen | changes)


def rows(run: Path) -> list[dict[str, float]]:
    with (run / "health.csv").open() as file:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]


def weights(run: Path) -> dict[str, Tensor]:
    path = sorted((run / "checkpoints").glob("step-*.pt"))[-1]
    return dict(torch.load(path, weights_only=True)["objective"])


# The measures, in closed form.


def test_rankme_is_the_papers_formula(seed: int) -> None:
    """Against the singular values themselves, for wide and for tall matrices."""
    rng = np.random.default_rng(seed)
    for shape in ((40, 7), (7, 40), (12, 12)):
        z = rng.normal(size=shape) + 2.0
        sigma = np.linalg.svd(z, compute_uv=False)
        p = sigma / sigma.sum() + 1e-7
        assert rankme(z) == pytest.approx(math.exp(-sum(p * np.log(p))), rel=1e-6)


def test_identical_vectors_have_rank_one_and_no_deviation() -> None:
    found = spread(np.tile(np.arange(1.0, 65.0), (100, 1)))
    assert found.rank == pytest.approx(1, abs=1e-3)
    assert found.std == pytest.approx(0, abs=1e-9) and found.dead == 1


def test_orthonormal_vectors_have_full_rank(seed: int) -> None:
    q, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(64, 64)))
    assert spread(q[:20]).rank == pytest.approx(20, rel=1e-3)
    assert spread(np.concatenate([q, -q])).std == pytest.approx(1, abs=0.02)


def test_gaussian_vectors_deviate_as_without_preference(seed: int) -> None:
    x = np.random.default_rng(seed).normal(size=(4000, 32)) * 7
    found = spread(x)
    assert found.std == pytest.approx(1, abs=0.03) and found.dead == 0
    # Half of the dimensions constant: half are dead, and scale does not matter.
    x[:, 16:] = 0
    assert spread(x).dead == 0.5
    assert spread(x * 1e-3) == pytest.approx(spread(x), rel=1e-6)


def test_vectors_that_are_zero_or_not_finite() -> None:
    nothing = spread(np.zeros((10, 4)))
    assert (nothing.std, nothing.dead) == (0, 1) and nothing.rank == pytest.approx(1, abs=1e-3)
    assert all(math.isnan(v) for v in spread(np.array([[1.0, np.nan], [0.0, 1.0]])))


def test_a_collapse_is_low_and_a_fall() -> None:
    healthy = Spread(0.5, 30.0, 0.0)
    assert not collapse(healthy, healthy)
    assert not collapse(Spread(0.1, 3.0, 0.2), healthy)  # far down, but not near the floor
    assert "std" in collapse(Spread(0.004, 3.0, 0.9), healthy)
    assert "rank" in collapse(Spread(0.1, 1.1, 0.2), healthy)
    # An encoder that began there has not fallen.
    low = Spread(0.008, 1.1, 0.9)
    assert not collapse(low, low)
    assert not collapse(Spread(np.nan, np.nan, np.nan), healthy)


class Squeezed(nn.Module):
    """An encoder whose deepest features are shrunk to one direction by `much`, from 0 to 1."""

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.encoder, self.much, self.strides = encoder, 0.0, encoder.strides

    def forward(self, image: Tensor) -> list[Tensor]:
        *rest, x = self.encoder(image)
        line = torch.ones_like(x) * x.mean(1, keepdim=True)
        return [*rest, (1 - self.much) * x + self.much * line]


def watch(corpus: Path, runs: Path, **health: Any) -> tuple[Health, Any]:
    chosen = settings(corpus, runs, health={"every": 4, **health})
    from pretrain.train import build_objective

    run = runs / "run"
    run.mkdir(exist_ok=True)
    dataset = make_dataset(chosen, Corpus.open(corpus))
    return Health(chosen.health, dataset, run), build_objective(chosen, 1).encoder


def test_features_of_rank_one_are_flagged_once_an_episode(
    pretrain_corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    health, encoder = watch(pretrain_corpus, tmp_path)
    squeezed: Any = Squeezed(encoder)
    assert health.begin(0)
    seen = []
    for step, much in enumerate([0, 0.2, 1, 1, 0, 1]):
        squeezed.much = much
        seen.append(int(health.look(squeezed, step)["collapsed"]))
    assert seen == [0, 0, 1, 1, 0, 1]
    err = capsys.readouterr().err
    assert err.count("WARNING") == 2 and "step 2 of run" in err and "step 5 of run" in err
    assert [row["step"] for row in rows(tmp_path / "run")] == [0, 1, 2, 3, 4, 5]


# In a run.


def test_an_objective_that_collapses_is_flagged_and_can_stop(
    pretrain_corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    constant = {"_target_": "tests.pretrain.test_health.Constant"}
    chosen = settings(
        pretrain_corpus, tmp_path, objective=constant, steps=400, lr=0.02, log_every=20,
        save_every=1000, health={"every": 20, "stop": True},
    )  # fmt: skip
    with pytest.raises(CollapseError, match=r"health\.stop"):
        pretrain(chosen)
    run = tmp_path / "run"
    found = rows(run)
    assert found[-1]["collapsed"] == 1 and found[-1]["step"] <= 200
    assert not any(row["collapsed"] for row in found[:-1])
    assert (run / "checkpoints" / f"step-{int(found[-1]['step']):08d}.pt").is_file()
    assert "WARNING" in capsys.readouterr().err
    # Whoever wants to go on may, and is not warned again of the same.
    going = chosen.model_copy(update={"health": HealthSettings(every=20)})
    more = going.model_copy(update={"steps": int(found[-1]["step"]) + 20})
    (run / "config.json").write_text(more.model_dump_json())
    pretrain(more)
    assert "WARNING" not in capsys.readouterr().err
    assert len(rows(run)) == len(found) + 1


@pytest.mark.parametrize(("backbone", "objective"), [(RESENC, CNN_MAE), (VIT, MAE)])
def test_watching_changes_no_weight_and_a_healthy_run_is_not_flagged(
    pretrain_corpus: Path,
    labelled_corpus: Path,
    tmp_path: Path,
    backbone: dict[str, Any],
    objective: dict[str, Any],
) -> None:
    parts: dict[str, Any] = {"backbone": backbone, "objective": objective, "steps": 40}
    on = {"every": 4, "probe": labelled_corpus}
    watched = pretrain(settings(pretrain_corpus, tmp_path, "on", health=on, **parts))
    alone = pretrain(settings(pretrain_corpus, tmp_path, "off", health={"every": 0}, **parts))
    one, other = weights(watched), weights(alone)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not (alone / "health.csv").exists()
    found = rows(watched)
    assert [row["step"] for row in found] == list(range(0, 41, 4))
    assert not any(row["collapsed"] for row in found)
    assert all(math.isfinite(value) for row in found for value in row.values())


def test_a_stopped_run_goes_on_in_its_health_csv(
    pretrain_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows after the checkpoint are made again, equal to those of the run that was not stopped."""
    from pretrain.objectives.cnn_mae import CnnMAE

    whole = pretrain(settings(pretrain_corpus, tmp_path, "whole", steps=20))
    original = CnnMAE.forward
    stop_at = 9

    def stopping(self: CnnMAE, batch: Any, progress: float) -> Any:
        if batch.keys and self.loop.step == stop_at:
            raise KeyboardInterrupt
        return original(self, batch, progress)

    monkeypatch.setattr(CnnMAE, "forward", stopping)
    chosen = settings(pretrain_corpus, tmp_path, "stopped", steps=20)
    with pytest.raises(KeyboardInterrupt):
        pretrain(chosen)
    run = tmp_path / "stopped"
    assert [row["step"] for row in rows(run)] == [0, 4, 8]  # the newest checkpoint is of step 6
    stop_at = -1
    pretrain(chosen)
    timed = ("seconds", "share")
    expected = [{k: v for k, v in row.items() if k not in timed} for row in rows(whole)]
    assert [{k: v for k, v in row.items() if k not in timed} for row in rows(run)] == expected
    assert [row["step"] for row in expected] == [0, 4, 8, 12, 16, 20]


def test_the_first_look_of_a_run_that_begins_anew_is_told_once(
    pretrain_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was stopped before its first checkpoint."""
    original, cut = Journal.tell, [0]

    def tell(self: Journal, values: Any, step: int) -> None:
        original(self, values, step)
        if step in cut and "health/rank" in values:
            cut.clear()
            raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "tell", tell)
    chosen = settings(pretrain_corpus, tmp_path, "cut", steps=8)
    with pytest.raises(KeyboardInterrupt):
        pretrain(chosen)
    pretrain(chosen)
    run = tmp_path / "cut"
    assert [row["step"] for row in rows(run)] == [0, 4, 8]
    told = [row["step"] for row in read_lines(run / "metrics.jsonl") if "health/rank" in row]
    assert told == [0, 4, 8]
    assert [start.end for start in Events(run).starts()] == ["interrupted", "finished"]


def test_two_ranks_are_watched_and_stop_together(pretrain_corpus: Path, tmp_path: Path) -> None:
    trainer = {"accelerator": "cpu", "devices": 2, "workers": 0, "threads": 1}
    constant = {"_target_": "tests.pretrain.test_health.Constant"}
    chosen = settings(
        pretrain_corpus, tmp_path, objective=constant, trainer=trainer, steps=400, lr=0.02,
        log_every=20, save_every=1000, health={"every": 20, "stop": True},
    )  # fmt: skip
    script = tmp_path / "two.py"
    script.write_text(
        "from pretrain.settings import PretrainSettings\n"
        "from pretrain.train import pretrain\n"
        "if __name__ == '__main__':\n"
        f"    pretrain(PretrainSettings.model_validate_json({chosen.model_dump_json()!r}))\n"
    )
    done = subprocess.run(
        [sys.executable, str(script)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1 and "CollapseError" in done.stderr
    assert done.stderr.count("WARNING: step") == 1
    steps = [row["step"] for row in rows(tmp_path / "run")]
    assert steps == list(range(0, int(steps[-1]) + 1, 20)) and steps[-1] <= 200


def test_modules_keep_their_modes() -> None:
    """A teacher that is frozen in evaluation mode must not come out training."""
    module = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout()))
    module[1].eval()
    with evaluating(module):
        assert not any(part.training for part in module.modules())
        assert not torch.is_grad_enabled()
    assert [part.training for part in module.modules()] == [True, True, False, False]


def test_the_interval_is_chosen_by_its_cost_and_kept(
    pretrain_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A look of 4 s beside steps of 0.5 s: 400 steps make 2 %, so every 500."""
    health, encoder = watch(pretrain_corpus, tmp_path, every="auto")
    clock = {"now": 0.0}
    monkeypatch.setattr("pretrain.health.time.perf_counter", lambda: clock["now"])
    assert health.begin(0)
    features = health._features

    def slow(*arguments: Any) -> Any:
        clock["now"] += 4.0
        return features(*arguments)

    monkeypatch.setattr(health, "_features", slow)
    health.look(encoder, 0)
    for step in range(1, 21):
        clock["now"] += 0.5
        assert not health.due(step, logged=step % 10 == 0, last=False)
    assert json.loads((tmp_path / "run" / "health.json").read_text())["every"] == 500
    assert health.due(500, logged=False, last=False)
    assert not health.due(50, logged=False, last=False)
    assert health.due(77, logged=False, last=True)
    # Another process, on a faster machine, keeps to it.
    again = Health(health.settings, health.dataset, tmp_path / "run")
    assert not again.begin(20)  # the untrained encoder was looked at
    assert again.due(1000, logged=True, last=False)
    assert not again.due(50, logged=True, last=False)


def test_a_run_that_health_stops_is_not_queued_again(
    pretrain_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each start would save a new state and collapse anew, so its crashes would all look new."""
    monkeypatch.setenv("VOXELITH_REFUSED", str(tmp_path / "refused"))
    monkeypatch.setattr(Health, "_judge", lambda *_: "fallen together")  # nothing is, in 4 steps
    words = [
        f"corpus={pretrain_corpus}", "run=x", f"runs={tmp_path}", "backbone=resenc_small",
        "backbone.features=[4,6]", "backbone.strides=[1,2]", "backbone.blocks=[1,1]",
        "objective=cnn_mae", "objective.block=4", "crop_size=[8,12,8]", "batch_size=4", "steps=4",
        "log_every=2", "warmup=1", "health.every=2", "health.stop=true", "trainer=cpu",
        "trainer.workers=0", "preview_every=0",
    ]  # fmt: skip
    assert main(["pretrain", *words]) == 1
    assert (tmp_path / "refused").exists()
