"""From the words of a command line to checked settings, all mistakes listed at once.

Hydra composes the groups; before it sees the words, paths are quoted (its grammar has no place for
`Scan (1)`, `dcm_PE=AP_3`, `x-{000..127}.tar`, signed URLs or umlauts), and unknown keys and values
that its grammar cannot read are collected with what was probably meant, since Hydra stops at the
first.
"""

from __future__ import annotations

import importlib
import inspect
import re
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from conf.signatures import class_arguments
from data_prep.errors import InputError, attempt, by_stage, config_text, near, plain_message
from data_prep.settings import ADDRESS, MUST_EXIST, REFERENCE, RELEASE, several

HERE = Path(__file__).parent

SETTINGS = {
    "prep": "data_prep.settings:PrepSettings",
    "remove": "data_prep.settings:RemoveSettings",
    "split": "data_prep.settings:SplitSettings",
    "pretrain": "pretrain.settings:PretrainSettings",
    "plan": "pretrain.settings:PlanSettings",
    "features": "pretrain.settings:FeaturesSettings",
    "bench": "pretrain.settings:BenchSettings",
    "finetune": "finetune.settings:FinetuneSettings",
    "evaluate": "finetune.settings:EvaluateSettings",
    "predict": "finetune.settings:PredictSettings",
    "demo": "finetune.settings:DemoSettings",
}
GIVEN = {"objective": ("encoder",)}
"""Arguments that the program passes itself to what a group names."""

OF_INIT = "init"
"""backbone=init: the architecture of what the run begins from."""

RECIPE = "experiment"
"""The group whose options set keys of all others."""

STAGES = "stages"
"""The key of a recipe that is trained as several runs, one after the other."""


def settings_for(command: str, words: list[str]) -> Any:
    """Composes and checks the settings of a command; of a recipe with stages, those of the first.

    Raises:
        InputError: see `stages_for`.
    """
    return next(iter(stages_for(command, words).values()))


def stages_for(command: str, words: list[str]) -> dict[str, Any]:
    """Composes and checks the settings of a command, of each stage by its name.

    Without stages there is one, which has no name. A recipe's `stages` maps names to what each
    changes: keys of the command, and other options of groups. What was typed wins over that in all
    stages, and `stages.NAME.key=value` wins over both in its own. A stage's run is RUN.NAME.

    Args:
        command: prep, pretrain, finetune, ...
        words: what the user typed after it: `key=value`, `group=option`, and `--config-dir DIR`
            with groups of the user's own.

    Raises:
        InputError: anything unknown, missing, given twice or out of range; everything that can be
            found, of all stages.
    """
    model = settings_class(command)
    line = read_words(command, words)
    problems = line.problems
    for group in sorted(set(line.missing) - line.given):
        options = ", ".join(sorted(line.options(group)))
        problems.append(f"{group}: missing; give {group}= one of {options}")
    try:
        line.compose([])
        accepted = line.accepted()
        line.compose(accepted)
        lines = line.stages(accepted)
    except Exception as error:  # Hydra raises a dozen kinds; the message is what matters.
        raise InputError([*problems, line.unreadable(error)]) from error
    found: dict[str, Any] = {}
    said: dict[str, list[str]] = {}
    for name, one in lines.items():
        if one.of_init:
            attempt(one.problems, _take_backbone, one)
        one.problems += _target_problems(model, one)
        try:
            found[name] = model.model_validate(
                {key: value for key, value in one.config.items() if value != "???"}
            )
        except ValidationError as error:
            one.problems += _settings_problems(error, one)
        for problem in one.problems[len(problems) :]:
            said.setdefault(problem, []).append(name)
    problems += by_stage(said, list(lines))
    if problems:
        raise InputError(problems + _absent(model, line))
    return {name: _fetched(model, lines[name], made) for name, made in found.items()}


def stage_names(command: str, words: list[str]) -> list[str]:
    """The names of the stages that `stages_for` would give, whatever else is wrong with the words.

    Raises:
        InputError: nothing can be composed of them.
    """
    line = read_words(command, words)
    try:
        line.compose([])
    except Exception as error:
        raise InputError(line.unreadable(error)) from error
    stages = line.config.get(STAGES)
    return [str(name) for name in stages] if isinstance(stages, dict) else [""]


def recipes(*, small: bool) -> list[str]:
    """Names of the recipes in conf/experiment: as the papers state them, or for two CPU cores."""
    found = (file.stem for file in (HERE / RECIPE).glob("*.yaml"))
    return sorted(name for name in found if name.endswith("_small") == small)


