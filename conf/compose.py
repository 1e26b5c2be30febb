"""From the words of a command line to checked settings, all mistakes listed at once.

Hydra composes the groups; before it sees the words, paths are quoted (its grammar has no place for
`Scan (1)`, `dcm_PE=AP_3`, `x-{000..127}.tar`, signed URLs or umlauts) and unknown keys are
collected with what was probably meant, since Hydra stops at the first.
"""

from __future__ import annotations

import importlib
import re
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from data_prep.errors import InputError, near, plain_message

HERE = Path(__file__).parent

SETTINGS = {
    "prep": "data_prep.settings:PrepSettings",
    "split": "data_prep.settings:SplitSettings",
    "pretrain": "pretrain.settings:PretrainSettings",
    "bench": "pretrain.settings:BenchSettings",
    "finetune": "finetune.settings:FinetuneSettings",
    "evaluate": "finetune.settings:EvaluateSettings",
    "predict": "finetune.settings:PredictSettings",
    "demo": "finetune.settings:DemoSettings",
}
GIVEN = {"objective": ("encoder",)}
"""Arguments that the program passes itself to what a group names."""


def settings_for(command: str, words: list[str]) -> Any:
    """Composes and checks the settings of a command.

    Args:
        command: prep, pretrain, finetune, ...
        words: what the user typed after it: `key=value`, `group=option`, and `--config-dir DIR`
            with groups of the user's own.

    Raises:
        InputError: anything unknown, missing or out of range; everything that can be found.
    """
    model = _model(command)
    words, own = _take_config_dir(words)
    roots = [HERE, *([own] if own else [])]
    groups = _groups(command)
    chosen, values, problems = _sort_words(words, groups, roots)
    for group in _required(command):
        if not any(word.startswith(f"{group}=") for word in words):
            options = sorted(_options(group, roots))
            problems.append(f"{group}: missing; give {group}= one of {', '.join(options)}")
        if not any(word.startswith(f"{group}=") for word in chosen):
            # Any option will do to look for what else is wrong.
            chosen.append(f"{group}={min(_options(group, roots))}")
    try:
        config = _compose(command, chosen, own)
    except Exception as error:  # a YAML of the user's own that cannot be read
        raise InputError([*problems, f"{' '.join(chosen)}: {_first_line(error)}"]) from error
    accepted, unknown = _known_only(values, config, _text_keys(model))
    problems += unknown
    try:
        config = _compose(command, chosen + accepted, own)
    except Exception as error:  # Hydra raises a dozen kinds; the message is what matters.
        problems.append(f"{' '.join(accepted)}: cannot be read ({_first_line(error)})")
        raise InputError(problems) from error
    problems += _target_problems(config)
    settings = None
    try:
        settings = model.model_validate(_without_missing(config))
    except ValidationError as error:
        problems += [_settings_problem(item) for item in error.errors(include_url=False)]
    if problems:
        raise InputError(problems)
    return settings


def recipes(*, small: bool) -> list[str]:
    """Names of the recipes in conf/experiment: as the papers state them, or for two CPU cores."""
    found = (file.stem for file in (HERE / "experiment").glob("*.yaml"))
    return sorted(name for name in found if name.endswith("_small") == small)


def describe(command: str) -> str:
    """The keys of a command with their defaults and comments, and the options of its groups."""
    file = HERE / f"{command}.yaml"
    if not file.exists():
        return ""
    groups = {group: ", ".join(sorted(_options(group, [HERE]))) for group in _groups(command)}
    listed = "\n".join(f"  {group}= {options}" for group, options in groups.items())
    lines = file.read_text().splitlines()
    keys = "\n".join(f"  {line}" for line in _after_defaults(lines)).rstrip()
    return (f"groups:\n{listed}\n\n" if listed else "") + f"keys and defaults:\n{keys}"


def _after_defaults(lines: list[str]) -> list[str]:
    kept: list[str] = []
    skipping = False
    for line in lines:
        if line.startswith("defaults:"):
            skipping = True
        elif skipping and not line.startswith((" ", "-")):
            skipping = False
        if not skipping and not (line.startswith("#") and not kept):
            kept.append(line)
    return kept


def _model(command: str) -> type[BaseModel]:
    module, _, name = SETTINGS[command].partition(":")
    found: type[BaseModel] = getattr(importlib.import_module(module), name)
    return found


def _take_config_dir(words: list[str]) -> tuple[list[str], Path | None]:
    rest, own = [], None
    queue = iter(words)
    for word in queue:
        if word == "--config-dir" or word.startswith("--config-dir="):
            value = word.partition("=")[2] or next(queue, "")
            own = Path(value).resolve()
            if not value or not own.is_dir():
                raise InputError(f"--config-dir {value}: no such folder; give one with YAML groups")
        else:
            rest.append(word)
    return rest, own


