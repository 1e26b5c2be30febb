"""Fixtures that several rooms need: small real corpora made once per session."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from seeds import SEED

SAMPLES = Path(__file__).parent.parent / "samples"


@pytest.fixture(scope="session")
def seed() -> int:
    return SEED


@pytest.fixture(autouse=True)
def _drawn_anew() -> None:
    """What a test draws from torch does not depend on the tests before it."""
    if (torch := sys.modules.get("torch")) is not None:
        torch.manual_seed(SEED)


@pytest.fixture(scope="session")
def samples() -> Path:
    """The embedded scans."""
    return SAMPLES


@pytest.fixture(scope="session")
def pretrain_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CT and MRI of samples/pretrain.csv as an unlabelled corpus of several shards."""
    return _prepare("pretrain.csv", tmp_path_factory)


@pytest.fixture(scope="session")
def labelled_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hippocampus MRI with labels and the official split."""
    return _prepare("hippocampus.csv", tmp_path_factory)


@pytest.fixture
def kept_by_wandb() -> Callable[[Path, bytes], bytes]:
    """What W&B keeps in a run's folder, once it is there: its own process writes it."""
    import wandb

    def read(run: Path, wanted: bytes) -> bytes:
        wandb.finish()
        found = b""
        for _ in range(300):
            found = b"".join(file.read_bytes() for file in (run / "wandb").rglob("*.wandb"))
            if wanted in found:
                break
            time.sleep(0.1)
        return found

    return read


def _prepare(name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from data_prep.build import prep
    from data_prep.settings import PrepSettings

    output = tmp_path_factory.mktemp("corpus") / name.removesuffix(".csv")
    prep(PrepSettings(input=SAMPLES / name, output=output, keys="names", processes=1, shard_mib=1))
    return output


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Guides take minutes each: at the end one process would be left alone with them."""
    items.sort(key=lambda item: item.path.name != "test_guides.py")
