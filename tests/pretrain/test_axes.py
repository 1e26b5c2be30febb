"""Encoders that were trained on other axes answer scans on ours as they answered their own."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from test_foreign import Public, dino_3d, hi_end, primus, resenc, stunet, swin
from torch import Tensor

from data_prep.errors import InputError
from pretrain.backbones.axes import turned, turned_back
from pretrain.foreign import open_foreign

CODES = [
    "".join(ends)
    for pairs in itertools.permutations(("SI", "PA", "LR"))
    for ends in itertools.product(*pairs)
]


@pytest.mark.parametrize("axes", CODES)
def test_every_order_of_axes_is_nibabels(axes: str) -> None:
    phantom = torch.arange(2 * 3 * 4 * 5).view(2, 3, 4, 5)
    orientation = nib.orientations
    way = orientation.ornt_transform(
        orientation.axcodes2ornt("SPL"), orientation.axcodes2ornt(tuple(axes))
    )
    theirs = np.stack([orientation.apply_orientation(one.numpy(), way) for one in phantom])
    assert np.array_equal(turned(phantom, axes).numpy(), theirs)
    assert torch.equal(turned_back(turned(phantom, axes), axes), phantom)


def drawn(kind: Callable[..., Public], seed: int) -> Public:
    torch.manual_seed(seed)
    return kind(np.random.default_rng(seed))


@pytest.mark.parametrize("axes", ["RAS", "LPS", "PIR"])
@pytest.mark.parametrize("kind", [hi_end, dino_3d, swin])
@torch.no_grad()
def test_a_turned_encoder_answers_our_scan_as_it_did_its_own(
    kind: Callable[..., Public], axes: str, tmp_path: Path, seed: int
) -> None:
    public = drawn(kind, seed)
    side = 32 if kind is swin else 8
    crop = (2 * side, side, 3 * side)
    image = torch.randn(2, 1, *crop)
    path = public.save(tmp_path / "weights.pth")
    found = open_foreign(path, public.told, axes=axes, crop_size=crop)
    public.encoder.eval()
    maps = found.build()(image)
    wanted = [turned_back(each, axes) for each in public.encoder(turned(image, axes))]
    unturned = public.encoder(image)
    assert len(maps) == len(wanted)
    for ours, theirs, without in zip(maps, wanted, unturned, strict=True):
        worst = (ours - theirs).abs().max() / theirs.abs().max()
        assert worst < 1e-5
        assert (ours - without).abs().max() / theirs.abs().max() > 1e-3
    if kind is not swin:
        said = found.report.adapted
        assert all(f"turned from {axes}" in said[n] for n in ("patch_embed.proj.weight", POSITION))
        assert not set(said) & set(found.report.copied)
        assert {*said, *found.report.copied} == set(found.state)


POSITION = "pos_embed.weight"


@pytest.mark.parametrize("kind", [resenc, primus, stunet])
def test_what_cannot_be_turned_is_refused(
    kind: Callable[..., Public], tmp_path: Path, seed: int
) -> None:
    public = drawn(kind, seed)
    path = public.save(tmp_path / "weights.pth")
    assert open_foreign(path, public.told, axes="SPL")
    with pytest.raises(InputError, match=re.escape(f"{path}: axes=RAS: ")):
        open_foreign(path, public.told, axes="RAS", crop_size=public.shape)


def test_a_computed_position_needs_the_crop(tmp_path: Path, seed: int) -> None:
    public = drawn(hi_end, seed)
    with pytest.raises(InputError, match="stored ones need a crop_size"):
        open_foreign(public.save(tmp_path / "weights.pth"), public.told, axes="RAS")


@pytest.mark.parametrize("axes", ["RA", "RAL", "XYZ", "RASS"])
def test_codes_of_no_axes_are_refused(axes: str) -> None:
    from pretrain.arguments import build_backbone

    with pytest.raises(InputError, match="such as RAS"):
        build_backbone("swin_unetr.SwinUNETREncoder", {"axes": axes}, "backbone")


def test_a_position_of_another_crop_is_turned_alike(tmp_path: Path, seed: int) -> None:
    """A learned position is interpolated: turned, on a turned grid."""
    public = drawn(dino_3d, seed)
    path = public.save(tmp_path / "weights.pth")
    image = torch.randn(1, 1, 32, 40, 48)
    ours: Tensor = open_foreign(path, public.told, axes="RAS").build()(image)[-1]
    theirs = turned_back(public.encoder.eval()(turned(image, "RAS"))[-1], "RAS")
    assert torch.allclose(ours, theirs, atol=1e-4)
