"""An image as a cube, and its faces: addresses and masks, and how programs share x.

An image is a cube `[A, B, D]` whose last axis is dense: `[C, H, W]` in nchw, `[H, W, C]` in channels_last. Pooled over
one axis it leaves a face of the other two: `[A, B]`, `[A, D]`, `[B, D]`. Faces `[F]` of an image follow each other in
this order: C and W, H and C, H and W. The last may be left out.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ...core.heuristics import cdiv, next_power_of_2, summed_steps
from ...core.layout import Layout

TILE_BYTES = 8192  # of a tile of x: 32 for each thread of 8 warps, which keep as many elements of the face [B, D]
ROWS = 64  # of a plane [B, D] that a tile has before its rows become shorter than they are
PLANES = 16  # planes [B, D] that are worth a partial result
MOST_PROGRAMS = 512  # programs that are enough: each leaves partial results as large as a plane


class Cube(NamedTuple):
    """The sizes of an image, and the strides of x, that kernels get when they run, as ``size``."""

    A: Any
    B: Any
    D: Any
    stride_n: Any
    stride_a: Any
    stride_b: Any


class FacePartials(NamedTuple):
    """The partial results of each face: blocks of D, blocks of B, shares of A."""

    ab: Any
    ad: Any
    bd: Any


class CubeTile(NamedTuple):
    """A `[BLOCK_A, BLOCK_B, BLOCK_D]` tile, and which faces there are; kernels take it as ``TILE``."""

    CHANNELS_LAST: bool
    SPATIAL: bool
    ROW_ALIGN: int
    BLOCK_A: int
    BLOCK_B: int
    BLOCK_D: int
    num_warps: int


@triton.jit
def face_starts(size, partials_ab, partials_ad, partials_bd, CHANNELS_LAST: tl.constexpr, SPATIAL: tl.constexpr):
    """Returns where an image's faces, of so many partials each, begin and end: [A, B], [A, D], [B, D], end."""
    ab = size.A * size.B * partials_ab
    ad = size.A * size.D * partials_ad
    bd = size.B * size.D * partials_bd
    if CHANNELS_LAST:
        first, second, third = bd + ad, bd, 0
        end = bd + ad + ab if SPATIAL else bd + ad
    else:
        first, second, third = ad, 0, ad + ab
        end = ad + ab + bd if SPATIAL else ad + ab
    return first, second, third, end


@triton.jit
def cube_program(pid, size, TILE: tl.constexpr):
    """Returns a program's image (int64), blocks of B and D, and their elements [BLOCK_B] and [BLOCK_D]."""
    blocks_b = tl.cdiv(size.B, TILE.BLOCK_B)
    blocks_d = tl.cdiv(size.D, TILE.BLOCK_D)
    block_d = pid % blocks_d
    block_b = pid // blocks_d % blocks_b
    b = block_b * TILE.BLOCK_B + tl.arange(0, TILE.BLOCK_B)
    d = block_d * TILE.BLOCK_D + tl.arange(0, TILE.BLOCK_D)
    return (pid // blocks_d // blocks_b).to(tl.int64), block_b, block_d, b, d


@triton.jit
def _wide_offsets(image, a, b, d, stride_a, stride_b, ALIGN: tl.constexpr):
    """Returns offsets [BLOCK_A, BLOCK_B, BLOCK_D], int64, of an image that begins at ``image``; ALIGN divides rows."""
    stride_b = stride_b // ALIGN * ALIGN  # so the compiler sees that ALIGN divides it
    rows = a.to(tl.int64)[:, None, None] * stride_a + b.to(tl.int64)[None, :, None] * stride_b
    offsets = image + (rows + d[None, None, :])
    return offsets if ALIGN == 1 else tl.multiple_of(offsets, [1, 1, ALIGN])


@triton.jit
def cube_offsets(n, a, b, d, size, TILE: tl.constexpr):
    """Returns the tile's offsets in x, which may be a slice of a larger map."""
    return _wide_offsets(n * size.stride_n, a, b, d, size.stride_a, size.stride_b, TILE.ROW_ALIGN)


@triton.jit
def dense_cube_offsets(n, a, b, d, size, TILE: tl.constexpr):
    """Returns the tile's offsets in a dense map of x's shape and layout."""
    D = size.D // TILE.ROW_ALIGN * TILE.ROW_ALIGN
    return _wide_offsets(n * size.A * size.B * D, a, b, d, size.B * D, D, TILE.ROW_ALIGN)


@triton.jit
def cube_mask(a, b, d, size, TILE: tl.constexpr):
    """Returns the mask [BLOCK_A, BLOCK_B, BLOCK_D], with a hint that ROW_ALIGN neighbours share it."""
    ALIGN: tl.constexpr = TILE.ROW_ALIGN
    D = size.D // ALIGN * ALIGN
    mask = (a < size.A)[:, None, None] & (b < size.B)[None, :, None] & (d < D)[None, None, :]
    return mask if ALIGN == 1 else tl.max_constancy(mask, [1, 1, ALIGN])


@triton.jit
def face_offsets(i, j, rows, columns):
    """Returns offsets in a face [rows, columns], and their mask, of rows i and columns j."""
    return i[:, None] * columns + j[None, :], (i < rows)[:, None] & (j < columns)[None, :]


class CubeGrid(NamedTuple):
    """How programs share x: blocks of planes [B, D], and splits of ``steps`` tiles along A."""

    tile: CubeTile
    size: Cube
    programs: int
    splits: int
    steps: int
    partials: FacePartials

    @property
    def several(self) -> bool:
        return max(self.partials) > 1

    def faces(self, partials: FacePartials) -> int:
        """The length of an image's faces of so many partials."""
        A, B, D = self.size[:3]
        ab, ad, bd = A * B * partials.ab, A * D * partials.ad, B * D * partials.bd
        if self.tile.SPATIAL:
            return ab + ad + bd
        return ad + (bd if self.tile.CHANNELS_LAST else ab)


ONE = FacePartials(1, 1, 1)


def cube_grid(layout: Layout, itemsize: int, spatial: bool) -> CubeGrid:
    elements = TILE_BYTES // itemsize
    N, C, H, W = layout[:4]
    if layout.channels_last:
        size = Cube(H, W, C, layout.stride_n, W * layout.stride_o, layout.stride_o)
    else:
        size = Cube(C, H, W, layout.stride_n, layout.stride_o, W)
    A, B, D = size[:3]
    bits = D | size.stride_n | size.stride_a | size.stride_b | 16
    align = bits & -bits
    block_d = min(next_power_of_2(D), elements // min(next_power_of_2(B), ROWS))
    block_b = min(next_power_of_2(B), elements // block_d)
    block_a = min(next_power_of_2(A), elements // (block_d * block_b))
    num_warps = max(block_a * block_b * block_d * itemsize // 1024, 1)
    blocks_b, blocks_d, tiles = cdiv(B, block_b), cdiv(D, block_d), cdiv(A, block_a)
    programs = N * blocks_b * blocks_d
    steps = min(max(cdiv(tiles, cdiv(MOST_PROGRAMS, max(programs, 1))), cdiv(PLANES, block_a)), tiles)
    steps = summed_steps(steps, tiles)
    splits = cdiv(tiles, steps)
    tile = CubeTile(layout.channels_last, spatial, align, block_a, block_b, block_d, num_warps)
    return CubeGrid(tile, size, programs, splits, steps, FacePartials(blocks_d, blocks_b, splits))
