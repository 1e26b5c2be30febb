"""What runs without voxelith gives what the encoder gives, at other sizes and batches too."""

from __future__ import annotations

import json
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_releases import VIT, tiny_release
from torch import nn

import voxelith
from data_prep.errors import CorruptionError, InputError
from data_prep.files import file_digest
from pretrain import portable
from pretrain.backbones.unet import UNetEncoder
from pretrain.backbones.vit import ViT3D
from pretrain.portable import write_onnx, write_torch_export

ROOT = Path(__file__).parent.parent.parent
CUBE, SLICE, LARGE = (8, 12, 16), (1, 12, 16), (32, 48, 64)
LEARNED = {"position": "learned", "position_grid": (2, 3, 3)}  # the fewest cells differ in one axis
PRIMUS = {"rope": True, "mlp": "swiglu", "inner_norm": True, "layer_scale": 0.1}
PCT = {"features": [4, 4, 8, 8, 8], "heads": [2] * 3, "windows": [2] * 3, "resolution_mode": 0}
SWIN = {"feature_size": 4, "depths": [2, 1, 1, 1], "heads": [2] * 4, "window": 4}
KINDS: dict[str, tuple[str, dict[str, Any], tuple[int, int, int]]] = {
    "vit": ("vit.ViT3D", VIT, CUBE),
    "vit-learned": ("vit.ViT3D", {**VIT, **LEARNED}, CUBE),
    "vit-no-position": ("vit.ViT3D", {**VIT, "position": "none", "register_tokens": 2}, CUBE),
    "vit-cls": ("vit.ViT3D", {**VIT, "cls_token": True, "register_tokens": 2}, CUBE),
    "vit-conv-stem": ("vit.ViT3D", {**VIT, "stem": "conv"}, CUBE),
    "vit-slices": ("vit.ViT3D", {**VIT, "patch_size": (1, 4, 4), "cls_token": True}, SLICE),
    "primus": ("vit.ViT3D", {**VIT, **LEARNED, **PRIMUS}, CUBE),
    "slice_vit": ("slice_vit.SliceViT", VIT, SLICE),
    "unet": ("unet.UNetEncoder", {"features": [4, 8], "strides": [1, 2], "convs": [1, 1]}, CUBE),
    "resenc": (
        "resenc.ResEncUNetEncoder",
        {"features": [4, 8, 8], "strides": [1, 2, (1, 2, 2)], "blocks": [1, 1, 1]},
        CUBE,
    ),
    "stunet": (
        "stunet.STUNetEncoder",
        {"features": [4, 8], "strides": [1, 2], "blocks": [1, 1]},
        CUBE,
    ),
    "pct_net": ("pct_net.PCTNetEncoder", PCT, LARGE),
    "swin_unetr": ("swin_unetr.SwinUNETREncoder", SWIN, (32, 32, 64)),
}
FIXED = {"pct_net", "swin_unetr"}


def runtime() -> Any:
    """onnxruntime, or the test is left out."""
    why = "the extra is not installed: pip install 'voxelith[onnx]'"
    for name in ("onnx", "onnxscript"):
        pytest.importorskip(name, reason=why)
    return pytest.importorskip("onnxruntime", reason=why)


def other_image(facts: dict[str, Any], crop: tuple[int, int, int], seed: int) -> torch.Tensor:
    """Of a size that the facts allow and that no check of ours had, in a batch of two."""
    shape = [
        size["at_least"] + size["multiple_of"] * (2 + axis) if "multiple_of" in size else side
        for axis, (size, side) in enumerate(
            zip(facts["input"]["sizes"].values(), crop, strict=True)
        )
    ]
    return torch.randn(2, 1, *shape, generator=torch.Generator().manual_seed(seed))


def check(found: dict[str, torch.Tensor], image: torch.Tensor, path: Path, limit: float) -> None:
    encoder = voxelith.load_encoder(path).module
    with torch.inference_mode():
        maps = encoder(image)
        expected = {f"map_{number}": one for number, one in enumerate(maps, start=1)}
        expected["vector"] = maps[-1].mean((2, 3, 4))
        if getattr(encoder, "cls_token", None) is not None:
            expected["cls"] = encoder.tokens(image)[:, 0]
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].shape == value.shape
        assert (found[name] - value).abs().max() <= limit * value.abs().max(), name


@pytest.mark.parametrize("kind", KINDS)
def test_the_program_gives_the_same(kind: str, seed: int, tmp_path: Path) -> None:
    name, args, crop = KINDS[kind]
    release = tiny_release(tmp_path / "r", name, args, crop, seed)
    facts = write_torch_export(release, tmp_path / "out")
    assert facts == json.loads((tmp_path / "out" / "encoder.json").read_text())
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"encoder.pt2", "encoder.json"}
    assert facts["release"]["digest"] == release.digest
    assert facts["file"]["sha256"] == file_digest(tmp_path / "out" / "encoder.pt2")
    assert all("fixed" in size for size in facts["input"]["sizes"].values()) == (kind in FIXED)
    assert all(told["error"] <= 1e-5 for told in facts["outputs"].values())
    program = torch.export.load(tmp_path / "out" / "encoder.pt2").module()
    image = other_image(facts, crop, seed)
    with torch.no_grad():
        check(program(image), image, release.path, 1e-5)


