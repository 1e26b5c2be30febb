"""What a finetuning cost: counted by hand, from a log with a gap in time, in a real run."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import torch
from small_runs import TASK, backbone
from torch.utils.flop_counter import FlopCounterMode

from finetune.costs import Cost, cost_note
from finetune.meter import priced, training_flops
from finetune.segmentation import Segmentation
from finetune.settings import FinetuneSettings
from pretrain.costs import peak_mib, trained_seconds
from pretrain.run_folder import RunFolder


def settings(**changes: Any) -> FinetuneSettings:
    known = {
        "task": TASK,
        "corpus": "c",
        "ckpt": "r",
        "crop_size": [16, 16, 32],
        "steps": 10,
        "batch_size": 3,
        "lr": 1e-3,
    }
    return FinetuneSettings.model_validate({**known, **changes})


def flops(**changes: Any) -> int:
    chosen = settings(**changes)
    with torch.device("meta"):
        model = Segmentation(encoder=backbone("resenc"), task=chosen.task, decoder="linear")
    return training_flops(model, chosen, 1)


def test_a_frozen_encoder_costs_its_forward_pass_alone() -> None:
    """With a linear head: 2 operations a weight and cell, forward and for the weights' gradient."""
    held = Segmentation(encoder=backbone("resenc"), task=settings().task, decoder="linear")
    crops = torch.zeros(1, 1, 16, 16, 32)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        features = held.encoder(crops)
    heads = [m for m in held.decoder.modules() if isinstance(m, torch.nn.Conv3d)]
    products = sum(
        2 * head.weight.numel() * math.prod(read.shape[2:])
        for head, read in zip(heads, features, strict=True)
    )
    samples = 10 * 3
    assert flops(freeze="encoder") == samples * (counter.get_total_flops() + 2 * products)
    assert flops() > 2 * flops(freeze="encoder")


def test_phases_cost_what_they_train() -> None:
    phases = [{"steps": 4, "freeze": "encoder"}]
    whole, frozen = flops(), flops(freeze="encoder")
    assert flops(phases=phases) == (4 * frozen + 6 * whole) // 10


def test_seconds_are_those_of_the_steps(tmp_path: Path) -> None:
    log = tmp_path / "metrics.csv"
    assert math.isnan(trained_seconds(log))
    log.write_text("step,samples,seconds_per_step\n1,2,3.0\n10,20,0.5\n12,24,1.0\n")
    assert trained_seconds(log) == 3.0 + 9 * 0.5 + 2 * 1.0
    log.write_text("step,seconds_per_step,start\n1,3.0,1\n10,0.5,1\n12,1.0,2\n")
    assert trained_seconds(log, {1: 8, 2: 1}) == 8 * (3.0 + 9 * 0.5) + 2 * 1.0


def test_memory_is_that_of_the_process() -> None:
    held = torch.ones(64, 2**20)  # 256 MiB that are touched
    found = peak_mib(torch.device("cpu"))
    said = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert said is not None
    known = int(said[1]) / 1024
    assert held.nbytes / 2**20 < known <= found * 1.05 and found < 4 * known


def test_a_note_says_what_is_known() -> None:
    plain = Cost(2_000_000, 2_000_000, 5 * 10**12, 600.0, 30.0, 2048.0, "CPU")
    other = plain._replace(train_seconds=1200.0, pretrain_seconds=3 * 86400.0)
    assert cost_note([plain, other]) == (
        "a run: 2 M parameters, 5 TFLOP, 15 min of training, 30 s of prediction, 2 GiB at its "
        "peak (CPU); the pretraining before it: 3 days"
    )
    assert "110 s of training" in cost_note([plain._replace(train_seconds=109.0)])
    little = Cost(10, 4, None, None, None, None, "H200")
    assert cost_note([little]) == "a run: 1e-05 M parameters (4e-06 M trained) (H200)"
    assert Cost.of({}) is None
    assert Cost.of({"cost": json.loads(json.dumps(plain._asdict()))}) == plain


def test_what_an_earlier_start_has_predicted_is_not_timed_by_this_one(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)

    def costs() -> dict[str, Any]:
        (tmp_path / "run.json").write_text('{"cost": {}}')
        with priced(run, torch.device("cpu"), 1):
            (tmp_path / "predictions").mkdir(exist_ok=True)
            (tmp_path / "predictions" / "a.nii.gz").touch()
        found: dict[str, Any] = json.loads((tmp_path / "run.json").read_text())["cost"]
        return found

    assert costs()["predict_seconds"] >= 0 and costs()["predict_seconds"] is None
    assert costs()["peak_mib"] is None
