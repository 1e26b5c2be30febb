from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import get_args

import pytest
import torch
from seeds import SEED
from torch import Tensor, nn
from torch.nn import functional as F

from conf.compose import settings_for
from data_prep.errors import InputError
from pretrain.arguments import check_arguments
from pretrain.backbones.resenc import ResEncUNetEncoder
from pretrain.backbones.unet import UNetEncoder
from pretrain.backbones.vit import ViT3D
from pretrain.masking import block_hidden, enlarge, patchify
from pretrain.objective import Batch
from pretrain.objectives.s3d import S3D, Densification, Densify
from pretrain.train import build_objective

SHAPE = (8, 12, 16)  # 2x3x4 blocks of 4
MakeBatch = Callable[..., Batch]
each_densification = pytest.mark.parametrize("densify", get_args(Densification))


class Shown(nn.Module):
    """A decoder that rebuilds what it was given beforehand."""

    def __init__(self, volume: Tensor) -> None:
        super().__init__()
        self.volume = nn.Parameter(volume)

    def forward(self, image: Tensor, features: list[Tensor]) -> Tensor:
        return self.volume


def objective(**changes: object) -> S3D:
    torch.manual_seed(SEED)
    encoder = ResEncUNetEncoder(features=(4, 6, 8), strides=(1, 2, 2), blocks=(1, 1, 1))
    args: dict = {"encoder": encoder, "block": 4}
    return S3D(**(args | changes))


def mask(batch: Batch) -> Tensor:
    return block_hidden(batch.seeds, SHAPE, 4, 0.75)


def test_mask_hides_the_same_number_of_whole_blocks(make_batch: MakeBatch) -> None:
    batch = make_batch(SHAPE, size=3)
    hidden, output = objective().predict(batch)
    assert output.shape == batch.image.shape
    assert torch.equal(hidden, mask(batch))
    assert (hidden.sum((1, 2, 3, 4)) == 18 * 64).all()


def test_loss_equals_a_voxelwise_oracle(make_batch: MakeBatch) -> None:
    batch, s3d = make_batch(SHAPE, channels=1), objective()
    batch.valid[0, :, :3] = False
    hidden, output = s3d.predict(batch)
    loss, parts = s3d(batch, 0.0)
    error = (output - batch.image).square()
    assert loss.item() == pytest.approx(error[hidden & batch.valid].mean().item(), rel=1e-5)
    assert parts["mse"].item() == loss.item()


def test_normalised_target_equals_a_blockwise_oracle(make_batch: MakeBatch) -> None:
    batch, s3d = make_batch(SHAPE), objective(norm_target=True)
    hidden, output = s3d.predict(batch)
    errors = []
    for image, seen, made in zip(batch.image, ~hidden, output, strict=True):
        for d in range(0, 8, 4):
            for h in range(0, 12, 4):
                for w in range(0, 16, 4):
                    at = (0, slice(d, d + 4), slice(h, h + 4), slice(w, w + 4))
                    if not seen[at].any():
                        target = (image[at] - image[at].mean()) / (image[at].var() + 1e-6).sqrt()
                        errors.append((made[at] - target).square().mean())
    assert len(errors) == 36
    assert s3d(batch, 0.0).loss.item() == pytest.approx(torch.stack(errors).mean().item(), rel=1e-4)


@pytest.mark.parametrize("norm_target", [False, True])
def test_a_prediction_equal_to_the_target_gives_0(norm_target: bool, make_batch: MakeBatch) -> None:
    """With the target made block by block from its definition, of valid voxels alone."""
    batch, s3d = make_batch(SHAPE), objective(norm_target=norm_target)
    batch.valid[:, :, :, :5] = False
    target = batch.image.clone()
    if norm_target:
        for sample, valid in zip(target, batch.valid, strict=True):
            for d, h, w in itertools.product(range(0, 8, 4), range(0, 12, 4), range(0, 16, 4)):
                at = (0, slice(d, d + 4), slice(h, h + 4), slice(w, w + 4))
                seen = sample[at][valid[at]]
                if len(seen):
                    sample[at] = (sample[at] - seen.mean()) / (seen.var() + 1e-6).sqrt()
    counted = mask(batch) & batch.valid
    s3d.decoder = Shown(torch.where(counted, target, 1e6))
    assert s3d(batch, 0.0).loss.item() == pytest.approx(0, abs=1e-10 if norm_target else 0)
    wrong = target.clone()
    wrong[tuple(counted.nonzero()[0])] += 1
    s3d.decoder = Shown(wrong)
    assert s3d(batch, 0.0).loss.item() == pytest.approx(1 / counted.sum().item(), rel=1e-4)


