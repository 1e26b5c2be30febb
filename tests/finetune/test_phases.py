"""Phases are data and follow from the step: a killed job goes on as if it had not been killed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from small_runs import add_few_split, killed_at, make_release, settings
from torch.nn import Parameter

from data_prep.errors import InputError
from finetune.phases import PhasedLoop
from finetune.protocol import Phase, phase_steps
from finetune.settings import FinetuneSettings
from finetune.train import build_model, make_plan, train
from pretrain.release import Release
from pretrain.run_folder import RunFolder

SAWTOOTH = [
    {"steps": 3, "freeze": "encoder", "warmup": 1, "schedule": "poly", "lr_factor": 0.5},
    {"steps": 3, "freeze": 2, "warmup": 2, "schedule": "cosine"},
]
"""Then 6 steps of the whole network, 3 of them warm-up: every stage has a beginning and an end."""


@pytest.fixture(scope="module")
def corpus(labelled_corpus: Path) -> Path:
    add_few_split(labelled_corpus)
    return labelled_corpus


@pytest.fixture(scope="module", params=["resenc", "vit"])
def release(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Release:
    return make_release(tmp_path_factory.mktemp("release") / "r", request.param)


def chosen(release: Release, corpus: Path, runs: Path, **changes: Any) -> FinetuneSettings:
    usual = {
        "phases": SAWTOOTH, "warmup": 3, "schedule": "poly", "optimizer": "sgd", "lr": 1e-2,
        "ema": 0.2, "layer_decay": 0.8, "clip": 1.0, "save_every": 1,
    }  # fmt: skip
    return settings(release, corpus, runs, **(usual | changes))


class Run:
    """A training by itself, without the prediction that follows."""

    def __init__(self, given: FinetuneSettings, folder: Path) -> None:
        self.plan = make_plan(given)
        self.model, self.report = build_model(self.plan)
        self.folder = RunFolder(folder)
        folder.mkdir(exist_ok=True)

    def go_on(self) -> dict[str, torch.Tensor]:
        train(self.plan, self.folder, self.model, self.report)
        return self.model.state_dict()


@pytest.fixture(scope="module")
def whole(release: Release, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """An uninterrupted training that kept the checkpoint of every step."""
    folder = tmp_path_factory.mktemp("whole")
    run = Run(chosen(release, corpus, folder), folder / "r")
    run.folder.checkpoints.keep = 100
    return run.go_on(), run.folder.checkpoints.paths()


def test_a_job_killed_after_any_step_gives_the_same_bytes(
    release: Release, corpus: Path, whole: Any, tmp_path: Path
) -> None:
    """In any stage, at its first and last step, and between them."""
    weights, paths = whole
    assert len(paths) == 12
    for step in range(1, 12) if "resenc" in release.name else (2, 3, 6, 7):
        run = Run(chosen(release, corpus, tmp_path, save_every=100), tmp_path / f"at-{step}")
        run.folder.checkpoints.folder.mkdir()
        shutil.copy(paths[step - 1], run.folder.checkpoints.folder)
        found = run.go_on()
        assert found.keys() == weights.keys()
        assert all(torch.equal(found[name], weights[name]) for name in found), step


def test_a_job_killed_without_warning_gives_the_same_bytes(
    release: Release, corpus: Path, tmp_path: Path
) -> None:
    """Between two checkpoints, in two stages, with moments of two kinds."""
    changes = {"optimizer": "adamw", "lr": 1e-3, "save_every": 2}
    weights = Run(chosen(release, corpus, tmp_path, **changes), tmp_path / "whole").go_on()
    given = chosen(release, corpus, tmp_path, **changes)
    for step in (5, 7):
        with killed_at(step):
            Run(given, tmp_path / "killed").go_on()
    found = Run(given, tmp_path / "killed").go_on()
    assert all(torch.equal(found[name], weights[name]) for name in found)


def test_the_rate_saws(release: Release, corpus: Path, tmp_path: Path) -> None:
    """Closed form of each phase: linear up, then down; the whole network last."""
    given = chosen(release, corpus, tmp_path, layer_decay=1.0)
    loop = PhasedLoop(given, None, None)  # type: ignore[arg-type]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], 1.0)
    found = []
    for loop.step in range(12):
        loop.set_rate(optimizer)
        found.append(optimizer.param_groups[0]["lr"] / given.lr)
    decoder = [0.5, 0.5, 0.5 * (1 / 2) ** 0.9]
    some = [0.5, 1.0, 1.0]  # two of warm-up, then the first of a cosine
    rest = [1 / 3, 2 / 3, 1.0, 1.0, (2 / 3) ** 0.9, (1 / 3) ** 0.9]
    assert found == pytest.approx([*decoder, *some, *rest])


def test_the_stage_that_others_skip_is_there() -> None:
    """nnssl's sawtooth of 1000 epochs: a job that comes back in epochs 50 to 99 warms up."""
    phases = [Phase(steps=50, freeze="encoder", warmup=25)]
    assert phase_steps(phases, 1000) == [range(50), range(50, 1000)]
    given = FinetuneSettings.model_validate(
        {
            "task": {"name": "t", "classes": [{"name": "a", "values": [1], "tolerance_mm": 1}]},
            "corpus": "c", "ckpt": "r", "steps": 1000, "batch_size": 2, "lr": 1e-3,
            "warmup": 50, "schedule": "poly", "phases": phases,
        }
    )  # fmt: skip
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], 1.0)
    loop = PhasedLoop(given, None, None)  # type: ignore[arg-type]
    for step, wanted in ((0, 1 / 25), (24, 1.0), (25, 1.0), (50, 1 / 50), (75, 26 / 50), (99, 1.0)):
        loop.step = step
        loop.set_rate(optimizer)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-3 * wanted), step


