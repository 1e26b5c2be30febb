"""What is submitted, to the letter: golden/*.sbatch.

After a change that is meant, `VOXELITH_WRITE_GOLDEN=1 pytest tests/slurm/test_golden.py` writes
them anew; the diff is what a reviewer reads.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from slurm.chain import plan_chain
from slurm.launch import render
from slurm.prep import launch_prep
from slurm.settings import cluster_of

GOLDEN = Path(__file__).parent / "golden"
SAMPLES = Path(__file__).parent.parent.parent / "samples"
WORDS = ["pretrain", "corpus=corpora/ct", "run=first", "experiment=mae"]


def of_run(*words: str) -> str:
    cluster, _ = cluster_of(words)
    return render(Path("runs/first").resolve(), WORDS, cluster)


def on_nodes() -> str:
    return of_run(
        "cluster.nodes=2", "cluster.gpus_per_node=4", "cluster.partition=gpu",
        "cluster.account=lab", "cluster.qos=long", "cluster.constraint=a100&nvlink",
        "cluster.memory=480G", 'cluster.environment=["module load cuda"]',
    )  # fmt: skip


def in_apptainer() -> str:
    return of_run(
        "cluster.container=apptainer", "cluster.image=/images/voxelith.sif",
        "cluster.gres=gpu:a100:8",
    )  # fmt: skip


def in_pyxis() -> str:
    return of_run(
        "cluster.container=pyxis",
        "cluster.image=lab/voxelith:1",
        "cluster.mounts=/scratch:/scratch",
    )


def of_sweep() -> str:
    cluster, _ = cluster_of(["cluster.gpus_per_node=1", "cluster.array_limit=8"])
    return render(Path("sweep").resolve(), ["labels=4,16"], cluster, 24)


def of_prep() -> str:
    scripts = launch_prep(
        [f"input={SAMPLES / 'pretrain.csv'}", "output=corpora/ct", "cluster.array=8"], dry_run=True
    )["scripts"]
    return str(scripts["write"])


def of_chain() -> str:
    Path("runs/first").mkdir(parents=True)
    Path("work.yaml").write_text("stages: [export runs/first releases/first]\n")
    (stage,) = plan_chain(Path("work.yaml"), Path("work").resolve())
    return stage.script


CASES = {
    "two_nodes": on_nodes, "apptainer": in_apptainer, "pyxis": in_pyxis, "sweep": of_sweep,
    "prep": of_prep, "chain_export": of_chain,
}  # fmt: skip


@pytest.mark.parametrize("name", list(CASES))
def test_a_script_is_the_golden_one(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["/opt/env/bin/voxelith"])
    text = CASES[name]().replace(str(tmp_path), "/work").replace(str(SAMPLES), "/samples")
    file = GOLDEN / f"{name}.sbatch"
    if os.environ.get("VOXELITH_WRITE_GOLDEN"):
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    assert text == file.read_text()
    subprocess.run(["bash", "-n", file], check=True)


def test_no_golden_script_is_left_over() -> None:
    assert {path.stem for path in GOLDEN.iterdir()} == CASES.keys()
