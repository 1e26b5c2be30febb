from __future__ import annotations

import io
import tarfile
from itertools import product

import blosc2
import numpy as np
import pytest
import xxhash

from data_prep.errors import CorruptionError
from data_prep.shards import (
    CHUNK,
    ShardWriter,
    canonical_json,
    encode_array,
    read_table,
    touched_chunks,
)


def cases(seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    mixed = rng.integers(-1000, 1000, (2, 70, 65, 130)).astype(np.int16)
    mixed[0, :64, :64, :64] = 0  # a chunk that blosc2 does not store
    mixed[0, :64, :64, 64:128] = 7
    return [
        mixed,
        rng.integers(0, 5, (4, 3, 5)).astype(np.uint8),
        np.zeros((70, 70, 70), np.uint8),
        np.full((1, 64, 64, 64), 300, np.int16),
        rng.integers(0, 60000, (33, 64, 1)).astype(np.uint16),
    ]


@pytest.mark.parametrize("number", range(5))
def test_table_covers_the_frame_and_gives_each_chunk(number: int, seed: int) -> None:
    array = cases(seed)[number]
    frame, data = encode_array(array)
    table = read_table(data, len(frame))
    assert int(table["bytes"].sum()) == len(frame)
    stored = blosc2.ndarray_from_cframe(frame)
    np.testing.assert_array_equal(stored[...], array)
    assert stored.dtype == array.dtype
    assert len(table) == stored.schunk.nchunks + 2
    for row in table:
        region = frame[int(row["offset"]) : int(row["offset"]) + int(row["bytes"])]
        assert xxhash.xxh3_64_intdigest(region) == int(row["xxh3"])
    for i, row in enumerate(table[1:-1]):
        region = frame[int(row["offset"]) : int(row["offset"]) + int(row["bytes"])]
        if len(region):
            assert region == stored.schunk.get_chunk(i)
        else:
            assert not any(stored.schunk.decompress_chunk(i))


def test_one_chunk_decompresses_alone_and_retiles(seed: int) -> None:
    """What a ranged reader needs: the table, the chunk's bytes, and the order of its blocks."""
    array = np.random.default_rng(seed).integers(-999, 999, (1, 2 * CHUNK, CHUNK, CHUNK))
    array = array.astype(np.int16)
    frame, data = encode_array(array)
    row = read_table(data, len(frame))[2]
    raw = blosc2.decompress2(frame[int(row["offset"]) : int(row["offset"]) + int(row["bytes"])])
    block = (16, 16, 32)
    d, h, w = (CHUNK // n for n in block)
    tiles = np.frombuffer(raw, np.int16).reshape(d, h, w, *block)
    chunk = tiles.transpose(0, 3, 1, 4, 2, 5).reshape(CHUNK, CHUNK, CHUNK)
    np.testing.assert_array_equal(chunk, array[0, CHUNK:])


def test_chunks_and_blocks_are_cut_to_the_array() -> None:
    frame, _ = encode_array(np.ones((2, 100, 10, 40), np.int16))
    stored = blosc2.ndarray_from_cframe(frame)
    assert stored.chunks == (1, 32, 10, 32)
    assert stored.blocks == (1, 16, 10, 32)
    # Single bytes are not shuffled, and their chunks are of one block.
    frame, _ = encode_array(np.ones((100, 10, 40), np.uint8))
    stored = blosc2.ndarray_from_cframe(frame)
    assert stored.chunks == stored.blocks == (32, 10, 32)
    assert set(stored.schunk.cparams.filters) == {blosc2.Filter.NOFILTER}


def test_bytes_are_the_same_every_time(seed: int) -> None:
    array = cases(seed)[0]
    assert encode_array(array) == encode_array(np.asfortranarray(array))


def test_a_table_that_does_not_cover_its_frame_is_refused(seed: int) -> None:
    frame, data = encode_array(cases(seed)[1])
    with pytest.raises(CorruptionError, match="cover"):
        read_table(data, len(frame) + 1)
    for damaged in (b"", data[:20], data[:-4], b"\x93NUMPY" + data[6:40], b"x" * len(data)):
        with pytest.raises(CorruptionError):
            read_table(damaged, len(frame))


def test_touched_chunks_are_those_that_overlap() -> None:
    shape, chunks = (1, 10, 7, 5), (1, 4, 3, 5)
    numbers = np.arange(3 * 3 * 1).reshape(1, 3, 3, 1)
    for start in product([0], [0, 3, 4, 9], [0, 2, 6], [0, 4]):
        stop = (1, min(10, start[1] + 3), min(7, start[2] + 2), 5)
        grid = [slice(a // c, -(-b // c)) for a, b, c in zip(start, stop, chunks, strict=True)]
        found = touched_chunks(shape, chunks, start, stop)
        assert sorted(found) == sorted(numbers[tuple(grid)].ravel())


def test_members_lie_where_the_writer_says() -> None:
    file = io.BytesIO()
    writer = ShardWriter(file)
    places = [
        writer.add(key, {"json": b"{}\n", "image.b2nd": bytes(size)})
        for key, size in (("a", 511), ("b-1", 512), ("c_2", 513))
    ]
    writer.close()
    whole = file.getvalue()
    with tarfile.open(fileobj=io.BytesIO(whole)) as tar:
        members = tar.getmembers()
    names = [m.name for m in members]
    assert names == [f"{k}.{s}" for k in ("a", "b-1", "c_2") for s in ("json", "image.b2nd")]
    flat = [place for sample in places for place in sample.values()]
    assert [(m.offset_data, m.size) for m in members] == [(p.offset, p.size) for p in flat]
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname) for m in members} == {(0, 0, 0, "", "")}
    assert whole[257:263] == b"ustar\0"


def test_json_has_one_spelling() -> None:
    assert canonical_json({"b": [1.0, "ü"], "a": None}) == b'{"a":null,"b":[1.0,"\\u00fc"]}\n'
    with pytest.raises(ValueError, match="JSON"):
        canonical_json({"a": float("nan")})
