from __future__ import annotations

import itertools
import math

import pytest
import torch
from seeds import SEED
from torch import Tensor
from torch.nn import functional as F

from pretrain.backbones.vit import ConvStem, ViT3D, rotary_table, sincos_position
from pretrain.masking import patchify, random_hidden, spread, unpatchify
from pretrain.optim import parameter_groups


def small(**changes: object) -> ViT3D:
    torch.manual_seed(SEED)
    args: dict = {"patch_size": (2, 4, 3), "embed_dim": 24, "depth": 4, "num_heads": 2}
    return ViT3D(**(args | changes))


# Its grid is 2x3x4.
IMAGE = torch.randn(2, 1, 4, 12, 12, generator=torch.Generator().manual_seed(SEED + 1))
HIDDEN = random_hidden(torch.tensor([3, 4]), (2, 3, 4), 0.75)


# What a ViT can be made of; each is run through the same promises.
LEARNED = {"position": "learned", "position_grid": (2, 3, 4)}
KINDS: dict[str, dict] = {
    "plain": {},
    "prefix": {"cls_token": True, "register_tokens": 2},
    "learned": LEARNED,
    "rope": {"rope": True, "position": "none", "cls_token": True},
    "swiglu": {"mlp": "swiglu", "layer_scale": 1e-5},
    "stem": {"stem": "conv", "patch_size": (2, 4, 3)},
    "no bias": {"qkv_bias": False, "layer_scale": 0.1},
    "primus": {
        **LEARNED,
        "rope": True,
        "mlp": "swiglu",
        "inner_norm": True,
        "layer_scale": 0.1,
        "norm_eps": 1e-5,
        "register_tokens": 1,
    },
}
kinds = pytest.mark.parametrize("kind", KINDS)


@pytest.mark.parametrize("dim", [24, 32, 7])
def test_position_equals_a_slow_oracle(dim: int) -> None:
    grid, count = (2, 3, 4), dim // 6
    found = sincos_position(grid, dim)
    assert found.shape == (24, dim)
    for row, cell in zip(found, itertools.product(*map(range, grid)), strict=True):
        expected: list[float] = []
        for coordinate in cell:
            angles = [coordinate / 10000 ** (i / count) for i in range(count)]
            expected += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
        expected += [0.0] * (dim - 6 * count)
        assert torch.allclose(row, torch.tensor(expected), atol=1e-6)


def test_position_tells_all_cells_apart() -> None:
    distance = torch.cdist(sincos_position((4, 5, 6), 48), sincos_position((4, 5, 6), 48))
    assert (distance + torch.eye(120) * 9 > 0.1).all()


def test_position_needs_six_columns() -> None:
    with pytest.raises(ValueError, match="found 5"):
        sincos_position((1, 1, 1), 5)


def test_maps_have_the_declared_surface() -> None:
    vit = small()
    maps = vit(IMAGE)
    assert vit.in_channels == 1
    assert vit.taps == (1, 2, 3, 4)
    assert vit.channels == (24,) * 4
    assert vit.strides == ((2, 4, 3),) * 4
    assert [m.shape for m in maps] == [(2, 24, 2, 3, 4)] * 4
    assert vit.grids(IMAGE.shape) == [(2, 3, 4)] * 4


@pytest.mark.parametrize(
    ("depth", "taps"), [(12, (3, 6, 9, 12)), (8, (2, 4, 6, 8)), (2, (1, 1, 2, 2)), (1, (1,) * 4)]
)
def test_default_taps_are_quarters(depth: int, taps: tuple[int, ...]) -> None:
    assert small(depth=depth).taps == taps


def test_taps_are_block_outputs_and_the_last_one_is_normed() -> None:
    vit = small(taps=(1, 4))
    seen: list[torch.Tensor] = []
    for block in vit.blocks:
        block.register_forward_hook(lambda *args: seen.append(args[-1]))
    first, last = vit(IMAGE)
    assert torch.equal(first.flatten(2).transpose(1, 2), seen[0])
    assert torch.equal(last.flatten(2).transpose(1, 2), vit.norm(seen[3]))


@pytest.mark.parametrize("taps", [(0, 1), (2, 1), (1, 5)])
def test_taps_outside_the_blocks_are_refused(taps: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="taps"):
        small(taps=taps)


def test_embedding_is_the_convolution_it_looks_like() -> None:
    vit = small(in_channels=2)
    x = torch.randn(2, 2, 4, 12, 12)
    rows = vit.patch_embed(patchify(x, vit.patch_size))
    expected = vit.patch_embed.proj(x).flatten(2).transpose(1, 2)
    assert torch.allclose(rows, expected, atol=1e-5)


