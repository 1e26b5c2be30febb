"""The labelled corpus of these tests is their own: they add splits to it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from data_prep.naming import private_folder


@pytest.fixture(scope="session")
def labelled_corpus(labelled_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy, with its private folder."""
    own = tmp_path_factory.mktemp("finetune") / labelled_corpus.name
    shutil.copytree(labelled_corpus, own)
    shutil.copytree(private_folder(labelled_corpus), private_folder(own))
    return own
