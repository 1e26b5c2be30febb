"""A sweep starts each run once, its twins with it, and after a kill exactly what is missing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import add_split, two_channels, write_encoder

from conf.compose import settings_for
from data_prep.errors import InputError
from data_prep.preprocess import Preprocess
from finetune.forecast import forecast
from finetune.infer import mirrored, segment
from finetune.rows import read_rows
from finetune.sweep import LEDGER, _devices, expand, plan_jobs, read_ledger, sweep
from pretrain.settings import TrainerSettings

BACKBONE: dict[str, Any] = {
    "name": "resenc.ResEncUNetEncoder",
    "args": {"in_channels": 1, "features": [4, 8], "strides": [1, 2], "blocks": [1, 1]},
}


def release(path: Path, seed: int, **backbone: Any) -> Path:
    described = {**BACKBONE, "args": {**BACKBONE["args"], **backbone}}
    return write_encoder(path, described, seed=seed, name=path.name)


@pytest.fixture(scope="module")
def given(labelled_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two checkpoints of one architecture, two seeds: four pretrained runs and two twins."""
    folder = tmp_path_factory.mktemp("sweep")
    add_split(labelled_corpus, "sweep", 4, 1)
    a, b = release(folder / "a", 1), release(folder / "b", 2)
    return [
        "task=hippocampus", f"corpus={labelled_corpus}", f"ckpt={a},{b}", "labels=2", "seed=0,1",
        "split=sweep", "steps=3", "batch_size=2", "warmup=1",
        "crop_size=[16,24,16]", "trainer=cpu", "trainer.workers=0",
    ]  # fmt: skip


@pytest.fixture
def words(given: list[str], tmp_path: Path) -> list[str]:
    """The same, into a folder of the test's own."""
    return [*given, f"runs={tmp_path / 'runs'}"]


def runs_of(words: list[str]) -> Path:
    return Path(next(w for w in words if w.startswith("runs=")).removeprefix("runs="))


def test_commas_make_combinations_and_brackets_hold_them_together() -> None:
    found = expand(["ckpt=a,b", "crop_size=[32,48,32],[8,8,8]", "run.x='p,q'", "seed=0"])
    assert [(f["ckpt"], f["crop_size"]) for f in found] == [
        ("a", "[32,48,32]"),
        ("a", "[8,8,8]"),
        ("b", "[32,48,32]"),
        ("b", "[8,8,8]"),
    ]
    assert {f["run.x"] for f in found} == {"'p,q'"}
    with pytest.raises(InputError) as error:
        expand(["seed=0", "seed=1", "run=mine", "what"])
    assert len(error.value.problems) == 3


def test_checkpoints_of_one_architecture_share_their_twins(
    words: list[str], tmp_path: Path
) -> None:
    jobs = plan_jobs(words)
    scratch = [job for job in jobs if job.plan.settings.init == "scratch"]
    assert (len(jobs), len(scratch)) == (6, 2)
    assert all(job.twin for job in scratch)
    assert len({job.name for job in jobs}) == 6
    # Twins differ in init alone, and all of a seed train on the same cases.
    for seed in (0, 1):
        alike = [job for job in jobs if job.plan.settings.seed == seed]
        assert len({job.plan.identity["config_hash"] for job in alike}) == 1
        assert len({job.plan.train_keys for job in alike}) == 1
    assert len(plan_jobs(words, twins=False)) == 4
    # Asked for, a twin is no addition, and still one run.
    asked = plan_jobs([*words, "init=scratch,pretrained"])
    assert (len(asked), sum(job.twin for job in asked)) == (6, 0)
    # Another architecture has another twin.
    other = release(tmp_path / "other", 1, features=[4, 12])
    wider = [w if not w.startswith("ckpt=") else f"{w},{other}" for w in words]
    assert sum(j.plan.settings.init == "scratch" for j in plan_jobs(wider)) == 4


