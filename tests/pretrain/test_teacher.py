from __future__ import annotations

import pytest
import torch
from seeds import SEED
from torch import Tensor, nn

from pretrain.ramps import cosine, warm
from pretrain.teacher import Teacher


def student() -> nn.Sequential:
    torch.manual_seed(SEED)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))


def values(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def step(module: nn.Module) -> None:
    module(torch.randn(8, 3)).square().sum().backward()
    torch.optim.SGD(module.parameters(), 0.1).step()


def test_a_teacher_begins_as_its_student() -> None:
    pupil = student()
    teacher = Teacher(pupil)
    copied = teacher.module.state_dict()
    assert all(torch.equal(copied[n], value) for n, value in pupil.state_dict().items())
    step(pupil)
    assert not torch.equal(teacher.module[0].weight, pupil[0].weight)


def test_a_teacher_follows_by_the_formula() -> None:
    pupil = student()
    teacher = Teacher(pupil)
    for momentum in (0.992, 0.5):
        before = values(teacher.module)
        step(pupil)
        teacher.update(pupil, momentum)
        parameters = {name for name, _ in pupil.named_parameters()}
        assert len(parameters) == 6
        for name, value in teacher.module.state_dict().items():
            new = pupil.state_dict()[name]
            if name in parameters:
                expected = momentum * before[name] + (1 - momentum) * new
                torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-7)
            else:  # running statistics and their count
                assert torch.equal(value, new) and not torch.equal(value, before[name])


def test_the_ends_of_the_momentum_are_exact() -> None:
    pupil = student()
    teacher = Teacher(pupil)
    before = values(teacher.module)
    step(pupil)
    teacher.update(pupil, 1.0)
    assert all(torch.equal(p, before[n]) for n, p in teacher.module.named_parameters())
    teacher.update(pupil, 0.0)
    assert all(torch.equal(p, pupil.get_parameter(n)) for n, p in teacher.module.named_parameters())


def test_a_teacher_stays_in_evaluation_mode() -> None:
    teacher = Teacher(student())
    around = nn.ModuleDict({"teacher": teacher}).train()
    assert around.training
    assert not any(part.training for part in teacher.modules())
    before, x = values(teacher), torch.randn(8, 3)
    assert torch.equal(teacher(x), teacher(x))
    assert all(torch.equal(v, before[n]) for n, v in teacher.state_dict().items())


def test_no_gradient_reaches_a_teacher() -> None:
    pupil = student()
    teacher = Teacher(pupil)
    x = torch.randn(8, 3, requires_grad=True)
    (teacher(x) + pupil(x)).square().sum().backward()
    teacher.update(pupil, 0.9)
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert all(p.grad is not None and p.requires_grad for p in pupil.parameters())
    assert not teacher(x).requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_checksum_sees_every_bit(dtype: torch.dtype) -> None:
    teacher = Teacher(student().to(dtype))
    first = teacher.checksum()
    assert first == Teacher(student().to(dtype)).checksum()
    for name, value in teacher.module.state_dict().items():
        kept = value.clone()
        flat = value.view(-1)
        if value.is_floating_point():
            flat[-1] = flat[-1].nextafter(torch.tensor(9.0, dtype=dtype))
        else:
            flat += 1
        assert teacher.checksum() != first, name
        value.copy_(kept)
    weight = teacher.module[0].weight.data
    weight[:, [0, 1]] = weight[:, [1, 0]]
    assert teacher.checksum() != first


def test_the_teachers_temperature_rises_and_stays() -> None:
    assert warm(0.0, 0.04, 0.07, 0.3) == 0.04
    assert warm(0.15, 0.04, 0.07, 0.3) == pytest.approx(0.055)
    assert [warm(p, 0.04, 0.07, 0.3) for p in (0.3, 0.6, 1.0)] == [0.07] * 3
    assert warm(0.0, 0.04, 0.07, 0.0) == 0.07


@pytest.mark.parametrize(("start", "end"), [(0.992, 1.0), (0.04, 0.4)])
def test_a_cosine_goes_from_end_to_end(start: float, end: float) -> None:
    assert cosine(0.0, start, end) == pytest.approx(start, rel=1e-12)
    assert cosine(0.5, start, end) == pytest.approx((start + end) / 2)
    assert cosine(1.0, start, end) == end
    found = [cosine(i / 50, start, end) for i in range(51)]
    assert found == sorted(found)
