"""Two ranks train as one process with the joint batch would: loss and every gradient.

Ranks get very different amounts of padding, so that a mean of their means would not do. Batch norm
is the exception, and what holds with it is stated here too. One spawn of two processes serves all.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from seeds import SEED
from tiny_pairs import fitting, names, refused
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from data_prep.errors import InputError
from pretrain.collectives import global_mean, world_size
from pretrain.estimate import bare_loop, raw_batch
from pretrain.losses import cross_entropy, dice_loss
from pretrain.objective import Batch, Objective
from pretrain.objectives.dino import DINO
from pretrain.regularisers import koleo
from pretrain.train import build_objective

WORLD = 2
SAMPLES = 4


class Case(NamedTuple):
    """An objective's preset on a backbone's, with Dice of each sample or over the batch.

    What is each rank's own by its definition is left out, unless it is asked for.
    """

    objective: str
    backbone: str
    batch_dice: bool = False
    per_rank: bool = False
    crop: tuple[int, int, int] | None = None


class Loss(nn.Module):
    """What DDP wraps: its forward gives the loss alone."""

    def __init__(self, objective: Objective) -> None:
        super().__init__()
        self.objective = objective

    def forward(self, batch: Batch) -> Tensor:
        return self.objective(batch, 0.5).loss


class Voxelwise(nn.Module):
    """A loss of a linear map of each voxel, in float64 throughout."""

    def __init__(self, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(SEED)
        self.logits = nn.Conv3d(2, 4, 1).double()
        self.loss = loss

    def forward(self, image: Tensor, target: Tensor) -> Tensor:
        return self.loss(self.logits(image), target)


VOXELWISE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "dice": dice_loss,
    "dice with background": functools.partial(dice_loss, background=True),
    "dice of each sample": functools.partial(dice_loss, over_batch=False),
    "cross-entropy": cross_entropy,
}


def voxels() -> tuple[Tensor, Tensor]:
    """Rank 0's samples count in one plane, classes 0 and 1; rank 1's whole, 0 and 2; none has 3."""
    random = torch.Generator().manual_seed(SEED + 2)
    image = torch.randn(SAMPLES, 2, 2, 3, 4, generator=random, dtype=torch.float64)
    target = torch.randint(0, 2, (SAMPLES, 2, 3, 4), generator=random)
    target[1::WORLD] *= 2
    target[0::WORLD, 1:] = -1
    return image, target


def prepared(case: Case, *, padded: bool = True) -> tuple[Objective, Batch]:
    """In float64, so that rounding hides nothing; rank 0's samples are padding but for a plane."""
    torch.manual_seed(SEED)
    chosen = fitting(case.objective, case.backbone)
    assert not isinstance(chosen, InputError)
    if case.crop is not None:
        chosen = chosen.model_copy(update={"crop_size": case.crop})
    changed = chosen.objective | ({"batch_dice": True} if case.batch_dice else {})
    if not case.per_rank:
        changed |= {name: 0.0 for name in PER_RANK if name in changed}
    chosen = chosen.model_copy(update={"objective": changed})
    built = build_objective(chosen, 1)
    torch.manual_seed(SEED + 1)
    batch = bare_loop(chosen, built).to_batch(raw_batch(chosen, 1, SAMPLES, built.crops))
    groups = [batch, *batch.others.values()]
    if padded:
        for group in groups:
            by_sample = group.valid.unflatten(0, (SAMPLES, -1))
            by_sample[::WORLD, :, :, 1:] = False
    built.double()
    for module in built.modules():
        if any(True for _ in module.parameters(recurse=False)):
            module.register_forward_pre_hook(widened)
    for group in groups:
        group.image = group.image.double()
    return built, batch


