"""Words to settings: all mistakes at once, any path as it is, every shipped group composes."""

from __future__ import annotations

from pathlib import Path

import pytest

from conf.compose import HERE, settings_for
from data_prep.errors import InputError

NEEDED = ["corpus=.", "run=r"]


def problems(command: str, *words: str) -> list[str]:
    with pytest.raises(InputError) as caught:
        settings_for(command, list(words))
    return caught.value.problems


def test_all_mistakes_are_listed_at_once_each_with_a_fix() -> None:
    found = problems(
        "pretrain",
        *NEEDED,
        "stepz=3",
        "batch_size=-1",
        "objective.maskratio=.3",
        "objective.mask_ratio=1.4",
        "backbone=vit_sm",
        "lr=abc",
        "steps",
    )
    text = "\n".join(found)
    assert len(found) == 7
    assert "stepz=3: no such key; did you mean steps?" in text
    assert "batch_size=-1: must be greater than or equal to 1" in text
    assert "objective.maskratio: unknown; did you mean mask_ratio?" in text
    assert "objective.mask_ratio=1.4: must be less than 1" in text
    assert "backbone=vit_sm: no such backbone; did you mean vit_s?" in text
    assert "lr=abc" in text and "steps: expected key=value" in text


def test_missing_keys_are_named() -> None:
    assert problems("pretrain") == [
        "corpus: missing; give corpus=...",
        "run: missing; give run=...",
    ]


def test_a_missing_group_is_named_with_its_options() -> None:
    found = problems("finetune", "corpus=.", "ckpt=.", "stepz=1")
    assert any(p.startswith("task: missing; give task= one of") for p in found)
    assert any(p.startswith("stepz=1: no such key") for p in found)


def test_a_group_with_a_wrong_option_is_not_missing_as_well() -> None:
    found = problems("finetune", "corpus=.", "ckpt=.", "task=liver")
    assert found == ["task=liver: no such task; did you mean msd03_liver?"]


# Paths that Hydra's grammar rejects or takes apart.
PATHS = [
    "dcm_PE=AP_3",
    "Scan (1)",
    "x-{000..127}.tar",
    "scans, all",
    "Köln/Übersicht",
    "it's",
    'say "aah"',
    "a\\b",
    "ends\\",
    "[1,2]",
    "{a: b}",
    "null",
    "12",
    "$HOME",
    "${oc.env:HOME}",
    "/data/*.nii.gz",
    "~/x",
    "a  b",
    "100%",
    "#1",
    "a;b|c&d",
    r"a\${x}",
    r"\\${x}b",
]


@pytest.mark.parametrize("path", PATHS)
def test_paths_are_taken_as_they_are(path: str) -> None:
    settings = settings_for("prep", [f"input={path}", f"output={path}"])
    assert settings.input == Path(path) and settings.output == Path(path)


def test_an_optional_path_can_be_null() -> None:
    settings = settings_for("prep", ["input=a", "output=null", "salt=null", "name=Scan (1)"])
    assert settings.salt is None and settings.output == Path("null") and settings.name == "Scan (1)"


def test_names_may_hold_what_hydra_would_parse() -> None:
    assert settings_for("pretrain", ["corpus=c", "run=a=b"]).run == "a=b"
    settings = settings_for("finetune", ["corpus=c", "ckpt=r", "task=hippocampus", "labels=16"])
    assert settings.labels == "16"


def test_quoted_paths_lose_their_quotes() -> None:
    assert settings_for("prep", ["input='a b'", 'output="c d"']).input == Path("a b")


@pytest.mark.parametrize("file", sorted((HERE / "backbone").glob("*.yaml")), ids=lambda f: f.stem)
def test_every_backbone_composes(file: Path) -> None:
    settings = settings_for("pretrain", [*NEEDED, f"backbone={file.stem}"])
    assert settings.backbone["_target_"].startswith("pretrain.backbones.")


