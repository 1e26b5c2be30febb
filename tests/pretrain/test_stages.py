"""One command trains a recipe's stages: each a run, each once, from the one before."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_loop import settings, steps, weights

import voxelith
from data_prep.errors import InputError
from finetune.describe import describe
from finetune.settings import FinetuneSettings
from finetune.train import build_model, make_plan
from pretrain.export import export
from pretrain.release import DECODER, load_release
from pretrain.settings import PretrainSettings
from pretrain.stages import pretrain_stages

PACKAGE = "pretrain.objectives.contrastive"
GLOBAL = {"_target_": f"{PACKAGE}.GlobalContrast", "slabs": 2, "hidden_dim": 8, "out_dim": 8}
LOCAL = {"_target_": f"{PACKAGE}.LocalContrast", "slabs": 2, "blocks": 1, "region": 1, "out_dim": 8}
RESENC = {
    "_target_": "pretrain.backbones.resenc.ResEncUNetEncoder",
    "features": [4, 6, 8], "strides": [1, 2, 2], "blocks": [1, 1, 1],
}  # fmt: skip
RECIPE = """# @package _global_
defaults:
  - override /backbone: resenc_small
  - override /objective: contrastive_global
  - override /trainer: cpu
trainer: {workers: 0, threads: 1}
backbone: {features: [4, 6, 8], strides: [1, 2, 2], blocks: [1, 1, 1]}
objective: {slabs: 2, out_dim: 8}
crop_size: [16, 16, 16]
batch_size: 2
lr: 1.0e-3
warmup: 1
log_every: 1
save_every: 2
health: {every: 0}
preview_every: 0
stages:
  global: {steps: 3}
  local: {objective: contrastive_local, objective.blocks: 1, objective.region: 1, steps: 400}
