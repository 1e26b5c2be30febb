"""How often each volume of a corpus is trained on, and what of it is never."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from data_prep.corpus import Corpus
from data_prep.errors import InputError
from pretrain.settings import SamplingSettings


def times_of(sampling: SamplingSettings, corpus: Corpus) -> NDArray[np.float64] | None:
    """How often each volume comes in an epoch, on average; None: once.

    Raises:
        InputError: groups without a weight, weights without a group, or all of them zero.
    """
    if sampling.by is None:
        return None
    groups = np.array(list(map(str, corpus.groups(sampling.by))))
    names, number, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    there = ", ".join(f"{name} ({size})" for name, size in zip(names, sizes, strict=True))
    missing, strange = set(names) - sampling.weights.keys(), sampling.weights.keys() - set(names)
    if missing or strange or not any(sampling.weights.values()):
        raise InputError(
            f"sampling.weights={sampling.weights}: expected a weight for each {sampling.by} of the "
            f"corpus, one above 0 at least; volumes there are: {there}"
        )
    weights = np.array([sampling.weights[name] for name in names])
    times = len(corpus) * weights / weights.sum() / sizes
    return np.asarray(times[number])


def used_volumes(sampling: SamplingSettings, corpus: Corpus) -> NDArray[np.int64]:
    """The volumes that training sees: those of a group of weight 0 teach nothing.

    Raises:
        InputError: as `times_of`.
    """
    times = times_of(sampling, corpus)
    return np.arange(len(corpus)) if times is None else np.flatnonzero(times > 0)
