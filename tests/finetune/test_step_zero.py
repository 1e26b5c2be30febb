"""Before its first step a run is its release: seen on real scans, and said by the run itself."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from seeds import SEED
from small_runs import BACKBONES, TASK, add_few_split, make_release, settings, write_encoder
from torch import nn

import voxelith
from data_prep.corpus import Corpus
from data_prep.errors import InputError
from data_prep.files import file_digest
from data_prep.splits import split_from, write_split
from finetune import train
from finetune.export import export_run as export
from finetune.kinds import kind_of
from finetune.model_file import load_network
from finetune.rows import read_rows
from finetune.segmenter import Segmenter
from finetune.settings import config_hash
from finetune.step_zero import FILE, look_at_start
from finetune.supervised import Supervised
from finetune.train import build_model, finetune, make_plan
from pretrain.encoder import Encoder
from pretrain.release import Release, load_release

HAS_PEFT = importlib.util.find_spec("peft") is not None
CLASSES = {"classes": TASK["classes"][:1]}


@pytest.fixture(scope="module", params=["resenc", "vit"])
def release(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Release:
    return make_release(tmp_path_factory.mktemp("release") / "r", request.param)


@pytest.fixture(scope="module")
def corpus(labelled_corpus: Path) -> Path:
    add_few_split(labelled_corpus)
    return labelled_corpus


def test_the_features_of_a_scan_are_those_of_the_release(
    release: Release, corpus: Path, samples: Path, tmp_path: Path
) -> None:
    """To the last bit, and from scratch they are others."""
    scan = sorted((samples / "hippocampus").rglob("images/*.nii.gz"))[0]
    expected = voxelith.load_encoder(release.path).features(scan, modality="MR")
    for init in ("pretrained", "scratch"):
        plan = make_plan(settings(release, corpus, tmp_path, init=init))
        model, _ = build_model(plan)
        found = Encoder(model.encoder, plan.preprocess, release.config).features(
            scan, modality="MR"
        )
        assert np.array_equal(found.map, expected.map) == (init == "pretrained")
        assert look_at_start(plan, model).features_equal_release == (init == "pretrained")


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"ema": 0.9},
        {"freeze": "encoder"},
        {"fit": "ridge", "decoder": "linear", "freeze": "encoder"},
        {"phases": [{"steps": 1, "freeze": "encoder"}]},
        {"decoder": "linear", "spacing": "native"},
        pytest.param(
            {"lora": {"rank": 2, "alpha": 4}, "ema": 0.9},
            marks=[
                pytest.mark.extra,
                pytest.mark.skipif(not HAS_PEFT, reason="peft is missing"),
            ],
        ),
    ],
    ids=str,
)
def test_a_run_says_so_itself(
    release: Release, corpus: Path, tmp_path: Path, more: dict[str, Any]
) -> None:
    run = finetune(settings(release, corpus, tmp_path, steps=2, **more))
    said = json.loads((run / FILE).read_text())
    assert said == {
        "features_equal_release": True, "largest_difference": 0.0, "allowed": 0.0,
        "maps": said["maps"],
    }  # fmt: skip
    assert said["maps"] == len(release.build_encoder().strides)


def test_scratch_says_that_it_is_not_the_release(
    release: Release, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = finetune(settings(release, corpus, tmp_path, steps=1, init="scratch"))
    said = json.loads((run / FILE).read_text())
    assert not said["features_equal_release"] and said["largest_difference"] > 1e-3
    assert "before the first step, features differ from those of the release" in (
        capsys.readouterr().out
    )


@pytest.mark.parametrize("where", ["encoder", "average", "lost"])
def test_a_run_whose_weights_are_not_in_use_stops(
    release: Release, corpus: Path, tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A single weight of a single tensor, or all of them: drawn anew behind the load."""
    built = train.build_model

    def spoilt(plan: Any) -> Any:
        model, report = built(plan)
        part = model.average["encoder"] if where == "average" else model.encoder
        with torch.no_grad():
            if where == "lost":
                part.apply(lambda m: m.reset_parameters() if isinstance(m, nn.Conv3d) else None)
            else:
                next(part.parameters()).view(-1)[0] += 0.01
        return model, report

    monkeypatch.setattr(train, "build_model", spoilt)
    given = settings(release, corpus, tmp_path, steps=2, ema=0.9)
    with pytest.raises(RuntimeError, match="are not in use"):
        finetune(given)
    run = tmp_path / "r"
    assert not json.loads((run / FILE).read_text())["features_equal_release"]
    assert not (run / "rows.csv").exists() and not (run / "metrics.csv").exists()


