from __future__ import annotations

import json
import multiprocessing
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from phantoms import save, scan

from data_prep.build import prep
from data_prep.corpus import Corpus, books
from data_prep.errors import CorruptionError, InputError
from data_prep.settings import PrepSettings
from data_prep.shards import array_suffix, table_suffix
from data_prep.volume import NativeGrid, read_label, read_nifti, write_nifti


@pytest.fixture(scope="session")
def wide(tmp_path_factory: pytest.TempPathFactory, seed: int) -> Path:
    """One volume of several chunks, with a mask."""
    root = tmp_path_factory.mktemp("wide")
    rng = np.random.default_rng(seed)
    save(root / "in" / "a.nii.gz", scan(rng, (70, 130, 66)))
    save(root / "in" / "m.nii.gz", rng.integers(0, 2, (70, 130, 66)).astype(np.uint8))
    save(root / "in" / "b.nii.gz", scan(rng))
    (root / "in" / "list.csv").write_text("image,mask\na.nii.gz,m.nii.gz\nb.nii.gz,\n")
    prep(PrepSettings(input=root / "in" / "list.csv", output=root / "c", keys="names", processes=1))
    return root / "c"


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x10
    path.write_bytes(bytes(data))


def test_a_crop_is_that_part_of_the_whole(wide: Path, seed: int) -> None:
    corpus = Corpus.open(wide)
    i = corpus.position("a")
    for payload in ("image", "mask"):
        whole = corpus.read(i, payload)
        rng = np.random.default_rng(seed)
        for _ in range(20):
            start = tuple(int(rng.integers(0, n)) for n in whole.shape[-3:])
            size = tuple(
                int(rng.integers(1, n - s + 1))
                for n, s in zip(whole.shape[-3:], start, strict=True)
            )
            box = tuple(slice(s, s + n) for s, n in zip(start, size, strict=True))
            np.testing.assert_array_equal(corpus.read(i, payload, start, size), whole[..., *box])


def test_boxes_outside_and_missing_payloads_are_refused(wide: Path) -> None:
    corpus = Corpus.open(wide)
    a, b = corpus.position("a"), corpus.position("b")
    for start, size in [((-1, 0, 0), (2, 2, 2)), ((0, 0, 0), (67, 1, 1)), ((0, 0, 0), (1, 0, 1))]:
        with pytest.raises(ValueError, match="inside"):
            corpus.read(a, "image", start, size)
    assert corpus.has("mask")
    assert not corpus.has("seg")
    assert (corpus.sample_has(a, "mask"), corpus.sample_has(b, "mask")) == (True, False)
    with pytest.raises(InputError, match="no payload 'mask'"):
        corpus.read(b, "mask")
    with pytest.raises(InputError, match="'nobody'"):
        corpus.position("nobody")


def test_corpus_equals_its_files(labelled_corpus: Path, samples: Path, tmp_path: Path) -> None:
    corpus = Corpus.open(labelled_corpus)
    assert (len(corpus), corpus.labelled) == (60, True)
    assert [row["value"] for row in corpus.classes] == [0, 1, 2]
    for key in corpus.keys[::20]:
        i = corpus.position(key)
        image = samples / "hippocampus" / "images" / f"{key}.nii.gz"
        meta = corpus.meta(i)
        volume = read_nifti(image)
        channel = meta["channels"][0]
        physical = corpus.read(i) * channel["slope"] + channel["intercept"]
        assert np.abs(physical - volume.physical()).max() <= abs(channel["slope"]) / 2 * 1.001
        label_path = samples / "hippocampus" / "labels" / f"{key}.nii.gz"
        label = corpus.read(i, "seg")
        np.testing.assert_array_equal(label, read_label(label_path, volume))
        np.testing.assert_allclose(meta["affine"], volume.affine)
        np.testing.assert_allclose(corpus.spacings[i], volume.spacing)
        assert tuple(corpus.shapes[i]) == volume.array.shape
        # The label goes home bit for bit.
        write_nifti(label, NativeGrid.from_dict(meta["native"]), tmp_path / "l.nii.gz")
        one, other = nib.load(tmp_path / "l.nii.gz"), nib.load(label_path)
        np.testing.assert_array_equal(np.asanyarray(one.dataobj), np.asanyarray(other.dataobj))
        np.testing.assert_allclose(one.affine, other.affine)


