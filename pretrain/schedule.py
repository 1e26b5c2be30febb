"""One global order of samples, as a pure function of (seed, epoch, index).

WebDataset's own shuffling, splitting and epochs can neither be reproduced nor resumed, so the tar
is our storage and the order is ours. P lanes own disjoint shards in each epoch and take turns:
position p of the epoch belongs to lane p mod P for as long as all lanes have samples. Where some
have none left, the others of the same half take their turns, then those of the other: for 2, 4, ...
nodes position p mod N stays within the lanes of one node for as long as that node has samples. A
node that owns whole lanes reads only their shards, so N nodes each fetch about 1/N of the corpus.
What is in an epoch lies evenly in it: a group of few large shards, or of a large weight, has its
share from the first batch to the last.

Global batch t is positions [t G, (t + 1) G) of the concatenated epochs. It does not depend on
ranks, workers or their start method, so the state of the loader is two numbers, the same on every
rank, and another world size continues with exactly the next sample. An epoch has every sample
once, or as often as its weight says; a batch may hold the end of one epoch and the beginning of
the next, so nothing is dropped.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

ORDER = 3
"""Of how the order is made: a run of another one cannot go on with this."""

WINDOW = 4
"""Shards of a lane that are mixed: wide enough to shuffle, narrow enough to cache."""


def generator(use: str, *key: int) -> np.random.Generator:
    """A fresh generator whose numbers depend on nothing but the key (Philox, counter-based).

    Args:
        use: what it is for, so that equal numbers mean different draws elsewhere.
        key: seed, epoch, position, ...
    """
    digest = hashlib.blake2b(repr((use, *key)).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


def _counts(times: NDArray[np.float64], total: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """How often each sample comes in an epoch: its `times`, rounded down or up, `total` in all.

    What is left of `times` is laid end to end in random order, and a comb with a tooth at each
    whole number falls on it (systematic sampling): each is hit with its own probability, none
    twice, and the share of any group strays far less than if samples were drawn one by one.
    """
    counts = np.floor(times + 1e-9).astype(np.int64)
    rest = np.maximum(times - counts, 0.0)
    mixed = rng.permutation(len(times))
    teeth = np.arange(total - counts.sum()) + rng.random()
    ends = np.cumsum(rest[mixed])
    hit = np.searchsorted(ends, teeth, side="right")
    # Where rounding leaves the last tooth beyond the end, it falls on the last that has a rest.
    hit = np.minimum(hit, np.flatnonzero(rest[mixed] > 0).max(initial=0))
    counts[mixed[hit]] += 1
    return counts


@dataclass(frozen=True)
class Schedule:
    """The order in which samples of a corpus are used.

    Args:
        shards: shard number of each sample [n]; the sample's position in this array is its id.
        seed: of the order and of every draw that a sample makes.
        lanes: number of lanes P, fixed for a run and recorded with it.
        times: how often each sample comes in an epoch, on average [n]; None: once. A sample of
            2.3 comes twice or three times in each; their sum is the epoch's length, and whole.
    """

    shards: NDArray[np.int64]
    seed: int
    lanes: int = 8
    times: NDArray[np.float64] | None = None

    def __post_init__(self) -> None:
        if len(self.shards) == 0:
            raise ValueError("a schedule needs at least one sample")
        length = len(self.shards)
        if self.times is not None:
            length = round(float(self.times.sum()))
            if len(self.times) != len(self.shards) or self.times.min() < 0 or length < 1:
                raise ValueError("times: expected a number for each sample, and none below zero")
            if abs(length - self.times.sum()) > 1e-6 * length:
                raise ValueError(f"times: add up to {self.times.sum()}, expected a whole number")
        object.__setattr__(self, "_length", length)
        # Dataclasses hash by value; the order of an epoch is cached per schedule object instead.
        object.__setattr__(self, "_order", lru_cache(maxsize=2)(self._make_order))

    def __len__(self) -> int:
        """Samples in an epoch."""
        return self._length  # type: ignore[attr-defined]

    def __getstate__(self) -> dict[str, object]:
        return {name: getattr(self, name) for name in ("shards", "seed", "lanes", "times")}

    def __setstate__(self, state: dict[str, object]) -> None:
        for name, value in state.items():
            object.__setattr__(self, name, value)
        self.__post_init__()

    def order(self, epoch: int) -> NDArray[np.int64]:
        """Sample ids of one epoch in the order of their use [len(self)]."""
        return self._order(epoch)  # type: ignore[attr-defined]

    def _make_order(self, epoch: int) -> NDArray[np.int64]:
        rng = generator("order", self.seed, epoch)
        ids = np.arange(len(self.shards))
        if self.times is not None:
            drawn = generator("times", self.seed, epoch)
            ids = np.repeat(ids, _counts(self.times, len(self), drawn))
        by_shard = ids[np.argsort(self.shards[ids], kind="stable")]
        shards = np.split(by_shard, np.flatnonzero(np.diff(self.shards[by_shard])) + 1)
        parts = self._parts(rng, shards)
        mixed = [parts[i] for i in rng.permutation(len(parts))]
        # The largest first, so that lanes end together: what one of them has more of comes last.
        mixed.sort(key=len, reverse=True)
        return self._lanes_in_turn(rng, mixed, self.lanes)

    def _parts(
        self, rng: np.random.Generator, shards: list[NDArray[np.int64]]
    ) -> list[NDArray[np.int64]]:
        """The shards, of which those are cut that are more than a lane and twice the mean.

        A group that lies in few shards and comes often would have a lane of its own for most of
        an epoch, and the rest of it to itself. Only these shards are read by several lanes.
        """
        total = sum(map(len, shards))
        lane, twice = total / self.lanes, 2 * total / max(1, len(shards))
        parts: list[NDArray[np.int64]] = []
        for shard in shards:
            cuts = math.ceil(len(shard) / lane) if len(shard) > max(lane, twice) else 1
            parts += np.array_split(rng.permutation(shard), cuts) if cuts > 1 else [shard]
        return parts

    def _lanes_in_turn(
        self, rng: np.random.Generator, shards: list[NDArray[np.int64]], lanes: int
    ) -> NDArray[np.int64]:
        """The samples of some shards as so many lanes have them in turn.

        An even number of lanes is two halves that take turns, each half of the samples: a shard
        goes to the half that has fewer, in the order of `shards`.
        """
        if lanes == 1 or not shards:
            return self._shuffle_lane(rng, shards)
        ways = 2 if lanes % 2 == 0 else lanes
        dealt: list[list[NDArray[np.int64]]] = [[] for _ in range(ways)]
        sizes = np.zeros(ways, dtype=np.int64)
        for shard in shards:
            way = int(sizes.argmin())
            dealt[way].append(shard)
            sizes[way] += len(shard)
        parts = [self._lanes_in_turn(rng, part, lanes // ways) for part in dealt]
        turn = np.concatenate([np.arange(len(part)) for part in parts])
        number = np.concatenate([np.full(len(part), i) for i, part in enumerate(parts)])
        return np.concatenate(parts)[np.lexsort((number, turn))]

    @staticmethod
    def _shuffle_lane(rng: np.random.Generator, lane: list[NDArray[np.int64]]) -> NDArray[np.int64]:
        """A lane's samples: windows of its shards in random order, and what is large anywhere.

        A shard that is more than one of WINDOW parts of the lane lies in all of it.
        """
        nothing = np.zeros(0, dtype=np.int64)
        total = sum(map(len, lane))
        large = [shard for shard in lane if len(shard) * WINDOW > total]
        small = [shard for shard in lane if len(shard) * WINDOW <= total]
        small = [small[i] for i in rng.permutation(len(small))]
        windows = [np.concatenate(small[i : i + WINDOW]) for i in range(0, len(small), WINDOW)]
        spread = rng.permutation(np.concatenate([nothing, *large]))
        order = np.empty(total, dtype=np.int64)
        anywhere = np.zeros(total, dtype=bool)
        anywhere[rng.permutation(total)[: len(spread)]] = True
        order[anywhere] = spread
        order[~anywhere] = np.concatenate([nothing, *map(rng.permutation, windows)])
        return order

    def sample(self, position: int) -> tuple[int, int, int]:
        """What the concatenated epochs hold at a position: (epoch, position in it, sample id)."""
        epoch, within = divmod(position, len(self))
        return epoch, within, int(self.order(epoch)[within])

    def batches(
        self, first: int, last: int, batch_size: int, rank: int = 0, world: int = 1, nodes: int = 1
    ) -> list[range]:
        """Positions of one rank's part of the global batches [first, last).

        Ranks stride through the batch with the node as the fastest index, so that a node sees
        lanes p mod nodes only (whole lanes, where `nodes` divides the number of lanes).

        Args:
            first: global batch to begin with.
            last: global batch to end before.
            batch_size: G, samples of a global batch; divisible by `world`.
            rank: node-major rank, as torchrun and srun number them.
            world: number of ranks.
            nodes: number of nodes.
        """
        if batch_size % world:
            raise ValueError(f"a global batch of {batch_size} does not divide among {world} ranks")
        node, local = divmod(rank, world // nodes)
        offset = local * nodes + node
        return [
            range(t * batch_size + offset, (t + 1) * batch_size, world) for t in range(first, last)
        ]

    def state(self, position: int, index_hash: str) -> dict[str, int | str]:
        """What a checkpoint keeps: nothing in it depends on ranks or workers."""
        epoch, consumed = divmod(position, len(self))
        return {
            "epoch": epoch,
            "consumed": consumed,
            "seed": self.seed,
            "lanes": self.lanes,
            "order": ORDER,
            "index_hash": index_hash,
        }
