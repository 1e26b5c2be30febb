"""Public weights: told by their tensors, taken whole or refused by name, and nothing is run.

The public side is drawn from a seed: our encoder under the public names, in the public wrappers.
Where a public implementation is installed, `test_theirs_and_ours_agree` compares with it.
"""

from __future__ import annotations

import json
import os
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.networks.nets import SwinUNETR
from safetensors.torch import save_file
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from data_prep.errors import InputError
from pretrain.arguments import build_backbone
from pretrain.backbones.backbone import Backbone
from pretrain.backbones.vit import sincos_position
from pretrain.foreign import open_foreign
from pretrain.foreign.stored import read_stored, read_weights

Weights = dict[str, Tensor]


@dataclass
class Public:
    """A public file, and the encoder of ours that it must give."""

    layout: str
    encoder: Backbone
    backbone: dict[str, Any]
    weights: Weights
    root: str
    """What precedes the encoder's names."""
    inner: str
    """One of the encoder's kernels or matrices, without the root."""
    wrap: Callable[[Weights], Any] = dict
    told: dict[str, Any] = field(default_factory=dict)
    shape: tuple[int, ...] = (16, 16, 16)

    def save(self, path: Path, weights: Weights | None = None) -> Path:
        chosen = self.weights if weights is None else weights
        if path.suffix == ".safetensors":
            save_file(chosen, path)
        else:
            torch.save(self.wrap(chosen), path)
        return path

    def image(self) -> Tensor:
        return torch.randn(2, self.encoder.in_channels, *self.shape)


def drawn(name: str, **args: Any) -> tuple[Backbone, dict[str, Any]]:
    """An encoder whose every tensor is drawn, in steps whose sums are exact."""
    encoder = build_backbone(name, args, "test").eval()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.copy_(torch.randn(parameter.shape).mul(32).round() / 256)
    return encoder, {"name": name, "args": args}


def pick(rng: np.random.Generator, *options: Any) -> Any:
    return options[int(rng.integers(len(options)))]


def resenc(rng: np.random.Generator) -> Public:
    strides = [[1, 1, 1], pick(rng, [2, 2, 2], [1, 2, 2]), [2, 2, 2]]
    encoder, backbone = drawn(
        "resenc.ResEncUNetEncoder",
        in_channels=pick(rng, 1, 2), features=[4, 6, 8], strides=strides,
        blocks=[1, pick(rng, 1, 3), 2],
    )  # fmt: skip
    weights: Weights = {}
    for name, tensor in encoder.state_dict().items():
        again = re.sub(r"\.norm\.(\w+)$", r".all_modules.1.\1", name)
        again = re.sub(r"\.conv\.(\w+)$", r".all_modules.0.\1", again)
        for root in ("encoder.", "decoder.encoder."):
            weights |= {root + name: tensor, root + again: tensor}
    for i, (step, width) in enumerate([(strides[2], 6), (strides[1], 4)]):
        weights[f"decoder.transpconvs.{i}.weight"] = torch.randn(8 - 2 * i, width, *step)
    arch = {"strides": strides, "features_per_stage": [4, 6, 8]}
    plan = {"architecture_plans": {"arch_kwargs": arch}}
    log = {"losses": [np.float64(0.5), np.float32(0.25)]}  # as nnU-Net writes them
    with_plan = bool(rng.integers(2))

    def wrap(chosen: Weights) -> dict[str, Any]:
        around = {"network_weights": chosen, "logging": log, "current_epoch": 3}
        return around | ({"nnssl_adaptation_plan": plan} if with_plan else {})

    return Public(
        "nnssl or nnU-Net ResEnc", encoder, backbone, weights, "encoder.",
        "stages.1.blocks.0.conv2.conv.weight", wrap,
    )  # fmt: skip


