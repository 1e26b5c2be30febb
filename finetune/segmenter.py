"""A finetuned network with all that it needs to label a scan."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_prep.preprocess import Preprocess
from data_prep.volume import Volume
from finetune.finetuned import Finetuned
from finetune.infer import Network, Size, mirrored, native_scores, segment, swapped_classes
from finetune.segmentation import Segmentation
from finetune.settings import TaskSettings


@dataclass(frozen=True)
class Segmenter(Finetuned):
    """A finetuned network that labels voxels."""

    model: Segmentation
    task: TaskSettings

    def segment(self, volume: Volume) -> NDArray[np.uint8]:
        """Class indices [D, H, W] on the volume's own grid; 0 is background."""
        self.model.eval()
        with torch.inference_mode():
            return segment(*self._arguments(volume))

    def scores(self, volume: Volume) -> Tensor:
        """What `segment` takes the largest of, [K, D, H, W] on the CPU: for small scans."""
        self.model.eval()
        with torch.inference_mode():
            slices: Iterator[Tensor] = native_scores(*self._arguments(volume))
            return torch.stack([one.cpu() for one in slices], 1)

    def label_values(self, classes: NDArray[np.uint8]) -> NDArray[Any]:
        """Class indices to the data set's label values; a class of several gets its first."""
        values = [0, *(c.values[0] for c in self.task.classes)]
        kind = np.uint8 if max(values) < 256 else np.uint16
        return np.array(values, kind)[classes]

    def _arguments(
        self, volume: Volume
    ) -> tuple[Network, Volume, Preprocess, Size, float, torch.device, int]:
        network: Network = self._logits
        if self.tta:
            flip = self.task.flip
            network = mirrored(network, flip, swapped_classes(self.task) if flip[2] else None)
        return (
            network, volume, self.preprocess, self.window, self.overlap, self.device,
            self.window_batch,
        )  # fmt: skip

    def _logits(self, image: Tensor) -> Tensor:
        return self.seen(self.model.logits, image)
