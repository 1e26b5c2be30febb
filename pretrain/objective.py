"""The contract between an objective and the loop that trains it.

An objective owns its encoder, its heads and its loss; it knows nothing of paths, loggers or
ranks. The loop moves crops to the device, calls `forward` on each batch and `after_step` once per
optimiser step. A segmentation task is an objective too, so finetuning needs no second loop.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import lightning as L
import torch
from torch import Tensor, nn

from data_prep.errors import InputError
from pretrain.backbones.backbone import Backbone
from pretrain.crops import ONE, Crops

if TYPE_CHECKING:
    from pretrain.loop import Loop

INHERITED = 0.95
"""Share of an encoder's parameters that other weights must have to begin from them."""


@dataclass
class Batch:
    """Crops on the device, in normalised units.

    B is samples x the crops of a sample, sample by sample; each crop has its own seed, and a
    sample's key stands once for each of its crops. Shapes: image [B, C, D, H, W]
    float32; valid [B, 1, D, H, W] bool, False where a voxel is padding or anonymised and must
    carry no loss; spacing [B, 3] in mm; seeds [B] int64, from which every random draw of the
    objective derives; label [B, D, H, W] int64 if there is one; box [B, 2, 3] float32, the corners
    of each crop in voxels of its volume's grid, the second beyond the last voxel, before the crop
    is mirrored or turned; modality, of each channel of each crop, CT or MR. Crops of other shapes
    are batches of their own (`pretrain.crops`).
    """

    image: Tensor
    valid: Tensor
    spacing: Tensor
    seeds: Tensor
    keys: list[str] = field(default_factory=list)
    label: Tensor | None = None
    box: Tensor | None = None
    others: dict[str, Batch] = field(default_factory=dict)
    modality: list[tuple[str, ...]] = field(default_factory=list)

    def of(self, samples: Sequence[int], among: int) -> Batch:
        """The crops of some of the batch's samples, in all groups; it has `among` of them."""
        crops = len(self.image) // among
        rows = [sample * crops + n for sample in samples for n in range(crops)]
        found = {n: value[rows] for n, value in vars(self).items() if isinstance(value, Tensor)}
        others = {name: group.of(samples, among) for name, group in self.others.items()}
        keys = [self.keys[row] for row in rows]
        modality = [self.modality[row] for row in rows] if self.modality else []
        return replace(self, keys=keys, others=others, modality=modality, **found)


class Losses(NamedTuple):
    """The loss to minimise and its named parts, for the log."""

    loss: Tensor
    parts: dict[str, Tensor]


class Objective(L.LightningModule):
    """Base of every pretraining objective and of the segmentation task.

    Subclasses set `encoder` and implement `forward`; the rest of this class is what Lightning
    asks for, written once.
    """

    encoder: Backbone
    loop: Loop

    crops: Crops = ONE
    """Crops of one volume that make a sample; a batch holds them one after the other."""

    batch_multiple: int = 1
    """Samples of a rank's micro-batch come in multiples of this: 2 if they are taken in pairs."""

    compares: bool = False
    """Whether samples of a batch are compared with each other; none should then come twice."""

    mixes: bool = False
    """Whether a sample's loss depends on the others of its micro-batch in another way: statistics
    or scores of all of them together."""

    transfers: Literal["encoder", "network"] = "encoder"
    """What finetuning takes over: the encoder, or the decoder but for its head as well."""

    decoder_blocks: int | None = None
    """Of a U-Net's decoder, how many blocks from the coarsest are trained; None: all of it."""

    def forward(self, batch: Batch, progress: float) -> Losses:
        """Computes the loss of one batch; `progress` runs from 0 to 1 over the training."""
        raise NotImplementedError

    def after_step(self, progress: float) -> None:
        """Runs once after each optimiser step: teachers move here."""

    @property
    def released(self) -> Backbone:
        """The encoder that is watched and exported: a teacher's, where there is one."""
        return self.encoder

    def held(self, progress: float) -> Iterable[nn.Parameter]:
        """Parameters that the next step must leave as they are."""
        return ()

    def clip_parts(self) -> list[list[nn.Parameter]]:
        """Groups of parameters whose gradients are clipped to a norm, each group by itself."""
        return [list(self.parameters())]

    def alarm(self, means: Mapping[str, float]) -> str:
        """What is wrong by the losses of a logged row, after the warm-up; empty if nothing is."""
        return ""

    def inherit(self, state: Mapping[str, Tensor], least: float = INHERITED) -> list[str]:
        """Takes over weights of another run or release, as far as they fit.

        Args:
            state: by name, those of a release beginning with `encoder.`; a run has all of its
                objective's. Tensors without values (meta) show what would fit.
            least: share of the encoder's parameters that must come from them.

        Returns:
            The names in this objective's state of what was taken.

        Raises:
            InputError: less than `least` of the encoder's parameters have the name and shape of one
                in `state`; the message lists the others.
        """
        own = self.state_dict()
        taken = {n: state[n] for n, v in own.items() if n in state and state[n].shape == v.shape}
        sizes = {f"encoder.{n}": p.numel() for n, p in self.encoder.named_parameters()}
        share = sum(n for name, n in sizes.items() if name in taken) / sum(sizes.values())
        if share < least:
            left = [
                f"{name} {list(own[name].shape)}"
                + (f" (there {list(state[name].shape)})" if name in state else "")
                for name in sizes
                if name not in taken
            ]
            shown = [*left[:10], *(["..."] if len(left) > 10 else [])]
            raise InputError(
                f"init: has {share:.0%} of this encoder's parameters, {least:.0%} are needed; give "
                "the backbone that it was trained with, or init_covers=... if so little is meant; "
                f"not there: {'; '.join(shown)}"
            )
        self.load_state_dict(taken, strict=False)
        return list(taken)

    def compile_parts(self) -> list[nn.Module]:
        """Returns the modules that are compiled one by one: the encoder's and the decoder's."""
        parts: list[nn.Module] = []
        for child in self.children():
            own = getattr(child, "compile_parts", None)
            if callable(own):
                parts += own()
            elif isinstance(child, nn.ModuleList):
                parts += list(child)
            elif any(True for _ in child.children()):
                parts.append(child)
        return parts

    def preview(self, batch: Batch) -> dict[str, Tensor]:
        """Returns named volumes [B, C, D, H, W] worth looking at; empty if there are none."""
        return {}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The loop's optimiser over this module's parameters."""
        return self.loop.make_optimizer(self)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Batch:
        """Raw crops to a batch, on the device."""
        return self.loop.to_batch(batch)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """One micro-step; everything random in it derives from where it is in the run."""
        self.loop.reseed(batch_idx)
        losses = self(batch, self.loop.progress)
        self.loop.observe(losses)
        return losses.loss

    def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
        """Clips by norm and keeps the norm for the log."""
        self.loop.clip(self)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Steps, then lets teachers move: once per optimiser step, never per micro-batch."""
        self.loop.set_rate(self.optimizers(use_pl_optimizer=False))
        super().optimizer_step(*args, **kwargs)
        self.loop.step += 1
        self.after_step(self.loop.progress)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards each part is in the mode that it was in."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    # Each of its shapes would be compiled for a look now and then.
    compiler = torch.compiler.set_stance("force_eager") if _compiles() else nullcontext()
    try:
        with compiler, torch.no_grad():
            yield
    finally:
        for part, training in modes:
            part.training = training


def _compiles() -> bool:
    """Whether anything here is compiled: asking the compiler imports it."""
    return "torch._dynamo" in sys.modules
