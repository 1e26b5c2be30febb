"""Is the request sound, and was it answered already?

Nothing is written before this says so, but what is wrong with each file of an input without a scan.
"""

from __future__ import annotations

import glob
import hashlib
import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from importlib import metadata
from itertools import chain, starmap
from pathlib import Path
from typing import Any

import blosc2
import nibabel as nib
import numpy as np
import pyarrow as pa
import yaml  # type: ignore[import-untyped]

from data_prep.corpus import CORPUS_FILE, Corpus
from data_prep.deface import deface_files, deface_function
from data_prep.dicom import REVISION
from data_prep.errors import InputError, Naming, attempt, near, some, without_names
from data_prep.exclusions import exclusion_digest, read_exclusions
from data_prep.files import write_csv
from data_prep.folds import key_by_case, splits_of_folds, splits_of_numbers
from data_prep.images import DETACHED, of_the_system
from data_prep.layouts.case import Layout, LeftOut, case_id
from data_prep.layouts.find import cannot_be_read, find_cases
from data_prep.naming import (
    QUARANTINE_HEADER,
    REFUSED_FILE,
    REQUEST_FILE,
    private_folder,
    read_salt,
    read_withdrawn,
)
from data_prep.settings import NEVER_RESAMPLED, PrepResult, PrepSettings
from data_prep.shards import canonical_json
from data_prep.splits import split_from

TASKS = Path(__file__).parents[1] / "conf" / "task"
"""The tasks that finetuning knows; their files are read here, the package is not imported."""

BITS = 16
"""Structures that bit planes of uint16 can tell apart."""


def check_request(settings: PrepSettings) -> tuple[Layout, bool, str]:
    """The layout, whether it is labelled, and a digest of the request; InputError with all."""
    problems: list[str] = []
    source, output = settings.input.resolve(), settings.output.resolve()
    if output == source or source in output.parents:
        problems.append(f"output={settings.output}: lies inside the input; choose another place")
    elif output in source.parents:
        problems.append(f"output={settings.output}: contains the input; choose another place")
    if output.exists() and not output.is_dir():
        problems.append(f"output={settings.output}: is a file; name a new directory")
    if settings.name is None and not output.name:
        problems.append(f"output={settings.output}: is not a directory one can create")
    noted = not problems  # with a place for it
    layout = attempt(
        problems,
        find_cases,
        settings.input,
        settings.channels,
        settings.subject_pattern,
        settings.volumes,
        settings.layout,
    )
    if layout is not None and not layout.cases:
        problems.append(nothing_left(settings, layout, layout.left_out))
    for check in (
        lambda: read_exclusions(settings.excluded),
        lambda: read_salt(settings.salt),
        lambda: named_classes(settings),
        lambda: settings.deface and deface_function(settings.deface),
    ):
        attempt(problems, check)
    labelled = False
    if layout is not None:
        has = any(case.label_files for case in layout.cases)
        labelled = has if settings.labels is None else settings.labels
        if labelled and not has:
            problems.append(
                f"labels=true, but the input has none ({layout.description}); put them in labels/ "
                "beside images/, or name them in the label column of a CSV"
            )
        if labelled and settings.resamples:
            problems.append(f"{settings.resamples}: {NEVER_RESAMPLED}")
        problems += _split_problems(layout, labelled)
        if labelled:
            attempt(problems, class_table, settings, layout)
    request = None if problems or layout is None else attempt(problems, _request, settings, layout)
    if layout is None or request is None:
        raise InputError(_told(settings, list(dict.fromkeys(problems)), noted))
    return layout, labelled, request


def _told(settings: PrepSettings, problems: list[str], noted: bool) -> list[str]:
    """Problems without names where these are replaced; if `noted`, they are in full in a file."""
    full = [problem for problem in problems if isinstance(problem, Naming)]
    if settings.keys == "names" or not full:
        return problems
    where = ""
    if noted:
        rows = [["", "wrong_input", problem] for problem in full]
        where = f" (in full: {note_refused(settings, rows)})"
    told = [without_names(p) + (where if p in full else "") for p in problems]
    return list(dict.fromkeys(told))


def note_refused(settings: PrepSettings, rows: list[list[str]]) -> Path:
    """Writes down for its owner what is wrong with an input."""
    private = private_folder(settings.output)
    private.mkdir(mode=0o700, parents=True, exist_ok=True)
    file = private / REFUSED_FILE
    if settings.part:  # of tasks side by side each has its own
        file = file.with_stem(f"{file.stem}-{settings.part.partition('/')[0]}")
    write_csv(file, QUARANTINE_HEADER[:3], rows)
    return file