def test_the_crops_that_weights_were_made_on_are_nothing_of_a_twin(
    words: list[str], tmp_path: Path
) -> None:
    """A given crop is that of all; without one each checkpoint's own decides, and its twin's."""
    other = write_encoder(tmp_path / "c", BACKBONE, crop_size=[24, 24, 16], name="c")
    wider = [w if not w.startswith("ckpt=") else f"{w},{other}" for w in words]
    unsaid = [w for w in wider if not w.startswith("crop_size=")]
    for asked, twins in ((wider, 2), (unsaid, 4)):
        jobs = plan_jobs(asked)
        assert sum(job.plan.settings.init == "scratch" for job in jobs) == twins
        assert len({job.plan.identity["config_hash"] for job in jobs}) == twins // 2


@pytest.mark.parametrize(
    ("value", "parts"),
    [
        ("/d/O'Brien/a,/d/b", ["/d/O'Brien/a", "/d/b"]),
        ("/d/b,/d/O'Brien/a,c'est", ["/d/b", "/d/O'Brien/a", "c'est"]),
        ("'a,b',\"c,d\", 'e,f'", ["'a,b'", '"c,d"', " 'e,f'"]),
        ("{a: 'x}', b: ['y]','z']},'O'", ["{a: 'x}', b: ['y]','z']}", "'O'"]),
        ("[O'Brien,a],b", ["[O'Brien,a]", "b"]),
    ],
)
def test_a_quote_opens_where_a_value_begins(value: str, parts: list[str]) -> None:
    assert [found["ckpt"] for found in expand([f"ckpt={value}"])] == parts


OWN = ["own={lr: 2e-3}", "search={lr: [1e-3,2e-3,3e-3], draws: 1}"]


def test_each_shared_recipe_has_a_third_arm_of_its_own(words: list[str]) -> None:
    """What is trained is the same; what it is compared with is not."""
    alone = [w for w in words if not w.startswith("seed=")]
    jobs = plan_jobs([*alone, *OWN, "init=scratch", "recipe_of=own", "lr=1e-3,3e-3"])
    assert len({job.name for job in jobs}) == len(jobs) == 2
    identities = [job.plan.identity for job in jobs]
    assert len({identity["recipe_hash"] for identity in identities}) == 1
    assert len({identity["config_hash"] for identity in identities}) == 2


def test_runs_in_another_precision_are_other_runs(words: list[str]) -> None:
    alone = [w for w in words if not w.startswith("seed=")]
    jobs = plan_jobs([*alone, "trainer.precision=32-true,bf16-mixed"])
    twins = [job.plan.identity["config_hash"] for job in jobs if job.twin]
    assert (len(jobs), len(set(twins))) == (6, 2)


def test_runs_that_would_share_a_name_are_refused(words: list[str]) -> None:
    """How a run is watched is no part of its name: one of the two would not be done."""
    alone = [w for w in words if not w.startswith("seed=")]
    with pytest.raises(InputError) as error:
        plan_jobs([*alone, "window_batch=1,2"])
    assert len(error.value.problems) == 2  # one for each checkpoint; twins are added once
    assert all("which does not say window_batch; vary" in one for one in error.value.problems)


