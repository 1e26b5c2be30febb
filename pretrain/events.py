"""What became of a run: events.jsonl, a line for each start, save and end, of which none is undone.

metrics.csv has each step once, whatever happened; here is what happened. A start without an end
was killed or taken for dead, or is under way.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_prep.files import append_line, read_lines

EVENTS = "events.jsonl"


def step_of(path: Path) -> int:
    """The step in the name of a checkpoint or a picture, step-00000100.pt."""
    return int(path.stem.removeprefix("step-"))


@dataclass
class Start:
    """One start of a run, up to what ended it.

    Attributes:
        step: that it went on from.
        began: seconds since 1970.
        ranks: processes that trained together.
        job: of the scheduler; None without one.
        end: `finished`, `requeue`, `preempted`, `interrupted` or what error; empty if nothing was
            written: it was killed or taken for dead, or is under way.
        last: the last step that is known of it.
        ended: seconds since 1970 at its last event.
        saves: seconds that each of its checkpoints took to write.
        bytes: size of its last checkpoint.
    """

    step: int
    began: float
    ranks: int = 1
    job: str | None = None
    end: str = ""
    last: int = 0
    ended: float = 0.0
    saves: list[float] = field(default_factory=list)
    bytes: int = 0


class Events:
    """The events of a run's folder."""

    def __init__(self, run: Path) -> None:
        self.path = run / EVENTS

    def write(self, what: str, step: int, **facts: Any) -> None:
        """Appends a line; it is on the disk before the run goes on."""
        at = round(time.time(), 3)
        append_line(self.path, {"time": at, "event": what, "step": step, **facts})

    @contextmanager
    def start(self, step: int, ranks: int) -> Iterator[None]:
        """Writes the start of a training and what ends it."""
        from data_prep.errors import LostLeaseError
        from pretrain.preemption import Ask, Preempted, job_id

        job = job_id() if "SLURM_JOB_ID" in os.environ else None
        self.write("start", step, ranks=ranks, job=job)
        try:
            yield
        except Preempted as ended:
            asked = "requeue" if ended.ask is Ask.REQUEUE else "preempted"
            self.write(asked, ended.step)
            raise
        except KeyboardInterrupt:
            self.write("interrupted", self.last_step())
            raise
        except LostLeaseError:
            raise  # the run goes on, written by another process
        except BaseException as error:
            # Its message may name paths, and is told elsewhere.
            self.write("failed", self.last_step(), error=type(error).__name__)
            raise

    def saved(self, step: int, seconds: float, size: int) -> None:
        """Writes that a checkpoint is whole."""
        self.write("saved", step, seconds=round(seconds, 4), bytes=size)

    def pictured(self, step: int, seconds: float) -> None:
        """Writes that a preview was drawn."""
        self.write("pictured", step, seconds=round(seconds, 4))

    def last_step(self) -> int:
        """The last step that an event names."""
        return max((int(event["step"]) for event in self.read()), default=0)

    def last_save(self) -> float | None:
        """Seconds that the last checkpoint took to write; None before the first."""
        saves = [float(event["seconds"]) for event in self.read() if event["event"] == "saved"]
        return saves[-1] if saves else None

    def starts(self) -> list[Start]:
        """All starts, the first one first."""
        found: list[Start] = []
        for event in self.read():
            what, step, at = str(event["event"]), int(event["step"]), float(event["time"])
            if what == "start":
                ranks, job = int(event.get("ranks", 1)), event.get("job")
                found.append(Start(step, at, ranks, job, last=step, ended=at))
                continue
            if not found:
                continue
            now = found[-1]
            now.last, now.ended = max(now.last, step), at
            if what == "saved":
                now.saves.append(float(event["seconds"]))
                now.bytes = int(event["bytes"])
            elif what != "pictured":
                now.end = str(event.get("error", what))
        return found

    def read(self) -> list[dict[str, Any]]:
        """All events, the first one first."""
        known = {"time", "event", "step"}
        return [event for event in read_lines(self.path) if known <= event.keys()]
