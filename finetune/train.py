"""`voxelith finetune`: a release and a labelled corpus to scores on cases it has not seen.

runs/NAME/
    config.json run.json metrics.csv   as every run has them
    load_report.json                   what became of each tensor of the release
    model.json model.safetensors       the finetuned network, for predict
    predictions/KEY.nii.gz             on each case's own grid
    rows.csv                           the scores; written last, so it marks a finished run

A sweep starts this many times, so nothing here is done twice and nothing waits.
"""

from __future__ import annotations

import json
import shutil
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_only
from safetensors.torch import save
from torch import nn

from data_prep.corpus import Corpus, open_corpus
from data_prep.errors import InputError, attempt, differences, named
from data_prep.files import write_bytes, write_json
from data_prep.preprocess import Preprocess
from data_prep.volume import write_nifti
from finetune.evaluate import (
    Labels,
    Origin,
    Split,
    choose_split,
    comparable,
    score,
    task_problems,
)
from finetune.infer import MODEL_FORMAT, Segmenter
from finetune.labels import choose_labels
from finetune.rows import write_rows
from finetune.segmentation import Segmentation
from finetune.settings import FinetuneSettings, config_hash
from pretrain.decoders import without_head
from pretrain.loader import Augment, CropDataset
from pretrain.loop import Loop, check_machine
from pretrain.release import LoadReport, Release, load_release
from pretrain.run_folder import RunFolder
from pretrain.schedule import Schedule
from pretrain.train import make_loggers

LANES = 8


@dataclass(frozen=True)
class Plan:
    """What the settings come to on this release and corpus, before anything is started."""

    settings: FinetuneSettings
    release: Release
    corpus: Corpus
    preprocess: Preprocess
    train_keys: tuple[str, ...]
    unlabelled: tuple[str, ...]
    test: Split
    recipe: dict[str, Any]
    transfer: str
    """What the pretrained arm takes over: encoder or network."""

    @property
    def label_seed(self) -> int:
        """The seed of the label draw."""
        chosen = self.settings.label_seed
        return self.settings.seed if chosen is None else chosen

    @property
    def identity(self) -> dict[str, Any]:
        """What a run is; a run folder holds one of these for life."""
        return {
            "config_hash": config_hash(self.recipe),
            "checkpoint_digest": self.release.digest,
            "init": self.settings.init,
            "seed": self.settings.seed,
            "label_seed": self.label_seed,
            # Scratch takes nothing over, so checkpoints of one architecture share its runs.
            "transfer": self.transfer if self._pretrained and self.transfer == "network" else None,
        }

    @property
    def _pretrained(self) -> bool:
        return self.settings.init == "pretrained"

    @property
    def checkpoint(self) -> str:
        """What rows call the checkpoint; empty for scratch."""
        if not self._pretrained:
            return ""
        return self.release.name + (" with decoder" if self.transfer == "network" else "")


def finetune(settings: FinetuneSettings) -> Path:
    """Trains one arm with one seed, predicts the test cases and scores them.

    A run that was interrupted goes on from its last checkpoint; a finished one is left as it is.

    Returns:
        The run folder.

    Raises:
        InputError: wrong settings, checkpoint, corpus or run folder; what can be seen together is
            listed together.
    """
    check_machine(settings.trainer)
    plan = make_plan(settings)
    run = RunFolder(settings.runs / settings.run_name)
    if _is_finished(run, plan):
        print(f"finetune: {run.path} is finished already, nothing to do")
        return run.path
    main = rank_zero_only.rank in (None, 0)
    model, report = build_model(plan)
    with run.lease() if main else nullcontext():
        if main:
            _describe(run, plan, model, report)
        _train(plan, run, model)
        if main:
            rows = _predict_and_score(plan, run, model)
            write_rows(rows, run.path / "rows.csv")
            # The weights lie in model.safetensors; what only a resumption needs can go.
            shutil.rmtree(run.checkpoints.folder, ignore_errors=True)
            mean = np.nanmean([row.dsc for row in rows]) if rows else float("nan")
            print(
                f"finetune: {settings.task.name}, {settings.init}, {len(plan.train_keys)} labels, "
                f"seed {settings.seed}: Dice {100 * mean:.1f} over {len(plan.test.keys)} cases "
                f"-> {run.path}"
            )
    return run.path


