from __future__ import annotations

import ctypes
import json
import mmap
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fault_server import FaultServer

from conf.compose import settings_for
from data_prep.corpus import Corpus
from pretrain.bench import GROUPS, OPTIMISER, group, profiled, spread
from pretrain.bench_loader import drop_pages
from voxelith import main

TINY = [
    "backbone.embed_dim=48",
    "backbone.depth=2",
    "backbone.num_heads=2",
    "objective.decoder_dim=24",
    "objective.decoder_depth=1",
    "objective.decoder_heads=2",
    "crop_size=[32,32,48]",
    "batch_size=4",
    "trainer=cpu",
    "repeats=3",
    "discard=1",
]


def test_a_step_is_measured_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "results" / "step.json"
    words = ["variants=[float32,bf16]", "profile=true", f"output={file}", "accumulate=2"]
    assert main(["bench", "step", *TINY, *words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads(file.read_text())
    assert [one["variant"] for one in found["measured"]] == ["float32", "bf16"]
    for one in found["measured"]:
        assert one["samples"] == 2  # a micro-batch
        assert len(one["seconds"]) == 3 and all(len(span) == 3 for span in one["seconds"])
        whole = sum(sorted(map(sum, one["seconds"]))[1:2])
        assert one["seconds_per_step"]["median"] == pytest.approx(whole)
        assert one["samples_per_second"] == pytest.approx(2 / whole)
        assert one["tokens_per_second"] == pytest.approx(2 * 12 / whole)
        flops = found["estimate"]["flops_per_sample"] * 2
        assert one["flops_per_second"] == pytest.approx(flops / whole)
        assert one["model_flops_utilisation"] is None
        assert one["memory_peak"] > 1e6 and one["memory_estimated"] > 1e6
        assert sum(one["profile"].values()) == pytest.approx(1)
        assert one["profile"]["linear"] > 0 and one["profile"]["optimiser"] > 0
    assert found["machine"]["cores"] and "torch" in found["versions"]
    assert found["settings"]["crop_size"] == [32, 32, 48]


def test_an_estimate_needs_no_device(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "estimate", *TINY]) == 0
    assert "memory (cuda, estimated, GiB)" in capsys.readouterr().out


def test_a_corpus_lends_its_channels(
    pretrain_corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "estimate", *TINY, f"corpus={pretrain_corpus}", "--json"]) == 0
    one = json.loads(capsys.readouterr().out)["estimate"]["parameters"]
    assert main(["bench", "estimate", *TINY, "channels=2", "--json"]) == 0
    two = json.loads(capsys.readouterr().out)["estimate"]["parameters"]
    assert two - one == 16**3 * 48


