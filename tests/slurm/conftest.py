"""The SLURM of this machine, for all tests that submit jobs."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from lab import Lab, missing
from launched import STEPS, Run


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    if absent := missing():
        reason = f"no SLURM: {', '.join(absent)} missing (apt-get install slurm-wlm munge)"
        if os.environ.get("VOXELITH_NEEDS_SLURM"):
            pytest.fail(reason)
        pytest.skip(reason)
    import tempfile

    # A socket's path must be short.
    with tempfile.TemporaryDirectory(prefix="lab", ignore_cleanup_errors=True) as folder:
        made = Lab(Path(folder) / "l")
        # Jobs run the command of this environment, whether or not it is activated.
        os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        try:
            yield made.start()
        finally:
            made.stop()


@pytest.fixture(scope="session")
def whole(lab: Lab, pretrain_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that nothing ends before its time."""
    run = Run(lab, pretrain_corpus, tmp_path_factory.mktemp("whole"), "whole")
    run.until_state("COMPLETED")
    assert run.restarts == 0 and run.rows == list(range(1, STEPS + 1))
    return run
