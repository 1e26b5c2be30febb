"""PCT-Net gives the outputs of MIS-FM's, at all four scales."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from pretrain.backbones.pct_net import PCTDecoder, PCTNetEncoder


def encoder_names(mode: int) -> dict[str, str]:
    """Prefixes of our parameters to those of the public network."""
    embedding = f"embeddings.{mode}"
    return {
        "stages.0.0.": f"{embedding}.proj.",
        "stages.0.1.": f"{embedding}.conv0.conv_conv.",
        "stages.1.0.": f"{embedding}.down1.conv.",
        "stages.1.1.": f"{embedding}.conv1.conv_conv.",
        "stages.2.0.": f"{embedding}.down2.conv.",
        "stages.2.1.": "pyramid_ct.convtrans_e2.",
        "stages.3.0.": "pyramid_ct.down3.conv.",
        "stages.3.1.": "pyramid_ct.convtrans_e3.",
        "stages.4.0.": "pyramid_ct.down4.conv.",
        "stages.4.1.": "pyramid_ct.convtrans_e4.",
    }


def decoder_names(mode: int) -> dict[str, str]:
    head = f"pred_heads.{mode}"
    return {
        "ups.0.": "pyramid_ct.up4.",
        "blocks.0.": "pyramid_ct.convtrans_d3.",
        "ups.1.": "pyramid_ct.up3.",
        "blocks.1.": "pyramid_ct.convtrans_d2.",
        "ups.2.": f"{head}.up2.",
        "blocks.2.": f"{head}.conv1.conv_conv.",
        "ups.3.": f"{head}.up1.",
        "blocks.3.": f"{head}.conv0.conv_conv.",
        "heads.0.": f"{head}.out_conv0.conv.",
        "heads.1.": f"{head}.out_conv1.conv.",
        "heads.2.": "pyramid_ct.out_conv2.conv.",
        "heads.3.": "pyramid_ct.out_conv3.conv.",
    }


def public_name(name: str, prefixes: dict[str, str]) -> str:
    ours = next(prefix for prefix in prefixes if name.startswith(prefix))
    theirs, rest = prefixes[ours], name.removeprefix(ours)
    if ".down" in theirs:  # ours counts the pooling as the first layer
        number, _, last = rest.partition(".")
        rest = f"{int(number) - 1}.{last}"
    if "convtrans" in theirs:
        rest = rest.replace("conv.", "conv.conv_conv.", 1) if rest.startswith("conv.") else rest
        rest = f"trans.{rest}" if rest.startswith("blocks.") else rest
    return theirs + rest


def load(module: torch.nn.Module, weights: dict[str, Tensor], prefixes: dict[str, str]) -> set[str]:
    names = {name: public_name(name, prefixes) for name in module.state_dict()}
    module.load_state_dict({ours: weights[theirs] for ours, theirs in names.items()})
    return set(names.values())


def built(metadata: dict[str, str]) -> tuple[PCTNetEncoder, PCTDecoder, int]:
    numbers = {key: value for key, value in metadata.items() if value[0] in "[0123456789"}
    facts: dict[str, Any] = {key: json.loads(value) for key, value in numbers.items()}
    mode = int(facts["resolution_mode"])
    stride = {0: (4, 4, 4), 1: (2, 4, 4), 2: (1, 4, 4)}[mode]
    cells = [n // s for n, s in zip(facts["input_size"], stride, strict=True)]
    # The public network shrinks windows to the smallest side of a stage when it is built.
    windows = [min(w, min(n // 2**i for n in cells)) for i, w in enumerate(facts["window_sizes"])]
    encoder = PCTNetEncoder(
        in_channels=int(facts["in_chns"]),
        features=tuple(facts["feature_chns"]),
        dropout=tuple(facts["dropout"]),
        depths=tuple(facts["depths"]),
        heads=tuple(facts["num_heads"]),
        windows=tuple(windows),  # type: ignore[arg-type]
        resolution_mode=mode,  # type: ignore[arg-type]
    )
    return encoder, encoder.own_decoder(int(facts["class_num"])), mode


def close(found: Tensor, expected: Tensor) -> bool:
    return found.shape == expected.shape and bool(
        (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    )


def test_all_four_outputs_are_those_of_the_public_network(parity: Callable[[str], Any]) -> None:
    tensors, metadata = parity("pct_net")
    weights = {n.removeprefix("weights."): t for n, t in tensors.items() if "weights." in n}
    encoder, decoder, mode = built(metadata)
    used = load(encoder, weights, encoder_names(mode))
    used |= load(decoder, weights, decoder_names(mode))
    others = tuple(
        f"{part}.{n}." for part in ("embeddings", "pred_heads") for n in {0, 1, 2} - {mode}
    )
    idle = ("norm_layer.weight", "norm_layer.bias", "relative_position_index")
    left = weights.keys() - used
    assert all(name.startswith(others) or name.endswith(idle) for name in left)
    encoder.eval()
    decoder.eval()
    image = tensors["input.x"]
    with torch.no_grad():
        features = encoder(image)
        outputs = decoder.outputs(image, features)
        assert torch.equal(decoder(image, features), outputs[0])
    expected = [tensors[f"expected.output{i}"] for i in range(4)]
    for found, wanted in zip(outputs, expected, strict=True):
        assert close(found, wanted)


def test_the_comparison_notices_a_changed_window(parity: Callable[[str], Any]) -> None:
    """The proof reaches the attention: without the shift, outputs are others."""
    tensors, metadata = parity("pct_net")
    weights = {n.removeprefix("weights."): t for n, t in tensors.items() if "weights." in n}
    encoder, decoder, mode = built(metadata)
    load(encoder, weights, encoder_names(mode))
    load(decoder, weights, decoder_names(mode))
    stage: Any = encoder.stages[2]
    grid = encoder.grids(tensors["input.x"].shape)[2]
    if min(grid) <= stage[1].blocks[1].window:
        pytest.skip("no stage of this file shifts its windows")
    stage[1].blocks[1].shifted = False
    encoder.eval()
    decoder.eval()
    with torch.no_grad():
        found = decoder(tensors["input.x"], encoder(tensors["input.x"]))
    assert not close(found, tensors["expected.output0"])