def _split_problems(layout: Layout, labelled: bool) -> list[str]:
    """Subjects that a given split tears, and names in it that no case has."""
    names = [case_id(case) for case in layout.cases]
    subjects = [case.subject or case.name for case in layout.cases]
    problems: list[str] = []
    parts, numbers = [c.split for c in layout.cases], [c.fold for c in layout.cases]
    if any(parts):
        attempt(problems, split_from, "official", names, subjects, parts)
    if labelled and layout.folds is not None:
        labelled_ones = [case_id(case) for case in layout.cases if case.label_files]
        key_of = attempt(problems, key_by_case, [(name, name) for name in labelled_ones])
        if key_of is not None:
            attempt(problems, splits_of_folds, layout.folds, key_of, names, subjects)
    if labelled and any(number is not None for number in numbers):
        attempt(problems, splits_of_numbers, numbers, names, subjects)
    return problems


def _request(settings: PrepSettings, layout: Layout) -> str:
    """Digest of options and input: is a finished corpus, or a half-done one, this one?

    Of the input all that a sample is made of: files (what each is taken for, name, size, time), and
    what the layout says of cases and of label values.
    """
    how = {"overwrite", "processes", "output", "step", "part"}
    options = settings.model_dump(mode="json", exclude=how)
    files: list[Any] = []
    for case in layout.cases:
        for role, name, path in chain.from_iterable(starmap(_with_voxels, case.roles)):
            try:
                state = path.stat()
            except (OSError, ValueError) as error:  # what is not there, scanning finds and says
                if system := of_the_system(error):
                    raise cannot_be_read(system, settings.input) from error
            else:
                files.append([role, name, str(path), state.st_size, state.st_mtime_ns])
        told = [case.id, case.subject, case.modality, case.sequence, case.frame, case.source]
        files.append([*told, case.licence, case.split, case.fold, case.group])
    files.append([layout.classes, layout.regions, layout.folds])
    if any(case.series for case in layout.cases):
        files.append([f"DICOM {REVISION}"])
    classes = _class_file(settings.classes) if isinstance(settings.classes, Path) else None
    files.append([exclusion_digest(path) for path in settings.excluded])
    code = deface_files(settings.deface) if settings.deface else []
    for option in (classes, settings.salt, *code):
        if option is not None:
            files.append([hashlib.sha256(option.read_bytes()).hexdigest()])
    digest = hashlib.sha256(canonical_json([options, files, versions()]))
    return digest.hexdigest()


def _with_voxels(role: str, name: str, path: Path) -> list[tuple[str, str, Path]]:
    """A file, and those beside a header of its name that may have its voxels."""
    found = [(role, name, path)]
    if path.name.lower().endswith(DETACHED):
        beside = sorted(path.parent.glob(f"{glob.escape(path.stem)}.*"))
        found += [(f"{role}, beside", name, one) for one in beside if one != path]
    return found


def existing_result(settings: PrepSettings, request: str) -> PrepResult | None:
    """The finished corpus at `output` if it answers this request; InputError if it does not."""
    output = settings.output
    if not output.exists() or not any(output.iterdir()):
        return None
    if not (output / CORPUS_FILE).is_file():
        raise InputError(
            f"output={output}: holds files and no corpus; it is left alone, choose another place"
        )
    if settings.overwrite:
        return None
    private = private_folder(output)
    try:
        known = json.loads((private / REQUEST_FILE).read_text())
        corpus = Corpus.open(output)
    except (OSError, ValueError, InputError):
        known, corpus = {}, None
    if corpus is None or known != {"request": request, "index": corpus.index_hash}:
        raise InputError(
            f"output={output}: holds another corpus, or one that other words, another state of "
            "the input or other versions have made; choose another place, or replace it with "
            "overwrite=true"
        )
    back = read_withdrawn(private).intersection(corpus.keys)
    if back:
        raise InputError(
            f"output={output}: has {len(back)} samples that were withdrawn; withdraw them again "
            "with remove=, or replace it with overwrite=true: they stay out"
        )
    return PrepResult.of(corpus.info, output, private, splits=corpus.splits, already_there=True)


def named_classes(settings: PrepSettings) -> dict[int, str] | None:
    """Label values and names that the user gave."""
    given = settings.classes
    if given is None or isinstance(given, dict):
        return given
    try:
        data = yaml.safe_load(_class_file(given).read_text(encoding="utf-8"))
        if isinstance(data, dict) and isinstance(data.get("classes"), list):
            data = _names_of_task(data)
        named = {int(value): str(name) for value, name in dict(data).items()}
    except (OSError, UnicodeError, yaml.YAMLError, ValueError, TypeError, KeyError) as error:
        hint = "" if given.is_file() else f"; {near(given.name, (f.stem for f in TASKS.iterdir()))}"
        raise InputError(
            f"classes={given}: a YAML or JSON file with `value: name` lines, or the name of a task "
            f"such as abdomen, is needed ({error}){hint}"
        ) from error
    if any(not 0 <= value <= 65535 for value in named):
        raise InputError(f"classes={given}: label values lie between 0 and 65535")
    return named


