"""What a user can do wrong, said so that they can mend it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


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


class CorruptionError(InputError):
    """Stored bytes are not the bytes that were written: a damaged shard, index or release."""


def near(name: str, known: Iterable[str]) -> str:
    """A hint at what was probably meant; a dotted key is also found by its last part."""
    options = sorted(known)
    match = difflib.get_close_matches(name, options, n=1) or [
        option for option in options if option.rpartition(".")[2] == name
    ]
    return f"did you mean {match[0]}?" if match else f"known: {', '.join(options)}"


def plain_message(item: Mapping[str, Any]) -> str:
    """One entry of pydantic's errors, without the library's way of saying it."""
    message = str(item["msg"]).removeprefix("Value error, ")
    return message.replace("Input should be", "must be")
