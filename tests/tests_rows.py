"""Finished finetuning runs as far as tables read them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from finetune.rows import Row, write_rows

ROW = Row(
    dataset="hippocampus", split="official/test", split_hash="abc", case="c0", subject="s0",
    class_value=1, class_name="anterior", status="scored", outcome="scored", dsc=0.5, nsd=0.6,
    nsd_tolerance_mm=1.0, hd95=3.0, volume_pred_ml=1.0, volume_true_ml=1.1, arm="scratch",
    labels="4", n_labels=4, seed=0, label_seed=0, init_seed=0, pretrain_seed=-1, steps=10,
    checkpoint="", checkpoint_digest="", config_hash="recipe", assd=0.7, volume_error_ml=-0.1,
    volume_error_relative=-0.09,
)  # fmt: skip


def write_two_arms(folder: Path) -> None:
    """One run of each arm with one case."""
    for arm in ("pretrained", "scratch"):
        (folder / arm).mkdir()
        write_rows([dataclasses.replace(ROW, arm=arm)], folder / arm / "rows.csv")
