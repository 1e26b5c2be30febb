"""The one training loop: Lightning's trainer, with our order, our checkpoints and our log.

A resumed run starts a fresh trainer on the steps that remain. Lightning's own resumption keeps
the loader state of rank 0 alone and counts prefetched batches as used; here the position follows
from the step, the weights and the optimiser come from our checkpoint, and everything random
derives from (seed, step), so there is nothing else to restore.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal, NamedTuple

import lightning as L
import torch
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from data_prep.errors import CorruptionError, InputError, differences
from data_prep.files import append_line, read_lines
from data_prep.progress import bar
from pretrain.ahead import Ahead
from pretrain.augment import Augment
from pretrain.checksums import check_equal, halves, tensor_sums
from pretrain.collectives import Agreement, world_size
from pretrain.costs import held_gib
from pretrain.events import Events
from pretrain.failures import Fault, Faults, Shape, write_failure
from pretrain.health import CollapseError, Health
from pretrain.loader import CropDataset, collate, make_loader, to_batch, to_device
from pretrain.objective import Batch, Losses, Objective, evaluating
from pretrain.optim import Moments, make_optimizer, rate, with_moments
from pretrain.preemption import Ask, Preempted, Preemption
from pretrain.ranks import Neighbours, Ranks
from pretrain.run_folder import RunFolder
from pretrain.schedule import generator
from pretrain.settings import LoopSettings, TrainerSettings
from pretrain.teacher import check_restored, checksums
from pretrain.tracking import Journal

CHECKPOINT_FORMAT = 1


class Stretch(NamedTuple):
    """Steps that are trained alike, with an optimiser of their own.

    `settings` are those of a training of just these steps: its rate counts from their first.
    """

    steps: range
    settings: LoopSettings


MOST_DAMAGED = 0.01
"""Of the volumes may others replace in a run, over all ranks and starts; more is another corpus."""

DAMAGED = "damaged.jsonl"


class Loop:
    """Trains one objective on one dataset within one run folder."""

    def __init__(
        self,
        settings: LoopSettings,
        dataset: CropDataset,
        run: RunFolder,
        *,
        augment: Augment | None = None,
        draw_previews: Callable[[Objective, Batch, Path], None] | None = None,
        health: Health | None = None,
        loggers: list[Logger] | None = None,
        label: str = "train",
    ) -> None:
        self.settings = settings
        self.dataset = dataset
        self.run = run
        self.augment = augment
        self.draw_previews = draw_previews
        self.health = health
        self.loggers = loggers or []
        self.label = label
        self.step = 0
        self.preemption = Preemption()
        self.start_number = 0
        self.neighbours: Neighbours
        self.norm: Tensor | None = None
        self.faults = Faults(settings.micro_steps)
        self._micro = 0
        self._restored: dict[str, Any] | None = None
        self._skips = dataset is not None and dataset.skip  # a loop without data is measured
        self._damaged: set[str] | None = None
        self._replaced = 0.0
        self._sums: dict[str, Tensor] = {}
        self._count = 0

    # What a training in several stretches changes.

    def stretch(self) -> Stretch:
        """The stretch that the next step belongs to: here all of the training is one."""
        return Stretch(range(self.settings.steps), self.settings)

    def begin(self, objective: Objective) -> None:
        """Prepares the objective for the stretch that the next step belongs to."""

    def look(self) -> dict[str, float | int]:
        """Measures what is due after the step that is done, on rank 0; returns what to log."""
        return {}

    # What an objective asks of its loop.

    @property
    def events(self) -> Events:
        """What became of the run's starts."""
        return Events(self.run.path)

    @property
    def progress(self) -> float:
        """Share of the optimiser steps that are done."""
        return self.step / self.settings.steps

    def micro_step(self) -> int:
        """Micro-steps since the start of the run, of which the next is under way."""
        return self.step * self.settings.micro_steps + self._micro

    def make_optimizer(self, objective: Objective) -> torch.optim.Optimizer:
        """The settings' optimiser over the objective's parameter groups."""
        return make_optimizer(objective, self.settings)

    def to_batch(self, raw: dict[str, Any]) -> Batch:
        """Raw crops on the device to a normalised, augmented batch."""
        if "damage" in raw:
            self._note_damage(raw["damage"], len(raw["key"]))
        return to_batch(raw, self.augment)

    def _note_damage(self, found: Sequence[Sequence[tuple[str, str]]], crops: int) -> None:
        """Names damaged volumes whose place others took, once each in a run, and counts them.

        The file of all ranks and starts is read where a rank meets a volume for the first time.
        What it has met itself it remembers: nodes that append at once may lose a line.
        """
        self._replaced += len(found) * self.dataset.crops.main / crops
        path, rank = self.run.path / DAMAGED, rank_zero_only.rank or 0
        met: dict[str, str] = {}
        for key, problem in (one for sample in found for one in sample):
            met.setdefault(key, problem)
        if self._damaged is not None and met.keys() <= self._damaged:
            return
        lines = {str(line["key"]): line for line in read_lines(path) if "key" in line}
        known = lines.keys() | (self._damaged or set())
        for key in [key for key in met if key not in known]:
            print(f"WARNING: {met[key]}; another volume takes its place", file=sys.stderr)
            line = {"step": self.step, "rank": rank, "key": key, "damage": met[key]}
            append_line(path, line)
            lines[key] = line
        self._damaged = known | met.keys()
        if len(self._damaged) > max(1.0, MOST_DAMAGED * len(self.dataset.samples)):
            raise CorruptionError(
                [
                    *[str(line["damage"]) for line in list(lines.values())[:20]],
                    f"{len(self._damaged)} volumes in all, more than damaged=skip bears; they are "
                    f"listed in {path}, which is to be removed when the shards are mended",
                ]
            )

    def reseed(self, batch_idx: int, rank: int | None = None) -> None:
        """What still draws from torch's generator (drop path, dropout) follows the step alone."""
        self._micro = batch_idx % self.settings.micro_steps
        rank = (rank_zero_only.rank or 0) if rank is None else rank
        key = ("step", self.settings.seed, self.step, self._micro, rank)
        torch.manual_seed(int(generator(*key).integers(2**62)))

    def set_rate(self, optimizer: torch.optim.Optimizer) -> None:
        """Learning rate and weight decay are functions of the step, so they need no state."""
        steps, chosen = self.stretch()
        done = self.step - steps.start
        lr = chosen.lr * rate(done, chosen)
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
            if group["weight_decay"]:  # others are spared
                group["weight_decay"] = chosen.decay(done)

    def clip(self, objective: Objective) -> None:
        """Clips the gradient's norm, if a limit is set, and remembers it for the log.

        What the objective holds still loses its gradient, so that neither decay nor moments of the
        optimiser touch it. Where the objective names parts, each is clipped by itself.
        """
        for parameter in objective.held(self.progress):
            parameter.grad = None
        limit = math.inf if self.settings.clip is None else self.settings.clip
        parts = objective.clip_parts()
        norms = [torch.nn.utils.clip_grad_norm_(part, limit) for part in parts]
        self.norm = norms[0] if len(norms) == 1 else torch.stack(norms).norm()
        self.faults.see("gradient", self.norm, self.step, self.settings.micro_steps - 1)

    def observe(self, losses: Losses) -> None:
        """Sums the losses on the device; they are fetched only when a row is logged."""
        self.faults.see("loss", losses.loss, self.step, self._micro)
        for name, value in {"loss": losses.loss, **losses.parts}.items():
            self._sums[name] = self._sums.get(name, torch.zeros_like(value)) + value.detach()
        if self._skips:
            share = self._replaced + self._sums.get("replaced", torch.zeros_like(losses.loss))
            self._sums["replaced"], self._replaced = share.detach(), 0.0
        self._count += 1

    def observed(
        self, gather: Callable[[Tensor], Tensor], objective: Objective
    ) -> tuple[dict[str, float], Fault | None]:
        """Mean losses since the last call, over all ranks, and the last gradient's `grad_norm`.

        The one place where the host waits for the device, once; the first fault and the sums of
        what ranks share come along.

        Args:
            gather: puts a tensor of all ranks side by side.
            objective: whose weights must be the same on all ranks.

        Raises:
            RuntimeError: they are not.
        """
        if not self._sums:
            return {}, None
        means = torch.stack([total.float() for total in self._sums.values()]) / self._count
        means = means if means.device.type == "mps" else means.double()
        norm = means.new_full((), math.nan) if self.norm is None else self.norm.to(means)
        sums = tensor_sums(objective) if world_size() > 1 else {}
        own = torch.cat([means, norm[None], halves(sums, means), self.faults.positions(means)])
        table: list[list[float]] = gather(own).reshape(-1, len(own)).tolist()
        values = [sum(column) / len(table) for column in zip(*table, strict=True)]
        found = dict(zip([*self._sums, "grad_norm"], values, strict=False))
        fault = self.faults.read([row[-2:] for row in table])
        if fault is None:
            check_equal(list(sums), [row[len(found) : -2] for row in table], self.step)
        self._sums, self._count = {}, 0
        return found, fault

    def check_ranks(self, gather: Callable[[Tensor], Tensor], objective: Objective) -> None:
        """Looks whether a training begins with the same weights on all ranks; waits for them.

        Raises:
            RuntimeError: it does not.
        """
        if world_size() > 1:
            sums = tensor_sums(objective)
            own = halves(sums, torch.zeros((), dtype=torch.float64, device=objective.device))
            check_equal(list(sums), gather(own).reshape(-1, len(own)).tolist(), self.step)

    def repeated(self) -> int:
        """Samples of the last step whose volume came before in its batch, over all ranks."""
        size, schedule = self.settings.batch_size, self.dataset.schedule
        first = (self.step - 1) * size
        return size - len({schedule.sample(p)[2] for p in range(first, first + size)})

    # The run.

    def fit(self, objective: Objective, moments: Moments | None = None) -> None:
        """Trains from the newest checkpoint of the run, or from the start, to the last step.

        Raises:
            InputError: the checkpoint belongs to another corpus, seed or batch size.
            FloatingPointError: the loss or the gradient is no longer finite; `failures/` in the
                run folder says where.
            CollapseError: the features collapsed and `health.stop` is set.
            Preempted: a signal came; the state of the step that it names is saved.
        """
        objective.loop = self
        state, self._restored = self._restored or self.restore(), None
        optimizer = None
        if state is not None:
            objective.load_state_dict(state["objective"])
            check_restored(objective, state.get("teachers", {}), str(self.run.path))
            self.step = int(state["step"])
            optimizer = state["optimizer"]
            del state  # or each rank keeps a copy of the model for as long as it trains
        elif moments:
            optimizer = with_moments(self.make_optimizer(objective), objective, moments)
            moments.clear()  # for the same reason, whoever holds them
        if self.step >= self.settings.steps:
            return
        if self.step and self.step == self.stretch().steps.start:
            optimizer = None  # of the stretch before, which ended with this checkpoint
        machine = self.settings.trainer
        objective.encoder.set_grad_checkpointing(machine.checkpointing)
        if machine.compile:
            compile_parts(objective)
        main = rank_zero_only.rank in (None, 0)
        self.start_number = len(self.events.starts()) + 1
        told = self.events.start(self.step, self.settings.ranks) if main else nullcontext()
        together = Neighbours(self.run.path, self.settings.ranks, machine.wait_minutes)
        with self.preemption, told, together as self.neighbours:
            while self.step < self.settings.steps:
                self.begin(objective)
                # One of its own: DDP learns once, at its start, which weights have gradients.
                # And nothing here keeps what the optimiser has taken over: two models on the host.
                trainer, optimizer = self._trainer(optimizer), None
                with _interrupts_as_such():
                    trainer.fit(objective, datamodule=_Steps(self))
            if main:
                self.events.write("finished", self.step)

    def restore(self) -> dict[str, Any] | None:
        """The newest checkpoint, or None; nothing is written.

        Raises:
            InputError: it belongs to another corpus, seed or batch size, or is damaged.
        """
        state = self.run.checkpoints.load()
        if state is not None:
            self._check_state(state)
        return state

    def restored_step(self) -> int:
        """The step of that checkpoint, which is kept for `fit`; 0 if there is none.

        Raises as `restore` does.
        """
        self._restored = self.restore()
        return 0 if self._restored is None else int(self._restored["step"])

    def _check_state(self, state: dict[str, Any]) -> None:
        now = {"format": CHECKPOINT_FORMAT, **self._schedule_state(int(state["step"]))}
        different = differences({"format": state["format"], **state["schedule"]}, now)
        if different:
            raise InputError(
                f"{self.run.path}: its checkpoint is of another corpus, seed, batch size or order "
                f"({'; '.join(different)}); restore what was changed, or start another run=NAME"
            )

    def _schedule_state(self, step: int) -> dict[str, Any]:
        position = step * self.settings.batch_size
        return self.dataset.schedule.state(position, self.dataset.corpus.index_hash)

    def state(self, objective: Objective, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """All that a run needs to go on: the same on every rank, plain types and tensors only."""
        return {
            "format": CHECKPOINT_FORMAT,
            "step": self.step,
            "objective": objective.state_dict(),
            "teachers": {name: int(total) for name, total in checksums(objective).items()},
            "optimizer": optimizer.state_dict(),
            "schedule": self._schedule_state(self.step),
        }

    def _trainer(self, optimizer_state: dict[str, Any] | None) -> L.Trainer:
        logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
        warnings.filterwarnings("ignore", module="lightning")
        chosen = self.settings
        machine = chosen.trainer
        # Lightning's own requeue saves inside the signal handler and is not safe; launch owns it.
        # Processes that torchrun started, also within a job, are not SLURM's tasks.
        by_slurm = SLURMEnvironment.detect() and not TorchElasticEnvironment.detect()
        slurm = [SLURMEnvironment(auto_requeue=False)] if by_slurm else None
        trainer = L.Trainer(
            accelerator=machine.accelerator,
            devices=machine.devices,
            num_nodes=machine.nodes,
            strategy=Ranks(self.neighbours, machine.threads) if chosen.ranks > 1 else "auto",
            precision=machine_precision(machine),
            max_epochs=1,
            accumulate_grad_batches=chosen.micro_steps,
            callbacks=[_Watch(self, optimizer_state)],
            plugins=slurm,
            use_distributed_sampler=False,
            logger=False,  # ours log from rank 0, where a row is written
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=self.run.path,
        )
        # On SIGTERM it would end with code 0 after a micro-batch, nothing saved, and ask all ranks
        # within the handler; it would ask rank 0 for a signal before each micro-batch, and have the
        # host wait for the device to hear the answer. Ours (`Preemption`) are agreed on once a
        # step, beside the device.
        trainer._signal_connector.register_signal_handlers = _nothing
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = _nothing
        return trainer


def _nothing() -> None:
    """Asks no rank for anything, and hears no signal."""


@contextmanager
def _interrupts_as_such() -> Iterator[None]:
    """Lightning makes an end with code 1 of Ctrl-C, and has the process hear no further one."""
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as end:
        if not isinstance(end.__context__, KeyboardInterrupt):
            raise
        signal.signal(signal.SIGINT, before)
        raise KeyboardInterrupt from end


def use_threads(machine: TrainerSettings) -> None:
    """Lets torch compute in as many threads as are wanted, where the settings say how many."""
    if machine.threads is not None:
        torch.set_num_threads(machine.threads)


def machine_precision(machine: TrainerSettings) -> Literal["32-true", "bf16-mixed"]:
    """The precision that `auto` comes to on this machine."""
    if machine.precision != "auto":
        return machine.precision
    # What is emulated (V100, T4) is slower than float32.
    if machine.accelerator == "cpu" or not torch.cuda.is_available():
        return "32-true"
    native = torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16-mixed" if native else "32-true"


def autocast_of(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """What the trainer computes a step in, for whoever does so without it."""
    if precision == "bf16-mixed":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext()


def check_machine(machine: TrainerSettings) -> None:
    """Refuses GPUs and processes that are not there, before anything is started.

    Raises:
        InputError: fewer GPUs than a process of this node is to use, or torchrun started another
            number of processes than the settings say.
    """
    problems = []
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    wanted = machine.accelerator in ("gpu", "cuda") or (machine.accelerator == "auto" and there)
    if wanted and there < machine.devices:
        problems.append(
            f"trainer.accelerator={machine.accelerator}, trainer.devices={machine.devices}: "
            f"this machine has {there} GPUs; choose another trainer=, such as trainer=cpu or "
            "trainer=auto, and for a recipe on two cores its twin experiment=NAME_small"
        )
    if TorchElasticEnvironment.detect():
        ranks, here = int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_WORLD_SIZE"])
        if (machine.devices, machine.devices * machine.nodes) != (here, ranks):
            problems.append(
                f"trainer.devices={machine.devices}, trainer.nodes={machine.nodes}: torchrun "
                f"started {here} processes on this node, {ranks} in all; give "
                f"trainer.devices={here} trainer.nodes={max(1, ranks // here)}, or another "
                "--nproc-per-node or --nnodes"
            )
    if problems:
        raise InputError(problems)


def compile_parts(objective: Objective) -> None:
    """Compiles blocks and stages in place, one by one: names of parameters stay as they are.

    Whole steps would compile for minutes; blocks are alike and compile once. What draws (drop
    path) must go on drawing from torch's generator, which is reseeded for each micro-step.
    """
    import torch._dynamo.config as dynamo
    import torch._inductor.config as inductor

    inductor.fallback_random = True
    # Blocks differ in their rate of drop path: each is one more variant of the same code. Taken as
    # a symbol, the rate is no part of the key of torch's cache of compiled graphs, which then gives
    # one block the rate of another (torch 2.14).
    dynamo.specialize_float = True
    dynamo.recompile_limit = 256
    # Blocks of one class meet a few shapes (visible patches, all of them, hidden ones), the same
    # in each step. A program for all shapes is slower, and torch 2.11's is wrong on GPUs where a
    # sum over a symbolic number of rows is split.
    for part in objective.compile_parts():
        part.compile(dynamic=False)


class _Steps(L.LightningDataModule):
    """The steps that remain, as a loader for this rank."""

    def __init__(self, loop: Loop) -> None:
        super().__init__()
        self.loop = loop

    def train_dataloader(self) -> Any:
        trainer, chosen = self.trainer, self.loop.settings
        assert trainer is not None
        return make_loader(
            self.loop.dataset,
            batch_size=chosen.batch_size,
            first_step=self.loop.step,
            last_step=self.loop.stretch().steps.stop,
            accumulate=chosen.micro_steps,
            workers=chosen.trainer.workers,
            rank=trainer.global_rank,
            world=trainer.world_size,
            nodes=trainer.num_nodes,
            # Before the other ranks give up on this one, which knows better why.
            timeout=30 * chosen.trainer.wait_minutes,
        )


class _Watch(L.Callback):
    """After each optimiser step: log, picture, checkpoint, progress, as each is due."""

    def __init__(self, loop: Loop, optimizer_state: dict[str, Any] | None) -> None:
        self.loop = loop
        self.optimizer_state = optimizer_state
        self.waited = 0.0
        self.repeats = False
        self.bar: Any = None
        self.ahead: Ahead | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        first = trainer.strategy.broadcast(self.loop.step)
        if first != self.loop.step:
            raise RuntimeError(
                f"rank 0 resumes at step {first}, rank {trainer.global_rank} at {self.loop.step}: "
                "the run folder does not look the same from every node; start again"
            )
        if self.optimizer_state is not None:
            trainer.optimizers[0].load_state_dict(self.optimizer_state)
            self.optimizer_state = None
        assert isinstance(pl_module, Objective)
        self.loop.check_ranks(trainer.strategy.all_gather, pl_module)
        self.main = trainer.is_global_zero
        self.agreement = Agreement(self.loop.settings.trainer.wait_minutes)
        self.began = self.rowed = self.ended = self.saved = time.perf_counter()
        self.logged = self.loop.step
        if self.main:
            self.journal = Journal(self.loop.run.path, self.loop.loggers, self.loop.step)
            self.bar = bar(
                total=self.loop.settings.steps,
                initial=self.loop.step,
                desc=self.loop.label,
                unit="step",
            )
            if self.loop.step == 0:
                self._preview(pl_module)
            if self.loop.health is not None and self.loop.health.begin(self.loop.step):
                self._look(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.waited += time.perf_counter() - self.ended
        if self.ahead is None and trainer.local_rank == 0:
            self.ahead = self._begin_ahead(trainer)  # now that workers are there: no fork follows
        self.loop.neighbours.beat(self.loop.step)

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        chosen, step = self.loop.settings, self.loop.step
        if (batch_idx + 1) % chosen.micro_steps == 0:
            last = step == chosen.steps
            ask = Ask.NOTHING if last else Ask(self.agreement.ask(self._wish()))
            logging_due = step % chosen.log_every == 0 or last or step == 1
            saving_due = step % chosen.save_every == 0 or last or ask > Ask.NOTHING
            if logging_due or saving_due:
                self._log(trainer, pl_module)
            # Before the checkpoint: a run that ends in between looks again.
            found = self.loop.look() if self.main else {}
            if found:
                self.journal.tell(found, step)
            if self.main and saving_due:
                self._save(trainer, pl_module)
            if self.main and chosen.preview_every and (step % chosen.preview_every == 0 or last):
                self._preview(pl_module)
            self._watch(trainer, pl_module, logged=logging_due or saving_due, last=last)
            if self.main:
                self.bar.update()
            if last or ask >= Ask.STOP:
                trainer.strategy.barrier()  # none goes on, or ends, before the state is whole
            if ask >= Ask.STOP:
                raise Preempted(ask, step)
        self.ended = time.perf_counter()

    def _begin_ahead(self, trainer: L.Trainer) -> Ahead:
        loop, chosen = self.loop, self.loop.settings
        return Ahead(
            loop.dataset,
            loop.micro_step,
            last=loop.stretch().steps.stop * chosen.micro_steps,
            batch_size=chosen.batch_size // chosen.micro_steps,
            node=trainer.node_rank,
            nodes=trainer.num_nodes,
            local=trainer.world_size // trainer.num_nodes,
        )

    def _wish(self) -> Ask:
        """What this rank wants done: rank 0 has the clock, and each hears signals."""
        waited = (time.perf_counter() - self.saved) / 60
        due = self.main and waited >= self.loop.settings.save_minutes
        if due:  # the answer of all ranks comes a step later, and must not be asked for twice
            self.saved = time.perf_counter()
        return max(self.loop.preemption.asked, Ask.SAVE if due else Ask.NOTHING)

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        if self.ahead is not None:
            self.ahead.end()
        if self.bar is not None:  # or it prints its last state after the error's own words
            self.bar.close()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.ahead is not None:
            self.ahead.end()
        if self.main:
            self.bar.close()
            if self.loop.health is not None and self.loop.health.looks:
                print(self.loop.health.summary(), file=sys.stderr)
            self.journal.close()

    def _watch(
        self, trainer: L.Trainer, objective: L.LightningModule, *, logged: bool, last: bool
    ) -> None:
        """Looks at the features where that is due; rank 0 alone, the others wait in their step."""
        health, step = self.loop.health, self.loop.step
        if health is None:
            return
        if self.main and health.due(step, logged=logged, last=last):
            self._look(trainer, objective)
        # All ranks stop together, where they meet anyway.
        if health.settings.stop and logged and trainer.strategy.broadcast(health.collapsed):
            if self.main:
                self._save(trainer, objective)
            trainer.strategy.barrier()
            raise CollapseError(
                f"step {step} of {self.loop.run.path.name}: the features have collapsed and "
                "health.stop is set; the state is saved: look at health.csv, or go on with "
                "health.stop=false"
            )

    def _look(self, trainer: L.Trainer, objective: L.LightningModule) -> None:
        health = self.loop.health
        assert isinstance(objective, Objective) and health is not None
        context = trainer.precision_plugin.forward_context
        row = health.look(objective.released, self.loop.step, context)
        shown = {f"health/{name}": value for name, value in row.items() if name != "step"}
        self.journal.tell(shown, self.loop.step)

    def _save(self, trainer: L.Trainer, objective: L.LightningModule) -> None:
        assert isinstance(objective, Objective)
        self.loop.run.check_lease()  # again: looks take their time, and saving deletes
        began, step = time.perf_counter(), self.loop.step
        self.journal.save()
        state = self.loop.state(objective, trainer.optimizers[0])
        path = self.loop.run.checkpoints.save(step, state)
        self.saved = time.perf_counter()
        self.loop.events.saved(step, self.saved - began, path.stat().st_size)

    def _log(self, trainer: L.Trainer, objective: L.LightningModule) -> None:
        loop, now = self.loop, time.perf_counter()
        assert isinstance(objective, Objective)
        means, fault = loop.observed(trainer.strategy.all_gather, objective)
        if not means:
            return
        norm = means.pop("grad_norm")
        if fault is not None:
            if self.main:
                self._describe(fault, trainer, objective, {**means, "grad_norm": norm})
            trainer.strategy.barrier()  # a rank that ends first may take the writer with it
            at = f"step {fault.step}"
            if fault.rank is not None:
                at += f", micro-step {fault.micro_step}, rank {fault.rank}"
            raise FloatingPointError(
                f"the {fault.what} of {at} is not finite (found at step {loop.step}: loss "
                f"{means['loss']}, gradient's norm {norm}); its samples are named in "
                f"{loop.run.path.name}/failures, the last checkpoint is from before: try a lower "
                "lr, a longer warmup or precision=32-true"
            )
        span, steps = now - self.rowed, max(1, loop.step - self.logged)
        row: dict[str, float | int] = {
            "step": loop.step,
            "samples": loop.step * loop.settings.batch_size,
            **means,
            "lr": trainer.optimizers[0].param_groups[0]["lr"],
            "grad_norm": norm,
            "seconds_per_step": span / steps,
            "samples_per_second": steps * loop.settings.batch_size / span if span else 0.0,
            "data_wait": self.waited / span if span else 0.0,
            "memory_gib": held_gib(objective.device),
            "start": loop.start_number,
        }
        self.rowed, self.logged, self.waited = now, loop.step, 0.0
        if objective.compares:
            row["repeated"] = loop.repeated()
        if self.main:
            self.loop.run.check_lease()
            self._judge(objective, row)
            self.journal.row(row)
            self.bar.set_postfix_str(
                f"loss {means['loss']:.4f}, {row['samples_per_second']:.3g} samples/s, data-wait "
                f"{row['data_wait']:.0%}, {row['memory_gib']:.1f} GiB",
                refresh=False,
            )

    def _judge(self, objective: Objective, row: dict[str, float | int]) -> None:
        """Tells what a logged row says is wrong."""
        health, chosen = self.loop.health, self.loop.settings
        if row.get("repeated") and not self.repeats:
            self.repeats = True
            print(
                f"WARNING: step {self.loop.step} of {self.loop.run.path.name}: {row['repeated']} "
                f"of {chosen.batch_size} samples are of a volume that is in the batch already, and "
                "the objective compares samples: take a batch_size well below the number of "
                "volumes, or more volumes (said once; see `repeated` in metrics.csv)",
                file=sys.stderr,
            )
        if health is not None and self.loop.step > chosen.warmup:
            health.heed(objective.alarm({n: float(v) for n, v in row.items()}), self.loop.step)

    def _describe(
        self,
        fault: Fault,
        trainer: L.Trainer,
        objective: L.LightningModule,
        means: dict[str, float],
    ) -> None:
        chosen = self.loop.settings
        write_failure(
            self.loop.run.path,
            fault,
            dataset=self.loop.dataset,
            shape=Shape(
                chosen.batch_size, chosen.micro_steps, trainer.world_size, trainer.num_nodes
            ),
            checkpoints=self.loop.run.checkpoints,
            objective=objective,
            facts={
                "seed": chosen.seed,
                "precision": str(trainer.precision),
                "found_at_step": self.loop.step,
                "means_since_last_row": means,
            },
        )

    def _preview(self, objective: L.LightningModule) -> None:
        loop = self.loop
        if loop.draw_previews is None or not loop.settings.preview_every:
            return
        assert isinstance(objective, Objective)
        began = time.perf_counter()
        raw = collate(loop.dataset.pictured(3, loop.dataset.crops))
        moved = to_device(raw, objective.device)
        folder = loop.run.path / "previews"
        folder.mkdir(exist_ok=True)
        with evaluating(objective):
            picture = folder / f"step-{loop.step:08d}.png"
            loop.draw_previews(objective, to_batch(moved), picture)
        loop.events.pictured(loop.step, time.perf_counter() - began)
