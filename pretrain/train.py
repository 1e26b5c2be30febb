"""`voxelith pretrain`: a corpus to a run folder."""

from __future__ import annotations

import contextlib
import math
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_only
from numpy.typing import NDArray
from torch import Tensor

from data_prep.corpus import Corpus, open_corpus
from data_prep.errors import InputError, attempt, named
from data_prep.preprocess import Preprocess
from data_prep.remote import Shelf
from pretrain.arguments import build, check_arguments, locate, split_target
from pretrain.augment import Augment
from pretrain.cache import cache_folder
from pretrain.crops import ONE, Crops
from pretrain.events import step_of
from pretrain.health import Health
from pretrain.loader import CropDataset, to_batch
from pretrain.loop import Loop, check_machine, machine_precision, use_threads
from pretrain.manifest import TRAINING
from pretrain.noise import raw_batch
from pretrain.objective import Batch, Objective
from pretrain.optim import Moments, fitting_moments, named_moments
from pretrain.previews import draw_previews
from pretrain.probe import Probe
from pretrain.release import LoadReport, TrainingState, load_release
from pretrain.run_folder import RunFolder
from pretrain.sampling import times_of
from pretrain.schedule import WINDOW, Schedule
from pretrain.settings import PretrainSettings, check_same, ranks_that_fit
from pretrain.start import (
    Start,
    begin_from,
    check_same_start,
    is_run,
    keep_seen,
    keep_start,
    open_start,
    other_intensities,
    taught_names,
)
from pretrain.strip import add_to_strip
from pretrain.tracking import check_loggers, log_load, make_loggers


def pretrain(settings: PretrainSettings) -> Path:
    """Trains an objective on a corpus; started again, it goes on where its checkpoint left off.

    Returns:
        The run folder.

    Raises:
        InputError: wrong settings, corpus or run folder; all problems that can be seen together.
    """
    path = prepare(settings).train()
    if rank_zero_only.rank == 0:
        print(f"Next: voxelith export {path} release/")
    return path


@dataclass(frozen=True)
class Prepared:
    """A pretraining that was looked at and fits together; nothing is written yet.

    Attributes:
        make: the objective with weights that depend on the seed alone.
        start: what it begins from instead, unless that is still to be trained or it is resumed.
    """

    settings: PretrainSettings
    run: RunFolder
    corpus: Corpus
    channels: int
    make: Callable[[], Objective]
    probe: Probe | None
    start: Start | None

    @property
    def finished(self) -> bool:
        """Whether its last step is done and saved."""
        return self.run.checkpoints.last_step() >= self.settings.steps

    def shapes(self) -> dict[str, Tensor]:
        """What its objective's state will be, without values."""
        with torch.device("meta"):
            return dict(self.make().state_dict())

    def train(self) -> Path:
        """Trains it to the last step, from its newest checkpoint if there is one."""
        settings, run, corpus = self.settings, self.run, self.corpus
        use_threads(settings.trainer)
        main = rank_zero_only.rank == 0
        if main:
            _warn(settings, corpus)
        objective = self.make()
        start = report = None
        # By every rank: none gets another's moments.
        moments = {} if run.checkpoints.paths() else first_moments(objective, settings)
        # Other ranks get these weights from the first one, when DDP starts.
        if main and settings.init is not None and not run.checkpoints.paths():
            start = self.start or named("init", settings.init, open_start)
            report = begin(objective, start.state, settings, foreign=start.foreign)
        dataset = make_dataset(settings, corpus, objective.crops)
        loop = Loop(
            settings,
            dataset,
            run,
            augment=Augment(settings.flip, settings.augment),
            draw_previews=_draw_pictures,
            health=Health(settings.health, dataset, run.path, self.probe),
            label="pretrain",
        )
        with run.lease() if main else contextlib.nullcontext():
            if main:
                # A run that cannot go on is refused before its facts are written anew.
                resumed = loop.restored_step()
                loop.loggers = make_loggers(settings, run, resumed)
                asked = settings.model_dump(mode="json")
                run.describe(
                    asked,
                    sys.argv,
                    channels=self.channels,
                    channel_names=corpus.channel_names,
                    corpus={"index_hash": corpus.index_hash, "samples": len(dataset.used)},
                    preprocess=dataset.preprocess.to_dict(),
                    data=data_facts(corpus, dataset.used),
                    parameters=sum(p.numel() for p in objective.encoder.parameters()),
                )
                keep_seen(run, corpus, asked["corpus"])
                if not resumed:
                    keep_start(run, start, report, len(moments))
                if report is not None:
                    print(f"init={settings.init}: {report}{_with(moments, objective)}")
                    log_load(loop.loggers, report)
                if start is not None:
                    modalities = data_facts(corpus, dataset.used)["modality"]
                    for one in other_intensities(start, dataset.preprocess, modalities):
                        print(one)
            del start
            try:
                loop.fit(objective, moments)
            except FloatingPointError:
                if main:
                    print(f"Next: voxelith replay {run.path}", file=sys.stderr)
                raise
        if main:
            print(f"{run.path}: step {loop.step} of {settings.steps}")
        return run.path


