"""What goes to nnssl and nnU-Net comes back to the last bit, and is what their network takes.

Nothing but the written file is used on their side: the network is built from its plan and loaded
as nnU-Net does (`tests/test_nnunet.py` runs nnU-Net itself).
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from pydoc import locate
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from seeds import SEED
from test_foreign import drawn
from tiny_pairs import preset
from torch import Tensor, nn

from data_prep.errors import CorruptionError, InputError
from data_prep.preprocess import Preprocess
from pretrain.arguments import split_target
from pretrain.backbones.backbone import Backbone
from pretrain.decoders import UNetDecoder, first_blocks, unet_decoder
from pretrain.foreign import nnssl_file, open_foreign
from pretrain.foreign.nnssl_file import (
    ARCHITECTURE,
    CHECKPOINT,
    adaptation_plan,
    differences,
    write_nnssl,
)
from pretrain.manifest import PLAN_FILE
from pretrain.release import Release, write_release


def config_of(backbone: dict[str, Any], crop: list[int], **others: Any) -> dict[str, Any]:
    return {
        "format": 1, "name": "tiny", "kind": "encoder", "backbone": backbone,
        "objective": {"name": "mae.MAE", "args": {}}, "crop_size": crop, "modalities": ["MR"],
        "preprocess": Preprocess.default().to_dict(), "training": {}, "data": {}, "versions": {},
    } | others  # fmt: skip


@dataclass
class Case:
    """An encoder of ours, and where its last feature map shows in their network."""

    backbone: dict[str, Any]
    encoder: Backbone
    crop: list[int]
    theirs: Callable[[dict[str, Any]], tuple[nn.Module, Callable[[Tensor], Tensor]]]

    def release(self, folder: Path, trained: nn.Module | None = None, **others: Any) -> Release:
        return write_release(
            folder,
            encoder=self.encoder,
            config=config_of(self.backbone, self.crop, **others),
            fingerprints={"format": 1, "values": []},
            card="A.\n",
            decoder=trained,
        )


def resenc(rng: np.random.Generator) -> Case:
    second = [[2, 2, 2], [1, 2, 2]][int(rng.integers(2))]
    encoder, backbone = drawn(
        "resenc.ResEncUNetEncoder",
        in_channels=int(rng.integers(1, 3)), features=[4, 6, 8],
        strides=[[1, 1, 1], second, [2, 1, 2]], blocks=[1, int(rng.integers(1, 4)), 2],
    )  # fmt: skip

    def theirs(plan: dict[str, Any]) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
        architectures = plan["architecture_plans"]
        kwargs = dict(architectures["arch_kwargs"])
        for name in architectures["arch_kwargs_requiring_import"]:
            kwargs[name] = locate(kwargs[name])
        package = pytest.importorskip("dynamic_network_architectures.architectures.unet")
        network = getattr(package, architectures["arch_class_name"])(
            input_channels=plan["pretrain_num_input_channels"], num_classes=3, **kwargs
        )
        return network, lambda image: network.encoder(image)[-1]

    return Case(backbone, encoder, [8, 12, 16], theirs)


def primus(rng: np.random.Generator) -> Case:
    # No cube, and heads that no published width has.
    encoder, backbone = drawn(
        "vit.ViT3D",
        in_channels=int(rng.integers(1, 3)), patch_size=8, embed_dim=36, depth=2,
        num_heads=int(rng.choice([1, 3])), mlp_ratio=8 / 3, mlp="swiglu", inner_norm=True,
        layer_scale=0.1, norm_eps=1e-5, rope=True, position="learned", position_grid=[1, 3, 2],
        decoder="patch",
    )  # fmt: skip

    def theirs(plan: dict[str, Any]) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
        kwargs = plan["architecture_plans"]["arch_kwargs"]
        package = pytest.importorskip("dynamic_network_architectures.architectures.primus")
        network = package.Primus(
            input_channels=plan["pretrain_num_input_channels"], num_classes=3,
            embed_dim=kwargs["embed_dim"], patch_embed_size=kwargs["patch_embed_size"],
            eva_depth=kwargs["encoder_eva_depth"], eva_numheads=kwargs["encoder_eva_numheads"],
            input_shape=plan["recommended_downstream_patchsize"],
            init_values=kwargs["init_values"], scale_attn_inner=kwargs["scale_attn_inner"],
        )  # fmt: skip
        seen: list[Tensor] = []
        network.up_projection.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
        return network, lambda image: (network(image), seen[-1])[1]

    return Case(backbone, encoder, [8, 24, 16], theirs)


@pytest.fixture(params=[resenc, primus], ids=lambda make: make.__name__)
def case(request: pytest.FixtureRequest, seed: int) -> Case:
    torch.manual_seed(seed)
    made: Case = request.param(np.random.default_rng(seed))
    return made


def stored(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(folder / CHECKPOINT, weights_only=True)
    return found


@torch.no_grad()
def test_what_is_written_comes_back(
    case: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    release = case.release(tmp_path / "r")
    output = write_nnssl(release, tmp_path / "new" / "out")
    beside = {ARCHITECTURE} if case.backbone["name"].startswith("resenc.") else set()
    names = {CHECKPOINT, PLAN_FILE, "config.json"}
    assert {file.name for file in output.iterdir()} == names | beside
    assert [file.name for file in output.parent.iterdir()] == ["out"]
    found = open_foreign(output / CHECKPOINT)  # nothing is told
    own = case.encoder.state_dict()
    assert found.state.keys() == own.keys()
    assert all(torch.equal(found.state[name], own[name]) for name in own)
    image = torch.randn(2, case.encoder.in_channels, *case.crop)
    for one, other in zip(found.build()(image), case.encoder(image), strict=True):
        assert torch.equal(one, other)
    assert found.preprocessing == {
        "spacing_mm": None,
        "normalisation": ["ZScoreNormalization"] * case.encoder.in_channels,
        "crop_size": case.crop,
        "axes": [0, 1, 2],
    }
    said = capsys.readouterr().err
    assert all(sentence in said for sentence in differences(release.config))


def test_plan_and_file_say_the_same(case: Case, tmp_path: Path) -> None:
    release = case.release(tmp_path / "r")
    output = write_nnssl(release, tmp_path / "out")
    plan = json.loads((output / PLAN_FILE).read_text())
    assert stored(output)["nnssl_adaptation_plan"] == plan == adaptation_plan(release.config)
    assert plan["voxelith"]["preprocess"] == release.config["preprocess"]


@torch.no_grad()
def test_their_network_takes_all_of_it_and_sees_the_same(case: Case, tmp_path: Path) -> None:
    file = stored(write_nnssl(case.release(tmp_path / "r"), tmp_path / "out"))
    plan, weights = file["nnssl_adaptation_plan"], file["network_weights"]
    network, features = case.theirs(plan)
    left = dict(weights)
    for key in ("key_to_encoder", "key_to_stem"):
        assert getattr(network, key) == plan[key]
        below = {n: left.pop(n) for n in weights if n.startswith(plan[key])}
        part = network.get_submodule(plan[key])
        part.load_state_dict({n.removeprefix(f"{plan[key]}."): t for n, t in below.items()})
    assert all(name.startswith("decoder.") for name in left)  # of a U-Net, for the package
    assert list(network.keys_to_in_proj) == plan["keys_to_in_proj"]
    assert getattr(network, "key_to_lpe", None) == plan["key_to_lpe"]
    # In double precision: rounding to float32 would be the larger difference.
    image = torch.randn(2, case.encoder.in_channels, *case.crop).double()
    found, expected = features_of(network, features, image), case.encoder.double()(image)[-1]
    assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()


PARTS = {
    "none": (None, "new, the release has none"),
    "first": ({"out_channels": 3, "blocks": 1}, "the release's first 1 blocks from the coarsest"),
    "whole": ({"out_channels": 3}, "the release's, without its last layer"),
}


@pytest.mark.parametrize("part", PARTS)
@torch.no_grad()
def test_the_network_of_the_plans_takes_the_whole_file(
    part: str, seed: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As `nnUNetv2_train -pretrained_weights` asks for it: every tensor but the last layers'."""
    torch.manual_seed(seed)
    case = resenc(np.random.default_rng(seed))
    facts, said = PARTS[part]
    decoder = drawn_decoder(case.encoder)
    release = case.release(tmp_path / "r", facts and decoder, decoder=facts)
    output = write_nnssl(release, tmp_path / "out")
    weights = stored(output)["network_weights"]
    network = network_of_plans(output, case.encoder.in_channels)
    own = network.state_dict()
    assert {n for n in own if n not in weights} == {n for n in own if ".seg_layers." in n}
    assert all(own[name].shape == weights[name].shape for name in weights)
    network.load_state_dict(own | weights)
    for name, tensor in case.encoder.state_dict().items():
        assert torch.equal(network.encoder.state_dict()[name], tensor)

    trained = {} if facts is None else first_blocks(decoder.state_dict(), facts.get("blocks"))
    loaded = network.decoder.state_dict()
    for name, tensor in trained.items():
        assert torch.equal(loaded[name], tensor)
    fresh = dict(network_of_plans(output, case.encoder.in_channels).decoder.named_parameters())
    for name, tensor in fresh.items():
        if name in trained or name.startswith(("encoder.", "seg_layers.")):
            continue
        found = loaded[name]
        if tensor.ndim == 5:  # He's normal weights, as nnU-Net draws them
            assert 0.5 < found.std() / tensor.std() < 2 and found.unique().numel() > 1
        else:
            assert torch.equal(found, tensor)
    if part == "whole":  # no name alone: decoding gives the same
        image = torch.randn(2, case.encoder.in_channels, *case.crop).double()
        head = network.decoder.seg_layers[-1]
        head.weight.copy_(decoder.head.weight)
        head.bias.copy_(decoder.head.bias)
        expected = decoder.double()(image, case.encoder.double()(image))
        found = network.double().eval()(image)
        assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()

    skipped = open_foreign(output / CHECKPOINT).report.skipped
    assert all(name in skipped for name in weights if name.startswith("decoder."))
    assert stored(output)["nnssl_adaptation_plan"]["voxelith"]["decoder"].startswith(said)
    assert f"decoder: {said}" in capsys.readouterr().err


