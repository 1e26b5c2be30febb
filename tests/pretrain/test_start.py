"""A pretraining that begins from another run or a release: what it takes, refuses and remembers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from seeds import SEED
from test_loop import MAE, RESENC, VIT, settings, weights

from conf.compose import settings_for
from data_prep.errors import InputError
from finetune.evaluate import comparable
from pretrain.backbones.resenc import ResEncUNetEncoder
from pretrain.backbones.slice_vit import SliceViT
from pretrain.export import export
from pretrain.objective import Objective
from pretrain.release import load_release
from pretrain.settings import PretrainSettings
from pretrain.start import begin_from, open_start, recipe_hash
from pretrain.train import build_objective, prepare, pretrain

SIMCLR = {"_target_": "pretrain.objectives.simclr.SimCLR", "hidden_dim": 8, "out_dim": 8}
LOCAL = {
    "_target_": "pretrain.objectives.contrastive.LocalContrast",
    "blocks": 1, "region": 1, "slabs": 2, "out_dim": 8,
}  # fmt: skip


@pytest.fixture(scope="module")
def first(pretrain_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pretrain(settings(pretrain_corpus, tmp_path_factory.mktemp("runs"), "first", steps=2))


@pytest.fixture(scope="module")
def release(first: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(first, tmp_path_factory.mktemp("releases") / "first").path


@pytest.fixture
def chosen(pretrain_corpus: Path, tmp_path: Path) -> Any:
    def make(run: str = "second", **changes: Any) -> PretrainSettings:
        # A rate so small that the weights after a step are those of the start but for a trifle.
        given: dict[str, Any] = {
            "objective": SIMCLR, "steps": 1, "lr": 1e-9, "weight_decay": 0.0,
        } | changes  # fmt: skip
        return settings(given.pop("corpus", pretrain_corpus), tmp_path, run, **given)

    return make


def nearly(run: Path, other: Path, prefix: str) -> bool:
    a, b = weights(run), weights(other)
    names = [name for name in a if name.startswith(prefix)]
    assert names
    return all(torch.allclose(a[name], b[name], atol=1e-6) for name in names)


def composed(corpus: Path, runs: Path, init: object, *more: str) -> PretrainSettings:
    words = [
        f"corpus={corpus}", "run=again", f"runs={runs}", f"init={init}", "backbone=init",
        "objective=simclr", "steps=2", *more,
    ]  # fmt: skip
    made = settings_for("pretrain", words)
    assert isinstance(made, PretrainSettings)
    return made


def test_the_architecture_comes_from_what_it_begins_from(
    first: Path, release: Path, pretrain_corpus: Path, tmp_path: Path
) -> None:
    file = tmp_path / "public.pth"
    encoder = ResEncUNetEncoder(**{k: v for k, v in RESENC.items() if k != "_target_"})
    state = {f"encoder.{name}": value for name, value in encoder.state_dict().items()}
    decoder = {"decoder.transpconvs.0.weight": torch.zeros(6, 4, 2, 2, 2)}
    torch.save({"network_weights": state | decoder}, file)
    same = ("features", "blocks")
    for init in (first, release, file):
        found = composed(pretrain_corpus, tmp_path, init).backbone
        assert found["_target_"] == RESENC["_target_"]
        assert all(list(found[name]) == list(RESENC[name]) for name in same), init
    assert composed(pretrain_corpus, tmp_path, first, "backbone.features=[2,4]").backbone[
        "features"
    ] == [2, 4]
    for words in (("null", "of what"), (tmp_path / "none", "none")):
        with pytest.raises(InputError, match=words[1]):
            composed(pretrain_corpus, tmp_path, words[0])


def test_a_run_that_has_begun_needs_its_start_no_more(
    first: Path, pretrain_corpus: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(first, copy)
    words = ("crop_size=[8,12,8]", "batch_size=4", "trainer=cpu", "trainer.workers=0", "warmup=1")
    made = composed(pretrain_corpus, tmp_path / "runs", copy, *words)
    pretrain(made)
    shutil.rmtree(copy)
    assert composed(pretrain_corpus, tmp_path / "runs", copy, *words).backbone == made.backbone


def test_other_intensities_than_the_weights_are_used_to_are_said(
    first: Path, chosen: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    pretrain(chosen("same", init=first))
    assert "intensity." not in capsys.readouterr().out
    rule = {"rule": "percentile", "onto": [0.0, 1.0]}
    pretrain(chosen("other", init=first, intensity={"MR": rule, "CT": rule}))
    said = capsys.readouterr().out
    assert 'the weights of init were trained with {"rule": ' in said


def test_the_encoder_of_a_run_or_its_release_is_where_it_begins(
    first: Path, release: Path, chosen: Any
) -> None:
    for init in (first, release):
        run = pretrain(chosen(f"from-{init.name}-{init.parent.name}", init=init, seed=5))
        assert nearly(run, first, "encoder.")
        report = json.loads((run / "load_report.json").read_text())
        state, given = weights(run), open_start(init).state
        assert sorted([*report["copied"], *report["new"]]) == sorted(state)
        assert sorted([*report["copied"], *report["skipped"]]) == sorted(given)
        assert report["covered"] == 1.0 and report["init"] == "first"
        assert all(name.startswith("projector.") for name in report["new"])
        checkpoint = torch.load(next((run / "checkpoints").iterdir()), weights_only=True)
        assert checkpoint["step"] == 1  # a schedule and an optimiser of its own
    scratch = pretrain(chosen("scratch", seed=5))
    assert not nearly(scratch, first, "encoder.")
    assert not (scratch / "load_report.json").exists()


def test_loggers_are_told_of_the_load(
    first: Path,
    chosen: Any,
    monkeypatch: pytest.MonkeyPatch,
    kept_by_wandb: Callable[[Path, bytes], bytes],
) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = pretrain(chosen("logged", init=first, loggers=("tensorboard", "wandb")))
    report = json.loads((run / "load_report.json").read_text())
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    (event,) = events.Tensors("load/text_summary")
    said = event.tensor_proto.string_val[0].decode()
    counts = {name: len(report[name]) for name in ("copied", "adapted", "skipped", "new")}
    for name, value in {"covered": 1.0, **counts, "constant": "[]"}.items():
        assert f"- load/{name}: {value}" in said
    kept = kept_by_wandb(run, b"load/covered")
    assert b"load/covered" in kept and str(run.parent).encode() not in kept


def test_another_encoder_is_refused_and_nothing_written(first: Path, chosen: Any) -> None:
    wide = chosen(init=first, backbone=RESENC | {"features": [4, 6]})
    with pytest.raises(InputError, match=r"init: has \d+% of this encoder's parameters") as found:
        pretrain(wide)
    assert "(there [8, 4, 3, 3, 3])" in str(found.value)
    with pytest.raises(InputError, match="has 0%"):
        pretrain(chosen(init=first, backbone=VIT, objective=MAE))
    assert not (wide.runs / wide.run).exists()


def test_less_of_an_encoder_is_taken_where_that_is_meant(first: Path, chosen: Any) -> None:
    """Said in the run's settings, and every tensor in its report."""
    deep = RESENC | {"features": [4, 8, 16], "strides": [1, 2, 2], "blocks": [1, 1, 1]}
    with pytest.raises(InputError, match=r"init: has \d+% .* or init_covers="):
        prepare(chosen(init=first, backbone=deep))
    run = pretrain(chosen("deep", init=first, backbone=deep, init_covers=0.1))
    report = json.loads((run / "load_report.json").read_text())
    assert 0.1 <= report["covered"] < 0.95
    assert sorted([*report["copied"], *report["new"]]) == sorted(weights(run))
    assert json.loads((run / "config.json").read_text())["init_covers"] == 0.1
    wide = chosen("wide", init=first, backbone=RESENC | {"features": [4, 6]}, init_covers=0.05)
    report = json.loads((pretrain(wide) / "load_report.json").read_text())
    assert any("has shape" in why for why in report["skipped"].values())


