"""Whatever ranks, nodes and workers take over at any step: the same crops follow."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep.corpus import Corpus
from data_prep.preprocess import Preprocess
from pretrain.bench_loader import private_bytes
from pretrain.crops import Crops
from pretrain.loader import CropDataset, make_loader
from pretrain.schedule import Schedule

CASES = 4
START_METHODS = ("spawn", "forkserver", "fork")


def dataset_of(
    corpus: Corpus, samples: Sequence[int], seed: int, lanes: int, crops: int
) -> CropDataset:
    schedule = Schedule(corpus.shards[list(samples)], seed=seed, lanes=lanes)
    preprocess = Preprocess.default()
    return CropDataset(corpus, samples, schedule, preprocess, (8, 8, 8), crops=Crops(crops))


def crops_of(batch: dict[str, Any]) -> list[tuple[str, int, bytes]]:
    """Of each crop: the volume, the seed of its draws, its voxels."""
    images = (image.numpy().tobytes() for image in batch["image"])
    return list(zip(batch["key"], batch["seeds"], images, strict=True))


@pytest.mark.parametrize("case", range(CASES))
def test_who_reads_changes_at_any_step_and_nothing_else_does(
    pretrain_corpus: Path, case: int, seed: int
) -> None:
    rng = np.random.default_rng([seed, case])
    corpus = Corpus.open(pretrain_corpus)
    lanes, k = int(rng.choice([1, 2, 4, 8])), int(rng.integers(1, 4))
    count = int(rng.integers(len(corpus) // 2, len(corpus) + 1))  # shards are uneven then
    samples = sorted(rng.choice(len(corpus), count, replace=False).tolist())
    dataset = dataset_of(corpus, samples, int(rng.integers(1000)), lanes, k)
    batch_size = 12
    steps = 2 * count // batch_size + 3  # more than two epochs
    alone = make_loader(dataset, batch_size=batch_size, first_step=0, last_step=steps)
    whole = [crops_of(batch) for batch in alone]
    epoch = [key for step in whole for key, _, _ in step[::k]][:count]
    assert sorted(epoch) == sorted(corpus.keys[sample] for sample in samples)

    cuts = sorted({0, steps, *map(int, rng.integers(1, steps, 3))})
    for first, last in pairwise(cuts):
        nodes = int(rng.choice([n for n in (1, 2, 4) if lanes % n == 0]))
        world = nodes * int(rng.choice([n for n in (1, 2, 3) if batch_size % (n * nodes) == 0]))
        workers, method = int(rng.integers(0, 3)), "fork"
        if first == 0:  # one by another method, which takes seconds, is enough of it
            nodes, world, workers = 1, 1, 1
            method = START_METHODS[(seed + case) % len(START_METHODS)]
        parts = []
        for rank in range(world):
            loader = make_loader(
                dataset, batch_size=batch_size, first_step=first, last_step=last, rank=rank,
                world=world, nodes=nodes, workers=workers, start_method=method,
            )  # fmt: skip
            assert len(loader) == last - first
            parts.append([crops_of(batch) for batch in loader])
        for step in range(first, last):
            there = [part[step - first] for part in parts]
            assert {len(one) for one in there} == {batch_size * k // world}
            # Rank r of node n has samples n + r * nodes, and so on by `world`.
            of_rank = [divmod(rank, world // nodes) for rank in range(world)]
            order = np.argsort([local * nodes + node for node, local in of_rank])
            samples = [
                there[rank][i * k : (i + 1) * k]
                for i in range(batch_size // world)
                for rank in order
            ]
            found = [crop for sample in samples for crop in sample]
            assert found == whole[step], (case, first, last, world, nodes, workers, method, step)


def test_ten_thousand_crops_leave_nothing_behind(pretrain_corpus: Path) -> None:
    """Memory of a process that reads, from its 2,000th crop to its 10,000th."""
    corpus = Corpus.open(pretrain_corpus)
    dataset = dataset_of(corpus, range(len(corpus)), 0, 1, 4)

    def read(first: int, last: int) -> int:
        for index in range(first, last):
            dataset[index]
        return private_bytes(os.getpid())

    before = read(0, 2_000)
    if not before:
        pytest.skip("the kernel does not say what memory is private")
    assert read(2_000, 10_000) - before < 4 << 20
