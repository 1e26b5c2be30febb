"""`voxelith bench`: what a step of a pretraining costs, told beforehand and measured.

A step here is what one device does with one micro-batch of an optimiser step: the transform of raw
crops that are on the device already, forward and backward pass, clipping and the optimiser. Reading
crops (see `data_wait` in a run's metrics.csv) and the gradients' way between devices are not in it.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from data_prep.files import make_folder, write_json
from data_prep.progress import bar
from pretrain.costs import resident
from pretrain.device import chosen_device
from pretrain.estimate import Estimate, bare_loop, estimate, raw_batch
from pretrain.loop import compile_parts, use_threads
from pretrain.run_folder import versions
from pretrain.settings import BenchSettings, Variant
from pretrain.train import build_objective, corpus_channels, corpus_for

PHASES = ("forward", "backward", "optimiser")

# Dense bf16 matrix products with float32 sums, FLOP/s, from the makers' data sheets. The first
# name that the device's name contains counts.
PEAK_BF16 = {
    "B200": 2250e12, "H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12,
    "A100": 312e12, "L40S": 362e12, "L40": 181e12, "L4": 121e12, "A10G": 70e12, "A10": 125e12,
    "RTX A6000": 155e12, "RTX 4090": 165e12, "RTX 3090": 71e12,
}  # fmt: skip


def bench_estimate(settings: BenchSettings) -> dict[str, Any]:
    """Parameters, operations and memory, without the device."""
    told = estimate(settings, _channels(settings), "cpu" if settings.device == "cpu" else "cuda")
    print(told.text())
    return written(settings, {"estimate": told.to_dict(), **_setting(settings)})


def bench_step(settings: BenchSettings) -> dict[str, Any]:
    """Measures steps on this machine's device, in each of the wanted variants.

    Raises:
        InputError: wrong settings, or a device that is not there.
    """
    device = chosen_device(settings.device, settings.trainer.accelerator)
    channels = _channels(settings)
    variants: tuple[Variant, ...] = settings.variants or (
        ("float32", "bf16", "float32-compiled", "bf16-compiled")
        if device.type == "cuda"
        else ("float32",)
    )
    load = os.getloadavg()[0]
    use_threads(settings.trainer)
    told = estimate(settings, channels, "cuda" if device.type == "cuda" else "cpu")
    print(told.text())
    measured = []
    for variant in variants:
        found = _measure(settings, channels, device, variant, told)
        measured.append(found)
        print(_line(found))
        if "profile" in found:
            print(_table(found["profile"]))
    return written(
        settings,
        {
            "measured": measured,
            "estimate": told.to_dict(),
            **_setting(settings),
            "machine": {**machine(device), "load_before": load},
            "versions": versions(),
        },
    )


def machine(device: torch.device) -> dict[str, Any]:
    """What a time depends on besides the program."""
    found: dict[str, Any] = {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": device.type,
    }
    if device.type == "cuda":
        found |= {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    return found


def spread(values: list[float]) -> dict[str, float]:
    """Median with the quartiles around it."""
    if len(values) == 1:
        return dict.fromkeys(("median", "low", "high"), values[0])
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "low": low, "high": high}


class Clock:
    """Moments on the device, which the host does not wait for."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.marks: list[Any] = []

    def mark(self) -> None:
        """Notes the moment at which the device gets here."""
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """The spans between the marks; waits for the device."""
        if self.device.type != "cuda":
            return [b - a for a, b in zip(self.marks, self.marks[1:], strict=False)]
        torch.cuda.synchronize()
        return [a.elapsed_time(b) / 1e3 for a, b in zip(self.marks, self.marks[1:], strict=False)]