def test_the_look_changes_nothing(release: Release, corpus: Path, tmp_path: Path) -> None:
    plan = make_plan(settings(release, corpus, tmp_path, freeze=1))
    model, _ = build_model(plan)
    model.train()
    modes = [part.training for part in model.modules()]
    before = {n: v.clone() for n, v in model.state_dict().items()}
    drawn = torch.get_rng_state()
    look_at_start(plan, model)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert [part.training for part in model.modules()] == modes and True in modes
    assert all(torch.equal(before[n], v) for n, v in model.state_dict().items())


# Other channels.


def of_channels(folder: Path, count: int, kind: str = "resenc") -> Release:
    described = BACKBONES[kind]
    described = {**described, "args": {**described["args"], "in_channels": count}}
    changes = {"name": f"of-{count}", "crop_size": [8, 16, 32]}
    return load_release(write_encoder(folder, described, **changes))


@pytest.mark.parametrize("kind", ["resenc", "vit", "pct_net"])
@pytest.mark.parametrize("how", ["repeat", "first"])
def test_adapted_channels_answer_as_before(
    kind: str, how: Any, corpus: Path, tmp_path: Path
) -> None:
    one = of_channels(tmp_path / "one", 1, kind)
    plan = make_plan(settings(one, corpus, tmp_path))
    three = replace(plan, release=one.for_channels(3, how))
    model, report = build_model(three)
    assert report.adapted
    found = look_at_start(three, model)
    assert found.features_equal_release and found.allowed > found.largest_difference >= 0
    if how == "first":  # what the others hold does not matter to weights that are zeros there
        shared, _ = build_model(replace(plan, release=one.for_channels(3, "repeat")))
        assert not look_at_start(three, shared).features_equal_release
    with torch.no_grad():
        next(model.encoder.parameters()).view(-1)[0] += 0.1
    assert not look_at_start(three, model).features_equal_release


def test_several_channels_are_the_first_of_more_where_it_is_said(
    corpus: Path, tmp_path: Path
) -> None:
    two = of_channels(tmp_path / "two", 2)
    one = of_channels(tmp_path / "one", 1)
    four = replace(make_plan(settings(one, corpus, tmp_path)), release=two.for_channels(4, "first"))
    model, report = build_model(four)
    assert all("the first 2, zeros" in how for how in report.adapted.values())
    assert look_at_start(four, model).features_equal_release
    with pytest.raises(InputError, match=r"takes 3 channels, .* give scans of 3$"):
        of_channels(tmp_path / "three", 3).for_channels(2, "first")


@pytest.mark.parametrize("kind", ["resenc", "vit"])
def test_several_channels_become_one_where_it_is_said(
    kind: str, corpus: Path, tmp_path: Path
) -> None:
    two = of_channels(tmp_path / "two", 2, kind)
    for how in (None, "first"):
        with pytest.raises(InputError, match=r"takes 2 channels.*or adapt_channels=repeat"):
            make_plan(settings(two, corpus, tmp_path, adapt_channels=how))
    with pytest.raises(InputError, match=r"takes 2 channels, .*, or adapt_channels=first: the fir"):
        two.for_channels(3, "repeat")
    run = finetune(settings(two, corpus, tmp_path, adapt_channels="repeat", steps=1))
    said = json.loads((run / FILE).read_text())
    assert said["features_equal_release"] and said["allowed"] == 1e-3
    report = json.loads((run / "load_report.json").read_text())
    assert "encoder" in next(iter(report["adapted"])) and report["covered"] == 1.0
    assert all("2 to 1 channels: their sum" in how for how in report["adapted"].values())
    assert load_network(run, "cpu").channels == 1
    facts = json.loads((run / "run.json").read_text())
    assert facts["recipe"]["adapt_channels"] == "repeat"


def test_the_hash_of_a_recipe_is_that_of_before_unless_it_is_said(
    corpus: Path, tmp_path: Path
) -> None:
    one = of_channels(tmp_path / "one", 1)
    plans = [
        make_plan(settings(one, corpus, tmp_path, adapt_channels=how))
        for how in (None, "repeat", "first")
    ]
    assert "adapt_channels" not in plans[0].recipe
    assert len({config_hash(plan.recipe) for plan in plans}) == 3
    assert plans[2].recipe["adapt_channels"] == "first"


# A segmenter goes on.