"""


def stages(corpus: Path, runs: Path, name: str = "r") -> dict[str, PretrainSettings]:
    given: dict[str, Any] = {
        "backbone": RESENC, "crop_size": (16, 16, 16), "steps": 3, "batch_size": 2, "warmup": 1,
        "log_every": 1, "save_every": 2,
    }  # fmt: skip
    return {
        "global": settings(corpus, runs, f"{name}.global", objective=GLOBAL, **given),
        "local": settings(corpus, runs, f"{name}.local", objective=LOCAL, **given),
    }


@pytest.fixture(scope="module")
def trained(pretrain_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return pretrain_stages(stages(pretrain_corpus, tmp_path_factory.mktemp("runs")))


def test_each_stage_is_a_run_and_the_second_has_the_encoder_of_the_first(
    trained: list[Path],
) -> None:
    first, second = trained
    assert (first.name, second.name) == ("r.global", "r.local")
    one, two = weights(first), weights(second)
    encoder = [name for name in one if name.startswith("encoder.")]
    assert encoder and all(torch.equal(one[name], two[name]) for name in encoder)
    report = json.loads((second / "load_report.json").read_text())
    assert report["copied"] == sorted(encoder) and report["covered"] == 1.0
    assert all(name.startswith("projector.") for name in report["skipped"])
    assert json.loads((second / "init.json").read_text())["name"] == "r.global"


def test_a_stage_that_is_done_is_not_run_again(
    trained: list[Path], pretrain_corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {f: f.stat().st_mtime_ns for run in trained for f in run.rglob("*")}
    again = pretrain_stages(stages(pretrain_corpus, trained[0].parent))
    assert again == trained
    assert {f: f.stat().st_mtime_ns for run in trained for f in run.rglob("*")} == before
    said = capsys.readouterr().out
    assert "r.global: stage 1 of 2 is done" in said and "r.local: stage 2 of 2 is done" in said
    assert f"Next: voxelith export {trained[1]} release/" in said


def test_a_stage_with_other_settings_is_refused_by_its_name(
    trained: list[Path], pretrain_corpus: Path
) -> None:
    changed = stages(pretrain_corpus, trained[0].parent)
    changed["local"] = changed["local"].model_copy(update={"lr": 0.5})
    with pytest.raises(InputError, match=r"^local: .*r\.local: cannot be resumed .*lr:"):
        pretrain_stages(changed)


def test_what_is_given_for_all_stages_starts_the_first(
    trained: list[Path], pretrain_corpus: Path, tmp_path: Path
) -> None:
    begun = {
        name: one.model_copy(update={"init": trained[0], "lr": 1e-9, "weight_decay": 0.0})
        for name, one in stages(pretrain_corpus, tmp_path).items()
    }
    first, second = pretrain_stages(begun)
    origins = [json.loads((run / "init.json").read_text()) for run in (first, second)]
    assert origins[0]["digest"] != origins[1]["digest"]
    assert len(origins[1]["data"]) == 2 and len(origins[0]["data"]) == 1


def words(corpus: Path, folder: Path, *more: str) -> list[str]:
    (folder / "mine" / "experiment").mkdir(parents=True, exist_ok=True)
    (folder / "mine" / "experiment" / "two.yaml").write_text(RECIPE)
    return [
        "pretrain", "experiment=two", f"corpus={corpus}", "run=r", f"runs={folder / 'runs'}",
        "--config-dir", str(folder / "mine"), *more,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("stages.local.backbone.features=[4,6,6]", "local: init: has"),
        ("stages.local.objective.blocks=5", "local: objective.blocks=5"),
        ("stages.local.lr=-1", "local: lr=-1"),
        ("stages.local.crop_size=[12,16,16]", "local: "),
    ],
)
def test_when_the_second_stage_is_wrong_nothing_is_written(
    pretrain_corpus: Path, tmp_path: Path, more: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = ["stages.local.objective.region=3"] if "crop_size" in more else []
    assert voxelith.main(words(pretrain_corpus, tmp_path, more, *wrong)) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_command_that_was_killed_in_its_second_stage_goes_on_there(
    pretrain_corpus: Path, tmp_path: Path
) -> None:
    run = tmp_path / "runs" / "r.local"
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "voxelith", *words(pretrain_corpus, tmp_path)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=Path(voxelith.__file__).parent,
    )
    while process.poll() is None and not list((run / "checkpoints").glob("step-*.pt")):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    reached = max(int(p.stem[5:]) for p in (run / "checkpoints").glob("step-*.pt"))
    assert reached < 400
    first = {f: f.stat().st_mtime_ns for f in (tmp_path / "runs" / "r.global").rglob("*")}
    # The stage ends here; its settings are those of the killed command but for that.
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"steps": reached + 2}))
    assert voxelith.main(words(pretrain_corpus, tmp_path, f"stages.local.steps={reached + 2}")) == 0
    assert {f: f.stat().st_mtime_ns for f in (tmp_path / "runs" / "r.global").rglob("*")} == first
    assert steps(run) == list(range(1, reached + 3))


def test_after_stage_two_the_encoder_and_the_trained_blocks_transfer(
    trained: list[Path], labelled_corpus: Path, tmp_path: Path
) -> None:
    """The rest of the decoder was never trained, so no release has it and finetuning says so."""
    encoder = load_release(export(trained[0], tmp_path / "global").path)
    assert encoder.transfers == "encoder" and not encoder.has_decoder
    release = export(trained[1], tmp_path / "local")
    assert release.transfers == "network"
    assert release.config["decoder"] == {"out_channels": 1, "blocks": 1}
    assert "its first 1 blocks from the coarsest" in (release.path / "README.md").read_text()
    assert "takes over its first 1 blocks" in describe(release.path)["decoder"]
    stored = load_file(release.path / DECODER)
    assert stored and all(name.startswith(("transpconvs.0.", "stages.0.")) for name in stored)
    trained_blocks = weights(trained[1])
    assert all(torch.equal(stored[n], trained_blocks[f"decoder.{n}"]) for n in stored)

    one_class = {"name": "a", "values": [1], "tolerance_mm": 1.0}
    plan = make_plan(
        FinetuneSettings.model_validate(
            {
                "task": {"name": "h", "classes": [one_class]},
                "corpus": labelled_corpus, "ckpt": release.path, "labels": 2, "runs": tmp_path,
                "run": "r", "steps": 1, "batch_size": 2, "lr": 1e-3,
                "trainer": {"accelerator": "cpu", "precision": "32-true", "workers": 0},
            }
        )
    )  # fmt: skip
    model, report = build_model(plan)
    assert plan.transfer == "network"
    state = model.state_dict()
    assert sorted([*report.copied, *report.new]) == sorted(state)
    assert {n for n in report.copied if n.startswith("decoder.")} == {
        f"decoder.{n}" for n in stored
    }
    assert all(torch.equal(state[f"decoder.{n}"], value) for n, value in stored.items())
    assert "decoder.stages.1.convs.0.conv.weight" in report.new
