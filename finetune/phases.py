"""The loop of a protocol with phases: decoder first, then the whole network ("sawtooth").

In each phase other parts are frozen and the rate rises and falls anew. Which phase a step belongs
to follows from the step, and the checkpoint at its end is the last of its optimiser, as in nnssl's
finetuning, whose phases begin with fresh momenta. So there is nothing to restore beside what every
run restores.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from finetune.protocol import phase_steps
from finetune.settings import FinetuneSettings
from finetune.supervised import Supervised
from finetune.validation import Validation
from pretrain.loop import Loop, Stretch
from pretrain.objective import Objective


class PhasedLoop(Loop):
    """Trains a supervised objective phase by phase; without phases it is the ordinary loop."""

    settings: FinetuneSettings

    def __init__(
        self,
        settings: FinetuneSettings,
        *args: Any,
        at_start: Callable[[Supervised], None] | None = None,
        validation: Validation | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(settings, *args, **kwargs)
        self.at_start = at_start
        self.validation = validation
        self._stretches: list[Stretch] = []
        self._freezes = [phase.freeze for phase in settings.phases] + [settings.freeze]
        chosen = [
            {
                "lr": settings.lr * phase.lr_factor,
                "warmup": phase.warmup,
                "schedule": phase.schedule,
                "halve_every": None,
            }
            for phase in settings.phases
        ]
        changes: list[dict[str, Any]] = [*chosen, {}]
        for steps, change in zip(
            phase_steps(settings.phases, settings.steps), changes, strict=True
        ):
            own = settings.model_copy(update={**change, "steps": len(steps)})
            self._stretches.append(Stretch(steps, own))

    def _phase(self) -> int:
        return next(i for i, stretch in enumerate(self._stretches) if self.step in stretch.steps)

    def stretch(self) -> Stretch:
        """The phase that the next step belongs to."""
        return self._stretches[self._phase()]

    def look(self) -> dict[str, float | int]:
        """Dice on validation cases, where it is due."""
        if self.validation is None or self.step not in self.validation.due:
            return {}
        row = self.validation.look(self.step)
        return {f"validation/{name}": value for name, value in row.items() if name != "step"}

    def begin(self, objective: Objective) -> None:
        """Freezes what the phase freezes; the network as it is before any step is looked at."""
        assert isinstance(objective, Supervised)
        objective.hold(self._freezes[self._phase()])
        if self.step == 0 and self.at_start is not None:
            self.at_start(objective)
