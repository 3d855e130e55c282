"""Tiles of a map: the channels and pixels of a program, their addresses and their mask.

Kernels get two groups of arguments: ``size``, a `layout.MapSizes`, and ``TILE``, a `heuristics.Tile`. Triton 3.6 and
3.7 do not accept a field of such a group inside a list, so lists are made of local constants.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def program_tile(size, TILE: tl.constexpr):
    """Returns this program's image (int64), channels [BLOCK_C] and pixels [BLOCK_P].

    The last images come first: the previous pass ended with them, so they may still be in the L2 cache.
    """
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    blocks_p = tl.cdiv(size.HW, TILE.BLOCK_P)
    blocks_c = tl.cdiv(size.C, TILE.BLOCK_C)
    n = (pid // blocks_p // blocks_c).to(tl.int64)
    c = (pid // blocks_p % blocks_c) * TILE.BLOCK_C + tl.arange(0, TILE.BLOCK_C)
    p = (pid % blocks_p) * TILE.BLOCK_P + tl.arange(0, TILE.BLOCK_P)
    return n, c, p


@triton.jit
def wide_mask(c, p, C, HW, CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr):
    """Returns the mask [channels, pixels], with a hint that ALIGN neighbours share it: masked loads stay wide."""
    mask = (c < C)[:, None] & (p < HW)[None, :]
    return mask if ALIGN == 1 else tl.max_constancy(mask, [ALIGN, 1] if CHANNELS_LAST else [1, ALIGN])


@triton.jit
def wide_offsets(image, c, p, stride_o, CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr):
    """Returns offsets [channels, pixels], int64, of an image that begins at offset ``image``.

    Triton only knows whether 16 divides a size; the hint tells it that ALIGN divides the start of every row.
    """
    if CHANNELS_LAST:
        offsets = c[:, None] + p[None, :].to(tl.int64) * stride_o
    else:
        offsets = c[:, None].to(tl.int64) * stride_o + p[None, :]
    offsets += image
    # Triton does not compile a hint about a tile of one element.
    return offsets if ALIGN == 1 else tl.multiple_of(offsets, [ALIGN, 1] if CHANNELS_LAST else [1, ALIGN])


@triton.jit
def tile_mask(c, p, size, TILE: tl.constexpr):
    """Returns the mask [BLOCK_C, BLOCK_P] of the elements that exist."""
    return wide_mask(c, p, size.C, size.HW, TILE.CHANNELS_LAST, TILE.ALIGN)


@triton.jit
def x_offsets(n, c, p, size, TILE: tl.constexpr):
    """Returns the tile's offsets in x, which may be a slice of a larger map."""
    return wide_offsets(n * size.stride_n, c, p, size.stride_o, TILE.CHANNELS_LAST, TILE.ALIGN)


@triton.jit
def dense_offsets(n, c, p, size, TILE: tl.constexpr):
    """Returns the tile's offsets in a dense map of x's shape and layout."""
    stride_o = size.C if TILE.CHANNELS_LAST else size.HW
    return wide_offsets(n * size.C * size.HW, c, p, stride_o, TILE.CHANNELS_LAST, TILE.ALIGN)


@triton.jit
def tile_full(value: tl.constexpr, TILE: tl.constexpr, dtype: tl.constexpr):
    """Returns a tile [BLOCK_C, BLOCK_P] of one value."""
    BLOCK_C: tl.constexpr = TILE.BLOCK_C
    BLOCK_P: tl.constexpr = TILE.BLOCK_P
    return tl.full([BLOCK_C, BLOCK_P], value, dtype)


@triton.jit
def load_channels(ptr, n, c, size):
    """Returns the values at channels c of image n, from [N, C]."""
    return tl.load(ptr + n * size.C + c, mask=c < size.C, other=0.0)


@triton.jit
def load_pixels(ptr, n, p, size):
    """Returns the values at pixels p of image n, from [N, HW]."""
    return tl.load(ptr + n * size.HW + p, mask=p < size.HW, other=0.0)


@triton.jit
def bound_if(condition, size):
    """Returns size if the scalar condition holds, else 0: a bound for a mask.

    Triton 3.9's interpreter refuses a mask that is the conjunction of a block and a scalar.
    """
    return tl.where(condition, size, 0)
