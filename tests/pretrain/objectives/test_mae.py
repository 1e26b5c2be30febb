from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from data_prep.errors import InputError
from pretrain.backbones.resenc import ResEncUNetEncoder
from pretrain.backbones.vit import ViT3D, sincos_position
from pretrain.losses import masked_mse
from pretrain.masking import kept, patchify, random_hidden, unpatchify
from pretrain.objective import Batch
from pretrain.objectives.mae import MAE
from pretrain.objectives.masked_patches import denormalise, normalise, patch_statistics

PATCH, GRID, SHAPE = (2, 4, 3), (2, 3, 4), (4, 12, 12)
MakeBatch = Callable[..., Batch]


class FixedSight(ViT3D):
    """Encodes a remembered image, so that a test can change the target alone."""

    image: Tensor

    def encode(self, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, list[Tensor]]:
        return super().encode(self.image, *args, **kwargs)


def objective(
    kind: type[ViT3D] = ViT3D, cls_token: bool = False, in_channels: int = 1, **changes: object
) -> MAE:
    torch.manual_seed(0)
    encoder = kind(
        in_channels=in_channels,
        patch_size=PATCH,
        embed_dim=24,
        depth=2,
        num_heads=2,
        cls_token=cls_token,
    )
    args: dict = {"decoder_dim": 18, "decoder_depth": 1, "decoder_heads": 3}
    return MAE(encoder=encoder, **(args | changes))


def hidden_voxels(batch: Batch) -> Tensor:
    hidden = random_hidden(batch.seeds, GRID, 0.75)
    rows = hidden[:, :, None].expand(-1, -1, 24)
    return unpatchify(rows, GRID, PATCH)


@pytest.mark.parametrize("cls_token", [False, True])
@pytest.mark.parametrize("channels", [1, 2])
def test_loss_equals_a_voxelwise_oracle(
    make_batch: MakeBatch, cls_token: bool, channels: int
) -> None:
    batch = make_batch(SHAPE, channels=channels)
    mae = objective(cls_token=cls_token, in_channels=channels, norm_target=False)
    loss, parts = mae(batch, 0.0)
    preview = mae.preview(batch)
    error = (preview["output"] - batch.image).square()
    where = hidden_voxels(batch).expand_as(error)
    assert loss.item() == pytest.approx(error[where].mean().item(), rel=1e-5)
    assert parts["mse"].item() == loss.item()
    assert not parts["mse"].requires_grad


@pytest.mark.parametrize("cls_token", [False, True])
def test_prediction_equals_the_unshuffling_decoder_of_the_paper(
    make_batch: MakeBatch, cls_token: bool
) -> None:
    batch, mae = make_batch(SHAPE), objective(cls_token=cls_token)
    hidden = random_hidden(batch.seeds, GRID, 0.75)
    _, prediction = mae.predict(batch)
    visible = mae.embed(mae.encoder.tokens(batch.image, hidden))
    for sample in range(2):
        x = mae.mask_token.repeat(24, 1)
        x[~hidden[sample]] = visible[sample, int(cls_token) :]
        x = torch.cat([visible[sample, : int(cls_token)], x + sincos_position(GRID, 18)])[None]
        for block in mae.blocks:
            x = block(x)
        voxels = mae.head(mae.norm(x))[0, int(cls_token) :]
        assert torch.allclose(voxels[hidden[sample]], prediction[sample], atol=1e-5)


def test_order_holds_visible_patches_then_hidden_ones(make_batch: MakeBatch) -> None:
    batch = make_batch(SHAPE, size=3)
    order, prediction = objective().predict(batch)
    hidden = random_hidden(batch.seeds, GRID, 0.75)
    assert kept(24, 0.75) == 6
    assert prediction.shape == (3, 18, 24)
    assert torch.equal(order.sort(1).values, torch.arange(24).expand(3, -1))
    assert not hidden.gather(1, order[:, :6]).any()
    assert hidden.gather(1, order[:, 6:]).all()


@pytest.mark.parametrize("norm_target", [False, True])
def test_only_hidden_targets_count(make_batch: MakeBatch, norm_target: bool) -> None:
    batch = make_batch(SHAPE)
    mae = objective(FixedSight, norm_target=norm_target)
    assert isinstance(mae.encoder, FixedSight)
    mae.encoder.image = batch.image
    loss, hidden = mae(batch, 0.0).loss, hidden_voxels(batch)
    noise = torch.randn_like(batch.image)
    seen = replace(batch, image=torch.where(hidden, batch.image, noise))
    rebuilt = replace(batch, image=torch.where(hidden, noise, batch.image))
    assert mae(seen, 0.0).loss == loss
    assert mae(rebuilt, 0.0).loss != loss


