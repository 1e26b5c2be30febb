"""nnU-Net v2 on the cases of the proof, for a given time on one thread: is our scratch a straw man?

    python benchmarks/nnunet_gate.py --work DIR --seconds N [--network same]

nnU-Net of PyPI (`nnunetv2`) must be installed. `--work` is the folder of benchmarks/proof.py. Its
trainer, augmentation, optimiser, planner and predictor do their work as they come; three things
are ours: training stops after N seconds (the rate falls to zero by the clock, not by epochs),
validation within training is left out, and the parts are those of the corpus. `--network same`
puts the proof's network, crop and batch into the plans (residual, 16 to 128 channels, 32x48x32,
2), as its own planner, which thinks of a GPU of 8 GB, gives few steps to a CPU.

Its predictions of the validation cases are scored by `voxelith evaluate`; prints the mean Dice and
keeps what came out as docs/results/proof/nnunet-NETWORK-N.json.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from line import ROOT, voxelith
from pilot import mean_dice

from data_prep.files import write_json
from finetune.rows import read_rows
from pretrain.bench import machine
from pretrain.run_folder import versions

NAME, NUMBER = "Dataset004_Hippocampus", 4
STAGES = 4
PROOF = ROOT / "docs" / "results" / "proof"
SAME: dict[str, Any] = {
    "network_class_name": "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet",
    "arch_kwargs": {
        "n_stages": STAGES,
        "features_per_stage": [16, 32, 64, 128],
        "conv_op": "torch.nn.modules.conv.Conv3d",
        "kernel_sizes": [[3, 3, 3]] * STAGES,
        "strides": [[1, 1, 1]] + [[2, 2, 2]] * (STAGES - 1),
        "n_blocks_per_stage": [1, 2, 2, 2],
        "n_conv_per_stage_decoder": [1] * (STAGES - 1),
        "conv_bias": True,
        "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
        "norm_op_kwargs": {"eps": 1e-05, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    },
    "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--network", choices=("own", "same"), default="own")
    chosen = parser.parse_args()
    work = chosen.work.resolve()
    output = work / f"nnunet-{chosen.network}-{chosen.seconds:.0f}"
    folders = {name: work / "nnunet" / name for name in ("raw", "preprocessed", "results")}
    for name, folder in folders.items():
        folder.mkdir(parents=True, exist_ok=True)
        os.environ[f"nnUNet_{name}"] = str(folder)
    # Its planner takes the number for torch's threads, its trainer 0 for "in this process".
    os.environ |= {"nnUNet_n_proc_DA": "1", "nnUNet_def_n_proc": "1", "nnUNet_compile": "f"}
    with (work / "hippocampus.csv").open(newline="") as stream:
        rows = [row for row in csv.DictReader(stream) if row["split"] != "test"]
    prepare(folders["raw"] / NAME, folders["preprocessed"] / NAME, rows)
    os.environ |= {"nnUNet_n_proc_DA": "0"}
    steps, seconds, folder = train(chosen.seconds, chosen.network)
    voxelith("evaluate", f"predictions={folder / 'validation'}", "task=hippocampus",
             f"corpus={work / 'hippocampus'}", "split=official", "part=validation",
             f"output={output}")  # fmt: skip
    scores = read_rows(output / "rows.csv")
    result = {
        "network": chosen.network,
        "dice": mean_dice(output / "rows.csv"),
        "steps": steps,
        "train_seconds": seconds,
        "nnunetv2": version("nnunetv2"),
        "cases": {f"{row.case} {row.class_name}": round(row.dsc, 5) for row in scores},
        "plans": json.loads((folder.parent / "plans.json").read_text())["configurations"][
            "3d_fullres"
        ],
        "machine": machine(torch.device("cpu")),
        "versions": versions(),
    }
    write_json(PROOF / f"{output.name}.json", result)
    print(f"{chosen.network}: {result['dice']:.2f} Dice, {steps} steps, {seconds:.0f} s")


def prepare(raw: Path, preprocessed: Path, rows: list[dict[str, str]]) -> None:
    """Both parts as nnU-Net's raw data set, planned and preprocessed by it, with our split."""
    if (preprocessed / "splits_final.json").exists():
        return
    from nnunetv2.experiment_planning.plan_and_preprocess_api import (
        extract_fingerprints,
        plan_experiments,
        preprocess,
    )

    for folder in ("imagesTr", "labelsTr"):
        (raw / folder).mkdir(parents=True, exist_ok=True)
    for row in rows:
        key = Path(row["image"]).name.removesuffix(".nii.gz")
        shutil.copy(row["image"], raw / "imagesTr" / f"{key}_0000.nii.gz")
        shutil.copy(row["label"], raw / "labelsTr" / f"{key}.nii.gz")
    write_json(
        raw / "dataset.json",
        {
            "channel_names": {"0": "MRI"},
            "labels": {"background": 0, "anterior": 1, "posterior": 2},
            "numTraining": len(rows),
            "file_ending": ".nii.gz",
        },
    )
    extract_fingerprints([NUMBER], num_processes=1, check_dataset_integrity=True)
    plan_experiments([NUMBER])
    preprocess([NUMBER], configurations=("3d_fullres",), num_processes=(1,))
    parts: dict[str, list[str]] = {"train": [], "val": []}
    for row in rows:
        part = "val" if row["split"] == "validation" else "train"
        parts[part].append(Path(row["image"]).name.removesuffix(".nii.gz"))
    write_json(preprocessed / "splits_final.json", [parts])


def train(budget: float, network: str) -> tuple[int, float, Path]:
    """Trains by the clock and segments the validation cases; returns steps, seconds and folder."""
    from nnunetv2.paths import nnUNet_preprocessed
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    torch.set_num_threads(1)
    torch.manual_seed(0)
    home = Path(str(nnUNet_preprocessed)) / NAME
    plans = json.loads((home / "nnUNetPlans.json").read_text()) | {"continue_training": False}
    plans["plans_name"] = f"{network}{budget:.0f}"
    if network == "same":
        plans["configurations"]["3d_fullres"] |= {
            "patch_size": [32, 48, 32],
            "batch_size": 2,
            "architecture": SAME,
        }
    data_set = json.loads((home / "dataset.json").read_text())
    trainer = nnUNetTrainer(plans, "3d_fullres", 0, data_set, torch.device("cpu"))
    trainer.on_train_start()
    trainer.network.train()
    steps, began = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - began) < budget:
        trainer.lr_scheduler.step(trainer.num_epochs * elapsed / budget)
        trainer.train_step(next(trainer.dataloader_train))
        steps += 1
        if steps % 50 == 0:
            print(f"{steps} steps, {elapsed:.0f} of {budget:.0f} s", flush=True)
    seconds = time.perf_counter() - began
    trainer.perform_actual_validation()
    return steps, seconds, Path(trainer.output_folder)


if __name__ == "__main__":
    main()
