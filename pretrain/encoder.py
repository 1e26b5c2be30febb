"""Features of a scan in three lines, with the preprocessing that the weights were trained on.

encoder = voxelith.load_encoder("release/")
features = encoder.features("scan.nii.gz")
features.map, features.affine, features.vector
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from data_prep.errors import InputError
from data_prep.images import Reject
from data_prep.preprocess import Preprocess
from data_prep.volume import Volume, as_known, read_known, volume_from_array
from pretrain.backbones.backbone import Backbone
from pretrain.release import LoadReport, load_release

Corner = tuple[int, ...]
"""Of a window, in cells."""
Each = Callable[[Sequence[Corner]], Iterable[Corner]]

OVERLAP = 0.5
"""Of neighbouring windows of a scan that is larger than the crop."""


@dataclass(frozen=True)
class Features:
    """What an encoder sees in one scan.

    Attributes:
        map: float32 [E, d, h, w] on a grid of cells in S, P, L axes.
        affine: maps (d, h, w) of a cell's centre to RAS millimetres.
        spacing: of the cells in mm.
        vector: float32 [E], the mean over the cells.
    """

    map: NDArray[np.float32]
    affine: NDArray[np.float64]
    spacing: tuple[float, float, float]
    vector: NDArray[np.float32]


class Encoder:
    """Weights and what must be done to a scan before it reaches them."""

    def __init__(
        self,
        module: Backbone,
        preprocess: Preprocess,
        config: dict[str, Any],
        report: LoadReport | None = None,
        digest: str | None = None,
    ) -> None:
        self.module = module
        self.preprocess = preprocess
        self.config = config
        self.report = report
        self.digest = digest

    def features(
        self,
        scan: str | Path | Sequence[str | Path] | NDArray[Any],
        *,
        spacing: Sequence[float] | None = None,
        modality: str | None = None,
        overlap: float = OVERLAP,
    ) -> Features:
        """Features of the deepest map.

        A scan that is larger than the training crop is seen by windows of that size that overlap
        and start on whole cells; a cell is the mean over the windows that see it.

        Args:
            scan: path of a NIfTI in any orientation, paths of a scan's channels on one grid, or an
                array [D, H, W] or [C, D, H, W] in physical values (HU for CT) whose axes run to
                S, P, L.
            spacing: in mm along D, H, W; needed for an array.
            modality: CT or MR; by default what the encoder knows, or, if it knows both, told
                from the values (some air at -500 or less is CT).
            overlap: share of a window's side that the next one sees again, below 1.

        Raises:
            InputError: unreadable scan, missing spacing, wrong channels or unknown modality, or
                there is no such overlap.
        """
        try:
            return self.see(self._volume(scan, spacing, modality), overlap=overlap)
        except Reject as reason:
            name = scan if isinstance(scan, str | Path | list | tuple) else "array"
            raise InputError(f"{name}: {reason.detail} ({reason.code})") from reason

    @torch.inference_mode()
    def see(self, volume: Volume, *, overlap: float = OVERLAP, each: Each = iter) -> Features:
        """Features of a volume that was read, under a modality that the encoder knows.

        Args:
            volume: in physical values.
            overlap: as in `features`.
            each: goes over the corners of the windows, for a bar to look on.

        Raises:
            Reject: it has other channels than the encoder takes.
            InputError: there is no such overlap.
        """
        if not 0 <= overlap < 1:
            raise InputError(
                f"overlap={overlap}: must be a share of a window's side, at least 0 and below 1"
            )
        channels = self.module.in_channels
        if len(volume.array) != channels:
            raise Reject(
                "channels",
                f"{len(volume.array)} channels found, this encoder takes {channels}; "
                "give one channel at a time or a matching encoder",
            )
        ready = self.preprocess.apply(volume)
        device = next(self.module.parameters()).device
        image = torch.from_numpy(np.ascontiguousarray(ready.array, dtype=np.float32))
        grid = self._windows(image[None].to(device), overlap, each)
        strides = np.array(self.module.strides[-1])
        # A cell stands for the voxels [i s, (i + 1) s) of each axis.
        cells = np.eye(4)
        cells[:3, :3] = np.diag(strides)
        cells[:3, 3] = (strides - 1) / 2
        d, h, w = np.array(ready.spacing) * strides
        found = grid.float().contiguous().cpu().numpy()
        vector = found.reshape(len(found), -1).mean(axis=1)
        return Features(found, ready.affine @ cells, (float(d), float(h), float(w)), vector)

    def _volume(
        self,
        scan: str | Path | Sequence[str | Path] | NDArray[Any],
        spacing: Sequence[float] | None,
        modality: str | None,
    ) -> Volume:
        known = self.config["modalities"]
        if modality is not None and modality not in known:
            raise InputError(
                f"modality={modality!r}: this encoder was trained on {' and '.join(known)}"
            )
        paths = [scan] if isinstance(scan, str | Path) else scan
        if isinstance(paths, list | tuple) and all(isinstance(p, str | Path) for p in paths):
            return read_known([Path(path) for path in paths], known, modality)
        if spacing is None or len(spacing) != 3 or min(spacing) <= 0:
            raise InputError(
                f"spacing={spacing}: an array needs its spacing in mm along D, H, W, such as "
                "spacing=(3.0, 0.8, 0.8)"
            )
        volume = volume_from_array(np.asarray(scan), spacing, modality=modality)
        return as_known(volume, known)

    def _windows(self, image: torch.Tensor, overlap: float, each: Each) -> torch.Tensor:
        """[1, C, D, H, W] to the deepest map [E, d, h, w] of its own cells."""
        stride = self.module.strides[-1]
        size = self.config["crop_size"]
        shape = image.shape[2:]
        cells = [-(-n // s) for n, s in zip(shape, stride, strict=True)]
        window = [c // s for c, s in zip(size, stride, strict=True)]
        grid = [max(n, k) for n, k in zip(cells, window, strict=True)]
        image = padded_to(image, [n * s for n, s in zip(grid, stride, strict=True)])
        starts = [
            window_starts(n, k, max(1, round(k * (1 - overlap))))
            for n, k in zip(grid, window, strict=True)
        ]
        total = torch.zeros((self.module.channels[-1], *grid), device=image.device)
        seen = torch.zeros(grid, device=image.device)
        was_training = self.module.training
        self.module.eval()
        for corner in each(list(itertools.product(*starts))):
            voxels = tuple(
                slice(c * s, c * s + k * s) for c, k, s in zip(corner, window, stride, strict=True)
            )
            where = tuple(slice(c, c + k) for c, k in zip(corner, window, strict=True))
            crop = image[(slice(None), slice(None), *voxels)]
            total[(slice(None), *where)] += self.module(crop)[-1][0].float()
            seen[where] += 1
        self.module.train(was_training)
        inside = tuple(slice(0, n) for n in cells)
        return (total / seen)[(slice(None), *inside)]


def padded_to(image: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Pads [B, C, D, H, W] at the far ends up to `shape`.

    The padding is each channel's lowest value, which is air, as in training.
    """
    d, h, w = (p - n for p, n in zip(shape, image.shape[2:], strict=True))
    ends = (0, w, 0, h, 0, d)
    lowest = image.amin((2, 3, 4), keepdim=True)
    return torch.where(F.pad(torch.ones_like(image), ends) > 0, F.pad(image, ends), lowest)


def window_starts(length: int, window: int, step: int) -> list[int]:
    """Window starts that cover a length, the last one flush with its end."""
    return sorted({*range(0, length - window, step), length - window})


def load_encoder(ref: str | Path, *, device: str | torch.device = "cpu") -> Encoder:
    """Loads a release's encoder with its preprocessing; every byte is verified.

    Args:
        ref: a release folder, or a reference to one; see `pretrain.fetch`.
        device: where the weights go.

    Raises:
        InputError: not a release, damaged, or naming what is not ours.
    """
    from pretrain.adopt import released  # its release is written with an Encoder

    release = load_release(released(ref))
    module = release.build_encoder()
    report = release.load(module)
    module.eval().requires_grad_(False).to(device)
    return Encoder(module, release.preprocess, release.config, report, release.digest)