def test_tokens_of_everything_are_the_deepest_map() -> None:
    vit = small()
    assert torch.equal(vit.tokens(IMAGE), vit(IMAGE)[-1].flatten(2).transpose(1, 2))


@kinds
def test_visible_tokens_equal_a_slow_oracle(kind: str) -> None:
    """Embed everything, add positions, then drop: the order that the paper's code has."""
    vit = small(**KINDS[kind])
    found = vit.tokens(IMAGE, HIDDEN, keep=6)
    assert found.shape == (2, vit.prefix_tokens + 6, 24)
    seen = IMAGE.masked_fill(spread(HIDDEN, (2, 3, 4), vit.patch_size), 0.0)
    everything = vit.patch_embed(
        seen if isinstance(vit.patch_embed, ConvStem) else patchify(seen, vit.patch_size)
    )
    everything = everything + vit.pos_embed((2, 3, 4), IMAGE.device)
    table = rotary_table((2, 3, 4), 12)
    for sample, hidden, expected in zip(everything, HIDDEN, found, strict=True):
        prefix = [t.view(-1, 24) for t in (vit.cls_token, vit.register_tokens) if t is not None]
        x = torch.cat([*prefix, sample[~hidden]])[None]
        for block in vit.blocks:
            x = block(x, table[~hidden]) if vit.kind.rope else block(x)
        assert torch.allclose(vit.norm(x)[0], expected, atol=1e-5)


@kinds
def test_a_mask_token_stands_in_before_the_position(kind: str) -> None:
    vit = small(**KINDS[kind])
    token = torch.randn(24, generator=torch.Generator().manual_seed(SEED + 2))
    found = vit.tokens(IMAGE, HIDDEN, mask_token=token)
    assert found.shape == (2, vit.prefix_tokens + 24, 24)
    position = vit.pos_embed((2, 3, 4), IMAGE.device)
    seen: list[Tensor] = []
    vit.blocks[0].register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    vit.tokens(IMAGE, HIDDEN, mask_token=token)
    patches = seen[0][:, vit.prefix_tokens :]
    assert torch.allclose(patches[HIDDEN], (token + position).expand(2, -1, -1)[HIDDEN])
    assert not torch.isclose(patches[~HIDDEN], (token + position).expand(2, -1, -1)[~HIDDEN]).all()


def test_nothing_hidden_with_a_mask_token_is_no_mask() -> None:
    vit, none = small(), torch.zeros_like(HIDDEN)
    assert torch.equal(vit.tokens(IMAGE, none, mask_token=torch.ones(24)), vit.tokens(IMAGE))


def test_block_outputs_come_without_norm() -> None:
    vit = small(cls_token=True)
    seen: list[Tensor] = []
    for block in vit.blocks:
        block.register_forward_hook(lambda *args: seen.append(args[-1]))
    tokens, outputs = vit.encode(IMAGE, HIDDEN, 6, blocks=(1, 3, 4))
    assert [o.shape for o in outputs] == [(2, 7, 24)] * 3
    for output, number in zip(outputs, (1, 3, 4), strict=True):
        assert torch.equal(output, seen[number - 1])
    assert torch.equal(tokens, vit.norm(outputs[-1]))


def test_keep_may_be_read_from_the_mask() -> None:
    vit = small()
    assert torch.equal(vit.tokens(IMAGE, HIDDEN), vit.tokens(IMAGE, HIDDEN, keep=6))


@kinds
@pytest.mark.parametrize("masked", ["dropped", "replaced"])
def test_hidden_voxels_are_never_read(kind: str, masked: str) -> None:
    vit = small(**KINDS[kind])
    given: dict = {"keep": 6} if masked == "dropped" else {"mask_token": torch.ones(24)}
    image = IMAGE.clone().requires_grad_()
    vit.tokens(image, HIDDEN, **given).square().sum().backward()
    assert image.grad is not None
    gradient = patchify(image.grad, vit.patch_size).abs().sum(-1)
    assert (gradient[HIDDEN] == 0).all()
    assert (gradient[~HIDDEN] > 0).all()

    rows = patchify(IMAGE, vit.patch_size).masked_fill(HIDDEN[:, :, None], float("nan"))
    ruined = unpatchify(rows, (2, 3, 4), vit.patch_size)
    expected = vit.tokens(IMAGE, HIDDEN, **given)
    vit.zero_grad()
    found = vit.tokens(ruined, HIDDEN, **given)
    assert torch.equal(found, expected)
    found.square().sum().backward()
    assert all(p.grad.isfinite().all() for p in vit.parameters() if p.grad is not None)


@kinds
def test_gradient_reaches_every_parameter(kind: str) -> None:
    vit = small(**KINDS[kind])
    vit(IMAGE)[-1].square().sum().backward()
    assert [n for n, p in vit.named_parameters() if p.grad is None or not p.grad.any()] == []


