"""Folds of cross-validation: splits called fold-0, fold-1, ..., drawn here or taken from nnU-Net.

Whole subjects are folded, never single cases. A drawn fold is stratified: classes one after the
other, the rarest first (after Sechidis et al. 2011, doi:10.1007/978-3-642-23808-6_10), and within
a class from the largest label to the smallest, so that each fold gets its share of both.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.corpus import Corpus
from data_prep.errors import InputError, Naming, some
from data_prep.files import read_csv, write_bytes
from data_prep.layouts.case import read_description
from data_prep.naming import KEYMAP_FILE, private_folder
from data_prep.settings import SplitSettings
from data_prep.splits import drawn_order, split_from, write_split

FOLDS_FILE = "splits_final.json"
"""What nnU-Net calls its folds: a list of {train: [case, ...], val: [case, ...]}."""

Folds = list[dict[str, list[str]]]
Volumes = Mapping[int, float]


def make_folds(
    keys: Sequence[str],
    subjects: Sequence[str],
    labels: Sequence[Volumes],
    folds: int = 5,
    seed: int = 0,
    *,
    keep: Mapping[str, int] | None = None,
    test: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Draws folds; every fold is a split in which its own subjects validate and the others train.

    A function of the set of cases and the seed alone, whatever their order. Subjects that come
    later move others, unless those are kept.

    Args:
        keys: One per case.
        subjects: One per case.
        labels: Per case the volume of each class that it has, in any unit.
        folds: How many.
        seed: Another seed is another draw.
        keep: Folds of subjects that stay where they are; the others fill up around them.
        test: Keys that no fold holds; they are the test part of each.

    Raises:
        InputError: there are fewer subjects than folds.
    """
    volumes: dict[str, Counter[int]] = {}
    for key, subject, label in zip(keys, subjects, labels, strict=True):
        if key not in test:
            volumes.setdefault(subject, Counter()).update(label)
    if len(volumes) < folds:
        raise InputError(
            f"folds={folds}: there are {len(volumes)} subjects to fold; ask for at most that many"
        )
    places = {s: n for s, n in (keep or {}).items() if s in volumes and n < folds}
    rank = {s: drawn_order(seed, s) for s in volumes}
    open_subjects = [s for s in volumes if s not in places]
    while open_subjects:
        rest = Counter(value for s in open_subjects for value in volumes[s])
        rarest = min(rest, key=lambda value: (rest[value], value)) if rest else None
        chosen = [s for s in open_subjects if rarest is None or rarest in volumes[s]]
        for subject in sorted(chosen, key=lambda s: (-_total(volumes[s]), rank[s])):
            having = Counter(n for s, n in places.items() if rarest in volumes[s])
            filled = Counter(places.values())
            places[subject] = min(
                range(folds),
                key=lambda n: (having[n], filled[n], drawn_order(seed, f"{subject}\0{n}")),
            )
        open_subjects = [s for s in open_subjects if s not in places]
    numbers = [None if key in test else places[s] for key, s in zip(keys, subjects, strict=True)]
    return splits_of_numbers(numbers, keys, subjects, test=test, seed=seed)


def splits_of_numbers(
    numbers: Sequence[int | None],
    keys: Sequence[str],
    subjects: Sequence[str],
    *,
    test: Sequence[str] = (),
    seed: int | None = None,
) -> list[dict[str, Any]]:
    """Splits from the fold that each case validates in; None leaves it out of all.

    Raises InputError if a subject is in two folds.
    """
    held = set(test)
    return [
        split_from(
            f"fold-{fold}",
            keys,
            subjects,
            [
                "test" if k in held else "" if n is None else "validation" if n == fold else "train"
                for k, n in zip(keys, numbers, strict=True)
            ],
            seed,
        )
        for fold in sorted({n for n in numbers if n is not None})
    ]


def splits_of_folds(
    folds: Folds, key_of: Mapping[str, str], keys: Sequence[str], subjects: Sequence[str]
) -> list[dict[str, Any]]:
    """The splits that a splits_final.json stands for, as it is: nothing is moved.

    Args:
        folds: Its content.
        key_of: Key by case id, of all cases of the input.
        keys: Those that became samples; others are left out of the folds.
        subjects: Of those.

    Raises:
        InputError: it names cases that the input has not, or a case or subject validates where it
            trains: its scores would be of what the network has learnt by heart.
    """
    problems: list[str] = []
    splits = []
    for number, fold in enumerate(folds):
        strange = sorted({*fold["train"], *fold["val"]} - key_of.keys())
        if strange:
            absent = f"{FOLDS_FILE}, fold {number}: {len(strange)} cases are not in the input"
            problems.append(Naming(f"{absent} ({some(strange)})", absent))
        both = sorted(set(fold["train"]) & set(fold["val"]))
        if both:
            where, do = f"{FOLDS_FILE}, fold {number}:", "train and validate both"
            problems.append(Naming(f"{where} {some(both)} {do}", f"{where} {len(both)} cases {do}"))
        parts = {key_of[case]: "train" for case in fold["train"] if case in key_of}
        parts |= {key_of[case]: "validation" for case in fold["val"] if case in key_of}
        try:
            chosen = [parts.get(key, "") for key in keys]
            splits.append(split_from(f"fold-{number}", keys, subjects, chosen))
        except InputError as error:
            problems += error.problems
    if problems:
        raise InputError(problems)
    return splits


