"""requirements.lock: pinned, hashed, within pyproject's ranges, and nothing that steals."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
LOCK = ROOT / "requirements.lock"


def pins() -> dict[str, tuple[str, int]]:
    """Version and number of hashes of each package."""
    found = {}
    for block in re.split(r"\n(?=[a-z])", LOCK.read_text()):
        head = re.match(r"([a-z0-9._-]+)==([^\s;\\]+)", block)
        if head:
            hashes = re.findall(r"--hash=sha256:[0-9a-f]{64}", block)
            found[canonicalize_name(head[1])] = (head[2], len(hashes))
    return found


def test_the_lock_has_a_hash_for_each_version_and_is_what_pyproject_asks_for() -> None:
    locked = pins()
    assert len(locked) > 80 and all(hashes for _, hashes in locked.values())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *project["optional-dependencies"]["tensorboard"]]
    for requirement in map(Requirement, asked):
        version, _ = locked[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"{requirement} has {version}: make lock"


def test_containers_install_the_lock_by_its_hashes() -> None:
    recipes = [ROOT / "containers" / name for name in ("Dockerfile", "voxelith.def")]
    bases = set()
    for recipe in recipes:
        text = recipe.read_text()
        assert "--require-hashes -r /build/requirements.lock" in text
        bases |= set(re.findall(r"python:\d+\.\d+\.\d+-slim-\w+", text))
    assert len(bases) == 1  # of one version, in both
    kept = (ROOT / ".dockerignore").read_text().split()
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"][
        "packages"
    ]
    for name in {package.partition(".")[0] for package in packages}:
        assert f"!{name}" in kept
        assert re.search(rf"^    .*\b{name}\b.* /build/$", recipes[1].read_text(), re.MULTILINE)


def refused(*words: str, said: str = "") -> bool:
    script = ROOT / ".ci" / "no-malicious"
    done = subprocess.run([script, *words], input=said, text=True, capture_output=True)
    assert done.returncode in (0, 1), done.stderr
    return done.returncode == 1


@pytest.mark.parametrize(
    "line",
    [
        "lightning==2.6.2",
        "lightning==2.6.3 \\",
        "pytorch-lightning==2.6.3 ; python_version > '3.10'",
        "pytorch_lightning-2.6.2-py3-none-any.whl",
        "Lightning[extra]==2.6.3",
        '    "lightning": "2.6.3",',
        'lightning = "2.6.2"',
    ],
)
def test_malicious_releases_are_refused(line: str, tmp_path: Path) -> None:
    assert refused(said=f"torch==2.14.1\n{line}\n")
    (tmp_path / "a.lock").write_text(f"torch==2.14.1\n{line}\n")
    assert refused(str(tmp_path / "a.lock"))


def test_others_are_not_refused(tmp_path: Path) -> None:
    good = "lightning==2.6.6\npytorch-lightning==2.6.1\nlightning-utilities==0.15.3\nx==2.6.3\n"
    assert not refused(said=good + "lightning==2.6.20\n")
    assert not refused(str(LOCK), str(ROOT / "pyproject.toml"))
