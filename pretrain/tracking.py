"""What a run tells while it trains: files of its folder first, then TensorBoard, W&B or MLflow.

metrics.csv and metrics.jsonl are the truth: each step once, none missing, whatever ended a start.
A tracker is told the same rows, once each. A resumed run takes back from TensorBoard what is after
its checkpoint; it asks W&B and MLflow which step they were told of last, catches up from there and
does not repeat itself. W&B offline starts a folder for each start, so the newest gets all rows and
older ones go: one folder to sync, one run.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import secrets
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from pydantic import BaseModel

from data_prep.errors import InputError, config_text
from data_prep.files import read_lines as lines_of
from data_prep.files import sync, write_text
from data_prep.references import without_secrets
from pretrain.release import LoadReport
from pretrain.run_folder import MetricsLog, RunFolder
from pretrain.settings import LoopSettings

Row = Mapping[str, float | int]


class Journal:
    """Tells the rows of a run from a step on; rank 0 alone has one.

    Args:
        run: its folder.
        trackers: who is told besides its files.
        step: of the checkpoint that it goes on from.
    """

    def __init__(self, run: Path, trackers: Sequence[Logger], step: int) -> None:
        self._table = MetricsLog(run / "metrics.csv", step)
        self._lines = run / "metrics.jsonl"
        # What was seen before the first step is seen again by a run that begins anew.
        kept = [row for row in read_lines(self._lines) if row["step"] <= step] if step else []
        if kept or self._lines.exists():
            write_text(self._lines, "".join(_line(row) for row in kept))
        self._trackers = list(trackers)
        self._first = {id(tracker): 0 for tracker in trackers}
        for tracker in trackers:
            self._to(tracker, partial(self._catch_up, tracker, kept))

    def row(self, row: Row) -> None:
        """A row of metrics.csv: how the training is."""
        self._table.write(dict(row))
        self.tell(row, int(row["step"]))

    def tell(self, values: Row, step: int) -> None:
        """What else was found at a step: looks at features, scores on validation cases."""
        with self._lines.open("a") as file:
            file.write(_line({"step": step, **values}))
        for tracker in list(self._trackers):
            if step >= self._first[id(tracker)]:
                self._to(tracker, partial(tracker.log_metrics, dict(values), step))

    def save(self) -> None:
        """Has on the disk what files and trackers hold back: what a checkpoint covers must stay."""
        self._table.save()
        if self._lines.exists():
            sync(self._lines)
        for tracker in list(self._trackers):
            self._to(tracker, tracker.save)

    def close(self) -> None:
        """The run is done."""
        for tracker in list(self._trackers):
            self._to(tracker, partial(tracker.finalize, "success"))

    def _catch_up(self, tracker: Logger, rows: Sequence[Row]) -> None:
        first = self._first[id(tracker)] = _next_step(tracker)
        if isinstance(tracker, TensorBoardLogger):
            return  # what is before the checkpoint was written before that
        for row in rows:
            if row["step"] >= first:
                values = {name: value for name, value in row.items() if name != "step"}
                tracker.log_metrics(values, int(row["step"]))
        if isinstance(tracker, WandbLogger):
            _drop_older_folders(tracker)

    def _to(self, tracker: Logger, call: Callable[[], object]) -> None:
        if not _works(type(tracker).__name__.strip("_"), call):
            self._trackers = [one for one in self._trackers if one is not tracker]


def _works(tracker: str, call: Callable[[], object]) -> bool:
    """A tracker that fails must not end a training: it is left out, and catches up later."""
    try:
        call()
    except Exception as error:
        why = without_secrets(f"{type(error).__name__}: {error}")
        print(
            f"WARNING: {tracker} fails ({why}) and is told no more in this start; metrics.csv and "
            "metrics.jsonl have all, and the next start tells it what it has missed",
            file=sys.stderr,
        )
        return False
    return True


def read_lines(path: Path) -> list[dict[str, float | int]]:
    """The rows of a metrics.jsonl; what a killed process left of one is none."""
    return [
        {k: math.nan if v is None else v for k, v in row.items()}
        for row in lines_of(path)
        if isinstance(row.get("step"), int)
    ]


def _line(row: Row) -> str:
    # JSON knows no NaN.
    return json.dumps({k: v if math.isfinite(v) else None for k, v in row.items()}) + "\n"


def _next_step(tracker: Logger) -> int:
    """The first step that a tracker has not been told of."""
    if isinstance(tracker, WandbLogger):
        return int(tracker.experiment.step)
    if isinstance(tracker, MLFlowLogger):
        assert tracker.run_id is not None
        tracker.experiment.update_run(tracker.run_id, status="RUNNING")
        told = tracker.experiment.get_metric_history(tracker.run_id, "loss")
        return max((point.step for point in told), default=-1) + 1
    return 0


def check_loggers(settings: LoopSettings) -> None:
    """Looks whether the wanted loggers can be used; writes nothing.

    Raises:
        InputError: a logger is wanted that is not installed or has no login.
    """
    problems = []
    for name, modules in (
        ("tensorboard", ("tensorboard", "tensorboardX")),
        ("mlflow", ("mlflow",)),
    ):
        if name in settings.loggers and not any(map(importlib.util.find_spec, modules)):
            problems.append(f"loggers: {name} is not installed; pip install 'voxelith[{name}]'")
    if "wandb" in settings.loggers:
        import wandb

        if not _offline() and not wandb.api.api_key:
            problems.append(
                "loggers: wandb has no login on this machine, and WANDB_MODE=online asks for one; "
                "run `wandb login`, set WANDB_API_KEY, or leave WANDB_MODE out and sync later"
            )
    if problems:
        raise InputError(problems)


def _offline() -> bool:
    """Unless it is said otherwise: nodes of clusters often reach nothing, and would wait for it."""
    return os.environ.get("WANDB_MODE", "") not in ("online", "run")


def make_loggers(settings: LoopSettings, run: RunFolder, step: int = 0) -> list[Logger]:
    """The trackers that are asked for, each with one run for life, whatever starts again.

    Args:
        settings: of the run; those without a path are told as its configuration.
        run: its folder, where identities are kept.
        step: of the checkpoint that it goes on from.

    Raises:
        InputError: see `check_loggers`.
    """
    check_loggers(settings)
    makers = {"tensorboard": _tensorboard, "wandb": _wandb, "mlflow": _mlflow}
    made: list[Logger] = []

    def begin(name: str) -> None:
        known = (run.path / f"{name}_id").exists()
        one = makers[name](run, step)
        if not step or not known:
            _tell_settings(one, settings)
        made.append(one)

    for name in dict.fromkeys(settings.loggers):
        _works(name, partial(begin, name))
    return made


def _tell_settings(logger: Logger, settings: BaseModel) -> None:
    if not isinstance(logger, TensorBoardLogger):  # which compares runs by them, and has one
        logger.log_hyperparams(without_paths(settings))


def without_paths(settings: BaseModel) -> dict[str, Any]:
    """Settings as plain data, but for where files lie, which is nobody else's business."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            kept = {k: v for k, v in value.items() if not _is_path(v)}
            return {k: plain(v) for k, v in kept.items()}
        return [plain(one) for one in value] if isinstance(value, list | tuple) else value

    return dict(plain(settings.model_dump(mode="python")))


