"""One progress bar for all long work: live on a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm

from data_prep.files import legible


def tell(line: str) -> None:
    """Prints a line, whatever names of files are in it."""
    print(legible(line))


class _Log:
    """A log file has no carriage to return: each state of the bar is a line of its own."""

    def write(self, text: str) -> None:
        """Writes the state of the bar, without the blanks that overwrite the one before."""
        if text.strip():
            sys.stderr.write(text.replace("\r", "").rstrip() + "\n")

    def flush(self) -> None:
        """Passes on."""
        sys.stderr.flush()


def bar(**options: Any) -> Any:
    """A tqdm bar on standard error with rate and ETA; in a log, a line every half a minute."""
    if sys.stderr.isatty():
        return tqdm(dynamic_ncols=True, mininterval=0.5, **options)
    return tqdm(file=_Log(), ncols=100, mininterval=30, **options)
