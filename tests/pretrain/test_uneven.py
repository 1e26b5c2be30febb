"""Fewer volumes than workers, fewer shards than ranks, tails of epochs: no rank waits in vain."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from rank_runs import machine, run
from test_loop import settings, steps
from test_world_sizes import KEYS, keys

from data_prep.build import prep
from data_prep.corpus import Corpus
from data_prep.settings import PrepSettings
from pretrain.schedule import Schedule

RANKS, WORKERS, VOLUMES = 3, 2, 5


@pytest.fixture
def few(samples: Path, tmp_path: Path) -> Path:
    """Five volumes in one or two shards."""
    with (samples / "pretrain.csv").open() as file:
        rows = list(csv.DictReader(file))[:VOLUMES]
    table = tmp_path / "few.csv"
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(row | {"image": str(samples / row["image"])} for row in rows)
    output = tmp_path / "few"
    prep(PrepSettings(input=table, output=output, keys="names", processes=1, shard_mib=1))
    return output


def test_odd_numbers_train_to_the_end_with_the_samples_of_the_schedule(
    few: Path, tmp_path: Path
) -> None:
    corpus = Corpus.open(few)
    assert len(corpus) == VOLUMES < RANKS * WORKERS and len(set(corpus.shards)) < RANKS
    chosen = settings(
        few, tmp_path, "odd", steps=7, batch_size=6, accumulate=2, log_every=2, save_every=3,
        crop_size=(8, 8, 8), trainer=machine(RANKS, workers=WORKERS),
    )  # fmt: skip
    done = run(chosen, tmp_path, KEYS.format(file=str(tmp_path / "odd.keys")))
    assert done.returncode == 0, done.stderr
    assert steps(tmp_path / "odd") == [1, 2, 3, 4, 6, 7]
    schedule = Schedule(np.asarray(corpus.shards), chosen.seed, chosen.mixed_lanes)
    for step, found in keys(tmp_path / "odd.keys").items():
        places = range(6 * step, 6 * (step + 1))  # each but the first begins within an epoch
        assert found == sorted(str(corpus.keys[schedule.sample(p)[2]]) for p in places)
    assert sorted(keys(tmp_path / "odd.keys")) == list(range(7))


def test_a_damaged_shard_ends_all_ranks_as_wrong_input(few: Path, tmp_path: Path) -> None:
    corpus = Corpus.open(few)
    place, size = (int(corpus.column(f"image_{what}")[2]) for what in ("offset", "size"))
    shard = few / "shards" / f"{corpus.shards[2]:06d}.tar"
    data = bytearray(shard.read_bytes())
    for at in range(place + 64, place + size, 64):
        data[at] ^= 1
    shard.write_bytes(bytes(data))
    chosen = settings(
        few, tmp_path, "damaged", steps=200, batch_size=3, log_every=1,
        trainer=machine(RANKS, workers=1),
    )  # fmt: skip
    done = run(chosen, tmp_path)
    assert done.returncode == 2, done.stderr
    assert str(corpus.keys[2]) in done.stderr
    assert "Traceback" not in done.stderr.replace("FutureWarning", ""), done.stderr
