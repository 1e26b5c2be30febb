"""The line on CT of two sources, and on heads: what comes out on other data than the hippocampi.

    python benchmarks/small_checks.py --data DIR --work DIR [--output docs/results]

`--data` has `totalsegmentator_examples/`, `totalsegmentator_ctfm/` and `derived_from_dicom/`;
`--work` may be that of benchmarks/pilot.py, whose network for IXI's heads is then reported too.

CT: a small encoder learns from seven unlabelled scans; both arms learn TotalSegmentator's 24
organs from one labelled scan (its example, 90 mm of an abdomen at 3 mm, 16 of them in it, some in a
corner), and are scored on the liver of another source (CHAOS, 2 mm, drawn by hand, axes left and
front to back reversed). One label, one test case, one seed: checks of the machinery, and no result
about pretraining. What is checked: organs of 1 ml and more are learnt by heart (Dice on the
training scan), the liver is found where another hospital has it, predictions have the grid of
their scan.
Writes small_checks.json and small_checks.md.
"""

from __future__ import annotations

import argparse
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch
from line import ROOT, prep, voxelith, write_list
from pilot import FEATURES, mean_dice

from data_prep.files import write_json, write_text
from finetune.rows import read_rows
from pretrain.bench import machine
from pretrain.run_folder import versions

TASK = "task=totalsegmentator_organs"
PRETRAIN_STEPS, STEPS = 200, 1200
ARMS = ("pretrained", "scratch")
LIVER = "task.regions=[{name: liver, values: [5], tolerance_mm: 5.0}]"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "results")
    chosen = parser.parse_args()
    work, began = chosen.work.resolve() / "checks", time.perf_counter()
    work.mkdir(parents=True, exist_ok=True)
    scans = make_corpora(chosen.data.resolve(), work)
    if not (work / "ct").exists():
        voxelith("pretrain", "experiment=cnn_mae_small", f"corpus={work / 'unlabelled'}", "run=ct",
                 f"runs={work / 'pretrained'}", FEATURES, f"steps={PRETRAIN_STEPS}",
                 f"warmup={PRETRAIN_STEPS // 10}", "augment=light")  # fmt: skip
        voxelith("export", str(work / "pretrained" / "ct"), str(work / "ct"))
    with ThreadPoolExecutor(2) as pool:
        found = dict(zip(ARMS, pool.map(lambda init: check(work, scans, init), ARMS), strict=True))
    heads = chosen.work.resolve() / "supervised" / "ixi" / "rows.csv"
    result = {
        "machine": machine(torch.device("cpu")),
        "versions": versions(),
        "seconds": round(time.perf_counter() - began),
        "steps": {"pretraining": PRETRAIN_STEPS, "finetuning": STEPS},
        "ct": found,
        "heads": regions(heads) if heads.is_file() else None,
    }
    chosen.output.mkdir(parents=True, exist_ok=True)
    write_json(chosen.output / "small_checks.json", result)
    text = markdown(result)
    write_text(chosen.output / "small_checks.md", text)
    print(text)


def check(work: Path, scans: dict[str, Path], init: str) -> dict[str, Any]:
    """One arm: trained, scored on both scans, its masks held against the scans' grids."""
    run, scored = work / "runs" / init, work / "by-heart" / init
    voxelith("finetune", TASK, LIVER, f"corpus={work / 'labelled'}", "split=fold-0",
             "part=validation", f"ckpt={work / 'ct'}", f"init={init}", "trainer=cpu",
             "trainer.threads=1", "batch_size=2", f"steps={STEPS}", "warmup=50", "lr=3e-3",
             "labels=all", f"runs={run.parent}", f"run={init}")  # fmt: skip
    voxelith("predict", f"ckpt={run}", f"input={work / 'scans'}", f"output={scored / 'masks'}",
             "resume=true")  # fmt: skip
    voxelith("evaluate", TASK, f"corpus={work / 'labelled'}", "split=fold-0", "part=train",
             f"predictions={scored / 'masks'}", f"output={scored}",
             f"keymap={work / 'labelled.private' / 'keymap.csv'}")  # fmt: skip
    return {
        "liver": liver(run / "rows.csv"),
        "by_heart": by_heart(scored / "rows.csv"),
        "grids": {name: same_grid(name, scan, scored / "masks") for name, scan in scans.items()},
    }


