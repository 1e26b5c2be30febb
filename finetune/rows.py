"""The rows in which every score is kept: one per case and class, in `rows.csv` of a run folder.

Tables are made from rows alone, so a row says where it comes from: data, split, arm, draws,
recipe, checkpoint and the version of the metric.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from data_prep.errors import InputError
from data_prep.files import write_text

ROW_FORMAT = 2
LATER = frozenset({"pretrain_recipe", "truth", "answer", "unit"})
"""Columns that files of this format may lack: they came later, and their defaults are right."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One case, one class.

    `outcome` is scored, true_negative, missed, false_positive or not_annotated. `status` is the
    same where the case can be believed: it is tainted if the checkpoint has seen the case in
    pretraining, and unknown if the checkpoint does not say what it has seen. `arm` is pretrained,
    scratch (its twin), scratch-own (scratch at its own best recipe), or external for predictions
    that were made elsewhere. `config_hash` covers all that arms share: everything but the arm, the
    checkpoint's weights and the draws. `recipe_hash` covers what was trained: it is the same for
    twins, and scratch-own has another. `protocol` is the name that the recipe goes by.
    `pretrain_recipe` is a hash of all that checkpoints of one recipe share, which differ in
    `pretrain_seed`; empty where the checkpoint does not say how it was made.
    Scores are those of `metrics.Score`; lesion counts are -1 where lesions are not counted.

    Rows of tasks of whole scans have no scores but `truth` and `answer`: of a classification 1 or 0
    and the probability of the row's class, of a regression both values, in `unit`.
    """

    dataset: str
    split: str
    split_hash: str
    case: str
    subject: str
    class_value: int
    class_name: str
    status: str
    outcome: str
    dsc: float
    nsd: float
    nsd_tolerance_mm: float
    hd95: float
    volume_pred_ml: float
    volume_true_ml: float
    arm: str
    labels: str
    n_labels: int
    seed: int
    label_seed: int
    init_seed: int
    pretrain_seed: int
    steps: int
    checkpoint: str
    checkpoint_digest: str
    config_hash: str
    recipe_hash: str = ""
    protocol: str = ""
    format: int = ROW_FORMAT
    metric_version: int = 1
    assd: float = math.nan
    volume_error_ml: float = math.nan
    volume_error_relative: float = math.nan
    lesion_tp: int = -1
    lesion_fp: int = -1
    lesion_fn: int = -1
    lesion_f1: float = math.nan
    lesion_rq: float = math.nan
    lesion_pq: float = math.nan
    pretrain_recipe: str = ""
    truth: float = math.nan
    answer: float = math.nan
    unit: str = ""

    @property
    def volume_difference_ml(self) -> float:
        """Volume error without its sign: errors of both signs must not cancel in a mean."""
        return abs(self.volume_error_ml)

    @property
    def draw(self) -> str:
        """What was drawn: rows of two arms are a pair only if all of it is the same."""
        drawn = (self.seed, self.label_seed, self.init_seed)
        return str(self.seed) if len(set(drawn)) == 1 else "/".join(map(str, drawn))


def write_rows(rows: Iterable[Row], path: Path) -> None:
    """Writes rows as CSV; a score that is not defined stays empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = [field.name for field in dataclasses.fields(Row)]
    writer.writerow(names)
    for row in rows:
        values = [getattr(row, name) for name in names]
        writer.writerow([_written(value) for value in values])
    write_text(path, text.getvalue())


def read_rows(path: Path) -> list[Row]:
    """Reads a rows.csv.

    Raises:
        InputError: the file is missing, of another format, or holds a value that does not fit.
    """
    if not path.is_file():
        raise InputError(f"{path}: not found; expected the rows.csv of a finished finetune run")
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            records, columns = list(reader), set(reader.fieldnames or ())
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(
            f"{path}: is no table of rows ({error}); expected the rows.csv of a finetune run"
        ) from error
    other = {record["format"] for record in records if "format" in record} - {str(ROW_FORMAT)}
    if other:
        raise InputError(
            f"{path}: row format {min(map(str, other))}, expected {ROW_FORMAT}; rows of format 1 "
            "lack ASSD, volume errors and lesions. Start the same `voxelith finetune` again: it "
            "scores the kept predictions anew and trains nothing; `voxelith evaluate` scores others"
        )
    fields = dataclasses.fields(Row)
    missing = [f.name for f in fields if f.name not in columns | LATER]
    if missing:
        raise InputError(
            f"{path}: columns {', '.join(missing)} are missing; "
            f"expected rows of format {ROW_FORMAT} as finetune and evaluate write them"
        )
    rows = []
    for line, record in enumerate(records, start=2):
        try:
            given = [f for f in fields if f.name in columns]
            rows.append(Row(**{f.name: _parsed(record[f.name], str(f.type)) for f in given}))
        except (ValueError, TypeError) as error:
            raise InputError(f"{path}, line {line}: {error}") from error
    return rows


def are_current(path: Path, metric_version: int) -> bool:
    """Whether rows are of today's format and metric; others are made again from predictions."""
    with path.open(newline="", encoding="utf-8") as file:
        first = next(csv.DictReader(file), None)
    wanted = str(ROW_FORMAT), str(metric_version)
    return first is None or (first.get("format"), first.get("metric_version")) == wanted


def _written(value: object) -> str:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.8g}"
    return str(value)


def _parsed(text: str, kind: str) -> Any:
    if kind == "float":
        return float(text) if text else math.nan
    return int(text) if kind == "int" else text
