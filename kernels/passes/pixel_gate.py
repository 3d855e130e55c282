"""Passes of spatial gates that are functions of each pixel's own channels."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..core.activations import NONE, SIGMOID, activation_grad, gate_grad
from ..core.heuristics import Tile, cdiv, next_power_of_2
from ..core.launch import launch
from ..core.layout import Layout
from ..core.tiles import dense_offsets, load_channels, load_pixels, tile_mask, x_offsets
from .gate import ADDED, gate_sums, gated
from .partials import Partials, combine


class Upstream(NamedTuple):
    """The tensors that g' = grad * act'(z) is made of, and those that store g' and a sum of it."""

    grad: Any
    x: Any
    residual: Any
    channel_gate: Any
    dresidual: Any  # g', with an activation
    dchannel: Any  # [N, blocks of pixels, C]


@triton.jit
def upstream_tile(
    upstream,
    spatial_gate,
    n,
    row,
    c,
    p,
    size,
    ACTIVATION: tl.constexpr,
    COMBINE: tl.constexpr,
    TILE: tl.constexpr,
):
    """Returns x of one tile, and the sum over channels of g' x [* channel_gate].

    Stores g', and in the row of dchannel the sum over pixels of g' x [* spatial_gate].
    """
    acc_ty = upstream.channel_gate.dtype.element_ty
    mask = tile_mask(c, p, size, TILE)
    offsets = dense_offsets(n, c, p, size, TILE)
    x = tl.load(upstream.x + x_offsets(n, c, p, size, TILE), mask=mask, other=0.0)
    v = x.to(acc_ty)
    g = tl.load(upstream.grad + offsets, mask=mask, other=0.0).to(acc_ty)
    channel_gate = load_channels(upstream.channel_gate, n, c, size)
    if ACTIVATION != NONE:
        z = gated(v, channel_gate, spatial_gate, COMBINE)
        if upstream.residual is not None:
            z += tl.load(upstream.residual + offsets, mask=mask, other=0.0).to(acc_ty)
        g = activation_grad(g, z, ACTIVATION)
        tl.store(upstream.dresidual + offsets, g, mask=mask)
    v *= g
    per_channel = v if COMBINE == ADDED else v * spatial_gate[None, :]
    tl.store(upstream.dchannel + row + c, tl.sum(per_channel, 1), mask=c < size.C)
    return x, tl.sum(v if COMBINE == ADDED else v * channel_gate[:, None], 0)


