"""`voxelith finetune`: a release and a labelled corpus to scores on cases it has not seen.

runs/NAME/
    config.json run.json metrics.csv   as every run has them
    load_report.json                   what became of each tensor of the release
    model.json model.safetensors       the finetuned network, for predict
    predictions/KEY.nii.gz             on each case's own grid
    validation.csv                     Dice on validation cases over the steps, if wanted
    rows.csv                           the scores; written last, so it marks a finished run

A sweep starts this many times, so nothing here is done twice and nothing waits.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_only
from torch import nn

from data_prep.corpus import Corpus, open_corpus
from data_prep.errors import InputError, attempt, differences, named
from data_prep.files import write_json
from data_prep.preprocess import Preprocess
from data_prep.volume import read_label, write_nifti
from finetune.costs import Cost
from finetune.evaluate import (
    Labels,
    Origin,
    Split,
    choose_split,
    comparable,
    score,
    task_problems,
)
from finetune.labels import choose_labels
from finetune.lora import add_adapters
from finetune.meter import priced, training_flops
from finetune.metrics import METRIC_VERSION
from finetune.phases import PhasedLoop
from finetune.predictions import find_predictions
from finetune.probes import fit_probe
from finetune.protocol import freeze_problem
from finetune.rows import Row, are_current, write_rows
from finetune.segmentation import Segmentation
from finetune.segmenter import Segmenter, write_segmenter
from finetune.settings import FinetuneSettings, config_hash
from finetune.validation import Validation
from pretrain.augment import Augment
from pretrain.decoders import without_head
from pretrain.loader import CropDataset
from pretrain.loop import check_machine
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
    partial: dict[str, list[str]]
    """Training cases that are left out, and the classes that were not annotated in each."""
    unlabelled: tuple[str, ...]
    test: Split
    validation: tuple[str, ...]
    """Cases that are looked at while it trains; none where the split has no validation part."""
    recipe: dict[str, Any]
    """What all arms share; `settings` are those that this run trains with."""
    trained: dict[str, Any]
    """The recipe of this run: the same, unless it is scratch at its own best."""
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
            "recipe_hash": config_hash(self.trained),
            "split_hash": self.test.hash,
            "checkpoint_digest": self.release.digest if self._pretrained else None,
            "init": self.settings.init,
            "seed": self.settings.seed,
            "label_seed": self.label_seed,
            # Scratch takes nothing over: checkpoints of one architecture share its runs.
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

    A run that was interrupted goes on from its last checkpoint; a finished one is left as it is,
    but for scores of an older metric, which are made anew from the predictions.

    Returns:
        The run folder.

    Raises:
        InputError: wrong settings, checkpoint, corpus or run folder; what can be seen together is
            listed together.
    """
    check_machine(settings.trainer)
    plan = make_plan(settings)
    run = RunFolder(settings.runs / settings.run_name)
    if is_finished(run, plan):
        print(f"finetune: {run.path} is finished already, nothing to do")
        return run.path
    main = rank_zero_only.rank in (None, 0)
    if (run.path / "rows.csv").exists():
        if main:
            with run.lease():
                rows = _score_again(plan, run)
                write_rows(rows, run.path / "rows.csv")
            print(f"finetune: {run.path}: its predictions are scored anew, {_told(plan, rows)}")
        return run.path
    model, report = build_model(plan)
    with run.lease() if main else nullcontext():
        if main:
            _describe(run, plan, model, report)
        train(plan, run, model)
        if main:
            devices = settings.trainer.devices * settings.trainer.nodes
            with priced(run, device_of(settings), devices):
                rows = _predict_and_score(plan, run, model)
            write_rows(rows, run.path / "rows.csv")
            # The weights lie in model.safetensors; what only a resumption needs can go.
            shutil.rmtree(run.checkpoints.folder, ignore_errors=True)
            print(
                f"finetune: {settings.task.name}, {settings.arm}, {len(plan.train_keys)} labels, "
                f"seed {settings.seed}: {_told(plan, rows)} -> {run.path}"
            )
    return run.path


