"""What only a GPU can show; `make gpu` runs it where there is one."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from seeds import SEED
from tiny_pairs import build, kinds, one_each
from torch import Tensor

import voxelith
from pretrain.collectives import global_mean
from pretrain.estimate import bare_loop, raw_batch
from pretrain.loader import to_device
from pretrain.loop import compile_parts
from pretrain.objective import Batch, Objective
from pretrain.settings import PretrainSettings

ROOT = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


@pytest.fixture(autouse=True)
def exact() -> Iterator[None]:
    """Float32 without TF32, as the tolerance of 1e-4 is meant."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = True


def test_features_are_those_of_the_cpu() -> None:
    scan = ROOT / "samples" / "totalsegmentator" / "s0335.nii.gz"
    here, there = (
        voxelith.load_encoder("resenc-small-cnn-mae", device=device).features(scan)
        for device in ("cpu", "cuda")
    )
    assert there.map.shape == here.map.shape and there.spacing == here.spacing
    assert abs(there.map - here.map).max() <= 1e-3 * abs(here.map).max()


def on(device: str, objective: str, backbone: str) -> tuple[Objective, Batch]:
    chosen, built = build(objective, backbone)
    loop = bare_loop(chosen, built)
    torch.manual_seed(SEED)
    raw = raw_batch(chosen, 1, 4, built.crops)
    return built.to(device), loop.to_batch(to_device(raw, torch.device(device)))


def loss_and_gradient(objective: Objective, batch: Batch) -> tuple[float, Tensor]:
    loss = objective(batch, 0.5).loss
    loss.backward()
    rows = [p.grad.flatten().float().cpu() for p in objective.parameters() if p.grad is not None]
    return loss.item(), torch.cat(rows)


@pytest.mark.parametrize(("objective", "backbone"), one_each())
def test_float32_is_that_of_the_cpu(objective: str, backbone: str) -> None:
    loss, gradient = loss_and_gradient(*on("cpu", objective, backbone))
    found, other = loss_and_gradient(*on("cuda", objective, backbone))
    assert found == pytest.approx(loss, rel=1e-4)
    assert torch.nn.functional.cosine_similarity(gradient, other, dim=0) > 0.9999


@pytest.mark.parametrize(("objective", "backbone"), one_each())
def test_bf16_is_near_float32(objective: str, backbone: str) -> None:
    loss, gradient = loss_and_gradient(*on("cuda", objective, backbone))
    built, batch = on("cuda", objective, backbone)
    with torch.autocast("cuda", torch.bfloat16):
        low = built(batch, 0.5).loss
    assert low.dtype == torch.float32
    low.backward()
    assert low.item() == pytest.approx(loss, rel=3e-2)
    rows = [p.grad.flatten().float().cpu() for p in built.parameters() if p.grad is not None]
    # PCT-Net's instance norms over maps of a few cells divide by deviations that bf16 rounds.
    near = 0.9 if backbone == "pct_net" else 0.98
    assert torch.nn.functional.cosine_similarity(gradient, torch.cat(rows), dim=0) > near


@pytest.mark.parametrize(("objective", "backbone"), one_each())
def test_compiled_parts_compute_the_same(objective: str, backbone: str) -> None:
    loss, gradient = loss_and_gradient(*on("cuda", objective, backbone))
    built, batch = on("cuda", objective, backbone)
    torch.compiler.reset()
    compile_parts(built)
    found, other = loss_and_gradient(built, batch)
    assert found == pytest.approx(loss, rel=1e-4)
    assert torch.nn.functional.cosine_similarity(gradient, other, dim=0) > 0.9999


@pytest.mark.parametrize(("objective", "backbone"), one_each())
def test_a_step_never_waits(objective: str, backbone: str) -> None:
    built, batch = on("cuda", objective, backbone)
    optimizer = built.loop.make_optimizer(built)

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            losses = built(replace(batch, seeds=batch.seeds + 1), 0.5)
        built.loop.observe(losses)
        losses.loss.backward()
        built.loop.clip(built)
        optimizer.step()
        optimizer.zero_grad()

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_nccl_sums_counts(tmp_path: Path) -> None:
    dist.init_process_group("nccl", f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        total = torch.tensor(6.0, device="cuda", requires_grad=True)
        count = torch.tensor(4, device="cuda")
        dist.all_reduce(count)
        assert global_mean(total, count) == 1.5
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("devices", [1, 2])
def test_a_run_trains(pretrain_corpus: Path, tmp_path: Path, devices: int) -> None:
    """The whole loop: pinned memory, workers, bf16, compiled parts; two ranks over NCCL."""
    if torch.cuda.device_count() < devices:
        pytest.skip(f"needs {devices} devices")
    chosen, _ = build(*next(iter(kinds())))
    told = chosen.model_dump() | {
        "corpus": pretrain_corpus,
        "run": "gpu",
        "runs": tmp_path,
        "steps": 6,
        "save_every": 3,
        "log_every": 1,
        "preview_every": 3,
        "trainer": {"accelerator": "gpu", "devices": devices, "workers": 2, "compile": True},
    }
    # A process of its own, since Lightning starts the script again for each rank.
    (tmp_path / "settings.json").write_text(PretrainSettings.model_validate(told).model_dump_json())
    (tmp_path / "train.py").write_text(
        "import sys\nfrom pathlib import Path\n"
        "from pretrain.settings import PretrainSettings\nfrom pretrain.train import pretrain\n"
        "pretrain(PretrainSettings.model_validate_json(Path(sys.argv[1]).read_text()))\n"
    )
    subprocess.run(
        [sys.executable, tmp_path / "train.py", tmp_path / "settings.json"],
        check=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path[1:]])},
    )
    assert (tmp_path / "gpu" / "metrics.csv").read_text().count("\n") == 7
    assert list((tmp_path / "gpu" / "checkpoints").glob("step-00000006.pt"))
