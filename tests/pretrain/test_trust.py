"""What comes from others is refused with a message, or is what it was: nothing else happens.

Other tests of trust are beside what they are about: releases in test_release.py and
test_transfer.py, public weights in test_foreign.py, downloads in test_fetch.py.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import shutil
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from seeds import SEED
from torch import Tensor

import voxelith
from data_prep.errors import CorruptionError, InputError, attempt
from data_prep.files import file_digest
from data_prep.references import is_safe
from finetune.describe import describe
from finetune.model_file import check_golden_network, load_network
from pretrain.arguments import build_backbone
from pretrain.foreign import open_foreign
from pretrain.foreign.stored import read_stored
from pretrain.manifest import DECODER, FILES, MAX_DEPTH
from pretrain.release import check_golden, load_release
from pretrain.run_folder import Checkpoints
from pretrain.start import open_start

ROOT = Path(__file__).parent.parent.parent
STORED = ROOT / "tests" / "releases"
ENCODER, SEGMENTER = sorted(STORED.iterdir())
NAMES = (*FILES, DECODER)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A release of a segmenter, to be tampered with."""
    return Path(shutil.copytree(SEGMENTER, tmp_path / "copy"))


def resign(path: Path) -> None:
    """Makes the sums right again: whoever tampers with a file can do that too."""
    lines = [f"{file_digest(path / n)}  {n}\n" for n in NAMES if (path / n).exists()]
    (path / "SHA256SUMS").write_text("".join(lines))


def change_config(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((path / "config.json").read_text())
    change(config)
    (path / "config.json").write_text(json.dumps(config))
    resign(path)


def stunet_weights() -> dict[str, Tensor]:
    """A small STU-Net's, under its published names."""
    torch.manual_seed(SEED)
    args = {"features": [2, 4], "strides": [[1, 1, 1], [2, 2, 2]], "blocks": [1, 1]}
    encoder = build_backbone("stunet.STUNetEncoder", args, "test")
    return {
        name.replace("stages", "conv_blocks_context")
        .replace("conv1.conv", "conv1").replace("conv1.norm", "norm1")
        .replace("conv2.conv", "conv2").replace("conv2.norm", "norm2")
        .replace("shortcut", "conv3"): tensor
        for name, tensor in encoder.state_dict().items()
    }  # fmt: skip


TOLD = {"strides": [[1, 1, 1], [2, 2, 2]]}


def is_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        torch.equal(found[name], expected[name]) for name in expected
    )


def ask(path: Path) -> None:
    """All that opens a release; whatever one of them refuses, the others do as well or can."""
    problems: list[str] = []
    for look in (voxelith.load_encoder, describe, load_network, check_golden_network, open_start):
        attempt(problems, look, path)
    if problems:
        raise InputError(problems)


# Nothing is run.


