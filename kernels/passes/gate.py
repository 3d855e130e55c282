"""The passes over x that apply gates, per channel [N, C] and per pixel [N, HW], and their gradients."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..core.heuristics import Reduction, grain, reduction, tile, tiles
from ..core.launch import launch
from ..core.layout import Layout, accumulation_dtype
from ..core.tiles import NONE, activate, activation_grad, program_tile, tile_mask, tile_offsets

# How a channel and a spatial gate become one.
PRODUCT, SUM = map(tl.constexpr, range(2))


@triton.jit
def gated(x, channel_gate, spatial_gate, COMBINE: tl.constexpr):
    """x [BLOCK_C, BLOCK_P] times both gates, [BLOCK_C] and [BLOCK_P], or times their sum."""
    if COMBINE == SUM:
        x *= channel_gate[:, None] + spatial_gate[None, :]
    else:
        x *= channel_gate[:, None]
        x *= spatial_gate[None, :]
    return x


@triton.jit
def _scale_kernel(
    x_ptr, channel_gate_ptr, spatial_gate_ptr, shift_ptr, residual_ptr, y_ptr, C, HW, stride_n, stride_o,
    ACTIVATION: tl.constexpr, COMBINE: tl.constexpr, CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """y = act(x * channel_gate [* spatial_gate] [+ shift [N, C]] [+ residual]), or with the sum of the gates."""
    acc_ty = channel_gate_ptr.dtype.element_ty
    n, c, p = program_tile(C, HW, BLOCK_C, BLOCK_P)
    mask = tile_mask(c, p, C, HW, CHANNELS_LAST, ALIGN)
    offsets = tile_offsets(n * C * HW, c, p, C if CHANNELS_LAST else HW, CHANNELS_LAST, ALIGN)
    x = tl.load(x_ptr + tile_offsets(n * stride_n, c, p, stride_o, CHANNELS_LAST, ALIGN), mask=mask, other=0.0)
    v = x.to(acc_ty)
    channel_gate = tl.load(channel_gate_ptr + n * C + c, mask=c < C, other=0.0)
    if spatial_gate_ptr is not None:
        v = gated(v, channel_gate, tl.load(spatial_gate_ptr + n * HW + p, mask=p < HW, other=0.0), COMBINE)
    else:
        v *= channel_gate[:, None]
    if shift_ptr is not None:
        v += tl.load(shift_ptr + n * C + c, mask=c < C, other=0.0)[:, None]
    if residual_ptr is not None:
        v += tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(acc_ty)
    tl.store(y_ptr + offsets, activate(v, ACTIVATION), mask=mask)


@triton.jit
def _gate_grads_kernel(
    grad_ptr, x_ptr, residual_ptr, channel_gate_ptr, spatial_gate_ptr, dresidual_ptr, dchannel_ptr, dspatial_ptr,
    C, HW, stride_n, stride_o, stride_gate, slots, steps,
    ACTIVATION: tl.constexpr, CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """g' = grad * act'(z), and both sums of g' x in one read; g' = 1 without grad.

    dchannel [N, slots, C]: over pixels, of g' x [* spatial_gate].
    dspatial [N, ., HW]: over channels, of g' x * channel_gate.
    A program keeps a block of the inner axis and walks a part of the outer one. Sums along the outer axis stay in
    registers to the end; those along the inner axis are stored for each block, which is wide to make them few.
    """
    acc_ty = dchannel_ptr.dtype.element_ty
    blocks = tl.cdiv(C, BLOCK_C) if CHANNELS_LAST else tl.cdiv(HW, BLOCK_P)
    block = tl.program_id(0) % blocks
    n = (tl.program_id(0) // blocks).to(tl.int64)
    part = tl.program_id(1)
    first_tile = part * steps
    c = (block if CHANNELS_LAST else first_tile) * BLOCK_C + tl.arange(0, BLOCK_C)
    p = (first_tile if CHANNELS_LAST else block) * BLOCK_P + tl.arange(0, BLOCK_P)

    acc = tl.zeros([BLOCK_C, BLOCK_P], acc_ty)
    for step in range(steps):
        cs = c if CHANNELS_LAST else c + step * BLOCK_C
        ps = p + step * BLOCK_P if CHANNELS_LAST else p
        mask = tile_mask(cs, ps, C, HW, CHANNELS_LAST, ALIGN)
        offsets = tile_offsets(n * C * HW, cs, ps, C if CHANNELS_LAST else HW, CHANNELS_LAST, ALIGN)
        x_offsets = tile_offsets(n * stride_n, cs, ps, stride_o, CHANNELS_LAST, ALIGN)
        channel_gate = tl.load(channel_gate_ptr + n * stride_gate + cs, mask=cs < C, other=0.0).to(acc_ty)[:, None]
        if spatial_gate_ptr is not None:
            spatial_gate = tl.load(spatial_gate_ptr + n * HW + ps, mask=ps < HW, other=0.0)[None, :]
        x = tl.load(x_ptr + x_offsets, mask=mask, other=0.0).to(acc_ty)
        g = 1.0
        if grad_ptr is not None:
            g = tl.load(grad_ptr + offsets, mask=mask, other=0.0).to(acc_ty)
        if ACTIVATION != NONE:
            z = x * channel_gate
            if spatial_gate_ptr is not None:
                z *= spatial_gate
            if residual_ptr is not None:
                z += tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(acc_ty)
            g = activation_grad(g, z, ACTIVATION)
            tl.store(dresidual_ptr + offsets, g, mask=mask)
        gx = g * x
        per_channel = gx * spatial_gate if spatial_gate_ptr is not None else gx
        if CHANNELS_LAST:
            acc += per_channel
            if dspatial_ptr is not None:
                row = (n * blocks + block) * HW
                tl.store(dspatial_ptr + row + ps, tl.sum(gx * channel_gate, 0), mask=ps < HW)
        else:
            tl.store(dchannel_ptr + (n * slots + block) * C + cs, tl.sum(per_channel, 1), mask=cs < C)
            if dspatial_ptr is not None:
                acc += gx * channel_gate
    if CHANNELS_LAST:
        tl.store(dchannel_ptr + (n * slots + part) * C + c, tl.sum(acc, 1), mask=c < C)
    elif dspatial_ptr is not None:
        tl.store(dspatial_ptr + (n * tl.num_programs(1) + part) * HW + p, tl.sum(acc, 0), mask=p < HW)


@triton.jit
def _map_grads_kernel(
    x_ptr, channel_gate_ptr, maps_ptr, dmaps_ptr, argmax_c_ptr, dchannel_ptr, C, HW, stride_n, stride_o,
    slots, first_slot, steps,
    CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """dchannel [N, slots, C], from first_slot on: sum over pixels of x (dmean_map / C + dmax_map at argmax_c).

    With maps_ptr, argmax_c may count equals: those of x * channel_gate that are the maximum.
    """
    acc_ty = dmaps_ptr.dtype.element_ty
    blocks = tl.cdiv(C, BLOCK_C)
    part = tl.program_id(1)
    n = (tl.program_id(0) // blocks).to(tl.int64)
    c = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    acc = tl.zeros([BLOCK_C, BLOCK_P], acc_ty)
    for step in range(steps):
        p = (part * steps + step) * BLOCK_P + tl.arange(0, BLOCK_P)
        mask = tile_mask(c, p, C, HW, CHANNELS_LAST, ALIGN)
        x_offsets = tile_offsets(n * stride_n, c, p, stride_o, CHANNELS_LAST, ALIGN)
        x = tl.load(x_ptr + x_offsets, mask=mask, other=0.0).to(acc_ty)
        u = x
        if maps_ptr is not None:
            u *= tl.load(channel_gate_ptr + n * C + c, mask=c < C, other=0.0)[:, None]
        acc += x * map_grad_tile(dmaps_ptr, argmax_c_ptr, maps_ptr, u, n, c, p, C, HW)
    tl.store(dchannel_ptr + (n * slots + first_slot + part) * C + c, tl.sum(acc, 1), mask=c < C)


@triton.jit
def map_grad_tile(dmaps_ptr, argmax_c_ptr, maps_ptr, u, n, c, p, C, HW):
    """[BLOCK_C, BLOCK_P]: dmean_map / C + dmax_map where c is argmax_c; dmaps, maps [N, 2, HW].

    With maps_ptr and argmax_c < 0, there are -argmax_c maxima, which share it: where u is maps' maximum.
    """
    dmean = tl.load(dmaps_ptr + n * 2 * HW + p, mask=p < HW, other=0.0) / C
    dmax = tl.load(dmaps_ptr + (n * 2 + 1) * HW + p, mask=p < HW, other=0.0)
    argmax = tl.load(argmax_c_ptr + n * HW + p, mask=p < HW, other=-1)
    hits = c[:, None] == argmax[None, :]
    if maps_ptr is not None:
        maximum = tl.load(maps_ptr + (n * 2 + 1) * HW + p, mask=p < HW, other=0.0)
        hits = tl.where(argmax[None, :] < 0, u == maximum[None, :], hits)
        dmax /= tl.maximum(-argmax, 1)
    return dmean[None, :] + tl.where(hits, dmax[None, :], 0.0)


def scale(
    x: torch.Tensor, layout: Layout, channel_gate: torch.Tensor, spatial_gate: torch.Tensor | None,
    residual: torch.Tensor | None, activation: int, combine: tl.constexpr = PRODUCT, shift: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """y = act(x * gates [+ shift [N, C]] + residual), in x's layout. Reads x (and the residual) and writes y."""
    y = layout.empty(x)
    t = tile(layout, *grain("scale", layout))
    launch(
        _scale_kernel, tiles(layout, t),
        x, channel_gate, spatial_gate, shift, None if residual is None else layout.dense(residual), y,
        layout.C, layout.HW, layout.stride_n, layout.stride_o, ACTIVATION=activation, COMBINE=combine.value,
        **t._asdict(),
    )  # fmt: skip
    return y


