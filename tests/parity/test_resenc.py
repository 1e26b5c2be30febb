"""The ResEnc U-Net against a checkpoint in nnssl's layout.

Its plain features are in test_foreign.py; here those of the sparse encoder, and the decoder.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.backbones.resenc import ResEncUNetEncoder
from pretrain.decoders import UNetDecoder
from pretrain.foreign import open_foreign
from pretrain.foreign.stored import read_stored
from pretrain.release import relative_error


@pytest.fixture(scope="module")
def file(parity_dir: Path) -> Path:
    path = parity_dir / "nnssl_resenc_checkpoint_final.pth"
    if not path.exists():
        pytest.skip(f"no reference numbers: {path} does not exist (VOXELITH_PARITY_DIR)")
    return path


@pytest.fixture
def encoder(file: Path) -> ResEncUNetEncoder:
    made = open_foreign(file).build()
    assert isinstance(made, ResEncUNetEncoder)
    return made


def test_sparse_features_of_a_mask_that_hides_nothing(
    encoder: ResEncUNetEncoder, parity: Callable[..., Any]
) -> None:
    numbers, _ = parity("nnssl_resenc_features")
    image = numbers["input.x"]
    hidden = torch.zeros(len(image), 1, *encoder.grids(image.shape)[-1], dtype=torch.bool)
    for stage, found in enumerate(encoder(image, hidden)):
        # Of the largest value: rounding at values near zero depends on the processor.
        assert relative_error(found, numbers[f"expected.stage{stage}"]) < 1e-5


def test_the_decoder_has_the_reference_names(file: Path, encoder: ResEncUNetEncoder) -> None:
    stored = read_stored(file)
    plan = stored.facts["nnssl_adaptation_plan"]["architecture_plans"]["arch_kwargs"]
    (convs,) = set(plan["n_conv_per_stage_decoder"])
    last = f"seg_layers.{len(encoder.channels) - 2}."
    known = {}
    for name, tensor in stored.weights.items():
        own = name.removeprefix("decoder.")
        others = ("encoder.", "seg_layers.")
        if name == own or ".all_modules." in own:
            continue
        if not own.startswith(others) or own.startswith(last):
            known[own.replace(last, "head.")] = tensor
    decoder = UNetDecoder(encoder.channels, encoder.strides, len(known["head.bias"]), convs)
    decoder.load_state_dict(known, strict=True)
