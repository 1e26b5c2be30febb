"""SwinUNETR: window attention in four stages, each map refined by residual convolutions.

Hatamizadeh et al. 2022, arXiv:2201.01266, and its second version, which puts a residual block of
convolutions before each stage (He et al. 2023, Swin-UNETR-V2); windows are shifted every second
block (Liu et al. 2021, arXiv:2103.14030). The parts are MONAI's and keep its names, so that weights
of `monai.networks.nets.SwinUNETR` fit (`pretrain.foreign`): 48, 96 and 192 channels are VoCo's B, L
and H (Wu et al. 2024, arXiv:2410.09890). What MONAI does beside the paper, and weights depend on:

- what a stage gives is normalised over channels, without weights, before it is refined; the next
  stage takes it unnormalised;
- a stage is padded with zeros up to whole windows, and the padding is attended to;
- where a stage is no larger than its window along some axis, the window is as long as the stage
  there and is not shifted. Cells then look up their relative positions by their number in the
  smaller window, which in the table of the larger one belongs to other offsets.

The image itself is never padded: sides are multiples of 32, in MONAI as here.

Shape legend: B batch, C channels, D H W cells of a map.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any

import torch
from monai.networks.blocks import UnetOutBlock, UnetrBasicBlock, UnetrUpBlock
from monai.networks.nets.swin_unetr import SwinTransformer, compute_mask, get_window_size
from pydantic import Field
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pretrain.backbones.axes import Axes, turned, turned_back
from pretrain.backbones.backbone import Backbone, divided
from pretrain.masking import triple

Depth = Annotated[int, Field(ge=1, le=64)]
Heads = Annotated[int, Field(ge=1, le=128)]
Window = Annotated[int, Field(ge=1, le=32)]

_WIDTHS = (1, 1, 2, 4, 8, 16)
"""Channels of the maps over the feature size; each map is half as fine as the one before."""


class SwinUNETREncoder(Backbone):
    """The encoder of SwinUNETR: six maps, at strides 1, 2, 4, 8, 16 and 32.

    They are what its decoder takes: the image and the outputs of patch embedding and stages, all
    of them refined by a residual block of convolutions but the fifth, which the decoder takes as
    the third stage gives it. VoCo pools those that are refined. Weights of the transformer alone,
    as SwinUNETR's own pretraining (Tang et al. 2022, arXiv:2111.14791) gives them, are an encoder
    without `refine`: five maps from stride 2 on, as embedding and stages give them.

    Args:
        in_channels: channels of the image.
        feature_size: channels of the finest map.
        depths: window blocks of each stage.
        heads: attention heads of each stage; must divide its channels.
        window: cells of a window, one number or (d, h, w).
        use_v2: begin each stage with a residual block of convolutions.
        refine: have the blocks that refine the maps, and the finest of them.
        axes: codes of the axes that the image is turned to inside, and its maps back from: public
            weights come from images in RAS, and windows, counted from one end, have no other form.
        drop_path: stochastic depth of the last window block, growing linearly from 0.

    Raises:
        ValueError: if heads do not divide the channels of their stage.
    """

    any_size = False  # windows and their shifts follow from it

    def __init__(
        self,
        *,
        in_channels: Annotated[int, Field(ge=1, le=1024)] = 1,
        feature_size: Annotated[int, Field(ge=1, le=1024)] = 48,
        depths: tuple[Depth, Depth, Depth, Depth] = (2, 2, 2, 2),
        heads: tuple[Heads, Heads, Heads, Heads] = (3, 6, 12, 24),
        window: Window | tuple[Window, Window, Window] = 7,
        use_v2: bool = False,
        refine: bool = True,
        axes: Axes = "SPL",
        drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.0,
    ) -> None:
        super().__init__()
        for stage, count in enumerate(heads):
            if (feature_size << stage) % count:
                raise ValueError(
                    f"heads={count} does not divide the {feature_size << stage} channels of its "
                    "stage"
                )
        self.in_channels = in_channels
        self.axes = axes
        first = 0 if refine else 1
        self.refined = (0, 1, 2, 3, 5) if refine else None
        self.channels = tuple(feature_size * width for width in _WIDTHS[first:])
        self.strides = tuple(triple(2**i) for i in range(first, len(_WIDTHS)))
        with _LinspaceOnHost():
            self.swinViT = SwinTransformer(
                in_chans=in_channels,
                embed_dim=feature_size,
                window_size=triple(window),
                patch_size=(2, 2, 2),
                depths=depths,
                num_heads=heads,
                drop_path_rate=drop_path,
                use_v2=use_v2,
            )
        if not refine:
            return
        self.encoder1 = _refine(in_channels, self.channels[0])
        self.encoder2 = _refine(self.channels[1])
        self.encoder3 = _refine(self.channels[2])
        self.encoder4 = _refine(self.channels[3])
        self.encoder10 = _refine(self.channels[5])

    def grids(self, shape: Sequence[int]) -> list[tuple[int, int, int]]:
        """Returns the (d, h, w) size of every feature map for a crop of `shape` voxels.

        Raises:
            ValueError: if 32 does not divide the crop's sides, or leaves a single cell, which
                instance norm cannot normalise.
        """
        return divided(shape, self.strides, "SwinUNETR")

    def forward(self, x: Tensor) -> list[Tensor]:
        """Returns the maps [B, C_i, D_i, H_i, W_i] of an image [B, C, D, H, W]."""
        self.grids(x.shape)
        x = turned(x, self.axes)
        maps = [] if self.refined is None else [self.run(self.encoder1, x)]
        x = self.run(self.swinViT.patch_embed, x)
        maps.append(self._outside(x, "encoder2"))
        names = ("encoder3", "encoder4", "", "encoder10")
        for (convs, stage), name in zip(self._stages(), names, strict=True):
            for conv in convs:
                x = self.run(conv, x)
            x = self._attend(stage, x)
            maps.append(self._outside(x, name))
        return [turned_back(each, self.axes) for each in maps]

    def _outside(self, x: Tensor, block: str) -> Tensor:
        """What the decoder sees of a stage."""
        outside: Tensor = self.swinViT.proj_out(x, normalize=True)
        refines = self.refined is not None and block
        return self.run(self.get_submodule(block), outside) if refines else outside

    def _attend(self, stage: Any, x: Tensor) -> Tensor:
        """The window blocks of a stage, then its merging: [B, C, D, H, W] to half the size.

        Block by block, so that each can be compiled or computed again, and the mask is made once.
        """
        x = x.movedim(1, -1)
        size = x.shape[1:4]
        window, shift = get_window_size(size, stage.window_size, stage.shift_size)
        whole = [-(-n // w) * w for n, w in zip(size, window, strict=True)]
        mask = compute_mask(whole, window, shift, x.device)
        for block in stage.blocks:
            x = self.run(block, x, mask)
        merged: Tensor = self.run(stage.downsample, x)
        return merged.movedim(-1, 1).contiguous()

    def no_weight_decay(self) -> set[str]:
        """Returns the tables of relative positions."""
        table = "relative_position_bias_table"
        return {name for name, _ in self.named_parameters() if name.endswith(table)}

    def compile_parts(self) -> list[nn.Module]:
        """Returns embedding, window blocks, mergings and convolution blocks."""
        refine = [part for name, part in self.named_children() if name.startswith("encoder")]
        stages = [
            part
            for convs, stage in self._stages()
            for part in (*convs, *stage.blocks, stage.downsample)
        ]
        return [self.swinViT.patch_embed, *stages, *refine]

    def layers(self) -> list[list[nn.Module | nn.Parameter]]:
        """Returns the embedding, then the stages, each with the block that refines its output."""
        stages: list[list[nn.Module | nn.Parameter]] = [
            [*convs, stage] for convs, stage in self._stages()
        ]
        if self.refined is None:
            return [[self.swinViT.patch_embed], *stages]
        stages[0].append(self.encoder3)
        stages[1].append(self.encoder4)
        stages[3].append(self.encoder10)
        return [[self.swinViT.patch_embed, self.encoder1, self.encoder2], *stages]

    def own_decoder(self, out_channels: int) -> SwinUNETRDecoder | None:
        """Returns SwinUNETR's decoder, which takes refined maps."""
        if self.refined is None:
            return None
        return SwinUNETRDecoder(channels=self.channels, out_channels=out_channels)

    def _stages(self) -> list[tuple[list[nn.Module], Any]]:
        """Each stage of window blocks, and the convolution blocks before it."""
        swin = self.swinViT
        return [
            ([*getattr(swin, f"layers{n}c")] if swin.use_v2 else [], getattr(swin, f"layers{n}")[0])
            for n in range(1, 5)
        ]


