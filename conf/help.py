"""The keys of a command with their values and comments, as they would be composed. No torch here.

Values come from Hydra, so that a recipe's are those that it would run with; comments from the YAMLs
and, for the classes that groups name, from the docstrings of these.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from conf.compose import GIVEN, HERE, RECIPE, SETTINGS, STAGES, Line, extended, read_words
from conf.signatures import class_arguments
from data_prep.errors import InputError, config_text

WIDTH, LEFT = 100, 32


class Key(NamedTuple):
    """What a YAML says of a key: its comment, and whether a blank line comes before it."""

    about: str
    apart: bool = False


def describe(command: str, words: list[str]) -> str:
    """Groups and keys of a command; empty if it has none.

    Args:
        command: prep, pretrain, finetune, ...
        words: what else was typed: values are those that it comes to, and keys are those of the
            options that it chooses.

    Raises:
        InputError: words that cannot be composed.
    """
    if command not in SETTINGS:
        return ""
    line = read_words(command, words)
    try:
        line.compose([])
        line.compose(line.accepted())
    except Exception as error:
        raise InputError(line.unreadable(error)) from error
    return "\n".join(f"{title}:\n{rows}" for title, rows in _sections(line) if rows)


def describe_file(title: str, group: str, file: Path, values: Mapping[str, Any]) -> str:
    """The keys of an option that is no part of a command, as `describe` shows those that are.

    Args:
        title: above them.
        group: that the option is of.
        file: that says what its keys are about.
        values: of the keys.
    """
    return f"{title}:\n{_rows(_keys_in(group, file), dict(_leaves(values, f'{group}.')))}"


def _sections(line: Line) -> Iterator[tuple[str, str]]:
    options = {g: "???" if g in line.missing else line.choices[g] or "null" for g in line.groups}
    if options:
        first = next(iter(options))
        yield (
            f"groups (words beside --help count: {first}=NAME --help shows the keys of that)",
            "".join(
                _row(f"{group}={option}", ", ".join(sorted(line.options(group) - {"null"})))
                for group, option in options.items()
            )
            + _row("--config-dir DIR", f"your own options: {first}=mine is DIR/{first}/mine.yaml"),
        )
    values = dict(_leaves(line.config))
    command: str | None = line.command
    title = "keys"
    while command:
        yield title, _rows(keys_of(HERE / f"{command}.yaml"), values)
        command = extended(command)
        title = f"keys of {command}"
    stages = {name: value for name, value in values.items() if name.startswith(f"{STAGES}.")}
    yield (
        f"{STAGES} ({RECIPE}={line.choices.get(RECIPE)} is a run of each, one after the other)",
        "".join(_row(f"{name}={value}", "") for name, value in stages.items()),
    )
    for group in [group for group in options if isinstance(line.config.get(group), dict)]:
        file = line.file(group)
        keys: dict[str, Key] = {}
        for source in (HERE / group / f"{line.groups[group]}.yaml", *_bases(file), file):
            found = _keys_in(group, source)
            keys |= {k: key for k, key in found.items() if key.about or k not in keys}
        for name, argument in class_arguments(line.config[group].get("_target_", "")).items():
            if name not in GIVEN.get(group, ()):
                keys[f"{group}.{name}"] = Key(argument.about)
                values.setdefault(f"{group}.{name}", argument.default)
        yield f"{group}={line.choices[group]} ({headline(file).rstrip('.')})", _rows(keys, values)


def _bases(file: Path) -> list[Path]:
    """The options of the same group that an option begins from."""
    match = re.search(r"^defaults: \[([\w, ]+)\]$", file.read_text(), re.MULTILINE)
    return [file.with_name(f"{name.strip()}.yaml") for name in match[1].split(",")] if match else []


def _rows(keys: Mapping[str, Key], values: dict[str, str]) -> str:
    """A row for each key that has a value, which is taken out, or a comment on the keys in it."""
    rows: list[str] = []
    for name, key in keys.items():
        if name in values:
            row = _row(f"{name}={values.pop(name)}", key.about)
        elif key.about and any(other.startswith(f"{name}.") for other in values):
            row = _row(f"{name}.*", key.about)
        else:
            continue
        rows.append("\n" * (key.apart and bool(rows)) + row)
    return "".join(rows)


def _row(left: str, about: str) -> str:
    lines = [f"# {part}" for part in textwrap.wrap(about, WIDTH - LEFT - 5)] or [""]
    if len(left) > LEFT and about:
        lines.insert(0, "")
    lefts = [left, *[""] * (len(lines) - 1)]
    return "".join(f"  {a:<{LEFT}} {b}".rstrip() + "\n" for a, b in zip(lefts, lines, strict=True))


def _leaves(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in config.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        elif name != "_target_":
            yield f"{prefix}{name}", config_text(value)


def _keys_in(group: str, file: Path) -> dict[str, Key]:
    return {f"{group}.{name}": key for name, key in keys_of(file).items()} if file.is_file() else {}


def keys_of(file: Path) -> dict[str, Key]:
    """The keys that a YAML sets, dotted and in its order.

    A comment beside a key goes on in the lines below it, as far in as it began.
    """
    found: dict[str, Key] = {}
    above: list[tuple[int, str]] = []
    before, column = "x", 0
    for line in file.read_text().splitlines():
        match = re.fullmatch(r"( *)(\w+):(?: [^#]*)?(?:# (.*))?", line)
        if match:
            depth = len(match[1])
            above = [*(part for part in above if part[0] < depth), (depth, match[2])]
            name = ".".join(part for _, part in above)
            found[name] = Key(match[3] or "", not before.strip())
            column = match.start(3) if match[3] else 0
        elif column and line.startswith(f"{' ' * (column - 2)}# "):
            found[name] = found[name]._replace(about=f"{found[name].about} {line[column:]}")
        else:
            column = 0
        before = line
    return {name: key for name, key in found.items() if name not in ("defaults", "_target_")}


def headline(file: Path) -> str:
    """The first sentences of a YAML: the comment on its top."""
    lines = []
    for line in file.read_text().splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("# "))
    return " ".join(line for line in lines if not line.startswith("@package"))
