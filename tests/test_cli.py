"""The command as a user meets it: exit codes, messages, nothing half-written."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from voxelith import COMMANDS, main


def test_no_words_show_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    assert f"voxelith {command}" in capsys.readouterr().out


def test_help_may_be_cut_off() -> None:
    """`voxelith finetune --help | head`: whoever reads has closed the pipe before it is written."""
    command = [sys.executable, "-m", "voxelith", "finetune", "--help"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=Path(__file__).parent.parent
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.wait() == 0
    assert process.stderr.read() == b""


def test_an_unknown_command_suggests_the_near_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pretrian"]) == 2
    assert "did you mean pretrain?" in capsys.readouterr().err


def test_one_problem_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pretrain", "corpus=/nowhere", "run=x"]) == 2
    err = capsys.readouterr().err.strip()
    assert err.startswith("error: corpus=/nowhere: no such directory") and "\n" not in err


def test_several_problems_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pretrain", "stepz=1"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: 3 problems, nothing was started\n")


@pytest.mark.parametrize("command", ["export", "check", "inspect"])
def test_missing_words_show_the_usage(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command]) == 2
    assert f"usage: voxelith {command}" in capsys.readouterr().err


def test_wrong_input_alone_leaves_the_note_for_a_batch_script(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    note = tmp_path / "refused"
    monkeypatch.setenv("VOXELITH_REFUSED", str(note))
    assert main(["--version"]) == 0 and not note.exists()
    assert main(["pretrain", "corpus=/nowhere", "run=x"]) == 2 and note.exists()


def test_a_fault_while_running_exits_with_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(words: list[str]) -> None:
        raise OSError("disk full")

    monkeypatch.setitem(COMMANDS, "check", COMMANDS["check"]._replace(run=broken))
    assert main(["check", "x"]) == 1
    assert "check failed while running: disk full" in capsys.readouterr().err


def test_a_folder_without_scans_starts_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    assert main(["prep", f"input={tmp_path}/empty", f"output={tmp_path}/corpus"]) == 2
    assert str(tmp_path / "empty") in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty"]


def test_a_wrong_crop_starts_nothing(
    pretrain_corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"corpus={pretrain_corpus}", "run=x", f"runs={tmp_path}/runs", "crop_size=[96,90,96]"]
    assert main(["pretrain", *words]) == 2
    assert "crop_size=[96, 90, 96]" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_corrupted_shard_is_named_before_its_values_are_used(
    workers: int, pretrain_corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    corpus = tmp_path / "corpus"
    shutil.copytree(pretrain_corpus, corpus)
    for shard in (corpus / "shards").glob("*.tar"):
        data = bytearray(shard.read_bytes())
        data[len(data) // 3 : len(data) // 3 + 4000] = bytes(4000)
        shard.write_bytes(data)
    words = [
        f"corpus={corpus}", "run=x", f"runs={tmp_path}/runs", "trainer=cpu",
        "backbone=resenc_small", "objective=cnn_mae", "crop_size=[16,16,16]",
        "objective.block=8", "batch_size=4", "steps=40", "warmup=1",
        f"trainer.workers={workers}",
    ]  # fmt: skip
    assert main(["pretrain", *words]) == 2
    err = capsys.readouterr().err
    assert "shards/" in err and "damaged" in err
    assert len([line for line in err.splitlines() if "rror" in line]) == 1  # no traceback
    assert main(["check", str(corpus)]) == 2
    assert capsys.readouterr().err.count("shards/") >= 9


def test_results_can_be_json(pretrain_corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(pretrain_corpus), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"corpus": str(pretrain_corpus), "problems": []}


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("voxelith 0.")


def test_a_missing_shard_is_found_before_a_folder_is_made(
    pretrain_corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    shutil.copytree(pretrain_corpus, tmp_path / "corpus")
    (tmp_path / "corpus" / "shards" / "000001.tar").unlink()
    words = [f"corpus={tmp_path}/corpus", "run=x", f"runs={tmp_path}/runs", "crop_size=[96,96,96]"]
    assert main(["pretrain", *words]) == 2
    assert "000001.tar: is missing" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "words",
    [
        ["table", "{runs}", "output=/proc/x"],
        ["report", "{runs}", "output=/proc/x/report.html"],
    ],
)
def test_folders_that_cannot_be_written_are_found_before_the_work(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tests_rows import write_two_arms

    write_two_arms(tmp_path)
    assert main([word.format(runs=tmp_path) for word in words]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_w_and_b_without_a_login_is_refused_up_front(
    pretrain_corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import wandb

    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    words = [
        f"corpus={pretrain_corpus}", "run=x", f"runs={tmp_path}/runs", "trainer=cpu",
        "backbone=resenc_small", "objective=cnn_mae", "crop_size=[16,16,16]",
        "objective.block=8", "batch_size=2", "steps=1", "loggers=[wandb]",
    ]  # fmt: skip
    assert main(["pretrain", *words]) == 2
    assert "WANDB_MODE=online asks for one" in capsys.readouterr().err
    wandb.teardown()  # which this process would keep for its other runs
    assert not (tmp_path / "runs").exists()
    monkeypatch.delenv("WANDB_MODE")  # offline, unless it is said otherwise
    command = [sys.executable, "-m", "voxelith", "pretrain", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "`wandb sync` sends it" in done.stdout
    assert list((tmp_path / "runs" / "x" / "wandb").glob("offline-run-*"))


def test_what_the_words_name_is_looked_at_together(
    pretrain_corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Machine, corpus, batch, crop and probe: one attempt tells of all of them."""
    words = [
        "corpus=nowhere", "run=x", f"runs={tmp_path}/runs", "crop_size=[96,90,96]",
        "objective=volume_fusion", "batch_size=1001", f"health.probe={pretrain_corpus}",
        "trainer.accelerator=gpu", "trainer.devices=1001",
    ]  # fmt: skip
    assert main(["pretrain", *words]) == 2
    head, *found = capsys.readouterr().err.strip().split("\n  ")
    assert head == "error: 5 problems, nothing was started"
    starts = [
        "trainer.accelerator=gpu, trainer.devices=1001: this machine has",
        "corpus=nowhere: no such directory",
        "batch_size=1001: leaves 1 samples to each",
        "backbone, objective and crop_size=[96, 90, 96] do not fit together",
        f"health.probe={pretrain_corpus}: holds no labels",
    ]
    for one, start in zip(found, starts, strict=True):
        assert one.startswith(start)
    assert not (tmp_path / "runs").exists()


