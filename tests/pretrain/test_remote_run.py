"""A pretraining on a corpus behind a web server: the rows of one on the same corpus here."""

from __future__ import annotations

import base64
import time
from pathlib import Path

import numpy as np
import pytest
from fault_server import FaultServer
from test_loop import settings

from data_prep import download
from data_prep.corpus import Corpus
from data_prep.errors import InputError
from data_prep.remote import Shelf
from pretrain.ahead import HORIZON, SHARDS, Ahead
from pretrain.export import export
from pretrain.release import load_release
from pretrain.train import make_dataset
from voxelith import main

WORDS = [
    "experiment=cnn_mae_small", "trainer=cpu", "crop_size=[32,32,32]", "batch_size=4", "steps=12",
    "warmup=1", "log_every=1", "save_every=100", "preview_every=0", "health.every=0",
]  # fmt: skip


def losses(run: Path) -> list[str]:
    rows = [line.split(",") for line in (run / "metrics.csv").read_text().splitlines()]
    return [row[rows[0].index("loss")] for row in rows[1:]]


@pytest.mark.parametrize("cached", [False, True], ids=["ranges", "shelf"])
def test_a_run_from_elsewhere_is_the_run_from_here(
    pretrain_corpus: Path, tmp_path: Path, seed: int, cached: bool
) -> None:
    local = [f"corpus={pretrain_corpus}", "run=here", f"runs={tmp_path}", *WORDS]
    assert main(["pretrain", *local, "trainer.workers=0"]) == 0
    with FaultServer(pretrain_corpus, seed, busy=0.05, cut=0.01, slow=0.05) as server:
        address = f"http://me:hush@127.0.0.1:{server.port}?sig=secret"
        words = [
            f"corpus={address}", "run=there", f"runs={tmp_path}", *WORDS, "trainer.workers=2",
            f"remote.cache_gb={int(cached)}", f"remote.folder={tmp_path}/shelf",
        ]  # fmt: skip
        assert main(["pretrain", *words]) == 0
        assert losses(tmp_path / "there") == losses(tmp_path / "here")
        shards = {shard["name"]: shard["bytes"] for shard in Corpus.open(server.url).info["shards"]}
        if cached:
            assert all(server.sent[name] < 2 * size for name, size in shards.items())
        else:
            assert not (tmp_path / "shelf").exists()
        # What the run keeps names the server, and no more.
        kept = b"".join(f.read_bytes() for f in (tmp_path / "there").rglob("*") if f.is_file())
        assert b"hush" not in kept and b"secret" not in kept and b"127.0.0.1" in kept


def test_what_a_run_behind_a_password_is_needed_for_later(
    pretrain_corpus: Path, tmp_path: Path
) -> None:
    """No run keeps the password: a release and a start need none, a replay is given it."""
    runs = [f"runs={tmp_path}", *WORDS, "trainer.workers=0"]
    with FaultServer(pretrain_corpus) as server:
        server.password = "Basic " + base64.b64encode(b"me:hush").decode()
        address = f"http://me:hush@127.0.0.1:{server.port}"
        assert main(["pretrain", f"corpus={address}", "run=there", *runs]) == 0
        run = tmp_path / "there"
        release = export(run, tmp_path / "release")
        assert release.fingerprints == set().union(*Corpus.open(address).scan_prints().values())
        words = [f"corpus={pretrain_corpus}", "run=then", f"init={run}", *runs]
        assert main(["pretrain", *words]) == 0
        again = tmp_path / "again"
        assert main(["export", str(tmp_path / "then"), str(again)]) == 0
        assert load_release(again).fingerprints == release.fingerprints
        assert main(["replay", str(run), "step=1"]) != 0
        assert main(["replay", str(run), "step=1", f"corpus={address}"]) == 0


def test_other_runs_have_fingerprints_from_their_corpus(
    pretrain_corpus: Path, labelled_corpus: Path, tmp_path: Path
) -> None:
    words = [f"runs={tmp_path}", *WORDS, "trainer.workers=0"]
    assert main(["pretrain", f"corpus={pretrain_corpus}", "run=r", *words]) == 0
    config = tmp_path / "r" / "config.json"
    assert not (tmp_path / "r" / "fingerprints.json").exists()
    found = export(tmp_path / "r", tmp_path / "b").fingerprints
    assert found == set().union(*Corpus.open(pretrain_corpus).scan_prints().values())
    config.write_text(config.read_text().replace(str(pretrain_corpus), str(labelled_corpus)))
    with pytest.raises(InputError, match="its fingerprints are needed: restore it"):
        export(tmp_path / "r", tmp_path / "c")


