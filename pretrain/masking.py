"""Which parts of a crop are hidden, and the crop as a row of patches.

Masks are bool, True = hidden, and a pure function of the samples' seeds. Every patch or block
order in this package is C order over (depth, height, width). No function here waits for the
device: the number of hidden parts follows from the shape alone, never from a tensor's values.

Shape legend: B batch, C channels, N patches, P = C * pd * ph * pw values of one patch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pretrain.draws import uniform

# The stream of `uniform` that masks draw from; no other use may share it.
MASK_STREAM = 16


def triple(value: int | Sequence[int]) -> tuple[int, int, int]:
    """Returns (d, h, w) from one number for all three axes or from three numbers."""
    if isinstance(value, int):
        return value, value, value
    if len(value) != 3:
        raise ValueError(f"expected one number or three (d, h, w), found {list(value)}")
    d, h, w = (int(v) for v in value)
    return d, h, w


def kept(count: int, ratio: float) -> int:
    """Returns how many of `count` parts stay visible: floor(count * (1 - ratio)).

    In floating point 1000 * (1 - 0.9) is 99.99..., whose floor is 99, so a millionth is added
    before rounding down. At least one part is hidden.

    Raises:
        ValueError: if the ratio is outside (0, 1) or leaves nothing visible.
    """
    if not 0 < ratio < 1:
        raise ValueError(f"the mask ratio must lie between 0 and 1 (both excluded), found {ratio}")
    visible = min(math.floor(count * (1 - ratio) + 1e-6), count - 1)
    if visible == 0:
        raise ValueError(
            f"a mask ratio of {ratio} leaves none of {count} parts visible; "
            "take a larger crop, smaller patches or blocks, or a lower ratio"
        )
    return visible


def random_hidden(seeds: Tensor, grid: Sequence[int], ratio: float) -> Tensor:
    """Hides the same number of parts of a grid in every sample, each sample its own.

    Args:
        seeds: int64 [B].
        grid: parts along (d, h, w), N in all.
        ratio: share to hide; N - floor(N * (1 - ratio)) are.

    Returns:
        bool [B, N], True = hidden.
    """
    count = math.prod(grid)
    noise = uniform(seeds, (count,), MASK_STREAM)
    # Stable, because 24-bit noise has ties on large grids and devices would break them differently.
    order = noise.argsort(dim=1, stable=True)
    hidden = torch.ones_like(noise, dtype=torch.bool)
    return hidden.scatter_(1, order[:, : kept(count, ratio)], False)


def visible_first(hidden: Tensor) -> Tensor:
    """Returns the indices [B, N] that put visible parts first, hidden ones last, both in order."""
    return hidden.to(torch.uint8).argsort(dim=1, stable=True)


def take_rows(rows: Tensor, index: Tensor) -> Tensor:
    """Picks rows of each sample: [B, N, P] at int64 [B, M] gives [B, M, P].

    Whole rows are copied; `gather` and `take_along_dim` would look up each of their values.
    """
    B, N, P = rows.shape
    first = torch.arange(0, B * N, N, device=index.device)[:, None]  # [B, 1]
    return rows.reshape(-1, P).index_select(0, (index + first).flatten()).view(B, index.shape[1], P)


def block_hidden(
    seeds: Tensor, shape: Sequence[int], block: int | Sequence[int], ratio: float
) -> Tensor:
    """Hides whole blocks of voxels. Where blocks do not divide the crop, the last ones are cut.

    Args:
        seeds: int64 [B].
        shape: voxels of the crop along (d, h, w).
        block: voxels of a block, one number or (d, h, w).
        ratio: share of the blocks to hide.

    Returns:
        bool [B, 1, D, H, W], True = hidden.
    """
    d, h, w = shape
    bd, bh, bw = triple(block)
    grid = -(-d // bd), -(-h // bh), -(-w // bw)
    voxels = spread(random_hidden(seeds, grid, ratio), grid, (bd, bh, bw))
    return voxels[:, :, :d, :h, :w]


def spread(hidden: Tensor, grid: Sequence[int], block: Sequence[int]) -> Tensor:
    """Gives every voxel the mark of its part: [B, N] in C order of the grid to [B, 1, D, H, W]."""
    return enlarge(hidden.view(-1, 1, *grid), block)


def enlarge(cells: Tensor, factor: int | Sequence[int]) -> Tensor:
    """Repeats each cell of [B, C, D, H, W] `factor` times along (d, h, w), as nearest does."""
    B, C, D, H, W = cells.shape
    fd, fh, fw = triple(factor)
    repeated = cells[:, :, :, None, :, None, :, None].expand(B, C, D, fd, H, fh, W, fw)
    return repeated.reshape(B, C, D * fd, H * fh, W * fw)


def patchify(volume: Tensor, patch: Sequence[int]) -> Tensor:
    """Cuts [B, C, D, H, W] into [B, N, P]; within a patch the order is (C, pd, ph, pw).

    That is the order of a convolution's weight, so a patch embedding is one matrix product.
    """
    B, C, D, H, W = volume.shape
    pd, ph, pw = patch
    x = volume.reshape(B, C, D // pd, pd, H // ph, ph, W // pw, pw)
    return x.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(B, -1, C * pd * ph * pw)


def unpatchify(patches: Tensor, grid: Sequence[int], patch: Sequence[int]) -> Tensor:
    """Inverts `patchify`: [B, N, P] on a grid of (d, h, w) patches to [B, C, D, H, W]."""
    gd, gh, gw = grid
    pd, ph, pw = patch
    x = patches.reshape(len(patches), gd, gh, gw, -1, pd, ph, pw)
    return x.permute(0, 4, 1, 5, 2, 6, 3, 7).reshape(len(patches), -1, gd * pd, gh * ph, gw * pw)


def shown(image: Tensor, hidden: Tensor, output: Tensor) -> dict[str, Tensor]:
    """What a preview shows of an image [B, C, D, H, W] that was hidden and rebuilt.

    "input", "visible" (hidden voxels NaN) and "output": the prediction where the mask hides, and
    the image elsewhere.
    """
    return {
        "input": image,
        "visible": image.masked_fill(hidden, torch.nan),
        "output": torch.where(hidden, output.float(), image),
    }