@dataclass
class Line:
    """A command line, sorted into options of groups and values of keys, and what it comes to."""

    command: str
    groups: dict[str, Any]
    """The groups of the command with their default options."""
    own: Path | None
    chosen: dict[str, str] = field(default_factory=dict)
    values: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    given: set[str] = field(default_factory=set)
    """Keys that were typed, also those with a wrong option."""
    config: dict[str, Any] = field(default_factory=dict)
    choices: dict[str, Any] = field(default_factory=dict)
    """The option of each group that the composed `config` has, by words, recipe or default."""
    stage: str = ""
    """The stage that it is of, where there are several."""
    of_init: bool = False
    """Whether the backbone is that of what the run begins from."""

    def options(self, group: str) -> set[str]:
        """The options of a group, the user's own among them."""
        roots = [HERE, *([self.own] if self.own else [])]
        found = {file.stem for root in roots for file in (root / group).glob("*.yaml")}
        return found | ({"null"} if self.groups[group] is None else set())

    def file(self, group: str) -> Path:
        """The YAML that a group's option was taken from."""
        name = f"{self.choices[group]}.yaml"
        own = (self.own or HERE) / group / name
        return own if own.is_file() else HERE / group / name

    @property
    def missing(self) -> list[str]:
        """Groups without a default of which no option was given."""
        return [g for g, o in self.groups.items() if o == "???" and g not in self.chosen]

    def compose(self, values: list[str]) -> None:
        """Fills `config` and `choices`; raises whatever Hydra raises."""
        from hydra import compose, initialize_config_dir
        from omegaconf import OmegaConf, open_dict

        search = [f"hydra.searchpath=[{_quoted(f'file://{self.own}')}]"] if self.own else []
        # Any option will do to look for what else is wrong.
        some = {group: min(self.options(group)) for group in self.missing}
        options = {**self.chosen, **some}.items()
        chosen = [f"{group}={option}" for group, option in options if option != "null"]
        with initialize_config_dir(version_base="1.3", config_dir=str(HERE)):
            config = compose(self.command, [*search, *chosen, *values], return_hydra_config=True)
        with open_dict(config):
            choices = config.pop("hydra").runtime.choices
        self.choices = {group: choices[group] for group in self.groups}
        plain = OmegaConf.to_container(config, resolve=True)
        assert isinstance(plain, dict)
        self.config = {str(key): value for key, value in plain.items()}

    def accepted(self, stage: str = "") -> list[str]:
        """Overrides of keys that exist; the others are problems.

        Args:
            stage: of those that were typed for that stage alone.
        """
        found: list[str] = []
        if not self.values:
            return found  # help alone does not wait for what settings import
        model = settings_class(self.command)
        texts, fields = _text_keys(model), {key for key, _ in _fields(model)}
        for typed, value in self.values.items():
            where, key = self._of_stage(typed)
            if where != stage or (stage and key in self.groups):
                continue
            parent = self.config
            *above, last = key.split(".")
            known = key in fields
            for part in above:
                child = parent.get(part)
                known = known and isinstance(child, dict)
                parent = child if isinstance(child, dict) else {}
            # Arguments of a class are checked against its signature, which knows more than the
            # YAML; a file of a group may leave out what has a default.
            if last not in parent and not known and "_target_" not in parent:
                self.problems.append(f"{typed}={value}: no such key; {self.near(key)}")
                continue
            if not value and parent.get(last) != "":
                self.problems.append(f"{typed}=: has no value; is a variable of the shell empty?")
                continue
            # null stays null where the default is; else it is a name like any other.
            literal = key in texts and not (value == "null" and parent.get(last) is None)
            override = f"++{key}={_quoted(value) if literal else _bare(value)}"
            if _is_readable(override):
                found.append(override)
            else:
                self.problems.append(
                    f"{typed}={value}: cannot be read; a list is written [1,2,3], a mapping "
                    "{a: 1}, each in quotes for the shell if there are spaces in it"
                )
        return found

    def _of_stage(self, key: str) -> tuple[str, str]:
        """The stage that a typed key is for, if it is for one alone, and the key there."""
        stages = self.config.get(STAGES)
        for stage in stages if isinstance(stages, dict) else [self.stage]:
            if key.startswith(f"{STAGES}.{stage}."):
                return stage, key.removeprefix(f"{STAGES}.{stage}.")
        return "", key

    def stages(self, values: list[str]) -> dict[str, Line]:
        """A line for each stage, in order; without stages one, which has no name.

        Each has the problems of this one, and its own behind them.

        Args:
            values: what `accepted` found for all of them.
        """
        if STAGES not in self.config:
            return {"": replace(self, problems=[*self.problems])}
        stages = self.config[STAGES]
        if not isinstance(stages, dict) or not all(
            re.fullmatch("[A-Za-z0-9_-]+", str(name)) and isinstance(changes, dict | None)
            for name, changes in stages.items()
        ):
            raise ValueError(f"{STAGES}: expected a mapping of names to what each stage changes")
        return {name: self._staged(name, changes or {}, values) for name, changes in stages.items()}

    def _staged(self, name: str, changes: dict[str, Any], values: list[str]) -> Line:
        typed = {self._of_stage(key): value for key, value in self.values.items()}
        own = {key: value for (stage, key), value in typed.items() if stage == name}
        stated = {g: o for g, o in changes.items() if g in self.groups and isinstance(o, str)}
        chosen = {g: o for g, o in own.items() if g in self.groups}
        for group, option in (stated | chosen).items():
            if option not in self.options(group):
                raise ValueError(
                    f"{STAGES}.{name}.{group}={option}: no such {group}; "
                    f"{near(option, self.options(group))}"
                )
        line = replace(self, stage=name, chosen=stated | self.chosen | chosen)
        line.problems = [*self.problems]
        line.compose(values)  # what is typed may be an argument of what the stage chooses
        given = line.accepted(name)
        line.compose([*values, *given])
        del line.config[STAGES]
        all_stages = {key for stage, key in typed if not stage}
        wins = {*all_stages, *own, *self.chosen}
        rest = {key: value for key, value in changes.items() if key not in stated}
        _overlay(line.config, rest, lambda key: _touches(key, wins))
        if line.config.get("run") not in (None, "???"):
            line.config["run"] = f"{line.config['run']}.{name}"
        return line

    def near(self, key: str) -> str:
        """A hint at the key that was probably meant."""
        known = {*_flat(self.config), *self.groups}
        for group, node in self.config.items():
            if isinstance(node, dict) and "_target_" in node:
                known |= {f"{group}.{name}" for name in class_arguments(node["_target_"])}
        return near(key, known - {key}, f"voxelith {self.command} --help lists them")

    def origin(self, key: str) -> str:
        """` (set in FILE)` for a key that nobody typed."""
        typed = [
            name for stage, name in map(self._of_stage, self.values) if stage in ("", self.stage)
        ]
        if _touches(key, typed):
            return ""
        said = {key, f"{STAGES}.{self.stage}.{key}"}
        if self.choices.get(RECIPE) and said & {*_flat(_load(self.file(RECIPE)))}:
            return f" (set in {_name(self.file(RECIPE))})"
        group = key.partition(".")[0]
        return f" (set in {_name(self.file(group))})" if self.choices.get(group) else ""

    def unreadable(self, error: Exception) -> str:
        """What stopped Hydra, said in a line."""
        from hydra.errors import MissingConfigException
        from omegaconf.errors import OmegaConfBaseException
        from yaml import MarkedYAMLError  # type: ignore[import-untyped]

        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        if isinstance(error, MarkedYAMLError) and error.problem_mark is not None:
            mark = error.problem_mark
            return f"{mark.name}, line {mark.line + 1}: is no YAML ({error.problem})"
        if isinstance(error, OmegaConfBaseException) and error.full_key:
            return f"{error.full_key}: {first}"
        words = " ".join(f"{group}={option}" for group, option in self.chosen.items())
        if isinstance(error, MissingConfigException) and error.options and error.missing_cfg_file:
            return f"{words}: {first}; {near(Path(error.missing_cfg_file).name, error.options)}"
        return f"{words}: {first}"


