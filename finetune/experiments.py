"""Sweeps that have a name: `voxelith finetune -m experiment=compare_released task=... corpus=...`.

An experiment is a file of conf/sweep, words that are typed for the user; what the user types goes
before them, and checkpoints are added to them. `ckpt: known` stands for all checkpoints that
`voxelith fetch --list` names. Those that cannot be had stop the experiment, unless `without=` says
that they are meant to be left out: a comparison must not lose a competitor silently.

`protocol=short` or `full` is that of each checkpoint's family: `short_cnn` or `short_vit`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from omegaconf import OmegaConf

from conf.compose import HERE
from data_prep.errors import InputError, UnreachableError, near
from finetune.protocol import family_of
from pretrain.adopt import released
from pretrain.registry import KNOWN

SWEEPS = HERE / "sweep"
KNOWN_ONES = "known"


def expanded(words: Sequence[str]) -> list[str]:
    """The words of a sweep, with those of its experiment in place of its name.

    Raises:
        InputError: there is no such experiment, or a checkpoint of it cannot be had; all of them.
    """
    pairs = [word.split("=", 1) for word in words if "=" in word and not word.startswith("-")]
    given = dict(pairs)
    name = given.pop("experiment", None)
    if name is None:
        return list(words)
    if twice := sorted({key for key, _ in pairs if sum(key == k for k, _ in pairs) > 1}):
        raise InputError(f"{', '.join(twice)}: stand there twice; give values between commas")
    names = sorted(file.stem for file in SWEEPS.glob("*.yaml"))
    if name not in names:
        raise InputError(f"experiment={name}: no such sweep; {near(name, names)}")
    without = set(filter(None, given.pop("without", "").split(",")))
    of_experiment = {str(k): str(v) for k, v in OmegaConf.load(SWEEPS / f"{name}.yaml").items()}
    wanted = of_experiment.pop("ckpt").split(",")
    wanted += [ref for ref in given.pop("ckpt", "").split(",") if ref]
    options = [word for word in words if "=" not in word or word.startswith("-")]
    made = of_experiment | {"ckpt": ",".join(_checkpoints(wanted, without))} | given
    return [*(f"{key}={value}" for key, value in made.items()), *options]


def _checkpoints(wanted: Sequence[str], without: set[str]) -> list[str]:
    """Local folders of releases, each once."""
    problems = [
        f"without={name}: no such checkpoint; {near(name, KNOWN)}"
        for name in sorted(without - KNOWN.keys())
    ]
    found: dict[str, None] = {}
    for ref in wanted:
        for one in _known(without) if ref == KNOWN_ONES else [ref]:
            try:
                found[str(released(one))] = None
            except (InputError, UnreachableError) as error:
                said = getattr(error, "problems", [str(error)])
                if ref == KNOWN_ONES:
                    said = [f"{one}: {problem}; without={one} leaves it out" for problem in said]
                problems += said
    if problems:
        raise InputError(problems)
    return list(found)


def _known(without: set[str]) -> list[str]:
    """Names of all checkpoints that are known and can be had, but for those to be left out."""
    kept = []
    for one in KNOWN.values():
        if one.name in without or one.reference is None:
            why = "without=" if one.name in without else one.note
            print(f"experiment: {one.name} is left out: {why}")
        else:
            kept.append(one.name)
    return kept


def with_family(combination: dict[str, str]) -> dict[str, str]:
    """A combination whose protocol is that of its checkpoint's family, where it names none."""
    base, _, rest = combination.get("protocol", "").partition("_")
    names = {one: "_".join(filter(None, (base, one, rest))) for one in ("cnn", "vit")}
    if not all((HERE / "protocol" / f"{name}.yaml").is_file() for name in names.values()):
        return combination
    file = released(combination.get("ckpt", "")) / "config.json"
    try:
        backbone = json.loads(file.read_text())["backbone"]["name"]
    except (OSError, ValueError, KeyError, TypeError):
        backbone = ""  # whoever opens the release says what it is
    return combination | {"protocol": names[family_of(str(backbone))]}