class Crafted:
    """Unpickled, it would make a folder."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("end", ["pth", "pt", "ckpt", "bin", "model", "safetensors"])
@pytest.mark.parametrize("form", ["zip", "legacy", "both"])
def test_no_pickle_runs_whatever_the_file_is_called(tmp_path: Path, end: str, form: str) -> None:
    target, path = tmp_path / "made", tmp_path / f"weights.{end}"
    weights: dict[str, Any] = stunet_weights()
    stored = {"state_dict": weights | {"a": {"b": [{"c": Crafted(target)}]}}}
    torch.save(stored, path, _use_new_zipfile_serialization=form == "zip")
    if form == "both":  # a pickle with an archive behind it: torch looks at the first bytes
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr("a/data.pkl", b"")
    for look in (open_foreign, describe, open_start):
        with pytest.raises(InputError, match="cannot be read as weights") as error:
            look(path)
        if form != "zip":
            assert "none that torch 1.6 or later saved" in str(error.value)
    assert voxelith.main(["inspect", str(path)]) == 2
    assert not target.exists()
    with path.open("rb") as file:
        torch.load(file, weights_only=False)
    assert target.exists()  # it would have


@pytest.mark.parametrize("name", ["model.safetensors", DECODER, "config.json"])
def test_no_pickle_runs_in_a_release(copy: Path, name: str) -> None:
    torch.save({"a": Crafted(copy / "made")}, copy / name)
    resign(copy)
    with pytest.raises(InputError, match=name):
        ask(copy)
    assert not (copy / "made").exists()


def test_no_pickle_runs_in_a_checkpoint_of_a_run(tmp_path: Path) -> None:
    """As `init=RUN` reads it, in a folder that somebody else gave away."""
    torch.save({"step": 1, "objective": Crafted(tmp_path / "made")}, tmp_path / "step-00000001.pt")
    with pytest.raises(CorruptionError, match=r"step-00000001\.pt in .* cannot be read"):
        Checkpoints(tmp_path).load()
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("depth", [0, 3, MAX_DEPTH - 5])
@pytest.mark.parametrize("key", ["training", "data", "backbone", "segmentation"])
def test_a_target_is_found_however_deep_it_lies(copy: Path, key: str, depth: int) -> None:
    value: Any = {"_target_": "os.mkdir", "_args_": [str(copy / "made")]}
    for i in range(depth):
        value = [value] if i % 2 else {"x": value}
    change_config(copy, lambda c: c[key].update(y=value))
    with pytest.raises(InputError, match=rf"{key}\.y\..*_target_: releases are data"):
        ask(copy)
    assert not (copy / "made").exists()


# Random damage.


def damaged(data: bytes, rng: np.random.Generator, end: int | None = None) -> bytes:
    """One byte is another, or the rest is gone."""
    place = int(rng.integers(len(data) if end is None else end))
    if rng.integers(4) == 0:
        return data[:place]
    return data[:place] + bytes([data[place] ^ int(rng.integers(1, 256))]) + data[place + 1 :]


def test_random_damage_of_a_release_is_refused_or_is_not_read(copy: Path, seed: int) -> None:
    """A byte of SHA256SUMS may say the same as before, such as the end of its last line."""
    expected = [load_file(copy / name) for name in ("model.safetensors", DECODER)]
    rng = np.random.default_rng((seed, 1))
    refused = 0
    for _ in range(200):
        file = copy / str(rng.choice([*NAMES, "SHA256SUMS"]))
        whole = file.read_bytes()
        file.write_bytes(damaged(whole, rng))
        try:
            encoder, network = voxelith.load_encoder(copy), load_network(copy, "cpu")
        except InputError as error:
            refused += 1
            assert str(copy) in str(error)
        else:
            assert file.name == "SHA256SUMS"
            assert is_same(dict(encoder.module.state_dict()), expected[0])
            assert is_same(dict(network.model.decoder.state_dict()), expected[1])
        file.write_bytes(whole)
    assert refused > 190


def test_random_damage_under_right_sums_is_no_other_fault(copy: Path, seed: int) -> None:
    """Sums show no tampering by who makes them: what is in there has to make sense by itself."""
    rng = np.random.default_rng((seed, 2))
    for _ in range(40):
        name = str(rng.choice(NAMES))
        file = copy / name
        whole = file.read_bytes()
        header = 8 + struct.unpack("<Q", whole[:8])[0] if name.endswith("tensors") else None
        file.write_bytes(damaged(whole, rng, header))
        resign(copy)
        with contextlib.suppress(InputError):
            ask(copy)
        file.write_bytes(whole)


def refused_or_same(path: Path, draw: Callable[[], bytes], expected: dict[str, Tensor]) -> None:
    """200 times a file of public weights is refused by its name, or gives what it gave."""
    refused = 0
    for _ in range(200):
        path.write_bytes(draw())
        try:
            found = open_foreign(path, TOLD).state
        except InputError as error:
            refused += 1
            assert str(path) in str(error)
        else:
            assert is_same(found, expected)
    assert refused > 100


def test_random_damage_of_a_pth_is_refused_or_is_not_read(tmp_path: Path, seed: int) -> None:
    """The archive has sums of its parts, which torch does not look at."""
    path = tmp_path / "a.pth"
    torch.save({"state_dict": stunet_weights(), "epoch": 3}, path)
    whole, expected = path.read_bytes(), open_foreign(path, TOLD).state
    rng = np.random.default_rng((seed, 3))
    refused_or_same(path, lambda: damaged(whole, rng), expected)


def test_random_damage_of_safetensors_is_refused_or_one_value(tmp_path: Path, seed: int) -> None:
    """The format has no sums: a value may be another, and then the file's digest is."""
    path = tmp_path / "a.safetensors"
    save_file(stunet_weights(), path, metadata={"format": "pt"})
    whole = path.read_bytes()
    expected = {n: t.clone() for n, t in open_foreign(path, TOLD).state.items()}  # not the file's
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    rng = np.random.default_rng((seed, 4))
    refused_or_same(path, lambda: damaged(whole, rng, header), expected)
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    found = open_foreign(path, TOLD).state
    assert sum(int((found[n] != expected[n]).sum()) for n in expected) == 1


