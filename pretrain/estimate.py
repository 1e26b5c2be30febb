"""What a training step costs, told without memory, arithmetic or the device itself.

The step runs on fake tensors, which have shapes, types and storages but no values: every operation
that autograd, autocast, checkpointing and the optimiser would issue is issued, its floating-point
operations are counted and its storages followed from birth to death.

What the numbers hold: matrix products, convolutions and attention, two operations per
multiply-add (no elementwise work); weights, gradients, optimiser state, DDP's buckets, the batch,
and what lives between operations. What they do not hold: a kernel's own workspace (cuDNN's for a
convolution can be as large as its input), the allocator's fragmentation and rounding, the CUDA
context (about 0.5 GB) and NCCL's buffers. See docs/gpu.md for how far this is from a real device.

There need be no GPU to ask about one. Fake tensors are on the CPU, whose fused attention keeps
what flash and memory-efficient attention keep; where CUDA's rules differ (autocast runs norms,
softmax and losses in float32) they are followed by `device="cuda"`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from torch.utils.weak import WeakIdKeyDictionary

from pretrain.loop import Loop
from pretrain.noise import raw_batch
from pretrain.objective import Objective
from pretrain.places import Size
from pretrain.settings import LoopSettings, PretrainSettings
from pretrain.train import build_objective

Device = Literal["cpu", "cuda"]
Precision = Literal["float32", "bf16"]

GIB = 2**30


@dataclass(frozen=True)
class Memory:
    """Bytes on one device while it trains with micro-batches, and how.

    `activations` is what the forward pass leaves for the backward pass, the batch included. The
    `peak` may be higher than the sum, in the backward pass, or when the optimiser steps.
    """

    precision: Precision
    checkpointing: bool
    weights: int
    gradients: int
    optimiser: int
    buckets: int
    activations: int
    peak: int


@dataclass(frozen=True)
class Estimate:
    """What a pretraining costs, per sample, per optimiser step and per device.

    Attributes:
        parameters: of the encoder.
        other_parameters: of the rest of the objective: decoder, heads, teachers.
        micro_batch: samples that a device takes at once.
        crops: of each sample, those of each size: how many, and their voxels along D, H, W.
        voxels: of all crops of a sample.
        tokens: cells of the encoder's grids for them; None if its maps form a pyramid.
        flops_per_sample: forward and backward pass, nothing computed twice.
        flops_per_step: of all samples of an optimiser step, over all devices.
        memory: for each precision, without and with gradient checkpointing.
    """

    parameters: int
    other_parameters: int
    micro_batch: int
    crops: tuple[tuple[int, Size], ...]
    voxels: int
    tokens: int | None
    flops_per_sample: int
    flops_per_step: int
    device: Device
    memory: tuple[Memory, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain types for JSON."""
        return asdict(self)

    def text(self) -> str:
        """A few lines to read."""
        sizes = " and ".join(f"{n} of {'x'.join(map(str, size))}" for n, size in self.crops)
        size = f"{self.voxels:,} voxels" + (f", {self.tokens:,} tokens" if self.tokens else "")
        lines = [
            f"parameters   {self.parameters / 1e6:.2f} M in the encoder, "
            f"{self.other_parameters / 1e6:.2f} M beside it",
            f"crops        {sizes}: {size} a sample, {self.micro_batch} samples at once",
            f"FLOP         {self.flops_per_sample / 1e9:,.1f} G a sample, "
            f"{self.flops_per_step / 1e12:,.2f} T an optimiser step",
            f"memory ({self.device}, estimated, GiB)  weights  gradients  optimiser  activations"
            "    peak",
        ]
        for one in self.memory:
            name = f"  {one.precision}{', checkpointing' if one.checkpointing else ''}"
            parts = (one.weights, one.gradients + one.buckets, one.optimiser, one.activations)
            numbers = [f"{n / GIB:.2f}" for n in (*parts, one.peak)]
            widths = (9, 11, 11, 13, 8)
            lines.append(
                f"{name:<32}" + "".join(f"{n:>{w}}" for n, w in zip(numbers, widths, strict=True))
            )
        return "\n".join(lines)


