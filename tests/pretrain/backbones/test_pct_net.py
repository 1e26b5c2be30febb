from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from seeds import SEED
from torch import Tensor, nn

from pretrain.backbones.pct_net import (
    PCTNetEncoder,
    WindowBlock,
    _relative_positions,
    _without_statistics,
)
from pretrain.optim import parameter_groups

SHAPE = (32, 48, 64)  # 2x3x4 cells of the deepest map in mode 0


def small(**changes: object) -> PCTNetEncoder:
    torch.manual_seed(SEED)
    args: dict = {
        "features": (4, 4, 8, 8, 8),
        "heads": (2, 2, 4),
        "windows": (4, 3, 2),
        "resolution_mode": 0,
        "dropout": (0.0, 0.0, 0.0, 0.0, 0.0),
        "drop_path": 0.0,
    }
    return PCTNetEncoder(**(args | changes))


@pytest.mark.parametrize(
    ("mode", "strides"),
    [
        (0, [(1, 1, 1), (2, 2, 2), (4, 4, 4), (8, 8, 8), (16, 16, 16)]),
        (1, [(1, 1, 1), (1, 2, 2), (2, 4, 4), (4, 8, 8), (8, 16, 16)]),
        (2, [(1, 1, 1), (1, 2, 2), (1, 4, 4), (2, 8, 8), (4, 16, 16)]),
    ],
)
def test_maps_and_outputs_have_the_declared_grids(mode: int, strides: list) -> None:
    encoder = small(resolution_mode=mode, in_channels=2)
    decoder = encoder.own_decoder(3)
    assert list(encoder.strides) == strides
    image = torch.randn(1, 2, 16, 32, 48)
    maps = encoder(image)
    assert [tuple(m.shape[1:]) for m in maps] == [
        (c, *grid) for c, grid in zip(encoder.channels, encoder.grids(image.shape), strict=True)
    ]
    outputs = decoder.outputs(image, maps)
    assert [tuple(o.shape) for o in outputs] == [
        (1, 3, *grid) for grid in encoder.grids(image.shape)[:4]
    ]


def test_one_set_of_weights_takes_other_crops() -> None:
    encoder = small().eval()
    decoder = encoder.own_decoder(2).eval()
    for shape in ((16, 16, 32), SHAPE, (80, 16, 48)):
        image = torch.randn(1, 1, *shape)
        assert decoder(image, encoder(image)).shape == (1, 2, *shape)


def test_gradient_reaches_every_weight() -> None:
    encoder = small()
    decoder = encoder.own_decoder(3)
    image = torch.randn(2, 1, *SHAPE)
    sum(o.square().mean() for o in decoder.outputs(image, encoder(image))).backward()
    for module in (encoder, decoder):
        assert [n for n, p in module.named_parameters() if p.grad is None] == []
        weights = [(n, p) for n, p in module.named_parameters() if p.ndim > 2]
        assert [n for n, p in weights if p.grad is not None and not p.grad.any()] == []


