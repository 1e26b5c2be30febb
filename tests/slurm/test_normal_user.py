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

HERE = Path(__file__).parent
USER = "nobody"


def caps() -> list[str]:
    """What a user needs who may not look into where this Python lies: to read files, no more."""
    plain = ["runuser", "-u", USER, "--", "test", "-r", str(HERE), "-a", "-x", sys.executable]
    if subprocess.run(plain).returncode == 0:
        return []
    return [f"--{which}-caps=-all,+dac_read_search" for which in ("inh", "ambient")]


@pytest.mark.slurm
@pytest.mark.timeout(400)
@pytest.mark.usefixtures("lab")
@pytest.mark.skipif(os.geteuid() != 0, reason="all tests of jobs are a normal user's already")
def test_a_run_of_a_normal_user_is_requeued() -> None:
    """That of test_daemons.py, once more, with a SLURM that belongs to `nobody`."""
    user = pwd.getpwnam(USER)
    as_user = [
        "setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups", *caps(),
    ]  # fmt: skip
    test = f"{HERE / 'test_daemons.py'}::test_near_its_time_limit_a_job_saves_and_comes_back[USR2]"
    home = Path(tempfile.mkdtemp(prefix="nobody"))  # pytest's own folder is closed to others
    os.chown(home, user.pw_uid, user.pw_gid)
    environment = {name: value for name, value in os.environ.items() if name != "SLURM_CONF"}
    environment |= {"HOME": str(home), "TMPDIR": str(home), "VOXELITH_NEEDS_SLURM": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist"]
    try:
        done = subprocess.run(
            [*as_user, *command, test], cwd=HERE.parents[1], env=environment,
            capture_output=True, text=True, timeout=380,
        )  # fmt: skip
    finally:
        shutil.rmtree(home, ignore_errors=True)
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout + done.stderr
