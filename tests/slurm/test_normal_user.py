"""Daemons and jobs of a user who is not root: what a requeue needs is no more than that."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from lab import missing

HERE = Path(__file__).parent
USER = "nobody"


@pytest.mark.slurm
@pytest.mark.timeout(400)
@pytest.mark.skipif(os.geteuid() != 0, reason="all tests of jobs are a normal user's already")
def test_a_run_of_a_normal_user_is_requeued() -> None:
    """That of test_daemons.py, once more, with a SLURM that belongs to `nobody`."""
    if absent := missing():
        pytest.skip(f"no SLURM: {', '.join(absent)} missing")
    as_user = ["runuser", "-u", USER, "--"]
    test = f"{HERE / 'test_daemons.py'}::test_near_its_time_limit_a_job_saves_and_comes_back[USR2]"
    if subprocess.run([*as_user, "test", "-r", HERE, "-a", "-x", sys.executable]).returncode:
        pytest.skip(f"{USER} may not read this checkout or its environment")
    home = Path(tempfile.mkdtemp(prefix="nobody"))  # pytest's own folder is closed to others
    user = pwd.getpwnam(USER)
    os.chown(home, user.pw_uid, user.pw_gid)
    environment = {name: value for name, value in os.environ.items() if name != "SLURM_CONF"}
    environment |= {"HOME": str(home), "TMPDIR": str(home), "VOXELITH_NEEDS_SLURM": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    try:
        done = subprocess.run(
            [*as_user, *command, test], cwd=HERE.parents[1], env=environment,
            capture_output=True, text=True, timeout=380,
        )  # fmt: skip
    finally:
        shutil.rmtree(home, ignore_errors=True)
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout + done.stderr
