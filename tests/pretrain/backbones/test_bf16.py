"""Under bfloat16 autocast every backbone stays near float32: its features, and steps of training.

How near: bfloat16 has 8 binary digits, so one rounding is off by at most 2^-8 and by 0.2 % on
average; roundings that know nothing of each other add up as their root. 2 % are a hundred of them,
more than lie on any path through these networks, and what a release allows for bf16 (with a cosine
above 0.999). A loss is a float32 mean over thousands of voxels, whose errors have both signs: 1 %.
Measured: ViTs 0.1 to 1.0 %, U-Nets 0.5 to 1.5 %, PCT-Net 0.2 to 0.9 %; losses up to 0.5 %.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import test_pct_net
import test_resenc
import test_slice_vit
import test_stunet
import test_swin_unetr
import test_unet
import test_vit
import torch
from torch import Tensor

from pretrain.backbones.backbone import Backbone
from pretrain.backbones.convolution import Pyramid
from pretrain.backbones.vit import TokenBackbone, ViT3D
from pretrain.decoders import build_decoder, full_outputs
from pretrain.masking import random_hidden
from pretrain.objective import Batch, Objective
from pretrain.objectives.cnn_mae import CnnMAE
from pretrain.objectives.mae import MAE
from pretrain.objectives.s3d import S3D
from pretrain.objectives.volume_fusion import VolumeFusion


def vit(kind: str) -> ViT3D:
    changes = dict(test_vit.KINDS[kind])
    if "layer_scale" in changes:
        changes["layer_scale"] = 1.0  # or blocks would add next to nothing to what they are given
    return test_vit.small(**changes)


# Deepest maps of 3x2x4 cells: torch 2.14's CPU kernel for bfloat16 gives wrong weight gradients of
# 3x3x3 convolutions on maps that are two cells deep, with 16 channels or more.
ENCODERS: dict[str, tuple[Callable[[], Backbone], tuple[int, int, int]]] = {
    **{kind: (lambda kind=kind: vit(kind), (4, 12, 12)) for kind in test_vit.KINDS},
    "resenc": (test_resenc.small, (6, 8, 16)),
    "unet": (test_unet.small, (6, 8, 16)),
    "pct_net": (test_pct_net.small, (48, 32, 64)),
    # As S and B, a block a stage: with its decoder, more of them make 2 to 3 % of a random network.
    "stunet": (
        lambda: test_stunet.small(features=(8, 12, 16), blocks=(1, 1, 1)),
        (6, 8, 16),
    ),
    "swin_unetr": (test_swin_unetr.small, (32, 64, 96)),  # forward alone
    "slice_vit": (lambda: test_slice_vit.small(layer_scale=1.0), (1, 16, 24)),
}
MAE_SIZES = {"decoder_dim": 18, "decoder_depth": 1, "decoder_heads": 3}
STEPS: dict[str, tuple[str, Callable[..., Objective], dict[str, Any]]] = {
    **{kind: (kind, MAE, MAE_SIZES) for kind in test_vit.KINDS},
    "cnn_mae, resenc": ("resenc", CnnMAE, {"block": (2, 4, 4)}),
    "cnn_mae, unet": ("unet", CnnMAE, {"block": (2, 4, 4)}),
    "cnn_mae, pct_net": ("pct_net", CnnMAE, {"block": 16}),
    "s3d, resenc": ("resenc", S3D, {"block": (2, 4, 4)}),
    "s3d, unet": ("unet", S3D, {"block": (2, 4, 4)}),
    "mae, slice_vit": ("slice_vit", MAE, MAE_SIZES),
    "s3d, stunet": ("stunet", S3D, {"block": (2, 4, 4)}),
    "volume_fusion, stunet": ("stunet", VolumeFusion, {}),
    "volume_fusion, pct_net": ("pct_net", VolumeFusion, {}),
}


def made(name: str) -> tuple[Backbone, Batch]:
    """The encoder, and waves that differ in each sample and along each axis, with some noise."""
    make, shape = ENCODERS[name]
    random = torch.Generator().manual_seed(1)
    axes = torch.meshgrid(*(torch.linspace(0, 1, n) for n in shape), indexing="ij")
    waves = torch.randn(2, 1, 3, generator=random) * 6
    phase = torch.stack(axes)[None, None] * waves[..., None, None, None]
    image = phase.sum(2).sin() + 0.05 * torch.randn(2, 1, *shape, generator=random)
    valid = torch.ones(2, 1, *shape, dtype=torch.bool)
    torch.manual_seed(0)  # the bounds below are those of these weights
    return make(), Batch(image, valid, torch.ones(2, 3), torch.arange(2))


def looks(encoder: Backbone, image: Tensor) -> list[Callable[[], list[Tensor]]]:
    """All ways in which an objective or finetuning asks an encoder."""
    decoder = build_decoder(encoder, 3).train(encoder.training)
    ways: list[Callable[[], list[Tensor]]] = [
        lambda: encoder(image),
        lambda: full_outputs(decoder, image, encoder(image)),
    ]
    seeds, grid = torch.tensor([3, 4]), encoder.grids(image.shape)[-1]
    hidden = random_hidden(seeds, grid, 0.75)
    if isinstance(encoder, TokenBackbone):
        token = torch.ones(encoder.embed_dim)
        ways.append(lambda: [encoder.tokens(image, hidden, keep=6)])
        ways.append(lambda: [encoder.tokens(image, hidden, mask_token=token)])
    if isinstance(encoder, Pyramid):
        ways.append(lambda: encoder(image, hidden.view(-1, 1, *grid)))
    return ways


def low(call: Callable[[], Any]) -> Any:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return call()


@pytest.mark.parametrize("name", ENCODERS)
def test_features_follow_float32(name: str) -> None:
    """As released: batch norm has statistics of its own, here of two batches."""
    encoder, batch = made(name)
    for _ in range(2):
        encoder(batch.image)
    with torch.no_grad():
        for way in looks(encoder.eval(), batch.image):
            for found, expected in zip(low(way), way(), strict=True):
                assert found.isfinite().all()
                error = (found.float() - expected).norm() / expected.norm()
                assert 0 < error < 2e-2  # 0: autocast was not there
                cosine = torch.cosine_similarity(found.float().flatten(), expected.flatten(), dim=0)
                assert cosine > 0.999


def steps(name: str, count: int, context: Callable[[Callable[[], Any]], Any]) -> list[Tensor]:
    """Losses of the first steps of AdamW, each in the same precision."""
    encoder, make, args = STEPS[name]
    torch.manual_seed(0)
    built, batch = made(encoder)
    objective = make(encoder=built, **args)
    optimizer = torch.optim.AdamW(objective.parameters(), lr=1e-3)
    losses = []
    for _ in range(count):
        loss = context(lambda: objective(batch, 0.5).loss)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad.isfinite().all() for p in objective.parameters() if p.grad is not None)
        optimizer.step()
        losses.append(loss.detach())
    return losses


@pytest.mark.parametrize("name", STEPS)
def test_steps_follow_float32(name: str) -> None:
    """The first loss, and those after one and two steps, which come of the gradient."""
    found = steps(name, 3, low)
    expected = steps(name, 3, lambda call: call())
    assert {loss.dtype for loss in found} == {torch.float32}
    moved = (expected[0] - expected[2]).abs() / expected[0]
    assert moved > 2e-2, "the steps must change more than the tolerance allows"
    assert torch.stack(found).tolist() == pytest.approx(torch.stack(expected).tolist(), rel=1e-2)
