"""A run that is killed and resumed is the run that was not."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from data_prep.errors import InputError, LostLeaseError
from data_prep.files import write_json
from pretrain.events import Events
from pretrain.failures import failure_folder
from pretrain.loop import Loop, _Watch, machine_precision
from pretrain.preemption import Ask, Preempted
from pretrain.replay import Replay
from pretrain.run_folder import RunFolder, load_checkpoint
from pretrain.settings import PretrainSettings, TrainerSettings
from pretrain.train import pretrain
from slurm.examine import _gpus

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
    "depth": 4,
    "num_heads": 2,
    "drop_path": 0.2,  # what draws from torch's generator must resume too
}
MAE = {
    "_target_": "pretrain.objectives.mae.MAE",
    "decoder_dim": 24,
    "decoder_depth": 1,
    "decoder_heads": 2,
}


def settings(corpus: Path, runs: Path, run: str, **changes: Any) -> PretrainSettings:
    chosen: dict[str, Any] = {
        "corpus": corpus,
        "run": run,
        "runs": runs,
        "backbone": RESENC,
        "objective": CNN_MAE,
        "trainer": {"accelerator": "cpu", "workers": 0, "threads": 1},
        "crop_size": (8, 12, 8),
        "steps": 40,
        "batch_size": 4,
        "lr": 1e-3,
        "warmup": 4,
        "log_every": 5,
        "save_every": 6,
    }
    return PretrainSettings.model_validate(chosen | changes)


def weights(run: Path) -> dict[str, torch.Tensor]:
    paths = sorted((run / "checkpoints").glob("step-*.pt"))
    state = torch.load(paths[-1], weights_only=True)
    return {name: value for name, value in state["objective"].items()}


def steps(run: Path) -> list[int]:
    with (run / "metrics.csv").open() as file:
        return [int(row["step"]) for row in csv.DictReader(file)]


def start(
    chosen: PretrainSettings, folder: Path, start_new_session: bool = False, kill_at: int = 0
) -> subprocess.Popen[bytes]:
    """The same run in a process of its own, so that it can be killed; it is at `kill_at`."""
    file = folder / f"{chosen.run}.json"
    file.write_text(chosen.model_dump_json())
    code = (
        "import sys; from pathlib import Path\n"
        "from pretrain.settings import PretrainSettings; from pretrain.train import pretrain\n"
        "import os; from pretrain.objective import Objective\n"
        "def after(self, progress):\n"
        "    if self.loop.step == int(sys.argv[2]): os.kill(os.getpid(), 9)\n"
        "if sys.argv[2] != '0': Objective.after_step = after\n"
        "pretrain(PretrainSettings.model_validate_json(Path(sys.argv[1]).read_text()))"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, str(file), str(kill_at)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stderr=subprocess.DEVNULL,
        start_new_session=start_new_session,
    )


@pytest.mark.parametrize(("backbone", "objective"), [(RESENC, CNN_MAE), (VIT, MAE)])
def test_kill_9_and_resume_gives_the_same_weights_bit_for_bit(
    pretrain_corpus: Path,
    tmp_path: Path,
    seed: int,
    backbone: dict[str, Any],
    objective: dict[str, Any],
) -> None:
    parts = {"backbone": backbone, "objective": objective}
    pretrain(settings(pretrain_corpus, tmp_path, "whole", **parts))
    killed = settings(pretrain_corpus, tmp_path, "killed", **parts)
    run = tmp_path / "killed"
    process = start(killed, tmp_path, kill_at=int(np.random.default_rng(seed).integers(7, 40)))
    assert process.wait() == -signal.SIGKILL
    assert "" < max(path.name for path in (run / "checkpoints").iterdir()) < "step-00000040.pt"
    pretrain(killed)
    one, other = weights(tmp_path / "whole"), weights(run)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert steps(run) == steps(tmp_path / "whole")


def test_resumed_sample_ids_continue_exactly(
    pretrain_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The keys that reach the objective, in order, are those of an uninterrupted run."""
    from pretrain.objectives.cnn_mae import CnnMAE

    seen: list[list[str]] = []
    original = CnnMAE.forward

    def recording(self: CnnMAE, batch: Any, progress: float) -> Any:
        if batch.image.device.type == "meta":  # the try before the start
            return original(self, batch, progress)
        seen.append(list(batch.keys))
        if self.loop.step == stop_at:
            raise KeyboardInterrupt
        return original(self, batch, progress)

    monkeypatch.setattr(CnnMAE, "forward", recording)
    stop_at = -1
    pretrain(settings(pretrain_corpus, tmp_path, "whole"))
    whole, seen = seen, []
    stop_at = 15
    heard = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        pretrain(settings(pretrain_corpus, tmp_path, "stopped"))
    assert signal.getsignal(signal.SIGINT) is heard
    assert Events(tmp_path / "stopped").starts()[-1].end == "interrupted"
    stop_at = -1
    before, seen = seen, []
    pretrain(settings(pretrain_corpus, tmp_path, "stopped"))
    assert before == whole[:16]
    assert seen == whole[12:]  # the newest checkpoint is of step 12


