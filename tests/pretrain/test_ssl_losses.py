"""What holds for every loss on embeddings, on one rank and on two."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from seeds import SEED
from ssl_losses import LOSSES, SAMPLES, Embedded, inputs
from sync_counter import DEVICE, SyncCounter
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pretrain.collectives import gather, global_max, rank
from pretrain.distillation import Centring, sinkhorn
from pretrain.heads import ProjectionHead
from pretrain.masked_tokens import hidden_in_some, hidden_rows, most_hidden
from pretrain.overlap import overlap_fractions
from pretrain.regularisers import resize_tokens
from pretrain.teacher import Teacher

WORLD = 2
WIDTH = 6


class Student(nn.Module):
    """A head with its loss, in float64, as DDP wraps them; the teacher sees other weights."""

    def __init__(self, loss: Embedded) -> None:
        super().__init__()
        torch.manual_seed(SEED)
        self.head = ProjectionHead(WIDTH, 7, hidden_dim=16, bottleneck_dim=8).double()
        with torch.no_grad():
            for parameter in self.head.mlp.parameters():
                parameter.mul_(20)
        self.teacher = Teacher(self.head)
        with torch.no_grad():
            self.teacher.module.prototypes.add_(0.01)
        self.loss = loss

    def forward(self, items: Tensor, hidden: Tensor) -> Tensor:
        return self.loss(self.head(items), self.teacher(items), hidden)


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


def rows_of_two(seed: int) -> tuple[Tensor, list[Tensor]]:
    """Logits [2, 9, 5] of two ranks, and which rows count: unequally many, or none on rank 0."""
    logits = torch.randn(2, 9, 5, generator=torch.Generator().manual_seed(seed)).double() * 3
    uneven, none = torch.zeros(2, 9, dtype=torch.bool), torch.zeros(2, 9, dtype=torch.bool)
    uneven[0, 4], uneven[1, 1:] = True, True
    none[1, :6] = True
    return logits, [uneven, none]


def worker(number: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=number, world_size=WORLD)
    found: dict[str, Any] = {}
    for name, loss in LOSSES.items():
        student = Student(loss)
        parallel = DistributedDataParallel(student)
        value = parallel(*(t[number::WORLD] for t in inputs(WIDTH)))
        value.backward()
        found[name] = (value.detach(), gradients(student))
    logits, counts = rows_of_two(0)
    found["sinkhorn"] = [sinkhorn(logits[number], 0.1, c[number]) for c in counts]
    centring = Centring(5).double()
    for counted in counts:
        centring(logits[number], 0.1, counted[number])
        centring.update()
    found["centre"] = centring.centre

    found["rank"] = rank()
    found["largest"] = global_max(torch.tensor([number, -number]))
    found["gathered"] = gather(torch.full((2, 3), float(number)))

    student = Student(LOSSES["dino"])
    parallel = DistributedDataParallel(student)
    parallel(*(t[number::WORLD] for t in inputs(WIDTH))).backward()
    torch.optim.SGD(student.head.parameters(), 0.1).step()
    student.teacher.update(student.head, 0.9)
    sums = [student.teacher.checksum()]
    student.teacher.module.scale.data[number] += 1e-12
    sums.append(student.teacher.checksum())
    found["checksums"] = [(global_max(s), -global_max(-s)) for s in sums]
    torch.save(found, f"{folder}/rank-{number}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two ranks found."""
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(worker, (str(folder),), nprocs=WORLD)
    return [torch.load(folder / f"rank-{number}.pt", weights_only=True) for number in range(WORLD)]


def apart(name: str) -> tuple[Tensor, dict[str, Tensor]]:
    """The mean of what the ranks would have if they did not speak."""
    student = Student(LOSSES[name])
    losses = [student(*(t[r::WORLD] for t in inputs(WIDTH))) / WORLD for r in range(WORLD)]
    sum(losses).backward()
    return sum(losses).detach(), gradients(student)


def joint(name: str) -> tuple[Tensor, dict[str, Tensor]]:
    if name == "koleo":  # of each rank by its definition
        return apart(name)
    student = Student(LOSSES[name])
    loss = student(*inputs(WIDTH))
    loss.backward()
    return loss.detach(), gradients(student)


@pytest.mark.parametrize("name", LOSSES)
def test_two_ranks_have_the_loss_of_the_joint_batch(ranks: list[dict[str, Any]], name: str) -> None:
    loss, expected = joint(name)
    assert expected["head.mlp.0.weight"].any()
    mean = torch.stack([found[name][0] for found in ranks]).mean()
    torch.testing.assert_close(mean, loss, rtol=1e-10, atol=0)
    for found in ranks:
        assert found[name][1].keys() == expected.keys()
        largest = max(g.abs().max() for g in expected.values())
        for parameter, gradient in found[name][1].items():
            error = (gradient - expected[parameter]).abs().max()
            assert error <= 1e-10 * largest, parameter


