"""Passes along H and W: sums of every row and column, and maps scaled by a gate for each.

Lines `[N, C, H + W]` hold a value for each row of a channel, then one for each column. They are dense as x is: along
H + W in nchw, along C in channels_last.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...core.activations import NONE, activate, activation_grad
from ...core.heuristics import cdiv
from ...core.launch import launch
from ...core.layout import Layout, accumulation_dtype
from ..partials import CHAIN
from .axis_tiles import (
    ELEMENTS,
    AxisSizes,
    axis_grid,
    axis_mask,
    axis_offsets,
    axis_program,
    dense_axis_offsets,
    group_length,
    line_offsets,
    load_columns,
    load_rows,
)


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
    J = group_length(W, TILE)
    groups = H // G
    n, block, c, j = axis_program(tl.program_id(0), C, J, TILE)
    share = tl.program_id(1)
    if grad_ptr is not None:
        lines = gates_ptr + n * C * (H + W)
        columns = load_columns(lines, c, j, J, size, TILE)
    out = out_ptr + (n * partials + block) * C * (H + W)
    acc = tl.zeros([BLOCK_C, BLOCK_R, BLOCK_J], acc_ty)
    for step in range(steps):
        r = (share * steps + step) * BLOCK_R + tl.arange(0, BLOCK_R)
        mask = axis_mask(c, r, j, C, groups, J, TILE)
        offsets = dense_axis_offsets(n, c, r, j, J, groups, size, TILE)
        x_offsets = offsets
        if not DENSE:
            x_offsets = axis_offsets(n * size.stride_n, c, r, j, J, size.stride_o, TILE)
        v = tl.load(x_ptr + x_offsets, mask=mask, other=0.0).to(acc_ty)
        along = v
        if grad_ptr is not None:
            rows = load_rows(lines, c, r, j, size, TILE)
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
            offsets_k = line_offsets(c, r * G + k, size, TILE.CHANNELS_LAST)
            row_mask = (c < C)[:, None] & (r < groups)[None, :]
            tl.store(out + offsets_k, tl.sum(of_row, 2) / row_divisor, mask=row_mask)
    # Element j of a group belongs to its image row j // W, and that row has a partial of its own.
    first = (n * partials + share * G) * C * (H + W)
    if G == 1:
        offsets = first + line_offsets(c, H + j, size, TILE.CHANNELS_LAST)
    else:
        in_row = line_offsets(c, H + j % W, size, TILE.CHANNELS_LAST)
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
    for first in range(0, partials, CHAIN):
        part = tl.zeros([BLOCK], total.dtype)
        for k in range(first, tl.minimum(first + CHAIN, partials)):
            mask = (i < length) & (k < tl.where(is_row, row_partials, column_partials))
            part += tl.load(partials_ptr + (n * partials + k) * length + i, mask=mask, other=0.0)
        total += part
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

    The last tiles of the sums come first: they may still be in the L2 cache.
    """
    acc_ty = gates_ptr.dtype.element_ty
    C, H, W = size.C, size.H, size.W
    J = group_length(W, TILE)
    groups = H // TILE.G
    n, _, c, j = axis_program(tl.num_programs(0) - 1 - tl.program_id(0), C, J, TILE)
    share = tl.num_programs(1) - 1 - tl.program_id(1)
    lines = n * C * (H + W)
    columns = load_columns(gates_ptr + lines, c, j, J, size, TILE)
    if dmeans_ptr is not None:
        dcolumns = load_columns(dmeans_ptr + lines, c, j, J, size, TILE) / H
    for step in range(steps):
        r = (share * steps + step) * TILE.BLOCK_R + tl.arange(0, TILE.BLOCK_R)
        mask = axis_mask(c, r, j, C, groups, J, TILE)
        offsets = dense_axis_offsets(n, c, r, j, J, groups, size, TILE)
        v_offsets = axis_offsets(n * size.stride_n, c, r, j, J, size.stride_o, TILE)
        v = tl.load(v_ptr + v_offsets, mask=mask, other=0.0).to(acc_ty)
        v *= load_rows(gates_ptr + lines, c, r, j, size, TILE) * columns
        if residual_ptr is not None:
            v += tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(acc_ty)
        if dmeans_ptr is not None:
            v += load_rows(dmeans_ptr + lines, c, r, j, size, TILE) / W + dcolumns
        tl.store(out_ptr + offsets, activate(v, ACTIVATION), mask=mask)


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
