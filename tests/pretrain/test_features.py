"""`voxelith features`: a folder gives what each scan gives, and says what was left out."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import voxelith
from data_prep.errors import InputError
from data_prep.preprocess import Preprocess
from data_prep.scans import read_scan
from pretrain.arguments import build_backbone
from pretrain.encoder import load_encoder
from pretrain.features import features
from pretrain.release import write_release
from pretrain.settings import FeaturesSettings

CROP = [8, 16, 16]


def encoder_release(folder: Path, channels: int = 1, seed: int = 0) -> Path:
    args = {"in_channels": channels, "features": [4, 6], "strides": [1, 2], "blocks": [1, 1]}
    torch.manual_seed(seed)
    config = {
        "format": 1, "name": "tiny", "kind": "encoder",
        "backbone": {"name": "resenc.ResEncUNetEncoder", "args": args},
        "objective": {"name": "cnn_mae.CnnMAE", "args": {}},
        "crop_size": CROP, "modalities": ["CT", "MR"], "preprocess": Preprocess.default().to_dict(),
        "training": {}, "data": {}, "versions": {},
    }  # fmt: skip
    encoder = build_backbone("resenc.ResEncUNetEncoder", args, "test")
    prints = {"format": 1, "values": []}
    write_release(folder, encoder=encoder, config=config, fingerprints=prints, card="A test.\n")
    return folder


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return encoder_release(tmp_path_factory.mktemp("releases") / "tiny")


@pytest.fixture
def scans(samples: Path, tmp_path: Path) -> Path:
    """Two real scans, one of them in a folder of its own, and a file that is none."""
    folder = tmp_path / "scans"
    (folder / "ward").mkdir(parents=True)
    found = sorted((samples / "hippocampus" / "images").glob("*.nii.gz"))[:2]
    shutil.copy(found[0], folder / "a.nii.gz")
    shutil.copy(found[1], folder / "ward" / "b.nii.gz")
    return folder


def asked(ckpt: Path, source: Path, output: Path, **changes: Any) -> FeaturesSettings:
    chosen = {"ckpt": ckpt, "input": source, "output": output, "device": "cpu"}
    return FeaturesSettings.model_validate(chosen | changes)


def test_a_folder_gives_what_each_scan_gives(release: Path, scans: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert features(asked(release, scans, out)).written == ["a.nii.gz", "ward/b.nii.gz"]
    encoder = load_encoder(release)
    for name in ("a", "ward/b"):
        expected = encoder.features(scans / f"{name}.nii.gz")
        with np.load(out / f"{name}.npz", allow_pickle=False) as found:
            for part in ("map", "affine", "vector", "spacing"):
                np.testing.assert_array_equal(found[part], getattr(expected, part), part)
            about = json.loads(str(found["about"]))
        assert about["digest"] == encoder.digest and about["overlap"] == 0.5
        assert about["window"] == CROP and str(tmp_path) not in json.dumps(about)
    table = tmp_path / "out.parquet"
    features(asked(release, scans, table))
    rows = pq.read_table(table)
    assert json.loads(rows.schema.metadata[b"voxelith"]) == about
    for row, name in zip(rows.to_pylist(), ("a.nii.gz", "ward/b.nii.gz"), strict=True):
        expected = encoder.features(scans / name)
        assert (row["file"], row["modality"]) == (name, ["MR"])
        np.testing.assert_array_equal(np.float32(row["vector"]), expected.vector)
        assert row["cells"] == list(expected.map.shape[1:])
        assert row["spacing"] == list(expected.spacing)


def test_a_single_scan_goes_to_a_single_file(release: Path, scans: Path, tmp_path: Path) -> None:
    features(asked(release, scans / "a.nii.gz", tmp_path / "deep" / "one.npz"))
    with np.load(tmp_path / "deep" / "one.npz", allow_pickle=False) as found:
        expected = load_encoder(release).features(scans / "a.nii.gz")
        np.testing.assert_array_equal(found["map"], expected.map)
    features(asked(release, scans / "a.nii.gz", tmp_path / "folder"))
    assert (tmp_path / "folder" / "a.npz").is_file()


def test_maps_of_one_name_are_refused_and_rows_are_told_apart(
    release: Path, scans: Path, tmp_path: Path
) -> None:
    nib.save(nib.load(scans / "a.nii.gz"), scans / "a.nii")
    with pytest.raises(InputError, match=r"a\.nii, a\.nii\.gz would all become .*a\.npz; rename"):
        features(asked(release, scans, tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    found = features(asked(release, scans, tmp_path / "out.parquet"))
    assert found.written == ["a.nii", "a.nii.gz", "ward/b.nii.gz"]


@pytest.mark.parametrize("kind", ["out", "out.parquet"])
def test_what_cannot_be_read_is_left_out_and_the_rest_is_done(
    release: Path, scans: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (scans / "broken.nii.gz").write_bytes(b"no scan")
    words = [f"ckpt={release}", f"input={scans}", f"output={tmp_path / kind}", "device=cpu"]
    assert voxelith.main(["features", *words, "--json"]) == 2
    said = capsys.readouterr()
    result = json.loads(said.out)
    assert result["written"] == 2 and list(result["left_out"]) == ["broken.nii.gz"]
    assert f"{scans / 'broken.nii.gz'}: " in said.err
    (scans / "broken.nii.gz").unlink()
    assert voxelith.main(["features", *words, "resume=true", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["there"] == 2


@pytest.mark.parametrize("kind", ["out", "out.parquet"])
def test_resume_does_what_is_missing_and_refuses_other_features(
    release: Path, scans: Path, tmp_path: Path, kind: str
) -> None:
    moved = (scans / "ward" / "b.nii.gz").rename(tmp_path / "b.nii.gz")
    out = tmp_path / kind
    features(asked(release, scans, out))
    moved.rename(scans / "ward" / "b.nii.gz")
    done = features(asked(release, scans, out, resume=True))
    assert (done.there, done.written) == (["a.nii.gz"], ["ward/b.nii.gz"])
    once = tmp_path / f"once-{kind}"
    features(asked(release, scans, once))
    if kind == "out.parquet":
        assert pq.read_table(out).equals(pq.read_table(once), check_metadata=True)
    else:
        for name in ("a", "ward/b"):
            assert (out / f"{name}.npz").read_bytes() == (once / f"{name}.npz").read_bytes()
    with pytest.raises(InputError, match=r"has other features \(overlap: 0\.5 -> 0\.25\)"):
        features(asked(release, scans, out, resume=True, overlap=0.25))
    other = encoder_release(tmp_path / "other", seed=1)
    with pytest.raises(InputError, match=r"has other features \(digest: "):
        features(asked(other, scans, out, resume=True))


def test_a_table_that_is_killed_has_the_rows_of_before(
    release: Path, scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.parquet"
    there = []

    def looked(*args: Any) -> Any:
        there.append(pq.read_table(out)["file"].to_pylist() if out.exists() else [])
        return read_scan(*args)

    monkeypatch.setattr("pretrain.features.read_scan", looked)
    monkeypatch.setattr("pretrain.features.SAVE_SECONDS", 0)
    features(asked(release, scans, out))
    assert there == [[], ["a.nii.gz"]]
    whole = out.read_bytes()
    features(asked(release, scans, out, resume=True))
    assert out.read_bytes() == whole


@torch.no_grad()
def test_windows_overlap_as_stated(release: Path, seed: int) -> None:
    """Twice the crop along one axis: side by side without overlap, three windows with a half."""
    encoder = load_encoder(release)
    scan = np.random.default_rng(seed).normal(size=(16, 16, 16)) * 100
    ready = encoder.preprocess.apply(encoder._volume(scan, (1, 1, 1), "MR")).array
    image = torch.from_numpy(np.ascontiguousarray(ready, dtype=np.float32))[None]
    one, half, two = (encoder.module(image[:, :, i : i + 8])[-1][0] for i in (0, 4, 8))
    apart = encoder.features(scan, spacing=(1, 1, 1), modality="MR", overlap=0.0).map
    np.testing.assert_allclose(apart, torch.cat([one, two], 1), rtol=1e-5, atol=1e-6)
    mean = torch.cat([one[:, :2], (one[:, 2:] + half[:, :2]) / 2,
                      (half[:, 2:] + two[:, :2]) / 2, two[:, 2:]], 1)  # fmt: skip
    found = encoder.features(scan, spacing=(1, 1, 1), modality="MR").map
    np.testing.assert_allclose(found, mean, rtol=1e-5, atol=1e-6)
    assert not np.allclose(found, apart)


@pytest.mark.parametrize("overlap", [-0.5, 1.0, 1.5, float("nan")])
def test_windows_that_leave_gaps_or_never_end_are_refused(release: Path, overlap: float) -> None:
    encoder, scan = load_encoder(release), np.zeros((16, 16, 40))
    with pytest.raises(InputError, match=f"overlap={overlap}: must be a share"):
        encoder.features(scan, spacing=(1, 1, 1), modality="MR", overlap=overlap)


def test_a_scan_that_takes_long_has_a_bar_of_its_windows(
    release: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """All windows pass it; what is done before it would be seen is not told."""
    encoder = load_encoder(release)
    scan = np.zeros((16, 24, 16), np.int16)
    scan[4:12] = np.arange(24)[:, None]
    nib.save(nib.Nifti1Image(scan.T, np.diag([-1.0, -1, 1, 1])), tmp_path / "scan.nii.gz")
    passed: list[tuple[int, ...]] = []

    def each(corners: Sequence[tuple[int, ...]]) -> Iterator[tuple[int, ...]]:
        for corner in corners:
            passed.append(corner)
            yield corner

    volume = read_scan([tmp_path / "scan.nii.gz"], ["MR"])
    encoder.see(volume, overlap=0, each=each)
    assert len(passed) == len(set(passed)) > 1
    settings = asked(release, tmp_path / "scan.nii.gz", tmp_path / "scan.npz", overlap=0)
    features(settings)
    assert "windows" not in capsys.readouterr().err
    monkeypatch.setattr("pretrain.features.PATIENCE", 0)
    features(settings)
    assert f"/{len(passed)} [" in (told := capsys.readouterr().err) and "windows" in told


def test_a_modality_that_is_told_counts(release: Path, scans: Path, tmp_path: Path) -> None:
    """A CT without air looks like MR."""
    known = load_encoder(release).config["modalities"]
    for modality in known:
        features(asked(release, scans / "a.nii.gz", tmp_path / modality, modality=modality))
        expected = load_encoder(release).features(scans / "a.nii.gz", modality=modality)
        with np.load(tmp_path / modality / "a.npz", allow_pickle=False) as found:
            np.testing.assert_array_equal(found["map"], expected.map)
            assert json.loads(str(found["about"]))["modality"] == modality
    for other in {"CT", "MR"} - set(known):
        with pytest.raises(InputError, match=f"modality={other}: this network was trained on"):
            features(asked(release, scans, tmp_path / "other", modality=other))


def test_channels_are_put_together(samples: Path, tmp_path: Path) -> None:
    two = encoder_release(tmp_path / "two", channels=2)
    scan = sorted((samples / "hippocampus" / "images").glob("*.nii.gz"))[0]
    folder = tmp_path / "scans"
    folder.mkdir()
    for name in ("a_0000", "a_0001", "b_0000"):
        shutil.copy(scan, folder / f"{name}.nii.gz")
    found = features(asked(two, folder, tmp_path / "out"))
    assert found.written == ["a.nii.gz"]
    assert "it has 0000, the network takes 0000 to 0001" in found.left_out["b.nii.gz"]


def test_all_that_is_wrong_is_said_together(release: Path, scans: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError) as found:
        features(asked(tmp_path, scans, scans / "out.npz"))
    text = str(found.value)
    (tmp_path / "empty").mkdir()
    assert "one file for the scans of a folder" in text and "lies in the input folder" in text
    assert f"ckpt={tmp_path}: is not a release" in text
    with pytest.raises(InputError, match=r"holds no \.nii"):
        features(asked(release, tmp_path / "empty", tmp_path / "out"))
    for place in ("/proc/x/out.npz", "/proc/x", "/proc/x/out.parquet"):
        with pytest.raises(InputError, match="cannot be written"):
            features(asked(release, scans / "a.nii.gz", Path(place)))
    for image in scans.rglob("*.nii.gz"):
        image.write_bytes(b"no scan")
    with pytest.raises(InputError) as found:
        features(asked(release, scans, tmp_path / "none"))
    assert len(found.value.problems) == 2
    (tmp_path / "odd.parquet").write_bytes(b"no table")
    with pytest.raises(InputError, match="holds no table of features"):
        features(asked(release, scans, tmp_path / "odd.parquet", resume=True))


def test_cells_lie_where_the_scan_has_them(release: Path, tmp_path: Path) -> None:
    """A bright corner of an oblique scan is found at its place in millimetres."""
    values = np.zeros((24, 20, 16), np.int16)
    values[18:22, 2:6, 10:14] = 1000
    turn = np.array([[0.96, -0.28, 0], [0.28, 0.96, 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = turn * [1.0, 1.5, 2.0]
    affine[:3, 3] = [-20, 31, 7]
    nib.save(nib.Nifti1Image(values, affine), tmp_path / "scan.nii.gz")
    features(asked(release, tmp_path / "scan.nii.gz", tmp_path / "one.npz"))
    with np.load(tmp_path / "one.npz", allow_pickle=False) as found:
        quiet = np.median(found["map"], axis=(1, 2, 3), keepdims=True)
        loud = np.abs(found["map"] - quiet).sum(0)
        cell = np.unravel_index(loud.argmax(), loud.shape)
        place = found["affine"] @ [*cell, 1]
    corners = np.array([[18, 2, 10, 1], [21, 5, 13, 1]])
    voxel = np.linalg.inv(affine) @ place
    assert (voxel[:3] > corners[0][:3] - 3).all() and (voxel[:3] < corners[1][:3] + 3).all()
