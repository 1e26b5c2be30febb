"""Mirrors and intensity: chances, ranges, formulas, and what must not matter."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from scipy import ndimage
from torch import Tensor
from torch.nn import functional as F

from conf.compose import HERE, settings_for
from pretrain import augment as module
from pretrain.augment import Augment, gained, mirrored, varied
from pretrain.draws import uniform
from pretrain.settings import AugmentSettings, PretrainSettings

EVERY = (
    "noise", "blur", "brightness", "contrast", "low_resolution", "inverted_gamma", "gamma",
)  # fmt: skip
NNUNET = dict(zip(EVERY, (0.1, 0.2, 0.15, 0.15, 0.25, 0.1, 0.3), strict=True))


def images(seed: int, *shape: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def changed(
    image: Tensor, valid: Tensor | None = None, seeds: list[int] | None = None, **chances: Any
) -> Tensor:
    seeds = list(range(len(image))) if seeds is None else seeds
    valid = torch.ones_like(image[:, :1], dtype=torch.bool) if valid is None else valid
    chosen = AugmentSettings(**chances)
    return varied(image.clone(), valid, torch.tensor(seeds), seeds, chosen)


def numbers(stream: int, seed: int, channels: int = 1) -> list[list[float]]:
    """The draws of a sample: whether, then four for each channel."""
    row = uniform(torch.tensor([seed]), (1 + 4 * channels,), stream)[0].tolist()
    return [row[1 + 4 * c : 5 + 4 * c] for c in range(channels)]


def test_nothing_chosen_changes_nothing(seed: int) -> None:
    image = images(seed, 3, 2, 4, 5, 6)
    assert torch.equal(changed(image), image)


@pytest.mark.parametrize("name", EVERY)
def test_each_comes_as_often_as_chosen(name: str, seed: int) -> None:
    """Over many seeds; half of the channels where each is asked on its own."""
    count, chance = 2000, NNUNET[name]
    image = images(seed, 1, 1, 3, 4, 5).expand(count, 1, 3, 4, 5)
    seeds = list(range(seed * count, (seed + 1) * count))
    found = changed(image, seeds=seeds, **{name: chance})
    share = float((found - image).abs().flatten(1).amax(1).gt(1e-4).float().mean())
    expected = chance * (0.5 if name in ("blur", "low_resolution") else 1.0)
    # A draw of hardly any change (a scale that rounds to all voxels) may pass for none.
    slack = 0.15 * expected if name == "low_resolution" else 0.0
    assert abs(share - expected) < 4 * math.sqrt(expected * (1 - expected) / count) + slack


def test_draws_are_independent_of_each_other(seed: int) -> None:
    """Streams of their own: one change does not bring another."""
    host = torch.arange(seed * 4000, seed * 4000 + 4000)
    streams = [1, 2, 16, *range(80, 90)]
    first = torch.stack([uniform(host, (1,), s)[:, 0] for s in streams]).double()
    table = torch.corrcoef(first) - torch.eye(len(streams)).double()
    assert table.abs().max() < 5 / math.sqrt(4000)


def test_noise_is_normal_and_its_deviation_uniform(seed: int) -> None:
    image = torch.zeros(200, 2, 8, 9, 11)
    found = changed(image, noise=1.0, seeds=list(range(seed, seed + 200)))
    assert torch.equal(found[:, 0], found[:, 1])  # one field for all channels
    sd = found[:, 0].flatten(1).std(1)
    assert sd.max() < 0.11 and abs(float(sd.mean()) - 0.05) < 0.008
    unit = (found[:, 0].flatten(1) / sd[:, None]).flatten().double()
    assert abs(float(unit.mean())) < 0.01
    assert abs(float((unit**4).mean()) - 3) < 0.05
    assert abs(float((unit.abs() > 1.96).double().mean()) - 0.05) < 0.003
    neighbours = (found[:, 0, 1:] * found[:, 0, :-1]).sum() / (found[:, 0] ** 2).sum()
    assert abs(float(neighbours)) < 0.02


def test_blur_is_a_gaussian_of_its_own_along_each_axis(seed: int) -> None:
    image = images(seed, 12, 2, 9, 8, 10)
    found = changed(image, blur=1.0)
    met = 0
    for i in range(12):
        for c, (happens, *draws) in enumerate(numbers(module.BLUR, i, 2)):
            expected = image[i, c].numpy().astype(np.float64)
            if happens < 0.5:
                met += 1
                for axis, u in enumerate(draws):
                    expected = ndimage.gaussian_filter1d(
                        expected, 0.5 + 0.5 * u, axis, mode="nearest", radius=3
                    )
            np.testing.assert_allclose(found[i, c].numpy(), expected, atol=1e-5)
    assert 5 < met < 19


def test_brightness_and_contrast(seed: int) -> None:
    image = images(seed, 30, 2, 4, 5, 6) + 1
    bright, contrast = changed(image, brightness=1.0), changed(image, contrast=1.0)
    ratio = (bright / image).flatten(2)
    assert torch.allclose(ratio.amin(2), ratio.amax(2), atol=1e-4)
    factor = ratio.mean(2)
    assert factor.min() >= 0.75 and factor.max() <= 1.25 and factor.std() > 0.1
    assert (factor[:, 0] - factor[:, 1]).abs().min() > 0  # each channel its own
    for i in range(30):
        for c, (u, *_) in enumerate(numbers(module.CONTRAST, i, 2)):
            x = image[i, c].numpy().astype(np.float64)
            expected = ((x - x.mean()) * (0.75 + 0.5 * u) + x.mean()).clip(x.min(), x.max())
            np.testing.assert_allclose(contrast[i, c].numpy(), expected, atol=1e-5)


def test_low_resolution_drops_voxels_and_interpolates(seed: int) -> None:
    image = images(seed, 12, 1, 9, 12, 10)
    found = changed(image, low_resolution=1.0)
    met = 0
    for i in range(12):
        ((happens, u, *_),) = numbers(module.LOW_RESOLUTION, i)
        few = [round(n * (0.5 + 0.5 * u)) for n in (9, 12, 10)]
        small = F.interpolate(image[i : i + 1], few, mode="nearest-exact")
        expected = F.interpolate(small, (9, 12, 10), mode="trilinear")[0]
        met += happens < 0.5
        torch.testing.assert_close(found[i], expected if happens < 0.5 else image[i])
    assert 1 < met < 11


def test_low_resolution_leaves_thin_axes(seed: int) -> None:
    image = torch.arange(4.0)[:, None, None].expand(20, 1, 4, 16, 16).contiguous()
    torch.testing.assert_close(changed(image, low_resolution=1.0), image)


@pytest.mark.parametrize("name", ["gamma", "inverted_gamma"])
def test_gamma_keeps_mean_and_deviation(name: str, seed: int) -> None:
    image = images(seed, 40, 1, 6, 7, 5) * 3 - 1
    found = changed(image, **{name: 1.0})
    stream = module.GAMMA if name == "gamma" else module.INVERTED_GAMMA
    exponents = []
    for i in range(40):
        ((u, *_),) = numbers(stream, i)
        power = 0.7 + 0.3 * 2 * u if u < 0.5 else 1 + 0.5 * (2 * u - 1)
        exponents.append(power)
        x = image[i, 0].numpy().astype(np.float64) * (1 if name == "gamma" else -1)
        y = ((x - x.min()) / np.ptp(x)) ** power * np.ptp(x) + x.min()
        y = (y - y.mean()) / y.std() * x.std() + x.mean()
        y = y if name == "gamma" else -y
        np.testing.assert_allclose(found[i, 0].numpy(), y, atol=2e-4)
    assert 0.7 <= min(exponents) < 0.8 and 1.3 < max(exponents) <= 1.5
    torch.testing.assert_close(
        found.flatten(1).mean(1), image.flatten(1).mean(1), atol=1e-4, rtol=0
    )


def test_the_order_is_that_of_the_module(seed: int) -> None:
    image, chances = images(seed, 6, 1, 6, 7, 8), dict.fromkeys(EVERY, 1.0)
    one_by_one = image
    for name in EVERY:
        one_by_one = changed(one_by_one, **{name: 1.0})
    assert torch.equal(changed(image, **chances), one_by_one)


def test_invalid_voxels_have_no_influence(seed: int) -> None:
    """Whatever they hold, NaN aside: the valid ones come out the same, and finite."""
    image = images(seed, 16, 2, 6, 7, 8)
    valid = images(seed + 1, 16, 1, 6, 7, 8) > -0.5
    valid[0] = False
    valid[1, :, 3:] = False
    other = torch.where(valid, image, 1000.0 * images(seed + 2, 16, 2, 6, 7, 8))
    chances = dict.fromkeys(EVERY, 1.0)
    one, two = changed(image, valid, **chances), changed(other, valid, **chances)
    both = valid.expand_as(image)
    torch.testing.assert_close(one[both], two[both], atol=1e-5, rtol=1e-5)
    assert torch.isfinite(one).all() and torch.isfinite(two).all()


def test_a_constant_image_stays_finite() -> None:
    found = changed(torch.full((8, 1, 4, 5, 6), 0.3), **dict.fromkeys(EVERY, 1.0))
    assert torch.isfinite(found).all()


def test_a_sample_depends_on_its_seed_alone(seed: int) -> None:
    image, chances = images(seed, 6, 2, 5, 6, 7), dict.fromkeys(EVERY, 0.5)
    seeds = [11, -(2**62), 5, 2**62, 7, 0]
    joint = changed(image, seeds=seeds, **chances)
    for i in range(6):
        alone = changed(image[i : i + 1], seeds=seeds[i : i + 1], **chances)
        assert torch.equal(alone[0], joint[i])
    turned = changed(image.flip(0), seeds=seeds[::-1], **chances)
    assert torch.equal(turned.flip(0), joint)


def test_flips_along_left_and_right_swap_sides(seed: int) -> None:
    """Pairs change places where W is mirrored, nowhere else; other values stay themselves."""
    count = 64
    label = torch.from_numpy(np.random.default_rng(seed).integers(0, 9, (count, 3, 4, 5)))
    label[:, 0, 0, 0] = 40000
    image, valid = label[:, None].float(), label[:, None] != 3
    seeds = torch.arange(seed, seed + count)
    pairs = ((1, 2), (7, 4))
    augment = Augment((True, False, True), swap=pairs)
    turned, sound, found = mirrored(image, valid, label, seeds, augment)
    assert found is not None
    partner = {1: 2, 2: 1, 7: 4, 4: 7}
    kinds = set()
    for i in range(count):
        draw = uniform(seeds[i : i + 1], (3,), module.FLIP)[0] < 0.5
        up, side = bool(draw[0]), bool(draw[2])
        kinds.add((up, side))
        for d, h, w in np.ndindex(3, 4, 5):
            at = (2 - d if up else d, h, 4 - w if side else w)
            before = int(label[i][at])
            assert int(turned[i, 0, d, h, w]) == before and sound[i, 0, d, h, w] == (before != 3)
            assert int(found[i, d, h, w]) == (partner.get(before, before) if side else before)
    assert len(kinds) == 4


def test_gain_is_what_it_was(seed: int) -> None:
    image, seeds = images(seed, 5, 1, 3, 4, 2), torch.arange(5)
    a, b = (uniform(seeds, (2,), module.GAIN) * 2 - 1).mul(0.1).unbind(1)
    for i in range(5):
        expected = image[i] * (1 + a[i]) + b[i]
        torch.testing.assert_close(gained(image, seeds, 0.1)[i], expected)


def test_every_file_of_the_group_is_whole_and_right() -> None:
    """`none` names each key, so that each can be given on the command line."""
    files = sorted(path.stem for path in (HERE / "augment").glob("*.yaml"))
    found = {
        name: settings_for("pretrain", ["corpus=c", "run=r", f"augment={name}"]).augment
        for name in files
    }
    keys = {line.split(":")[0] for line in (HERE / "augment/none.yaml").read_text().splitlines()}
    assert keys >= set(AugmentSettings.model_fields)
    assert found["none"] == AugmentSettings()
    assert found["light"] == AugmentSettings(gain=0.1)
    assert found["spatial"] == AugmentSettings(rotate=0.2, scale=0.2)
    assert found["nnunet"] == AugmentSettings(rotate=0.2, scale=0.2, **NNUNET)
    given = ["corpus=c", "run=r", "augment=nnunet", "augment.gamma=0.5"]
    assert settings_for("pretrain", given).augment.gamma == 0.5


def test_wrong_values_are_refused() -> None:
    for wrong in ({"noise": 1.1}, {"zoom": (1.4, 0.7)}, {"degrees": 0}, {"elastic": 0.1}):
        with pytest.raises(ValidationError):
            AugmentSettings.model_validate(wrong)


def test_a_run_of_before_the_group_is_read_and_compared() -> None:
    """`gain` stood alone: such a run goes on under the same words, and under no others."""
    now = settings_for("pretrain", ["corpus=c", "run=r"])
    before = now.model_dump(mode="json")
    del before["augment"]
    before["gain"] = 0.1
    assert PretrainSettings.model_validate(before) == now and now.changed(before) == []
    (said,) = now.changed({**before, "gain": 0.0})
    assert said.startswith("augment.gain: ")
    with pytest.raises(ValidationError, match="gain"):
        PretrainSettings.model_validate({**now.model_dump(), "gain": 0.1})
