"""Measures what a finetuning costs: arithmetic beforehand, time and memory at its end."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from data_prep.files import write_json
from finetune.answers import ANSWERS
from finetune.protocol import phase_steps
from finetune.settings import FinetuneSettings
from finetune.supervised import Supervised
from pretrain.costs import peak_mib, trained_seconds
from pretrain.estimate import bare_loop, counted_flops, raw_batch
from pretrain.run_folder import RunFolder


def training_flops(
    model: Supervised, settings: FinetuneSettings, channels: int, key: str = ""
) -> int:
    """Floating-point operations of all steps, forward and backward, on tensors without values.

    What is frozen in a phase is not computed backwards in it.

    Args:
        model: the network on the meta device; it is of no use afterwards.
        settings: of the run.
        channels: of the images.
        key: of a case that it is trained on, where targets are looked up by it.
    """
    freezes = [phase.freeze for phase in settings.phases] + [settings.freeze]
    total = 0
    with FakeTensorMode():
        model._apply(lambda t: torch.empty(t.shape, dtype=t.dtype))
        loop = bare_loop(settings, model)
        raw = raw_batch(settings, channels, 1, model.crops)
        raw["key"] = [key]
        raw["label"] = torch.zeros(raw["valid"].shape, dtype=torch.int64)[:, 0]
        for freeze, steps in zip(
            freezes, phase_steps(settings.phases, settings.steps), strict=True
        ):
            model.hold(freeze)
            one = counted_flops(lambda: model(loop.to_batch(raw), 0.5).loss.backward())
            total += one * settings.batch_size * len(steps)
    return total


@contextmanager
def priced(run: RunFolder, device: torch.device, devices: int) -> Iterator[None]:
    """Adds to run.json what the training cost, and the work inside: predicting the test cases.

    Of a run that an earlier start has begun to predict, this process knows neither that time nor
    the memory of the training.
    """
    begun = any((run.path / "predictions").glob("*")) or (run.path / ANSWERS).exists()
    began = time.perf_counter()
    yield
    path = run.path / "run.json"
    facts = json.loads(path.read_text())
    seconds = trained_seconds(run.path / "metrics.csv")
    facts["cost"] |= {
        "train_seconds": None if math.isnan(seconds) else round(seconds * devices, 2),
        "predict_seconds": None if begun else round(time.perf_counter() - began, 2),
        "peak_mib": None if begun else round(peak_mib(device), 1),
    }
    write_json(path, facts)
