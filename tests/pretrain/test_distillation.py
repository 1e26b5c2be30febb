from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pretrain.distillation import Centring, cls_loss, ibot_loss, sinkhorn, soft_cross_entropy
from pretrain.masked_tokens import hidden_rows


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def plain_sinkhorn(logits: Tensor, temperature: float, iterations: int) -> Tensor:
    """Prototype by prototype and row by row, as in a table that is to have equal sums."""
    Q = (logits / temperature).exp()
    B, K = Q.shape
    for _ in range(iterations):
        for k in range(K):
            Q[:, k] /= Q[:, k].sum() * K
        for b in range(B):
            Q[b] /= Q[b].sum() * B
    return Q * B


@pytest.mark.parametrize("iterations", [1, 3])
def test_sinkhorn_equals_its_formula(seed: int, iterations: int) -> None:
    logits = randn(7, 5, seed=seed)
    found = sinkhorn(logits, 0.3, iterations=iterations)
    torch.testing.assert_close(found, plain_sinkhorn(logits, 0.3, iterations))


def test_sinkhorn_uses_prototypes_alike() -> None:
    found = sinkhorn(randn(12, 4), 0.5, iterations=100)
    torch.testing.assert_close(found.sum(1), torch.ones(12, dtype=found.dtype))
    torch.testing.assert_close(found.sum(0), torch.full((4,), 3.0, dtype=found.dtype))
    # A prototype that all rows prefer has no more of them for it.
    biased = randn(12, 4) + torch.tensor([5.0, 0, 0, 0])
    torch.testing.assert_close(sinkhorn(biased, 0.5), sinkhorn(randn(12, 4), 0.5))


@pytest.mark.parametrize("constant", [-300.0, 40.0, 1000.0])
def test_sinkhorn_does_not_see_a_constant(constant: float) -> None:
    logits = randn(6, 5)
    torch.testing.assert_close(sinkhorn(logits + constant, 0.1), sinkhorn(logits, 0.1))


def test_sinkhorn_neither_over_nor_underflows() -> None:
    """Logits over a temperature of 0.04 pass float32's 88 early, and rows differ in height."""
    logits = randn(6, 5).float() * 20 + torch.tensor([0.0, 0, 0, 0, 0, -200])[:, None]
    found = sinkhorn(logits, 0.04)
    assert found.isfinite().all()
    torch.testing.assert_close(found.sum(1), torch.ones(6))
    torch.testing.assert_close(found, sinkhorn(logits.double(), 0.04).float(), atol=1e-3, rtol=0)


def test_padding_has_no_part_in_sinkhorn() -> None:
    logits, counted = randn(9, 5), torch.tensor([1, 1, 0, 1, 0, 1, 1, 0, 0]).bool()
    expected = sinkhorn(logits[counted], 0.1)
    for padding in (100.0, -torch.inf, torch.nan):
        logits[~counted] = padding
        found = sinkhorn(logits, 0.1, counted)
        torch.testing.assert_close(found[counted], expected)
        assert not found[~counted].any()
    assert not sinkhorn(logits, 0.1, torch.zeros_like(counted)).any()


def test_targets_have_no_gradient() -> None:
    logits = randn(4, 3).requires_grad_()
    assert not sinkhorn(logits, 0.1).requires_grad
    assert not Centring(3).double()(logits, 0.1).requires_grad


def test_a_batch_is_centred_by_those_before_it() -> None:
    centring, (first, second) = Centring(5).double(), randn(2, 8, 5)
    torch.testing.assert_close(centring(first, 0.1), (first / 0.1).softmax(1))
    assert not centring.centre.any()  # until the optimiser has stepped
    centring.update()
    torch.testing.assert_close(centring.centre, 0.1 * first.mean(0))
    centre = centring.centre.clone()
    torch.testing.assert_close(centring(second, 0.1), ((second - centre) / 0.1).softmax(1))
    centring.update()
    torch.testing.assert_close(centring.centre, 0.9 * centre + 0.1 * second.mean(0))
    centre = centring.centre.clone()
    centring.update()
    assert torch.equal(centring.centre, centre)  # nothing was seen since
    assert list(centring.state_dict()) == ["centre"]


def test_micro_batches_move_the_centre_as_one_batch() -> None:
    whole, parts, logits = Centring(5).double(), Centring(5).double(), randn(8, 5)
    whole(logits, 0.1)
    for rows in (slice(0, 2), slice(2, 8)):
        parts(logits[rows], 0.1)
    for centring in (whole, parts):
        centring.update()
    torch.testing.assert_close(parts.centre, whole.centre)


def test_padding_and_evaluation_do_not_move_the_centre() -> None:
    centring, logits = Centring(5).double(), randn(4, 5)
    counted = torch.tensor([True, False, True, False])
    logits[~counted] = torch.nan
    targets = centring(logits, 0.1, counted)
    centring.update()
    assert not targets[~counted].any()
    torch.testing.assert_close(centring.centre, 0.1 * logits[counted].mean(0))
    centre = centring.centre.clone()
    centring(logits, 0.1, torch.zeros_like(counted))
    centring.eval()(randn(4, 5), 0.1)
    centring.update()
    assert torch.equal(centring.centre, centre)


