"""What --help shows is what a command can be told, without waiting for what it would run."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from conf.compose import GIVEN, HERE, SETTINGS, read_words
from conf.help import describe, keys_of
from conf.signatures import class_arguments
from data_prep.errors import InputError, config_text
from slurm.settings import ClusterSettings
from voxelith import COMMANDS, _command_help

GROUPS = ("backbone", "objective")
FILES = [file for group in GROUPS for file in sorted((HERE / group).glob("*.yaml"))]


def rows(command: str, *words: str) -> dict[str, tuple[str, str]]:
    """Values and comments by key, the comments put together again."""
    found: dict[str, tuple[str, str]] = {}
    key = ""
    for line in describe(command, list(words)).splitlines():
        left, _, about = line.partition(" # ")
        if left.startswith("  ") and "=" in left:
            key, _, value = left.strip().partition("=")
            found[key] = (value, about)
        elif about and not left.strip():
            found[key] = (found[key][0], f"{found[key][1]} {about}".strip())
    return found


def leaves(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found = {}
    for name, value in config.items():
        if isinstance(value, dict) and value:
            found |= leaves(value, f"{prefix}{name}.")
        elif name != "_target_":
            found[f"{prefix}{name}"] = value
    return found


@pytest.mark.parametrize("command", SETTINGS)
def test_every_key_is_shown_with_its_value_and_a_comment(command: str) -> None:
    line = read_words(command, [])
    line.compose([])
    found = rows(command)
    for key, value in leaves(line.config).items():
        shown, about = found[key]
        assert shown == config_text(value), key
        assert about, f"{key} has no comment"


def test_every_setting_of_the_models_is_shown() -> None:
    from pretrain.settings import BenchSettings, HealthSettings, TrainerSettings

    found = rows("bench")
    assert set(BenchSettings.model_fields) <= {key.partition(".")[0] for key in found}
    for part, model in (("trainer", TrainerSettings), ("health", HealthSettings)):
        assert {f"{part}.{name}" for name in model.model_fields} <= set(found)


def test_groups_are_shown_with_their_options() -> None:
    text = describe("finetune", [])
    assert "  task=???                         # abdomen, acdc, " in text
    assert "--config-dir DIR" in text and "--config-dir" not in describe("prep", [])
    (title,) = [line for line in text.splitlines() if line.startswith("task=")]
    assert title == "task=abdomen (Large organs in CT, from TotalSegmentator's label values):"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_what_only_a_class_knows_is_shown(file: Path) -> None:
    """Each argument of the class that an option names, as the interpreter sees them."""
    group = file.parent.name
    line = read_words("pretrain", [f"{group}={file.stem}"])
    line.compose([])
    path = str(line.config[group]["_target_"])
    module, _, name = path.rpartition(".")
    parameters = inspect.signature(getattr(importlib.import_module(module), name)).parameters
    arguments = class_arguments(path)
    assert list(arguments) == list(parameters)
    for key, parameter in parameters.items():
        required = parameter.default is inspect.Parameter.empty
        default = "???" if required else config_text(parameter.default)
        assert arguments[key].default == default and arguments[key].about, key
    found = rows("pretrain", f"{group}={file.stem}")
    for key in set(parameters) - set(GIVEN.get(group, ())):
        value, about = found[f"{group}.{key}"]
        given = line.config[group]
        assert value == (config_text(given[key]) if key in given else arguments[key].default)
        assert about == arguments[key].about


def test_words_beside_help_are_taken_in() -> None:
    found = rows("pretrain", "experiment=mae", "steps=7", "corpus=a b", "nonsense=1", "trainer=cpu")
    assert found["lr"][0] == "0.0024" and found["steps"][0] == "7" and found["corpus"][0] == "a b"
    assert found["objective.decoder_depth"][0] == "8" and found["trainer.accelerator"][0] == "cpu"
    # Comments on a group's keys are those of its default where an option has none.
    assert found["trainer.workers"][1] == rows("pretrain")["trainer.workers"][1]
    with pytest.raises(InputError, match="no such folder"):
        describe("pretrain", ["--config-dir=nowhere"])


def test_a_users_own_option_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_part.py").write_text(
        'raise RuntimeError("imported")\n'
        "class Mine:\n"
        '    """An idea.\n\n    Args:\n        share: of the whole,\n            a number.\n"""\n'
        "    def __init__(self, encoder, share=0.5, *, more=None): ...\n"
    )
    (tmp_path / "objective").mkdir()
    (tmp_path / "objective" / "mine.yaml").write_text("_target_: own_part.Mine\nmore: 3  # or less")
    (tmp_path / "objective" / "gone.yaml").write_text("_target_: nowhere.Gone\nmore: 3  # or less")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = rows("pretrain", f"--config-dir={tmp_path}", "objective=mine")
    assert found["objective.share"] == ("0.5", "of the whole, a number")
    assert found["objective.more"][0] == "3" and "objective.encoder" not in found
    found = rows("pretrain", f"--config-dir={tmp_path}", "objective=gone")
    assert found["objective.more"] == ("3", "or less")


def test_a_cluster_is_shown_with_its_keys(tmp_path: Path) -> None:
    """Also those that a file of one's own leaves out, with the words beside --help."""
    (tmp_path / "cluster").mkdir()
    (tmp_path / "cluster" / "mine.yaml").write_text("kind: slurm\nmemory: 64G\n")
    words = ["pretrain", "--config-dir", str(tmp_path), "cluster=mine", "cluster.nodes=2", "x=1"]
    said = {
        line.split()[0].partition("=")[0]: line.split()[0]
        for line in _command_help("launch", words).splitlines()
        if line.startswith("  cluster.")
    }
    assert set(said) == {f"cluster.{name}" for name in ClusterSettings.model_fields}
    assert said["cluster.memory"] == "cluster.memory=64G"
    assert said["cluster.nodes"] == "cluster.nodes=2"


def test_keys_of_a_yaml(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text(
        "# head\ndefaults:\n  - a: b\n\n_target_: x\none: 1  # first\n\n"
        "two:      # second\n  three: {a: 1}\n  four:\n    five: [1, 2]  # 5 # five\nsix:\n"
        "seven: x  # the first\n          # and more\n# of what follows\neight: y\n"
    )
    found = keys_of(file)
    assert list(found) == [
        "one", "two", "two.three", "two.four", "two.four.five", "six", "seven", "eight",
    ]  # fmt: skip
    assert [key.about for key in found.values()] == [
        "first", "second", "", "", "5 # five", "", "the first and more", "",
    ]  # fmt: skip
    assert [name for name, key in found.items() if key.apart] == ["two"]


@pytest.mark.parametrize("command", [name for name in SETTINGS if name in COMMANDS])
def test_help_does_not_wait_for_torch(command: str) -> None:
    code = (
        "import sys; from voxelith import main\n"
        f"assert main([{command!r}, '--help']) == 0\n"
        "print('torch' in sys.modules, 'numpy' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=HERE.parent
    )
    assert done.stdout.splitlines()[-1] == "False False", done.stderr
