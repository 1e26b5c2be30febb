"""What every masked autoencoder of a ViT promises, whatever its decoder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from seeds import SEED
from torch import Tensor

from pretrain.backbones.vit import ViT3D
from pretrain.masking import kept, patchify, random_hidden, spread, visible_first
from pretrain.objective import Batch
from pretrain.objectives.hi_end_mae import HiEndMAE
from pretrain.objectives.mae import MAE
from pretrain.objectives.mae_primus import PrimusMAE
from pretrain.objectives.masked_patches import (
    MaskedPatches,
    denormalise,
    normalise,
    patch_statistics,
)

PATCH, GRID, SHAPE, VALUES = (2, 4, 4), (2, 3, 4), (4, 12, 16), 32
MakeBatch = Callable[..., Batch]


class FixedSight(ViT3D):
    """Encodes a remembered image, if there is one, so that a test can change the target alone."""

    image: Tensor | None = None

    def encode(self, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, list[Tensor]]:
        return super().encode(x if self.image is None else self.image, *args, **kwargs)


PRIMUS: dict[str, Any] = {
    "position": "learned",
    "position_grid": (3, 2, 2),
    "rope": True,
    "mlp": "swiglu",
    "inner_norm": True,
    "layer_scale": 0.1,
    "norm_eps": 1e-5,
}
MAE_SIZES = {"decoder_dim": 18, "decoder_depth": 1, "decoder_heads": 3}
KINDS: dict[str, tuple[type[MaskedPatches], dict[str, Any], dict[str, Any]]] = {
    "mae": (MAE, {"cls_token": True}, MAE_SIZES),
    "mae of voxels": (MAE, {}, MAE_SIZES | {"norm_target": False}),
    "mae behind a stem": (MAE, {"stem": "conv"}, MAE_SIZES),
    "hi end": (HiEndMAE, {"cls_token": True}, {"decoder_dim": 18, "decoder_heads": 3}),
    "primus": (PrimusMAE, PRIMUS, {"drop_path": 0.0}),
    "normed primus": (
        PrimusMAE,
        {**PRIMUS, "register_tokens": 1},
        {"drop_path": 0.0, "norm_target": True},
    ),
}
kinds = pytest.mark.parametrize("kind", KINDS)


def objective(kind: str, in_channels: int = 1) -> MaskedPatches:
    torch.manual_seed(SEED)
    target, encoder, args = KINDS[kind]
    sizes: dict[str, Any] = {"patch_size": PATCH, "embed_dim": 24, "depth": 4, "num_heads": 2}
    return target(encoder=FixedSight(in_channels=in_channels, **sizes, **encoder), **args)


def hidden_voxels(batch: Batch) -> Tensor:
    return spread(random_hidden(batch.seeds, GRID, 0.75), GRID, PATCH)


@kinds
@pytest.mark.parametrize("channels", [1, 2])
def test_loss_equals_a_voxelwise_oracle(make_batch: MakeBatch, kind: str, channels: int) -> None:
    """Patch by patch in loops, with what a decoder gave for each."""
    batch, model = make_batch(SHAPE, channels=channels), objective(kind, channels)
    loss, parts = model(batch, 0.0)
    order, prediction = model.predict(batch)
    hidden = hidden_voxels(batch)
    total = 0.0
    for sample in range(2):
        for n, row in zip(order[sample, 6:].tolist(), prediction[sample], strict=True):
            d, h, w = n // 12, n // 4 % 3, n % 4
            place = (..., slice(2 * d, 2 * d + 2), slice(4 * h, 4 * h + 4), slice(4 * w, 4 * w + 4))
            assert hidden[sample][place].all()
            target = batch.image[sample][place].flatten()
            if model.norm_target:
                variance = target.var(unbiased=not isinstance(model, HiEndMAE))
                target = (target - target.mean()) / (variance + 1e-6).sqrt()
            total += (row - target).square().mean().item()
    assert loss.item() == pytest.approx(total / 36, rel=1e-5)
    assert parts["mse"].item() == loss.item()
    assert not parts["mse"].requires_grad


def plain_target(batch: Batch, model: MaskedPatches, order: Tensor) -> tuple[Tensor, Tensor]:
    """Target and valid voxels of the hidden patches, each cut out and normalised by itself."""
    targets, valids = [], []
    for image, valid, rows in zip(batch.image, batch.valid, order[:, 6:].tolist(), strict=True):
        for n in rows:
            d, h, w = n // 12, n // 4 % 3, n % 4
            place = (0, slice(2 * d, 2 * d + 2), slice(4 * h, 4 * h + 4), slice(4 * w, 4 * w + 4))
            target, counts = image[place].flatten(), valid[place].flatten()
            if model.norm_target and counts.sum() > 1:
                seen = target[counts]
                variance = seen.var(unbiased=not isinstance(model, HiEndMAE))
                target = (target - seen.mean()) / (variance + 1e-6).sqrt()
            elif model.norm_target:
                target = torch.zeros_like(target)
            targets.append(target)
            valids.append(counts)
    shape = (len(order), 18, VALUES)
    return torch.stack(targets).view(shape), torch.stack(valids).view(shape)


@kinds
def test_a_prediction_equal_to_the_target_gives_0(make_batch: MakeBatch, kind: str) -> None:
    """A normalised target to rounding, a raw one exactly; invalid voxels may be anything."""
    batch, model = make_batch(SHAPE), objective(kind)
    batch.valid[:, :, :, :5] = False
    order, _ = model.predict(batch)
    target, valid = plain_target(batch, model, order)
    model.rebuild = lambda *_: torch.where(valid, target, 1e6)  # type: ignore[method-assign]
    assert model(batch, 0.0).loss.item() == pytest.approx(0, abs=1e-10 * model.norm_target)
    wrong = target.clone()
    wrong[tuple(valid.nonzero()[0])] += 1
    model.rebuild = lambda *_: wrong  # type: ignore[method-assign]
    assert model(batch, 0.0).loss.item() == pytest.approx(1 / valid.sum().item(), rel=1e-4)


@kinds
def test_the_mean_is_over_the_batch_not_over_samples(make_batch: MakeBatch, kind: str) -> None:
    """The first sample counts one hidden voxel, with an error of 10; the second all, with 1."""
    batch, model = make_batch(SHAPE), objective(kind)
    at = tuple(hidden_voxels(batch)[0, 0].nonzero()[0])
    batch.valid[0] = False
    batch.valid[0, 0][at] = True
    order, _ = model.predict(batch)
    target, valid = plain_target(batch, model, order)
    assert valid.sum((1, 2)).tolist() == [1, 18 * VALUES]
    error = torch.tensor([10.0, 1.0])[:, None, None]
    model.rebuild = lambda *_: target + error  # type: ignore[method-assign]
    expected = (100 + 18 * VALUES) / (1 + 18 * VALUES)
    assert model(batch, 0.0).loss.item() == pytest.approx(expected, rel=1e-4)


@kinds
def test_order_holds_visible_patches_then_hidden_ones(make_batch: MakeBatch, kind: str) -> None:
    batch = make_batch(SHAPE, size=3)
    order, prediction = objective(kind).predict(batch)
    hidden = random_hidden(batch.seeds, GRID, 0.75)
    assert kept(24, 0.75) == 6
    assert prediction.shape == (3, 18, VALUES)
    assert torch.equal(order.sort(1).values, torch.arange(24).expand(3, -1))
    assert not hidden.gather(1, order[:, :6]).any()
    assert hidden.gather(1, order[:, 6:]).all()


@kinds
def test_a_hidden_patch_has_its_own_place(make_batch: MakeBatch, kind: str) -> None:
    """With the mask shifted by a cell of w, the prediction for a cell is another one."""
    batch, model = make_batch(SHAPE, size=1), objective(kind).eval()
    hidden = random_hidden(batch.seeds, GRID, 0.75)
    order = visible_first(hidden)
    with torch.no_grad():
        rows = model.rebuild(batch.image, hidden, order, 6)
        turned = torch.cat([order[:, :6], order[:, 6:].roll(1, 1)], dim=1)
        again = model.rebuild(batch.image, hidden, turned, 6)
    assert torch.allclose(again, rows.roll(1, 1), atol=1e-5)
    assert (rows - rows.roll(1, 1)).abs().amax(-1).min() > 1e-6


@kinds
def test_hidden_voxels_are_never_read(make_batch: MakeBatch, kind: str) -> None:
    batch, model = make_batch(SHAPE), objective(kind)
    ruined = replace(batch, image=batch.image.masked_fill(hidden_voxels(batch), torch.nan))
    assert torch.equal(model.predict(batch)[1], model.predict(ruined)[1])


@kinds
def test_only_hidden_targets_count(make_batch: MakeBatch, kind: str) -> None:
    batch, model = make_batch(SHAPE), objective(kind)
    assert isinstance(model.encoder, FixedSight)
    model.encoder.image = batch.image
    loss, hidden = model(batch, 0.0).loss, hidden_voxels(batch)
    noise = torch.randn_like(batch.image)
    seen = replace(batch, image=torch.where(hidden, batch.image, noise))
    rebuilt = replace(batch, image=torch.where(hidden, noise, batch.image))
    assert model(seen, 0.0).loss == loss
    assert model(rebuilt, 0.0).loss != loss


@kinds
def test_invalid_voxels_carry_no_loss(make_batch: MakeBatch, kind: str) -> None:
    batch, model = make_batch(SHAPE), objective(kind)
    batch.valid[:, :, :, :5] = False
    assert isinstance(model.encoder, FixedSight)
    model.encoder.image = batch.image
    loss = model(batch, 0.0).loss
    noise = torch.randn_like(batch.image)
    changed = replace(batch, image=torch.where(batch.valid, batch.image, noise))
    assert model(changed, 0.0).loss == loss
    # And no gradient: what the objective's own loss asks of its prediction.
    kept: list[Tensor] = []
    rebuild = model.rebuild

    def keep(*args: Any) -> Tensor:
        kept.append(rebuild(*args))
        kept[-1].retain_grad()
        return kept[-1]

    model.rebuild = keep  # type: ignore[method-assign]
    model(batch, 0.0).loss.backward()
    (prediction,) = kept
    order, _ = model.predict(batch)
    valid = patchify(batch.valid, PATCH).take_along_dim(order[:, 6:, None], 1)
    assert prediction.grad is not None
    assert (prediction.grad[~valid] == 0).all()
    assert (prediction.grad[valid] != 0).all()


@kinds
def test_a_batch_without_valid_voxels_has_zero_loss_and_gradient(
    make_batch: MakeBatch, kind: str
) -> None:
    batch, model = make_batch(SHAPE), objective(kind)
    batch.valid[:] = False
    loss = model(batch, 0.0).loss
    loss.backward()
    assert loss == 0
    assert all((p.grad == 0).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("unbiased", [True, False])
def test_patch_statistics_equal_torch_without_invalid_voxels(unbiased: bool) -> None:
    x, valid = torch.randn(3, 7, 24), torch.rand(3, 7, 24) > 0.4
    found = patch_statistics(x, valid, unbiased)
    for i in range(3):
        for j in range(7):
            chosen = x[i, j][valid[i, j]]
            assert found.mean[i, j, 0].item() == pytest.approx(chosen.mean().item(), abs=1e-6)
            expected = chosen.var(unbiased=unbiased).item()
            assert found.variance[i, j, 0].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("unbiased", [True, False])
def test_normalised_patches_have_mean_0_and_variance_1(unbiased: bool) -> None:
    x = torch.randn(4, 6, 24) * 30 + 100
    statistics = patch_statistics(x, torch.ones_like(x, dtype=torch.bool), unbiased)
    target = normalise(x, statistics)
    assert target.mean(-1).abs().max() < 1e-5
    assert torch.allclose(target.var(-1, unbiased=unbiased), torch.ones(4, 6), atol=1e-5)
    assert torch.allclose(denormalise(target, statistics), x, atol=1e-3)


@kinds
def test_a_constant_patch_is_a_finite_zero(make_batch: MakeBatch, kind: str) -> None:
    x = torch.full((1, 1, 24), -0.75)
    everything = torch.ones_like(x, dtype=torch.bool)
    assert (normalise(x, patch_statistics(x, everything)) == 0).all()
    batch, model = make_batch(SHAPE), objective(kind)
    batch.image[:] = 1
    loss, parts = model(batch, 0.0)
    loss.backward()
    assert loss.isfinite()
    assert parts["constant_patches"] == 1
    batch.image.copy_(torch.randn(batch.image.shape))
    batch.valid[0] = False  # padding is no constant patch of the scan
    assert model(batch, 0.0).parts["constant_patches"] == 0
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@kinds
def test_gradient_reaches_every_parameter(make_batch: MakeBatch, kind: str) -> None:
    model = objective(kind)
    model(make_batch(SHAPE), 0.0).loss.backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@kinds
def test_masks_and_loss_follow_the_seeds(make_batch: MakeBatch, kind: str) -> None:
    batch, model = make_batch(SHAPE), objective(kind)
    assert model(batch, 0.0).loss == model(batch, 0.5).loss
    assert model(replace(batch, seeds=batch.seeds + 1), 0.0).loss != model(batch, 0.0).loss


@kinds
def test_loss_is_float32_under_autocast(make_batch: MakeBatch, kind: str) -> None:
    batch, model = make_batch(SHAPE), objective(kind)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = model(batch, 0.0).loss
    assert low.dtype == torch.float32
    assert low.item() == pytest.approx(model(batch, 0.0).loss.item(), rel=2e-2)


@kinds
def test_the_step_never_waits_for_the_device(make_batch: MakeBatch, kind: str) -> None:
    """Meta tensors hold no values, so a hidden `.item()` or boolean index would raise."""
    batch, model = make_batch(SHAPE), objective(kind).to("meta")
    meta = Batch(*(t.to("meta") for t in (batch.image, batch.valid, batch.spacing, batch.seeds)))
    model(meta, 0.0).loss.backward()
    assert set(model.preview(meta)) == {"input", "visible", "output"}


@kinds
def test_the_step_compiles_without_a_break(make_batch: MakeBatch, kind: str) -> None:
    batch, model = make_batch(SHAPE), objective(kind)

    def loss(image: Tensor, valid: Tensor, seeds: Tensor) -> Tensor:
        return model.forward(Batch(image, valid, batch.spacing, seeds), 0.0).loss

    traced = torch.compile(loss, backend="eager", fullgraph=True)
    assert torch.equal(traced(batch.image, batch.valid, batch.seeds), model(batch, 0.0).loss)


@kinds
def test_preview_is_in_units_of_the_input(
    make_batch: MakeBatch, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    batch, model = make_batch(SHAPE), objective(kind)
    batch.image.mul_(40).add_(100)
    batch.valid[0, :, 0] = False

    def oracle(image: Tensor, hidden: Tensor, order: Tensor, keep: int) -> Tensor:
        target, valid = (
            rows.take_along_dim(order[:, keep:, None], 1) for rows in model._patches(batch)
        )
        if not model.norm_target:
            return target
        return normalise(target, patch_statistics(target, valid, model.unbiased))

    monkeypatch.setattr(model, "rebuild", oracle)
    preview, hidden = model.preview(batch), hidden_voxels(batch)
    assert torch.equal(preview["input"], batch.image)
    assert preview["visible"][hidden].isnan().all()
    assert torch.equal(preview["visible"][~hidden], batch.image[~hidden])
    assert torch.allclose(preview["output"], batch.image, rtol=1e-4)


@kinds
def test_preview_shows_the_input_where_it_was_visible(make_batch: MakeBatch, kind: str) -> None:
    batch, model = make_batch(SHAPE), objective(kind)
    preview, hidden = model.preview(batch), hidden_voxels(batch)
    assert torch.equal(preview["output"][~hidden], batch.image[~hidden])
    assert torch.equal(preview["output"], model.preview(batch)["output"])


@kinds
def test_slices_work_as_volumes_do(make_batch: MakeBatch, kind: str) -> None:
    target, encoder, args = KINDS[kind]
    sizes: dict[str, Any] = {"embed_dim": 24, "depth": 4, "num_heads": 2}
    model = target(encoder=ViT3D(patch_size=(1, 4, 4), **sizes, **encoder), **args)
    batch = make_batch((1, 16, 24))
    order, prediction = model.predict(batch)
    assert (order.shape, prediction.shape) == ((2, 24), (2, 18, 16))
    loss = model(batch, 0.0).loss
    loss.backward()
    assert loss.isfinite()
    assert model.preview(batch)["output"].shape == batch.image.shape


@pytest.mark.parametrize(
    ("kind", "lr", "steps"), [("mae", 3e-3, 120), ("hi end", 5e-4, 240), ("primus", 3e-3, 200)]
)
def test_one_batch_can_be_learnt(make_batch: MakeBatch, kind: str, lr: float, steps: int) -> None:
    torch.manual_seed(SEED)
    target, encoder, args = KINDS[kind]
    if "decoder_dim" in args:
        args = args | {"decoder_dim": 48, "decoder_heads": 4}
    vit = ViT3D(patch_size=4, embed_dim=48, depth=2, num_heads=4, **encoder)
    model, batch = target(encoder=vit, **args), make_batch((8, 12, 16))
    optimiser = torch.optim.AdamW(model.parameters(), lr=lr)
    losses = []
    for _ in range(steps):
        loss = model(batch, 0.0).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]
