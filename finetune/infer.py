"""Whole scans through a network that was trained on crops, in bounded memory.

Windows overlap and are blended with Gaussian weights, as in nnU-Net (Isensee et al. 2021) and
MONAI, whose numbers these are. The volume is walked from the bottom up: once no further window can
touch a slice, its classes are decided and its logits forgotten, so the logits held at a time span
one window along D, however tall the scan.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from data_prep.errors import InputError, attempt
from data_prep.files import make_folder
from data_prep.preprocess import Preprocess
from data_prep.progress import bar
from data_prep.volume import Reject, Volume, read_as, write_nifti
from finetune.segmentation import Segmentation
from finetune.settings import TaskSettings
from pretrain.arguments import build_backbone
from pretrain.release import load_strictly

Size = tuple[int, int, int]
Network = Callable[[Tensor], Tensor]

MODEL_FORMAT = 1


@dataclass(frozen=True)
class Segmenter:
    """A finetuned network with all that it needs to label a scan."""

    model: Segmentation
    preprocess: Preprocess
    task: TaskSettings
    window: Size
    """The size of the crops it was trained on. Instance norms and padded borders tell a network
    where it is: on windows half as long again, one of few labels went from 70 Dice to 25."""
    overlap: float
    modalities: tuple[str, ...]

    def segment(self, volume: Volume) -> NDArray[np.uint8]:
        """Class indices [D, H, W] on the volume's own grid; 0 is background."""
        self.model.eval()
        with torch.inference_mode():
            return segment(
                self.model.logits,
                volume,
                self.preprocess,
                self.window,
                self.overlap,
                next(self.model.parameters()).device,
            )

    def label_values(self, classes: NDArray[np.uint8]) -> NDArray[Any]:
        """Class indices to the data set's label values; a class of several gets its first."""
        values = [0, *(c.values[0] for c in self.task.classes)]
        kind = np.uint8 if max(values) < 256 else np.uint16
        return np.array(values, kind)[classes]


@dataclass(frozen=True)
class Predicted:
    """What `predict` did: files written, and per input left out the reason."""

    written: list[Path]
    left_out: dict[str, str]


def predict(ckpt_run: Path, input_dir: Path, output_dir: Path) -> Predicted:
    """Segments every NIfTI below a folder; results keep the names and the geometry of the inputs.

    Args:
        ckpt_run: folder of a finished finetune run.
        input_dir: folder with .nii or .nii.gz scans in any orientation.
        output_dir: made if missing; label maps on each scan's own grid.

    Raises:
        InputError: no such run, no scan in the folder that can be read, or input and output are
            the same.
    """
    problems: list[str] = []
    scans = sorted(path for path in input_dir.rglob("*") if path.name.endswith((".nii", ".nii.gz")))
    if not input_dir.is_dir():
        problems.append(f"input={input_dir}: no such folder; give a folder with NIfTI scans")
    elif not scans:
        problems.append(f"input={input_dir}: holds no .nii or .nii.gz file")
    if output_dir.resolve().is_relative_to(input_dir.resolve()):
        problems.append(
            f"output={output_dir}: lies in the input folder, and predictions would be taken for "
            "scans; choose another"
        )
    segmenter = attempt(problems, load_segmenter, ckpt_run)
    if problems or segmenter is None:
        raise InputError(problems)
    make_folder(output_dir, "output")
    written, left_out = [], {}
    for scan in bar(iterable=scans, desc="predict", unit="scan"):
        name = scan.relative_to(input_dir)
        try:
            volume = read_as(scan, segmenter.modalities)
        except Reject as reject:
            left_out[str(name)] = str(reject)
            continue
        except Exception as error:
            # A header that no reader foresaw must not stop the folder.
            left_out[str(name)] = f"unreadable: {type(error).__name__}: {error}"
            continue
        target = output_dir / name
        target.parent.mkdir(parents=True, exist_ok=True)
        labels = segmenter.label_values(segmenter.segment(volume))
        write_nifti(labels, volume.native, target)
        written.append(target)
    if not written:
        raise InputError([f"{input_dir / name}: {why}" for name, why in left_out.items()])
    for name, why in left_out.items():
        print(f"left out {name}: {why}")
    return Predicted(written, left_out)


