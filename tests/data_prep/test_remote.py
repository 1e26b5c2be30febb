"""A corpus behind a web server: the same bytes as here, whatever the server does."""

from __future__ import annotations

import base64
import fcntl
import hashlib
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from fault_server import FaultServer

import voxelith
from data_prep import download
from data_prep.corpus import Corpus, open_corpus
from data_prep.errors import CorruptionError, InputError, UnreachableError
from data_prep.references import without_secrets
from data_prep.remote import Remote, Shelf
from data_prep.shards import read_table

SHARDS = "shards/000000.tar"


@pytest.fixture
def server(pretrain_corpus: Path, seed: int) -> Iterator[FaultServer]:
    with FaultServer(pretrain_corpus, seed) as made:
        yield made


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "PAUSES", (0.01,) * 8)
    monkeypatch.setattr("data_prep.remote.PAUSES", (0.01,) * 8)


def boxes(corpus: Corpus, seed: int, count: int) -> Iterator[tuple[int, tuple, tuple]]:
    rng = np.random.default_rng(seed)
    for _ in range(count):
        i = int(rng.integers(len(corpus)))
        shape = corpus.shapes[i][1:]
        size = tuple(int(rng.integers(1, n + 1)) for n in shape)
        start = tuple(int(rng.integers(0, n - s + 1)) for n, s in zip(shape, size, strict=True))
        yield i, start, size


def same(one: Corpus, other: Corpus, seed: int, count: int) -> None:
    for i, start, size in boxes(one, seed, count):
        assert one.meta(i) == other.meta(i)
        np.testing.assert_array_equal(
            one.read(i, "image", start, size), other.read(i, "image", start, size)
        )


def test_ranges_bring_the_same_voxels_and_no_whole_shard(
    pretrain_corpus: Path, server: FaultServer, seed: int
) -> None:
    here, there = Corpus.open(pretrain_corpus), open_corpus(Path(server.url), "corpus")
    assert there.index_hash == here.index_hash and there.keys == here.keys
    assert there.fingerprints() == here.fingerprints()
    same(here, there, seed, 40)


def test_what_a_corpus_elsewhere_lacks_is_said_with_its_whole_address(server: FaultServer) -> None:
    there = Corpus.open(server.url)
    for wrong in (
        lambda: there.position("nobody"),
        lambda: there.read(0, "mask"),
        lambda: there.split("mine"),
    ):
        with pytest.raises(InputError) as caught:
            wrong()
        assert str(caught.value).startswith(f"{there}: ") and "://" in str(there)


def test_a_range_read_brings_the_touched_chunks_alone(
    pretrain_corpus: Path, server: FaultServer
) -> None:
    """And, of the largest volume, header, table and index: nothing twice."""
    there = Corpus.open(server.url)
    i = int(there.shapes.prod(1).argmax())
    shard = f"shards/{int(there.shards[i]):06d}.tar"
    there.meta(i)
    about = server.sent[shard]
    assert about < 20_000 and server.asked[shard] <= 2
    offset, size = (int(there.column(f"image_chunks_{c}")[i]) for c in ("offset", "size"))
    stored = (pretrain_corpus / shard).read_bytes()[offset : offset + size]
    table = read_table(stored, int(there.column("image_size")[i]))
    there.read(i, "image", (0, 0, 0), (10, 10, 10))
    assert server.sent[shard] - about == table[1]["bytes"]  # the first chunk
    asked = server.asked[shard]
    there.read(i, "image", (5, 5, 5), (20, 20, 20))
    assert server.asked[shard] == asked  # of the same chunk


@pytest.mark.parametrize("cached", [False, True], ids=["ranges", "shelf"])
def test_faults_change_nothing(
    pretrain_corpus: Path,
    server: FaultServer,
    seed: int,
    tmp_path: Path,
    impatient: None,
    cached: bool,
) -> None:
    """Far more of them than a server in use has."""
    server.busy, server.cut, server.slow, server.pause = 0.2, 0.2, 0.1, 0.02
    for number in range(4):
        shelf = Shelf(tmp_path / str(number), 10**9) if cached else None
        there = Corpus.open(server.url, shelf=shelf)
        same(Corpus.open(pretrain_corpus), there, seed + number, 20)
    assert server.faults["busy"] and server.faults["cut"]


