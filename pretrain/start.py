"""Weights that a pretraining begins from: another run's, a release's, or public ones of others.

What they were trained on goes along: the leakage gate asks what an encoder has seen, in all of its
trainings, and of public weights that is unknown. A run keeps all this in `init.json` and needs the
other one no more once it has a checkpoint.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from data_prep.corpus import Corpus
from data_prep.errors import CorruptionError, InputError
from data_prep.files import file_digest, read_note, write_json
from data_prep.licences import UNSTATED
from data_prep.preprocess import Preprocess
from pretrain.adapters import Channels, adapted_state
from pretrain.foreign import converted, open_foreign, read_weights
from pretrain.manifest import TRAINING
from pretrain.objective import INHERITED, Objective
from pretrain.release import LoadReport, TrainingState, constant_tensors, load_release, read_tensors
from pretrain.run_folder import RunFolder
from pretrain.sampling import used_volumes
from pretrain.settings import FREE, SamplingSettings

TEACHER = "teacher.module."
"""What the names of a teacher's weights begin with, where a student's begin with `encoder.`."""
ENCODERS = ("encoder.", "teacher.")
"""What the names of an encoder's weights begin with in an objective."""


@dataclass(frozen=True)
class Origin:
    """Where weights come from, without a path.

    Attributes:
        name: of the run, the release or the file.
        digest: sha256 of the run's checkpoint or of the file, or the release's.
        recipe_hash: see there; the digest where the release has none.
        data: counts of what the weights were trained on, a dict for each training, the last first;
            a count is None where the weights do not tell.
        fingerprints: of all volumes that they were trained on. Those of public weights are unknown,
            and one that no corpus has says so: the leakage gate takes it for no answer.
    """

    name: str
    digest: str
    recipe_hash: str
    data: list[dict[str, Any]]
    fingerprints: list[str]

    def facts(self) -> dict[str, Any]:
        """All but the fingerprints, for a release's config."""
        return {name: value for name, value in asdict(self).items() if name != "fingerprints"}


def origin_of(run: RunFolder) -> Origin | None:
    """What a run began from; None: from random weights."""
    file = run.path / "init.json"
    return Origin(**json.loads(file.read_text())) if file.exists() else None


@dataclass(frozen=True)
class Start:
    """Weights by name, and where they come from.

    Attributes:
        state: by the names of an objective; of public weights, by those they were published under.
        foreign: whether they are public ones.
        preprocess: what scans were turned into for them, as plain data; None: it is not told.
    """

    state: Mapping[str, Tensor]
    origin: Origin
    foreign: bool = False
    preprocess: dict[str, Any] | None = None


def open_start(path: Path) -> Start:
    """Reads the weights of a run's newest checkpoint or of a release, every byte of it verified.

    Or public weights from a file: see `pretrain.foreign`.

    Raises:
        InputError: it is none of them, or has no checkpoint yet.
    """
    if path.is_file():
        return _of_file(path)
    return _of_run(RunFolder(path)) if is_run(path) else _of_release(path)


def backbone_of(path: Path) -> dict[str, Any]:
    """The architecture of a run, a release or a file of public weights, as a config names it.

    Raises:
        InputError: it is none of them, or the file does not tell all of its sizes.
    """
    if path.is_dir() and is_run(path):
        config, _ = RunFolder(path).pretraining()
        return dict(config["backbone"])
    file = path.is_file()
    chosen = open_foreign(path).backbone if file else load_release(path).config["backbone"]
    return {"_target_": f"pretrain.backbones.{chosen['name']}", **chosen["args"]}


def check_same_start(init: Path | None, run: RunFolder) -> None:
    """Refuses to resume a run that began from other weights.

    Its own checkpoint has all that it needs, so where they were may be empty by now, or hold a run
    that went on: the same path is taken at its word, another one by its digest.

    Raises:
        InputError: it began from others.
    """
    origin, path = origin_of(run), run.config().get("init")
    if origin is None and init is None:
        return
    if origin is not None and init is not None:
        if str(init) == path:
            return
        file = init if init.is_file() else None
        there = _newest(RunFolder(init))[0] if is_run(init) else file
        found = load_release(init).digest if there is None else file_digest(there)
        if found == origin.digest:
            return
    began = "random weights" if origin is None else f"{origin.name} ({path})"
    raise InputError(
        f"{run.path}: cannot be resumed with init={init}: it began from {began}; restore that, or "
        "start another run=NAME"
    )


