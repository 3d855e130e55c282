"""The pass that writes dx, the input's gradient, and beside it the gradients of the gates' weights."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..core.heuristics import grain, tile, tiles
from ..core.launch import launch
from ..core.layout import Layout
from ..core.tiles import dense_offsets, load_channels, load_pixels, program_tile, tile_full, tile_mask, x_offsets
from .gate import ADDED, MULTIPLIED, gated
from .map_grads import map_grad_tile
from .weight_grads import MLPGrads, RowSum, mlp_grads_first, row_sum_first, row_sum_works


class Terms(NamedTuple):
    """The terms of dx, as kernels take them; terms that are None are left out.

    dx = (grad spatial_gate + dmean_map / C + dmax_map at argmax_c) channel_gate + dmean / HW + dmax at argmax_hw. With
    the sum of the gates, dx = grad (channel_gate + spatial_gate) + ws dlogits + dmean / HW.
    """

    grad: Any = None  # dense in x's layout
    channel_gate: Any = None  # [N, C]
    spatial_gate: Any = None  # [N, HW]
    dpooled: Any = None  # dmean [N, C] or, with argmax_hw, dmean and dmax [N, 2, C]
    argmax_hw: Any = None  # [N, C]
    dmaps: Any = None  # dmean_map and dmax_map [N, 2, HW]
    argmax_c: Any = None  # [N, HW]
    ws: Any = None  # [C], of a linear spatial gate
    dlogits: Any = None  # [N, HW], the gradient before that gate's sigmoid


class Ties(NamedTuple):
    """The tensors that tell which elements share a maximum, for argmaxima that may count ties."""

    x: Any
    pooled: Any  # [N, 2, C]
    maps: Any  # [N, 2, HW]


@triton.jit
def _any_ties(argmax_ptr, k, size):
    """Returns True if any entry k of argmax is negative, that is, a count of ties instead of an index."""
    return tl.min(tl.load(argmax_ptr + k, mask=k < size, other=0), 0) < 0


@triton.jit
def _load_if(condition, pointers, mask, zeros):
    """Loads values in the dtype of zeros; without the condition, returns zeros and reads no memory."""
    values = zeros
    if condition:
        values = tl.load(pointers, mask=mask, other=0.0).to(zeros.dtype)
    return values


@triton.jit
def _add_pooled_grad(d, terms, ties, x, n, c, p, size):
    """Returns d + dmean / HW + dmax at argmax_hw."""
    C = size.C
    row = n * C if terms.argmax_hw is None else n * 2 * C
    d += (tl.load(terms.dpooled + row + c, mask=c < C, other=0.0) / size.HW)[:, None]
    if terms.argmax_hw is not None:
        dmax = tl.load(terms.dpooled + row + C + c, mask=c < C, other=0.0)
        argmax = tl.load(terms.argmax_hw + n * C + c, mask=c < C, other=-1)
        hits = p[None, :] == argmax[:, None]
        if ties is not None:
            maximum = tl.load(ties.pooled + row + C + c, mask=c < C, other=0.0)
            hits = tl.where(argmax[:, None] < 0, x == maximum[:, None], hits)
            dmax /= tl.maximum(-argmax, 1)
        d += tl.where(hits, dmax[:, None], 0.0)
    return d


@triton.jit
def _dx_tile(terms, ties, dx_ptr, size, COMBINE: tl.constexpr, TILE: tl.constexpr):
    """Writes this program's tile of dx, as `Terms` says. With ties, reads x where an argmax counts them."""
    if terms.channel_gate is not None:
        acc_ty = terms.channel_gate.dtype.element_ty
    else:
        acc_ty = terms.dpooled.dtype.element_ty if terms.dpooled is not None else terms.dmaps.dtype.element_ty
    n, c, p = program_tile(size, TILE)
    mask = tile_mask(c, p, size, TILE)
    offsets = dense_offsets(n, c, p, size, TILE)
    d = tile_full(0, TILE, acc_ty)
    x = d
    if ties is not None:
        tied = _any_ties(terms.argmax_c + n * size.HW, p, size.HW) | _any_ties(terms.argmax_hw + n * size.C, c, size.C)
        x = _load_if(tied, ties.x + x_offsets(n, c, p, size, TILE), mask, d)
    if terms.grad is not None:
        d += tl.load(terms.grad + offsets, mask=mask, other=0.0).to(acc_ty)
    if COMBINE == ADDED:
        spatial_gate = load_pixels(terms.spatial_gate, n, p, size)
        d = gated(d, load_channels(terms.channel_gate, n, c, size), spatial_gate, ADDED)
        ws = tl.load(terms.ws + c, mask=c < size.C, other=0.0).to(acc_ty)
        d += ws[:, None] * load_pixels(terms.dlogits, n, p, size)[None, :]
    elif terms.spatial_gate is not None:
        d *= load_pixels(terms.spatial_gate, n, p, size)[None, :]
    if terms.dmaps is not None:
        if ties is not None:
            u = x * load_channels(terms.channel_gate, n, c, size)[:, None]
            d += map_grad_tile(terms.dmaps, terms.argmax_c, ties.maps, u, n, c, p, size)
        else:
            d += map_grad_tile(terms.dmaps, terms.argmax_c, None, None, n, c, p, size)
    if COMBINE == MULTIPLIED and terms.channel_gate is not None:
        d *= load_channels(terms.channel_gate, n, c, size)[:, None]
    if terms.dpooled is not None:
        d = _add_pooled_grad(d, terms, ties, x, n, c, p, size)
    tl.store(dx_ptr + offsets, d, mask=mask)


