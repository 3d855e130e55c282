"""Passes along H and W: means of every row and column, a gate for each, and their gradients.

Lines `[N, C, H + W]` hold a value for each row of a channel, then one for each column. They are dense as x is: along
H + W in nchw, along C in channels_last.
A plane is seen as `[groups, J]`: a group is G image rows, J = G W elements, as many as it takes for every group to
start aligned. 28 columns of bfloat16 are 56 bytes, two rows 112, a multiple of 16.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ...core.activations import NONE, activate, activation_grad
from ...core.heuristics import PROGRAMS, cdiv, next_power_of_2
from ...core.launch import launch
from ...core.layout import Layout, accumulation_dtype, canonical

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
def _group(W, TILE: tl.constexpr):
    """Returns J, in nchw as a multiple of ALIGN that the compiler sees."""
    return W if TILE.CHANNELS_LAST else W * TILE.G // TILE.ALIGN * TILE.ALIGN


@triton.jit
def _program(pid, C, J, TILE: tl.constexpr):
    """Returns a program's image (int64), block of a group's elements, channels [BLOCK_C] and elements [BLOCK_J]."""
    blocks_j = tl.cdiv(J, TILE.BLOCK_J)
    blocks_c = tl.cdiv(C, TILE.BLOCK_C)
    block = pid % blocks_j
    c = (pid // blocks_j % blocks_c) * TILE.BLOCK_C + tl.arange(0, TILE.BLOCK_C)
    return (pid // blocks_j // blocks_c).to(tl.int64), block, c, block * TILE.BLOCK_J + tl.arange(0, TILE.BLOCK_J)


@triton.jit
def _offsets(image, c, r, j, J, stride_o, TILE: tl.constexpr):
    """Returns offsets [BLOCK_C, BLOCK_R, BLOCK_J] of an image, int64; see `tiles.wide_offsets`."""
    ALIGN: tl.constexpr = TILE.ALIGN
    p = r[None, :, None] * J + j[None, None, :]
    if TILE.CHANNELS_LAST:
        offsets = image + (c[:, None, None] + p.to(tl.int64) * stride_o)
    else:
        offsets = image + (c[:, None, None].to(tl.int64) * stride_o + p)
    return offsets if ALIGN == 1 else tl.multiple_of(offsets, [ALIGN, 1, 1] if TILE.CHANNELS_LAST else [1, 1, ALIGN])


@triton.jit
def _dense_offsets(n, c, r, j, J, groups, size, TILE: tl.constexpr):
    """Returns the tile's offsets in a dense map of x's shape and layout."""
    stride_o = size.C if TILE.CHANNELS_LAST else groups * J
    return _offsets(n * size.C * (groups * J), c, r, j, J, stride_o, TILE)


@triton.jit
def _mask(c, r, j, C, groups, J, TILE: tl.constexpr):
    ALIGN: tl.constexpr = TILE.ALIGN
    mask = (c < C)[:, None, None] & (r < groups)[None, :, None] & (j < J)[None, None, :]
    return mask if ALIGN == 1 else tl.max_constancy(mask, [ALIGN, 1, 1] if TILE.CHANNELS_LAST else [1, 1, ALIGN])


@triton.jit
def _line_offsets(c, line, size, CHANNELS_LAST: tl.constexpr):
    """Returns offsets [BLOCK_C, lines] of lines inside an image, int64."""
    if CHANNELS_LAST:
        return c[:, None] + line[None, :].to(tl.int64) * size.C
    return c[:, None].to(tl.int64) * (size.H + size.W) + line[None, :]


@triton.jit
def _columns(ptr, c, j, J, size, TILE: tl.constexpr):
    """Loads the columns' values of a group's elements, [BLOCK_C, 1, BLOCK_J]."""
    offsets = _line_offsets(c, size.H + (j if TILE.G == 1 else j % size.W), size, TILE.CHANNELS_LAST)
    return tl.load(ptr + offsets, mask=(c < size.C)[:, None] & (j < J)[None, :], other=0.0)[:, None, :]


@triton.jit
def _rows(ptr, c, r, j, size, TILE: tl.constexpr):
    """Loads the rows' values, [BLOCK_C, BLOCK_R, 1], or for groups of several rows [BLOCK_C, BLOCK_R, BLOCK_J]."""
    G: tl.constexpr = TILE.G
    mask = (c < size.C)[:, None] & (r * G < size.H)[None, :]
    values = tl.load(ptr + _line_offsets(c, r * G, size, TILE.CHANNELS_LAST), mask=mask, other=0.0)[:, :, None]
    for k in tl.static_range(1, G):
        offsets = _line_offsets(c, r * G + k, size, TILE.CHANNELS_LAST)
        later = tl.load(ptr + offsets, mask=mask, other=0.0)[:, :, None]
        values = tl.where((j // size.W >= k)[None, None, :], later, values)
    return values


@triton.jit
def _line_sums_kernel(
    x_ptr,
    grad_ptr,
    gates_ptr,
    residual_ptr,
    dresidual_ptr,
    out_ptr,
    size,
    partials,
    steps,
    row_divisor,
    column_divisor,
    DENSE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    TILE: tl.constexpr,
):
    """out [N, partials, lines] = sums of x over W and over H, in one read; with grad, of g' x times the other gate.

    g' = grad * act'(x * gates + residual) is stored in dresidual if there is an activation. A DENSE x has grad's
    addresses, which saves the registers of a second set of them.
    """
    BLOCK_C: tl.constexpr = TILE.BLOCK_C
    BLOCK_R: tl.constexpr = TILE.BLOCK_R
    BLOCK_J: tl.constexpr = TILE.BLOCK_J
    G: tl.constexpr = TILE.G
    acc_ty = out_ptr.dtype.element_ty
    C, H, W = size.C, size.H, size.W
    J = _group(W, TILE)
    groups = H // G
    n, block, c, j = _program(tl.program_id(0), C, J, TILE)
    share = tl.program_id(1)
    if grad_ptr is not None:
        lines = gates_ptr + n * C * (H + W)
        columns = _columns(lines, c, j, J, size, TILE)
    out = out_ptr + (n * partials + block) * C * (H + W)
    acc = tl.zeros([BLOCK_C, BLOCK_R, BLOCK_J], acc_ty)
    for step in range(steps):
        r = (share * steps + step) * BLOCK_R + tl.arange(0, BLOCK_R)
        mask = _mask(c, r, j, C, groups, J, TILE)
        offsets = _dense_offsets(n, c, r, j, J, groups, size, TILE)
        x_offsets = offsets
        if not DENSE:
            x_offsets = _offsets(n * size.stride_n, c, r, j, J, size.stride_o, TILE)
        v = tl.load(x_ptr + x_offsets, mask=mask, other=0.0).to(acc_ty)
        along = v
        if grad_ptr is not None:
            rows = _rows(lines, c, r, j, size, TILE)
            if ACTIVATION != NONE:
                z = v * (rows * columns)
                if residual_ptr is not None:
                    z += tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(acc_ty)
            g = tl.load(grad_ptr + offsets, mask=mask, other=0.0).to(acc_ty)
            if ACTIVATION != NONE:
                g = activation_grad(g, z, ACTIVATION)
                tl.store(dresidual_ptr + offsets, g, mask=mask)
            v *= g
            along = v * columns
            v *= rows
        acc += v
        for k in tl.static_range(G):
            of_row = tl.where((j // W == k)[None, None, :], along, 0.0) if G > 1 else along
            offsets_k = _line_offsets(c, r * G + k, size, TILE.CHANNELS_LAST)
            row_mask = (c < C)[:, None] & (r < groups)[None, :]
            tl.store(out + offsets_k, tl.sum(of_row, 2) / row_divisor, mask=row_mask)
    # Element j of a group belongs to its image row j // W, and that row has a partial of its own.
    first = (n * partials + share * G) * C * (H + W)
    if G == 1:
        offsets = first + _line_offsets(c, H + j, size, TILE.CHANNELS_LAST)
    else:
        in_row = _line_offsets(c, H + j % W, size, TILE.CHANNELS_LAST)
        offsets = first + (j // W).to(tl.int64)[None, :] * C * (H + W) + in_row
    tl.store(out_ptr + offsets, tl.sum(acc, 1) / column_divisor, mask=(c < C)[:, None] & (j < J)[None, :])


@triton.jit
def _combine_lines_kernel(
    partials_ptr,
    out_ptr,
    C,
    H,
    W,
    partials,
    row_partials,
    column_partials,
    row_divisor,
    column_divisor,
    CHANNELS_LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out = sums of the lines' partials, in order, divided."""
    length = C * (H + W)
    blocks = tl.cdiv(length, BLOCK)
    n = (tl.program_id(0) // blocks).to(tl.int64)
    i = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    is_row = i < H * C if CHANNELS_LAST else i % (H + W) < H
    total = tl.zeros([BLOCK], out_ptr.dtype.element_ty)
    for k in range(partials):
        mask = (i < length) & (k < tl.where(is_row, row_partials, column_partials))
        total += tl.load(partials_ptr + (n * partials + k) * length + i, mask=mask, other=0.0)
    divisor = tl.where(is_row, row_divisor, column_divisor).to(total.dtype)
    tl.store(out_ptr + n * length + i, total / divisor, mask=i < length)


@triton.jit
def _axis_map_kernel(
    v_ptr,
    gates_ptr,
    residual_ptr,
    dmeans_ptr,
    out_ptr,
    size,
    steps,
    ACTIVATION: tl.constexpr,
    TILE: tl.constexpr,
):
    """out = act(v * row gate * column gate [+ residual] [+ dmeans of the row / W + dmeans of the column / H]).

    What the sums read last comes first: it may still be in the L2 cache.
    """
    acc_ty = gates_ptr.dtype.element_ty
    C, H, W = size.C, size.H, size.W
    J = _group(W, TILE)
    groups = H // TILE.G
    n, _, c, j = _program(tl.num_programs(0) - 1 - tl.program_id(0), C, J, TILE)
    share = tl.num_programs(1) - 1 - tl.program_id(1)
    lines = n * C * (H + W)
    columns = _columns(gates_ptr + lines, c, j, J, size, TILE)
    if dmeans_ptr is not None:
        dcolumns = _columns(dmeans_ptr + lines, c, j, J, size, TILE) / H
    for step in range(steps):
        r = (share * steps + step) * TILE.BLOCK_R + tl.arange(0, TILE.BLOCK_R)
        mask = _mask(c, r, j, C, groups, J, TILE)
        offsets = _dense_offsets(n, c, r, j, J, groups, size, TILE)
        v_offsets = _offsets(n * size.stride_n, c, r, j, J, size.stride_o, TILE)
        v = tl.load(v_ptr + v_offsets, mask=mask, other=0.0).to(acc_ty)
        v *= _rows(gates_ptr + lines, c, r, j, size, TILE) * columns
        if residual_ptr is not None:
            v += tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(acc_ty)
        if dmeans_ptr is not None:
            v += _rows(dmeans_ptr + lines, c, r, j, size, TILE) / W + dcolumns
        tl.store(out_ptr + offsets, activate(v, ACTIVATION), mask=mask)


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


def _empty_lines(x: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Allocates lines [N, C, L], dense as lines of x are."""
    N, C, L, acc = layout.N, layout.C, layout.H + layout.W, accumulation_dtype(x)
    if layout.memory_format == torch.channels_last:
        return x.new_empty((N, L, C), dtype=acc).mT
    return x.new_empty((N, C, L), dtype=acc)


def line_sums(
    x: torch.Tensor,
    layout: Layout,
    divisors: tuple[int, int] = (1, 1),
    grad: torch.Tensor | None = None,
    gates: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    dresidual: torch.Tensor | None = None,
    activation: int = NONE.value,
) -> torch.Tensor:
    """Returns the sums of `_line_sums_kernel` as lines, divided. Reads x, grad and the residual once."""
    # With the channels inside, a tile's columns take as many registers as the tile, and so do their sums.
    halved = layout.channels_last and grad is not None
    a = axis_grid(layout, x.element_size(), ELEMENTS // 2 if halved else ELEMENTS)
    C, H, W = layout.C, layout.H, layout.W
    out, several = _empty_lines(x, layout), a.partials > 1
    partials = x.new_empty((layout.N * a.partials, C * (H + W)), dtype=out.dtype) if several else out
    launch(
        _line_sums_kernel,
        a.programs,
        x,
        grad,
        gates,
        residual,
        dresidual,
        partials,
        AxisSizes(C, H, W, layout.stride_n, layout.stride_o),
        a.partials,
        a.steps,
        *((1, 1) if several else divisors),
        DENSE=layout.is_dense(x),
        ACTIVATION=activation,
        TILE=a.tile,
        num_warps=a.tile.num_warps,
        splits=a.splits,
    )
    if several:
        launch(
            _combine_lines_kernel,
            layout.N * cdiv(C * (H + W), ELEMENTS),
            partials,
            out,
            C,
            H,
            W,
            a.partials,
            a.blocks_j,
            a.splits * a.tile.G,
            *divisors,
            CHANNELS_LAST=layout.channels_last,
            BLOCK=ELEMENTS,
        )
    return out


def apply_line_gates(
    v: torch.Tensor,
    x: torch.Tensor,
    layout: Layout,
    strides: tuple[int, int],
    gates: torch.Tensor,
    residual: torch.Tensor | None = None,
    dmeans: torch.Tensor | None = None,
    activation: int = NONE.value,
) -> torch.Tensor:
    """Returns the map of `_axis_map_kernel`, like x. Reads v, which has these strides, and the residual."""
    a = axis_grid(layout, x.element_size())
    out = layout.empty(x)
    launch(
        _axis_map_kernel,
        a.programs,
        v,
        gates,
        residual,
        dmeans,
        out,
        AxisSizes(layout.C, layout.H, layout.W, *strides),
        a.steps,
        ACTIVATION=activation,
        TILE=a.tile,
        num_warps=a.tile.num_warps,
        splits=a.splits,
    )
    return out
