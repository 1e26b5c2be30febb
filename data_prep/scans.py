"""Scans that a network is to see: the files of a folder, put together by case.

Several channels are files NAME_0000.nii.gz, NAME_0001.nii.gz, ... on one grid, as nnU-Net names
them; their case is NAME.nii.gz.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from data_prep.errors import InputError
from data_prep.images import Reject
from data_prep.layouts.case import files_below, is_image
from data_prep.volume import Volume, read_known

CHANNEL = re.compile(r"(?P<case>.+)_(?P<number>\d{4})(?P<end>\.nii(\.gz)?)", re.IGNORECASE)


def scan_files(source: Path) -> list[Path]:
    """The image files below a folder, relative to it, in order; DICOM series are none."""
    if not source.is_dir():
        return []
    return sorted(path.relative_to(source) for path in files_below(source) if is_image(path))


def by_case(names: Sequence[Path], channels: int) -> tuple[dict[Path, list[Path]], dict[str, str]]:
    """The files of each case in the order of their channels; what makes no case, and why."""
    if channels == 1:
        return {name: [name] for name in names}, {}
    numbered: dict[Path, dict[int, Path]] = {}
    left_out = {}
    for name in names:
        match = CHANNEL.fullmatch(name.name)
        if match is None:
            left_out[str(name)] = (
                f"channels: the network takes {channels} channels a case, in files named "
                "NAME_0000.nii.gz, NAME_0001.nii.gz, ..."
            )
        else:
            case = name.with_name(match["case"] + match["end"])
            numbered.setdefault(case, {})[int(match["number"])] = name
    cases = {}
    for case, files in numbered.items():
        if sorted(files) == list(range(channels)):
            cases[case] = [files[number] for number in range(channels)]
        else:
            left_out[str(case)] = (
                f"channels: it has {', '.join(f'{n:04d}' for n in sorted(files))}, the network "
                f"takes 0000 to {channels - 1:04d}"
            )
    return cases, left_out


def refuse_shared(source: Path, results: Mapping[Path, Path]) -> None:
    """Cases whose results would have one name, of which the last alone would be kept.

    Args:
        source: the folder of the cases.
        results: the file that becomes of each case.

    Raises:
        InputError: names all that share a result.
    """
    cases: dict[Path, list[str]] = defaultdict(list)
    for case, result in results.items():
        cases[result].append(str(case))
    problems = [
        f"input={source}: {', '.join(sharing)} would all become {result}; rename all but one of "
        "them, or leave one form of each scan in the folder"
        for result, sharing in cases.items()
        if len(sharing) > 1
    ]
    if problems:
        raise InputError(problems)


def unknown_modality(modality: str | None, known: Sequence[str]) -> list[str]:
    """What is wrong with the modality that a user says scans are of."""
    if modality is None or modality in known:
        return []
    return [f"modality={modality}: this network was trained on {' and '.join(known)}"]


def read_scan(files: Sequence[Path], known: Sequence[str], modality: str | None = None) -> Volume:
    """The volume of a case under a modality that the network knows; see `read_known`.

    Raises:
        Reject: it cannot be read, or is of another modality.
    """
    try:
        return read_known(files, known, modality)
    except Reject:
        raise
    except Exception as error:
        # A header that no reader foresaw must not stop a folder.
        raise Reject("unreadable", f"{type(error).__name__}: {error}") from error