def drawn_decoder(encoder: Backbone) -> UNetDecoder:
    decoder = unet_decoder(encoder, 3)
    for parameter in decoder.parameters():
        nn.init.normal_(parameter)
    return decoder.eval()


def network_of_plans(folder: Path, channels: int) -> Any:
    """As nnU-Net's `get_network_from_plans` makes it."""
    package = pytest.importorskip("dynamic_network_architectures")
    told = json.loads((folder / ARCHITECTURE).read_text())["architecture"]
    kwargs = dict(told["arch_kwargs"])
    for name in told["_kw_requires_import"]:
        kwargs[name] = locate(kwargs[name])
    assert told["network_class_name"].startswith(f"{package.__name__}.")
    made: Any = locate(told["network_class_name"])
    network = made(input_channels=channels, num_classes=3, **kwargs)
    network.apply(network.initialize)
    return network


PAGE = Path(__file__).parent.parent.parent / "docs" / "checkpoints.md"


@pytest.mark.parametrize("spacing", [None, [1.5, 1.0, 2.0]])
def test_plans_get_patch_and_spacing(
    spacing: list[float] | None, seed: int, tmp_path: Path
) -> None:
    """By the plans.py of docs/checkpoints.md, on a data set whose axes nnU-Net would turn."""
    case = resenc(np.random.default_rng(seed))
    preprocess = Preprocess.default(spacing).to_dict()
    write_nnssl(case.release(tmp_path / "r", preprocess=preprocess), tmp_path / "for_nnunet")
    plans = {
        "plans_name": "voxelith",
        "transpose_forward": [1, 2, 0],  # its spacing is 0.5, 3, 0.7 by the axes of the files
        "transpose_backward": [2, 0, 1],
        "configurations": {
            "2d": {},
            "3d_fullres": {"spacing": [3.0, 0.7, 0.5], "batch_size": 9, "data_identifier": "d"},
        },
    }
    file = tmp_path / "Dataset004_Hippocampus" / "voxelith.json"
    file.parent.mkdir()
    file.write_text(json.dumps(plans))
    snippet = re.findall(r"```python\n(import json.*?)```", PAGE.read_text(), flags=re.DOTALL)[0]
    environment = os.environ | {"nnUNet_preprocessed": str(tmp_path)}
    subprocess.run([sys.executable, "-c", snippet], env=environment, cwd=tmp_path, check=True)

    made = json.loads(file.read_text())
    assert made["transpose_forward"] == made["transpose_backward"] == [0, 1, 2]
    assert made["configurations"] == {
        "3d_fullres": {
            "spacing": spacing or [0.5, 3.0, 0.7],
            "patch_size": case.crop,
            "batch_size": 2,
            "data_identifier": "d",
            "architecture": json.loads((tmp_path / "for_nnunet" / ARCHITECTURE).read_text())[
                "architecture"
            ],
        }
    }


