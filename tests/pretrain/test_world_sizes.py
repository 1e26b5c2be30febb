"""A run goes on on another number of ranks: the batch and its samples stay, `accumulate` adapts."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_runs import machine, run
from test_dino_runs import settings as dino_settings
from test_loop import settings, steps, weights

from data_prep.errors import InputError
from pretrain.settings import PretrainSettings, ranks_that_fit
from pretrain.train import prepare, pretrain

KEYS = """
from pretrain.objectives.cnn_mae import CnnMAE
forward = CnnMAE.forward
def seen(self, batch, progress):
    if batch.keys:
        with open({file!r}, 'a') as file:
            file.write(f'{{self.loop.step}} {{" ".join(batch.keys)}}\\n')
    return forward(self, batch, progress)
CnnMAE.forward = seen
"""


def keys(file: Path) -> dict[int, list[str]]:
    """The samples of each step, sorted, of all ranks and micro-batches."""
    found: dict[int, list[str]] = {}
    for line in file.read_text().splitlines():
        step, *names = line.split()
        found[int(step)] = sorted(found.get(int(step), []) + names)
    return found


def config(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "config.json").read_text()))


@pytest.mark.parametrize(("first", "then"), [(2, 1), pytest.param(1, 2, marks=pytest.mark.slow)])
def test_a_run_goes_on_on_other_ranks(
    pretrain_corpus: Path, tmp_path: Path, first: int, then: int
) -> None:
    def train(name: str, ranks: int) -> Path:
        # Without padding: micro-batches weigh alike, whatever share of them is padding. By SGD:
        # Adam makes a step of what is rounding in a gradient near zero, and none of a factor.
        chosen = settings(
            pretrain_corpus, tmp_path, name, steps=6, save_every=3, log_every=1, warmup=2,
            crop_size=(8, 8, 8), optimizer="sgd", lr=1e-2, trainer=machine(ranks),
        )  # fmt: skip
        assert chosen.accumulate is None
        done = run(chosen, tmp_path, KEYS.format(file=str(tmp_path / f"{name}.keys")))
        assert done.returncode == 0, done.stderr
        return tmp_path / name

    whole = train("whole", first)
    cut = train("cut", first)
    expected = keys(tmp_path / "whole.keys")
    assert config(cut)["accumulate"] == 1
    (cut / "checkpoints" / "step-00000006.pt").unlink()
    middle = weights(cut)
    (tmp_path / "cut.keys").unlink()
    train("cut", then)
    assert keys(tmp_path / "cut.keys") == {n: expected[n] for n in (3, 4, 5)}
    assert config(cut)["accumulate"] == (2 if then == 1 else 1)
    one, other = weights(whole), weights(cut)
    assert steps(cut) == [1, 2, 3, 4, 5, 6]
    assert max(float((one[n] - middle[n]).abs().max()) for n in one) > 1e-4
    for name in one:
        torch.testing.assert_close(other[name], one[name], rtol=0, atol=1e-6)


def before(batch_size: int, ranks: int, accumulate: int | None) -> dict[str, Any]:
    trainer = {"devices": ranks, "nodes": 1}
    return {"batch_size": batch_size, "trainer": trainer, "accumulate": accumulate}


@pytest.mark.parametrize(
    ("batch_size", "had", "ranks", "expected"),
    [
        (64, (8, 1), 4, 2),
        (64, (8, None), 1, 8),
        (64, (8, 1), 16, 1),
        (64, (8, 2), 4, 4),
        (64, (4, 2), 8, 1),
        (24, (2, 1), 3, 1),
        (24, (4, 1), 3, 2),  # 8 would be more than the 6 of before, 4 are not
        (6, (6, 1), 1, 6),
    ],
)
def test_a_rank_takes_no_more_than_before(
    batch_size: int, had: tuple[int, int | None], ranks: int, expected: int
) -> None:
    def on(devices: int, **more: Any) -> PretrainSettings:
        return settings(
            Path(), Path(), "x", batch_size=batch_size, trainer=machine(devices), **more
        )

    made = on(ranks).resumed(before(batch_size, *had))
    assert made.micro_steps == expected
    assert made.micro_batch * made.micro_steps * ranks == batch_size
    assert made.micro_batch <= batch_size // (had[0] * (had[1] or 1))
    # Other ranks may read what the first one has written already.
    again = on(ranks).resumed(before(batch_size, ranks, made.micro_steps))
    assert again.micro_steps == expected
    assert on(ranks, accumulate=1).resumed(before(batch_size, *had)).micro_steps == 1


def test_what_does_not_divide_is_refused_with_what_would() -> None:
    said = r"accumulate = 6; with accumulate=2 it divides among 1, 2, 4, 8 ranks"
    with pytest.raises(ValueError, match=said):
        settings(Path(), Path(), "x", batch_size=16, accumulate=2, trainer=machine(3))
    assert ranks_that_fit(64, 1) == [1, 2, 4, 8, 16, 32, 64]
    assert ranks_that_fit(6, 4) == []


def test_what_compares_samples_keeps_its_micro_batches(
    pretrain_corpus: Path, tmp_path: Path
) -> None:
    """Of two ranks it goes on on one with the same loss, or not at all."""
    made = pretrain(dino_settings(pretrain_corpus, tmp_path, steps=2))
    had = config(made)
    had["steps"] = 4
    had["trainer"]["devices"] = 2
    (made / "config.json").write_text(json.dumps(had))
    with pytest.raises(InputError) as caught:
        prepare(dino_settings(pretrain_corpus, tmp_path, steps=4))
    (said,) = caught.value.problems
    assert said.startswith("accumulate=2: the run has accumulate=1, on 2 ranks with 2 samples")
    assert "DINO compares or mixes the samples" in said
    assert said.endswith("or give accumulate=1: 4 samples at once on each of 1")
    prepare(dino_settings(pretrain_corpus, tmp_path, steps=4, accumulate=1))


@pytest.mark.parametrize(
    "objective",
    [
        {"name": "voco.VoCo", "form": "nnssl", "inter": False, "targets": 1, "grid": [1, 1, 2]},
        {"name": "volume_fusion.VolumeFusion", "form": "grid", "batch_dice": True},
    ],
    ids=["batch norm", "Dice over the batch"],
)
def test_what_has_statistics_of_a_micro_batch_keeps_it(
    objective: dict[str, Any], pretrain_corpus: Path, tmp_path: Path
) -> None:
    """Also where no samples are compared or taken in pairs, so that these do not say so."""
    name = objective.pop("name")
    made = partial(
        settings, pretrain_corpus, tmp_path, "run", save_every=2, batch_size=4, warmup=1,
        objective={"_target_": f"pretrain.objectives.{name}", **objective},
    )  # fmt: skip
    run = pretrain(made(steps=2))
    had = config(run)
    had["steps"] = 4
    had["trainer"]["devices"] = 2
    (run / "config.json").write_text(json.dumps(had))
    with pytest.raises(InputError, match="compares or mixes the samples of a micro-batch"):
        prepare(made(steps=4))
    prepare(made(steps=4, accumulate=1))


SLOW = """
from pretrain.loop import Loop
from pretrain.run_folder import Checkpoints
save, fit = Checkpoints.save, Loop.fit
def slowly(self, step, state):
    time.sleep(3)
    return save(self, step, state)
def train(self, *given):
    fit(self, *given)
    Path({folder!r}, str(RANK)).write_text(str(self.run.checkpoints.last_step()))
Checkpoints.save, Loop.fit = slowly, train
"""


def test_no_rank_is_through_before_the_last_state_is_whole(
    pretrain_corpus: Path, tmp_path: Path
) -> None:
    """The next stage reads it: weights of the first rank alone, moments each for itself."""
    chosen = settings(
        pretrain_corpus, tmp_path, "run", steps=2, warmup=1, save_every=100, trainer=machine(2)
    )
    done = run(chosen, tmp_path, SLOW.format(folder=str(tmp_path)))
    assert done.returncode == 0, done.stderr
    assert [(tmp_path / str(rank)).read_text() for rank in (0, 1)] == ["2", "2"]
