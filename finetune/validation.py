"""Dice on validation cases while a run trains: whether it was long enough (finetune/budget.py).

Nothing is chosen by it: the last weights, or their average, are what a run reports.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from data_prep.corpus import Corpus
from finetune.budget import CURVE
from finetune.evaluate import score_case
from finetune.segmenter import Segmenter
from pretrain.objective import evaluating
from pretrain.run_folder import MetricsLog

CASES = 8
"""Cases that are segmented each time, spread over the validation part."""


def watched(keys: Sequence[str]) -> list[str]:
    """The validation cases that a curve is over."""
    chosen = np.linspace(0, len(keys) - 1, min(CASES, len(keys))).round().astype(int)
    return [keys[i] for i in chosen]


class Validation:
    """Measures a network as it would be reported, and keeps a run's validation.csv.

    Args:
        segmenter: around the network that trains.
        corpus: labelled.
        keys: of the validation part.
        steps: of the training.
        times: how often, evenly, the last time at its end.
        run: folder of the run.
    """

    def __init__(
        self,
        segmenter: Segmenter,
        corpus: Corpus,
        keys: Sequence[str],
        *,
        steps: int,
        times: int,
        run: Path,
    ) -> None:
        self.segmenter = replace(segmenter, tta=False)  # mirrors cost time and tell no trend
        self.corpus = corpus
        self.keys = watched(keys)
        self.due = frozenset(math.ceil(k * steps / times) for k in range(1, times + 1))
        self.run = run
        self._log: MetricsLog | None = None

    def look(self, step: int) -> dict[str, float | int]:
        """Segments the cases with the network as it is after `step`; writes and returns a row."""
        if self._log is None:  # rows from here on are of a start that left no checkpoint
            self._log = MetricsLog(self.run / CURVE, step - 1)
        began = time.perf_counter()
        model = self.segmenter.model
        with model.reported(), evaluating(model):
            dice = [self._dice(key) for key in self.keys]
        row: dict[str, float | int] = {
            "step": step,
            "dice": float(np.nanmean(dice)) if np.isfinite(dice).any() else math.nan,
            "cases": len(self.keys),
            "seconds": time.perf_counter() - began,
        }
        self._log.write(row)
        return row

    def _dice(self, key: str) -> float:
        """Of one case in points, over the classes that it has or was given."""
        i = self.corpus.position(key)
        labels = self.segmenter.label_values(self.segmenter.segment(self.corpus.volume(i)))
        found = [one.dsc for one in score_case(self.corpus, i, self.segmenter.task, labels)]
        return 100 * float(np.nanmean(found)) if np.isfinite(found).any() else math.nan