def _told(plan: Plan, rows: list[Row]) -> str:
    """The scores in a few words."""
    mean = np.nanmean([row.dsc for row in rows]) if rows else float("nan")
    return f"Dice {100 * mean:.1f} over {len(plan.test.keys)} cases"


def make_plan(
    settings: FinetuneSettings, release: Release | None = None, corpus: Corpus | None = None
) -> Plan:
    """Opens what the settings name and checks that it fits together.

    Args:
        settings: of one run.
        release: what `ckpt` names, where it is open already.
        corpus: likewise.

    Raises:
        InputError: it does not.
    """
    problems: list[str] = []
    if release is None:
        release = attempt(problems, named, "ckpt", settings.ckpt, load_release)
    if corpus is None:
        corpus = attempt(problems, open_corpus, settings.corpus, "corpus")
    if release is None or corpus is None:
        raise InputError(problems)
    settings = settings.model_copy(update={"crop_size": settings.crop_size or release.crop_size})
    problems += task_problems(corpus, settings.task)
    preprocess = _preprocess(settings, release)
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
    transfer, more = _transfer(settings, release)
    problems += more + _protocol_problems(settings, release)
    if problems:
        raise InputError(problems)
    train = choose_split(corpus, settings.split, "train")
    test = choose_split(corpus, settings.split, settings.part)
    partial = _partial(corpus, train, settings)
    whole = [key for key in train.keys if key not in partial]
    seed = settings.seed if settings.label_seed is None else settings.label_seed
    subjects = [corpus.subjects[corpus.position(key)] for key in whole]
    chosen = choose_labels(whole, subjects, settings.labels, seed)
    resolved = {
        "network": release.equal_but_weights(),
        "index_hash": corpus.index_hash,
        "preprocess": preprocess.to_dict(),
    }
    effective = settings.effective()
    return Plan(
        effective,
        release,
        corpus,
        preprocess,
        tuple(chosen),
        partial,
        _absent_classes(corpus, chosen, settings),
        test,
        validation=tuple(corpus.split(test.name)["parts"].get("validation", ())),
        recipe=settings.recipe(**resolved),
        trained=effective.recipe(**resolved),
        transfer=transfer,
    )


def build_model(plan: Plan) -> tuple[Segmentation, LoadReport]:
    """The network of an arm: the seed decides all weights, then the pretrained arm loads its own.

    So twins start with the same head, and differ in what is transferred alone: the encoder, or
    the decoder but for its head as well. The report lists every tensor of the network once.

    Adapters and the average of the weights begin from there.
    """
    settings = plan.settings
    torch.manual_seed(settings.seed)
    model = _network(plan)
    _check_crop(model, settings)
    _check_freezes(model, settings)
    report = _load(plan, model)
    model.layer_decay = settings.layer_decay
    if settings.lora is not None:
        add_adapters(model.encoder, settings.lora)
    model.hold(settings.freeze)
    if settings.ema is not None:
        model.start_average(settings.ema)
    return model, report


def _network(plan: Plan) -> Segmentation:
    return Segmentation(
        encoder=plan.release.build_encoder(),
        task=plan.settings.task,
        decoder=plan.settings.decoder,
        deep_supervision=plan.settings.deep_supervision,
    )


def _load(plan: Plan, model: Segmentation) -> LoadReport:
    if plan.settings.init == "scratch":
        return LoadReport(new=sorted(model.state_dict()))
    encoder = plan.release.load(model.encoder)
    if plan.transfer == "network":
        decoder = plan.release.load_decoder(model.decoder)
    else:
        decoder = _decoder_left(plan.release, model.decoder)
    return LoadReport.joined(encoder=encoder, decoder=decoder)


