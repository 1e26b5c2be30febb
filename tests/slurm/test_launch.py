"""What is submitted is readable, right in bash, and checked before it waits in a queue."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

import voxelith
from data_prep.errors import InputError
from slurm.chain import Stage
from slurm.launch import (
    Launched,
    Sweep,
    cancel,
    logs,
    plan_job,
    plan_sweep,
    render,
    status,
    submit_sweep,
)
from slurm.settings import ClusterSettings, cluster_of


def words(corpus: Path, tmp_path: Path, *more: str) -> list[str]:
    return [
        f"corpus={corpus}", "run=first", f"runs={tmp_path / 'my runs'}", "objective=cnn_mae",
        "backbone=resenc_small", "crop_size=[32,32,32]", "steps=10", "batch_size=32", "warmup=1",
        *more,
    ]  # fmt: skip


def options(script: str) -> dict[str, str]:
    lines = [line for line in script.splitlines() if line.startswith("#SBATCH --")]
    pairs = [line.removeprefix("#SBATCH --").partition("=") for line in lines]
    assert len({key for key, _, _ in pairs}) == len(pairs)
    return {key: value for key, _, value in pairs}


CASES: dict[str, tuple[list[str], dict[str, str], list[str]]] = {
    "gpus": (
        ["cluster.nodes=2", "cluster.gpus_per_node=4"],
        {"nodes": "2", "ntasks-per-node": "4", "gpus-per-node": "4", "cpus-per-task": "12",
         "signal": "USR2@180", "requeue": "", "open-mode": "append", "time": "24:00:00"},
        ["trainer.devices=4", "trainer.nodes=2", "trainer.workers=11", "--kill-on-bad-exit=1"],
    ),
    "gres": (
        ["cluster.gres=gpu:a100:8", "cluster.account=lab", "cluster.qos=long", "cluster.memory=1",
         "cluster.constraint=a100&nvlink", "cluster.partition=gpu", "cluster.time=2-00:00:00"],
        {"gres": "gpu:a100:8", "account": "lab", "qos": "long", "mem": "1", "partition": "gpu",
         "constraint": "a100&nvlink", "time": "2-00:00:00"},
        ["trainer.devices=8"],
    ),
    "cpus": (
        ["cluster.gpus_per_node=0", "cluster.tasks_per_node=2", "cluster.cpus_per_task=1",
         'cluster.environment=["module load x", "export A=\'b c\'"]'],
        {"ntasks-per-node": "2", "cpus-per-task": "1"},
        ["trainer.accelerator=cpu", "trainer.workers=0", "module load x", "export A='b c'"],
    ),
    "apptainer": (
        ["cluster.container=apptainer", "cluster.image=/i m.sif", "cluster.mounts=/data:/data"],
        {},
        ["apptainer exec --nv --pwd ", "--bind /data:/data,", "'/i m.sif'",
         "    voxelith \"${words[@]}\""],
    ),
    "pyxis": (
        ["cluster.container=pyxis", "cluster.image=org/image:1", "cluster.mounts=/data:/data"],
        {},
        ["--container-image=org/image:1 ", "--container-workdir=",
         "--container-mounts=/data:/data,"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", list(CASES))
def test_the_script_says_what_the_cluster_gives(
    case: str, pretrain_corpus: Path, tmp_path: Path
) -> None:
    more, wanted, said = CASES[case]
    job, cluster = plan_job("pretrain", words(pretrain_corpus, tmp_path, *more))
    found = options(job.script)
    assert {key: found.get(key) for key in wanted} == wanted
    assert ("gpus-per-node" in found) == (case in ("gpus", "apptainer", "pyxis"))
    assert all(text in job.script for text in said), job.script
    assert job.stages[0].trainer.devices == cluster.tasks
    script = tmp_path / "job.sh"
    script.write_text(job.script)
    subprocess.run(["bash", "-n", script], check=True)
    # What bash makes of the command is what was typed.
    shown = job.script.replace("srun --cpus", "printf '%s\\n' --cpus").replace("mkdir", ": mkdir")
    lines = subprocess.run(
        ["bash", "-c", f"scontrol() {{ :; }}; cd() {{ :; }}; module() {{ :; }}; {shown}"],
        capture_output=True, text=True, env={"PATH": "/usr/bin:/bin", "SLURM_JOB_ID": "1",
        "SLURM_JOB_NODELIST": "n", "SLURM_CPUS_PER_TASK": "3"},
    ).stdout.splitlines()  # fmt: skip
    assert f"runs={tmp_path / 'my runs'}" in lines and "--cpus-per-task=3" in lines
    assert lines[lines.index("pretrain") :][: len(job.words)] == list(job.words)


def test_mistakes_are_told_before_anything_waits_in_a_queue(
    pretrain_corpus: Path, tmp_path: Path
) -> None:
    wrong = words(
        pretrain_corpus, tmp_path, "cluster.nods=2", "cluster.time=soon", "cluster.signal=HUP@3",
        "trainer.devices=2", "lr=fast",
    )  # fmt: skip
    with pytest.raises(InputError) as found:
        plan_job("pretrain", wrong)
    said = "\n".join(found.value.problems)
    for part in (
        "cluster.nods: no such key; did you mean nodes?",
        "cluster.time: expected HH:MM:SS",
        "cluster.signal",
        "lr=fast",
    ):
        assert part in said, said
    with pytest.raises(InputError, match=r"trainer.devices: follows from cluster.nodes"):
        plan_job("pretrain", words(pretrain_corpus, tmp_path, "trainer.devices=2"))
    with pytest.raises(InputError, match="multiple of devices x nodes x accumulate = 64"):
        plan_job("pretrain", words(pretrain_corpus, tmp_path, "cluster.nodes=8"))
    with pytest.raises(InputError, match="do not fit together"):
        plan_job("pretrain", words(pretrain_corpus, tmp_path, "objective.block=32"))
    with pytest.raises(InputError, match="cluster=slrm: no such cluster; did you mean slurm"):
        plan_job("pretrain", words(pretrain_corpus, tmp_path, "cluster=slrm"))
    with pytest.raises(InputError, match=r"cluster\.environment=.*cannot be read"):
        cluster_of(["cluster.environment=[a() { b; }]"])
    with pytest.raises(InputError, match="launches pretrain or finetune"):
        plan_job("predict", [])


@pytest.mark.parametrize(
    "more", [["cluster.gpus_per_node=8"], [], ["cluster.gpus_per_node=0", "cluster.gres=gpu:8"]]
)
def test_no_gpus_are_asked_for_that_the_training_would_not_use(
    more: list[str], pretrain_corpus: Path, tmp_path: Path
) -> None:
    given = [*words(pretrain_corpus, tmp_path, *more), "trainer=cpu"]
    with pytest.raises(InputError, match=r"trainer.accelerator=cpu .*cluster.gpus_per_node=0"):
        plan_job("pretrain", given)


def test_a_sweep_asks_for_no_gpus_that_it_would_not_use(
    labelled_corpus: Path, tmp_path: Path
) -> None:
    release = Path(__file__).parent.parent / "releases" / "encoder-7253723"
    given = [
        "task=hippocampus", f"corpus={labelled_corpus}", f"ckpt={release}", "labels=2",
        f"runs={tmp_path}", "trainer=cpu", "crop_size=[16,24,16]", "batch_size=1",
        "cluster.gpus_per_node=1",
    ]  # fmt: skip
    with pytest.raises(InputError, match=r"trainer.accelerator=cpu .*cluster.gpus_per_node=0"):
        plan_sweep(given)
    given[-1] = "cluster.gpus_per_node=0"
    assert len(plan_sweep(given).elements) == 2


STAGED = [
    "run=s", "experiment=dino_3dino_small", "backbone.embed_dim=48", "objective.prototypes=4",
    "cluster.gpus_per_node=0",
]  # fmt: skip


def test_a_recipe_in_stages_is_one_job_of_all_of_them(
    pretrain_corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [*STAGED, f"corpus={pretrain_corpus}", f"runs={tmp_path / 'runs'}"]
    assert voxelith.main(["launch", "pretrain", *given, "--dry-run", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["run"] == str(tmp_path / "runs" / "s")
    assert f"--output={tmp_path}/runs/s/launch/job-%j.log" in result["script"]
    for name in ("base", "highres"):
        assert f"    {tmp_path}/runs/s.{name}\n" in result["script"]
    # What does not fit in the second stage alone is told before the first one waits.
    with pytest.raises(InputError, match=r"highres: .*crop_size"):
        plan_job("pretrain", [*given, "stages.highres.crop_size=[41,40,40]"])


def test_the_plan_of_stages_is_that_of_all(
    pretrain_corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [*STAGED, f"corpus={pretrain_corpus}", f"runs={tmp_path / 'runs'}"]
    assert voxelith.main(["launch", "pretrain", *given, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "s.base: 300 steps" in said and "s.highres: 60 steps" in said
    found = [float(n) for n in re.findall(r"([\d.e-]+) EFLOP", said)]
    assert "together 360 steps" in said and len(found) == 3
    assert found[2] == pytest.approx(found[0] + found[1], rel=0.01)


def test_a_run_in_stages_says_how_far_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slurm.launch._shown", lambda job: "JobState=RUNNING Restarts=2")
    for name, step, steps in (("base", 300, 300), ("highres", 20, 60)):
        folder = tmp_path / f"s.{name}"
        (folder / "checkpoints").mkdir(parents=True)
        (folder / "checkpoints" / f"step-{step:08d}.pt").touch()
        (folder / "config.json").write_text(json.dumps({"steps": steps}))
    (tmp_path / "s" / "launch").mkdir(parents=True)
    note = {"job": "7", "stages": ["s.base", "s.highres", "s.last"]}
    (tmp_path / "s" / "launch" / "job.json").write_text(json.dumps(note))
    found = status(tmp_path / "s")
    assert (found["stage"], found["saved_step"], found["steps"]) == ("s.highres, 2 of 3", 20, 60)


def test_a_cluster_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "cluster").mkdir()
    (tmp_path / "cluster" / "mine.yaml").write_text(
        "kind: slurm\ngpus_per_node: 4\ntime: 36:00:00\npartition: 7\n"
    )
    found, rest = cluster_of(["cluster=mine", f"--config-dir={tmp_path}", "steps=1"])
    assert (found.tasks, found.time, found.partition, found.hours) == (4, "36:00:00", "7", 36.0)
    assert rest == ["steps=1"]  # it has nothing for the command
    (tmp_path / "objective").mkdir()
    (tmp_path / "objective" / "own.yaml").write_text("_target_: own.Own\n")
    for option in ([f"--config-dir={tmp_path}"], ["--config-dir", str(tmp_path)]):
        assert cluster_of(["cluster=mine", *option, "steps=1"])[1] == [*option, "steps=1"]


@pytest.mark.parametrize("command", ["pretrain", "prep"])
def test_a_folder_with_nothing_but_a_cluster_is_enough(
    command: str,
    samples: Path,
    pretrain_corpus: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "cluster").mkdir()
    text = (Path(voxelith.__file__).parent / "conf" / "cluster" / "slurm.yaml").read_text()
    (tmp_path / "cluster" / "mine.yaml").write_text(
        text.replace("partition: null", "partition: p9")
    )
    words = {
        "pretrain": [f"corpus={pretrain_corpus}", "run=r", f"runs={tmp_path}",
                     "experiment=cnn_mae_small", "crop_size=[16,16,16]"],
        "prep": [f"input={samples / 'ixi'}", f"output={tmp_path / 'c'}"],
    }  # fmt: skip
    options = ["--config-dir", str(tmp_path), "cluster=mine", "--dry-run"]
    if command == "pretrain":
        options.append("cluster.gpus_per_node=0")
    assert voxelith.main(["launch", command, *words[command], *options]) == 0
    assert "#SBATCH --partition=p9" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("time", "hours"),
    [("90", 1.5), ("01:30:00", 1.5), ("2-12:00:00", 60.0), ("2880", 48.0), ("4320", 72.0),
     ("7200", 120.0), ("72:00:00", 72.0), ("0060", 1.0)],
)  # fmt: skip
def test_times_are_read_as_slurm_reads_them(time: str, hours: float, tmp_path: Path) -> None:
    """Typed and in a file; YAML would take 24:00:00 for a number of seconds."""
    (tmp_path / "cluster").mkdir()
    (tmp_path / "cluster" / "mine.yaml").write_text(f"kind: slurm\ntime: {time}\n")
    for words in ([f"cluster.time={time}"], ["cluster=mine", f"--config-dir={tmp_path}"]):
        found, _ = cluster_of(words)
        assert (found.time, found.hours) == (time, hours)


def test_a_time_that_slurm_reads_in_another_way_is_refused() -> None:
    with pytest.raises(InputError, match=r"cluster.time: expected HH:MM:SS, .*or minutes"):
        cluster_of(["cluster.time=45:00"])
    with pytest.raises(InputError, match="the signal ends a start before half of its time is over"):
        cluster_of(["cluster.time=00:05:00"])
    cluster_of(["cluster.time=00:06:00"])


@pytest.mark.parametrize("elements", [0, 3])
def test_names_of_folders_may_have_spaces(tmp_path: Path, elements: int) -> None:
    """sbatch splits the words of a directive as a shell does, and takes one option from each."""
    cluster = ClusterSettings(kind="slurm")
    script = render(tmp_path / "my 'best' sweep", ("finetune",), cluster, elements)
    options = [line for line in script.splitlines() if line.startswith("#SBATCH")]
    assert all(len(shlex.split(line[1:])) == 2 for line in options), options
    assert "#SBATCH --job-name=voxelith-my--best--sweep" in options


@pytest.mark.parametrize("value", ["a b", "x\n#SBATCH --uid=0", "$(id)", "`id`", "a;b", "'"])
def test_no_option_brings_a_line_of_its_own(value: str) -> None:
    for key in ("partition", "account", "qos", "constraint", "gres", "memory"):
        with pytest.raises(ValueError, match="letters that no option of sbatch has"):
            ClusterSettings.model_validate({"kind": "slurm", key: value})


def test_a_dry_run_starts_nothing(
    pretrain_corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = words(pretrain_corpus, tmp_path, "cluster.nodes=1")
    assert voxelith.main(["launch", "pretrain", *given, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "#SBATCH --nodes=1" in said and "192 GPU-hours" in said
    assert not (tmp_path / "my runs").exists()


def test_what_was_not_launched_is_said(tmp_path: Path) -> None:
    for asked in (status, logs, cancel):
        with pytest.raises(InputError, match="no job of it was launched"):
            asked(tmp_path)


def launched(folder: Path, job: str, said: dict[str, str], **note: object) -> None:
    """What a submission leaves, and logs from the oldest to the newest."""
    (folder / "launch").mkdir(parents=True)
    (folder / "launch" / "job.json").write_text(json.dumps({"job": job, **note}))
    for time, (name, text) in enumerate(said.items()):
        log = folder / "launch" / f"job-{name}.log"
        log.write_text(text)
        os.utime(log, (time, time))


def test_each_run_of_a_sweep_has_its_job_and_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str] = []
    monkeypatch.setattr("slurm.launch._shown", lambda job: asked.append(job) or "JobState=RUNNING")
    sweep = tmp_path / "sweep"
    launched(sweep, "7", {"7_1": "I am one\n", "7_0": "I am zero\n", "3_2": "an earlier job\n"})
    (sweep / "launch" / "jobs").mkdir()
    # A chain's element is known by the run that it has begun.
    (sweep / "launch" / "element-1").mkdir()
    (sweep / "launch" / "element-1" / "checkpoints").symlink_to(sweep / "b" / "checkpoints")
    for number, run in enumerate((sweep / "a", sweep / "launch" / "element-1")):
        (sweep / "launch" / "jobs" / f"{number}.txt").write_text(f"{run}\nfinetune\nrun=x\n")
    (sweep / "b" / "checkpoints").mkdir(parents=True)
    (sweep / "b" / "checkpoints" / "step-00000030.pt").touch()
    assert logs(sweep) == f"{sweep}/launch/job-7_0.log:\nI am zero"
    assert (logs(sweep / "a"), logs(sweep / "b")) == ("I am zero", "I am one")
    found = status(sweep / "b")
    assert (found["job"], found["saved_step"]) == ("7_1", 30)
    assert found["log"] == f"{sweep}/launch/job-7_1.log" and asked == ["7_1"]
    with pytest.raises(InputError, match="no job of it was launched"):
        status(sweep / "c")
    assert voxelith.main(["launch", "logs", str(sweep)]) == 0
    assert "I am zero" in capsys.readouterr().out


@pytest.fixture
def job_8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is submitted becomes this job, and never runs."""
    (tmp_path / "sbatch").write_text("#!/bin/sh\necho 8\n")
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")


