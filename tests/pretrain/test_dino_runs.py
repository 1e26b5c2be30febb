"""Runs of an objective with teachers and prototypes: resumed, watched, exported."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from seeds import SEED
from torch import Tensor

from data_prep.errors import InputError
from pretrain.checksums import tensor_sums
from pretrain.distillation import Centring
from pretrain.estimate import bare_loop
from pretrain.export import export
from pretrain.loop import Loop
from pretrain.objective import Losses
from pretrain.objectives.dino import DINO
from pretrain.objectives.simmim import SimMIM
from pretrain.settings import LoopSettings, PretrainSettings
from pretrain.start import begin_from, taught_names
from pretrain.teacher import Teacher, check_restored, checksums
from pretrain.train import build_objective, pretrain

VIT = {
    "_target_": "pretrain.backbones.vit.ViT3D",
    "patch_size": 4,
    "embed_dim": 48,
    "depth": 2,
    "num_heads": 2,
    "cls_token": True,
    "drop_path": 0.1,
}
TINY = {
    "_target_": "pretrain.objectives.dino.DINO",
    "prototypes": 64,
    "hidden_dim": 64,
    "bottleneck_dim": 16,
    "local": 2,
    "local_size": (8, 8, 8),
    "region": (24, 24, 24),
    "freeze": 0.2,
    "momentum": (0.9, 1.0),
}


def settings(corpus: Path, runs: Path, run: str = "run", **changes: Any) -> PretrainSettings:
    chosen: dict[str, Any] = {
        "corpus": corpus,
        "run": run,
        "runs": runs,
        "backbone": VIT,
        "objective": TINY,
        "trainer": {"accelerator": "cpu", "workers": 0, "threads": 1},
        "crop_size": (16, 16, 16),
        "steps": 8,
        "batch_size": 4,
        "lr": 1e-3,
        "weight_decay": 0.04,
        "weight_decay_end": 0.4,
        "warmup": 2,
        "clip": 3.0,
        "log_every": 2,
        "save_every": 4,
        "health": {"every": 0},
    }
    return PretrainSettings.model_validate(chosen | changes)


def state(run: Path) -> dict[str, Any]:
    return dict(torch.load(sorted((run / "checkpoints").glob("*.pt"))[-1], weights_only=True))


def rows(run: Path, name: str = "metrics.csv") -> list[dict[str, str]]:
    with (run / name).open() as file:
        return list(csv.DictReader(file))


def variant(**changes: Any) -> dict[str, Any]:
    return {"objective": TINY | changes}


@pytest.mark.parametrize(
    "changes",
    [{}, {"targets": "centring", "gram_weight": 1.0, "gram_size": (24, 24, 24), "gram_refresh": 3}],
    ids=["sinkhorn", "centring and gram"],
)
def test_a_resumed_run_is_the_run_bit_for_bit(
    pretrain_corpus: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    """Weights, teachers, centres and the optimiser, with two micro-batches a step."""
    both = variant(**changes) | {"accumulate": 2}
    whole = pretrain(settings(pretrain_corpus, tmp_path, "whole", **both))
    run = pretrain(settings(pretrain_corpus, tmp_path, "stopped", **both))
    sorted((run / "checkpoints").glob("*.pt"))[-1].unlink()  # as if killed after step 4
    pretrain(settings(pretrain_corpus, tmp_path, "stopped", **both))
    one, other = state(whole), state(run)
    assert one["teachers"] == other["teachers"] and len(one["teachers"]) == 3 + bool(changes) * 1
    for name, value in one["objective"].items():
        assert torch.equal(value, other["objective"][name]), name
    of_the_machine = {"seconds_per_step", "samples_per_second", "data_wait", "memory_gib", "start"}
    columns = [name for name in rows(whole)[0] if name not in of_the_machine]
    assert {"cls", "ibot", "koleo", "entropy", "information", "repeated"} <= set(columns)
    for a, b in zip(rows(whole), rows(run), strict=True):
        assert [a[name] for name in columns] == [b[name] for name in columns]


def test_a_teacher_that_is_not_the_saved_one_is_refused(
    pretrain_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = pretrain(settings(pretrain_corpus, tmp_path, steps=4))
    (run / "config.json").write_text(
        (run / "config.json").read_text().replace('"steps": 4', '"steps": 8')
    )
    original = Loop.restore

    def flipped(self: Loop) -> dict[str, Any] | None:
        found = original(self)
        assert found is not None
        found["objective"]["teacher.module.cls_token"][0] += 1e-7
        return found

    monkeypatch.setattr(Loop, "restore", flipped)
    with pytest.raises(InputError, match="the teacher teacher of its checkpoint is not"):
        pretrain(settings(pretrain_corpus, tmp_path, steps=8))
    # A checkpoint of before there were checksums goes on.
    monkeypatch.setattr(Loop, "restore", lambda self: {**original(self), "teachers": {}})
    pretrain(settings(pretrain_corpus, tmp_path, steps=8))


def small() -> tuple[DINO, Loop]:
    from pretrain.backbones.vit import ViT3D

    torch.manual_seed(SEED)
    encoder = ViT3D(**{k: v for k, v in VIT.items() if k != "_target_"})
    model = DINO(encoder=encoder, **{k: v for k, v in TINY.items() if k != "_target_"})
    chosen = LoopSettings(crop_size=(16, 16, 16), steps=10, batch_size=4, lr=1e-3)
    return model, bare_loop(chosen, model)


def test_another_objective_begins_from_the_teacher_as_from_its_release() -> None:
    source, _ = small()
    with torch.no_grad():
        for parameter in source.teacher.parameters():
            parameter += 1.0
    state = source.state_dict()
    other = SimMIM(encoder=small()[0].encoder, block=8)
    report = begin_from(other, state)
    # Moments under these names are of the student, and are not taken.
    assert taught_names(other, state).keys() == {f"encoder.{n}" for n in other.encoder.state_dict()}
    assert not taught_names(small()[0], state)
    taught = source.teacher.module.state_dict()
    assert all(torch.equal(v, taught[n]) for n, v in other.encoder.state_dict().items())
    assert report.sources["encoder.norm.weight"] == "teacher.module.norm.weight"
    same, _ = small()  # which has both
    report = begin_from(same, state)
    assert all(torch.equal(value, state[name]) for name, value in same.state_dict().items())
    assert not report.sources
    # VoCo's teacher is of a projector: its encoder is what its release has.
    encoder = {f"encoder.{n}": v for n, v in taught.items()}
    begin_from(other, {**encoder, "teacher.module.0.weight": torch.zeros(3)})
    assert all(torch.equal(v, taught[n]) for n, v in other.encoder.state_dict().items())


def test_ranks_with_other_teachers_end_with_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums travel in the one message of a logged row, 64 bits exactly."""
    monkeypatch.setattr("pretrain.loop.world_size", lambda: 3)
    model, loop = small()
    zero = torch.zeros(())
    loop.step = 7
    loop.observe(Losses(zero, {"cls": zero}))
    loop.observed(lambda own: torch.stack([own, own]), model)
    names = list(tensor_sums(model))
    place = names.index("teacher.module.cls_token")

    def one_bit(own: Tensor) -> Tensor:
        other = own.clone()
        other[3 + 2 * place + 1] += 1  # loss, cls, grad_norm; two halves for each tensor
        return torch.stack([own, own, other])

    loop.observe(Losses(zero, {"cls": zero}))
    said = r"step 7: teacher.module.cls_token of rank 2 is not that of rank 0"
    with pytest.raises(RuntimeError, match=said):
        loop.observed(one_bit, model)