def _transfer(settings: FinetuneSettings, release: Release) -> tuple[str, list[str]]:
    """What the pretrained arm takes over, and why it cannot."""
    own = settings.decoder == "auto"
    if settings.transfer == "auto":
        return (release.transfers if own else "encoder"), []
    problems = []
    if settings.transfer == "network" and not release.has_decoder:
        problems.append(
            f"transfer=network: {release.path} has no decoder; transfer=auto takes what it has"
        )
    if settings.transfer == "network" and not own:
        problems.append(
            f"transfer=network with decoder={settings.decoder}: a release's decoder is the one of "
            "decoder=auto; give that, or transfer=encoder"
        )
    return settings.transfer, problems


def _protocol_problems(settings: FinetuneSettings, release: Release) -> list[str]:
    """Whether the protocol is for another kind of network: it would look like a bad checkpoint."""
    name = str(release.config["backbone"]["name"])
    family = "vit" if name.startswith("vit.") else "cnn"
    if settings.family in ("any", family):
        return []
    other = settings.protocol.replace(settings.family, family)
    return [
        f"protocol={settings.protocol}: its rates are for a {settings.family} and {release.path} "
        f"is {name}; take protocol={other}, or family=any if it is meant"
    ]


def _decoder_left(release: Release, decoder: nn.Module) -> LoadReport:
    """The report of a decoder that begins anew, though the release may have one."""
    state = decoder.state_dict()
    if not release.has_decoder:
        return LoadReport(new=sorted(state))
    body = sorted(without_head(state))
    return LoadReport(
        skipped=dict.fromkeys(body, "transfer=encoder"), new=sorted(set(state) - set(body))
    )


def _preprocess(settings: FinetuneSettings, release: Release) -> Preprocess:
    """The checkpoint's preprocessing, or, where asked for, the same at the data's own spacing.

    Crops and scans alike are resampled to its spacing; scores are taken on the native grid.
    """
    if settings.spacing == "checkpoint":
        return release.preprocess
    operations = tuple(
        {**o, "spacing_mm": None} if o["op"] == "resample" else o
        for o in release.preprocess.operations
    )
    return Preprocess(operations)


def _check_crop(model: Segmentation, settings: FinetuneSettings) -> None:
    assert settings.crop_size is not None
    try:
        model.encoder.grids(settings.crop_size)
    except ValueError as error:
        raise InputError(f"crop_size={list(settings.crop_size)}: {error}") from error


def _check_freezes(model: Segmentation, settings: FinetuneSettings) -> None:
    layers = len(model.encoder.layers())
    named = {"freeze": settings.freeze}
    named |= {f"phases[{i}].freeze": phase.freeze for i, phase in enumerate(settings.phases)}
    found = [freeze_problem(what, layers, name) for name, what in named.items()]
    problems = [problem for problem in found if problem]
    if problems:
        raise InputError(problems)


def _partial(corpus: Corpus, train: Split, settings: FinetuneSettings) -> dict[str, list[str]]:
    """Training cases in which not every class was annotated, and the classes that were not.

    A structure that nobody looked for may be there; as background it would be learnt away.
    """
    found = {}
    for key in train.keys:
        annotated = set(corpus.meta(corpus.position(key))["annotated"])
        missing = [c.name for c in settings.task.classes if not annotated.issuperset(c.values)]
        if missing:
            found[key] = missing
    if len(found) == len(train.keys):
        raise InputError(
            f"corpus={corpus.path}: none of the {len(found)} training cases of split {train.name} "
            f"is annotated for all classes of task {settings.task.name} (missing: "
            f"{_missing(found)}), and what is not annotated would be learnt as background; "
            "choose a task with the classes that are annotated"
        )
    return found


def _missing(partial: dict[str, list[str]]) -> str:
    cases = Counter(name for names in partial.values() for name in names)
    return ", ".join(f"{name} in {count}" for name, count in cases.items())


