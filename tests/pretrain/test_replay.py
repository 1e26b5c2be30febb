"""A step that is not finite is named exactly, and made again."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from data_prep.corpus import Corpus
from data_prep.errors import InputError
from pretrain.failures import Fault, Faults, Shape, plain
from pretrain.preemption import Ask
from pretrain.replay import Replay, replay
from pretrain.run_folder import RunFolder
from pretrain.settings import PretrainSettings
from pretrain.train import make_dataset, pretrain

RESENC = {
    "_target_": "pretrain.backbones.resenc.ResEncUNetEncoder",
    "features": [4, 8],
    "strides": [1, 2],
    "blocks": [1, 1],
}
VIT = {
    "_target_": "pretrain.backbones.vit.ViT3D",
    "patch_size": 4,
    "embed_dim": 24,
    "depth": 2,
    "num_heads": 2,
    "drop_path": 0.3,
}
CNN_MAE = {"_target_": "pretrain.objectives.cnn_mae.CnnMAE", "block": 4}
MAE = {
    "_target_": "pretrain.objectives.mae.MAE",
    "decoder_dim": 24,
    "decoder_depth": 1,
    "decoder_heads": 2,
}
# Two crops of a volume make a sample.
FUSION = {"_target_": "pretrain.objectives.volume_fusion.VolumeFusion", "form": "grid"}
KEY = "hippocampus_067"
AFTER = 7


def settings(corpus: Path, runs: Path, **changes: Any) -> PretrainSettings:
    chosen: dict[str, Any] = {
        "corpus": corpus,
        "run": "run",
        "runs": runs,
        "backbone": RESENC,
        "objective": {"_target_": "tests.pretrain.planted.Planted", "key": KEY, "after": AFTER},
        "trainer": {"accelerator": "cpu", "workers": 0, "threads": 1},
        "crop_size": (8, 12, 8),
        "steps": 60,
        "batch_size": 4,
        "lr": 1e-3,
        "warmup": 4,
        "log_every": 50,
        "save_every": 6,
        "health": {"every": 0},
    }
    return PretrainSettings.model_validate(chosen | changes)


def first(chosen: PretrainSettings, world: int = 1) -> tuple[int, int, int]:
    """Step, micro-step and rank that first meet the planted volume, read off the schedule."""
    corpus = Corpus.open(chosen.corpus)
    dataset = make_dataset(chosen, corpus)
    for position in range(AFTER * chosen.batch_size, chosen.steps * chosen.batch_size):
        if corpus.keys[dataset.schedule.sample(position)[2]] == KEY:
            step, within = divmod(position, chosen.batch_size)
            micro, place = divmod(within, chosen.batch_size // chosen.micro_steps)
            return step + 1, micro, place % world
    raise AssertionError("the volume never comes")


@pytest.mark.parametrize(("what", "accumulate"), [("output", 2), ("gradient", 1), ("loss", 2)])
def test_a_fault_is_named_and_found_again(
    pretrain_corpus: Path, tmp_path: Path, what: str, accumulate: int
) -> None:
    chosen = settings(pretrain_corpus, tmp_path, accumulate=accumulate)
    chosen.objective["what"] = what
    step, micro, rank = first(chosen)
    with pytest.raises(FloatingPointError, match=f"of step {step}"):
        pretrain(chosen)
    run = tmp_path / "run"
    folder = run / "failures" / f"step-{step:08d}"
    failure = json.loads((folder / "failure.json").read_text())
    assert failure["step"] == step and failure["found_at_step"] >= step
    assert failure["what"] == ("gradient" if what == "gradient" else "loss")
    if what != "gradient":
        assert (failure["micro_step"], failure["rank"]) == (micro, rank)
    assert failure["not_finite"]["parameters"]  # by the time that it was noticed
    assert KEY in {s["key"] for s in failure["samples"] if s["micro_step"] == micro}
    assert [path.name for path in (run / "failures").iterdir()] == [folder.name]

    report = replay(run)
    assert report["found"] and report["step"] == step
    assert (report["micro_step"], report["rank"]) == (micro, rank)
    assert report["start"] == 6 * ((step - 1) // 6)
    assert report["parameters"] == {}  # at the step itself they were whole
    assert {s["key"] for s in report["samples"] if s["bad"]} == {KEY}
    expected = {"output": "trap (Trap)", "gradient": "stages.1", "loss": "loss"}[what]
    assert expected in report["module"]
    assert report["what"] == ("gradient" if what == "gradient" else "output")
    assert report["parts"] == ([] if what == "gradient" else ["mse"])
    assert (folder / "replay.png").stat().st_size > 5000
    # What the run wrote and what the replay found are of the same crops.
    named = {
        (s["position"], s["crop"], s["key"], s["seed"], *s["origin"]) for s in failure["samples"]
    }
    assert {
        (s["position"], s["crop"], s["key"], s["seed"], *s["origin"]) for s in report["samples"]
    } <= named
    for file in (folder / "failure.json", folder / "replay.json"):
        assert str(tmp_path) not in file.read_text()
        assert str(pretrain_corpus) not in file.read_text()


@pytest.mark.parametrize(("backbone", "objective"), [(VIT, MAE), (RESENC, FUSION)])
def test_a_replayed_step_is_the_step_bit_for_bit(
    pretrain_corpus: Path, tmp_path: Path, backbone: dict[str, Any], objective: dict[str, Any]
) -> None:
    """From the checkpoint before it to the next one: drop path, accumulation, several crops."""
    chosen = settings(
        pretrain_corpus, tmp_path, crop_size=(16, 24, 16), steps=9, save_every=3, accumulate=2,
        backbone=backbone, objective=objective,
    )  # fmt: skip
    run = RunFolder(pretrain(chosen))
    made = Replay(run)
    report = made.to(9, Shape(4, 2, 1, 1), "32-true")
    assert report["start"] == 6 and not report["found"]
    saved = run.checkpoints.load()
    assert saved is not None and saved["step"] == 9
    found = made.objective.state_dict()
    assert all(torch.equal(found[name], saved["objective"][name]) for name in found)


@pytest.mark.parametrize("moments", [False, True])
def test_a_run_that_began_from_another_is_replayed_from_that(
    pretrain_corpus: Path, tmp_path: Path, moments: bool
) -> None:
    plain = {"objective": CNN_MAE, "steps": 3, "save_every": 3}
    before = pretrain(settings(pretrain_corpus, tmp_path, run="before", **plain))
    chosen = settings(pretrain_corpus, tmp_path, init=before, init_moments=moments, seed=1, **plain)
    run = RunFolder(pretrain(chosen))
    made = Replay(run)
    assert made.to(3, Shape(4, 1, 1, 1), "32-true")["start"] == 0
    saved = run.checkpoints.load()
    assert saved is not None and saved["step"] == 3
    found = made.objective.state_dict()
    assert all(torch.equal(found[name], saved["objective"][name]) for name in found)
    shutil.rmtree(before)
    with pytest.raises(InputError, match=f"init={before}: "):
        Replay(run).to(3, Shape(4, 1, 1, 1), "32-true")
    pretrain(settings(pretrain_corpus, tmp_path, run="before", seed=2, **plain))
    with pytest.raises(InputError, match=r"the run began from what .*init\.json names"):
        Replay(run).to(3, Shape(4, 1, 1, 1), "32-true")


def test_the_start_of_a_failed_step_outlives_its_checkpoint(
    pretrain_corpus: Path, tmp_path: Path
) -> None:
    chosen = settings(pretrain_corpus, tmp_path)
    with pytest.raises(FloatingPointError):
        pretrain(chosen)
    run = tmp_path / "run"
    newest = max((run / "checkpoints").iterdir())
    (folder,) = (run / "failures").iterdir()
    assert (folder / "start.pt").samefile(newest)
    for path in (run / "checkpoints").iterdir():
        path.unlink()
    assert replay(run)["start"] == int(newest.stem.removeprefix("step-"))


def test_two_ranks_name_the_one_that_met_it(pretrain_corpus: Path, tmp_path: Path) -> None:
    trainer = {"accelerator": "cpu", "devices": 2, "workers": 0, "threads": 1}
    chosen = settings(pretrain_corpus, tmp_path, trainer=trainer)
    step, micro, rank = first(chosen, world=2)
    script = tmp_path / "two.py"
    script.write_text(
        "from pretrain.settings import PretrainSettings\n"
        "from pretrain.train import pretrain\n"
        "if __name__ == '__main__':\n"
        f"    pretrain(PretrainSettings.model_validate_json({chosen.model_dump_json()!r}))\n"
    )
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    done = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 1
    assert f"loss of step {step}, micro-step {micro}, rank {rank} is not finite" in done.stderr
    assert done.stderr.count("Next: voxelith replay") == 1
    report = replay(tmp_path / "run")
    assert (report["step"], report["rank"]) == (step, rank)
    assert {s["key"] for s in report["samples"] if s["bad"]} == {KEY}


def test_ruined_weights_are_not_saved_on_the_way_out(
    pretrain_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Preempted after the step that ruined them and before anybody looked."""
    from tests.pretrain.planted import Planted

    chosen = settings(pretrain_corpus, tmp_path, save_every=1000, log_every=1000)
    step, _, _ = first(chosen)
    original = Planted.forward

    def preempted(self: Planted, batch: Any, progress: float) -> Any:
        if batch.keys and self.loop.step == step + 2:
            self.loop.preemption.asked = Ask.STOP
        return original(self, batch, progress)

    monkeypatch.setattr(Planted, "forward", preempted)
    with pytest.raises(FloatingPointError, match=f"of step {step}"):
        pretrain(chosen)
    assert not list((tmp_path / "run").glob("checkpoints/*"))