def primus(rng: np.random.Generator) -> Public:
    grid = pick(rng, [2, 2, 2], [1, 3, 2])
    width = pick(rng, 36, 48)
    encoder, backbone = drawn(
        "vit.ViT3D",
        in_channels=1, patch_size=[8, 8, 8], embed_dim=width, depth=int(rng.integers(1, 5)),
        num_heads=2, mlp_ratio=8 / 3, mlp="swiglu", inner_norm=True, layer_scale=0.1,
        norm_eps=1e-5, rope=True, position="learned", position_grid=grid, decoder="patch",
    )  # fmt: skip
    weights = {"mask_token": torch.randn(1, 1, width), "up_projection.a.weight": torch.randn(3, 3)}
    for name, tensor in encoder.state_dict().items():
        if name == "pos_embed.weight":
            weights["eva.pos_embed"] = tensor.flatten(0, 2)[None]
        elif name.startswith("patch_embed."):
            weights[name.replace("patch_embed", "down_projection")] = tensor
        else:
            weights[f"eva.{name}"] = tensor
    crop = [8 * n for n in grid]
    plan = {
        "recommended_downstream_patchsize": crop,
        "pretrain_plan": {
            "transpose_forward": [0, 1, 2],
            "configurations": {"onemmiso": {"spacing": [1, 1, 1], "patch_size": crop}},
        },
    }
    return Public(
        "nnssl Primus", encoder, backbone, weights, "", "eva.blocks.0.attn.q_proj.weight",
        lambda chosen: {"network_weights": chosen, "nnssl_adaptation_plan": plan},
        {"num_heads": 2}, tuple(crop),
    )  # fmt: skip


def hi_end(rng: np.random.Generator) -> Public:
    encoder, backbone = drawn(
        "vit.ViT3D",
        in_channels=1, patch_size=[pick(rng, 4, 8)] * 3, embed_dim=24,
        depth=int(rng.integers(4, 7)), mlp_ratio=4.0, qkv_bias=True, cls_token=True,
        norm_eps=1e-6, rope=False, position="sincos", num_heads=3,
    )  # fmt: skip
    weights = {
        f"module.encoder.{name}": tensor.view(1, 1, -1) if name == "cls_token" else tensor
        for name, tensor in encoder.state_dict().items()
    }
    moments = {"step": torch.ones(()), "exp_avg": torch.ones(2)}
    optimizer = {"state": {0: moments, 1: moments}, "param_groups": [{"lr": 1.0}]}
    side = int(rng.integers(2, 5))
    weights |= {
        "module.encoder_pos_embed": sincos_position([side] * 3, 24)[None],
        "module.mask_token": torch.randn(1, 1, 24),
        "module.decoder.blocks.0.attn.qkv.weight": torch.randn(72, 24),
    }
    return Public(
        "Hi-End-MAE", encoder, backbone, weights, "module.encoder.", "blocks.1.mlp.fc1.weight",
        lambda chosen: {"epoch": 3, "state_dict": chosen, "optimizer": optimizer},
        {"num_heads": 3},
    )  # fmt: skip


def dino_names(encoder: Backbone, rng: np.random.Generator, *, timm: bool) -> Weights:
    """The class token's position is its own row in Meta's names, and at random in timm's."""
    weights = dict(encoder.state_dict())
    grid = weights.pop("pos_embed.weight").flatten(0, 2)[None]
    cls = weights.pop("cls_token").view(1, 1, -1)
    if not timm or rng.integers(2):
        row = torch.randn(cls.shape).mul(32).round() / 256
        grid, cls = torch.cat([row, grid], dim=1), cls - row
    registers = weights.pop("register_tokens", None)
    if registers is not None:
        weights["reg_token" if timm else "register_tokens"] = registers[None]
    weights |= {"cls_token": cls, "pos_embed": grid}
    return weights if timm else weights | {"mask_token": torch.zeros(1, cls.shape[-1])}


def dino_3d(rng: np.random.Generator) -> Public:
    side = int(rng.integers(2, 4))
    depth = int(rng.integers(1, 5))
    encoder, backbone = drawn(
        "vit.ViT3D",
        in_channels=1, patch_size=[8] * 3, embed_dim=24, depth=depth, mlp_ratio=4.0,
        qkv_bias=True, cls_token=True, norm_eps=1e-6, rope=False, num_heads=2, layer_scale=1e-5,
        position="learned", position_grid=[side] * 3, register_tokens=0,
    )  # fmt: skip
    chunks = bool(rng.integers(2))
    weights = {
        "backbone." + (re.sub(r"^blocks\.(\d+)", r"blocks.0.\1", name) if chunks else name): tensor
        for name, tensor in dino_names(encoder, rng, timm=False).items()
    }
    weights["dino_head.mlp.0.weight"] = torch.randn(2, 2)
    inner = "blocks.0.0.attn.qkv.weight" if chunks else "blocks.0.attn.qkv.weight"
    student = {name: -tensor for name, tensor in weights.items()}
    return Public(
        "3DINO", encoder, backbone, weights, "backbone.", inner,
        lambda chosen: {"student": student, "teacher": chosen, "iteration": 5},
        {"num_heads": 2}, (8 * side,) * 3,
    )  # fmt: skip