@pytest.mark.parametrize("file", sorted((HERE / "objective").glob("*.yaml")), ids=lambda f: f.stem)
def test_every_objective_composes(file: Path) -> None:
    settings = settings_for("pretrain", [*NEEDED, f"objective={file.stem}"])
    assert settings.objective["_target_"].startswith("pretrain.objectives.")


@pytest.mark.parametrize("file", sorted((HERE / "trainer").glob("*.yaml")), ids=lambda f: f.stem)
def test_every_trainer_composes(file: Path) -> None:
    settings_for("pretrain", [*NEEDED, f"trainer={file.stem}"])


@pytest.mark.parametrize("file", sorted((HERE / "task").glob("*.yaml")), ids=lambda f: f.stem)
def test_every_task_composes(file: Path) -> None:
    targets = ["targets=t.csv"] if "\ntarget: " in file.read_text() else []
    settings_for("finetune", ["corpus=c", "ckpt=r", f"task={file.stem}", *targets])


def test_lists_and_numbers_keep_hydras_grammar() -> None:
    settings = settings_for("pretrain", [*NEEDED, "crop_size=[32,48,32]", "lr=1e-3"])
    assert settings.crop_size == (32, 48, 32) and settings.lr == 1e-3


def test_arguments_that_only_the_signature_knows_are_accepted() -> None:
    settings = settings_for("pretrain", [*NEEDED, "backbone.drop_path=0.1"])
    assert settings.backbone["drop_path"] == 0.1


