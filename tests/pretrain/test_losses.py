from __future__ import annotations

import pytest
import torch

from pretrain.losses import masked_l1, masked_mse

BOTH = [masked_mse, masked_l1]


@pytest.mark.parametrize(("loss", "expected"), [(masked_mse, 4), (masked_l1, 2)])
def test_a_constant_error_has_a_known_loss(loss, expected: float) -> None:
    x = torch.randn(2, 5, 24)
    everything = torch.ones_like(x, dtype=torch.bool)
    assert loss(x, x, everything) == 0
    assert loss(x - 2, x, everything).item() == pytest.approx(expected, rel=1e-6)


def test_losses_equal_their_formulas_over_the_whole_batch() -> None:
    x, y, counted = torch.randn(2, 3, 7), torch.randn(2, 3, 7), torch.rand(2, 3, 7) > 0.3
    difference = (x - y)[counted]
    assert masked_mse(x, y, counted).item() == pytest.approx(difference.pow(2).mean().item())
    assert masked_l1(x, y, counted).item() == pytest.approx(difference.abs().mean().item())


@pytest.mark.parametrize("loss", BOTH)
def test_the_error_is_summed_in_float32(loss) -> None:
    low = torch.full((1000,), 1.0, dtype=torch.bfloat16)
    found = loss(low, torch.zeros_like(low), torch.ones_like(low, dtype=torch.bool))
    assert found.dtype == torch.float32
    assert found == 1


@pytest.mark.parametrize(("loss", "slope"), [(masked_mse, 2), (masked_l1, 1)])
def test_uncounted_voxels_may_be_infinite(loss, slope: float) -> None:
    prediction = torch.tensor([1.0, float("inf"), float("nan")], requires_grad=True)
    found = loss(prediction, torch.zeros(3), torch.tensor([True, False, False]))
    found.backward()
    assert found == 1
    assert prediction.grad is not None
    assert prediction.grad.tolist() == [slope, 0, 0]


@pytest.mark.parametrize("loss", BOTH)
def test_nothing_to_count_is_zero(loss) -> None:
    x = torch.randn(3, requires_grad=True)
    found = loss(x, torch.zeros(3), torch.zeros(3, dtype=torch.bool))
    found.backward()
    assert found == 0
    assert x.grad is not None and not x.grad.any()
