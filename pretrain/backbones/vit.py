"""Vision transformer over 3D patches.

Dosovitskiy et al. 2020, arXiv:2010.11929, on timm's blocks (pre-norm, fused attention), with the
fixed sine-cosine position of MAE (He et al. 2021, arXiv:2111.06377) extended to three axes. Its
options reach to Primus (Wald et al. 2025, arXiv:2503.01835): rotary position (Su et al. 2021,
arXiv:2104.09864) along three axes, a learned position, SwiGLU (Shazeer 2020, arXiv:2002.05202),
layer scale (Touvron et al. 2021, arXiv:2103.17239) and norms inside attention and MLP, in the
blocks of EVA-02 (Fang et al. 2023, arXiv:2303.11331).

Every part that needs an order of tokens takes it from the grid's C order over (d, h, w).

Shape legend: B batch, C channels, N = gd*gh*gw patches, V visible ones, P = C*pd*ph*pw values of a
patch, E width, K prefix tokens, A width of an attention head.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

import torch
from pydantic import Field
from timm.models.eva import EvaBlock
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional as F

from data_prep.errors import InputError
from pretrain.backbones.backbone import Backbone, fitting_crop
from pretrain.masking import patchify, spread, take_rows, triple, visible_first

Side = Annotated[int, Field(ge=1, le=64)]
"""Voxels of a patch along an axis."""

Cells = Annotated[int, Field(ge=1, le=256)]
"""Patches of a reference grid along an axis."""


def _angles(grid: Sequence[int], count: int, device: torch.device | None) -> Tensor:
    """Place of every cell times each of `count` frequencies 10000^(-i / count), per axis.

    Returns:
        float32 [N, 3, count], rows in C order of the grid.
    """
    steps = torch.arange(count, device=device, dtype=torch.float32)
    omega = torch.exp(steps * (-math.log(10000.0) / count))
    axes = [torch.arange(size, device=device, dtype=torch.float32) for size in grid]
    cells = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(-1, 3)
    return cells[:, :, None] * omega


def sincos_position(grid: Sequence[int], dim: int, device: torch.device | None = None) -> Tensor:
    """Fixed position of every cell of a (d, h, w) grid, in cells, by sines and cosines.

    Each axis takes dim // 6 frequencies 10000^(-i / (dim // 6)): first their sines, then their
    cosines; the axes follow each other as d, h, w. What a width not divisible by 6 leaves over
    stays zero, so any width works.

    Returns:
        float32 [N, dim], rows in C order of the grid.
    """
    count = dim // 6
    if count == 0:
        raise ValueError(f"a 3D sine-cosine position needs a width of 6 or more, found {dim}")
    angle = _angles(grid, count, device)  # [N, 3, count]
    position = torch.cat([angle.sin(), angle.cos()], dim=-1).flatten(1)
    return F.pad(position, (0, dim - 6 * count))


def rotary_table(grid: Sequence[int], head_dim: int, device: torch.device | None = None) -> Tensor:
    """Sines and cosines by which attention turns the queries and keys of every cell of a grid.

    Neighbouring channels form pairs; each axis turns head_dim // 6 of them, by the place in cells
    times frequencies 10000^(-i / (head_dim // 6)), the axes one after the other as d, h, w. What a
    head's width leaves over is not turned. A dot product of two turned tokens depends on where
    they lie relative to each other alone.

    Returns:
        float32 [N, 2 * head_dim]: sines, then cosines, rows in C order of the grid.
    """
    count = head_dim // 6
    angle = _angles(grid, count, device).flatten(1).repeat_interleave(2, dim=1)
    angle = F.pad(angle, (0, head_dim - 6 * count))
    return torch.cat([angle.sin(), angle.cos()], dim=1)


class Position(nn.Module):
    """What is added to a patch's embedding to tell where the patch lies.

    Args:
        kind: sincos is `sincos_position`, learned a vector per cell of a reference grid, none zero.
        dim: width E.
        grid: the reference grid (d, h, w) of a learned position; other grids interpolate in it.
    """

    def __init__(
        self,
        kind: Literal["sincos", "learned", "none"],
        dim: int,
        grid: tuple[int, int, int] | None = None,
    ) -> None:
        super().__init__()
        self.kind = kind
        self.dim = dim
        self.grid = grid
        self.weight = None if grid is None else nn.Parameter(torch.empty(*grid, dim))
        if self.weight is not None:
            nn.init.trunc_normal_(self.weight, std=0.02)

    def no_weight_decay(self) -> set[str]:
        """Positions do not decay."""
        return set() if self.weight is None else {"weight"}

    def forward(self, grid: Sequence[int], device: torch.device) -> Tensor:
        """Returns [N, E] for a grid of any size; a learned one trilinear between cell centres."""
        if self.kind == "sincos":
            return sincos_position(grid, self.dim, device)
        if self.weight is None:
            return torch.zeros(math.prod(grid), self.dim, device=device)
        maps = self.weight.permute(3, 0, 1, 2)[None]  # [1, E, gd, gh, gw]
        # Where it is exported, the grid has no numbers to compare; at its own it is an identity.
        if torch.compiler.is_compiling() or tuple(maps.shape[2:]) != tuple(grid):
            maps = F.interpolate(maps, size=tuple(grid), mode="trilinear", align_corners=False)
        return maps[0].flatten(1).T


class ChannelNorm(nn.Module):
    """Layer norm over the channels of each voxel alone, so that nothing spreads in space."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Maps [B, C, D, H, W] to the same shape."""
        last = F.layer_norm(x.movedim(1, -1), self.weight.shape, self.weight, self.bias, 1e-6)
        return last.movedim(-1, 1)


class PatchEmbed(nn.Module):
    """A convolution whose stride is its kernel, computed as a matrix product over patches.

    The weight keeps a convolution's name and shape (`proj.weight` [E, C, pd, ph, pw]), and only
    the patches that are asked for are embedded.
    """

    def __init__(self, in_channels: int, embed_dim: int, patch_size: tuple[int, int, int]) -> None:
        super().__init__()
        self.proj = nn.Conv3d(in_channels, embed_dim, patch_size, patch_size)
        init_as_linear(self.proj)

    def forward(self, patches: Tensor) -> Tensor:
        """Embeds [B, N, P] as [B, N, E]."""
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


class ConvStem(nn.Module):
    """Strided convolutions in place of one linear map per patch.

    Xiao et al. 2021, "Early convolutions help transformers see better", arXiv:2106.14881. Each
    stage halves the axes that still can be halved (kernel 3 there, 1 along the others); what is
    left of a side that is no power of two falls to the last, linear convolution. The paper's batch
    norms are layer norms over channels here: a norm over space would carry what is hidden.
    """

    def __init__(self, in_channels: int, embed_dim: int, patch_size: tuple[int, int, int]) -> None:
        super().__init__()
        rest = list(patch_size)
        steps = []
        while any(side % 2 == 0 for side in rest):
            steps.append(triple([2 if side % 2 == 0 else 1 for side in rest]))
            rest = [side // step for side, step in zip(rest, steps[-1], strict=True)]
        layers: list[nn.Module] = []
        width = in_channels
        for i, step in enumerate(steps):
            source, width = width, max(8, embed_dim >> (len(steps) - 1 - i))
            kernel = triple([2 * s - 1 for s in step])
            pad = triple([k // 2 for k in kernel])
            layers += [nn.Conv3d(source, width, kernel, step, pad), ChannelNorm(width), nn.GELU()]
        self.convs = nn.Sequential(*layers)
        self.proj = nn.Conv3d(width, embed_dim, triple(rest), triple(rest))
        for layer in layers:
            if isinstance(layer, nn.Conv3d):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        init_as_linear(self.proj)

    def forward(self, x: Tensor) -> Tensor:
        """Embeds an image [B, C, D, H, W] as [B, N, E]."""
        return self.proj(self.convs(x)).flatten(2).transpose(1, 2)


@dataclass(frozen=True)
class BlockKind:
    """What a transformer block is made of; a decoder can have blocks of its encoder's kind.

    Plain blocks are timm's `Block`. Rotary position, SwiGLU or inner norms take its `EvaBlock`,
    whose keys have no bias and whose weights begin as EVA's do.
    """

    num_heads: int
    mlp_ratio: float = 4.0
    mlp: Literal["gelu", "swiglu"] = "gelu"
    rope: bool = False
    inner_norm: bool = False
    layer_scale: float | None = None
    qkv_bias: bool = True
    norm_eps: float = 1e-6

    def norm(self, width: int) -> nn.LayerNorm:
        """The norm behind the last block."""
        return nn.LayerNorm(width, eps=self.norm_eps)

    def blocks(self, width: int, drop_path: Sequence[float], prefix_tokens: int) -> nn.ModuleList:
        """Returns initialised blocks, one for each rate of stochastic depth."""
        norm = partial(nn.LayerNorm, eps=self.norm_eps)
        if not (self.rope or self.inner_norm or self.mlp == "swiglu"):
            plain = nn.ModuleList(
                Block(
                    width,
                    self.num_heads,
                    self.mlp_ratio,
                    qkv_bias=self.qkv_bias,
                    init_values=self.layer_scale,
                    drop_path=rate,
                    norm_layer=norm,
                )
                for rate in drop_path
            )
            return plain.apply(init_transformer)
        blocks = nn.ModuleList(
            EvaBlock(
                width,
                self.num_heads,
                qkv_bias=self.qkv_bias,
                qkv_fused=False,
                mlp_ratio=self.mlp_ratio,
                swiglu_mlp=self.mlp == "swiglu",
                scale_mlp=self.inner_norm,
                scale_attn_inner=self.inner_norm,
                num_prefix_tokens=prefix_tokens,
                drop_path=rate,
                init_values=self.layer_scale,
                norm_layer=norm,
            )
            for rate in drop_path
        )
        for number, block in enumerate(blocks, start=1):
            _init_eva(block, number)
        return blocks

    def rotary(self, grid: Sequence[int], width: int, device: torch.device) -> tuple[Tensor, ...]:
        """What blocks take beside the tokens of a whole grid: (table [N, 2 A],) or nothing."""
        return (rotary_table(grid, width // self.num_heads, device),) if self.rope else ()


class TokenBackbone(Backbone):
    """A transformer over patches: what objectives on tokens and decoders of tokens ask for.

    The feature maps are the outputs of the tapped blocks, shallow to deep, all at the stride of the
    patch. Subclasses set the attributes and implement `embed_patches`, `prefix` and, if they have
    one, `position` and `rotary`.
    """

    patch_size: tuple[int, int, int]
    """Voxels of a patch along (d, h, w)."""

    embed_dim: int
    """Width E."""

    prefix_tokens: int
    """K tokens before those of the patches; a CLS token is the first."""

    taps: tuple[int, ...]
    """1-based numbers of the blocks whose outputs are the feature maps."""

    normed_taps: bool = False
    """Whether all feature maps pass the final norm, or the deepest one alone."""

    decoder: Literal["unetr", "patch"] = "unetr"
    """What finetuning decodes the maps with."""

    patch_embed: nn.Module
    blocks: nn.ModuleList
    norm: nn.Module

    def embed_patches(
        self,
        x: Tensor,
        grid: tuple[int, int, int],
        hidden: Tensor | None,
        visible: Tensor | None,
    ) -> Tensor:
        """Embeds patches as [B, V, E], or all as [B, N, E]; hidden voxels are never read.

        Args:
            x: image [B, C, D, H, W].
            grid: its patches.
            hidden: bool [B, N], True = hidden.
            visible: int64 [B, V], the patches to embed; None: all.
        """
        raise NotImplementedError

    def prefix(self) -> list[nn.Parameter]:
        """Returns the K prefix tokens in their order, in tensors whose last axis is E."""
        raise NotImplementedError

    def position(self, grid: Sequence[int], device: torch.device) -> Tensor | None:
        """Returns [N, E] to add to the embedded patches of a whole grid, if there is any."""
        return None

    def rotary(self, grid: Sequence[int], device: torch.device) -> tuple[Tensor, ...]:
        """Returns what blocks take beside the tokens of a whole grid: a table [N, ...] or none."""
        return ()

    def grid(self, shape: Sequence[int]) -> tuple[int, int, int]:
        """Returns the patches along (d, h, w) of a crop of `shape` voxels.

        Raises:
            ValueError: if the patch does not divide the crop.
        """
        size = tuple(shape[-3:])  # not cast: where it is exported, a size has no number yet
        if any(s < p or s % p for s, p in zip(size, self.patch_size, strict=True)):
            raise ValueError(
                f"a crop of {list(size)} voxels cannot be cut into patches of "
                f"{list(self.patch_size)}; sides are (d, h, w) and must be multiples, for example "
                f"{fitting_crop(size, self.patch_size)}"
            )
        d, h, w = (s // p for s, p in zip(size, self.patch_size, strict=True))
        return d, h, w

    def grids(self, shape: Sequence[int]) -> list[tuple[int, int, int]]:
        """Returns the size of each feature map, which is that of the grid for all of them."""
        return [self.grid(shape)] * len(self.taps)

    def tokens(
        self,
        x: Tensor,
        hidden: Tensor | None = None,
        keep: int | None = None,
        mask_token: Tensor | None = None,
    ) -> Tensor:
        """Encodes the visible patches, or all with a token in place of the hidden ones.

        Hidden voxels are never read.

        Args:
            x: image [B, C, D, H, W].
            hidden: bool [B, N], True = hidden; None hides none. Without a mask token equally many
                must be hidden in every sample.
            keep: number V of visible patches. Without it and without a mask token the number is
                read from the mask, for which the host waits for the device.
            mask_token: [E], put in place of a hidden patch's embedding before its position is
                added.

        Returns:
            Tokens after the final norm, prefix first, patches in grid order: [B, K + V, E], or
            [B, K + N, E] with a mask token.
        """
        return self.encode(x, hidden, keep, mask_token)[0]

    def encode(
        self,
        x: Tensor,
        hidden: Tensor | None = None,
        keep: int | None = None,
        mask_token: Tensor | None = None,
        blocks: Sequence[int] = (),
    ) -> tuple[Tensor, list[Tensor]]:
        """Does what `tokens` does, and returns outputs on the way as well.

        Args:
            x: image, as the arguments that follow, of `tokens`.
            hidden: which patches are hidden.
            keep: number of visible patches.
            mask_token: for hidden patches.
            blocks: 1-based numbers of blocks, rising.

        Returns:
            The tokens after the final norm, and the outputs of the named blocks before any norm,
            all of one shape.
        """
        tokens, outputs = self._run_blocks(*self._embed(x, hidden, keep, mask_token), blocks)
        return self.norm(tokens), outputs

    def forward(self, x: Tensor) -> list[Tensor]:
        """Returns the tapped feature maps [B, E, gd, gh, gw], shallow to deep."""
        return self.maps_and_prefix(x)[0]

    def maps_and_prefix(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        """Returns what `forward` does, and the prefix tokens [B, K, E] after the final norm."""
        grid = self.grid(x.shape)
        _, maps = self._run_blocks(*self._embed(x, None, None, None), self.taps)
        first = 0 if self.normed_taps else len(maps) - 1
        maps[first:] = [self.norm(tokens) for tokens in maps[first:]]
        patches = [
            tokens[:, self.prefix_tokens :].transpose(1, 2).unflatten(2, grid) for tokens in maps
        ]
        return patches, maps[-1][:, : self.prefix_tokens]

    def compile_parts(self) -> list[nn.Module]:
        """Returns the blocks: alike, so that one compilation serves all of them."""
        return list(self.blocks)

    def layers(self) -> list[list[nn.Module | nn.Parameter]]:
        """Returns the embedding with the prefix tokens, then the blocks.

        The final norm belongs to the last block.
        """
        blocks: list[list[nn.Module | nn.Parameter]] = [[block] for block in self.blocks]
        blocks[-1].append(self.norm)
        return [[self.patch_embed, *self.prefix()], *blocks]

    def _run_blocks(
        self, tokens: Tensor, rotary: tuple[Tensor, ...], taps: Sequence[int]
    ) -> tuple[Tensor, list[Tensor]]:
        outputs: list[Tensor] = []
        for number, block in enumerate(self.blocks, start=1):
            tokens = self.run(block, tokens, *rotary)
            outputs += [tokens] * taps.count(number)
        return tokens, outputs

    def _embed(
        self, x: Tensor, hidden: Tensor | None, keep: int | None, mask_token: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The blocks' input: tokens [B, K + V, E] and what turns them, if anything does."""
        grid = self.grid(x.shape)
        visible = None
        if hidden is not None and mask_token is None:
            if keep is None:
                keep = int((~hidden[0]).sum())
            visible = visible_first(hidden)[:, :keep]  # [B, V]
        tokens = self.embed_patches(x, grid, hidden, visible)
        if hidden is not None and mask_token is not None:
            tokens = torch.where(hidden[:, :, None], mask_token.to(tokens.dtype), tokens)

        # Each token keeps the place of its own patch, whichever others are left out.
        rotary = self.rotary(grid, x.device)
        if visible is not None:
            rotary = tuple(table[visible][:, None] for table in rotary)  # [B, 1, V, 2 A]
        position = self.position(grid, x.device)  # [N, E]
        if position is not None:
            tokens = tokens + (position if visible is None else position[visible])
        prefix = [
            token.to(tokens.dtype).view(1, -1, self.embed_dim).expand(x.shape[0], -1, -1)
            for token in self.prefix()
        ]
        return torch.cat([*prefix, tokens], dim=1) if prefix else tokens, rotary


class ViT3D(TokenBackbone):
    """3D vision transformer for crops of any shape that its patch divides.

    One set of weights serves all crop sizes: fixed and rotary positions follow from the grid, a
    learned one is interpolated. The feature maps are the outputs of four blocks, shallow to deep,
    all at the stride of the patch; the deepest one passes the final norm, as the tokens do. Slices
    are crops of one voxel: patch [1, 16, 16] makes a 2D ViT of it.

    Args:
        in_channels: channels of the image.
        patch_size: voxels of a patch, one number or (d, h, w).
        embed_dim: width E.
        depth: number of blocks.
        num_heads: attention heads; must divide the width.
        mlp_ratio: hidden width of a block's MLP over E.
        drop_path: stochastic depth of the last block.
        drop_path_rule: linear grows to `drop_path` from 0 at the first block; uniform has it in
            all blocks.
        cls_token: prepend one learned token without position.
        register_tokens: learned tokens without position that follow the CLS token (Darcet et al.
            2023, arXiv:2309.16588).
        taps: 1-based numbers of the blocks whose outputs are the feature maps; default: at a
            quarter, half, three quarters and the whole of the depth.
        position: what is added to a patch's embedding: sincos (fixed), learned, or none.
        position_grid: patches (d, h, w) for which a learned position has a vector each.
        rope: turn the patches' queries and keys by their place; prefix tokens are not turned.
        mlp: gelu, or swiglu, which has three matrices of the hidden width.
        inner_norm: a norm before the last map of attention and of the MLP.
        layer_scale: initial value of a learned factor per channel on each branch; None: no factor.
        qkv_bias: whether the maps to queries, keys and values have biases.
        norm_eps: added to the variance in all norms of blocks and behind them.
        stem: linear embeds each patch by itself; conv lets neighbours in, but no hidden voxel.
        decoder: what finetuning decodes the maps with: unetr, or patch, the deepest map alone by
            transposed convolutions, as published with Primus.

    Raises:
        ValueError: if heads do not divide the width or are too narrow to turn, a tap is not a
            block, or a learned position lacks its grid.
    """

    def __init__(
        self,
        *,
        in_channels: Annotated[int, Field(ge=1, le=1024)] = 1,
        patch_size: Side | tuple[Side, Side, Side] = 16,
        embed_dim: Annotated[int, Field(ge=6, le=8192)] = 384,
        depth: Annotated[int, Field(ge=1, le=128)] = 12,
        num_heads: Annotated[int, Field(ge=1, le=128)] = 6,
        mlp_ratio: Annotated[float, Field(gt=0, le=16)] = 4.0,
        drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.0,
        drop_path_rule: Literal["linear", "uniform"] = "linear",
        cls_token: bool = False,
        register_tokens: Annotated[int, Field(ge=0, le=64)] = 0,
        taps: Annotated[tuple[int, ...], Field(min_length=1, max_length=32)] | None = None,
        position: Literal["sincos", "learned", "none"] = "sincos",
        position_grid: tuple[Cells, Cells, Cells] | None = None,
        rope: bool = False,
        mlp: Literal["gelu", "swiglu"] = "gelu",
        inner_norm: bool = False,
        layer_scale: Annotated[float, Field(gt=0, le=10)] | None = None,
        qkv_bias: bool = True,
        norm_eps: Annotated[float, Field(gt=0, le=1e-2)] = 1e-6,
        stem: Literal["linear", "conv"] = "linear",
        decoder: Literal["unetr", "patch"] = "unetr",
    ) -> None:
        super().__init__()
        if embed_dim % num_heads:
            raise ValueError(f"num_heads={num_heads} does not divide embed_dim={embed_dim}")
        head_dim = embed_dim // num_heads
        if rope and (head_dim < 6 or head_dim % 2):
            raise ValueError(
                f"rope turns pairs of channels along three axes and a head has {head_dim}: "
                "embed_dim / num_heads must be even and 6 or more"
            )
        if (position == "learned") != (position_grid is not None):
            raise ValueError(
                f"position={position} with position_grid={position_grid}: a learned position, and "
                "no other, needs the grid of patches that it is learned for, such as [6, 6, 6]"
            )
        self.taps = tapped_blocks(taps, depth)
        if decoder == "patch" and any(side & (side - 1) for side in triple(patch_size)):
            raise ValueError(
                f"decoder=patch doubles its way up and needs sides that are powers of two, found "
                f"patch_size={patch_size}; decoder=unetr takes any"
            )
        self.in_channels = in_channels
        self.patch_size = triple(patch_size)
        self.embed_dim = embed_dim
        self.prefix_tokens = int(cls_token) + register_tokens
        self.channels = (embed_dim,) * len(self.taps)
        self.strides = (self.patch_size,) * len(self.taps)
        self.decoder = decoder
        self.kind = BlockKind(
            num_heads, mlp_ratio, mlp, rope, inner_norm, layer_scale, qkv_bias, norm_eps
        )

        embed = ConvStem if stem == "conv" else PatchEmbed
        self.patch_embed = embed(in_channels, embed_dim, self.patch_size)
        self.cls_token = nn.Parameter(torch.empty(embed_dim)) if cls_token else None
        self.register_tokens = (
            nn.Parameter(torch.empty(register_tokens, embed_dim)) if register_tokens else None
        )
        self.pos_embed = Position(position, embed_dim, position_grid)
        linear = [drop_path * i / max(depth - 1, 1) for i in range(depth)]
        rates = linear if drop_path_rule == "linear" else [drop_path] * depth
        self.blocks = self.kind.blocks(embed_dim, rates, self.prefix_tokens)
        self.norm = self.kind.norm(embed_dim)
        for token in (self.cls_token, self.register_tokens):
            if token is not None:
                nn.init.normal_(token, std=0.02)

    def no_weight_decay(self) -> set[str]:
        """Returns the register tokens; a learned position answers for itself."""
        return {"register_tokens"} if self.register_tokens is not None else set()

    def layers(self) -> list[list[nn.Module | nn.Parameter]]:
        """Returns what every transformer over patches does; positions are of the first layer."""
        first, *blocks = super().layers()
        return [[*first, self.pos_embed], *blocks]

    def prefix(self) -> list[nn.Parameter]:
        """Returns the CLS token, then the register tokens, as far as there are any."""
        return [t for t in (self.cls_token, self.register_tokens) if t is not None]

    def position(self, grid: Sequence[int], device: torch.device) -> Tensor:
        """Returns the position [N, E] that is added to the patches of a grid."""
        position: Tensor = self.pos_embed(grid, device)
        return position

    def rotary(self, grid: Sequence[int], device: torch.device) -> tuple[Tensor, ...]:
        """Returns (table [N, 2 A],), or nothing without a rotary position."""
        return self.kind.rotary(grid, self.embed_dim, device)

    def embed_patches(
        self,
        x: Tensor,
        grid: tuple[int, int, int],
        hidden: Tensor | None,
        visible: Tensor | None,
    ) -> Tensor:
        """Embeds patches as [B, V, E]; hidden voxels are left out or zero before anything else."""
        if isinstance(self.patch_embed, ConvStem):
            if hidden is not None:
                x = x.masked_fill(spread(hidden, grid, self.patch_size), 0.0)
            tokens = self.patch_embed(x)
            return tokens if visible is None else take_rows(tokens, visible)
        patches = patchify(x, self.patch_size)
        if visible is not None:
            patches = take_rows(patches, visible)
        elif hidden is not None:
            patches = patches.masked_fill(hidden[:, :, None], 0.0)
        return self.patch_embed(patches)


def as_tokens(encoder: Backbone, objective: str) -> TokenBackbone:
    """The encoder, for an objective that works on tokens.

    Raises:
        InputError: if it has none.
    """
    if not isinstance(encoder, TokenBackbone):
        raise InputError(
            f"objective={objective} encodes tokens and {type(encoder).__name__} has none: "
            "choose a ViT, such as backbone=vit_s, or objective=cnn_mae"
        )
    return encoder


def as_vit(encoder: Backbone, objective: str) -> ViT3D:
    """The encoder, for an objective that builds on its kind of blocks and positions.

    Raises:
        InputError: if it is another.
    """
    encoder = as_tokens(encoder, objective)
    if not isinstance(encoder, ViT3D):
        raise InputError(
            f"objective={objective} continues the encoder with blocks and positions of its kind, "
            f"which {type(encoder).__name__} does not give: choose another ViT, such as "
            "backbone=vit_s, or objective=mae"
        )
    return encoder


def init_transformer(module: nn.Module) -> None:
    """Initialises linear layers as MAE does: Xavier-uniform weights, zero biases."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def init_as_linear(conv: nn.Conv3d) -> None:
    """Initialises a convolution as MAE does: like the linear map over patches that it is."""
    nn.init.xavier_uniform_(conv.weight.data.view(len(conv.weight), -1))
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)


def _init_eva(block: EvaBlock, number: int) -> None:
    """EVA's start: narrow weights, and the maps back to the residual narrower with depth."""
    for module in block.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    with torch.no_grad():
        block.attn.proj.weight.div_(math.sqrt(2.0 * number))
        block.mlp.fc2.weight.div_(math.sqrt(2.0 * number))


def tapped_blocks(taps: Sequence[int] | None, depth: int) -> tuple[int, ...]:
    """1-based numbers of the blocks to tap; by default at each quarter of the depth.

    A network of fewer than four blocks repeats some: decoders count on four maps.

    Raises:
        ValueError: if they do not rise to the last block.
    """
    found = tuple(taps) if taps else tuple(max(1, -(-depth * i // 4)) for i in range(1, 5))
    if sorted(found) != list(found) or found[0] < 1 or found[-1] != depth:
        raise ValueError(
            f"taps must rise from 1 or more to depth={depth}, or blocks behind the last one "
            f"would learn nothing; found {list(found)}"
        )
    return found
