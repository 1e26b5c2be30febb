"""One global order of samples, as a pure function of (seed, epoch, index).

WebDataset's own shuffling, splitting and epochs can neither be reproduced nor resumed, so the tar
is our storage and the order is ours. P lanes own disjoint shards in each epoch and take turns:
position p of the epoch belongs to lane p mod P for as long as all lanes have samples. A node that
owns whole lanes reads only their shards, so N nodes each fetch about 1/N of the corpus.

Global batch t is positions [t G, (t + 1) G) of the concatenated epochs. It does not depend on
ranks, workers or their start method, so the state of the loader is two numbers, the same on every
rank, and another world size continues with exactly the next sample. An epoch has every sample
once; a batch may hold the end of one epoch and the beginning of the next, so nothing is dropped.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

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


@dataclass(frozen=True)
class Schedule:
    """The order in which samples of a corpus are used.

    Args:
        shards: shard number of each sample [n]; the sample's position in this array is its id.
        seed: of the order and of every draw that a sample makes.
        lanes: number of lanes P, fixed for a run and recorded with it.
    """

    shards: NDArray[np.int64]
    seed: int
    lanes: int = 8

    def __post_init__(self) -> None:
        if len(self.shards) == 0:
            raise ValueError("a schedule needs at least one sample")
        # Dataclasses hash by value; the order of an epoch is cached per schedule object instead.
        object.__setattr__(self, "_order", lru_cache(maxsize=2)(self._make_order))

    def __len__(self) -> int:
        """Samples in an epoch."""
        return len(self.shards)

    def __getstate__(self) -> dict[str, object]:
        return {"shards": self.shards, "seed": self.seed, "lanes": self.lanes}

    def __setstate__(self, state: dict[str, object]) -> None:
        for name, value in state.items():
            object.__setattr__(self, name, value)
        self.__post_init__()

    def order(self, epoch: int) -> NDArray[np.int64]:
        """Sample ids of one epoch, each once, in the order of their use [n]."""
        return self._order(epoch)  # type: ignore[attr-defined]

    def _make_order(self, epoch: int) -> NDArray[np.int64]:
        rng = generator("order", self.seed, epoch)
        lanes = [self._shuffle_lane(rng, lane) for lane in self._deal_shards(rng)]
        # Lanes take turns; when the shortest is used up, the others go on taking turns.
        turn = np.concatenate([np.arange(len(lane)) for lane in lanes])
        number = np.concatenate([np.full(len(lane), i) for i, lane in enumerate(lanes)])
        return np.concatenate(lanes)[np.lexsort((number, turn))]

    def _deal_shards(self, rng: np.random.Generator) -> list[list[NDArray[np.int64]]]:
        """Deals whole shards to lanes in random order, each to the lane with the fewest samples."""
        by_shard = np.argsort(self.shards, kind="stable")
        cuts = np.flatnonzero(np.diff(self.shards[by_shard])) + 1
        shards = np.split(by_shard, cuts)
        lanes: list[list[NDArray[np.int64]]] = [[] for _ in range(min(self.lanes, len(shards)))]
        sizes = np.zeros(len(lanes), dtype=np.int64)
        for i in rng.permutation(len(shards)):
            lane = int(sizes.argmin())
            lanes[lane].append(shards[i])
            sizes[lane] += len(shards[i])
        return lanes

    @staticmethod
    def _shuffle_lane(rng: np.random.Generator, lane: list[NDArray[np.int64]]) -> NDArray[np.int64]:
        windows = [np.concatenate(lane[i : i + WINDOW]) for i in range(0, len(lane), WINDOW)]
        return np.concatenate([rng.permutation(window) for window in windows])

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
            "index_hash": index_hash,
        }
