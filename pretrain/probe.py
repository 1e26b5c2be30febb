"""A linear probe on a few labelled cases: does the encoder know anatomy by now?

Each voxel is described by the encoder's feature maps, interpolated to it; of maps with one stride
the deepest counts, finer ones than every fourth voxel are left out where a coarser one is there.
Ridge regression onto the classes, in closed form, is fitted on all cases but one and segments the
one that was left out; since both it and the interpolation are linear, it is applied to the maps
first, and the voxels get interpolated class scores. The score is the mean Dice over cases and
classes at voxel resolution within fixed crops around what is labelled. A second score asks the
nearest neighbours: the class of a voxel by the most similar ones of the other cases, as the mean
recall over classes.

The cases are of the training part of the corpus's split, one of each subject. Nothing of its
validation or test part is used, neither by subject nor by fingerprint.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from data_prep.corpus import Corpus, open_corpus
from data_prep.errors import InputError
from data_prep.preprocess import Preprocess
from pretrain.loader import CropDataset, collate, to_batch, to_device, valid_of
from pretrain.schedule import Schedule, generator

Encode = Callable[[Tensor], list[Tensor]]
Strides = Sequence[tuple[int, int, int]]

CASES = 8
VOXELS = 512
"""Of each case that the probe learns from: half of the background, half of the classes."""
CLASSES = 8
"""The probe tells at most so many, those that most cases have."""
FINEST = 4
"""Stride of the finest feature map that counts."""
PENALTY = 0.01
"""Of the ridge, on standardised features, per voxel."""
NEIGHBOURS = 10


def probe_cases(corpus: Corpus) -> list[int]:
    """Positions of the cases that a probe may use, at most 8.

    Raises:
        InputError: the corpus has no labels, no split, or fewer than two cases to use.
    """
    if not corpus.labelled:
        raise InputError(
            f"health.probe={corpus}: holds no labels; prep writes them where there are some"
        )
    name = "official" if "official" in corpus.splits else "default"
    split = corpus.split(name)
    apart = [key for part in ("validation", "test") for key in split["parts"][part]]
    prints = corpus.fingerprints()
    seen = {prints[key] for key in apart}
    subjects = {corpus.subjects[corpus.position(key)] for key in apart}
    wanted = {int(c["value"]) for c in corpus.classes if c["value"] and not c["ignore"]}
    chosen: dict[str, int] = {}
    for key in split["parts"]["train"]:
        item = corpus.position(key)
        subject = corpus.subjects[item]
        if subject in chosen or subject in subjects or prints[key] in seen:
            continue
        meta = corpus.meta(item)
        if meta["class_voxels"] and wanted <= set(meta["annotated"]):
            chosen[subject] = item
    ranked = sorted(chosen, key=lambda subject: hashlib.blake2b(subject.encode()).digest())
    if len(ranked) < 2:
        raise InputError(
            f"health.probe={corpus}: the train part of split {name!r} has {len(ranked)} "
            "subjects with complete labels that are in no other part; a probe needs two"
        )
    return [chosen[subject] for subject in ranked[:CASES]]


class Probe:
    """Fixed crops of a labelled corpus, and what an encoder's features say of them."""

    def __init__(
        self,
        corpus: Corpus,
        channels: int | None,
        preprocess: Preprocess,
        crop_size: tuple[int, int, int],
    ) -> None:
        found = sorted({int(n) for n in corpus.shapes[:, 0]})
        if channels is not None and found != [channels]:
            raise InputError(
                f"health.probe={corpus}: its volumes have {found} "
                f"channels, the run's have {channels}; give a corpus like the run's"
            )
        self.items = probe_cases(corpus)
        self.dataset = CropDataset(
            corpus,
            np.arange(len(corpus)),
            Schedule(np.asarray(corpus.shards), 0),
            preprocess,
            crop_size,
            label=True,
        )
        self._cases: list[_Case] = []

    @classmethod
    def open(
        cls,
        path: Path,
        channels: int | None,
        preprocess: Preprocess,
        crop_size: tuple[int, int, int],
    ) -> Probe:
        """Opens a labelled corpus; channels None is any number, where the run's is not known.

        Raises:
            InputError: it cannot serve as a probe.
        """
        corpus = open_corpus(path, "health.probe")
        return cls(corpus, channels, preprocess, crop_size)

    def score(self, encode: Encode, strides: Strides, device: torch.device) -> dict[str, float]:
        """Mean Dice of the ridge and mean recall of the neighbours: probe_dice and probe_knn.

        Both NaN where a feature is not finite.

        Args:
            encode: an image [B, C, D, H, W] to the feature maps of an encoder, in evaluation mode
                and without gradients.
            strides: of the maps.
            device: where the encoder is.
        """
        if not self._cases:
            self._cases = self._read()
        maps = [self._maps(encode, strides, case, device) for case in self._cases]
        rows = [
            sample(found, case.voxels, case.label.shape).double().cpu().numpy()
            for found, case in zip(maps, self._cases, strict=True)
        ]
        if not all(np.isfinite(x).all() for x in rows):
            return {"probe_dice": float("nan"), "probe_knn": float("nan")}
        every = [
            Moments.of(x, case.target, case.weight)
            for x, case in zip(rows, self._cases, strict=True)
        ]
        dice = []
        for held, case in enumerate(self._cases):
            weight, bias = ridge([one for i, one in enumerate(every) if i != held])
            predicted = apply(maps[held], weight, bias, case.label.shape)
            dice += dice_of(predicted.cpu().numpy(), case.label, case.counted)
        groups = np.repeat(np.arange(len(rows)), [len(x) for x in rows])
        classes = np.concatenate([case.target.argmax(1) for case in self._cases])
        return {
            "probe_dice": float(np.mean(dice)),
            "probe_knn": neighbour_recall(np.concatenate(rows), classes, groups),
        }

    def _read(self) -> list[_Case]:
        raws = [self.dataset.middle(item) for item in self.items]
        ignored = [c["value"] for c in self.dataset.corpus.classes if c["ignore"]]
        counts: Counter[int] = Counter()
        for raw in raws:
            counts.update(int(v) for v in np.unique(raw["label"]) if v and v not in ignored)
        values = sorted(counts, key=lambda value: (-counts[value], value))[:CLASSES]
        read = [
            _Case(raw, values, ignored, item) for raw, item in zip(raws, self.items, strict=True)
        ]
        usable = [case for case in read if case.usable]
        if len(usable) < 2:
            raise InputError(
                f"health.probe={self.dataset.corpus}: {len(usable)} of the crops in the "
                "middle of its cases hold background and a class, a probe needs two; give a larger "
                "crop_size or another corpus"
            )
        return usable

    @staticmethod
    def _maps(encode: Encode, strides: Strides, case: _Case, device: torch.device) -> list[Tensor]:
        """The feature maps of a case that count, each [E, d, h, w]."""
        raw = collate([case.raw])
        moved = to_device(raw, device)
        found = encode(to_batch(moved).image)
        return [found[i][0].float() for i in counted_maps(strides)]


