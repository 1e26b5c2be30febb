"""`voxelith finetune`: a release and a labelled corpus to scores on cases it has not seen.

runs/NAME/
    config.json run.json metrics.csv   as every run has them
    load_report.json                   what became of each tensor of the release
    step_zero.json                     whether the network sees what the release sees, at the start
    model.json model.safetensors       the finetuned network, for predict
    predictions/KEY.nii.gz             on each case's own grid; of a task of whole scans there is
                                       answers.csv
    validation.csv                     Dice on validation cases over the steps, if wanted
    rows.csv                           the scores; written last, so it marks a finished run

A sweep starts this many times, so nothing here is done twice and nothing waits.
"""

from __future__ import annotations

import json
import shutil
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_only
from torch import nn

from data_prep.corpus import Corpus, open_corpus
from data_prep.errors import InputError, attempt, differences, named
from data_prep.files import read_note, read_table, write_json
from data_prep.preprocess import Preprocess
from finetune.cells import score_in_words, unseen
from finetune.costs import Cost
from finetune.done_before import take_over, trained_alike
from finetune.evaluate import choose_split
from finetune.kinds import device_name, device_of, kind_of
from finetune.labels import choose_labels
from finetune.lora import add_adapters
from finetune.meter import priced, training_flops
from finetune.metrics import METRIC_VERSION
from finetune.model_file import release_facts
from finetune.phases import PhasedLoop
from finetune.plan import Plan
from finetune.protocol import family_of, freeze_problem
from finetune.rows import Row, are_current, write_rows
from finetune.settings import FinetuneSettings, TaskSettings, config_hash
from finetune.step_zero import check_start
from finetune.supervised import Supervised
from pretrain.decoders import first_blocks
from pretrain.loader import CropDataset
from pretrain.loop import check_machine, machine_precision, use_threads
from pretrain.release import LoadReport, Release, load_release
from pretrain.run_folder import RunFolder
from pretrain.schedule import Schedule
from pretrain.tracking import log_load, make_loggers

LANES = 8


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
    main = rank_zero_only.rank in (None, 0)
    if is_finished(run, plan):
        if main:
            _clear(run)  # where a start was killed before it did
        print(f"finetune: {run.path} is finished already, nothing to do")
        return run.path
    if (run.path / "rows.csv").exists():
        if main:
            with run.lease():
                rows = _score_again(plan, run)
                write_rows(rows, run.path / "rows.csv")
                _clear(run)
            print(f"finetune: {run.path}: its predictions are scored anew, {_told(rows)}")
        return run.path
    model, report = build_model(plan)
    alike = trained_alike(plan, device_name(settings))
    with run.lease() if main else nullcontext():
        if main and settings.ranks == 1 and is_finished(run, plan):
            print(f"finetune: {run.path} was finished by another start meanwhile, nothing to do")
            return run.path
        if main:
            _describe(run, plan, model, report)
        if alike:
            take_over(alike, run)
            rows = _score_again(plan, run)
            write_rows(rows, run.path / "rows.csv")
            print(f"finetune: {run.path}: trained already in {alike.name}, {_told(rows)}")
            return run.path
        train(plan, run, model, report)
        if main:
            with priced(run, device_of(settings), settings.ranks):
                rows = _predict_and_score(plan, run, model)
            write_rows(rows, run.path / "rows.csv")
            _clear(run)
            print(
                f"finetune: {settings.task.name}, {settings.arm}, {len(plan.train_keys)} labels, "
                f"seed {settings.seed}: {_told(rows)} -> {run.path}"
            )
    return run.path


def _clear(run: RunFolder) -> None:
    """Removes what only a resumption needs: the weights lie in model.safetensors."""
    shutil.rmtree(run.checkpoints.folder, ignore_errors=True)


