"""A finetuned network as files: model.json and model.safetensors of a run, or a release.

What is written says what the network is asked, so what is read is a segmenter or an answerer.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, ValidationError
from safetensors.torch import save
from torch import Tensor

from data_prep.errors import CorruptionError, InputError, plain_message
from data_prep.files import read_table, write_bytes, write_json
from data_prep.preprocess import Preprocess
from data_prep.volume import read_channels
from finetune.answerer import Answerer
from finetune.finetuned import Finetuned
from finetune.pooled import Pooled, pooled
from finetune.protocol import DecoderKind
from finetune.scan_task import ScanTask
from finetune.segmentation import Segmentation
from finetune.segmenter import Segmenter
from finetune.settings import TaskFacts
from pretrain.arguments import build_backbone
from pretrain.backbones.backbone import Backbone
from pretrain.device import chosen_device
from pretrain.encoder import load_encoder
from pretrain.manifest import DECODER, FACTS, Part
from pretrain.release import (
    Release,
    check_golden,
    compare_golden,
    golden_features,
    golden_modality,
    load_release,
    load_strictly,
)
from pretrain.settings import Side

MODEL_FORMAT = 1


class ModelFile(TaskFacts):
    """The keys of a run's model.json, format 1."""

    format: Literal[1]
    backbone: Part
    preprocess: dict[str, Any]
    window: tuple[Side, Side, Side]
    modalities: Annotated[tuple[Literal["CT", "MR"], ...], Field(min_length=1)]


def write_network(
    network: Finetuned,
    backbone: dict[str, Any],
    decoder: DecoderKind,
    folder: Path,
    answered: Path | None = None,
) -> None:
    """Writes model.safetensors and model.json into a run folder; `load_network` reads them.

    Args:
        network: that is written.
        backbone: name and arguments of its encoder's.
        decoder: what it was built with.
        folder: of the run.
        answered: a file or a folder of its answers. Those of other weights, as of a start whose
            last checkpoint was lost, go before the weights come: what is left is these weights'.
    """
    facts = TaskFacts(task=network.task, decoder=decoder, overlap=network.overlap, tta=network.tta)
    state = network.model.state_dict()
    weights = {name: value.contiguous().cpu() for name, value in state.items()}
    file, data = folder / "model.safetensors", save(weights, {"format": "pt"})
    if not file.exists() or file.read_bytes() != data:
        if answered is not None and answered.is_dir():
            shutil.rmtree(answered)
        elif answered is not None:
            answered.unlink(missing_ok=True)
        write_bytes(file, data)
    write_json(
        folder / "model.json",
        {
            "format": MODEL_FORMAT,
            "backbone": backbone,
            "preprocess": network.preprocess.to_dict(),
            "window": list(network.window),
            "modalities": list(network.modalities),
            **facts.model_dump(mode="json"),
        },
    )


def load_network(ref: Path, device: str | torch.device | None = None) -> Segmenter | Answerer:
    """Loads the network of a finished finetune run or of its release, strictly.

    Args:
        ref: the folder of either.
        device: where the weights go; by default a GPU if there is one.

    Raises:
        InputError: the folder is neither.
        CorruptionError: a release whose bytes are not those that were released.
    """
    if (ref / "model.json").is_file():
        network = _from_run(ref)
    elif (ref / "SHA256SUMS").is_file():
        network = _from_release(load_release(ref))
    else:
        raise InputError(
            f"ckpt={ref}: is neither a finished finetune run (no model.json) nor a release (no "
            "SHA256SUMS); give a folder that `voxelith finetune` made and finished, or that "
            "`voxelith export` made of one"
        )
    network.model.to(device or chosen_device("auto")).eval()
    return network


def read_model_file(run: Path) -> ModelFile:
    """What a finetune run says of its network.

    Raises:
        InputError: it is damaged, or of another version.
    """
    path = run / "model.json"
    config = read_table(path)
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


def _from_run(run: Path) -> Segmenter | Answerer:
    facts = read_model_file(run)
    where = f"{run / 'model.json'}: backbone"
    preprocess = Preprocess.from_dict(facts.preprocess)
    model = _model(facts, build_backbone(facts.backbone.name, facts.backbone.args, where))
    load_strictly(model, run / "model.safetensors")
    return _network(model, preprocess, facts, facts.window, facts.modalities)