def gate_grads(
    grad: torch.Tensor, x: torch.Tensor, layout: Layout, channel_gate: torch.Tensor, spatial_gate: torch.Tensor | None,
    residual: torch.Tensor | None, activation: int, more_slots: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """One read of x and grad (and the residual). Returns

    - g' = grad * act'(z), dense in x's layout: grad itself without an activation;
    - dresidual: g' where it had to be written, else empty [0];
    - parts [N, S + more_slots, C] of the sum over pixels of g' x [* spatial_gate]; the last more_slots are not written;
    - parts [N, S, HW] of the sum over channels of g' x * channel_gate, where there is a spatial gate.
    """
    N, C, HW = layout.N, layout.C, layout.HW
    name = "gate gradient" if spatial_gate is None else "gate gradients"
    t, blocks, parts, steps = reduction(layout, not layout.channels_last, *grain(name, layout))
    slots_c, slots_p = (parts, blocks) if layout.channels_last else (blocks, parts)
    dchannel = channel_gate.new_empty((N, slots_c + more_slots, C))
    dspatial = None if spatial_gate is None else channel_gate.new_empty((N, slots_p, HW))
    grad = layout.dense(grad)
    dresidual = layout.empty(x) if activation else x.new_empty(0)
    launch(
        _gate_grads_kernel, N * blocks,
        grad, x, layout.dense(residual) if activation and residual is not None else None, channel_gate, spatial_gate,
        dresidual, dchannel, dspatial, C, HW, layout.stride_n, layout.stride_o, C, slots_c + more_slots,
        steps, ACTIVATION=activation, **t._asdict(), parts=parts,
    )  # fmt: skip
    return dresidual if activation else grad, dresidual, dchannel, dspatial


def gate_sums(x: torch.Tensor, layout: Layout, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One read of x: parts [N, S, C] of its sum over pixels, and [N, S, HW] of the sum over channels of x * weight.

    weight is [C], in any dtype.
    """
    N, C, HW = layout.N, layout.C, layout.HW
    t, blocks, parts, steps = reduction(layout, not layout.channels_last, *grain("gate gradients", layout))
    slots_c, slots_p = (parts, blocks) if layout.channels_last else (blocks, parts)
    a = accumulation_dtype(x)
    sums, weighted = x.new_empty((N, slots_c, C), dtype=a), x.new_empty((N, slots_p, HW), dtype=a)
    launch(
        _gate_grads_kernel, N * blocks,
        None, x, None, weight, None, None, sums, weighted, C, HW, layout.stride_n, layout.stride_o, 0, slots_c, steps,
        ACTIVATION=NONE.value, **t._asdict(), parts=parts,
    )  # fmt: skip
    return sums, weighted


def map_grads_reduction(layout: Layout) -> Reduction:
    """map_grads fills a slot for each part. Each block of channels reads the maps again."""
    return reduction(layout, False, *grain("map gradients", layout))


def map_grads(
    x: torch.Tensor, layout: Layout, dmaps: torch.Tensor, argmax_c: torch.Tensor, dchannel: torch.Tensor,
    channel_gate: torch.Tensor | None = None, maps: torch.Tensor | None = None,
) -> None:  # fmt: skip
    """Fills the last slots of dchannel [N, S, C] with parts of the sum over pixels of x * du. Reads x once.

    With channel_gate and maps, argmax_c may count equals.
    """
    t, blocks, parts, steps = map_grads_reduction(layout)
    slots = dchannel.shape[1]
    launch(
        _map_grads_kernel, layout.N * blocks, x, channel_gate, maps, dmaps, argmax_c, dchannel,
        layout.C, layout.HW, layout.stride_n, layout.stride_o, slots, slots - parts, steps, **t._asdict(), parts=parts,
    )  # fmt: skip
