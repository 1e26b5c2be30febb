"""A finetuned network with all that it needs to label a scan, from a run or from a release."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, ValidationError
from safetensors.torch import save
from torch import Tensor

from data_prep.errors import CorruptionError, InputError, plain_message
from data_prep.files import write_bytes, write_json
from data_prep.preprocess import Preprocess
from data_prep.volume import Volume, read_channels
from finetune.infer import Network, Size, mirrored, native_scores, segment, swapped_classes
from finetune.protocol import DecoderKind
from finetune.segmentation import Segmentation
from finetune.settings import SegmentationFacts, TaskSettings
from pretrain.arguments import build_backbone
from pretrain.encoder import load_encoder
from pretrain.loop import autocast_of, machine_precision
from pretrain.manifest import DECODER, Part
from pretrain.release import (
    Release,
    compare_golden,
    golden_features,
    golden_modality,
    load_release,
    load_strictly,
)
from pretrain.settings import Side, TrainerSettings

MODEL_FORMAT = 1
Precision = Literal["auto", "32-true", "bf16-mixed"]


class ModelFile(SegmentationFacts):
    """The keys of a run's model.json, format 1."""

    format: Literal[1]
    backbone: Part
    preprocess: dict[str, Any]
    window: tuple[Side, Side, Side]
    modalities: Annotated[tuple[Literal["CT", "MR"], ...], Field(min_length=1)]


@dataclass(frozen=True)
class Segmenter:
    """A finetuned network and how it looks at scans."""

    model: Segmentation
    preprocess: Preprocess
    task: TaskSettings
    window: Size
    """The size of the crops it was trained on. Instance norms and padded borders tell a network
    where it is: on windows half as long again, one of few labels went from 70 Dice to 25."""
    overlap: float
    modalities: tuple[str, ...]
    tta: bool = False
    """Whether windows are also seen mirrored, along the axes that the task allows."""
    precision: Precision = "32-true"
    """Of the network's layers; sums of windows and probabilities are float32."""
    window_batch: int = 1

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.model.parameters()).device

    @property
    def channels(self) -> int:
        """Scans of a case that it takes at a time."""
        return self.model.encoder.in_channels

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
        with autocast_of(layer_precision(self.precision, image.device), image.device):
            return self.model.logits(image)


def layer_precision(precision: Precision, device: torch.device) -> str:
    """What `auto` comes to where the network is: bfloat16 on a GPU that has it."""
    if precision == "auto" and device.type != "cuda":
        return "32-true"
    return machine_precision(TrainerSettings(precision=precision))


def write_segmenter(
    segmenter: Segmenter, backbone: dict[str, Any], decoder: DecoderKind, folder: Path
) -> None:
    """Writes model.safetensors and model.json into a run folder; `load_segmenter` reads them."""
    facts = SegmentationFacts(
        task=segmenter.task, decoder=decoder, overlap=segmenter.overlap, tta=segmenter.tta
    )
    state = segmenter.model.state_dict()
    weights = {name: value.contiguous().cpu() for name, value in state.items()}
    write_bytes(folder / "model.safetensors", save(weights, {"format": "pt"}))
    write_json(
        folder / "model.json",
        {
            "format": MODEL_FORMAT,
            "backbone": backbone,
            "preprocess": segmenter.preprocess.to_dict(),
            "window": list(segmenter.window),
            "modalities": list(segmenter.modalities),
            **facts.model_dump(mode="json"),
        },
    )


def load_segmenter(ref: Path, device: str | torch.device | None = None) -> Segmenter:
    """Loads the network of a finished finetune run or of a segmenter's release, strictly.

    Args:
        ref: the folder of either.
        device: where the weights go; by default a GPU if there is one.

    Raises:
        InputError: the folder is neither.
        CorruptionError: a release whose bytes are not those that were released.
    """
    if (ref / "model.json").is_file():
        segmenter = _from_run(ref)
    elif (ref / "SHA256SUMS").is_file():
        segmenter = _from_release(load_release(ref))
    else:
        raise InputError(
            f"ckpt={ref}: is neither a finished finetune run (no model.json) nor a release (no "
            "SHA256SUMS); give a folder that `voxelith finetune` made and finished, or that "
            "`voxelith export` made of one"
        )
    segmenter.model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()
    return segmenter