def _told(rows: list[Row]) -> str:
    """The scores in a few words."""
    counted, cases = ({row.case for row in found} for found in (unseen(rows), rows))
    left_out = len(cases) - len(counted)
    seen = f" ({left_out} that pretraining has seen left out)" if left_out else ""
    return f"{score_in_words(rows)} over {len(counted)} cases{seen}"


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
    crop = settings.crop_size or release.crop_size
    settings = settings.model_copy(update={"crop_size": crop})
    kind = kind_of(settings)
    problems += kind.problems(corpus)
    preprocess = _preprocess(settings, release)
    channels = sorted({int(n) for n in corpus.shapes[:, 0]})
    if len(channels) == 1:
        adapted = attempt(problems, release.for_channels, channels[0], settings.adapt_channels)
        release = adapted or release
    else:
        problems.append(
            f"corpus={corpus.path}: its volumes have {channels} channels, which must be one number"
        )
    if moved := release.other_order(corpus.channel_names):
        problems.append(
            f"{release.path}: {moved} of {corpus.path} in this order, and channels are taken by "
            "position; prepare the corpus with its channels in the order of the release"
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
    targets = kind.targets(corpus, test.name)
    partial = kind.partial(corpus, train)
    whole = [key for key in train.keys if key not in partial]
    subjects = [corpus.subjects[corpus.position(key)] for key in whole]
    chosen = choose_labels(whole, subjects, settings.labels, settings.label_draw)
    resolved = {
        "network": release.equal_but_weights(crop),
        "index_hash": corpus.index_hash,
        "preprocess": preprocess.to_dict(),
    }
    if targets is not None:
        resolved["targets"] = config_hash(targets.recipe())
    effective = settings.effective()
    return Plan(
        effective,
        release,
        corpus,
        preprocess,
        tuple(chosen),
        partial,
        kind.unlabelled(corpus, chosen, targets),
        test,
        validation=tuple(corpus.split(test.name)["parts"].get("validation", ())),
        recipe=settings.recipe(**resolved),
        trained=effective.recipe(**resolved),
        transfer=transfer,
        targets=targets,
    )


def build_model(plan: Plan) -> tuple[Supervised, LoadReport]:
    """The network of an arm: the seed decides all weights, then the pretrained arm loads its own.

    So twins differ in what is transferred alone: the encoder, or the decoder but for its head as
    well, or all of it. The report lists every tensor of the network once.

    Adapters and the average of the weights begin from there.
    """
    settings = plan.settings
    torch.manual_seed(settings.seed)
    model = _network(plan)
    _check_fit(model, settings)
    report = _load(plan, model)
    model.layer_decay = settings.layer_decay
    if settings.lora is not None:
        add_adapters(model.encoder, settings.lora)
    model.hold(settings.freeze)
    if settings.ema is not None:
        model.start_average(settings.ema)
    return model, report


def check_network(plan: Plan) -> None:
    """Whether `build_model` will make the network, without its weights.

    Raises:
        InputError: the settings do not fit it.
    """
    with torch.device("meta"):
        model = _network(plan)
        _check_fit(model, plan.settings)
        if plan.settings.lora is not None:
            add_adapters(model.encoder, plan.settings.lora)


def _network(plan: Plan) -> Supervised:
    targets = plan.targets.of(plan.train_keys) if plan.targets else {}
    return kind_of(plan.settings).network(plan.release.build_encoder(), targets)


def _load(plan: Plan, model: Supervised) -> LoadReport:
    if plan.settings.init == "scratch":
        return LoadReport(new=sorted(model.state_dict()))
    encoder = plan.release.load(model.encoder)
    if plan.transfer == "encoder":
        decoder = _decoder_left(plan.release, model.decoder)
    else:
        decoder = plan.release.load_decoder(model.decoder, head=plan.transfer == "task")
    return LoadReport.joined(encoder=encoder, decoder=decoder)


def _transfer(settings: FinetuneSettings, release: Release) -> tuple[str, list[str]]:
    """What the pretrained arm takes over, and why it cannot."""
    own = settings.decoder == "auto" and isinstance(settings.task, TaskSettings)
    if settings.transfer == "auto":
        if not own:
            return "encoder", []
        return ("task" if _continues(settings, release) else release.transfers), []
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


def _continues(settings: FinetuneSettings, release: Release) -> bool:
    """Whether the release was finetuned for the same classes, so that its head belongs here."""
    if release.kind != "segmenter" or release.transfers != "network":
        return False
    before, task = release_facts(release).task, settings.task
    assert isinstance(before, TaskSettings) and isinstance(task, TaskSettings)
    return [(c.name, c.values) for c in before.classes] == [
        (c.name, c.values) for c in task.classes
    ]


def _protocol_problems(settings: FinetuneSettings, release: Release) -> list[str]:
    """Whether the protocol is for another kind of network: it would look like a bad checkpoint."""
    name = str(release.config["backbone"]["name"])
    family = family_of(name)
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
    body = sorted(first_blocks(state, release.decoder_blocks))
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


def _check_fit(model: Supervised, settings: FinetuneSettings) -> None:
    """Whether the crop suits the encoder, and the encoder has the layers that are frozen."""
    assert settings.crop_size is not None
    try:
        model.encoder.grids(settings.crop_size)
    except ValueError as error:
        raise InputError(f"crop_size={list(settings.crop_size)}: {error}") from error
    layers = len(model.encoder.layers())
    named = {"freeze": settings.freeze}
    named |= {f"phases[{i}].freeze": phase.freeze for i, phase in enumerate(settings.phases)}
    found = [freeze_problem(what, layers, name) for name, what in named.items()]
    problems = [problem for problem in found if problem]
    if problems:
        raise InputError(problems)


def is_finished(run: RunFolder, plan: Plan) -> bool:
    """Whether the folder holds this run, finished, with scores of today's metric.

    Raises:
        InputError: it holds another run.
    """
    file = run.path / "run.json"
    if not file.exists():
        return False
    facts = {"recipe": {}, "identity": {}, **read_table(file)}
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


def _describe(run: RunFolder, plan: Plan, model: Supervised, report: LoadReport) -> None:
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
        label_subjects=plan.label_subjects,
        partly_annotated=plan.partial,
        classes_without_label=list(plan.unlabelled),
        compared_by_voxels_alone=plan.by_voxels_alone,
        validation_seen=plan.validation_seen,
        precisions=_precisions(run, plan),
        parameters=sum(p.numel() for p in model.parameters()),
        cost=_cost(plan, model)._asdict(),
    )
    for note in kind_of(plan.settings).notes(plan):
        print(f"finetune: {note}")
    how = {"init": plan.settings.init, "transfer": plan.transfer}
    write_json(run.path / "load_report.json", how | report.to_dict())


