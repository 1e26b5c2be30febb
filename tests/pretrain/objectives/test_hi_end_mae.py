from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from seeds import SEED
from torch import Tensor, nn

from data_prep.errors import InputError
from pretrain.backbones import vit
from pretrain.backbones.resenc import ResEncUNetEncoder
from pretrain.backbones.vit import ViT3D, sincos_position
from pretrain.masking import patchify, random_hidden, take_rows, visible_first
from pretrain.objective import Batch
from pretrain.objectives import masked_patches
from pretrain.objectives.hi_end_mae import CrossAttention, CrossBlock, HiEndMAE

PATCH, GRID, SHAPE = (2, 4, 3), (2, 3, 4), (4, 12, 12)
MakeBatch = Callable[..., Batch]


def objective(depth: int = 12, registers: int = 0, **changes: object) -> HiEndMAE:
    torch.manual_seed(SEED)
    sizes: dict = {"embed_dim": 24, "depth": depth, "num_heads": 2, "register_tokens": registers}
    encoder = ViT3D(patch_size=PATCH, cls_token=True, **sizes)
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


@pytest.mark.parametrize("registers", [0, 3])
def test_only_the_normed_end_gets_mask_tokens_and_positions(
    make_batch: MakeBatch, registers: int
) -> None:
    model, batch, first_patch = objective(registers=registers), make_batch(SHAPE), 1 + registers
    seen = first_patch + 6
    first = watched(model.blocks[0])
    order, _ = model.predict(batch)
    hidden = random_hidden(batch.seeds, GRID, 0.75)
    end = model.embed(model.encoder.tokens(batch.image, hidden, 6))
    position = sincos_position(GRID, 18)[order]
    x = first[0][0]
    assert torch.equal(x[:, :first_patch], end[:, :first_patch])
    assert torch.allclose(x[:, first_patch:seen], end[:, first_patch:] + position[:, :6])
    assert torch.allclose(x[:, seen:], model.mask_token + position[:, 6:])
    order, prediction = model.predict(batch)
    decoded = model.decode(batch.image, hidden, order, 6)
    assert torch.equal(prediction, model.head(decoded[:, seen:]))


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
    torch.manual_seed(SEED)
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


@pytest.mark.parametrize("turned", ["visible", "hidden", "both"])
def test_the_order_of_patches_does_not_matter(
    make_batch: MakeBatch, monkeypatch: pytest.MonkeyPatch, turned: str
) -> None:
    """Tokens permuted with their positions: permuted predictions, and the same loss.

    The order that encoder and objective work in is turned for both, visible and hidden ones apart.
    """
    model, batch = objective(), make_batch(SHAPE)
    order, one = model.predict(batch)
    loss = model(batch, 0.0).loss

    def other_order(hidden: Tensor) -> Tensor:
        visible, rest = visible_first(hidden).split([6, 18], dim=1)
        visible = visible if turned == "hidden" else visible.roll(2, 1)
        return torch.cat([visible, rest if turned == "visible" else rest.flip(1)], dim=1)

    monkeypatch.setattr(vit, "visible_first", other_order)
    first = watched(model.encoder.blocks[0])
    if turned != "hidden":  # the encoder alone in another order: positions no longer fit
        assert (model.predict(batch)[1] - one).abs().max() > 1e-3
    monkeypatch.setattr(masked_patches, "visible_first", other_order)
    new, other = model.predict(batch)
    assert not torch.equal(new, order)
    expected = one if turned == "visible" else one.flip(1)
    assert torch.allclose(other, expected, atol=1e-5)
    assert model(batch, 0.0).loss.item() == pytest.approx(loss.item(), rel=1e-5)
    tokens = first[-1][0][:, 1:]
    plain = model.encoder.patch_embed(patchify(batch.image, PATCH))
    plain = plain + sincos_position(GRID, 24)
    assert torch.allclose(tokens, take_rows(plain, new[:, :6]), atol=1e-5)


def test_what_the_decoder_makes_of_visible_patches_does_not_count(make_batch: MakeBatch) -> None:
    model, batch = objective(), make_batch(SHAPE)
    loss = model(batch, 0.0).loss
    noise = torch.randn(2, 1 + 24, 18)
    for part, same in ((slice(0, 1 + 6), True), (slice(1 + 6, None), False)):

        def disturb(module: nn.Module, given: tuple, tokens: Tensor, part: slice = part) -> Tensor:
            changed = tokens.clone()
            changed[:, part] += noise[:, part]
            return changed

        handle = model.norm.register_forward_hook(disturb)
        assert torch.equal(model(batch, 0.0).loss, loss) is same
        handle.remove()


def test_a_cross_block_asks_its_own_tokens_and_a_memory_without_norm_or_order() -> None:
    torch.manual_seed(SEED)
    block = CrossBlock(12, 3)
    x, memory = torch.randn(2, 5, 12), torch.randn(2, 4, 12)
    plain = block(x, memory)
    moved = x.clone()
    moved[:, 0] += torch.randn(12)
    # Tokens that did not change hear of the one that did: attention among themselves.
    assert (block(moved, memory)[:, 1:] - plain[:, 1:]).abs().amax(-1).min() > 1e-4
    assert torch.allclose(block(x, memory.flip(1)), plain, atol=1e-6)
    assert (block(x, 3 * memory) - plain).abs().amax(-1).min() > 1e-3


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
