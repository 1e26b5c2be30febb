"""What is kept of a step whose loss or gradient is not finite.

failures/step-00000012/
    failure.json    where it happened, on which samples, and what was found when it was noticed
    start.pt        the newest checkpoint from before, where there is one

The loop asks the device only where it logs, which may be many steps later, when the weights are
ruined already. What is written here is enough all the same: order, crops and every draw are
functions of (seed, step, micro-step, rank), so `pretrain.replay` makes the step again from the
checkpoint. No path and no name goes in: samples are named by their keys.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from data_prep.files import write_json
from pretrain.events import step_of
from pretrain.loader import CropDataset
from pretrain.run_folder import Checkpoints

FORMAT = 1
NEVER = 2**62

What = Literal["loss", "gradient"]


class Fault(NamedTuple):
    """The first value that is not finite.

    Attributes:
        what: the loss of a micro-step, or the gradient of an optimiser step, which is the same on
            all ranks.
        step: the optimiser step that it belongs to, counted from 1.
        micro_step: within the step; the last one for a gradient.
        rank: None for a gradient.
    """

    what: What
    step: int
    micro_step: int
    rank: int | None


class Faults:
    """Remembers on the device when the loss and the gradient's norm were first not finite."""

    def __init__(self, accumulate: int) -> None:
        self.accumulate = accumulate
        self._first: dict[What, Tensor] = {}

    def see(self, what: What, value: Tensor, step: int, micro_step: int) -> None:
        """Looks at a scalar of a step, counted from 0; the host does not wait for it."""
        first = self._first.get(what)
        if first is None:
            first = torch.full((), NEVER, dtype=torch.int64, device=value.device)
        at = first.clamp(max=step * self.accumulate + micro_step)
        self._first[what] = torch.where(torch.isfinite(value.detach()), first, at)

    def positions(self, like: Tensor) -> Tensor:
        """What `read` wants of this rank, for a fetch that other numbers share: [2] as `like`.

        A float64 holds any number of micro-steps exactly.
        """
        never = torch.full((), NEVER, dtype=torch.int64, device=like.device)
        kinds: tuple[What, What] = ("loss", "gradient")
        return torch.stack([self._first.get(kind, never) for kind in kinds]).to(like)

    def read(self, table: Sequence[Sequence[float]]) -> Fault | None:
        """The first fault of all ranks, or None, from a row of `positions` for each rank."""
        # A loss comes before the gradient that it spoils.
        ranked = [(at, kind, rank) for rank, row in enumerate(table) for kind, at in enumerate(row)]
        at, kind, rank = min(ranked)
        if at >= NEVER:
            return None
        step, micro_step = divmod(int(at), self.accumulate)
        if kind:
            return Fault("gradient", step + 1, micro_step, None)
        return Fault("loss", step + 1, micro_step, rank)


class Shape(NamedTuple):
    """How a step is cut into micro-batches; free to change when a run is resumed."""

    batch_size: int
    accumulate: int
    world: int
    nodes: int

    def micro_batches(
        self, dataset: CropDataset, step: int
    ) -> Iterable[tuple[int, int, list[int]]]:
        """The step after `step` steps, in order: micro-step, rank, indices of the crops."""
        for micro in range(self.accumulate):
            number = step * self.accumulate + micro
            for rank in range(self.world):
                (positions,) = dataset.schedule.batches(
                    number, number + 1, self.batch_size // self.accumulate, rank, self.world,
                    self.nodes,
                )  # fmt: skip
                crops = range(dataset.crops.total)
                yield micro, rank, [p * len(crops) + n for p in positions for n in crops]


def failure_folder(run: Path, step: int) -> Path:
    """Where a failed step is described."""
    return run / "failures" / f"step-{step:08d}"


def write_failure(
    run: Path,
    fault: Fault,
    *,
    dataset: CropDataset,
    shape: Shape,
    checkpoints: Checkpoints,
    objective: nn.Module,
    facts: Mapping[str, Any],
) -> Path:
    """Writes the folder of a failed step, whole or not at all; an older one of the step goes.

    Args:
        run: the run folder.
        fault: what happened.
        dataset: of the run.
        shape: how the step was cut.
        checkpoints: of the run; all of them are from before the fault.
        objective: with the weights and gradients as they are now.
        facts: what else to keep, plain values.
    """
    folder = failure_folder(run, fault.step)
    folder.parent.mkdir(exist_ok=True)
    new = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        new.chmod(0o755)
        start = [path for path in checkpoints.paths() if step_of(path) < fault.step]
        if start:
            # A link costs nothing and outlives the checkpoint, should the run go on.
            with contextlib.suppress(OSError):
                os.link(start[-1], new / "start.pt")
        write_json(
            new / "failure.json",
            {
                "format": FORMAT,
                **fault._asdict(),
                **shape._asdict(),
                **{name: plain(value) for name, value in facts.items()},
                "not_finite": {
                    "parameters": count_not_finite(objective.named_parameters()),
                    "gradients": count_not_finite(
                        (name, p.grad) for name, p in objective.named_parameters()
                    ),
                },
                "samples": [
                    {"micro_step": micro, "rank": rank, **describe_sample(dataset, index)}
                    for micro, rank, crops in shape.micro_batches(dataset, fault.step - 1)
                    for index in crops
                ],
            },
        )
        if folder.exists():
            shutil.rmtree(folder)
        new.replace(folder)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    return folder


def describe_sample(dataset: CropDataset, index: int) -> dict[str, Any]:
    """Names a crop: position in the schedule, number within it, key, first voxel, seed."""
    draw = dataset.draw(index)
    position, number = divmod(index, dataset.crops.total)
    return {
        "position": position,
        "crop": number,
        "key": str(dataset.corpus.keys[draw.item]),
        "origin": [math.floor(n) for n in draw.box[0]],
        "seed": draw.seed,
    }


def count_not_finite(tensors: Iterable[tuple[str, Tensor | None]]) -> dict[str, int]:
    """Values that are not finite, by name; names without any are left out."""
    found = {
        name: int((~torch.isfinite(tensor)).sum())
        for name, tensor in tensors
        if tensor is not None and tensor.is_floating_point()
    }
    return {name: count for name, count in found.items() if count}


def plain(value: Any) -> Any:
    """A value for JSON, which has no number for NaN and infinity: they become words."""
    if isinstance(value, Mapping):
        return {str(name): plain(inner) for name, inner in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
