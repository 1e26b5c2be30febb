"""The walk: raw scans to a Dice table, through the command line, on tiny real inputs."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from voxelith import main

CNN = ["backbone=resenc_small", "objective=cnn_mae", "objective.block=8"]
FUSION = ["backbone=resenc_small", "objective=volume_fusion"]
VIT = ["backbone=vit_ti", "backbone.embed_dim=24", "backbone.depth=4", "objective=mae"]


def run(*words: str | Path) -> None:
    assert main([str(word) for word in words]) == 0


def tiny(samples: Path, name: str, counts: dict[str, int], folder: Path) -> Path:
    """A list of the first few scans of each part or source of a sample list."""
    with (samples / f"{name}.csv").open() as file:
        rows = list(csv.DictReader(file))
    column = "split" if rows[0].get("split") else "source"
    kept: list[dict[str, str]] = []
    for value, count in counts.items():
        kept += [row for row in rows if row[column] == value][:count]
    for row in kept:
        for key in ("image", "label"):
            if row.get(key):
                row[key] = str(samples / row[key])
    path = folder / f"{name}.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(kept[0]))
        writer.writeheader()
        writer.writerows(kept)
    return path


@pytest.mark.parametrize(
    "network",
    [
        pytest.param(CNN, id="cnn_mae"),
        pytest.param(VIT, id="mae", marks=pytest.mark.slow),
        pytest.param(FUSION, id="volume_fusion", marks=pytest.mark.slow),
    ],
)
def test_from_scan_to_dice_table(network: list[str], samples: Path, tmp_path: Path) -> None:
    corpora, runs, release = tmp_path / "corpora", tmp_path / "runs", tmp_path / "release"
    few = {
        "pretrain": {"totalsegmentator": 1, "ixi-t1-2mm": 1, "msd-task04-hippocampus": 4},
        "hippocampus": {"train": 6, "test": 4},
    }
    for name, counts in few.items():
        run(
            "prep", f"input={tiny(samples, name, counts, tmp_path)}",
            f"output={corpora / name}", "keys=names", "shard_mib=1", "processes=1",
        )  # fmt: skip
    run(
        "pretrain", f"corpus={corpora / 'pretrain'}", "run=walk", f"runs={runs}", *network,
        "trainer=cpu", "crop_size=[32,48,32]", "batch_size=2", "steps=6", "warmup=2", "lr=1e-3",
        "preview_every=6", f"health.probe={corpora / 'hippocampus'}",
    )  # fmt: skip
    run("export", runs / "walk", release)
    finetuned = []
    for init in ("pretrained", "scratch"):
        for seed in (0, 1):
            name = f"{init}-{seed}"
            run(
                "finetune", "task=hippocampus", f"corpus={corpora / 'hippocampus'}",
                f"ckpt={release}", f"init={init}", "labels=4", f"seed={seed}", f"runs={runs}",
                f"run={name}", "trainer=cpu", "steps=4", "warmup=1", "batch_size=2",
            )  # fmt: skip
            finetuned.append(runs / name)
    run("table", *finetuned, f"output={tmp_path / 'table'}")
    run("report", runs, f"pretrain={runs / 'walk'}", f"output={tmp_path / 'report.html'}")
    page = (tmp_path / "report.html").read_text()
    assert "http://" not in page and "https://" not in page and len(page) < 10_000_000
    assert "What became of its features" in page and "Features of fixed slices" in page

    with (runs / "pretrained-0" / "rows.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4 * 2  # test cases x classes
    assert {row["status"] for row in rows} <= {"scored", "missed"}
    table = json.loads((tmp_path / "table" / "table.json").read_text())
    text = json.dumps(table)
    assert "hippocampus" in text and "scratch" in text

    # Predictions lie on the grid of the scan that the user has.
    key = rows[0]["case"]
    found = nib.load(runs / "pretrained-0" / "predictions" / f"{key}.nii.gz")
    scan = nib.load(next((samples / "hippocampus" / "images").glob(f"{key}*")))
    assert found.shape == scan.shape
    np.testing.assert_allclose(found.affine, scan.affine, atol=1e-5)

    # Arms are twins: same head and order, another start of what was pretrained.
    facts = [json.loads((run / "run.json").read_text()) for run in finetuned]
    assert len({fact["identity"]["config_hash"] for fact in facts}) == 1
    assert facts[0]["label_keys"] == facts[2]["label_keys"]
    assert facts[0]["label_keys"] != facts[1]["label_keys"]
    report = json.loads((runs / "pretrained-0" / "load_report.json").read_text())
    assert report["covered"] == 1.0 and report["copied"]
    assert report["transfer"] == ("network" if network is FUSION else "encoder")
    decoder = [name for name in report["copied"] if name.startswith("decoder.")]
    assert bool(decoder) == (network is FUSION)
    assert all(name.startswith("decoder.") for name in [*report["new"], *report["skipped"]])

    # The finetuned run segments a folder of scans.
    inputs, outputs = tmp_path / "Scan (1)", tmp_path / "dcm_PE=AP_3"
    inputs.mkdir()
    nib.save(scan, inputs / "mine.nii.gz")
    run("predict", f"ckpt={runs / 'pretrained-0'}", f"input={inputs}", f"output={outputs}")
    assert nib.load(outputs / "mine.nii.gz").shape == scan.shape
