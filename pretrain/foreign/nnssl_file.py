"""A release in the form that nnssl writes and nnU-Net finetunes: `nnssl.py` the other way round.

Wald et al. 2024, "An OpenMind for 3D medical vision self-supervised learning", arXiv:2412.17041.
Its checkpoints say what they are by an adaptation plan inside: nnU-Net builds the network of the
plan and loads encoder and stem into it, each strictly and under all names that its modules have;
the decoder is always new. So for them a file needs the encoder's weights and the plan.

Those commands are in nnU-Net's repository. Its package on PyPI has `-pretrained_weights` alone,
which takes the network of its own plans and asks the file for all tensors of it but the last
layers. So a U-Net goes over whole, with a decoder, and beside it lies what belongs into the plans.

Two of our backbones are architectures of nnssl's: `resenc.ResEncUNetEncoder`, of two or more stages
whose first keeps the image's resolution, and `vit.ViT3D` with the options of a Primus (Wald et al.
2025, arXiv:2503.01835), as the presets primus_* have them.

What nnU-Net does to scans is its own business: of the plan it takes the spacing, and it makes a
z-score of each scan whatever the plan says. `differences` tells how that is not the pretraining's.
"""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_prep.errors import CorruptionError, InputError
from data_prep.files import atomic_folder, write_json
from data_prep.preprocess import Preprocess
from pretrain.arguments import build_backbone
from pretrain.backbones.backbone import Backbone
from pretrain.backbones.resenc import ResEncUNetEncoder
from pretrain.backbones.vit import PatchEmbed, ViT3D
from pretrain.decoders import UNetDecoder, unet_decoder, without_head
from pretrain.foreign import open_foreign, read_weights
from pretrain.foreign.layout import Found
from pretrain.foreign.nnssl import PLAN, RESENC
from pretrain.manifest import PLAN_FILE
from pretrain.release import Release, shapes_of

CHECKPOINT = "checkpoint_final.pth"
"""Beside adaptation_plan.json: the names under which nnU-Net looks for them on the hub."""

ARCHITECTURE = "nnunet_architecture.json"
"""Beside them, of a U-Net: what nnU-Net's own plans need to have of it."""

WITH_FORM = "resenc_* and primus_*"
"""Presets whose encoders nnssl and nnU-Net know."""


class _NoFormError(ValueError):
    """Why nnssl and nnU-Net have no such architecture."""


@dataclass(frozen=True)
class _Form:
    """An encoder as an architecture of nnssl's.

    Attributes:
        architecture: class and arguments by which nnU-Net builds the network.
        keys: where the parts lie in it.
        channels: of the image.
        crop: voxels that the weights are made for, which learned positions show.
        names: a tensor under their names, from its name here.
        no_decoder: why nnU-Net cannot be given one; empty: it can.
    """

    architecture: dict[str, Any]
    keys: dict[str, Any]
    channels: int
    crop: list[int]
    names: Callable[[str, Tensor], dict[str, Tensor]]
    no_decoder: str = ""


