"""Passes of spatial gates that are functions of each pixel's own channels."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..core.heuristics import Tile, cdiv, next_power_of_2
from ..core.launch import launch
from ..core.layout import Layout
from ..core.tiles import NONE, SIGMOID, activation_grad, gate_grad, tile_mask, tile_offsets
from .gate import SUM, gate_sums, gated
from .pool import Parts, combine


@triton.jit
def upstream_tile(
    grad_ptr, x_ptr, residual_ptr, channel_gate_ptr, dresidual_ptr, dchannel_ptr, spatial_gate, n, row, c, p,
    C, HW, stride_n, stride_o,
    ACTIVATION: tl.constexpr, COMBINE: tl.constexpr, CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Of one tile: x, and the sum over channels of g' x [* channel_gate]; stores g' and the sum over pixels."""
    acc_ty = channel_gate_ptr.dtype.element_ty
    mask = tile_mask(c, p, C, HW, CHANNELS_LAST, ALIGN)
    offsets = tile_offsets(n * C * HW, c, p, C if CHANNELS_LAST else HW, CHANNELS_LAST, ALIGN)
    x = tl.load(x_ptr + tile_offsets(n * stride_n, c, p, stride_o, CHANNELS_LAST, ALIGN), mask=mask, other=0.0)
    v = x.to(acc_ty)
    g = tl.load(grad_ptr + offsets, mask=mask, other=0.0).to(acc_ty)
    channel_gate = tl.load(channel_gate_ptr + n * C + c, mask=c < C, other=0.0)
    if ACTIVATION != NONE:
        z = gated(v, channel_gate, spatial_gate, COMBINE)
        if residual_ptr is not None:
            z += tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(acc_ty)
        g = activation_grad(g, z, ACTIVATION)
        tl.store(dresidual_ptr + offsets, g, mask=mask)
    v *= g
    per_channel = v if COMBINE == SUM else v * spatial_gate[None, :]
    tl.store(dchannel_ptr + row + c, tl.sum(per_channel, 1), mask=c < C)
    return x, tl.sum(v if COMBINE == SUM else v * channel_gate[:, None], 0)