def test_each_phase_trains_what_it_should(
    release: Release, corpus: Path, whole: Any, tmp_path: Path
) -> None:
    _, paths = whole
    states = {i: torch.load(path, weights_only=True) for i, path in enumerate(paths, start=1)}
    kept = {i: state["objective"] for i, state in states.items()}
    model = Run(chosen(release, corpus, tmp_path), tmp_path / "r").model
    start, layers = model.state_dict(), model.encoder.layers()

    def owned(part: Any) -> list[int]:
        return [id(p) for p in ([part] if isinstance(part, Parameter) else part.parameters())]

    ids = [{i for part in layer for i in owned(part)} for layer in layers]
    names = [{n for n, p in model.named_parameters() if id(p) in found} for found in ids]
    first, rest = names[0] | names[1], set().union(*names[2:])

    def changed(a: dict[str, Any], b: dict[str, Any]) -> set[str]:
        return {n for n in a if n[:8] in ("encoder.", "decoder.") and not torch.equal(a[n], b[n])}

    assert all(n.startswith("decoder.") for n in changed(start, kept[3]))
    second = changed(kept[3], kept[6])
    assert not second & first and second & rest
    assert changed(kept[6], kept[12]) & first
    counts = {
        i: sum(len(group["params"]) for group in state["optimizer"]["param_groups"])
        for i, state in states.items()
    }
    decoder = len(list(model.decoder.parameters()))
    assert counts[1] == counts[3] == decoder
    assert counts[4] == counts[6] == decoder + len(rest)
    assert counts[7] == counts[12] == decoder + len(rest) + len(first)


def test_an_average_is_what_is_reported(
    release: Release, corpus: Path, whole: Any, tmp_path: Path
) -> None:
    """The slow oracle: the average made by hand from the weights after each step."""
    weights, paths = whole
    run = Run(chosen(release, corpus, tmp_path), tmp_path / "r")
    parts = ("encoder.", "decoder.")
    mean = {n: v.double() for n, v in run.model.state_dict().items() if n.startswith(parts)}
    for step, path in enumerate(paths, start=1):
        decay = min(0.2, (1 + step) / (10 + step))
        state = torch.load(path, weights_only=True)["objective"]
        for name in mean:
            mean[name] = decay * mean[name] + (1 - decay) * state[name].double()
    run.model.load_state_dict(weights)
    run.model.finish()
    found = run.model.state_dict()
    assert found.keys() == mean.keys()
    for name in found:
        assert torch.allclose(found[name].double(), mean[name], rtol=1e-5, atol=1e-6), name
    assert any(not torch.equal(found[name], weights[name]) for name in found)


def test_phases_must_leave_steps_and_fit_the_encoder(
    release: Release, corpus: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValidationError, match="phases take 6 of 6 steps"):
        chosen(release, corpus, tmp_path, steps=6)
    with pytest.raises(ValidationError, match="lr_factor"):
        chosen(release, corpus, tmp_path, phases=[{"steps": 1, "freeze": "none", "lr_factor": 0}])
    deep = [{"steps": 2, "freeze": 9}]
    with pytest.raises(InputError, match=r"phases\[0\].freeze=9: the encoder has"):
        build_model(make_plan(chosen(release, corpus, tmp_path, phases=deep)))
