"""Passes along H and W: means of every row and column, a gate for each, and their gradients.

Lines `[N, C, H + W]` hold a value for each row of a channel, then one for each column; they are dense as x is: along
H + W in nchw, along C in channels_last. A plane is seen as `[groups, J]`: a group is G image rows, J = G W elements, as
many as it takes for every group to start aligned. 28 columns of bfloat16 are 56 bytes, two rows 112, a multiple of 16.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ._heuristics import PROGRAMS, cdiv, next_power_of_2
from ._launch import device_guard, launch
from ._layout import Layout, accumulation_dtype, canonical
from ._tiles import NONE, activate, activation_grad

# A tile is one warp's, where its loads are wide: no sum over an axis waits for other warps, and a plane's addresses and
# end, as long as its elements with four warps, are paid for once.
TILE = 1024  # elements
TILES = 4 * PROGRAMS  # programs of so many elements that are enough, as each is small
MIN_ROWS, MIN_PLANE_ROWS = 8, 64  # image rows that are worth a partial result: with the channels inside, and in a plane
WIDEST = 512  # elements of a group in one tile


class AxisTile(NamedTuple):
    """A `[BLOCK_C, BLOCK_R, BLOCK_J]` tile: channels, groups, elements of a group. `_asdict()`: a kernel's keywords."""

    CHANNELS_LAST: bool
    ALIGN: int
    G: int
    BLOCK_C: int
    BLOCK_R: int
    BLOCK_J: int
    num_warps: int


class Plan(NamedTuple):
    """How programs share x: blocks of channels and of a group's elements, parts of `steps` tiles along the groups."""

    tile: AxisTile
    programs: int
    parts: int
    steps: int
    blocks_j: int

    @property
    def slots(self) -> int:
        """Partial sums of a line: of a row from blocks of its elements, of a column from parts and rows of a group."""
        return max(self.blocks_j, self.parts * self.tile.G)