def test_a_segmenter_goes_on_with_its_task(corpus: Path, tmp_path: Path) -> None:
    """What it scores before the first step is what its release scores, not chance."""
    start = make_release(tmp_path / "start", "resenc")
    found = Corpus.open(corpus)
    if "same" not in found.splits:  # it is asked about the cases that it knows
        part = {key: "train" for key in found.split("few")["parts"]["train"][:2]}
        part[found.split("few")["parts"]["train"][2]] = "test"
        parts = [part.get(key, "") for key in found.keys]
        write_split(split_from("same", found.keys, found.subjects, parts), found.path / "splits")
    more: dict[str, Any] = {"split": "same", "steps": 120, "lr": 1e-2, "crop_size": [16, 32, 32]}
    trained = finetune(settings(start, corpus, tmp_path, run="first", **more))
    release = export(trained, tmp_path / "release")

    def dice(network: Segmenter) -> float:
        return float(np.nanmean([row.dsc for row in rows_of(network)]))

    def rows_of(network: Segmenter) -> list[Any]:
        run_plan = replace(plan, preprocess=network.preprocess)
        return list(kind_of(run_plan.settings).score(run_plan, Folder(tmp_path), network.model))

    plan = make_plan(settings(release, corpus, tmp_path, run="second", **more))
    assert plan.transfer == "task" and plan.checkpoint.endswith(" with decoder and head")
    model, report = build_model(plan)
    assert not report.new and not report.skipped and report.covered == 1.0
    own = load_network(release.path, "cpu")
    assert isinstance(own, Segmenter)
    scored = float(np.nanmean([row.dsc for row in read_rows(trained / "rows.csv")]))
    segmenter = replace(own, model=model)
    assert dice(segmenter) == pytest.approx(scored, abs=1e-6)
    scratch = build_model(make_plan(settings(release, corpus, tmp_path, init="scratch", **more)))[0]
    chance = dice(replace(own, model=scratch))
    assert scored > chance + 0.1, (scored, chance)
    for path in (release.path, trained):
        volume = found.volume(found.position(plan.test.keys[0]))
        known = load_network(path, "cpu")
        assert isinstance(known, Segmenter)
        assert np.array_equal(segmenter.segment(volume), known.segment(volume))


class Folder:
    """A run's folder, as far as scoring knows it."""

    def __init__(self, path: Path) -> None:
        self.path = path


def test_another_task_gets_a_head_of_its_own(corpus: Path, tmp_path: Path) -> None:
    release = load_release(Path(__file__).parents[1] / "releases" / "segmenter-8698360")
    usual = {"crop_size": [8, 16, 16]}
    told = {
        "task": make_plan(settings(release, corpus, tmp_path, **usual)),
        "network": make_plan(
            settings(release, corpus, tmp_path, task={**TASK, **CLASSES}, **usual)
        ),
        "encoder": make_plan(settings(release, corpus, tmp_path, transfer="encoder", **usual)),
    }
    asked = make_plan(settings(release, corpus, tmp_path, transfer="network", **usual))
    assert asked.transfer == "network" and asked.identity != told["task"].identity
    for name, plan in told.items():
        assert plan.transfer == name
        model, report = build_model(plan)
        assert isinstance(model, Supervised)
        heads = [n for n in report.new if n.startswith("decoder.head")]
        assert bool(heads) == (name != "task")
        assert look_at_start(plan, model).features_equal_release


@pytest.mark.parametrize("fit", ["descent", "ridge"])
def test_loggers_are_told_of_the_load(
    fit: str,
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kept_by_wandb: Callable[[Path, bytes], bytes],
) -> None:
    """In the files that they keep: what is covered, the counts, and weights without values."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    torch.manual_seed(SEED)
    path = make_release(tmp_path / "release", "resenc").path
    weights = load_file(path / "model.safetensors")
    empty = next(name for name in sorted(weights) if weights[name].ndim == 5)
    save_file(weights | {empty: torch.zeros_like(weights[empty])}, path / "model.safetensors")
    names = [line.split("  ")[1] for line in (path / "SHA256SUMS").read_text().splitlines()]
    sums = "".join(f"{file_digest(path / name)}  {name}\n" for name in names)
    (path / "SHA256SUMS").write_text(sums)
    more: dict[str, Any] = {"steps": 1, "loggers": ["tensorboard", "wandb"]}
    if fit == "ridge":
        more |= {"fit": "ridge", "decoder": "linear", "freeze": "encoder"}
    run = finetune(settings(load_release(path), corpus, tmp_path, **more))
    report = json.loads((run / "load_report.json").read_text())
    assert report["constant"] == [f"encoder.{empty}"]
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    (event,) = events.Tensors("load/text_summary")
    said = event.tensor_proto.string_val[0].decode()
    assert "- load/covered: 1.0" in said and f"- load/constant: [encoder.{empty}]" in said
    assert f"- load/copied: {len(report['copied'])}" in said
    kept = kept_by_wandb(run, f"encoder.{empty}".encode())
    assert b"load/covered" in kept and f"encoder.{empty}".encode() in kept
