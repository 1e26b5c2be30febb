from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from pretrain.backbones.resenc import ResEncUNetEncoder, ResidualBlock


def small(**changes: object) -> ResEncUNetEncoder:
    torch.manual_seed(0)
    args: dict = {"features": (4, 6, 8), "strides": (1, 2, (1, 2, 2)), "blocks": (1, 2, 1)}
    return ResEncUNetEncoder(**(args | changes))


def test_maps_have_the_declared_surface() -> None:
    encoder = small(in_channels=2)
    x = torch.randn(2, 2, 4, 8, 12)
    maps = encoder(x)
    assert encoder.channels == (4, 6, 8)
    assert encoder.strides == ((1, 1, 1), (2, 2, 2), (2, 4, 4))
    assert [tuple(m.shape[1:]) for m in maps] == [(4, 4, 8, 12), (6, 2, 4, 6), (8, 2, 2, 3)]
    assert encoder.grids(x.shape) == [tuple(m.shape[2:]) for m in maps]


def test_gradient_reaches_every_parameter() -> None:
    encoder = small()
    encoder(torch.randn(2, 1, 4, 8, 12))[-1].square().mean().backward()
    # A bias before an instance norm is removed by it: its gradient is there, but zero.
    assert [n for n, p in encoder.named_parameters() if p.grad is None] == []
    weights = {n: p for n, p in encoder.named_parameters() if not n.endswith("conv.bias")}
    assert [n for n, p in weights.items() if p.grad is not None and not p.grad.any()] == []


def test_a_strided_block_is_the_written_formula() -> None:
    torch.manual_seed(0)
    block = ResidualBlock(3, 5, (1, 2, 2))
    x = torch.randn(2, 3, 4, 6, 6)

    def norm(y: torch.Tensor) -> torch.Tensor:
        mean, var = y.mean((2, 3, 4), keepdim=True), y.var((2, 3, 4), unbiased=False, keepdim=True)
        return (y - mean) / (var + 1e-5).sqrt()

    c1, c2, c3 = block.conv1.conv, block.conv2.conv, block.skip[1].conv
    y = F.leaky_relu(norm(F.conv3d(x, c1.weight, c1.bias, (1, 2, 2), 1)), 0.01)
    y = norm(F.conv3d(y, c2.weight, c2.bias, 1, 1))
    pooled = x.unflatten(4, (3, 2)).unflatten(3, (3, 2)).mean((4, 6))
    y = F.leaky_relu(y + norm(F.conv3d(pooled, c3.weight)), 0.01)
    assert torch.allclose(block(x), y, atol=1e-5)


def test_a_crop_that_does_not_fit_is_explained() -> None:
    with pytest.raises(ValueError, match=r"\[4, 8, 10\].*\[2, 4, 4\].*for example \[4, 8, 8\]"):
        small()(torch.zeros(1, 1, 4, 8, 10))
    with pytest.raises(ValueError, match="single voxel"):
        small()(torch.zeros(1, 1, 2, 4, 4))


def test_stages_must_agree() -> None:
    with pytest.raises(ValueError, match="3, 3 and 2"):
        small(blocks=(1, 1))


def test_the_scale_of_the_input_does_not_matter_behind_the_stem() -> None:
    encoder = small()
    x = torch.randn(1, 1, 4, 8, 12)
    assert torch.allclose(encoder(x)[-1], encoder(3 * x)[-1], atol=1e-3)


def test_features_of_the_public_implementation() -> None:
    folder = Path(os.environ.get("VOXELITH_PARITY_DIR", "../shared/parity"))
    checkpoint = folder / "nnssl_resenc_checkpoint_final.pth"
    if not checkpoint.exists():
        pytest.skip(f"no reference numbers: {checkpoint} does not exist (VOXELITH_PARITY_DIR)")
    from safetensors.torch import load_file

    numbers = load_file(folder / "nnssl_resenc_features.safetensors")
    stored = torch.load(checkpoint, map_location="cpu", weights_only=True)
    plan = stored["nnssl_adaptation_plan"]["architecture_plans"]["arch_kwargs"]
    weights = {
        name.removeprefix("encoder."): tensor
        for name, tensor in stored["network_weights"].items()
        if name.startswith("encoder.") and ".all_modules." not in name
    }
    encoder = ResEncUNetEncoder(
        in_channels=weights["stem.convs.0.conv.weight"].shape[1],
        features=tuple(plan["features_per_stage"]),
        strides=tuple(tuple(s) for s in plan["strides"]),
        blocks=tuple(plan["n_blocks_per_stage"]),
    )
    encoder.load_state_dict(weights, strict=True)
    maps = encoder.eval()(numbers["input.x"])
    for found, name in zip(maps, sorted(n for n in numbers if "expected" in n), strict=True):
        assert torch.allclose(found, numbers[name], rtol=1e-5, atol=1e-5)
