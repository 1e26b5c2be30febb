"""What every network that learns from labels can do, whatever it predicts.

Parts of its encoder can be frozen, or adapted by low rank; its layers can learn at rates of their
own; its weights can be averaged over the steps.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from finetune.lora import adapter_parameters, merge_adapters
from finetune.protocol import Freeze, frozen_layers
from pretrain.objective import Objective


class Supervised(Objective):
    """Base of the supervised objectives; subclasses set `encoder` and `decoder`."""

    decoder: nn.Module

    def __init__(self) -> None:
        super().__init__()
        self.layer_decay = 1.0
        self.ema: float | None = None
        self.average: nn.ModuleDict | None = None
        self._frozen: list[nn.Module] = []

    def hold(self, what: Freeze) -> None:
        """Freezes that much of the encoder, and thaws the rest.

        Frozen weights have no gradient, so nothing is kept for one, and frozen parts stay in
        evaluation mode: their norms, dropout and drop path are those of inference. An adapted
        encoder's own weights are frozen always.
        """
        layers = self.encoder.layers()
        count = frozen_layers(what, len(layers))
        adapters = set(adapter_parameters(self.encoder))
        for name, parameter in self.encoder.named_parameters():
            parameter.requires_grad_(not adapters or name in adapters)
        frozen = [part for layer in layers[:count] for part in layer]
        for part in frozen:
            part.requires_grad_(False)
        modules = [part for part in frozen if isinstance(part, nn.Module)]
        self._frozen = [self.encoder] if adapters or count == len(layers) else modules
        self.train(self.training)

    def train(self, mode: bool = True) -> Supervised:
        """As every module's; what is frozen stays in evaluation mode."""
        super().train(mode)
        for part in self._frozen:
            part.eval()
        return self

    def lr_scales(self) -> dict[str, float]:
        """Share of the rate for each of the encoder's parameters, by name: layer-wise decay."""
        if self.layer_decay == 1:
            return {}
        rates = self.encoder.layer_rates(self.layer_decay)
        return {f"encoder.{name}": rate for name, rate in rates.items()}

    def start_average(self, decay: float) -> None:
        """Keeps a moving average of the weights from here on, part of the state."""
        self.ema = decay
        parts = nn.ModuleDict({"encoder": self.encoder, "decoder": self.decoder})
        self.average = copy.deepcopy(parts).requires_grad_(False)

    def after_step(self, progress: float) -> None:
        """Moves the average; early ones, of which there are few, move it more."""
        if self.average is None:
            return
        assert self.ema is not None
        # After n steps at most (1 + n) / (10 + n): or short runs would report their start.
        n = self.loop.step
        share = 1 - min(self.ema, (1 + n) / (10 + n))
        with torch.no_grad():
            for mean, value in self._averaged():
                if mean.is_floating_point():
                    mean.lerp_(value, share)
                else:
                    mean.copy_(value)

    @contextmanager
    def reported(self) -> Iterator[None]:
        """The network as it would be reported now: with the averaged weights, if there are any."""
        own = {"encoder": self.encoder, "decoder": self.decoder}
        for name, part in own.items():
            setattr(self, name, part if self.average is None else self.average[name])
        try:
            yield
        finally:
            for name, part in own.items():
                setattr(self, name, part)

    def finish(self) -> None:
        """Becomes the network that is reported and released: averaged, merged, nothing beside it.

        Its tensors are then those of the network that its settings name, without any of what only
        training needs.
        """
        if self.average is not None:
            with torch.no_grad():
                for mean, value in self._averaged():
                    value.copy_(mean)
            self.average = self.ema = None
        merge_adapters(self.encoder)
        self._frozen = []

    def _averaged(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Pairs of an averaged tensor and the one that it follows."""
        assert self.average is not None
        for name in ("encoder", "decoder"):
            means, values = self.average[name].state_dict(), getattr(self, name).state_dict()
            yield from ((means[key], values[key]) for key in means)
