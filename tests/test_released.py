"""Encoders that come with the package: whole, small, free to give on, and what they know."""

from __future__ import annotations

import csv
import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import voxelith
from data_prep.corpus import Corpus
from data_prep.errors import CorruptionError
from finetune.evaluate import comparable
from pretrain import registry
from pretrain.registry import OURS, RELEASES, Known
from pretrain.release import check_golden, load_release

SAMPLES = RELEASES.parent
LIMIT = 12 * 2**20
FREE = {"CC BY-SA 4.0", "CC BY-SA 3.0", "CC BY 4.0", "CC BY 3.0", "CC BY", "CC0", "PDDL",
        "Apache-2.0", "BSD-3-Clause", "MIT"}  # fmt: skip
"""Licences of data that CC BY-SA 4.0 can hold; none is GPL, non-commercial or unknown."""

LAST_TESTED = "6926bae66ed2"
"""Where the protocol's order of subjects, by hash, leaves the part that it tests on."""

ours = pytest.mark.parametrize("one", OURS, ids=[one.name for one in OURS])


def test_there_is_one() -> None:
    assert OURS


@ours
def test_its_golden_output_holds_and_its_bytes_are_those_that_are_known(one: Known) -> None:
    folder = RELEASES / one.name
    release = load_release(folder)
    assert (release.name, release.digest) == (one.name, one.sha256)
    assert check_golden(folder) < 1e-4
    assert sum(file.stat().st_size for file in folder.iterdir()) <= LIMIT


@ours
def test_its_data_lets_it_be_given_on(one: Known) -> None:
    data = load_release(RELEASES / one.name).config["data"]
    assert set(data["licence"]) <= FREE
    assert "unknown" not in data["source"]
    assert one.licence == "CC BY-SA 4.0"


@ours
def test_three_lines_say_nothing_that_was_not_asked(one: Known) -> None:
    """Not what libraries think of one another, in a process that ignores no warning."""
    code = f"import voxelith\nvoxelith.load_encoder({one.name!r})"
    done = subprocess.run(
        [sys.executable, "-W", "default::FutureWarning", "-c", code],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stderr == done.stdout == ""


@ours
def test_it_goes_by_its_name(
    one: Known, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From any folder, without a network and with nothing in the cache."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VOXELITH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert voxelith.main(["fetch", one.name]) == 0
    assert f"release, was here, sha256 {one.sha256}" in capsys.readouterr().out
    assert voxelith.main(["fetch", "--list"]) == 0
    assert f"  {one.name} " in (told := capsys.readouterr().out) and "comes with voxelith" in told
    features = voxelith.load_encoder(one.name).features(
        SAMPLES / "hippocampus" / "images" / "hippocampus_019.nii.gz"
    )
    assert np.isfinite(features.map).all() and features.map.std() > 0
    assert voxelith.main(["export", one.name, "for_nnunet", "form=nnssl"]) == 0
    assert (tmp_path / "for_nnunet" / "checkpoint_final.pth").is_file()
    assert voxelith.main(["export", one.name, "other", "form=torch", "name=other"]) == 2
    assert "(name for runs too)" in capsys.readouterr().err


@ours
def test_another_release_under_its_name_is_refused(
    one: Known, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole by its own sums, but not what the code knows."""
    other = shutil.copytree(RELEASES / one.name, tmp_path / one.name)
    (other / "README.md").write_text("Another card.\n")
    rest = [line for line in (other / "SHA256SUMS").read_text().splitlines()
            if not line.endswith("README.md")]  # fmt: skip
    card = hashlib.sha256((other / "README.md").read_bytes()).hexdigest()
    (other / "SHA256SUMS").write_text("\n".join([*rest, f"{card}  README.md"]) + "\n")
    voxelith.load_encoder(other)
    monkeypatch.setattr(registry, "RELEASES", tmp_path)
    with pytest.raises(CorruptionError, match=f"{one.name}: .* is known"):
        voxelith.load_encoder(one.name)


@ours
def test_it_has_seen_no_subject_that_the_protocol_tests_on(one: Known, tmp_path: Path) -> None:
    """By the gate that finetuning has; it does know the sample scans that were pretrained on."""
    assert voxelith.main([
        "prep", f"input={SAMPLES / 'hippocampus.csv'}", f"output={tmp_path / 'corpus'}",
        "classes=hippocampus", "keys=names",
    ]) == 0  # fmt: skip
    corpus = Corpus.open(tmp_path / "corpus")
    stored = json.loads((RELEASES / one.name / "fingerprints.json").read_text())["values"]
    seen = comparable(stored)
    assert seen is not None
    prints = corpus.scan_prints()
    parts: dict[str, set[bool]] = {"test": set(), "pool": set()}
    with (SAMPLES / "hippocampus.csv").open(newline="") as stream:
        for row in csv.DictReader(stream):
            key = Path(row["image"]).name.removesuffix(".nii.gz")
            name = f"hippocampus s{row['subject'].removeprefix('h')}"
            tested = hashlib.sha256(name.encode()).hexdigest()[:12] <= LAST_TESTED
            parts["test" if tested else "pool"].add(seen.has(prints[key]))
    assert parts == {"test": {False}, "pool": {True}}
