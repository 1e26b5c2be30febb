"""Decoders that finetuning may choose, and nnU-Net's deep supervision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from seeds import SEED
from small_runs import BACKBONES, TASK, add_few_split, backbone, make_release, settings
from torch import Tensor
from torch.nn import functional as F

from data_prep.errors import InputError
from finetune.decoders import (
    AggregateDecoder,
    DeepUNetDecoder,
    LinearDecoder,
    MLPDecoder,
    choose_decoder,
)
from finetune.model_file import load_network
from finetune.segmentation import Segmentation, shrunk
from finetune.settings import TaskSettings
from finetune.train import build_model, finetune, make_plan
from pretrain.backbones.vit import ViT3D
from pretrain.decoders import PatchDecoder, UNetDecoder, UNETRDecoder, build_decoder, without_head
from pretrain.losses import IGNORE, cross_entropy, dice_loss
from pretrain.objective import Batch

FITS = {
    "auto": list(BACKBONES),
    "linear": list(BACKBONES),
    "mlp": list(BACKBONES),
    "unet": ["resenc", "unet", "pct_net"],
    "unetr": ["vit", "primus"],
    "patch": ["vit", "primus"],
    "aggregate": ["vit", "primus"],
}


def image() -> Tensor:
    return torch.randn(2, 1, 8, 16, 32, generator=torch.Generator().manual_seed(SEED))


def batch() -> Batch:
    x = image()
    label = torch.zeros(2, 8, 16, 32, dtype=torch.int64)
    label[:, 2:6, 3:12, 5:20] = 1
    label[:, :3, 10:, 20:] = 2
    valid = torch.ones_like(x, dtype=torch.bool)
    valid[1, :, :, :, 30:] = False
    return Batch(x, valid, torch.ones(2, 3), torch.arange(2), ["a", "b"], label)


@pytest.mark.parametrize("kind", FITS)
@pytest.mark.parametrize("network", BACKBONES)
def test_each_decoder_gives_labels_or_says_why_not(kind: Any, network: str) -> None:
    encoder = backbone(network)
    if network not in FITS[kind]:
        with pytest.raises(InputError, match=f"decoder={kind}"):
            choose_decoder(encoder, 3, kind)
        return
    decoder = choose_decoder(encoder, 3, kind)
    torch.manual_seed(SEED)  # drop path may leave out a whole block
    out = decoder(image(), encoder(image()))
    assert out.shape == (2, 3, 8, 16, 32)
    out.square().mean().backward()
    idle = {n for n, p in decoder.named_parameters() if p.grad is None or not p.grad.any()}
    own = network == "pct_net" and kind == "auto"  # its coarser heads answer in training alone
    assert not {n for n in idle if not (own and n.startswith("heads."))}
    task = {n for n in decoder.state_dict()} - set(without_head(decoder.state_dict()))
    assert task or kind == "aggregate"  # something belongs to the task and stays behind


def test_auto_is_what_pretraining_takes() -> None:
    kinds = {"resenc": UNetDecoder, "vit": UNETRDecoder, "primus": PatchDecoder}
    for network, expected in kinds.items():
        found = choose_decoder(backbone(network), 3)
        usual = build_decoder(backbone(network), 3)
        assert type(found) is type(usual) is expected
        assert found.state_dict().keys() == usual.state_dict().keys()
    assert isinstance(choose_decoder(backbone("vit"), 3, "patch"), PatchDecoder)


def test_a_linear_head_is_linear_in_concatenated_interpolated_maps() -> None:
    torch.manual_seed(SEED)
    maps = [
        torch.randn(2, c, *size) for c, size in ((3, (4, 8, 16)), (5, (2, 4, 8)), (2, (2, 4, 8)))
    ]
    decoder = LinearDecoder([3, 5, 2], 4).double()
    maps = [x.double() for x in maps]
    size = (8, 16, 32)
    full = torch.cat(
        [F.interpolate(x, size=size, mode="trilinear", align_corners=False) for x in maps], dim=1
    )
    weight = torch.cat([head.weight for head in decoder.heads], dim=1)
    expected = F.conv3d(full, weight, decoder.heads[0].bias)
    found = decoder(torch.zeros(2, 1, *size, dtype=torch.float64), maps)
    assert torch.allclose(found, expected, atol=1e-12)


def test_an_mlp_head_is_a_hidden_layer_on_the_finest_grid() -> None:
    torch.manual_seed(SEED)
    maps = [torch.randn(1, 3, 2, 3, 4).double(), torch.randn(1, 5, 1, 1, 2).double()]
    decoder = MLPDecoder([3, 5], 4, hidden=6).double()
    coarse = F.interpolate(maps[1], size=(2, 3, 4), mode="trilinear", align_corners=False)
    weight = torch.cat([lift.weight for lift in decoder.lifts], dim=1)
    hidden = F.conv3d(torch.cat([maps[0], coarse], 1), weight, decoder.lifts[0].bias)
    low = decoder.head(F.gelu(hidden))
    expected = F.interpolate(low, size=(4, 6, 8), mode="trilinear", align_corners=False)
    found = decoder(torch.zeros(1, 1, 4, 6, 8, dtype=torch.float64), maps)
    assert torch.allclose(found, expected, atol=1e-12)


def test_aggregation_reads_every_tap_and_each_token_its_own_patch() -> None:
    encoder = backbone("vit")
    assert isinstance(encoder, ViT3D)
    decoder = choose_decoder(encoder, 3, "aggregate").eval()
    assert isinstance(decoder, AggregateDecoder)
    maps = [torch.randn(1, 24, 1, 2, 4, requires_grad=True) for _ in range(4)]
    out = decoder(image()[:1], maps)
    out[:, :, :, 8:, 16:24].sum().backward()  # the patch of cell (0, 1, 2)
    for x in maps:
        assert x.grad is not None
        reached = x.grad.abs().sum(1)[0] > 0
        assert reached[0, 1, 2] and reached.sum() == 1


def test_deep_supervision_has_nnunets_weights_and_scales() -> None:
    """1, 1/2, 1/4, ... with the coarsest zeroed, normalised: closed form."""
    decoder = DeepUNetDecoder((4, 8, 8, 8, 8), [(1 << i,) * 3 for i in range(5)], 3)
    nnunet = [0.5**i for i in range(4)]
    nnunet[-1] = 0
    assert decoder.output_weights == pytest.approx([w / sum(nnunet) for w in nnunet[:-1]])
    assert sum(decoder.output_weights) == pytest.approx(1)
    encoder = backbone("resenc")
    deep = choose_decoder(encoder, 3, deep=True)
    assert isinstance(deep, DeepUNetDecoder)
    outputs = deep.outputs(image(), encoder(image()))
    assert [tuple(x.shape[1:]) for x in outputs] == [(3, 8, 16, 32), (3, 4, 8, 16)]
    assert deep.output_weights == pytest.approx((2 / 3, 1 / 3))
    assert torch.equal(outputs[0], deep(image(), encoder(image())))
    only = DeepUNetDecoder((4, 8), [(1, 1, 1), (2, 2, 2)], 3)
    assert only.output_weights == (1.0,) and not only.heads


def test_targets_shrink_to_the_nearest_voxel() -> None:
    target = torch.arange(2 * 4 * 6 * 8).reshape(2, 4, 6, 8) % 7 - 1
    found = shrunk(target, (2, 2, 4))
    for d in range(2):
        for h in range(2):
            for w in range(4):  # the voxel in which the cell's centre lies
                assert torch.equal(found[:, d, h, w], target[:, 2 * d + 1, 3 * h + 1, 2 * w + 1])
    assert shrunk(target, (4, 6, 8)) is target


def test_the_loss_is_the_weighted_sum_over_scales() -> None:
    torch.manual_seed(SEED)
    task = TaskSettings.model_validate(TASK)
    model = Segmentation(encoder=backbone("resenc"), task=task, deep_supervision=True)
    one = batch()
    assert isinstance(model.decoder, DeepUNetDecoder) and one.label is not None
    outputs = model.decoder.outputs(one.image, model.encoder(one.image))
    target = one.label.masked_fill(~one.valid[:, 0], IGNORE)
    small = target[:, 1::2, 1::2, 1::2]
    expected = 2 / 3 * (dice_loss(outputs[0], target) + cross_entropy(outputs[0], target))
    expected = expected + 1 / 3 * (dice_loss(outputs[1], small) + cross_entropy(outputs[1], small))
    assert torch.allclose(model(one, 0.0).loss, expected, atol=1e-6)
    model(one, 0.0).loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_pct_net_keeps_its_own_way() -> None:
    """Outputs interpolated to the image, all alike: as in its publication."""
    torch.manual_seed(SEED)
    model = Segmentation(encoder=backbone("pct_net"), task=TaskSettings.model_validate(TASK)).eval()
    one = batch()
    assert one.label is not None
    target = one.label.masked_fill(~one.valid[:, 0], IGNORE)
    outputs = model.decoder.outputs(one.image, model.encoder(one.image))
    full = [F.interpolate(x, (8, 16, 32), mode="trilinear") for x in outputs]
    expected = sum(dice_loss(x, target) + cross_entropy(x, target) for x in full) / len(full)
    assert torch.allclose(model(one, 0.0).loss, expected, atol=1e-6)


def test_one_scale_cannot_be_supervised_deeply() -> None:
    with pytest.raises(InputError, match="deep_supervision=true: UNETRDecoder"):
        choose_decoder(backbone("vit"), 3, deep=True)
    assert choose_decoder(backbone("pct_net"), 3, deep=True).out_channels == 3


def test_heads_for_training_alone_stay_out_of_what_is_kept(
    labelled_corpus: Path, tmp_path: Path
) -> None:
    """The network without them starts alike, is loaded alike, and predicts alike."""
    add_few_split(labelled_corpus)
    release = make_release(tmp_path / "release", "resenc")
    given = settings(release, labelled_corpus, tmp_path, deep_supervision=True, steps=2)
    deep, _ = build_model(make_plan(given))
    plain, _ = build_model(make_plan(given.model_copy(update={"deep_supervision": False})))
    start = deep.state_dict()
    assert all(torch.equal(v, start[n]) for n, v in plain.state_dict().items())
    assert {n for n in start if n not in plain.state_dict()} == {
        "decoder.heads.0.weight", "decoder.heads.0.bias",
    }  # fmt: skip
    run = finetune(given)
    loaded = load_network(run, "cpu").model
    assert loaded.state_dict().keys() == plain.state_dict().keys()


def test_another_decoder_is_kept_with_the_run_and_is_not_transferred(
    labelled_corpus: Path, tmp_path: Path
) -> None:
    add_few_split(labelled_corpus)
    release = make_release(tmp_path / "release", "vit")
    given = settings(release, labelled_corpus, tmp_path, decoder="aggregate", steps=2)
    run = finetune(given)
    assert isinstance(load_network(run, "cpu").model.decoder, AggregateDecoder)
    with pytest.raises(InputError, match="transfer=network with decoder=aggregate"):
        make_plan(given.model_copy(update={"transfer": "network"}))
