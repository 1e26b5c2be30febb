"""Shards from elsewhere come before workers need them: threads of each node's first rank.

Workers wait for a shard that is not on the node's shelf, or fetch it themselves, so nothing depends
on these threads but the time that they wait.
"""

from __future__ import annotations

import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator

import numpy as np

from data_prep.errors import InputError, UnreachableError
from pretrain.loader import CropDataset

SHARDS = 4
"""That are on the shelf, or on their way, before the step that needs them: each by a thread, for
one connection seldom gives all that a network has."""

HORIZON = 256
"""Micro-steps ahead that are looked at. All of a run would be hours of drawing samples, beside the
training and for its interpreter, where all shards are there; and they may be gone when needed."""

LOOK_SECONDS = 0.2


class Ahead:
    """Fetches the shards that a node will need, in the order of need, until its end.

    Args:
        dataset: whose corpus has a shelf; of any other nothing is fetched.
        now: gives the micro-step under way, where it begins.
        last: micro-step to end before.
        batch_size: samples of a global micro-batch.
        node: number of this node.
        nodes: how many there are.
        local: ranks of a node.
    """

    def __init__(
        self,
        dataset: CropDataset,
        now: Callable[[], int],
        *,
        last: int,
        batch_size: int,
        node: int = 0,
        nodes: int = 1,
        local: int = 1,
    ) -> None:
        self.dataset = dataset
        self.now = now
        self.steps = range(now(), last)
        self.batch_size = batch_size
        self.node, self.nodes, self.local = node, nodes, local
        self._over = threading.Event()
        self._turn = threading.Lock()
        self._early: deque[int] = deque()
        self._told = False
        self._needed = self.needed()
        if dataset.corpus.shelf is not None:
            for _ in range(SHARDS):
                threading.Thread(target=self._run, name="ahead", daemon=True).start()

    def end(self) -> None:
        """Fetches no more."""
        self._over.set()

    def needed(self) -> Iterator[tuple[int, int]]:
        """Micro-steps and the shards that the node's ranks read in them, in order."""
        dataset = self.dataset
        shards = np.asarray(dataset.corpus.shards)[dataset.samples]
        world = self.nodes * self.local
        ranks = range(self.node * self.local, (self.node + 1) * self.local)
        for step in self.steps:
            found: dict[int, None] = {}
            for rank in ranks:
                (batch,) = dataset.schedule.batches(
                    step, step + 1, self.batch_size, rank, world, self.nodes
                )
                for position in batch:
                    found[int(shards[dataset.schedule.sample(position)[2]])] = None
            for shard in found:
                yield step, shard

    def _run(self) -> None:
        while (shard := self._next()) is not None:
            try:
                self.dataset.corpus.bring(shard)
            except (InputError, UnreachableError, OSError) as error:
                self._tell(error)

    def _tell(self, error: Exception) -> None:
        """Says for the first shard that does not come that others are gone on with."""
        with self._turn:
            if self._over.is_set() or self._told:
                return
            self._told = True
        said = str(error).splitlines()[0]
        print(
            f"WARNING: a shard does not come ahead of time and is left to its readers, and so are "
            f"others like it: {said}",
            file=sys.stderr,
        )

    def _next(self) -> int | None:
        """A shard that is not there, once its time has come; None at the end."""
        with self._turn:
            for step, shard in self._needed:
                while self._is_full() or step > self.now() + HORIZON:
                    if self._over.wait(LOOK_SECONDS):
                        return None
                if self._over.is_set():
                    return None
                if step >= self.now() and not self.dataset.corpus.has_shard(shard):
                    self._early.append(step)
                    return shard
        return None

    def _is_full(self) -> bool:
        now = self.now()
        while self._early and self._early[0] <= now:
            self._early.popleft()
        return len(self._early) >= SHARDS
