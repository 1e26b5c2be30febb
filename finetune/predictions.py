"""Files of predictions for the cases of a corpus, whoever made and named them."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.corpus import Corpus
from data_prep.errors import InputError, some
from data_prep.images import Reject
from data_prep.layouts.case import is_image, stem
from data_prep.naming import slug
from data_prep.volume import NativeGrid, Volume, check_label_grid, read_label

Labels = NDArray[Any]
Name = tuple[str, ...]
"""Folders and stem of a file, in the alphabet of keys."""


@dataclass(frozen=True)
class Scan:
    """What keymap.csv knows of a case: the path that its scan had, and what its data set calls it.

    Of paths that begin at different folders the ends agree as far as both go: a prediction
    `case-7/ct.nii.gz` is that of `train/case-7/ct.nii.gz`, and `ct.nii.gz` that of either, which
    decides nothing where there are others.
    """

    input: str
    case: str

    @property
    def paths(self) -> list[Name]:
        """Its path; a second time without nnU-Net's number of the channel if it has one."""
        found = _name(PurePosixPath(self.input))
        last = found[-1].removesuffix("_0000")
        return [found, *([(*found[:-1], last)] if last != found[-1] else [])]

    @property
    def case_name(self) -> Name | None:
        """Its name in the data set where that is more than the name of its file."""
        name = (slug(self.case),)
        return name if self.case and all(name != path[-1:] for path in self.paths) else None


@dataclass
class KnownCases:
    """The cases that a name may mean."""

    whole: list[dict[Name, set[str]]] = field(default_factory=lambda: [{}, {}, {}])
    """By key, by the data set's name, by path: the first that has a name decides."""
    ends: dict[Name, set[str]] = field(default_factory=dict)
    """By the end of a path."""

    @classmethod
    def of(cls, corpus: Corpus, keymap: Path | None) -> KnownCases:
        """By the keys of a corpus and, where there is its keymap.csv, the names of its scans."""
        return _known(corpus.keys, {} if keymap is None else _read_keymap(keymap, corpus.keys))

    def named(self, text: str) -> set[str]:
        """The cases of a key, a name or a path."""
        return self.cases(_name(PurePosixPath(text)))

    def cases(self, name: Name) -> set[str]:
        """The cases of a file; the folders that it lies in may be more than their names have."""
        for start in range(len(name)):
            for known in [*self.whole, *([self.ends] if start == 0 else [])]:
                if name[start:] in known:
                    return known[name[start:]]
        return set()


def find_predictions(
    folder: Path, corpus: Corpus, keys: Sequence[str], keymap: Path | None
) -> dict[str, Path]:
    """The file of each case, on the case's grid, in the folder or in folders below it.

    A file is named KEY.nii.gz. With `keymap` it may also have the name of the case in its data set,
    the path that `voxelith predict` gives it, which is that of the scan, or, where no other case
    has it, the scan's name (nnU-Net's _0000 may be missing).

    Args:
        folder: of the files.
        corpus: labelled.
        keys: the cases wanted.
        keymap: keymap.csv that prep wrote beside the corpus, if files have the scans' names.

    Raises:
        InputError: files are missing, twice, of no certain case, or on another grid; all of them
            are named.
    """
    scans = {} if keymap is None else _read_keymap(keymap, keys)
    known = _known(corpus.keys, scans)
    certain: dict[str, list[Path]] = {}
    doubtful: dict[str, dict[Path, set[str]]] = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and is_image(path)):
        file = path.relative_to(folder)
        cases = known.cases(_name(file))
        for key in cases:
            if len(cases) == 1:
                certain.setdefault(key, []).append(file)
            else:
                doubtful.setdefault(key, {})[file] = cases
    files: dict[str, Path] = {}
    absent: list[str] = []
    problems: list[str] = []
    unclear: dict[Path, set[str]] = {}
    for key in keys:
        found = certain.get(key, [])
        if len(found) > 1:
            problems.append(
                f"predictions={folder}: {' and '.join(map(str, found))} are both case {key}; "
                "leave one of them there"
            )
        elif found:
            files[key] = folder / found[0]
        elif key in doubtful:
            unclear |= doubtful[key]
        else:
            absent.append(key)
    problems += [_unclear(folder / file, cases, scans) for file, cases in unclear.items()]
    if absent:
        problems.append(_missing(folder, keys, absent, keymap))
    if not problems:
        problems = [said for key, file in files.items() if (said := _off_grid(file, corpus, key))]
    if problems:
        raise InputError(problems)
    return files