def _from_release(release: Release) -> Segmenter | Answerer:
    facts = release_facts(release)
    model = _model(facts, release.build_encoder())
    release.load(model.encoder)
    load_strictly(model.decoder, release.path / DECODER)
    return _network(model, release.preprocess, facts, release.crop_size, release.modalities)


def _model(facts: TaskFacts, encoder: Backbone) -> Segmentation | Pooled:
    if isinstance(facts.task, ScanTask):
        return pooled(facts.task, encoder, facts.decoder)
    return Segmentation(encoder=encoder, task=facts.task, decoder=facts.decoder)


def _network(
    model: Segmentation | Pooled,
    preprocess: Preprocess,
    facts: TaskFacts,
    window: tuple[int, int, int],
    modalities: tuple[str, ...],
) -> Segmenter | Answerer:
    looks = (window, facts.overlap, modalities, facts.tta)
    if isinstance(facts.task, ScanTask):
        assert isinstance(model, Pooled)
        return Answerer(model, preprocess, facts.task, *looks)
    assert isinstance(model, Segmentation)
    return Segmenter(model, preprocess, facts.task, *looks)


def release_facts(release: Release) -> TaskFacts:
    """What a release says of what it was finetuned for, checked.

    Raises:
        InputError: it is an encoder, or its facts are not what they should be.
    """
    file = release.path / "config.json"
    if release.kind == "encoder":
        raise InputError(
            f"ckpt={release.path}: is the release of an encoder, which answers nothing yet; "
            "finetune it (`voxelith finetune ckpt=...`) and give that run, or an export of it"
        )
    name = FACTS[release.kind]
    try:
        facts = TaskFacts.model_validate(release.config[name])
    except ValidationError as error:
        raise InputError(f"{file}: {_told(error, f'{name}.')}") from error
    outputs = release.config["decoder"]["out_channels"]
    if isinstance(facts.task, ScanTask) != (release.kind == "answerer"):
        raise CorruptionError(
            f"{file}: kind is {release.kind!r}, and its task is of the other kind; fetch the "
            "release again"
        )
    if outputs != task_outputs(facts):
        raise CorruptionError(
            f"{file}: decoder.out_channels is {outputs}, and the task has {task_outputs(facts)}; "
            "fetch the release again"
        )
    return facts


def task_outputs(facts: TaskFacts) -> int:
    """Numbers that the network gives: of a window, or of each voxel, background included."""
    task = facts.task
    return task.outputs if isinstance(task, ScanTask) else len(task.classes) + 1


def golden_answers(network: Finetuned, folder: Path) -> dict[str, Tensor]:
    """What a network says to a release's golden scan, which is every channel of several."""
    scans = [folder / "golden_input.nii.gz"] * network.channels
    volume = read_channels(scans, golden_modality(network.modalities))
    if isinstance(network, Answerer):
        return {"answer": network.answer(volume)}
    assert isinstance(network, Segmenter)
    return {"scores": network.scores(volume)}


def check_release(path: Path) -> float:
    """Whether a release, of whatever kind, gives on this machine what it gave when it was made.

    Returns:
        The largest error of its golden scan's features and answers, relative to the largest value.

    Raises:
        InputError: it is no release.
        CorruptionError: its bytes are others, or the error is above the tolerance.
    """
    finetuned = load_release(path).kind in FACTS
    return check_golden_network(path) if finetuned else check_golden(path)


def check_golden_network(path: Path) -> float:
    """Loads a finetuned network's release as its users would, and compares features and answers.

    Returns:
        The largest error, relative to the largest value.

    Raises:
        CorruptionError: it is above the tolerance.
    """
    features = golden_features(load_encoder(path), path)
    return compare_golden(path, features | golden_answers(load_network(path, "cpu"), path))


def _told(error: ValidationError, prefix: str) -> str:
    items = error.errors(include_url=False)
    return "; ".join(
        f"{prefix}{'.'.join(map(str, i['loc']))}: {plain_message([i], len(i['loc']))}"
        for i in items
    )
