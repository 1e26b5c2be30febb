from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from seeds import SEED
from torch import Tensor, nn

from data_prep.errors import InputError
from pretrain.backbones.resenc import ResEncUNetEncoder
from pretrain.backbones.vit import ViT3D
from pretrain.masking import block_hidden, patchify
from pretrain.objective import Batch
from pretrain.objectives.simmim import SimMIM

PATCH, GRID, SHAPE = (2, 4, 4), (2, 3, 4), (4, 12, 16)
MakeBatch = Callable[..., Batch]
VARIANTS: dict[str, dict] = {
    "paper": {"block": (2, 4, 8)},
    "primus": {"block": PATCH, "mask_ratio": 0.75, "error": "mse", "head": "patch"},
}
variants = pytest.mark.parametrize("variant", VARIANTS)


def objective(variant: str = "paper", **changes: object) -> SimMIM:
    torch.manual_seed(SEED)
    encoder = ViT3D(patch_size=PATCH, embed_dim=24, depth=2, num_heads=2, cls_token=True)
    return SimMIM(encoder=encoder, **(VARIANTS[variant] | changes))


def mask(batch: Batch, variant: str = "paper") -> Tensor:
    """The mask drawn over voxels: the same blocks, found another way."""
    args = VARIANTS[variant]
    return block_hidden(batch.seeds, SHAPE, args["block"], args.get("mask_ratio", 0.6))


class Shown(nn.Module):
    """A head that gives each patch the voxels that it was given beforehand."""

    def __init__(self, volume: Tensor) -> None:
        super().__init__()
        self.rows = nn.Parameter(patchify(volume, PATCH))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.rows


@variants
def test_mask_hides_whole_blocks(make_batch: MakeBatch, variant: str) -> None:
    batch = make_batch(SHAPE, size=3)
    hidden, output = objective(variant).predict(batch)
    assert output.shape == batch.image.shape
    assert torch.equal(hidden, mask(batch, variant))
    share = {"paper": 8 / 12, "primus": 18 / 24}[variant]  # ceil(12 * 0.6) of 12 blocks
    assert (hidden.float().mean((1, 2, 3, 4)) == share).all()


def test_the_head_is_given_patches_and_no_prefix(make_batch: MakeBatch) -> None:
    batch, sizes = make_batch(SHAPE), {"embed_dim": 24, "depth": 2, "num_heads": 2}
    encoder = ViT3D(patch_size=PATCH, cls_token=True, register_tokens=3, **sizes)
    model = SimMIM(encoder=encoder, block=PATCH)
    given: list[Tensor] = []
    model.head.register_forward_pre_hook(lambda _, args: given.append(args[0]))
    hidden, _ = model.predict(batch)
    rows = patchify(hidden, PATCH)[:, :, 0]
    tokens = encoder.tokens(batch.image, rows, mask_token=model.mask_token)
    assert torch.equal(given[0], tokens[:, 4:])


@variants
def test_loss_equals_a_voxelwise_oracle(make_batch: MakeBatch, variant: str) -> None:
    batch, model = make_batch(SHAPE), objective(variant)
    batch.valid[0, :, :3] = False
    hidden, output = model.predict(batch)
    loss, parts = model(batch, 0.0)
    error = (output - batch.image)[hidden & batch.valid]
    expected = error.abs().mean() if variant == "paper" else error.square().mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert {"paper": "l1", "primus": "mse"}[variant] in parts


@variants
def test_a_prediction_equal_to_the_target_gives_0(make_batch: MakeBatch, variant: str) -> None:
    batch, model = make_batch(SHAPE), objective(variant, head="linear")
    batch.valid[:, :, :, :5] = False
    counted = mask(batch, variant) & batch.valid
    model.head = Shown(torch.where(counted, batch.image, 1e6))
    assert model(batch, 0.0).loss == 0
    wrong = batch.image.clone()
    wrong[tuple(counted.nonzero()[0])] += 1
    model.head = Shown(wrong)
    assert model(batch, 0.0).loss.item() == pytest.approx(1 / counted.sum().item(), rel=1e-4)


def test_the_encoder_sees_all_tokens_with_a_mask_token_in_place_of_the_hidden(
    make_batch: MakeBatch,
) -> None:
    batch, model = make_batch(SHAPE), objective()
    seen: list[Tensor] = []
    model.encoder.blocks[0].register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    model.predict(batch)
    patches = seen[0][:, 1:]
    assert patches.shape == (2, 24, 24)
    hidden = patchify(mask(batch), PATCH).all(-1)
    expected = model.mask_token + model.encoder.pos_embed(GRID, batch.image.device)
    assert torch.allclose(patches[hidden], expected.expand(2, -1, -1)[hidden])


@variants
def test_hidden_values_are_not_seen(make_batch: MakeBatch, variant: str) -> None:
    batch, model = make_batch(SHAPE), objective(variant)
    ruined = replace(batch, image=batch.image.masked_fill(mask(batch, variant), torch.nan))
    assert torch.equal(model.predict(batch)[1], model.predict(ruined)[1])


