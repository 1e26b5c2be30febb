"""Every preset of an objective with every preset of a backbone, shrunk until a step is instant.

Shrinking goes by the names of arguments, never by those of presets, so that a new YAML file takes
part in the tests of all pairs without an edit.
"""

from __future__ import annotations

import functools
import inspect
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from _pytest.mark.structures import ParameterSet

import conf
from conf.compose import settings_for
from data_prep.errors import InputError
from pretrain.arguments import check_arguments, locate
from pretrain.objective import Objective
from pretrain.settings import PretrainSettings
from pretrain.train import build_objective

CONF = Path(conf.__file__).parent
# Two by three by four patches or blocks, so that no axis can pass for another; then what takes
# multiples of 32, and what takes nothing but slices.
CROPS = [(8, 12, 16), (16, 24, 32), (32, 48, 64), (32, 64, 96), (1, 12, 16)]
STAGES = 3


def names(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def _smaller(limit: int) -> Callable[[Any], Any]:
    def change(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [change(item) for item in value]
        return min(value, limit) if isinstance(value, int) else value

    return change


def _to(number: float) -> Callable[[Any], Any]:
    return lambda value: [number] * len(value) if isinstance(value, list | tuple) else number


SHRINK: dict[str, Callable[[Any], Any]] = {
    # Heads of 24 channels take a rotary position on three axes as well.
    "embed_dim": _to(48),
    "num_heads": _to(2),
    "heads": _to(2),
    "depths": _to(1),
    "decoder_dim": _to(48),
    "decoder_heads": _to(2),
    "decoder_depth": _smaller(2),
    "depth": _smaller(12),  # some objectives tap the tenth block
    "patch_size": _smaller(4),
    "position_grid": _smaller(4),
    "block": _smaller(4),
    # Crops of a sample.
    "places": _smaller(2),
    "slabs": _smaller(2),
    "grid": _smaller(2),
    "hidden_dim": _smaller(48),
    "out_dim": _smaller(32),
    "blocks": _to(1),
    "convs": _to(1),
    "feature_size": _to(4),
    "window": _smaller(4),
    # Beside a crop, as large as half of the smallest.
    "local_size": _to(8),
    "prototypes": _smaller(16),
    "bottleneck_dim": _smaller(16),
    "features": lambda value: [8 * (i + 1) for i in range(len(value))],
    # What draws from torch's generator would differ between ranks.
    "drop_path": _to(0.0),
    "dropout": _to(0.0),
}


def shrink(config: dict[str, Any]) -> dict[str, Any]:
    """The same class with small arguments; three stages where it takes lists of any length."""
    target = locate(config["_target_"], "")
    full = {
        name: config.get(name, parameter.default)
        for name, parameter in inspect.signature(target).parameters.items()
        if name in config or parameter.default is not inspect.Parameter.empty
    }
    small = {name: SHRINK[name](value) for name, value in full.items() if name in SHRINK and value}
    stages = len(full.get("features", ()))
    cut = {
        name: list(value[:STAGES])
        for name, value in (full | small).items()
        if stages and isinstance(value, list | tuple) and len(value) == stages
    }
    problems = check_arguments(target, small | cut, "")[1] if cut else []
    return config | small | ({} if any("missing" not in p for p in problems) else cut)


@functools.cache
def preset(group: str, name: str) -> PretrainSettings:
    """A preset beside the first one of the other group; pairs are put together from two of these.

    Composing each pair would take a minute, and presets are independent of each other.
    """
    chosen = {other: names(other)[0] for other in ("objective", "backbone")} | {group: name}
    words = [f"{key}={value}" for key, value in chosen.items()]
    found: PretrainSettings = settings_for("pretrain", ["corpus=unused", "run=unused", *words])
    return found


def composed(objective: str, backbone: str) -> PretrainSettings:
    """Four samples a step, one process, float32."""
    found = preset("objective", objective)
    return PretrainSettings.model_validate(
        found.model_dump()
        | {
            "backbone": shrink(preset("backbone", backbone).backbone),
            "objective": shrink(found.objective),
            "batch_size": 4,
            "trainer": {"accelerator": "cpu", "precision": "32-true", "workers": 0},
        }
    )


def fitting(objective: str, backbone: str) -> PretrainSettings | InputError:
    """Settings with the smallest crop that the pair takes, or why there is none."""
    return _fitting(composed(objective, backbone).model_dump_json())


@functools.cache  # many presets are the same network once they are small
def _fitting(text: str) -> PretrainSettings | InputError:
    said = ""
    for crop in CROPS:
        chosen = PretrainSettings.model_validate_json(text).model_copy(update={"crop_size": crop})
        if crop[0] == 1 and "local_size" in chosen.objective:  # all crops are slices, or none is
            chosen.objective["local_size"][0] = 1
        try:
            build_objective(chosen, 1)
        except InputError as error:
            refusal = error
            if str(error) == said:
                break  # it is not about the crop
            said = str(error)
        else:
            return chosen
    return refusal


def build(objective: str, backbone: str) -> tuple[PretrainSettings, Objective]:
    chosen = fitting(objective, backbone)
    assert isinstance(chosen, PretrainSettings)
    return chosen, build_objective(chosen, 1)


def pairs() -> list[tuple[str, str]]:
    """All pairs of presets; of those that are the same when they are small, the first."""
    found: dict[str, tuple[str, str]] = {}
    for objective in names("objective"):
        for backbone in names("backbone"):
            text = composed(objective, backbone).model_dump_json()
            found.setdefault(text, (objective, backbone))
    return list(found.values())


@functools.cache
def kinds() -> dict[tuple[str, str], Any]:
    """Each objective with one backbone of each kind that fits it: class, position, dimension."""
    chosen: dict[tuple[str, str], Any] = {}
    for objective in names("objective"):
        seen = set()
        for backbone in names("backbone"):
            config = preset("backbone", backbone).backbone
            slices = str(config.get("patch_size"))[:3] == "[1,"
            kind = config["_target_"], config.get("rope"), slices
            # Asked last: whether a pair fits is found by making it.
            if kind not in seen and not refused(objective, backbone):
                seen.add(kind)
                chosen[objective, backbone] = kind
    return chosen


def one_each() -> list[ParameterSet]:
    """These pairs as parameters of a test: all but a few that cover both sides are slow.

    The few: each objective with the kind that was taken least so far, then each kind that was not.
    """
    taken: Counter[Any] = Counter()
    few: set[tuple[str, str]] = set()
    for objective in names("objective"):
        mine = {pair: kind for pair, kind in kinds().items() if pair[0] == objective}
        pair = min(mine, key=lambda pair: taken[mine[pair]])
        few.add(pair)
        taken[mine[pair]] += 1
    for pair, kind in kinds().items():
        if not taken[kind]:
            few.add(pair)
            taken[kind] += 1
    return [pytest.param(*p, marks=() if p in few else pytest.mark.slow) for p in kinds()]


def refused(objective: str, backbone: str) -> bool:
    return isinstance(fitting(objective, backbone), InputError)
