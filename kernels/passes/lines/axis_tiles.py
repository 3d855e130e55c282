"""Tiles of the passes along H and W: addresses and masks, and how programs share x.

A plane is seen as `[groups, J]`: a group is G image rows, J = G W elements, as many as it takes for every group to
start aligned. 28 columns of bfloat16 are 56 bytes, two rows 112, a multiple of 16.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ...core.heuristics import PROGRAMS, cdiv, next_power_of_2, summed_steps
from ...core.layout import Layout, canonical

# A tile is one warp's if its loads are wide: no sum over an axis waits for other warps, and a plane's addresses and its
# end are paid for once, which with four warps take as long as its elements.
ELEMENTS = 1024  # of a tile
MOST_PROGRAMS = 4 * PROGRAMS  # programs of so many elements that are enough, as each is small
MIN_ROWS, MIN_PLANE_ROWS = 8, 64  # image rows that are worth a partial result: with the channels inside, and in a plane
WIDEST = 512  # elements of a group in one tile


class AxisSizes(NamedTuple):
    """The sizes and strides of x `[N, C, H, W]` that kernels get when they run, as ``size``."""

    C: Any
    H: Any
    W: Any
    stride_n: Any
    stride_o: Any  # of the outer axis of C and H * W


class AxisTile(NamedTuple):
    """A `[BLOCK_C, BLOCK_R, BLOCK_J]` tile of channels, groups and elements of a group; kernels take it as ``TILE``."""

    CHANNELS_LAST: bool
    ALIGN: int
    G: int
    BLOCK_C: int
    BLOCK_R: int
    BLOCK_J: int
    num_warps: int


@triton.jit
def group_length(W, TILE: tl.constexpr):
    """Returns J, in nchw as a multiple of ALIGN that the compiler sees."""
    return W if TILE.CHANNELS_LAST else W * TILE.G // TILE.ALIGN * TILE.ALIGN


@triton.jit
def axis_program(pid, C, J, TILE: tl.constexpr):
    """Returns a program's image (int64), block of a group's elements, channels [BLOCK_C] and elements [BLOCK_J]."""
    blocks_j = tl.cdiv(J, TILE.BLOCK_J)
    blocks_c = tl.cdiv(C, TILE.BLOCK_C)
    block = pid % blocks_j
    c = (pid // blocks_j % blocks_c) * TILE.BLOCK_C + tl.arange(0, TILE.BLOCK_C)
    return (pid // blocks_j // blocks_c).to(tl.int64), block, c, block * TILE.BLOCK_J + tl.arange(0, TILE.BLOCK_J)


@triton.jit
def axis_offsets(image, c, r, j, J, stride_o, TILE: tl.constexpr):
    """Returns offsets [BLOCK_C, BLOCK_R, BLOCK_J] of an image, int64; see `tiles.wide_offsets`."""
    ALIGN: tl.constexpr = TILE.ALIGN
    p = r[None, :, None] * J + j[None, None, :]
    if TILE.CHANNELS_LAST:
        offsets = image + (c[:, None, None] + p.to(tl.int64) * stride_o)
    else:
        offsets = image + (c[:, None, None].to(tl.int64) * stride_o + p)
    return offsets if ALIGN == 1 else tl.multiple_of(offsets, [ALIGN, 1, 1] if TILE.CHANNELS_LAST else [1, 1, ALIGN])


@triton.jit
def dense_axis_offsets(n, c, r, j, J, groups, size, TILE: tl.constexpr):
    """Returns the tile's offsets in a dense map of x's shape and layout."""
    stride_o = size.C if TILE.CHANNELS_LAST else groups * J
    return axis_offsets(n * size.C * (groups * J), c, r, j, J, stride_o, TILE)


@triton.jit
def axis_mask(c, r, j, C, groups, J, TILE: tl.constexpr):
    ALIGN: tl.constexpr = TILE.ALIGN
    mask = (c < C)[:, None, None] & (r < groups)[None, :, None] & (j < J)[None, None, :]
    return mask if ALIGN == 1 else tl.max_constancy(mask, [ALIGN, 1, 1] if TILE.CHANNELS_LAST else [1, 1, ALIGN])


@triton.jit
def line_offsets(c, line, size, CHANNELS_LAST: tl.constexpr):
    """Returns offsets [BLOCK_C, lines] of lines inside an image, int64."""
    if CHANNELS_LAST:
        return c[:, None] + line[None, :].to(tl.int64) * size.C
    return c[:, None].to(tl.int64) * (size.H + size.W) + line[None, :]


@triton.jit
def load_columns(ptr, c, j, J, size, TILE: tl.constexpr):
    """Loads the columns' values of a group's elements, [BLOCK_C, 1, BLOCK_J]."""
    offsets = line_offsets(c, size.H + (j if TILE.G == 1 else j % size.W), size, TILE.CHANNELS_LAST)
    return tl.load(ptr + offsets, mask=(c < size.C)[:, None] & (j < J)[None, :], other=0.0)[:, None, :]


@triton.jit
def load_rows(ptr, c, r, j, size, TILE: tl.constexpr):
    """Loads the rows' values, [BLOCK_C, BLOCK_R, 1], or for groups of several rows [BLOCK_C, BLOCK_R, BLOCK_J]."""
    G: tl.constexpr = TILE.G
    mask = (c < size.C)[:, None] & (r * G < size.H)[None, :]
    values = tl.load(ptr + line_offsets(c, r * G, size, TILE.CHANNELS_LAST), mask=mask, other=0.0)[:, :, None]
    for k in tl.static_range(1, G):
        offsets = line_offsets(c, r * G + k, size, TILE.CHANNELS_LAST)
        later = tl.load(ptr + offsets, mask=mask, other=0.0)[:, :, None]
        values = tl.where((j // size.W >= k)[None, None, :], later, values)
    return values


class AxisGrid(NamedTuple):
    """How programs share x: blocks of channels and of a group's elements, splits of `steps` tiles along the groups."""

    tile: AxisTile
    programs: int
    splits: int
    steps: int
    blocks_j: int

    @property
    def partials(self) -> int:
        """Partial sums of a line: a row has one for each block, a column one for each split and row of a group."""
        return max(self.blocks_j, self.splits * self.tile.G)


def axis_grid(layout: Layout, itemsize: int, elements: int = ELEMENTS) -> AxisGrid:
    align = min(layout.align, 16 // itemsize)
    G = 1
    while not layout.channels_last and layout.W * G % align:
        G *= 2
    J, groups = layout.W * G, layout.H // G
    if layout.channels_last:
        block_c = min(next_power_of_2(layout.C), elements // 16)
        block_j = min(next_power_of_2(J), elements // block_c)
        block_r = min(next_power_of_2(groups), elements // (block_c * block_j))
    else:
        block_j = min(next_power_of_2(J), WIDEST)
        block_r = min(next_power_of_2(groups), elements // block_j)
        block_c = min(next_power_of_2(layout.C), elements // (block_j * block_r))
    num_warps = max(block_c * block_j * block_r // (ELEMENTS if align * itemsize >= 16 else 256), 1)
    blocks_j, tiles = cdiv(J, block_j), cdiv(groups, block_r)
    programs = layout.N * cdiv(layout.C, block_c) * blocks_j
    least = cdiv(MIN_ROWS if layout.channels_last else MIN_PLANE_ROWS, block_r * G)
    steps = min(max(cdiv(tiles, cdiv(MOST_PROGRAMS * ELEMENTS, max(programs * elements, 1))), least), tiles)
    steps = summed_steps(steps, tiles)
    tile = AxisTile(layout.channels_last, align, G, block_c, block_r, block_j, num_warps)
    return AxisGrid(tile, programs, cdiv(tiles, steps), steps, blocks_j)


def canonical_with_lines(x: torch.Tensor) -> tuple[torch.Tensor, Layout]:
    """Returns x and its layout as `canonical`, except for a 1x1 map, whose lines tell the layouts apart by format."""
    x, layout = canonical(x)
    if layout.channels_last and layout.memory_format == torch.contiguous_format:
        layout = layout._replace(channels_last=False, stride_o=x.stride(1))
    return x, layout


def dense_lines(lines: torch.Tensor, layout: Layout) -> torch.Tensor:
    return lines.mT.contiguous().mT if layout.channels_last else lines.contiguous()