def make_plan(settings: FinetuneSettings) -> Plan:
    """Opens what the settings name and checks that it fits together.

    Raises:
        InputError: it does not.
    """
    problems: list[str] = []
    release = attempt(problems, named, "ckpt", settings.ckpt, load_release)
    corpus = attempt(problems, open_corpus, settings.corpus, "corpus")
    if release is None or corpus is None:
        raise InputError(problems)
    settings = settings.model_copy(update={"crop_size": settings.crop_size or release.crop_size})
    problems += task_problems(corpus, settings.task)
    preprocess, more = _preprocess(settings, release, corpus)
    problems += more
    channels = {int(n) for n in corpus.shapes[:, 0]}
    wanted = int(release.config["backbone"]["args"].get("in_channels", 1))
    if channels != {wanted}:
        problems.append(
            f"corpus={corpus.path}: its volumes have {sorted(channels)} channels, the checkpoint "
            f"takes {wanted}; prepare the corpus with that many"
        )
    strange = sorted(set(corpus.modalities) - set(release.modalities))
    if strange:
        problems.append(
            f"corpus={corpus.path}: holds {', '.join(strange)}, the checkpoint was trained on "
            f"{', '.join(release.modalities)} only; choose another ckpt"
        )
    transfer = release.transfers if settings.transfer == "auto" else settings.transfer
    if transfer == "network" and not release.has_decoder:
        problems.append(
            f"transfer=network: {release.path} has no decoder; transfer=auto takes what it has"
        )
    if problems:
        raise InputError(problems)
    train = choose_split(corpus, settings.split, "train")
    test = choose_split(corpus, settings.split, settings.part)
    seed = settings.seed if settings.label_seed is None else settings.label_seed
    subjects = [corpus.subjects[corpus.position(key)] for key in train.keys]
    chosen = choose_labels(train.keys, subjects, settings.labels, seed)
    recipe = settings.recipe(
        network=release.equal_but_weights(),
        index_hash=corpus.index_hash,
        split_hash=train.hash,
        preprocess=preprocess.to_dict(),
    )
    unlabelled = _absent_classes(corpus, chosen, settings)
    return Plan(
        settings, release, corpus, preprocess, tuple(chosen), unlabelled, test, recipe, transfer
    )


def build_model(plan: Plan) -> tuple[Segmentation, LoadReport]:
    """The network of an arm: the seed decides all weights, then the pretrained arm loads its own.

    So twins start with the same head, and differ in what is transferred alone: the encoder, or
    the decoder but for its head as well. The report lists every tensor of the network once.
    """
    torch.manual_seed(plan.settings.seed)
    model = Segmentation(encoder=plan.release.build_encoder(), task=plan.settings.task)
    _check_crop(model, plan.settings)
    if plan.settings.init == "scratch":
        return model, LoadReport(new=sorted(model.state_dict()))
    encoder = plan.release.load(model.encoder)
    if plan.transfer == "network":
        decoder = plan.release.load_decoder(model.decoder)
    else:
        decoder = _decoder_left(plan.release, model.decoder)
    return model, LoadReport.joined(encoder=encoder, decoder=decoder)


def _decoder_left(release: Release, decoder: nn.Module) -> LoadReport:
    """The report of a decoder that begins anew, though the release may have one."""
    state = decoder.state_dict()
    if not release.has_decoder:
        return LoadReport(new=sorted(state))
    body = sorted(without_head(state))
    return LoadReport(
        skipped=dict.fromkeys(body, "transfer=encoder"), new=sorted(set(state) - set(body))
    )


def _preprocess(
    settings: FinetuneSettings, release: Release, corpus: Corpus
) -> tuple[Preprocess, list[str]]:
    """The checkpoint's preprocessing, or, where asked for, the same at the data's own spacing."""
    spacing = release.preprocess.spacing_mm
    if spacing is None:
        return release.preprocess, []
    if settings.spacing == "native":
        operations = tuple(
            {**o, "spacing_mm": None} if o["op"] == "resample" else o
            for o in release.preprocess.operations
        )
        return Preprocess(operations), []
    factors = corpus.spacings / np.array(spacing)
    if np.abs(factors - 1).max() < 0.01:
        return release.preprocess, []
    return release.preprocess, [
        f"spacing=checkpoint: the checkpoint was trained at {list(spacing)} mm, the volumes of "
        f"{corpus.path} differ from that by up to {np.abs(factors - 1).max():.0%}; training on "
        "resampled labelled crops is not offered yet: spacing=native finetunes at the data's own "
        "spacing, and records it"
    ]


def _check_crop(model: Segmentation, settings: FinetuneSettings) -> None:
    assert settings.crop_size is not None
    try:
        model.encoder.grids(settings.crop_size)
    except ValueError as error:
        raise InputError(f"crop_size={list(settings.crop_size)}: {error}") from error


def _absent_classes(corpus: Corpus, keys: list[str], settings: FinetuneSettings) -> tuple[str, ...]:
    """Classes of which no chosen training case has a voxel."""
    present = {
        int(value)
        for key in keys
        for value, voxels in corpus.meta(corpus.position(key))["class_voxels"].items()
        if voxels
    }
    return tuple(c.name for c in settings.task.classes if not present & set(c.values))


