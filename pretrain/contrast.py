"""Contrastive losses: views of the same are near, views of others far, by cosine similarity.

NT-Xent: Chen et al. 2020, arXiv:2002.05709, over the crops of all ranks. CT-FM's form within a
scan: Pai et al. 2025, arXiv:2501.09001. Global and local losses of volumes whose anatomy is
aligned: Chaitanya et al. 2020, arXiv:2006.10511, in 3D here: partitions are slabs of the volume,
regions cubes of a feature map.

All are means of l(a, b) = -ln(e^s(a,b) / (e^s(a,b) + sum over negatives n of e^s(a,n))), where s is
the cosine over a temperature: ln(1 + number of negatives) if all embeddings are equal. Chaitanya
adds l(a, b) and l(b, a) of a pair, which is twice the mean taken here.

Shape legend: N crops, S scans, C crops of each, V volumes, P partitions of each, R regions of each
map, E width; M volumes of all ranks.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from itertools import combinations, product
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from pretrain.collectives import gather, rank
from pretrain.numerics import in_float32, unit


@in_float32
def nt_xent(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """Each view of a crop is to find the other one among all views of the batch of all ranks.

    The mean over the 2 N own views; ranks have equally many. The views of all other crops are
    negatives, two crops of one scan too. This is Chaitanya's G^R as well.

    Args:
        first: embeddings of one view of each crop [N, E].
        second: of the other one [N, E].
        temperature: 0.5 in nnssl, 0.1 in Chaitanya.
    """
    own = unit(torch.cat([first, second]))  # [2 N, E]
    everyone = gather(own)
    count = len(own)
    here = torch.arange(count, device=own.device)
    itself = torch.arange(len(everyone), device=own.device) == (rank() * count + here)[:, None]
    logits = (own @ everyone.mT / temperature).masked_fill(itself, -torch.inf)
    return F.cross_entropy(logits, rank() * count + here.roll(len(first)))


@in_float32
def within_scan(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """CT-FM: the first view of a crop is to find the second among the crops of the same scan.

    Negatives are both views of the scan's C - 1 other crops, 2 (C - 1) in all; where these overlap
    in space, they are false ones. Nothing is asked of other scans, nor of second views.

    Args:
        first: embeddings of the anchors [S, C, E].
        second: of their other views [S, C, E].
        temperature: 0.1 in CT-FM.
    """
    anchors, others = unit(first), unit(second)
    S, C, _ = anchors.shape
    crop = torch.arange(C, device=anchors.device)
    same = (anchors @ anchors.mT).masked_fill(crop == crop[:, None], -torch.inf)
    logits = torch.cat([anchors @ others.mT, same], dim=2) / temperature  # [S, C, 2 C]
    return F.cross_entropy(logits.flatten(0, 1), crop.repeat(S))


@in_float32
def partition_contrast(
    first: Tensor, second: Tensor, temperature: float, *, across: bool
) -> Tensor:
    """Chaitanya's global loss, which knows that partition p of two volumes shows similar anatomy.

    Never a negative: anything of the anchor's own partition, of any volume and view. That leaves
    2 M (P - 1). Positives are the two views of an image (G^D-) and, with `across`, also the same
    view of the same partition of each other volume (G^D). The mean is over all (anchor, positive)
    of all ranks, in both directions; ranks have equally many volumes.

    Args:
        first: embeddings of one view, [V, P, E], one image of each partition.
        second: of the other one [V, P, E].
        temperature: 0.1 in the paper.
        across: whether volumes attract each other.

    Raises:
        ValueError: if there is one partition only: nothing would be a negative.
    """
    V, P, _ = first.shape
    if P < 2:
        raise ValueError("partition_contrast needs at least two partitions of each volume")
    own = unit(torch.stack([first, second], 1))  # [V, 2, P, E]
    everyone = gather(own)  # [M, 2, P, E]
    similarity = torch.einsum("vape,mbqe->vapmbq", own, everyone) / temperature
    partition = torch.arange(P, device=own.device)
    mates = (partition == partition[:, None])[:, None, None]  # [P, 1, 1, P]
    negatives = similarity.masked_fill(mates, -torch.inf).logsumexp((3, 4, 5))  # [V, 2, P]
    positive = similarity.diagonal(dim1=2, dim2=5)  # [V, 2, M, 2, P]
    losses = F.softplus(negatives[:, :, None, None] - positive)

    same_view = torch.eye(2, dtype=torch.bool, device=own.device)[:, None, :, None]  # [2, 1, 2, 1]
    itself = _own_volume(V, everyone)[:, None, :, None, None]  # [V, 1, M, 1, 1]
    chosen = itself ^ same_view if across else itself & ~same_view  # [V, 2, M, 2, 1]
    positives = len(everyone) if across else 1
    return torch.where(chosen, losses, 0).sum() / (2 * V * P * positives)


def _own_volume(volumes: int, everyone: Tensor) -> Tensor:
    """Bool [V, M], True where a volume of this rank meets itself among those of all."""
    here = rank() * volumes + torch.arange(volumes, device=everyone.device)
    return here[:, None] == torch.arange(len(everyone), device=everyone.device)


class Lattice(NamedTuple):
    """Where regions lie in a feature map, and which are neighbours.

    starts: first cell (d, h, w) of each; neighbours: bool [R, R], equally many in each row.
    """

    starts: list[tuple[int, int, int]]
    neighbours: Tensor


def region_lattice(
    shape: Sequence[int],
    size: int,
    neighbours: int = 8,
    device: torch.device | str | None = None,
) -> Lattice:
    """Fixed regions of a map: a 3x3x3 lattice from border to border, and 8 points between.

    That is the paper's 3x3 lattice with 4 quarter points of a slice, with a third axis: 35 regions.
    The neighbours of a region are those nearest to it in cells; among equally near ones, the first
    in the order of `starts`. The paper fixes 5 of 12 by hand; 8 are, for a point between, the
    corners of its octant.

    Args:
        shape: cells of the map along (d, h, w).
        size: cells of a region along each axis, 3 in the paper.
        neighbours: of each region.
        device: where their table is made; nothing waits for it.

    Raises:
        ValueError: if regions would share cells, and so be false negatives.
    """
    rooms = [cells - size for cells in shape]
    lattice = product(*[[room * i // 2 for i in range(3)] for room in rooms])
    between = product(*[[room * (2 * i + 1) // 4 for i in range(2)] for room in rooms])
    starts = [(d, h, w) for d, h, w in [*lattice, *between]]
    apart = (max(map(abs, map(operator.sub, *two))) for two in combinations(starts, 2))
    if min(apart) < size:
        raise ValueError(
            f"regions of {size} cells overlap in a feature map of {list(shape)}: one axis needs "
            f"{5 * size} cells or more, the others {3 * size}; take a finer map or smaller regions"
        )
    # The same places once more, on the device.
    index, R = torch.arange(3, device=device), len(starts)
    corners = torch.cartesian_prod(*[room * index // 2 for room in rooms])
    middles = torch.cartesian_prod(*[room * (2 * index[:2] + 1) // 4 for room in rooms])
    places = torch.cat([corners, middles])
    squared = (places[:, None] - places).square().sum(2)  # [R, R]
    # Itself comes first; equally near ones by their number.
    order = (squared * R + torch.arange(R, device=device)).argsort(1)[:, 1 : 1 + neighbours]
    table = torch.zeros(R, R, dtype=torch.bool, device=device).scatter(1, order, True)
    return Lattice(starts, table)


def take_regions(features: Tensor, starts: Sequence[Sequence[int]], size: int) -> Tensor:
    """Cuts regions of a map [B, C, D, H, W] out, each as one row: [B, R, C * size^3]."""
    cubes = [
        features[:, :, d : d + size, h : h + size, w : w + size].flatten(1) for d, h, w in starts
    ]
    return torch.stack(cubes, 1)


@in_float32
def local_contrast(
    first: Tensor, second: Tensor, neighbours: Tensor, temperature: float, *, across: bool
) -> Tensor:
    """Chaitanya's local loss: a region is to find itself in another map, not its neighbours.

    For a pair of maps, region r of one is the anchor, r of the other the positive, and the
    neighbours of r in both maps are the negatives; other images never are. Pairs are the two views
    of an image (L^R) and, with `across`, also the same view of the same partition of each other
    volume (L^D). The mean is over regions and ordered pairs of all ranks. The views must be
    aligned in space: they differ in intensities only.

    Args:
        first: embeddings of the regions of one view, [V, P, R, E].
        second: of the other one [V, P, R, E].
        neighbours: bool [R, R] on the same device; see `region_lattice`.
        temperature: 0.1 in the paper.
        across: whether volumes attract each other.
    """
    own = unit(torch.stack([first, second], 1))  # [V, 2, P, R, E]
    others = own.flip(1)[:, None]  # [V, 1, 2, P, R, E]
    if across:
        everyone = gather(own)  # [M, 2, P, R, E]
        itself = _own_volume(len(own), everyone)[:, :, None, None, None, None]
        others = torch.where(itself, others, everyone)  # [V, M, 2, P, R, E]
    between = torch.einsum("vapre,vmapqe->vmaprq", own, others) / temperature
    within = own @ own.mT / temperature  # [V, 2, P, R, R]
    far = ~neighbours
    of_other = between.masked_fill(far, -torch.inf).logsumexp(-1)  # [V, M, 2, P, R]
    of_own = within.masked_fill(far, -torch.inf).logsumexp(-1)[:, None]  # [V, 1, 2, P, R]
    positive = between.diagonal(dim1=-2, dim2=-1)
    return F.softplus(torch.logaddexp(of_other, of_own) - positive).mean()
