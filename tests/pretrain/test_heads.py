from __future__ import annotations

import torch
from seeds import SEED
from torch.nn import functional as F

from pretrain.heads import ProjectionHead


def head() -> ProjectionHead:
    torch.manual_seed(SEED)
    return ProjectionHead(6, 9, hidden_dim=16, bottleneck_dim=8)


def test_logits_are_scaled_cosines_with_prototypes() -> None:
    built, x = head(), torch.randn(2, 5, 6)
    with torch.no_grad():
        built.scale.uniform_(0.5, 2)
    point = built.mlp(x)[..., None, :].expand(2, 5, 9, 8)
    prototypes = built.prototypes.expand(2, 5, 9, 8)
    expected = F.cosine_similarity(point, prototypes, dim=-1) * built.scale
    torch.testing.assert_close(built(x), expected)


def test_logits_start_within_one() -> None:
    built = head()
    assert (built.scale == 1).all()
    with torch.no_grad():
        built.prototypes.mul_(100)
        built.mlp[-1].weight.mul_(100)
    assert built(torch.randn(50, 6)).abs().max() <= 1 + 1e-6


def test_weights_start_small() -> None:
    built = ProjectionHead(32, 64)
    assert [m.weight.shape for m in built.mlp if hasattr(m, "weight")] == [
        (2048, 32), (2048, 2048), (256, 2048),
    ]  # fmt: skip
    for name, parameter in built.named_parameters():
        if name.endswith("weight") or name == "prototypes":
            assert abs(parameter.std().item() - 0.02) < 1e-3, name
        elif name.endswith("bias"):
            assert not parameter.any()


def test_state_travels_plainly() -> None:
    built, other = head(), ProjectionHead(6, 9, hidden_dim=16, bottleneck_dim=8)
    layers = {f"mlp.{i}.{name}" for i in (0, 2, 4) for name in ("weight", "bias")}
    assert set(built.state_dict()) == {"prototypes", "scale"} | layers
    other.load_state_dict(built.state_dict())
    x = torch.randn(3, 6)
    assert torch.equal(built(x), other(x))


def test_all_of_it_is_trained() -> None:
    built = head()
    built(torch.randn(3, 6)).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in built.parameters())


def test_lengths_and_cosines_are_float32_under_autocast() -> None:
    """The MLP is in bfloat16; what follows it has all digits."""
    built, x = head(), torch.randn(64, 6)
    with torch.no_grad():
        for weight in built.mlp.parameters():
            weight.mul_(20)
    exact = built(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, points = built(x), built.mlp(x)
    assert found.dtype == torch.float32 and points.dtype == torch.bfloat16
    expected = F.cosine_similarity(points.float()[:, None], built.prototypes, dim=-1)
    torch.testing.assert_close(found, expected)
    assert F.cosine_similarity(found, exact, dim=-1).min() > 0.999


def test_a_zero_has_a_finite_gradient() -> None:
    x = torch.zeros(3, 6, requires_grad=True)
    built = head()
    built(x).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in built.parameters())


def test_the_head_compiles_without_a_break() -> None:
    built, x = head(), torch.randn(3, 6)
    traced = torch.compile(built, backend="eager", fullgraph=True)
    torch.testing.assert_close(traced(x), built(x))