def _is_path(value: Any) -> bool:
    several = isinstance(value, list | tuple) and any(map(_is_path, value))
    return isinstance(value, Path) or several


def _tensorboard(run: RunFolder, step: int) -> Logger:
    again = {"purge_step": step + 1} if step else {}
    return TensorBoardLogger(run.path, name="tensorboard", version="", **again)


class _Wandb(WandbLogger):
    """Counts steps as the run does, so that a step is told once; Lightning counts its calls."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self.experiment.log(dict(metrics), step=step)


def _wandb(run: RunFolder, step: int) -> Logger:
    if not step and _offline():
        print(
            f"wandb: is written to {run.path / 'wandb'}; `wandb sync` sends it, and with "
            "WANDB_MODE=online it goes there while the run trains"
        )
    return _Wandb(
        project="voxelith",
        name=run.path.name,
        id=_kept(run, "wandb_id", lambda: secrets.token_hex(4)),
        resume="allow",
        save_dir=run.path,
        offline=_offline(),
        # Hosts, paths and command lines stay here.
        settings={
            "disable_git": True,
            "disable_code": True,
            "console": "off",
            "host": "",
            "program": "voxelith",
            "x_disable_meta": True,
            "x_disable_machine_info": True,
        },
    )


def _drop_older_folders(tracker: WandbLogger) -> None:
    """Of a run that is written offline the newest folder has all rows."""
    here = Path(tracker.experiment.dir).parent
    if here.name.startswith("offline-run-"):
        for other in here.parent.glob(f"offline-run-*-{tracker.version}"):
            if other != here:
                shutil.rmtree(other, ignore_errors=True)


def _mlflow(run: RunFolder, step: int) -> Logger:
    # A server that is gone must not hold a training for as long as MLflow would try.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    here = f"sqlite:///{(run.path / 'mlflow.db').resolve()}"

    def made(run_id: str | None) -> MLFlowLogger:
        return MLFlowLogger(
            experiment_name="voxelith",
            run_name=run.path.name,
            tracking_uri=os.environ.get("MLFLOW_TRACKING_URI") or here,
            run_id=run_id,
            # Instead of the user's name, the program's path and the commit.
            tags={
                "mlflow.user": "",
                "mlflow.source.name": "voxelith",
                "mlflow.source.git.commit": "",
            },
        )

    return made(_kept(run, "mlflow_id", lambda: str(made(None).run_id)))


def _kept(run: RunFolder, name: str, make: Callable[[], str]) -> str:
    """What identifies a run for a tracker: made once, kept in its folder."""
    file = run.path / name
    if not file.exists():
        run.path.mkdir(parents=True, exist_ok=True)
        write_text(file, make())
    return file.read_text().strip()


def log_load(loggers: Iterable[Logger], report: LoadReport) -> None:
    """Tells loggers what became of the weights that a run begins from.

    As `load/...` beside a run's settings, or a text where a logger has no such place.
    """
    told = {f"load/{name}": value for name, value in report.summary().items()}

    def tell(logger: Logger) -> None:
        if isinstance(logger, TensorBoardLogger):
            lines = [f"- {name}: {config_text(value)}" for name, value in told.items()]
            logger.experiment.add_text("load", "\n".join(lines))
            logger.save()
        else:
            logger.log_hyperparams(told)

    for logger in loggers:
        _works(type(logger).__name__.strip("_"), partial(tell, logger))
