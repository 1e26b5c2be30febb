"""Predictions against the truth of a labelled corpus: rows by case and class, in native space."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from data_prep.corpus import Corpus, open_corpus
from data_prep.errors import InputError, attempt
from data_prep.files import make_folder
from data_prep.fingerprint import ALGORITHM, VERSION
from data_prep.naming import plain
from data_prep.progress import bar
from data_prep.sketch import PREFIX, Sketch, SketchIndex
from finetune.metrics import METRIC_VERSION, Score, score_labels
from finetune.predictions import Labels, find_predictions, read_prediction
from finetune.rows import Row, write_rows
from finetune.settings import EvaluateSettings, TaskSettings


@dataclass(frozen=True)
class Split:
    """One part of a corpus' split."""

    name: str
    hash: str
    part: str
    keys: tuple[str, ...]


@dataclass(frozen=True)
class Origin:
    """Where predictions come from; the fields of `Row` of the same names.

    `seen` is what the weights were pretrained on: None if that is not known.
    """

    arm: str
    labels: str = ""
    n_labels: int = -1
    seed: int = -1
    label_seed: int = -1
    init_seed: int = -1
    pretrain_seed: int = -1
    pretrain_recipe: str = ""
    steps: int = -1
    checkpoint: str = ""
    checkpoint_digest: str = ""
    config_hash: str = ""
    recipe_hash: str = ""
    protocol: str = ""
    seen: Seen | None = None


def evaluate(settings: EvaluateSettings) -> Path:
    """Scores a folder of predictions, whoever made them; writes rows.csv into `output`.

    Raises:
        InputError: corpus and task do not fit, or predictions are missing or on another grid; all
            of them are named.
    """
    problems: list[str] = []
    if not settings.predictions.is_dir():
        problems.append(f"predictions={settings.predictions}: no such folder")
    corpus = attempt(problems, open_corpus, settings.corpus, "corpus")
    if corpus is not None:
        problems += task_problems(corpus, settings.task)
    if corpus is None or problems:
        raise InputError(problems)
    split = choose_split(corpus, settings.split, settings.part)
    files = find_predictions(settings.predictions, corpus, split.keys, settings.keymap)
    make_folder(settings.output, "output")

    def read(key: str) -> Labels:
        return read_prediction(files[key], corpus.volume(corpus.position(key)))

    name = settings.name or settings.predictions.resolve().name
    origin = Origin(arm="external", checkpoint=name, config_hash="external")
    rows = score(corpus, split, settings.task, read, origin)
    path = settings.output / "rows.csv"
    write_rows(rows, path)
    return path


def score(
    corpus: Corpus,
    split: Split,
    task: TaskSettings,
    read: Callable[[str], Labels],
    origin: Origin,
) -> list[Row]:
    """Scores every case of a part.

    Args:
        corpus: labelled.
        split: which cases.
        task: the classes and their tolerances.
        read: gives the label values [D, H, W] that were predicted for a key, on the stored grid.
        origin: where they come from.
    """
    prints = corpus.scan_prints()
    rows: list[Row] = []
    for key in bar(iterable=split.keys, desc="score", unit="case"):
        i = corpus.position(key)
        doubted, about = (
            doubt(origin, prints[key]),
            about_case(corpus, split, task.name, key, origin),
        )
        scores = score_case(corpus, i, task, read(key))
        for index, (chosen, found) in enumerate(zip(task.scored, scores, strict=True), start=1):
            values = {name: value for name, value in vars(found).items() if name != "status"}
            rows.append(
                Row(
                    class_value=index,
                    class_name=chosen.name,
                    status=doubted or found.status,
                    outcome=found.status,
                    nsd_tolerance_mm=chosen.tolerance_mm,
                    **about,
                    **values,
                )
            )
    return rows


def about_case(
    corpus: Corpus, split: Split, dataset: str, key: str, origin: Origin
) -> dict[str, Any]:
    """What all rows of a case share: the fields of `Row` that say what was scored, and whose."""
    told = {name: value for name, value in vars(origin).items() if name != "seen"}
    return told | {
        "dataset": dataset,
        "split": f"{split.name}/{split.part}",
        "split_hash": split.hash,
        "case": key,
        "subject": str(corpus.subjects[corpus.position(key)]),
        "metric_version": METRIC_VERSION,
    }


def doubt(origin: Origin, prints: set[str]) -> str:
    """Why a case cannot be believed: tainted, or unknown; empty if it can."""
    if origin.seen is None:
        return "unknown"
    return "tainted" if origin.seen.has(prints) else ""