def _defaults(command: str) -> dict[str, Any]:
    from omegaconf import OmegaConf

    root = OmegaConf.to_container(OmegaConf.load(HERE / f"{command}.yaml"))
    found: dict[str, Any] = {}
    for entry in root.get("defaults", []) if isinstance(root, dict) else []:
        if isinstance(entry, dict):
            found |= {str(k): v for k, v in entry.items()}
        elif entry != "_self_":  # another command's configuration, extended here
            found |= _defaults(entry)
    return found


def _groups(command: str) -> list[str]:
    return list(_defaults(command))


def _required(command: str) -> list[str]:
    return [group for group, option in _defaults(command).items() if option == "???"]


def _options(group: str, roots: Iterable[Path]) -> set[str]:
    return {file.stem for root in roots for file in (root / group).glob("*.yaml")}


def _sort_words(
    words: list[str], groups: list[str], roots: list[Path]
) -> tuple[list[str], dict[str, str], list[str]]:
    chosen, values, problems = [], {}, []
    for word in words:
        key, equals, value = word.partition("=")
        key = key.lstrip("+~")
        if not equals or not re.fullmatch(r"[A-Za-z_][\w.]*", key):
            problems.append(f"{word}: expected key=value")
        elif key in groups:
            options = _options(key, roots)
            if value in options:
                chosen.append(f"{key}={value}")
            else:
                problems.append(f"{key}={value}: no such {key}; {near(value, options)}")
        else:
            values[key] = value
    return chosen, values, problems


def _compose(command: str, overrides: list[str], own: Path | None) -> dict[str, Any]:
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    search = [f"hydra.searchpath=[{_quoted(f'file://{own}')}]"] if own else []
    with initialize_config_dir(version_base="1.3", config_dir=str(HERE)):
        config = compose(config_name=command, overrides=search + overrides)
    plain = OmegaConf.to_container(config, resolve=True)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def _known_only(
    values: dict[str, str], config: dict[str, Any], texts: set[str]
) -> tuple[list[str], list[str]]:
    """Overrides of keys that exist, and a problem for each that does not."""
    names = list(_flat(config))
    accepted, problems = [], []
    for key, value in values.items():
        parent = config
        *above, last = key.split(".")
        for part in above:
            child = parent.get(part)
            parent = child if isinstance(child, dict) else {}
        # Arguments of a class are checked against its signature, which knows more than the YAML.
        if last in parent or "_target_" in parent:
            # null stays null where the default is; else it is a name like any other.
            literal = key in texts and not (value == "null" and parent.get(last) is None)
            quoted = _quoted(value) if literal else value
            accepted.append(f"++{key}={quoted}")
        else:
            problems.append(f"{key}={value}: no such key; {near(key, names)}")
    return accepted, problems


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterable[str]:
    for key, value in config.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _flat(value, f"{name}.")
        if key != "_target_":
            yield name


def _quoted(value: str) -> str:
    """A value that Hydra's grammar takes literally."""
    if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"":
        value = value[1:-1]
    escaped = re.sub(r"(\\*)(')", r"\1\1\\\2", value)
    escaped = re.sub(r"(\\+)$", r"\1\1", escaped)
    # OmegaConf reads the result once more and would fill in ${...}.
    return "'" + re.sub(r"(\\*)\$\{", r"\1\1\\${", escaped) + "'"


def _text_keys(model: type[BaseModel], prefix: str = "") -> set[str]:
    """Names of the settings that are paths or free text, which Hydra must not parse."""
    found = set()
    for name, field in model.model_fields.items():
        kinds = _kinds(field.annotation)
        if Path in kinds or str in kinds:
            found.add(prefix + name)
        for kind in kinds:
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                found |= _text_keys(kind, f"{prefix}{name}.")
    return found


def _kinds(annotation: Any) -> list[Any]:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return [k for part in typing.get_args(annotation) for k in _kinds(part)]
    return [annotation]


def _target_problems(config: dict[str, Any]) -> list[str]:
    named = {k: v for k, v in config.items() if isinstance(v, dict) and "_target_" in v}
    if not named:
        return []  # prep and predict do not wait for torch here
    from pretrain.arguments import check_arguments, locate, split_target

    problems = []
    for where, node in named.items():
        path, arguments = split_target(node)
        try:
            target = locate(path, where)
        except InputError as error:
            problems += error.problems
            continue
        problems += check_arguments(target, arguments, where, GIVEN.get(where, ()))[1]
    return problems


def _without_missing(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if value != "???"}


def _settings_problem(item: Any) -> str:
    where = ".".join(str(part) for part in item["loc"])
    if item["type"] == "missing":
        return f"{where}: missing; give {where}=..."
    said = plain_message(item)
    if isinstance(item["input"], dict):
        return f"{where}: {said}" if where else said  # a whole file would hide the message
    return f"{where}={item['input']}: {said}" if where else said


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