def adaptation_plan(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """A release's adaptation plan, as plain JSON data.

    Beside nnssl's keys it has one of ours, `voxelith`: the preprocessing as the release has it, the
    sentences of `differences`, and whose the decoder is. Normalisations that have no name in nnssl
    are null.

    Args:
        config: config.json.

    Returns:
        The plan; None where nnssl and nnU-Net have no such architecture.
    """
    chosen = config["backbone"]
    with torch.device("meta"):
        encoder = build_backbone(chosen["name"], chosen["args"], "backbone")
    try:
        return _plan(config, _form(encoder, config["crop_size"]))
    except _NoFormError:
        return None


def differences(config: Mapping[str, Any]) -> list[str]:
    """What nnU-Net does to scans otherwise than the pretraining did, in sentences.

    Args:
        config: config.json.
    """
    preprocess = Preprocess.from_dict(config["preprocess"])
    found = ["axes: turned to S, P, L in the pretraining; nnU-Net keeps the order of each file"]
    if preprocess.spacing_mm is None:
        found.append(
            "spacing: each scan's own in the pretraining; nnU-Net resamples to the median of its "
            "data set"
        )
    for modality in config["modalities"]:
        rule = (preprocess.intensity or {}).get(modality, {"rule": "none"})
        onto = list(rule.get("onto") or (-1.0, 1.0))
        said = {
            "percentile": f"the 0.5 and 99.5 percentiles mapped onto {onto}",
            "none": "as they are",
            "zscore": "clipped to the 0.5 and 99.5 percentiles of the whole scan, then a z-score",
            "window": f"[{rule.get('low')}, {rule.get('high')}] mapped onto {onto}",
        }[rule["rule"]]
        found.append(
            f"{modality} intensities: {said} in the pretraining; nnU-Net makes a z-score of each "
            "scan, cut to the box of what is not zero, without clipping"
            + (" (its package: CTNormalization of a channel called CT)" if modality == "CT" else "")
        )
    return found


def write_nnssl(release: Release, output: Path) -> Path:
    """Writes a release's encoder as a checkpoint of nnssl's.

    It is for `nnUNetv2_preprocess_like_nnssl` and `nnUNetv2_train_pretrained`. Beside it lie its
    plan once more, and the release's config.json, for which nnU-Net asks when it fetches from the
    hub. The file is read by `open_foreign` and compared bit by bit before the folder appears. What
    nnU-Net does to scans otherwise than the pretraining goes to stderr.

    Of a U-Net it has a decoder as well, for `nnUNetv2_train -pretrained_weights`: the release's,
    and new from a fixed seed what the release has not got. nnunet_architecture.json is then to be
    put into nnU-Net's plans. stderr and the plan say whose the decoder is.

    Args:
        release: whose encoder it is.
        output: folder that is made.

    Returns:
        The folder.

    Raises:
        InputError: `output` exists, the backbone has no form in nnssl, or its weights have values
            that are not finite.
    """
    if output.exists():
        raise InputError(f"{output}: already exists; choose another folder or remove it")
    encoder = release.build_encoder()
    name = release.config["backbone"]["name"]
    try:
        form = _form(encoder, release.config["crop_size"])
    except _NoFormError as error:
        raise InputError(
            f"{release.path}/config.json: backbone.name={name}: nnssl and nnU-Net have no such "
            f"encoder ({error}); backbone={WITH_FORM} have one, and `voxelith finetune ckpt=...` "
            "takes them all"
        ) from None
    plan = _plan(release.config, form)
    release.load(encoder)
    state = encoder.state_dict()
    weights = {
        public: tensor for own in state for public, tensor in form.names(own, state[own]).items()
    }
    if not form.no_decoder:
        weights |= _rest_of_unet(weights, _decoder(release, encoder))
    empty = [name for name, tensor in weights.items() if not bool(torch.isfinite(tensor).all())]
    if empty:
        raise InputError(f"{release.path}: {empty[0]}: has values that are not finite")
    with atomic_folder(output) as folder:
        torch.save({"network_weights": weights, PLAN: plan}, folder / CHECKPOINT)
        write_json(folder / PLAN_FILE, plan)
        if not form.no_decoder:
            write_json(folder / ARCHITECTURE, _plans_part(release.config, form))
        shutil.copyfile(release.path / "config.json", folder / "config.json")
        _check(folder / CHECKPOINT, state, weights, release.path)
    for sentence in (*differences(release.config), f"decoder: {plan['voxelith']['decoder']}"):
        print(f"{output}: {sentence}", file=sys.stderr)
    return output


def _check(
    file: Path, state: Mapping[str, Tensor], weights: Mapping[str, Tensor], release: Path
) -> None:
    """Reads the file as anybody would, telling it nothing."""
    try:
        read = open_foreign(file).state
    except InputError as error:
        told = [problem.replace(str(file), str(release)) for problem in error.problems]
        raise type(error)(told) from None
    wrong = [name for name in state if not torch.equal(state[name], read[name])]
    stored = read_weights(file)
    wrong += [name for name in weights if not torch.equal(weights[name], stored[name])]
    if wrong:
        raise CorruptionError(f"{file}: {wrong[0]} is not what was written; write it again")


def _form(encoder: Backbone, crop: Sequence[int]) -> _Form:
    if isinstance(encoder, ResEncUNetEncoder):
        return _resenc(encoder, crop)
    if isinstance(encoder, ViT3D):
        return _primus(encoder)
    raise _NoFormError("it is neither their residual U-Net encoder nor a Primus")


def _plan(config: Mapping[str, Any], form: _Form) -> dict[str, Any]:
    preprocess = Preprocess.from_dict(config["preprocess"])
    spacing = preprocess.spacing_mm
    rules = {(preprocess.intensity or {}).get(m, {}).get("rule") for m in config["modalities"]}
    # A window has no name there: CTNormalization is a z-score by the whole data set's statistics.
    scheme = "ZScoreNormalization" if rules == {"zscore"} else None
    return {
        "architecture_plans": form.architecture,
        "pretrain_plan": {
            "dataset_name": config["name"],
            "plans_name": "voxelith",
            "transpose_forward": [0, 1, 2],
            "transpose_backward": [0, 1, 2],
            "configurations": {
                "pretraining": {
                    "spacing": None if spacing is None else list(spacing),
                    "normalization_schemes": scheme and [scheme] * form.channels,
                    "use_mask_for_norm": [False] * form.channels,
                    "patch_size": form.crop,
                }
            },
        },
        "pretrain_num_input_channels": form.channels,
        "recommended_downstream_patchsize": list(config["crop_size"]),
        **form.keys,
        "voxelith": {
            "modalities": list(config["modalities"]),
            "preprocess": preprocess.to_dict(),
            "differences": differences(config),
            "decoder": form.no_decoder or _whose_decoder(config),
        },
    }


# Residual encoders.

_ARCHITECTURES = "dynamic_network_architectures.architectures"


def _resenc(encoder: ResEncUNetEncoder, crop: Sequence[int]) -> _Form:
    told, _ = RESENC.sizes(Found(shapes_of(encoder)))
    strides, stages = RESENC.hidden(encoder)["strides"], len(told["features"])
    if stages < 2 or strides[0] != [1, 1, 1]:
        raise _NoFormError(
            "their U-Net has two stages or more and the first keeps the resolution, here are "
            f"{stages} with strides {strides}"
        )
    level = next((n for n in range(1, stages) if strides[n] == [1, 1, 1]), None)
    no_decoder = (
        f"none, and `nnUNetv2_train -pretrained_weights` needs one: stage {level} is no coarser "
        "than the one before, and no U-Net's decoder here has such a step"
    )
    imported = {
        "conv_op": "torch.nn.modules.conv.Conv3d",
        "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
        "nonlin": "torch.nn.modules.activation.LeakyReLU",
    }
    return _Form(
        architecture={
            "arch_class_name": "ResidualEncoderUNet",
            "arch_kwargs": {
                "n_stages": stages,
                "features_per_stage": told["features"],
                "kernel_sizes": [[3, 3, 3]] * stages,
                "strides": strides,
                "n_blocks_per_stage": told["blocks"],
                "n_conv_per_stage_decoder": [1] * (stages - 1),
                "conv_bias": True,
                "norm_op_kwargs": {"eps": 1e-5, "affine": True},
                "dropout_op": None,
                "dropout_op_kwargs": None,
                "nonlin_kwargs": {"inplace": True},
                **imported,
            },
            "arch_kwargs_requiring_import": list(imported),
        },
        keys={
            "key_to_encoder": "encoder.stages",
            "key_to_stem": "encoder.stem",
            "keys_to_in_proj": ["encoder.stem.convs.0.conv", "encoder.stem.convs.0.all_modules.0"],
            "key_to_lpe": None,
        },
        channels=encoder.in_channels,
        crop=list(crop),
        names=_names_of_resenc,
        no_decoder="" if level is None else no_decoder,
    )


def _names_of_resenc(name: str, tensor: Tensor) -> dict[str, Tensor]:
    return {f"encoder.{public}": tensor for public in _both_names(name)}


def _both_names(name: str) -> tuple[str, str]:
    """Their modules hold convolution and norm twice, and a strict load asks for both names."""
    again = re.sub(r"\.norm\.(\w+)$", r".all_modules.1.\1", name)
    again = re.sub(r"\.conv\.(\w+)$", r".all_modules.0.\1", again)
    return name, again


# The rest of a U-Net.


def _whose_decoder(config: Mapping[str, Any]) -> str:
    drawn, facts = "drawn as nnU-Net does, from a fixed seed", _decoder_facts(config)
    if facts is None:
        return f"new, the release has none: {drawn}"
    if facts.get("blocks") is None:
        return "the release's, without its last layer"
    return f"the release's first {facts['blocks']} blocks from the coarsest; the others {drawn}"


def _decoder_facts(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What config.json says of a U-Net's decoder; that of an answerer is a head and no such."""
    facts: Mapping[str, Any] | None = config.get("decoder")
    return None if config["kind"] == "answerer" else facts


def _decoder(release: Release, encoder: Backbone) -> UNetDecoder:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # the same release gives the same file
        decoder = unet_decoder(encoder, out_channels=1)
    if _decoder_facts(release.config) is not None:
        release.load_decoder(decoder)
    return decoder


def _rest_of_unet(encoder: Mapping[str, Tensor], decoder: UNetDecoder) -> dict[str, Tensor]:
    """All names of their U-Net but the last layers': its decoder holds the encoder once more."""
    again = {f"decoder.{name}": tensor for name, tensor in encoder.items()}
    for own, tensor in without_head(decoder.state_dict()).items():
        again |= {f"decoder.{name}": tensor for name in _both_names(own)}
    return again


def _plans_part(config: Mapping[str, Any], form: _Form) -> dict[str, Any]:
    """What a configuration of nnU-Net's plans is to have; without spacing it keeps its own."""
    spacing = Preprocess.from_dict(config["preprocess"]).spacing_mm
    own = form.architecture
    return {
        "architecture": {
            "network_class_name": f"{_ARCHITECTURES}.unet.{own['arch_class_name']}",
            "arch_kwargs": own["arch_kwargs"],
            "_kw_requires_import": own["arch_kwargs_requiring_import"],
        },
        "patch_size": form.crop,
        "batch_size": 2,
    } | ({} if spacing is None else {"spacing": list(spacing)})


# Primus.

_SIZES = {(396, 12, 6): "S", (792, 12, 12): "B", (864, 16, 12): "M", (1056, 24, 16): "L"}
"""Width, depth and heads of those that have a name."""


def _primus(encoder: ViT3D) -> _Form:
    kind, grid, patch = encoder.kind, encoder.pos_embed.grid, encoder.patch_size
    width, depth, heads = encoder.embed_dim, len(encoder.blocks), kind.num_heads
    needed = {
        "rope: true": kind.rope,
        "mlp: swiglu": kind.mlp == "swiglu",
        "mlp_ratio: 8/3": int(width * kind.mlp_ratio) == int(width * (4 * 2 / 3)),
        "inner_norm: true": kind.inner_norm,
        "qkv_bias: true": kind.qkv_bias,
        "norm_eps: 1e-5": kind.norm_eps == 1e-5,
        "position: learned": grid is not None,
        "stem: linear": isinstance(encoder.patch_embed, PatchEmbed),
        "no cls_token or register_tokens": encoder.prefix_tokens == 0,
        "heads of a width that 6 divides": width // heads % 6 == 0,
        "a patch_size of powers of two": all(side & (side - 1) == 0 for side in patch),
    }
    lacking = [option for option, there in needed.items() if not there]
    if lacking or grid is None:
        raise _NoFormError(f"a ViT is theirs as a Primus only, which needs {', '.join(lacking)}")
    stored = [n * side for n, side in zip(grid, patch, strict=True)]
    named = patch == (8, 8, 8) and kind.layer_scale is not None
    return _Form(
        architecture={
            "arch_class_name": f"Primus{_SIZES.get((width, depth, heads), 'X') if named else 'X'}",
            "arch_kwargs": {
                "input_channels": encoder.in_channels,
                "embed_dim": width,
                "patch_embed_size": list(patch),
                "input_shape": stored,
                "encoder_eva_depth": depth,
                "encoder_eva_numheads": heads,
                "init_values": kind.layer_scale,
                "scale_attn_inner": True,
            },
            "arch_kwargs_requiring_import": [],
        },
        keys={
            "key_to_encoder": "eva",
            "key_to_stem": "down_projection",
            "keys_to_in_proj": ["down_projection.proj"],
            "key_to_lpe": "eva.pos_embed",
        },
        channels=encoder.in_channels,
        crop=stored,
        names=_names_of_primus,
        no_decoder="none: nnU-Net begins with a new one",
    )


def _names_of_primus(name: str, tensor: Tensor) -> dict[str, Tensor]:
    if name == "pos_embed.weight":
        return {"eva.pos_embed": tensor.flatten(0, 2)[None]}
    if name.startswith("patch_embed."):
        return {f"down_projection.{name.removeprefix('patch_embed.')}": tensor}
    return {f"eva.{name}": tensor}
