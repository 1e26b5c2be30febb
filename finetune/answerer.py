"""A finetuned network with all that it needs to answer for a whole scan.

Windows lie over the scan as those that segment it. Each is answered, and the scan gets the mean of
their probabilities or values. All windows hold equally much of it, for padding is only along axes
where there is one window. Padding counts for nothing in a window's answer, and anonymised voxels,
of which a NIfTI knows nothing, count as any other.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data_prep.preprocess import Preprocess
from data_prep.volume import Volume
from finetune.finetuned import Finetuned
from finetune.infer import filled, starts
from finetune.pooled import Pooled
from finetune.scan_task import ScanTask


@dataclass(frozen=True)
class Answerer(Finetuned):
    """A finetuned network that answers one question for each scan."""

    model: Pooled
    task: ScanTask

    def answer(self, volume: Volume) -> Tensor:
        """What is said of a scan, float32 [K] on the CPU, as `Pooled.answers` has it."""
        # Padding to a multiple would be taken for a part of the scan.
        whole = tuple(o for o in self.preprocess.operations if o["op"] != "pad")
        ready = Preprocess(whole).apply(volume)
        image = torch.from_numpy(np.ascontiguousarray(ready.array, np.float32))
        self.model.eval()
        with torch.inference_mode():
            return self._answer(image).cpu()

    def _answer(self, image: Tensor) -> Tensor:
        """The answer for a preprocessed scan [C, D, H, W]."""
        image, kept = filled(image, self.window)
        valid = torch.zeros(1, *image.shape[1:], dtype=torch.bool)
        valid[(slice(None), *kept)] = True
        along = [
            starts(n, w, self.overlap) for n, w in zip(image.shape[1:], self.window, strict=True)
        ]
        corners = list(itertools.product(*along))
        total = torch.zeros(self.task.outputs, device=self.device)
        for first in range(0, len(corners), self.window_batch):
            places = [
                (slice(None), *(slice(a, a + w) for a, w in zip(corner, self.window, strict=True)))
                for corner in corners[first : first + self.window_batch]
            ]
            crops = torch.stack([image[place] for place in places]).to(self.device)
            inside = torch.stack([valid[place] for place in places]).to(self.device)
            total += self._seen(crops, inside).sum(0)
        return total / len(corners)

    def _seen(self, image: Tensor, valid: Tensor) -> Tensor:
        """Answers [B, K] for windows, with `tta` the mean over all their mirrors."""
        axes = [axis for axis, chosen in enumerate(self.task.flip) if chosen and self.tta]
        mirrors = [m for n in range(len(axes) + 1) for m in itertools.combinations(axes, n)]
        answers = []
        for mirror in mirrors:
            turned = [axis + 2 for axis in mirror]
            found = self.seen(self.model.answers, image.flip(turned), valid.flip(turned)).float()
            if 2 in mirror and self.task.swap:
                found = found[:, self.task.mirrored_classes()]
            answers.append(found)
        return torch.stack(answers).mean(0)
