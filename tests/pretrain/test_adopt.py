"""Public weights as releases: what is told is kept, what is not told is asked for, none is guessed.

The oracle does not know our reader: nibabel turns the scan to the axes that the weights are from.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from fake_hub import Fake, Repo
from nibabel.orientations import axcodes2ornt, inv_ornt_aff, io_orientation, ornt_transform
from seeds import SEED
from test_foreign import Public, dino_3d, dinov3, hi_end, primus, resenc, stunet, swin
from torch import Tensor

import voxelith
from data_prep.errors import InputError
from data_prep.fingerprint import ALGORITHM, VERSION
from finetune.evaluate import comparable
from pretrain import adopt as adopting
from pretrain.adopt import Told, adopt, released
from pretrain.backbones.axes import turned_back
from pretrain.registry import KNOWN, Known
from pretrain.release import check_golden, load_release

TOLD: dict[str, Any] = {
    "modalities": ["CT"],
    "spacing_mm": None,
    "CT": {"rule": "window", "low": -175, "high": 250, "onto": [0, 1]},
}


def drawn(kind: Callable[..., Public], seed: int) -> Public:
    torch.manual_seed(seed)
    return kind(np.random.default_rng(seed))


def phantom(shape: tuple[int, ...], axes: str, path: Path) -> tuple[np.ndarray, Path]:
    """A scan of whole HU without any symmetry, stored as L, S, A; and the same on other axes."""
    rng = np.random.default_rng(SEED + 7)
    affine = np.diag([2.0, 1.5, 1.0, 1.0])
    ours = nib.Nifti1Image(
        np.rint(rng.normal(40, 120, shape[::-1])).astype(np.float32), affine
    )  # RAS
    stored = ours.as_reoriented(
        ornt_transform(io_orientation(affine), axcodes2ornt(("L", "S", "A")))
    )
    nib.save(stored, path)
    way = ornt_transform(io_orientation(stored.affine), axcodes2ornt(tuple(axes)))
    there = nib.load(path).as_reoriented(way)
    assert "".join(nib.aff2axcodes(there.affine)) == axes
    assert inv_ornt_aff(way, stored.shape).shape == (4, 4)
    return there.get_fdata(dtype=np.float32), path


@pytest.mark.parametrize(
    ("kind", "axes", "crop"),
    [
        (hi_end, "RAS", (16, 8, 24)),
        (dino_3d, "RAS", (16, 8, 24)),
        (swin, "RAS", (64, 32, 32)),
        (resenc, "SPL", (16, 32, 16)),
        (stunet, "SPL", (16, 32, 16)),
        (dinov3, "SPL", (1, 12, 8)),
    ],
)
@torch.no_grad()
def test_a_scan_reaches_the_weights_as_its_makers_meant(
    kind: Callable[..., Public], axes: str, crop: tuple[int, ...], tmp_path: Path, seed: int
) -> None:
    public = drawn(kind, seed)
    file = public.save(tmp_path / "weights.pth")
    told = {**TOLD, "crop_size": crop, "axes": axes, **public.told}
    release = adopt(file, tmp_path / "release", told)
    shape = (max(crop[0], 4), *crop[1:])  # a scan has more than a slice
    array, scan = phantom(shape, axes, tmp_path / "scan.nii.gz")
    image = torch.from_numpy((np.clip(array, -175, 250) + 175) / 425)[None, None]
    channels, encoder = public.encoder.in_channels, public.encoder.eval()
    seen = image.repeat(1, channels, 1, 1, 1).split(1 if crop[0] == 1 else 1000, dim=2)
    there: Tensor = torch.cat([encoder(part)[-1] for part in seen], dim=2)
    wanted = turned_back(there, axes)[0].numpy()
    found = voxelith.load_encoder(release.path).features(
        [scan] * channels if channels > 1 else scan
    )
    assert found.map.shape == wanted.shape
    assert np.abs(found.map - wanted).max() <= 1e-5 * np.abs(wanted).max()
    assert check_golden(release.path) <= 1e-5
    assert release.config["training"]["axes"] == axes
    # Never clean, nor is what begins from it and then sees volumes that are known.
    assert comparable(release.fingerprints | {f"{ALGORITHM}-{VERSION}:x"}) is None


def test_all_that_is_not_told_is_asked_for_at_once(tmp_path: Path, seed: int) -> None:
    public = drawn(hi_end, seed)
    file = public.save(tmp_path / "weights.pth")
    with pytest.raises(InputError) as found:
        adopt(file, tmp_path / "out", {"nme": "x"})
    said = str(found.value)
    assert all(f"{key}: missing" in said for key in ("modalities", "crop_size", "spacing_mm"))
    assert "nme: is taken for an argument of the backbone; did you mean name?" in said
    told = {"modalities": ["CT", "MR"], "crop_size": [16, 16, 16], "spacing_mm": None}
    with pytest.raises(InputError, match="CT: missing; how do its values"):
        adopt(file, tmp_path / "out", told)
    with pytest.raises(InputError, match="no tensor shows it"):
        adopt(file, tmp_path / "out", {**TOLD, "crop_size": [16, 16, 16]})
    with pytest.raises(InputError, match=r"crop_size: .*must be multiples"):
        adopt(file, tmp_path / "out", {**TOLD, **public.told, "crop_size": [18, 16, 16]})
    assert not (tmp_path / "out").exists()


def test_a_file_is_no_release_and_the_message_says_how_it_becomes_one(
    tmp_path: Path, seed: int
) -> None:
    file = drawn(primus, seed).save(tmp_path / "weights.pth")
    for opened in (load_release, released, voxelith.load_encoder):
        with pytest.raises(InputError, match=r"is a file.*`voxelith export FILE OUT`"):
            opened(file)  # type: ignore[operator]


@pytest.mark.parametrize("name", [name for name, one in KNOWN.items() if one.told])
def test_what_is_known_of_public_checkpoints_is_enough(name: str) -> None:
    one = KNOWN[name]
    facts = adopting._facts(Path("weights.pth"), adopting._known(name), name)
    assert isinstance(facts, Told) and facts.name == one.name and facts.licence == one.licence
    told = (facts.preprocess().intensity or {}).values()
    rules = {rule["rule"] for rule in told if isinstance(rule, dict)}
    assert rules and rules <= {"window", "percentile", "zscore"}


def test_every_public_checkpoint_says_what_a_scan_must_become() -> None:
    assert [name for name, one in KNOWN.items() if one.told is None and one.file] == []


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fake]:
    monkeypatch.setenv("VOXELITH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    made = Fake().start()
    monkeypatch.setenv("HF_ENDPOINT", made.url)
    yield made
    made.stop()


def test_a_known_name_is_a_release_once_and_then_offline(
    fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    public = drawn(dino_3d, seed)
    data = public.save(tmp_path / "weights.pth").read_bytes()
    fake.repos["org/public@main"] = Repo("5" * 40, {"weights.pth": data})
    known = Known(
        "public", "a public encoder", "CC BY 4.0", "https://example.org", "org/public",
        "weights.pth", told={**TOLD, **public.told, "crop_size": [16, 16, 16], "axes": "RAS"},
    )  # fmt: skip
    monkeypatch.setitem(KNOWN, "public", known)
    first = released("public")
    release = load_release(first)
    assert release.name == "public" and release.config["data"]["licence"] == {"CC BY 4.0": None}
    assert "CC BY 4.0" in (first / "README.md").read_text()
    written = {file.name: file.stat().st_mtime_ns for file in first.iterdir()}
    fake.stop()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert released("public") == first
    assert written == {file.name: file.stat().st_mtime_ns for file in first.iterdir()}
    assert voxelith.load_encoder("public").config["name"] == "public"
    changed = Known(**{**vars(known), "told": {**(known.told or {}), "axes": "SPL"}})
    monkeypatch.setitem(KNOWN, "public", changed)
    assert released("public") != first  # what is told otherwise is another release


def test_the_command_makes_one(tmp_path: Path, seed: int, capsys: Any) -> None:
    public = drawn(swin, seed)
    file = public.save(tmp_path / "weights.pth")
    words = [
        "modalities=[CT]", "crop_size=[32,32,64]", "spacing_mm=null", "axes=RAS", "licence=CC0",
        "CT={rule: window, low: -175, high: 250, onto: [0, 1]}", "name=theirs",
    ]  # fmt: skip
    out = tmp_path / "out"
    assert voxelith.main(["export", str(file), str(out), *words, "--json"]) == 0
    config = json.loads((out / "config.json").read_text())
    assert config["name"] == "theirs" and config["backbone"]["args"]["axes"] == "RAS"
    rule = config["preprocess"]["operations"][2]["CT"]
    assert rule == {"rule": "window", "low": -175.0, "high": 250.0, "onto": [0.0, 1.0]}
    assert voxelith.main(["export", str(file), str(tmp_path / "x"), "form=full"]) == 2
    assert voxelith.main(["export", str(out), str(tmp_path / "x"), "form=ful"]) == 2
    assert voxelith.main(["inspect", str(out)]) == 0
    said = capsys.readouterr()
    assert "theirs" in said.out and "did you mean full?" in said.err
