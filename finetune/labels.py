"""Which training cases keep their labels: nested subsets, whole subjects first, one per seed.

The order of subjects is a hash of (seed, subject), so that every smaller subset of a seed lies in
its larger ones (16 labels hold the 4 labels), and a case that joins the training part later
leaves the order of the others as it was.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

from data_prep.errors import InputError


def choose_labels(
    keys: Sequence[str], subjects: Sequence[str], labels: str, seed: int
) -> list[str]:
    """Chooses the labelled cases of one draw.

    Args:
        keys: the training part's cases.
        subjects: the subject of each case; the cases of a subject stand together in the order.
        labels: "all", a number of cases such as "16", or a share of the cases such as "10%"
            (rounded up, so never none).
        seed: the label draw.

    Returns:
        The chosen keys in the order of the draw: a smaller subset is a prefix of a larger one.

    Raises:
        InputError: `labels` asks for more cases than there are.
    """
    order = sorted(
        zip(keys, subjects, strict=True), key=lambda case: (_rank(seed, case[1]), case[1], case[0])
    )
    return [key for key, _ in order[: count_labels(labels, len(order))]]


def count_labels(labels: str, available: int) -> int:
    """Turns "all", "16" or "10%", as the settings let it through, into a number of cases.

    Raises:
        InputError: as in `choose_labels`.
    """
    if available < 1:
        raise InputError("the training part of the split holds no case: nothing to finetune on")
    if labels == "all":
        return available
    if labels.endswith("%"):
        # Shares of decimal percentages are exact but for float noise: 10 % of 30 is 3, not 4.
        return max(1, math.ceil(round(float(labels[:-1]) / 100 * available, 6)))
    if int(labels) > available:
        raise InputError(
            f"labels={labels}: the training part holds {available} cases with all classes "
            f"annotated; ask for at most {available}, or all"
        )
    return int(labels)


def _rank(seed: int, subject: str) -> bytes:
    return hashlib.blake2b(f"{seed}:{subject}".encode(), digest_size=16).digest()