def attention_oracle(block: WindowBlock, x: Tensor, side: int, shift: int) -> Tensor:
    """Cell by cell: who shares a window after the shift and was a neighbour before it."""
    D, H, W, C = x.shape
    attn, heads = block.attn, block.attn.heads
    padded = [-(-n // side) * side for n in (D, H, W)]
    rows: dict[tuple[int, ...], Tensor] = {}
    cells = [
        (d, h, w) for d in range(padded[0]) for h in range(padded[1]) for w in range(padded[2])
    ]
    for cell in cells:
        inside = cell[0] < D and cell[1] < H and cell[2] < W
        rows[cell] = attn.qkv(x[cell] if inside else torch.zeros(C))
    out = torch.zeros_like(x)
    table = attn.relative_position_bias_table
    for cell in cells:
        if not (cell[0] < D and cell[1] < H and cell[2] < W):
            continue
        moved = [(c - shift) % n for c, n in zip(cell, padded, strict=True)]
        scores, values = [], []
        for other in cells:
            place = [(c - shift) % n for c, n in zip(other, padded, strict=True)]
            if any(a // side != b // side for a, b in zip(moved, place, strict=True)):
                continue
            # The roll carried the first `shift` cells of an axis behind the last ones.
            wrapped = any((a < shift) != (b < shift) for a, b in zip(cell, other, strict=True))
            offset = [a - b + block.window - 1 for a, b in zip(moved, place, strict=True)]
            index = offset[0] * (3 * block.window - 1) + offset[1] * (2 * block.window - 1)
            q = rows[cell][:C].view(heads, -1)
            k, v = rows[other][C : 2 * C].view(heads, -1), rows[other][2 * C :].view(heads, -1)
            score = (q * k).sum(1) / k.shape[1] ** 0.5 + table[index + offset[2]]
            apart = wrapped and any(
                m // side == n // side - 1 for m, n in zip(moved, padded, strict=True)
            )
            scores.append(score - 100.0 * apart)
            values.append(v)
        weight = torch.stack(scores).softmax(0)  # [cells, heads]
        out[cell] = attn.proj((weight[..., None] * torch.stack(values)).sum(0).flatten())
    return out


@pytest.mark.parametrize(
    ("grid", "side", "shift"),
    [((3, 5, 4), 2, 1), ((2, 3, 4), 2, 0), ((4, 3, 5), 2, 1)],
    ids=["shifted, padded", "too small to shift", "another order"],
)
def test_window_attention_equals_a_slow_oracle(
    grid: tuple[int, int, int], side: int, shift: int
) -> None:
    torch.manual_seed(SEED)
    block = WindowBlock(4, 2, 2, True, 0.0, 0.0)
    nn.init.normal_(block.attn.relative_position_bias_table)
    nn.init.normal_(block.attn.qkv.bias)
    x = torch.randn(1, *grid, 4)
    with torch.no_grad():
        assert torch.allclose(
            block._attend(x)[0], attention_oracle(block, x[0], side, shift), atol=1e-5
        )


def test_a_small_map_shrinks_the_window() -> None:
    """Windows of 2 out of a table for 4 use the entries of the same offsets."""
    small_window, large = (
        _relative_positions(2, 4, torch.device("cpu")),
        _relative_positions(4, 4, torch.device("cpu")),
    )
    corner = [0, 1, 4, 5, 16, 17, 20, 21]
    assert torch.equal(small_window, large[corner][:, corner])


def test_a_crop_that_does_not_fit_is_explained() -> None:
    with pytest.raises(ValueError, match=r"\[32, 40, 64\].*for example \[32, 32, 64\]"):
        small()(torch.zeros(1, 1, 32, 40, 64))
    with pytest.raises(ValueError, match="single cell"):
        small().grids((16, 16, 16))
    with pytest.raises(ValueError, match="heads=3"):
        small(heads=(3, 2, 2))


def test_position_tables_do_not_decay() -> None:
    model = nn.ModuleDict({"encoder": small(), "decoder": small().own_decoder(2)})
    spared = parameter_groups(model, 0.1)[1]["params"]
    tables = [p for n, p in model.named_parameters() if "relative_position" in n]
    assert len(tables) == 2 * 3 + 2 * 2
    assert {id(p) for p in tables} <= {id(p) for p in spared}  # type: ignore[attr-defined]


def statistics(module: nn.Module) -> dict[str, Tensor]:
    return {n: b.clone() for n, b in module.named_buffers()}


@pytest.mark.parametrize("enable", [False, True])
def test_checkpointing_changes_neither_gradients_nor_statistics(enable: bool) -> None:
    plain, other = small(), small()
    other.set_grad_checkpointing(enable)
    image = torch.randn(2, 1, *SHAPE)
    for encoder in (plain, other):
        sum(m.square().mean() for m in encoder(image)).backward()
    for one, two in zip(plain.parameters(), other.parameters(), strict=True):
        assert one.grad is not None and two.grad is not None
        assert torch.equal(one.grad, two.grad)
    before, after = statistics(plain), statistics(other)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert {int(v) for n, v in after.items() if n.endswith("tracked")} == {1}


def test_statistics_stand_still_only_within_the_guard() -> None:
    encoder, image = small(), torch.randn(2, 1, *SHAPE)
    before = statistics(encoder)
    with _without_statistics(encoder):
        encoder(image)
    assert all(torch.equal(before[n], b) for n, b in statistics(encoder).items())
    encoder(image)
    assert not all(torch.equal(before[n], b) for n, b in statistics(encoder).items())


def test_in_eval_a_sample_does_not_depend_on_its_batch() -> None:
    encoder = small()
    encoder(torch.randn(2, 1, *SHAPE))
    encoder.eval()
    images = torch.randn(3, 1, *SHAPE)
    for many, one in zip(encoder(images), encoder(images[1:2]), strict=True):
        assert torch.allclose(many[1:2], one, atol=1e-5)


def network(encoder: PCTNetEncoder) -> Callable[[Tensor], list[Tensor]]:
    decoder = encoder.own_decoder(3)

    def run(image: Tensor) -> list[Tensor]:
        return decoder.outputs(image, encoder(image))

    return run


def test_it_compiles_without_a_break() -> None:
    run, image = network(small()), torch.randn(1, 1, *SHAPE)
    traced = torch.compile(run, backend="eager", fullgraph=True)
    for found, expected in zip(traced(image), run(image), strict=True):
        assert torch.equal(found, expected)


def test_it_runs_without_values_and_in_bf16() -> None:
    with torch.device("meta"):
        outputs = network(small())(torch.zeros(1, 1, *SHAPE))
    assert outputs[0].shape == (1, 3, *SHAPE)
    run, image = network(small()), torch.randn(1, 1, *SHAPE)
    full = run(image)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = run(image)[0]
    assert (low.float() - full).abs().max() < 0.1 * full.abs().max()
