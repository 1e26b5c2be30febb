"""Rows of arms whose gain is known."""

from __future__ import annotations

import dataclasses

import numpy as np

from finetune.rows import Row

BASE = Row(
    dataset="hippocampus",
    split="official/test",
    split_hash="abc",
    case="c0",
    subject="s0",
    class_value=1,
    class_name="anterior",
    status="scored",
    outcome="scored",
    dsc=0.5,
    nsd=0.6,
    nsd_tolerance_mm=1.0,
    hd95=3.0,
    volume_pred_ml=1.0,
    volume_true_ml=1.1,
    arm="scratch",
    labels="4",
    n_labels=4,
    seed=0,
    label_seed=0,
    init_seed=0,
    pretrain_seed=-1,
    steps=100,
    checkpoint="",
    checkpoint_digest="",
    config_hash="recipe",
    assd=0.7,
    volume_error_ml=-0.1,
    volume_error_relative=-0.09,
)


def make_rows(
    arm: str, gain: float = 0.0, seeds: int = 3, cases: int = 12, noise: float = 0.01
) -> list[Row]:
    rng = np.random.default_rng(0 if arm == "scratch" else 1)
    given = {"checkpoint": "mae", "checkpoint_digest": "d1", "pretrain_seed": 5}
    out = []
    for seed in range(seeds):
        for case in range(cases):
            for value, name in ((1, "anterior"), (2, "posterior")):
                dsc = 0.6 + 0.01 * case + gain + noise * rng.normal()
                row = dataclasses.replace(
                    BASE,
                    arm=arm,
                    case=f"c{case}",
                    subject=f"s{case // 2}",
                    seed=seed,
                    label_seed=seed,
                    init_seed=seed,
                    class_value=value,
                    class_name=name,
                    dsc=dsc,
                )
                out.append(row if arm == "scratch" else dataclasses.replace(row, **given))
    return out


def scratch_own(gain: float, seeds: int = 3) -> list[Row]:
    rows = [dataclasses.replace(r, arm="scratch-own") for r in make_rows("scratch", gain, seeds)]
    return [dataclasses.replace(r, recipe_hash="own") for r in rows]