def prepare(
    settings: PretrainSettings,
    *,
    follows: bool = False,
    before: Mapping[str, Tensor] | None = None,
    elsewhere: bool = False,
) -> Prepared:
    """Looks whether a pretraining can start.

    Args:
        settings: of it.
        follows: whether what it begins from, `settings.init`, is a run that is still to be trained.
        before: that run's state without values, if it is known.
        elsewhere: whether it is to start on another machine, whose devices and packages are not
            those of this one.

    Raises:
        InputError: wrong settings, corpus or run folder; all problems that can be seen together.
    """
    main = rank_zero_only.rank == 0
    run = RunFolder(settings.runs / settings.run)
    problems: list[str] = []
    if not elsewhere:
        attempt(problems, check_machine, settings.trainer)
        attempt(problems, check_loggers, settings)
    given = settings
    settings = attempt(problems, on_these_ranks, settings, elsewhere) or settings
    if main:
        attempt(problems, _check_run, run, settings)
    corpus = attempt(problems, corpus_for, settings)
    channels = None if corpus is None else attempt(problems, corpus_channels, corpus)
    if corpus is not None:
        attempt(problems, times_of, settings.sampling, corpus)
    make = attempt(problems, plan_objective, settings, channels or 1)
    if main and make is not None:
        attempt(problems, _check_micro_steps, make, settings)
    preprocess = _preprocess(settings, corpus)
    probe = None
    if settings.health.probe is not None:
        probe = attempt(
            problems, Probe.open, settings.health.probe, channels, preprocess, settings.crop_size
        )
    start, foreign = None, False
    if main and settings.init is not None and not follows and not run.checkpoints.paths():
        start = attempt(problems, named, "init", settings.init, open_start)
        if start is not None:
            before, foreign = start.state, start.foreign
    if make is not None and channels is not None:
        attempt(problems, _check_start, make, settings, before, foreign)
    if main and settings.init_moments and not follows and not run.checkpoints.paths():
        attempt(problems, _check_moments, settings)
    if problems or corpus is None or channels is None or make is None:
        raise InputError(problems)
    if main and given.accumulate is None and settings.micro_steps > 1:
        print(
            f"accumulate={settings.micro_steps}: each of {settings.ranks} ranks takes "
            f"{settings.micro_batch} samples at once, no more than before"
        )
    return Prepared(settings, run, corpus, channels, make, probe, start)


def begin(
    objective: Objective,
    state: Mapping[str, Tensor],
    settings: PretrainSettings,
    *,
    foreign: bool,
) -> LoadReport:
    """Lets an objective begin from weights, as the settings of a run say; see `begin_from`."""
    return begin_from(
        objective,
        state,
        foreign=foreign,
        channels=settings.adapt_channels,
        least=settings.init_covers,
    )


def _check_start(
    make: Callable[[], Objective],
    settings: PretrainSettings,
    state: Mapping[str, Tensor] | None,
    foreign: bool,
) -> None:
    """Lets an objective without memory begin from the weights."""
    with torch.device("meta"):
        objective = make()
    if state is not None:
        begin(objective, state, settings, foreign=foreign)
    frozen = not any(p.requires_grad for p in objective.encoder.parameters())
    if frozen and settings.init is None:
        raise InputError(
            f"init: missing; {type(objective).__name__} does not train the encoder, so give "
            "init=RUN, init=RELEASE or init=FILE of public weights, one that is trained"
        )


def _check_moments(settings: PretrainSettings) -> None:
    if settings.init is None:
        raise InputError("init_moments=true: of what? give init=RUN or init=RELEASE, a full one")
    if settings.init.exists():
        _check_optimizer(open_training(settings.init), settings)


