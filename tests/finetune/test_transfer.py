"""A pretrained decoder travels with its encoder: from the run to the first step of finetuning."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_runs import add_few_split, two_channels

from data_prep.errors import CorruptionError, InputError
from data_prep.files import file_digest
from finetune.rows import read_rows
from finetune.settings import FinetuneSettings, config_hash
from finetune.train import build_model, finetune, make_plan
from pretrain.backbones.resenc import ResEncUNetEncoder
from pretrain.backbones.vit import ViT3D
from pretrain.decoders import UNetDecoder
from pretrain.export import export, transferable_decoder
from pretrain.manifest import OPTIONAL
from pretrain.objectives.cnn_mae import CnnMAE
from pretrain.objectives.mae import MAE
from pretrain.objectives.volume_fusion import VolumeFusion
from pretrain.release import DECODER, FILES, Release, load_release
from pretrain.settings import PretrainSettings
from pretrain.train import pretrain

TASK = {
    "name": "hippocampus",
    "classes": [
        {"name": "anterior", "values": [1], "tolerance_mm": 1.0},
        {"name": "posterior", "values": [2], "tolerance_mm": 1.0},
    ],
}
NETWORKS: dict[str, tuple[dict[str, Any], str]] = {
    "resenc": (
        {
            "_target_": "pretrain.backbones.resenc.ResEncUNetEncoder",
            "features": [4, 8],
            "strides": [1, 2],
            "blocks": [1, 1],
        },
        "boxes",
    ),
    "pct_net": (
        {
            "_target_": "pretrain.backbones.pct_net.PCTNetEncoder",
            "features": [4, 4, 8, 8, 8],
            "heads": [2, 2, 4],
            "windows": [2, 2, 2],
            "depths": [2, 1, 1],
            "resolution_mode": 2,
        },
        "grid",
    ),
}


@pytest.fixture(scope="module", params=NETWORKS)
def run(
    request: pytest.FixtureRequest, pretrain_corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    backbone, form = NETWORKS[request.param]
    return pretrain(
        PretrainSettings(
            corpus=pretrain_corpus,
            run=request.param,
            runs=tmp_path_factory.mktemp("runs"),
            backbone=backbone,
            objective={
                "_target_": "pretrain.objectives.volume_fusion.VolumeFusion",
                "form": form,
            },
            trainer={"accelerator": "cpu", "workers": 0},
            crop_size=(8, 16, 32),
            steps=2,
            batch_size=2,
            lr=1e-3,
            preview_every=2,
        )
    )


@pytest.fixture(scope="module")
def release(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Release:
    return export(run, tmp_path_factory.mktemp("releases") / "mine")


@pytest.fixture
def copy(release: Release, tmp_path: Path) -> Path:
    return Path(shutil.copytree(release.path, tmp_path / "copy"))


@pytest.fixture(scope="module")
def tiny(labelled_corpus: Path) -> Path:
    """The labelled corpus with a split of a few cases."""
    add_few_split(labelled_corpus)
    return labelled_corpus


def settings(ckpt: Path, corpus: Path, runs: Path, **changes: Any) -> FinetuneSettings:
    chosen = {
        "task": TASK, "corpus": corpus, "ckpt": ckpt, "labels": 2, "split": "few", "runs": runs,
        "run": "r", "steps": 1, "batch_size": 2, "lr": 1e-3, "overlap": 0.0,
        "trainer": {"accelerator": "cpu", "precision": "32-true", "workers": 0},
    }  # fmt: skip
    return FinetuneSettings.model_validate(chosen | changes)


def resign(path: Path) -> None:
    names = [name for name in (*FILES, *OPTIONAL) if (path / name).exists()]
    lines = [f"{file_digest(path / name)}  {name}\n" for name in names]
    (path / "SHA256SUMS").write_text("".join(lines))


def change_config(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((path / "config.json").read_text())
    change(config)
    (path / "config.json").write_text(json.dumps(config))
    resign(path)


def without_decoder(path: Path) -> None:
    """As releases were before they had decoders."""
    (path / DECODER).unlink()
    change_config(path, lambda c: (c.pop("decoder"), c.pop("transfers")))


def test_a_release_holds_the_decoder_of_the_last_checkpoint(run: Path, release: Release) -> None:
    state = torch.load(sorted((run / "checkpoints").glob("*.pt"))[-1], weights_only=True)
    stored, prefix = load_file(release.path / DECODER), "decoder."
    trained = {n.removeprefix(prefix): v for n, v in state["objective"].items() if prefix in n}
    assert stored.keys() == trained.keys()
    assert all(torch.equal(stored[name], trained[name]) for name in stored)
    assert release.config["decoder"] == {"out_channels": 5}
    assert release.transfers == "network" and release.has_decoder
    assert DECODER in (release.path / "SHA256SUMS").read_text()
    card = (release.path / "README.md").read_text()
    assert "finetuning takes it over but for its head" in card


def test_finetuning_begins_with_the_whole_network(
    release: Release, tiny: Path, tmp_path: Path
) -> None:
    """Bytes of the decoder before the first step; the twin differs in the start alone."""
    plan = make_plan(settings(release.path, tiny, tmp_path))
    assert plan.transfer == "network"
    model, report = build_model(plan)
    stored = load_file(release.path / DECODER)
    for name, value in model.decoder.state_dict().items():
        if name.startswith("head"):
            assert f"decoder.{name}" in report.new
        else:
            assert value.numpy().tobytes() == stored[name].numpy().tobytes(), name
            assert f"decoder.{name}" in report.copied
    listed = [*report.copied, *report.new, *report.skipped, *report.adapted]
    assert sorted(listed) == sorted(model.state_dict())
    assert all(name.startswith("decoder.head") for name in report.new) and report.covered == 1.0

    scratch = make_plan(settings(release.path, tiny, tmp_path, init="scratch"))
    twin, twin_report = build_model(scratch)
    assert config_hash(scratch.recipe) == config_hash(plan.recipe)
    assert twin_report.new == sorted(twin.state_dict()) and twin_report.covered == 0
    fresh, loaded = twin.state_dict(), model.state_dict()
    assert all(torch.equal(fresh[name], loaded[name]) for name in report.new)
    assert any(not torch.equal(fresh[name], loaded[name]) for name in report.copied)


def test_the_encoder_alone_can_be_taken(release: Release, tiny: Path, tmp_path: Path) -> None:
    def built(**changes: Any) -> Any:
        plan = make_plan(settings(release.path, tiny, tmp_path, **changes))
        return plan, *build_model(plan)

    plan, model, report = built(transfer="encoder")
    scratch, twin, _ = built(transfer="encoder", init="scratch")
    for name, value in model.decoder.state_dict().items():
        assert torch.equal(value, twin.decoder.state_dict()[name])
        if not name.startswith("head"):
            assert report.skipped[f"decoder.{name}"] == "transfer=encoder"
    assert all(name.startswith("encoder.") for name in report.copied)
    listed = [*report.copied, *report.new, *report.skipped]
    assert sorted(listed) == sorted(model.state_dict())
    whole, _, _ = built(transfer="network")
    auto, _, _ = built()
    hashes = [config_hash(p.recipe) for p in (plan, scratch, whole, auto)]
    assert len(set(hashes)) == 1  # one recipe: scratch is the twin of both
    assert plan.identity != whole.identity == auto.identity
    assert (plan.checkpoint, scratch.checkpoint) == (plan.release.name, "")
    assert whole.checkpoint == f"{plan.release.name} with decoder"


def test_a_run_says_what_was_transferred(release: Release, tiny: Path, tmp_path: Path) -> None:
    run = finetune(settings(release.path, tiny, tmp_path))
    report = json.loads((run / "load_report.json").read_text())
    assert report["transfer"] == "network"
    assert any(name.startswith("decoder.") for name in report["copied"])
    facts = json.loads((run / "run.json").read_text())
    assert facts["identity"]["transfer"] == "network"
    assert len(read_rows(run / "rows.csv")) == 2
    with pytest.raises(InputError, match=r"holds another run \(transfer: network -> null\); "):
        finetune(settings(release.path, tiny, tmp_path, transfer="encoder"))


def test_a_release_without_a_decoder_loads_as_before(
    copy: Path, tiny: Path, tmp_path: Path
) -> None:
    without_decoder(copy)
    plan = make_plan(settings(copy, tiny, tmp_path))
    assert plan.transfer == "encoder"
    _, report = build_model(plan)
    assert not report.skipped and all(name.startswith("decoder.") for name in report.new)
    with pytest.raises(InputError, match=r"transfer=network: .* has no decoder"):
        make_plan(settings(copy, tiny, tmp_path, transfer="network", init="scratch"))
    with pytest.raises(InputError, match="has no decoder"):
        load_release(copy).load_decoder(torch.nn.Identity())


def test_a_flipped_bit_or_a_missing_decoder_is_noticed(copy: Path, seed: int) -> None:
    file = copy / DECODER
    data = bytearray(file.read_bytes())
    data[len(data) // 2 + seed % 100] ^= 4
    file.write_bytes(data)
    with pytest.raises(CorruptionError, match=f"{DECODER}: its bytes are not those"):
        load_release(copy)
    file.unlink()
    with pytest.raises(CorruptionError, match=f"{DECODER}: is missing"):
        load_release(copy)
    resign(copy)
    with pytest.raises(CorruptionError, match=rf"SHA256SUMS does not list {DECODER}"):
        load_release(copy)


def test_a_decoder_that_the_config_does_not_tell_of_is_refused(copy: Path) -> None:
    change_config(copy, lambda c: (c.pop("decoder"), c.pop("transfers")))
    with pytest.raises(CorruptionError, match=rf"SHA256SUMS lists {DECODER}"):
        load_release(copy)


@pytest.mark.parametrize(
    ("decoder", "said"),
    [
        ({"_target_": "os.system"}, "name nothing to import"),
        ({"name": "os.system", "out_channels": 5}, "decoder.name: unknown"),
        ({"out_channels": 0}, "must be greater"),
        ({"out_channels": 10**9}, "must be less"),
        ({"out_channels": "5"}, "decoder.out_channels"),
        ([5], "decoder"),
        (None, "transfers='network', and there is no decoder"),
    ],
)
def test_hostile_facts_are_refused(copy: Path, decoder: object, said: str) -> None:
    change_config(copy, lambda c: c.update(decoder=decoder))
    with pytest.raises(InputError, match=said):
        load_release(copy)


def test_other_outputs_than_the_weights_have_are_refused(
    copy: Path, tiny: Path, tmp_path: Path
) -> None:
    change_config(copy, lambda c: c.update(decoder={"out_channels": 7}))
    with pytest.raises(InputError, match=r"head.*has shape \[5.*expected \[7"):
        build_model(make_plan(settings(copy, tiny, tmp_path)))


def test_a_tampered_decoder_is_listed_tensor_by_tensor(
    copy: Path, tiny: Path, tmp_path: Path
) -> None:
    weights = load_file(copy / DECODER)
    names = [n for n, v in sorted(weights.items()) if not n.startswith("head") and v.ndim == 5]
    weights["renamed"] = weights.pop(names[0])
    weights[names[1]] = weights[names[1]][:-1].clone()
    save_file(weights, copy / DECODER)
    resign(copy)
    with pytest.raises(InputError, match="3 tensors differ") as caught:
        build_model(make_plan(settings(copy, tiny, tmp_path)))
    for said in (f"{names[0]} is missing", "renamed is not part", f"{names[1]} has shape"):
        assert said in str(caught.value)


def test_another_decoder_is_refused_untouched(release: Release) -> None:
    other = UNetDecoder((4, 8, 8), ((1, 1, 1), (2, 2, 2), (4, 4, 4)), 3)
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(InputError, match="tensors differ"):
        release.load_decoder(other)
    assert all(torch.equal(before[name], v) for name, v in other.state_dict().items())


def test_a_cls_token_travels_with_its_encoder(
    pretrain_corpus: Path, tiny: Path, tmp_path: Path
) -> None:
    """Blocks were trained beside it: an encoder that begins without it is another one."""
    run = pretrain(
        PretrainSettings(
            corpus=pretrain_corpus,
            run="hi_end",
            runs=tmp_path,
            backbone={
                "_target_": "pretrain.backbones.vit.ViT3D", "patch_size": 8, "embed_dim": 24,
                "depth": 4, "num_heads": 2, "cls_token": True,
            },
            objective={
                "_target_": "pretrain.objectives.hi_end_mae.HiEndMAE",
                "decoder_dim": 24, "decoder_heads": 2, "self_blocks": 1,
            },
            trainer={"accelerator": "cpu", "workers": 0},
            crop_size=(8, 16, 32),
            steps=2,
            batch_size=2,
            lr=1e-2,
        )
    )  # fmt: skip
    state = torch.load(sorted((run / "checkpoints").glob("*.pt"))[-1], weights_only=True)
    trained = state["objective"]["encoder.cls_token"]
    release = export(run, tmp_path / "release")
    model, report = build_model(make_plan(settings(release.path, tiny, tmp_path / "runs")))
    assert "encoder.cls_token" in report.copied and report.covered == 1.0
    assert torch.equal(model.encoder.cls_token, trained)
    scratch = make_plan(settings(release.path, tiny, tmp_path / "runs", init="scratch"))
    assert not torch.equal(build_model(scratch)[0].encoder.cls_token, trained)
    image = torch.randn(1, 1, 8, 16, 32)
    with torch.no_grad():
        plain = model.encoder(image)[-1]
        model.encoder.cls_token.zero_()
        assert not torch.allclose(model.encoder(image)[-1], plain, atol=1e-3)


def test_only_the_decoder_of_segmentation_is_released() -> None:
    encoder = ResEncUNetEncoder(features=(4, 8), strides=(1, 2), blocks=(1, 1))
    usual = CnnMAE(encoder=encoder, block=4)
    assert transferable_decoder(usual) is usual.decoder
    assert transferable_decoder(CnnMAE(encoder=encoder, block=4, convs_per_stage=2)) is None
    vit = ViT3D(patch_size=4, embed_dim=12, depth=4, num_heads=1)
    mae = MAE(encoder=vit, decoder_dim=12, decoder_depth=1, decoder_heads=1)
    assert transferable_decoder(mae) is None
    fusion = VolumeFusion(encoder=vit)
    assert transferable_decoder(fusion) is fusion.decoder
    fusion.decoder = torch.nn.Identity()
    with pytest.raises(InputError, match="the whole network transfers"):
        transferable_decoder(fusion)


def test_channels_in_another_order_are_refused(samples: Path, tmp_path: Path) -> None:
    """All tensors would fit. What is called otherwise may be the same, and two of one name are."""
    alike = [("T1", "FLAIR"), ("t1", "T2-FLAIR"), ("MR", "MR")]
    orders = [*alike, ("FLAIR", "T1")]
    corpora = {
        names: two_channels(samples, tmp_path / "-".join(names), names, train=3) for names in orders
    }
    run = pretrain(
        PretrainSettings(
            corpus=corpora["T1", "FLAIR"], run="two", runs=tmp_path, backbone=NETWORKS["resenc"][0],
            objective={"_target_": "pretrain.objectives.cnn_mae.CnnMAE", "block": 4},
            trainer={"accelerator": "cpu", "workers": 0}, crop_size=(8, 16, 32), steps=1,
            batch_size=2, lr=1e-3, preview_every=0, health={"every": 0},
        )
    )  # fmt: skip
    release = export(run, tmp_path / "release")
    assert release.config["channels"] == ["T1", "FLAIR"]
    for names in alike:
        make_plan(settings(release.path, corpora[names], tmp_path))
    with pytest.raises(InputError, match="has the channels T1, FLAIR, not FLAIR, T1 of"):
        make_plan(settings(release.path, corpora["FLAIR", "T1"], tmp_path))