def test_visible_and_invalid_output_is_free(make_batch: MakeBatch) -> None:
    batch, model = make_batch(SHAPE), objective()
    batch.valid[:, :, :, :5] = False
    counted = mask(batch) & batch.valid
    model.head = Shown(torch.where(counted, batch.image, 1e6))
    loss = model(batch, 0.0).loss
    loss.backward()
    assert loss == 0

    model.head = Shown(batch.image + 1)
    model(batch, 0.0).loss.backward()
    gradient = model.head.rows.grad
    assert gradient is not None
    where = patchify(counted, PATCH)
    assert (gradient[~where] == 0).all()
    assert torch.allclose(gradient[where], 1 / counted.sum())


@variants
def test_gradient_reaches_every_parameter(make_batch: MakeBatch, variant: str) -> None:
    model = objective(variant)
    model(make_batch(SHAPE), 0.0).loss.backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@variants
def test_masks_and_loss_follow_the_seeds(make_batch: MakeBatch, variant: str) -> None:
    batch, model = make_batch(SHAPE), objective(variant)
    assert model(batch, 0.0).loss == model(batch, 0.5).loss
    assert model(replace(batch, seeds=batch.seeds + 1), 0.0).loss != model(batch, 0.0).loss


@variants
def test_loss_is_float32_under_autocast(make_batch: MakeBatch, variant: str) -> None:
    batch, model = make_batch(SHAPE), objective(variant)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = model(batch, 0.0).loss
    assert low.dtype == torch.float32
    assert low.item() == pytest.approx(model(batch, 0.0).loss.item(), rel=3e-2)


@variants
def test_the_step_never_waits_for_the_device(make_batch: MakeBatch, variant: str) -> None:
    batch, model = make_batch(SHAPE), objective(variant).to("meta")
    meta = Batch(*(t.to("meta") for t in (batch.image, batch.valid, batch.spacing, batch.seeds)))
    model(meta, 0.0).loss.backward()
    assert set(model.preview(meta)) == {"input", "visible", "output"}


@variants
def test_the_step_compiles_without_a_break(make_batch: MakeBatch, variant: str) -> None:
    batch, model = make_batch(SHAPE), objective(variant)

    def loss(image: Tensor, valid: Tensor, seeds: Tensor) -> Tensor:
        return model.forward(Batch(image, valid, batch.spacing, seeds), 0.0).loss

    traced = torch.compile(loss, backend="eager", fullgraph=True)
    assert torch.equal(traced(batch.image, batch.valid, batch.seeds), model(batch, 0.0).loss)


def test_preview_shows_what_the_network_sees_and_rebuilds(make_batch: MakeBatch) -> None:
    batch, model = make_batch(SHAPE), objective()
    model.head = Shown(torch.full_like(batch.image, 7))
    preview, hidden = model.preview(batch), mask(batch)
    assert torch.equal(preview["input"], batch.image)
    assert torch.equal(preview["visible"].isnan(), hidden.expand_as(batch.image))
    assert torch.equal(preview["visible"].nan_to_num(0.0), batch.image * ~hidden)
    assert torch.equal(preview["output"], torch.where(hidden, 7.0, batch.image))


def test_blocks_that_do_not_divide_the_crop_are_cut(make_batch: MakeBatch) -> None:
    batch, model = make_batch(SHAPE), objective(block=(4, 8, 12))
    hidden, _ = model.predict(batch)
    assert torch.equal(hidden, block_hidden(batch.seeds, SHAPE, (4, 8, 12), 0.6))
    assert model(batch, 0.0).loss.isfinite()


def test_slices_work_as_volumes_do(make_batch: MakeBatch) -> None:
    encoder = ViT3D(patch_size=(1, 4, 4), embed_dim=24, depth=2, num_heads=2)
    model, batch = SimMIM(encoder=encoder, block=(1, 8, 8)), make_batch((1, 16, 24))
    model(batch, 0.0).loss.backward()
    assert model.preview(batch)["output"].shape == batch.image.shape


@variants
def test_one_batch_can_be_learnt(make_batch: MakeBatch, variant: str) -> None:
    torch.manual_seed(SEED)
    encoder = ViT3D(patch_size=4, embed_dim=48, depth=2, num_heads=4)
    args = VARIANTS[variant] | {"block": 4}
    model, batch = SimMIM(encoder=encoder, **args), make_batch((8, 12, 16))
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(280):
        loss = model(batch, 0.0).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


def test_what_does_not_fit_is_refused() -> None:
    said = r"block=\(2, 6, 4\) must be a multiple.*\[2, 4, 4\]"
    with pytest.raises(InputError, match=said) as caught:
        objective(block=(2, 6, 4))
    for advice in re.findall(r"\[(.*?)\]", str(caught.value))[1:]:
        objective(block=tuple(int(side) for side in advice.split(",")))
    assert "such as [2, 4, 4] or [2, 8, 4]" in str(caught.value)
    with pytest.raises(InputError, match=r"such as \[2, 4, 4\] or \[4, 4, 4\]"):
        objective(block=3)
    encoder = ViT3D(patch_size=12, embed_dim=24, depth=1, num_heads=2)
    with pytest.raises(InputError, match="or head=linear"):
        SimMIM(encoder=encoder, block=12, head="patch")
    with pytest.raises(InputError, match="objective=simmim encodes tokens"):
        SimMIM(encoder=ResEncUNetEncoder(features=(4, 8), strides=(1, 2), blocks=(1, 1)))