def _class_file(given: Path) -> Path:
    """The file that `classes` means: itself, or that of a task by its name."""
    task = TASKS / f"{given}.yaml"
    return task if len(given.parts) == 1 and not given.is_file() and task.is_file() else given


def _names_of_task(task: dict[str, Any]) -> dict[int, str]:
    """Label values of a file of conf/task; of a class with several, each gets a name of its own."""
    named = {0: "background"}
    for row in task["classes"]:
        name, values = str(row["name"]), [int(value) for value in row["values"]]
        named |= {v: name if len(values) == 1 else f"{name} {v}" for v in values}
    if task.get("ignore") is not None:
        named[int(task["ignore"])] = "ignore"
    return named


def class_table(settings: PrepSettings, layout: Layout) -> list[dict[str, Any]] | None:
    """Rows of value, name, regions, ignore; None if the labels themselves must tell.

    Raises InputError if the names are no names: empty, twice the same, or not those of the masks.
    """
    named = named_classes(settings) or layout.classes
    if named is None:
        return None
    where = "classes" if settings.classes else f"the classes of {settings.input}"
    problems = []
    for value, name in named.items():
        if not 1 <= len(name.strip()) <= 64:
            problems.append(f"{where}: value {value} is called {name!r}; 1 to 64 letters needed")
    twice = sorted({n for n in named.values() if list(named.values()).count(n) > 1})
    if twice:
        problems.append(f"{where}: {', '.join(twice)} has several values; each needs its own name")
    masks = {name for case in layout.cases for name, _ in case.organs}
    strange = sorted(masks - set(named.values()))
    if strange:
        problems.append(
            f"{where}: no value is called {some(strange)}, as the masks are; name all of "
            "the structures that have masks"
        )
    bits = max(named, default=0)
    if masks and settings.overlap == "bits" and bits > BITS:
        problems.append(
            f"overlap=bits: value {bits} is called {named[bits]}, and a label has {BITS} bits; "
            "choose fewer structures with classes={1: liver, ...}, or overlap=last"
        )
    if problems:
        raise InputError(problems)
    if masks and settings.overlap == "bits":
        named = {1 << (value - 1): name for value, name in named.items() if value}
    return class_rows({0: "background", **named}, layout.regions)


def class_rows(
    named: dict[int, str], regions: Mapping[str, Sequence[int]] | None = None
) -> list[dict[str, Any]]:
    """The class table of corpus.json; a class named `ignore` is not scored and not learnt."""
    return [
        {
            "value": value,
            "name": name,
            "regions": sorted(r for r, members in (regions or {}).items() if value in members),
            "ignore": name == "ignore",
        }
        for value, name in sorted(named.items())
    ]


def combined_rows(rows: list[dict[str, Any]], codes: Collection[int]) -> list[dict[str, Any]]:
    """The table of bit planes with a row for each combination of structures that occurs.

    So every code is a value like any other to those who read it: a task lists the values of all
    combinations that hold its structure.
    """
    names = {int(row["value"]): str(row["name"]) for row in rows}
    more = []
    for code in sorted(set(codes) - names.keys()):
        parts = [name for value, name in names.items() if value and code & value]
        more.append({"value": code, "name": " + ".join(parts), "regions": parts, "ignore": False})
    return [*rows, *more]


def nothing_left(settings: PrepSettings, layout: Layout, left_out: Sequence[LeftOut]) -> str:
    """The message for an input that gives no sample at all; why not is noted, file by file."""
    said = (
        f"input={settings.input}: no usable scan ({layout.description}); 3D CT or MR in NIfTI, "
        "NRRD, MetaImage or DICOM is needed."
    )
    if not left_out:
        return said
    if settings.keys == "names":
        shown = [f"{row.name}: {row.code}, {row.detail}" for row in left_out[:5]]
        shown += [f"{len(left_out) - 5} more"] if len(left_out) > 5 else []
    else:  # where names are replaced they stay out of logs as well
        counts = Counter(row.code for row in left_out)
        shown = [f"{count} {code}" for code, count in sorted(counts.items())]
    noted = note_refused(settings, sorted([r.name, r.code, r.detail] for r in left_out))
    return f"{said} Left out: {'; '.join(shown)}. All of them: {noted}"


def versions() -> dict[str, str]:
    """Versions of what shapes the bytes."""
    try:
        own = metadata.version("voxelith")
    except metadata.PackageNotFoundError:
        own = "source"
    return {
        "blosc2": str(blosc2.__version__),
        "nibabel": str(nib.__version__),
        "numpy": str(np.__version__),
        "pyarrow": str(pa.__version__),
        "voxelith": own,
    }