class _Case:
    """A crop with its classes (0 background, 1... the probe's), and the voxels to learn from."""

    def __init__(
        self, raw: dict[str, Any], values: list[int], ignored: list[int], item: int
    ) -> None:
        self.raw = raw
        stored = raw["label"].numpy()
        self.label = np.zeros(stored.shape, np.int64)
        for index, value in enumerate(values, start=1):
            self.label[stored == value] = index
        self.counted = valid_of(raw)[0].numpy() & ~np.isin(stored, ignored)
        rng = generator("probe", item)
        present = [c for c in range(len(values) + 1) if (self.counted & (self.label == c)).any()]
        self.usable = len(present) > 1
        if not self.usable:
            return
        self.voxels, self.weight = choose_voxels(self.label, self.counted, present, rng)
        self.target = np.eye(len(values) + 1)[self.label[tuple(self.voxels.T)]]


def counted_maps(strides: Strides) -> list[int]:
    """Which feature maps describe a voxel: of one stride the deepest, none finer than every 4th.

    The deepest map alone where all are finer.
    """
    deepest = {stride: i for i, stride in enumerate(strides)}
    coarse = [i for stride, i in deepest.items() if max(stride) >= FINEST]
    return coarse or [len(strides) - 1]


def choose_voxels(
    label: NDArray[np.int64],
    counted: NDArray[np.bool_],
    present: Sequence[int],
    rng: np.random.Generator,
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Voxels [n, 3] of a crop to learn from, half of them background, and weights [n] of sum 1.

    Args:
        label: classes [D, H, W], 0 background.
        counted: which voxels count.
        present: the classes that have such voxels.
        rng: draws among them.
    """
    chosen, weights = [], []
    for index in present:
        found = np.argwhere(counted & (label == index))
        share = VOXELS // 2 // (1 if index == 0 else max(len(present) - 1, 1))
        taken = found[rng.permutation(len(found))[:share]]
        chosen.append(taken)
        # Between what the crop holds and equal shares: with the one, small structures are never
        # predicted; with the other, everywhere.
        weights.append(np.full(len(taken), (len(found) / len(taken)) ** 0.5))
    weight = np.concatenate(weights)
    return np.concatenate(chosen), weight / weight.sum()


def sample(maps: list[Tensor], voxels: NDArray[np.int64], shape: tuple[int, ...]) -> Tensor:
    """Features of voxels [n, 3] of a crop, from maps [E_i, d, h, w]: [n, sum E_i].

    The trilinear interpolation that `interpolate` makes at each voxel's centre.
    """
    centres = (torch.from_numpy(voxels).float() + 0.5) / torch.tensor(shape) * 2 - 1
    at = centres.flip(1)[None, None, None].to(maps[0].device)  # grid_sample counts w, h, d
    return torch.cat(
        [
            F.grid_sample(m[None], at, "bilinear", "border", align_corners=False)[0, :, 0, 0].T
            for m in maps
        ],
        dim=1,
    )


class Moments(NamedTuple):
    """Weighted first and second moments of features [n, F] and targets [n, K] of one case."""

    x: NDArray[np.float64]
    y: NDArray[np.float64]
    xx: NDArray[np.float64]
    xy: NDArray[np.float64]

    @classmethod
    def of(
        cls, x: NDArray[np.float64], y: NDArray[np.float64], weight: NDArray[np.float64]
    ) -> Moments:
        """Moments under weights [n] that sum to 1."""
        weighted = x * weight[:, None]
        return cls(weighted.sum(0), weight @ y, weighted.T @ x, weighted.T @ y)


def ridge(cases: Sequence[Moments]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Ridge on standardised features onto the targets, each case of one weight.

    Returns:
        Slope [F, K] and bias [K]: the prediction is `x @ slope + bias`.
    """
    x, y, xx, xy = (np.mean(parts, axis=0) for parts in zip(*cases, strict=True))
    scale = np.sqrt(np.maximum(np.diag(xx) - x**2, 0)) + 1e-8
    gram = (xx - np.outer(x, x)) / np.outer(scale, scale)
    cross = (xy - np.outer(x, y)) / scale[:, None]
    slope = np.linalg.solve(gram + PENALTY * np.eye(len(gram)), cross) / scale[:, None]
    return slope, y - x @ slope


def apply(
    maps: list[Tensor],
    weight: NDArray[np.float64],
    bias: NDArray[np.float64],
    shape: tuple[int, ...],
) -> Tensor:
    """The class of each voxel of a crop [D, H, W], from a linear rule on its features."""
    parts = torch.from_numpy(weight).float().to(maps[0].device).split([len(m) for m in maps])
    scores = torch.from_numpy(bias).float().to(maps[0].device)[:, None, None, None]
    for found, part in zip(maps, parts, strict=True):
        low = torch.einsum("edhw,ek->kdhw", found, part)
        scores = scores + F.interpolate(low[None], shape, mode="trilinear", align_corners=False)[0]
    return scores.argmax(0)


def dice_of(
    predicted: NDArray[np.int64], label: NDArray[np.int64], counted: NDArray[np.bool_]
) -> list[float]:
    """Dice of each class that the crop has, over the voxels that count."""
    found = []
    for index in np.unique(label[counted & (label > 0)]):
        a, b = (predicted == index) & counted, (label == index) & counted
        found.append(2 * float((a & b).sum()) / float(a.sum() + b.sum()))
    return found


def neighbour_recall(
    x: NDArray[np.float64], classes: NDArray[np.int64], groups: NDArray[np.int64]
) -> float:
    """Mean over classes of the share of voxels whose nearest neighbours are of their class.

    Neighbours are the 10 of largest cosine similarity, on standardised features, among voxels of
    other groups; they vote, and of equal votes the lower class wins.
    """
    z = (x - x.mean(0)) / (x.std(0) + 1e-8)
    z = (z / np.maximum(np.linalg.norm(z, axis=1, keepdims=True), 1e-12)).astype(np.float32)
    similar = z @ z.T
    similar[groups[:, None] == groups[None]] = -np.inf
    nearest = np.argpartition(-similar, NEIGHBOURS - 1, axis=1)[:, :NEIGHBOURS]
    votes = np.stack([(classes[nearest] == c).sum(1) for c in range(classes.max() + 1)], axis=1)
    right = votes.argmax(1) == classes
    return float(np.mean([right[classes == c].mean() for c in np.unique(classes)]))
