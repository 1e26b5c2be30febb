"""Commands after each other on a real cluster: to the table, or visibly to an end."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from lab import Lab, call

import voxelith
from data_prep.errors import InputError
from slurm.chain import chain, plan_chain, status, unknown_sweep

CPUS = "cluster.gpus_per_node=0 cluster.cpus_per_task=1 cluster.memory=1900 cluster.partition=main"
TINY = (
    "backbone=resenc_small objective=cnn_mae backbone.features=[4,6] backbone.strides=[1,2] "
    "backbone.blocks=[1,1] objective.block=4 batch_size=2 warmup=1 log_every=1 health.every=0 "
    "trainer.threads=1 crop_size=[8,12,8]"
)


def written(tmp_path: Path, pretrain: Path, labelled: Path, steps: int = 60) -> Path:
    file = tmp_path / "work.yaml"
    file.write_text(
        f"""\
cluster: {CPUS} cluster.max_restarts=0
stages:
  - pretrain corpus={pretrain} run=a runs={tmp_path}/runs steps={steps} {TINY}
  - export {tmp_path}/runs/a {tmp_path}/release
  - >-
    finetune -m task=hippocampus corpus={labelled} ckpt={tmp_path}/release labels=2 seed=0
    runs={tmp_path}/sweep steps=2 batch_size=1 warmup=1 trainer.threads=1 crop_size=[16,24,16]
  - table {tmp_path}/sweep output={tmp_path}/table
