"""What a run tells is told once, after kill -9 too: files, TensorBoard, W&B and MLflow."""

from __future__ import annotations

import importlib.util
import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loggers import Logger
from test_loop import settings, start, steps

from pretrain.events import Events
from pretrain.run_folder import RunFolder
from pretrain.tracking import make_loggers, read_lines, without_paths
from pretrain.train import pretrain

STEPS = 30
MLFLOW = importlib.util.find_spec("mlflow") is not None
TRACKERS = ("tensorboard", "wandb", *(("mlflow",) if MLFLOW else ()))


@pytest.fixture(scope="module")
def killed(pretrain_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run that was killed with rows beyond its checkpoint, twice, and went on to its end."""
    runs = tmp_path_factory.mktemp("runs")
    chosen = settings(
        pretrain_corpus, runs, "killed", steps=STEPS, log_every=1, save_every=10, preview_every=0,
        loggers=TRACKERS, health={"every": 10},
    )  # fmt: skip
    run = runs / "killed"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_SILENT", "true")
        for name in ("MLFLOW_TRACKING_URI", "WANDB_SERVICE"):  # the latter: of tests before
            patch.delenv(name, raising=False)
        for beyond in (13, 23):
            process = start(chosen, runs)
            while process.poll() is None and not (
                (run / "metrics.csv").exists() and steps(run)[-1:] >= [beyond]
            ):
                time.sleep(0.002)
            process.kill()
            assert process.wait() == -9
        assert start(chosen, runs).wait() == 0
        yield run


def test_files_have_each_step_once_and_tell_of_the_starts(killed: Path) -> None:
    assert steps(killed) == list(range(1, STEPS + 1))
    rows = read_lines(killed / "metrics.jsonl")
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, STEPS + 1))
    assert [row["step"] for row in rows if "health/rank" in row] == [0, 10, 20, 30]
    first, second, third = Events(killed).starts()
    assert (first.step, second.step, third.step) == (0, 10, 20)
    assert (first.end, second.end, third.end) == ("", "", "finished")
    assert len(first.saves) == len(second.saves) == len(third.saves) == 1
    newest = sorted((killed / "checkpoints").iterdir())[-1]
    assert (third.last, third.bytes) == (STEPS, newest.stat().st_size)
    marks = {int(row["step"]): row["start"] for row in rows if "loss" in row}
    assert [marks[step] for step in (10, 11, 20, 21, 30)] == [1, 2, 2, 3, 3]
    assert all(row["samples_per_second"] > 0 and row["memory_gib"] > 0.01 for row in rows[1:2])


def test_tensorboard_shows_each_step_once(killed: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert len(list((killed / "tensorboard").glob("events.*"))) == 3
    events = EventAccumulator(str(killed / "tensorboard"))
    events.Reload()
    assert [point.step for point in events.Scalars("loss")] == list(range(1, STEPS + 1))


def test_wandb_has_one_offline_folder_with_each_step_once(killed: Path) -> None:
    (folder,) = (killed / "wandb").glob("offline-run-*")
    (file,) = folder.glob("*.wandb")
    assert (killed / "wandb_id").read_text() in file.name
    rows = list(history(file))
    assert [int(row["_step"]) for row in rows] == list(range(STEPS + 1))
    assert [int(row["_step"]) for row in rows if "loss" in row] == list(range(1, STEPS + 1))
    assert [int(row["_step"]) for row in rows if "health/rank" in row] == [0, 10, 20, 30]


def history(file: Path) -> Iterator[dict[str, Any]]:
    """Rows of a .wandb file: protocol buffers in the records of a LevelDB log."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, whole = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        size, kind = struct.unpack_from("<HB", data, at + 4)
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last of several parts
            record = Record()
            record.ParseFromString(whole)
            whole = b""
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                names = {item.key or "/".join(item.nested_key): item.value_json for item in items}
                yield {name: json.loads(value) for name, value in names.items()}


@pytest.mark.extra
@pytest.mark.skipif(not MLFLOW, reason="mlflow is not installed: pip install 'voxelith[mlflow]'")
def test_mlflow_has_one_run_with_each_step_once(killed: Path) -> None:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{killed / 'mlflow.db'}")
    (experiment,) = [e for e in client.search_experiments() if e.name == "voxelith"]
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.run_id == (killed / "mlflow_id").read_text()
    assert found.info.status == "FINISHED" and found.data.params["lr"] == "0.001"
    told = client.get_metric_history(found.info.run_id, "loss")
    assert sorted(point.step for point in told) == list(range(1, STEPS + 1))
    said = json.dumps([found.data.tags, found.data.params])
    assert str(killed.parent) not in said and str(Path.home()) not in said


def test_a_tracker_that_fails_does_not_end_the_run_and_catches_up(
    pretrain_corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tensorboard")
    run = tmp_path / "run"
    run.mkdir()
    (run / "tensorboard").write_text("in the way")
    chosen = {"steps": 4, "log_every": 1, "loggers": ("tensorboard",), "health": {"every": 0}}
    pretrain(settings(pretrain_corpus, tmp_path, "run", **chosen))
    assert steps(run) == [1, 2, 3, 4]
    said = capfd.readouterr().err
    assert said.count("WARNING: TensorBoardLogger fails (") == 1 and "metrics.csv" in said


class Absent(Logger):
    """As Lightning's logger of MLflow, whose server does not answer until it is `there`."""

    there = False
    name, version = "voxelith", "0"

    def __init__(self, **given: Any) -> None:
        self.given, self.told = given, {}  # type: dict[str, Any], dict[str, Any]

    @property
    def run_id(self) -> str:
        if not self.there:
            raise ConnectionError("http://nobody:hush@lab.example/ does not answer")
        return self.given["run_id"] or "first"

    def log_hyperparams(self, params: Any, *more: Any, **others: Any) -> None:
        self.told = {**params, "id": self.run_id}

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        raise NotImplementedError


def test_a_server_that_does_not_answer_ends_no_start_and_gets_its_run_later(
    pretrain_corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("pretrain.tracking.MLFlowLogger", Absent)
    monkeypatch.setattr("pretrain.tracking.check_loggers", lambda settings: None)
    chosen = settings(pretrain_corpus, tmp_path, "run", loggers=("mlflow",))
    run = RunFolder(tmp_path / "run")
    assert make_loggers(chosen, run) == []
    said = capfd.readouterr().err
    assert "WARNING: mlflow fails (ConnectionError" in said and "hush" not in said
    assert not (run.path / "mlflow_id").exists()
    monkeypatch.setattr(Absent, "there", True)
    (made,) = make_loggers(chosen, run, step=7)
    assert (run.path / "mlflow_id").read_text() == "first"
    # What it has missed are the settings too, which a start that goes on does not tell again.
    assert isinstance(made, Absent) and (made.told["id"], made.told["lr"]) == ("first", chosen.lr)
    (again,) = make_loggers(chosen, run, step=7)
    assert isinstance(again, Absent) and again.told == {}


def test_what_trackers_are_told_of_settings_has_no_path(
    pretrain_corpus: Path, tmp_path: Path
) -> None:
    chosen = settings(pretrain_corpus, tmp_path, "run", health={"probe": pretrain_corpus})
    said = without_paths(chosen)
    assert str(tmp_path) not in str(said) and str(pretrain_corpus) not in str(said)
    assert said["lr"] == chosen.lr and said["objective"] == chosen.objective
    several = chosen.model_copy(update={"corpus": (pretrain_corpus, tmp_path / "other")})
    assert str(pretrain_corpus) not in str(without_paths(several))
    assert make_loggers(chosen, RunFolder(tmp_path / "run")) == []


def test_events_survive_a_line_that_was_cut_off(tmp_path: Path) -> None:
    events = Events(tmp_path)
    assert events.starts() == [] and events.last_step() == 0
    with pytest.raises(ZeroDivisionError), events.start(0, ranks=2):
        events.saved(3, 0.5, 100)
        with events.path.open("a") as file:
            file.write('{"time": 1, "ev')
        1 / 0  # noqa: B018
    with events.start(3, ranks=1):
        events.write("finished", 9)
    first, second = events.starts()
    assert (first.ranks, first.saves, first.last, first.end) == (2, [0.5], 3, "ZeroDivisionError")
    assert (second.ranks, second.step, second.last, second.end) == (1, 3, 9, "finished")