# What is not what it says.


def header_of(shape: list[int], size: int) -> bytes:
    entry = {"dtype": "F32", "shape": shape, "data_offsets": [0, size]}
    text = json.dumps({"stages.0.blocks.0.conv1.conv.weight": entry}).encode()
    return struct.pack("<Q", len(text)) + text


SAFETENSORS = {
    "empty": b"",
    "eight bytes": bytes(8),
    "a header of 2^40 bytes": struct.pack("<Q", 2**40) + b"{}",
    "a header of 2^64 - 1 bytes": struct.pack("<Q", 2**64 - 1) + b"{}",
    "4 TiB that are not there": header_of([2**40], 2**42),
    "a shape beyond all numbers": header_of([2**62, 2**62], 16) + bytes(16),
    "no values in 2^40 rows": header_of([2**40, 0], 0),
    "deep JSON": struct.pack("<Q", 10**5) + b"[" * 10**5,
}


@pytest.mark.parametrize("name", ["model.safetensors", DECODER, "golden_output.safetensors"])
@pytest.mark.parametrize("case", SAFETENSORS)
def test_weights_that_claim_what_is_not_there(copy: Path, name: str, case: str) -> None:
    (copy / name).write_bytes(SAFETENSORS[case])
    resign(copy)
    with pytest.raises(InputError) as error:
        ask(copy)
    assert str(copy) in str(error.value)


def test_nothing_is_allocated_before_it_is_refused(tmp_path: Path) -> None:
    """Under a limit of what a process may take, in which an honest release and file still fit."""
    for name, data in SAFETENSORS.items():
        path = Path(shutil.copytree(SEGMENTER, tmp_path / "releases" / name))
        (path / "model.safetensors").write_bytes(data)
        resign(path)
        (tmp_path / f"{name}.safetensors").write_bytes(data)
    backbone = json.loads((SEGMENTER / "config.json").read_text())["backbone"]["args"]
    vit = {"patch_size": 4, "num_heads": 1}
    many = {"strides": [1] * 8, "blocks": [20] * 8}
    absurd: dict[str, Any] = {
        "embed_dim 10^6": {"name": "vit.ViT3D", "args": {**vit, "embed_dim": 10**6, "depth": 4}},
        "depth 10^4": {"name": "vit.ViT3D", "args": {**vit, "embed_dim": 96, "depth": 10**4}},
        "both allowed": {"name": "vit.ViT3D", "args": {**vit, "embed_dim": 8190, "depth": 128}},
        "features": {
            "name": "resenc.ResEncUNetEncoder", "args": {**many, "features": [4096] * 8}
        },
        "channels": {"name": "resenc.ResEncUNetEncoder", "args": {**backbone, "in_channels": 1024}},
    }  # fmt: skip
    for name, value in absurd.items():
        path = Path(shutil.copytree(SEGMENTER, tmp_path / "releases" / name))
        change_config(path, lambda c, value=value: c.update(backbone=value))
    path = Path(shutil.copytree(SEGMENTER, tmp_path / "releases" / "crop"))
    change_config(path, lambda c: c.update(crop_size=[2048] * 3))
    pad = {"op": "pad", "multiple": [1024] * 3, "value": "minimum"}
    path = Path(shutil.copytree(SEGMENTER, tmp_path / "releases" / "pad"))
    change_config(path, lambda c: c["preprocess"]["operations"].append(pad))
    # Of 37 x 29 x 41 voxels in millimetres, in pieces of 0.05 mm.
    path = Path(shutil.copytree(SEGMENTER, tmp_path / "releases" / "fine"))
    change_config(path, lambda c: c["preprocess"]["operations"][1].update(spacing_mm=[0.05] * 3))
    voxels = np.arange(200**3, dtype=np.uint8).reshape(200, 200, 200)
    huge = nib.Nifti1Image(voxels, np.diag([2.0, 2.0, 2.0, 1.0]))
    (path / "golden_input.nii.gz").write_bytes(gzip.compress(huge.to_bytes()))
    resign(path)
    torch.save({"a": torch.zeros(1).expand(2**20, 2**20)}, tmp_path / "expanded.pth")
    code = """
import resource, sys
from pathlib import Path
sys.path[:0] = ["tests", "tests/pretrain"]
from test_trust import SEGMENTER, InputError, ask, open_foreign
ask(SEGMENTER)
pages = int(Path("/proc/self/statm").read_text().split()[0])
limit = pages * resource.getpagesize() + 2**28
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
ask(SEGMENTER)
folder = Path(sys.argv[1])
for look, paths in ((ask, folder.glob("releases/*")), (open_foreign, folder.glob("*.*"))):
    for path in sorted(paths):
        try:
            look(path)
        except InputError as error:
            said = str(error).replace(sys.argv[1], "")
            if "emory" in said or "allocate" in said:
                print("too late:", said)
        else:
            print(path.name, "was taken")
print("done")
"""
    words = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.stdout.split("\n")[-2:] == ["done", ""], done.stdout + done.stderr
    assert done.stdout == "done\n"