def read_words(command: str, words: Iterable[str]) -> Line:
    """Sorts the words of a command line.

    Raises:
        InputError: there is something wrong with `--config-dir`, so that nothing else can be said.
    """
    groups = _defaults(command)
    rest, own = _take_config_dir(words, groups)
    line = Line(command, groups, own)
    for word in rest:
        key, equals, value = word.partition("=")
        key = key.lstrip("+")
        if not equals or not re.fullmatch(r"[A-Za-z_][\w.]*", key):
            line.problems.append(
                f"{word}: expected key=value, without dashes before it or spaces in it"
            )
            continue
        line.given.add(key)
        if (key, value) == ("backbone", OF_INIT) and key in groups:
            line.of_init = True
            continue
        known = line.chosen if key in groups else line.values
        if known.get(key, value) != value:
            line.problems.append(f"{key}={value}: {key}={known[key]} was given before; give one")
        elif key in groups and value not in line.options(key):
            hint = near(value.removesuffix(".yaml"), line.options(key))
            line.problems.append(f"{key}={value}: no such {key}; {hint}")
        else:
            known[key] = value
    return line


def extended(command: str) -> str | None:
    """The command whose configuration this one's extends."""
    entries = _load(HERE / f"{command}.yaml").get("defaults", [])
    return next((e for e in entries if isinstance(e, str) and e != "_self_"), None)


