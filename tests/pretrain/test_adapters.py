"""Adapters keep what weights answer where both inputs say the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from seeds import SEED
from test_loop import CNN_MAE, MAE, RESENC, settings
from tiny_pairs import CROPS, names, preset, shrink
from torch import Tensor
from torch.nn import functional as F

from data_prep.errors import InputError
from pretrain.adapters import Channels, adapted, adapted_state, to_channels, to_grid, to_kernel
from pretrain.arguments import build
from pretrain.backbones.backbone import Backbone
from pretrain.start import begin_from
from pretrain.train import build_objective


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def small(name: str, channels: int) -> Backbone:
    torch.manual_seed(SEED)
    made: Backbone = build(
        shrink(preset("backbone", name).backbone) | {"in_channels": channels}, ""
    )
    return made.eval()


def test_a_repeated_image_is_answered_as_before(seed: int) -> None:
    weight, image = drawn(5, 1, 3, 3, 3, seed=seed), drawn(2, 1, 6, 7, 8, seed=seed + 1)
    for count in (1, 2, 4):
        made, _ = to_channels(weight, count, "repeat") or (weight, "")
        repeated = image.expand(-1, count, -1, -1, -1)
        torch.testing.assert_close(F.conv3d(repeated, made), F.conv3d(image, weight))
    back, _ = to_channels(drawn(5, 3, 3, 3, 3, seed=seed), 1) or (weight, "")
    expected = F.conv3d(image.expand(-1, 3, -1, -1, -1), drawn(5, 3, 3, 3, 3, seed=seed))
    torch.testing.assert_close(F.conv3d(image, back), expected)


def test_first_begins_as_if_the_others_were_not_there(seed: int) -> None:
    weight, image = drawn(5, 2, 3, 3, 3, seed=seed), drawn(2, 4, 6, 7, 8, seed=seed + 1)
    made, how = to_channels(weight, 4, "first") or (weight, "")
    torch.testing.assert_close(F.conv3d(image, made), F.conv3d(image[:, :2], weight))
    assert how == "the first 2, zeros for the others"
    assert to_channels(weight, 4, "repeat") is None  # whose are they?


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ((4, 4, 4), (8, 2, 6)),
        ((1, 4, 4), (4, 4, 4)),
        ((4, 4, 4), (1, 8, 8)),
        ((1, 4, 4), (2, 8, 6)),
    ],
)
def test_a_patch_of_one_value_is_answered_as_before(old: Any, new: Any, seed: int) -> None:
    weight = drawn(5, 2, *old, seed=seed)
    made, _ = to_kernel(weight, new)
    assert made.shape[2:] == new
    torch.testing.assert_close(made.sum((2, 3, 4)), weight.sum((2, 3, 4)), rtol=1e-4, atol=1e-4)


def test_what_does_not_change_along_an_axis_is_answered_as_before(seed: int) -> None:
    weight, image = drawn(5, 1, 4, 4, seed=seed), drawn(1, 1, 1, 12, 8, seed=seed + 1)
    made, how = adapted(weight, (5, 1, 6, 4, 4)) or (weight, "")
    volume = image.expand(-1, -1, 6, -1, -1)
    expected = F.conv2d(image[:, :, 0], weight, stride=4)
    torch.testing.assert_close(F.conv3d(volume, made, stride=(6, 4, 4))[:, :, 0], expected)
    assert how == "kernel [1, 4, 4] to [6, 4, 4]: 1/6 along d"
    back, how = adapted(made, (5, 1, 4, 4)) or (made, "")
    torch.testing.assert_close(back, weight)
    assert how == "kernel [6, 4, 4] to [1, 4, 4]: the sum along d"


def test_a_linear_kernel_stays_linear() -> None:
    """Inside; at the ends trilinear interpolation repeats the last value."""
    line = torch.arange(4.0)[None, None, :, None, None].expand(1, 1, 4, 4, 4)
    made, _ = to_kernel(line, (8, 4, 4))
    steps = (made[0, 0, 1:7, 0, 0] * 2).diff()
    torch.testing.assert_close(steps, torch.full((5,), 0.5))


@pytest.mark.parametrize("shape", [(6, 1, 3, 3, 3), (5, 1, 3), (5, 1), (5,)])
def test_another_width_is_another_network(shape: tuple[int, ...]) -> None:
    assert adapted(torch.zeros(5, 1, 3, 3, 3), shape) is None
    assert adapted(torch.zeros(5, 4), (5, 8)) is None


@torch.no_grad()
@pytest.mark.parametrize("name", names("backbone"))
@pytest.mark.parametrize("channels", ["repeat", "first"])
def test_every_backbone_takes_more_channels(name: str, channels: Channels, seed: int) -> None:
    """Its features of an image are those of the image in all channels, or in the first."""
    one, three = small(name, 1), small(name, 3)
    state, how = adapted_state(one.state_dict(), three, channels)
    three.load_state_dict(state)
    assert how and all("1 to 3 channels" in said for said in how.values())
    for crop in CROPS:
        try:
            one.grids(crop)
        except ValueError:
            continue
        break
    image = drawn(1, 1, *crop, seed=seed)
    given = image.expand(-1, 3, -1, -1, -1)
    if channels == "first":
        given = torch.cat([image, drawn(1, 2, *crop, seed=seed + 1)], 1)
    for found, expected in zip(three(given), one(image), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    again, how = adapted_state(three.state_dict(), one, channels)
    assert sorted(again) == sorted(one.state_dict()) and len(how) > 0


def test_a_run_begins_with_more_channels_and_tells(pretrain_corpus: Any, tmp_path: Any) -> None:
    chosen = settings(pretrain_corpus, tmp_path, "r")
    one, four = build_objective(chosen, 1), build_objective(chosen, 4)
    report = begin_from(four, one.state_dict())
    stem = "encoder.stem.convs.0.conv.weight"
    assert report.adapted == {stem: "1 to 4 channels: 1/4 each"} and report.covered == 1.0
    named = [*report.copied, *report.adapted, *report.new]
    assert sorted(named) == sorted(four.state_dict()) and len(set(named)) == len(named)
    own = stem.removeprefix("encoder.")
    before = one.encoder.state_dict()[own].expand(-1, 4, -1, -1, -1)
    torch.testing.assert_close(four.encoder.state_dict()[own], before / 4)


def test_what_no_adapter_makes_is_refused(pretrain_corpus: Any, tmp_path: Any) -> None:
    """Two channels are not three, however few parameters that is about."""
    wide = RESENC | {"features": [8, 48]}
    chosen = settings(pretrain_corpus, tmp_path, "r", backbone=wide)
    two, three = build_objective(chosen, 2), build_objective(chosen, 3)
    said = r"stem\.convs\.0\.conv\.weight has shape \[8, 2, 3, 3, 3\] there, .* no adapter"
    with pytest.raises(InputError, match=said):
        begin_from(three, two.state_dict())
    begin_from(three, two.state_dict(), channels="first")


def test_a_teacher_is_adapted_like_its_student(pretrain_corpus: Any, tmp_path: Any) -> None:
    vit = shrink(preset("backbone", "dino_b").backbone)
    dino = shrink(preset("objective", "dino").objective)
    chosen = settings(
        pretrain_corpus, tmp_path, "r", backbone=vit, objective=dino, crop_size=(16, 16, 16)
    )
    one, four = build_objective(chosen, 1), build_objective(chosen, 4)
    with torch.no_grad():
        one.get_submodule("teacher.module.patch_embed.proj").weight.mul_(2)
    report = begin_from(four, one.state_dict())
    assert sorted(report.adapted) == [
        "encoder.patch_embed.proj.weight", "teacher.module.patch_embed.proj.weight"
    ]  # fmt: skip
    state, before = four.state_dict(), one.state_dict()
    for name in report.adapted:
        torch.testing.assert_close(state[name], before[name].expand(-1, 4, -1, -1, -1) / 4)


def test_another_crop_needs_no_adapter(pretrain_corpus: Any, tmp_path: Any) -> None:
    """Learned positions are interpolated to the grid of each crop, the others computed."""
    primus = shrink(preset("backbone", "primus_s").backbone)
    chosen = settings(pretrain_corpus, tmp_path, "r", backbone=primus, objective=CNN_MAE)
    assert chosen.backbone != RESENC
    small_crop, large = (build(primus | {"in_channels": 1}, "").eval() for _ in range(2))
    _, how = adapted_state(small_crop.state_dict(), large)
    assert how == {}
    large.load_state_dict(small_crop.state_dict())
    assert large(drawn(1, 1, 16, 24, 32, seed=0))[-1].shape[2:] == (4, 6, 8)


@torch.no_grad()
@pytest.mark.parametrize("channels", ["repeat", "first"])
@pytest.mark.parametrize("grid", [[6, 6, 8], [6, 8, 6], [8, 3, 12]])
def test_positions_of_another_grid_are_what_the_encoder_interpolates(
    pretrain_corpus: Any, tmp_path: Any, grid: list[int], channels: Channels, seed: int
) -> None:
    vit = {
        "_target_": "pretrain.backbones.vit.ViT3D",
        "patch_size": 4, "embed_dim": 12, "depth": 1, "num_heads": 2, "position": "learned",
    }  # fmt: skip
    before, now = (
        build_objective(
            settings(
                pretrain_corpus, tmp_path, "r", objective=MAE, crop_size=(16, 16, 16),
                backbone={**vit, "position_grid": cells},
            ),
            1,
        )
        for cells in ([6, 6, 6], grid)
    )  # fmt: skip
    before.get_parameter("encoder.pos_embed.weight").copy_(1 + drawn(6, 6, 6, 12, seed=seed))
    report = begin_from(now, before.state_dict(), channels=channels)
    said = f"positions [6, 6, 6] to {grid}: trilinear"
    assert report.adapted == {"encoder.pos_embed.weight": said} and report.covered == 1.0
    image = drawn(1, 1, *(4 * n for n in grid), seed=seed + 1)
    torch.testing.assert_close(now.encoder(image)[-1], before.encoder(image)[-1])


def test_positions_of_another_width_are_another_network() -> None:
    assert to_grid(torch.zeros(6, 6, 6, 12), (6, 6, 6, 24)) is None