def estimate(
    settings: PretrainSettings,
    channels: int = 1,
    device: Device = "cuda",
    precisions: tuple[Precision, ...] = ("float32", "bf16"),
    checkpointings: tuple[bool, ...] = (False, True),
) -> Estimate:
    """Costs of a pretraining on `device`, which need not be there, in each of the ways asked for.

    Raises:
        InputError: backbone, objective and crop do not fit together.
    """
    with torch.device("meta"):  # where initialisation may ask for no values
        objective = build_objective(settings, channels)
    with FakeTensorMode():
        objective._apply(lambda t: torch.empty(t.shape, dtype=t.dtype))
        samples = settings.micro_batch
        flops = _flops(settings, objective, channels, samples) // samples
        memory = []
        for precision in precisions:
            for checkpointing in checkpointings:
                objective.encoder.set_grad_checkpointing(checkpointing)
                memory.append(_memory(settings, objective, channels, device, precision))
    encoder = parameters(objective.encoder)
    groups = objective.crops.groups(settings.crop_size)
    cells = sum(g.crops * math.prod(objective.encoder.grids(g.size)[-1]) for g in groups)
    return Estimate(
        parameters=encoder,
        other_parameters=parameters(objective) - encoder,
        micro_batch=samples,
        crops=tuple((group.crops, group.size) for group in groups),
        voxels=sum(group.crops * math.prod(group.size) for group in groups),
        tokens=cells if len(set(objective.encoder.strides)) == 1 else None,
        flops_per_sample=flops,
        flops_per_step=flops * settings.batch_size,
        device=device,
        memory=tuple(memory),
    )


def parameters(module: torch.nn.Module) -> int:
    """Number of weights."""
    return sum(p.numel() for p in module.parameters())


def checkpoint_bytes(objective: torch.nn.Module, optimizer: str) -> int:
    """Size of a training state: weights and buffers, and the optimiser's moments.

    Args:
        objective: which may be on the meta device.
        optimizer: one of `LoopSettings.optimizer`.
    """
    moments = 1 if optimizer == "sgd" else 2
    trained = sum(p.numel() * p.element_size() for p in objective.parameters() if p.requires_grad)
    weights = sum(t.numel() * t.element_size() for t in objective.state_dict().values())
    return weights + moments * trained


def bare_loop(settings: LoopSettings, objective: Objective) -> Loop:
    """A loop without data and run folder, for what an objective asks of its loop in a step."""
    loop = Loop(settings, cast(Any, None), cast(Any, None))
    objective.loop = loop
    return loop


def _flops(settings: PretrainSettings, objective: Objective, channels: int, samples: int) -> int:
    """Of the forward and backward pass of one micro-batch, nothing computed twice."""
    loop = bare_loop(settings, objective)
    raw = raw_batch(settings, channels, samples, objective.crops)
    found = counted_flops(lambda: objective(loop.to_batch(raw), 0.5).loss.backward())
    objective.zero_grad()
    return found


def counted_flops(work: Callable[[], Any]) -> int:
    """Floating-point operations of matrix products, convolutions and attention in `work`.

    The backward pass of fused attention computes its scores again, which is counted.
    """
    with FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION) as counter:
        work()
    return counter.get_total_flops()