@triton.jit
def _pixel_grads_kernel(
    grad_ptr, x_ptr, residual_ptr, channel_gate_ptr, spatial_gate_ptr, dresidual_ptr, dchannel_ptr, dweight_ptr,
    dbias_ptr, dz_ptr, C, HW, stride_n, stride_o,
    ACTIVATION: tl.constexpr, COMBINE: tl.constexpr, ONE_TILE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """g' = grad * act'(z), both sums of g' x, and the linear spatial gate's weight gradient, all channels at once.

    dz [N, HW]: the sum over channels of g' x [* channel_gate], times the sigmoid's derivative.
    dchannel, dweight [N, blocks of pixels, C], dbias [N, blocks]: sums over a block of g' x [* spatial_gate], of x dz,
    and of dz.
    Where all channels are one tile, x is read once; else it comes from the L2 cache a second time.
    """
    acc_ty = channel_gate_ptr.dtype.element_ty
    blocks = tl.cdiv(HW, BLOCK_P)
    block = tl.program_id(0) % blocks
    n = (tl.program_id(0) // blocks).to(tl.int64)
    row = (n * blocks + block) * C
    p = block * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tl.arange(0, BLOCK_C)
    spatial_gate = tl.load(spatial_gate_ptr + n * HW + p, mask=p < HW, other=0.0)
    if ONE_TILE:
        x, dspatial = upstream_tile(
            grad_ptr, x_ptr, residual_ptr, channel_gate_ptr, dresidual_ptr, dchannel_ptr, spatial_gate, n, row, c, p,
            C, HW, stride_n, stride_o, ACTIVATION, COMBINE, CHANNELS_LAST, ALIGN,
        )  # fmt: skip
    else:
        dspatial = tl.zeros([BLOCK_P], acc_ty)
        for start in range(0, C, BLOCK_C):
            _, part = upstream_tile(
                grad_ptr, x_ptr, residual_ptr, channel_gate_ptr, dresidual_ptr, dchannel_ptr, spatial_gate, n, row,
                start + c, p, C, HW, stride_n, stride_o, ACTIVATION, COMBINE, CHANNELS_LAST, ALIGN,
            )  # fmt: skip
            dspatial += part
    dz = dspatial * gate_grad(spatial_gate, SIGMOID)
    tl.store(dz_ptr + n * HW + p, dz, mask=p < HW)
    if dweight_ptr is not None:
        tl.store(dbias_ptr + n * blocks + block, tl.sum(dz, 0))
        if ONE_TILE:
            tl.store(dweight_ptr + row + c, tl.sum(x.to(acc_ty) * dz[None, :], 1), mask=c < C)
        else:
            for start in range(0, C, BLOCK_C):
                cs = start + c
                mask = tile_mask(cs, p, C, HW, CHANNELS_LAST, ALIGN)
                offsets = tile_offsets(n * stride_n, cs, p, stride_o, CHANNELS_LAST, ALIGN)
                x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(acc_ty)
                tl.store(dweight_ptr + row + cs, tl.sum(x * dz[None, :], 1), mask=cs < C)


def pixel_tile(layout: Layout) -> Tile:
    """As many channels as a tile can hold, of few pixels; each program takes all channels of its pixels."""
    block_c = min(next_power_of_2(layout.C), 256)
    wide = layout.align >= 8
    elements = 8192 if wide else 4096
    if wide and not layout.channels_last and block_c == 256:
        elements *= 2  # 64 pixels, so that rows of bfloat16 are whole cache lines
    block_p = min(next_power_of_2(layout.HW), elements // block_c)
    num_warps = min(max(block_c * block_p // (1024 if wide else 512), 1), 8)  # more would leave too few registers
    return Tile(layout.channels_last, layout.align, block_c, block_p, num_warps)


def linear_gate(
    x: torch.Tensor, layout: Layout, ws: torch.Tensor, bs: torch.Tensor | None
) -> tuple[Parts, torch.Tensor]:
    """Parts of the channel means [N, C], and sigmoid(ws x + bs) [N, H, W], for ws of C elements. Reads x once."""
    N, C = layout.N, layout.C
    sums, logits = gate_sums(x, layout, ws.reshape(-1).contiguous())
    gate = sums.new_empty((N, layout.H, layout.W))
    parts = Parts(sums.view(-1, C), None, sums.shape[1], layout.HW)
    return parts, combine(logits, None, gate, bias=bs, result=SIGMOID)


class PixelGrads(NamedTuple):
    """What one read of x and grad gives.

    g is g' = grad * act'(z), dense in x's layout, and dresidual as of `gate_grads`; parts [N, S, C] are of the channel
    gate's gradient, dz [N, HW] is that of the spatial gate before its sigmoid. For the sum of the gates, rows [N, S, C]
    and [N, S] are of the sums over images and pixels of x dz and of dz: a linear spatial gate's weights' gradients.
    """

    g: torch.Tensor
    dresidual: torch.Tensor
    parts: torch.Tensor
    dz: torch.Tensor
    dweight: torch.Tensor | None
    dbias: torch.Tensor | None


def both_grads(
    grad: torch.Tensor, x: torch.Tensor, layout: Layout, channel_gate: torch.Tensor, spatial_gate: torch.Tensor,
    residual: torch.Tensor | None, activation: int, combine_gates: tl.constexpr,
) -> PixelGrads:  # fmt: skip
    """The gradients of both gates. Reads x and grad (and the residual) once."""
    N, C, HW = layout.N, layout.C, layout.HW
    t = pixel_tile(layout)
    blocks = cdiv(HW, t.BLOCK_P)
    dchannel = channel_gate.new_empty((N, blocks, C))
    linear = combine_gates == SUM
    dweight = torch.empty_like(dchannel) if linear else None
    dbias = channel_gate.new_empty((N, blocks)) if linear else None
    dz = channel_gate.new_empty((N, HW))
    grad = layout.dense(grad)
    dresidual = layout.empty(x) if activation else x.new_empty(0)
    launch(
        _pixel_grads_kernel, N * blocks,
        grad, x, None if residual is None else layout.dense(residual), channel_gate, spatial_gate,
        dresidual if activation else None, dchannel, dweight, dbias, dz, C, HW, layout.stride_n, layout.stride_o,
        ACTIVATION=activation, COMBINE=combine_gates.value, ONE_TILE=t.BLOCK_C >= C, **t._asdict(),
    )  # fmt: skip
    return PixelGrads(dresidual if activation else grad, dresidual, dchannel, dz, dweight, dbias)