def test_whole_numbers_are_no_weights(copy: Path, tmp_path: Path) -> None:
    """Of the same bytes, which copying would take without a word."""
    for name in ("model.safetensors", DECODER):
        whole = (copy / name).read_bytes()
        (copy / name).write_bytes(whole.replace(b'"F32"', b'"I32"'))
        resign(copy)
        with pytest.raises(InputError, match=r"is torch\.int32, expected torch\.float32"):
            ask(copy)
        if name == DECODER:
            with pytest.raises(InputError, match=r"decoder.*is torch\.int32"):
                load_release(copy).load_decoder(load_network(SEGMENTER, "cpu").model.decoder)
        (copy / name).write_bytes(whole)
    path = tmp_path / "a.safetensors"
    save_file(stunet_weights(), path)
    path.write_bytes(path.read_bytes().replace(b'"F32"', b'"I32"', 1))
    with pytest.raises(InputError, match=r"is torch\.int32, which no weight"):
        open_foreign(path, TOLD)


def test_a_config_of_another_release_is_refused(copy: Path) -> None:
    """With right sums: of another network, of another kind, or with other facts of its own."""
    shutil.copy(ENCODER / "config.json", copy)
    resign(copy)
    with pytest.raises(InputError, match=f"lists {DECODER}"):
        ask(copy)
    (copy / DECODER).unlink()
    args = {"features": [4, 12], "strides": [1, 2], "blocks": [1, 1]}
    other = {"name": "resenc.ResEncUNetEncoder", "args": args}
    for change in ({"backbone": other}, {"kind": "segmenter"}, {"transfers": "network"}):
        config = json.loads((ENCODER / "config.json").read_text()) | change
        (copy / "config.json").write_text(json.dumps(config))
        resign(copy)
        with pytest.raises(InputError, match=r"does not fit this network|kind=|transfers="):
            voxelith.load_encoder(copy)


def test_a_config_that_fits_the_weights_and_means_others_fails_the_golden_scan(copy: Path) -> None:
    """No tensor shows a slope, an order of channels or a stride's place: features do."""
    change_config(copy, lambda c: c["preprocess"]["operations"].pop())
    with pytest.raises(CorruptionError, match="the golden scan gives features that differ"):
        check_golden(copy)


@pytest.mark.parametrize("value", [5, [], {"version": 9}, {"version": 1, "operations": [[]]}])
def test_a_preprocessing_of_another_kind_is_told_with_its_file(copy: Path, value: Any) -> None:
    change_config(copy, lambda c: c.update(preprocess=value))
    with pytest.raises(InputError, match=r"config\.json: preprocess"):
        ask(copy)


@pytest.mark.parametrize("name", [*NAMES, "SHA256SUMS"])
@pytest.mark.parametrize("to", ["elsewhere", "nowhere", "itself", "folder"])
def test_links_that_lead_out_are_refused(copy: Path, name: str, to: str) -> None:
    file, out = copy / name, copy.parent / "out"
    file.rename(out)
    if to == "folder":
        file.mkdir()
    else:
        file.symlink_to({"elsewhere": out, "nowhere": copy / "none", "itself": file}[to])
    said = "is a link out of the release" if to == "elsewhere" else name
    with pytest.raises(InputError, match=said) as error:
        voxelith.load_encoder(copy)
    assert str(copy) in str(error.value)


def test_links_within_a_release_are_its_own(copy: Path) -> None:
    """And a release may lie behind a link itself, as in a folder of latest ones."""
    (copy / "README.md").rename(copy / "card")
    (copy / "README.md").symlink_to("card")
    (copy.parent / "latest").symlink_to(copy)
    assert voxelith.load_encoder(copy.parent / "latest").report is not None


