"""Passes over x that apply gates, per channel [N, C] and per pixel [N, HW], and that make the gates' gradients."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..core.activations import NONE, activate, activation_grad
from ..core.heuristics import grain, reduction, tile, tiles
from ..core.launch import launch
from ..core.layout import Layout, accumulation_dtype
from ..core.tiles import (
    dense_offsets,
    load_channels,
    load_pixels,
    program_tile,
    tile_full,
    tile_mask,
    x_offsets,
)

# How a channel gate and a spatial gate become one.
MULTIPLIED, ADDED = map(tl.constexpr, range(2))


@triton.jit
def gated(x, channel_gate, spatial_gate, COMBINE: tl.constexpr):
    """Returns x [BLOCK_C, BLOCK_P] times both gates, [BLOCK_C] and [BLOCK_P], or times their sum."""
    if COMBINE == ADDED:
        x *= channel_gate[:, None] + spatial_gate[None, :]
    else:
        x *= channel_gate[:, None]
        x *= spatial_gate[None, :]
    return x


@triton.jit
def _apply_gates_kernel(
    x_ptr,
    channel_gate_ptr,
    spatial_gate_ptr,
    shift_ptr,
    residual_ptr,
    y_ptr,
    size,
    ACTIVATION: tl.constexpr,
    COMBINE: tl.constexpr,
    TILE: tl.constexpr,
):
    """y = act(x * channel_gate [* spatial_gate] [+ shift [N, C]] [+ residual]), or with the sum of the gates."""
    acc_ty = channel_gate_ptr.dtype.element_ty
    n, c, p = program_tile(size, TILE)
    mask = tile_mask(c, p, size, TILE)
    offsets = dense_offsets(n, c, p, size, TILE)
    v = tl.load(x_ptr + x_offsets(n, c, p, size, TILE), mask=mask, other=0.0).to(acc_ty)
    channel_gate = load_channels(channel_gate_ptr, n, c, size)
    if spatial_gate_ptr is not None:
        v = gated(v, channel_gate, load_pixels(spatial_gate_ptr, n, p, size), COMBINE)
    else:
        v *= channel_gate[:, None]
    if shift_ptr is not None:
        v += load_channels(shift_ptr, n, c, size)[:, None]
    if residual_ptr is not None:
        v += tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(acc_ty)
    tl.store(y_ptr + offsets, activate(v, ACTIVATION), mask=mask)


@triton.jit
def _gate_grads_kernel(
    grad_ptr,
    x_ptr,
    residual_ptr,
    channel_gate_ptr,
    spatial_gate_ptr,
    dresidual_ptr,
    dchannel_ptr,
    dspatial_ptr,
    size,
    stride_gate,
    partials,
    steps,
    ACTIVATION: tl.constexpr,
    TILE: tl.constexpr,
):
    """g' = grad * act'(z), and both sums of g' x in one read; g' = 1 without grad.

    dchannel [N, partials, C]: over pixels, of g' x [* spatial_gate].
    dspatial [N, ., HW]: over channels, of g' x * channel_gate.
    A program keeps a block of the inner axis and walks a share of the outer one. Sums along the outer axis stay in
    registers to the end; those along the inner axis are stored for each block, which is wide to make them few.
    """
    acc_ty = dchannel_ptr.dtype.element_ty
    blocks = tl.cdiv(size.C, TILE.BLOCK_C) if TILE.CHANNELS_LAST else tl.cdiv(size.HW, TILE.BLOCK_P)
    block = tl.program_id(0) % blocks
    n = (tl.program_id(0) // blocks).to(tl.int64)
    share = tl.program_id(1)
    first_tile = share * steps
    c = (block if TILE.CHANNELS_LAST else first_tile) * TILE.BLOCK_C + tl.arange(0, TILE.BLOCK_C)
    p = (first_tile if TILE.CHANNELS_LAST else block) * TILE.BLOCK_P + tl.arange(0, TILE.BLOCK_P)

    acc = tile_full(0, TILE, acc_ty)
    for step in range(steps):
        cs = c if TILE.CHANNELS_LAST else c + step * TILE.BLOCK_C
        ps = p + step * TILE.BLOCK_P if TILE.CHANNELS_LAST else p
        mask = tile_mask(cs, ps, size, TILE)
        offsets = dense_offsets(n, cs, ps, size, TILE)
        gate = tl.load(channel_gate_ptr + n * stride_gate + cs, mask=cs < size.C, other=0.0).to(acc_ty)[:, None]
        if spatial_gate_ptr is not None:
            spatial_gate = load_pixels(spatial_gate_ptr, n, ps, size)[None, :]
        x = tl.load(x_ptr + x_offsets(n, cs, ps, size, TILE), mask=mask, other=0.0).to(acc_ty)
        g = 1.0
        if grad_ptr is not None:
            g = tl.load(grad_ptr + offsets, mask=mask, other=0.0).to(acc_ty)
        if ACTIVATION != NONE:
            z = x * gate
            if spatial_gate_ptr is not None:
                z *= spatial_gate
            if residual_ptr is not None:
                z += tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(acc_ty)
            g = activation_grad(g, z, ACTIVATION)
            tl.store(dresidual_ptr + offsets, g, mask=mask)
        gx = g * x
        per_channel = gx * spatial_gate if spatial_gate_ptr is not None else gx
        if TILE.CHANNELS_LAST:
            acc += per_channel
            if dspatial_ptr is not None:
                row = (n * blocks + block) * size.HW
                tl.store(dspatial_ptr + row + ps, tl.sum(gx * gate, 0), mask=ps < size.HW)
        else:
            tl.store(dchannel_ptr + (n * partials + block) * size.C + cs, tl.sum(per_channel, 1), mask=cs < size.C)
            if dspatial_ptr is not None:
                acc += gx * gate
    if TILE.CHANNELS_LAST:
        tl.store(dchannel_ptr + (n * partials + share) * size.C + c, tl.sum(acc, 1), mask=c < size.C)
    elif dspatial_ptr is not None:
        row = (n * tl.num_programs(1) + share) * size.HW
        tl.store(dspatial_ptr + row + p, tl.sum(acc, 0), mask=p < size.HW)


def apply_gates(
    x: torch.Tensor,
    layout: Layout,
    channel_gate: torch.Tensor,
    spatial_gate: torch.Tensor | None,
    residual: torch.Tensor | None,
    activation: int,
    combine: tl.constexpr = MULTIPLIED,
    shift: torch.Tensor | None = None,
) -> torch.Tensor:
    """Returns y = act(x * gates [+ shift [N, C]] + residual) in x's layout.

    Reads x (and the residual), writes y.
    """
    y = layout.empty(x)
    t = tile(layout, *grain("scale", layout))
    launch(
        _apply_gates_kernel,
        tiles(layout, t),
        x,
        channel_gate,
        spatial_gate,
        shift,
        layout.dense_or_none(residual),
        y,
        layout.sizes,
        ACTIVATION=activation,
        COMBINE=combine.value,
        TILE=t,
        num_warps=t.num_warps,
    )
    return y


def gate_grads(
    grad: torch.Tensor,
    x: torch.Tensor,
    layout: Layout,
    channel_gate: torch.Tensor,
    spatial_gate: torch.Tensor | None,
    residual: torch.Tensor | None,
    activation: int,
    more_partials: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Returns (g', dresidual, dchannel, dspatial) from one read of x and grad (and the residual).

    - g' = grad * act'(z), dense in x's layout: grad itself without an activation;
    - dresidual: g' if it had to be written, else empty [0];
    - dchannel: partials [N, S + more_partials, C] of the sum over pixels of g' x [* spatial_gate]; the last
      ``more_partials`` are not written;
    - dspatial: partials [N, S, HW] of the sum over channels of g' x * channel_gate; None without a spatial gate.
    """
    N, C, HW = layout.N, layout.C, layout.HW
    name = "gate gradient" if spatial_gate is None else "gate gradients"
    t, blocks, splits, steps = reduction(layout, not layout.channels_last, *grain(name, layout))
    partials_c, partials_p = (splits, blocks) if layout.channels_last else (blocks, splits)
    dchannel = channel_gate.new_empty((N, partials_c + more_partials, C))
    dspatial = None if spatial_gate is None else channel_gate.new_empty((N, partials_p, HW))
    grad = layout.dense(grad)
    dresidual = layout.empty_dresidual(x, activation)
    launch(
        _gate_grads_kernel,
        N * blocks,
        grad,
        x,
        layout.dense_or_none(residual if activation else None),
        channel_gate,
        spatial_gate,
        dresidual,
        dchannel,
        dspatial,
        layout.sizes,
        C,
        partials_c + more_partials,
        steps,
        ACTIVATION=activation,
        TILE=t,
        num_warps=t.num_warps,
        splits=splits,
    )
    return dresidual if activation else grad, dresidual, dchannel, dspatial


def gate_sums(x: torch.Tensor, layout: Layout, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns partials [N, S, C] of x's sum over pixels, and [N, S, HW] of the sum over channels of x * weight [C].

    Reads x once. The weight has any dtype.
    """
    N, C, HW = layout.N, layout.C, layout.HW
    t, blocks, splits, steps = reduction(layout, not layout.channels_last, *grain("gate gradients", layout))
    partials_c, partials_p = (splits, blocks) if layout.channels_last else (blocks, splits)
    acc = accumulation_dtype(x)
    sums, weighted = x.new_empty((N, partials_c, C), dtype=acc), x.new_empty((N, partials_p, HW), dtype=acc)
    launch(
        _gate_grads_kernel,
        N * blocks,
        None,
        x,
        None,
        weight,
        None,
        None,
        sums,
        weighted,
        layout.sizes,
        0,
        partials_c,
        steps,
        ACTIVATION=NONE.value,
        TILE=t,
        num_warps=t.num_warps,
        splits=splits,
    )
    return sums, weighted
