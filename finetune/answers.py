"""Answers for whole scans as files and as rows. No torch in here."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from data_prep.corpus import Corpus
from data_prep.errors import InputError
from data_prep.files import write_text
from finetune.evaluate import Origin, Split, about_case, doubt
from finetune.rows import Row
from finetune.scan_task import ScanTask
from finetune.targets import Targets

ANSWERS = "answers.csv"
"""The file of a run, and of a folder that `voxelith predict` made: a row for each scan."""


def write_answers(
    folder: Path, name: str, task: ScanTask, answers: Mapping[str, Sequence[float]]
) -> None:
    """Writes answers.csv.

    Args:
        folder: that gets it.
        name: what tells scans apart, the first column: key or file.
        task: whose answers; a column for each class's probability, or one for the value.
        answers: of each scan.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([name, *task.columns])
    writer.writerows([scan, *(f"{value:.8g}" for value in said)] for scan, said in answers.items())
    write_text(folder / ANSWERS, text.getvalue())


def read_answers(folder: Path, name: str, task: ScanTask) -> dict[str, list[float]]:
    """What `write_answers` wrote; nothing where there is no such file.

    Raises:
        InputError: it has other columns, those of another task, or what is no number.
    """
    path = folder / ANSWERS
    if not path.is_file():
        return {}
    with path.open(newline="", encoding="utf-8") as file:
        head, *rows = list(csv.reader(file)) or [[]]
    wanted = [name, *task.columns]
    try:
        if head != wanted:
            raise ValueError(f"has the columns {', '.join(head)}, expected {', '.join(wanted)}")
        return {scan: [float(value) for value in values] for scan, *values in rows}
    except ValueError as error:
        raise InputError(
            f"{path}: {error}; it holds no answers of this network: move it away, or choose "
            "another output"
        ) from error


def score_answers(
    corpus: Corpus,
    split: Split,
    targets: Targets,
    answers: Mapping[str, Sequence[float]],
    origin: Origin,
) -> list[Row]:
    """Rows of a part: of a classification one for each class, of a regression one for each case.

    Args:
        corpus: of the cases.
        split: which cases.
        targets: the truth.
        answers: of each case, as `Answerer.answer` gives them.
        origin: where they come from.
    """
    prints = corpus.scan_prints()
    task, rows = targets.task, []
    for key in split.keys:
        truth, about = targets.values[key], about_case(corpus, split, task.name, key, origin)
        for n, (name, answer) in enumerate(zip(task.columns, answers[key], strict=True)):
            rows.append(
                Row(
                    class_value=n + 1,
                    class_name=name,
                    status=doubt(origin, prints[key]) or "scored",
                    outcome="scored",
                    dsc=math.nan,
                    nsd=math.nan,
                    nsd_tolerance_mm=math.nan,
                    hd95=math.nan,
                    volume_pred_ml=math.nan,
                    volume_true_ml=math.nan,
                    truth=truth if task.unit else float(truth == n),
                    answer=answer,
                    unit=task.unit,
                    **about,
                )
            )
    return rows
