"""Are the features of a run alive? A look at fixed crops now and then, without touching the run.

The watched crops are the middles of fixed volumes of the training corpus, as they are: no
augmentation, no mask, evaluation mode, no gradient and no draw, so that a run has the same weights
with and without it. Of the deepest feature map it looks at the dense tokens and at their mean over
each crop:

- std: standard deviation over the vectors, mean of the dimensions, after each vector is scaled to
  length 1, in units of 1/sqrt(dimensions): 1 for directions without preference, 0 where all are
  the same (Chen and He 2020, "Exploring simple Siamese representation learning", arXiv:2011.10566).
- rank: RankMe (Garrido et al. 2022, arXiv:2210.02885), the exponential of the entropy of the
  singular values; not centred, as in the paper.
- dead: share of the dimensions in which the scaled vectors hardly differ.

Random networks have low values to begin with, and objectives differ, so a collapse is called only
where a value is near its floor and far below what it was at the run's first look.

health.csv has a row per look, with the time that it took, and the probe's scores (pretrain.probe)
where one is asked for. The first row, of step 0, is the untrained encoder.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_prep.errors import FailedError
from data_prep.files import write_json
from pretrain.backbones.backbone import Backbone
from pretrain.loader import CropDataset, collate, to_batch, to_device
from pretrain.objective import evaluating
from pretrain.probe import Encode, Probe
from pretrain.run_folder import MetricsLog
from pretrain.settings import HealthSettings

VOLUMES = 16
"""Watched crops: the rank of their means can tell no more directions than there are crops."""

TOKENS = 2048
"""Dense tokens that enter the statistics, evenly over the crops: enough to tell a rank of some
hundred, and the singular values of more would cost more than the rest of a look."""

AT_ONCE = 4
"""Crops of one forward pass: less memory than a training step."""

SHARE = 0.02
"""Of the training time that looks may take by `every: auto`; the promise is 3 %."""

LEAST_EVERY = 50
"""Steps between looks at least by `every: auto`: features change more slowly than this."""

LENGTH_FLOOR = 1e-12
EPSILON = 1e-7
"""RankMe's own constant, added to each share."""

DEAD = 0.01
"""Of the deviation without preference; a dimension below it is dead, and features whose mean is
below it differ by less than a hundredth of their length."""

RANK_FLOOR = 1.2
"""Of two directions, what 96 % and 4 % of the spread make: all vectors lie on one line but for a
rest."""

FALL = 0.5
"""Of its first value (of a rank: of what exceeds 1) a value must have lost half as well."""


class CollapseError(FailedError):
    """The features have collapsed and `health.stop` ends the run, for good: it would again."""

    final = True


class Spread(NamedTuple):
    """How far vectors spread: see the module's text."""

    std: float
    rank: float
    dead: float


def spread(vectors: NDArray[Any]) -> Spread:
    """Measures vectors [N, E]; all values NaN where a vector is not finite."""
    x = np.asarray(vectors, dtype=np.float64)
    if not np.isfinite(x).all():
        return Spread(np.nan, np.nan, np.nan)
    scaled = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), LENGTH_FLOOR)
    deviation = scaled.std(axis=0) * np.sqrt(x.shape[1])
    return Spread(float(deviation.mean()), rankme(x), float((deviation < DEAD).mean()))


def rankme(vectors: NDArray[np.float64]) -> float:
    """RankMe of [N, E]: exp(-sum p log p), p the singular values over their sum, plus 1e-7.

    The singular values come from the smaller of the two Gram matrices, which halves their digits:
    8 of them are left, as many as the constant has.
    """
    n, e = vectors.shape
    gram = vectors @ vectors.T if n < e else vectors.T @ vectors
    singular = np.sqrt(np.clip(np.linalg.eigvalsh(gram), 0, None))
    share = singular / max(float(singular.sum()), LENGTH_FLOOR) + EPSILON
    return float(np.exp(-(share * np.log(share)).sum()))


def collapse(now: Spread, first: Spread) -> str:
    """Why features count as collapsed; empty if they do not.

    Args:
        now: of the dense tokens or of the crops' means.
        first: the same at the run's first look.
    """
    if now.std < DEAD and now.std < FALL * first.std:
        return f"std {now.std:.3f}, was {first.std:.3f}"
    if now.rank < RANK_FLOOR and now.rank - 1 < FALL * (first.rank - 1):
        return f"rank {now.rank:.2f}, was {first.rank:.2f}"
    return ""