def widened(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Objectives compute targets in float32; what reaches weights in float64 must be that too."""
    return tuple(a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)


def part(batch: Batch, rank: int) -> Batch:
    """The samples of one rank: ranks stride through the batch, as the schedule does."""
    return batch.of(range(rank, SAMPLES, WORLD), SAMPLES)


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


def statistics(module: nn.Module) -> dict[str, Tensor]:
    """Running means and variances, and how many batches they have seen."""
    return {n: b.clone() for n, b in module.named_buffers()}


def worker(rank: int, folder: str, cases: dict[str, Case], normed: Case) -> None:
    torch.set_num_threads(1)
    built = {name: prepared(case) for name, case in cases.items()}  # before there are ranks
    exception, whole = prepared(normed, padded=False)
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=WORLD)
    found: dict[str, Any] = {}
    for name, (objective, batch) in built.items():
        parallel = DistributedDataParallel(Loss(objective))
        loss = parallel(part(batch, rank))
        loss.backward()
        found[name] = (loss.detach(), gradients(objective))
    for name, formula in VOXELWISE.items():
        mapped = Voxelwise(formula)
        parallel = DistributedDataParallel(mapped)
        loss = parallel(*(t[rank::WORLD] for t in voxels()))
        loss.backward()
        found[name] = (loss.detach(), gradients(mapped))
    parallel = DistributedDataParallel(Loss(exception))
    steps = []
    for _ in range(2):
        exception.zero_grad()
        parallel(part(whole, rank)).backward()
        steps.append((gradients(exception), statistics(exception)))
    found["batch norm"] = steps
    torch.save(found, f"{folder}/rank-{rank}.pt")
    dist.destroy_process_group()


def has_batch_norm(case: Case) -> bool:
    chosen = fitting(case.objective, case.backbone)
    assert not isinstance(chosen, InputError)
    modules = build_objective(chosen, 1).modules()
    return any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in modules)


PER_RANK = ("koleo_weight",)
KOLEO = Case("dino", "dino_ti", per_rank=True)
OVER_BATCH = {f"{name}, Dice over the batch": name for name in ("volume_fusion", "volume_fusion_b")}
JOINT = [*names("objective"), *OVER_BATCH]
NORMED = Case("volume_fusion", "pct_net_small", crop=(16, 16, 32))


@functools.cache
def joint_case(name: str) -> Case:
    """The objective with the first backbone that fits it and has no batch norm."""
    objective = OVER_BATCH.get(name, name)
    for backbone in names("backbone"):
        case = Case(objective, backbone, batch_dice=name in OVER_BATCH)
        if not refused(objective, backbone) and not has_batch_norm(case):
            return case
    raise AssertionError(f"{objective} has no backbone without batch norm")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two ranks found."""
    folder = tmp_path_factory.mktemp("ranks")
    cases = {name: joint_case(name) for name in JOINT} | {"dino with KoLeo": KOLEO}
    mp.spawn(worker, (str(folder), cases, NORMED), nprocs=WORLD)
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=True) for rank in range(WORLD)]