def test_a_head_of_whole_scans_is_no_decoder(seed: int, tmp_path: Path) -> None:
    case = resenc(np.random.default_rng(seed))
    others = {"kind": "answerer", "answers": {}, "decoder": {"out_channels": 3}}
    release = case.release(tmp_path / "r", nn.Linear(8, 3), **others)
    plan = stored(write_nnssl(release, tmp_path / "out"))["nnssl_adaptation_plan"]
    assert plan["voxelith"]["decoder"].startswith("new, the release has none")


def test_what_was_not_written_as_it_is_does_not_appear(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, save = "decoder.stages.1.convs.0.conv.weight", torch.save

    def wrong(file: dict[str, Any], path: Path) -> None:
        weights = file["network_weights"]
        save(file | {"network_weights": weights | {name: weights[name] + 1}}, path)

    monkeypatch.setattr(nnssl_file.torch, "save", wrong)
    release = resenc(np.random.default_rng(seed)).release(tmp_path / "r")
    with pytest.raises(CorruptionError, match=f"{name} is not what was written"):
        write_nnssl(release, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["r"]


def test_new_parts_are_the_same_each_time_and_leave_others_draws(seed: int, tmp_path: Path) -> None:
    release = resenc(np.random.default_rng(seed)).release(tmp_path / "r")
    files, draws = [], []
    for n in range(2):
        torch.manual_seed(seed + n)
        expected = torch.get_rng_state()
        release.build_encoder()  # draws
        drawn_before = torch.get_rng_state()
        torch.set_rng_state(expected)
        files.append(stored(write_nnssl(release, tmp_path / f"out{n}"))["network_weights"])
        draws.append(torch.equal(torch.get_rng_state(), drawn_before))
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])
    assert all(draws)


