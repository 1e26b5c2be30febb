from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from data_prep.errors import InputError
from pretrain.backbones.resenc import ResEncUNetEncoder
from pretrain.backbones.vit import ViT3D, sincos_position
from pretrain.masking import random_hidden, visible_first
from pretrain.objective import Batch
from pretrain.objectives.hi_end_mae import CrossAttention, HiEndMAE

PATCH, GRID, SHAPE = (2, 4, 3), (2, 3, 4), (4, 12, 12)
MakeBatch = Callable[..., Batch]


def objective(depth: int = 12, **changes: object) -> HiEndMAE:
    torch.manual_seed(0)
    encoder = ViT3D(patch_size=PATCH, embed_dim=24, depth=depth, num_heads=2, cls_token=True)
    args: dict = {"decoder_dim": 18, "decoder_heads": 3}
    return HiEndMAE(encoder=encoder, **(args | changes))


def watched(*modules: nn.Module) -> list[tuple[Tensor, ...]]:
    """Inputs of modules, in the order of their calls."""
    seen: list[tuple[Tensor, ...]] = []
    for module in modules:
        module.register_forward_pre_hook(lambda _, given: seen.append(given))
    return seen


def outputs(modules: nn.ModuleList) -> list[Tensor]:
    found: list[Tensor] = []
    for module in modules:
        module.register_forward_hook(lambda *args: found.append(args[-1]))
    return found


@pytest.mark.parametrize(("depth", "taps"), [(12, (4, 7, 10)), (24, (7, 13, 19)), (8, (3, 5, 7))])
def test_taps_are_the_first_blocks_behind_the_quarters(depth: int, taps: tuple[int, ...]) -> None:
    assert objective(depth).taps == taps


def test_cross_blocks_ask_raw_visible_tokens_deep_to_shallow(make_batch: MakeBatch) -> None:
    """Each through its own map: memories are maps of the outputs of blocks 10, 7 and 4."""
    model = objective()
    blocks = outputs(model.encoder.blocks)
    asked = watched(*model.cross_blocks)
    model.predict(make_batch(SHAPE))
    assert len(blocks) == 12
    for (x, memory), number, embed in zip(
        asked, (10, 7, 4), reversed(model.tap_embeds), strict=True
    ):
        assert x.shape == (2, 1 + 24, 18)  # CLS, visible, hidden
        assert memory.shape == (2, 1 + 6, 18)  # CLS, visible
        assert torch.equal(memory, embed(blocks[number - 1]))


def test_only_the_normed_end_gets_mask_tokens_and_positions(make_batch: MakeBatch) -> None:
    model, batch = objective(), make_batch(SHAPE)
    first = watched(model.blocks[0])
    order, _ = model.predict(batch)
    hidden = random_hidden(batch.seeds, GRID, 0.75)
    end = model.embed(model.encoder.tokens(batch.image, hidden, 6))
    position = sincos_position(GRID, 18)[order]
    x = first[0][0]
    assert torch.equal(x[:, 0], end[:, 0])
    assert torch.allclose(x[:, 1:7], end[:, 1:] + position[:, :6])
    assert torch.allclose(x[:, 7:], model.mask_token + position[:, 6:])


@pytest.mark.parametrize(("side", "patch", "visible"), [(96, 12, 128), (96, 16, 54)])
def test_token_counts_of_the_paper(side: int, patch: int, visible: int) -> None:
    with torch.device("meta"):
        encoder = ViT3D(patch_size=patch, embed_dim=24, depth=12, num_heads=2, cls_token=True)
        model = HiEndMAE(encoder=encoder, decoder_dim=18, decoder_heads=3)
        batch = Batch(
            torch.zeros(1, 1, side, side, side),
            torch.ones(1, 1, side, side, side, dtype=torch.bool),
            torch.ones(1, 3),
            torch.zeros(1, dtype=torch.int64),
        )
    asked = watched(*model.cross_blocks)
    _, prediction = model.predict(batch)
    count = (side // patch) ** 3
    assert [m.shape[1] for _, m in asked] == [visible + 1] * 3
    assert prediction.shape == (1, count - visible, patch**3)


def test_cross_attention_is_a_mean_of_values_with_weights_that_sum_to_one() -> None:
    torch.manual_seed(0)
    attention = CrossAttention(12, 3)
    x, memory = torch.randn(2, 5, 12), torch.randn(2, 4, 12)
    expected = torch.empty(2, 5, 12)
    key, value = attention.kv(memory).chunk(2, -1)
    for head in range(3):
        part = slice(4 * head, 4 * head + 4)
        weights = (attention.q(x)[..., part] @ key[..., part].mT / 2).softmax(-1)
        assert torch.allclose(weights.sum(-1), torch.ones(2, 5))
        expected[..., part] = weights @ value[..., part]
    assert torch.allclose(attention(x, memory), attention.proj(expected), atol=1e-6)


def test_the_order_of_patches_does_not_matter(make_batch: MakeBatch) -> None:
    """Visible and hidden tokens permuted with their positions give permuted predictions."""
    model, batch = objective(), make_batch(SHAPE)
    hidden = random_hidden(batch.seeds, GRID, 0.75)
    order = visible_first(hidden)
    turned = torch.cat([order[:, :6], order[:, 6:].flip(1)], dim=1)
    one = model.rebuild(batch.image, hidden, order, 6)
    other = model.rebuild(batch.image, hidden, turned, 6)
    assert torch.allclose(one, other.flip(1), atol=1e-5)


def test_gradient_reaches_every_block_and_projection(make_batch: MakeBatch) -> None:
    model = objective()
    model(make_batch(SHAPE), 0.0).loss.backward()
    for module in (*model.encoder.blocks, model.embed, *model.tap_embeds):
        assert any(p.grad is not None and p.grad.any() for p in module.parameters())


def test_wrong_sizes_are_refused_together() -> None:
    with pytest.raises(InputError) as caught:
        objective(decoder_heads=4, taps=(4, 13))
    assert "decoder_heads=4 does not divide" in str(caught.value)
    assert "taps=[4, 13]: must rise within the encoder's blocks 1..12" in str(caught.value)
    with pytest.raises(InputError, match="must rise"):
        objective(taps=(7, 4))
    encoder = ResEncUNetEncoder(features=(4, 8), strides=(1, 2), blocks=(1, 1))
    with pytest.raises(InputError, match="objective=hi_end_mae encodes tokens"):
        HiEndMAE(encoder=encoder)
