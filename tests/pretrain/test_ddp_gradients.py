"""Two ranks train as one process with the joint batch would: loss and every gradient.

Ranks get very different amounts of padding, so that a mean of their means would not do. One spawn
of two processes serves all objectives.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tiny_pairs import build, names, refused
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pretrain.collectives import global_mean, world_size
from pretrain.estimate import bare_loop, raw_batch
from pretrain.objective import Batch, Objective

WORLD = 2


class Loss(nn.Module):
    """What DDP wraps: its forward gives the loss alone."""

    def __init__(self, objective: Objective) -> None:
        super().__init__()
        self.objective = objective

    def forward(self, batch: Batch) -> Tensor:
        return self.objective(batch, 0.5).loss


def prepared(objective: str, backbone: str) -> tuple[Objective, Batch]:
    """In float64, so that rounding hides nothing; rank 0's samples are padding but for a plane."""
    torch.manual_seed(0)
    chosen, built = build(objective, backbone)
    crops = built.crops
    torch.manual_seed(1)
    batch = bare_loop(chosen, built).to_batch(raw_batch(chosen, 1, 4 * crops))
    for sample in range(0, 4, WORLD):
        batch.valid[sample * crops : (sample + 1) * crops, :, 1:] = False
    built.double()
    for module in built.modules():
        if any(True for _ in module.parameters(recurse=False)):
            module.register_forward_pre_hook(widened)
    return built, replace(batch, image=batch.image.double())


def widened(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Objectives compute targets in float32; what reaches weights in float64 must be that too."""
    return tuple(a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)


def part(batch: Batch, rank: int, crops: int) -> Batch:
    """The samples of one rank: ranks stride through the batch, as the schedule does."""
    keep = torch.cat(
        [torch.arange(i * crops, (i + 1) * crops) for i in range(rank, 4, WORLD)],
    )
    found = {name: value[keep] for name, value in vars(batch).items() if isinstance(value, Tensor)}
    return replace(batch, keys=[batch.keys[i] for i in keep], **found)


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


def worker(rank: int, folder: str, cases: list[tuple[str, str]]) -> None:
    torch.set_num_threads(1)
    built = [prepared(*case) for case in cases]  # before there are ranks, as in training
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=WORLD)
    found: dict[str, Any] = {}
    for (name, _), (objective, batch) in zip(cases, built, strict=True):
        parallel = DistributedDataParallel(Loss(objective))
        loss = parallel(part(batch, rank, objective.crops))
        loss.backward()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        found[name] = (mean / WORLD, gradients(objective))
    if rank == 0:
        torch.save(found, f"{folder}/found.pt")
    dist.destroy_process_group()


def cases_without_batch_norm() -> list[tuple[str, str]]:
    """Batch norm (PCT-Net's, as published) takes each rank's own statistics, by design."""
    found = []
    for objective in names("objective"):
        for backbone in names("backbone"):
            if refused(objective, backbone):
                continue
            modules = build(objective, backbone)[1].modules()
            if not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in modules):
                found.append((objective, backbone))
                break
    assert len(found) == len(names("objective"))
    return found


def test_two_ranks_have_the_gradient_of_the_joint_batch(tmp_path: Path) -> None:
    cases = cases_without_batch_norm()
    mp.spawn(worker, (str(tmp_path), cases), nprocs=WORLD)
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    for name, backbone in cases:
        objective, batch = prepared(name, backbone)
        loss = objective(batch, 0.5).loss
        loss.backward()
        mean, parallel = found[name]
        assert mean.item() == pytest.approx(loss.item(), rel=1e-5), name
        joint = gradients(objective)
        assert joint.keys() == parallel.keys()
        largest = max(g.abs().max().item() for g in joint.values())
        for parameter, expected in joint.items():
            # What is zero but for rounding (a bias before a norm) is compared with the largest.
            scale = max(expected.abs().max().item(), 1e-6 * largest)
            error = (parallel[parameter] - expected).abs().max().item() / scale
            assert error < 1e-5, f"{name}: {parameter} differs by {error:.1e}"


def test_one_process_has_the_plain_mean() -> None:
    total = torch.tensor(6.0, requires_grad=True)
    mean = global_mean(total, torch.tensor(4))
    mean.backward()
    assert world_size() == 1
    assert mean == 1.5 and total.grad == 0.25
    assert global_mean(torch.tensor(0.0), torch.tensor(0)) == 0


def test_a_mean_compiles_without_a_break() -> None:
    traced = torch.compile(global_mean, backend="eager", fullgraph=True)
    assert traced(torch.tensor(6.0), torch.tensor(4)) == 1.5
