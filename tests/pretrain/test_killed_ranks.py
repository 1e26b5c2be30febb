"""Two ranks, one of them killed five times at random steps: the run is the one that was not."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from rank_runs import machine, run
from test_loop import settings, steps, weights

from pretrain.settings import PretrainSettings

STEPS = 24

WATCHED = """
from pretrain.objectives.cnn_mae import CnnMAE
forward = CnnMAE.forward
KILLS = {kills!r}
def seen(self, batch, progress):
    if batch.keys:
        step = self.loop.step
        with open({file!r}, 'a') as file:
            file.write(f'{{step}} {{RANK}} {{" ".join(batch.keys)}}\\n')
        if (step, RANK) in KILLS:
            os.kill(os.getpid(), 9)
    return forward(self, batch, progress)
CnnMAE.forward = seen
"""


def seen(file: Path) -> dict[int, list[str]]:
    """The samples of each step, sorted, of both ranks; a step that is made again has the same."""
    found: dict[tuple[int, int], list[list[str]]] = {}
    for line in file.read_text().splitlines():
        step, rank, *names = line.split()
        found.setdefault((int(step), int(rank)), []).append(names)
    assert all(len(set(map(tuple, again))) == 1 for again in found.values())
    made: dict[int, list[str]] = {}
    for (step, _), again in found.items():
        made[step] = sorted(made.get(step, []) + again[0])
    return made


@pytest.mark.slow
def test_ids_and_weights_are_those_of_a_run_that_was_not_killed(
    pretrain_corpus: Path, tmp_path: Path, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    kills = sorted(map(int, rng.choice(np.arange(2, STEPS), 5, replace=False)))
    victims = rng.integers(0, 2, 5).tolist()

    def chosen(name: str, ranks: int) -> PretrainSettings:
        return settings(
            pretrain_corpus, tmp_path, name, steps=STEPS, save_every=4, log_every=1, warmup=2,
            trainer=machine(ranks, workers=1),
        )  # fmt: skip

    def train(name: str, ranks: int, now: Sequence[tuple[int, int]] = ()) -> int:
        changes = WATCHED.format(file=str(tmp_path / f"{name}.keys"), kills=list(now))
        return run(chosen(name, ranks), tmp_path, changes).returncode

    assert train("whole", 2) == 0
    for step, victim in zip(kills, victims, strict=True):
        assert train("killed", 2, [(step, victim)]) != 0
        saved = sorted(path.name for path in (tmp_path / "killed" / "checkpoints").glob("*.pt"))
        assert not saved or saved[-1] <= f"step-{step:08d}.pt"
    assert train("killed", 2) == 0
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert steps(tmp_path / "killed") == steps(tmp_path / "whole")
    ids = seen(tmp_path / "whole.keys")
    assert list(ids) == list(range(STEPS)) and seen(tmp_path / "killed.keys") == ids

    # Alone the one rank goes on with the samples of both.
    assert train("alone", 2, [(kills[2], victims[2])]) != 0
    assert train("alone", 1) == 0
    lone: dict[int, list[str]] = {}
    for line in (tmp_path / "alone.keys").read_text().splitlines():
        step, _, *names = line.split()
        lone.setdefault(int(step), []).extend(names)
    assert set(lone) == set(ids)
    assert all(set(lone[step]) == set(ids[step]) for step in ids)
    last = STEPS - 1  # which was made once
    assert sorted(lone[last]) == ids[last]
