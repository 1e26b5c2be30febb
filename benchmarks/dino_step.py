"""Where a step of DINO goes: student, teacher, heads, losses; what passing crops together saves.

    python benchmarks/dino_step.py [--repeats 5] [--output docs/results] [RECIPE=SAMPLES ...]

By default the small recipe as it stands, and the full one (ViT-B/16, 96^3 and 48^3, 65,536
prototypes) with two samples, what a rank needs at least. One thread, float32, noise of the shape
that the loader delivers. Parts of the forward pass are timed one by one; the backward pass is
timed as a whole, and arithmetic (forward and backward) tells how it divides. Beside it
the encoder's passes of a step with every crop of a sample by itself: the same crops, in 2 + n
passes of the student and 2 of the teacher instead of 2 and 1. Writes dino_step.json (machine,
versions, raw seconds) and dino_step.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from line import ROOT
from torch.utils.flop_counter import FlopCounterMode

from conf.compose import stages_for
from data_prep.files import write_json, write_text
from pretrain.bench import machine, spread
from pretrain.estimate import bare_loop, estimate, raw_batch
from pretrain.objective import Batch
from pretrain.objectives import dino
from pretrain.run_folder import versions
from pretrain.settings import PretrainSettings
from pretrain.train import build_objective

CASES = ("dino_small=8", "dino=2")
LOSSES = ("cls_loss", "ibot_loss", "koleo", "gram_loss")
TARGETS = ("sinkhorn",)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="*", default=CASES, metavar="RECIPE=SAMPLES")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "results")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    found = {}
    for case in chosen.cases:
        recipe, _, samples = case.partition("=")
        found[recipe] = measure(recipe, int(samples), chosen.repeats)
        print(recipe, {name: round(s["median"], 3) for name, s in found[recipe]["parts"].items()})
    result = {
        "machine": machine(torch.device("cpu")),
        "versions": versions(),
        "repeats": chosen.repeats,
        "recipes": found,
    }
    chosen.output.mkdir(parents=True, exist_ok=True)
    write_json(chosen.output / "dino_step.json", result)
    text = markdown(result)
    write_text(chosen.output / "dino_step.md", text)
    print(text)


class Stopwatch:
    """Sums the seconds of calls by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """The call, whose seconds count for the name."""

        def run(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            found = call(*args, **kwargs)
            spent = time.perf_counter() - began
            self.seconds[name] = self.seconds.get(name, 0.0) + spent
            return found

        return run


def measure(recipe: str, samples: int, repeats: int) -> dict[str, Any]:
    """Seconds of each part of a step, its arithmetic, and passes of the encoder one by one."""
    words = ["corpus=c", "run=r", f"experiment={recipe}"]
    settings = next(iter(stages_for("pretrain", words).values()))
    objective = build_objective(settings, 1)
    assert isinstance(objective, dino.DINO)
    loop = bare_loop(settings, objective)
    optimizer = loop.make_optimizer(objective)
    raw = raw_batch(settings, 1, samples, objective.crops)
    runs = []
    for _ in range(repeats + 1):  # the first one also sets up
        watch = Stopwatch()
        step(objective, loop, optimizer, raw, watch)
        runs.append(watch.seconds)
    parts = {name: [run[name] for run in runs[1:]] for name in runs[0]}
    batch = loop.to_batch(raw)
    counts = arithmetic(objective, batch)
    together, alone = passes(objective, batch, repeats)
    return {
        "samples": samples,
        "crops": [[g.name or "global", g.crops, list(g.size)]
                  for g in objective.crops.groups(settings.crop_size)],
        "parameters": {name: sum(p.numel() for p in child.parameters())
                       for name, child in objective.named_children()},
        "parts": {name: spread(seconds) for name, seconds in parts.items()},
        "memory": memory(settings),
        "flops": counts,
        "passes": {"together": spread(together), "alone": spread(alone)},
        "seconds": parts,
    }  # fmt: skip


def arithmetic(objective: Any, batch: Batch) -> dict[str, int]:
    """FLOP of a step by part; the student's backward pass counts as twice its forward pass."""

    def forward(*images: Any) -> int:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            for image in images:
                objective.encoder.tokens(image)
        return int(counter.get_total_flops())

    with FlopCounterMode(display=False) as counter:
        objective(batch, 0.5).loss.backward()
    whole = int(counter.get_total_flops())
    shown = [batch.image, *(batch.others[n].image for n in ("local",) if n in batch.others)]
    found = {"student": 3 * forward(*shown), "teacher": forward(batch.image)}
    return {**found, "heads and losses": whole - sum(found.values())}


def memory(settings: PretrainSettings) -> dict[str, Any]:
    """What a device of the recipe's own trainer needs, estimated."""
    told = estimate(settings, 1, "cuda", ("bf16",))
    return {"samples": told.micro_batch, **dataclasses.asdict(told.memory[0])}


def step(objective: Any, loop: Any, optimizer: Any, raw: Any, watch: Stopwatch) -> None:
    """One optimiser step, watched from outside: nothing of the objective is changed."""
    forward = Stopwatch()

    def tokens(image: Any, hidden: Any = None, **rest: Any) -> Any:
        name = "student, global crops" if hidden is not None else "student, local crops"
        return forward.timed(name, objective.encoder.__class__.tokens)(
            objective.encoder, image, hidden, **rest
        )

    teacher = objective.teacher.module
    wraps = [
        patch.object(objective.encoder, "tokens", tokens),
        patch.object(teacher, "tokens", forward.timed("teacher", teacher.tokens)),
        *(
            patch.object(head, "forward", forward.timed("heads", head.forward))
            for head in (objective.head, objective.ibot_head)
            if head is not None
        ),
        *(
            patch.object(head, "forward", forward.timed("teacher's heads", head.forward))
            for head in (objective.teacher_head, objective.teacher_ibot_head)
            if head is not None
        ),
        *(patch.object(dino, n, forward.timed("losses", getattr(dino, n))) for n in LOSSES),
        *(patch.object(dino, n, forward.timed("targets", getattr(dino, n))) for n in TARGETS),
        *(
            patch.object(one, "forward", forward.timed("targets", one.forward))
            for one in (objective.centring, objective.ibot_centring)
            if one is not None
        ),
    ]
    batch: Batch = watch.timed("crops to batch", loop.to_batch)(raw)
    for one in wraps:
        one.start()
    try:
        began = time.perf_counter()
        losses = objective(batch, 0.5)
        whole = time.perf_counter() - began
    finally:
        for one in wraps:
            one.stop()
    watch.seconds |= forward.seconds
    watch.seconds["rest of forward"] = whole - sum(forward.seconds.values())
    watch.timed("backward", losses.loss.backward)()

    def end() -> None:
        loop.clip(objective)
        optimizer.step()
        optimizer.zero_grad()

    watch.timed("clip and step", end)()
    watch.timed("teachers move", objective.after_step)(0.5)


def passes(objective: Any, batch: Batch, repeats: int) -> tuple[list[float], list[float]]:
    """Seconds of the encoder's forward passes: crops of one shape together, or each by itself."""
    shapes = [(batch.image, objective.crops.main, 2)]  # student and teacher
    if "local" in batch.others:
        shapes.append((batch.others["local"].image, objective.crops.local, 1))
    spent: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats):
        for alone, seconds in enumerate(spent):
            began = time.perf_counter()
            for image, crops, times in shapes:
                parts = [image[n::crops] for n in range(crops)] if alone else [image]
                for part in parts * times:
                    with torch.no_grad():
                        objective.encoder.tokens(part)
            seconds.append(time.perf_counter() - began)
    return spent


