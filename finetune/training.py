"""A training as it stands, at any time: under way, killed, waiting in a queue or done."""

from __future__ import annotations

import csv
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.errors import InputError
from data_prep.files import read_note
from finetune.costs import duration
from finetune.curves import Log, draw_health, draw_training
from finetune.pages import data_uri
from pretrain.events import Events, Start
from pretrain.run_folder import RunFolder

ENDS = {
    "finished": "finished",
    "requeue": "time limit near: saved, to be queued again",
    "preempted": "SIGTERM: saved",
    "interrupted": "interrupted",
}


def is_pretraining(run: Path) -> bool:
    """Whether a folder is that of a pretraining, begun at least."""
    return "objective" in read_note(run / "config.json")


def sort_runs(paths: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """What is shown as a training, and what has rows for the table.

    Args:
        paths: folders of runs, folders of such folders, or rows.csv files.

    Raises:
        InputError: names every path that is none of them.
    """
    trainings: list[Path] = []
    finished: list[Path] = []
    problems = []
    for path in paths:
        if path.is_file() or (path / "rows.csv").is_file():
            finished.append(path)
            continue
        known = ("config.json", "rows.csv")
        inside = sorted({file.parent for name in known for file in path.glob(f"*/{name}")})
        found = [path] if (path / "config.json").is_file() else inside
        if not found:
            why = (
                "is no run and holds none: no config.json in it or one level below"
                if path.is_dir()
                else "no such folder"
            )
            queued = (path / "launch" / "job.json").is_file()
            problems.append(
                f"{path}: its job has not started yet; see `voxelith launch status {path}`"
                if queued
                else f"{path}: {why}; give the folder of a run, or one that holds runs"
            )
        for run in found:
            (finished if (run / "rows.csv").is_file() else trainings).append(run)
    if problems:
        raise InputError(problems)
    return list(dict.fromkeys(trainings)), list(dict.fromkeys(finished))


def read_log(path: Path) -> dict[str, np.ndarray] | None:
    """Columns of a metrics.csv or health.csv; None where it has no whole row yet."""
    if not path.is_file():
        return None
    with path.open(newline="") as file:
        # The last row of a run that is under way, or was killed, may be half of one.
        rows = [r for r in csv.DictReader(file) if None not in r and None not in r.values()]
    if not rows:
        return None
    return {name: np.array([float(row[name] or "nan") for row in rows]) for name in rows[0]}


def training_section(run: Path) -> dict[str, Any]:
    """All that the page shows of a training.

    Raises:
        InputError: it is no run's folder.
    """
    config, facts = RunFolder(run).config(), read_note(run / "run.json")
    log, starts = read_log(run / "metrics.csv"), Events(run).starts()
    words = [str(word) for word in facts.get("command", [])]
    return {
        "name": run.name,
        "kind": "Pretraining" if is_pretraining(run) else "Finetuning",
        "what": _what(config, facts),
        "state": _state(run, config, log, starts),
        "figures": [] if log is None else _figures(config, log, starts),
        "curve": None if log is None else draw_training(log, [s.step for s in starts[1:]]),
        "starts": [_start(n, one, _ends(run, starts, n)) for n, one in enumerate(starts, 1)],
        "failures": sorted(path.name for path in (run / "failures").glob("step-*")),
        "previews": _previews(run),
        "health": _health(run),
        "command": shlex.join([Path(words[0]).name, *words[1:]]) if words else "",
    }


def _what(config: dict[str, Any], facts: dict[str, Any]) -> str:
    size = " x ".join(str(n) for n in config["crop_size"] or ())
    batch = f"batches of {config['batch_size']} crops of {size} voxels"
    if "objective" not in config:
        arm = config.get("init", "")
        return f"{arm} arm, seed {config.get('seed')}: {config.get('steps')} steps, {batch}."
    objective, backbone = (
        str(config[part]["_target_"]).rpartition(".")[2] for part in ("objective", "backbone")
    )
    volumes = facts.get("corpus", {}).get("samples", "unknown")
    return f"{objective} on {backbone}: {config['steps']} steps, {batch} from {volumes} volumes."


def _last(log: Log | None) -> int:
    return 0 if log is None else int(log["step"][-1])


def _state(run: Path, config: dict[str, Any], log: Log | None, starts: Sequence[Start]) -> str:
    """One sentence: where it is, and what is to be done about it."""
    folder, steps = RunFolder(run), int(config["steps"])
    step, saved = _last(log), folder.checkpoints.last_step()
    where = f"step {step:,} of {steps:,}"
    if saved >= steps and "objective" in config:
        return f"Finished: {steps:,} steps."
    if saved >= steps:
        now = "this is under way" if folder.held() else "the same command goes on with them"
        return f"Trained: {steps:,} steps; not all test cases are predicted yet, and {now}."
    if folder.held():
        left = (steps - step) * _pace(log) if log is not None else float("nan")
        more = "" if np.isnan(left) else f", about {duration(left)} left at the pace of late"
        return f"Under way: {where}{more}."
    goes_on = f"the newest checkpoint is of step {saved:,}, and the same command goes on from there"
    if not starts:
        return f"Not under way: {where}; {goes_on}."
    end = starts[-1].end
    if not end:
        return f"Killed at or after {where}; {goes_on}."
    said = ENDS.get(end, f"ended by {end}")
    return f"{said[0].upper()}{said[1:]} at {where}; {goes_on}."


def _pace(log: Log) -> float:
    """Seconds of a step, of the last ten rows."""
    return float(np.nanmedian(log["seconds_per_step"][-10:]))


def _figures(config: dict[str, Any], log: Log, starts: Sequence[Start]) -> list[tuple[str, str]]:
    spans = log["seconds_per_step"] * np.diff(log["step"], prepend=0)
    trained = float(np.nansum(spans))
    found = [
        ("Steps", f"{_last(log):,} of {int(config['steps']):,}"),
        ("Loss", f"{log['loss'][0]:.3f} to {log['loss'][-1]:.3f}"),
        ("Time of the steps", duration(trained)),
    ]
    if "samples_per_second" in log:
        found.append(("Samples a second", f"{np.nanmedian(log['samples_per_second']):.3g}"))
    waits = float(np.nansum(log["data_wait"] * spans)) / max(trained, 1e-9)
    found.append(("Waiting for data", f"{waits:.0%}"))
    if "memory_gib" in log:
        found.append(("Memory", f"{np.nanmax(log['memory_gib']):.2f} GiB"))
    saves = [second for start in starts for second in start.saves]
    if saves:
        size = max(start.bytes for start in starts) / 2**20
        found.append(("A save", f"{np.median(saves):.2g} s, {size:,.0f} MiB"))
    return found


def _ends(run: Path, starts: Sequence[Start], number: int) -> str:
    """How a start ended, in words."""
    end = starts[number - 1].end
    if end:
        return ENDS.get(end, end)
    if number == len(starts) and RunFolder(run).held():
        return "under way"
    return "killed"


def _start(number: int, start: Start, end: str) -> dict[str, str]:
    return {
        "number": str(number),
        "began": time.strftime("%Y-%m-%d %H:%M", time.gmtime(start.began)),
        "lasted": duration(start.ended - start.began),
        "steps": f"{start.step:,} to {start.last:,}",
        "ranks": str(start.ranks),
        "job": start.job or "–",
        "save": f"{np.median(start.saves):.2g} s" if start.saves else "–",
        "end": end,
    }


def _previews(run: Path) -> dict[str, str] | None:
    """The last picture that a run drew of its fixed samples."""
    pictures = sorted((run / "previews").glob("step-*.png"))
    if not pictures:
        return None
    step = int(pictures[-1].stem.removeprefix("step-"))
    return {"step": str(step), "picture": data_uri(pictures[-1].read_bytes(), "image/png")}


def _health(run: Path) -> dict[str, str | None] | None:
    """What a run saw of its own features: curves, and their colours over time."""
    log = read_log(run / "health.csv")
    if log is None:
        return None
    strip = run / "previews" / "strip.png"
    return {
        "curves": draw_health(log),
        "strip": data_uri(strip.read_bytes(), "image/png") if strip.is_file() else None,
    }