def test_only_teachers_are_summed() -> None:
    model, _ = small()
    assert list(checksums(model)) == ["teacher", "teacher_head", "teacher_ibot_head"]
    saved = {name: int(total) for name, total in checksums(model).items()}
    check_restored(model, saved, "run")
    model.head.prototypes.data.add_(1)
    check_restored(model, saved, "run")
    model.teacher_head.module.prototypes.data.add_(1)
    with pytest.raises(InputError, match="run: the teacher teacher_head"):
        check_restored(model, saved, "run")
    assert sum(isinstance(part, Teacher) for part in model.modules()) == 3


def test_a_release_is_the_teachers_encoder(pretrain_corpus: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    run = pretrain(settings(pretrain_corpus, tmp_path, steps=4, health={"every": 2}))
    release = tmp_path / "release"
    export(run, release)
    weights = load_file(release / "model.safetensors")
    trained = state(run)["objective"]
    names = [name for name in trained if name.startswith("teacher.module.")]
    assert len(weights) == len(names)
    for name in names:
        own = name.removeprefix("teacher.module.")
        (found,) = (v for n, v in weights.items() if n.removeprefix("encoder.") == own)
        assert torch.equal(found, trained[name])
        if own != "norm.bias":
            assert not torch.equal(found, trained[f"encoder.{own}"])
    assert len(rows(run, "health.csv")) == 3


def test_volumes_that_come_twice_in_a_batch_are_counted_and_told_once(
    pretrain_corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    once = pretrain(settings(pretrain_corpus, tmp_path, "once", steps=2, log_every=1))
    assert [row["repeated"] for row in rows(once)] == ["0", "0"]
    assert "in the batch already" not in capsys.readouterr().err
    twice = pretrain(
        settings(
            pretrain_corpus, tmp_path, "twice", steps=2, log_every=1, batch_size=40, warmup=0,
            **variant(local=0),
        )
    )  # fmt: skip
    assert [int(row["repeated"]) >= 4 for row in rows(twice)] == [True, True]  # of 36 volumes
    said = capsys.readouterr().err
    assert "4 of 40 samples are of a volume" in said and said.count("in the batch already") == 1


# Collapse.


def blunt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Targets that are all but even: nothing sharpens them."""
    original = DINO.teach

    def teach(self: DINO, *args: Any) -> tuple[Tensor, Tensor]:
        self.teacher_temperature = (10.0, 10.0)
        return original(self, *args)

    monkeypatch.setattr(DINO, "teach", teach)


def uncentred(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sharp targets that nothing keeps from being the same for all crops."""
    monkeypatch.setattr(Centring, "update", lambda self: None)


CASES = {
    "healthy": (None, {}, ""),
    "blunt": (blunt, {"targets": "centring"}, "an even guess"),
    "uncentred": (uncentred, {"targets": "centring"}, "all crops are the same"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_collapse_is_told_within_200_steps(
    pretrain_corpus: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    break_it, changes, expected = CASES[name]
    if break_it is not None:
        break_it(monkeypatch)
    objective = TINY | {"freeze": 0.0, "prototypes": 16, **changes}
    run = pretrain(
        settings(
            pretrain_corpus, tmp_path, steps=200, warmup=100, log_every=20, batch_size=8,
            objective=objective, health={"every": 100}, save_every=200,
        )
    )  # fmt: skip
    said = capsys.readouterr().err
    last = rows(run)[-1]
    if expected:
        assert "of run: " in said and expected in said
        assert rows(run, "health.csv")[-1]["collapsed"] == "1"
    else:
        assert "WARNING" not in said
        assert abs(float(last["cls"]) - math.log(16)) > 0.01 < float(last["information"])


def test_objectives_without_teachers_have_none_of_it(pretrain_corpus: Path, tmp_path: Path) -> None:
    mae = {"_target_": "pretrain.objectives.mae.MAE", "decoder_dim": 24, "decoder_depth": 1}
    mae["decoder_heads"] = 2
    chosen = settings(pretrain_corpus, tmp_path, steps=2, warmup=0, objective=mae)
    run = pretrain(chosen)
    assert state(run)["teachers"] == {} and "repeated" not in rows(run)[0]
    built = build_objective(chosen, 1)
    assert built.released is built.encoder