def other_intensities(start: Start, preprocess: Preprocess, modalities: Iterable[str]) -> list[str]:
    """How values become the network's otherwise than the weights are used to, by modality."""
    before = None if start.preprocess is None else Preprocess.from_dict(start.preprocess).intensity
    now = preprocess.intensity
    if before is None or now is None:
        return []
    return [
        f"intensity.{modality}: {json.dumps(now[modality])}, and the weights of init were trained "
        f"with {json.dumps(before[modality])}"
        for modality in sorted(set(modalities) & before.keys())
        if now[modality] != before[modality]
    ]


def keep_start(
    run: RunFolder, start: Start | None, report: LoadReport | None, moments: int = 0
) -> None:
    """Writes into a run's folder what it begins from and what became of each tensor."""
    files = run.path / "init.json", run.path / "load_report.json"
    for file in files:
        file.unlink(missing_ok=True)  # of a start that came to no checkpoint
    if start is not None and report is not None:
        write_json(files[0], asdict(start.origin))
        how = {"init": start.origin.name, "digest": start.origin.digest}
        write_json(files[1], how | report.to_dict() | {"moments": moments})


def taught_names(objective: Objective, state: Mapping[str, Tensor]) -> dict[str, str]:
    """The teacher's names by the student's, where an objective without a teacher begins from both.

    It gets the teacher, as from a release.
    """
    if objective.released is not objective.encoder:
        return {}
    own = [name for name in state if name.startswith("encoder.")]
    taught = {name: name.replace("encoder.", TEACHER, 1) for name in own}
    return taught if state.keys() >= set(taught.values()) else {}


def begin_from(
    objective: Objective,
    state: Mapping[str, Tensor],
    *,
    foreign: bool = False,
    channels: Channels = "repeat",
    least: float = INHERITED,
) -> LoadReport:
    """Lets an objective take over weights; the report says what became of each.

    Args:
        objective: that begins; one without memory says whether they fit.
        state: the weights.
        foreign: whether they have the names that others published them under.
        channels: how several channels begin from one; see `pretrain.adapters`.
        least: share of the encoder's parameters that must come from them. Where less than usual
            will do, what no adapter makes is new instead of refused.

    Raises:
        InputError: they do not fit it, and no adapter makes them; see `Objective.inherit` and
            `pretrain.foreign.converted`.
    """
    published = None
    if foreign:
        found, published = converted(state, objective.encoder)
        state = {f"encoder.{name}": value for name, value in found.items()}
    device = next(objective.parameters()).device
    own = objective.state_dict()
    state = {name: value.to(device) for name, value in state.items()}
    taught = taught_names(objective, state)
    state |= {name: state[teacher] for name, teacher in taught.items()}
    # VoCo's teacher is one of its projector.
    encoder_names = ENCODERS if objective.released is not objective.encoder else ENCODERS[:1]
    encoders = {name: value for name, value in state.items() if name.startswith(encoder_names)}
    fitted, changed = adapted_state(encoders, objective, channels)
    state |= fitted
    taken = set(objective.inherit(state, least))
    unfit = [n for n in own if n.startswith(encoder_names) and n in state and n not in taken]
    if unfit and least >= INHERITED:
        raise InputError(
            [
                f"init: {name} has shape {list(state[name].shape)} there, {list(own[name].shape)} "
                "here, and no adapter makes one of the other"
                for name in unfit
            ]
        )
    sizes = {f"encoder.{name}": p.numel() for name, p in objective.encoder.named_parameters()}
    skipped = {
        name: f"has shape {list(value.shape)}, {list(own[name].shape)} here"
        if name in own
        else "is no part of it"
        for name, value in state.items()
        if name not in taken
    }
    covered = sum(n for name, n in sizes.items() if name in taken) / sum(sizes.values())
    report = LoadReport(
        copied=sorted(taken), skipped=skipped, new=sorted(own.keys() - taken), covered=covered
    )
    if not any(state[name].is_meta for name in taken):
        report.constant = constant_tensors({name: state[name] for name in taken})
    if published is not None:
        changed |= {f"encoder.{name}": how for name, how in published.adapted.items()}
        names = {f"encoder.{name}": published.sources.get(name, name) for name in found}
        report.sources = {n: file for n, file in names.items() if n in taken and n != file}
        report.skipped |= published.skipped
    report.sources |= {name: teacher for name, teacher in taught.items() if name in taken}
    report.adapted = {name: how for name, how in sorted(changed.items()) if name in taken}
    report.copied = sorted(taken - report.adapted.keys())
    return report