@pytest.mark.parametrize("norm_target", [False, True])
def test_invalid_voxels_carry_no_loss(make_batch: MakeBatch, norm_target: bool) -> None:
    batch = make_batch(SHAPE)
    batch.valid[:, :, :, :5] = False
    mae = objective(FixedSight, norm_target=norm_target)
    assert isinstance(mae.encoder, FixedSight)
    mae.encoder.image = batch.image
    loss = mae(batch, 0.0).loss
    noise = torch.randn_like(batch.image)
    assert mae(replace(batch, image=torch.where(batch.valid, batch.image, noise)), 0.0).loss == loss
    # And no gradient: what is predicted there has no say.
    order, prediction = mae.predict(batch)
    prediction = prediction.detach().requires_grad_()
    valid = patchify(batch.valid, PATCH).take_along_dim(order[:, 6:, None], 1)
    masked_mse(prediction, torch.zeros_like(prediction), valid).backward()
    assert prediction.grad is not None
    assert (prediction.grad[~valid] == 0).all()
    assert (prediction.grad[valid] != 0).all()


def test_a_batch_without_valid_voxels_has_zero_loss_and_gradient(make_batch: MakeBatch) -> None:
    batch = make_batch(SHAPE)
    batch.valid[:] = False
    mae = objective()
    loss = mae(batch, 0.0).loss
    loss.backward()
    assert loss == 0
    assert all((p.grad == 0).all() for p in mae.parameters() if p.grad is not None)


def test_perfect_prediction_has_no_loss() -> None:
    x = torch.randn(2, 5, 24)
    everything = torch.ones_like(x, dtype=torch.bool)
    assert masked_mse(x, x, everything) == 0
    assert masked_mse(x + 2, x, everything).item() == pytest.approx(4, rel=1e-6)


def test_the_error_is_summed_in_float32() -> None:
    low = torch.full((1000,), 0.5, dtype=torch.bfloat16)
    loss = masked_mse(low, torch.zeros_like(low), torch.ones_like(low, dtype=torch.bool))
    assert loss.dtype == torch.float32
    assert loss == 0.25


def test_uncounted_voxels_may_be_infinite() -> None:
    prediction = torch.tensor([1.0, float("inf"), float("nan")], requires_grad=True)
    loss = masked_mse(prediction, torch.zeros(3), torch.tensor([True, False, False]))
    loss.backward()
    assert loss == 1
    assert prediction.grad is not None
    assert prediction.grad.tolist() == [2, 0, 0]


def test_patch_statistics_equal_torch_without_invalid_voxels() -> None:
    x, valid = torch.randn(3, 7, 24), torch.rand(3, 7, 24) > 0.4
    found = patch_statistics(x, valid)
    for i in range(3):
        for j in range(7):
            chosen = x[i, j][valid[i, j]]
            assert found.mean[i, j, 0].item() == pytest.approx(chosen.mean().item(), abs=1e-6)
            assert found.variance[i, j, 0].item() == pytest.approx(chosen.var().item(), rel=1e-5)


def test_normalised_patches_have_mean_0_and_unbiased_variance_1() -> None:
    x = torch.randn(4, 6, 24) * 30 + 100
    statistics = patch_statistics(x, torch.ones_like(x, dtype=torch.bool))
    target = normalise(x, statistics)
    assert target.mean(-1).abs().max() < 1e-5
    assert torch.allclose(target.var(-1), torch.ones(4, 6), atol=1e-5)
    assert torch.allclose(denormalise(target, statistics), x, atol=1e-3)


def test_a_constant_patch_is_a_finite_zero(make_batch: MakeBatch) -> None:
    x = torch.full((1, 1, 24), -0.75)
    everything = torch.ones_like(x, dtype=torch.bool)
    assert (normalise(x, patch_statistics(x, everything)) == 0).all()
    batch = make_batch(SHAPE)
    batch.image[:] = 1
    mae = objective()
    loss, parts = mae(batch, 0.0)
    loss.backward()
    assert loss.isfinite()
    assert parts["constant_patches"] == 1
    assert all(p.grad.isfinite().all() for p in mae.parameters() if p.grad is not None)


