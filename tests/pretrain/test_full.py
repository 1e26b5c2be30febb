"""A full release: heads, teacher and optimiser go along, and a pretraining can go on with them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_dino_runs import TINY, VIT
from test_loop import RESENC, settings

from data_prep.errors import CorruptionError, InputError
from data_prep.files import file_digest
from pretrain.encoder import load_encoder
from pretrain.export import export
from pretrain.manifest import TRAINING
from pretrain.release import load_release
from pretrain.run_folder import RunFolder
from pretrain.train import open_training, prepare, pretrain


@pytest.fixture(scope="module")
def first(pretrain_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pretrain(settings(pretrain_corpus, tmp_path_factory.mktemp("runs"), "first", steps=2))


@pytest.fixture(scope="module")
def full(first: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(first, tmp_path_factory.mktemp("releases") / "full", full=True).path


@pytest.fixture
def chosen(pretrain_corpus: Path, tmp_path: Path) -> Any:
    return lambda run, **changes: settings(
        pretrain_corpus, tmp_path, run, **({"steps": 1, "lr": 1e-9, "weight_decay": 0.0} | changes)
    )


def state(run: Path) -> dict[str, Any]:
    found = RunFolder(run).checkpoints.load()
    assert found is not None
    return found


def resigned(path: Path, to: Path) -> Path:
    """A copy that is to be changed and signed anew by `sign`."""
    shutil.copytree(path, to)
    return to


def sign(path: Path) -> None:
    lines = [line.partition("  ")[2] for line in (path / "SHA256SUMS").read_text().splitlines()]
    sums = "".join(f"{file_digest(path / name)}  {name}\n" for name in lines)
    (path / "SHA256SUMS").write_text(sums)


def test_it_has_all_of_the_training_to_the_last_bit(first: Path, full: Path) -> None:
    release, kept = load_release(full), open_training(full)
    trained = state(first)
    assert release.is_full and "full" in (full / "README.md").read_text()
    assert kept.objective.keys() == trained["objective"].keys()
    assert all(torch.equal(kept.objective[n], v) for n, v in trained["objective"].items())
    assert kept.optimizer == "adamw"
    of_run = open_training(first)
    assert kept.moments.keys() == of_run.moments.keys() == trained["objective"].keys()
    for name, moments in of_run.moments.items():
        assert {"exp_avg", "exp_avg_sq", "step"} == moments.keys() == kept.moments[name].keys()
        assert moments["exp_avg"].shape == trained["objective"][name].shape
        assert all(torch.equal(kept.moments[name][kind], v) for kind, v in moments.items())
    assert load_encoder(full).report.covered == 1.0


def test_a_teacher_and_its_heads_go_along(pretrain_corpus: Path, tmp_path: Path) -> None:
    run = pretrain(
        settings(pretrain_corpus, tmp_path, "dino", objective=TINY, backbone=VIT, steps=1)
    )
    path = export(run, tmp_path / "release", full=True).path
    stored, kept = load_file(path / "model.safetensors"), open_training(path).objective
    assert any(name.startswith("teacher") for name in kept)
    teacher = {n for n in kept if n.startswith("teacher") and n.endswith("patch_embed.proj.weight")}
    (name,) = teacher
    assert torch.equal(stored["patch_embed.proj.weight"], kept[name])
    assert not torch.equal(kept["encoder.patch_embed.proj.weight"], kept[name])


def test_a_pretraining_goes_on_with_heads_where_an_encoder_alone_has_none(
    first: Path, full: Path, chosen: Any, tmp_path: Path
) -> None:
    alone = export(first, tmp_path / "encoder").path
    runs = {ref.name: pretrain(chosen(f"from-{ref.name}", init=ref)) for ref in (full, alone)}
    reports = {n: json.loads((run / "load_report.json").read_text()) for n, run in runs.items()}
    assert reports["full"]["new"] == [] and reports["encoder"]["new"]
    before, after = state(first)["objective"], state(runs["full"])["objective"]
    assert all(torch.allclose(before[n], after[n], atol=1e-6) for n in before)


def test_moments_are_taken_over_exactly(first: Path, full: Path, chosen: Any) -> None:
    """With b1 m + (1 - b1) g for each moment, m is what two runs differ in."""
    runs = [
        pretrain(chosen(f"moments-{keep}", init=ref, init_moments=keep))
        for keep, ref in ((False, full), (True, full))
    ]
    fresh, kept = (open_training(run).moments for run in runs)
    before = open_training(first).moments
    for name, moments in before.items():
        assert kept[name]["step"] == moments["step"] + 1 == fresh[name]["step"] + 2
        difference = kept[name]["exp_avg"] - fresh[name]["exp_avg"]
        wanted = 0.9 * moments["exp_avg"]
        assert torch.allclose(difference, wanted, atol=1e-6 + 1e-4 * float(wanted.abs().max()))
        assert wanted.abs().max() > 0
    report = json.loads((runs[1] / "load_report.json").read_text())
    assert report["moments"] == len(before)
    assert json.loads((runs[0] / "load_report.json").read_text())["moments"] == 0


def test_moments_of_other_shapes_begin_anew(full: Path, chosen: Any) -> None:
    wide = RESENC | {"features": [4, 6]}
    run = pretrain(chosen("wide", init=full, backbone=wide, init_covers=0.05, init_moments=True))
    report = json.loads((run / "load_report.json").read_text())
    assert 0 < report["moments"] < len(open_training(run).moments)


def test_moments_that_are_not_there_are_said_before_the_start(
    first: Path, full: Path, chosen: Any, tmp_path: Path
) -> None:
    alone = export(first, tmp_path / "encoder").path
    for words, change in (
        ("init_moments=true: of what", {}),
        (r"encoder has no moments; .* form=full", {"init": alone}),
        ("trained by adamw, .* give optimizer=adamw", {"init": full, "optimizer": "sgd"}),
    ):
        with pytest.raises(InputError, match=words):
            prepare(chosen("none", init_moments=True, **change))


def test_what_is_not_what_its_config_says_is_refused(full: Path, tmp_path: Path) -> None:
    less = resigned(full, tmp_path / "less")
    (less / TRAINING).unlink()
    text = (less / "SHA256SUMS").read_text().splitlines(keepends=True)
    (less / "SHA256SUMS").write_text("".join(line for line in text if TRAINING not in line))
    with pytest.raises(
        CorruptionError, match=f"full is True, and SHA256SUMS does not list {TRAINING}"
    ):
        load_release(less)
    more = resigned(full, tmp_path / "more")
    config = json.loads((more / "config.json").read_text())
    (more / "config.json").write_text(json.dumps({**config, "full": False}))
    sign(more)
    with pytest.raises(CorruptionError, match=f"full is False, and SHA256SUMS lists {TRAINING}"):
        load_release(more)
    other = resigned(full, tmp_path / "other")
    save_file({"weights": torch.zeros(2)}, other / TRAINING)
    sign(other)
    with pytest.raises(CorruptionError, match="weights is no part of a training's state"):
        open_training(other)
    flipped = resigned(full, tmp_path / "flipped")
    with (flipped / TRAINING).open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x01")
    with pytest.raises(CorruptionError, match=f"{TRAINING}: its bytes are not those"):
        load_release(flipped)