def recipe_hash(
    settings: dict[str, Any], index_hash: str, step: int, origin: Origin | None = None
) -> str:
    """The same for releases that differ in the seed of pretraining alone.

    What several seeds of one recipe are worth together is told by this (`finetune.table`).

    Args:
        settings: of the run, as its config.json has them.
        index_hash: of the corpus.
        step: how far the run had come.
        origin: what it began from.
    """
    kept = {k: v for k, v in settings.items() if k not in FREE | {"run", "seed"}}
    precision = settings["trainer"]["precision"]
    recipe = {**kept, "precision": precision, "index_hash": index_hash, "step": step}
    if origin is not None:
        recipe["init"] = origin.recipe_hash
    text = json.dumps(recipe, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def keep_seen(run: RunFolder, corpus: Corpus, given: str | Sequence[str]) -> None:
    """Writes the fingerprints of a corpus behind a password into the folder of a run on it.

    What needs them later cannot get at the corpus again, since no run keeps the password. Of other
    corpora nothing is copied: it is kilobytes for each volume.

    Args:
        run: that has described itself.
        corpus: of it.
        given: the paths or addresses of the corpus, as they were given.
    """
    file = run.path / "fingerprints.json"
    if run.config()["corpus"] == given:
        return
    if read_note(file).get("index_hash") != corpus.index_hash:
        with contextlib.suppress(CorruptionError):  # of a volume that the training may skip
            write_json(file, {"index_hash": corpus.index_hash, "values": _prints(run, corpus)})


def seen_volumes(run: RunFolder, index_hash: str) -> list[str]:
    """Fingerprints of all that a run's weights have seen: in its corpus, and before.

    Raises:
        InputError: the run has not kept them, and its corpus is gone or another one.
    """
    kept, origin = read_note(run.path / "fingerprints.json"), origin_of(run)
    own = kept["values"] if kept.get("index_hash") == index_hash else _found(run, index_hash)
    return sorted({*own, *(origin.fingerprints if origin else [])})


def _prints(run: RunFolder, corpus: Corpus) -> list[str]:
    """Of the volumes that the run sees."""
    sampling = SamplingSettings.model_validate(run.config().get("sampling", {}))
    prints = corpus.scan_prints()
    return sorted(set().union(*(prints[corpus.keys[i]] for i in used_volumes(sampling, corpus))))


def _found(run: RunFolder, index_hash: str) -> list[str]:
    """The fingerprints of a run's corpus, which is opened for them."""
    paths = run.config()["corpus"]
    corpus = Corpus.open(*([paths] if isinstance(paths, str) else paths))
    if corpus.index_hash != index_hash:
        raise InputError(
            f"{corpus}: is not the corpus that {run.path} was trained on (index hash "
            f"{corpus.index_hash[:12]}, its checkpoint says {index_hash[:12]}); "
            "its fingerprints are needed: restore it"
        )
    return _prints(run, corpus)


def is_run(path: Path) -> bool:
    """Whether a folder is that of a run."""
    return (path / "run.json").exists() and (path / "config.json").exists()


def _newest(run: RunFolder) -> tuple[Path, dict[str, Any]]:
    found = run.checkpoints.newest()
    if found is None:
        raise InputError(f"{run.path}: has no checkpoint yet; let it train first")
    return found


def _of_run(run: RunFolder) -> Start:
    (settings, facts), (newest, checkpoint) = run.pretraining(), _newest(run)
    index_hash, step = str(checkpoint["schedule"]["index_hash"]), int(checkpoint["step"])
    before = origin_of(run)
    data = {**facts["corpus"], **facts["data"]}
    origin = Origin(
        name=run.path.name,
        digest=file_digest(newest),
        recipe_hash=recipe_hash(settings, index_hash, step, before),
        data=[data, *(before.data if before else [])],
        fingerprints=seen_volumes(run, index_hash),
    )
    return Start(checkpoint["objective"], origin, preprocess=facts.get("preprocess"))


def _of_file(path: Path) -> Start:
    digest = file_digest(path)
    origin = Origin(
        name=path.name,
        digest=digest,
        recipe_hash=digest,
        data=[{"source": {path.name: None}, "licence": {f"{UNSTATED} by {path.name}": None}}],
        fingerprints=[f"unknown:{digest}"],
    )
    return Start(read_weights(path), origin, foreign=True)


def _of_release(path: Path) -> Start:
    release = load_release(path)
    training = release.config["training"]
    if release.is_full:
        state: Mapping[str, Tensor] = TrainingState.load(path / TRAINING).objective
    else:
        weights = read_tensors(path / "model.safetensors")
        state = {f"encoder.{name}": value for name, value in weights.items()}
    origin = Origin(
        name=release.name,
        digest=release.digest,
        recipe_hash=str(training.get("recipe_hash", release.digest)),
        data=release.trainings,
        fingerprints=sorted(release.fingerprints),
    )
    return Start(state, origin, preprocess=release.config["preprocess"])
