"""The order of samples: exact, elastic, the same for every split of the work."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from pretrain.schedule import Schedule


def shards_of(rng: np.random.Generator, count: int) -> np.ndarray:
    return np.repeat(np.arange(count), rng.integers(1, 12, count)).astype(np.int64)


@pytest.mark.parametrize("case", range(12))
def test_each_sample_once_in_an_epoch_and_orders_differ(case: int, seed: int) -> None:
    rng = np.random.default_rng((seed, case))
    shards = shards_of(rng, int(rng.integers(1, 40)))
    schedule = Schedule(shards, seed=case, lanes=int(rng.integers(1, 16)))
    orders = [schedule.order(epoch) for epoch in range(3)]
    for order in orders:
        assert sorted(order) == list(range(len(shards)))
    if len(shards) > 8:
        assert (orders[0] != orders[1]).any()
        assert (orders[0] != Schedule(shards, seed=case + 1).order(0)).any()
    again = Schedule(shards, seed=case, lanes=schedule.lanes)
    assert (again.order(2) == orders[2]).all()  # without having seen epochs 0 and 1


@pytest.mark.parametrize("case", range(12))
def test_ranks_together_read_the_global_batch(case: int, seed: int) -> None:
    rng = np.random.default_rng((seed, case))
    schedule = Schedule(shards_of(rng, 9), seed=0, lanes=4)
    nodes, local = (int(n) for n in rng.integers(1, 4, 2))
    world, batch = nodes * local, nodes * local * int(rng.integers(1, 4))
    parts = [schedule.batches(3, 20, batch, rank, world, nodes) for rank in range(world)]
    for t in range(17):
        read = sorted(position for part in parts for position in part[t])
        assert read == list(range((t + 3) * batch, (t + 4) * batch))


def test_a_batch_spans_epochs_and_nothing_is_dropped() -> None:
    schedule = Schedule(np.repeat(np.arange(3), 5), seed=1, lanes=2)
    seen = [
        schedule.sample(position)[::2] for batch in schedule.batches(0, 30, 4) for position in batch
    ]
    assert len(seen) == 120
    for epoch in range(8):
        assert sorted(i for e, i in seen if e == epoch) == list(range(15))


def test_resuming_from_any_step_continues_the_order() -> None:
    schedule = Schedule(np.repeat(np.arange(4), 7), seed=5, lanes=3)
    whole = schedule.batches(0, 40, 6)
    for step in (0, 1, 17, 39):
        assert schedule.batches(0, step, 6) + schedule.batches(step, 40, 6) == whole


def test_a_node_that_owns_lanes_reads_only_their_shards() -> None:
    """With lanes divisible by nodes (not by ranks), each node touches its share of the shards."""
    shards = np.repeat(np.arange(64), 10)
    schedule = Schedule(shards, seed=0, lanes=4)
    touched = []
    for node in range(4):
        ranks = [2 * node, 2 * node + 1]
        positions = [
            p
            for rank in ranks
            for batch in schedule.batches(0, len(shards) // 16, 16, rank, world=8, nodes=4)
            for p in batch
        ]
        touched.append({int(shards[schedule.sample(p)[2]]) for p in positions})
    assert sum(len(part) for part in touched) == 64  # disjoint and complete
    assert all(len(part) == 16 for part in touched)


def test_state_is_rank_agnostic_and_plain() -> None:
    schedule = Schedule(np.repeat(np.arange(3), 5), seed=9, lanes=2)
    state = schedule.state(37, "abc")
    assert state == {"epoch": 2, "consumed": 7, "seed": 9, "lanes": 2, "index_hash": "abc"}


def test_a_schedule_travels_to_spawned_workers() -> None:
    schedule = Schedule(np.repeat(np.arange(3), 5), seed=9, lanes=2)
    copy = pickle.loads(pickle.dumps(schedule))
    assert (copy.order(1) == schedule.order(1)).all()


def test_a_batch_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="10 does not divide among 4 ranks"):
        Schedule(np.zeros(3, dtype=np.int64), seed=0).batches(0, 1, 10, 0, 4)


def test_a_million_samples_plan_quickly_enough_to_start() -> None:
    schedule = Schedule(np.repeat(np.arange(10_000), 100), seed=0, lanes=64)
    order = schedule.order(0)
    assert np.bincount(order, minlength=len(schedule)).max() == 1
