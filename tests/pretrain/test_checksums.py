"""Ranks whose weights are no longer the same stop before they save."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rank_runs import machine, run
from seeds import SEED
from test_loop import settings, steps
from torch import Tensor, nn

from pretrain.checksums import check_equal, halves, shared_tensors, tensor_sums
from pretrain.teacher import Teacher

ULP = """
from pretrain.objectives.cnn_mae import CnnMAE
import torch
def after_step(self, progress):
    if self.loop.step == 4 and RANK == 1:
        weight = self.encoder.get_parameter({name!r}).data.flatten()
        weight[-1] = weight[-1].nextafter(torch.tensor(9.0))
CnnMAE.after_step = after_step
"""
START = """
from pretrain.loop import Loop
begun = Loop.check_ranks
def check_ranks(self, gather, objective):
    if RANK == 1:
        next(objective.encoder.parameters()).data.view(-1)[0] += 1
    begun(self, gather, objective)
Loop.check_ranks = check_ranks
"""


def two(corpus: Path, runs: Path, name: str, **changes: Any) -> Any:
    chosen = {"steps": 8, "log_every": 3, "save_every": 5, "trainer": machine(2)}
    return settings(corpus, runs, name, **chosen | changes)


def first_parameter(corpus: Path, runs: Path) -> str:
    from pretrain.train import build_objective

    return next(n for n, _ in build_objective(two(corpus, runs, "x"), 1).encoder.named_parameters())


def test_a_weight_that_differs_by_one_bit_stops_the_run_before_it_is_saved(
    pretrain_corpus: Path, tmp_path: Path
) -> None:
    name = first_parameter(pretrain_corpus, tmp_path)
    chosen = two(
        pretrain_corpus, tmp_path, "bit", accumulate=2, trainer=machine(2, precision="bf16-mixed")
    )
    done = run(chosen, tmp_path, ULP.format(name=name))
    assert done.returncode == 1, done.stderr
    # Looked at where a checkpoint is due, before it is written.
    assert f"step 5: encoder.{name} of rank 1 is not that of rank 0" in done.stderr
    assert steps(tmp_path / "bit") == [1, 3]
    assert not list((tmp_path / "bit" / "checkpoints").glob("*"))


def test_ranks_that_begin_otherwise_do_not_begin(pretrain_corpus: Path, tmp_path: Path) -> None:
    done = run(two(pretrain_corpus, tmp_path, "start"), tmp_path, START)
    assert done.returncode == 1 and "step 0: encoder." in done.stderr
    assert not (tmp_path / "start" / "metrics.csv").exists()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(SEED)
        self.frozen = nn.Linear(3, 5).requires_grad_(False)
        self.norm = nn.BatchNorm1d(5)
        self.short = nn.Parameter(torch.randn(7).bfloat16())
        self.register_buffer("centre", torch.randn(3))
        self.register_buffer("few", torch.tensor([True, False, True]))
        self.register_buffer("scalar", torch.tensor(2.0))
        self.teacher = Teacher(self.norm)


def test_every_bit_of_what_ranks_share_counts() -> None:
    net = Net()
    before = {n: int(s) for n, s in tensor_sums(net).items()}
    assert before.keys() == {
        *(n for n, _ in net.named_parameters()), "centre", "few", "scalar",
    }  # fmt: skip
    for name, tensor in shared_tensors(net):
        flat = tensor.data.view(-1).view(torch.uint8)
        for place in {0, len(flat) // 2, len(flat) - 1}:
            flat[place] ^= 1
            changed = {n: int(s) for n, s in tensor_sums(net).items()}
            assert [n for n in before if before[n] != changed[n]] == [name]
            flat[place] ^= 1
    net.norm.running_mean += 1  # each rank has its own
    net.teacher.module.running_var += 1
    assert before == {n: int(s) for n, s in tensor_sums(net).items()}


def test_a_sum_is_that_of_the_words_wherever_they_lie() -> None:
    values = torch.randn(2, 3, 4, 5)
    words = values.flatten().view(torch.int64).tolist()
    expected = (sum(words) + 2**63) % 2**64 - 2**63
    odd = torch.cat([torch.zeros(1), values.flatten()])[1:].view_as(values)
    strided = values.to(memory_format=torch.channels_last)
    for tensor in (values, odd, strided):
        module = nn.Module()
        module.register_buffer("x", tensor)
        assert int(tensor_sums(module)["x"]) == expected


def test_halves_hold_all_64_bits() -> None:
    like = torch.zeros((), dtype=torch.float64)
    numbers = (0, 1, -1, 2**63 - 1, -(2**63), 1234567890123456789, -987654321987654321)
    sums: dict[str, Tensor] = {str(n): torch.tensor(n) for n in numbers}
    found = halves(sums, like).view(-1, 2).tolist()
    assert tuple(int(high) * 2**32 + int(low) for high, low in found) == numbers
    assert len(halves({}, like)) == 0


def test_the_message_names_tensor_and_ranks() -> None:
    row = [1.0, 2.0, 3.0, 4.0]
    check_equal(["a", "b"], [row, row], 7)
    with pytest.raises(RuntimeError, match=r"step 7: b of rank 1, 3 is not that of rank 0"):
        check_equal(["a", "b"], [row, [1.0, 2.0, 3.0, 5.0], row, [1.0, 2.0, 0.0, 4.0]], 7)
