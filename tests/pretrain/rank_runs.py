"""Runs of several ranks in processes of their own, over gloo on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pretrain.settings import PretrainSettings

ROOT = Path(__file__).parents[2]


def machine(devices: int, **more: Any) -> dict[str, Any]:
    """Settings of a trainer with so many ranks."""
    return {"accelerator": "cpu", "devices": devices, "workers": 0, "threads": 1, **more}


def script(chosen: PretrainSettings, folder: Path, changes: str = "") -> Path:
    """A program that trains a run, as the command would; `changes` is Python from before that.

    `RANK` is known there: the number of the process that runs it.
    """
    file = folder / f"{chosen.run}.py"
    file.write_text(
        "import os, sys, time\n"
        "from pathlib import Path\n"
        "RANK = int(os.environ.get('RANK', os.environ.get('LOCAL_RANK', 0)))\n"
        f"{changes}\n"
        "if __name__ == '__main__':\n"
        "    import voxelith\n"
        "    from pretrain.settings import PretrainSettings\n"
        "    from pretrain.train import pretrain\n"
        f"    chosen = PretrainSettings.model_validate_json({chosen.model_dump_json()!r})\n"
        "    command = voxelith.COMMANDS['pretrain']._replace(run=lambda words: pretrain(chosen))\n"
        "    voxelith.COMMANDS['pretrain'] = command\n"
        "    sys.exit(voxelith.main(['pretrain']))\n"
    )
    return file


def environment() -> dict[str, str]:
    """What such a process gets."""
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def begin(command: Sequence[str | Path], **more: Any) -> subprocess.Popen[str]:
    """Starts a program, whose output can be read."""
    return subprocess.Popen(
        [sys.executable, *map(str, command)], env=environment(), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, **more,
    )  # fmt: skip


def run(
    chosen: PretrainSettings, folder: Path, changes: str = ""
) -> subprocess.CompletedProcess[str]:
    """Trains to the end, with Lightning's launcher."""
    return subprocess.run(
        [sys.executable, str(script(chosen, folder, changes))], env=environment(), text=True,
        capture_output=True, timeout=300, check=False,
    )  # fmt: skip
