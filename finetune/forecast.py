"""What runs will cost, told before the first starts, from a step and a window of each network."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from finetune.infer import starts
from finetune.kinds import device_of, kind_of
from finetune.plan import Plan
from finetune.train import build_model


@dataclass(frozen=True)
class Forecast:
    """Seconds of one worker, runs at a time, bytes that stay, and bytes more while at work."""

    seconds: float
    jobs: int
    kept: int
    passing: int

    def text(self) -> str:
        """One line to read."""
        hours = self.seconds / 3600
        return (
            f"about {hours:.1f} hours of one worker, {hours / self.jobs:.1f} with {self.jobs} at a "
            f"time (training steps and windows, measured here just now); disk: "
            f"{self.kept / 2**30:.2f} GiB kept, {self.passing / 2**30:.2f} GiB more at work"
        )


def forecast(plans: Sequence[Plan], at_once: int) -> Forecast:
    """Hours and disk of runs, from a step and a window of each recipe on this machine."""
    measured: dict[str, tuple[float, float, int]] = {}
    seconds, kept, largest = 0.0, 0, 0
    for plan in plans:
        recipe = str(plan.identity["recipe_hash"])
        if recipe not in measured:
            measured[recipe] = _measure(plan)
        step, window, parameters = measured[recipe]
        positions = [plan.corpus.position(key) for key in plan.test.keys]
        shapes = [plan.corpus.shapes[i][1:] for i in positions]
        seconds += plan.settings.steps * step + window * sum(_windows(plan, i) for i in positions)
        voxels = 0 if plan.targets else sum(math.prod(map(int, s)) for s in shapes)
        # Label maps compress to about a fiftieth of a byte per voxel.
        kept += 4 * parameters + voxels // 50
        largest = max(largest, 4 * parameters)
    return Forecast(seconds, at_once, kept, at_once * 2 * 3 * largest)


def _windows(plan: Plan, case: int) -> int:
    """Windows that the network sees of a case: once, and again for each mirror."""
    chosen = plan.settings
    assert chosen.crop_size is not None
    corpus = plan.corpus
    shape = plan.preprocess.shape_of(corpus.shapes[case][1:], corpus.spacings[case])
    sides = zip(shape, chosen.crop_size, strict=True)
    mirrors = 2 ** sum(chosen.task.flip) if chosen.tta else 1
    return mirrors * math.prod(len(starts(max(n, w), w, chosen.overlap)) for n, w in sides)


def _measure(plan: Plan) -> tuple[float, float, int]:
    """Seconds of a step, of a window, and the number of parameters."""
    import torch

    from pretrain.objective import Batch

    chosen = plan.settings
    assert chosen.crop_size is not None
    model, _ = build_model(plan)
    device = device_of(chosen)
    model.to(device).train()
    descends = chosen.fit == "descent"
    micro = chosen.batch_size // (chosen.ranks if descends else 1)  # one process makes a probe
    channels = int(plan.release.config["backbone"]["args"].get("in_channels", 1))
    batch = Batch(
        torch.randn(micro, channels, *chosen.crop_size, device=device),
        torch.ones(micro, 1, *chosen.crop_size, dtype=torch.bool, device=device),
        torch.ones(micro, 3, device=device),
        torch.arange(micro, device=device),
        [plan.train_keys[0]] * micro,
        label=torch.zeros(micro, *chosen.crop_size, dtype=torch.int64, device=device),
    )

    def timed(work: Any) -> float:
        spent = []
        for _ in range(2):  # the first one also sets up
            began = time.perf_counter()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize()
            spent.append(time.perf_counter() - began)
        return spent[-1]

    threads = torch.get_num_threads()
    torch.set_num_threads(chosen.trainer.threads or 1)
    try:
        if descends:
            step = timed(lambda: model(batch, 0.5).loss.backward())
        else:
            with torch.inference_mode():
                step = timed(lambda: model.encoder(batch.image))
        with torch.inference_mode():
            window = timed(lambda: kind_of(chosen).look(model, batch))
    finally:
        torch.set_num_threads(threads)
    return step, window, sum(p.numel() for p in model.parameters())