def _absent_classes(corpus: Corpus, keys: list[str], settings: FinetuneSettings) -> tuple[str, ...]:
    """Classes of which no chosen training case has a voxel."""
    present = {
        int(value)
        for key in keys
        for value, voxels in corpus.meta(corpus.position(key))["class_voxels"].items()
        if voxels
    }
    return tuple(c.name for c in settings.task.classes if not present & set(c.values))


def is_finished(run: RunFolder, plan: Plan) -> bool:
    """Whether the folder holds this run, finished, with scores of today's metric.

    Raises:
        InputError: it holds another run.
    """
    file = run.path / "run.json"
    if not file.exists():
        return False
    facts = {"recipe": {}, "identity": {}, **json.loads(file.read_text())}
    if any(facts["identity"].get(name) != value for name, value in plan.identity.items()):
        now = json.loads(json.dumps({**plan.recipe, **plan.identity}))
        changed = differences({**facts["recipe"], **facts["identity"]}, now)
        # The recipe says what lies behind another hash.
        hashes = ("config_hash:", "recipe_hash:")
        changed = [item for item in changed if not item.startswith(hashes)] or changed
        raise InputError(
            f"{run.path}: holds another run ({'; '.join(changed)}); choose another run=NAME, "
            "remove the folder, or restore the settings"
        )
    rows = run.path / "rows.csv"
    return rows.exists() and are_current(rows, METRIC_VERSION)


def _describe(run: RunFolder, plan: Plan, model: Segmentation, report: LoadReport) -> None:
    run.describe(
        plan.settings.model_dump(mode="json"),
        sys.argv,
        identity=plan.identity,
        recipe=plan.recipe,
        arm=plan.settings.arm,
        trained=plan.trained,
        corpus={"path": str(plan.corpus.path), "index_hash": plan.corpus.index_hash},
        release={"name": plan.release.name, "digest": plan.release.digest},
        label_keys=list(plan.train_keys),
        partly_annotated=plan.partial,
        classes_without_label=list(plan.unlabelled),
        parameters=sum(p.numel() for p in model.parameters()),
        cost=_cost(plan, model)._asdict(),
    )
    if plan.settings.validations and not plan.validation:
        print(
            f"finetune: split {plan.test.name!r} has no validation part, so validations="
            f"{plan.settings.validations} measures nothing"
        )
    if plan.unlabelled:
        print(f"finetune: no training case has {', '.join(plan.unlabelled)} in this label draw")
    if plan.partial:
        print(
            f"finetune: {len(plan.partial)} training cases are left out, for not every class was "
            f"annotated in them (missing: {_missing(plan.partial)})"
        )
    how = {"init": plan.settings.init, "transfer": plan.transfer}
    write_json(run.path / "load_report.json", how | report.to_dict())


def _cost(plan: Plan, model: Segmentation) -> Cost:
    """What is known of a run's cost before it begins."""
    settings = plan.settings
    weights = [*model.encoder.parameters(), *model.decoder.parameters()]
    flops = None
    if settings.fit == "descent":
        with torch.device("meta"):
            bare = _network(plan)
            if settings.lora is not None:
                add_adapters(bare.encoder, settings.lora)
        flops = training_flops(bare, settings, int(plan.corpus.shapes[0, 0]))
    device = device_of(settings)
    made = plan.release.config["training"] if settings.init == "pretrained" else {}
    return Cost(
        parameters=sum(p.numel() for p in weights),
        trained_parameters=sum(p.numel() for p in weights if p.requires_grad),
        flops=flops,
        train_seconds=None,
        predict_seconds=None,
        peak_mib=None,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        pretrain_seconds=made.get("seconds"),
    )