def make_corpora(data: Path, work: Path) -> dict[str, Path]:
    """Labelled scans of two sources under TotalSegmentator's numbers; unlabelled ones at 3 mm."""
    examples, derived = data / "totalsegmentator_examples", data / "derived_from_dicom"
    scans = {
        "totalsegmentator": examples / "example_ct_sm.nii.gz",
        "chaos": derived / "CHAOS_CT_image_2mm.nii.gz",
    }
    mask = nibabel.load(derived / "CHAOS_CT_liver_label_2mm.nii.gz")
    liver_mask = 5 * (np.asarray(mask.dataobj) > 0).astype(np.uint8)
    (work / "scans").mkdir(exist_ok=True)
    masks = {"totalsegmentator": examples / "example_seg.nii.gz", "chaos": work / "liver.nii.gz"}
    nibabel.save(nibabel.Nifti1Image(liver_mask, mask.affine, mask.header), masks["chaos"])
    rows = []
    for name, scan in scans.items():
        copy = work / "scans" / f"{name}.nii.gz"
        copy.write_bytes(scan.read_bytes())
        rows.append([copy, masks[name], name, "CT"])
    write_list(work / "labelled.csv", ["image", "label", "subject", "modality"], rows)
    others = [
        *sorted((data / "totalsegmentator_ctfm").glob("*.nii.gz")),
        *sorted(derived.glob("CRLM-CT-*.nii.gz")),
        derived / "FNNDSC_andrei_abdomen_3mm.nii.gz",
    ]
    write_list(
        work / "unlabelled.csv",
        ["image", "subject", "modality"],
        [[scan, scan.name.split(".")[0], "CT"] for scan in others],
    )
    if not (work / "labelled" / "corpus.json").exists():
        prep(work / "labelled", "classes=totalsegmentator")
        folds = [{"train": ["totalsegmentator"], "val": ["chaos"]}]
        write_json(work / "splits_final.json", folds)
        voxelith("split", f"corpus={work / 'labelled'}", f"read={work / 'splits_final.json'}")
    prep(work / "unlabelled", "labels=false", "spacing=[3,3,3]")
    return scans


def liver(rows: Path) -> dict[str, float]:
    """The scores of the one case."""
    [row] = read_rows(rows)
    return {"dice": 100 * row.dsc, "surface_dice": 100 * row.nsd, "hd95": row.hd95}


def by_heart(rows: Path) -> dict[str, Any]:
    """Dice on the scan that was learnt, of each organ that it has a millilitre of."""
    dice = {row.class_name: 100 * row.dsc for row in read_rows(rows) if row.volume_true_ml >= 1}
    return {"organs": dice, "mean": float(np.mean([*dice.values()]))}


def regions(rows: Path) -> dict[str, Any]:
    """Mean Dice of each region of the heads, and over all."""
    values: dict[str, list[float]] = {}
    for row in read_rows(rows):
        values.setdefault(row.class_name, []).append(100 * row.dsc)
    cases = len(next(iter(values.values())))
    return {"cases": cases, "mean": mean_dice(rows),
            "regions": {name: float(np.nanmean(v)) for name, v in values.items()}}  # fmt: skip


def same_grid(name: str, scan: Path, masks: Path) -> bool:
    """Whether the mask of a scan has its axes, shape and place, and whole numbers."""
    [path] = masks.rglob(f"{name}*.nii.gz")
    image, mask = nibabel.load(scan), nibabel.load(path)
    values = np.asarray(mask.dataobj)
    return bool(
        image.shape == mask.shape
        and np.allclose(image.affine, mask.affine, atol=1e-4)
        and np.issubdtype(values.dtype, np.integer)
    )


def markdown(result: dict[str, Any]) -> str:
    """What docs/results/small_checks.md shows."""
    ct, steps = result["ct"], result["steps"]
    organs = ct["scratch"]["by_heart"]["organs"]
    rows = [
        f"| {arm} | {one['by_heart']['mean']:.1f} | {min(one['by_heart']['organs'].values()):.1f} "
        f"| {one['liver']['dice']:.1f} | {one['liver']['surface_dice']:.1f} "
        f"| {one['liver']['hd95']:.1f} | {'yes' if all(one['grids'].values()) else 'NO'} |"
        for arm, one in ct.items()
    ]
    lines = [
        "# Small checks: CT of two sources, and heads",
        "",
        "Made by `python benchmarks/small_checks.py`; what it does stands at the head of that "
        "file, raw values in [small_checks.json](small_checks.json). One labelled scan, one test "
        "case, one seed: checks of the machinery, no result about pretraining.",
        "",
        "## CT: organs of one scan by heart, the liver of another hospital",
        "",
        f"{steps['pretraining']} steps of pretraining on seven scans, {steps['finetuning']} of "
        f"finetuning on one; its organs of 1 ml and more are {len(organs)} of 24. Dice and surface "
        "Dice (5 mm) in points, HD95 in mm, on each scan's own grid.",
        "",
        "| arm | training scan, mean | lowest | CHAOS liver | surface | HD95 "
        "| masks on their scans' grids |",
        "| --- | --: | --: | --: | --: | --: | --- |",
        *rows,
        "",
        "| organ of the training scan | " + " | ".join(ct) + " |",
        "| --- |" + " --: |" * len(ct),
        *[
            f"| {name} | "
            + " | ".join(f"{one['by_heart']['organs'][name]:.1f}" for one in ct.values())
            + " |"
            for name in organs
        ],
    ]
    if result["heads"] is not None:
        heads = result["heads"]
        lines += [
            "",
            "## Heads: eight regions of IXI",
            "",
            "The pilot's supervised control: scratch, all labels (machine-made by DLMUSE), "
            f"{heads['cases']} validation heads, mean Dice {heads['mean']:.1f}.",
            "",
            "| region | Dice |",
            "| --- | --: |",
            *[f"| {name} | {value:.1f} |" for name, value in heads["regions"].items()],
        ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
