import math

import pytest
import torch
from pydantic import ValidationError
from seeds import SEED

from finetune.segmentation import Segmentation, class_table, to_classes
from finetune.settings import TaskSettings
from pretrain.backbones.backbone import Backbone
from pretrain.backbones.resenc import ResEncUNetEncoder
from pretrain.backbones.vit import ViT3D
from pretrain.losses import IGNORE, cross_entropy, dice_loss
from pretrain.objective import Batch

TASK = TaskSettings.model_validate(
    {
        "name": "organs",
        "classes": [
            {"name": "liver", "values": [5], "tolerance_mm": 3},
            {"name": "kidneys", "values": [2, 3], "tolerance_mm": 2},
        ],
        "ignore": 9,
    }
)


def batch(shape: tuple[int, int, int] = (16, 24, 16), seed: int = 0) -> Batch:
    g = torch.Generator().manual_seed(seed)
    image = torch.randn(2, 1, *shape, generator=g)
    label = torch.zeros(2, *shape, dtype=torch.int64)
    label[:, 4:10, 5:15, 3:9] = 5
    label[:, 4:10, 16:22, 9:14] = 3
    image = image * 0.3 + label[:, None]
    valid = torch.ones(2, 1, *shape, dtype=torch.bool)
    return Batch(image, valid, torch.ones(2, 3), torch.arange(2), ["a", "b"], label)


def test_label_values_become_classes() -> None:
    values = torch.tensor([0, 1, 2, 3, 5, 9, 10, 60000])
    assert to_classes(values, class_table(TASK)).tolist() == [0, 0, 2, 2, 1, IGNORE, 0, 0]


def test_dice_has_closed_form() -> None:
    target = torch.zeros(1, 2, 2, 2, dtype=torch.int64)
    target[0, 0] = 1  # 4 of 8 voxels
    logits = torch.zeros(1, 2, 2, 2, 2)  # probability 1/2 everywhere
    assert dice_loss(logits, target).item() == pytest.approx(1 - 2 * 2 / (4 + 4), abs=1e-5)
    sure = torch.stack([50 - 100 * target[0], 100 * target[0] - 50])[None].float()
    assert dice_loss(sure, target).item() == pytest.approx(0, abs=1e-5)
    assert cross_entropy(logits, target).item() == pytest.approx(math.log(2))


def test_dice_sums_over_the_batch_before_dividing() -> None:
    target = torch.zeros(2, 1, 1, 4, dtype=torch.int64)
    target[0, ..., :2] = 1  # the second crop has no foreground, and that is no failure
    logits = torch.full((2, 2, 1, 1, 4), -20.0)
    logits[:, 0] = 20
    logits[0, :, ..., :2] = torch.tensor([-20.0, 20.0])[:, None, None, None]
    assert dice_loss(logits, target).item() == pytest.approx(0, abs=1e-5)


def test_ignored_and_invalid_voxels_change_nothing() -> None:
    model = Segmentation(
        encoder=ResEncUNetEncoder(in_channels=1, features=(4, 8), strides=(1, 2), blocks=(1, 1)),
        task=TASK,
    ).eval()
    one = batch()
    assert one.label is not None
    one.valid[:, :, :, :, 12:] = False
    one.label[:, 12:] = 9
    other = Batch(one.image, one.valid, one.spacing, one.seeds, one.keys, one.label.clone())
    assert other.label is not None
    other.label[:, :12, :, 12:] = 5
    assert torch.equal(model(one, 0.0).loss, model(other, 0.0).loss)


def test_everything_ignored_is_finite() -> None:
    model = Segmentation(
        encoder=ResEncUNetEncoder(in_channels=1, features=(4, 8), strides=(1, 2), blocks=(1, 1)),
        task=TASK,
    )
    empty = batch()
    empty.valid[:] = False
    loss = model(empty, 0.0).loss
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("kind", ["resenc", "vit"])
def test_one_batch_can_be_learnt(kind: str) -> None:
    torch.manual_seed(SEED)
    encoder: Backbone
    if kind == "resenc":
        encoder = ResEncUNetEncoder(
            in_channels=1, features=(8, 16, 32), strides=(1, 2, 2), blocks=(1, 1, 1)
        )
    else:
        encoder = ViT3D(in_channels=1, patch_size=8, embed_dim=24, depth=4, num_heads=2)
    model = Segmentation(encoder=encoder, task=TASK)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    given = batch()
    for _ in range(100):
        losses = model(given, 0.0)
        optimizer.zero_grad()
        losses.loss.backward()
        optimizer.step()
    assert set(losses.parts) == {"dice", "cross_entropy"}
    assert all(p.grad is not None for p in model.parameters())
    found = model.logits(given.image).argmax(1)
    assert given.label is not None
    truth = to_classes(given.label, class_table(TASK))
    assert (found == truth).float().mean() > 0.98


def test_contradictory_tasks_are_refused() -> None:
    liver = {"name": "liver", "values": [5], "tolerance_mm": 3}
    with pytest.raises(ValidationError, match="more than one class"):
        TaskSettings.model_validate({"name": "t", "classes": [liver, {**liver, "name": "x"}]})
    with pytest.raises(ValidationError, match="same name"):
        TaskSettings.model_validate({"name": "t", "classes": [liver, {**liver, "values": [6]}]})