def test_a_step_that_no_decoder_has_is_told(
    seed: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """nnssl's form needs none."""
    encoder, backbone = drawn(
        "resenc.ResEncUNetEncoder",
        **{"features": [4, 6, 8], "strides": [1, 2, 1], "blocks": [1, 1, 1]},
    )
    case = Case(backbone, encoder, [8, 8, 8], lambda plan: pytest.fail("no plan"))
    output = write_nnssl(case.release(tmp_path / "r"), tmp_path / "out")
    assert "decoder: none, and `nnUNetv2_train -pretrained_weights` needs one: stage 2 is no" in (
        capsys.readouterr().err
    )
    assert not (output / ARCHITECTURE).exists()
    assert not any(name.startswith("decoder.") for name in stored(output)["network_weights"])


def features_of(network: nn.Module, features: Callable[[Tensor], Tensor], image: Tensor) -> Tensor:
    network.eval().double()
    return features(image)


def test_heads_that_a_published_width_does_not_have_are_told(tmp_path: Path) -> None:
    case = primus(np.random.default_rng(SEED))
    args = case.backbone["args"] | {"embed_dim": 396, "num_heads": 3, "depth": 1}
    case.encoder, case.backbone = drawn("vit.ViT3D", **args)
    output = write_nnssl(case.release(tmp_path / "r"), tmp_path / "out")
    assert open_foreign(output / CHECKPOINT).backbone["args"]["num_heads"] == 3


def test_positions_of_another_crop_are_told(seed: int, tmp_path: Path) -> None:
    """nnU-Net interpolates them where the patch that they are stored for is not its own."""
    case = primus(np.random.default_rng(seed))
    case.crop = [16, 16, 16]
    output = write_nnssl(case.release(tmp_path / "r"), tmp_path / "out")
    plan = stored(output)["nnssl_adaptation_plan"]
    (configuration,) = plan["pretrain_plan"]["configurations"].values()
    assert configuration["patch_size"] == [8, 24, 16]
    assert plan["recommended_downstream_patchsize"] == [16, 16, 16]
    assert open_foreign(output / CHECKPOINT).backbone["args"]["position_grid"] == [1, 3, 2]


@pytest.mark.parametrize(
    ("size", "name"),
    [("s", "PrimusS"), ("b", "PrimusB"), ("m", "PrimusM"), ("l", "PrimusL"), ("ti", "PrimusX")],
)
def test_published_sizes_have_their_names(size: str, name: str) -> None:
    _, args = split_target(preset("backbone", f"primus_{size}").backbone)
    plan = adaptation_plan(config_of({"name": "vit.ViT3D", "args": args}, [64, 64, 64]))
    assert plan is not None and plan["architecture_plans"]["arch_class_name"] == name


REFUSED = [
    ("vit.ViT3D", {"patch_size": 8, "embed_dim": 24, "num_heads": 2}, "rope: true, mlp: swiglu"),
    ("unet.UNetEncoder", {"features": [4, 6], "strides": [1, 2], "convs": [1, 1]}, "neither"),
    (
        "resenc.ResEncUNetEncoder",
        {"features": [4, 6], "strides": [2, 2], "blocks": [1, 1]},
        r"strides \[\[2, 2, 2\], \[2, 2, 2\]\]",
    ),
]


@pytest.mark.parametrize(("name", "args", "reason"), REFUSED)
def test_another_backbone_is_refused(
    name: str, args: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    encoder, backbone = drawn(name, **args)
    case = Case(backbone, encoder, [16, 16, 16], lambda plan: pytest.fail("no plan"))
    release = case.release(tmp_path / "r")
    assert adaptation_plan(release.config) is None
    message = rf"backbone\.name={name}: .*{reason}.*backbone=resenc_\* and primus_\* have one"
    with pytest.raises(InputError, match=message):
        write_nnssl(release, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["r"]


def test_what_is_there_is_left_alone(seed: int, tmp_path: Path) -> None:
    release = resenc(np.random.default_rng(seed)).release(tmp_path / "r")
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match="out: already exists"):
        write_nnssl(release, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("file", "part", "name"),
    [
        ("model.safetensors", "encoder", "stages.1.blocks.0.conv1.conv.weight"),
        ("decoder.safetensors", "decoder", "stages.1.convs.0.norm.weight"),
    ],
)
def test_weights_without_values_are_refused_and_leave_nothing(
    file: str, part: str, name: str, seed: int, tmp_path: Path
) -> None:
    case = resenc(np.random.default_rng(seed))
    release = case.release(tmp_path / "r", drawn_decoder(case.encoder), decoder={"out_channels": 3})
    weights = load_file(release.path / file)
    weights[name].view(-1)[-1] = torch.nan
    save_file(weights, release.path / file)
    told = re.escape(f"{release.path}: {part}.{name}: has values that are not finite")
    with pytest.raises(InputError, match=told):
        write_nnssl(release, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["r"]


@pytest.mark.parametrize("modalities", [["MR"], ["CT"], ["CT", "MR"]])
@pytest.mark.parametrize("spacing", [None, [1.5, 1.0, 2.0]])
def test_preprocessing_is_named_where_it_has_a_name(
    modalities: list[str], spacing: list[float] | None
) -> None:
    """A window of CT is no scheme of nnssl's."""
    window = {"CT": {"rule": "window", "low": -500.0, "high": 300.0, "onto": [0.0, 1.0]}}
    preprocess = Preprocess.default(spacing, intensity=window).to_dict()
    chosen = {"name": "resenc.ResEncUNetEncoder", "args": {"in_channels": 2}}
    config = config_of(chosen, [64] * 3, modalities=modalities, preprocess=preprocess)
    plan = adaptation_plan(config)
    assert plan is not None
    (made,) = plan["pretrain_plan"]["configurations"].values()
    assert made["spacing"] == spacing
    expected = ["ZScoreNormalization"] * 2 if modalities == ["MR"] else None
    assert made["normalization_schemes"] == expected
    said = "\n".join(plan["voxelith"]["differences"])
    assert ("[-500.0, 300.0] mapped onto [0.0, 1.0]" in said) == ("CT" in modalities)
    assert ("MR intensities: clipped to the 0.5 and 99.5" in said) == ("MR" in modalities)
    assert ("spacing: each scan's own" in said) == (spacing is None)
