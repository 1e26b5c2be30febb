from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import hydra.utils
import pytest
import torch
from omegaconf import OmegaConf
from seeds import SEED
from torch import Tensor, nn

import conf
from data_prep.errors import InputError
from pretrain.backbones.resenc import ResEncUNetEncoder
from pretrain.backbones.vit import ViT3D
from pretrain.masking import block_hidden
from pretrain.objective import Batch
from pretrain.objectives.cnn_mae import CnnMAE

SHAPE = (8, 12, 16)  # 2x3x4 blocks of 4
MakeBatch = Callable[..., Batch]


class Shown(nn.Module):
    """A decoder that rebuilds what it was given beforehand."""

    def __init__(self, volume: Tensor) -> None:
        super().__init__()
        self.volume = nn.Parameter(volume)

    def forward(self, image: Tensor, features: list[Tensor]) -> Tensor:
        return self.volume


def objective(**changes: object) -> CnnMAE:
    torch.manual_seed(SEED)
    encoder = ResEncUNetEncoder(features=(4, 6, 8), strides=(1, 2, 2), blocks=(1, 1, 1))
    args: dict = {"block": 4}
    return CnnMAE(encoder=encoder, **(args | changes))


def mask(batch: Batch) -> Tensor:
    return block_hidden(batch.seeds, SHAPE, 4, 0.75)


def test_mask_hides_the_same_number_of_whole_blocks(make_batch: MakeBatch) -> None:
    batch = make_batch(SHAPE, size=3)
    hidden, output = objective().predict(batch)
    assert output.shape == batch.image.shape
    assert torch.equal(hidden, mask(batch))
    assert (hidden.sum((1, 2, 3, 4)) == 18 * 64).all()


def test_loss_equals_a_voxelwise_oracle(make_batch: MakeBatch) -> None:
    batch, cnn = make_batch(SHAPE), objective()
    batch.valid[0, :, :3] = False
    hidden, output = cnn.predict(batch)
    loss, parts = cnn(batch, 0.0)
    error = (output - batch.image).square()
    assert loss.item() == pytest.approx(error[hidden & batch.valid].mean().item(), rel=1e-5)
    assert parts["mse"].item() == loss.item()


def test_a_prediction_equal_to_the_target_gives_0(make_batch: MakeBatch) -> None:
    batch, cnn = make_batch(SHAPE), objective()
    batch.valid[:, :, :, :5] = False
    counted = mask(batch) & batch.valid
    cnn.decoder = Shown(torch.where(counted, batch.image, 1e6))
    assert cnn(batch, 0.0).loss == 0
    wrong = batch.image.clone()
    wrong[tuple(counted.nonzero()[0])] += 1
    cnn.decoder = Shown(wrong)
    assert cnn(batch, 0.0).loss.item() == pytest.approx(1 / counted.sum().item(), rel=1e-4)


def test_hidden_values_are_not_seen(make_batch: MakeBatch) -> None:
    batch, cnn = make_batch(SHAPE), objective()
    ruined = replace(batch, image=batch.image.masked_fill(mask(batch), float("nan")))
    assert torch.equal(cnn.predict(batch)[1], cnn.predict(ruined)[1])
    image = batch.image.clone().requires_grad_()
    cnn.predict(replace(batch, image=image))[1].square().sum().backward()
    assert image.grad is not None
    assert (image.grad[mask(batch)] == 0).all()
    assert (image.grad[~mask(batch)] != 0).any()


def test_visible_and_invalid_output_is_free(make_batch: MakeBatch) -> None:
    batch, cnn = make_batch(SHAPE), objective()
    batch.valid[:, :, :, :5] = False
    counted = mask(batch) & batch.valid
    cnn.decoder = Shown(torch.where(counted, batch.image, 1e6))
    loss = cnn(batch, 0.0).loss
    loss.backward()
    assert loss == 0

    cnn.decoder = Shown(torch.randn_like(batch.image))
    cnn(batch, 0.0).loss.backward()
    gradient = cnn.decoder.volume.grad
    assert gradient is not None
    assert (gradient[~counted] == 0).all()
    assert (gradient[counted] != 0).all()


def test_the_error_of_visible_voxels_does_not_count(make_batch: MakeBatch) -> None:
    batch, cnn = make_batch(SHAPE), objective()
    error, losses = torch.randn_like(batch.image), []
    for scale in (1, 1000):
        wrong = torch.where(mask(batch), error, scale * error)
        cnn.decoder = Shown(batch.image + wrong)
        losses.append(cnn(batch, 0.0).loss.item())
    assert losses[0] == losses[1]
    assert losses[0] == pytest.approx(error[mask(batch)].square().mean().item(), rel=1e-4)


