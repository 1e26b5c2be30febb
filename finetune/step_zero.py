"""What a network sees before its first step: proof that the weights of its release are in use.

The golden scan of the release goes through the network as it stands, adapters and average
included, and through the release's own encoder; where nothing was adapted, not a bit may differ.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from data_prep.errors import InputError
from data_prep.files import write_json
from data_prep.images import Reject
from data_prep.volume import read_nifti
from finetune.plan import Plan
from finetune.supervised import Supervised
from pretrain.backbones.backbone import Backbone
from pretrain.objective import evaluating
from pretrain.release import Release, golden_modality, relative_error
from pretrain.run_folder import RunFolder

FILE = "step_zero.json"
ROUNDING = 1e-3
"""Relative to the largest feature: sums over other numbers of channels are rounded otherwise."""
SIDE = 32
"""Voxels of the crop, where the encoder takes so few."""


@dataclass(frozen=True)
class StepZero:
    """What was found.

    Attributes:
        features_equal_release: whether the features are those of the release.
        largest_difference: of a feature, relative to the largest one of its map.
        allowed: what adapted weights may differ by; 0 where nothing was adapted.
        maps: how many maps were compared.
    """

    features_equal_release: bool
    largest_difference: float
    allowed: float
    maps: int

    def __str__(self) -> str:
        equal = "equal" if self.features_equal_release else "differ from"
        return (
            f"before the first step, features {equal} those of the release (largest difference "
            f"{self.largest_difference:.1e}, allowed {self.allowed:.0e})"
        )


def check_start(plan: Plan, model: Supervised, run: RunFolder) -> StepZero:
    """Looks at a network that has made no step yet, writes what it finds and says it.

    Raises:
        RuntimeError: the run begins from the release, and its features are others.
    """
    found = look_at_start(plan, model)
    write_json(run.path / FILE, asdict(found))
    print(f"finetune: {found}")
    if plan.settings.init == "pretrained" and not found.features_equal_release:
        raise RuntimeError(
            f"{run.path}: {found}: the weights of {plan.release.path} are not in use. Nothing was "
            "trained; this is a fault of the program or of its libraries, please report it"
        )
    return found


@torch.no_grad()
def look_at_start(plan: Plan, model: Supervised) -> StepZero:
    """Compares a network's features of the golden scan with those of its release, on the CPU."""
    release = plan.release
    stored = release.as_stored()
    with torch.random.fork_rng(devices=[]):  # fresh weights are drawn before they are replaced
        theirs = stored.build_encoder().eval()
    stored.load(theirs)
    image = golden_crop(stored, theirs)
    expected = theirs(image.expand(-1, theirs.in_channels, -1, -1, -1))
    seen = _for_network(release, model.encoder, image)
    difference = 0.0
    with evaluating(model):
        for network in (model.encoder, *([model.average["encoder"]] if model.average else [])):
            device = next(network.parameters()).device
            for a, b in zip(network(seen.to(device)), expected, strict=True):
                difference = max(difference, relative_error(a.float().cpu(), b))
    allowed = 0.0 if release.stored_channels is None else ROUNDING
    return StepZero(difference <= allowed, difference, allowed, len(expected))


def golden_crop(release: Release, encoder: Backbone) -> Tensor:
    """The middle of the golden scan as the release preprocesses it, [1, 1, D, H, W]."""
    file = release.path / "golden_input.nii.gz"
    try:
        volume = release.preprocess.apply(read_nifti(file, golden_modality(release.modalities)))
    except Reject as reason:
        raise InputError(
            f"{file}: {reason.detail} ({reason.code}); fetch the release again"
        ) from None
    image = torch.from_numpy(volume.array).float()[None]
    size = _small_crop(release, encoder)
    missing = [max(0, side - n) for side, n in zip(size, image.shape[2:], strict=True)]
    image = F.pad(image, [n for side in reversed(missing) for n in (0, side)])
    for axis, side in enumerate(size, start=2):
        image = image.narrow(axis, (image.shape[axis] - side) // 2, side)
    return image


def _small_crop(release: Release, encoder: Backbone) -> tuple[int, ...]:
    """About SIDE voxels a side, where such a crop fits; else what the release was trained on."""
    size = tuple(
        min(crop, max(2, -(-SIDE // stride)) * stride)
        for crop, stride in zip(release.crop_size, encoder.strides[-1], strict=True)
    )
    try:
        encoder.grids(size)
    except ValueError:
        return release.crop_size
    return size


def _for_network(release: Release, encoder: Backbone, image: Tensor) -> Tensor:
    """The image in channels of the network to which it must answer as the release does.

    As adapters promise: the same in each of them, or in the first, whatever the others hold.
    """
    channels = image.expand(-1, encoder.in_channels, -1, -1, -1).clone()
    if release.stored_channels is not None and release.adapt_channels == "first":
        channels[:, release.stored_channels :] = image.flip(2)
    return channels