def _measure(
    settings: BenchSettings,
    channels: int,
    device: torch.device,
    variant: Variant,
    told: Estimate,
) -> dict[str, Any]:
    precision, _, compiled = variant.partition("-")
    idle = resident()
    objective = build_objective(settings, channels).to(device)
    objective.encoder.set_grad_checkpointing(settings.trainer.checkpointing)
    loop = bare_loop(settings, objective)
    optimizer = loop.make_optimizer(objective)
    samples = settings.micro_batch
    raw = raw_batch(settings, channels, samples, objective.crops, device)
    if compiled:
        torch.compiler.reset()
        compile_parts(objective)

    def step(clock: Clock) -> None:
        clock.mark()
        batch = loop.to_batch(raw)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            losses = objective(batch, 0.5)
        loop.observe(losses)
        clock.mark()
        losses.loss.backward()
        clock.mark()
        with record_function(OPTIMISER):
            loop.clip(objective)
            optimizer.step()
            optimizer.zero_grad()
            objective.after_step(0.5)
        clock.mark()

    clocks = []
    began = time.perf_counter()
    with bar(total=settings.discard + settings.repeats, desc=variant, unit="step") as shown:
        for number in range(settings.discard + settings.repeats):
            if number == settings.discard:
                start = _synchronise(device) - began
                _reset_peak(device)
            clock = Clock(device)
            step(clock)
            clocks.append(clock)
            shown.update()
    _synchronise(device)
    spans = [clock.seconds() for clock in clocks[settings.discard :]]
    found: dict[str, Any] = {"variant": variant, "samples": samples, "start_seconds": start}
    found |= _figures(spans, samples, told, _peak_flops(device) if precision == "bf16" else None)
    found |= _peak_memory(device, idle)
    guess = [
        m.peak
        for m in told.memory
        if (m.precision, m.checkpointing) == (precision, settings.trainer.checkpointing)
    ]
    found["memory_estimated"] = guess[0]
    if settings.profile and not compiled:
        found["profile"], busy = profiled(lambda: step(Clock(device)), device)
        if device.type == "cuda":  # the rest of a step the device waits for the host's launches
            found["busy"] = busy / found["seconds_per_step"]["median"]
    return found


def _figures(
    spans: list[list[float]], samples: int, told: Estimate, peak: float | None
) -> dict[str, Any]:
    whole = spread([sum(span) for span in spans])
    flops = told.flops_per_sample * samples / whole["median"]
    found: dict[str, Any] = {
        "seconds_per_step": whole,
        "split": {
            phase: statistics.median(column)
            for phase, column in zip(PHASES, zip(*spans, strict=True), strict=True)
        },
        "samples_per_second": samples / whole["median"],
        "voxels_per_second": samples * told.voxels / whole["median"],
        "flops_per_second": flops,
        "model_flops_utilisation": None if peak is None else flops / peak,
        "seconds": spans,
    }
    if told.tokens is not None:
        found["tokens_per_second"] = samples * told.tokens / whole["median"]
    return found


def _line(found: dict[str, Any]) -> str:
    whole, split = found["seconds_per_step"], found["split"]
    parts = " + ".join(f"{phase} {split[phase]:.4g}" for phase in PHASES)
    rates = [f"{found['samples_per_second']:.4g} samples/s"]
    if "tokens_per_second" in found:
        rates.append(f"{found['tokens_per_second']:,.0f} tokens/s")
    rates.append(f"{found['flops_per_second'] / 1e12:.3g} TFLOP/s")
    if found["model_flops_utilisation"] is not None:
        rates.append(f"MFU {found['model_flops_utilisation']:.1%}")
    memory = f"{found['memory_peak'] / 2**30:.2f} GiB"
    if "busy" in found:
        rates.append(f"device busy {found['busy']:.0%}")
    if "memory_idle" in found:
        memory += f" resident, {found['memory_idle'] / 2**30:.2f} of them before the network"
    return (
        f"{found['variant']:<16} {whole['median']:.4g} s a step of {found['samples']} samples "
        f"(quartiles {whole['low']:.4g} to {whole['high']:.4g}): {parts}\n"
        f"{'':<16} {', '.join(rates)}; peak {memory}, "
        f"{found['memory_estimated'] / 2**30:.2f} estimated; "
        f"first steps took {found['start_seconds']:.3g} s"
    )


# Where the time goes.

OPTIMISER = "clip and step"

