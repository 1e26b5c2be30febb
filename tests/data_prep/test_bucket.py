"""A corpus in a bucket of a real S3 server (moto), by the credentials that any client finds."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from bucket_server import ADDRESS, CREDENTIALS, bucket_server
from fault_server import FaultServer

from data_prep.corpus import Corpus, open_corpus
from data_prep.errors import InputError
from data_prep.remote import Shelf

pytest.importorskip("s3fs", reason="the extra is not installed: pip install 'voxelith[s3]'")
pytest.importorskip("moto.server", reason="moto is not installed: pip install 'moto[server]'")


@pytest.fixture(scope="module")
def bucket(pretrain_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    log = tmp_path_factory.mktemp("moto") / "log"
    with pytest.MonkeyPatch.context() as patch, bucket_server(pretrain_corpus, log) as place:
        for name, value in CREDENTIALS.items():
            patch.setenv(name, value)
        patch.setenv("AWS_ENDPOINT_URL", f"http://{place}")
        yield ADDRESS


@pytest.mark.parametrize("cached", [False, True], ids=["ranges", "shelf"])
def test_a_bucket_holds_the_same_corpus(
    pretrain_corpus: Path, bucket: str, tmp_path: Path, cached: bool, seed: int
) -> None:
    shelf = Shelf(tmp_path, 10**9) if cached else None
    # A path has lost a slash, as that of a setting has.
    here, there = Corpus.open(pretrain_corpus), open_corpus(Path(bucket), "corpus", shelf)
    assert there.index_hash == here.index_hash
    rng = np.random.default_rng(seed)
    for i in rng.integers(len(here), size=12):
        assert there.meta(int(i)) == here.meta(int(i))
        size = tuple(int(n) for n in here.shapes[i][1:] // 2)
        start = tuple(int(rng.integers(0, n + 1)) for n in size)
        np.testing.assert_array_equal(
            there.read(int(i), "image", start, size), here.read(int(i), "image", start, size)
        )


@pytest.mark.parametrize("cached", [False, True], ids=["ranges", "shelf"])
def test_a_bucket_that_fails_holds_it_too(
    pretrain_corpus: Path, bucket: str, tmp_path: Path, cached: bool, seed: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    here, rng = Corpus.open(pretrain_corpus), np.random.default_rng(seed)
    behind = os.environ["AWS_ENDPOINT_URL"].removeprefix("http://")
    faults = {"busy": 0.15, "cut": 0.15, "slow": 0.05, "pause": 0.05}
    with FaultServer(tmp_path, seed, behind=behind, **faults) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        there = Corpus.open(bucket, shelf=Shelf(tmp_path, 10**9) if cached else None)
        for i in rng.permutation(len(here)).tolist():
            np.testing.assert_array_equal(there.read(i), here.read(i))
    assert server.faults["busy"] and server.faults["cut"], server.faults


@pytest.mark.parametrize("cached", [False, True], ids=["ranges", "shelf"])
def test_workers_read_a_bucket_that_their_parent_has_read(
    pretrain_corpus: Path, bucket: str, tmp_path: Path, cached: bool
) -> None:
    there = Corpus.open(bucket, shelf=Shelf(tmp_path, 10**9) if cached else None)
    there.read(0)  # and opens what a fork must not use
    last, fork = len(there) - 1, multiprocessing.get_context("fork")
    answers = fork.Queue()
    # Inherited, as by a loader's workers: an argument of a pool would be opened anew.
    child = fork.Process(target=lambda: answers.put(there.read(last)), daemon=True)
    child.start()
    np.testing.assert_array_equal(answers.get(timeout=20), Corpus.open(pretrain_corpus).read(last))
    child.join()


def test_a_bucket_without_it_says_so(bucket: str) -> None:
    with pytest.raises(InputError, match=r"s3://scans/lab/mr/corpus\.json: is not there"):
        open_corpus(Path("s3://scans/lab/mr"), "corpus")
