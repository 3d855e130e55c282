"""Passes over three branches in one map u [N, 3C, H, W]; the first two are shifted as they are read."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..core.heuristics import Tile, reduction, tile, tiles
from ..core.launch import launch
from ..core.layout import Layout, accumulation_dtype, canonical
from ..core.tiles import dense_offsets, load_channels, program_tile, tile_full, tile_mask
from .partials import combine

BRANCHES = 3


class BranchSizes(NamedTuple):
    """The sizes of one branch and the strides of u that kernels get when they run, as ``size``."""

    C: Any
    HW: Any
    H: Any
    W: Any
    stride_n: Any
    stride_c: Any
    stride_p: Any


@triton.jit
def _step(c, C, BRANCH: tl.constexpr):
    """Returns (dh, dw), [BLOCK_C, 1] each, from a pixel to the one whose value it gets.

    The quarters of branch 0 step -1, 1 along H, then -1, 1 along W; those of branch 1 along W first.
    """
    QUARTER = C // 4
    even = (c < QUARTER) | ((c >= 2 * QUARTER) & (c < 3 * QUARTER))
    step = tl.where(even, -1, 1)[:, None]
    along_h = ((c < 2 * QUARTER) if BRANCH == 0 else (c >= 2 * QUARTER))[:, None]
    return tl.where(along_h, step, 0), tl.where(along_h, 0, step)


@triton.jit
def _offsets(c, p, stride_c, stride_p, RUN: tl.constexpr):
    """Returns offsets, int64, of pixels p [BLOCK_C or 1, BLOCK_P]; RUN neighbouring channels move alike."""
    offsets = c[:, None].to(tl.int64) * stride_c + p.to(tl.int64) * stride_p
    return offsets if RUN == 1 else tl.max_contiguous(tl.multiple_of(offsets, [RUN, 1]), [RUN, 1])


@triton.jit
def _load_shifted(u_ptr, c, p, mask, size, BRANCH: tl.constexpr, RUN: tl.constexpr):
    """Loads a shifted branch, in u's dtype: a neighbour's values, or at the border the pixel's own."""
    dh, dw = _step(c, size.C, BRANCH)
    h = tl.minimum(tl.maximum((p // size.W)[None, :] + dh, 0), size.H - 1)
    w = tl.minimum(tl.maximum((p % size.W)[None, :] + dw, 0), size.W - 1)
    offsets = _offsets(BRANCH * size.C + c, h * size.W + w, size.stride_c, size.stride_p, RUN)
    return tl.load(u_ptr + offsets, mask=mask, other=0.0)


@triton.jit
def _load_unshifted(u_ptr, c, p, mask, size):
    """Loads the third branch, in u's dtype."""
    offsets = _offsets(2 * size.C + c, p[None, :], size.stride_c, size.stride_p, 1)
    return tl.load(u_ptr + offsets, mask=mask, other=0.0)


@triton.jit
def _shift_sums_kernel(grad_ptr, u_ptr, partials_ptr, size, steps, RUN: tl.constexpr, TILE: tl.constexpr):
    """Sums over shares of the pixels: of the three branches, [N, splits, C].

    With grad_ptr: of its product with each branch, [N, splits, 3, C].
    """
    acc_ty: tl.constexpr = partials_ptr.dtype.element_ty
    C = size.C
    blocks = tl.cdiv(C, TILE.BLOCK_C)
    n = (tl.program_id(0) // blocks).to(tl.int64)
    share = tl.program_id(1)
    c = tl.program_id(0) % blocks * TILE.BLOCK_C + tl.arange(0, TILE.BLOCK_C)
    u_ptr += tl.multiple_of(n * size.stride_n, RUN)
    first = tile_full(0, TILE, acc_ty)
    second = tile_full(0, TILE, acc_ty)
    third = tile_full(0, TILE, acc_ty)
    for step in range(steps):
        p = (share * steps + step) * TILE.BLOCK_P + tl.arange(0, TILE.BLOCK_P)
        mask = tile_mask(c, p, size, TILE)
        b1 = _load_shifted(u_ptr, c, p, mask, size, 0, RUN).to(acc_ty)
        b2 = _load_shifted(u_ptr, c, p, mask, size, 1, RUN).to(acc_ty)
        b3 = _load_unshifted(u_ptr, c, p, mask, size).to(acc_ty)
        if grad_ptr is None:
            first += b1 + b2 + b3
        else:
            g = tl.load(grad_ptr + dense_offsets(n, c, p, size, TILE), mask=mask, other=0.0).to(acc_ty)
            first += g * b1
            second += g * b2
            third += g * b3
    row = n * tl.num_programs(1) + share
    if grad_ptr is None:
        tl.store(partials_ptr + row * C + c, tl.sum(first, 1), mask=c < C)
    else:
        tl.store(partials_ptr + row * 3 * C + c, tl.sum(first, 1), mask=c < C)
        tl.store(partials_ptr + (row * 3 + 1) * C + c, tl.sum(second, 1), mask=c < C)
        tl.store(partials_ptr + (row * 3 + 2) * C + c, tl.sum(third, 1), mask=c < C)


@triton.jit
def _shift_sum_kernel(u_ptr, gate_ptr, y_ptr, size, RUN: tl.constexpr, TILE: tl.constexpr):
    """y = the sum over branches of gate [N, 3, C] * branch."""
    acc_ty: tl.constexpr = gate_ptr.dtype.element_ty
    C = size.C
    n, c, p = program_tile(size, TILE)
    mask = tile_mask(c, p, size, TILE)
    u_ptr += tl.multiple_of(n * size.stride_n, RUN)
    gate_ptr += n * 3 * C + c
    y = _load_unshifted(u_ptr, c, p, mask, size).to(acc_ty)
    y *= tl.load(gate_ptr + 2 * C, mask=c < C, other=0.0)[:, None]
    for branch in tl.static_range(2):
        b = _load_shifted(u_ptr, c, p, mask, size, branch, RUN).to(acc_ty)
        y += b * tl.load(gate_ptr + branch * C, mask=c < C, other=0.0)[:, None]
    tl.store(y_ptr + dense_offsets(n, c, p, size, TILE), y, mask=mask)


@triton.jit
def _shift_grad_kernel(
    grad_ptr,
    edge_ptr,
    gate_ptr,
    dtotal_ptr,
    du_ptr,
    size,
    H,
    W,
    RUN: tl.constexpr,
    TILE: tl.constexpr,
):
    """du: each pixel sends back grad * gate + dtotal of each branch, to the pixel whose value it got.

    A shift that repeats one border uses it twice, and never the opposite one. So that every element of du is written
    once, the pixel next to the repeated border adds what the border pixel sends, read from edge_ptr, which is grad; and
    the border pixel writes the zero on the opposite side.
    """
    acc_ty: tl.constexpr = gate_ptr.dtype.element_ty
    C, HW = size.C, size.HW
    n, c, p = program_tile(size, TILE)
    mask = tile_mask(c, p, size, TILE)
    g = tl.load(grad_ptr + dense_offsets(n, c, p, size, TILE), mask=mask, other=0.0).to(acc_ty)
    gate_ptr += n * 3 * C + c
    dtotal = load_channels(dtotal_ptr, n, c, size)[:, None]
    edge_ptr += tl.multiple_of(n * C * HW, RUN)
    du_ptr += tl.multiple_of(n * 3 * C * HW, RUN)
    stride_c = 1 if TILE.CHANNELS_LAST else HW
    stride_p = C if TILE.CHANNELS_LAST else 1
    du_stride_p = 3 * C if TILE.CHANNELS_LAST else 1
    own, h, w = p[None, :], (p // W)[None, :], (p % W)[None, :]
    for branch in tl.static_range(2):
        gate = tl.load(gate_ptr + branch * C, mask=c < C, other=0.0)[:, None]
        dh, dw = _step(c, C, branch)
        to_h, to_w = h + dh, w + dw
        at_border = (to_h < 0) | (to_h >= H) | (to_w < 0) | (to_w >= W)
        next_h, next_w = to_h + dh, to_w + dw
        beside = ((next_h < 0) | (next_h >= H) | (next_w < 0) | (next_w >= W)) & (at_border == 0)
        to_h = tl.where(to_h < 0, H - 1, tl.where(to_h >= H, 0, to_h))
        to_w = tl.where(to_w < 0, W - 1, tl.where(to_w >= W, 0, to_w))
        to = to_h * W + to_w
        e = tl.load(edge_ptr + _offsets(c, to, stride_c, stride_p, RUN), mask=mask & beside, other=0.0).to(acc_ty)
        d = tl.where(at_border & (to != own), 0.0, g * gate + dtotal) + tl.where(beside, e * gate + dtotal, 0.0)
        tl.store(du_ptr + _offsets(branch * C + c, to, stride_c, du_stride_p, RUN), d, mask=mask)
    d = g * tl.load(gate_ptr + 2 * C, mask=c < C, other=0.0)[:, None] + dtotal
    tl.store(du_ptr + _offsets(2 * C + c, own, stride_c, du_stride_p, 1), d, mask=mask)


class ShiftedBranches:
    """u, the layout of one of its branches (which y and its gradient share), and how kernels walk u."""

    def __init__(self, u: torch.Tensor) -> None:
        self.u, self.whole = canonical(u)
        whole, C = self.whole, self.whole.C // BRANCHES
        outer = C if whole.channels_last else whole.HW
        self.layout: Layout = whole._replace(C=C, stride_n=C * whole.HW, stride_o=outer)
        # Neighbours within a quarter share wide accesses; quarters and branches start at multiples of so many.
        bits = C | C // 4 | whole.stride_n | whole.stride_o | 16
        self.run = bits & -bits if whole.channels_last else 1

    @property
    def sizes(self) -> BranchSizes:
        whole, branch = self.whole, self.layout
        strides = (1, whole.stride_o) if whole.channels_last else (whole.stride_o, 1)
        return BranchSizes(branch.C, branch.HW, branch.H, branch.W, whole.stride_n, *strides)

    def tile(self) -> Tile:
        """Returns a small tile: every element of a shifted branch needs an address of its own."""
        return tile(self.layout, 1024)


def shift_sums(grad: torch.Tensor | None, b: ShiftedBranches) -> torch.Tensor:
    """Returns the sums of `_shift_sums_kernel` over all pixels, [N, C] or [N, 3 C]. Reads u (and grad) once."""
    t, blocks, splits, steps = reduction(b.layout, over_c=False, elements=1024)
    columns = b.layout.C if grad is None else BRANCHES * b.layout.C
    partials = b.u.new_empty((b.layout.N, splits, columns), dtype=accumulation_dtype(b.u))
    launch(
        _shift_sums_kernel,
        b.layout.N * blocks,
        grad,
        b.u,
        partials,
        b.sizes,
        steps,
        RUN=b.run,
        TILE=t,
        num_warps=t.num_warps,
        splits=splits,
    )
    return combine(partials, None, partials.new_empty((b.layout.N, columns))) if splits > 1 else partials[:, 0]


def weighted_shift_sum(b: ShiftedBranches, gate: torch.Tensor) -> torch.Tensor:
    """Returns the sum over branches of gate [N, 3, C] * branch. Reads u, writes y."""
    t, layout = b.tile(), b.layout
    shape = layout.N, layout.C, layout.H, layout.W
    y = torch.empty(shape, dtype=b.u.dtype, device=b.u.device, memory_format=layout.memory_format)
    launch(
        _shift_sum_kernel,
        tiles(layout, t),
        b.u,
        gate,
        y,
        b.sizes,
        RUN=b.run,
        TILE=t,
        num_warps=t.num_warps,
    )
    return y


def shift_grads(b: ShiftedBranches, grad: torch.Tensor, gate: torch.Tensor, dtotal: torch.Tensor) -> torch.Tensor:
    """Returns du, like u, whose values are not read. Reads grad and its border once more, writes du."""
    layout, t = b.layout, b.tile()
    grad, du = layout.dense(grad), b.whole.empty(b.u)
    # The border is read again, element by element, and seen in a shape of its own: it is no stream.
    launch(
        _shift_grad_kernel,
        tiles(layout, t),
        grad,
        grad.flatten(2),
        gate,
        dtotal,
        du,
        layout.sizes,
        layout.H,
        layout.W,
        RUN=b.run,
        TILE=t,
        num_warps=t.num_warps,
    )
    return du