GROUPS = {
    "attention": r"scaled_dot_product|flash|efficient_attention|cudnn_attention",
    "convolution": r"conv",
    "norm": r"_norm",
    "linear": r"aten::(mm|addmm|bmm|baddbmm|linear|matmul|dot)$",
    "copy": r"aten::(copy_|_to_copy|to|contiguous|clone|cat|stack|gather|scatter|index|fill_|zero_|"
    r"empty|zeros|full|ones|new_|im2col|flip|repeat|pad|constant_pad)|[Mm]em(cpy|set)",
    "elementwise": r"aten::(add|sub|mul|div|neg|abs|pow|sqrt|rsqrt|square|exp|log|sin|cos|where|"
    r"clamp|gelu|silu|relu|leaky_relu|sigmoid|softmax|_softmax|masked_fill|threshold|bitwise|"
    r"lt|gt|le|ge|eq|ne|sum|mean|bernoulli|sign|lerp|isfinite|_foreach|tanh)",
}  # fmt: skip


PROFILED = 3
"""Steps that the profiler watches."""


def profiled(step: Callable[[], None], device: torch.device) -> tuple[dict[str, float], float]:
    """What each kind of operation takes of a step's time.

    What the optimiser and the clipping call counts as "optimiser", whatever it is.

    Returns:
        The shares, the largest first, and the seconds of one step that they are shares of: those
        in which the device computed.
    """
    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities) as watched:
        for _ in range(PROFILED):
            step()
        _synchronise(device)
    seconds = dict.fromkeys((*GROUPS, "optimiser", "other"), 0.0)
    for event in watched.events() or []:
        # Kernels are also filed under the operation that launched them.
        if event.device_type == torch.autograd.DeviceType.CPU:
            spent = event.self_device_time_total if cuda else event.self_cpu_time_total
            seconds[group(event)] += spent
    total = sum(seconds.values())
    shares = {name: spent / total for name, spent in seconds.items() if total}
    return dict(sorted(shares.items(), key=lambda item: -item[1])), total / 1e6 / PROFILED


def group(event: Any) -> str:
    """The kind of operation of a profiler's event."""
    if any(name == OPTIMISER for name in _ancestry(event)):
        return "optimiser"
    for kind, pattern in GROUPS.items():
        if re.search(pattern, event.name):
            return kind
    return "other"


def _ancestry(event: Any) -> Iterator[str]:
    while event is not None:
        yield event.name
        event = event.cpu_parent


def _table(shares: dict[str, float]) -> str:
    return "\n".join(f"{'':<16} {share:6.1%}  {name}" for name, share in shares.items())


# The device.


def _synchronise(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _peak_flops(device: torch.device) -> float | None:
    """None for what the list does not know, CPUs among it."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_BF16.items() if part in name), None)


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        with contextlib.suppress(OSError):  # else the peak is that of the whole process
            Path("/proc/self/clear_refs").write_text("5")


def _peak_memory(device: torch.device, idle: int) -> dict[str, int]:
    """Bytes: what tensors took on a GPU, what the process has resident on a CPU."""
    if device.type == "cuda":
        return {
            "memory_peak": torch.cuda.max_memory_allocated(),
            "memory_reserved": torch.cuda.max_memory_reserved(),
        }
    return {"memory_peak": resident("VmHWM"), "memory_idle": idle}


def _processor() -> str:
    with contextlib.suppress(OSError):
        found = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
        if found:
            return found.group(1)
    return platform.processor() or platform.machine()


# What it is about.


def _channels(settings: BenchSettings) -> int:
    if settings.channels is not None:
        return settings.channels
    return corpus_channels(corpus_for(settings)) if settings.corpus else 1


def _setting(settings: BenchSettings) -> dict[str, Any]:
    names = {"backbone", "objective", "crop_size", "batch_size", "accumulate", "trainer"}
    return {"settings": settings.model_dump(mode="json", include=names)}


def written(settings: BenchSettings, found: dict[str, Any]) -> dict[str, Any]:
    """What was found, in the file that `output` names as well."""
    if settings.output is not None:
        make_folder(settings.output.parent, "output")
        write_json(settings.output, found)
        print(f"{settings.output}: written")
    return found
