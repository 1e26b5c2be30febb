"""Files of predictions for the cases of a corpus, whoever made and named them."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from data_prep.corpus import Corpus
from data_prep.errors import InputError
from data_prep.layouts.case import is_image, stem
from data_prep.naming import slug
from data_prep.volume import Reject, check_label_grid


def find_predictions(
    folder: Path, corpus: Corpus, keys: Sequence[str], keymap: Path | None
) -> dict[str, Path]:
    """The file of each case, on the case's grid.

    A file is named KEY.nii.gz, or as the scan was (nnU-Net's _0000 may be missing), if the keys of
    the corpus are made of names or `keymap` tells them.

    Args:
        folder: of the files.
        corpus: labelled.
        keys: the cases wanted.
        keymap: keymap.csv that prep wrote beside the corpus, if files have the scans' names.

    Raises:
        InputError: files are missing, twice or on another grid; all of them are named.
    """
    names = {} if keymap is None else _read_keymap(keymap, keys)
    there: dict[str, list[Path]] = {}
    for path in sorted(path for path in folder.iterdir() if path.is_file() and is_image(path)):
        there.setdefault(slug(stem(path)), []).append(path)
    files: dict[str, Path] = {}
    absent, problems = [], []
    for key in keys:
        wanted = [key, *names.get(key, ())]
        found = next((there[name] for name in wanted if name in there), [])
        if len(found) > 1:
            problems.append(
                f"predictions={folder}: {' and '.join(path.name for path in found)} are both case "
                f"{key}; leave one of them there"
            )
        elif found:
            files[key] = found[0]
        else:
            absent.append(key)
    if absent:
        problems.append(_missing(folder, corpus, keys, absent, keymap))
    if not problems:
        problems = [said for key, file in files.items() if (said := _off_grid(file, corpus, key))]
    if problems:
        raise InputError(problems)
    return files


def _missing(
    folder: Path, corpus: Corpus, keys: Sequence[str], absent: Sequence[str], keymap: Path | None
) -> str:
    shown = ", ".join(absent[:5]) + (", ..." if len(absent) > 5 else "")
    hint = ""
    if corpus.info["options"].get("keys") == "hmac" and keymap is None:
        hint = (
            "; the keys of this corpus are hashes: where files have the scans' own names, "
            "keymap=FILE takes the keymap.csv that prep wrote beside the corpus"
        )
    return (
        f"predictions={folder}: {len(absent)} of {len(keys)} cases are missing ({shown}); expected "
        f"KEY.nii.gz for each, a case without a finding too (all zeros){hint}"
    )


def _off_grid(file: Path, corpus: Corpus, key: str) -> str:
    """What is wrong with a prediction's grid, from its header; empty if nothing is."""
    i = corpus.position(key)
    shape = tuple(int(n) for n in corpus.shapes[i, 1:])
    try:
        check_label_grid(file, shape, np.array(corpus.meta(i)["affine"]))
    except Reject as reject:
        hint = (
            "; save predictions on the grid of the scan that was given, not on the network's"
            if reject.code == "label_geometry_mismatch"
            else ""
        )
        return f"{file}: {reject}{hint}"
    return ""


def _read_keymap(path: Path, keys: Iterable[str]) -> dict[str, list[str]]:
    """For each key the names that a prediction of it may have."""
    try:
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, ValueError) as error:
        raise InputError(f"keymap={path}: cannot be read ({error})") from error
    if not rows or not {"key", "input"} <= rows[0].keys():
        raise InputError(
            f"keymap={path}: has no columns key and input; give the keymap.csv that prep wrote"
        )
    names = {row["key"]: stem(Path(row["input"])) for row in rows}
    unknown = [key for key in keys if key not in names]
    if unknown:
        raise InputError(
            f"keymap={path}: does not have {len(unknown)} cases, {unknown[0]} among them; it is "
            "that of another corpus"
        )
    return {key: [slug(name), slug(name.removesuffix("_0000"))] for key, name in names.items()}
