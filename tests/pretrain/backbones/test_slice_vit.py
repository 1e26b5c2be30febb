from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import hydra.utils
import pytest
import timm
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file
from seeds import SEED
from timm.models.eva import Eva, checkpoint_filter_fn
from torch import Tensor, nn

import conf
from data_prep.errors import InputError
from pretrain.backbones.slice_vit import SliceViT, slice_rotary_table
from pretrain.decoders import UNETRDecoder, build_decoder
from pretrain.foreign import converted, read_weights
from pretrain.masking import patchify, random_hidden, unpatchify
from pretrain.objectives.mae_primus import PrimusMAE
from pretrain.optim import parameter_groups

CONF = Path(conf.__file__).parent
IMAGE = torch.randn(2, 1, 1, 8, 12, generator=torch.Generator().manual_seed(SEED + 1))  # grid 1x2x3
HIDDEN = random_hidden(torch.tensor([3, 4]), (1, 2, 3), 0.5)


def small(**changes: object) -> SliceViT:
    """Every weight drawn, so that none can be left out unnoticed."""
    torch.manual_seed(SEED)
    args: dict = {"patch_size": 4, "embed_dim": 24, "depth": 4, "num_heads": 2, "layer_scale": 0.5}
    return SliceViT(**(args | changes))


def drawn(vit: SliceViT) -> SliceViT:
    for parameter in vit.parameters():
        nn.init.normal_(parameter, std=0.2)
    return vit


