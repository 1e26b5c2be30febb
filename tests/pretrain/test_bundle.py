"""A MONAI bundle that runs without voxelith gives the features that voxelith gives."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny_releases import VIT, tiny_release

import voxelith
from data_prep.errors import CorruptionError, InputError
from data_prep.preprocess import Preprocess
from pretrain import bundle
from pretrain.bundle import run_alone, write_bundle

# The golden scan is larger along each axis; along h a window is an odd number of cells.
CROP = (16, 12, 16)
# Of spacings 2.1, 1.3 and 0.9 mm one grows, one stays and one shrinks.
PREPROCESS = Preprocess.default(spacing_mm=(1.5, 1.3, 1.2), multiple=(6, 6, 6))
REQUIRED = {  # by MONAI's schema of 2024-07-25
    "schema", "version", "monai_version", "pytorch_version", "numpy_version", "task",
    "required_packages_version", "description", "authors", "copyright", "network_data_format",
}  # fmt: skip
TENSOR = {"type", "format", "num_channels", "spatial_shape", "dtype", "value_range"}


def test_it_runs_alone_and_gives_the_same(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Writing runs it: looks at what that run wrote, beside what the release gives."""
    kept = tmp_path / "run"
    kept.mkdir()
    alone = bundle.run_alone

    def keep(made: Path, output: Path, modalities: tuple[str, ...]) -> None:
        alone(made, kept, modalities)
        shutil.copytree(kept, output, dirs_exist_ok=True)

    monkeypatch.setattr(bundle, "run_alone", keep)
    release = tiny_release(tmp_path / "r", "vit.ViT3D", VIT, CROP, seed, ("CT", "MR"), PREPROCESS)
    facts = write_bundle(release, tmp_path / "out")
    encoder = voxelith.load_encoder(release.path)
    for modality in release.modalities:
        expected = encoder.features(release.path / "golden_input.nii.gz", modality=modality)
        with np.load(kept / modality / "golden_input.npz") as found:
            for name in ("map", "vector", "affine", "spacing"):
                wanted = np.asarray(getattr(expected, name))
                np.testing.assert_allclose(
                    found[name], wanted, rtol=0, atol=1e-5 * np.abs(wanted).max(), err_msg=name
                )
    root = tmp_path / "out"
    assert json.loads((root / "configs" / "metadata.json").read_text()) == facts
    assert facts.keys() >= REQUIRED
    for side in ("inputs", "outputs"):
        for tensor in facts["network_data_format"][side].values():
            assert tensor.keys() >= TENSOR
    assert facts["golden"]["error"] < 1e-5
    licence = (root / "LICENSE").read_text()
    assert licence.index("CC-BY-NC-4.0") < licence.index("CC-BY-4.0")
    for path in root.rglob("*.*"):
        if path.suffix in (".json", ".md"):
            assert str(tmp_path) not in path.read_text(), path
    assert {path.name for path in tmp_path.iterdir()} == {"r", "run", "out"}


def test_a_scan_may_be_scaled_by_its_own_percentiles(seed: int, tmp_path: Path) -> None:
    rules = {"CT": {"rule": "percentile", "onto": (-0.5, 2.0)}, "MR": {"rule": "percentile"}}
    preprocess = Preprocess.default(spacing_mm=(1.5, 1.3, 1.2), intensity=rules)
    release = tiny_release(tmp_path / "r", "vit.ViT3D", VIT, CROP, seed, ("CT", "MR"), preprocess)
    # What it writes is run, and compared with what the release gives.
    assert write_bundle(release, tmp_path / "out")["golden"]["error"] < 1e-5


def test_a_rule_without_a_form_is_refused() -> None:
    with pytest.raises(InputError, match="intensity rule 'histogram'"):
        bundle._intensity({"rule": "histogram"})


def test_other_features_are_found_and_nothing_stays(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = tiny_release(tmp_path / "r", "vit.ViT3D", VIT, CROP, seed)
    features = voxelith.load_encoder(release.path).features(
        release.path / "golden_input.nii.gz", modality="MR"
    )

    def other(made: Path, output: Path, modalities: tuple[str, ...]) -> None:
        (output / "MR").mkdir()
        np.savez(
            output / "MR" / "golden_input.npz",
            map=features.map[:, ::-1],
            vector=features.vector,
            affine=features.affine,
            spacing=features.spacing,
        )

    monkeypatch.setattr(bundle, "run_alone", other)
    with pytest.raises(CorruptionError, match="map of MR by"):
        write_bundle(release, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"r"}


def test_images_of_one_name_are_refused(seed: int, tmp_path: Path) -> None:
    """Results are named by it: the last would be all that is left."""
    release = tiny_release(tmp_path / "r", "vit.ViT3D", VIT, CROP, seed, ("MR",), PREPROCESS)
    write_bundle(release, tmp_path / "out")
    golden = release.path / "golden_input.nii.gz"
    (tmp_path / "2").mkdir()
    shutil.copy(golden, tmp_path / "2")
    images = [str(golden), str(tmp_path / "2" / golden.name)]
    words = {"bundle_root": ".", "images": images, "output_dir": str(tmp_path / "features")}
    code = f"from monai.bundle import run; run(config_file='configs/inference.json', **{words!r})"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path / "out", capture_output=True, text=True
    )
    assert done.returncode and "images of one file name: results are named by it" in done.stderr
    assert not (tmp_path / "features").exists()


def test_what_does_not_run_says_why(tmp_path: Path) -> None:
    (tmp_path / "configs").mkdir()
    # Where voxelith is installed, this finds it unless it is kept out.
    (tmp_path / "configs" / "inference.json").write_text('{"run": ["$__import__(\'pretrain\')"]}')
    with pytest.raises(CorruptionError, match="does not run without voxelith"):
        run_alone(tmp_path, tmp_path, ["MR"])


def test_cells_that_monai_would_misplace_are_refused(seed: int, tmp_path: Path) -> None:
    args = {**VIT, "patch_size": 6}
    release = tiny_release(tmp_path / "r", "vit.ViT3D", args, (12, 12, 12), seed)
    with pytest.raises(InputError, match="powers of two"):
        write_bundle(release, tmp_path / "out")


def test_windows_step_as_ours() -> None:
    """MONAI's rule for a step, int(side * (1 - overlap)), gives the whole cells of ours."""
    for cells, stride in itertools.product(range(1, 100), (1, 2, 4, 8, 16, 32)):
        side, step = cells * stride, max(1, round(cells * 0.5)) * stride
        assert int(side * (1 - bundle._overlap(cells, stride))) == step, (cells, stride)