def dinov2(rng: np.random.Generator) -> Public:
    encoder, backbone = drawn(
        "vit.ViT3D",
        in_channels=3, patch_size=[1, 4, 4], embed_dim=24, depth=2, mlp_ratio=4.0, qkv_bias=True,
        cls_token=True, norm_eps=1e-6, rope=False, num_heads=2, layer_scale=1e-5,
        position="learned", position_grid=[1, 3, 3], register_tokens=pick(rng, 0, 4),
    )  # fmt: skip
    weights = dino_names(encoder, rng, timm=bool(rng.integers(2)))
    weights["patch_embed.proj.weight"] = weights["patch_embed.proj.weight"][:, :, 0].contiguous()
    return Public(
        "DINOv2", encoder, backbone, weights, "", "blocks.1.attn.proj.weight",
        told={"num_heads": 2}, shape=(1, 12, 12),
    )  # fmt: skip


def dinov3(rng: np.random.Generator) -> Public:
    """MedDINOv3's names, or timm's of DINOv3."""
    meta = bool(rng.integers(2))
    encoder, backbone = drawn(
        "slice_vit.SliceViT",
        in_channels=3, patch_size=4, embed_dim=24, depth=int(rng.integers(1, 4)), num_heads=2,
        mlp_ratio=4.0, qkv_bias=False, layer_scale=1e-5, norm_eps=1e-6 if meta else 1e-5,
        register_tokens=pick(rng, 1, 4),
    )  # fmt: skip
    weights = dict(encoder.state_dict())
    root, inner = "", "blocks.0.mlp.fc2.weight"
    if meta:
        root = "backbone."
        for ours, theirs in {"reg_token": "storage_tokens", "gamma_": "ls"}.items():
            weights = {name.replace(ours, theirs): t for name, t in weights.items()}
        weights = {root + re.sub(r"(ls[12])$", r"\1.gamma", name): t for name, t in weights.items()}
        weights["dino_head.mlp.0.weight"] = torch.randn(2, 2)
        weights["backbone.mask_token"] = torch.zeros(1, 24)
    return Public(
        "DINOv3 or MedDINOv3", encoder, backbone, weights, root, inner,
        (lambda chosen: {"teacher": chosen}) if meta else dict, {"num_heads": 2}, (1, 12, 8),
    )  # fmt: skip


def stunet(rng: np.random.Generator) -> Public:
    steps = [pick(rng, [2, 2, 2], [1, 2, 2]), [2, 2, 2]]
    encoder, backbone = drawn(
        "stunet.STUNetEncoder",
        in_channels=1, features=[4, 6, 8], strides=[[1, 1, 1], *steps],
        blocks=[1, pick(rng, 1, 2), 1],
    )  # fmt: skip
    weights: Weights = {}
    for name, tensor in encoder.state_dict().items():
        theirs = re.sub(r"\.(conv|norm)([12])?\.?(conv|norm)?", r".\1\2", name)
        theirs = re.sub(r"\.conv([12])\.(conv|norm)\.", r".\2\1.", name)
        theirs = theirs.replace("shortcut", "conv3")
        weights[re.sub(r"^stages", "conv_blocks_context", theirs)] = tensor
    weights |= {"seg_outputs.0.weight": torch.randn(3, 6, 1, 1, 1)}
    plans = {"configurations": {"3d_fullres": {"pool_op_kernel_sizes": [[1, 1, 1], *steps]}}}
    said = {"plans": plans, "configuration": "3d_fullres"}
    return Public(
        "STU-Net", encoder, backbone, weights, "", "conv_blocks_context.1.0.conv2.weight",
        lambda chosen: {"network_weights": chosen, "init_args": said},
    )  # fmt: skip


