from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from data_prep.check import check
from data_prep.corpus import Corpus
from data_prep.errors import InputError


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
    assert any("is missing" in problem for problem in check(copy))


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


def test_no_corpus_is_wrong_input(tmp_path: Path) -> None:
    with pytest.raises(InputError):
        check(tmp_path / "none")