def _is_finished(run: RunFolder, plan: Plan) -> bool:
    """Whether the folder holds this run, finished; refuses a folder that holds another."""
    file = run.path / "run.json"
    if not file.exists():
        return False
    facts = {"recipe": {}, "identity": {}, **json.loads(file.read_text())}
    if any(facts["identity"].get(name) != value for name, value in plan.identity.items()):
        now = json.loads(json.dumps({**plan.recipe, **plan.identity}))
        changed = differences({**facts["recipe"], **facts["identity"]}, now)
        # The recipe says what lies behind another hash.
        changed = [item for item in changed if not item.startswith("config_hash:")] or changed
        raise InputError(
            f"{run.path}: holds another run ({'; '.join(changed)}); choose another run=NAME, "
            "remove the folder, or restore the settings"
        )
    return (run.path / "rows.csv").exists()


def _describe(run: RunFolder, plan: Plan, model: Segmentation, report: LoadReport) -> None:
    run.describe(
        plan.settings.model_dump(mode="json"),
        sys.argv,
        identity=plan.identity,
        recipe=plan.recipe,
        corpus={"path": str(plan.corpus.path), "index_hash": plan.corpus.index_hash},
        release={"name": plan.release.name, "digest": plan.release.digest},
        label_keys=list(plan.train_keys),
        classes_without_label=list(plan.unlabelled),
        parameters=sum(p.numel() for p in model.parameters()),
    )
    if plan.unlabelled:
        print(f"finetune: no training case has {', '.join(plan.unlabelled)} in this label draw")
    how = {"init": plan.settings.init, "transfer": plan.transfer}
    write_json(run.path / "load_report.json", how | report.to_dict())


def _train(plan: Plan, run: RunFolder, model: Segmentation) -> None:
    settings, corpus = plan.settings, plan.corpus
    assert settings.crop_size is not None
    if settings.trainer.threads:
        torch.set_num_threads(settings.trainer.threads)
    samples = np.array(sorted(corpus.position(key) for key in plan.train_keys))
    dataset = CropDataset(
        corpus,
        samples,
        Schedule(np.asarray(corpus.shards)[samples], settings.seed, LANES),
        plan.preprocess,
        settings.crop_size,
        label=True,
        foreground=settings.foreground,
        classes=[value for c in settings.task.classes for value in c.values],
    )
    Loop(
        settings,
        dataset,
        run,
        augment=Augment(settings.task.flip, settings.gain),
        loggers=make_loggers(settings, run) if rank_zero_only.rank in (None, 0) else [],
        label=f"finetune {settings.init} seed {settings.seed}",
    ).fit(model)


def _predict_and_score(plan: Plan, run: RunFolder, model: Segmentation) -> list[Any]:
    """Writes the network and the predictions of the test cases; returns their rows."""
    settings, corpus = plan.settings, plan.corpus
    assert settings.crop_size is not None
    segmenter = Segmenter(
        model,
        plan.preprocess,
        settings.task,
        settings.crop_size,
        settings.overlap,
        tuple(sorted(set(corpus.modalities))),
    )
    weights = {name: value.contiguous().cpu() for name, value in model.state_dict().items()}
    write_bytes(run.path / "model.safetensors", save(weights, {"format": "pt"}))
    write_json(
        run.path / "model.json",
        {
            "format": MODEL_FORMAT,
            "backbone": plan.release.config["backbone"],
            "preprocess": plan.preprocess.to_dict(),
            "window": list(settings.crop_size),
            "overlap": settings.overlap,
            "modalities": sorted(set(corpus.modalities)),
            "task": settings.task.model_dump(mode="json"),
        },
    )
    accelerated = settings.trainer.accelerator != "cpu" and torch.cuda.is_available()
    model.to("cuda" if accelerated else "cpu").eval()
    folder = run.path / "predictions"
    folder.mkdir(exist_ok=True)

    def predict(key: str) -> Labels:
        volume = corpus.volume(corpus.position(key))
        labels = segmenter.label_values(segmenter.segment(volume))
        write_nifti(labels, volume.native, folder / f"{key}.nii.gz")
        return labels

    release, pretrained = plan.release, settings.init == "pretrained"
    seen = comparable(release.fingerprints)
    origin = Origin(
        arm=settings.init,
        labels=settings.labels,
        n_labels=len(plan.train_keys),
        seed=settings.seed,
        label_seed=plan.label_seed,
        init_seed=settings.seed,
        pretrain_seed=int(release.config["training"].get("seed", -1)) if pretrained else -1,
        steps=settings.steps,
        checkpoint=plan.checkpoint,
        checkpoint_digest=release.digest if pretrained else "",
        config_hash=config_hash(plan.recipe),
        seen=seen if pretrained else frozenset(),
    )
    return score(corpus, plan.test, settings.task, predict, origin)