def _check_optimizer(state: TrainingState, settings: PretrainSettings) -> None:
    if state.optimizer != settings.optimizer:
        raise InputError(
            f"init_moments=true: {settings.init} was trained by {state.optimizer}, and "
            f"optimizer={settings.optimizer} keeps something else; give optimizer={state.optimizer}"
        )


def first_moments(objective: Objective, settings: PretrainSettings) -> Moments:
    """The moments that a training begins with: those of `init` that fit, where they are wanted.

    Raises:
        InputError: `init` has none, or those of another optimiser.
    """
    if not settings.init_moments or settings.init is None:
        return {}
    state = open_training(settings.init)
    _check_optimizer(state, settings)
    # A teacher's weights have no moments: those under their names are of the student.
    taught = taught_names(objective, state.objective)
    own = {name: kept for name, kept in state.moments.items() if name not in taught}
    return fitting_moments(objective, own)


def _with(moments: Moments, objective: Objective) -> str:
    trained = sum(p.requires_grad for p in objective.parameters())
    return f"; moments of {len(moments)} of {trained} parameters" if moments else ""


def _check_run(run: RunFolder, settings: PretrainSettings) -> None:
    if run.config_path.exists():
        if settings.resume == "never":
            raise InputError(
                f"{run.path}: exists already; choose another run=NAME, remove it, or resume=auto"
            )
        if run.checkpoints.paths():  # else nothing has been trained that could differ
            check_same(settings, run.config(), run.path)
            check_same_start(settings.init, run)


def on_these_ranks(settings: PretrainSettings, elsewhere: bool = False) -> PretrainSettings:
    """Settings with the `accumulate` and the precision that this start has.

    A run that goes on stays in its precision unless another is given; of its `accumulate` see
    `resumed`. What `auto` comes to elsewhere is not known here. Every rank finds the same, also
    where the first one has written its settings already.
    """
    run, trainer = RunFolder(settings.runs / settings.run), settings.trainer
    own = "auto" if elsewhere else machine_precision(trainer)
    if run.config_path.exists():
        before = run.config()
        settings, kept = settings.resumed(before), before["trainer"]["precision"]
        if run.checkpoints.paths():  # else nothing has been computed in it
            if trainer.precision == "auto" and not elsewhere and kept not in ("auto", own):
                _say(f"{run.path}: goes on in {kept}, as it began; {own} would be usual here")
            own = kept
    if trainer.precision == "auto":
        trainer = trainer.model_copy(update={"precision": own})
    return settings.model_copy(update={"accumulate": settings.micro_steps, "trainer": trainer})


@rank_zero_only
def _say(text: str) -> None:
    print(text, flush=True)


def _check_micro_steps(make: Callable[[], Objective], settings: PretrainSettings) -> None:
    """Refuses another `accumulate` where it would change the loss of a run that goes on."""
    run = RunFolder(settings.runs / settings.run)
    if not run.checkpoints.paths():
        return
    before = PretrainSettings.model_validate(run.config())
    with torch.device("meta"):
        objective = make()
    among = objective.compares or objective.mixes or objective.batch_multiple > 1
    if not among or settings.micro_steps == before.micro_steps:
        return
    kept = settings.model_copy(update={"accumulate": before.micro_steps})
    fit = ranks_that_fit(settings.batch_size, before.micro_steps)
    raise InputError(
        f"accumulate={settings.micro_steps}: the run has accumulate={before.micro_steps}, on "
        f"{before.ranks} ranks with {before.micro_batch} samples at once each, and "
        f"{type(objective).__name__} compares or mixes the samples of a micro-batch, so another "
        f"one is another loss; go on on {before.ranks} ranks or more ({', '.join(map(str, fit))} "
        f"divide batch_size={settings.batch_size}), or give accumulate={before.micro_steps}: "
        f"{kept.batch_size / (kept.ranks * kept.micro_steps):g} samples at once on each of "
        f"{settings.ranks}"
    )


