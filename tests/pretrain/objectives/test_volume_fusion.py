from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from seeds import SEED
from torch import Tensor, nn

from data_prep.errors import InputError
from pretrain.backbones.backbone import Backbone
from pretrain.backbones.pct_net import PCTNetEncoder
from pretrain.backbones.resenc import ResEncUNetEncoder
from pretrain.backbones.vit import ViT3D
from pretrain.draws import uniform
from pretrain.objective import Batch
from pretrain.objectives.volume_fusion import (
    _COEFFICIENT,
    _COUNT,
    _ORDER,
    _PLACE,
    _SIZE,
    BLOCKS,
    BOXES,
    Sizes,
    VolumeFusion,
    draw_boxes,
    draw_grid,
    fuse,
    stretch,
)
from pretrain.schedule import Schedule
from pretrain.settings import PretrainSettings
from pretrain.train import build_objective

SHAPE = (16, 24, 32)  # 2x3x4 cells of 8
FORMS = ("boxes", "boxes_nnssl", "grid")
MakeBatch = Callable[..., Batch]
ENCODERS: dict[str, Callable[[], Backbone]] = {
    "resenc": lambda: ResEncUNetEncoder(features=(4, 6, 8), strides=(1, 2, 2), blocks=(1, 1, 1)),
    "vit": lambda: ViT3D(patch_size=8, embed_dim=12, depth=4, num_heads=1),
    "pct_net": lambda: PCTNetEncoder(
        features=(4, 4, 8, 8, 8), heads=(2, 2, 4), windows=(4, 3, 2), resolution_mode=2
    ),
}


class Shown(nn.Module):
    """A decoder that says what it was given beforehand."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, image: Tensor, features: list[Tensor]) -> Tensor:
        return self.logits


def objective(encoder: str = "resenc", **changes: Any) -> VolumeFusion:
    torch.manual_seed(SEED)
    return VolumeFusion(encoder=ENCODERS[encoder](), **changes)


def integers(draw: float, low: int, high: int) -> int:
    return low + int(np.float32(draw) * np.float32(high - low + 1))


# Fusing.


@pytest.mark.parametrize("coefficients", [1, 3, 4, 7])
def test_fusing_is_exact_at_both_ends_and_linear_between(coefficients: int) -> None:
    g = torch.Generator().manual_seed(coefficients)
    front, back = (torch.randn(2, 2, 4, 6, 8, generator=g) * 100 for _ in range(2))
    label = torch.randint(0, coefficients + 1, (2, 4, 6, 8), generator=g)
    fused = fuse(front, back, label, coefficients)
    for k in range(coefficients + 1):
        here = (label == k)[:, None].expand_as(fused)
        assert here.any()
        exact = {0: back, coefficients: front}.get(k)
        if exact is not None:
            assert torch.equal(fused[here], exact[here])
        else:
            share = k / coefficients
            expected = share * front.double()[here] + (1 - share) * back.double()[here]
            assert torch.allclose(fused[here].double(), expected, rtol=1e-6, atol=1e-5)
            assert (fused[here] != back[here]).all() and (fused[here] != front[here]).all()
    assert (fused >= torch.minimum(front, back)).all()
    assert (fused <= torch.maximum(front, back)).all()


def test_fusing_a_volume_with_itself_changes_nothing() -> None:
    volume = torch.randn(3, 1, 4, 6, 8) * 1000
    label = torch.randint(0, 8, (3, 4, 6, 8))
    assert torch.equal(fuse(volume, volume, label, 7), volume)


# Labels.


def boxes_oracle(
    seed: int, shape: tuple[int, ...], k: int, sizes: Sizes, counts: tuple[int, int],
    lowest: int, inside: bool,
) -> np.ndarray:  # fmt: skip
    """One box after the other."""
    seeds, most = torch.tensor([seed]), counts[1]
    count = integers(uniform(seeds, (1,), _COUNT).item(), *counts)
    size_draw, place_draw = (uniform(seeds, (3, most), s)[0].numpy() for s in (_SIZE, _PLACE))
    coefficient = uniform(seeds, (most,), _COEFFICIENT)[0].numpy()
    label = np.zeros(shape, np.int64)
    for box in range(count):
        where = []
        for axis, side in enumerate(shape):
            size = integers(size_draw[axis, box], sizes.low[axis], sizes.high[axis])
            if inside:
                start = integers(place_draw[axis, box], 0, side - size)
                assert 0 <= start <= side - size
            else:
                start = integers(place_draw[axis, box], 0, side - 1) - size // 2
            part = slice(max(start, 0), min(start + size, side))
            assert part.start < part.stop  # a clipped box still has voxels
            where.append(part)
        label[tuple(where)] = integers(coefficient[box], lowest, k)
    return label


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("counts", [(10, 40), (3, 52), (1, 1)])
def test_boxes_equal_an_oracle_that_draws_one_after_the_other(
    inside: bool, counts: tuple[int, int], seed: int
) -> None:
    sizes, seeds = Sizes((1, 2, 3), (9, 11, 20)), torch.arange(6) + 1000 * seed
    lowest = 0 if inside else 1
    label = draw_boxes(seeds, SHAPE, 4, sizes, counts=counts, lowest=lowest, inside=inside)
    assert label.dtype == torch.int64
    for one, found in zip(seeds.tolist(), label.numpy(), strict=True):
        assert (found == boxes_oracle(one, SHAPE, 4, sizes, counts, lowest, inside)).all()


def test_the_last_of_two_scripted_boxes_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two boxes that share voxels, with labels 1 and 2, in both orders."""
    from pretrain.objectives import volume_fusion

    first, second = (0.26, 0.01), (0.51, 0.99)  # (place, coefficient): centres 2 and 4 of 8

    for one, other in ((first, second), (second, first)):
        script = {
            _COUNT: torch.tensor([[0.0]]),
            _SIZE: torch.zeros(1, 3, 2),  # the smallest: 4 voxels
            _PLACE: torch.tensor([[[one[0], other[0]]] * 3]),
            _COEFFICIENT: torch.tensor([[one[1], other[1]]]),
        }

        def scripted(
            seeds: Tensor, shape: Any, stream: int, script: dict[int, Tensor] = script
        ) -> Tensor:
            return script[stream]

        monkeypatch.setattr(volume_fusion, "uniform", scripted)
        (label,) = draw_boxes(
            torch.zeros(1), (8, 8, 8), 2, Sizes((4,) * 3, (5,) * 3), counts=(2, 2)
        )
        expected = torch.zeros(8, 8, 8, dtype=torch.int64)
        for place, coefficient in (one, other):
            centre = int(place * 8)
            expected[(slice(centre - 2, centre + 2),) * 3] = 1 + int(coefficient * 2)
        assert torch.equal(label, expected)
        assert label[3, 3, 3] == 1 + int(other[1] * 2)


