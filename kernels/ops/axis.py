"""Passes along H and W: means of every row and column, a gate for each, and their gradients.

Lines `[N, C, H + W]` hold a value for each row of a channel, then one for each column; they are dense as x is: along
H + W in nchw, along C in channels_last.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..core.heuristics import PROGRAMS, cdiv, next_power_of_2
from ..core.launch import device_guard, launch
from ..core.layout import Layout, accumulation_dtype, canonical
from ..passes.lines.axis import _axis_map_kernel, _combine_lines_kernel, _sums_kernel

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
