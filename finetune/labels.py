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
    keys: Sequence[str], subjects: Sequence[str], labels: str | int, seed: int
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
        InputError: `labels` is malformed or asks for more cases than there are.
    """
    order = sorted(
        zip(keys, subjects, strict=True), key=lambda case: (_rank(seed, case[1]), case[1], case[0])
    )
    return [key for key, _ in order[: count_labels(labels, len(order))]]


def count_labels(labels: str | int, available: int) -> int:
    """Turns "all", "16" or "10%" into a number of cases.

    Raises:
        InputError: as in `choose_labels`.
    """
    if available < 1:
        raise InputError("the training part of the split holds no case: nothing to finetune on")
    text = str(labels).strip()
    if text == "all":
        return available
    share = text.endswith("%")
    try:
        number = float(text[:-1]) if share else float(int(text))
    except ValueError:
        number = math.nan
    if not number > 0 or (share and number > 100):
        raise InputError(
            f'labels={text}: expected "all", a number of cases such as 16, or a share such as 10%'
        )
    # Shares of decimal percentages are exact but for float noise: 10 % of 30 is 3, not 4.
    count = math.ceil(round(number / 100 * available, 6)) if share else int(number)
    if count > available:
        raise InputError(
            f"labels={text}: the training part holds {available} cases with all classes annotated; "
            f"ask for at most {available}, or all"
        )
    return count


def _rank(seed: int, subject: str) -> bytes:
    return hashlib.blake2b(f"{seed}:{subject}".encode(), digest_size=16).digest()