def swin(rng: np.random.Generator) -> Public:
    """A whole network, VoCo's, with the old names, or the transformer alone."""
    form = pick(rng, "whole", "voco", "old", "alone")
    encoder, backbone = drawn(
        "swin_unetr.SwinUNETREncoder",
        in_channels=1, feature_size=12, depths=[2, 1, 2, 1], heads=[2, 2, 2, 4],
        window=pick(rng, 2, 3), use_v2=form == "voco", refine=form != "alone",
    )  # fmt: skip
    root = {"whole": "", "voco": "module.backbone.", "old": "module.", "alone": "module."}[form]
    weights = {root + name: tensor for name, tensor in encoder.state_dict().items()}
    inner = "swinViT.layers2.0.blocks.0.mlp.linear1.weight"
    if form in ("old", "alone"):
        new = {"old": "swin_vit.", "alone": ""}[form]
        weights = {
            n.replace("swinViT.", new).replace("linear", "fc"): t for n, t in weights.items()
        }
        inner = inner.replace("swinViT.", new).replace("linear", "fc")
    if form == "whole":
        weights["decoder1.conv_block.conv1.conv.weight"] = torch.randn(2, 2)
        weights["out.conv.conv.bias"] = torch.randn(2)
    if form == "voco":
        weights["module.student.layer1.0.weight"] = torch.randn(2, 2)
    return Public(
        "MONAI Swin transformer" if form == "alone" else "MONAI SwinUNETR or VoCo",
        encoder, backbone, weights, root, inner,
        lambda chosen: {"epoch": 1, "state_dict": chosen}, shape=(64, 32, 32),
    )  # fmt: skip


KINDS = [resenc, primus, hi_end, dino_3d, dinov2, dinov3, stunet, swin]


@pytest.fixture(
    params=[(kind, case) for kind in KINDS for case in range(3)],
    ids=lambda case: f"{case[0].__name__}-{case[1]}",
)
def public(request: pytest.FixtureRequest, seed: int) -> Public:
    kind, case = request.param
    rng = np.random.default_rng([seed, case, KINDS.index(kind)])
    torch.manual_seed(int(rng.integers(2**31)))
    return kind(rng)


@torch.no_grad()
def test_a_public_file_is_the_encoder(public: Public, tmp_path: Path) -> None:
    """By its tensors, whatever it is called; every tensor is reported once."""
    found = open_foreign(public.save(tmp_path / "stunet_3dino.pth"), public.told)
    assert found.layout == public.layout
    assert {**found.backbone["args"], **public.backbone["args"]} == found.backbone["args"]
    assert found.backbone["name"] == public.backbone["name"]
    image = public.image()
    maps, expected = found.build()(image), public.encoder(image)
    assert all(torch.equal(a, b) for a, b in zip(maps, expected, strict=True))

    report = found.report
    own = [*report.copied, *report.adapted]
    assert sorted(own) == sorted(public.encoder.state_dict())
    sources = [report.sources.get(name, name) for name in own]
    skipped = [name for name in report.skipped if not name.endswith(".*")]
    assert sorted([*sources, *skipped]) == sorted(public.weights)
    assert (report.new, report.covered, report.constant) == ([], 1.0, [])


@torch.no_grad()
def test_another_prefix_is_the_same_encoder(public: Public, tmp_path: Path) -> None:
    weights = {f"net.{name}": tensor for name, tensor in public.weights.items()}
    expected = open_foreign(public.save(tmp_path / "a.pth"), public.told)
    # Whether DINOv3 is Meta's or MedDINOv3's is told by the prefix.
    found = open_foreign(public.save(tmp_path / "b.pth", weights), public.told)
    assert found.backbone == expected.backbone
    assert found.state.keys() == expected.state.keys()
    assert all(torch.equal(found.state[name], expected.state[name]) for name in found.state)