def test_constant_blocks_are_told_where_a_target_is_normalised(make_batch: MakeBatch) -> None:
    """The share of the hidden ones; a block of padding alone is none of them."""
    batch, s3d = make_batch(SHAPE), objective(norm_target=True)
    assert s3d(batch, 0.0).parts["constant_patches"] == 0
    batch.image[0, :, :4] = -1
    batch.valid[1, :, :, :, 12:] = False
    hidden = mask(batch)[:, 0, ::4, ::4, ::4]
    expected = hidden[0, 0].sum() / (36 - hidden[1, :, :, 3].sum())
    assert 0 < expected < 1
    assert s3d(batch, 0.0).parts["constant_patches"].item() == pytest.approx(expected.item())
    assert set(objective()(batch, 0.0).parts) == {"mse"}


def test_the_sparse_encoder_has_the_names_of_the_dense_one() -> None:
    dense = ResEncUNetEncoder(features=(4, 6, 8), strides=(1, 2, 2), blocks=(1, 1, 1))
    dense.load_state_dict(objective().encoder.state_dict(), strict=True)


@each_densification
def test_hidden_values_are_not_seen(densify: str, make_batch: MakeBatch) -> None:
    batch, s3d = make_batch(SHAPE), objective(densify=densify)
    for other in (torch.randn_like(batch.image), torch.full_like(batch.image, torch.nan)):
        ruined = replace(batch, image=torch.where(mask(batch), other, batch.image))
        assert torch.equal(s3d.predict(batch)[1], s3d.predict(ruined)[1])
    image = batch.image.clone().requires_grad_()
    s3d.predict(replace(batch, image=image))[1].square().sum().backward()
    assert image.grad is not None
    assert (image.grad[mask(batch)] == 0).all()
    assert (image.grad[~mask(batch)] != 0).any()


def test_scales_equal_a_slow_densification(make_batch: MakeBatch) -> None:
    batch, s3d = make_batch(SHAPE), objective()
    given: list[list[Tensor]] = []
    s3d.decoder.register_forward_pre_hook(lambda module, args: given.append(args[1]))
    s3d.predict(batch)
    blocks = mask(batch)[:, :, ::4, ::4, ::4]
    maps = s3d.encoder(batch.image, blocks)
    for scale, (fill, found) in enumerate(zip(s3d.densify, maps, strict=True)):
        seen = ~mask(batch)[:, :, :: 2**scale, :: 2**scale, :: 2**scale].expand_as(found)
        dense = fill.token.view(1, -1, 1, 1, 1).expand_as(found).clone()
        for b in range(len(found)):
            for c in range(found.shape[1]):
                cells = found[b, c][seen[b, c]]
                spread = (cells.var(unbiased=False) + 1e-5).sqrt()
                dense[b, c][seen[b, c]] = (cells - cells.mean()) / spread
        if scale:
            dense = F.conv3d(dense, fill.conv.weight, fill.conv.bias, padding=1)
        assert torch.allclose(given[0][scale], dense, rtol=1e-5, atol=1e-5)


def test_tokens_fill_hidden_cells_and_none_else(make_batch: MakeBatch) -> None:
    hidden = mask(make_batch(SHAPE))
    x = torch.where(hidden, 0.0, torch.randn(2, 3, *SHAPE))
    fill = Densify(3, token=True, convolve=False, project=True)
    assert fill.token is not None
    assert 0 < fill.token.abs().max() <= 0.02
    expected = torch.where(hidden, fill.token.view(1, 3, 1, 1, 1), x)
    assert torch.equal(fill(x, ~hidden), expected)
    assert torch.equal(Densify(3, token=False, convolve=False, project=True)(x, ~hidden), x)


