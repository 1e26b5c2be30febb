"""What a user can do wrong, said so that they can mend it."""

from __future__ import annotations

from collections.abc import Sequence


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