def test_a_users_own_objective_comes_by_config_dir(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new objective needs no edit: a class, a YAML."""
    (tmp_path / "mine.py").write_text(
        "from typing import Annotated\n"
        "from pydantic import Field\n"
        "from torch import nn\n"
        "class Mine(nn.Module):\n"
        "    def __init__(self, *, encoder: nn.Module, share: Annotated[float, Field(le=1)]):\n"
        "        super().__init__()\n"
    )
    groups = tmp_path / "my grüps 100%"
    (groups / "objective").mkdir(parents=True)
    (groups / "objective" / "mine.yaml").write_text("_target_: mine.Mine\nshare: 0.5")
    monkeypatch.syspath_prepend(str(tmp_path))
    own = ["--config-dir", str(groups), "objective=mine"]
    assert settings_for("pretrain", [*NEEDED, *own]).objective["share"] == 0.5
    assert problems("pretrain", *NEEDED, *own, "objective.share=3") == [
        "objective.share=3: must be less than or equal to 1"
    ]


def test_a_batch_that_does_not_divide_says_why() -> None:
    (found,) = problems("pretrain", *NEEDED, "trainer.devices=3", "batch_size=64")
    assert "must be a multiple of devices x nodes x accumulate = 3" in found


def test_what_is_given_twice_is_not_decided_silently() -> None:
    words = ["experiment=mae", "experiment=simmim", "lr=1", "lr=2", "trainer=cpu", "trainer=gpu8"]
    assert problems("pretrain", *NEEDED, *words) == [
        "experiment=simmim: experiment=mae was given before; give one",
        "lr=2: lr=1 was given before; give one",
        "trainer=gpu8: trainer=cpu was given before; give one",
    ]
    assert settings_for("pretrain", [*NEEDED, "lr=1", "lr=1"]).lr == 1


def test_keys_of_a_recipe_for_another_objective_are_told_as_such() -> None:
    words = [*NEEDED, "experiment=mae", "objective=cnn_mae"]
    (found,) = problems("pretrain", *words)
    assert found == (
        "objective=cnn_mae: does not take decoder_dim, decoder_depth, decoder_heads, norm_target, "
        "which conf/experiment/mae.yaml sets for its own objective=mae; leave out "
        "objective=cnn_mae or experiment=mae, or take a recipe with it, experiment= cnn_mae, "
        "cnn_mae_small"
    )
    # What was typed is the user's own mistake.
    found = problems("pretrain", *words, "objective.decoder_dim=24")[1]
    assert found.startswith("objective.decoder_dim: unknown")
    # The same class in another option of the group takes what the recipe sets.
    settings_for("pretrain", [*NEEDED, "experiment=volume_fusion", "objective=volume_fusion_b"])


@pytest.mark.parametrize(
    "value", ["(96,96,96)", "96,96,96", "[96,96", "[96, 96", "choice(1,2)", "{a: 1"]
)
def test_a_value_that_cannot_be_read_is_named_beside_the_others(value: str) -> None:
    first, second = problems("pretrain", *NEEDED, f"crop_size={value}", "lr=-1")
    assert first.startswith(f"crop_size={value}: cannot be read; a list is written [1,2,3]")
    assert second == "lr=-1: must be greater than 0"


def test_a_list_in_quotes_is_a_list() -> None:
    """As from a script that quotes once too often."""
    words = [*NEEDED, "crop_size='[32,48,32]'", 'health={every: 5, probe: "a"}']
    settings = settings_for("pretrain", words)
    assert settings.crop_size == (32, 48, 32)
    assert settings.health.every == 5 and settings.health.probe == Path("a")


@pytest.mark.parametrize(
    ("command", "word", "said"),
    [
        ("pretrain", "crop_size=[96,0,4096]", "0 must be greater than or equal to 1; 4096 must be"),
        ("pretrain", "crop_size=96", "expected voxels along D, H and W, such as [96,96,96]"),
        ("pretrain", "betas=[0.9]", "has no value number 2"),
        ("pretrain", "betas=[0.9,0.9,0.9]", "must have at most 2 items, found 3"),
        ("pretrain", "loggers=wandb", "must be a list, such as [a,b]"),
        ("pretrain", "health=off", "has keys of its own, to be given one by one"),
        ("pretrain", "lr=null", "must be a valid number"),
        ("pretrain", "run=a/b", "a name has letters, digits and . _ = - only"),
        ("pretrain", "objective.mask_ratio=no", "must be a valid number"),
        ("pretrain", "backbone.patch_size=[8,8]", "has no value number 3"),
        ("pretrain", "backbone.patch_size=[0,8,8]", "0 must be greater than or equal to 1"),
        ("pretrain", "backbone.patch_size=big", "must be a valid integer"),
    ],
)
def test_a_wrong_value_is_one_problem_of_the_key_that_was_typed(
    command: str, word: str, said: str
) -> None:
    needed = [] if command == "bench" else [w for w in NEEDED if w[:4] != word[:4]]
    (found,) = problems(command, *needed, word)
    # Lists that a class takes are shown as Python has them.
    assert found.replace(", ", ",").startswith(f"{word}: {said}".replace(", ", ","))


def test_wrong_items_of_a_list_are_all_that_is_wrong_with_it() -> None:
    """Without them the list would be too short, which is no second problem."""
    assert problems("bench", "variants=[fp16]") == [
        "variants=[fp16]: fp16 must be 'float32', 'bf16', 'float32-compiled' or 'bf16-compiled'"
    ]
    assert problems("bench", "variants=[]") == ["variants=[]: must have at least 1 item, found 0"]


def test_a_parts_problem_prints_no_mapping() -> None:
    assert problems("pretrain", *NEEDED, "intensity.CT.low=2000") == [
        "intensity.CT: a window needs low < high"
    ]


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("epochs=3", "epochs=3: no such key; voxelith pretrain --help lists them"),
        ("experiments=mae", "experiments=mae: no such key; did you mean experiment?"),
        ("drop_path=.1", "drop_path=.1: no such key; did you mean backbone.drop_path?"),
        ("objective=mae.yaml", "objective=mae.yaml: no such objective; did you mean mae?"),
        ("~lr=1", "~lr=1: expected key=value"),
        ("--steps=1", "--steps=1: expected key=value, without dashes"),
        ("lr=", "lr=: has no value; is a variable of the shell empty?"),
        ("runs=", "runs=: has no value"),
        ("hydra.run.dir=x", "hydra.run.dir=x: no such key"),
    ],
)
def test_words_that_name_nothing_are_explained(word: str, said: str) -> None:
    (found,) = problems("pretrain", *NEEDED, word)
    assert found.startswith(said)


def test_keys_that_a_file_leaves_out_can_be_given() -> None:
    """Regions have a default, and few files of conf/task name any."""
    needed = ["corpus=c", "ckpt=r", "task=hippocampus", "lr=1e-3"]
    region = "{name: whole, values: [1, 2], tolerance_mm: 1.0}"
    chosen = settings_for("finetune", [*needed, f"task.regions=[{region}]"])
    assert [one.name for one in chosen.task.scored] == ["whole"]
    for word, said in (
        ("task.region=3", "task.region=3: no such key"),
        ("lora.rank=3", "lora.rank=3: no such key; did you mean lora?"),
        ("task.unit=ml", "task.unit: no such key"),
    ):
        assert any(p.startswith(said) for p in problems("finetune", *needed, word)), word


def test_no_recipe_can_be_said() -> None:
    with_null = settings_for("pretrain", [*NEEDED, "experiment=null"])
    assert with_null == settings_for("pretrain", NEEDED)


def test_inputs_that_are_not_there_are_told_with_what_else_is_wrong() -> None:
    words = ["corpus=nowhere", "health.probe=gone", "run=r", "lr=abc"]
    assert problems("pretrain", *words)[1:] == [
        "corpus=nowhere: is not there",
        "health.probe=gone: is not there",
    ]


OWN = {
    "objective/unread.yaml": "a: [1\nb: {",
    "objective/bare.yaml": "mask_ratio: 0.5",
    "objective/gap.yaml": "_target_: pretrain.objectives.mae.MAE\nmask_ratio: ${nowhere}",
    "objective/gone.yaml": "_target_: nowhere.Mine",
    "experiment/plain.yaml": "lr: 0.1",
    "experiment/lost.yaml": "# @package _global_\ndefaults: [override /objective: maee]",
    "experiment/typo.yaml": "# @package _global_\nstepz: 5\nbetas: [2, 0]",
    "experiment/key.yaml": "# @package _global_\nobjective: cnn_mae",
}


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("objective=unread", ["{own}/objective/unread.yaml, line 2: is no YAML (expected ','"]),
        ("objective=bare", ["objective (set in {own}/objective/bare.yaml): has no _target_; give"]),
        ("objective=gap", ["objective.mask_ratio: Interpolation key 'nowhere' not found"]),
        ("objective=gone", ["objective._target_=nowhere.Mine: cannot be imported"]),
        (
            "experiment=plain",
            ["experiment (set in {own}/experiment/plain.yaml): its YAML must begin with the line"],
        ),
        (
            "experiment=lost",
            ["experiment=lost: In 'pretrain': Could not find 'objective/maee'; did you mean mae?"],
        ),
        (
            "experiment=typo",
            [
                "betas=[2,0] (set in {own}/experiment/typo.yaml): 2 must be less than 1",
                "stepz (set in {own}/experiment/typo.yaml): no such key; did you mean steps?",
            ],
        ),
        (
            "experiment=key",
            ["objective=cnn_mae (set in {own}/experiment/key.yaml): options are chosen in"],
        ),
    ],
)
def test_mistakes_in_a_users_own_groups_name_the_file(
    word: str, said: list[str], tmp_path: Path
) -> None:
    for name, text in OWN.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    found = problems("pretrain", *NEEDED, f"--config-dir={tmp_path}", word)
    assert len(found) == len(said)
    for one, expected in zip(found, said, strict=True):
        assert one.startswith(expected.format(own=tmp_path))


def test_a_folder_of_groups_is_looked_at(tmp_path: Path) -> None:
    own = f"--config-dir={tmp_path}"
    assert "no options of groups" in problems("pretrain", own)[0]
    assert "this command has no groups" in problems("prep", own)[0]
    assert "given 2 times" in problems("pretrain", own, own)[0]
    (tmp_path / "objective").mkdir()
    (tmp_path / "objective" / "mae.yaml").write_text("_target_: mine.Mine")
    # Hydra would take ours and say nothing.
    assert "objective=mae is one of voxelith; rename the file" in problems("pretrain", own)[0]
