"""`voxelith predict`: a finetuned network over a folder of NIfTI scans, one after the other."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from data_prep.errors import InputError, attempt
from data_prep.files import make_folder
from data_prep.images import NIFTI, Reject
from data_prep.layouts.case import stem
from data_prep.progress import bar
from data_prep.scans import by_case, read_scan, refuse_shared, scan_files, unknown_modality
from data_prep.volume import write_nifti
from finetune.answerer import Answerer
from finetune.answers import read_answers, write_answers
from finetune.model_file import load_network
from finetune.segmenter import Segmenter
from finetune.settings import PredictSettings
from pretrain.device import chosen_device


@dataclass(frozen=True)
class Predicted:
    """What `predict` did: files written, and per input left out the reason.

    Of a network that answers for whole scans, `written` and `there` are scans with an answer.
    """

    written: list[Path] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    there: list[Path] = field(default_factory=list)
    """Outputs that were left as they were, with `resume`."""


def predict(settings: PredictSettings) -> Predicted:
    """Segments every scan below a folder; results keep the names and the geometry of the inputs.

    A network that answers for whole scans gives a row of answers.csv for each instead. What cannot
    be read, or does not fit the network, is left out, and the rest is done.

    A network of several channels takes NAME_0000.nii.gz, NAME_0001.nii.gz, ... on one grid for a
    case, and its result is NAME.nii.gz.

    Raises:
        InputError: no such network, no scan in the folder that can be read, results of several
            scans would have one name, or the output lies in the input.
    """
    source, output = settings.input, settings.output
    problems: list[str] = []
    names = scan_files(source)
    if not source.is_dir():
        problems.append(f"input={source}: no such folder; give a folder with NIfTI scans")
    elif not names:
        problems.append(f"input={source}: holds no .nii or .nii.gz file, nor NRRD or MetaImage")
    if output.resolve().is_relative_to(source.resolve()):
        problems.append(
            f"output={output}: lies in the input folder, and predictions would be taken for "
            "scans; choose another"
        )
    device = attempt(problems, chosen_device, settings.device)
    network = attempt(problems, load_network, settings.ckpt, device=device or "cpu")
    if network is not None:
        problems += unknown_modality(settings.modality, network.modalities)
    if problems or network is None:
        raise InputError(problems)
    cases, left_out = by_case(names, network.channels)
    if isinstance(network, Segmenter):
        refuse_shared(source, {name: output / _result_name(name) for name in cases})
    make_folder(output, "output")
    network = replace(
        network,
        tta=network.tta if settings.tta is None else settings.tta,
        precision=settings.precision,
        window_batch=settings.window_batch,
    )
    found = Predicted(left_out=left_out)
    kept = _answers(output, network, resume=settings.resume)
    try:
        for name, channels in bar(iterable=cases.items(), desc="predict", unit="scan"):
            target = output / _result_name(name)
            if settings.resume and (target.is_file() if kept is None else str(name) in kept):
                found.there.append(target)
                continue
            try:
                volume = read_scan(
                    [source / one for one in channels], network.modalities, settings.modality
                )
                if isinstance(network, Answerer):
                    assert kept is not None
                    kept[str(name)] = network.answer(volume).tolist()
                else:
                    labels = network.label_values(network.segment(volume))
                    target.parent.mkdir(parents=True, exist_ok=True)
                    write_nifti(labels, volume.native, target)
            except Reject as reject:
                left_out[str(name)] = str(reject)
                continue
            found.written.append(target)
    finally:  # an interrupted folder keeps the answers that it has
        if isinstance(network, Answerer) and kept:
            write_answers(output, "file", network.task, kept)
    if not found.written and not found.there:
        raise InputError([f"{source / name}: {why}" for name, why in left_out.items()])
    return found


def _result_name(name: Path) -> Path:
    """Results are NIfTI, whatever the scan is."""
    return name if name.name.lower().endswith(NIFTI) else name.with_name(f"{stem(name)}.nii.gz")


def _answers(
    output: Path, network: Segmenter | Answerer, *, resume: bool
) -> dict[str, list[float]] | None:
    """Answers that are there already, for a network that gives any; None for one of label maps."""
    if isinstance(network, Segmenter):
        return None
    return read_answers(output, "file", network.task) if resume else {}
