"""Which side of the body the name of a class tells: what a mirrored crop would make wrong."""

from __future__ import annotations

import re
from collections.abc import Sequence

SIDES = (
    {"superior", "inferior", "upper", "lower", "top", "bottom"},
    {"anterior", "posterior", "front", "back", "ventral", "dorsal"},
    {"left", "right", "lh", "rh"},
)
"""Words of a class's name that a mirror along an axis (D, H, W) makes wrong."""

LETTERS = {"l": "r", "r": "l"}
"""Left and right as a letter of its own, kidney_L; not that of L5, a vertebra."""


def named_side(name: str, names: Sequence[str], axis: int) -> bool:
    """Whether a class's name tells on which side along an axis (D, H, W) it lies.

    Args:
        name: of the class.
        names: of all classes.
        axis: 0, 1 or 2.
    """
    return bool(SIDES[axis] & set(_words(name))) or (axis == 2 and _has_letter(name, names))


def _has_letter(name: str, names: Sequence[str]) -> bool:
    """Whether a letter tells the side: at an end of the name, or where a twin has the other."""
    words = _words(name)
    others = [_words(other) for other in names]
    return any(
        word in LETTERS
        and (
            place in (0, len(words) - 1)
            or [*words[:place], LETTERS[word], *words[place + 1 :]] in others
        )
        for place, word in enumerate(words)
    )


def _words(name: str) -> list[str]:
    """The words of a class's name in small letters: of left_lung, lung-left2 and LeftLung too."""
    parted = re.sub(r"(?<=[^\W_A-Z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", " ", name)
    # A number stays with a letter, which means something else with it, and leaves a word.
    parted = re.sub(r"(?<=[^\W\d_]{2})(?=\d)", " ", parted)
    return re.findall(r"[^\W_]+", parted.lower())
