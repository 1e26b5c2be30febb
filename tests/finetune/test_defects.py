"""What other systems' loaders let pass: each defect of theirs is refused or reported here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_runs import BACKBONES, add_few_split, make_release, settings

from data_prep.errors import InputError
from finetune.train import build_model, make_plan
from pretrain.release import FILES, file_digest, load_release


@pytest.fixture(scope="module")
def corpus(labelled_corpus: Path) -> Path:
    add_few_split(labelled_corpus)
    return labelled_corpus


def resign(path: Path) -> None:
    lines = [f"{file_digest(path / name)}  {name}\n" for name in FILES]
    (path / "SHA256SUMS").write_text("".join(lines))


@pytest.mark.parametrize("kind", BACKBONES)
def test_every_tensor_is_reported_once_and_the_stem_is_loaded(
    kind: str, corpus: Path, tmp_path: Path
) -> None:
    """Also where the stem lives inside the first stage (plain U-Net), under its own full key."""
    release = make_release(tmp_path / "release", kind)
    model, report = build_model(make_plan(settings(release, corpus, tmp_path)))
    stored = load_file(release.path / "model.safetensors")
    assert sorted(report.copied) == sorted(f"encoder.{name}" for name in stored)
    listed = [*report.copied, *report.new, *report.adapted, *report.skipped]
    assert sorted(listed) == sorted(model.state_dict()) and report.covered == 1.0
    state = model.encoder.state_dict()
    assert all(torch.equal(state[name], value) for name, value in stored.items())
    first = next(n for n, v in stored.items() if v.ndim == 5 and v.shape[1] == 1)
    assert first.endswith(".weight")  # what reads the image
    # No tensor is left at zero without a word: only biases and batch statistics begin there.
    assert not [n for n, v in stored.items() if v.ndim > 1 and not v.any()]


@pytest.mark.parametrize("change", ["prefix", "missing", "more", "shape"])
def test_a_load_that_does_not_fit_stops_and_names_what_differs(
    change: str, corpus: Path, tmp_path: Path
) -> None:
    """`strict=False` without a report: a failed load looks like pretraining that does not help."""
    release = make_release(tmp_path / "release", "unet")
    file = release.path / "model.safetensors"
    stored = load_file(file)
    name = sorted(n for n, v in stored.items() if v.ndim == 5)[0]
    changed = {
        "prefix": {f"module.{n}": v for n, v in stored.items()},
        "missing": {n: v for n, v in stored.items() if n != name},
        "more": {**stored, "mask_token": torch.zeros(3)},
        "shape": {**stored, name: stored[name].repeat(1, 2, 1, 1, 1)},  # another channel count
    }[change]
    save_file(changed, file)
    resign(release.path)
    said = {
        "prefix": "is missing", "missing": f"{name} is missing",
        "more": "mask_token is not part of it", "shape": f"{name} has shape",
    }[change]  # fmt: skip
    with pytest.raises(InputError, match=said):
        build_model(make_plan(settings(load_release(release.path), corpus, tmp_path)))


@pytest.mark.parametrize("channels", [2, 4])
def test_other_channels_than_the_checkpoint_takes_are_refused(
    channels: int, corpus: Path, tmp_path: Path
) -> None:
    """Fewer here than in pretraining; never a silent slice or repeat."""
    path = make_release(tmp_path / "release", "resenc").path
    config = json.loads((path / "config.json").read_text())
    config["backbone"]["args"]["in_channels"] = channels
    (path / "config.json").write_text(json.dumps(config))
    resign(path)
    with pytest.raises(InputError, match=rf"have \[1\] channels, the checkpoint takes {channels}"):
        make_plan(settings(load_release(path), corpus, tmp_path))


def test_rates_that_differ_between_arms_are_declared(corpus: Path, tmp_path: Path) -> None:
    """Scratch at another rate than its twin has another arm and another recipe, in every record."""
    release = make_release(tmp_path / "release", "resenc")
    given = settings(
        release, corpus, tmp_path, own={"lr": 1e-2}, search={"lr": [3e-3, 1e-2], "draws": 1},
        init="scratch",
    )  # fmt: skip
    twin, own = make_plan(given), make_plan(given.model_copy(update={"recipe_of": "own"}))
    assert twin.settings.lr == 3e-3 and own.settings.lr == 1e-2
    assert twin.recipe == own.recipe and twin.trained != own.trained
    assert twin.identity != own.identity
    assert json.dumps(own.trained)  # plain data, written to run.json