def test_the_loader_is_measured_for_each_number_of_workers(
    pretrain_corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "loader.json"
    words = [f"corpus={pretrain_corpus}", "trainer.workers=3", "seconds=0.2", f"output={file}"]
    assert main(["bench", "loader", *TINY, *words, "gpu_rate=50"]) == 0
    said = capsys.readouterr().out
    found = json.loads(file.read_text())
    tried = [(one["workers"], one["cold"]) for one in found["measured"]]
    assert tried == [(1, ""), (2, ""), (3, ""), (3, "pages dropped")]
    for one in found["measured"]:
        assert one["batches"] > (0 if one["cold"] else one["workers"])
        assert one["samples_per_second"] > 0
        assert 1e6 < one["memory_per_worker"] < 1e9
    if not in_memory(pretrain_corpus):
        # Of pages that were dropped every byte comes from storage, whatever the corpus is.
        assert found["measured"][-1]["storage_bytes_per_second"] > 0
    least = min(one["samples_per_second"] for one in found["measured"][2:])
    assert f"with 3 workers {least:.4g} samples/s: {least / 50:.3g} GPUs" in said
    assert f"a GPU takes {150 / least:.3g} workers" in said


@pytest.mark.parametrize("kept", [0, 1], ids=["ranges", "shelf"])
def test_a_corpus_elsewhere_is_measured_as_it_is_trained_on(
    pretrain_corpus: Path, tmp_path: Path, kept: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bytes that come are told, and where there is a shelf shards come ahead of time."""
    file = tmp_path / "loader.json"
    with FaultServer(pretrain_corpus, slow=1.0, pause=0.3) as server:
        words = [
            f"corpus={server.url}", "trainer.workers=1", "seconds=0.5", f"output={file}",
            f"remote.cache_gb={kept}", f"remote.folder={tmp_path}/shelf",
        ]  # fmt: skip
        assert main(["bench", "loader", *TINY, *words]) == 0
        assert "MB/s from elsewhere" in capsys.readouterr().out
        found, *cold = json.loads(file.read_text())["measured"]
        sent = sum(sent for name, sent in server.sent.items() if name.startswith("shards/"))
    assert 0 < found["fetched_bytes_per_second"] * 0.5 <= sent
    assert [one["cold"] for one in cold] == ["empty shelf"] * kept
    if kept:
        assert server.most > 1  # by the one worker alone it would be one at a time
        assert cold[0]["fetched_bytes_per_second"] > 0  # though all of it may be on the shelf
        assert not list((tmp_path / "shelf").glob(".bench-*"))


def test_replaced_samples_are_told(
    pretrain_corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(pretrain_corpus, tmp_path / "c")
    corpus = Corpus.open(tmp_path / "c")
    for i in range(0, len(corpus), 2):
        start, _ = corpus._span(i, "image")
        path = corpus.shard_files()[int(corpus.shards[i])]
        data = bytearray(path.read_bytes())
        data[start] ^= 1
        path.write_bytes(data)
    words = [f"corpus={tmp_path}/c", "trainer.workers=1", "seconds=1", "damaged=skip"]
    assert main(["bench", "loader", *TINY, *words]) == 0
    assert "samples were damaged and replaced" in capsys.readouterr().out


def test_a_damaged_shard_ends_it_with_one_line(pretrain_corpus: Path, tmp_path: Path) -> None:
    """In a process of its own, which must not wait for its workers for ever."""
    shutil.copytree(pretrain_corpus, tmp_path / "c")
    for shard in (tmp_path / "c" / "shards").iterdir():
        data = bytearray(shard.read_bytes())
        for at in range(600, len(data), 600):
            data[at] ^= 1
        shard.write_bytes(data)
    words = ["bench", "loader", *TINY, f"corpus={tmp_path}/c", "trainer.workers=2", "seconds=1"]
    command = [sys.executable, "-m", "voxelith", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.count("copy the shard again") == 1 and "Traceback" not in done.stderr


def test_dropped_pages_are_read_again(tmp_path: Path) -> None:
    """What makes `cold` cold: the kernel has nothing of the file, and has it after a reader."""
    if in_memory(tmp_path):
        pytest.skip("temporary files are in memory here")
    file = tmp_path / "file"
    file.write_bytes(bytes(4 << 20))
    drop_pages([file])
    assert resident_pages(file) == 0
    file.read_bytes()
    assert resident_pages(file) == (4 << 20) // mmap.PAGESIZE


def in_memory(folder: Path) -> bool:
    """Whether its file system has no storage behind it."""
    told = subprocess.run(["stat", "-f", "-c", "%T", folder], capture_output=True, text=True)
    return told.stdout.strip() == "tmpfs"


def resident_pages(file: Path) -> int:
    """Pages of a file that are in memory, as the kernel says."""
    libc = ctypes.CDLL(None, use_errno=True)
    with file.open("rb") as opened:
        view = mmap.mmap(opened.fileno(), 0, flags=mmap.MAP_PRIVATE)  # writable: has an address
        held = ctypes.c_char.from_buffer(view)
        pages = (ctypes.c_ubyte * (len(view) // mmap.PAGESIZE))()
        at = ctypes.c_void_p(ctypes.addressof(held))
        assert libc.mincore(at, ctypes.c_size_t(len(view)), pages) == 0
        del held
        view.close()
    return sum(page & 1 for page in pages)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "say what, step, estimate or loader"),
        (["stp"], "say what, step, estimate or loader"),
        (["step", "repets=3"], "did you mean repeats?"),
        (["step", "variants=[fp8]"], "variants"),
        pytest.param(
            ["step", "device=cuda"],
            "this machine has no GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one"),
        ),
        (["estimate", "crop_size=[90,96,96]"], "multiple"),
        (["loader"], "corpus: missing"),
        (["loader", "corpus=nowhere"], "nowhere"),
    ],
)
def test_wrong_words_start_nothing(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *words]) == 2
    assert said in capsys.readouterr().err


def test_bench_takes_what_pretrain_takes() -> None:
    """Its configuration extends pretrain's, so a recipe is measured by the words that start it."""
    words = ["objective=cnn_mae", "backbone=resenc_small", "trainer=cpu", "lr=1e-2"]
    benched = settings_for("bench", words).model_dump()
    trained = settings_for("pretrain", [*words, "corpus=unused", "run=unused"]).model_dump()
    different = {name for name, value in trained.items() if benched[name] != value}
    assert different == {"corpus", "run"}


def test_spread_is_median_and_quartiles() -> None:
    assert spread([5.0, 1.0, 2.0, 4.0, 3.0]) == {"median": 3, "low": 2, "high": 4}
    assert spread([2.0]) == {"median": 2, "low": 2, "high": 2}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("aten::_scaled_dot_product_flash_attention_for_cpu_backward", "attention"),
        ("aten::addmm", "linear"),
        ("aten::convolution_backward", "convolution"),
        ("aten::native_layer_norm_backward", "norm"),
        ("aten::native_batch_norm", "norm"),
        ("aten::gelu_backward", "elementwise"),
        ("aten::copy_", "copy"),
        ("autograd::engine::evaluate_function: AddmmBackward0", "other"),
    ],
)
def test_operations_are_grouped(name: str, kind: str) -> None:
    assert group(SimpleNamespace(name=name, cpu_parent=None)) == kind
    parent = SimpleNamespace(name=OPTIMISER, cpu_parent=None)
    assert group(SimpleNamespace(name=name, cpu_parent=parent)) == "optimiser"


def test_a_profile_finds_what_a_step_does() -> None:
    a, kernel = torch.randn(384, 384), torch.randn(8, 8, 3, 3, 3)
    volume: Any = torch.randn(1, 8, 24, 24, 24)
    products, _ = profiled(lambda: [a @ a for _ in range(5)], torch.device("cpu"))
    convolved, _ = profiled(lambda: torch.conv3d(volume, kernel), torch.device("cpu"))
    assert next(iter(products)) == "linear" and next(iter(convolved)) == "convolution"
    assert set(products) == {*GROUPS, "optimiser", "other"}
