"""Chaitanya's two stages against loops, and what the second one leaves alone."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from seeds import SEED
from torch import Tensor
from torch.nn import functional as F

from data_prep.errors import InputError
from pretrain.backbones.pct_net import PCTNetEncoder
from pretrain.backbones.resenc import ResEncUNetEncoder
from pretrain.backbones.vit import ViT3D
from pretrain.contrast import region_lattice
from pretrain.objective import Batch
from pretrain.objectives.contrastive import GlobalContrast, LocalContrast
from pretrain.optim import parameter_groups

P, T = 3, 0.2
Make = Callable[..., Batch]


def encoder(stages: int = 3) -> ResEncUNetEncoder:
    torch.manual_seed(SEED)
    return ResEncUNetEncoder(
        features=[4, 6, 8][:stages], strides=[1, 2, 2][:stages], blocks=[1] * stages
    )


def global_stage(**chosen: Any) -> GlobalContrast:
    return GlobalContrast(
        encoder=encoder(), slabs=P, temperature=T, hidden_dim=16, out_dim=8, **chosen
    )


def local_stage(stages: int = 3, **chosen: Any) -> LocalContrast:
    given = {"blocks": 1, "region": 1, "slabs": P, "temperature": T, "out_dim": 8} | chosen
    return LocalContrast(encoder=encoder(stages), **given)


def score(a: Tensor, b: Tensor) -> float:
    return math.exp(float(F.cosine_similarity(a, b, dim=0)) / T)


def pair_loss(anchor: Tensor, positive: Tensor, negatives: list[Tensor]) -> float:
    good = score(anchor, positive)
    return -math.log(good / (good + sum(score(anchor, n) for n in negatives)))


@pytest.mark.parametrize("across", [False, True])
def test_the_global_stage_by_loops(make_batch: Make, across: bool) -> None:
    """Crops come view by view within a sample, slabs from feet to head within a view."""
    volumes = 3
    built, batch = global_stage(across=across), make_batch((4, 8, 12), size=volumes * 2 * P)
    z = {}
    for number, crop in enumerate(batch.image):
        volume, rest = divmod(number, 2 * P)
        view, slab = divmod(rest, P)
        mean = built.encoder(crop[None])[-1].flatten(2).mean(2)
        z[volume, view, slab] = built.projector(mean)[0]
    losses, counts = [], set()
    for (volume, view, slab), anchor in z.items():
        negatives = [row for (_, _, other), row in z.items() if other != slab]
        counts.add(len(negatives))
        positives = [(volume, 1 - view, slab)]
        if across:
            positives += [(v, view, slab) for v in range(volumes) if v != volume]
        losses += [pair_loss(anchor, z[key], negatives) for key in positives]
    assert counts == {2 * volumes * (P - 1)}
    expected = sum(losses) / len(losses)
    assert built(batch, 0.0).loss.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("across", [False, True])
def test_the_local_stage_by_loops(make_batch: Make, across: bool) -> None:
    volumes, size = 2, 2
    built = local_stage(region=size, across=across, blocks=1)
    batch = make_batch((12, 12, 20), size=volumes * 2 * P)
    # Stage one behind the coarsest map is a map of stride 2: (6, 6, 10) cells.
    lattice = region_lattice((6, 6, 10), size)
    z = {}
    for number, crop in enumerate(batch.image):
        volume, rest = divmod(number, 2 * P)
        view, slab = divmod(rest, P)
        maps = built.encoder(crop[None])
        up = built.decoder.transpconvs[0](maps[-1])
        grid = built.projector(built.decoder.stages[0](torch.cat([up, maps[-2]], 1)))[0]
        for region, (d, h, w) in enumerate(lattice.starts):
            cube = grid[:, d : d + size, h : h + size, w : w + size].reshape(-1)
            z[volume, view, slab, region] = built.region_projector.weight @ cube
    losses, counts = [], set()
    near = [[i for i, yes in enumerate(row) if yes] for row in lattice.neighbours.tolist()]
    for (volume, view, slab, region), anchor in z.items():
        others = [(volume, 1 - view, slab)]
        if across:
            others += [(v, view, slab) for v in range(volumes) if v != volume]
        for other in others:
            maps_of = [(volume, view, slab), other]
            negatives = [z[*one, n] for one in maps_of for n in near[region]]
            counts.add(len(negatives))
            losses.append(pair_loss(anchor, z[*other, region], negatives))
    assert counts == {2 * 8}
    expected = sum(losses) / len(losses)
    assert built(batch, 0.0).loss.item() == pytest.approx(expected, rel=1e-5)


def test_the_local_stage_needs_views_that_are_aligned(make_batch: Make) -> None:
    """Equal views are the easiest there are; the same two apart in space are not."""
    built = local_stage()
    assert built.crops.aligned and not global_stage().crops.aligned
    assert (built.crops.count, built.crops.main) == (P, 2 * P)
    batch = make_batch((12, 12, 20), size=2 * P)
    batch.image[P:] = batch.image[:P]
    aligned = built(batch, 0.0).loss
    batch.image[P:] = batch.image[:P].flip(4)
    assert built(batch, 0.0).loss > aligned + 0.1


def test_the_second_stage_changes_its_blocks_and_nothing_before_or_behind(
    make_batch: Make,
) -> None:
    built = local_stage(blocks=1)
    built.train()
    assert not built.encoder.training and built.decoder.training
    before = {name: value.clone() for name, value in built.state_dict().items()}
    groups: Any = parameter_groups(built, 0.1)
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        built(make_batch((12, 12, 20), size=4 * P), 0.5).loss.backward()
        missing = [n for n, p in built.named_parameters() if p.requires_grad and p.grad is None]
        assert missing == []
        optimizer.step()
    changed = {n for n, value in built.state_dict().items() if not torch.equal(value, before[n])}
    assert not any(name.startswith("encoder.") for name in changed)
    trained = ("decoder.transpconvs.0.", "decoder.stages.0.", "projector.", "region_projector.")
    assert all(name.startswith(trained) for name in changed)
    assert {name.rsplit(".", 1)[0] for name in changed} >= {
        "decoder.transpconvs.0", "region_projector",
    }  # fmt: skip


def test_running_statistics_of_a_frozen_encoder_stay(make_batch: Make) -> None:
    built = local_stage()
    norm = torch.nn.BatchNorm3d(8)
    stages: Any = built.encoder.stages
    stages[-1].register_forward_hook(lambda module, args, output: norm(output))
    stages[-1].norm = norm
    built.encoder.train()
    built.train()
    built(make_batch((12, 12, 20), size=2 * P), 0.5)
    assert norm.num_batches_tracked is not None and int(norm.num_batches_tracked) == 0


def test_a_map_without_room_for_its_regions_is_refused_with_what_would_do(
    make_batch: Make,
) -> None:
    built = local_stage(blocks=1, region=3)
    with pytest.raises(ValueError, match="regions of 3 cells overlap") as refusal:
        built(make_batch((12, 12, 16), size=2 * P), 0.0)  # a map of 6 x 6 x 8
    advised = re.search(r"crop_size=\[(\d+),(\d+),(\d+)\]", str(refusal.value))
    assert advised is not None
    sides = tuple(int(side) for side in advised.groups())
    assert built(make_batch(sides, size=2 * P), 0.0).loss.isfinite()
    with pytest.raises(ValueError, match=r"or objective\.blocks=2$"):
        built(make_batch((12, 12, 16), size=2 * P), 0.0)
    finer = local_stage(blocks=2, region=3)
    assert finer(make_batch((12, 12, 16), size=2 * P), 0.0).loss.isfinite()


def test_what_has_no_such_blocks_is_refused() -> None:
    with pytest.raises(InputError, match=r"blocks=3: the decoder of this encoder has 2 blocks"):
        local_stage(blocks=3)
    vit = ViT3D(patch_size=2, embed_dim=24, depth=4, num_heads=2)
    with pytest.raises(InputError, match="UNETRDecoder: choose a CNN, such as backbone="):
        LocalContrast(encoder=vit)
    pct = PCTNetEncoder(features=(4, 6, 8, 8, 8), heads=(2, 2, 2))
    with pytest.raises(InputError, match="PCTDecoder: choose a CNN"):
        LocalContrast(encoder=pct)


@pytest.mark.parametrize("stage", ["global", "local"])
def test_one_batch_is_learned(make_batch: Make, stage: str) -> None:
    if stage == "global":
        built: GlobalContrast | LocalContrast = global_stage(across=False)
    else:
        built = local_stage(blocks=2, region=2)
    batch = make_batch((12, 12, 20), size=4 * P)
    first_view = batch.image.unflatten(0, (2, 2, P))[:, :1]
    noise = 0.05 * torch.randn(2, 2, P, 1, 12, 12, 20)
    batch = replace(batch, image=(first_view + noise).flatten(0, 2))
    optimizer = torch.optim.Adam([p for p in built.parameters() if p.requires_grad], lr=1e-2)
    first = built(batch, 0.0).loss.item()
    for _ in range(40):
        optimizer.zero_grad()
        loss = built(batch, 0.0).loss
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.4 * first
