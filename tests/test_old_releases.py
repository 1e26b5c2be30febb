"""Releases of older versions stay readable, and give what they gave.

tests/releases holds what `voxelith export` wrote at two commits, told by the folders' names: a tiny
encoder of the first version, and a segmenter that was finetuned from it later.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import voxelith
from data_prep.files import file_digest
from finetune.describe import describe
from finetune.model_file import check_golden_network, load_network
from pretrain.release import check_golden, load_release

STORED = Path(__file__).parent / "releases"
FOLDERS = sorted(path.name for path in STORED.iterdir())


def test_there_are_some_of_each_kind() -> None:
    assert {load_release(STORED / name).kind for name in FOLDERS} == {"encoder", "segmenter"}


@pytest.mark.parametrize("name", FOLDERS)
def test_an_old_release_gives_what_it_gave(name: str) -> None:
    release = load_release(STORED / name)
    assert check_golden(release.path) <= 1e-5
    encoder = voxelith.load_encoder(release.path)
    assert encoder.report is not None and encoder.report.covered == 1.0
    facts = describe(release.path)
    assert facts["digest"] == release.digest and facts["licences"]
    if release.kind == "segmenter":
        assert check_golden_network(release.path) <= 1e-5
        assert load_network(release.path, device="cpu").channels == 1


@pytest.mark.parametrize("name", FOLDERS)
def test_other_features_under_right_sums_are_told(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What another version of a library would do: nothing is damaged, and the answer is another."""
    assert voxelith.main(["check", str(STORED / name)]) == 0
    copy = tmp_path / name
    shutil.copytree(STORED / name, copy)
    weights = load_file(copy / "model.safetensors")
    save_file({n: t * 1.001 for n, t in weights.items()}, copy / "model.safetensors")
    sums = [line.partition("  ")[2] for line in (copy / "SHA256SUMS").read_text().splitlines()]
    text = "".join(f"{file_digest(copy / file)}  {file}\n" for file in sums)
    (copy / "SHA256SUMS").write_text(text)
    assert voxelith.main(["check", str(copy)]) == 2
    assert "weights or preprocessing are not what was released" in capsys.readouterr().err