ACROSS = {
    "dino", "ibot", "centred", "nt_xent", "partitions", "partitions across", "regions across",
    "overlap_cross_entropy", "overlap_log_loss", "overlap between volumes",
}  # fmt: skip


@pytest.mark.parametrize("name", LOSSES)
def test_ranks_that_did_not_speak_would_differ(name: str) -> None:
    """The shares are so unequal that a mean of means would not pass."""
    found, expected = apart(name)[0], joint(name)[0]
    if name in ACROSS:
        assert (found - expected).abs() > 1e-4 * expected.abs()
    else:
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("case", [0, 1])
def test_sinkhorn_spans_ranks(ranks: list[dict[str, Any]], case: int) -> None:
    logits, counts = rows_of_two(0)
    counted = counts[case]
    expected = sinkhorn(logits[counted], 0.1)
    found = torch.stack([r["sinkhorn"][case] for r in ranks])
    torch.testing.assert_close(found[counted], expected, rtol=1e-12, atol=0)
    assert not found[~counted].any()


def test_the_centre_is_that_of_all_rows(ranks: list[dict[str, Any]]) -> None:
    logits, counts = rows_of_two(0)
    centring = Centring(5).double()
    for counted in counts:
        centring(logits[counted], 0.1)
        centring.update()
    for found in ranks:
        torch.testing.assert_close(found["centre"], centring.centre, rtol=1e-12, atol=0)


def test_what_ranks_say_to_each_other(ranks: list[dict[str, Any]]) -> None:
    for number, found in enumerate(ranks):
        assert found["rank"] == number
        assert found["largest"].tolist() == [1, 0]
        assert found["gathered"][:, 0].tolist() == [0, 0, 1, 1]
        (same, also), (largest, smallest) = found["checksums"]
        assert same == also and largest != smallest
    assert rank() == 0


@pytest.mark.parametrize("name", LOSSES)
def test_losses_are_float32_under_autocast(name: str) -> None:
    """In bfloat16 they are what they are for the same numbers in float32, to the last bit."""
    items, hidden = inputs(WIDTH)
    student, teacher = (items.bfloat16().requires_grad_() for _ in range(2))
    plain = [x.detach().float().requires_grad_() for x in (student, teacher)]
    expected = LOSSES[name](*plain, hidden)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = LOSSES[name](student, teacher, hidden)
    assert found.dtype == torch.float32
    assert found == expected
    found.backward()
    expected.backward()
    assert student.grad is not None and plain[0].grad is not None
    assert torch.equal(student.grad, plain[0].grad.bfloat16())


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_collapse_has_a_finite_gradient(name: str, value: float) -> None:
    """All embeddings are one and the same."""
    student = torch.full((SAMPLES, 8, 6), value, requires_grad=True)
    loss = LOSSES[name](student, student.detach(), inputs(WIDTH)[1])
    loss.backward()
    assert loss.isfinite() and student.grad is not None and student.grad.isfinite().all()


@pytest.mark.parametrize("name", LOSSES)
def test_losses_never_wait(name: str) -> None:
    items, hidden = (t.to(DEVICE) for t in inputs(WIDTH))
    student, teacher = items.float().requires_grad_(), items.float()
    with SyncCounter() as counter:
        LOSSES[name](student, teacher, hidden).backward()
    assert counter.found == []


def test_masks_boxes_maps_and_teachers_never_wait() -> None:
    student = ProjectionHead(6, 9, hidden_dim=16, bottleneck_dim=8).to(DEVICE)
    teacher = Teacher(student)
    seeds = torch.zeros(6, dtype=torch.int64, device=DEVICE)
    box = torch.zeros(2, 3, 2, 3, device=DEVICE)
    with SyncCounter() as counter:
        hidden = hidden_in_some(seeds, (2, 3, 4), 0.5, 0.2, 0.75)
        rows = hidden_rows(hidden, most_hidden(3, (2, 3, 4), 0.5, 0.75))
        teacher(torch.zeros(4, 6, device=DEVICE))
        teacher.update(student, 0.9)
        teacher.checksum()
        overlap_fractions(box, box)
        resize_tokens(torch.zeros(2, 24, 5, device=DEVICE), (2, 3, 4), (1, 2, 2))
    assert counter.found == []
    assert rows.token.shape == (most_hidden(3, (2, 3, 4), 0.5, 0.75),)