def test_rotary_table_equals_a_slow_oracle() -> None:
    found = slice_rotary_table((2, 3), 8)
    assert found.shape == (6, 16)
    for row, cell in zip(found, itertools.product(range(2), range(3)), strict=True):
        places = [2 * (c + 0.5) / n - 1 for c, n in zip(cell, (2, 3), strict=True)]
        angles = [2 * math.pi * p / 100 ** (i / 2) for p in places for i in range(2)] * 2
        expected = [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
        assert torch.allclose(row, torch.tensor(expected), atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("qkv_bias", [False, True])
def test_tokens_and_maps_are_those_of_timm(qkv_bias: bool) -> None:
    """timm's own DINOv3 with the same weights, on a slice of another size than it was made for."""
    ours = drawn(small(in_channels=3, qkv_bias=qkv_bias)).eval()
    theirs = Eva(
        img_size=16, patch_size=4, num_classes=0, embed_dim=24, depth=4, num_heads=2,
        global_pool="token", qkv_bias=qkv_bias, init_values=0.5, num_reg_tokens=4,
        use_abs_pos_emb=False, use_rot_pos_emb=True, rope_type="dinov3", rope_temperature=100,
        rope_rotate_half=True, dynamic_img_size=True, norm_layer=partial(nn.LayerNorm, eps=1e-5),
    )  # fmt: skip
    theirs.load_state_dict(ours.state_dict(), strict=True)
    image = torch.randn(2, 3, 8, 20)
    tokens, layers = theirs.eval().forward_intermediates(image, norm=True)
    assert torch.allclose(ours.tokens(image[:, :, None]), tokens, atol=1e-5)
    for found, expected in zip(ours(image[:, :, None]), layers, strict=True):
        assert torch.allclose(found[:, :, 0], expected, atol=1e-5)


@pytest.mark.parametrize(("name", "timms"), [("s", "small"), ("b", "base")])
def test_presets_have_the_tensors_of_timms(name: str, timms: str) -> None:
    with torch.device("meta"):
        ours = hydra.utils.instantiate(
            OmegaConf.load(CONF / "backbone" / f"dinov3_{name}_2d.yaml"), in_channels=3
        )
    theirs = timm.create_model(f"vit_{timms}_patch16_dinov3", num_classes=0, depth=1)
    shapes = {name: t.shape for name, t in ours.state_dict().items() if "blocks" not in name}
    assert shapes.items() <= {n: t.shape for n, t in theirs.state_dict().items()}.items()
    blocks = [
        {n: (t.shape, getattr(t, "eps", None)) for n, t in vit.blocks[0].state_dict().items()}
        for vit in (ours, theirs)
    ]
    assert blocks[0] == blocks[1]
    assert ours.taps == (3, 6, 9, 12)
    assert ours.blocks[0].attn.num_heads == theirs.blocks[0].attn.num_heads


def test_visible_tokens_keep_their_places() -> None:
    """Embed everything, then drop: each visible patch is turned as in the whole grid."""
    vit = drawn(small())
    found = vit.tokens(IMAGE, HIDDEN, keep=3)
    assert found.shape == (2, 5 + 3, 24)
    everything = vit.patch_embed(IMAGE[:, :, 0]).flatten(1, 2)
    table = slice_rotary_table((2, 3), 12)
    for sample, hidden, expected in zip(everything, HIDDEN, found, strict=True):
        assert vit.reg_token is not None
        x = torch.cat([vit.cls_token[0], vit.reg_token[0], sample[~hidden]])[None]
        for block in vit.blocks:
            x = block(x, table[~hidden])
        assert torch.allclose(vit.norm(x)[0], expected, atol=1e-5)


def test_a_mask_token_stands_in_for_the_embedding() -> None:
    vit = drawn(small())
    token = torch.randn(24)
    seen: list[Tensor] = []
    vit.blocks[0].register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    assert vit.tokens(IMAGE, HIDDEN, mask_token=token).shape == (2, 5 + 6, 24)
    patches = seen[0][:, 5:]
    assert torch.equal(patches[HIDDEN], token.expand_as(patches[HIDDEN]))
    embedded = vit.patch_embed(IMAGE[:, :, 0]).flatten(1, 2)
    assert torch.allclose(patches[~HIDDEN], embedded[~HIDDEN], atol=1e-6)
    none = torch.zeros_like(HIDDEN)
    assert torch.equal(vit.tokens(IMAGE, none, mask_token=token), vit.tokens(IMAGE))


@pytest.mark.parametrize("masked", ["dropped", "replaced"])
def test_hidden_voxels_are_never_read(masked: str) -> None:
    vit = drawn(small())
    given: dict = {"keep": 3} if masked == "dropped" else {"mask_token": torch.ones(24)}
    rows = patchify(IMAGE, vit.patch_size).masked_fill(HIDDEN[:, :, None], float("nan"))
    ruined = unpatchify(rows, (1, 2, 3), vit.patch_size).requires_grad_()
    found = vit.tokens(ruined, HIDDEN, **given)
    assert torch.equal(found, vit.tokens(IMAGE, HIDDEN, **given))
    found.square().sum().backward()
    assert ruined.grad is not None
    gradient = patchify(ruined.grad, vit.patch_size).abs().sum(-1)
    assert (gradient[HIDDEN] == 0).all() and (gradient[~HIDDEN] > 0).all()
    assert all(p.grad.isfinite().all() for p in vit.parameters() if p.grad is not None)


def test_maps_are_normed_blocks_and_decode() -> None:
    vit = small(register_tokens=2)
    seen: list[Tensor] = []
    for block in vit.blocks:
        block.register_forward_hook(lambda *args: seen.append(args[-1]))
    maps = vit(IMAGE)
    for found, output in zip(maps, seen, strict=True):
        assert torch.equal(found.flatten(2).transpose(1, 2), vit.norm(output)[:, 3:])
    assert (vit.strides, vit.grids(IMAGE.shape)) == (((1, 4, 4),) * 4, [(1, 2, 3)] * 4)
    decoder = build_decoder(vit, 3)
    assert isinstance(decoder, UNETRDecoder)
    assert decoder(IMAGE, maps).shape == (2, 3, 1, 8, 12)


def test_gradient_reaches_every_parameter_with_checkpoints_too() -> None:
    vit = small()
    found = []
    for enable in (False, True):
        vit.set_grad_checkpointing(enable)
        vit.zero_grad()
        vit(IMAGE)[-1].square().sum().backward()
        assert [n for n, p in vit.named_parameters() if p.grad is None or not p.grad.any()] == []
        found.append([p.grad for p in vit.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))  # type: ignore[arg-type]


def test_each_parameter_is_in_one_layer_and_tokens_do_not_decay() -> None:
    vit = small()
    first, *blocks = vit.layers()
    assert len(blocks) == 4
    found = [
        id(p)
        for layer in (first, *blocks)
        for part in layer
        for p in ([part] if isinstance(part, nn.Parameter) else part.parameters())
    ]
    assert sorted(found) == sorted(id(p) for p in vit.parameters())
    spared = {id(p) for p in parameter_groups(vit, 0.1)[1]["params"]}  # type: ignore[attr-defined]
    assert {id(token) for token in vit.prefix()} <= spared


def test_volumes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[8, 12, 12\] voxels is no slice.*\[1, 12, 12\]"):
        small()(torch.zeros(1, 1, 8, 12, 12))
    with pytest.raises(ValueError, match=r"\[1, 10, 12\].*multiples"):
        small()(torch.zeros(1, 1, 1, 10, 12))


def test_a_head_must_have_pairs_for_two_axes() -> None:
    with pytest.raises(ValueError, match="multiple of 4"):
        small(num_heads=4)


def test_what_builds_on_blocks_of_our_vit_is_refused_kindly() -> None:
    with pytest.raises(InputError, match=r"SliceViT does not give.*backbone=vit_s"):
        PrimusMAE(encoder=small())


def published(vit: SliceViT) -> dict[str, Tensor]:
    """An encoder's weights under Meta's names, with what pretraining keeps beside them."""
    names = {"reg_token": "storage_tokens", "gamma_1": "ls1.gamma", "gamma_2": "ls2.gamma"}
    found: dict[str, Tensor] = {}
    for name, tensor in vit.state_dict().items():
        if name.endswith("v_bias"):
            continue
        if name.endswith("q_bias"):
            value = vit.state_dict()[name.replace("q_bias", "v_bias")]
            found[name.replace("q_bias", "qkv.bias")] = torch.cat(
                [tensor, torch.ones(24), value]  # masked when it is used
            )
            found[name.replace("q_bias", "qkv.bias_mask")] = torch.ones(72)
            continue
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        found[name] = tensor
    periods = torch.tensor([100 ** (i / 3) for i in range(3)]).bfloat16()
    extra = {"mask_token": torch.ones(1, 24), "local_cls_norm.weight": torch.ones(24)}
    return found | extra | {"rope_embed.periods": periods}


@torch.no_grad()
@pytest.mark.parametrize("qkv_bias", [False, True])
def test_metas_names_are_read_as_timm_reads_them(qkv_bias: bool) -> None:
    vit = drawn(small(in_channels=3, qkv_bias=qkv_bias))
    stored = published(vit)
    found, report = converted(stored, vit)
    expected = checkpoint_filter_fn(dict(stored), vit)
    assert found.keys() == expected.keys() == vit.state_dict().keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert not report.new
    # bare names are timm's: the same encoder again
    again, report = converted(vit.state_dict(), vit)
    assert again.keys() == found.keys() and not report.skipped


@pytest.mark.parametrize("form", ["teacher.pth", "bare.pth", "timm.safetensors"])
def test_files_load_whole_and_report_each_tensor(tmp_path: Path, form: str) -> None:
    source, target = drawn(small()), small()
    stored, path = published(source), tmp_path / form
    if form.startswith("teacher"):
        around = {f"backbone.{name}": tensor for name, tensor in stored.items()}
        torch.save({"teacher": around | {"dino_head.mlp.0.weight": torch.ones(2)}}, path)
    elif form.startswith("bare"):
        torch.save(stored, path)
    else:
        save_file(source.state_dict(), path)
    weights, report = converted(read_weights(path), target)
    target.load_state_dict(weights)
    assert torch.equal(target.tokens(IMAGE), source.tokens(IMAGE))
    assert sorted(report.copied) == sorted(target.state_dict())
    skipped = {"teacher.pth": 4, "bare.pth": 3, "timm.safetensors": 0}[form]
    assert (len(report.skipped), report.adapted, report.covered) == (skipped, {}, 1.0)


@torch.no_grad()
def test_one_channel_has_the_sum_of_three() -> None:
    colour, grey = drawn(small(in_channels=3)).eval(), small().eval()
    weights, report = converted(published(colour), grey)
    grey.load_state_dict(weights)
    assert "sum over 3" in report.adapted["patch_embed.proj.weight"]
    expected = colour.tokens(IMAGE.expand(-1, 3, -1, -1, -1))
    assert torch.allclose(grey.tokens(IMAGE), expected, atol=1e-5)


def without(name: str, stored: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in stored.items() if key != name}


@pytest.mark.parametrize(
    ("changes", "stored", "message"),
    [
        ({}, lambda s: without("norm.weight", s), "norm.weight: is not in the file"),
        ({}, lambda s: without("blocks.2.ls1.gamma", s), "blocks.2.gamma_1: is not in the file"),
        ({}, lambda s: s | {"blocks.4.norm1.bias": torch.ones(24)}, "nothing of that name"),
        ({"in_channels": 2}, lambda s: s, r"patch_embed.*shape \[24, 1, 4, 4\].*\[24, 2, 4, 4\]"),
        ({"patch_size": 8}, lambda s: s, r"patch_embed.*\[24, 1, 8, 8\]"),
        ({"register_tokens": 2}, lambda s: s, r"storage_tokens.*\[1, 4, 24\].*\[1, 2, 24\]"),
        ({}, lambda s: s | {"rope_embed.periods": torch.ones(3)}, "turns by"),
        ({}, lambda s: s | {"blocks.0.attn.qkv.bias": torch.ones(72)}, "qkv_bias=true"),
        ({}, lambda s: s | {"blocks.0.attn.qkv.bias": torch.tensor(1.0)}, "qkv.bias: chunk"),
        ({"qkv_bias": True}, lambda s: s, "attn.q_bias: is not in the file"),
    ],
)
def test_weights_of_another_network_are_refused(
    changes: dict, stored: Callable[[dict[str, Tensor]], dict[str, Tensor]], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        converted(stored(published(small())), small(**changes))


def test_biases_of_zero_may_be_left_out() -> None:
    """As the distilled sizes of DINOv3 have them."""
    stored = published(small()) | {"blocks.0.attn.qkv.bias": torch.zeros(72)}
    _, report = converted(stored, small())
    assert "zero" in report.skipped["blocks.0.attn.qkv.bias"]


def test_files_that_hold_something_else_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    with pytest.raises(InputError, match="cannot be read"):
        read_weights(path)
    path.write_bytes(b"no weights")
    with pytest.raises(InputError, match="cannot be read"):
        read_weights(path)
    torch.save({"teacher": {"epoch": 3}}, path)
    with pytest.raises(InputError, match="holds other things"):
        read_weights(path)
