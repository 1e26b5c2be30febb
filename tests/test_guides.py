"""Every command of docs/guides, and the README's first ones, run as they stand, in an empty folder.

Blocks of `sh` are run one after the other; the lines of a block of `text` behind one must be among
what it says, numbers aside.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
GUIDES = ROOT / "docs" / "guides"
BLOCK = re.compile(r"^```(sh|text|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NUMBER = re.compile(r"\d+(\.\d+)?")


@pytest.mark.parametrize("guide", sorted(path.stem for path in GUIDES.glob("*.md")))
def test_a_guide_does_what_it_says(guide: str, tmp_path: Path) -> None:
    if guide == "pretrain-on-a-cluster":
        pytest.skip("its commands need a SLURM: tests/slurm/test_guide.py runs them")
    follow(GUIDES / f"{guide}.md", tmp_path)


def test_the_readme_gives_the_features_that_it_shows(tmp_path: Path) -> None:
    (tmp_path / "samples").symlink_to(ROOT / "samples")
    follow(ROOT / "README.md", tmp_path)


def follow(guide: Path, folder: Path) -> None:
    """Runs the blocks of a guide in a folder, in one shell for all that they export."""
    blocks = BLOCK.findall(guide.read_text())
    assert any(kind == "sh" for kind, _ in blocks)
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
    }
    said, exports = "", ""
    for kind, text in blocks:
        if kind == "text":
            known = [NUMBER.sub("N", line).strip() for line in said.splitlines()]
            for line in text.splitlines():
                wanted = NUMBER.sub("N", line).strip()
                assert any(wanted in one for one in known), f"{line!r} is not in:\n{said}"
            continue
        command = ["bash", "-e", "-c", exports + text]
        if kind == "python":
            command = [sys.executable, "-c", text]
        done = subprocess.run(
            command, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, f"{text}\n{done.stdout}"
        said = done.stdout
        exports += "".join(f"{line}\n" for line in text.splitlines() if line.startswith("export "))
