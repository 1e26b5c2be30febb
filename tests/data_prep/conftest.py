"""Salts of a test's corpora are drawn from the seed: what order samples get is then no chance."""

from __future__ import annotations

import hashlib
import itertools
import os
from types import SimpleNamespace

import pytest
from seeds import SEED


@pytest.fixture(autouse=True)
def _salts_of_the_seed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each salt is another one, in a process of the test's own too."""
    counted, first = itertools.count(), os.getpid()

    def drawn(size: int) -> str:
        which = f"{SEED} {request.node.nodeid} {next(counted)} {os.getpid() - first}"
        return hashlib.shake_256(which.encode()).hexdigest(size)

    monkeypatch.setattr("data_prep.naming.secrets", SimpleNamespace(token_hex=drawn))