def test_safetensors_are_read_under_any_name(public: Public, tmp_path: Path) -> None:
    args = public.backbone["args"]  # without the plan
    told = public.told | {n: args[n] for n in ("strides", "position_grid") if n in args}
    apart = {name: tensor.clone() for name, tensor in public.weights.items()}
    path = public.save(tmp_path / "model.safetensors", apart).rename(tmp_path / "model.bin")
    found = open_foreign(path, told)
    assert found.layout == public.layout and found.preprocessing is None


def test_damage_is_refused_by_name(public: Public, tmp_path: Path, seed: int) -> None:
    """What is missing, too much, of another shape or not finite: all of it, at once."""
    rng = np.random.default_rng(seed)
    inner = public.root + public.inner
    again = [name for name in public.weights if public.weights[name] is public.weights[inner]]
    whole = {n: t for n, t in public.weights.items() if n == inner or n not in again}

    def refused(weights: Weights) -> str:
        with pytest.raises(InputError) as error:
            open_foreign(public.save(tmp_path / "damaged.pth", weights), public.told)
        return str(error.value)

    missing = {name: t for name, t in whole.items() if name != inner}
    assert "is not in the file" in refused(missing)
    extra = public.root + re.sub(r"\d+", "9", public.inner, count=1)
    extra = extra if extra != inner else f"{inner}_more"
    assert f"{extra}: " in refused(whole | {extra: torch.randn(3, 3)})
    wrong = whole[inner].flatten()[: 3 + int(rng.integers(3))].clone()
    assert inner in (said := refused(whole | {inner: wrong})) and "shape" in said
    broken = whole[inner].clone()
    broken.view(-1)[int(rng.integers(broken.numel()))] = float("nan")
    assert f"{inner}: has values that are not finite" in refused(whole | {inner: broken})


def test_any_tensor_of_any_shape_is_refused_or_left_out(
    public: Public, tmp_path: Path, seed: int
) -> None:
    """Never a traceback, and never into the encoder."""
    rng = np.random.default_rng(seed)
    names = list(public.weights)
    for name in rng.choice(names, 12):
        other = torch.randn([int(side) for side in rng.integers(1, 6, int(rng.integers(0, 6)))])
        path = public.save(tmp_path / "a.pth", public.weights | {name: other})
        try:
            report = open_foreign(path, public.told).report
        except InputError:
            continue
        assert name in report.skipped or other.shape == public.weights[name].shape