def crops(samples: int, local: int, K: int) -> tuple[Tensor, Tensor, Tensor]:
    teacher = randn(samples, 2, K, seed=1).softmax(-1)
    return teacher, randn(samples, 2, K, seed=2), randn(samples, local, K, seed=3)


@pytest.mark.parametrize("local", [0, 3, 8])
def test_cls_loss_is_the_mean_over_pairs(local: int) -> None:
    teacher, student_global, student_local = crops(4, local, 6)

    def pair(t: Tensor, z: Tensor) -> Tensor:
        p = (z / 0.1).softmax(-1)
        return torch.stack([-(t[b] * p[b].log()).sum() for b in range(len(t))]).mean()

    pairs = [pair(teacher[:, g], student_local[:, crop]) for g in range(2) for crop in range(local)]
    crossed = [pair(teacher[:, 0], student_global[:, 1]), pair(teacher[:, 1], student_global[:, 0])]
    found = cls_loss(teacher, student_global, student_local, 0.1)
    assert found.loss.item() == pytest.approx(sum(pairs + crossed).item() / (2 * local + 2))
    assert found.crossed.item() == pytest.approx(sum(crossed).item())
    assert found.local.item() == pytest.approx(float(sum(pairs)))


def test_a_student_that_knows_nothing_has_the_logarithm_of_k() -> None:
    teacher, student_global, student_local = crops(4, 8, 6)
    found = cls_loss(teacher, 0 * student_global, 0 * student_local, 0.1)
    assert found.loss.item() == pytest.approx(math.log(6))
    assert found.local.item() == pytest.approx(16 * math.log(6))
    assert found.crossed.item() == pytest.approx(2 * math.log(6))


def test_a_crop_never_predicts_itself() -> None:
    teacher = torch.eye(4, dtype=torch.float64).view(2, 2, 4)  # one-hot
    none = torch.empty(2, 0, 4, dtype=torch.float64)
    own, other = 1000 * teacher, 1000 * teacher.flip(1)
    assert cls_loss(teacher, other, none, 1.0).loss == 0
    assert cls_loss(teacher, own, none, 1.0).loss == 1000


def test_cross_entropy_is_no_less_than_the_entropy() -> None:
    target = (randn(5, 6) / 0.1).softmax(-1)
    entropy = -(target * target.log()).sum(-1)
    assert (soft_cross_entropy(target, randn(5, 6, seed=4), 0.1) >= entropy).all()
    torch.testing.assert_close(soft_cross_entropy(target, randn(5, 6), 0.1), entropy)


def test_no_gradient_reaches_the_teacher() -> None:
    teacher, student_global, student_local = (x.requires_grad_() for x in crops(4, 3, 6))
    cls_loss(teacher, student_global, student_local, 0.1).loss.backward()
    assert teacher.grad is None
    assert student_global.grad is not None and student_local.grad is not None


def hidden_tokens() -> Tensor:
    """One, three, none and two of five."""
    hidden = torch.zeros(4, 5, dtype=torch.bool)
    hidden[0, 4] = hidden[1, :3] = hidden[3, 1] = hidden[3, 3] = True
    return hidden


def test_ibot_loss_is_a_mean_of_crops_means() -> None:
    hidden = hidden_tokens()
    teacher, student = randn(4, 5, 6, seed=1).softmax(-1), randn(4, 5, 6)
    each = []
    for crop in range(4):
        losses = [
            -(teacher[crop, n] * (student[crop, n] / 0.1).softmax(-1).log()).sum()
            for n in range(5)
            if hidden[crop, n]
        ]
        each.append(sum(losses) / len(losses) if losses else torch.tensor(0.0))
    rows = hidden_rows(hidden, 9)
    taken = [z.flatten(0, 1)[rows.token] for z in (teacher, student)]
    found = ibot_loss(*taken, rows.weight, 4, 0.1)
    assert found.item() == pytest.approx(sum(each).item() / 4)


def test_padding_of_ibot_has_no_gradient() -> None:
    rows = hidden_rows(hidden_tokens(), 9)
    teacher, student = randn(9, 6, seed=1).softmax(-1), randn(9, 6)
    expected = ibot_loss(teacher, student, rows.weight, 4, 0.1)
    for z in (teacher, student):
        z[~rows.counted] = torch.nan
    student.requires_grad_()
    found = ibot_loss(teacher, student, rows.weight, 4, 0.1)
    found.backward()
    assert found == expected
    assert student.grad is not None and student.grad.isfinite().all()
    assert not student.grad[~rows.counted].any() and student.grad[rows.counted].all()


def test_nothing_hidden_is_zero() -> None:
    rows = hidden_rows(torch.zeros(4, 5, dtype=torch.bool), 3)
    student = randn(3, 6).requires_grad_()
    found = ibot_loss(sinkhorn(randn(3, 6), 0.1, rows.counted), student, rows.weight, 4, 0.1)
    found.backward()
    assert found == 0
    assert student.grad is not None and not student.grad.any()
