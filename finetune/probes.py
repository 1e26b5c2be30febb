"""Probes of frozen features: what a checkpoint knows before anything is trained, in seconds.

A ridge regression or the nearest neighbours, on the same features and voxels that watch a
pretraining (`pretrain.probe`), put into a decoder of finetuning's. From there on it is a finetuned
network like any other: the same windows, the same scores, the same rows.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from finetune.decoders import LinearDecoder, NeighbourDecoder
from finetune.segmentation import Segmentation, to_classes
from pretrain.loader import CropDataset, collate, to_batch, to_device
from pretrain.losses import IGNORE
from pretrain.probe import Moments, choose_voxels, counted_maps, ridge, sample
from pretrain.schedule import generator

Rows = NDArray[np.float64]


def fit_probe(model: Segmentation, dataset: CropDataset, crops: int) -> None:
    """Fits the decoder of a frozen encoder to the first crops of a training's order.

    Their number is the protocol's, however many cases are labelled.

    Args:
        model: with decoder=linear, which becomes a ridge regression, or decoder=knn.
        dataset: labelled crops in the order in which a training would use them.
        crops: how many of them are read.
    """
    device = next(model.parameters()).device
    found = [_described(model, dataset, position, device) for position in range(crops)]
    kept = [one for one in found if one is not None]
    if not kept:
        return  # nothing counts in any crop: all is background
    if isinstance(model.decoder, LinearDecoder):
        _fit_ridge(model, model.decoder, kept)
    else:
        assert isinstance(model.decoder, NeighbourDecoder)
        _fit_bank(model.decoder, kept, dataset.schedule.seed)


def _described(
    model: Segmentation, dataset: CropDataset, position: int, device: torch.device
) -> tuple[Rows, NDArray[np.int64], Rows] | None:
    """Features [n, F], classes [n] and weights [n] of a crop's voxels."""
    raw: dict[str, Any] = to_device(collate([dataset[position]]), device)
    batch = to_batch(raw)
    assert batch.label is not None
    label = to_classes(batch.label, model.class_of)[0].cpu().numpy()
    counted = batch.valid[0, 0].cpu().numpy() & (label != IGNORE)
    present = [int(c) for c in np.unique(label[counted])]
    if not present:
        return None
    rng = generator("probe", dataset.schedule.seed, position)
    voxels, weight = choose_voxels(label, counted, present, rng)
    model.eval()
    with torch.no_grad():
        maps = model.encoder(batch.image)
    chosen = [maps[i][0].float() for i in counted_maps(model.encoder.strides)]
    rows = sample(chosen, voxels, label.shape).double().cpu().numpy()
    return rows, label[tuple(voxels.T)], weight


def _fit_ridge(
    model: Segmentation,
    decoder: LinearDecoder,
    found: list[tuple[Rows, NDArray[np.int64], Rows]],
) -> None:
    one_hot = np.eye(decoder.out_channels)
    slope, bias = ridge([Moments.of(x, one_hot[c], weight) for x, c, weight in found])
    counted = counted_maps(model.encoder.strides)
    widths = [model.encoder.channels[i] for i in counted]
    parts = dict(zip(counted, torch.from_numpy(slope).float().split(widths), strict=True))
    with torch.no_grad():
        for i, head in enumerate(decoder.heads):
            assert isinstance(head.weight, Tensor)
            head.weight.zero_()
            if i in parts:
                head.weight.copy_(parts[i].T[..., None, None, None])
            if isinstance(head.bias, Tensor):
                head.bias.copy_(torch.from_numpy(bias))


def _fit_bank(
    decoder: NeighbourDecoder, found: list[tuple[Rows, NDArray[np.int64], Rows]], seed: int
) -> None:
    rows = np.concatenate([x for x, _, _ in found])
    classes = np.concatenate([c for _, c, _ in found])
    decoder.mean.copy_(torch.from_numpy(rows.mean(0)))
    decoder.scale.copy_(torch.from_numpy(rows.std(0) + 1e-8))
    taken = generator("bank", seed).permutation(len(rows))[: decoder.BANK]
    device = decoder.bank.device
    chosen = torch.from_numpy(rows[taken]).float().to(device)
    decoder.bank[: len(taken)] = decoder.scaled(chosen)
    decoder.classes[: len(taken)] = torch.from_numpy(classes[taken]).to(device)
