from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from seeds import SEED

from data_prep.errors import InputError
from pretrain.backbones.resenc import ResEncUNetEncoder
from pretrain.backbones.vit import ViT3D, sincos_position
from pretrain.masking import random_hidden
from pretrain.objective import Batch
from pretrain.objectives.mae import MAE

PATCH, GRID, SHAPE = (2, 4, 3), (2, 3, 4), (4, 12, 12)
MakeBatch = Callable[..., Batch]


def objective(prefix: dict | None = None, **changes: object) -> MAE:
    torch.manual_seed(SEED)
    encoder = ViT3D(patch_size=PATCH, embed_dim=24, depth=2, num_heads=2, **(prefix or {}))
    args: dict = {"decoder_dim": 18, "decoder_depth": 1, "decoder_heads": 3}
    return MAE(encoder=encoder, **(args | changes))


@pytest.mark.parametrize(
    ("prefix", "first"),
    [({}, 0), ({"cls_token": True}, 1), ({"cls_token": True, "register_tokens": 3}, 4)],
)
def test_prediction_equals_the_unshuffling_decoder_of_the_paper(
    make_batch: MakeBatch, prefix: dict, first: int
) -> None:
    batch, mae = make_batch(SHAPE), objective(prefix)
    hidden = random_hidden(batch.seeds, GRID, 0.75)
    _, prediction = mae.predict(batch)
    visible = mae.embed(mae.encoder.tokens(batch.image, hidden))
    for sample in range(2):
        x = mae.mask_token.repeat(24, 1)
        x[~hidden[sample]] = visible[sample, first:]
        x = torch.cat([visible[sample, :first], x + sincos_position(GRID, 18)])[None]
        for block in mae.blocks:
            x = block(x)
        voxels = mae.head(mae.norm(x))[0, first:]
        assert torch.allclose(voxels[hidden[sample]], prediction[sample], atol=1e-5)


def test_an_encoder_without_tokens_is_refused() -> None:
    encoder = ResEncUNetEncoder(features=(4, 8), strides=(1, 2), blocks=(1, 1))
    with pytest.raises(InputError, match="backbone=vit_s"):
        MAE(encoder=encoder)


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(InputError, match="decoder_heads=4"):
        objective(decoder_heads=4)