def load_segmenter(run: Path, device: str | torch.device | None = None) -> Segmenter:
    """Loads the network of a finished finetune run, strictly.

    Raises:
        InputError: the folder is not a finished finetune run.
    """
    path = run / "model.json"
    if not path.is_file():
        raise InputError(
            f"ckpt={run}: is not a finished finetune run, it has no model.json; give a run folder "
            "that `voxelith finetune` made and finished"
        )
    config: dict[str, Any] = json.loads(path.read_text())
    if config.get("format") != MODEL_FORMAT:
        raise InputError(
            f"{path}: format {config.get('format')!r}, expected {MODEL_FORMAT}; "
            "the run was made by another version of voxelith"
        )
    try:
        backbone = config["backbone"]
        task = TaskSettings.model_validate(config["task"])
        d, h, w = config["window"]
        overlap, modalities = float(config["overlap"]), tuple(config["modalities"])
        preprocess = Preprocess.from_dict(config["preprocess"])
        name, arguments = backbone["name"], backbone["args"]
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: is damaged ({error}); run `voxelith finetune` again") from error
    encoder = build_backbone(name, arguments, f"{path}: backbone")
    model = Segmentation(encoder=encoder, task=task)
    load_strictly(model, run / "model.safetensors")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return Segmenter(model.to(device).eval(), preprocess, task, (d, h, w), overlap, modalities)


def segment(
    network: Network,
    volume: Volume,
    preprocess: Preprocess,
    window: Size,
    overlap: float,
    device: torch.device,
) -> NDArray[np.uint8]:
    """Class indices [D, H, W] on the volume's own canonical grid.

    Where the preprocessing resamples, probabilities are brought back to the volume's grid linearly
    before the class is chosen, so that borders are not as coarse as the network's grid.
    """
    ready = preprocess.apply(volume)
    shape = volume.array.shape[1:]
    image = torch.from_numpy(np.ascontiguousarray(ready.array, np.float32))
    slices = _slices(sliding_window(network, image, window, overlap, device))
    out = np.zeros(shape, np.uint8)
    step = np.linalg.inv(volume.affine) @ ready.affine  # index of `ready` to index of `volume`
    factors, offset = np.diag(step)[:3], step[:3, 3]
    if np.allclose(factors, 1, atol=1e-6) and np.allclose(offset, 0, atol=1e-4):
        # Padding lies at the far ends and falls away.
        for d, logits in zip(range(shape[0]), slices, strict=False):
            out[d] = logits[:, : shape[1], : shape[2]].argmax(0).to(torch.uint8).numpy()
        return out
    rows, columns = (
        _interpolation(shape[a], image.shape[a + 1], factors[a], offset[a]) for a in (1, 2)
    )
    flat = (rows @ logits.softmax(0) @ columns.T for logits in slices)  # [K, H, W] each
    position = _position(shape[0], image.shape[1], factors[0], offset[0])
    for d, probability in enumerate(_at_positions(flat, position)):
        out[d] = probability.argmax(0).to(torch.uint8).numpy()
    return out