def _warn(settings: PretrainSettings, corpus: Corpus) -> None:
    """Says what is allowed and seldom meant."""
    if settings.warmup >= settings.steps:
        print(
            f"warmup={settings.warmup}: not shorter than steps={settings.steps}, so that the rate "
            "never gets to lr"
        )
    if corpus.shelf is not None and settings.mixed_lanes % settings.trainer.nodes:
        print(
            f"lanes={settings.mixed_lanes}: does not divide among {settings.trainer.nodes} nodes, "
            "so each of them fetches the shards of all lanes; give a multiple of the nodes"
        )
    if corpus.shelf is not None:
        sizes = [int(shard["bytes"]) for shard in corpus.info["shards"]]
        used = min(len(sizes), WINDOW * math.ceil(settings.mixed_lanes / settings.trainer.nodes))
        needed = used * sum(sizes) / len(sizes)
        if corpus.shelf.limit < needed:
            print(
                f"remote.cache_gb={settings.remote.cache_gb:g}: about {used} shards of "
                f"{needed / 1e9:.3g} GB are in use on a node at once, so they come more than "
                "once; raise it, lower lanes, or give 0 to fetch only what crops touch"
            )
    shapes = corpus.shapes[:, 1:].astype(float)
    if settings.spacing is not None:
        shapes = np.rint(shapes * corpus.spacings / settings.spacing)
    largest = [int(n) for n in shapes.max(axis=0)]
    sides = zip("DHW", settings.crop_size, largest, strict=True)
    wide = [f"{axis} ({side} of at most {n} voxels)" for axis, side, n in sides if side > n]
    if wide:
        print(
            f"crop_size={list(settings.crop_size)}: larger than every volume of the corpus along "
            f"{', '.join(wide)}; what is beyond is padding, which costs time and has no loss"
        )


def _draw_pictures(objective: Objective, batch: Batch, path: Path) -> None:
    """What the objective shows of a batch, and what its features look like since the start."""
    draw_previews(objective, batch, path)
    add_to_strip(objective, batch, path.parent, step_of(path))


def corpus_for(settings: PretrainSettings) -> Corpus:
    """The corpus, or corpora, of the settings, with a shelf for what lies elsewhere if wanted.

    Raises:
        InputError: see `open_corpus`.
    """
    assert settings.corpus is not None
    shelf = None
    if settings.remote.cache_gb:
        folder = settings.remote.folder or cache_folder() / "shards"
        shelf = Shelf(folder.absolute(), int(settings.remote.cache_gb * 1e9))
    return open_corpus(settings.corpus, "corpus", shelf)


def make_dataset(settings: PretrainSettings, corpus: Corpus, crops: Crops = ONE) -> CropDataset:
    """All volumes of the corpus in the run's order."""
    times = times_of(settings.sampling, corpus)
    return CropDataset(
        corpus,
        np.arange(len(corpus)),
        Schedule(np.asarray(corpus.shards), settings.seed, settings.mixed_lanes, times),
        _preprocess(settings, corpus),
        settings.crop_size,
        crops=crops,
        augment=settings.augment,
        skip=settings.damaged == "skip",
    )


def _preprocess(settings: PretrainSettings, corpus: Corpus | None) -> Preprocess:
    # Without crop_mm the corpus is at its spacing already; the release resamples new scans to it.
    spacing = settings.spacing or (None if corpus is None else corpus_spacing(corpus))
    return Preprocess.default(spacing, intensity=settings.intensity.model_dump(exclude_none=True))


def build_objective(settings: PretrainSettings, channels: int) -> Objective:
    """Backbone and objective from their config groups; weights depend on the seed alone.

    Raises:
        InputError: see `plan_objective`.
    """
    return plan_objective(settings, channels)()


def plan_objective(settings: PretrainSettings, channels: int) -> Callable[[], Objective]:
    """Looks whether backbone, objective, crop and batch fit together, and returns what makes them.

    Raises:
        InputError: they do not; all wrong arguments are listed at once.
    """
    backbone = {**settings.backbone, "in_channels": channels}
    problems: list[str] = []
    for where, config, given in (
        ("backbone", backbone, ()),
        ("objective", settings.objective, ("encoder",)),
    ):
        path, arguments = split_target(config)
        problems += check_arguments(locate(path, where), arguments, where, given)[1]
    if problems:
        raise InputError(problems)

    def make() -> Objective:
        made = build(settings.objective, "objective", encoder=build(backbone, "backbone"))
        if not isinstance(made, Objective):
            raise InputError(
                f"objective._target_={settings.objective['_target_']}: is no "
                "pretrain.objective.Objective; derive it from that class"
            )
        return made

    try:
        with torch.device("meta"):
            objective = make()
    except (ValueError, TypeError, RuntimeError) as error:
        raise InputError(f"backbone and objective cannot be made: {error}") from error
    attempt(problems, _check_batch, objective, settings)
    attempt(problems, _try_step, objective, channels, settings)
    if problems:
        raise InputError(problems)

    def make_seeded() -> Objective:
        torch.manual_seed(settings.seed)
        return make()

    return make_seeded


