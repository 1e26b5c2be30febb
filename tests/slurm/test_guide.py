"""The guide to clusters, command by command, on a real SLURM."""

from __future__ import annotations

from pathlib import Path

import pytest
from lab import Lab
from test_guides import GUIDES, follow


@pytest.mark.slurm
def test_the_guide_does_what_it_says(lab: Lab, tmp_path: Path) -> None:
    follow(GUIDES / "pretrain-on-a-cluster.md", tmp_path)
