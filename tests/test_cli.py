"""The command as a user meets it: exit codes, messages, nothing half-written."""

from __future__ import annotations

import json
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


@pytest.mark.parametrize("command", ["export", "check", "features"])
def test_missing_words_show_the_usage(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command]) == 2
    assert f"usage: voxelith {command}" in capsys.readouterr().err


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
        ["features", "{runs}", "scan.nii.gz", "/proc/x/out.npz"],
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
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    words = [
        f"corpus={pretrain_corpus}", "run=x", f"runs={tmp_path}/runs", "trainer=cpu",
        "backbone=resenc_small", "objective=cnn_mae", "crop_size=[16,16,16]",
        "objective.block=8", "batch_size=2", "steps=1", "loggers=[wandb]",
    ]  # fmt: skip
    assert main(["pretrain", *words]) == 2
    assert "WANDB_MODE=offline" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
