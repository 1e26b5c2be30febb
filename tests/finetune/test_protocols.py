"""Presets state what the protocols state; arms differ in what they should and in nothing else."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError
from small_runs import add_few_split, make_release
from small_runs import settings as run_settings

from conf.compose import HERE, settings_for
from data_prep.errors import InputError
from finetune.kinds import kind_of
from finetune.rows import read_rows
from finetune.settings import FREE, FinetuneSettings, config_hash
from finetune.train import build_model, finetune, make_plan

PROTOCOLS = sorted(file.stem for file in (HERE / "protocol").glob("*.yaml"))


def test_the_page_lists_every_protocol_with_its_steps() -> None:
    page = (HERE.parent / "docs" / "data_sets.md").read_text().partition("## Protocols")[2]
    told = {}
    for line in page.splitlines():
        if line.startswith("| `"):
            names, family, steps, _ = line.strip("| ").split(" | ")
            families = [name.lower().rstrip("s") for name in family.split(", ")]
            told |= {
                name: (families[n % len(families)], int(steps))
                for n, name in enumerate(re.findall(r"`(\w+)`", names))
            }
    found = {name: composed(name) for name in PROTOCOLS}
    assert told == {name: (one.family, one.steps) for name, one in found.items()}


def composed(protocol: str | None = None, *words: str) -> FinetuneSettings:
    given = ["task=hippocampus", "corpus=c", "ckpt=r", *words]
    found: FinetuneSettings = settings_for(
        "finetune", given if protocol is None else [*given, f"protocol={protocol}"]
    )
    return found


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_every_protocol_composes_under_its_name(protocol: str) -> None:
    found = composed(protocol)
    assert found.protocol == protocol
    assert found.family == next((f for f in ("cnn", "vit") if f in protocol.split("_")), "any") or (
        protocol == "nnunet" and found.family == "cnn"
    )
    # Every arm of it is possible.
    if found.search:
        assert composed(protocol, "init=scratch", "recipe_of=own").arm == "scratch-own"


def test_tiny_is_the_default_and_what_is_given_beside_a_protocol_wins() -> None:
    assert composed("tiny") == composed()
    assert composed("short_cnn", "lr=5e-4", "steps=40000").lr == 5e-4
    assert composed("short_cnn", "lr=5e-4", "steps=40000").steps == 40000


@pytest.mark.parametrize(
    ("name", "epochs", "warm", "first", "factor"),
    [
        ("short_cnn", 150, 15, 0, 1), ("full_cnn", 1000, 50, 0, 1), ("nnunet", 1000, 0, 0, 1),
        ("short_vit", 150, 15, 0, 1), ("full_vit", 1000, 50, 0, 1),
        ("short_cnn_sawtooth", 150, 15, 15, 1), ("full_cnn_sawtooth", 1000, 50, 50, 1),
        ("short_vit_sawtooth", 150, 50, 15, 0.1), ("full_vit_sawtooth", 1000, 50, 50, 0.01),
    ],
)  # fmt: skip
def test_presets_have_the_published_rates_and_shapes(
    name: str, epochs: int, warm: int, first: int, factor: float
) -> None:
    found = composed(name)
    assert (found.steps, found.warmup) == (250 * epochs, 250 * warm)
    assert found.schedule == "poly" and found.batch_size == 2 and found.foreground == 0.5
    assert sum(phase.steps for phase in found.phases) == 250 * first
    for phase in found.phases:
        assert (phase.freeze, phase.lr_factor, phase.schedule) == ("encoder", factor, "poly")
        assert phase.warmup == 250 * (first // 2)
    if found.family == "cnn":
        assert (found.optimizer, found.momentum, found.weight_decay) == ("sgd", 0.99, 3e-5)
        assert found.lr == (1e-2 if name == "nnunet" else 1e-3)
        assert found.own is not None and found.own.lr == 1e-2
    else:
        assert (found.optimizer, found.betas, found.weight_decay) == ("adamw", (0.9, 0.98), 5e-2)
        assert (found.lr, found.clip) == (1e-4, 1.0)
        assert found.own is not None and found.own.lr == 3e-4
    assert found.deep_supervision == (name == "nnunet")
    # The same budget for both arms, stated.
    assert found.search is not None and found.search.runs == 4 * 3
    assert {found.lr, found.own.lr} <= set(found.search.lr)
    # The number of labels does not change the number of steps.
    assert composed(name, "labels=4").steps == composed(name, "labels=all").steps


# R3: one thing differs.

OTHER: dict[str, Any] = {
    "adapt_channels": "first",
    "crop_size": (8, 8, 8), "steps": 11, "batch_size": 4, "accumulate": 2, "optimizer": "sgd",
    "lr": 2e-3, "weight_decay": 0.1, "betas": (0.5, 0.6), "momentum": 0.5, "schedule": "poly",
    "warmup": 3, "halve_every": 5, "clip": 3.0, "augment": {"gain": 0.2}, "tta": True,
    "labels": "4", "part": "validation",
    "spacing": "native", "foreground": 0.1, "overlap": 0.1, "fit": "knn", "decoder": "mlp",
    "deep_supervision": True, "freeze": 2, "phases": ({"steps": 1, "freeze": "encoder"},),
    "layer_decay": 0.5, "ema": 0.5, "lora": {"rank": 2}, "task": None,
}  # fmt: skip
"""A different value of every setting that is part of a recipe."""


def test_every_setting_is_part_of_the_recipe_or_said_to_be_free() -> None:
    base = composed()
    fields = set(FinetuneSettings.model_fields)
    assert fields >= FREE
    said = base.model_copy(update={"adapt_channels": "repeat"})  # part of it where it is said
    assert set(said.recipe()) - set(base.recipe()) == {"adapt_channels"}
    kept = set(said.recipe()) - {"recipe_version", "precision"}
    assert kept == fields - FREE == set(OTHER)
    # Settings that others add land here too: they are in the recipe unless FREE names them.
    for name in kept & OTHER.keys():
        value = OTHER[name]
        if name == "task":
            value = base.task.model_copy(update={"flip": (True, True, True)})
        changed = base.model_copy(update={name: value})
        assert config_hash(changed.recipe()) != config_hash(base.recipe()), name


def test_only_what_makes_an_arm_or_a_draw_is_free() -> None:
    base = composed("short_cnn")
    same = [
        {"init": "scratch"}, {"seed": 9}, {"label_seed": 3}, {"ckpt": Path("x")}, {"run": "y"},
        {"protocol": "another"}, {"family": "any"}, {"own": None}, {"search": None},
        {"init": "scratch", "recipe_of": "own"},
    ]  # fmt: skip
    for change in same:
        assert config_hash(base.model_copy(update=change).recipe()) == config_hash(base.recipe())


@pytest.fixture(scope="module")
def arms(labelled_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    add_few_split(labelled_corpus)
    folder = tmp_path_factory.mktemp("arms")
    release = make_release(folder / "release", "resenc")
    shared = {
        "protocol": "mine", "own": {"lr": 1e-2, "warmup": 1}, "layer_decay": 0.9, "run": None,
        "search": {"lr": [3e-3, 1e-2], "draws": 2}, "steps": 4,
        "phases": [{"steps": 1, "freeze": "encoder"}],
    }  # fmt: skip
    changes: dict[str, dict[str, Any]] = {
        "pretrained": {"init": "pretrained"},
        "scratch": {"init": "scratch"},
        "scratch-own": {"init": "scratch", "recipe_of": "own"},
    }
    return {
        arm: finetune(run_settings(release, labelled_corpus, folder, **shared, **change))
        for arm, change in changes.items()
    }


def test_rows_tell_the_three_arms_apart(arms: dict[str, Path]) -> None:
    heads = {arm: read_rows(run / "rows.csv")[0] for arm, run in arms.items()}
    assert [row.arm for row in heads.values()] == list(arms)
    assert len({row.config_hash for row in heads.values()}) == 1  # one recipe is shared
    assert {row.protocol for row in heads.values()} == {"mine"}
    trained = {arm: row.recipe_hash for arm, row in heads.items()}
    assert trained["pretrained"] == trained["scratch"] == heads["scratch"].config_hash
    assert trained["scratch-own"] != trained["scratch"]
    assert len({run.name for run in arms.values()}) == 3


def test_twins_differ_in_init_alone(arms: dict[str, Path]) -> None:
    """R3, mechanically: what two runs were told, key by key."""

    def told(arm: str) -> tuple[dict[str, Any], dict[str, Any]]:
        run = arms[arm]
        config = json.loads((run / "config.json").read_text())
        return config, json.loads((run / "run.json").read_text())

    (one, first), (other, second) = told("pretrained"), told("scratch")
    assert {name for name in one if one[name] != other[name]} == {"init"}
    assert first["recipe"] == second["recipe"] == first["trained"] == second["trained"]
    assert first["label_keys"] == second["label_keys"]
    own, third = told("scratch-own")
    assert third["recipe"] == first["recipe"]
    different = {n for n in first["recipe"] if third["trained"][n] != first["recipe"][n]}
    assert different == {"lr", "warmup", "phases", "layer_decay"}
    assert own["lr"] == 1e-2 and own["phases"] == [] and own["layer_decay"] == 1.0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"recipe_of": "own"}, "give init=scratch"),
        ({"recipe_of": "own", "init": "scratch"}, "needs own.lr"),
        (
            {
                "recipe_of": "own", "init": "scratch", "own": {"lr": 2e-2},
                "search": {"lr": [1e-3], "draws": 1},
            },
            "are not among search.lr",
        ),
        ({"search": {"lr": [1e-3, 1e-3], "draws": 1}}, "names a candidate twice"),
        ({"lora": {"rank": 4}, "freeze": "encoder"}, "give freeze=none"),
        ({"fit": "ridge", "freeze": "encoder"}, "ridge fits decoder=linear"),
        ({"fit": "ridge", "decoder": "linear"}, "goes with freeze=encoder"),
        ({"decoder": "knn"}, "descent fits every other"),
        ({"own": {"lr": 1e-3, "freeze": "none"}}, "Extra inputs"),
    ],
)  # fmt: skip
def test_settings_that_do_not_go_together_are_refused(changes: dict[str, Any], said: str) -> None:
    base = composed().model_dump()
    with pytest.raises(ValidationError, match=said):
        FinetuneSettings.model_validate(base | changes)


def test_a_protocol_for_another_kind_of_network_is_refused(
    labelled_corpus: Path, tmp_path: Path
) -> None:
    add_few_split(labelled_corpus)
    vit = make_release(tmp_path / "vit", "vit")
    given = run_settings(vit, labelled_corpus, tmp_path, protocol="short_cnn", family="cnn")
    with pytest.raises(InputError, match=r"rates are for a cnn .* take protocol=short_vit"):
        make_plan(given)
    for fits in ({"family": "vit"}, {"family": "any"}):
        build_model(make_plan(given.model_copy(update=fits)))


def test_a_rate_that_never_gets_up_is_told() -> None:
    plan: Any = SimpleNamespace(validation=("v",), unlabelled=(), partial={})

    def said(*words: str) -> list[str]:
        chosen = composed("short_cnn", *words)
        return [n for n in kind_of(chosen).notes(plan) if "never gets to lr" in n]

    assert said() == [] and composed("short_cnn").warmup == 3750
    (note,) = said("steps=20")
    assert note.startswith("warmup=3750: not shorter than the 20 steps")
    phase = "phases=[{steps: 10, freeze: encoder, warmup: 10}]"
    assert [note[:19] for note in said("steps=30", "warmup=5", phase)] == ["phases[0].warmup=10"]
    assert said("steps=5000", "phases=[{steps: 4000, freeze: encoder}]") != []  # 1000 are left