@pytest.mark.parametrize("cls_token", [False, True])
def test_gradient_reaches_every_parameter(make_batch: MakeBatch, cls_token: bool) -> None:
    mae = objective(cls_token=cls_token)
    mae(make_batch(SHAPE), 0.0).loss.backward()
    assert [n for n, p in mae.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_masks_and_loss_follow_the_seeds(make_batch: MakeBatch) -> None:
    batch, mae = make_batch(SHAPE), objective()
    assert mae(batch, 0.0).loss == mae(batch, 0.5).loss
    assert mae(replace(batch, seeds=batch.seeds + 1), 0.0).loss != mae(batch, 0.0).loss


def test_loss_is_float32_under_autocast(make_batch: MakeBatch) -> None:
    batch, mae = make_batch(SHAPE), objective()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = mae(batch, 0.0).loss
    assert low.dtype == torch.float32
    assert low.item() == pytest.approx(mae(batch, 0.0).loss.item(), rel=2e-2)


def test_the_step_never_waits_for_the_device(make_batch: MakeBatch) -> None:
    """Meta tensors hold no values, so a hidden `.item()` or boolean index would raise."""
    batch, mae = make_batch(SHAPE), objective(cls_token=True).to("meta")
    meta = Batch(*(t.to("meta") for t in (batch.image, batch.valid, batch.spacing, batch.seeds)))
    mae(meta, 0.0).loss.backward()
    assert set(mae.preview(meta)) == {"input", "visible", "output"}


def test_the_step_compiles_without_a_break(make_batch: MakeBatch) -> None:
    batch, mae = make_batch(SHAPE), objective(cls_token=True)

    def loss(image: Tensor, valid: Tensor, seeds: Tensor) -> Tensor:
        return mae.forward(Batch(image, valid, batch.spacing, seeds), 0.0).loss

    traced = torch.compile(loss, backend="eager", fullgraph=True)
    assert torch.equal(traced(batch.image, batch.valid, batch.seeds), mae(batch, 0.0).loss)


@pytest.mark.parametrize("norm_target", [False, True])
def test_preview_is_in_units_of_the_input(make_batch: MakeBatch, norm_target: bool) -> None:
    batch = make_batch(SHAPE)
    batch.image.mul_(40).add_(100)
    batch.valid[0, :, 0] = False

    class Oracle(MAE):
        def predict(self, batch: Batch) -> tuple[Tensor, Tensor]:
            order, _ = super().predict(batch)
            target, valid = self._patches(batch)
            where = order[:, 6:, None]
            target, valid = target.take_along_dim(where, 1), valid.take_along_dim(where, 1)
            return order, normalise(target, patch_statistics(target, valid)) if norm_target else (
                target
            )

    mae = objective(norm_target=norm_target)
    mae.__class__ = Oracle
    preview, hidden = mae.preview(batch), hidden_voxels(batch)
    assert torch.equal(preview["input"], batch.image)
    assert preview["visible"][hidden].isnan().all()
    assert torch.equal(preview["visible"][~hidden], batch.image[~hidden])
    assert torch.allclose(preview["output"], batch.image, rtol=1e-4)


def test_preview_shows_the_input_where_it_was_visible(make_batch: MakeBatch) -> None:
    batch, mae = make_batch(SHAPE), objective()
    preview, hidden = mae.preview(batch), hidden_voxels(batch)
    assert torch.equal(preview["output"][~hidden], batch.image[~hidden])
    assert torch.equal(preview["output"], mae.preview(batch)["output"])


def test_one_batch_can_be_learnt(make_batch: MakeBatch) -> None:
    torch.manual_seed(0)
    encoder = ViT3D(patch_size=4, embed_dim=48, depth=2, num_heads=4)
    mae = MAE(encoder=encoder, decoder_dim=48, decoder_depth=1, decoder_heads=4)
    batch = make_batch((8, 12, 16))
    optimiser = torch.optim.AdamW(mae.parameters(), lr=3e-3)
    losses = []
    for _ in range(120):
        loss = mae(batch, 0.0).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


def test_an_encoder_without_tokens_is_refused() -> None:
    encoder = ResEncUNetEncoder(features=(4, 8), strides=(1, 2), blocks=(1, 1))
    with pytest.raises(InputError, match="backbone=vit_s"):
        MAE(encoder=encoder)


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(InputError, match="decoder_heads=4"):
        objective(decoder_heads=4)