def _name(path: PurePosixPath | Path) -> Name:
    folders = (part for part in path.parts[:-1] if part != path.anchor)
    return (*map(slug, folders), slug(stem(Path(path.name))))


def _known(keys: Iterable[str], scans: dict[str, Scan]) -> KnownCases:
    known = KnownCases()
    by_key, by_case, by_path = known.whole
    by_key |= {(key,): {key} for key in keys}
    for key, scan in scans.items():
        if scan.case_name is not None:
            by_case.setdefault(scan.case_name, set()).add(key)
        for path in scan.paths:
            by_path.setdefault(path, set()).add(key)
            for start in range(1, len(path)):
                known.ends.setdefault(path[start:], set()).add(key)
    return known


def _unclear(file: Path, cases: set[str], scans: dict[str, Scan]) -> str:
    inputs = sorted(scans[key].input for key in cases)
    more = f" and {len(inputs) - 2} more" if len(inputs) > 2 else ""
    return (
        f"{file}: may be the case of {inputs[0]} or of {inputs[1]}{more}; put it in folders like "
        "those of its scan, or name it KEY.nii.gz"
    )


def _missing(folder: Path, keys: Sequence[str], absent: Sequence[str], keymap: Path | None) -> str:
    hint = (
        "; where files have the scans' own names, keymap=FILE takes the keymap.csv that prep wrote "
        "beside the corpus"
    )
    return (
        f"predictions={folder}: {len(absent)} of {len(keys)} cases are missing ({some(absent)}); "
        "expected KEY.nii.gz for each, a case without a finding too (all zeros)"
        f"{'' if keymap else hint}"
    )


def _off_grid(file: Path, corpus: Corpus, key: str) -> str:
    """What is wrong with a prediction's grid, from its header; empty if nothing is."""
    i = corpus.position(key)
    shape = tuple(int(n) for n in corpus.shapes[i, 1:])
    try:
        meta = corpus.meta(i)
        native = NativeGrid.from_dict(meta["native"])
        check_label_grid(file, shape, np.array(meta["affine"]), native)
    except Reject as reject:
        hint = (
            "; save predictions on the grid of the scan that was given, not on the network's"
            if reject.code == "label_geometry_mismatch"
            else ""
        )
        return f"{file}: {reject}{hint}"
    return ""


def _read_keymap(path: Path, keys: Iterable[str]) -> dict[str, Scan]:
    """The scan of each case of the corpus, by key."""
    try:
        with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
            rows = list(csv.DictReader(file))
    except (OSError, ValueError) as error:
        raise InputError(f"keymap={path}: cannot be read ({error})") from error
    if not rows or not {"key", "input"} <= rows[0].keys():
        raise InputError(
            f"keymap={path}: has no columns key and input; give the keymap.csv that prep wrote"
        )
    scans = {row["key"]: Scan(row["input"], row.get("case") or "") for row in rows}
    unknown = [key for key in keys if key not in scans]
    if unknown:
        raise InputError(
            f"keymap={path}: does not have {len(unknown)} cases, {unknown[0]} among them; it is "
            "that of another corpus"
        )
    return scans


def read_prediction(file: Path, volume: Volume) -> Labels:
    """The label values [D, H, W] of a file, on the grid that its case is stored on.

    Raises:
        InputError: it is damaged, or holds no labels of this case.
    """
    try:
        return read_label(file, volume)
    except Reject as reject:
        raise InputError(f"{file}: {reject}") from reject
