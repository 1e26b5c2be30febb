"""Two of the small recipes, whole: what `make recipes` does for all of them."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NAMES = ["hi_end_mae_small", "mae_2d_small"]


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_small_recipes_train_and_keep_their_logs(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            sys.executable, "-W", "ignore", "benchmarks/recipes.py", *NAMES,
            "--output", str(tmp_path), "--work", str(tmp_path / "work"), "--beside", "1",
        ],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    table = (tmp_path / "README.md").read_text()
    for name in NAMES:
        found = json.loads((tmp_path / f"{name}.json").read_text())
        with (tmp_path / f"{name}.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert int(rows[-1]["step"]) == found["steps"]
        assert found["loss"] == [float(row["loss"]) for row in rows]
        assert min(found["loss"][-3:]) < 0.9 * found["loss"][0]
        assert [row["collapsed"] for row in found["health"]] == [0] * len(found["health"])
        assert found["health"][0]["step"] == 0 and 0 < found["health"][-1]["probe_dice"] < 1
        assert f"[{name}]({name}.csv)" in table
        for picture in (f"{name}.png", f"{name}-strip.png"):
            assert (tmp_path / picture).stat().st_size > 10_000


def test_every_small_recipe_has_its_logs() -> None:
    """Those that are committed are of recipes that exist, and none is missing."""
    from conf.compose import recipes, stages_for

    kept = {path.stem for path in (ROOT / "docs" / "results" / "recipes").glob("*_small*.json")}
    wanted = set()
    for name in recipes(small=True):  # a recipe with stages has those of each
        words = ["corpus=c", f"run={name}", f"experiment={name}"]
        wanted |= {stage.run for stage in stages_for("pretrain", words).values()}
    assert kept == wanted
