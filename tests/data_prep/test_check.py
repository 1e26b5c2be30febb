from __future__ import annotations

import json
import re
import shutil
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from fault_server import FaultServer

from data_prep.check import check
from data_prep.corpus import Corpus
from data_prep.errors import CorruptionError, InputError
from data_prep.splits import write_split
from voxelith import main


@pytest.fixture
def copy(labelled_corpus: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(labelled_corpus, tmp_path / "c"))


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(bytes(data))


def test_a_whole_corpus_has_no_problems(copy: Path) -> None:
    assert check(copy) == []


@pytest.mark.parametrize(
    ("column", "words"),
    [
        ("image", "payload image"),
        ("seg", "payload seg"),
        ("image_chunks", "chunk table"),
        ("json", ".json is damaged"),
    ],
)
def test_a_flipped_bit_names_shard_sample_and_payload(column: str, words: str, copy: Path) -> None:
    corpus = Corpus.open(copy)
    i = 40
    shard = copy / "shards" / f"{corpus.shards[i]:06d}.tar"
    place, size = (int(corpus.column(f"{column}_{what}")[i]) for what in ("offset", "size"))
    flip(shard, place + size // 2)
    problems = check(copy)
    assert len(problems) == 2
    assert "sha256" in problems[0]
    assert str(shard) in problems[1]
    assert corpus.keys[i] in problems[1]
    assert words in problems[1]


def cut(path: Path, size: int) -> None:
    with path.open("r+b") as file:
        file.truncate(size)


@pytest.mark.parametrize("damage", ["payload", "header", "boundary", "bytes", "bit", "gone"])
def test_each_damage_that_plain_webdataset_lets_pass_names_shard_and_samples(
    damage: str, copy: Path, seed: int
) -> None:
    """Of a sample in the middle of a shard: the check names it, and so does who reads it.

    Of the readers of webdataset 1.0 the one cut alone is an error to; a flipped bit, flipped bytes
    of a header and a cut between members are none, and the samples after it are never missed.
    """
    rng = np.random.default_rng([seed, *damage.encode()])
    corpus = Corpus.open(copy)
    mine = np.flatnonzero(corpus.shards == 1)
    i = int(rng.choice(mine[1:-1]))
    shard = copy / "shards" / "000001.tar"
    first, size = (int(corpus.column(f"json_{what}")[i]) for what in ("offset", "size"))
    header = first - 512
    if damage == "payload":
        cut(shard, first + int(rng.integers(1, size)))
    elif damage == "header":
        cut(shard, header + int(rng.integers(1, 512)))
    elif damage == "boundary":
        cut(shard, header)
    elif damage == "bytes":
        for offset in rng.integers(0, 100, 3):
            flip(shard, header + int(offset))
    elif damage == "bit":
        start, count = (int(corpus.column(f"image_{what}")[i]) for what in ("offset", "size"))
        flip(shard, start + int(rng.integers(count)))
    else:
        shard.unlink()
    problems = check(copy)
    assert all(str(shard) in problem for problem in problems)
    lost = [i] if damage in ("bytes", "bit") else [j for j in mine if j >= i]
    if damage == "gone":
        assert problems == [f"{shard}: missing; copy the shard again"]
        lost = list(mine)
    else:
        named = {corpus.keys[j] for j in mine if any(corpus.keys[j] in p for p in problems)}
        assert corpus.keys[i] in named and named <= {corpus.keys[j] for j in lost}
    # Readers stop at it as well, each sample that is touched; what lies before it is not lost.
    again = Corpus.open(copy)
    if damage != "bytes":  # which no reader of ours looks at: places are the index's
        with pytest.raises(CorruptionError, match=r"000001\.tar"):
            for j in lost:
                again.meta(int(j))
                again.read(int(j))
    if damage in ("bytes", "bit"):
        for j in set(map(int, mine)) - {i}:
            again.read(j)
    with pytest.raises(CorruptionError) if damage not in ("bytes", "bit") else nullcontext():
        again.require_shards()  # so no run begins with it


def test_a_flipped_bit_between_payloads_is_found(copy: Path) -> None:
    corpus = Corpus.open(copy)
    flip(copy / "shards" / "000000.tar", int(corpus.column("image_offset")[1]) - 300)
    assert any("sha256" in problem for problem in check(copy))


def test_truncated_missing_and_strange_shards(copy: Path) -> None:
    shards = copy / "shards"
    (shards / "000000.tar").write_bytes((shards / "000000.tar").read_bytes()[:5000])
    (shards / "000001.tar").unlink()
    (shards / "000099.tar").write_bytes(b"")
    text = "\n".join(check(copy))
    assert "000000.tar: 5000 bytes" in text
    assert "000001.tar: missing" in text
    assert "000099.tar: not a shard" in text


def test_exchanged_shards_are_found(copy: Path) -> None:
    one, two = copy / "shards" / "000000.tar", copy / "shards" / "000001.tar"
    data = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(data)
    assert any("where the index has member" in problem for problem in check(copy))


def test_index_fingerprints_and_splits(copy: Path) -> None:
    flip(copy / "fingerprints.parquet", 60)
    path = copy / "splits" / "official.json"
    data = json.loads(path.read_text())
    data["parts"]["train"].append("stranger")
    path.write_text(json.dumps(data))
    text = "\n".join(check(copy))
    assert "fingerprints" in text
    assert "official.json" in text
    flip(copy / "index.parquet", 100)
    (problem,) = check(copy)
    assert "index.parquet" in problem


def test_every_flipped_bit_of_corpus_json_is_found(copy: Path, seed: int) -> None:
    path = copy / "corpus.json"
    data = path.read_bytes()
    text = data.decode()
    rng = np.random.default_rng(seed)
    places = [text.index(f'"{word}') + 1 for word in ("sha256", "splits", "ignore", "generations")]
    for offset in [*places, *rng.integers(0, len(data) - 1, 60).tolist()]:
        damaged = bytearray(data)
        damaged[offset] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        try:
            problems = check(copy)
        except InputError as error:  # the number of the format itself
            problems = error.problems
        assert any("corpus.json" in problem for problem in problems), bytes(damaged)


@pytest.mark.parametrize("name", ["counts", "shards", "index"])
def test_what_corpora_of_before_lack_is_told(name: str, copy: Path) -> None:
    """They have no sum over corpus.json, and are read."""
    info = json.loads((copy / "corpus.json").read_text())
    del info["sha256"], info["splits"]
    (copy / "corpus.json").write_text(json.dumps(info))
    assert check(copy) == []
    if name == "shards":
        del info["shards"][0]["samples"]
    else:
        del info[name]
    (copy / "corpus.json").write_text(json.dumps(info))
    (problem,) = check(copy)
    assert f"corpus.json: lacks {name}" in problem


def test_splits_that_are_gone_or_others_and_strange_files_are_named(copy: Path) -> None:
    path = copy / "splits" / "official.json"
    data = json.loads(path.read_text())
    path.unlink()
    (problem,) = check(copy)
    assert "there is no split 'official'" in problem
    data["parts"]["train"], data["parts"]["test"] = data["parts"]["test"], data["parts"]["train"]
    write_split(data, path.parent)
    (problem,) = check(copy)
    assert "split official is another than corpus.json tells" in problem
    write_split({**data, "name": "mine"}, path.parent)  # one that was made since
    assert len(check(copy)) == 1
    for name in ("extra.txt", ".hidden", "splits/note.txt", "shards/note.txt"):
        (copy / name).write_text("x")
        assert any(f"{copy}/{name}: not a " in problem for problem in check(copy))
        (copy / name).unlink()


def test_no_corpus_is_wrong_input(tmp_path: Path) -> None:
    with pytest.raises(InputError):
        check(tmp_path / "none")


def test_a_corpus_elsewhere_is_checked_as_one_here(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each shard comes once; damage has the same names, at the server's address."""
    with FaultServer(copy) as server:
        address = f"http://me:hush@127.0.0.1:{server.port}?token=secret"
        assert main(["check", address]) == 0
        said = capsys.readouterr()
        assert "every byte is what was written" in said.out
        assert not {"hush", "secret"} & set(re.split(r"\W", said.out + said.err))
        shards = Corpus.open(copy).shard_files()
        assert all(server.asked[f"shards/{shard.name}"] == 1 for shard in shards)
        first, second = (int(n) for n in Corpus.open(copy).column("image_offset")[[40, 41]])
        flip(shards[int(Corpus.open(copy).shards[40])], (first + second) // 2)
        shards[0].unlink()
        cut(shards[2], 3000)
        here, there = check(copy), check(server.url)
        gone = f"{server.url}/shards/{shards[0].name}: is not there (404); check the address"
        assert here[0] == f"{shards[0]}: missing; copy the shard again" and there[0] == gone
        assert [problem.replace(server.url, str(copy)) for problem in there[1:]] == here[1:]
        assert len(here) > 4