def test_the_finest_scale_is_not_convolved_and_the_coarsest_has_no_token() -> None:
    """Cells of 8 voxels in blocks of 4: that scale hides nothing."""
    encoder = UNetEncoder(features=(4, 6, 8, 8), strides=(1, 2, 2, 2), convs=(1, 1, 1, 1))
    s3d = objective(encoder=encoder)
    assert [fill.conv is not None for fill in s3d.densify] == [False, True, True, True]
    assert [fill.token is not None for fill in s3d.densify] == [True, True, True, False]
    variants = [objective(densify=name) for name in ("token", "none")]
    assert [len(list(v.densify.parameters())) for v in variants] == [3, 0]


@pytest.mark.parametrize("norm_target", [False, True])
def test_visible_and_invalid_output_is_free(make_batch: MakeBatch, norm_target: bool) -> None:
    batch, s3d = make_batch(SHAPE), objective(norm_target=norm_target)
    batch.valid[:, :, :, :5] = False
    counted = mask(batch) & batch.valid
    s3d.decoder = Shown(torch.where(counted, batch.image, 1e6))
    loss = s3d(batch, 0.0).loss
    loss.backward()
    assert norm_target or loss == 0
    noise = torch.where(batch.valid, batch.image, 1e3)
    assert s3d(replace(batch, image=noise), 0.0).loss == loss  # nor has an invalid target a say

    s3d.decoder = Shown(torch.randn_like(batch.image))
    s3d(batch, 0.0).loss.backward()
    gradient = s3d.decoder.volume.grad
    assert gradient is not None
    assert (gradient[~counted] == 0).all()
    assert (gradient[counted] != 0).all()


@each_densification
def test_gradient_reaches_every_stage(densify: str, make_batch: MakeBatch) -> None:
    """Every parameter is reached: a distributed run would stop at one that is not."""
    for encoder in (
        ResEncUNetEncoder(features=(4, 6, 8, 8), strides=(1, 2, 2, 2), blocks=(1, 2, 1, 1)),
        UNetEncoder(features=(4, 6, 8, 8), strides=(1, 2, 2, 2), convs=(2, 1, 1, 1)),
    ):
        s3d = objective(encoder=encoder, densify=densify, convs_per_stage=2)
        s3d(make_batch((16, 24, 32)), 0.0).loss.backward()
        assert [n for n, p in s3d.named_parameters() if p.grad is None] == []
        # A bias before an instance norm is removed by it, so weights and tokens tell.
        told = [(n, p) for n, p in s3d.named_parameters() if n.endswith(("weight", "token"))]
        assert [n for n, p in told if p.grad is not None and not p.grad.any()] == []


def test_masks_and_loss_follow_the_seeds(make_batch: MakeBatch) -> None:
    batch, s3d = make_batch(SHAPE), objective()
    assert s3d(batch, 0.0).loss == s3d(batch, 0.5).loss
    assert s3d(replace(batch, seeds=batch.seeds + 1), 0.0).loss != s3d(batch, 0.0).loss


@each_densification
def test_loss_is_float32_under_autocast(densify: str, make_batch: MakeBatch) -> None:
    batch, s3d = make_batch(SHAPE), objective(densify=densify)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = s3d(batch, 0.0).loss
    assert low.dtype == torch.float32
    assert low.item() == pytest.approx(s3d(batch, 0.0).loss.item(), rel=3e-2)


@pytest.mark.parametrize("norm_target", [False, True])
def test_the_step_never_waits_for_the_device(norm_target: bool, make_batch: MakeBatch) -> None:
    """Meta tensors hold no values, so a hidden `.item()` or boolean index would raise."""
    batch, s3d = make_batch(SHAPE), objective(norm_target=norm_target).to("meta")
    meta = Batch(*(t.to("meta") for t in (batch.image, batch.valid, batch.spacing, batch.seeds)))
    s3d(meta, 0.0).loss.backward()
    assert set(s3d.preview(meta)) == {"input", "visible", "output"}


@pytest.mark.parametrize("norm_target", [False, True])
def test_the_step_compiles_without_a_break(norm_target: bool, make_batch: MakeBatch) -> None:
    batch, s3d = make_batch(SHAPE), objective(norm_target=norm_target)

    def loss(image: Tensor, valid: Tensor, seeds: Tensor) -> Tensor:
        return s3d.forward(Batch(image, valid, batch.spacing, seeds), 0.0).loss

    traced = torch.compile(loss, backend="eager", fullgraph=True)
    assert torch.equal(traced(batch.image, batch.valid, batch.seeds), s3d(batch, 0.0).loss)


