"""SimCLR in two forms: whose views are negatives, and the whole objective against loops."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from small_encoders import encoder
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain.objective import Batch
from pretrain.objectives.simclr import SimCLR

SHAPE = (4, 6, 8)
Make = Callable[..., Batch]


def objective(kind: str = "resenc", **chosen: Any) -> SimCLR:
    return SimCLR(encoder=encoder(kind), **chosen)


def normed(rows: Tensor) -> Tensor:
    return (rows - rows.mean(0)) / (rows.var(0, correction=0) + 1e-5).sqrt()


def embedded(built: SimCLR, batch: Batch) -> Tensor:
    """Means of one crop at a time, of all maps for NT-Xent: [crops, E] of length 1."""
    joint = built.form == "nt_xent"
    means = []
    for crop in batch.image:
        maps = built.encoder(crop[None])
        pyramid = len(set(built.encoder.strides)) > 1
        seen = maps if joint and pyramid else maps[-1:]
        means.append(torch.cat([m.flatten(2).mean(2)[0] for m in seen]))
    first, last = (part for part in built.projector if isinstance(part, nn.Linear))
    hidden = first(torch.stack(means))
    rows = last((normed(hidden) if joint else hidden).clamp(min=0))
    return F.normalize(normed(rows) if joint else rows, dim=1)


@pytest.mark.parametrize("kind", ["resenc", "vit"])
def test_nt_xent_of_the_batch_by_loops(make_batch: Make, kind: str) -> None:
    built, batch = objective(kind, places=3, temperature=0.5), make_batch(SHAPE, size=12)
    rows = embedded(built, batch)
    losses, negatives = [], set()
    for anchor in range(12):
        positive = anchor ^ 1  # both views of a place lie side by side
        others = [i for i in range(12) if i not in (anchor, positive)]
        negatives.add(len(others))
        scores = [math.exp(rows[anchor] @ rows[i] / 0.5) for i in [positive, *others]]
        losses.append(-math.log(scores[0] / sum(scores)))
    assert negatives == {2 * 6 - 2}
    assert built(batch, 0.0).loss.item() == pytest.approx(sum(losses) / 12, rel=1e-5)


def test_within_scan_by_loops(make_batch: Make) -> None:
    built = objective(form="within_scan", places=3, temperature=0.1)
    batch = make_batch(SHAPE, size=12)
    rows = embedded(built, batch)
    losses = []
    for scan in range(2):
        own = range(6 * scan, 6 * scan + 6)
        for anchor in own[::2]:  # first views alone
            positive = anchor + 1
            others = [i for i in own if i not in (anchor, positive)]
            assert len(others) == 2 * (3 - 1)
            scores = [math.exp(rows[anchor] @ rows[i] / 0.1) for i in [positive, *others]]
            losses.append(-math.log(scores[0] / sum(scores)))
    assert built(batch, 0.0).loss.item() == pytest.approx(sum(losses) / 6, rel=1e-5)


@pytest.mark.parametrize(
    ("form", "places", "scans", "negatives"),
    [("nt_xent", 1, 4, 6), ("nt_xent", 2, 2, 6), ("within_scan", 15, 2, 28)],
)
def test_equal_crops_tell_how_many_negatives_there_are(
    make_batch: Make, form: Any, places: int, scans: int, negatives: int
) -> None:
    batch = make_batch(SHAPE, size=2 * places * scans)
    batch.image[:] = batch.image[:1].clone()
    loss = objective(form=form, places=places)(batch, 0.0).loss
    assert loss.item() == pytest.approx(math.log(1 + negatives), rel=1e-5)


def test_other_scans_do_not_matter_within_one(make_batch: Make) -> None:
    built = objective(form="within_scan", places=2)
    one, two = make_batch(SHAPE, size=4), make_batch(SHAPE, size=4, seed=1)
    both = replace(one, image=torch.cat([one.image, two.image]))
    mean = (built(one, 0.0).loss + built(two, 0.0).loss) / 2
    torch.testing.assert_close(built(both, 0.0).loss, mean)
    nt_xent = objective(places=2)
    apart = (nt_xent(one, 0.0).loss + nt_xent(two, 0.0).loss) / 2
    assert nt_xent(both, 0.0).loss > apart + 0.5  # twice the negatives


def test_one_place_has_no_negative_within_its_scan() -> None:
    with pytest.raises(ValueError, match="places=2"):
        objective(form="within_scan", places=1)


@pytest.mark.parametrize("form", ["nt_xent", "within_scan"])
def test_one_batch_is_learned(make_batch: Make, form: Any) -> None:
    built = objective(form=form, places=2, temperature=0.1)
    batch = make_batch(SHAPE, size=8)
    batch.image[1::2] = batch.image[::2] + 0.1 * torch.randn_like(batch.image[::2])
    optimizer = torch.optim.Adam(built.parameters(), lr=1e-2)
    first = built(batch, 0.0).loss.item()
    for _ in range(60):
        optimizer.zero_grad()
        loss = built(batch, 0.0).loss
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.2 * first