def test_the_program_tells_nothing_of_this_machine(seed: int, tmp_path: Path) -> None:
    release = tiny_release(tmp_path / "r", *KINDS["unet"], seed)
    write_torch_export(release, tmp_path / "out")
    with zipfile.ZipFile(tmp_path / "out" / "encoder.pt2") as archive:
        for name in archive.namelist():
            assert str(ROOT).encode() not in archive.read(name)
    assert str(tmp_path) not in (tmp_path / "out" / "encoder.json").read_text()


def test_what_is_there_stays(seed: int, tmp_path: Path) -> None:
    release = tiny_release(tmp_path / "r", *KINDS["unet"], seed)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("kept")
    with pytest.raises(InputError, match="already exists"):
        write_torch_export(release, tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine"]


def test_another_network_is_found_and_nothing_stays(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = tiny_release(tmp_path / "r", *KINDS["unet"], seed)
    export = portable.export_program

    def spoilt(release: Any, module: Any) -> Any:
        program = export(release, module)
        scale = next(name for name in program.state_dict if name.endswith("norm.weight"))
        program.state_dict[scale] = nn.Parameter(program.state_dict[scale] * 1.01)
        return program

    monkeypatch.setattr(portable, "export_program", spoilt)
    with pytest.raises(CorruptionError, match="map_1 by"):
        write_torch_export(release, tmp_path / "out")
    assert {p.name for p in tmp_path.iterdir()} == {"r"}


def test_a_branch_on_values_is_refused_in_words(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = tiny_release(tmp_path / "r", *KINDS["vit"], seed)
    usual = ViT3D.forward
    monkeypatch.setattr(ViT3D, "forward", lambda self, x: usual(self, x if x.sum() > 0 else -x))
    with pytest.raises(InputError, match=r"torch.export cannot have backbone vit.ViT3D") as caught:
        write_torch_export(release, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert {p.name for p in tmp_path.iterdir()} == {"r"}


def test_steps_that_follow_from_the_size_are_found(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A backbone that does not say so: its program works at the size that it was exported at."""
    release = tiny_release(tmp_path / "r", *KINDS["unet"], seed)
    usual = UNetEncoder.forward
    monkeypatch.setattr(
        UNetEncoder, "forward", lambda self, x: usual(self, x if x.shape[2] > CUBE[0] else 2 * x)
    )
    with pytest.raises(InputError, match="any_size = False"):
        write_torch_export(release, tmp_path / "out")


def test_without_onnx_it_is_said_how_to_have_it(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = tiny_release(tmp_path / "r", *KINDS["unet"], seed)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(InputError, match=r"pip install 'voxelith\[onnx\]'"):
        write_onnx(release, tmp_path / "out")


@pytest.mark.extra
@pytest.mark.parametrize("kind", ["vit-learned", "primus", "slice_vit", "resenc", "pct_net"])
def test_onnx_gives_the_same(kind: str, seed: int, tmp_path: Path) -> None:
    onnxruntime = runtime()
    name, args, crop = KINDS[kind]
    release = tiny_release(tmp_path / "r", name, args, crop, seed)
    facts = write_onnx(release, tmp_path / "out")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"encoder.onnx", "encoder.json"}
    file = tmp_path / "out" / "encoder.onnx"
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    assert [given.name for given in session.get_outputs()] == list(facts["outputs"])
    image = other_image(facts, crop, seed)
    found = session.run(list(facts["outputs"]), {"image": image.numpy()})
    named = dict(zip(facts["outputs"], map(torch.from_numpy, found), strict=True))
    check(named, image, release.path, 1e-4)
    assert str(ROOT).encode() not in file.read_bytes()


@pytest.mark.extra
def test_weights_beyond_a_file_of_onnx_lie_beside_it(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime()
    monkeypatch.setattr(portable, "PROTOBUF_LIMIT", 0)
    release = tiny_release(tmp_path / "r", *KINDS["stunet"], seed)
    facts = write_onnx(release, tmp_path / "out")  # onnxruntime has read both
    assert all(told["error"] <= 1e-4 for told in facts["outputs"].values())
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert names == {"encoder.onnx", "encoder.onnx.data", "encoder.json"}


@pytest.mark.extra
def test_what_onnx_does_not_know_is_said_in_words(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime()
    monkeypatch.setattr(portable, "_ONNX_STEPS", {})
    release = tiny_release(tmp_path / "r", *KINDS["pct_net"], seed)
    with pytest.raises(InputError, match="ONNX cannot have backbone pct_net") as caught:
        write_onnx(release, tmp_path / "out")
    assert "Failed to convert" not in str(caught.value)  # the reason, not that there is one
    assert {p.name for p in tmp_path.iterdir()} == {"r"}


@pytest.mark.extra
def test_norms_of_large_crops_of_air_stay_exact(seed: int, tmp_path: Path) -> None:
    """onnxruntime's own instance norm loses 2e-4 here."""
    runtime()
    args = {"features": [4], "strides": [1], "convs": [1]}
    release = tiny_release(tmp_path / "r", "unet.UNetEncoder", args, (64, 96, 96), seed)
    facts = write_onnx(release, tmp_path / "out")
    assert facts["outputs"]["map_1"]["error"] < 1e-5