def _precisions(run: RunFolder, plan: Plan) -> list[str]:
    """What it computes in, and did before it was resumed: `auto` is another on another device."""
    before = read_note(run.path / "run.json") if run.checkpoints.paths() else {}
    now = machine_precision(plan.settings.trainer)
    return sorted({*map(str, before.get("precisions", [])), now})


def _cost(plan: Plan, model: Supervised) -> Cost:
    """What is known of a run's cost before it begins."""
    settings = plan.settings
    weights = [*model.encoder.parameters(), *model.decoder.parameters()]
    flops = None
    if settings.fit == "descent":
        with torch.device("meta"):
            bare = _network(plan)
            if settings.lora is not None:
                add_adapters(bare.encoder, settings.lora)
        flops = training_flops(bare, settings, int(plan.corpus.shapes[0, 0]), plan.train_keys[0])
    made = plan.release.config["training"] if settings.init == "pretrained" else {}
    return Cost(
        parameters=sum(p.numel() for p in weights),
        trained_parameters=sum(p.numel() for p in weights if p.requires_grad),
        flops=flops,
        train_seconds=None,
        predict_seconds=None,
        peak_mib=None,
        device=device_name(settings),
        pretrain_seconds=made.get("seconds"),
    )


def train(plan: Plan, run: RunFolder, model: Supervised, report: LoadReport) -> None:
    """Trains what `build_model` made, from the run's newest checkpoint if there is one."""
    settings, corpus, kind = plan.settings, plan.corpus, kind_of(plan.settings)
    assert settings.crop_size is not None
    use_threads(settings.trainer)
    samples = np.array(sorted(corpus.position(key) for key in plan.train_keys))
    dataset = CropDataset(
        corpus,
        samples,
        Schedule(np.asarray(corpus.shards)[samples], settings.seed, LANES),
        plan.preprocess,
        settings.crop_size,
        augment=settings.augment,
        **kind.crops(),
    )
    main = rank_zero_only.rank in (None, 0)
    loggers = make_loggers(settings, run, run.checkpoints.last_step()) if main else []
    log_load(loggers, report)

    def look(network: Supervised) -> None:
        if rank_zero_only.rank in (None, 0):
            check_start(plan, network, run)

    if settings.fit != "descent":
        look(model)
        # No trainer, which would start the other ranks: this process is the only one.
        kind.fit(model.to(device_of(settings)), dataset)
        return
    PhasedLoop(
        settings,
        dataset,
        run,
        at_start=look,
        validation=kind.validation(plan, run, model),
        augment=kind.augment(),
        loggers=loggers,
        label=f"finetune {settings.arm} seed {settings.seed}",
    ).fit(model)


def _predict_and_score(plan: Plan, run: RunFolder, model: Supervised) -> list[Row]:
    """Writes the network and its answers for the test cases; returns their rows."""
    model.finish()
    model.to(device_of(plan.settings)).eval()
    return kind_of(plan.settings).score(plan, run, model)


def _score_again(plan: Plan, run: RunFolder) -> list[Row]:
    """Rows of today's metric from the predictions or answers of a finished run."""
    try:
        return kind_of(plan.settings).score_again(plan, run)
    except InputError as error:
        why = f"{run.path}: its scores are of an older metric and cannot be made anew; remove the "
        raise InputError([why + "folder to train it again", *error.problems]) from error