def sliding_window(
    network: Network, image: Tensor, window: Size, overlap: float, device: torch.device
) -> Iterator[Tensor]:
    """Yields logits [K, n, H, W] of consecutive slabs along D, from the first slice to the last.

    Args:
        network: maps [1, C, *window] to [1, K, *window].
        image: [C, D, H, W] on the CPU; smaller than the window is padded with its minimum.
        window: (d, h, w) in voxels.
        overlap: of neighbouring windows, from 0 to below 1.
        device: where the network is.
    """
    size = image.shape[1:]
    missing = [max(w - n, 0) for n, w in zip(size, window, strict=True)]
    padding = [(n // 2, n - n // 2) for n in missing]
    low = image.flatten(1).min(1).values[:, None, None, None]
    if any(missing):
        flat = [side for pair in reversed(padding) for side in pair]
        image = F.pad(image - low, flat) + low
    depth, height, width = image.shape[1:]
    starts = [_starts(n, w, overlap) for n, w in zip(image.shape[1:], window, strict=True)]
    weight = gaussian(window).to(device)
    kept = tuple(slice(a, a + n) for (a, _), n in zip(padding, size, strict=True))
    total: Tensor | None = None
    mass = torch.zeros(window[0], height, width, device=device)
    for d, onward in zip(starts[0], [*starts[0][1:], depth], strict=True):
        for h, w in itertools.product(starts[1], starts[2]):
            crop = image[:, d : d + window[0], h : h + window[1], w : w + window[2]]
            logits = network(crop[None].to(device))[0].float()  # [K, d, h, w]
            if total is None:
                total = torch.zeros(len(logits), window[0], height, width, device=device)
            at = (slice(None), slice(h, h + window[1]), slice(w, w + window[2]))
            total[(slice(None), *at)] += logits * weight
            mass[at] += weight
        assert total is not None
        n = onward - d
        done = slice(max(kept[0].start - d, 0), min(kept[0].stop - d, n))
        if done.start < done.stop:
            yield (total[:, done] / mass[done])[:, :, kept[1], kept[2]].cpu()
        total = torch.cat([total[:, n:], torch.zeros_like(total[:, :n])], 1)
        mass = torch.cat([mass[n:], torch.zeros_like(mass[:n])])


def gaussian(window: Sequence[int]) -> Tensor:
    """Weights [d, h, w] of a window: 1 in the middle, sigma an eighth of each side."""
    weight = torch.ones(())
    for n in window:
        x = torch.arange(n) - (n - 1) / 2
        weight = weight[..., None] * torch.exp(-0.5 * (x / (n / 8)) ** 2)
    # A corner's weight would be 1e-11, lost in a sum of float32.
    return weight.clamp(min=max(1e-3, float(weight.min())))


def _starts(length: int, window: int, overlap: float) -> list[int]:
    """Where windows start along an axis, the last one flush with its end."""
    step = max(1, int(window * (1 - overlap)))
    return [min(i * step, length - window) for i in range(-(-(length - window) // step) + 1)]


def _slices(slabs: Iterator[Tensor]) -> Iterator[Tensor]:
    """[K, n, H, W] slabs to [K, H, W] slices."""
    for slab in slabs:
        yield from slab.unbind(1)


def _at_positions(slices: Iterator[Tensor], positions: NDArray[np.float64]) -> Iterator[Tensor]:
    """Slices at fractional positions that never go back, blended of the two around each."""
    here, ahead, at = next(slices), None, 0
    for z in positions:
        while at + 1 <= z:
            here, ahead, at = (next(slices) if ahead is None else ahead), None, at + 1
        if z > at and ahead is None:
            ahead = next(slices)
        yield torch.lerp(here, ahead, float(z - at)) if z > at and ahead is not None else here


def _position(length: int, source: int, factor: float, offset: float) -> NDArray[np.float64]:
    """Where each of `length` indices lies among `source` others, held at the ends."""
    return np.clip((np.arange(length) - offset) / factor, 0, source - 1)


def _interpolation(length: int, source: int, factor: float, offset: float) -> Tensor:
    """[length, source] weights of linear interpolation to those positions."""
    position = _position(length, source, factor, offset)
    below = np.floor(position).astype(np.int64)
    above = np.minimum(below + 1, source - 1)
    share = torch.from_numpy(position - below).float()
    index = torch.arange(length)
    weights = torch.zeros(length, source)
    weights[index, torch.from_numpy(below)] += 1 - share
    weights[index, torch.from_numpy(above)] += share
    return weights