def test_class_voxels_and_foreground_box_are_right(labelled_corpus: Path) -> None:
    corpus = Corpus.open(labelled_corpus)
    meta = corpus.meta(3)
    label = corpus.read(3, "seg")
    assert meta["annotated"] == [1, 2]
    for value, voxels in meta["class_voxels"].items():
        assert len(voxels) == 64
        assert len({tuple(v) for v in voxels}) == 64
        assert {int(label[tuple(v)]) for v in voxels} == {int(value)}
        assert meta["class_counts"][value] == np.count_nonzero(label == int(value))
    for (low, high), n in zip(meta["foreground_box"], label.shape, strict=True):
        assert 0 <= low < high <= n


def _read_in_child(corpus: Corpus, queue: Any) -> None:
    queue.put(int(corpus.read(0).sum()))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_other_processes_can_read(method: str, wide: Path) -> None:
    corpus = Corpus.open(wide)
    expected = int(corpus.read(0).sum())
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    child = context.Process(target=_read_in_child, args=(corpus, queue))
    child.start()
    assert queue.get(timeout=60) == expected
    child.join(60)
    assert child.exitcode == 0
    assert int(corpus.read(0).sum()) == expected


def test_opening_starts_no_threads(wide: Path) -> None:
    program = (
        "import pathlib, sys\n"
        "from data_prep.corpus import Corpus, books\n"
        "def threads():\n"
        "    tasks = pathlib.Path('/proc/self/task').iterdir()\n"
        "    return sum('jemalloc' not in (t / 'comm').read_text() for t in tasks)\n"
        "before = threads()\n"
        "corpus = Corpus.open(sys.argv[1])\n"
        "corpus.read(0), corpus.meta(0), corpus.fingerprints()\n"
        "assert threads() == before\n"
    )
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", program, str(wide)], check=True, cwd=root)


def test_pickling_sends_the_path_alone(wide: Path) -> None:
    corpus = Corpus.open(wide)
    corpus.read(0)
    data = pickle.dumps(corpus)
    assert len(data) < 2000
    assert pickle.loads(data).index_hash == corpus.index_hash


@pytest.mark.parametrize("part", ["chunk", "header", "index", "table", "json"])
def test_a_flipped_bit_is_found_and_named(part: str, wide: Path, tmp_path: Path) -> None:
    shutil.copytree(wide, tmp_path / "c")
    corpus = Corpus.open(tmp_path / "c")
    i = corpus.position("a")
    start = int(corpus.column("image_offset")[i])
    size = int(corpus.column("image_size")[i])
    offset = {
        "chunk": start + size // 2,
        "header": start + 20,
        "index": start + size - 40,
        "table": int(corpus.column("image_chunks_offset")[i]) + 150,
        "json": int(corpus.column("json_offset")[i]) + 60,
    }[part]
    flip(tmp_path / "c" / "shards" / "000000.tar", offset)
    with pytest.raises(CorruptionError) as caught:
        corpus.meta(i) if part == "json" else corpus.read(i)
    text = str(caught.value)
    assert "shards/000000.tar" in text
    assert "sample a" in text
    assert part in text
    # The neighbour is whole, and so are chunks that the damage does not touch.
    corpus.read(corpus.position("b"))
    if part == "chunk":
        corpus.read(i, "image", (0, 0, 0), (4, 4, 4))


def test_a_damaged_index_is_found(wide: Path, tmp_path: Path) -> None:
    shutil.copytree(wide, tmp_path / "c")
    flip(tmp_path / "c" / "index.parquet", 100)
    with pytest.raises(CorruptionError, match="sha256"):
        Corpus.open(tmp_path / "c")


def test_a_cut_or_missing_shard_is_found(wide: Path, tmp_path: Path) -> None:
    shutil.copytree(wide, tmp_path / "c")
    shard = tmp_path / "c" / "shards" / "000000.tar"
    corpus = Corpus.open(tmp_path / "c")
    shard.write_bytes(shard.read_bytes()[:-512])
    with pytest.raises(CorruptionError, match=r"corpus\.json says"):
        corpus.read(0)
    shard.unlink()
    with pytest.raises(CorruptionError, match="missing"):
        corpus.read(0)


