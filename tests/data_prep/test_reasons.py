"""Every code under which prep leaves something out is in the list that its users read."""

from __future__ import annotations

import re
from pathlib import Path

import data_prep

CODE = re.compile(
    r'(?:Reject\(|LeftOut\([^"()]+,|append\(\(|code, detail =|leave_out\([^"()]+,)\s*"([a-z_0-9]+)"'
)


def test_each_code_is_explained() -> None:
    root = Path(data_prep.__file__).parent
    listed = set(re.findall(r"`([a-z0-9_]+)`", (root.parent / "docs/scans.md").read_text()))
    used = set()
    for file in root.rglob("*.py"):
        used |= set(CODE.findall(file.read_text()))
    assert len(used) > 20 and {"empty_label", "implausible_extent"} <= used
    assert used - listed == set()