def test_preview_shows_what_the_network_sees_and_rebuilds(make_batch: MakeBatch) -> None:
    batch, s3d = make_batch(SHAPE), objective()
    s3d.decoder = Shown(torch.full_like(batch.image, 7))
    preview, hidden = s3d.preview(batch), mask(batch)
    assert torch.equal(preview["input"], batch.image)
    assert torch.equal(preview["visible"].isnan(), hidden.expand_as(batch.image))
    assert torch.equal(preview["visible"].nan_to_num(0.0), batch.image * ~hidden)
    assert torch.equal(preview["output"], torch.where(hidden, 7.0, batch.image))


def test_preview_of_a_normalised_target_is_in_units_of_the_input(make_batch: MakeBatch) -> None:
    """A prediction of 0 is the mean of the true block."""
    batch, s3d = make_batch(SHAPE), objective(norm_target=True)
    s3d.decoder = Shown(torch.zeros_like(batch.image))
    means = patchify(batch.image, (4, 4, 4)).mean(-1).view(2, 1, 2, 3, 4)
    expected = torch.where(mask(batch), enlarge(means, 4), batch.image)
    assert torch.allclose(s3d.preview(batch)["output"], expected, atol=1e-6)


@pytest.mark.parametrize("block", [16, (8, 12, 16), (4, 6, 4)])
def test_blocks_that_do_not_fit_are_explained(block: object, make_batch: MakeBatch) -> None:
    s3d = objective(block=block)
    with pytest.raises(ValueError, match=r"blocks of .* voxels do not"):
        s3d((make_batch((16, 24, 24)) if block == 16 else make_batch((8, 12, 12))), 0.0)


@pytest.mark.parametrize(
    ("block", "said"),
    [
        (12, r"cells of \[8, 8, 8\].*blocks of \[16, 16, 16\]"),
        (32, r"do not divide .* for example to \[64, 64, 64\]"),
    ],
)
def test_blocks_that_do_not_fit_are_wrong_input(block: int, said: str) -> None:
    """Found before a run starts."""
    words = ["corpus=x", "run=x", "objective=s3d", "backbone=unet_small", "crop_size=[48,48,48]"]
    settings = settings_for("pretrain", [*words, f"objective.block={block}"])
    with pytest.raises(InputError, match=said):
        build_objective(settings, channels=1)


def test_blocks_may_be_anisotropic(make_batch: MakeBatch) -> None:
    encoder = ResEncUNetEncoder(features=(4, 6), strides=(1, (1, 2, 2)), blocks=(1, 1))
    s3d = objective(encoder=encoder, block=(2, 4, 8))
    assert s3d(make_batch(SHAPE), 0.0).loss.isfinite()


@pytest.mark.parametrize(("norm_target", "share"), [(False, 0.1), (True, 0.4)])
def test_one_batch_can_be_learnt(norm_target: bool, share: float, make_batch: MakeBatch) -> None:
    """A normalised target keeps the noise of every block, which takes longer."""
    s3d, batch = objective(norm_target=norm_target), make_batch(SHAPE)
    optimiser = torch.optim.AdamW(s3d.parameters(), lr=1e-2)
    losses = []
    for _ in range(100):
        loss = s3d(batch, 0.0).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < share * losses[0]


def test_an_encoder_that_cannot_leave_blocks_out_is_refused() -> None:
    with pytest.raises(InputError, match="backbone=resenc_small"):
        S3D(encoder=ViT3D(patch_size=4, embed_dim=12, depth=1, num_heads=1))
    flat = UNetEncoder(features=(4, 4), strides=(1, 1), convs=(1, 1))
    with pytest.raises(InputError, match=r"backbone\.strides"):
        S3D(encoder=flat)


def test_wrong_arguments_are_found_by_the_signature() -> None:
    wrong = {"mask_ratio": 1.0, "densify": "dense", "block": 0}
    problems = check_arguments(S3D, wrong, "objective", ("encoder",))[1]
    assert [p.split("=")[0] for p in problems] == [f"objective.{name}" for name in wrong]
