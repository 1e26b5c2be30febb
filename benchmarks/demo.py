"""The demo's numbers and the picture of its report, as the README shows them.

    python benchmarks/demo.py [--work DIR] [--browser chromium]

Runs `voxelith demo` and keeps its table and what its steps took as docs/results/demo. The picture,
docs/images/report.png, is the top of the report as a browser without a window draws it; where there
is none (`apt-get install chromium`), that says so and everything else is kept.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import torch
from line import ROOT
from PIL import Image

from data_prep.files import write_json
from pretrain.bench import machine
from pretrain.run_folder import commit, versions

KEPT, PICTURE = ROOT / "docs" / "results" / "demo", ROOT / "docs" / "images" / "report.png"
SIZE = (1200, 3250)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "demo")
    parser.add_argument("--browser", default="chromium")
    chosen = parser.parse_args()
    work = chosen.work.resolve()
    shutil.rmtree(work, ignore_errors=True)  # what is there would be gone on with, and not timed
    said = run_demo(work)
    print(said)
    KEPT.mkdir(parents=True, exist_ok=True)
    for name in ("table.md", "table.json"):
        shutil.copy(work / "table" / name, KEPT / name)
    steps: Counter[str] = Counter()  # two of them are preps
    for name, seconds in re.findall(r"^  (\w+): (\d+) s$", said, re.MULTILINE):
        steps[name] += int(seconds)
    write_json(
        KEPT / "machine.json",
        {
            "seconds": dict(steps),
            "machine": machine(torch.device("cpu")),
            "versions": versions(),
            "commit": commit(),
        },
    )
    browser = shutil.which(chosen.browser)
    if browser is None:
        print(f"{chosen.browser}: not here, so {PICTURE} stays as it is", file=sys.stderr)
        return
    draw(browser, work / "report.html", work / "report.png")
    with Image.open(work / "report.png") as picture:
        picture.convert("RGB").quantize(256).save(PICTURE, optimize=True)
    print(f"{KEPT} and {PICTURE}: written")


def run_demo(work: Path) -> str:
    """What it says on its way."""
    done = subprocess.run(
        [sys.executable, "-m", "voxelith", "demo", f"output={work}"],
        stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT,
    )  # fmt: skip
    return done.stdout


def draw(browser: str, page: Path, picture: Path) -> None:
    """The top of a page as a browser shows it."""
    subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
         f"--window-size={SIZE[0]},{SIZE[1]}", f"--screenshot={picture}", page.as_uri()],
        check=True, capture_output=True,
    )  # fmt: skip


if __name__ == "__main__":
    main()