def _defaults(command: str) -> dict[str, Any]:
    """The groups of a command with their default options, ??? where there is none."""
    more = extended(command)
    found = _defaults(more) if more else {}
    for entry in _load(HERE / f"{command}.yaml").get("defaults", []):
        if isinstance(entry, dict):
            found |= {str(k): v for k, v in entry.items()}
    return found


def _load(file: Path) -> dict[str, Any]:
    from omegaconf import OmegaConf

    found = OmegaConf.to_container(OmegaConf.load(file))
    return {str(k): v for k, v in found.items()} if isinstance(found, dict) else {}


def _name(file: Path) -> str:
    """A file of ours from conf on, another one as it is."""
    return str(file.relative_to(HERE.parent) if file.is_relative_to(HERE.parent) else file)


def settings_class(command: str) -> type[BaseModel]:
    """The model that a command's configuration must fit."""
    module, _, name = SETTINGS[command].partition(":")
    found: type[BaseModel] = getattr(importlib.import_module(module), name)
    return found


def take_option(words: Iterable[str], name: str) -> tuple[list[str], list[str]]:
    """The words without an option, and its values: `--name VALUE` or `--name=VALUE`."""
    rest, values = [], []
    queue = iter(words)
    for word in queue:
        if word == name or word.startswith(f"{name}="):
            values.append(word.partition("=")[2] or next(queue, ""))
        else:
            rest.append(word)
    return rest, values


def _take_config_dir(words: Iterable[str], groups: Iterable[str]) -> tuple[list[str], Path | None]:
    rest, own = take_option(words, "--config-dir")
    if not own:
        return rest, None
    if len(own) > 1:
        raise InputError(f"--config-dir: given {len(own)} times; give one folder")
    folder = Path(own[0]).resolve()
    if not own[0] or not folder.is_dir():
        raise InputError(f"--config-dir {own[0]}: no such folder; give one with YAML groups")
    files = [file for group in groups for file in (folder / group).glob("*.yaml")]
    if not files:
        wanted = ", ".join(f"{group}/NAME.yaml" for group in groups) or "this command has no groups"
        raise InputError(f"--config-dir {own[0]}: holds no options of groups ({wanted})")
    ours = [f for f in files if (HERE / f.parent.name / f.name).exists()]
    if ours:
        raise InputError(
            [f"{f}: {f.parent.name}={f.stem} is one of voxelith; rename the file" for f in ours]
        )
    return rest, folder


def _touches(key: str, keys: Iterable[str]) -> bool:
    """Whether a dotted key is one of them, or a part of one, or has one as a part."""
    return any(f"{key}.".startswith(f"{k}.") or k.startswith(f"{key}.") for k in keys)


def _overlay(
    config: dict[str, Any], changes: Mapping[str, Any], kept: Callable[[str], bool], above: str = ""
) -> None:
    """Sets keys of a config, those of mappings in it one by one, but for those that are kept.

    A key may be dotted: beside `objective: NAME`, its arguments are `objective.ARGUMENT`.
    """
    for dotted, given in changes.items():
        key, dot, rest = dotted.partition(".")
        value = {rest: given} if dot else given
        name = f"{above}{key}"
        if isinstance(value, dict) and isinstance(config.get(key), dict):
            _overlay(config[key], value, kept, f"{name}.")
        elif not kept(name):
            config[key] = value


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in config.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _flat(value, f"{name}.")
        if key != "_target_":
            yield name


def _is_readable(override: str) -> bool:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        return not OverridesParser.create().parse_override(override).is_sweep_override()
    except HydraException:
        return False


def _bare(value: str) -> str:
    """Without quotes around a list or mapping, which would make it a text."""
    return re.sub(r"""^(['"])([\[{].*[\]}])\1$""", r"\2", value)