def markdown(result: dict[str, Any]) -> str:
    """What docs/results/dino_step.md shows."""
    recipes = result["recipes"]
    lines = [
        "# Where a step of DINO goes",
        "",
        f"Made by `python benchmarks/dino_step.py` on {result['machine']['processor']}, one "
        f"thread, torch {result['versions']['torch']}, float32, eager; medians of "
        f"{result['repeats']} steps. What is timed stands at the head of that file, raw values in "
        "[dino_step.json](dino_step.json).",
        "",
        "| part | " + " | ".join(f"{name}, s | share" for name in recipes) + " |",
        "| --- |" + " --: | --: |" * len(recipes),
    ]
    names = list(dict.fromkeys(name for one in recipes.values() for name in one["parts"]))
    for name in names:
        cells = []
        for one in recipes.values():
            whole = sum(part["median"] for part in one["parts"].values())
            spent = one["parts"].get(name, {"median": 0.0})["median"]
            cells.append(f"{spent:.3f} | {spent / whole:.1%}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    totals = [sum(p["median"] for p in one["parts"].values()) for one in recipes.values()]
    lines.append("| all | " + " | ".join(f"{total:.3f} |" for total in totals))
    for (name, one), total in zip(recipes.items(), totals, strict=True):
        crops = ", ".join(f"{n} {kind} of {'x'.join(map(str, size))}"
                          for kind, n, size in one["crops"])  # fmt: skip
        flops = sorted(one["flops"].items(), key=lambda f: -f[1])
        whole = sum(one["flops"].values())
        shares = ", ".join(f"{part} {count / whole:.1%}" for part, count in flops if count)
        passed = one["passes"]
        ratio = passed["alone"]["median"] / passed["together"]["median"]
        lines += [
            "",
            f"`{name}`: {one['samples']} samples, each {crops}. "
            f"{whole / 1e9:.0f} GFLOP a step, {whole / total / 1e9:.0f} "
            f"GFLOP/s; forward and backward: {shares}. The encoder's passes (forward "
            f"alone): {passed['together']['median']:.3f} s together, "
            f"{passed['alone']['median']:.3f} s crop by crop, {ratio:.2f} times. "
            f"Memory of a GPU with {one['memory']['samples']} samples, bf16, estimated: "
            f"{one['memory']['peak'] / 2**30:.1f} GiB, activations "
            f"{one['memory']['activations'] / 2**30:.1f} of them.",
        ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
