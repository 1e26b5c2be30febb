"""BIDS: sub-*/[ses-*/]anat/*_T1w.nii.gz, with label maps in derivatives/ or beside the images.

Gorgolewski et al. 2016, doi:10.1038/sdata.2016.44. A label map ends in `_dseg`, in `_msk`
(ISLES), or is a `_mask` with a `label-` entity (ATLAS). The subject is the group.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from data_prep.errors import InputError, Naming
from data_prep.layouts.case import (
    BETWEEN_CHANNELS,
    Case,
    Layout,
    is_image,
    known_sequence,
    leave_out,
    looks_like_a_label,
    modality_from_name,
    refused_label,
    stem,
    subject_from_name,
)
from data_prep.layouts.piles import is_series_file

Session = tuple[str, str]

_BIDS = re.compile(
    r"sub-(?P<subject>[A-Za-z0-9]+)/(?:(?P<session>ses-[A-Za-z0-9]+)/)?[a-z]+/"
    r"sub-(?P=subject)_(?(session)(?P=session)_)[^/]+"
)
_NOT_RAW = ("derivatives", "sourcedata", "code")


def from_bids(
    root: Path, files: list[Path], channels: Sequence[str] = (), forced: bool = False
) -> Layout | None:
    """The labelled sessions of a BIDS data set; of one without label maps every image.

    None if it is something else: without label maps a single image that has no BIDS name says so.

    Args:
        root: The data set.
        files: All that it holds.
        channels: Suffixes of the images that make up a case, in order. Without them there must
            be one suffix that every labelled session has, and T1w wins over others.
        forced: Whether it is BIDS for certain.

    Raises:
        InputError: it is not clear which images belong to the labels.
    """
    images: dict[Session, list[Path]] = defaultdict(list)
    labels: dict[Session, list[Path]] = defaultdict(list)
    for path in files:
        session = _session(path.relative_to(root).as_posix())
        if session is None or not is_image(path):
            continue
        if _is_label(path):
            labels[session].append(path)
        elif "derivatives" not in path.relative_to(root).parts and not looks_like_a_label(
            path.name
        ):
            images[session].append(path)
    if not labels and not channels:
        return _unlabelled(root, files, forced)
    if not images or not (labels or forced):
        return None
    wanted = list(channels) or [_common_suffix(root, images, labels)]
    sequence = BETWEEN_CHANNELS.join(channels or map(known_sequence, wanted))
    told = sequence.replace(BETWEEN_CHANNELS, ", ") or "images"
    layout = Layout(f"BIDS ({told} {'with' if labels else 'without'} label maps)")
    problems: list[str] = []
    used: set[Path] = set()
    for session, found in sorted(images.items()):
        case = _case(root, session, found, labels.get(session, []), wanted, sequence, problems)
        if case is not None:
            layout.cases.append(case)
            used |= set(case.files)
    if problems:
        raise InputError(problems)
    rest = [file for file in files if file not in used]
    leave_out(root, rest, layout, "not_listed", f"neither {' nor '.join(wanted)} nor its label map")
    layout.cases.sort(key=lambda case: case.name)
    return layout


def _unlabelled(root: Path, files: list[Path], forced: bool) -> Layout | None:
    """Every image of a subject as it is; its suffix is its sequence, if it is that of one.

    The session stays in the case's id, which is private: it often is a date.
    """
    raw = [path for path in files if path.relative_to(root).parts[0] not in _NOT_RAW]
    images = [path for path in raw if is_image(path)]
    named = [path for path in images if _BIDS.fullmatch(path.relative_to(root).as_posix())]
    if not named or (not forced and (named != images or any(map(is_series_file, raw)))):
        return None
    layout = Layout("BIDS without label maps")
    for path in named:
        name = path.relative_to(root).as_posix()
        if looks_like_a_label(path.name):
            layout.left_out.append(refused_label(name))
            continue
        suffix = _suffix(path)
        layout.cases.append(
            Case(
                name,
                (path,),
                subject=subject_from_name(name),
                modality=modality_from_name(suffix) or modality_from_name(name),
                sequence=known_sequence(suffix),
            )
        )
    taken = set(named)
    rest = [path for path in files if path not in taken]
    leave_out(root, rest, layout, "not_listed", "not the raw image of a subject")
    return layout


def _case(
    root: Path,
    session: Session,
    images: list[Path],
    labels: list[Path],
    wanted: list[str],
    sequence: str,
    problems: list[str],
) -> Case | None:
    chosen = []
    for suffix in wanted:
        having = [path for path in images if _suffix(path) == suffix]
        if len(having) > 1:
            names = ", ".join(path.relative_to(root).as_posix() for path in having[:4])
            several = f"{len(having)} images end in _{suffix}"
            way = "list the right ones in a CSV"
            problems.append(
                Naming(
                    f"{'/'.join(filter(None, session))}: {several} ({names}); {way}",
                    f"of a session {several}; {way}",
                )
            )
            return None
        chosen += having
    if len(labels) > 1:
        names = ", ".join(path.relative_to(root).as_posix() for path in labels[:4])
        way = "keep one, or list the right ones in a CSV"
        problems.append(
            Naming(
                f"{'/'.join(filter(None, session))}: {len(labels)} label maps ({names}); {way}",
                f"a session has {len(labels)} label maps; {way}",
            )
        )
        return None
    if len(chosen) < len(wanted):
        return None
    name = chosen[0].relative_to(root).as_posix()
    return Case(
        name,
        tuple(chosen),
        labels[0] if labels else None,
        id="_".join(filter(None, session)),
        subject=session[0].removeprefix("sub-"),
        modality=modality_from_name(" ".join(wanted)),
        sequence=sequence,
    )


def _common_suffix(
    root: Path, images: dict[Session, list[Path]], labels: dict[Session, list[Path]]
) -> str:
    """The suffix that an image of every labelled session has."""
    sets = [{_suffix(path) for path in images[session]} for session in labels if images[session]]
    common = set.intersection(*sets) if sets else set()
    if len(common) == 1:
        return common.pop()
    if "T1w" in common:
        return "T1w"
    everything = sorted(set().union(*sets))
    have = f"input={root}: the labelled sessions have images"
    way = "say which belong to the label maps, for example channels=[T1w] or channels=[dwi,adc]"
    raise InputError(
        Naming(
            f"{have} {', '.join(everything) or '(none)'}; {way}",
            f"{have} of {len(everything)} kinds; {way}",
        )
    )


def _session(name: str) -> Session | None:
    """(sub-X, ses-Y or nothing) of a path."""
    subject = re.search(r"(?:^|/)(sub-[A-Za-z0-9]+)", name)
    session = re.search(r"[/_](ses-[A-Za-z0-9]+)", name)
    return (subject[1], session[1] if session else "") if subject else None


def _suffix(path: Path) -> str:
    return stem(path).rpartition("_")[2]


def _is_label(path: Path) -> bool:
    suffix, name = _suffix(path), stem(path)
    return suffix in ("dseg", "msk") or (suffix == "mask" and "_label-" in name)