def test_a_plan_of_another_kind_is_refused(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    public, path = resenc(rng), tmp_path / "a.pth"
    for plan in (3, "plan", ["plan"], {"architecture_plans": [3]}, {"pretrain_plan": 3}):
        torch.save({"network_weights": public.weights, "nnssl_adaptation_plan": plan}, path)
        with pytest.raises(InputError, match=r"a\.pth: is of no size or plan of nnssl"):
            open_foreign(path)
    public = stunet(rng)
    for plan in ({"plans": {"configurations": 3}}, {"plans": {"configurations": {None: 3}}}):
        torch.save({"network_weights": public.weights, "init_args": plan}, path)
        with pytest.raises(InputError, match=r"a\.pth: is of no size or plan of STU-Net|strides"):
            open_foreign(path)


def test_a_kernel_of_zeros_is_called_out(public: Public, tmp_path: Path) -> None:
    inner = public.root + public.inner
    value = public.weights[inner]
    again = [name for name, tensor in public.weights.items() if tensor is value]
    for constant in (torch.zeros_like(value), torch.full_like(value, 0.5)):
        weights = public.weights | dict.fromkeys(again, constant)
        report = open_foreign(public.save(tmp_path / "zero.pth", weights), public.told).report
        assert [report.sources.get(name, name) for name in report.constant] == [inner]
        assert "WITHOUT VALUES" in str(report)
        assert report.to_dict()["constant"] == report.constant


def test_second_names_must_be_the_same(tmp_path: Path, seed: int) -> None:
    public = resenc(np.random.default_rng(seed))
    first = "encoder.stages.0.blocks.0.conv1.conv.weight"
    once = {n: v for n, v in public.weights.items() if not n.startswith("decoder.encoder.")}
    name = first.replace("conv.weight", "all_modules.0.weight")
    with pytest.raises(InputError, match=f"{re.escape(name)}: differs from {re.escape(first)}"):
        open_foreign(public.save(tmp_path / "a.pth", once | {name: once[name] + 1}))
    name = f"decoder.{first}"
    other = public.weights | {name: public.weights[name] + 1}
    with pytest.raises(InputError, match=rf"several networks .*differ \({re.escape(name)}\)"):
        open_foreign(public.save(tmp_path / "a.pth", other))


def test_of_two_networks_the_teacher_counts(tmp_path: Path, seed: int) -> None:
    public = dinov2(np.random.default_rng(seed))
    both = {f"student.{n}": -t for n, t in public.weights.items()}
    both |= {f"teacher.{n}": t for n, t in public.weights.items()}
    found = open_foreign(public.save(tmp_path / "a.pth", both), public.told)
    assert torch.equal(found.state["norm.weight"], public.weights["norm.weight"])
    student = {name for name in both if name.startswith("student.")}
    assert student == set(found.report.skipped) - {"teacher.mask_token"}
    bare = {n.removeprefix("student."): t for n, t in both.items()}
    again = open_foreign(public.save(tmp_path / "c.pth", bare), public.told)
    assert torch.equal(again.state["norm.weight"], public.weights["norm.weight"])
    copies = public.weights | {f"ema.{n}": t for n, t in public.weights.items()}
    report = open_foreign(public.save(tmp_path / "d.pth", copies), public.told).report
    assert report.skipped["ema.norm.weight"] == "second name of norm.weight"
    unclear = {n.replace("teacher", "momentum"): t for n, t in both.items()}
    with pytest.raises(InputError, match=r"several networks.*'student\.'"):
        open_foreign(public.save(tmp_path / "b.pth", unclear), public.told)


def test_what_lies_beside_the_weights_is_counted(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    public = hi_end(rng)
    found = open_foreign(public.save(tmp_path / "a.pth"), public.told)
    assert found.report.skipped["optimizer.*"] == "4 tensors beside state_dict"
    assert found.facts["epoch"] == 3
    public = dino_3d(rng)
    found = open_foreign(public.save(tmp_path / "a.pth"), public.told)
    count = len(public.weights)
    assert found.report.skipped["student.*"] == f"{count} tensors beside teacher"
    public = primus(rng)
    found = open_foreign(public.save(tmp_path / "a.pth"), public.told)
    assert found.preprocessing == {
        "spacing_mm": [1, 1, 1], "normalisation": None, "axes": [0, 1, 2],
        "crop_size": [8 * n for n in public.backbone["args"]["position_grid"]],
    }  # fmt: skip


def test_what_no_tensor_shows_is_asked_for(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    for make, name in ((hi_end, "num_heads"), (dino_3d, "num_heads"), (stunet, "strides")):
        public = make(rng)
        public.wrap = dict
        with pytest.raises(InputError, match=f"{name}: .*give {name}="):
            open_foreign(public.save(tmp_path / "a.pth"))
        told = {name: public.backbone["args"][name]}
        assert open_foreign(tmp_path / "a.pth", told).backbone["args"][name] == told[name]


def test_an_encoder_that_computes_otherwise_is_refused(tmp_path: Path, seed: int) -> None:
    """Though every tensor would fit."""
    public = hi_end(np.random.default_rng(seed))
    path = public.save(tmp_path / "a.pth")
    with pytest.raises(InputError, match=r"backbone\.position=none: these weights were trained"):
        open_foreign(path, public.told | {"position": "none"})
    public = resenc(np.random.default_rng(seed))
    with pytest.raises(InputError, match=r"backbone\.strides="):
        open_foreign(public.save(path), {"strides": [1, 2, [2, 2, 1]]})
    learned = public = hi_end(np.random.default_rng(seed))
    position = learned.weights["module.encoder_pos_embed"]
    changed = learned.weights | {"module.encoder_pos_embed": position + 0.1}
    with pytest.raises(InputError, match="encoder_pos_embed: is not the fixed position"):
        open_foreign(public.save(path, changed), public.told)


def test_files_of_no_layout_or_of_two_are_refused(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    names = ["a.weight", "conv_blocks.weight", "encoder.stem.weight"]
    path = tmp_path / "nnssl_resenc.pth"
    torch.save({name: torch.randn(3, 3) for name in names}, path)
    with pytest.raises(InputError, match=r"no layout.*a\.weight \[3, 3\].*STU-Net") as error:
        open_foreign(path)
    assert str(path) in str(error.value)
    one, two = hi_end(rng), stunet(rng)
    torch.save(one.weights | two.weights, path)
    with pytest.raises(InputError, match=r"several layouts \(Hi-End-MAE, STU-Net\)"):
        open_foreign(path)


def test_mlps_that_no_encoder_here_has_are_refused(tmp_path: Path, seed: int) -> None:
    """SwiGLU, as in the largest models of DINOv2."""
    public = dinov2(np.random.default_rng(seed))
    weights = {n.replace("mlp.fc1", "mlp.w12"): t for n, t in public.weights.items()}
    weights = {n.replace("mlp.fc2", "mlp.w3"): t for n, t in weights.items()}
    with pytest.raises(InputError, match=r"mlp_ratio: the blocks have no mlp\.fc1"):
        open_foreign(public.save(tmp_path / "a.pth", weights), public.told)
    with pytest.raises(InputError, match=r"blocks\.0\.mlp\.w12\.weight: .* nothing of that name"):
        open_foreign(tmp_path / "a.pth", public.told | {"mlp_ratio": 4.0})


class Crafted:
    """Unpickled, it would make a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("legacy", [False, True])
def test_nothing_in_a_file_is_run(tmp_path: Path, legacy: bool, seed: int) -> None:
    public = stunet(np.random.default_rng(seed))
    target, path = tmp_path / "made", tmp_path / "crafted.pth"
    stored = {"network_weights": public.weights, "logging": Crafted(target)}
    torch.save(stored, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(InputError, match="cannot be read as weights") as error:
        open_foreign(path)
    assert not target.exists()
    if not legacy:
        assert re.search(r"holds (posix|nt)\.mkdir", str(error.value))
        assert "weights_only=False" not in str(error.value)
    torch.load(path, weights_only=False)
    assert target.exists()  # it would have


def test_absurd_sizes_are_refused_before_they_are_made(tmp_path: Path, seed: int) -> None:
    public = hi_end(np.random.default_rng(seed))
    path = tmp_path / "a.pth"
    # A view of one number that claims 4 TiB.
    name = "module.encoder.blocks.0.mlp.fc1.weight"
    claimed = torch.zeros(1).expand(2**20, 2**20)
    torch.save(public.wrap(public.weights | {name: claimed}), path)
    with pytest.raises(InputError, match=f"{name}: claims more values than the file holds"):
        open_foreign(path, public.told)
    torch.save({name: torch.empty(2**20, 2**20, device="meta")}, path)
    with pytest.raises(InputError, match=f"{name}: claims more values than the file holds"):
        open_foreign(path)
    header = json.dumps({name: {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}})
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode() + bytes(16))
    with pytest.raises(InputError, match="cannot be read as weights"):
        open_foreign(path)
    # Few numbers that ask for a large encoder.
    for told in ({"embed_dim": 10**6}, {"depth": 10**6}, {"position_grid": [10**4] * 3}):
        with pytest.raises(InputError, match=next(iter(told))):
            open_foreign(public.save(path), public.told | told)
    wide = public.weights | {
        "module.encoder.patch_embed.proj.weight": torch.zeros(99999, 1, 1, 1, 1)
    }
    with pytest.raises(InputError, match=r"embed_dim=99999"):
        open_foreign(public.save(path, wide), public.told)


def test_an_archive_that_unpacks_to_more_than_its_size_is_refused(tmp_path: Path) -> None:
    plain, packed = tmp_path / "plain.pth", tmp_path / "packed.pth"
    torch.save({"a": torch.zeros(2**20)}, plain)
    with zipfile.ZipFile(plain) as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:
        for part in old.namelist():
            new.writestr(part, old.read(part))
    assert read_weights(plain).keys() == {"a"}
    with pytest.raises(InputError, match="unpacks to"):
        read_stored(packed)


def close(found: Tensor, expected: Tensor) -> bool:
    return found.shape == expected.shape and bool(
        (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    )


def redrawn(network: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.1)
    return network.eval()


@torch.no_grad()
@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("form", ["pth", "safetensors"])
def test_timms_dinov2(tmp_path: Path, registers: int, form: str, seed: int) -> None:
    torch.manual_seed(seed)
    theirs = redrawn(
        VisionTransformer(
            img_size=12, patch_size=4, embed_dim=24, depth=3, num_heads=2, num_classes=0,
            init_values=1e-5, reg_tokens=registers, no_embed_class=registers > 0,
        )
    )  # fmt: skip
    path = tmp_path / f"model.{form}"
    state = theirs.state_dict()
    save_file(state, path) if form == "safetensors" else torch.save(state, path)
    encoder = open_foreign(path, {"num_heads": 2}).build()
    image = torch.randn(2, 3, 12, 12)
    assert close(encoder.tokens(image[:, :, None]), theirs.forward_features(image))
    grey = open_foreign(path, {"num_heads": 2, "in_channels": 1}).build()
    repeated = theirs.forward_features(image[:, :1].expand(-1, 3, -1, -1))
    assert close(grey.tokens(image[:, :1, None]), repeated)


@torch.no_grad()
def test_timms_dinov3(tmp_path: Path, seed: int) -> None:
    torch.manual_seed(seed)
    theirs = redrawn(
        Eva(
            img_size=16, patch_size=4, embed_dim=48, depth=3, num_heads=2, num_classes=0,
            qkv_bias=False, init_values=1e-5, num_reg_tokens=4, use_abs_pos_emb=False,
            use_rot_pos_emb=True, rope_type="dinov3", rope_rotate_half=True, rope_temperature=100,
            dynamic_img_size=True, use_fc_norm=False, norm_layer=partial(nn.LayerNorm, eps=1e-5),
        )
    )  # fmt: skip
    path = tmp_path / "model.safetensors"
    save_file(theirs.state_dict(), path)
    encoder = open_foreign(path, {"num_heads": 2}).build()
    image = torch.randn(2, 3, 16, 24)
    assert close(encoder.tokens(image[:, :, None]), theirs.forward_features(image))


@torch.no_grad()
@pytest.mark.parametrize("prefix", ["", "module.backbone."])
@pytest.mark.parametrize("alone", [False, True])
def test_monais_swin(tmp_path: Path, prefix: str, alone: bool, seed: int) -> None:
    torch.manual_seed(seed)
    theirs = redrawn(
        SwinUNETR(
            in_channels=1, out_channels=2, feature_size=12, num_heads=(2, 2, 2, 4),
            depths=(1, 2, 1, 1), window_size=3, use_v2=not alone,
        )
    )  # fmt: skip
    path, image = tmp_path / "a.pth", torch.randn(1, 1, 64, 32, 96)
    network = theirs.swinViT if alone else theirs
    torch.save({"state_dict": {prefix + n: t for n, t in network.state_dict().items()}}, path)
    found = open_foreign(path)
    maps, hidden = found.build()(image), theirs.swinViT(image)
    if alone:
        assert all(close(a, b) for a, b in zip(maps, hidden, strict=True))
        assert found.backbone["args"]["refine"] is False
    else:
        assert close(maps[0], theirs.encoder1(image))
        assert close(maps[5], theirs.encoder10(hidden[4]))


@torch.no_grad()
@pytest.mark.parametrize("shape", [(16, 16, 16), (8, 24, 16)])
def test_published_primus(tmp_path: Path, shape: tuple[int, int, int], seed: int) -> None:
    architectures = pytest.importorskip("dynamic_network_architectures.architectures.primus")
    torch.manual_seed(seed)
    theirs = redrawn(
        architectures.Primus(
            input_channels=1, embed_dim=48, patch_embed_size=(8, 8, 8), num_classes=2,
            eva_depth=2, eva_numheads=2, input_shape=shape, init_values=0.1, scale_attn_inner=True,
        )
    )  # fmt: skip
    path, image = tmp_path / "a.pth", torch.randn(2, 1, *shape)
    plan = {"recommended_downstream_patchsize": shape}
    torch.save({"network_weights": theirs.state_dict(), "nnssl_adaptation_plan": plan}, path)
    seen: list[Tensor] = []
    theirs.up_projection.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    theirs(image)
    assert close(open_foreign(path, {"num_heads": 2}).build()(image)[-1], seen[0])