def test_what_is_no_start_is_said_with_all_else(chosen: Any, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    objective = SIMCLR | {"places": 0}
    with pytest.raises(InputError) as found:
        prepare(chosen(init=tmp_path / "empty", objective=objective))
    text = str(found.value)
    assert "init=" in text and "SHA256SUMS" in text and "objective.places=0" in text


def test_a_frozen_encoder_needs_a_start(first: Path, chosen: Any) -> None:
    local = {"objective": LOCAL, "crop_size": (8, 12, 8)}
    with pytest.raises(InputError, match="LocalContrast does not train the encoder, so give init="):
        prepare(chosen(**local))
    prepare(chosen(init=first, **local))


def test_a_run_goes_on_without_what_it_began_from(first: Path, chosen: Any, tmp_path: Path) -> None:
    """It has a checkpoint of its own; but another start is another run."""
    copy = Path(shutil.copytree(first, tmp_path / "copy"))
    pretrain(chosen(init=copy))
    moved = copy.rename(tmp_path / "moved")
    assert prepare(chosen(init=moved)).finished  # the same weights elsewhere
    shutil.rmtree(moved)
    assert prepare(chosen(init=copy)).finished  # gone by now
    for other in (None, pretrain(chosen("other"))):
        with pytest.raises(InputError, match="it began from copy"):
            prepare(chosen(init=other))
    with pytest.raises(InputError, match="it began from random weights"):
        prepare(chosen("other", init=first))


def test_a_release_remembers_what_its_start_has_seen(
    first: Path, release: Path, chosen: Any, tmp_path: Path, labelled_corpus: Path
) -> None:
    """The leakage gate asks for all volumes, and no path travels."""
    elsewhere = chosen(init=release, corpus=labelled_corpus)
    run = pretrain(elsewhere)
    made = load_release(export(run, tmp_path / "release").path)
    before = load_release(release)
    assert before.fingerprints < made.fingerprints
    origin = made.config["training"]["init"]
    assert (origin["name"], origin["digest"]) == ("first", before.digest)
    assert origin["data"][0]["source"] == before.config["data"]["source"]
    assert str(release) not in (made.path / "config.json").read_text()
    card = (made.path / "README.md").read_text()
    assert "| begins from | `first`" in card
    for licence in before.config["data"]["licence"]:
        assert f"- {licence}:" in card
    # Once more: what the start's start has seen is still known.
    again = open_start(made.path).origin
    assert len(again.data) == 2 and set(again.fingerprints) == made.fingerprints
    assert open_start(run).origin.fingerprints == again.fingerprints


def test_the_recipe_of_the_start_is_part_of_the_recipe(first: Path, chosen: Any) -> None:
    """And its seed is not, as with the run's own."""
    config = chosen().model_dump(mode="json")
    origin = open_start(first).origin
    plain, with_start = recipe_hash(config, "i", 1), recipe_hash(config, "i", 1, origin)
    assert plain != with_start
    reseeded = pretrain(
        PretrainSettings.model_validate(
            json.loads((first / "config.json").read_text()) | {"seed": 9, "run": "reseeded"}
        )
    )
    assert open_start(reseeded).origin.digest != origin.digest
    assert recipe_hash(config, "i", 1, open_start(reseeded).origin) == with_start


SLICES = {
    "_target_": "pretrain.backbones.slice_vit.SliceViT",
    "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def public(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of three channels, as MedDINOv3 publishes them: a teacher, heads and all."""
    torch.manual_seed(SEED + 3)
    chosen = {name: value for name, value in SLICES.items() if name != "_target_"}
    vit = SliceViT(in_channels=3, **chosen)
    for parameter in vit.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    meta = {"reg_token": "storage_tokens", "gamma_1": "ls1.gamma", "gamma_2": "ls2.gamma"}
    stored = {"dino_head.last_layer.weight": torch.ones(2)}
    for name, tensor in vit.state_dict().items():
        for ours, theirs in meta.items():
            name = name.replace(ours, theirs)
        stored[f"backbone.{name}"] = tensor
    path = tmp_path_factory.mktemp("public") / "vit.pth"
    torch.save({"teacher": stored}, path)
    return path


def test_public_weights_are_where_it_begins_and_what_they_saw_is_unknown(
    public: Path, chosen: Any, tmp_path: Path
) -> None:
    slices = {"backbone": SLICES, "crop_size": (1, 12, 8)}
    run = pretrain(chosen(init=public, **slices))
    stored = torch.load(public, weights_only=True)["teacher"]
    found = weights(run)
    for name in ("blocks.1.mlp.fc2.weight", "cls_token"):
        torch.testing.assert_close(found[f"encoder.{name}"], stored[f"backbone.{name}"])
    grey = stored["backbone.patch_embed.proj.weight"].sum(1, keepdim=True)
    torch.testing.assert_close(found["encoder.patch_embed.proj.weight"], grey)
    report = json.loads((run / "load_report.json").read_text())
    assert sorted([*report["copied"], *report["adapted"], *report["new"]]) == sorted(found)
    assert list(report["adapted"]) == ["encoder.patch_embed.proj.weight"]
    assert report["covered"] == 1.0 and "dino_head.last_layer.weight" in report["skipped"]

    made = load_release(export(run, tmp_path / "release").path)
    assert comparable(made.fingerprints) is None  # the gate gets no answer, not a clean one
    assert comparable(open_start(made.path).origin.fingerprints) is None
    card = (made.path / "README.md").read_text()
    assert "training data: not stated by vit.pth" in card and "what vit.pth does not tell" in card
    assert str(public.parent) not in (made.path / "config.json").read_text() + card

    copy = Path(shutil.copyfile(public, tmp_path / "copy.pth"))
    assert prepare(chosen(init=copy, **slices)).finished
    torch.save({"teacher": {n: t + 1 for n, t in stored.items()}}, copy)
    with pytest.raises(InputError, match="it began from vit"):
        prepare(chosen(init=copy, **slices))


def test_public_weights_of_another_network_are_refused_and_nothing_written(
    public: Path, chosen: Any
) -> None:
    deep = chosen(init=public, backbone=SLICES | {"depth": 3}, crop_size=(1, 12, 8))
    with pytest.raises(InputError, match=r"blocks\.2\.norm1\.weight: is not in the file"):
        pretrain(deep)
    with pytest.raises(InputError, match=r"here is slice_vit\.SliceViT, and the encoder is Res"):
        pretrain(chosen(init=public))
    assert not (deep.runs / deep.run).exists()


def test_public_weights_of_nnssl_are_where_it_begins(chosen: Any, tmp_path: Path) -> None:
    """In nnssl's layout, each tensor by two names; one kernel without values is called out."""
    args = {name: value for name, value in RESENC.items() if name != "_target_"}
    encoder = ResEncUNetEncoder(**args)
    lost = "stages.0.blocks.0.conv1.conv.weight"
    torch.nn.init.zeros_(encoder.get_parameter(lost))
    stored = {f"encoder.{name}": tensor for name, tensor in encoder.state_dict().items()}
    stored |= {f"decoder.{name}": tensor for name, tensor in stored.items()}
    path = tmp_path / "public.pth"
    torch.save({"network_weights": stored, "trainer_name": "BaseMAETrainer"}, path)
    run = pretrain(chosen(init=path, backbone=RESENC))
    found = weights(run)
    for name, tensor in encoder.state_dict().items():
        torch.testing.assert_close(found[f"encoder.{name}"], tensor, atol=1e-6, rtol=0)
    report = json.loads((run / "load_report.json").read_text())
    assert report["constant"] == [f"encoder.{lost}"]
    assert sorted([*report["copied"], *report["new"]]) == sorted(found)
    assert report["sources"] == {}  # an objective calls them as nnssl does
    assert sorted([*report["copied"], *report["skipped"]]) == sorted(stored)


def test_a_run_says_in_what_precision_it_is_computed_and_stays_in_it(
    chosen: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Seeds on two kinds of machines are no seeds of one recipe."""

    def kept(run: Path) -> tuple[str, str]:
        config = json.loads((run / "config.json").read_text())
        return config["trainer"]["precision"], recipe_hash(config, "i", 1)

    plain = kept(pretrain(chosen("plain")))
    assert plain[0] == "32-true"
    monkeypatch.setattr("pretrain.train.machine_precision", lambda _: "bf16-mixed")
    half = kept(pretrain(chosen("half")))
    assert half[0] == "bf16-mixed" and half[1] != plain[1]
    # A start that came to no checkpoint has computed nothing.
    shutil.copytree(tmp_path / "half", tmp_path / "none")
    shutil.rmtree(tmp_path / "none" / "checkpoints")
    monkeypatch.undo()
    assert prepare(chosen("none")).settings.trainer.precision == "32-true"
    # Elsewhere a run goes on as it was, one of before that kept no precision too.
    assert prepare(chosen("half")).settings.trainer.precision == "bf16-mixed"
    config = tmp_path / "half" / "config.json"
    config.write_text(config.read_text().replace("bf16-mixed", "auto"))
    assert prepare(chosen("half")).settings.trainer.precision == "auto"
    assert prepare(chosen("new"), elsewhere=True).settings.trainer.precision == "auto"


def test_a_projector_of_another_width_is_new_and_its_teacher_too() -> None:
    """VoCo's teacher is that of its projector, and no encoder that must fit."""

    def voco(width: int) -> Objective:
        words = ["experiment=voco_small", "corpus=c", "run=r", f"objective.hidden_dim={width}"]
        return build_objective(settings_for("pretrain", words), 1)

    one, other = voco(16), voco(32)
    report = begin_from(other, one.state_dict())
    assert report.covered == 1.0
    assert {name.split(".")[0] for name in report.new} >= {"projector", "teacher"}
    encoder = one.encoder.state_dict()
    assert all(torch.equal(v, encoder[n]) for n, v in other.encoder.state_dict().items())
