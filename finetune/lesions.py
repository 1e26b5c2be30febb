"""Lesions found, invented and missed: scores of objects where a class is made of many.

A lesion is a connected component of the class, with 26 neighbours, of whatever size. Two rules say
which were found, and both are reported:

- **Detection F1** counts a lesion of the truth as found if the prediction touches it in one voxel,
  and a predicted one as invented if it touches none of the truth. It is the rule of ISLES'22
  (Hernandez Petzsche et al. 2022, arXiv:2206.06694) and of ATLAS v2.0, and the default of the field
  where lesions are small; one blob over everything is perfect by it.
- **Panoptic quality** (Kirillov et al. 2018, arXiv:1801.00868; for lesions, one case at a time:
  panoptica, Kofler et al. 2023, arXiv:2312.02608) pairs lesions whose IoU is above 0.5; no lesion
  can be in two such pairs. Recognition quality RQ is the F1 of these pairs, segmentation quality SQ
  their mean IoU, and PQ = SQ x RQ.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Mask = NDArray[np.bool_]

_NEIGHBOURS = np.ones((3, 3, 3), bool)


@dataclass(frozen=True)
class Lesions:
    """Of one class in one case: found, invented and missed lesions, and qualities from 0 to 1.

    `tp` counts lesions of the truth, `fp` predicted ones. The qualities need a lesion on either
    side.
    """

    tp: int
    fp: int
    fn: int
    rq: float
    pq: float

    @property
    def f1(self) -> float:
        """Detection F1."""
        return 2 * self.tp / (2 * self.tp + self.fp + self.fn)


def count_lesions(prediction: Mask, truth: Mask) -> Lesions:
    """Matches the lesions of two masks [D, H, W], of which one is not empty."""
    ours, n_pred = ndimage.label(prediction, _NEIGHBOURS)
    theirs, n_true = ndimage.label(truth, _NEIGHBOURS)
    both = prediction & truth
    pairs, common = np.unique(
        theirs[both].astype(np.int64) * (n_pred + 1) + ours[both], return_counts=True
    )
    i, j = pairs // (n_pred + 1), pairs % (n_pred + 1)
    tp, touching = len(np.unique(i)), len(np.unique(j))
    sizes = np.bincount(theirs.ravel())[i] + np.bincount(ours.ravel())[j]
    iou = common / (sizes - common)
    matched = iou > 0.5
    mean = (n_pred + n_true) / 2
    return Lesions(
        tp=tp,
        fp=n_pred - touching,
        fn=n_true - tp,
        rq=float(np.count_nonzero(matched) / mean),
        pq=float(iou[matched].sum() / mean),
    )