def test_a_step_that_did_not_fail_is_shown(
    pretrain_corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = pretrain(settings(pretrain_corpus, tmp_path, steps=3, save_every=2))
    with pytest.raises(InputError, match="no step of this run failed; give step=N"):
        replay(run)
    with pytest.raises(InputError, match="steps 1 to 3"):
        replay(run, 4)
    report = replay(run, 3)
    assert not report["found"] and report["start"] == 2
    assert len(report["samples"]) == 4
    assert "loss and gradient are finite here" in capsys.readouterr().out


def test_another_corpus_is_not_replayed(
    pretrain_corpus: Path, labelled_corpus: Path, tmp_path: Path
) -> None:
    run = pretrain(settings(pretrain_corpus, tmp_path, steps=2))
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**config, "corpus": str(labelled_corpus)}))
    with pytest.raises(InputError, match="is not the corpus"):
        replay(run, 1)


def test_the_first_fault_is_kept() -> None:
    """Steps of two micro-batches; a later fault, and finite values after it, change nothing."""
    nan, one = torch.tensor(float("nan")), torch.tensor(1.0)
    faults = Faults(2)

    def own() -> Fault | None:
        return faults.read([faults.positions(torch.zeros((), dtype=torch.float64)).tolist()])

    for step in range(3):
        for micro in range(2):
            faults.see("loss", nan if step >= 1 and micro else one, step, micro)
        faults.see("gradient", nan if step >= 1 else one, step, 1)
        assert (own() is None) == (step == 0)
    assert own() == ("loss", 2, 1, 0)
    row = faults.positions(torch.zeros((), dtype=torch.float64)).tolist()
    assert faults.read([[at + 3 for at in row], row]) == ("loss", 2, 1, 1)


def test_looking_does_not_wait_for_the_device() -> None:
    """A meta tensor has no value: whoever asks for one fails."""
    faults = Faults(1)
    for step in range(3):
        faults.see("loss", torch.empty((), device="meta"), step, 0)
        faults.see("gradient", torch.empty((), device="meta"), step, 0)


def test_json_has_no_nan() -> None:
    assert plain({"a": {"b": float("nan")}, "c": -float("inf"), "d": 1.5}) == {
        "a": {"b": "nan"},
        "c": "-inf",
        "d": 1.5,
    }