@pytest.mark.parametrize("depth", [MAX_DEPTH + 1, 300, 480, 900, 5000, 10**5])
@pytest.mark.parametrize("name", ["config.json", "fingerprints.json"])
def test_deep_json_is_refused(copy: Path, name: str, depth: int) -> None:
    """Deep enough for the parser, for what walks through it, and for what writes it anew."""
    text = (copy / name).read_text().strip()
    for inner in ("[" * depth + "]" * depth, '{"a":' * depth + "1" + "}" * depth):
        (copy / name).write_text(f'{text[:-1]}, "x": {inner}}}')
        resign(copy)
        with pytest.raises(InputError, match=rf"{name}: (nests deeper|is not JSON)"):
            ask(copy)


def within(value: Any, times: int) -> Any:
    for _ in range(times):
        value = [value] * 10
    return value


def test_what_lies_beside_public_weights_ends_nowhere(tmp_path: Path) -> None:
    """Lists that hold themselves, or each other ten times over; what is no plain data; names."""
    path, weights = tmp_path / "a.pth", stunet_weights()
    itself: list[Any] = []
    itself.append(itself)
    deep: Any = []
    for _ in range(200):
        deep = [deep]
    odd = {"itself": itself, "ten": within(1, 20), "deep": deep, 3: 4, "epoch": 5}
    torch.save({"state_dict": weights, **odd}, path)
    assert read_stored(path).facts == {"epoch": 5}
    around: dict[str, Any] = {"state_dict": weights}
    for _ in range(40):
        around = {"a": around, "b": around}
    for stored in (
        {0: torch.ones(2)},
        {"state_dict": {0: torch.ones(2)}},
        {(): torch.ones(2)},
        around,
    ):
        torch.save(stored, path)
        with pytest.raises(InputError, match="holds other things than tensors by name"):
            open_foreign(path, TOLD)


def test_a_tensor_keeps_nothing_of_what_a_pickle_puts_on_it(tmp_path: Path) -> None:
    path, weights = tmp_path / "a.pth", stunet_weights()
    for name in ("is_floating_point", "numel", "float", "untyped_storage", "detach"):
        own = {n: torch.nn.Parameter(t.clone()) for n, t in weights.items()}
        for tensor in own.values():
            setattr(tensor, name, 5)
        torch.save(own, path)
        assert is_same(open_foreign(path, TOLD).state, weights_of(weights, tmp_path))


def weights_of(weights: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
    torch.save(weights, folder / "plain.pth")
    return open_foreign(folder / "plain.pth", TOLD).state


def test_a_numbers_bytes_are_all_that_it_takes(tmp_path: Path) -> None:
    """numpy would make 1 GB of a kind of number that is so large, without a byte of it."""
    path = tmp_path / "a.pth"
    torch.save({"state_dict": stunet_weights(), "loss": np.float64(0.5)}, path)
    assert read_stored(path).facts["loss"] == 0.5
    kind = b"cnumpy\ndtype\nX\x0b\x00\x00\x00V1000000000\x85R"
    pickled = b"\x80\x02cnumpy._core.multiarray\nscalar\n" + kind + b"\x85R."
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in parts.items():
            archive.writestr(name, pickled if name.endswith("data.pkl") else data)
    with pytest.raises(InputError, match=r"_number\(\) missing 1 required"):
        open_foreign(path)


def test_a_file_without_sums_is_read(tmp_path: Path) -> None:
    """torch writes none where it is told so."""
    path, weights = tmp_path / "a.pth", stunet_weights()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(weights, path)
    finally:
        torch.serialization.set_crc32_options(True)
    assert is_same(open_foreign(path, TOLD).state, weights_of(weights, tmp_path))


@pytest.mark.parametrize(
    "path", ["../x", "a/../../x", "/x", "a\\..\\x", "C:\\x", "a\0b", "a//b", ".", "..", "", "a/./b"]
)
def test_paths_that_lead_out_are_told(path: str) -> None:
    assert not is_safe(path) and is_safe("a/b.pth")


@pytest.mark.parametrize("name", ["../config.json", "/config.json", "..\\config.json", "a\0"])
def test_sums_list_no_paths(copy: Path, name: str) -> None:
    sums = copy / "SHA256SUMS"
    sums.write_text(sums.read_text().replace("  config.json", f"  {name}"))
    with pytest.raises(InputError, match="which is no part of a release"):
        ask(copy)