def test_a_probe_that_is_not_there_is_told_by_its_key(
    pretrain_corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"corpus={pretrain_corpus}", "run=x", f"runs={tmp_path}/runs", "health.probe=gone"]
    assert main(["pretrain", *words, "trainer=cpu", "backbone=vit_ti"]) == 2
    err = capsys.readouterr().err
    assert err == "error: health.probe=gone: no such directory; `voxelith prep` writes a corpus\n"


def test_a_folder_for_runs_that_cannot_be_written_is_wrong_input(
    pretrain_corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    words = [f"corpus={pretrain_corpus}", "run=x", "trainer=cpu", "backbone=vit_ti"]
    assert main(["pretrain", *words, "crop_size=[16,16,16]", f"runs={tmp_path}/file"]) == 2
    err = capsys.readouterr().err
    assert f"error: runs={tmp_path}/file/x: cannot be written" in err and "Traceback" not in err


def test_a_crop_beyond_all_volumes_is_said(
    pretrain_corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        f"corpus={pretrain_corpus}", "run=x", f"runs={tmp_path}/runs", "trainer=cpu",
        "backbone=vit_ti", "backbone.depth=1", "backbone.embed_dim=24", "objective.decoder_dim=24",
        "objective.decoder_depth=1", "batch_size=1", "steps=1", "warmup=0", "preview_every=0",
        "health.every=0", "backbone.patch_size=[8,32,32]",
    ]  # fmt: skip
    assert main(["pretrain", *words, "crop_size=[8,32,256]"]) == 0
    out = capsys.readouterr().out
    assert "crop_size=[8, 32, 256]: larger than every volume of the corpus along W (256 of" in out
    assert main(["pretrain", *words[:1], "run=y", *words[2:], "crop_size=[8,64,64]"]) == 0
    assert "larger than every volume" not in capsys.readouterr().out


def test_a_warm_up_without_an_end_is_said(
    pretrain_corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        f"corpus={pretrain_corpus}", f"runs={tmp_path}/runs", "trainer=cpu", "backbone=vit_ti",
        "backbone.depth=1", "objective.decoder_depth=1", "batch_size=1", "steps=1",
        "preview_every=0", "health.every=0", "crop_size=[16,16,16]",
    ]  # fmt: skip
    assert main(["pretrain", *words, "run=x"]) == 0
    assert "warmup=2000: not shorter than steps=1, so that the rate" in capsys.readouterr().out
    assert main(["pretrain", *words, "run=y", "warmup=0"]) == 0
    assert "warmup" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["replay"], "no run given, a folder such as runs/NAME; usage: voxelith replay RUN"),
        (["replay", "a", "b"], "replay: takes one run, 2 given: a b"),
        (["replay", "a", "step=x"], "step=x: must be the number of a step, counted from 1"),
        (["replay", "a", "stpe=3"], "stpe=3: no such option or folder; did you mean step?"),
        (["replay", "a", "--step", "3"], "--step: no such option or folder; did you mean step?"),
        (["replay", "a", "step=1", "step=2"], "step=2: step=1 was given before; give one"),
        (["replay", "nowhere"], "nowhere is not a run folder"),
        (["table", "a", "otput=x"], "otput=x: no such option or folder; did you mean output?"),
        (["bench", "step", "estimate"], "one of them (step and estimate given); usage: voxelith"),
        (
            ["bench", "repeats=3"],
            "say what, step, estimate or loader, and one of them (none given)",
        ),
        (["bench", "step", "repets=3"], "repets=3: no such key; did you mean repeats?"),
        (["finetune", "task=abdomen", "ckpt=x", "corpus=y"], "\n  ckpt=x: no such release"),
        (["finetune", "task=abdomen", "ckpt=x", "corpus=y"], "\n  corpus=y: no such directory"),
        (["evaluate", "task=abdomen", "predictions=x", "corpus=y", "output=z"], "error: 2 problem"),
        (["predict", "ckpt=x", "input=y", "output=z"], "error: 2 problems"),
        (["prep", "input=x", "output=y"], "error: input=x: "),
    ],
)
def test_wrong_words_are_wrong_input(
    words: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    err = capsys.readouterr().err
    assert said in err and "Traceback" not in err
    assert not list(tmp_path.iterdir())


def test_a_run_whose_name_holds_a_sign_is_a_run(tmp_path: Path) -> None:
    from tests_rows import write_two_arms

    (tmp_path / "labels=16").mkdir()
    write_two_arms(tmp_path / "labels=16")
    assert main(["table", str(tmp_path / "labels=16"), f"output={tmp_path}/table"]) == 0


@pytest.mark.parametrize("command", COMMANDS)
def test_help_can_be_asked_for_in_three_ways(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = []
    for words in ([command, "--help"], ["help", command], [command, "-h"]):
        assert main(words) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] == texts[2]
    assert texts[0].startswith(f"usage: voxelith {command} ")
    # Who has no keys has words, and an example of them.
    assert "\nkeys:\n" in texts[0] or f"\nexample: voxelith {command} " in texts[0]


def test_the_usage_names_the_folder_of_own_groups_where_there_are_groups(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for command in COMMANDS:
        assert main([command, "--help"]) == 0
        usage, _, rest = capsys.readouterr().out.partition("\n")
        assert ("--config-dir DIR" in usage) == ("\ngroups (" in rest), command
