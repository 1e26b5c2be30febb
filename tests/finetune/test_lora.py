"""Adapters by peft: nothing at the start, nothing but them learns, and nothing of them is left."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from seeds import SEED
from small_runs import TASK, add_few_split, backbone, killed_at, make_release, settings
from torch import nn

from data_prep.errors import InputError
from finetune.lora import adapted_layers, adapter_parameters, add_adapters
from finetune.model_file import load_network
from finetune.protocol import LoRASettings
from finetune.segmentation import Segmentation
from finetune.settings import TaskSettings
from finetune.train import build_model, finetune, make_plan
from pretrain.objective import Batch
from pretrain.optim import parameter_groups

needs_peft = pytest.mark.skipif(
    importlib.util.find_spec("peft") is None, reason='peft is missing: pip install "voxelith[lora]"'
)
CHOSEN = LoRASettings(rank=2, alpha=8.0)


def batch() -> Batch:
    x = torch.randn(2, 1, 8, 16, 32, generator=torch.Generator().manual_seed(SEED))
    label = (x[:, 0] > 0.5).long()
    valid = torch.ones_like(x, dtype=torch.bool)
    return Batch(x, valid, torch.ones(2, 3), torch.arange(2), ["a", "b"], label)


def model_of(kind: str) -> Segmentation:
    torch.manual_seed(SEED + 1)
    return Segmentation(encoder=backbone(kind), task=TaskSettings.model_validate(TASK))


def test_attention_and_mlps_or_every_convolution_are_adapted() -> None:
    plain = {
        f"blocks.{i}.{n}" for i in range(4) for n in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    }
    assert set(adapted_layers(backbone("vit"))) == plain
    swiglu = {n.split(".", 2)[2] for n in adapted_layers(backbone("primus"))}
    assert swiglu == {"attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.proj", "mlp.fc1_g",
                      "mlp.fc1_x", "mlp.fc2"}  # fmt: skip
    cnn = backbone("resenc")
    assert set(adapted_layers(cnn)) == {
        n for n, m in cnn.named_modules() if isinstance(m, nn.Conv3d)
    }


def test_without_peft_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(InputError, match=r"pip install \"voxelith\[lora\]\""):
        add_adapters(backbone("vit"), CHOSEN)


@pytest.mark.extra
@needs_peft
@pytest.mark.parametrize("kind", ["vit", "primus", "resenc", "unet", "pct_net"])
def test_adapters_change_nothing_then_learn_alone_then_become_weights(kind: str) -> None:
    model = model_of(kind).eval()
    names = set(model.state_dict())
    one = batch()
    before = model.logits(one.image).detach()
    start = {n: v.clone() for n, v in model.encoder.state_dict().items()}
    layers = dict(model.encoder.named_modules())
    kernels = {n: layers[n] for n in adapted_layers(model.encoder)}

    add_adapters(model.encoder, CHOSEN)
    model.hold("none")
    assert torch.equal(model.logits(one.image), before)  # B is zero

    model.train()
    adapters = {f"encoder.{n}" for n in adapter_parameters(model.encoder)}
    assert len(adapters) == 2 * len(kernels)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trainable == adapters | {n for n in trainable if n.startswith("decoder.")}
    assert all(p.requires_grad for p in model.decoder.parameters())  # trained whole
    optimizer = torch.optim.Adam(parameter_groups(model, 0.0), 1e-2)  # type: ignore[arg-type]
    for _ in range(3):
        optimizer.zero_grad()
        model(one, 0.0).loss.backward()
        optimizer.step()
    for name, value in model.encoder.state_dict().items():
        if "lora_" not in name:
            assert torch.equal(value, start[name.replace(".base_layer", "")]), name
    model.eval()
    learnt = model.logits(one.image).detach()
    assert not torch.allclose(learnt, before, atol=1e-4)

    state = model.encoder.state_dict()
    model.finish()
    assert set(model.state_dict()) == names
    assert torch.allclose(model.logits(one.image), learnt, atol=1e-4, rtol=1e-4)
    # W + (alpha / rank) B A, by hand.
    for name in list(kernels)[:4]:
        a, b = (state[f"{name}.lora_{x}.default.weight"].flatten(1) for x in "AB")
        added = (8.0 / 2) * (b @ a).reshape(start[f"{name}.weight"].shape)
        found = model.encoder.get_submodule(name).weight
        assert torch.allclose(found, start[f"{name}.weight"] + added, atol=1e-6)


@pytest.mark.extra
@needs_peft
def test_a_run_with_adapters_resumes_averages_and_needs_no_peft_afterwards(
    labelled_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_few_split(labelled_corpus)
    release = make_release(tmp_path / "release", "vit")
    given = settings(
        release, labelled_corpus, tmp_path, lora=CHOSEN, ema=0.5, steps=4, save_every=2
    )
    whole = load_file(finetune(given) / "model.safetensors")
    given = given.model_copy(update={"run": "killed"})
    with killed_at(3):
        finetune(given)
    run = finetune(given)
    found = load_file(run / "model.safetensors")
    assert all(torch.equal(found[name], whole[name]) for name in whole)
    plain, _ = build_model(make_plan(given.model_copy(update={"lora": None, "ema": None})))
    assert found.keys() == plain.state_dict().keys()
    frozen = {n for n in found if "norm" in n and n.startswith("encoder.")}
    assert frozen and all(torch.equal(found[n], plain.state_dict()[n]) for n in frozen)
    monkeypatch.setitem(sys.modules, "peft", None)
    load_network(run, "cpu")
