"""A recipe in stages: runs that are trained one after the other, each from the one before.

Each is an ordinary run, so all that is true of runs holds for it: it can be watched, resumed,
replayed, exported and begun from. There is nothing beside the runs that could disagree with them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_only

from data_prep.errors import InputError, by_stage
from pretrain.settings import PretrainSettings
from pretrain.train import Prepared, prepare


def pretrain_stages(stages: Mapping[str, PretrainSettings]) -> list[Path]:
    """Trains what `stages_for` composed; started again, it goes on where it was.

    The first stage begins from `init`, if it is given; another one from the stage before, unless it
    has an `init` of its own. All are looked at before the first one starts, the state of one
    against the encoder of the next. A stage that is done is not run again.

    Returns:
        The run folders, in order; the last one is the result.

    Raises:
        InputError: something is wrong with any of them; all problems of all stages.
    """
    prepared = prepare_stages(stages)
    main, several = rank_zero_only.rank == 0, len(prepared) > 1
    for number, one in enumerate(prepared, start=1):
        done = several and one.finished
        if main and several:
            said_done = " is done" if done else ""
            print(f"{one.run.path}: stage {number} of {len(prepared)}{said_done}")
        if not done:
            one.train()
    if main:
        print(f"Next: voxelith export {prepared[-1].run.path} release/")
    return [one.run.path for one in prepared]


def prepare_stages(
    stages: Mapping[str, PretrainSettings], *, elsewhere: bool = False
) -> list[Prepared]:
    """Looks whether all stages can start, each from the one before.

    Args:
        stages: what `stages_for` composed.
        elsewhere: whether they are to be trained on another machine than this one.

    Raises:
        InputError: something is wrong with any of them; all problems of all stages.
    """
    prepared: list[Prepared] = []
    said: dict[str, list[str]] = {}
    before: Prepared | None = None
    path: Path | None = None
    first = next(iter(stages.values())).init
    for name, settings in stages.items():
        goes_on = follows(settings, first, path)
        if goes_on:
            settings = settings.model_copy(update={"init": path})
        state = before.shapes() if goes_on and before is not None else None
        try:
            before = prepare(settings, follows=goes_on, before=state, elsewhere=elsewhere)
            prepared.append(before)
        except InputError as error:
            before = None
            for problem in error.problems:
                said.setdefault(problem, []).append(name)
        path = settings.runs / settings.run
    if said:
        raise InputError(by_stage(said, list(stages)))
    return prepared


def follows(settings: PretrainSettings, first: Path | None, before: Path | None) -> bool:
    """Whether a stage begins from the one before it.

    Args:
        settings: of the stage.
        first: where the first stage begins; what is typed for all stages is meant for that one.
        before: run of the stage before; None for the first stage.
    """
    return before is not None and settings.init in (None, first)