@triton.jit
def _pixel_grads_kernel(
    upstream,
    spatial_gate_ptr,
    dweight_ptr,
    dbias_ptr,
    dlogits_ptr,
    size,
    ACTIVATION: tl.constexpr,
    COMBINE: tl.constexpr,
    ONE_TILE: tl.constexpr,
    TILE: tl.constexpr,
):
    """g' = grad * act'(z), both sums of g' x, and the linear spatial gate's weight gradient, all channels at once.

    dlogits [N, HW]: the sum over channels of g' x [* channel_gate], times the sigmoid's derivative.
    dchannel, dweight [N, blocks of pixels, C], dbias [N, blocks]: sums over a block of g' x [* spatial_gate], of
    x dlogits, and of dlogits.
    x is read once if all channels are one tile; else it comes from the L2 cache a second time.
    """
    acc_ty = upstream.channel_gate.dtype.element_ty
    C = size.C
    blocks = tl.cdiv(size.HW, TILE.BLOCK_P)
    block = tl.program_id(0) % blocks
    n = (tl.program_id(0) // blocks).to(tl.int64)
    row = (n * blocks + block) * C
    p = block * TILE.BLOCK_P + tl.arange(0, TILE.BLOCK_P)
    c = tl.arange(0, TILE.BLOCK_C)
    spatial_gate = load_pixels(spatial_gate_ptr, n, p, size)
    if ONE_TILE:
        x, dspatial = upstream_tile(upstream, spatial_gate, n, row, c, p, size, ACTIVATION, COMBINE, TILE)
    else:
        dspatial = tl.zeros(p.shape, acc_ty)
        for start in range(0, C, TILE.BLOCK_C):
            _, share = upstream_tile(upstream, spatial_gate, n, row, start + c, p, size, ACTIVATION, COMBINE, TILE)
            dspatial += share
    dlogits = dspatial * gate_grad(spatial_gate, SIGMOID)
    tl.store(dlogits_ptr + n * size.HW + p, dlogits, mask=p < size.HW)
    if dweight_ptr is not None:
        tl.store(dbias_ptr + n * blocks + block, tl.sum(dlogits, 0))
        if ONE_TILE:
            tl.store(dweight_ptr + row + c, tl.sum(x.to(acc_ty) * dlogits[None, :], 1), mask=c < C)
        else:
            for start in range(0, C, TILE.BLOCK_C):
                cs = start + c
                mask = tile_mask(cs, p, size, TILE)
                x = tl.load(upstream.x + x_offsets(n, cs, p, size, TILE), mask=mask, other=0.0).to(acc_ty)
                tl.store(dweight_ptr + row + cs, tl.sum(x * dlogits[None, :], 1), mask=cs < C)


def _pixel_tile(layout: Layout) -> Tile:
    """Returns a tile of as many channels as it can hold, and of few pixels; a program takes all their channels."""
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
) -> tuple[Partials, torch.Tensor]:
    """Returns partials of the channel means [N, C], and sigmoid(ws x + bs) [N, H, W] for ws of C elements.

    Reads x once.
    """
    N, C = layout.N, layout.C
    sums, logits = gate_sums(x, layout, ws.reshape(-1).contiguous())
    gate = sums.new_empty((N, layout.H, layout.W))
    partials = Partials(sums.view(-1, C), None, sums.shape[1], layout.HW)
    return partials, combine(logits, None, gate, bias=bs, activation=SIGMOID.value)


class PixelGrads(NamedTuple):
    """The result of one read of x and grad: g', dresidual, and partial sums of both gates' gradients.

    g is g' = grad * act'(z), dense in x's layout, and dresidual is as in `gate_grads`. dchannel [N, S, C] are partials
    of the channel gate's gradient; dlogits [N, HW] is the spatial gate's gradient before its sigmoid. For the sum of
    the gates, dweight [N, S, C] and dbias [N, S] are partials of the sums over images and pixels of x dlogits and of
    dlogits: the gradients of a linear spatial gate's weights.
    """

    g: torch.Tensor
    dresidual: torch.Tensor
    dchannel: torch.Tensor
    dlogits: torch.Tensor
    dweight: torch.Tensor | None
    dbias: torch.Tensor | None


def pixel_grads(
    grad: torch.Tensor,
    x: torch.Tensor,
    layout: Layout,
    channel_gate: torch.Tensor,
    spatial_gate: torch.Tensor,
    residual: torch.Tensor | None,
    activation: int,
    combine_gates: tl.constexpr,
) -> PixelGrads:
    """Returns the gradients of both gates. Reads x and grad (and the residual) once."""
    N, C, HW = layout.N, layout.C, layout.HW
    t = _pixel_tile(layout)
    blocks = cdiv(HW, t.BLOCK_P)
    dchannel = channel_gate.new_empty((N, blocks, C))
    linear = combine_gates == ADDED
    dweight = torch.empty_like(dchannel) if linear else None
    dbias = channel_gate.new_empty((N, blocks)) if linear else None
    dlogits = channel_gate.new_empty((N, HW))
    grad = layout.dense(grad)
    dresidual = layout.empty_dresidual(x, activation)
    launch(
        _pixel_grads_kernel,
        N * blocks,
        Upstream(grad, x, layout.dense_or_none(residual), channel_gate, dresidual if activation else None, dchannel),
        spatial_gate,
        dweight,
        dbias,
        dlogits,
        layout.sizes,
        ACTIVATION=activation,
        COMBINE=combine_gates.value,
        ONE_TILE=t.BLOCK_C >= C,
        TILE=t,
        num_warps=t.num_warps,
    )
    return PixelGrads(dresidual if activation else grad, dresidual, dchannel, dlogits, dweight, dbias)
