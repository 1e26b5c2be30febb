from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from seeds import SEED

from data_prep.errors import InputError
from pretrain.backbones.vit import ViT3D, rotary_table
from pretrain.masking import random_hidden, unpatchify
from pretrain.objective import Batch
from pretrain.objectives.mae_primus import PrimusMAE

PATCH, GRID, SHAPE = (2, 4, 4), (2, 3, 4), (4, 12, 16)
MakeBatch = Callable[..., Batch]


def objective(registers: int = 1, **changes: object) -> PrimusMAE:
    torch.manual_seed(SEED)
    encoder = ViT3D(
        patch_size=PATCH,
        embed_dim=24,
        depth=2,
        num_heads=2,
        position="learned",
        position_grid=GRID,
        rope=True,
        mlp="swiglu",
        inner_norm=True,
        layer_scale=0.1,
        norm_eps=1e-5,
        register_tokens=registers,
    )
    args: dict = {"drop_path": 0.0}
    return PrimusMAE(encoder=encoder, **(args | changes))


@pytest.mark.parametrize("registers", [1, 3])
def test_prediction_equals_a_decoder_that_sees_the_whole_grid(
    make_batch: MakeBatch, registers: int
) -> None:
    """As published: put tokens back in the grid, decode all of it, look at hidden voxels.

    On a grid of three sizes, so that no two axes can be taken for each other.
    """
    batch, model = make_batch(SHAPE), objective(registers)
    order, prediction = model.predict(batch)
    hidden = random_hidden(batch.seeds, GRID, 0.75)
    visible = model.encoder.tokens(batch.image, hidden, 6)
    table = rotary_table(GRID, 12)
    assert model.pos_embed.weight is not None
    position = model.pos_embed.weight.flatten(0, 2)
    rows = torch.zeros(2, 24, 32).scatter(1, order[:, 6:, None].expand_as(prediction), prediction)
    found = unpatchify(rows, GRID, PATCH)
    for sample in range(2):
        x = model.mask_token.repeat(24, 1)
        x[~hidden[sample]] = visible[sample, registers:]
        x = torch.cat([visible[sample, :registers], x + position])[None]
        for block in model.blocks:
            x = block(x, table)
        maps = model.norm(x)[:, registers:].transpose(1, 2).unflatten(2, GRID)
        volume = model.decoder(batch.image, [maps])[0]
        where = unpatchify(hidden[sample, None, :, None].expand(-1, -1, 32), GRID, PATCH)[0]
        assert torch.allclose(volume[where], found[sample][where], atol=1e-5)


def test_decoder_blocks_are_of_the_encoders_kind() -> None:
    model = objective(decoder_depth=3, drop_path=0.2)
    shapes = [
        {name: tuple(p.shape) for name, p in block.named_parameters()}
        for block in (model.encoder.blocks[0], *model.blocks)
    ]
    assert shapes == [shapes[0]] * 4
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in model.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2])


def test_raw_voxels_are_the_target(make_batch: MakeBatch) -> None:
    """Doubling the image doubles what has to be predicted; nothing normalises it away."""
    batch, model = make_batch(SHAPE), objective()
    with torch.no_grad():
        model.decoder.head.weight.zero_()
        model.decoder.head.bias.zero_()
    one = model(batch, 0.0).loss
    batch.image.mul_(2)
    assert model(batch, 0.0).loss.item() == pytest.approx(4 * one.item(), rel=1e-5)


def test_a_patch_that_doubling_does_not_reach_is_refused() -> None:
    encoder = ViT3D(patch_size=12, embed_dim=24, depth=1, num_heads=2)
    with pytest.raises(InputError, match=r"powers of two.*\[12, 12, 12\]; or choose objective=mae"):
        PrimusMAE(encoder=encoder)