def test_what_is_no_corpus_is_refused(wide: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such directory"):
        Corpus.open(tmp_path / "nothing")
    with pytest.raises(InputError, match="not a corpus"):
        Corpus.open(tmp_path)
    shutil.copytree(wide, tmp_path / "c")
    (tmp_path / "c" / "index.parquet").unlink()
    with pytest.raises(InputError, match="index"):
        Corpus.open(tmp_path / "c")
    path = tmp_path / "c" / "corpus.json"
    info = json.loads(path.read_text())
    path.write_text(json.dumps({**info, "format": 2}))
    with pytest.raises(InputError, match="format 2"):
        Corpus.open(tmp_path / "c")
    path.write_text("{")
    with pytest.raises(CorruptionError, match="JSON"):
        Corpus.open(tmp_path / "c")


def test_fingerprints_and_splits_are_verified(labelled_corpus: Path, tmp_path: Path) -> None:
    shutil.copytree(labelled_corpus, tmp_path / "c")
    corpus = Corpus.open(tmp_path / "c")
    prints = corpus.fingerprints()
    assert list(prints) == corpus.keys
    assert len(set(prints.values())) == 60
    flip(tmp_path / "c" / "fingerprints.parquet", 60)
    with pytest.raises(CorruptionError, match="sha256"):
        corpus.fingerprints()
    split = tmp_path / "c" / "splits" / "official.json"
    split.write_text(split.read_text().replace("hippocampus_019", "hippocampus_020", 1))
    with pytest.raises(CorruptionError, match="hash"):
        corpus.split("official")


def test_unlabelled_and_labelled_copies_share_fingerprints(
    labelled_corpus: Path, pretrain_corpus: Path
) -> None:
    labelled, unlabelled = Corpus.open(labelled_corpus), Corpus.open(pretrain_corpus)
    parts = labelled.split("official")["parts"]
    prints = labelled.fingerprints()
    seen = set(unlabelled.fingerprints().values())
    assert all(prints[key] in seen for key in parts["train"] + parts["validation"])
    assert not any(prints[key] in seen for key in parts["test"])


def test_plain_webdataset_reads_the_shards(labelled_corpus: Path) -> None:
    import blosc2
    import webdataset as wds

    def array(data: bytes) -> np.ndarray:
        return np.asarray(blosc2.ndarray_from_cframe(data)[...])

    corpus = Corpus.open(labelled_corpus)
    urls = [str(labelled_corpus / shard["name"]) for shard in corpus.info["shards"]]
    assert len(urls) > 2
    dataset = wds.WebDataset(urls, shardshuffle=False).decode(
        wds.handle_extension("image.b2nd", array),
        wds.handle_extension("seg.b2nd", array),
        wds.handle_extension("json", json.loads),
    )
    seen = []
    for sample in dataset:
        i = corpus.position(sample["__key__"])
        seen.append(i)
        np.testing.assert_array_equal(sample["image.b2nd"], corpus.read(i))
        np.testing.assert_array_equal(sample["seg.b2nd"], corpus.read(i, "seg"))
        assert sample["json"] == corpus.meta(i)
        assert {table_suffix("image"), array_suffix("seg")} <= set(sample)
    assert seen == list(range(60))


@pytest.mark.slow
def test_a_million_samples_open_without_a_step_for_each(wide: Path, tmp_path: Path) -> None:
    import hashlib

    shutil.copytree(wide, tmp_path / "c")
    table = pq.read_table(tmp_path / "c" / "index.parquet").slice(0, 1)
    n = 1_000_000
    columns = {
        name: pa.chunked_array([pa.array(column.to_numpy(zero_copy_only=False).repeat(n))])
        for name, column in zip(table.column_names, table.columns, strict=True)
    }
    columns["key"] = pa.array([f"k{i:032x}" for i in range(n)])
    pq.write_table(pa.table(columns), tmp_path / "c" / "index.parquet", compression="zstd")
    path = tmp_path / "c" / "corpus.json"
    info = json.loads(path.read_text())
    data = (tmp_path / "c" / "index.parquet").read_bytes()
    info["index"]["sha256"] = hashlib.sha256(data).hexdigest()
    path.write_bytes(books(info))
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    sys.setprofile(count)
    try:
        corpus = Corpus.open(tmp_path / "c")
        corpus.read(n - 1, "image", (0, 0, 0), (4, 4, 4))
    finally:
        sys.setprofile(None)
    assert len(corpus) == n
    assert calls < n / 10  # of functions, Python's and C's: columns are handled whole