def test_the_mean_is_over_the_batch_not_over_samples(make_batch: MakeBatch) -> None:
    """The first sample counts a single voxel, with an error of 10; the second all, with 1."""
    batch, cnn = make_batch(SHAPE), objective()
    at = tuple(mask(batch)[0, 0].nonzero()[0])
    batch.valid[0] = False
    batch.valid[0, 0][at] = True
    error = torch.ones_like(batch.image)
    error[0] = 10
    cnn.decoder = Shown(batch.image + error)
    count = 18 * 64
    expected = (100 + count) / (1 + count)
    assert cnn(batch, 0.0).loss.item() == pytest.approx(expected, rel=1e-4)


def test_the_defaults_are_those_of_nnssl() -> None:
    encoder = ResEncUNetEncoder(features=(4, 6, 8), strides=(1, 2, 2), blocks=(1, 1, 1))
    config = OmegaConf.load(Path(conf.__file__).parent / "objective" / "cnn_mae.yaml")
    for cnn in (CnnMAE(encoder=encoder), hydra.utils.instantiate(config, encoder=encoder)):
        assert (cnn.block, cnn.mask_ratio) == (16, 0.75)
        assert [len(stage.convs) for stage in cnn.decoder.stages] == [1, 1]


def test_gradient_reaches_every_stage(make_batch: MakeBatch) -> None:
    cnn = objective(convs_per_stage=2)
    cnn(make_batch(SHAPE), 0.0).loss.backward()
    assert [n for n, p in cnn.named_parameters() if p.grad is None] == []
    # A bias before an instance norm is removed by it, so weights tell.
    weights = [(n, p) for n, p in cnn.named_parameters() if n.endswith("weight")]
    assert [n for n, p in weights if p.grad is not None and not p.grad.any()] == []


def test_masks_and_loss_follow_the_seeds(make_batch: MakeBatch) -> None:
    batch, cnn = make_batch(SHAPE), objective()
    assert cnn(batch, 0.0).loss == cnn(batch, 0.5).loss
    assert cnn(replace(batch, seeds=batch.seeds + 1), 0.0).loss != cnn(batch, 0.0).loss


def test_loss_is_float32_under_autocast(make_batch: MakeBatch) -> None:
    batch, cnn = make_batch(SHAPE), objective()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = cnn(batch, 0.0).loss
    assert low.dtype == torch.float32
    assert low.item() == pytest.approx(cnn(batch, 0.0).loss.item(), rel=3e-2)


def test_the_step_never_waits_for_the_device(make_batch: MakeBatch) -> None:
    """Meta tensors hold no values, so a hidden `.item()` or boolean index would raise."""
    batch, cnn = make_batch(SHAPE), objective().to("meta")
    meta = Batch(*(t.to("meta") for t in (batch.image, batch.valid, batch.spacing, batch.seeds)))
    cnn(meta, 0.0).loss.backward()
    assert set(cnn.preview(meta)) == {"input", "visible", "output"}


def test_the_step_compiles_without_a_break(make_batch: MakeBatch) -> None:
    batch, cnn = make_batch(SHAPE), objective()

    def loss(image: Tensor, valid: Tensor, seeds: Tensor) -> Tensor:
        return cnn.forward(Batch(image, valid, batch.spacing, seeds), 0.0).loss

    traced = torch.compile(loss, backend="eager", fullgraph=True)
    assert torch.equal(traced(batch.image, batch.valid, batch.seeds), cnn(batch, 0.0).loss)


def test_preview_shows_what_the_network_sees_and_rebuilds(make_batch: MakeBatch) -> None:
    batch, cnn = make_batch(SHAPE), objective()
    cnn.decoder = Shown(torch.full_like(batch.image, 7))
    preview, hidden = cnn.preview(batch), mask(batch)
    assert torch.equal(preview["input"], batch.image)
    assert torch.equal(preview["visible"].isnan(), hidden.expand_as(batch.image))
    assert torch.equal(preview["visible"].nan_to_num(0.0), batch.image * ~hidden)
    assert torch.equal(preview["output"], torch.where(hidden, 7.0, batch.image))


def test_blocks_may_be_anisotropic_and_need_not_divide_the_crop(make_batch: MakeBatch) -> None:
    cnn = objective(block=(3, 5, 4))
    assert cnn(make_batch(SHAPE), 0.0).loss.isfinite()


def test_one_batch_can_be_learnt(make_batch: MakeBatch) -> None:
    cnn, batch = objective(), make_batch(SHAPE)
    optimiser = torch.optim.AdamW(cnn.parameters(), lr=1e-2)
    losses = []
    for _ in range(80):
        loss = cnn(batch, 0.0).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


def test_an_encoder_without_a_pyramid_is_refused() -> None:
    with pytest.raises(InputError, match="backbone=resenc_small"):
        CnnMAE(encoder=ViT3D(patch_size=4, embed_dim=12, depth=1, num_heads=1))