def test_a_shard_comes_once_for_all_processes(
    pretrain_corpus: Path, server: FaultServer, tmp_path: Path, seed: int
) -> None:
    there = Corpus.open(server.url, shelf=Shelf(tmp_path / "shelf", 10**9))
    copy = pickle.loads(pickle.dumps(there))
    assert copy._storage.shelf == there._storage.shelf
    with multiprocessing.get_context("fork").Pool(4) as pool:
        sums = pool.map(_sum_of_all, [there] * 4)
    here = _sum_of_all(Corpus.open(pretrain_corpus))
    assert sums == [here] * 4
    shards = [shard["name"] for shard in there.info["shards"]]
    assert {server.asked[name] for name in shards} == {1}
    same(Corpus.open(pretrain_corpus), copy, seed, 5)
    assert {server.asked[name] for name in shards} == {1}
    left = sorted(p.suffix for p in (tmp_path / "shelf").glob("*.*"))
    assert left == [".tar"] * len(shards)


def _sum_of_all(corpus: Corpus) -> int:
    return sum(int(corpus.read(i).astype(np.int64).sum()) for i in range(len(corpus)))


def test_a_shelf_keeps_its_bound_and_lets_the_oldest_go(
    pretrain_corpus: Path, server: FaultServer, tmp_path: Path, seed: int
) -> None:
    here = Corpus.open(pretrain_corpus)
    sizes = [shard["bytes"] for shard in here.info["shards"]]
    limit = max(sizes) + min(sizes)
    there = Corpus.open(server.url, shelf=Shelf(tmp_path, limit))
    for i, start, size in boxes(here, seed, 40):
        np.testing.assert_array_equal(
            there.read(i, "image", start, size), here.read(i, "image", start, size)
        )
        assert sum(path.stat().st_size for path in tmp_path.glob("*.tar")) <= limit
    names = [shard["name"] for shard in here.info["shards"]]
    assert sum(server.asked[name] for name in names) > len(names)  # some came again
    # What was let go is not held open, where it would still take room.
    assert all(opened.is_kept() for opened in there._storage._opened.values())


def test_processes_share_a_shelf_that_is_too_small_for_all(
    pretrain_corpus: Path, server: FaultServer, tmp_path: Path
) -> None:
    """Each reads all of it, in an order of its own, and none waits for ever."""
    largest = max(shard["bytes"] for shard in Corpus.open(pretrain_corpus).info["shards"])
    there = Corpus.open(server.url, shelf=Shelf(tmp_path, 2 * largest))
    with multiprocessing.get_context("fork").Pool(3) as pool:
        found = pool.starmap(_sum_in_order, [(there, number) for number in range(3)])
    assert len(set(found)) == 1
    assert sum(path.stat().st_size for path in tmp_path.glob("*.tar")) <= 2 * largest


def _sum_in_order(corpus: Corpus, seed: int) -> int:
    order = np.random.default_rng(seed).permutation(len(corpus))
    return sum(int(corpus.read(int(i)).astype(np.int64).sum()) for i in order)


def test_what_a_killed_process_left_is_cleared_away(
    pretrain_corpus: Path, server: FaultServer, tmp_path: Path
) -> None:
    sizes = {s["sha256"]: s["bytes"] for s in Corpus.open(pretrain_corpus).info["shards"]}
    (first, _), *_, (last, _) = sizes.items()
    limit = max(sizes.values())
    (tmp_path / f"{last}.coming").write_text(str(limit))
    (tmp_path / f"{last}.arrived.part").write_bytes(b"x" * 100)
    there = Corpus.open(server.url, shelf=Shelf(tmp_path, limit))
    there.read(0)  # would wait for ever for the room that the dead one has taken
    assert [path.stem for path in tmp_path.glob("*.tar")] == [first]
    assert not list(tmp_path.glob(f"{last}.*"))


def test_one_shelf_for_two_corpora_whose_shards_have_the_same_names(
    pretrain_corpus: Path, labelled_corpus: Path, tmp_path: Path
) -> None:
    shutil.copytree(pretrain_corpus, tmp_path / "www" / "a")
    shutil.copytree(labelled_corpus, tmp_path / "www" / "b")
    with FaultServer(tmp_path / "www") as server:
        for name, path in (("a", pretrain_corpus), ("b", labelled_corpus)):
            there = Corpus.open(f"{server.url}/{name}", shelf=Shelf(tmp_path / "shelf", 10**9))
            here = Corpus.open(path)
            assert there.keys == here.keys
            np.testing.assert_array_equal(there.read(0), here.read(0))


