"""`voxelith replay RUN [step=N]`: makes a step again and finds where a value stops being finite.

The replay starts at the newest checkpoint before the step (if there is none, as the run did: at the
seed, or at what `init` gave), makes every step up to it on this machine, the micro-batches of all
ranks one after the other, and looks into the modules of the first one whose loss or gradient is not
finite. On the machine that trained the numbers are the same; elsewhere, or where the run was
compiled, they are equal to rounding, so a value at the edge of the range may stay finite here. An
objective whose loss spans the batches of several ranks is not the same when they come one after the
other.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from data_prep.errors import InputError, named
from data_prep.files import atomic, write_json
from data_prep.progress import bar
from pretrain.augment import Augment
from pretrain.device import chosen_device
from pretrain.events import step_of
from pretrain.failures import (
    Shape,
    count_not_finite,
    describe_sample,
    failure_folder,
    plain,
)
from pretrain.loader import CropDataset, collate, to_device
from pretrain.loop import Loop, autocast_of, machine_precision, use_threads
from pretrain.objective import Batch
from pretrain.optim import Moments, with_moments
from pretrain.previews import PLANES, aspects, planes
from pretrain.run_folder import RunFolder, load_checkpoint
from pretrain.settings import PretrainSettings
from pretrain.start import open_start, origin_of
from pretrain.train import begin, build_objective, corpus_for, first_moments, make_dataset


@dataclass
class Trace:
    """Watches the modules of an objective while it computes; for one forward and backward pass."""

    objective: nn.Module
    crops: int
    output: tuple[str, list[int]] | None = None
    gradient: tuple[str, list[int]] | None = None
    _handles: list[Any] = field(default_factory=list)

    def __enter__(self) -> Trace:
        for name, module in self.objective.named_modules():
            if name:
                title = f"{name} ({type(module).__name__})"
                self._handles.append(module.register_forward_hook(self._hook(title)))
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, title: str) -> Any:
        def look(module: nn.Module, inputs: Any, output: Any) -> None:
            for tensor in _tensors(output):
                if self.output is None and not torch.isfinite(tensor).all():
                    self.output = (title, _bad_rows(tensor, self.crops))
                if tensor.requires_grad:
                    tensor.register_hook(self._look_back(title))

        return look

    def _look_back(self, title: str) -> Any:
        def look(gradient: Tensor) -> None:
            if self.gradient is None and not torch.isfinite(gradient).all():
                self.gradient = (title, _bad_rows(gradient, self.crops))

        return look


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _tensors(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _tensors(inner)


def _bad_rows(tensor: Tensor, rows: int) -> list[int]:
    """Rows that are not finite; empty where the first axis does not count the crops."""
    if tensor.ndim == 0 or len(tensor) != rows:
        return []
    bad = ~torch.isfinite(tensor).reshape(rows, -1).all(dim=1)
    return [int(row) for row in bad.nonzero().flatten()]


class Replay:
    """A run on this machine, without its trainer, its log and its folder's lease."""

    def __init__(self, run: RunFolder, corpus: str | None = None) -> None:
        config, facts = run.pretraining()
        self.run = run
        lies = {} if corpus is None else {"corpus": corpus}
        self.settings = PretrainSettings.model_validate({**config, **lies})
        found = corpus_for(self.settings)
        if found.index_hash != facts["corpus"]["index_hash"]:
            raise InputError(
                f"{found}: is not the corpus that {run.path} was trained on "
                f"(index {found.index_hash[:12]}, expected {facts['corpus']['index_hash'][:12]}); "
                "put that one back, or give corpus=DIR where it lies now"
            )
        self.objective = build_objective(self.settings, int(facts["channels"]))
        self.dataset: CropDataset = make_dataset(self.settings, found, self.objective.crops)

    def failure(self, step: int | None) -> dict[str, Any]:
        """What the run wrote of a failed step, by default of its last; {} if it wrote nothing."""
        if step is None:
            found = sorted((self.run.path / "failures").glob("step-*/failure.json"))
            if not found:
                raise InputError(
                    f"{self.run.path}: no step of this run failed; give step=N to look at one"
                )
            path = found[-1]
        else:
            path = failure_folder(self.run.path, step) / "failure.json"
        return dict(json.loads(path.read_text())) if path.is_file() else {}

    def start(self, step: int) -> dict[str, Any] | None:
        """The newest state from before a step; None: the run's own beginning."""
        paths = [p for p in self.run.checkpoints.paths() if step_of(p) < step]
        linked = failure_folder(self.run.path, step) / "start.pt"
        # The link outlives what it was made of; where checkpoints are left, the last is as new.
        start = next((path for path in [*paths[-1:], linked] if path.is_file()), None)
        return None if start is None else load_checkpoint(start)

    def to(self, step: int, shape: Shape, precision: str) -> dict[str, Any]:
        """Makes all steps up to `step`, counted from 1, and reports on the first bad one."""
        settings = self.settings.model_copy(update={"accumulate": shape.accumulate})
        self.device = chosen_device("auto", settings.trainer.accelerator)
        use_threads(settings.trainer)
        augment = Augment(settings.flip, settings.augment)
        loop = Loop(settings, self.dataset, self.run, augment=augment)
        objective = self.objective
        state = self.start(step)
        moments: Moments = {}
        if state is not None:
            objective.load_state_dict(state["objective"])
            loop.step = int(state["step"])
        elif settings.init is not None:
            self._begin_from(settings.init)
            moments = first_moments(objective, settings)
        objective.to(self.device).train()
        objective.loop = loop
        optimizer = loop.make_optimizer(objective)
        kept = with_moments(optimizer, objective, moments) if state is None else state["optimizer"]
        optimizer.load_state_dict(kept)
        self.loop, self.precision = loop, precision
        report: dict[str, Any] = {
            "step": step,
            "start": loop.step,
            "precision": precision,
            "world": shape.world,
        }
        with bar(total=step, initial=loop.step, desc="replay", unit="step") as progress:
            while loop.step < step:
                bad = self._step(optimizer, shape)
                progress.update()
                if bad is not None:
                    return {**report, "step": loop.step + 1, "found": True, **bad}
        return {**report, "found": False, **self._samples(shape, step - 1)}

    def _begin_from(self, init: Path) -> None:
        """Gives the objective the weights that the run began from.

        Raises:
            InputError: they are gone, or others lie in their place.
        """
        start, began = named("init", init, open_start), origin_of(self.run)
        if began is None or start.origin.digest != began.digest:
            raise InputError(
                f"init={init}: has digest {start.origin.digest[:12]}, and the run began from what "
                f"{self.run.path}/init.json names; put that back, or give step=N of a step that "
                "has a checkpoint before it"
            )
        begin(self.objective, start.state, self.settings, foreign=start.foreign)

    def _step(self, optimizer: torch.optim.Optimizer, shape: Shape) -> dict[str, Any] | None:
        """One optimiser step; where it is not finite, nothing is stepped and it is examined."""
        loop, objective = self.loop, self.objective
        batches = list(shape.micro_batches(self.dataset, loop.step))
        optimizer.zero_grad()
        for micro, rank, crops in batches:
            losses = self._losses(micro, rank, self._batch(crops))
            (losses.loss / (shape.accumulate * shape.world)).backward()
            if not torch.isfinite(losses.loss):
                return self._examine(micro, rank, crops)
        loop.clip(objective)
        if loop.norm is not None and not torch.isfinite(loop.norm):
            gradients = count_not_finite((n, p.grad) for n, p in objective.named_parameters())
            for batch in batches:
                found = self._examine(*batch)
                if found["gradients"] or found["parameters"]:
                    return found
            # Each is finite by itself, and their sum is not.
            return {
                "micro_step": None,
                "rank": None,
                "what": "gradient",
                "module": "the sum over micro-batches",
                "parts": [],
                "parameters": {},
                "gradients": gradients,
                **self._samples(shape, loop.step),
            }
        loop.set_rate(optimizer)
        optimizer.step()
        loop.step += 1
        objective.after_step(loop.progress)
        return None

    def _batch(self, crops: list[int]) -> Batch:
        raw = collate(self.dataset.__getitems__(crops))
        moved = to_device(raw, self.device)
        return self.loop.to_batch(moved)

    def _losses(self, micro: int, rank: int, batch: Batch) -> Any:
        self.loop.reseed(micro, rank)
        with autocast_of(self.precision, self.device):
            return self.objective(batch, self.loop.progress)

    def _examine(self, micro: int, rank: int, crops: list[int]) -> dict[str, Any]:
        """Makes a micro-step once more, with a look into each module."""
        objective = self.objective
        parameters = count_not_finite(objective.named_parameters())
        objective.zero_grad()
        batch = self._batch(crops)
        with Trace(objective, len(batch.image)) as trace:
            losses = self._losses(micro, rank, batch)
            losses.loss.backward()
        gradients = count_not_finite((n, p.grad) for n, p in objective.named_parameters())
        parts = [name for name, part in losses.parts.items() if not torch.isfinite(part).all()]
        views = self._views(batch)
        bad = [at for at, (group, row) in enumerate(views) if not group.image[row].isfinite().all()]
        if bad:
            what, module = "input", "input"
        elif trace.output is not None:
            what, (module, rows) = "output", trace.output
            bad = self._numbers(rows)
        elif not torch.isfinite(losses.loss):
            what, module, bad = "output", "loss", self._alone(micro, rank, batch)
        elif trace.gradient is not None:
            what, (module, rows) = "gradient", trace.gradient
            bad = self._numbers(rows)
        else:
            what, module = "gradient", "loss"
        return {
            "micro_step": micro,
            "rank": rank,
            "what": what,
            "module": module,
            "parts": parts,
            "parameters": parameters,
            "gradients": gradients,
            "samples": self._describe(batch, crops, bad),
            "batch": (views, bad),
        }

    def _alone(self, micro: int, rank: int, batch: Batch) -> list[int]:
        """Crops whose sample's loss is not finite by itself; none where it cannot be alone."""
        found: list[int] = []
        total = self.dataset.crops.total
        samples = len(batch.image) // self.dataset.crops.main
        for sample in range(samples):
            with contextlib.suppress(ValueError, RuntimeError), torch.no_grad():
                if not torch.isfinite(self._losses(micro, rank, batch.of([sample], samples)).loss):
                    found += range(sample * total, (sample + 1) * total)
        return found

    def _views(self, batch: Batch) -> list[tuple[Batch, int]]:
        """Group and row of each crop of a batch, all crops of a sample before the next one's."""
        chosen = self.dataset.crops
        groups = [
            (batch.others[group.name] if group.name else batch, group.crops)
            for group in chosen.groups(self.dataset.crop_size)
        ]
        return [
            (group, sample * crops + n)
            for sample in range(len(batch.image) // chosen.main)
            for group, crops in groups
            for n in range(crops)
        ]

    def _numbers(self, rows: list[int]) -> list[int]:
        """Where crops of the main group stand among all."""
        main, total = self.dataset.crops.main, self.dataset.crops.total
        return [row // main * total + row % main for row in rows]

    def _samples(self, shape: Shape, step: int) -> dict[str, Any]:
        """All samples of a step, none of which is to blame."""
        samples = []
        for micro, rank, crops in shape.micro_batches(self.dataset, step):
            batch = self._batch(crops)
            place = {"micro_step": micro, "rank": rank}
            samples += [{**place, **one} for one in self._describe(batch, crops, [])]
        return {"samples": samples, "batch": (self._views(batch), [])}

    def _describe(self, batch: Batch, crops: list[int], bad: list[int]) -> list[dict[str, Any]]:
        """Key, origin and seed of each crop; its least, largest and mean value, normalised."""
        return [
            {
                **describe_sample(self.dataset, index),
                "bad": at in bad,
                "min": float(group.image[row].min()),
                "max": float(group.image[row].max()),
                "mean": float(group.image[row].mean()),
                "valid": float(group.valid[row].float().mean()),
            }
            for at, (index, (group, row)) in enumerate(zip(crops, self._views(batch), strict=True))
        ]


def replay(path: Path, step: int | None = None, corpus: str | None = None) -> dict[str, Any]:
    """Replays a step of a run, by default the last one that failed.

    Writes replay.json and replay.png into the step's folder under `failures/`.

    Args:
        path: the run folder.
        step: the optimiser step, counted from 1.
        corpus: where the corpus of the run lies, if not where it was, or with the password of its
            address, which no run keeps.

    Returns:
        What replay.json holds: whether a value that is not finite was `found`; if so, in which
        micro-step and module, in which loss parts, parameters and gradients; the samples.

    Raises:
        InputError: no such run, no failed step, or its corpus is not there, or what it began from,
            where no checkpoint is from before the step.
    """
    run = RunFolder(path)
    made = Replay(run, corpus)
    failure = made.failure(step)
    chosen = made.settings
    number = int(failure["step"]) if step is None else step
    if not 1 <= number <= chosen.steps:
        raise InputError(f"step={number}: the run has steps 1 to {chosen.steps}")
    now = Shape(chosen.batch_size, chosen.micro_steps, chosen.ranks, chosen.trainer.nodes)
    shape = now._replace(**{name: failure[name] for name in Shape._fields if name in failure})
    precision = str(failure.get("precision") or machine_precision(chosen.trainer))
    report = made.to(number, shape, precision)
    views, bad = report.pop("batch")
    folder = failure_folder(run.path, number)
    folder.mkdir(parents=True, exist_ok=True)
    _draw(views, bad, folder / "replay.png")
    report = plain({"run": run.path.name, **report})
    write_json(folder / "replay.json", report)
    print(_said(report, folder))
    return report


def _said(report: dict[str, Any], folder: Path) -> str:
    head = f"replayed steps {report['start'] + 1} to {report['step']}"
    if not report["found"]:
        lines = [f"{head}: loss and gradient are finite here"]
        if report["world"] > 1:
            lines.append(
                f"  the {report['world']} ranks came one after the other: masked means are those "
                "of each rank, not of all, which can hide a fault at the edge of the range"
            )
    else:
        lines = [
            f"{head}: step {report['step']}, micro-step {report['micro_step']}, rank "
            f"{report['rank']}: the first {report['what']} that is not finite is at "
            f"{report['module']}",
            f"  loss parts: {', '.join(report['parts']) or 'all finite'}",
        ]
        for name in ("parameters", "gradients"):
            found = report[name]
            first = ", ".join(f"{key} ({count})" for key, count in list(found.items())[:3])
            more = f" and {len(found) - 3} more" if len(found) > 3 else ""
            lines.append(f"  {name} not finite: {first or 'none'}{more}")
    for sample in report["samples"]:
        if sample["bad"] or not any(s["bad"] for s in report["samples"]):
            lines.append(
                f"  {sample['key']} at {sample['origin']}: min {sample['min']:.4g}, max "
                f"{sample['max']:.4g}, mean {sample['mean']:.4g}, valid {sample['valid']:.0%}"
            )
    return "\n".join([*lines, f"{folder}: replay.json, replay.png"])


def _draw(views: list[tuple[Batch, int]], bad: list[int], path: Path, most: int = 6) -> None:
    """The crops in three planes, the bad ones first, each in its own grey range."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    shown = [*bad, *(at for at in range(len(views)) if at not in bad)][:most]
    figure, axes = plt.subplots(
        len(shown), 3, figsize=(7.5, 2.6 * len(shown)), squeeze=False, layout="constrained"
    )
    for line, at in zip(axes, shown, strict=True):
        batch, row = views[at]
        volume = batch.image[row, 0].float().cpu().numpy()
        finite = volume[np.isfinite(volume)]
        low, high = np.percentile(finite, [0.5, 99.5]) if finite.size else (0.0, 1.0)
        shades = plt.get_cmap("gray").with_extremes(bad="#b3261e")
        sides = zip(line, planes(volume), aspects(batch.spacing[row].cpu().numpy()), strict=True)
        for axis, picture, aspect in sides:
            axis.imshow(picture, cmap=shades, vmin=low, vmax=high, aspect=aspect)
            axis.set_axis_off()
        line[0].set_title(
            f"{batch.keys[row]}{', not finite' if at in bad else ''}", fontsize=9, loc="left"
        )
        for axis, name in zip(line[1:], PLANES[1:], strict=True):
            axis.set_title(name, fontsize=9)
    with atomic(path) as file:
        figure.savefig(file, format="png", dpi=110)
    plt.close(figure)