def test_a_shelf_that_is_too_small_for_the_order_is_told_and_serves_all_the_same(
    pretrain_corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with FaultServer(pretrain_corpus) as server:
        words = [
            f"corpus={server.url}", "run=there", f"runs={tmp_path}", *WORDS, "trainer.workers=2",
            "remote.cache_gb=0.003", f"remote.folder={tmp_path}/shelf",
        ]  # fmt: skip
        assert main(["pretrain", *words]) == 0
    said = capsys.readouterr().out
    shards = len(Corpus.open(pretrain_corpus).shard_files())
    assert f"remote.cache_gb=0.003: about {shards} shards of 0.00" in said
    assert "more than once" in said
    assert (tmp_path / "shelf").stat().st_mode & 0o77 == 0
    kept = sum(file.stat().st_size for file in (tmp_path / "shelf").glob("*.tar"))
    assert 0 < kept <= 0.003e9


def test_shards_come_before_their_step_and_not_long_before(
    pretrain_corpus: Path, tmp_path: Path
) -> None:
    with FaultServer(pretrain_corpus) as server:
        corpus = Corpus.open(server.url, shelf=Shelf(tmp_path, 10**9))
        chosen = settings(pretrain_corpus, tmp_path, "x").model_copy(update={"lanes": 1})
        dataset = make_dataset(chosen, corpus)
        now = 0
        ahead = Ahead(dataset, lambda: now, last=9, batch_size=4)
        try:
            order = list(dict.fromkeys(shard for _, shard in ahead.needed()))
            names = [f"shards/{shard:06d}.tar" for shard in order]
            first = {shard: step for step, shard in reversed(list(ahead.needed()))}
            for now in range(9):
                must = [n for n, shard in zip(names, order, strict=True) if first[shard] <= now]
                until = time.monotonic() + 30
                while not all(server.asked[name] for name in must):
                    assert time.monotonic() < until
                    time.sleep(0.02)
                time.sleep(0.3)
                early = [
                    n
                    for n, shard in zip(names, order, strict=True)
                    if server.asked[n] and first[shard] > now
                ]
                assert len(early) <= SHARDS
        finally:
            ahead.end()


def test_where_all_shards_are_there_nobody_looks_at_the_whole_run(
    pretrain_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That would take the interpreter from the training, and what is dropped later be missed."""
    with FaultServer(pretrain_corpus) as server:
        corpus = Corpus.open(server.url, shelf=Shelf(tmp_path, 10**9))
        dataset = make_dataset(settings(pretrain_corpus, tmp_path, "x"), corpus)
        asked: list[int] = []
        monkeypatch.setattr(corpus, "has_shard", lambda shard: asked.append(shard) or True)
        now = 0
        ahead = Ahead(dataset, lambda: now, last=10**6, batch_size=1)
        try:
            for now in (0, 50):
                until = time.monotonic() + 30
                while len(asked) <= now + HORIZON and time.monotonic() < until:
                    time.sleep(0.02)
                time.sleep(0.5)
                assert len(asked) == now + HORIZON + 1  # a shard a step
        finally:
            ahead.end()


def test_several_shards_come_at_once(pretrain_corpus: Path, tmp_path: Path) -> None:
    """One connection seldom gives all that a network has."""
    with FaultServer(pretrain_corpus, slow=1.0, pause=1.0) as server:
        corpus = Corpus.open(server.url, shelf=Shelf(tmp_path, 10**9))
        dataset = make_dataset(settings(pretrain_corpus, tmp_path, "x"), corpus)
        server.most = 0
        ahead = Ahead(dataset, lambda: -1, last=9, batch_size=4)
        until = time.monotonic() + 60
        while len(list(tmp_path.glob("*.tar"))) < SHARDS and time.monotonic() < until:
            time.sleep(0.05)
        ahead.end()
        assert 1 < server.most <= SHARDS
        assert max(server.asked[name] for name in server.asked if name.startswith("shards/")) == 1


def test_nodes_fetch_their_own_lanes(pretrain_corpus: Path, tmp_path: Path) -> None:
    """In an epoch two nodes need about half of the shards each, and together all of them."""
    with FaultServer(pretrain_corpus) as server:
        corpus = Corpus.open(server.url)  # without a shelf nothing is fetched ahead
        chosen = settings(pretrain_corpus, tmp_path, "x").model_copy(update={"lanes": 2})
        dataset = make_dataset(chosen, corpus)
        needed = [
            {
                shard
                for _, shard in Ahead(
                    dataset, lambda: 0, last=9, batch_size=4, node=node, nodes=2, local=2
                ).needed()
            }
            for node in (0, 1)
        ]
    shards = set(map(int, np.unique(corpus.shards)))
    assert needed[0] | needed[1] == shards
    assert max(map(len, needed)) < 0.8 * len(shards)


def test_a_shard_that_does_not_come_ahead_of_time_stops_no_other(
    pretrain_corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(download, "PAUSES", (0.01,))
    with FaultServer(pretrain_corpus) as server:
        chosen, now = settings(pretrain_corpus, tmp_path, "x"), 0
        without = make_dataset(chosen, Corpus.open(server.url))  # nothing is fetched ahead
        needed = Ahead(without, lambda: now, last=36, batch_size=4).needed()
        order = list(dict.fromkeys(shard for _, shard in needed))
        bad = order[1:3]
        for shard in bad:
            server.changed[f"shards/{shard:06d}.tar"] = b"x"
        corpus = Corpus.open(server.url, shelf=Shelf(tmp_path, 10**9))
        ahead = Ahead(make_dataset(chosen, corpus), lambda: now, last=36, batch_size=4)
        until = time.monotonic() + 60
        try:
            good = [shard for shard in order if shard not in bad]
            while not (ahead._told and all(map(corpus.has_shard, good))):  # it is late to tell
                assert time.monotonic() < until
                now = min(now + 1, 8)  # each shard's time comes within an epoch of nine
                time.sleep(0.1)
        finally:
            ahead.end()
        assert not any(corpus.has_shard(shard) for shard in bad)
    said = capsys.readouterr().err
    assert said.count("WARNING: a shard does not come ahead of time") == 1
    assert "came twice with other bytes" in said