def train(plan: Plan, run: RunFolder, model: Segmentation) -> None:
    """Trains what `build_model` made, from the run's newest checkpoint if there is one."""
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
        classes=[c.values for c in settings.task.classes],
        augment=settings.augment,
    )
    if settings.fit != "descent":
        # No trainer, which would start the other ranks: this process is the only one.
        fit_probe(model.to(device_of(settings)), dataset, settings.steps * settings.batch_size)
        return
    PhasedLoop(
        settings,
        dataset,
        run,
        validation=_validation(plan, run, model),
        augment=Augment(settings.task.flip, settings.augment, settings.task.swap),
        loggers=make_loggers(settings, run) if rank_zero_only.rank in (None, 0) else [],
        label=f"finetune {settings.arm} seed {settings.seed}",
    ).fit(model)


def _validation(plan: Plan, run: RunFolder, model: Segmentation) -> Validation | None:
    settings = plan.settings
    if not settings.validations or not plan.validation:
        return None
    return Validation(
        _segmenter(plan, model),
        plan.corpus,
        plan.validation,
        steps=settings.steps,
        times=settings.validations,
        run=run.path,
    )


def _segmenter(plan: Plan, model: Segmentation) -> Segmenter:
    """The network with all that a scan needs to be labelled by it."""
    settings = plan.settings
    assert settings.crop_size is not None
    return Segmenter(
        model,
        plan.preprocess,
        settings.task,
        settings.crop_size,
        settings.overlap,
        tuple(sorted(set(plan.corpus.modalities))),
        settings.tta,
        settings.trainer.precision,
        settings.window_batch,
    )


def device_of(settings: FinetuneSettings) -> torch.device:
    """Where a run's network is outside of its training."""
    accelerated = settings.trainer.accelerator != "cpu" and torch.cuda.is_available()
    return torch.device("cuda" if accelerated else "cpu")


def _predict_and_score(plan: Plan, run: RunFolder, model: Segmentation) -> list[Row]:
    """Writes the network and the predictions of the test cases; returns their rows."""
    settings, corpus = plan.settings, plan.corpus
    model.finish()
    segmenter = _segmenter(plan, model)
    write_segmenter(segmenter, plan.release.config["backbone"], settings.decoder, run.path)
    model.to(device_of(settings)).eval()
    folder = run.path / "predictions"
    folder.mkdir(exist_ok=True)

    def predict(key: str) -> Labels:
        volume = corpus.volume(corpus.position(key))
        labels = segmenter.label_values(segmenter.segment(volume))
        write_nifti(labels, volume.native, folder / f"{key}.nii.gz")
        return labels

    return score(corpus, plan.test, settings.task, predict, _origin(plan))


def _score_again(plan: Plan, run: RunFolder) -> list[Row]:
    """Rows of today's metric from the predictions of a finished run."""
    corpus, keys = plan.corpus, plan.test.keys
    try:
        files = find_predictions(run.path / "predictions", corpus, keys, None)
    except InputError as error:
        why = f"{run.path}: its scores are of an older metric and cannot be made anew; remove the "
        raise InputError([why + "folder to train it again", *error.problems]) from error

    def read(key: str) -> Labels:
        return read_label(files[key], corpus.volume(corpus.position(key)))

    return score(corpus, plan.test, plan.settings.task, read, _origin(plan))


def _origin(plan: Plan) -> Origin:
    """What all rows of a run say of where they come from."""
    settings, release = plan.settings, plan.release
    pretrained = settings.init == "pretrained"
    seen = comparable(release.fingerprints)
    made, how = release.config["training"] if pretrained else {}, plan.transfer
    return Origin(
        arm=settings.arm,
        protocol=settings.protocol,
        recipe_hash=config_hash(plan.trained),
        labels=settings.labels,
        n_labels=len(plan.train_keys),
        seed=settings.seed,
        label_seed=plan.label_seed,
        init_seed=settings.seed,
        pretrain_seed=int(made.get("seed", -1)),
        pretrain_recipe=str(made.get("recipe_hash", "")) and f"{made['recipe_hash']}/{how}",
        steps=settings.steps,
        checkpoint=plan.checkpoint,
        checkpoint_digest=release.digest if pretrained else "",
        config_hash=config_hash(plan.recipe),
        seen=seen if pretrained else frozenset(),
    )