def grid_facts(seed: int, shape: tuple[int, ...], sizes: Sizes) -> tuple[list, list, list]:
    seeds = torch.tensor([seed])
    size_draw, place_draw = (uniform(seeds, (3,), stream)[0].tolist() for stream in (_SIZE, _PLACE))
    block = [integers(d, a, b) for d, a, b in zip(size_draw, sizes.low, sizes.high, strict=True)]
    offset = [integers(d, 0, n % b) for d, n, b in zip(place_draw, shape, block, strict=True)]
    return block, offset, [n // b for n, b in zip(shape, block, strict=True)]


@pytest.mark.parametrize("share", [0.7, 0.25])
def test_a_grid_has_exactly_its_share_of_whole_blocks(share: float, seed: int) -> None:
    sizes, seeds = Sizes((2, 3, 4), (5, 9, 12)), torch.arange(20) + 1000 * seed
    label = draw_grid(seeds, SHAPE, 4, sizes, share=share)
    assert label.dtype == torch.int64 and label.min() >= 0 and label.max() <= 4
    for one, found in zip(seeds.tolist(), label.numpy(), strict=True):
        block, offset, number = grid_facts(one, SHAPE, sizes)
        noise = uniform(torch.tensor([one]), (8 * 8 * 8,), _ORDER)[0].numpy()[: np.prod(number)]
        front = set(
            np.argsort(noise, kind="stable")[: int(np.prod(number) * share + 1e-6)].tolist()
        )
        rest = found.copy()
        foreground = 0
        for i, cell in enumerate(itertools.product(*(range(n) for n in number))):
            where = tuple(
                slice(o + c * b, o + (c + 1) * b)
                for o, c, b in zip(offset, cell, block, strict=True)
            )
            assert found[where].size == np.prod(block)  # all inside
            assert (found[where] == found[where].flat[0]).all()
            assert (found[where].flat[0] > 0) == (i in front)
            foreground += int(found[where].flat[0] > 0)
            rest[where] = 0
        assert foreground == len(front)
        assert not rest.any()


def test_ninety_blocks_have_sixty_three_in_the_foreground() -> None:
    """int(90 * 0.7) is 62 in floating point."""
    label = draw_grid(torch.arange(5), (3, 5, 6), 4, Sizes((1, 1, 1), (1, 1, 1)))
    assert (label > 0).sum((1, 2, 3)).tolist() == [63] * 5


@pytest.mark.parametrize("form", FORMS)
def test_labels_use_every_class_and_follow_the_seeds_alone(form: str) -> None:
    fusion = objective(form=form)
    seeds = torch.arange(40)
    label = fusion.draw(seeds, SHAPE)
    assert label.unique().tolist() == [0, 1, 2, 3, 4]
    assert torch.equal(fusion.draw(seeds[7:9], SHAPE), label[7:9])
    assert len({one.numpy().tobytes() for one in label}) == 40
    # Coefficients of the boxes are drawn alike; voxels they cover differ in number.
    shares = [(label == k).float().mean().item() for k in range(1, 5)]
    assert max(shares) < 2 * min(shares)


def test_sizes_are_those_published_and_scale_with_the_crop() -> None:
    assert BOXES.scaled((64, 128, 128)) == BOXES
    assert BLOCKS.scaled((64, 128, 128)) == BLOCKS
    assert BOXES.scaled((32, 128, 256)) == Sizes((4, 8, 16), (20, 80, 160))
    assert BLOCKS.scaled((96, 96, 96)) == Sizes((8, 6, 6), (30, 24, 24))
    assert BOXES.scaled((4, 4, 4)) == Sizes((1, 1, 1), (3, 3, 3))
    for shape in itertools.product((1, 7, 16, 33), repeat=3):
        for sizes in (BOXES.scaled(shape), BLOCKS.scaled(shape)):
            ordered = zip(sizes.low, sizes.high, shape, strict=True)
            assert all(1 <= low <= high <= side for low, high, side in ordered)


# Pairs.


@pytest.mark.parametrize("form", ["boxes", "boxes_nnssl"])
def test_pairs_are_the_same_for_every_number_of_ranks(form: str) -> None:
    """What the schedule gives to the ranks, paired by the objective, against one rank."""
    schedule = Schedule(np.repeat(np.arange(5), 7), seed=1, lanes=3)
    fusion = objective(form=form)

    def pairs(world: int, nodes: int) -> set[tuple[int, int, int]]:
        found = set()
        for rank in range(world):
            for step, positions in enumerate(schedule.batches(3, 6, 16, rank, world, nodes)):
                back, front = fusion._pair(torch.tensor(list(positions)))
                found |= {(step, int(b), int(f)) for b, f in zip(back, front, strict=True)}
        return found

    alone = pairs(1, 1)
    assert len(alone) == 3 * 16
    assert all(back != front for _, back, front in alone)
    for world, nodes in ((2, 1), (2, 2), (4, 2), (8, 1), (8, 4)):
        assert pairs(world, nodes) == alone


def test_two_crops_of_a_sample_are_a_pair() -> None:
    back, front = objective(form="grid")._pair(torch.arange(6))
    assert back.tolist() == [0, 2, 4] and front.tolist() == [1, 3, 5]


def test_a_pair_of_two_is_the_reference_roll() -> None:
    crops = torch.randn(2, 1, 2, 2, 2)
    back, front = objective()._pair(crops)
    assert torch.equal(back, crops) and torch.equal(front, crops.roll(1, 0))


@pytest.mark.parametrize(("batch_size", "devices", "accumulate"), [(1, 1, 1), (6, 2, 1), (4, 2, 2)])
def test_odd_micro_batches_are_refused_at_the_start(
    batch_size: int, devices: int, accumulate: int
) -> None:
    def settings(size: int, form: str) -> PretrainSettings:
        return PretrainSettings(
            corpus="c", run="r", crop_size=(8, 8, 8), steps=1, batch_size=size, lr=1e-3,
            accumulate=accumulate, trainer={"devices": devices},
            backbone={
                "_target_": "pretrain.backbones.resenc.ResEncUNetEncoder",
                "features": [2, 2], "strides": [1, 2], "blocks": [1, 1],
            },
            objective={
                "_target_": "pretrain.objectives.volume_fusion.VolumeFusion", "form": form,
            },
        )  # fmt: skip

    fit = 2 * devices * accumulate
    with pytest.raises(InputError, match=rf"batch_size={batch_size}: .*multiple of {fit}$"):
        build_objective(settings(batch_size, "boxes"), 1)
    build_objective(settings(fit, "boxes"), 1)
    build_objective(settings(batch_size, "grid"), 1)


def test_an_odd_batch_never_passes_silently(make_batch: MakeBatch) -> None:
    for form in FORMS:
        with pytest.raises(ValueError, match="in pairs, found 3"):
            objective(form=form)(make_batch(SHAPE, size=3), 0.0)


# The fused volume.


@pytest.mark.parametrize("form", FORMS)
def test_label_tells_where_the_fused_volume_comes_from(form: str, make_batch: MakeBatch) -> None:
    batch, fusion = make_batch(SHAPE, size=4), objective(form=form, contrast=False)
    back, front = fusion._pair(batch.image)
    image, label, target = fusion.fused(batch)
    assert torch.equal(label, target) and label.dtype == torch.int64
    for k in range(5):
        here = (label == k)[:, None]
        expected = k / 4 * front + (1 - k / 4) * back
        assert torch.allclose(image[here], expected[here], rtol=1e-5, atol=1e-6)
    assert torch.equal(image == back, (label == 0)[:, None])
    assert torch.equal(image == front, (label == 4)[:, None])


@pytest.mark.parametrize("form", FORMS)
def test_what_is_invalid_in_either_crop_is_free(form: str, make_batch: MakeBatch) -> None:
    batch = make_batch(SHAPE, size=4)
    batch.valid[0, :, :3] = False
    batch.valid[3, :, :, 20:] = False
    fusion = objective(form=form)
    _, label, target = fusion.fused(batch)
    back, front = fusion._pair(batch.valid[:, 0])
    assert torch.equal(target == -1, ~(back & front))
    assert torch.equal(target.clamp(min=0), label.masked_fill(target == -1, 0))

    logits = torch.randn(len(label), 5, *SHAPE)
    fusion.decoder = Shown(logits)
    loss = fusion(batch, 0.0).loss
    loss.backward()
    gradient = fusion.decoder.logits.grad
    assert gradient is not None
    free = (target == -1)[:, None].expand_as(gradient)
    assert (gradient[free] == 0).all() and (gradient[~free] != 0).all()
    fusion.decoder = Shown(torch.where(free, 1e4, logits))
    assert torch.equal(fusion(batch, 0.0).loss, loss)


def test_a_batch_without_valid_voxels_is_finite(make_batch: MakeBatch) -> None:
    batch, fusion = make_batch(SHAPE), objective()
    batch.valid[:] = False
    loss = fusion(batch, 0.0).loss
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in fusion.parameters() if p.grad is not None)


