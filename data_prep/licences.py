"""Licences of data by what they forbid."""

from __future__ import annotations

from collections.abc import Iterable

# From the strictest to the freest; what is not listed counts as strictest of all.
_FREEDOM = ("nc-nd", "nc-sa", "nc", "nd", "sa", "by", "mpl", "apache", "bsd", "mit", "pddl", "cc0")

UNSTATED = "not stated"
"""How a licence begins that nobody told; what follows says whose it is."""


def strictest_first(licences: Iterable[str]) -> list[str]:
    """Orders licences by what they forbid; unknown ones come first."""

    def freedom(licence: str) -> int:
        if licence.startswith(UNSTATED):
            return -1  # a file's name may look like a licence's
        words = licence.lower().replace(" ", "-")
        return next((i for i, mark in enumerate(_FREEDOM) if mark in words), -1)

    return sorted(licences, key=lambda licence: (freedom(licence), licence))
