"""Which layout the input has. Each one is a file beside this; the first that fits is taken."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from data_prep.errors import InputError, Naming, some
from data_prep.folds import FOLDS_FILE, read_folds
from data_prep.images import of_the_system, open_image
from data_prep.layouts.bids import from_bids
from data_prep.layouts.case import BETWEEN_CHANNELS, Case, Layout, LeftOut, case_id, files_below
from data_prep.layouts.decathlon import from_decathlon
from data_prep.layouts.folders import from_folders
from data_prep.layouts.lists import from_csv
from data_prep.layouts.nnssl import from_nnssl
from data_prep.layouts.nnunet import from_nnunet
from data_prep.layouts.piles import from_pairs, from_pile

# No file system has longer names, or paths.
NAME_BYTES = 255
PATH_BYTES = 4000

READERS: dict[str, Callable[[Path, list[Path]], Layout | None]] = {
    "nnssl": from_nnssl,
    "nnunet": from_nnunet,
    "decathlon": from_decathlon,
    "folders": from_folders,
    "pairs": from_pairs,
}


def find_cases(
    source: Path,
    channels: Sequence[str] = (),
    subjects: re.Pattern[str] | None = None,
    volumes: str = "refuse",
    forced: str = "auto",
) -> Layout:
    """Recognise the layout of an input folder or list and name its cases, sorted.

    Args:
        source: A folder, or a CSV list.
        channels: Names of the channels, in order, where the layout does not state them: BIDS
            suffixes, or what the volumes of 4D files are.
        subjects: Finds the subject in a case's id where the layout names none: its first group,
            or all that it matches.
        volumes: What a 4D file is whose channels have no names, as `PrepSettings` has it.
        forced: The layout that it must be, as `PrepSettings` has it.

    Raises:
        InputError: the input is missing, empty, or a list or description with mistakes (all at
            once), or a file cannot be read now.
    """
    try:
        return _found(source, channels, subjects, volumes, forced)
    except OSError as error:
        raise cannot_be_read(error, source) from error


def cannot_be_read(error: OSError, source: Path) -> InputError:
    """What is said of a file of an input that the system does not let be read."""
    way = f"cannot be read ({error.strerror}); start again when it can be, or take it away"
    return InputError(Naming(f"{error.filename or source}: {way}", f"a file of {source}: {way}"))


def _found(
    source: Path,
    channels: Sequence[str],
    subjects: re.Pattern[str] | None,
    volumes: str,
    forced: str,
) -> Layout:
    layout = _recognise(source, channels, forced)
    _leave_impossible(layout)
    layout.cases = list(dict.fromkeys(layout.cases))
    _refuse_twice(source, layout.cases)
    if subjects is not None:
        without = [case for case in layout.cases if not case.subject]
        layout.cases = [replace(c, subject=_subject(c, subjects)) for c in layout.cases]
        left = [case for case in layout.cases if not case.subject]
        if without and len(left) == len(without):
            none = f"subjects={subjects.pattern}: is found in none of {len(without)} cases"
            alone = "each would be a person of its own"
            raise InputError(
                Naming(f"{none}, such as {case_id(left[0])}; {alone}", f"{none}; {alone}")
            )
        if without and left:
            layout.description += f"; subjects= is found in none of {len(left)} of its cases"
    if channels:
        joined = BETWEEN_CHANNELS.join(channels)
        layout.cases = [c if c.sequence else replace(c, sequence=joined) for c in layout.cases]
    if volumes != "refuse":
        layout.cases = [part for case in layout.cases for part in _parts(case, volumes)]
    return layout


def _refuse_twice(source: Path, cases: Sequence[Case]) -> None:
    """Lists may state a case twice; not as two different ones."""
    twice = sorted(name for name, n in Counter(case.name for case in cases).items() if n > 1)
    if twice:
        how = "listed twice, with other labels, subjects or parts of the split; keep one of each"
        said = f"input={source}: {{}} {'is' if len(twice) == 1 else 'are'} {how}"
        raise InputError(Naming(said.format(some(twice)), said.format(f"{len(twice)} images")))


def _leave_impossible(layout: Layout) -> None:
    """Cases with names that lists state and no file can have: to ask for one is an error."""
    wrong = [case for case in layout.cases if not all(map(_can_be, case.stated_files))]
    layout.left_out += [
        LeftOut(case.name, "missing_file", "a name of its files is longer than any can be")
        for case in wrong
    ]
    layout.cases = [case for case in layout.cases if case not in wrong]


def _can_be(path: Path) -> bool:
    parts = [len(os.fsencode(part)) for part in path.parts]
    return max(parts, default=0) <= NAME_BYTES and sum(parts) + len(parts) <= PATH_BYTES


def _parts(case: Case, volumes: str) -> list[Case]:
    """A case whose file has several volumes as one of as many channels, or as many cases."""
    if case.series or len(case.channels) > 1 or len(case.images) > 1:
        return [case]
    try:
        count = open_image(case.images[0]).shape[3]
    except Exception as error:  # whatever is wrong with it, scanning finds and says
        if system := of_the_system(error):
            raise system from None
        return [case]
    if count < 2:
        return [case]
    if volumes == "channels":
        names = [f"{case.sequence} {n}".strip() for n in range(count)]
        return [replace(case, sequence=BETWEEN_CHANNELS.join(names))]
    subject, name = case.subject or case.name, case_id(case)
    return [
        replace(
            case,
            name=f"{case.name} (volume {n + 1})",
            id=f"{name}-{n + 1}",
            subject=subject,
            frame=n,
        )
        for n in range(count)
    ]


def _recognise(source: Path, channels: Sequence[str], forced: str) -> Layout:
    if not source.exists():
        raise InputError(f"input={source}: no such file or folder")
    if source.is_file():
        if source.suffix.lower() == ".csv":
            return from_csv(source)
        raise InputError(
            f"input={source}: a folder of scans or a .csv list is needed; for one scan, give the "
            "folder that holds it"
        )
    files = files_below(source)
    if not files:
        raise InputError(f"input={source}: the folder is empty")
    readers = READERS | {
        "bids": lambda root, files: from_bids(root, files, channels, forced == "bids"),
        "pile": from_pile,
    }
    wanted = list(readers) if forced == "auto" else [forced]
    layouts = (readers[name](source, files) for name in wanted)
    layout = next((found for found in layouts if found is not None), None)
    if layout is None:
        raise InputError(
            f"layout={forced}: {source} is not laid out like that; auto looks what fits"
        )
    layout.files = frozenset(path.relative_to(source).as_posix() for path in files)
    if (source / FOLDS_FILE).is_file():
        layout.folds = read_folds(source / FOLDS_FILE)
    return layout


def _subject(case: Case, pattern: re.Pattern[str]) -> str:
    found = None if case.subject else pattern.search(case_id(case))
    if found is None:
        return case.subject
    return found.group(1) if pattern.groups and found.group(1) else found.group(0)