"""
    )
    return file


def ended(lab: Lab, folder: Path) -> dict[str, str]:
    def said() -> dict[str, str]:
        found = status(folder)
        found.pop("chain")
        return {name: text.partition(",")[0] for name, text in found.items()}

    over = {"COMPLETED", "FAILED", "CANCELLED", "finished before"}
    lab.until(lambda: set(said().values()) <= over, 700, f"the chain: {said()}")
    return said()


@pytest.mark.slurm
@pytest.mark.timeout(900)
def test_from_a_corpus_to_a_table(
    lab: Lab, pretrain_corpus: Path, labelled_corpus: Path, tmp_path: Path
) -> None:
    """The pretraining is requeued on its way, which must not break the chain."""
    file = written(tmp_path, pretrain_corpus, labelled_corpus, steps=300)
    first = chain(file)
    assert list(first["jobs"]) == ["1-pretrain", "2-export", "3-finetune", "4-table"]
    with pytest.raises(InputError, match=r"its job \d+ is"):
        chain(file)
    job, log = first["jobs"]["1-pretrain"], tmp_path / "runs" / "a" / "metrics.csv"
    lab.until(lambda: log.exists() and len(log.read_text().splitlines()) > 5, 90, "some steps")
    call("scancel", "--signal=USR2", job)
    assert set(ended(lab, tmp_path / "work").values()) == {"COMPLETED"}
    assert lab.job(job)["Restarts"] == "1"
    with (tmp_path / "table" / "table.csv").open(newline="") as opened:
        assert list(csv.DictReader(opened))
    runs = [path.parent.name for path in (tmp_path / "sweep").glob("*/rows.csv")]
    assert len(runs) == 2 and sum("scratch" in name for name in runs) == 1
    assert voxelith.main(["launch", "status", str(tmp_path / "work")]) == 0
    again = chain(file)
    assert again["to_start"] == [] and again["jobs"] == {}
    # Another last command: that alone.
    file.write_text(file.read_text().replace("/table\n", "/other\n"))
    assert list(chain(file)["jobs"]) == ["4-table"]
    assert ended(lab, tmp_path / "work")["4-table"] == "COMPLETED"
    assert (tmp_path / "other" / "table.csv").exists()


@pytest.mark.slurm
@pytest.mark.timeout(900)
def test_a_stage_that_fails_ends_the_chain_and_is_where_it_goes_on(
    lab: Lab, pretrain_corpus: Path, labelled_corpus: Path, tmp_path: Path
) -> None:
    file = written(tmp_path, pretrain_corpus, labelled_corpus)
    planted = tmp_path / "fails"
    planted.touch()
    crash = f'cluster.environment=["test -e {planted} && exit 9"]'
    text = file.read_text()
    file.write_text(text.replace("  - export ", f"  - export '{crash}' "))
    chain(file)
    found = ended(lab, tmp_path / "work")
    assert found == {
        "1-pretrain": "COMPLETED", "2-export": "FAILED", "3-finetune": "CANCELLED",
        "4-table": "CANCELLED",
    }, found  # fmt: skip
    planted.unlink()
    assert list(chain(file)["jobs"]) == ["2-export", "3-finetune", "4-table"]
    found = ended(lab, tmp_path / "work")
    assert found.pop("1-pretrain") == "finished before"
    assert set(found.values()) == {"COMPLETED"}


def test_what_is_wrong_in_any_stage_is_told_before_the_first_is_submitted(
    pretrain_corpus: Path, labelled_corpus: Path, tmp_path: Path
) -> None:
    file = written(tmp_path, pretrain_corpus, labelled_corpus)
    text = file.read_text()
    for old, new in (
        ("objective.block=4", "objective.block=32"), ("/release labels=2", "/relase labels=few"),
        ("/runs/a ", "/runs/b "), ("table ", "tabel "), ("max_restarts", "max_restart"),
    ):  # fmt: skip
        assert old in text
        text = text.replace(old, new)
    file.write_text(text)
    with pytest.raises(InputError) as error:
        chain(file)
    said = "\n".join(error.value.problems)
    for part in (
        "stage 1 (pretrain): cluster.max_restart: no such key", "did you mean table",
    ):  # fmt: skip
        assert part in said, said
    file.write_text(text.replace("max_restart=", "max_restarts="))
    with pytest.raises(InputError) as error:
        chain(file)
    said = "\n".join(error.value.problems)
    for part in (
        "do not fit together", "stage 2 (export): ", "runs/b: is not there",
        "stage 3 (finetune): ckpt=", "labels=few: expected", "stage 4 (tabel): no such stage",
    ):  # fmt: skip
        assert part in said, said
    assert not (tmp_path / "work").exists() and not (tmp_path / "runs").exists()


def test_a_plan_says_what_waits_for_what(
    pretrain_corpus: Path, labelled_corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = written(tmp_path, pretrain_corpus, labelled_corpus)
    assert voxelith.main(["launch", "chain", str(file), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert f"checked when it starts: ckpt={tmp_path}/release" in said
    assert said.count("#SBATCH --time=01:00:00") == 2 and "#SBATCH --array=0-1" in said
    assert "gpus-per-node" not in said and not (tmp_path / "work").exists()
    # With GPUs for all, and those of a node: none of it is for an export.
    gpus = file.read_text().replace(CPUS, "cluster.gpus_per_node=1 cluster.gres=gpu:1")
    file.write_text(gpus)
    assert voxelith.main(["launch", "chain", str(file), "--dry-run"]) == 0
    scripts = capsys.readouterr().out.split("#!/bin/bash")[1:]
    assert [script.count("gpu") for script in scripts] == [1, 0, 1, 0]
    assert scripts[1].count("--mem=16G") == scripts[1].count("--cpus-per-task=4") == 1
    file.write_text(f"cluster: {CPUS}\nstage: []\n")
    assert voxelith.main(["launch", "chain", str(file)]) == 2
    assert "expected `stages:`" in capsys.readouterr().err


def test_a_sweep_has_room_for_every_run_it_may_come_to() -> None:
    """Two checkpoints that share their scratch twins, or not: what of it is known is the most."""
    words = ["ckpt=a,b", "labels=4,16", "seed=0,1,2", "runs=x", *CPUS.split()]
    sweep = unknown_sweep(words)
    assert sweep.size == len(sweep.elements) == 2 * 2 * 3 * 2
    assert unknown_sweep([*words, "init=scratch"]).size == 12
    assert sweep.elements[3][1:4] == ["launch", "element", "3"]


def test_a_chain_knows_the_runs_of_a_recipe_in_stages(
    pretrain_corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = (
        f"pretrain corpus={pretrain_corpus} run=s runs={tmp_path} experiment=dino_3dino_small "
        "backbone.embed_dim=48 objective.prototypes=4"
    )
    file = tmp_path / "work.yaml"
    file.write_text(
        f"cluster: {CPUS}\nstages:\n  - {recipe}\n  - export {tmp_path}/s.highres {tmp_path}/r\n"
    )
    found = chain(file, dry_run=True)
    assert found["to_start"] == ["1-pretrain", "2-export"]
    file.write_text(file.read_text().replace("s.highres", "s"))
    with pytest.raises(InputError, match=r"in stages, each a run: give s\.base or s\.highres"):
        chain(file, dry_run=True)
    # What it will make is known where the recipe itself cannot be checked yet.
    first = f"pretrain corpus={pretrain_corpus} run=a runs={tmp_path} steps=9 {TINY}"
    later = f"pretrain init={tmp_path}/a init_covers=0.1 {recipe.removeprefix('pretrain ')}"
    last = f"export {tmp_path}/s.highres {tmp_path}/r"
    file.write_text(f"cluster: {CPUS}\nstages:\n  - {first}\n  - {later}\n  - {last}\n")
    assert chain(file, dry_run=True)["to_start"] == ["1-pretrain", "2-pretrain", "3-export"]
    assert "checked when it starts: init=" in capsys.readouterr().out


def test_a_quote_that_is_left_open_is_told_by_its_stage(tmp_path: Path) -> None:
    file = tmp_path / "chain.yaml"
    file.write_text("stages:\n- prep input='/data output=c\n- \"export 'runs/a b\"\n")
    with pytest.raises(InputError) as error:
        plan_chain(file, tmp_path / "chain")
    said = error.value.problems
    assert [problem[:8] for problem in said] == ["stage 1:", "stage 2:"]
    assert all("No closing quotation" in problem for problem in said)
    file.write_text('cluster: "cluster=\'x"\nstages: [prep input=a output=b]\n')
    with pytest.raises(InputError, match=r"cluster: .*No closing quotation"):
        plan_chain(file, tmp_path / "chain")