def losses(run: Path) -> list[float]:
    with (run / "metrics.csv").open() as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


def test_two_ranks_stop_resume_and_match_one_rank(pretrain_corpus: Path, tmp_path: Path) -> None:
    """2-rank DDP over gloo: bitwise after a stop, and the losses of one process on the batch."""

    def chosen(name: str, devices: int, steps: int) -> PretrainSettings:
        return settings(
            pretrain_corpus,
            tmp_path,
            name,
            steps=steps,
            warmup=2,
            save_every=3,
            log_every=1,
            trainer={"accelerator": "cpu", "devices": devices, "workers": 0, "threads": 1},
        )

    two = chosen("two", 2, 6)
    script = tmp_path / "two.py"
    script.write_text(
        "import os, shutil; from pathlib import Path\n"
        "from pretrain.settings import PretrainSettings\n"
        "from pretrain.train import pretrain\n"
        "if __name__ == '__main__':\n"
        f"    pretrain(PretrainSettings.model_validate_json({two.model_dump_json()!r}))\n"
    )
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    command = [sys.executable, str(script)]
    run = tmp_path / "two"
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL, env=environment, timeout=300)
    uninterrupted = weights(run)
    (run / "checkpoints" / "step-00000006.pt").unlink()  # as if killed between steps 3 and 6
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL, env=environment, timeout=300)
    resumed = weights(run)
    assert all(torch.equal(resumed[name], uninterrupted[name]) for name in resumed)
    assert steps(run) == [1, 2, 3, 4, 5, 6]
    one = pretrain(chosen("one", 1, 6))
    assert losses(run) == pytest.approx(losses(one), rel=1e-4)


