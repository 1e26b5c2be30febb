"""The order of samples: exact, elastic, the same for every split of the work."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from pretrain.schedule import ORDER, Schedule
from pretrain.settings import PretrainSettings


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


@pytest.mark.parametrize("nodes", [2, 4, 8])
@pytest.mark.parametrize("epoch", [0, 1])
def test_nodes_fetch_their_part_of_uneven_shards(nodes: int, epoch: int, seed: int) -> None:
    """By bytes, of shards of 1 to 40 volumes; an epoch's length is no multiple of anything."""
    rng = np.random.default_rng((seed, nodes))
    sizes = rng.integers(1, 41, 300)
    shards = np.repeat(np.arange(300), sizes)
    schedule = Schedule(shards, seed=seed, lanes=64)
    first, last = epoch * len(schedule), (epoch + 1) * len(schedule)
    parts = []
    for node in range(nodes):
        own = np.arange(node, last, nodes)
        own = own[own >= first] - first
        parts.append(sizes[np.unique(shards[schedule.order(epoch)[own]])].sum() / sizes.sum())
    assert sum(parts) > 1 - 1e-9 and max(parts) < 1.1 / nodes


def test_what_comes_often_is_not_twice_in_a_batch(seed: int) -> None:
    """Half of the samples from 3 % of the volumes, in batches that are no larger than lanes."""
    rng = np.random.default_rng(seed)
    often = rng.permutation(4000) < 120
    times = np.where(often, 2000 / 120, 2000 / 3880)
    order = Schedule(np.arange(4000) // 20, seed=seed, lanes=64, times=times).order(0)
    batches = order[: 4000 // 64 * 64].reshape(-1, 64)
    twice = np.mean([64 - len(np.unique(batch)) for batch in batches])
    by_chance = [64 - len(np.unique(rng.choice(4000, 64, p=times / 4000))) for _ in range(400)]
    assert twice < 1.1 * np.mean(by_chance)


DRIFTING = {
    "a group of few shards, half of the epoch": (
        np.r_[np.arange(36_000) // 60, 600 + np.arange(1000) // 100],
        36_000,
        np.r_[np.full(36_000, 18_500 / 36_000), np.full(1000, 18.5)],
    ),
    "a group of one shard": (
        np.r_[np.arange(980) // 20, np.full(20, 49)],
        980,
        np.r_[np.full(980, 500 / 980), np.full(20, 25.0)],
    ),
    "large volumes in many shards, small ones in few": (
        np.r_[np.arange(20_000) // 10, 2000 + np.arange(20_000) // 500],
        20_000,
        None,
    ),
}


@pytest.mark.parametrize("case", DRIFTING)
def test_a_group_comes_as_often_late_in_an_epoch_as_early(case: str, seed: int) -> None:
    """Within what chance does to batches that are drawn one by one."""
    shards, first, times = DRIFTING[case]
    schedule = Schedule(shards, seed=seed, lanes=64, times=times)
    order = schedule.order(0)
    group = order >= first
    batches = group[: len(order) // 64 * 64].reshape(-1, 64).mean(axis=1)
    assert abs(group.mean() - 0.5) < 0.01
    assert batches.std() < 1.3 * np.sqrt(0.25 / 64)
    for tenth in np.array_split(group, 10)[:-1]:  # lanes end within a few of each other
        assert abs(tenth.mean() - 0.5) < 4 * np.sqrt(0.25 / len(tenth)) + 0.01
    # And nodes still read about their part of the corpus.
    sizes = np.bincount(shards)
    own = [np.unique(shards[order[node::4]]) for node in range(4)]
    assert max(sizes[part].sum() for part in own) < 1.3 * len(shards) / 4


def test_state_is_rank_agnostic_and_plain() -> None:
    schedule = Schedule(np.repeat(np.arange(3), 5), seed=9, lanes=2)
    state = schedule.state(37, "abc")
    assert state == {
        "epoch": 2,
        "consumed": 7,
        "seed": 9,
        "lanes": 2,
        "order": ORDER,
        "index_hash": "abc",
    }


def test_a_schedule_travels_to_spawned_workers() -> None:
    schedule = Schedule(np.repeat(np.arange(3), 5), seed=9, lanes=2)
    copy = pickle.loads(pickle.dumps(schedule))
    assert (copy.order(1) == schedule.order(1)).all()


def test_a_batch_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="10 does not divide among 4 ranks"):
        Schedule(np.zeros(3, dtype=np.int64), seed=0).batches(0, 1, 10, 0, 4)


def test_a_million_samples_come_once_each() -> None:
    schedule = Schedule(np.repeat(np.arange(10_000), 100), seed=0, lanes=64)
    order = schedule.order(0)
    assert (np.bincount(order, minlength=len(schedule)) == 1).all()


@pytest.mark.parametrize("case", range(12))
def test_times_are_kept_in_every_epoch(case: int, seed: int) -> None:
    """Each sample its times rounded down or up; over epochs its times on average; all in all L."""
    rng = np.random.default_rng((seed, case))
    shards = shards_of(rng, int(rng.integers(1, 20)))
    times = rng.exponential(size=len(shards)) * (rng.random(len(shards)) < 0.8) + 1e-3
    length = int(rng.integers(1, 4 * len(shards)))
    times *= length / times.sum()
    schedule = Schedule(shards, seed=case, lanes=3, times=times)
    epochs = 400
    counts = np.stack(
        [np.bincount(schedule.order(e), minlength=len(shards)) for e in range(epochs)]
    )
    assert len(schedule) == length and (counts.sum(1) == length).all()
    assert ((counts == np.floor(times + 1e-9)) | (counts == np.ceil(times - 1e-9))).all()
    # A rest of r comes with chance r: five standard deviations of the mean of Bernoulli draws.
    rest = times - np.floor(times)
    bound = 5 * np.sqrt(rest * (1 - rest) / epochs) + 1e-6
    assert (np.abs(counts.mean(0) - times) <= bound + 1 / epochs).all()


def test_whole_times_are_exact_and_none_leaves_a_sample_out(seed: int) -> None:
    rng = np.random.default_rng(seed)
    shards = shards_of(rng, 9)
    times = rng.integers(0, 4, len(shards)).astype(float)
    times[0] = 1
    schedule = Schedule(shards, seed=1, lanes=4, times=times)
    for epoch in range(3):
        assert (np.bincount(schedule.order(epoch), minlength=len(shards)) == times).all()
    once = Schedule(shards, seed=1, lanes=4, times=np.ones(len(shards)))
    assert (once.order(5) == Schedule(shards, seed=1, lanes=4).order(5)).all()


def test_a_group_has_its_share_of_each_epoch(seed: int) -> None:
    """Half of the samples from 3 % of the volumes: within few draws for the group as a whole.

    Drawn one by one the share of an epoch would stray by sqrt(n / 4) = 16 samples.
    """
    group = np.arange(1000) < 30
    times = np.where(group, 500 / 30, 500 / 970)
    schedule = Schedule(np.arange(1000) // 10, seed=seed, times=times)
    shares = np.array([group[schedule.order(epoch)].sum() for epoch in range(50)])
    assert np.sqrt(np.mean((shares - 500.0) ** 2)) < 5 and abs(shares.mean() - 500) < 2


def test_times_that_cannot_be_kept_are_refused() -> None:
    shards = np.zeros(3, dtype=np.int64)
    for times in ([0.5, 0.2, 0.2], [0.0, 0.0, 0.0], [-1.0, 1.0, 1.0], [1.0, 1.0]):
        with pytest.raises(ValueError, match="times"):
            Schedule(shards, seed=0, times=np.array(times))


def test_lanes_are_as_many_as_a_batch_is_large() -> None:
    given = {"corpus": ".", "run": "x", "steps": 1, "backbone": {}, "objective": {}}
    found = []
    for batch, lanes in ((1, None), (64, None), (65, None), (96, 7), (10_000, None)):
        settings = PretrainSettings.model_construct(**given, batch_size=batch, lanes=lanes)
        found.append(settings.mixed_lanes)
    assert found == [64, 64, 128, 7, 4096]