class Seen:
    """Scans that weights have seen, to be looked up by other prints of theirs or of copies.

    Args:
        prints: fingerprints and sketches.
    """

    def __init__(self, prints: Collection[str] = ()) -> None:
        self._prints = frozenset(prints)
        self._looks: SketchIndex | None = None

    def by_voxels_alone(self, prints: Collection[str]) -> bool:
        """Whether copies cannot be looked for: the scan, or all that was seen, has no sketch."""
        return bool(self._prints) and not (any(map(_is_look, prints)) and self._has_looks)

    @cached_property
    def _has_looks(self) -> bool:
        return any(map(_is_look, self._prints))

    def has(self, prints: Collection[str]) -> bool:
        """Whether a scan with these prints, or a near-duplicate of it, is among them."""
        if not self._prints.isdisjoint(prints):
            return True
        if self._looks is None:
            self._looks = SketchIndex(map(Sketch.from_text, filter(_is_look, sorted(self._prints))))
        looks = map(Sketch.from_text, filter(_is_look, prints))
        return any(self._looks.find(look) for look in looks)


def _is_look(print_text: str) -> bool:
    return print_text.startswith(PREFIX)


def comparable(fingerprints: Collection[str]) -> Seen | None:
    """What a release has seen, if all its fingerprints are of the kind that corpora have.

    None means that it is not known what the checkpoint has seen: no fingerprints, or some that
    cannot be compared with ours. It is never taken for "nothing".
    """
    known = (f"{ALGORITHM}-{VERSION}:", PREFIX)
    if not fingerprints or not all(value.startswith(known) for value in fingerprints):
        return None
    return Seen(fingerprints)


def score_case(corpus: Corpus, i: int, task: TaskSettings, prediction: Labels) -> list[Score]:
    """Scores what the task wants scored in one case; `prediction` holds label values [D, H, W]."""
    truth = corpus.read(i, "seg")
    meta = corpus.meta(i)
    counts = None if task.ignore is None else truth != task.ignore
    if corpus.sample_has(i, "mask"):
        valid = corpus.read(i, "mask") == 0
        counts = valid if counts is None else counts & valid
    return score_labels(
        prediction,
        truth,
        task.scored,
        meta["spacing"],
        annotated=meta["annotated"],
        counts=counts,
    )


def choose_split(corpus: Corpus, name: str, part: str) -> Split:
    """A part of a split; `auto` is the official one where the corpus has it, else `default`.

    Raises:
        InputError: no such split, or the part is empty.
    """
    if name == "auto":
        name = "official" if "official" in corpus.splits else "default"
    data = corpus.split(name)
    keys = tuple(data["parts"].get(part, ()))
    if not keys:
        filled = [p for p, members in data["parts"].items() if members]
        raise InputError(
            f"{corpus.path}: split {name!r} has no case in its {part} part; it has cases in "
            f"{', '.join(filled)}"
        )
    return Split(name, str(data["hash"]), part, keys)


def task_problems(corpus: Corpus, task: TaskSettings) -> list[str]:
    """Why a task cannot be scored on a corpus; empty if it can."""
    if not corpus.labelled:
        return [f"corpus={corpus.path}: holds no labels; prep writes them where the input has them"]
    known = {int(c["value"]): str(c["name"]) for c in corpus.classes}
    return [
        *_values_that_are_not_there(corpus, task, known),
        *_classes_of_another_value(corpus, task, known),
        *_values_to_ignore(corpus, task, known),
    ]


def _values_that_are_not_there(
    corpus: Corpus, task: TaskSettings, known: Mapping[int, str]
) -> list[str]:
    missing = {c.name: sorted(set(c.values) - known.keys()) for c in task.classes}
    missing = {name: values for name, values in missing.items() if values}
    if not missing:
        return []
    table = ", ".join(f"{value} {name}" for value, name in sorted(known.items()))
    who = ", ".join(f"{name} {values}" for name, values in missing.items())
    return [
        f"task {task.name}: label values of {len(missing)} classes do not occur in {corpus.path} "
        f"({who}), which has {table}; choose the task that belongs to it, or name all of its "
        "values when the corpus is prepared (prep classes=)"
    ]


def _classes_of_another_value(
    corpus: Corpus, task: TaskSettings, known: Mapping[int, str]
) -> list[str]:
    """Data sets with the same organs number them otherwise; all values may occur all the same."""
    values = {plain(name): value for value, name in known.items()}
    wrong = [
        f"{c.name} is {', '.join(map(str, c.values))} in the task and {values[plain(c.name)]} in "
        "the corpus"
        for c in task.classes
        if values.get(plain(c.name), c.values[0]) not in c.values
    ]
    if not wrong:
        return []
    return [
        f"task {task.name}: has other label values than {corpus.path} ({'; '.join(wrong)}); choose "
        "the task that belongs to it, or write one with its values"
    ]


def _values_to_ignore(corpus: Corpus, task: TaskSettings, known: Mapping[int, str]) -> list[str]:
    """What the corpus says is neither scored nor learnt would be background to the task."""
    used = {value for c in task.classes for value in c.values} | {task.ignore}
    return [
        f"task {task.name}: does not ignore label value {value} of {corpus.path}, which is "
        f"{known[value]!r} there; say task.ignore={value}"
        for value in sorted(int(c["value"]) for c in corpus.classes if c["ignore"])
        if value not in used
    ]