def read_folds(path: Path) -> Folds:
    """The content of a splits_final.json; InputError if it is something else."""
    try:
        data = read_description(path)
        folds = [
            {part: [str(case) for case in fold[part]] for part in ("train", "val")} for fold in data
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path}: not a list of {{train: [case, ...], val: [case, ...]}} "
            f"({type(error).__name__}: {error})"
        ) from error
    if not folds:
        raise InputError(f"{path}: holds no fold")
    return folds


def split(settings: SplitSettings, say: Callable[[str], None] = print) -> list[str]:
    """Gives a corpus its folds, or writes them for nnU-Net; the names of the splits.

    Raises:
        InputError: no such corpus or file, or the corpus has other folds already: runs may rest
            on them, so they are never replaced.
    """
    corpus = Corpus.open(settings.corpus)
    if settings.write is not None:
        folds = _folds_of(corpus)
        ids = {key: case for case, key in _key_of(corpus).items()}
        content = [
            {"train": sorted(ids[k] for k in f["train"]), "val": sorted(ids[k] for k in f["val"])}
            for f in folds
        ]
        write_bytes(settings.write, json.dumps(content, indent=2).encode() + b"\n")
        say(f"{settings.write}: {len(folds)} folds of {corpus.path}")
        return _fold_names(corpus)
    if settings.read is not None:
        found = read_folds(settings.read)
        splits = splits_of_folds(found, _key_of(corpus), corpus.keys, corpus.subjects)
    else:
        splits = _draw(corpus, settings)
    _refuse_other_folds(corpus, splits)
    for data in splits:
        write_split(data, corpus.path / "splits")
        sizes = ", ".join(f"{len(keys)} {part}" for part, keys in data["parts"].items() if keys)
        say(f"{corpus.path}: {data['name']}: {sizes}")
    return [str(data["name"]) for data in splits]


def _draw(corpus: Corpus, settings: SplitSettings) -> list[dict[str, Any]]:
    if not corpus.labelled:
        raise InputError(f"corpus={corpus.path}: holds no labels, so there is nothing to validate")
    labels = []
    for i in range(len(corpus)):
        meta = corpus.meta(i)
        voxel = float(np.prod(meta["spacing"]))
        labels.append({int(v): n * voxel for v, n in meta["class_counts"].items()})
    test = corpus.split("official")["parts"]["test"] if "official" in corpus.splits else []
    keep: dict[str, int] = {}
    if settings.keep is not None:
        other = Corpus.open(settings.keep)
        of = dict(zip(other.keys, other.subjects, strict=True))
        for number, fold in enumerate(_folds_of(other)):
            keep |= {of[key]: number for key in fold["val"]}
    return make_folds(
        corpus.keys, corpus.subjects, labels, settings.folds, settings.seed, keep=keep, test=test
    )


def _refuse_other_folds(corpus: Corpus, splits: Sequence[Mapping[str, Any]]) -> None:
    new = {str(data["name"]): data["hash"] for data in splits}
    other = [n for n in _fold_names(corpus) if corpus.split(n)["hash"] != new.get(n)]
    if other:
        raise InputError(
            f"corpus={corpus.path}: has folds already, and {', '.join(other)} would change; remove "
            f"{corpus.path / 'splits'}/fold-*.json if no result rests on them"
        )


def _fold_names(corpus: Corpus) -> list[str]:
    found = [name for name in corpus.splits if re.fullmatch(r"fold-[0-9]+", name)]
    return sorted(found, key=lambda name: int(name[5:]))


def _folds_of(corpus: Corpus) -> Folds:
    names = _fold_names(corpus)
    if not names:
        raise InputError(
            f"{corpus.path}: has no folds; `voxelith split corpus={corpus.path} folds=5` draws some"
        )
    parts = [corpus.split(name)["parts"] for name in names]
    return [{"train": list(p["train"]), "val": list(p["validation"])} for p in parts]


def _key_of(corpus: Corpus) -> dict[str, str]:
    """Key by case id: from the key map where there is one, else ids are the keys."""
    path = private_folder(corpus.path) / KEYMAP_FILE
    if not path.is_file():
        if corpus.info["options"]["keys"] == "names":
            return {key: key for key in corpus.keys}
        raise InputError(
            f"{path}: missing, and the keys of {corpus.path} are hashes; only the key map that "
            "prep wrote tells which case is which"
        )
    rows = read_csv(path)
    if rows and "case" not in rows[0]:
        raise InputError(
            f"{path}: has no column case; prepare the corpus again with overwrite=true"
        )
    return key_by_case([(row["case"], row["key"]) for row in rows])


def key_by_case(pairs: Sequence[tuple[str, str]]) -> dict[str, str]:
    """Key by the id that a data set gives a case.

    Raises:
        InputError: several cases have one id, so that folds by id would mean the last alone.
    """
    counts = Counter(case for case, _ in pairs)
    if shared := sorted(case for case, count in counts.items() if count > 1):
        why = "each is that of several cases, and folds go by ids; rename their files"
        raise InputError(
            Naming(f"case ids {some(shared)}: {why}", f"{len(shared)} case ids: {why}")
        )
    return dict(pairs)


def _total(volumes: Volumes) -> float:
    return sum(volumes.values())