def _attention_flops(*args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return sdpa_flop_count(*args[:3])


def _attention_backward_flops(*args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return sdpa_backward_flop_count(*args[:4])


# torch counts the fused attention of GPUs alone.
_CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}


def _memory(
    settings: PretrainSettings,
    objective: Objective,
    channels: int,
    device: Device,
    precision: Precision,
) -> Memory:
    """One optimiser step in the steady state: its state is there, gradients are not yet."""
    loop = bare_loop(settings, objective)
    trained = [p for p in objective.parameters() if p.requires_grad]
    rules = _CudaAutocast() if device == "cuda" else contextlib.nullcontext()
    with StorageCounter() as storages, rules:
        storages.count([*objective.parameters(), *objective.buffers()])
        weights = storages.live

        optimizer = loop.make_optimizer(objective)
        _make_gradients(trained)
        optimizer.step()
        optimizer.zero_grad()
        kept = storages.live - weights

        if settings.micro_steps > 1:
            _make_gradients(trained)  # of the micro-batches before the last
        storages.peak = before = storages.live
        raw = raw_batch(settings, channels, settings.micro_batch, objective.crops)
        batch = loop.to_batch(raw)
        del raw
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = objective(batch, 0.5).loss
        activations = storages.live - before
        _backward(loss)
        del loss, batch
        loop.clip(objective)
        optimizer.step()
        objective.after_step(0.5)
        peak = storages.peak
        objective.zero_grad()
    gradients = sum(p.numel() * p.element_size() for p in trained)
    # Gradients lie in DDP's buckets once they are reduced; while micro-batches are accumulated they
    # lie beside them, so that without accumulation this is more than is needed.
    buckets = gradients if settings.ranks > 1 else 0
    return Memory(
        precision=precision,
        checkpointing=objective.encoder.grad_checkpointing,
        weights=weights,
        gradients=gradients,
        optimiser=kept,
        buckets=buckets,
        activations=activations,
        peak=peak + buckets,
    )


def _make_gradients(trained: list[torch.nn.Parameter]) -> None:
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)


def _backward(loss: Tensor) -> None:
    """`loss.backward()` for which function modes do not step aside: checkpoints recompute in it."""
    engine: Any = torch.autograd.Variable._execution_engine
    engine.run_backward(
        (loss,),
        (torch.ones_like(loss),),
        False,
        False,
        (),
        allow_unreachable=True,
        accumulate_grad=True,
    )


class StorageCounter(TorchDispatchMode):
    """Follows the bytes of all storages that operations make, from birth to death.

    A view shares its base's storage and costs nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._known: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def count(self, tree: Any) -> None:
        """Takes the tensors of any nest of lists and dicts into account."""
        for leaf in tree_leaves(tree):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                if storage not in self._known:
                    self._known[storage] = _Bytes(self, storage.nbytes())
        self.peak = max(self.peak, self.live)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.count(result)
        return result


class _Bytes:
    """Counts as long as the storage that it is filed under lives."""

    def __init__(self, counter: StorageCounter, size: int) -> None:
        self.counter, self.size = counter, size
        counter.live += size

    def __del__(self) -> None:
        self.counter.live -= self.size


class _CudaAutocast(TorchFunctionMode):
    """CUDA's rules where the CPU's differ: what it computes in float32, and what it leaves as is.

    Of torch's lists (ATen/autocast_mode.h) those functions that networks and losses use. Acts
    where autocast is on, so it may stay over the backward pass, where checkpoints recompute.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.is_autocast_enabled("cpu"):
            if func in _FLOAT32_ON_CUDA:
                args, kwargs = _widened(args), {k: _widened(v) for k, v in kwargs.items()}
                with torch.autocast("cpu", enabled=False):
                    return func(*args, **kwargs)
            if func in _AS_IS_ON_CUDA:
                with torch.autocast("cpu", enabled=False):
                    return func(*args, **kwargs)
        return func(*args, **kwargs)


_FLOAT32_ON_CUDA: set[Callable[..., Any]] = {
    F.layer_norm, torch.layer_norm, F.group_norm, torch.group_norm,
    F.softmax, torch.softmax, Tensor.softmax,
    F.log_softmax, torch.log_softmax, Tensor.log_softmax,
    F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss, F.nll_loss, F.cross_entropy, F.kl_div,
    F.cosine_similarity, torch.cosine_similarity, F.softplus,
    F.binary_cross_entropy_with_logits,
    torch.exp, Tensor.exp, torch.log, Tensor.log, torch.pow, Tensor.pow, torch.rsqrt, Tensor.rsqrt,
    torch.sum, Tensor.sum, torch.cumsum, Tensor.cumsum, torch.logsumexp, Tensor.logsumexp,
}  # fmt: skip
_AS_IS_ON_CUDA: set[Callable[..., Any]] = {F.avg_pool3d, F.interpolate}


def _widened(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype == torch.bfloat16 else value
