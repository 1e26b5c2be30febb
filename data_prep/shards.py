"""Payloads and shards: blosc2 frames with a chunk table each, in plain USTAR files.

A frame is laid out as header, stored chunks in order, index and trailer. Its chunk table lists
exactly these regions with their xxh3-64, so a reader can verify the few chunks that it touches,
and a ranged read fetches no more; blosc2 itself does not notice a flipped bit. Chunks of zeros
are not stored at all, they occupy no bytes.

Everything here is deterministic: one thread (with more, blosc2's bytes differ from run to run),
fixed owner, mode and time in the tar.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import IO, Any

import blosc2
import numpy as np
import xxhash

from data_prep.errors import CorruptionError

blosc2.set_nthreads(1)

CHUNK = 32


def _layout(itemsize: int) -> tuple[tuple[int, int, int], blosc2.CParams]:
    """Blocks, and how they are compressed; measured, see docs/decisions/0035.

    Single bytes have nothing to shuffle, and blosc2 takes twice as long for a crop if told to.
    """
    single = itemsize == 1
    filters = [blosc2.Filter.NOFILTER if single else blosc2.Filter.SHUFFLE]
    params = blosc2.CParams(codec=blosc2.Codec.LZ4HC, clevel=5, filters=filters, nthreads=1)
    return (CHUNK, CHUNK, CHUNK) if single else (16, 16, 32), params


TAR_HEADER = 512
TABLE_DTYPE = np.dtype([("offset", "<u8"), ("bytes", "<u4"), ("xxh3", "<u8")])
TABLE_HEADER = f"{{'descr': {TABLE_DTYPE.descr}, 'fortran_order': False, 'shape': (".encode()

# In the order in which the members of one sample lie in the tar.
PAYLOADS = ("image", "seg", "mask")


def array_suffix(payload: str) -> str:
    """Suffix of the member that holds a payload's frame, `image.b2nd`."""
    return f"{payload}.b2nd"


def table_suffix(payload: str) -> str:
    """Suffix of the member that holds a payload's chunk table, `image.chunks.npy`."""
    return f"{payload}.chunks.npy"


def encode_array(array: np.ndarray) -> tuple[bytes, bytes]:
    """A blosc2 frame and its chunk table (an .npy file) for `[C, D, H, W]` or `[D, H, W]`.

    Chunks are (1, 32, 32, 32), and blocks of them (1, 16, 16, 32), of single bytes all of a chunk;
    both are cut to the array. Row 0 of the
    table is the frame's header, rows 1 to n are the chunks in C order, and the last row is index
    and trailer; together they cover every byte.
    """
    lead = (1,) * (array.ndim - 3)
    chunks = lead + tuple(min(CHUNK, n) for n in array.shape[-3:])
    block, params = _layout(array.dtype.itemsize)
    blocks = lead + tuple(min(b, n) for b, n in zip(block, chunks[-3:], strict=True))
    stored = blosc2.empty(
        array.shape,
        array.dtype.newbyteorder("<"),
        chunks=chunks,
        blocks=blocks,
        contiguous=True,
        cparams=params,
        dparams=blosc2.DParams(nthreads=1),
    )
    # At once: `asarray` goes chunk by chunk in Python, and takes a quarter longer.
    stored[...] = np.ascontiguousarray(array)
    frame = stored.to_cframe()
    return frame, _table_bytes(_chunk_table(frame, stored.schunk))


def _chunk_table(frame: bytes, schunk: Any) -> np.ndarray:
    """Rows (offset, bytes, xxh3) of all regions of a frame, in order."""
    # By the frame format, bytes 11 to 14 are the header's length, big-endian.
    position = int.from_bytes(frame[11:15], "big")
    rows = [(0, position)]
    for number in range(schunk.nchunks):
        chunk = schunk.get_chunk(number)
        # A chunk of zeros exists in the index alone; blosc2 makes up its 32 bytes on request.
        size = len(chunk) if frame[position : position + len(chunk)] == chunk else 0
        if size == 0 and len(chunk) != blosc2.MAX_OVERHEAD:
            raise RuntimeError(f"chunk {number} is not where blosc2 {blosc2.__version__} puts it")
        rows.append((position, size))
        position += size
    rows.append((position, len(frame) - position))
    table = np.zeros(len(rows), dtype=TABLE_DTYPE)
    view = memoryview(frame)
    for row, (offset, size) in zip(table, rows, strict=True):
        row["offset"], row["bytes"] = offset, size
        row["xxh3"] = xxhash.xxh3_64_intdigest(view[offset : offset + size])
    return table


def _table_bytes(table: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, table, version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


def read_table(data: bytes, frame_size: int) -> np.ndarray:
    """The rows of a chunk table; CorruptionError if they do not cover `frame_size` bytes."""
    # numpy's reader parses the header as Python, which takes longer than all else here.
    first = 10 + int.from_bytes(data[8:10], "little")
    if data[:8] != b"\x93NUMPY\x01\x00" or not data.startswith(TABLE_HEADER, 10):
        raise CorruptionError("the chunk table is no .npy file of offset, bytes, xxh3")
    if (len(data) - first) % TABLE_DTYPE.itemsize or len(data) < first + 3 * TABLE_DTYPE.itemsize:
        raise CorruptionError("the chunk table is cut")
    table = np.frombuffer(data, dtype=TABLE_DTYPE, offset=first)
    ends = np.cumsum(table["bytes"], dtype=np.uint64)
    starts = np.concatenate([np.zeros(1, dtype=np.uint64), ends[:-1]])
    if not np.array_equal(table["offset"], starts) or int(ends[-1]) != frame_size:
        raise CorruptionError("the chunk table does not cover its frame")
    return table


def touched_chunks(
    shape: tuple[int, ...], chunks: tuple[int, ...], start: tuple[int, ...], stop: tuple[int, ...]
) -> np.ndarray:
    """Numbers of the chunks (C order) that a box [start, stop) of an array overlaps."""
    grid = [-(-n // c) for n, c in zip(shape, chunks, strict=True)]
    ranges = [np.arange(a // c, -(-b // c)) for a, b, c in zip(start, stop, chunks, strict=True)]
    return np.ravel_multi_index(np.meshgrid(*ranges, indexing="ij"), grid).ravel()


def canonical_json(data: Any) -> bytes:
    """One spelling of plain data: sorted keys, no spaces, ASCII, no NaN, a final newline."""
    text = json.dumps(
        data, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
    )
    return text.encode("ascii") + b"\n"


@dataclass(frozen=True)
class Member:
    """Where one payload lies in its shard."""

    offset: int
    size: int


class ShardWriter:
    """Appends samples to one USTAR file; no time, no owner, members in a fixed order.

    Args:
        file: A binary file at position 0; the caller opens and publishes it.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._tar = tarfile.open(  # noqa: SIM115 - closed by close()
            fileobj=file, mode="w", format=tarfile.USTAR_FORMAT
        )

    def add(self, key: str, members: Mapping[str, bytes]) -> dict[str, Member]:
        """Write one sample, `{suffix: bytes}` in order; gives offset and size per suffix."""
        places = {}
        for suffix, data in members.items():
            info = tarfile.TarInfo(f"{key}.{suffix}")
            info.size = len(data)
            info.mode = 0o644
            places[suffix] = Member(self._tar.offset + TAR_HEADER, len(data))
            self._tar.addfile(info, io.BytesIO(data))
        return places

    def close(self) -> None:
        """Write the end of the archive."""
        self._tar.close()
