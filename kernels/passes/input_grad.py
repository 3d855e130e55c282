"""The pass that writes dx, the input's gradient, and beside it the gradients of the gates' weights."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..core.heuristics import grain, tile, tiles
from ..core.launch import launch
from ..core.layout import Layout
from ..core.tiles import program_tile, tile_mask, tile_offsets
from .gate import PRODUCT, SUM, gated, map_grad_tile
from .weight_grads import MLPGrads, RowSum, beside, weight_grads_first


@triton.jit
def _any_equals(argmax_ptr, k, size):
    """Whether one of the maxima k counts equals, as a scalar."""
    return tl.min(tl.load(argmax_ptr + k, mask=k < size, other=0), 0) < 0


@triton.jit
def _load_if(condition, pointers, mask, zeros):
    """The values behind the pointers, in the dtype of zeros; zeros, and no memory is read, without the condition."""
    values = zeros
    if condition:
        values = tl.load(pointers, mask=mask, other=0.0).to(zeros.dtype)
    return values


@triton.jit
def _dx_tile(
    grad_ptr, channel_gate_ptr, spatial_gate_ptr, dpooled_ptr, argmax_hw_ptr, dmaps_ptr, argmax_c_ptr, ws_ptr, dz_ptr,
    x_ptr, pooled_ptr, maps_ptr, dx_ptr, C, HW, stride_n, stride_o,
    COMBINE: tl.constexpr, CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """dx = (grad spatial_gate + dmean_map / C + dmax_map at argmax_c) channel_gate + dmean / HW + dmax at argmax_hw.

    Terms whose pointer is None are left out; dpooled is [N, C] (the mean's) or, with argmax_hw, [N, 2, C]. With the sum
    of the gates, dx = grad (channel_gate + spatial_gate) + ws dz + dmean / HW, for ws [C] and dz [N, HW].
    With x_ptr, the argmaxima may count equals, which share; x is read where one does.
    """
    if channel_gate_ptr is not None:
        acc_ty = channel_gate_ptr.dtype.element_ty
    else:
        acc_ty = dpooled_ptr.dtype.element_ty if dpooled_ptr is not None else dmaps_ptr.dtype.element_ty
    n, c, p = program_tile(C, HW, BLOCK_C, BLOCK_P)
    mask = tile_mask(c, p, C, HW, CHANNELS_LAST, ALIGN)
    offsets = tile_offsets(n * C * HW, c, p, C if CHANNELS_LAST else HW, CHANNELS_LAST, ALIGN)
    d = tl.zeros([BLOCK_C, BLOCK_P], acc_ty)
    x = d
    if x_ptr is not None:
        equals = _any_equals(argmax_c_ptr + n * HW, p, HW) | _any_equals(argmax_hw_ptr + n * C, c, C)
        x_offsets = tile_offsets(n * stride_n, c, p, stride_o, CHANNELS_LAST, ALIGN)
        x = _load_if(equals, x_ptr + x_offsets, mask, d)
    if grad_ptr is not None:
        d += tl.load(grad_ptr + offsets, mask=mask, other=0.0).to(acc_ty)
    if COMBINE == SUM:
        spatial_gate = tl.load(spatial_gate_ptr + n * HW + p, mask=p < HW, other=0.0)
        d = gated(d, tl.load(channel_gate_ptr + n * C + c, mask=c < C, other=0.0), spatial_gate, SUM)
        ws = tl.load(ws_ptr + c, mask=c < C, other=0.0).to(acc_ty)
        d += ws[:, None] * tl.load(dz_ptr + n * HW + p, mask=p < HW, other=0.0)[None, :]
    elif spatial_gate_ptr is not None:
        d *= tl.load(spatial_gate_ptr + n * HW + p, mask=p < HW, other=0.0)[None, :]
    if dmaps_ptr is not None:
        u = x
        if x_ptr is not None:
            u *= tl.load(channel_gate_ptr + n * C + c, mask=c < C, other=0.0)[:, None]
        d += map_grad_tile(dmaps_ptr, argmax_c_ptr, maps_ptr, u, n, c, p, C, HW)
    if COMBINE == PRODUCT and channel_gate_ptr is not None:
        d *= tl.load(channel_gate_ptr + n * C + c, mask=c < C, other=0.0)[:, None]
    if dpooled_ptr is not None:
        row = n * C if argmax_hw_ptr is None else n * 2 * C
        d += (tl.load(dpooled_ptr + row + c, mask=c < C, other=0.0) / HW)[:, None]
        if argmax_hw_ptr is not None:
            dmax = tl.load(dpooled_ptr + row + C + c, mask=c < C, other=0.0)
            argmax = tl.load(argmax_hw_ptr + n * C + c, mask=c < C, other=-1)
            hits = p[None, :] == argmax[:, None]
            if x_ptr is not None:
                maximum = tl.load(pooled_ptr + row + C + c, mask=c < C, other=0.0)
                hits = tl.where(argmax[:, None] < 0, x == maximum[:, None], hits)
                dmax /= tl.maximum(-argmax, 1)
            d += tl.where(hits, dmax[:, None], 0.0)
    tl.store(dx_ptr + offsets, d, mask=mask)


@triton.jit(do_not_specialize=["N", "rows", "more_rows"])
def _dx_kernel(
    grad_ptr, channel_gate_ptr, spatial_gate_ptr, dpooled_ptr, argmax_hw_ptr, dmaps_ptr, argmax_c_ptr, ws_ptr, dz_ptr,
    x_ptr, pooled_ptr, maps_ptr, dx_ptr, C, HW, stride_n, stride_o,
    mlp_dz_ptr, hidden_ptr, dhidden_ptr, mlp_pooled_ptr, dw1_ptr, db1_ptr, dw2_ptr, db2_ptr, N, mlp_C, R,
    parts_ptr, out_ptr, rows, L, more_parts_ptr, more_out_ptr, more_rows, more_L,
    COMBINE: tl.constexpr, CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
    BRANCHES: tl.constexpr, HIDDEN_ACTIVATION: tl.constexpr, WEIGHT_C: tl.constexpr, WEIGHT_R: tl.constexpr,
    SUM_S: tl.constexpr, SUM_L: tl.constexpr, MORE_S: tl.constexpr, MORE_L: tl.constexpr,
):  # fmt: skip
    """A tile of dx; the first programs make the weights' gradients, which take as long as many tiles."""
    place = weight_grads_first(
        tl.program_id(0), mlp_dz_ptr, hidden_ptr, dhidden_ptr, mlp_pooled_ptr, dw1_ptr, db1_ptr, dw2_ptr, db2_ptr,
        N, mlp_C, R, parts_ptr, out_ptr, rows, L, more_parts_ptr, more_out_ptr, more_rows, more_L,
        BRANCHES, HIDDEN_ACTIVATION, WEIGHT_C, WEIGHT_R, SUM_S, SUM_L, MORE_S, MORE_L,
    )  # fmt: skip
    if place >= 0:
        _dx_tile(
            grad_ptr, channel_gate_ptr, spatial_gate_ptr, dpooled_ptr, argmax_hw_ptr, dmaps_ptr, argmax_c_ptr, ws_ptr,
            dz_ptr, x_ptr, pooled_ptr, maps_ptr, dx_ptr, C, HW, stride_n, stride_o,
            COMBINE, CHANNELS_LAST, ALIGN, BLOCK_C, BLOCK_P,
        )  # fmt: skip


def input_grad(
    x: torch.Tensor, layout: Layout, grad: torch.Tensor | None = None, channel_gate: torch.Tensor | None = None,
    spatial_gate: torch.Tensor | None = None, dpooled: torch.Tensor | None = None,
    argmax_hw: torch.Tensor | None = None, dmaps: torch.Tensor | None = None, argmax_c: torch.Tensor | None = None,
    ws: torch.Tensor | None = None, dz: torch.Tensor | None = None,
    pooled: torch.Tensor | None = None, maps: torch.Tensor | None = None,
    mlp: MLPGrads | None = None, sums: tuple[RowSum, ...] = (),
) -> torch.Tensor:  # fmt: skip
    """dx of `_dx_tile`, like x. Reads grad, where given, and writes dx; writes the gradients of mlp and sums, too.

    With pooled and maps the argmaxima may count equals, and tiles of x are read where one does; else none are.
    """
    dx = layout.empty(x)
    t = tile(layout, *grain("input gradient" if dmaps is None else "input gradient, maps", layout))
    more, arguments, meta = beside(mlp, sums, t.num_warps)
    launch(
        _dx_kernel, tiles(layout, t) + more,
        grad, channel_gate, spatial_gate, dpooled, argmax_hw, dmaps, argmax_c, ws, dz,
        None if maps is None else x, pooled, maps, dx, layout.C, layout.HW, layout.stride_n, layout.stride_o,
        *arguments, COMBINE=(PRODUCT if dz is None else SUM).value, **t._asdict(), **meta,
    )  # fmt: skip
    return dx