@triton.jit(do_not_specialize=["rows_1", "rows_2"])
def _dx_kernel(
    terms,
    ties,
    dx_ptr,
    size,
    sum_1,
    rows_1,
    sum_2,
    rows_2,
    COMBINE: tl.constexpr,
    SUM_1: tl.constexpr,
    SUM_2: tl.constexpr,
    TILE: tl.constexpr,
):
    """A tile of dx. The first programs do up to two sums over rows, which take as long as many tiles."""
    program = row_sum_first(tl.program_id(0), sum_1, rows_1, SUM_1)
    program = row_sum_first(program, sum_2, rows_2, SUM_2)
    if program >= 0:
        _dx_tile(terms, ties, dx_ptr, size, COMBINE, TILE)


@triton.jit(do_not_specialize=["N", "rows_1", "rows_2"])
def _dx_mlp_kernel(
    terms,
    ties,
    dx_ptr,
    size,
    sum_1,
    rows_1,
    sum_2,
    rows_2,
    mlp,
    N,
    COMBINE: tl.constexpr,
    SUM_1: tl.constexpr,
    SUM_2: tl.constexpr,
    MLP: tl.constexpr,
    TILE: tl.constexpr,
):
    """`_dx_kernel`, with the gradients of an MLP's weights before the sums."""
    program = mlp_grads_first(tl.program_id(0), mlp, N, MLP)
    program = row_sum_first(program, sum_1, rows_1, SUM_1)
    program = row_sum_first(program, sum_2, rows_2, SUM_2)
    if program >= 0:
        _dx_tile(terms, ties, dx_ptr, size, COMBINE, TILE)


def input_grad(
    x: torch.Tensor,
    layout: Layout,
    terms: Terms,
    pooled: torch.Tensor | None = None,
    maps: torch.Tensor | None = None,
    mlp: MLPGrads | None = None,
    sums: tuple[RowSum, ...] = (),
) -> torch.Tensor:
    """Returns dx, like x, and writes the gradients of mlp and sums. Reads grad, if given, and writes dx.

    With pooled and maps the argmaxima may count ties, and tiles of x with ties are read; else x is not read.
    """
    dx = layout.empty(x)
    t = tile(layout, *grain("input gradient" if terms.dmaps is None else "input gradient, maps", layout))
    first, second = row_sum_works(sums, t.num_warps)
    arguments = (
        terms,
        None if maps is None else Ties(x, pooled, maps),
        dx,
        layout.sizes,
        first.operands,
        first.rows,
        second.operands,
        second.rows,
    )
    meta = {
        "COMBINE": (MULTIPLIED if terms.dlogits is None else ADDED).value,
        "SUM_1": first.tile,
        "SUM_2": second.tile,
        "TILE": t,
        "num_warps": t.num_warps,
    }
    programs = tiles(layout, t) + first.programs + second.programs
    if mlp is None or not mlp.images:
        launch(_dx_kernel, programs, *arguments, **meta)
    else:
        m = mlp.tile()
        launch(_dx_mlp_kernel, mlp.programs(m) + programs, *arguments, mlp.operands, mlp.images, MLP=m, **meta)
    return dx