@pytest.mark.usefixtures("job_8")
def test_a_sweep_launched_again_has_forgotten_its_former_elements(tmp_path: Path) -> None:
    elements = [[str(tmp_path / "runs" / name), "finetune"] for name in "abc"]
    submit_sweep(Sweep(tmp_path / "runs", "", elements, 3), [])
    assert Launched.of(tmp_path / "runs" / "c").job == "8_2"
    submit_sweep(Sweep(tmp_path / "runs", "", elements[1:2], 3), [])
    assert Launched.of(tmp_path / "runs" / "b").job == "8_0"
    with pytest.raises(InputError, match="no job of it was launched"):
        Launched.of(tmp_path / "runs" / "c")


@pytest.mark.usefixtures("job_8")
def test_a_password_lies_in_what_the_user_alone_can_read(tmp_path: Path) -> None:
    """In the script and the elements, which need it, and in nothing else."""
    words, run = ["corpus=https://me:hushed@host/ct", "run=a"], tmp_path / "runs"
    script = "srun voxelith pretrain corpus=https://me:hushed@host/ct"
    element = [str(run / "a"), "finetune", *words]
    submit_sweep(Sweep(run, script, [element], 1), ["finetune", *words])
    holding = {path.name: path for path in run.rglob("*") if path.is_file()}
    assert "https://host/ct" in holding["job.json"].read_text()
    for name, path in holding.items():
        kept = "hushed" in path.read_text()
        assert kept is (name in ("job.sbatch", "0.txt")), name
        assert not kept or path.stat().st_mode & 0o077 == 0
    stage = Stage("1-pretrain", ["pretrain", *words], run)
    assert "hushed" not in str(stage) and "https://host/ct" in str(stage)