def differences(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """The largest error of each tensor, as a share of its largest value."""
    assert found.keys() == expected.keys()
    largest = max(g.abs().max().item() for g in expected.values())
    # What is zero but for rounding (a bias before a norm) is compared with the largest.
    scales = {n: max(g.abs().max().item(), 1e-6 * largest) for n, g in expected.items()}
    return {n: (found[n] - g).abs().max().item() / scales[n] for n, g in expected.items()}


@pytest.mark.parametrize("name", JOINT)
def test_two_ranks_have_the_gradient_of_the_joint_batch(
    ranks: list[dict[str, Any]], name: str
) -> None:
    objective, batch = prepared(joint_case(name))
    loss = objective(batch, 0.5).loss
    loss.backward()
    mean = torch.stack([found[name][0] for found in ranks]).mean()
    assert mean.item() == pytest.approx(loss.item(), rel=1e-5)
    for found in ranks:
        errors = differences(found[name][1], gradients(objective))
        assert max(errors.values()) < 1e-5, errors


def test_koleo_is_each_ranks_own(ranks: list[dict[str, Any]]) -> None:
    """Neighbours are sought among the samples of a rank; all else of DINO is the joint batch's."""
    objective, batch = prepared(KOLEO._replace(per_rank=False))
    assert isinstance(objective, DINO)
    objective(batch, 0.5).loss.backward()
    for rank in range(WORLD):
        own = part(batch, rank)
        tokens = objective.encoder.tokens(
            own.image, objective.hidden(own), mask_token=objective.mask_token
        )
        apart = koleo(tokens[::2, 0]) + koleo(tokens[1::2, 0])
        (0.1 * apart / WORLD).backward()
    for found in ranks:
        errors = differences(found["dino with KoLeo"][1], gradients(objective))
        assert max(errors.values()) < 1e-5, errors
    whole, _ = prepared(KOLEO)
    whole(batch, 0.5).loss.backward()
    assert max(differences(gradients(objective), gradients(whole)).values()) > 1e-2


@pytest.mark.parametrize("name", OVER_BATCH)
def test_dice_over_the_batch_is_not_a_mean_of_ranks(name: str) -> None:
    """The content of both ranks is so unequal that the mean of their own would not pass."""
    means, batch = prepared(joint_case(name))
    for rank in range(WORLD):
        (means(part(batch, rank), 0.5).loss / WORLD).backward()
    joint, _ = prepared(joint_case(name))
    joint(batch, 0.5).loss.backward()
    assert max(differences(gradients(means), gradients(joint)).values()) > 1e-1


@pytest.mark.parametrize("name", VOXELWISE)
def test_losses_of_two_ranks_are_those_of_the_joint_batch(
    ranks: list[dict[str, Any]], name: str
) -> None:
    """In float64: classes that one rank alone has, or none, and few voxels on one of the ranks."""
    mapped = Voxelwise(VOXELWISE[name])
    loss = mapped(*voxels())
    loss.backward()
    losses = torch.stack([found[name][0] for found in ranks])
    torch.testing.assert_close(losses.mean(), loss.detach(), rtol=1e-12, atol=0)
    if name in ("dice", "dice with background"):  # one ratio of sums: each rank knows all of it
        assert losses[0] == losses[1]
    own = [mapped(*(t[rank::WORLD] for t in voxels())) for rank in range(WORLD)]
    if name != "dice of each sample":
        assert (torch.stack(own).mean() - loss).abs() > 1e-2 * loss  # a mean of means is another
    for found in ranks:
        assert max(differences(found[name][1], gradients(mapped)).values()) < 1e-12


def test_batch_norm_has_the_statistics_of_each_rank(ranks: list[dict[str, Any]]) -> None:
    """Ranks are to batch norm what micro-batches are: the gradient is the mean of theirs.

    Running statistics are rank 0's: at the start of a step all ranks take them over.
    """
    assert has_batch_norm(NORMED)
    objective, batch = prepared(NORMED, padded=False)
    halves = [part(batch, rank) for rank in range(WORLD)]
    for half in halves:
        (objective(half, 0.5).loss / WORLD).backward()
    for found in ranks:
        gradient, _ = found["batch norm"][0]
        assert max(differences(gradient, gradients(objective)).values()) < 1e-5
    joint, _ = prepared(NORMED, padded=False)
    joint(batch, 0.5).loss.backward()
    assert max(differences(gradients(objective), gradients(joint)).values()) > 1e-1

    seen = {(0,): ranks[0], (1,): ranks[1], (0, 0): ranks[0], (0, 1): ranks[1]}
    for order, found in seen.items():
        alone, _ = prepared(NORMED, padded=False)
        with torch.no_grad():
            for rank in order:
                alone(halves[rank], 0.5)
        _, running = found["batch norm"][len(order) - 1]
        assert max(differences(running, statistics(alone)).values()) < 1e-5, order


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