@kinds
def test_checkpointing_and_compilation_change_nothing(kind: str) -> None:
    vit = small(**KINDS[kind])
    vit.tokens(IMAGE, HIDDEN, keep=6).square().sum().backward()
    expected = {n: p.grad for n, p in vit.named_parameters() if p.grad is not None}
    vit.zero_grad()
    vit.set_grad_checkpointing()
    vit.tokens(IMAGE, HIDDEN, keep=6).square().sum().backward()
    assert all(torch.equal(p.grad, expected[n]) for n, p in vit.named_parameters() if n in expected)
    vit.set_grad_checkpointing(False)
    plain = vit.tokens(IMAGE, HIDDEN, keep=6)
    for part in vit.compile_parts():
        part.compile(backend="eager", fullgraph=True)
    assert torch.equal(vit.tokens(IMAGE, HIDDEN, keep=6), plain)


@kinds
def test_slices_are_crops_of_one_voxel(kind: str) -> None:
    """With a patch of one slice, a volume's depth only adds tokens; a slice alone works too."""
    vit = small(**KINDS[kind] | {"patch_size": (1, 4, 4)}).eval()
    image = torch.randn(2, 1, 1, 8, 12)
    assert [m.shape for m in vit(image)] == [(2, 24, 1, 2, 3)] * 4
    hidden = random_hidden(torch.tensor([3, 4]), (1, 2, 3), 0.5)
    assert vit.tokens(image, hidden, keep=3).shape == (2, vit.prefix_tokens + 3, 24)
    assert vit(torch.randn(1, 1, 3, 8, 12))[-1].shape == (1, 24, 3, 2, 3)


def test_one_set_of_weights_serves_several_crops() -> None:
    vit = small()
    assert vit(torch.randn(1, 1, 8, 4, 9))[0].shape == (1, 24, 4, 1, 3)


def test_a_crop_that_does_not_fit_is_explained() -> None:
    with pytest.raises(ValueError, match=r"\[5, 12, 12\].*\[2, 4, 3\].*\[4, 12, 12\]"):
        small()(torch.zeros(1, 1, 5, 12, 12))
    with pytest.raises(ValueError, match="multiple"):
        small().grid((0, 4, 3))


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(ValueError, match="num_heads=5"):
        small(num_heads=5)


def test_no_values_are_needed_to_know_the_shapes() -> None:
    vit = small().to("meta")
    assert vit.tokens(IMAGE.to("meta"), HIDDEN.to("meta"), keep=6).shape == (2, 6, 24)
    assert vit(IMAGE.to("meta"))[0].shape == (2, 24, 2, 3, 4)


def test_drop_path_grows_with_depth_and_rests_in_eval() -> None:
    vit = small(drop_path=0.3)
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in vit.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3])
    vit.eval()
    assert torch.equal(vit(IMAGE)[-1], vit(IMAGE)[-1])


def test_drop_path_may_be_uniform() -> None:
    blocks = small(drop_path=0.3, drop_path_rule="uniform").blocks
    assert [b.drop_path2.drop_prob for b in blocks] == [0.3] * 4