# Contrast.


def test_contrast_equals_an_oracle(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    image = torch.randn(3, 2, 8, 9, 10, generator=g).exp()
    valid = torch.rand(3, 1, 8, 9, 10, generator=g) < 0.7
    seeds = torch.arange(3) + 10 * seed
    found = stretch(image, valid, seeds).double().numpy()
    percentile, gamma = uniform(seeds, (2,), 37).numpy(), uniform(seeds, (1,), 38).numpy()
    for b in range(3):
        shares = [0.1 + 1.9 * percentile[b, 0], 98 + 1.9 * percentile[b, 1]]
        for c in range(2):
            x = image[b, c].double().numpy()
            inside = x[valid[b, 0].numpy()]
            p0, p1 = np.percentile(inside, shares)
            points = [inside.min(), p0, p1, inside.max()]
            expected = np.interp(x, points, [0, 0.1, 0.9, 1]) ** (0.7 + 0.8 * gamma[b, 0])
            np.testing.assert_allclose(found[b, c], expected, atol=1e-5)


def test_percentiles_of_a_large_crop_come_from_a_sample_of_its_voxels() -> None:
    image = torch.randn(1, 1, 48, 64, 64, generator=torch.Generator().manual_seed(SEED))
    valid = torch.ones_like(image, dtype=torch.bool)
    found = stretch(image, valid, torch.tensor([3]))
    share = 0.98 + 0.019 * uniform(torch.tensor([3]), (2,), 37)[0, 1].item()
    gamma = 0.7 + 0.8 * uniform(torch.tensor([3]), (1,), 38).item()
    assert (found > 0.9**gamma).float().mean().item() == pytest.approx(1 - share, abs=2e-3)


def test_contrast_of_constant_crops_is_finite() -> None:
    image = torch.stack([torch.full((1, 4, 4, 4), 3.0), torch.randn(1, 4, 4, 4)])
    valid = torch.ones(2, 1, 4, 4, 4, dtype=torch.bool)
    valid[1] = False
    found = stretch(image, valid, torch.arange(2))
    assert found.isfinite().all()
    assert found[0].unique().numel() == 1


def test_contrast_comes_before_the_fusion_and_treats_both_crops_alike(
    make_batch: MakeBatch,
) -> None:
    """Brightness must not tell the label: crops that differ by a scale become the same."""
    batch = make_batch(SHAPE)
    image = batch.image.clone()
    image[1] = 5 * image[0] - 2
    same = torch.zeros_like(batch.seeds)
    fused = objective().fused(replace(batch, image=image, seeds=same))
    assert (fused.label > 0).any()
    low, high = image.amin(), image.amax()
    expected = low + (high - low) * stretch(image, batch.valid, same)
    either = (fused.image - expected).abs() < 1e-4 * (high - low)
    inverted = (fused.image - (low + high - expected)).abs() < 1e-4 * (high - low)
    assert either.all() or inverted.all()
    assert fused.image.min() >= low - 1e-4 and fused.image.max() <= high + 1e-4


def test_a_quarter_of_the_pairs_is_inverted_both_crops_together() -> None:
    seeds = torch.arange(400)
    ramp = torch.linspace(-1, 1, 8).view(1, 1, 8, 1, 1).expand(400, 1, 8, 8, 8)
    batch = Batch(ramp, torch.ones(400, 1, 8, 8, 8, dtype=torch.bool), torch.ones(400, 3), seeds)
    turned = (objective().fused(batch).image.diff(dim=2).mean((1, 2, 3, 4))) < 0
    assert 70 <= int(turned.sum()) <= 130
    rising = objective().fused(batch).image.diff(dim=2)
    # A voxel of F among those of B runs the same way.
    steps = rising.sum((1, 2))
    assert torch.equal(steps < 0, turned[:, None, None].expand_as(steps))


# The objective.


def test_the_loss_equals_a_written_formula(make_batch: MakeBatch) -> None:
    batch = make_batch(SHAPE, size=4)
    batch.valid[1, :, 5:9] = False
    for options, over in (({}, (2, 3, 4)), ({"batch_dice": True}, (0, 2, 3, 4))):
        fusion = objective(dice_weight=0.3, entropy_weight=0.9, **options)
        target = fusion.fused(batch).target
        logits = torch.randn(4, 5, *SHAPE)
        fusion.decoder = Shown(logits)
        loss, parts = fusion(batch, 0.0)
        seen = (target >= 0).double()
        probability = logits.double().softmax(1) * seen[:, None]
        truth = torch.stack([(target == k).double() for k in range(5)], 1)
        overlap, total = (probability * truth).sum(over), (probability + truth).sum(over)
        dice = 1 - ((2 * overlap + 1e-5) / (total + 1e-5)).mean()
        entropy = -(logits.double().log_softmax(1) * truth).sum() / seen.sum()
        assert parts["dice"].item() == pytest.approx(dice.item(), rel=1e-5)
        assert parts["cross_entropy"].item() == pytest.approx(entropy.item(), rel=1e-5)
        assert loss.item() == pytest.approx((0.3 * dice + 0.9 * entropy).item(), rel=1e-5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("encoder", ENCODERS)
def test_every_backbone_learns_in_every_part(
    encoder: str, form: str, make_batch: MakeBatch
) -> None:
    fusion = objective(encoder, form=form)
    assert fusion.transfers == "network"
    loss, parts = fusion(make_batch((16, 32, 48), size=4), 0.0)
    assert loss.isfinite() and set(parts) == {"dice", "cross_entropy"}
    loss.backward()
    assert [n for n, p in fusion.named_parameters() if p.grad is None] == []
    weights = [(n, p) for n, p in fusion.named_parameters() if p.ndim > 2]
    assert [n for n, p in weights if p.grad is not None and not p.grad.any()] == []


def test_deep_supervision_averages_all_scales(make_batch: MakeBatch) -> None:
    class Scales(Shown):
        def outputs(self, image: Tensor, features: list[Tensor]) -> list[Tensor]:
            return [self.logits, self.logits[..., ::2, ::2, ::2]]

    batch, logits = make_batch(SHAPE), torch.randn(2, 5, *SHAPE)
    fusion = objective()
    losses = []
    coarse = logits[..., ::2, ::2, ::2]
    wide = nn.functional.interpolate(coarse, size=SHAPE, mode="trilinear", align_corners=False)
    for decoder in (Shown(logits), Shown(wide), Scales(logits)):
        fusion.decoder = decoder
        losses.append(fusion(batch, 0.0).loss.item())
    assert losses[2] == pytest.approx((losses[0] + losses[1]) / 2, rel=1e-5)


def test_loss_is_float32_under_autocast(make_batch: MakeBatch) -> None:
    batch, fusion = make_batch(SHAPE), objective()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = fusion(batch, 0.0).loss
    assert low.dtype == torch.float32
    assert low.item() == pytest.approx(fusion(batch, 0.0).loss.item(), rel=3e-2)


@pytest.mark.parametrize("form", FORMS)
def test_the_step_never_waits_for_the_device(form: str, make_batch: MakeBatch) -> None:
    batch, fusion = make_batch(SHAPE), objective(form=form).to("meta")
    meta = Batch(*(t.to("meta") for t in (batch.image, batch.valid, batch.spacing, batch.seeds)))
    fusion(meta, 0.0).loss.backward()
    assert set(fusion.preview(meta)) == {"fused", "label", "predicted"}


@pytest.mark.parametrize("form", FORMS)
def test_the_step_compiles_without_a_break(form: str, make_batch: MakeBatch) -> None:
    batch, fusion = make_batch(SHAPE), objective(form=form)

    def loss(image: Tensor, valid: Tensor, seeds: Tensor) -> Tensor:
        return fusion.forward(Batch(image, valid, batch.spacing, seeds), 0.0).loss

    traced = torch.compile(loss, backend="eager", fullgraph=True)
    assert torch.equal(traced(batch.image, batch.valid, batch.seeds), fusion(batch, 0.0).loss)


@pytest.mark.parametrize("form", FORMS)
def test_preview_shows_the_fused_volume_the_truth_and_the_prediction(
    form: str, make_batch: MakeBatch
) -> None:
    batch = make_batch(SHAPE, size=4)
    fusion = objective(form=form)
    fused = fusion.fused(batch)
    sure = nn.functional.one_hot(fused.label, 5).movedim(-1, 1).float()
    fusion.decoder = Shown(sure)
    shown = fusion.preview(batch)
    assert torch.equal(shown["fused"], fused.image)
    assert torch.equal(shown["label"], shown["predicted"])
    low, high = fused.image.flatten(1).aminmax(dim=1)
    for one, label, a, b in zip(shown["label"], fused.label, low, high, strict=True):
        for k in range(5):
            grey = one[0][label == k]
            assert torch.allclose(grey, (a + k / 4 * (b - a)).expand_as(grey), atol=1e-5)
    assert fusion.preview(Batch(*(t[:1] for t in batch_tensors(batch)))) == {}


def batch_tensors(batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return batch.image, batch.valid, batch.spacing, batch.seeds


@pytest.mark.parametrize("form", FORMS)
def test_previews_are_drawn(form: str, make_batch: MakeBatch, tmp_path: Any) -> None:
    from pretrain.previews import draw_previews

    crops = 3 * objective(form=form).crops.main
    draw_previews(objective(form=form).eval(), make_batch(SHAPE, size=crops), tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 10_000


def test_one_batch_can_be_learnt(make_batch: MakeBatch) -> None:
    """The criterion of a segmentation: voxels whose coefficient is told, far above chance."""
    torch.manual_seed(SEED)
    encoder = ResEncUNetEncoder(features=(8, 16), strides=(1, 2), blocks=(1, 1))
    fusion, batch = VolumeFusion(encoder=encoder, contrast=False), make_batch((8, 12, 16))
    optimiser = torch.optim.AdamW(fusion.parameters(), lr=1e-2)
    for _ in range(100):
        loss = fusion(batch, 0.0).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    fused = fusion.fused(batch)
    with torch.no_grad():
        found = fusion.decoder(fused.image, fusion.encoder(fused.image)).argmax(1)
    commonest = fused.label.flatten().bincount().max().item() / fused.label.numel()
    assert (found == fused.label).float().mean() > max(0.9, commonest + 0.2)