def _quoted(value: str) -> str:
    """A value that Hydra's grammar takes literally."""
    if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"":
        value = value[1:-1]
    escaped = re.sub(r"(\\*)(')", r"\1\1\\\2", value)
    escaped = re.sub(r"(\\+)$", r"\1\1", escaped)
    # OmegaConf reads the result once more and would fill in ${...}.
    return "'" + re.sub(r"(\\*)\$\{", r"\1\1\\${", escaped) + "'"


def _fields(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """The settings of a model, those of its parts with dotted names."""
    for name, setting in model.model_fields.items():
        yield prefix + name, setting
        for kind in _kinds(setting.annotation):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from _fields(kind, f"{prefix}{name}.")


def _text_keys(model: type[BaseModel]) -> set[str]:
    """Names of the settings that are paths or free text, which Hydra must not parse."""
    return {key for key, f in _fields(model) if {Path, str} & set(_kinds(f.annotation))}


def _absent(model: type[BaseModel], line: Line) -> list[str]:
    """Inputs that are not there: said here along with other problems, else by who opens them."""
    wanted = [key for key, setting in _fields(model) if MUST_EXIST in setting.metadata]
    remote = [
        key
        for key, setting in _fields(model)
        if _may_be_remote(setting) or ADDRESS in setting.metadata
    ]
    given = {key: several(line.values[key]) for key in wanted if key in line.values}
    return [
        f"{k}={one}: is not there"
        for k, v in given.items()
        for one in (v if isinstance(v, list) else [v])
        if not (k in remote and _is_remote(one)) and not Path(one).exists()
    ]


def _take_backbone(line: Line) -> None:
    """Puts the architecture of what the run begins from in place of a backbone's option.

    Arguments that were typed go before it.

    Raises:
        InputError: there is none, or it does not say.
    """
    init = line.config.get("init")
    if not init:
        raise InputError("backbone=init: of what? give init=RUN, init=RELEASE or init=FILE as well")
    from pretrain.fetch import resolve
    from pretrain.start import backbone_of

    typed = {
        key.removeprefix("backbone."): line.config["backbone"][key.removeprefix("backbone.")]
        for key in line.values
        if key.startswith("backbone.") and "." not in key.removeprefix("backbone.")
    }
    own = Path(line.config["runs"]) / str(line.config["run"])
    path = _begun_from(line, str(init)) or resolve(init)
    # A run that has begun needs what it began from no more.
    there = path if path.exists() or not (own / "run.json").is_file() else own
    line.config["backbone"] = backbone_of(there) | typed


def _may_be_remote(setting: FieldInfo) -> bool:
    return REFERENCE in setting.metadata or RELEASE in setting.metadata


def _is_remote(value: str) -> bool:
    from data_prep.references import is_reference
    from pretrain.registry import KNOWN

    return is_reference(value) or value in KNOWN


def _fetched(model: type[BaseModel], line: Line, made: Any) -> Any:
    """Settings that name a checkpoint elsewhere, with the folder or file where it is now.

    A path forgets the second slash of `https://`, so the reference is taken from the words.

    Raises:
        InputError: it is not there or does not verify.
    """
    here: dict[str, str] = {}
    problems: list[str] = []
    for key, setting in _fields(model):
        given = line.config.get(key)
        if not _may_be_remote(setting) or not given or not _is_remote(str(given)):
            continue
        if key == "init" and (start := _begun_from(line, str(given))):
            here[key] = str(start)
            continue
        try:
            here[key] = str(_local(given, release=RELEASE in setting.metadata))
        except InputError as error:
            problems += [f"{key}: {problem}" for problem in error.problems]
    if problems:
        raise InputError(problems)
    given = {key: value for key, value in line.config.items() if value != "???"}
    return model.model_validate(given | here) if here else made


def _begun_from(line: Line, ref: str) -> Path | None:
    """Where the start of a run lay, if the run has a checkpoint and began from this reference.

    It needs that no more, and may go on where there is no cache and no network.
    """
    from data_prep.files import read_note
    from data_prep.references import without_secrets

    if line.command != "pretrain":
        return None
    own = Path(line.config["runs"]) / str(line.config["run"])
    began = read_note(own / "config.json").get("init")
    same = f"init={without_secrets(ref)}" in read_note(own / "run.json").get("command", [])
    done = any((own / "checkpoints").glob("step-*.pt"))
    return Path(began) if began and same and done else None


def _local(ref: str, *, release: bool) -> Path:
    if release:
        from pretrain.adopt import released

        return released(ref)
    from pretrain.fetch import resolve

    return resolve(ref)


def _kinds(annotation: Any) -> list[Any]:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return [k for part in typing.get_args(annotation) for k in _kinds(part)]
    if typing.get_origin(annotation) is typing.Annotated:
        return _kinds(typing.get_args(annotation)[0])
    return [annotation]


def _target_problems(model: type[BaseModel], line: Line) -> list[str]:
    """What is wrong with the arguments of the classes that groups name."""
    named = [
        name
        for name, setting in model.model_fields.items()
        if name in line.groups and typing.get_origin(setting.annotation) is dict
    ]
    if not named:
        return []  # prep and predict do not wait for torch here
    from pretrain.arguments import check_arguments, locate, split_target

    problems = []
    for where in named:
        node = line.config[where]
        if not isinstance(node, dict):
            problems.append(
                f"{where}={node}{line.origin(where)}: options are chosen in a YAML's list of "
                f"defaults; write `defaults: [override /{where}: {node}]` there"
            )
            continue
        if "_target_" not in node:
            problems.append(
                f"{where}{line.origin(where)}: has no _target_; give package.module.Class there"
            )
            continue
        path, arguments = split_target(node)
        try:
            target = locate(path, where)
        except InputError as error:
            problems += error.problems
            continue
        foreign = _foreign(where, set(inspect.signature(target).parameters), line)
        if foreign:
            problems.append(_not_of_the_recipe(where, foreign, line))
        arguments = {name: value for name, value in arguments.items() if name not in foreign}
        problems += check_arguments(target, arguments, where, GIVEN.get(where, ()))[1]
    return problems


def _foreign(where: str, taken: set[str], line: Line) -> list[str]:
    """Arguments that the recipe sets for its own option and the chosen one does not take."""
    if where not in line.chosen or not line.choices.get(RECIPE):
        return []
    names = _load(line.file(RECIPE)).get(where, {})
    return [n for n in names if n not in taken and f"{where}.{n}" not in line.values]


def _not_of_the_recipe(where: str, foreign: list[str], line: Line) -> str:
    def of(recipe: dict[str, Any]) -> Any:
        entries = [e for e in recipe.get("defaults", []) if isinstance(e, dict)]
        return next((e[k] for e in entries for k in e if k.endswith(f"/{where}")), None)

    file, option = line.file(RECIPE), line.chosen[where]
    others = sorted(f.stem for f in file.parent.glob("*.yaml") if of(_load(f)) == option)
    also = f", or take a recipe with it, {RECIPE}= {', '.join(others)}" if others else ""
    return (
        f"{where}={option}: does not take {', '.join(foreign)}, which {_name(file)} sets for its "
        f"own {where}={of(_load(file)) or line.groups[where]}; leave out {where}={option} or "
        f"{RECIPE}={file.stem}{also}"
    )


def _settings_problems(error: ValidationError, line: Line) -> list[str]:
    """One line for each key that is wrong."""
    found: dict[str, list[Any]] = {}
    for item in error.errors(include_url=False):
        path: list[str] = []
        node: Any = line.config
        for part in item["loc"]:
            if not isinstance(node, dict):
                break  # a place in a list, or one of several allowed types
            path.append(str(part))
            node = node.get(part)
        found.setdefault(".".join(path), []).append(item)
    said = [re.split("[=: ]", problem, maxsplit=1)[0] for problem in line.problems]
    return [_setting_problem(key, items, line) for key, items in found.items() if key not in said]


def _setting_problem(key: str, items: list[Any], line: Line) -> str:
    if not key:
        return plain_message(items)
    depth = key.count(".") + 1
    if items[0]["type"] == "missing" and len(items[0]["loc"]) == depth:
        return f"{key}: missing; give {key}=..."
    if items[0]["type"] == "extra_forbidden":
        hint = f"no such key; {line.near(key)}"
        if key in line.groups:
            hint = (
                "its YAML must begin with the line `# @package _global_` to set keys of all groups"
            )
        return f"{key}{line.origin(key)}: {hint}"
    value: Any = line.config
    for part in key.split("."):
        value = value[part]
    shown = line.values.get(key, config_text(value))
    value = "" if isinstance(value, dict) else f"={shown}"
    return f"{key}{value}{line.origin(key)}: {plain_message(items, depth)}"