def test_a_stage_of_a_recipe_is_watched_by_its_own_name_too(tmp_path: Path) -> None:
    launched(tmp_path / "s", "7", {"7": "all stages\n"}, stages=["s.base", "s.highres"])
    assert logs(tmp_path / "s.highres") == logs(tmp_path / "s") == "all stages"


def test_the_log_of_a_chain_is_that_of_the_stage_that_spoke_last(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    launched(tmp_path / "runs" / "a", "7", {"7": "trains\n"})
    launched(tmp_path / "sweep", "9", {"0": "", "1": "", "9_4": "scores\n"})
    launched(tmp_path / "work" / "4-table", "10", {})
    stages = [
        ("1", "runs/a", "7"),
        ("2", "r", None),
        ("3", "sweep", "9"),
        ("4", "work/4-table", "10"),
    ]
    told = [{"name": n, "folder": str(tmp_path / f), "job": job} for n, f, job in stages]
    (tmp_path / "work" / "chain.json").write_text(json.dumps({"stages": told}))
    assert voxelith.main(["launch", "logs", str(tmp_path / "work")]) == 0
    assert f"{tmp_path}/sweep/launch/job-9_4.log:\nscores" in capsys.readouterr().out


def test_without_a_scheduler_the_command_runs_here(pretrain_corpus: Path, tmp_path: Path) -> None:
    given = words(
        pretrain_corpus, tmp_path, "cluster=local", "trainer=cpu", "trainer.workers=0", "steps=2",
        "batch_size=2",
    )[:-1]  # fmt: skip
    given = [w for w in given if w not in ("steps=10", "batch_size=32")] + ["batch_size=2"]
    assert voxelith.main(["launch", "pretrain", *given]) == 0
    assert (tmp_path / "my runs" / "first" / "checkpoints" / "step-00000002.pt").exists()


def test_rendering_quotes_what_a_shell_would_read(tmp_path: Path) -> None:
    cluster = ClusterSettings(kind="slurm", gpus_per_node=1)
    script = render(tmp_path / "it's a run", ("pretrain", "run=$(touch x)", "a=`b`"), cluster)
    file = tmp_path / "job.sh"
    file.write_text(script)
    subprocess.run(["bash", "-n", file], check=True)
    assert "'run=$(touch x)'" in script and "'a=`b`'" in script


def mounted(script: str) -> list[str]:
    (found,) = re.findall(r"--(?:container-mounts=|bind )(\S+)", script)
    return [mount.partition(":")[0] for mount in found.split(",")]


@pytest.mark.parametrize("kind", ["pyxis", "apptainer"])
def test_a_container_sees_what_the_command_works_on(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work, data, other = tmp_path / "work", tmp_path / "data", tmp_path / "other"
    for folder in (work, data / "c", other / "runs", other / "start", tmp_path / "b"):
        folder.mkdir(parents=True)
    (work / "linked").symlink_to(other / "runs")
    (work / "begin").symlink_to(other / "start")
    monkeypatch.chdir(work)
    cluster = ClusterSettings(
        kind="slurm", container=kind, image="/i.sif", mounts=f"/mnt/x:{data}:ro"
    )
    said = [
        "pretrain", f"corpus=[{data}/c,{tmp_path}/b]", "runs=linked", "run=a", "steps=10",
        "init=begin",
        f"health.probe={tmp_path}/absent/probe",
    ]  # fmt: skip
    script = render(other / "runs" / "a", said, cluster)
    assert (f"--pwd {work} " if kind == "apptainer" else f"--container-workdir={work} ") in script
    # Of what is still to be made, the folder above; all else lies below that one.
    assert mounted(script) == ["/mnt/x", str(tmp_path)]
    del said[-1]
    script = render(other / "runs" / "a", said, cluster)
    # The corpus is covered already, and links lead to where they lead on the node.
    more = [tmp_path / "b", work, other / "runs", other / "start"]
    assert mounted(script) == ["/mnt/x", *sorted(map(str, more))]
    (tmp_path / "a:b").mkdir()
    with pytest.raises(InputError, match=r"a:b: the container cannot mount a path"):
        render(other / "runs" / "a", ["pretrain", f"corpus={tmp_path}/a:b"], cluster)


def test_the_program_is_that_which_the_environment_leads_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs = {name: tmp_path / name / "bin" / "voxelith" for name in ("mine", "other")}
    for program in programs.values():
        program.parent.mkdir(parents=True)
        program.write_text(f'#!/bin/bash\necho {program} "$@"\n')
        program.chmod(0o755)
    monkeypatch.setattr("sys.argv", [str(programs["mine"])])

    def ran(*lines: str) -> str:
        cluster = ClusterSettings(kind="slurm", environment=list(lines))
        script = render(tmp_path / "run", ("pretrain",), cluster)
        shell = 'srun() { shift 2; "$@"; }; scontrol() { :; }; ' + script
        environment = {"PATH": "/usr/bin:/bin", "SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": "n",
                       "SLURM_CPUS_PER_TASK": "1"}  # fmt: skip
        done = subprocess.run(
            ["bash", "-c", shell], capture_output=True, text=True, env=environment
        )
        return done.stdout.splitlines()[-1]

    assert ran() == f"{programs['mine']} pretrain"
    assert ran(f"export PATH={programs['other'].parent}:$PATH") == f"{programs['other']} pretrain"
    assert ran("export A=1") == f"{programs['mine']} pretrain"  # there is no other


def test_lines_of_an_environment_may_read_what_nobody_has_set(
    pretrain_corpus: Path, tmp_path: Path
) -> None:
    """As `module load` and `conda activate` do; all else in the script must not."""
    lines = f'["export PYTHONPATH=/site:$PYTHONPATH", "echo $PYTHONPATH > {tmp_path}/seen"]'
    cluster, _ = cluster_of([f"cluster.environment={lines}"])
    script = render(tmp_path / "run", ("pretrain",), cluster)
    head = script[: script.index("mkdir -p")]  # what comes then needs SLURM
    done = subprocess.run(
        ["bash", "-c", head + "\nset -o | grep nounset"],
        env={"PATH": os.environ["PATH"], "SLURM_JOB_ID": "1"},
        check=True,
        capture_output=True,
        text=True,
    )
    assert (tmp_path / "seen").read_text() == "/site:\n"
    assert "on" in done.stdout.split()