def plan(layout: Layout, itemsize: int, elements: int = TILE) -> Plan:
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
    num_warps = max(block_c * block_j * block_r // (TILE if align * itemsize >= 16 else 256), 1)
    blocks_j, tiles = cdiv(J, block_j), cdiv(groups, block_r)
    programs = layout.N * cdiv(layout.C, block_c) * blocks_j
    least = cdiv(MIN_ROWS if layout.channels_last else MIN_PLANE_ROWS, block_r * G)
    steps = min(max(cdiv(tiles, cdiv(TILES * TILE, max(programs * elements, 1))), least), tiles)
    tile = AxisTile(layout.channels_last, align, G, block_c, block_r, block_j, num_warps)
    return Plan(tile, programs, cdiv(tiles, steps), steps, blocks_j)


@triton.jit
def _group(W, CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr, G: tl.constexpr):
    """J, in nchw as a multiple of ALIGN that the compiler sees."""
    return W if CHANNELS_LAST else W * G // ALIGN * ALIGN


@triton.jit
def _program(pid, C, J, BLOCK_C: tl.constexpr, BLOCK_J: tl.constexpr):
    """A program's image (int64), block of a group's elements, channels [BLOCK_C] and elements [BLOCK_J]."""
    blocks_j = tl.cdiv(J, BLOCK_J)
    blocks_c = tl.cdiv(C, BLOCK_C)
    block = pid % blocks_j
    c = (pid // blocks_j % blocks_c) * BLOCK_C + tl.arange(0, BLOCK_C)
    return (pid // blocks_j // blocks_c).to(tl.int64), block, c, block * BLOCK_J + tl.arange(0, BLOCK_J)


@triton.jit
def _offsets(c, r, j, J, stride_o, CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr):
    """Offsets [BLOCK_C, BLOCK_R, BLOCK_J] inside an image, int64."""
    p = r[None, :, None] * J + j[None, None, :]
    if CHANNELS_LAST:
        return tl.multiple_of(c[:, None, None] + p.to(tl.int64) * stride_o, [ALIGN, 1, 1])
    return tl.multiple_of(c[:, None, None].to(tl.int64) * stride_o + p, [1, 1, ALIGN])


@triton.jit
def _mask(c, r, j, C, groups, J, CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr):
    mask = (c < C)[:, None, None] & (r < groups)[None, :, None] & (j < J)[None, None, :]
    return tl.max_constancy(mask, [ALIGN, 1, 1] if CHANNELS_LAST else [1, 1, ALIGN])


@triton.jit
def _line_offsets(c, line, C, L, CHANNELS_LAST: tl.constexpr):
    """Offsets [BLOCK_C, lines] of lines inside an image, int64."""
    if CHANNELS_LAST:
        return c[:, None] + line[None, :].to(tl.int64) * C
    return c[:, None].to(tl.int64) * L + line[None, :]


@triton.jit
def _columns(ptr, c, j, C, H, W, J, CHANNELS_LAST: tl.constexpr, G: tl.constexpr):
    """The columns' values of a group's elements, [BLOCK_C, 1, BLOCK_J]."""
    offsets = _line_offsets(c, H + (j if G == 1 else j % W), C, H + W, CHANNELS_LAST)
    return tl.load(ptr + offsets, mask=(c < C)[:, None] & (j < J)[None, :], other=0.0)[:, None, :]


@triton.jit
def _rows(ptr, c, r, j, C, H, W, CHANNELS_LAST: tl.constexpr, G: tl.constexpr):
    """The rows' values, [BLOCK_C, BLOCK_R, 1], or for groups of several rows [BLOCK_C, BLOCK_R, BLOCK_J]."""
    mask = (c < C)[:, None] & (r * G < H)[None, :]
    values = tl.load(ptr + _line_offsets(c, r * G, C, H + W, CHANNELS_LAST), mask=mask, other=0.0)[:, :, None]
    for k in tl.static_range(1, G):
        offsets = _line_offsets(c, r * G + k, C, H + W, CHANNELS_LAST)
        later = tl.load(ptr + offsets, mask=mask, other=0.0)[:, :, None]
        values = tl.where((j // W >= k)[None, None, :], later, values)
    return values


@triton.jit
def _sums_kernel(
    x_ptr, grad_ptr, gates_ptr, residual_ptr, dresidual_ptr, out_ptr,
    C, H, W, stride_n, stride_o, slots, steps, row_divisor, column_divisor,
    DENSE: tl.constexpr, ACTIVATION: tl.constexpr, CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr, G: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """out [N, slots, lines] = sums of x over W and over H, in one read; of g' x times the other axis' gate, with grad.

    g' = grad * act'(x * gates + residual) is stored in dresidual, where there is an activation. A DENSE x has grad's
    addresses, which saves the registers of a second set of them.
    """
    acc_ty = out_ptr.dtype.element_ty
    J = _group(W, CHANNELS_LAST, ALIGN, G)
    groups = H // G
    n, block, c, j = _program(tl.program_id(0), C, J, BLOCK_C, BLOCK_J)
    part = tl.program_id(1)
    if grad_ptr is not None:
        lines = gates_ptr + n * C * (H + W)
        columns = _columns(lines, c, j, C, H, W, J, CHANNELS_LAST, G)
    out = out_ptr + (n * slots + block) * C * (H + W)
    acc = tl.zeros([BLOCK_C, BLOCK_R, BLOCK_J], acc_ty)
    for step in range(steps):
        r = (part * steps + step) * BLOCK_R + tl.arange(0, BLOCK_R)
        mask = _mask(c, r, j, C, groups, J, CHANNELS_LAST, ALIGN)
        stride_dense = C if CHANNELS_LAST else groups * J
        offsets = n * C * (groups * J) + _offsets(c, r, j, J, stride_dense, CHANNELS_LAST, ALIGN)
        x_offsets = offsets
        if not DENSE:
            x_offsets = n * stride_n + _offsets(c, r, j, J, stride_o, CHANNELS_LAST, ALIGN)
        v = tl.load(x_ptr + x_offsets, mask=mask, other=0.0).to(acc_ty)
        along = v
        if grad_ptr is not None:
            rows = _rows(lines, c, r, j, C, H, W, CHANNELS_LAST, G)
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
            offsets_k = _line_offsets(c, r * G + k, C, H + W, CHANNELS_LAST)
            row_mask = (c < C)[:, None] & (r < groups)[None, :]
            tl.store(out + offsets_k, tl.sum(of_row, 2) / row_divisor, mask=row_mask)
    # Element j of a group belongs to its image row j // W, and that row has a slot of its own.
    first = (n * slots + part * G) * C * (H + W)
    if G == 1:
        offsets = first + _line_offsets(c, H + j, C, H + W, CHANNELS_LAST)
    else:
        in_row = _line_offsets(c, H + j % W, C, H + W, CHANNELS_LAST)
        offsets = first + (j // W).to(tl.int64)[None, :] * C * (H + W) + in_row
    tl.store(out_ptr + offsets, tl.sum(acc, 1) / column_divisor, mask=(c < C)[:, None] & (j < J)[None, :])


@triton.jit
def _combine_lines_kernel(
    parts_ptr, out_ptr, C, H, W, slots, row_slots, column_slots, row_divisor, column_divisor,
    CHANNELS_LAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out = sums of lines' slots, in order, divided."""
    size = C * (H + W)
    blocks = tl.cdiv(size, BLOCK)
    n = (tl.program_id(0) // blocks).to(tl.int64)
    i = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    is_row = i < H * C if CHANNELS_LAST else i % (H + W) < H
    total = tl.zeros([BLOCK], out_ptr.dtype.element_ty)
    for slot in range(slots):
        mask = (i < size) & (slot < tl.where(is_row, row_slots, column_slots))
        total += tl.load(parts_ptr + (n * slots + slot) * size + i, mask=mask, other=0.0)
    divisor = tl.where(is_row, row_divisor, column_divisor).to(total.dtype)
    tl.store(out_ptr + n * size + i, total / divisor, mask=i < size)


@triton.jit
def _axis_map_kernel(
    v_ptr, gates_ptr, residual_ptr, dmeans_ptr, out_ptr, C, H, W, stride_n, stride_o, steps,
    ACTIVATION: tl.constexpr, CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr, G: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """out = act(v * row gate * column gate [+ residual] [+ dmeans of the row / W + dmeans of the column / H]).

    What the sums read last comes first: it may still be in the L2 cache.
    """
    acc_ty = gates_ptr.dtype.element_ty
    J = _group(W, CHANNELS_LAST, ALIGN, G)
    groups = H // G
    n, _, c, j = _program(tl.num_programs(0) - 1 - tl.program_id(0), C, J, BLOCK_C, BLOCK_J)
    part = tl.num_programs(1) - 1 - tl.program_id(1)
    lines = n * C * (H + W)
    columns = _columns(gates_ptr + lines, c, j, C, H, W, J, CHANNELS_LAST, G)
    if dmeans_ptr is not None:
        dcolumns = _columns(dmeans_ptr + lines, c, j, C, H, W, J, CHANNELS_LAST, G) / H
    for step in range(steps):
        r = (part * steps + step) * BLOCK_R + tl.arange(0, BLOCK_R)
        mask = _mask(c, r, j, C, groups, J, CHANNELS_LAST, ALIGN)
        offsets = n * C * (groups * J) + _offsets(c, r, j, J, C if CHANNELS_LAST else groups * J, CHANNELS_LAST, ALIGN)
        v_offsets = n * stride_n + _offsets(c, r, j, J, stride_o, CHANNELS_LAST, ALIGN)
        v = tl.load(v_ptr + v_offsets, mask=mask, other=0.0).to(acc_ty)
        v *= _rows(gates_ptr + lines, c, r, j, C, H, W, CHANNELS_LAST, G) * columns
        if residual_ptr is not None:
            v += tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(acc_ty)
        if dmeans_ptr is not None:
            v += _rows(dmeans_ptr + lines, c, r, j, C, H, W, CHANNELS_LAST, G) / W + dcolumns
        tl.store(out_ptr + offsets, activate(v, ACTIVATION), mask=mask)


def _canonical(x: torch.Tensor) -> tuple[torch.Tensor, Layout]:
    """x and its layout; lines tell the two layouts of a 1x1 map apart, so that its results' format decides."""
    x, layout = canonical(x)
    if layout.channels_last and layout.memory_format == torch.contiguous_format:
        layout = layout._replace(channels_last=False, stride_o=x.stride(1))
    return x, layout


def _empty_lines(x: torch.Tensor, layout: Layout, rows: int) -> torch.Tensor:
    """[rows, C, L], dense as lines of x are."""
    C, L, a = layout.C, layout.H + layout.W, accumulation_dtype(x)
    if layout.memory_format == torch.channels_last:
        return x.new_empty((rows, L, C), dtype=a).mT
    return x.new_empty((rows, C, L), dtype=a)


def _dense_lines(lines: torch.Tensor, layout: Layout) -> torch.Tensor:
    return lines.mT.contiguous().mT if layout.channels_last else lines.contiguous()


def _sums(
    x: torch.Tensor, layout: Layout, grad: torch.Tensor | None, gates: torch.Tensor | None,
    residual: torch.Tensor | None, dresidual: torch.Tensor | None, activation: int, divisors: tuple[int, int],
) -> torch.Tensor:  # fmt: skip
    """Lines of the sums of `_sums_kernel`, divided. Reads x, and grad and the residual, once."""
    # With the channels inside, a tile's columns take as many registers as the tile, and so do their sums.
    p = plan(layout, x.element_size(), TILE // 2 if layout.channels_last and grad is not None else TILE)
    slots, (C, H, W) = p.slots, (layout.C, layout.H, layout.W)
    out = _empty_lines(x, layout, layout.N)
    parts = out if slots == 1 else x.new_empty((layout.N * slots, C * (H + W)), dtype=out.dtype)
    launch(
        _sums_kernel, p.programs, x, grad, gates, residual, dresidual, parts, C, H, W,
        layout.stride_n, layout.stride_o, slots, p.steps, *(divisors if slots == 1 else (1, 1)),
        DENSE=layout.is_dense(x), ACTIVATION=activation, **p.tile._asdict(), parts=p.parts,
    )  # fmt: skip
    if slots > 1:
        launch(
            _combine_lines_kernel, layout.N * cdiv(C * (H + W), TILE), parts, out, C, H, W,
            slots, p.blocks_j, p.parts * p.tile.G, *divisors, CHANNELS_LAST=layout.channels_last, BLOCK=TILE,
        )  # fmt: skip
    return out


def _map(
    v: torch.Tensor, x: torch.Tensor, layout: Layout, strides: tuple[int, int], gates: torch.Tensor,
    residual: torch.Tensor | None, dmeans: torch.Tensor | None, activation: int,
) -> torch.Tensor:  # fmt: skip
    p = plan(layout, x.element_size())
    out = layout.empty(x)
    launch(
        _axis_map_kernel, p.programs, v, gates, residual, dmeans, out, layout.C, layout.H, layout.W,
        *strides, p.steps, ACTIVATION=activation, **p.tile._asdict(), parts=p.parts,
    )  # fmt: skip
    return out


def axis_mean(x: torch.Tensor) -> torch.Tensor:
    """Means over W, then over H, as lines. x [N, C, H, W]. Reads x once."""
    with device_guard(x):
        x, layout = _canonical(x)
        return _sums(x, layout, None, None, None, None, 0, (layout.W, layout.H))


def axis_scale(x: torch.Tensor, gates: torch.Tensor, residual: torch.Tensor | None, activation: int) -> torch.Tensor:
    """y = act(x * row gate * column gate + residual), gates as lines. Reads x (and the residual), writes y."""
    with device_guard(x):
        x, layout = _canonical(x)
        residual = None if residual is None else layout.dense(residual)
        strides = (layout.stride_n, layout.stride_o)
        return _map(x, x, layout, strides, _dense_lines(gates, layout), residual, None, activation)


def axis_scale_bwd(
    grad: torch.Tensor, x: torch.Tensor, gates: torch.Tensor, residual: torch.Tensor | None, activation: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(dgates as lines, dresidual): sums of g' x times the other axis' gate, g' = grad * act'(x * gates + residual).

    Reads x and grad once. With an activation g' is written as dresidual (else empty), and a residual is read.
    """
    with device_guard(x):
        x, layout = _canonical(x)
        residual = None if residual is None or not activation else layout.dense(residual)
        dresidual = layout.empty(x) if activation else None
        gates = _dense_lines(gates, layout)
        dgates = _sums(x, layout, layout.dense(grad), gates, residual, dresidual, activation, (1, 1))
        return dgates, x.new_empty(0) if dresidual is None else dresidual


def axis_input_grad(grad: torch.Tensor, x: torch.Tensor, gates: torch.Tensor, dmeans: torch.Tensor) -> torch.Tensor:
    """dx = grad * row gate * column gate + dmeans' row / W + dmeans' column / H. Reads grad, writes dx."""
    with device_guard(x):
        x, layout = _canonical(x)
        strides = (layout.C * layout.HW, layout.C if layout.channels_last else layout.HW)
        gates, dmeans = _dense_lines(gates, layout), _dense_lines(dmeans, layout)
        return _map(layout.dense(grad), x, layout, strides, gates, None, dmeans, 0)