def test_rotary_table_equals_a_slow_oracle() -> None:
    """Pair by pair; 16 channels turn 2 pairs per axis and leave 4 channels alone."""
    found = rotary_table((2, 3, 4), 16)
    assert found.shape == (24, 32)
    for row, cell in zip(found, itertools.product(range(2), range(3), range(4)), strict=True):
        angles = [c / 10000 ** (i / 2) for c in cell for i in range(2) for _ in "xy"] + [0.0] * 4
        expected = [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
        assert torch.allclose(row, torch.tensor(expected), atol=1e-6)


def turned(vector: Tensor, row: Tensor) -> Tensor:
    """A vector turned pair by pair, as complex numbers."""
    pairs = torch.view_as_complex(vector.view(-1, 2))
    sines, cosines = (half[::2] for half in row.chunk(2))
    return torch.view_as_real(pairs * torch.complex(cosines, sines)).flatten()


def test_turned_tokens_know_their_relative_place_alone() -> None:
    table = rotary_table((4, 5, 6), 24).view(4, 5, 6, -1)
    q, k = torch.randn(2, 24, generator=torch.Generator().manual_seed(SEED + 3))
    dots = [
        turned(q, table[d, h, w]) @ turned(k, table[d + 1, h + 2, w + 3])
        for d, h, w in [(0, 0, 0), (1, 2, 0), (2, 1, 2)]
    ]
    assert torch.allclose(torch.stack(dots), dots[0].expand(3), atol=1e-5)
    other = turned(q, table[0, 0, 0]) @ turned(k, table[2, 1, 3])
    assert (other - dots[0]).abs() > 1e-3


def test_attention_turns_patches_and_no_prefix() -> None:
    """One block by hand: scores of turned queries and keys, prefix tokens as they are."""
    vit = small(rope=True, position="none", register_tokens=2, depth=1, num_heads=1, taps=(1,))
    x = torch.randn(1, 26, 24)
    table = rotary_table((2, 3, 4), 24)
    attention = vit.blocks[0].attn
    q, k, v = attention.q_proj(x)[0], attention.k_proj(x)[0], attention.v_proj(x)[0]
    q[2:] = torch.stack([turned(a, row) for a, row in zip(q[2:].clone(), table, strict=True)])
    k[2:] = torch.stack([turned(a, row) for a, row in zip(k[2:].clone(), table, strict=True)])
    expected = attention.proj((q @ k.T / 24**0.5).softmax(-1) @ v)
    assert torch.allclose(attention(x, rope=table)[0], expected, atol=1e-5)


def test_rope_and_position_see_a_moved_patch() -> None:
    """Without any position the patches' order does not matter; each kind of it makes it matter."""
    rows = patchify(IMAGE, (2, 4, 3))
    moved = unpatchify(rows.roll(1, 1), (2, 3, 4), (2, 4, 3))
    for changes, same in [
        ({"position": "none"}, True),
        ({"position": "none", "rope": True}, False),
        ({}, False),
        (LEARNED, False),
    ]:
        vit = small(**changes)
        back = vit.tokens(moved).roll(-1, 1)
        assert torch.allclose(back, vit.tokens(IMAGE), atol=1e-5) is same, changes


def test_a_learned_position_is_interpolated_in_its_own_axes() -> None:
    position = small(**LEARNED).pos_embed
    assert position.weight is not None
    assert torch.equal(position((2, 3, 4), IMAGE.device), position.weight.flatten(0, 2))
    ramp = torch.arange(3.0)  # along h, the second axis
    with torch.no_grad():
        position.weight.copy_(ramp[None, :, None, None].expand_as(position.weight))
    finer = position((4, 6, 4), IMAGE.device).view(4, 6, 4, 24)
    expected = F.interpolate(ramp[None, None], size=6, mode="linear")[0, 0]
    assert torch.allclose(finer, expected[None, :, None, None].expand_as(finer), atol=1e-6)


def test_tokens_and_positions_do_not_decay() -> None:
    vit = small(**KINDS["primus"] | {"cls_token": True})
    spared = {id(p) for p in parameter_groups(vit, 0.1)[1]["params"]}  # type: ignore[attr-defined]
    assert vit.pos_embed.weight is not None
    for parameter in (vit.cls_token, vit.register_tokens, vit.pos_embed.weight):
        assert id(parameter) in spared


@pytest.mark.parametrize("patch", [4, 12, (2, 4, 3), (1, 16, 16), 3, 1])
def test_the_stem_reaches_any_patch(patch: int | tuple[int, int, int]) -> None:
    vit = small(patch_size=patch, stem="conv")
    shape = [2 * p for p in vit.patch_size]
    assert vit(torch.randn(1, 1, *shape))[-1].shape == (1, 24, 2, 2, 2)


def test_the_stem_lets_neighbours_in_but_never_the_whole_crop() -> None:
    vit = small(stem="conv", patch_size=4)
    image = torch.randn(1, 1, 24, 24, 24, requires_grad=True)
    vit.patch_embed(image)[0, -1].sum().backward()  # the far corner's token, whose patch is 20..23
    assert image.grad is not None
    reached = image.grad[0, 0].abs().sum((1, 2)).nonzero().min()
    assert 16 <= reached < 20


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"position": "learned"}, "needs the grid"),
        ({"position_grid": (1, 2, 3)}, "no other"),
        ({"rope": True, "num_heads": 6}, "a head has 4"),
        ({"rope": True, "embed_dim": 27, "num_heads": 3}, "a head has 9"),
    ],
)
def test_contradictions_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**changes)


def test_a_frozen_encoder_with_adapters_is_checkpointed_too() -> None:
    """It is in evaluation mode, and its activations are what takes the memory."""
    vit = small().eval().requires_grad_(False)
    vit.blocks[0].mlp.fc1.weight.requires_grad_(True)
    passes = []
    vit.blocks[1].register_forward_pre_hook(lambda *_: passes.append(1))
    vit(IMAGE)[-1].square().sum().backward()
    assert len(passes) == 1
    vit.set_grad_checkpointing()
    vit(IMAGE)[-1].square().sum().backward()
    assert len(passes) == 3  # forward, and again when the gradient needs it
