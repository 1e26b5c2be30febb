"""What ranks say to each other in a step, counted beneath all Python."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from rank_runs import ROOT, environment

from conf.compose import settings_for
from pretrain.train import build_objective


def test_gradients_go_round_once_a_step_and_nothing_is_asked_beside(
    pretrain_corpus: Path, tmp_path: Path
) -> None:
    """With two micro-batches a step: 4 bytes a trained parameter, no broadcast, small sums."""
    name = "mae_small"
    program = ROOT / "benchmarks" / "collectives.py"
    command = [sys.executable, program, name, "--rank", pretrain_corpus, tmp_path]
    subprocess.run(
        list(map(str, command)), env=environment(), check=True, timeout=300, cwd=ROOT,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    found = json.loads((tmp_path / f"{name}.json").read_text())["plain"]
    settings = settings_for("pretrain", ["corpus=c", "run=r", f"experiment={name}"])
    objective = build_objective(settings, 1)
    trained = sum(p.numel() for p in objective.parameters() if p.requires_grad)
    steps, micro_batches = 3, 2
    assert found["bytes"]["gradients"] == 4 * trained * steps
    assert "broadcast" not in found["calls"] and "all_gather" not in found["calls"]
    rest = found["calls"]["all_reduce"] - found["calls"]["gradients"]
    assert 0 < rest <= steps * (micro_batches + 1)  # the loss's count, the agreement