@pytest.mark.parametrize(
    "order", [("pretrained,scratch", "own,twin"), ("scratch,pretrained", "twin,own")]
)
def test_the_three_arms_are_one_sweep(
    words: list[str], order: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Pretrained with scratch's own recipe is no arm: it is left out, and that is said."""
    alone = [w for w in words if not w.startswith(("seed=", "ckpt="))]
    ckpt = next(w for w in words if w.startswith("ckpt=")).partition(",")[0]
    given = [*alone, ckpt, *OWN, "lr=1e-3", f"init={order[0]}", f"recipe_of={order[1]}"]
    arms = {job.plan.settings.arm: job for job in plan_jobs(given)}
    assert sorted(arms) == ["pretrained", "scratch", "scratch-own"] and len(plan_jobs(given)) == 3
    for arm, job in arms.items():
        # What is planned is what a process of its own makes of the words.
        told = settings_for("finetune", list(job.words))
        assert (told.arm, told.effective()) == (
            arm,
            job.plan.settings.model_copy(update={"crop_size": told.crop_size}),
        )
    sweep(given, dry_run=True)
    assert "1 combinations left out: init=pretrained" in capsys.readouterr().out


def test_a_combination_is_checked_as_the_run_would_be(words: list[str]) -> None:
    alone = [w for w in words if not w.startswith("seed=")]
    # Nobody would train the own recipe.
    with pytest.raises(InputError, match="give init=scratch"):
        plan_jobs([*alone, *OWN, "lr=1e-3", "recipe_of=twin,own"])
    # Each rate is fine for the twin, and 5e-3 is not for the third arm.
    arms = ["init=scratch", "recipe_of=twin,own", "lr=1e-3,5e-3"]
    with pytest.raises(InputError, match=r"rates \[0.005\] are not among search.lr") as error:
        plan_jobs([*alone, *OWN, *arms])
    assert len(error.value.problems) == 1
    # What is wrong with the first combination does not hide the others.
    for_labels = [w for w in alone if not w.startswith("labels=")]
    with pytest.raises(InputError) as error:
        plan_jobs([*for_labels, *OWN, *arms, "labels=many,2,lots", "seed=0,-1"])
    said = "\n".join(error.value.problems)
    assert all(wrong in said for wrong in ("labels=many", "labels=lots", "seed=-1"))


def test_all_that_is_wrong_is_said_before_anything_starts(words: list[str]) -> None:
    wrong = [w for w in words if not w.startswith(("labels=", "seed="))]
    with pytest.raises(InputError) as error:
        sweep([*wrong, "labels=2,many,99", "seed=0,-1"])
    said = "\n".join(error.value.problems)
    assert "labels=many" in said and "seed=-1" in said
    assert not runs_of(words).exists()


def test_what_the_network_refuses_is_said_before_anything_starts(words: list[str]) -> None:
    wrong = [w for w in words if not w.startswith("crop_size=")]
    with pytest.raises(InputError, match=r"crop_size=\[17, 24, 16\]") as error:
        sweep([*wrong, "crop_size=[17,24,16]"])
    assert len(error.value.problems) == 1  # of six runs
    with pytest.raises(InputError, match="freeze=9"):
        sweep([*words, "freeze=9"])
    assert not runs_of(words).exists()


def test_a_release_is_adapted_anew_for_each_run(
    words: list[str], samples: Path, tmp_path: Path
) -> None:
    """Two channels for one, in both ways: what was made for one of them is not the other's."""
    two = two_channels(samples, tmp_path, ("MR", "MR"), train=5)
    kept = [w for w in words if not w.startswith(("corpus=", "seed=", "split="))]
    more = [f"corpus={two}", "split=few", "seed=0", "adapt_channels=repeat,first"]
    jobs = plan_jobs([*kept, *more])
    for job in jobs:
        assert job.plan.release.adapt_channels == job.plan.settings.adapt_channels
    assert len(jobs) == 6  # two checkpoints, two ways, and a twin of each way


def test_a_dry_run_starts_nothing_and_names_the_cost(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    found = sweep(words, dry_run=True, jobs=2)
    assert len(found["to_start"]) == 6
    said = capsys.readouterr().out
    assert "6 to start, 2 at a time" in said and "hours" in said and "GiB kept" in said
    assert not runs_of(words).exists()


@pytest.mark.parametrize("protocol", ["probe_knn", "probe_ridge"])
def test_a_dry_run_of_a_probe_trains_nothing_either(
    words: list[str], monkeypatch: pytest.MonkeyPatch, protocol: str
) -> None:
    """What it costs is a look of the frozen encoder at each crop; its decoder is fitted after."""
    monkeypatch.setattr(torch.Tensor, "backward", lambda *_: pytest.fail("trained"))
    plans = [job.plan for job in plan_jobs([*words, f"protocol={protocol}"])]
    assert forecast(plans, 1).seconds > 0


def test_the_cost_counts_the_windows_that_the_network_sees(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the checkpoint's grid, not the scan's, and mirrored as often as the task allows."""
    preprocess = Preprocess.default((0.7, 0.9, 0.8), multiple=(8, 8, 8)).to_dict()
    fine = write_encoder(tmp_path / "fine", BACKBONE, preprocess=preprocess)
    alone = [w for w in words if not w.startswith(("seed=", "ckpt="))]
    given = [*alone, f"ckpt={fine}", "tta=true", "task.flip=[true,false,true]"]
    (job,) = plan_jobs(given, twins=False)
    plan, seen = job.plan, []

    def network(window: torch.Tensor) -> torch.Tensor:
        seen.append(len(window))
        return torch.zeros(len(window), 2, *window.shape[2:])

    for key in plan.test.keys:
        volume = plan.corpus.volume(plan.corpus.position(key))
        size, overlap = plan.settings.crop_size, plan.settings.overlap
        assert size is not None
        both = mirrored(network, plan.settings.task.flip)
        segment(both, volume, plan.preprocess, size, overlap, torch.device("cpu"))
    # A window takes a second, and nothing else takes any time.
    monkeypatch.setattr("finetune.forecast._measure", lambda plan: (0.0, 1.0, 0))
    assert forecast([plan], 1).seconds == sum(seen) > 4


@pytest.mark.parametrize(("devices", "dealt"), [(1, set("0123")), (2, {"0,1", "2,3"})])
def test_each_run_at_a_time_has_gpus_of_its_own(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, devices: int,
    dealt: set[str], capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    seen = []
    monkeypatch.setattr("finetune.sweep._run", lambda job, given, *_: seen.append(given))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    given = [w for w in words if not w.startswith(("trainer=", "runs="))]
    given += [f"runs={tmp_path / 'runs'}", f"trainer.devices={devices}"]
    sweep(given)
    assert len(seen) == 6 and {one["CUDA_VISIBLE_DEVICES"] for one in seen} == dealt
    assert f"{len(dealt)} at a time" in capsys.readouterr().out


@pytest.mark.parametrize("visible", ["-1", "0,1"])
def test_what_is_said_to_be_visible_is_no_gpu_where_there_is_none(
    visible: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert _devices(TrainerSettings(accelerator="auto")) == []


def test_runs_of_several_machines_are_refused(words: list[str]) -> None:
    """Each would wait for ranks that nobody starts."""
    with pytest.raises(InputError, match=r"trainer.nodes=2: .* `voxelith launch finetune -m`"):
        sweep([*words, "trainer.nodes=2"], dry_run=True)


def test_a_run_of_more_gpus_than_there_are_is_refused(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finetune.sweep._run", lambda *_: pytest.fail("started"))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    given = [w for w in words if not w.startswith(("trainer=", "runs="))]
    with pytest.raises(InputError, match=r"trainer.devices=2: this machine has 1 GPUs"):
        sweep([*given, f"runs={tmp_path / 'runs'}", "trainer.devices=2"])
    assert not (tmp_path / "runs").exists()


def test_runs_import_nothing_from_where_the_sweep_was_started(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("conf", "finetune"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("raise RuntimeError('not ours')")
    monkeypatch.chdir(tmp_path)
    alone = [w for w in words if not w.startswith(("ckpt=", "seed=", "runs="))]
    ckpt = next(w for w in words if w.startswith("ckpt=")).partition(",")[0]
    found = sweep([*alone, ckpt, "init=scratch", "runs=runs"])
    assert len(found["done"]) == 1


def test_after_a_kill_exactly_the_killed_runs_start_again(words: list[str]) -> None:
    """Three of six runs are killed while they work; a rerun starts these, a third one nothing."""
    runs = runs_of(words)
    root = str(Path(__file__).parents[2])
    command = [sys.executable, "-m", "voxelith", "finetune", "-m", *words, "jobs=3"]
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    first = subprocess.Popen(
        command, cwd=root, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
    )
    killed: set[str] = set()
    while len(killed) < 3 and first.poll() is None:
        for lease in runs.glob("*/lease.json"):
            if lease.parent.name not in killed and len(killed) < 3:
                try:
                    os.kill(json.loads(lease.read_text())["pid"], signal.SIGKILL)
                except (ProcessLookupError, ValueError, FileNotFoundError):
                    continue
                killed.add(lease.parent.name)
        time.sleep(0.01)
    _, said = first.communicate(timeout=300)
    assert len(killed) == 3 and first.returncode == 1
    assert b"3 of 6 runs are not finished" in said
    entries = {entry.run: entry for entry in read_ledger(runs / LEDGER)}
    assert {name for name, entry in entries.items() if entry.state == "failed"} == killed
    assert all(entries[name].note == "killed by signal 9" for name in killed)

    again = sweep(words, jobs=3)
    assert (len(again["done"]), again["failed"]) == (6, [])
    entries = {entry.run: entry for entry in read_ledger(runs / LEDGER)}
    assert {name for name, entry in entries.items() if entry.starts == 2} == killed
    assert {entry.state for entry in entries.values()} == {"done"}
    arms = {read_rows(runs / name / "rows.csv")[0].arm for name in entries}
    assert arms == {"pretrained", "scratch"}

    before = {name: entry.starts for name, entry in entries.items()}
    sweep(words, jobs=3)
    assert {e.run: e.starts for e in read_ledger(runs / LEDGER)} == before


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGHUP])
def test_a_sweep_that_is_ended_stops_its_runs_and_says_so(
    words: list[str], tmp_path: Path, end: signal.Signals
) -> None:
    longer = [w for w in words if not w.startswith(("runs=", "steps=", "seed="))]
    longer += [f"runs={tmp_path / 'runs'}", "steps=100000", "seed=0"]
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "voxelith", "finetune", "-m", *longer, "jobs=1"]
    process = subprocess.Popen(
        command,
        cwd=root,
        env=environment,
        stderr=subprocess.PIPE,
        # Under nohup, as whoever runs the tests may be, the signal would be ignored.
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
    )
    try:
        while not list((tmp_path / "runs").glob("*/metrics.csv")):
            assert process.poll() is None
            time.sleep(0.05)
        # A second sweep of the folder is refused while this one works.
        with pytest.raises(InputError, match="another sweep is at work"):
            sweep(longer, jobs=1)
        process.send_signal(end)
        _, said = process.communicate(timeout=120)
        assert process.returncode == 1, said
    except BaseException:
        process.terminate()  # and with it the run, which would go on for hours
        process.wait()
        raise
    entries = read_ledger(tmp_path / "runs" / LEDGER)
    assert [entry.state for entry in entries] == ["stopped"] * 3
    assert sorted(entry.starts for entry in entries) == [0, 0, 1]
    # The one that ran has saved where it was, and gone.
    assert not list((tmp_path / "runs").glob("*/lease.json"))
    assert len(list((tmp_path / "runs").glob("*/checkpoints/step-*.pt"))) >= 1


def test_a_run_that_a_killed_sweep_leaves_is_not_started_beside_itself(
    words: list[str], tmp_path: Path
) -> None:
    """It is waited for, and counts as done; its sweep had been told to outlive its terminal."""
    runs = tmp_path / "runs"
    one = [w for w in words if not w.startswith(("ckpt=", "seed=", "runs="))]
    ckpt = next(w for w in words if w.startswith("ckpt=")).partition(",")[0]
    one += [ckpt, "init=scratch", f"runs={runs}"]
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    command = ["nohup", sys.executable, "-m", "voxelith", "finetune", "-m", *one, "jobs=1"]
    nowhere = subprocess.DEVNULL
    first = subprocess.Popen(
        command, cwd=root, env=environment, stdin=nowhere, stdout=nowhere, stderr=nowhere
    )
    while not (leases := list(runs.glob("*/lease.json"))):
        assert first.poll() is None
        time.sleep(0.01)
    left = json.loads(leases[0].read_text())["pid"]
    os.kill(left, signal.SIGSTOP)  # so that it is at work for as long as we look
    try:
        first.send_signal(signal.SIGHUP)
        with pytest.raises(subprocess.TimeoutExpired):
            first.wait(1)
        first.kill()
        first.wait()
        with pytest.raises(InputError, match=r"runs that it left .* lease.json"):
            sweep(one, jobs=1)
        assert [entry.state for entry in read_ledger(runs / LEDGER)] == ["running"]
    finally:
        os.kill(left, signal.SIGCONT)
    (name,) = (lease.parent.name for lease in leases)
    until = time.monotonic() + 120
    while not (runs / name / "rows.csv").exists() or leases[0].exists():
        assert time.monotonic() < until
        time.sleep(0.05)
    while True:  # the interpreter takes a moment to leave
        try:
            assert sweep(one, jobs=1)["done"] == [name]
            break
        except InputError:
            assert time.monotonic() < until
            time.sleep(0.05)
    assert [(e.state, e.starts) for e in read_ledger(runs / LEDGER)] == [("done", 1)]