def test_damage_there_is_named_and_never_kept(
    pretrain_corpus: Path, server: FaultServer, tmp_path: Path, impatient: None
) -> None:
    data = bytearray((pretrain_corpus / SHARDS).read_bytes())
    there = Corpus.open(server.url)
    start, stop = there._span(0, "image")
    data[(start + stop) // 2] ^= 1
    server.changed[SHARDS] = bytes(data)
    with pytest.raises(CorruptionError, match=rf"{server.url}/{SHARDS}: sample .* is damaged in"):
        there.read(0)
    kept = Corpus.open(server.url, shelf=Shelf(tmp_path, 10**9))
    with pytest.raises(CorruptionError, match="came twice with other bytes"):
        kept.read(0)
    assert server.asked[SHARDS] >= 2 and not list(tmp_path.glob("*.*"))
    server.changed[SHARDS] = bytes(data[:-1024])
    with pytest.raises(CorruptionError, match="came twice with other bytes"):
        kept.read(0)
    server.changed["index.parquet"] = b"PAR1"
    with pytest.raises(CorruptionError, match=r"index\.parquet: sha256 is"):
        Corpus.open(server.url)


def test_what_is_not_there_or_not_for_us_is_told_without_secrets(
    pretrain_corpus: Path, server: FaultServer, tmp_path: Path, impatient: None
) -> None:
    server.password = "Basic " + base64.b64encode(b"me:hush").decode()
    address = f"http://me:hush@127.0.0.1:{server.port}"
    there = Corpus.open(f"{address}?sig=secret")
    assert "hush" not in f"{there} {there!r} {there.path}" and "secret" not in str(there)
    np.testing.assert_array_equal(there.read(0), Corpus.open(pretrain_corpus).read(0))
    server.password = "Basic other"
    for shelf in (None, Shelf(tmp_path, 10**9)):
        there._storage.shelf = shelf
        with pytest.raises(InputError, match="access is denied") as found:
            there.read(20)
        assert "hush" not in str(found.value) and "secret" not in str(found.value)
    with pytest.raises(InputError, match="access is denied"):
        Corpus.open(address)
    server.password = ""
    with pytest.raises(InputError, match=r"corpus\.json: is not there"):
        Corpus.open(f"{address}/elsewhere")


ADDRESSES = [
    "{scheme}://me:hush@{host}/ct?token=secret&X-Amz-Signature=s1gn",
    "{SCHEME}://me:hush@{host}/ct?token=secret",
    "{scheme}:/me:hush@{host}/ct",
    "{scheme}://me:hu/sh-hush@{host}/ct",
    "{scheme}://me:hush@hush@{host}/ct",
    "s3://me:hush@scans/ct",
    "s3://me:hu+/hush@scans/ct?X-Amz-Signature=s1gn",
    "s3://scans/ct?X-Amz-Signature=s1gn&token=secret",
    "gs://me:hush@scans/ct?token=secret",
]


@pytest.mark.parametrize("form", ADDRESSES)
def test_no_form_of_an_address_tells_its_secrets(
    form: str, impatient: None, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Nobody answers there, or it is no address; also among others, and where words fail."""
    address = form.format(scheme="http", SCHEME="HTTP", host="127.0.0.1:9")
    for words in (
        ["inspect", address],
        ["fetch", address],
        ["pretrain", f"corpus={address}", "run=a", "experiment=mae_small", f"runs={tmp_path}"],
        ["pretrain", f"corpus=[{address},{tmp_path}]", "run=a", f"runs={tmp_path}"],
        ["pretrain", f"corpsu={address}", "run=a"],
        ["finetune", f"corpus={address}", f"ckpt={address}", "run=a", "task=hippocampus"],
    ):
        assert voxelith.main(words) in (1, 2)
        told = "".join(capsys.readouterr())
        assert told and not [s for s in ("hush", "secret", "s1gn") if s in told], told


def test_what_is_shown_of_an_address_still_leads_there() -> None:
    found = without_secrets("https://me:a@h/x?q=1,https://c:d@h/y?z and s3://b/z")
    assert found == "https://h/x,https://h/y and s3://b/z"
    for text in (
        "hf://org/repo@main/x.pt, /data/a@b, C:/x@y, file:/data/a@b",
        "https://host:8080/pkg@1.0/x#sha256=ab",
    ):
        assert without_secrets(text) == text


def test_a_server_without_ranges_is_told_apart(server: FaultServer, tmp_path: Path) -> None:
    server.ranges = False
    with pytest.raises(InputError, match=f"^corpus={server.url}: {server.url}/.* gives no ranges"):
        open_corpus(Path(server.url), "corpus")
    with pytest.raises(InputError, match="raise it, or give 0"):
        open_corpus(Path(server.url), "corpus", Shelf(tmp_path, 1000))
    there = open_corpus(Path(server.url), "corpus", Shelf(tmp_path, 10**9))
    assert there.read(0).size


def test_a_server_that_is_gone_is_given_up(server: FaultServer, impatient: None) -> None:
    there = Corpus.open(server.url)
    server.busy = 1.0
    with pytest.raises(UnreachableError, match=r"9 tries in a row"):
        there.read(0)


@pytest.mark.parametrize("cached", [False, True], ids=["ranges", "shelf"])
def test_threads_may_read_at_once(
    pretrain_corpus: Path, server: FaultServer, tmp_path: Path, cached: bool
) -> None:
    there = Corpus.open(server.url, shelf=Shelf(tmp_path, 10**9) if cached else None)
    here = Corpus.open(pretrain_corpus)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda i: there.read(i % len(there)).sum(), range(40)))
    assert found == [here.read(i % len(here)).sum() for i in range(40)]


def test_a_remote_is_sent_to_another_process_by_its_address(server: FaultServer) -> None:
    remote, size = Remote(server.url), (server.folder / "corpus.json").stat().st_size
    remote.ranges("corpus.json", [(0, 1)], size)
    copy = pickle.loads(pickle.dumps(remote))
    assert copy.ranges("corpus.json", [(0, 1), (3, 9)], size)[0] == b"{"
    child = os.fork()
    if child == 0:  # connections of the parent must not be used
        os._exit(0 if remote.ranges("corpus.json", [(0, 1)], size) == [b"{"] else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_other_processes_need_not_fetch_the_index_again(
    server: FaultServer, pretrain_corpus: Path
) -> None:
    """A spawned worker is sent what its trainer has; of a corpus here it opens the file itself."""
    corpus = Corpus.open(server.url)
    asked = sum(server.asked.values())
    copy = pickle.loads(pickle.dumps(corpus))
    assert sum(server.asked.values()) == asked
    assert copy.keys == corpus.keys and copy.index_hash == corpus.index_hash
    assert (copy.read(3) == Corpus.open(pretrain_corpus).read(3)).all()
    both = Corpus.together([corpus, Corpus.open(pretrain_corpus)])
    again = pickle.loads(pickle.dumps(both))
    assert again.keys == both.keys and (again.read(40) == both.read(40)).all()
    assert len(pickle.dumps(Corpus.open(pretrain_corpus))) < 1000


def test_a_worker_forked_while_a_shard_comes_holds_no_lock_of_it(tmp_path: Path) -> None:
    """It would keep every process of the machine waiting, for as long as it lives."""
    shelf = Shelf(tmp_path, 10**9)
    with shelf._alone("room"):
        child = os.fork()
        if child == 0:
            time.sleep(60)
            os._exit(0)
    try:
        with shelf._locks("room") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises where it is held
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def shelves(tmp_path: Path) -> list[Shelf | None]:
    return [None, Shelf(tmp_path / "shelf", 10**9)]


@pytest.mark.parametrize("cut", ["before", "within"])
def test_a_shard_that_is_cut_there_is_damaged(
    pretrain_corpus: Path, server: FaultServer, tmp_path: Path, impatient: None, cut: str
) -> None:
    """Where a range begins behind its end the server refuses, otherwise it gives less."""
    here = Corpus.open(pretrain_corpus)
    last = int(np.flatnonzero(here.shards == 0)[-1])
    start, stop = here._span(last, "image")
    size = start - 4096 if cut == "before" else (start + stop) // 2
    whole = (pretrain_corpus / SHARDS).read_bytes()
    server.changed[SHARDS] = whole[:size]
    said = f"{server.url}/{SHARDS}: has {size} bytes, corpus.json says {len(whole)}"
    for shelf in shelves(tmp_path):
        there = Corpus.open(server.url, shelf=shelf)
        with pytest.raises(CorruptionError, match="came twice" if shelf else said):
            there.read(last)
        other = int(np.flatnonzero(here.shards == 1)[0])
        np.testing.assert_array_equal(there.read(other), here.read(other))


def test_a_shard_that_is_not_there_is_named(
    server: FaultServer, tmp_path: Path, impatient: None, pretrain_corpus: Path
) -> None:
    server.folder = tmp_path / "www"
    shutil.copytree(pretrain_corpus, server.folder)
    (server.folder / SHARDS).unlink()
    for shelf in shelves(tmp_path):
        there = Corpus.open(server.url, shelf=shelf)
        with pytest.raises(InputError, match=f"{server.url}/{SHARDS}: is not there"):
            there.read(0)
        assert server.asked[SHARDS] <= 2  # places in it that are far apart; none is tried again
        server.asked.clear()
    with pytest.raises(InputError, match=f"^corpus={server.url}: {server.url}/{SHARDS}: is not"):
        open_corpus(Path(server.url), "corpus")


@pytest.mark.parametrize("more", [-100, 100])
def test_a_wrong_length_brings_no_wrong_voxels(
    server: FaultServer, tmp_path: Path, impatient: None, more: int
) -> None:
    """The server says that a body has another length than it has."""
    server.wrong[SHARDS] = more
    for shelf in shelves(tmp_path):
        there = Corpus.open(server.url, shelf=shelf)
        with pytest.raises((CorruptionError, UnreachableError), match=f"{server.url}/{SHARDS}: "):
            there.read(0)
    assert not list((tmp_path / "shelf").glob("*.tar"))


def test_a_download_that_is_gone_on_with_is_of_one_file(
    pretrain_corpus: Path, server: FaultServer, tmp_path: Path, impatient: None
) -> None:
    """Its ETag tells; where that has changed meanwhile, all comes anew."""
    whole, shelf = (pretrain_corpus / SHARDS).read_bytes(), Shelf(tmp_path, 10**9)
    here = Corpus.open(pretrain_corpus).read(0)
    for before in (whole, bytes(len(whole))):
        there = Corpus.open(server.url, shelf=shelf)
        server.tag, server.cut, server.changed[SHARDS] = '"before"', 1.0, before
        with pytest.raises(UnreachableError, match="bytes are kept"):
            there.read(0)
        server.tag, server.cut = '"before"' if before == whole else '"after"', 0
        server.changed.clear()
        asked, sent = server.asked[SHARDS], server.sent[SHARDS]
        np.testing.assert_array_equal(there.read(0), here)
        assert server.asked[SHARDS] == asked + 1
        assert (server.sent[SHARDS] - sent == len(whole)) == (before != whole)
        (kept,) = tmp_path.glob("*.tar")
        kept.unlink()


def test_a_server_that_gives_little_each_time_is_given_up(
    pretrain_corpus: Path, server: FaultServer, tmp_path: Path, impatient: None
) -> None:
    """Half of what is missing each time would take as many tries as its size has bits."""
    there = Corpus.open(server.url, shelf=Shelf(tmp_path, 10**9))
    server.tag, server.cut = '"a"', 1.0
    assert (pretrain_corpus / SHARDS).stat().st_size < 2 * download.ENOUGH
    with pytest.raises(UnreachableError, match="9 tries in a row"):
        there.read(0)
    assert server.asked[SHARDS] <= 2 * len(download.PAUSES) + 1


def test_those_who_fail_at_once_do_not_come_back_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)

    def busy() -> None:
        raise download.PassingError("the server answers 503")

    with pytest.raises(UnreachableError):
        download.retried(busy, "x", pauses=(1.0,) * 20)
    assert len(set(pauses)) > 10 and all(0.5 <= pause <= 1.5 for pause in pauses)


@pytest.mark.parametrize("how", ["flipped", "cut"])
def test_what_the_disk_has_changed_on_the_shelf_comes_again(
    pretrain_corpus: Path,
    server: FaultServer,
    tmp_path: Path,
    how: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """And where the server's own is damaged by now, that is the one to be named."""
    here = Corpus.open(pretrain_corpus)
    start, stop = here._span(0, "image")
    shelf = Shelf(tmp_path, 10**9)
    Corpus.open(server.url, shelf=shelf).read(0)
    (kept,) = tmp_path.glob("*.tar")

    def harm() -> None:
        data = bytearray(kept.read_bytes())
        data[(start + stop) // 2] ^= 1
        kept.write_bytes(data if how == "flipped" else data[:-512])

    harm()
    there = Corpus.open(server.url, shelf=shelf)
    np.testing.assert_array_equal(there.read(0), here.read(0))
    assert server.asked[SHARDS] == 2 and kept.read_bytes() == here.shard_files()[0].read_bytes()
    said = f"WARNING: {tmp_path}: {server.url}/{SHARDS} is no longer what came from there"
    assert capsys.readouterr().err.count(said) == 1
    harm()
    server.changed[SHARDS] = b"x" * kept.stat().st_size
    with pytest.raises(CorruptionError, match=f"{server.url}/{SHARDS}: came twice"):
        Corpus.open(server.url, shelf=shelf).read(0)


def test_a_shard_that_is_refused_is_not_fetched_again(
    server: FaultServer, tmp_path: Path, impatient: None
) -> None:
    there = Corpus.open(server.url, shelf=Shelf(tmp_path, 10**9))
    server.changed[SHARDS] = b"x" * there.info["shards"][0]["bytes"]
    for i in np.flatnonzero(there.shards == 0):
        with pytest.raises(CorruptionError, match="came twice with other bytes"):
            there.read(int(i))
    with pytest.raises(CorruptionError, match="came twice with other bytes"):
        there.bring(0)
    assert server.asked[SHARDS] == 2


def test_what_failed_fetches_leave_is_within_the_bound_of_the_shelf(
    server: FaultServer, tmp_path: Path, impatient: None
) -> None:
    sizes = [shard["bytes"] for shard in Corpus.open(server.url).info["shards"]]
    there = Corpus.open(server.url, shelf=Shelf(tmp_path, max(sizes)))
    (tmp_path / "mine.tar").write_bytes(b"not of a shelf")
    first = [int(np.flatnonzero(there.shards == n)[0]) for n in range(len(sizes))]
    server.tag, server.cut = '"a"', 1.0
    for i in first:
        with pytest.raises(UnreachableError):
            there.read(i)
        kept = [file for file in tmp_path.glob("*.arrived*") if file.suffix != ".json"]
        assert 0 < sum(file.stat().st_size for file in kept) <= max(sizes)
    server.cut = 0
    for i in first:
        there.read(i)
        kept = [file for file in tmp_path.iterdir() if file.is_file() and file.suffix != ".json"]
        assert sum(file.stat().st_size for file in kept) <= max(sizes) + 14
    assert (tmp_path / "mine.tar").exists()


def test_an_address_says_what_corpus_it_is(pretrain_corpus: Path, server: FaultServer) -> None:
    sha256 = hashlib.sha256((pretrain_corpus / "corpus.json").read_bytes()).hexdigest()
    there = Corpus.open(f"{server.url}#sha256={sha256}")
    assert there.keys == pickle.loads(pickle.dumps(there)).keys
    with pytest.raises(
        CorruptionError, match=rf"corpus\.json: sha256 is {sha256}, the address says"
    ):
        Corpus.open(f"{server.url}#sha256={'0' * 64}")


@pytest.mark.parametrize("kept", ["ranges", "shelf"])
def test_from_https_none_is_sent_to_http(
    pretrain_corpus: Path, server: FaultServer, tmp_path: Path, kept: str
) -> None:
    pair = tmp_path / "pair.pem"
    words = (
        "req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=x -addext subjectAltName=IP:127.0.0.1"
    )
    for part in ("-keyout", "-out"):
        words += f" {part} {tmp_path}/{part}"
    subprocess.run(["openssl", *words.split()], check=True, capture_output=True)
    pair.write_bytes((tmp_path / "-keyout").read_bytes() + (tmp_path / "-out").read_bytes())
    with FaultServer(pretrain_corpus, secure=str(pair)) as secure:
        secure.changed["copy"] = (pretrain_corpus / SHARDS).read_bytes()
        for to in (f"{secure.url}/copy", f"{server.url}/{SHARDS}"):
            secure.redirects = {SHARDS: to}
            shelf = f"Shelf(Path({str(tmp_path)!r}) / {to[:5]!r}, 10**9)"
            shelf = "None" if kept == "ranges" else shelf
            program = (
                "from pathlib import Path\n"
                "from data_prep.corpus import Corpus\n"
                "from data_prep.remote import Shelf\n"
                f"print(Corpus.open({secure.url!r}, shelf={shelf}).read(0).sum())\n"
            )
            done = subprocess.run(
                [sys.executable, "-c", program], text=True, capture_output=True,
                env=os.environ | {"SSL_CERT_FILE": str(tmp_path / "-out")},
            )  # fmt: skip
            if to.startswith("https"):
                assert done.stdout.strip() == str(Corpus.open(pretrain_corpus).read(0).sum())
            else:
                assert "redirects to http://, which is not safe to follow" in done.stderr
    assert not server.asked[SHARDS]
