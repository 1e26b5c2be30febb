"""What a user can do wrong, said so that they can mend it."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ParamSpec, Self, TypeVar

P = ParamSpec("P")
T = TypeVar("T")
Place = TypeVar("Place")


class InputError(Exception):
    """The input is wrong and nothing was started; the command line prints it and exits with 2.

    Each problem is a sentence or two that names the file or key, says what was found and what
    was expected, and how to fix it. All problems of one input are collected before raising.
    """

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))

    def __reduce__(self) -> tuple[type[InputError], tuple[list[str]]]:
        return type(self), (self.problems,)


class Naming(str):
    """A problem that names files or subjects of the input; `public` says it without them."""

    public: str

    def __new__(cls, text: str, public: str) -> Self:
        """The problem in full, and as it is told where names must not be."""
        problem = super().__new__(cls, text)
        problem.public = public
        return problem

    def __reduce__(self) -> tuple[type[Naming], tuple[str, str]]:
        return type(self), (str(self), self.public)


def without_names(problem: str) -> str:
    """A problem as it is told where names must not be."""
    return problem.public if isinstance(problem, Naming) else problem


class CorruptionError(InputError):
    """Stored bytes are not the bytes that were written: a damaged shard, index or release."""


class LeftOutError(InputError):
    """Some of the input is wrong and the rest was done; `result` is what came of it."""

    def __init__(self, problems: str | Sequence[str], result: Any = None) -> None:
        super().__init__(problems)
        self.result = result


class UnreachableError(Exception):
    """A server does not answer, or not in full: nothing that the input could mend.

    The command line prints it without a traceback and exits with 1.
    """


def last_error(text: str) -> str:
    """The problem in what a process of the loader raised, which has its traceback before it."""
    return re.split(rf"{InputError.__module__}\.\w+Error: ", text)[-1].strip()


class NeighbourError(Exception):
    """Another process of the same training ended first; the message has its cause.

    The command line prints it without a traceback and exits with 1.
    """


class LostLeaseError(Exception):
    """Another process writes where this one did, which was taken for dead.

    The command line prints it without a traceback and exits with 1.
    """


class FailedError(Exception):
    """The work is done and what it found is bad; `result` is that.

    The command line prints it without a traceback and exits with 1.

    Attributes:
        final: whether a job must not be started again for it.
    """

    final = False

    def __init__(self, message: str, result: Any = None) -> None:
        super().__init__(message)
        self.result = result


def near(name: str, known: Iterable[str], otherwise: str = "") -> str:
    """A hint at what was probably meant; a dotted key is also found by its last part.

    Args:
        name: what was given.
        known: what there is.
        otherwise: the hint where nothing is near; by default all that there is.
    """
    options = sorted(known)
    match = difflib.get_close_matches(name, options, n=1) or [
        option for option in options if option.rpartition(".")[2] == name
    ]
    return f"did you mean {match[0]}?" if match else otherwise or f"known: {', '.join(options)}"


def some(names: Iterable[object], most: int = 5) -> str:
    """The first names, and a sign where there are more."""
    shown = [str(name) for name in names]
    return ", ".join([*shown[:most], *["..."] * (len(shown) > most)])


def attempt(
    problems: list[str], work: Callable[P, T], *args: P.args, **kwargs: P.kwargs
) -> T | None:
    """What `work` returns; wrong input joins the problems, to be told with what else is wrong."""
    try:
        return work(*args, **kwargs)
    except InputError as error:
        problems += error.problems
        return None


def named(key: str, path: Place, work: Callable[[Place], T]) -> T:
    """What `work` makes of the path that a setting names; problems begin with `key=path`."""
    try:
        return work(path)
    except InputError as error:

        def said(problem: str) -> str:
            return f"{key}={path}: {problem.removeprefix(f'{path}: ')}"

        problems = [
            Naming(said(p), said(p.public)) if isinstance(p, Naming) else said(p)
            for p in error.problems
        ]
        raise type(error)(problems) from error


def by_stage(said: Mapping[str, list[str]], stages: list[str]) -> list[str]:
    """Problems of a recipe's stages, each once, with the stages that have it unless all have.

    Args:
        said: the stages that have a problem, by its text.
        stages: all there are.
    """
    return [p if found == stages else f"{', '.join(found)}: {p}" for p, found in said.items()]


def plain_message(items: Sequence[Mapping[str, Any]], depth: int = 0) -> str:
    """Pydantic's errors of one value, without the library's way of saying it.

    Args:
        items: entries of `ValidationError.errors()`.
        depth: length of the path that leads to the value; what comes below it is a place in a list
            or one of several allowed types.
    """
    places = [(item, item["loc"][depth:]) for item in items]
    # Of several types the one that was meant counts; a list without its wrong items is too short.
    meant = [(item, below) for item, below in places if not item["type"].endswith("_type")]
    kept = [(item, below) for item, below in meant if item["type"] != "too_short"]
    shown = kept or meant or places
    types = {below[0] for _, below in shown if below and isinstance(below[0], str)}
    said = dict.fromkeys(_plain_item(item, below) for item, below in shown)
    return (", or " if len(types) > 1 else "; ").join(said)


def _plain_item(item: Mapping[str, Any], below: Sequence[int | str]) -> str:
    if item["type"] == "missing" and below:
        return f"has no value number {int(below[-1]) + 1}"
    message = str(item["msg"]).removeprefix("Value error, ")
    for pattern, plain in _PLAIN:
        message = re.sub(pattern, plain, message)
    return f"{item['input']} {message}" if any(isinstance(p, int) for p in below) else message


_PLAIN = (
    (r"Input should be a valid tuple", "must be a list, such as [a,b]"),
    (r"Input should be a valid dictionary.*", "has keys of its own, to be given one by one"),
    (r"Input should be", "must be"),
    (r"Tuple should have (.*) after validation, not", r"must have \1, found"),
)


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The settings that differ, as `key: old -> new`; of nested ones the innermost.

    Where another class is named, its arguments are not compared.
    """
    was, found = dict(_leaves(before)), dict(_leaves(now))
    other = [key for key in {**was, **found} if was.get(key, _UNSET) != found.get(key, _UNSET)]
    classes = tuple(key.removesuffix("_target_") for key in other if key.endswith("._target_"))
    return [
        f"{key}: {config_text(was.get(key, _UNSET))} -> {config_text(found.get(key, _UNSET))}"
        for key in other
        if key.endswith("._target_") or not key.startswith(classes)
    ]


_UNSET = "not set"


def config_text(value: Any) -> str:
    """A value as it is written in a configuration and on the command line."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k}: {config_text(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(config_text, value)) + "]"
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _leaves(settings: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, list) and any(isinstance(part, Mapping) for part in value):
            value = dict(enumerate(value))
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