def _try_step(objective: Objective, channels: int, settings: PretrainSettings) -> None:
    """One forward step without memory or arithmetic: what does not fit is found before a start.

    Raises:
        InputError: backbone, objective and crops do not fit together.
    """
    fits: Any = objective.encoder
    where = f"objective and crop_size={list(settings.crop_size)}"
    try:
        for group in objective.crops.groups(settings.crop_size):
            key = f"objective.{group.name}_size" if group.name else "objective and crop_size"
            where = f"{key}={list(group.size)}"
            fits.grids(group.size)
        where = f"objective and crop_size={list(settings.crop_size)}"
        with torch.device("meta"):
            samples = 2 * objective.batch_multiple
            raw = raw_batch(settings, channels, samples, objective.crops, "meta")
            # Without keys: it is no sample that an objective could look up.
            objective(replace(to_batch(raw), keys=[]), 0.0)
    except NotImplementedError:
        return  # an objective that reads values (torch has none here) is tried by its first batch
    except (ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise InputError(f"backbone, {where} do not fit together: {error}") from error


def _check_batch(objective: Objective, settings: PretrainSettings) -> None:
    parts = settings.ranks * settings.micro_steps
    micro, multiple = settings.batch_size // parts, objective.batch_multiple
    if micro % multiple:
        raise InputError(
            f"batch_size={settings.batch_size}: leaves {micro} samples to each of devices x nodes "
            f"x accumulate = {parts} micro-batches, and {type(objective).__name__} needs a "
            f"multiple of {multiple} there: take a batch_size that is a multiple of "
            f"{parts * multiple}"
        )


def corpus_channels(corpus: Corpus) -> int:
    """Channels of the corpus; all volumes must have the same number."""
    counts = np.unique(corpus.shapes[:, 0])
    if len(counts) != 1:
        raise InputError(
            f"{corpus}: volumes have {' and '.join(map(str, counts))} channels; "
            "an encoder needs one number, so make a corpus of each"
        )
    return int(counts[0])


def corpus_spacing(corpus: Corpus) -> tuple[float, float, float] | None:
    """The spacing that prep resampled to, or None where volumes keep their own."""
    spacing = corpus.info["options"].get("spacing")
    return None if spacing is None else (float(spacing[0]), float(spacing[1]), float(spacing[2]))


FACTS = ("modality", "source", "licence")


def data_facts(corpus: Corpus, used: NDArray[np.int64]) -> dict[str, Any]:
    """Counts for the model card: what the encoder saw of a corpus, and under which licences."""
    counts = corpus.info["counts"]
    if len(used) < len(corpus):
        groups = {name: corpus.groups(name) for name in FACTS}
        counts = {name: dict(Counter(found[i] for i in used)) for name, found in groups.items()}
    return {name: counts[name] for name in FACTS}


def open_training(path: Path) -> TrainingState:
    """The state of the training of a run or of a full release.

    Raises:
        InputError: it is neither.
    """
    if is_run(path):
        objective, _, state = load_trained(RunFolder(path))
        optimizer = str(RunFolder(path).config()["optimizer"])
        return TrainingState(
            state["objective"], optimizer, named_moments(objective, state["optimizer"])
        )
    if path.is_dir() and load_release(path).is_full:
        return TrainingState.load(path / TRAINING)
    raise InputError(
        f"init_moments=true: {path} has no moments; give the run, or a release that "
        "`voxelith export RUN OUT form=full` made"
    )


def load_trained(run: RunFolder) -> tuple[Objective, dict[str, Any], dict[str, Any]]:
    """The objective of a run with its newest weights, the run's facts and its checkpoint."""
    config, facts = run.pretraining()
    settings = PretrainSettings.model_validate(config)
    state = run.checkpoints.load()
    if state is None:
        raise InputError(
            f"{run.path}: has no checkpoint yet; wait for the first (save_every) or lower it"
        )
    objective = build_objective(settings, int(facts["channels"]))
    objective.load_state_dict(state["objective"])
    return objective, facts, state
