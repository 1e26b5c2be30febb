"""Our Hi-End-MAE is the published one: same weights, same masks, same numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from pretrain.backbones.vit import ViT3D, sincos_position
from pretrain.foreign import converted
from pretrain.masking import kept, visible_first
from pretrain.objective import Batch
from pretrain.objectives.hi_end_mae import HiEndMAE
from pretrain.objectives.masked_patches import patch_statistics

# Their names of the decoder to ours, beginnings of names; the first that fits counts.
NAMES = {
    "encoder_to_decoder.3.": "embed.",  # of the normed end
    "encoder_to_decoder.": "tap_embeds.",
    "decoder.cross_attention_blocks.": "cross_blocks.",
    "decoder.": "",
    "mask_token": "mask_token",
}


class Given(HiEndMAE):
    """Hides what it is told to hide."""

    hidden: Tensor

    def draw(self, batch: Batch) -> Tensor:
        return self.hidden


@dataclass
class Reference:
    model: Given
    batch: Batch
    numbers: dict[str, Tensor]


@pytest.fixture
def reference(parity: Callable) -> Reference:
    numbers, facts = parity("hi_end_mae")
    model, batch = built(numbers, facts)
    return Reference(model, batch, numbers)


def built(
    numbers: dict[str, Tensor], facts: dict[str, str], encoder: ViT3D | None = None
) -> tuple[Given, Batch]:
    """The model with their weights, and what they gave it; an encoder that is given has its own."""
    weights = {n.removeprefix("weights."): t for n, t in numbers.items() if n.startswith("weights")}
    image, shuffled = numbers["input.x"], numbers["input.shuffle_indices"]
    count, ratio = shuffled.shape[1], float(facts["mask_ratio"])
    if encoder is None:
        encoder = ViT3D(
            in_channels=image.shape[1],
            patch_size=tuple(weights["encoder.patch_embed.proj.weight"].shape[2:]),
            embed_dim=int(facts["width"]),
            depth=int(facts["depth"]),
            num_heads=int(facts["heads"]),
            cls_token=True,
        )
        encoder.load_state_dict(converted(weights, encoder)[0])
    model = Given(
        encoder=encoder,
        decoder_dim=weights["mask_token"].shape[-1],
        decoder_heads=int(facts["heads"]),
        self_blocks=int(facts["decoder_self_blocks"]),
        mask_ratio=ratio,
    )
    assert len(model.taps) == int(facts["decoder_cross_blocks"])
    mine = {f"encoder.{name}": tensor for name, tensor in encoder.state_dict().items()}
    for name, tensor in weights.items():
        old = next((prefix for prefix in NAMES if name.startswith(prefix)), None)
        if old is not None:
            flat = tensor.flatten() if name.endswith("token") else tensor
            mine[NAMES[old] + name.removeprefix(old)] = flat
    model.load_state_dict(mine, strict=True)
    model.hidden = torch.ones(len(image), count, dtype=torch.bool).scatter(
        1, shuffled[:, : kept(count, ratio)], False
    )
    valid = torch.ones_like(image[:, :1], dtype=torch.bool)
    batch = Batch(image, valid, torch.ones(len(image), 3), torch.arange(len(image)))
    return model.eval(), batch


def test_positions_are_theirs(reference: Reference) -> None:
    grid = reference.model.encoder.grid(reference.batch.image.shape)
    for name in ("encoder_pos_embed", "decoder_pos_embed"):
        theirs = reference.numbers[f"weights.{name}"][0]
        torch.testing.assert_close(
            sincos_position(grid, theirs.shape[1]), theirs, rtol=1e-5, atol=1e-6
        )


def test_loss_and_gradient(reference: Reference) -> None:
    loss = reference.model(reference.batch, 0.0).loss
    torch.testing.assert_close(loss, reference.numbers["expected.loss"], rtol=1e-5, atol=0)
    loss.backward()
    found = reference.model.encoder.patch_embed.proj.weight.grad
    expected = reference.numbers["expected.grad.patch_embed"]
    scale = expected.abs().max().item()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * scale)


def reconstruction(model: Given, batch: Batch) -> Tensor:
    """All patches, in the grid's order, in units of the image as their pictures show it."""
    order = visible_first(model.hidden)
    keep = int((~model.hidden[0]).sum())
    with torch.no_grad():
        rows = model.head(model.decode(batch.image, model.hidden, order, keep))
    rows = rows[:, model.encoder.prefix_tokens :].gather(
        1, order.argsort(1)[:, :, None].expand(-1, -1, rows.shape[2])
    )
    # Their pictures undo the biased normalisation of the target with the unbiased deviation.
    patches, valid = model._patches(batch)
    statistics = patch_statistics(patches, valid, unbiased=True)
    return rows * (statistics.variance.sqrt() + 1e-6) + statistics.mean


def test_reconstruction(reference: Reference) -> None:
    found = reconstruction(reference.model, reference.batch)
    expected = reference.numbers["expected.reconstruction"]
    scale = expected.abs().max().item()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * scale)
