"""What is learnt of whole scans: a column of a CSV that has a row for each case. No torch here.

Rows are found by `key`: the key of the corpus, or, where the key map that prep wrote lies beside
the corpus, what the data set calls the case or the path of its scan.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_prep.corpus import Corpus
from data_prep.errors import InputError, near, some
from data_prep.naming import KEYMAP_FILE, private_folder
from finetune.predictions import KnownCases
from finetune.scan_task import ScanTask

KEY = "key"


@dataclass(frozen=True)
class Targets:
    """The target of each case by key: a class's number, counted from 0, or a value in its unit."""

    task: ScanTask
    values: Mapping[str, float]

    def of(self, keys: Iterable[str]) -> dict[str, float]:
        """Those of some cases."""
        return {key: self.values[key] for key in keys}

    def recipe(self) -> dict[str, str | float]:
        """What they come to, whatever file they came from: part of what all arms share."""
        if self.task.kind == "regression":
            return dict(sorted(self.values.items()))
        return {key: self.task.classes[int(n)] for key, n in sorted(self.values.items())}


def read_targets(path: Path, task: ScanTask, corpus: Corpus, keys: Sequence[str]) -> Targets:
    """Reads the targets of some cases of a corpus.

    Args:
        path: of the CSV.
        task: whose column.
        corpus: that the rows are about; its private folder may have the scans' names.
        keys: of the cases that need one.

    Raises:
        InputError: it cannot be read, lacks a column or a case, names what is no case, or holds
            what is no class or no finite number; all of it is told.
    """
    where = f"targets={path}"
    rows = _rows(path, task, where)
    keymap = private_folder(corpus.path) / KEYMAP_FILE
    known = KnownCases.of(corpus, keymap if keymap.is_file() else None)
    cells: dict[str, list[str]] = {}
    strange: list[str] = []
    doubtful: list[str] = []
    for name, cell in rows:
        found = known.named(name) if name else set()
        if len(found) == 1:
            cells.setdefault(next(iter(found)), []).append(cell)
        else:
            (doubtful if found else strange).append(name or "(empty)")
    problems = []
    if strange:
        hint = (
            ""
            if keymap.is_file()
            else f"; names of scans are known where {keymap.name} lies in "
            f"{keymap.parent.name} beside the corpus"
        )
        problems.append(
            f"{where}: {len(strange)} rows are of no case of {corpus.path} ({some(strange)}); "
            f"{KEY} holds keys of the corpus, or names of its scans; mend or remove them{hint}"
        )
    if doubtful:
        problems.append(
            f"{where}: {len(doubtful)} rows may be of several cases ({some(doubtful)}); give "
            "their keys, or their scans' paths"
        )
    if absent := [key for key in keys if key not in cells]:
        problems.append(
            f"{where}: {len(absent)} of {len(keys)} cases of the split have no row "
            f"({some(absent)}); add them, or leave these cases out of the split"
        )
    if twice := [key for key, found in cells.items() if len(found) > 1]:
        problems.append(
            f"{where}: {len(twice)} cases have more than one row ({some(twice)}); leave one"
        )
    values, wrong = {}, []
    for key in keys:
        for cell in cells.get(key, [])[:1]:
            value = _value(cell, task)
            if value is None:
                wrong.append(f"{key}: {cell or 'empty'}")
            else:
                values[key] = value
    if wrong:
        wanted = (
            "a finite number"
            if task.kind == "regression"
            else f"one of the classes of task {task.name}, {', '.join(task.classes)}"
        )
        problems.append(
            f"{where}: {task.target} of {len(wrong)} cases is not {wanted} ({some(wrong)}); mend "
            "them, or leave these cases out of the split"
        )
    if problems:
        raise InputError(problems)
    return Targets(task, values)


def _rows(path: Path, task: ScanTask, where: str) -> list[tuple[str, str]]:
    """Name and cell of each row."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            names = list(reader.fieldnames or [])
            missing = [name for name in (KEY, task.target) if name not in names]
            if missing:
                raise InputError(
                    f"{where}: has no column {' and '.join(missing)}; "
                    f"{near(missing[-1], names, f'it has {some(names)}')}"
                )
            return [((r[KEY] or "").strip(), (r[task.target] or "").strip()) for r in reader]
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(f"{where}: cannot be read ({error}); expected a CSV in UTF-8") from error


def _value(cell: str, task: ScanTask) -> float | None:
    """A cell as a number; None if it is none that the task knows."""
    if task.kind == "classification":
        return float(task.classes.index(cell)) if cell in task.classes else None
    try:
        value = float(cell)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