def test_a_checkpoint_is_read_once_to_go_on_from(
    pretrain_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is gigabytes of a large network, and all of it is summed."""
    chosen = settings(pretrain_corpus, tmp_path, "run", steps=3, save_every=1)
    last = RunFolder(pretrain(chosen)).checkpoints.paths()[-1]
    last.unlink()
    read: list[str] = []

    def counted(path: Path) -> dict[str, Any]:
        read.append(path.name)
        return load_checkpoint(path)

    monkeypatch.setattr("pretrain.run_folder.load_checkpoint", counted)
    monkeypatch.setattr("pretrain.replay.load_checkpoint", counted)
    pretrain(chosen)
    assert last.exists() and read == ["step-00000002.pt"]
    link = failure_folder(tmp_path / "run", 3) / "start.pt"
    link.parent.mkdir(parents=True)
    link.hardlink_to(last.with_name("step-00000002.pt"))
    state = Replay(RunFolder(tmp_path / "run")).start(3)
    assert state is not None and state["step"] == 2 and read == ["step-00000002.pt"] * 2


def test_a_finished_run_does_nothing_more(pretrain_corpus: Path, tmp_path: Path) -> None:
    chosen = settings(pretrain_corpus, tmp_path, "done", steps=3)
    run = pretrain(chosen)
    before = (run / "metrics.csv").read_bytes()
    pretrain(chosen)
    assert (run / "metrics.csv").read_bytes() == before


def test_what_does_not_fit_is_refused_before_a_folder_is_made(
    pretrain_corpus: Path, tmp_path: Path
) -> None:
    """A mask that hides nothing, a crop that does not divide, a ViT under a CNN's objective."""
    for changes, said in (
        ({"objective": {**CNN_MAE, "block": 64, "mask_ratio": 0.5}}, "block"),
        ({"crop_size": (8, 9, 8)}, "must be multiples"),
        ({"backbone": VIT}, "needs a pyramid"),
    ):
        with pytest.raises(InputError, match=said):
            pretrain(settings(pretrain_corpus, tmp_path / "runs", "x", **changes))
    assert not (tmp_path / "runs").exists()


def test_a_run_is_not_repeated_where_that_is_not_wanted(
    pretrain_corpus: Path, tmp_path: Path
) -> None:
    chosen = settings(pretrain_corpus, tmp_path, "once", steps=2, resume="never")
    pretrain(chosen)
    with pytest.raises(InputError, match="exists already"):
        pretrain(chosen)


def test_other_settings_do_not_continue_a_run(pretrain_corpus: Path, tmp_path: Path) -> None:
    pretrain(settings(pretrain_corpus, tmp_path, "mine", steps=3))
    with pytest.raises(InputError) as caught:
        pretrain(settings(pretrain_corpus, tmp_path, "mine", steps=5, lr=2e-3))
    text = str(caught.value)
    assert "(steps: 3 -> 5; lr: 0.001 -> 0.002)" in text
    for objective, said in (
        ({**CNN_MAE, "block": 2}, "(objective.block: 4 -> 2)"),
        (MAE, f"(objective._target_: {CNN_MAE['_target_']} -> {MAE['_target_']})"),
    ):
        with pytest.raises(InputError) as caught:
            pretrain(settings(pretrain_corpus, tmp_path, "mine", steps=3, objective=objective))
        assert any(said in problem for problem in caught.value.problems)


def test_a_run_that_knows_fewer_settings_had_their_defaults(
    pretrain_corpus: Path, tmp_path: Path
) -> None:
    run = pretrain(settings(pretrain_corpus, tmp_path, "older", steps=3))
    config = json.loads((run / "config.json").read_text())
    for name in ("optimizer", "schedule", "intensity", "halve_every"):
        del config[name]
    (run / "config.json").write_text(json.dumps(config))
    pretrain(settings(pretrain_corpus, tmp_path, "older", steps=3))
    with pytest.raises(InputError, match="optimizer: adamw -> sgd"):
        pretrain(settings(pretrain_corpus, tmp_path, "older", steps=3, optimizer="sgd"))


def test_the_intensity_rule_trains_and_travels(pretrain_corpus: Path, tmp_path: Path) -> None:
    narrow = {"CT": {"rule": "window", "low": -175, "high": 250, "onto": [0, 1]}}
    chosen = settings(pretrain_corpus, tmp_path, "narrow", steps=9, intensity=narrow)
    run = pretrain(chosen)
    (rule,) = (
        o
        for o in json.loads((run / "run.json").read_text())["preprocess"]["operations"]
        if o["op"] == "intensity"
    )
    assert rule["CT"] == {"rule": "window", "low": -175.0, "high": 250.0, "onto": [0.0, 1.0]}
    plain = pretrain(settings(pretrain_corpus, tmp_path, "plain", steps=9))
    assert losses(run) != losses(plain)  # nine steps of four: an epoch of MRI and two CT


def test_another_corpus_does_not_continue_a_run(
    pretrain_corpus: Path, labelled_corpus: Path, tmp_path: Path
) -> None:
    """Refused, with the run's facts as they were: export must not take the other corpus's."""
    chosen = settings(pretrain_corpus, tmp_path, "mine", steps=6)
    run = pretrain(chosen)
    before = {name: (run / name).read_bytes() for name in ("run.json", "config.json")}
    with pytest.raises(InputError, match=r"order \(index_hash: [0-9a-f]{64} -> [0-9a-f]{64}\); "):
        pretrain(chosen.model_copy(update={"corpus": labelled_corpus}))
    assert before == {name: (run / name).read_bytes() for name in before}


def test_accumulated_steps_equal_whole_ones(pretrain_corpus: Path, tmp_path: Path) -> None:
    """Two micro-batches of two make the step of one batch of four: the same gradient."""
    norms = []
    for name, accumulate in (("one", 1), ("two", 2)):
        run = pretrain(
            settings(
                pretrain_corpus, tmp_path, name, steps=1, gain=0, accumulate=accumulate,
                crop_size=(8, 8, 8),
            )
        )  # fmt: skip
        with (run / "metrics.csv").open() as file:
            norms.append([float(r["grad_norm"]) for r in csv.DictReader(file)])
        norms[-1] += [float(value.sum()) for value in weights(run).values() if value.ndim == 5]
    assert norms[1] == pytest.approx(norms[0], rel=2e-3, abs=1e-5)


def test_a_gradient_that_is_not_finite_is_never_saved(
    pretrain_corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The loss may still be fine in the very step whose gradient ruins the weights."""
    from pretrain.objectives.cnn_mae import CnnMAE

    original = CnnMAE.forward

    def broken(self: CnnMAE, batch: Any, progress: float) -> Any:
        losses = original(self, batch, progress)
        if batch.image.device.type != "meta" and self.loop.step == 1:
            losses.loss.register_hook(lambda gradient: gradient * float("nan"))
        return losses

    monkeypatch.setattr(CnnMAE, "forward", broken)
    with pytest.raises(FloatingPointError, match="gradient's norm nan"):
        pretrain(settings(pretrain_corpus, tmp_path, "nan", steps=4, save_every=1, log_every=1))
    (only,) = (tmp_path / "nan" / "checkpoints").glob("*")
    assert only.name == "step-00000001.pt"
    # The bar ends with the run, and not when its last reader lets go of it.
    assert "pretrain:  25%" in capsys.readouterr().err


def test_sigterm_saves_and_does_not_look_like_success(
    pretrain_corpus: Path, tmp_path: Path
) -> None:
    """Preempted: a checkpoint of the moment, exit code 143, and the same weights in the end."""
    pretrain(settings(pretrain_corpus, tmp_path, "whole", save_every=1000))
    chosen = settings(pretrain_corpus, tmp_path, "preempted", save_every=1000, log_every=1)
    run = tmp_path / "preempted"
    process = start(chosen, tmp_path)
    while process.poll() is None and not (run / "metrics.csv").exists():
        time.sleep(0.002)
    process.terminate()
    assert process.wait() == 128 + signal.SIGTERM
    (saved,) = (run / "checkpoints").glob("step-*.pt")
    assert 0 < int(saved.stem.removeprefix("step-")) < 40
    pretrain(chosen)
    one, other = weights(tmp_path / "whole"), weights(run)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_sigterm_before_the_first_step_is_no_success(
    pretrain_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranks are compared once Lightning has begun, which has handlers of its own for signals."""
    original = Loop.check_ranks

    def told(self: Loop, *words: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        original(self, *words)

    monkeypatch.setattr(Loop, "check_ranks", told)
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(Preempted) as end:
            pretrain(settings(pretrain_corpus, tmp_path, "early", accumulate=2, batch_size=4))
    finally:
        signal.signal(signal.SIGTERM, before)  # what preempted a run stays deaf
    assert end.value.exit_code == 128 + signal.SIGTERM
    (saved,) = (tmp_path / "early" / "checkpoints").glob("step-*.pt")
    assert saved.name == "step-00000001.pt"


def test_a_writer_that_was_taken_for_dead_ends_and_deletes_nothing(
    pretrain_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its job was started again elsewhere, and has come further."""
    run = RunFolder(tmp_path / "taken")
    original = RunFolder.check_lease

    def taken(self: RunFolder) -> None:
        if self.checkpoints.last_step() >= 4:
            self.checkpoints.save(30, {"step": 30})
            note = json.loads((self.path / "lease.json").read_text())
            write_json(self.path / "lease.json", {**note, "token": "another"})
        original(self)

    monkeypatch.setattr(RunFolder, "check_lease", taken)
    with pytest.raises(LostLeaseError, match="another process writes here now"):
        pretrain(settings(pretrain_corpus, tmp_path, "taken", log_every=1))
    assert run.checkpoints.last_step() == 30
    assert json.loads((run.path / "lease.json").read_text())["token"] == "another"
    assert Events(run.path).starts()[-1].end == "" and max(steps(run.path)) == 6


def test_a_signal_to_the_whole_group_saves_too(pretrain_corpus: Path, tmp_path: Path) -> None:
    """As schedulers send it: the workers of the loader get it as well."""
    machine = {"accelerator": "cpu", "workers": 2, "threads": 1}
    chosen = settings(
        pretrain_corpus, tmp_path, "group", save_every=1000, log_every=1, steps=2000,
        trainer=machine,
    )  # fmt: skip
    run = tmp_path / "group"
    process = start(chosen, tmp_path, start_new_session=True)
    while process.poll() is None and not (run / "metrics.csv").exists():
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait() == 128 + signal.SIGTERM
    (saved,) = (run / "checkpoints").glob("step-*.pt")
    assert 0 < int(saved.stem.removeprefix("step-")) < 2000


def test_a_loss_that_is_not_finite_stops_the_run(
    pretrain_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pretrain.objectives.cnn_mae import CnnMAE

    original = CnnMAE.forward

    def broken(self: CnnMAE, batch: Any, progress: float) -> Any:
        losses = original(self, batch, progress)
        return losses._replace(loss=losses.loss * float("nan"))

    monkeypatch.setattr(CnnMAE, "forward", broken)
    with pytest.raises(FloatingPointError, match="try a lower lr"):
        pretrain(settings(pretrain_corpus, tmp_path, "nan", steps=3))
    assert not list((tmp_path / "nan" / "checkpoints").glob("*"))


def test_the_run_says_what_it_was(pretrain_corpus: Path, tmp_path: Path) -> None:
    run = pretrain(settings(pretrain_corpus, tmp_path, "facts", steps=2, preview_every=2))
    facts = json.loads((run / "run.json").read_text())
    assert facts["corpus"]["samples"] == 36 and set(facts["data"]["modality"]) == {"CT", "MR"}
    assert {"torch", "lightning", "python"} <= facts["versions"].keys()
    pictures = sorted(path.name for path in (run / "previews").glob("*.png"))
    assert pictures == ["step-00000000.png", "step-00000002.png", "strip.png"]
    assert not (run / "lease.json").exists()


def test_loggers_write_offline(
    pretrain_corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kept_by_wandb: Callable[[Path, bytes], bytes],
) -> None:
    pytest.importorskip("tensorboard")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = pretrain(
        settings(pretrain_corpus, tmp_path, "logged", steps=2, loggers=("tensorboard", "wandb"))
    )
    assert list((run / "tensorboard").glob("events.out.tfevents.*"))
    assert list((run / "wandb").glob("offline-run-*"))
    assert len((run / "wandb_id").read_text()) == 8
    # Where it ran and from which folders is nobody else's business.
    logged = kept_by_wandb(run, b"grad_norm")
    assert b"grad_norm" in logged and str(tmp_path).encode() not in logged
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    assert [point.step for point in events.Scalars("loss")] == [1, 2]


@pytest.mark.parametrize("emulated", [True, False])
def test_a_gpu_that_only_emulates_bf16_computes_in_float32(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, emulated: bool
) -> None:
    """As V100 and T4 do; nor does the doctor of a cluster call that support."""

    def supported(including_emulation: bool = True) -> bool:
        return including_emulation or not emulated

    named = SimpleNamespace(name="GPU", total_memory=2**34)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: named)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    expected = "32-true" if emulated else "bf16-mixed"
    assert machine_precision(TrainerSettings()) == expected
    assert machine_precision(TrainerSettings(accelerator="cpu")) == "32-true"
    task: Any = SimpleNamespace(gpus=1)
    assert _gpus(task)["bf16"] == (not emulated)


def test_a_save_by_the_clock_is_asked_for_once() -> None:
    """The answer of all ranks comes a step later, and until then the clock has not gone back."""
    settings = SimpleNamespace(save_minutes=0.5)
    loop = SimpleNamespace(settings=settings, preemption=SimpleNamespace(asked=Ask.NOTHING))
    watch: Any = SimpleNamespace(main=True, loop=loop, saved=time.perf_counter() - 31)
    assert [_Watch._wish(watch) for _ in range(3)] == [Ask.SAVE, Ask.NOTHING, Ask.NOTHING]
