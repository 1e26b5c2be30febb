"""One progress bar for all long work: live on a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm


def bar(**options: Any) -> Any:
    """A tqdm bar on standard error with rate and ETA.

    In a log file a bar that redraws itself is noise: there it says a line every half a minute.
    """
    terminal = sys.stderr.isatty()
    return tqdm(dynamic_ncols=terminal, mininterval=0.5 if terminal else 30, **options)
