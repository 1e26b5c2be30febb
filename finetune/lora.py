"""Low-rank adapters in a frozen encoder, by `peft`, and back into its weights for a release.

Hu et al. 2021, "LoRA", arXiv:2106.09685: a weight W becomes W + (alpha / rank) B A. B is zero at
the start, so the network begins as the one that was pretrained. In a ViT the linear maps of
attention and MLP have them; elsewhere every convolution and linear map of the encoder, where A is
the convolution to `rank` channels and B one of 1x1x1 back.
"""

from __future__ import annotations

import torch
from torch import nn

from data_prep.errors import InputError
from finetune.protocol import LoRASettings
from pretrain.backbones.backbone import Backbone
from pretrain.backbones.vit import TokenBackbone

_MARK = "lora_"


def add_adapters(encoder: Backbone, chosen: LoRASettings) -> None:
    """Puts adapters into an encoder, in place; the start of A is torch's to draw.

    Raises:
        InputError: peft is not installed.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise InputError(
            'lora: needs peft, which is not installed: pip install "voxelith[lora]"'
        ) from error
    config = LoraConfig(
        r=chosen.rank, lora_alpha=chosen.alpha, target_modules=adapted_layers(encoder)
    )
    inject_adapter_in_model(config, encoder)


def adapted_layers(encoder: Backbone) -> list[str]:
    """Names of the modules that get adapters.

    A ViT's embedding is left as it is: it multiplies patches by its convolution's weight and never
    calls the convolution.
    """
    within = "blocks." if isinstance(encoder, TokenBackbone) else ""
    return [
        name
        for name, part in encoder.named_modules()
        if name.startswith(within) and isinstance(part, nn.Linear | nn.Conv3d)
    ]


def adapter_parameters(encoder: nn.Module) -> list[str]:
    """Names of the adapters' parameters; none where there are no adapters."""
    return [name for name, _ in encoder.named_parameters() if _MARK in name]


def merge_adapters(encoder: nn.Module) -> None:
    """Adds adapters to the weights that they adapt and removes them, in place."""
    if not adapter_parameters(encoder):
        return
    from peft.tuners.lora import LoraLayer

    for name, layer in list(encoder.named_modules()):
        if isinstance(layer, LoraLayer):
            base = layer.get_base_layer()
            # By hand, for peft 0.21 takes kernels of 1x1x1 for those of two axes and fails.
            with torch.no_grad():
                for adapter, scale in layer.scaling.items():
                    a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
                    base.weight += scale * (b.flatten(1) @ a.flatten(1)).view_as(base.weight)
            parent, _, own = name.rpartition(".")
            setattr(encoder.get_submodule(parent), own, base)
