"""Single cases on a real crop, changed by us and by MONAI and scipy: the same numbers.

MONAI draws from other ranges and other generators, so its deterministic half is what is compared.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from monai import transforms as T
from scipy import ndimage
from test_geometry import dataset_of
from torch import Tensor

from pretrain import augment as module
from pretrain.augment import Augment, bias_field, biased, mirrored, mirrors, varied
from pretrain.draws import uniform
from pretrain.geometry import grid_of, moved, plan
from pretrain.loader import collate, to_batch
from pretrain.places import Size
from pretrain.settings import AugmentSettings

CROP: Size = (24, 28, 20)


@pytest.fixture(scope="module")
def crop(pretrain_corpus: Path) -> Tensor:
    """A normalised crop of an MRI, [1, 1, D, H, W]; no padding."""
    dataset = dataset_of(pretrain_corpus, (16, 20, 12))
    for index in range(len(dataset)):
        batch = to_batch(collate([dataset[index]]))
        if batch.modality == [("MR",)] and batch.valid.all() and batch.image.std() > 0.1:
            return batch.image
    raise AssertionError("the corpus has no such crop")


def only(name: str, image: Tensor, seed: int) -> Tensor:
    valid = torch.ones_like(image[:, :1], dtype=torch.bool)
    chosen = AugmentSettings.model_validate({name: 1.0})
    return varied(image.clone(), valid, torch.tensor([seed]), [seed], chosen)


def draws(stream: int, seed: int) -> list[float]:
    """The numbers of the first channel, in [0, 1)."""
    found: list[float] = uniform(torch.tensor([seed]), (5,), stream)[0, 1:].tolist()
    return found


@pytest.mark.parametrize("case", range(3))
@pytest.mark.parametrize("inverted", [False, True])
def test_gamma_is_monais(crop: Tensor, case: int, inverted: bool, seed: int) -> None:
    number = 10 * seed + case
    name, stream = (
        ("inverted_gamma", module.INVERTED_GAMMA) if inverted else ("gamma", module.GAMMA)
    )
    u = draws(stream, number)[0]
    power = 0.7 + 0.6 * u if u < 0.5 else 1 + 0.5 * (2 * u - 1)
    theirs = T.AdjustContrast(power, invert_image=inverted, retain_stats=True)(crop[0])
    torch.testing.assert_close(only(name, crop, number)[0], theirs, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("case", range(3))
def test_brightness_is_monais(crop: Tensor, case: int, seed: int) -> None:
    number = 10 * seed + case
    factor = 0.75 + 0.5 * draws(module.BRIGHTNESS, number)[0]
    theirs = T.ScaleIntensity(minv=None, maxv=None, factor=factor - 1)(crop[0])
    torch.testing.assert_close(only("brightness", crop, number)[0], theirs, atol=1e-5, rtol=1e-5)


def test_low_resolution_is_monais(crop: Tensor, seed: int) -> None:
    number = next(n for n in range(seed * 50, seed * 50 + 50) if only_met(n, module.LOW_RESOLUTION))
    factor = 0.5 + 0.5 * draws(module.LOW_RESOLUTION, number)[1]
    theirs = T.RandSimulateLowResolution(
        prob=1.0, downsample_mode="nearest-exact", upsample_mode="trilinear",
        zoom_range=(factor, factor), align_corners=False,
    )(crop[0])  # fmt: skip
    found = only("low_resolution", crop, number)[0]
    assert not torch.equal(found, crop[0])
    torch.testing.assert_close(found, torch.as_tensor(theirs), atol=1e-5, rtol=1e-5)


def test_blur_is_scipys(crop: Tensor, seed: int) -> None:
    number = next(n for n in range(seed * 50, seed * 50 + 50) if only_met(n, module.BLUR))
    sigmas = [0.5 + 0.5 * u for u in draws(module.BLUR, number)[1:4]]
    theirs = ndimage.gaussian_filter(
        crop[0, 0].double().numpy(), sigmas, mode="nearest", radius=module.BLUR_RADIUS
    )
    np.testing.assert_allclose(only("blur", crop, number)[0, 0].numpy(), theirs, atol=1e-5)


def only_met(seed: int, stream: int) -> bool:
    """Whether the one channel is among those that a change of half of them meets."""
    return draws(stream, seed)[0] < module.PER_CHANNEL


def test_mirrors_are_monais(crop: Tensor, seed: int) -> None:
    for number in range(8 * seed, 8 * seed + 8):
        seeds = torch.tensor([number])
        axes = [a for a, flip in enumerate(mirrors(seeds)[0].tolist()) if flip]
        valid = torch.ones_like(crop, dtype=torch.bool)
        found, _, _ = mirrored(crop, valid, None, seeds, Augment(flip=(True, True, True)))
        theirs = T.Flip(axes)(crop[0]) if axes else crop[0]
        assert torch.equal(found[0], torch.as_tensor(theirs))


@pytest.mark.parametrize("case", range(3))
def test_rotation_scale_and_spacing_are_monais(crop: Tensor, case: int, seed: int) -> None:
    """In one interpolation each; MONAI turns about the middle of an image, so ours is all of it."""
    rng = np.random.default_rng([seed, case])
    image = (crop[0] * 1000).round()
    shape = np.array(image.shape[1:])
    angle, zoom = rng.uniform(-0.5, 0.5), rng.uniform(0.7, 1.4)
    wanted = (1.0, 1.0, 1.0)
    turn = np.eye(3)
    turn[1, 1] = turn[2, 2] = math.cos(angle)
    turn[1, 2], turn[2, 1] = -math.sin(angle), math.sin(angle)
    matrix = turn * zoom
    size: Size = tuple(map(int, shape))  # type: ignore[assignment]
    first, extent, move = plan(np.zeros(3), size, matrix, grid_of(size, wanted, None), shape, [0])
    box = tuple(slice(a, a + n) for a, n in zip(first, extent, strict=True))
    ours, valid, _ = moved(image[(slice(None), *box)].to(torch.int16), None, None, move)
    affine = np.eye(4)
    affine[:3, :3] = matrix
    theirs = T.Affine(affine=affine, padding_mode="border", image_only=True)(image)
    inside = valid.expand_as(ours)
    assert 0.3 < inside.float().mean() <= 1
    torch.testing.assert_close(ours[inside], torch.as_tensor(theirs)[inside], atol=0.5, rtol=1e-3)


def test_a_bias_field_is_monais(seed: int) -> None:
    coefficients = torch.from_numpy(np.random.default_rng(seed).uniform(-0.2, 0.2, 19))
    theirs = T.RandBiasField(degree=3)
    # Its first coefficient is that of the constant, which ours does not have.
    logs = theirs._generate_random_field(CROP, 3, [0.0, *coefficients.tolist()])
    found = bias_field(CROP, coefficients)
    np.testing.assert_allclose(found.numpy(), np.exp(logs), rtol=1e-5)


def test_a_bias_field_multiplies_physical_values_of_mr_alone(crop: Tensor, seed: int) -> None:
    """Of a z-score 0 is a mean: there a factor on what is normalised would change nothing."""
    count = 40
    image = torch.cat([crop, crop], dim=1).expand(count, -1, -1, -1, -1).contiguous()
    zero = torch.tensor([[-2.0, -1.0]]).expand(count, 2)
    seeds = list(range(seed * count, (seed + 1) * count))
    modality = [("MR", "CT")] * (count // 2) + [("MR", "MR")] * (count // 2)
    tensor = torch.tensor(seeds)
    found = biased(image.clone(), zero, tensor, seeds, modality, 0.5)
    host = uniform(torch.tensor(seeds), (20,), module.BIAS_FIELD)
    met, spread = 0, []
    for i in range(count):
        if host[i, 0] >= 0.5:
            assert torch.equal(found[i], image[i])
            continue
        met += 1
        factor = bias_field(image.shape[2:], (host[i, 1:] * 0.4 - 0.2))
        spread.append(float(factor.log().std()))
        assert float(factor.log().mean()) == pytest.approx(0, abs=0.15)
        for c in range(2):
            expected = (image[i, c] - zero[i, c]) * factor + zero[i, c]
            if modality[i][c] == "CT":
                assert torch.equal(found[i, c], image[i, c])
            else:
                torch.testing.assert_close(found[i, c], expected)
    assert 10 < met < 30
    assert 0.1 < float(np.mean(spread)) < 0.3


def test_a_bias_field_comes_from_the_settings_and_knows_what_is_mr(pretrain_corpus: Path) -> None:
    """In a batch of the loader, where physical zero comes from each volume's own window."""
    dataset = dataset_of(pretrain_corpus)
    items = [dataset[index] for index in range(len(dataset))]
    plain = to_batch(collate(items))
    batch = to_batch(collate(items), Augment(change=AugmentSettings(bias_field=1.0)))
    assert batch.modality == [item["modality"] for item in items]
    assert {"MR", "CT"} == {name for names in batch.modality for name in names}
    for i, (name,) in enumerate(batch.modality):
        if name == "CT":
            assert torch.equal(batch.image[i], plain.image[i])
            continue
        _, _, shift, scale = items[i]["window"][0]
        # What is not clipped is the stored value times the field, exactly.
        code, (slope, intercept) = items[i]["image"].float(), items[i]["value"][0]
        value = code * slope + intercept
        draws = uniform(torch.tensor([items[i]["seed"]]), (20,), module.BIAS_FIELD)[0, 1:]
        field = bias_field(batch.image.shape[2:], draws * 0.4 - 0.2)
        low, high = items[i]["window"][0, :2]
        free = ((value > low) & (value < high))[0]
        expected = ((value * field - shift) * scale)[0]
        torch.testing.assert_close(batch.image[i, 0][free], expected[free], atol=1e-3, rtol=1e-4)