class SwinUNETRDecoder(nn.Module):
    """The decoder of SwinUNETR: transposed convolution, skip, residual block, per map.

    Args:
        channels: channels of the encoder's maps, finest first.
        out_channels: channels of the output.
    """

    def __init__(self, *, channels: Sequence[int], out_channels: int) -> None:
        super().__init__()
        self.out_channels = out_channels
        for number in range(len(channels) - 1, 0, -1):
            up = UnetrUpBlock(
                3, channels[number], channels[number - 1], 3, 2, "instance", res_block=True
            )
            self.add_module(f"decoder{number}", up)
        self.head = UnetOutBlock(3, channels[0], out_channels)

    def forward(self, image: Tensor, features: list[Tensor]) -> Tensor:
        """Decodes six maps, finest first, to [B, out_channels, D, H, W]."""
        x = features[-1]
        for number in range(len(features) - 1, 0, -1):
            x = self.get_submodule(f"decoder{number}")(x, features[number - 1])
        logits: Tensor = self.head(x)
        return logits


def _refine(in_channels: int, out_channels: int | None = None) -> nn.Module:
    block: nn.Module = UnetrBasicBlock(
        3, in_channels, out_channels or in_channels, 3, 1, "instance", res_block=True
    )
    return block


class _LinspaceOnHost(TorchFunctionMode):
    """MONAI reads rates of drop path from a tensor, which under `torch.device("meta")` has none."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        host = {"device": "cpu"} if func is torch.linspace else {}
        return func(*args, **{**(kwargs or {}), **host})