def read_model_file(run: Path) -> ModelFile:
    """What a finetune run says of its network.

    Raises:
        InputError: it is damaged, or of another version.
    """
    path = run / "model.json"
    config: dict[str, Any] = json.loads(path.read_text())
    if config.get("format") != MODEL_FORMAT:
        raise InputError(
            f"{path}: format {config.get('format')!r}, expected {MODEL_FORMAT}; "
            "the run was made by another version of voxelith"
        )
    try:
        return ModelFile.model_validate(config)
    except ValidationError as error:
        said = _told(error, "")
        raise InputError(f"{path}: is damaged ({said}); run `voxelith finetune` again") from error


def _from_run(run: Path) -> Segmenter:
    facts = read_model_file(run)
    where = f"{run / 'model.json'}: backbone"
    preprocess = Preprocess.from_dict(facts.preprocess)
    encoder = build_backbone(facts.backbone.name, facts.backbone.args, where)
    model = Segmentation(encoder=encoder, task=facts.task, decoder=facts.decoder)
    load_strictly(model, run / "model.safetensors")
    return Segmenter(
        model, preprocess, facts.task, facts.window, facts.overlap, facts.modalities, facts.tta
    )


def _from_release(release: Release) -> Segmenter:
    facts = release_facts(release)
    encoder = release.build_encoder()
    model = Segmentation(encoder=encoder, task=facts.task, decoder=facts.decoder)
    release.load(model.encoder)
    load_strictly(model.decoder, release.path / DECODER)
    return Segmenter(
        model,
        release.preprocess,
        facts.task,
        release.crop_size,
        facts.overlap,
        release.modalities,
        facts.tta,
    )


def release_facts(release: Release) -> SegmentationFacts:
    """What a release says of its segmentation, checked.

    Raises:
        InputError: it is an encoder, or its facts are not what they should be.
    """
    file = release.path / "config.json"
    if release.kind != "segmenter":
        raise InputError(
            f"ckpt={release.path}: is the release of an encoder, which labels nothing yet; "
            "finetune it (`voxelith finetune ckpt=...`) and give that run, or an export of it"
        )
    try:
        facts = SegmentationFacts.model_validate(release.config["segmentation"])
    except ValidationError as error:
        raise InputError(f"{file}: {_told(error, 'segmentation.')}") from error
    outputs = release.config["decoder"]["out_channels"]
    if outputs != len(facts.task.classes) + 1:
        raise CorruptionError(
            f"{file}: decoder.out_channels is {outputs}, and the task has "
            f"{len(facts.task.classes)} classes and background; fetch the release again"
        )
    return facts


def golden_scores(segmenter: Segmenter, folder: Path) -> dict[str, Tensor]:
    """What a segmenter says to a release's golden scan, which is every channel of several."""
    scans = [folder / "golden_input.nii.gz"] * segmenter.channels
    volume = read_channels(scans, golden_modality(segmenter.modalities))
    return {"scores": segmenter.scores(volume)}


def check_golden_segmenter(path: Path) -> float:
    """Loads a segmenter's release as its users would, and compares features and scores.

    Returns:
        The largest error, relative to the largest value.

    Raises:
        CorruptionError: it is above the tolerance.
    """
    features = golden_features(load_encoder(path), path)
    return compare_golden(path, features | golden_scores(load_segmenter(path, "cpu"), path))


def _told(error: ValidationError, prefix: str) -> str:
    items = error.errors(include_url=False)
    return "; ".join(
        f"{prefix}{'.'.join(map(str, i['loc']))}: {plain_message([i], len(i['loc']))}"
        for i in items
    )