class Health:
    """Looks at a run's encoder and keeps health.csv; used by rank 0 alone."""

    def __init__(
        self,
        settings: HealthSettings,
        dataset: CropDataset,
        run: Path,
        probe: Probe | None = None,
    ) -> None:
        self.settings = settings
        self.dataset = dataset
        self.run = run
        self.probe = probe
        self.collapsed = False
        self.alarm = ""
        self.looks = 0
        self.seconds = 0.0
        self._every = 0
        self._warm: tuple[int, float] | None = None
        self._crops: list[dict[str, Any]] = []
        self._rows: list[dict[str, float]] = []

    def begin(self, step: int) -> bool:
        """Prepares a process that starts at a step; returns whether to look at it right away."""
        if step == 0:  # what lies here is of a start that left no checkpoint, maybe another network
            for name in ("health.csv", "health.json"):
                (self.run / name).unlink(missing_ok=True)
        self._log = MetricsLog(self.run / "health.csv", step)
        self._rows = self._log.rows()
        self.collapsed = bool(self._rows and self._rows[-1]["collapsed"])
        self._every = self._chosen()
        self._began, self._warm = time.perf_counter(), None
        return not self._rows and self.settings.every != 0

    def due(self, step: int, *, logged: bool, last: bool) -> bool:
        """Whether to look after a step; where a row was just `logged`, `auto` may choose."""
        if self.settings.every == 0:
            return False
        if not self._every and logged:
            if self._warm is None:  # what comes before is start-up: workers, kernels, compilation
                self._warm = (step, time.perf_counter())
            elif step - self._warm[0] >= 10:
                self._choose(step)
        return last or (bool(self._every) and step % self._every == 0)

    @property
    def share(self) -> float:
        """Of this process' time since it began, what went into looks."""
        return self.seconds / max(time.perf_counter() - self._began, 1e-9)

    def summary(self) -> str:
        """What watching cost."""
        return (
            f"health: {self.looks} look{'s' * (self.looks != 1)}, {self.seconds:.1f} s, "
            f"{self.share:.1%} of the time; health.csv"
        )

    def look(
        self,
        encoder: Backbone,
        step: int,
        context: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> dict[str, float | int]:
        """Looks, writes a row and returns it.

        Args:
            encoder: the run's; left in the mode that it is in.
            step: that is done.
            context: what the trainer computes a step in (autocast).
        """
        device = next(encoder.parameters()).device
        if device.type == "cuda":
            torch.cuda.synchronize()  # the steps that still run are not ours to account for
        began = time.perf_counter()

        def encode(image: Tensor) -> list[Tensor]:
            with context():
                return [found.float() for found in encoder(image)]

        with evaluating(encoder):
            tokens, means = self._features(encode, device)
            scores = {}
            if self.probe is not None:
                scores = self.probe.score(encode, encoder.strides, device)
        dense, pooled = spread(tokens), spread(means)
        reason = self._judge(dense, pooled) or self.alarm
        took = time.perf_counter() - began
        self.seconds += took
        self.looks += 1
        if reason and not self.collapsed:
            print(
                f"WARNING: step {step} of {self.run.name}: the features have collapsed ({reason}); "
                "the encoder tells its inputs hardly apart. Look at health.csv; try a lower lr, a "
                "longer warmup or another seed",
                file=sys.stderr,
            )
        self.collapsed = bool(reason)
        row: dict[str, float | int] = {
            "step": step,
            "std": dense.std,
            "rank": dense.rank,
            "dead": dense.dead,
            "pooled_std": pooled.std,
            "pooled_rank": pooled.rank,
            "pooled_dead": pooled.dead,
            "collapsed": int(self.collapsed),
            **scores,
            "seconds": took,
            "share": self.share,
        }
        self._log.write(row)
        self._rows.append({name: float(value) for name, value in row.items()})
        return row

    def heed(self, said: str, step: int) -> None:
        """Takes in what the objective says of a logged row; the alarm lasts while it says so.

        Args:
            said: what is wrong; empty if nothing is.
            step: that is done.
        """
        if said and not self.alarm:
            print(
                f"WARNING: step {step} of {self.run.name}: {said}; look at metrics.csv; try a "
                "lower lr, a longer warmup or another seed",
                file=sys.stderr,
            )
        self.alarm = said
        self.collapsed = self.collapsed or bool(said)

    def _features(
        self, encode: Encode, device: torch.device
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Dense tokens [T, E] and means over the crops [B, E] of the deepest map."""
        if not self._crops:
            self._crops = self.dataset.pictured(VOLUMES)
        each = max(1, TOKENS // len(self._crops))
        tokens, means = [], []
        for first in range(0, len(self._crops), AT_ONCE):
            raw = collate(self._crops[first : first + AT_ONCE])
            moved = to_device(raw, device)
            cells = encode(to_batch(moved).image)[-1].flatten(2).transpose(1, 2)
            chosen = np.unique(np.linspace(0, cells.shape[1] - 1, each).round().astype(int))
            tokens.append(cells[:, torch.from_numpy(chosen).to(device)].flatten(0, 1).cpu())
            means.append(cells.mean(1).cpu())
        return torch.cat(tokens).numpy(), torch.cat(means).numpy()

    def _judge(self, dense: Spread, pooled: Spread) -> str:
        if not self._rows:
            return ""
        first = self._rows[0]
        for name, prefix, now in (("tokens", "", dense), ("crops", "pooled_", pooled)):
            before = Spread(*(first[prefix + field] for field in Spread._fields))
            reason = collapse(now, before)
            if reason:
                return f"{name}: {reason}"
        return ""

    def _chosen(self) -> int:
        """Steps between looks; 0 while `auto` has not chosen. A run keeps its choice for life."""
        if self.settings.every != "auto":
            return self.settings.every
        try:
            return int(json.loads((self.run / "health.json").read_text())["every"])
        except FileNotFoundError:
            return 0

    def _choose(self, step: int) -> None:
        assert self._warm is not None
        per_step = (time.perf_counter() - self._warm[1]) / (step - self._warm[0])
        cost = min(row["seconds"] for row in self._rows)
        self._every = interval(cost, per_step)
        write_json(
            self.run / "health.json",
            {"every": self._every, "seconds_per_look": cost, "seconds_per_step": per_step},
        )


def interval(cost: float, per_step: float) -> int:
    """Steps between looks that cost `cost` seconds: their share of the time stays below `SHARE`."""
    wanted = max(LEAST_EVERY, cost / (SHARE * per_step))
    scale = 10 ** int(np.floor(np.log10(wanted)))
    return int(next(n * scale for n in (1, 2, 5, 10) if n * scale >= wanted))
