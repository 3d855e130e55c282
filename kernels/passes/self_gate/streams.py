"""Streaming passes of self-gates, from statistics of the channels: the gate, and backward the sums and dx."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...core import heuristics
from ...core.activations import NONE, activate, activation_grad
from ...core.heuristics import PROGRAMS, SCALE_TILE, tile, tiles
from ...core.launch import launch
from ...core.layout import Layout
from ...core.tiles import dense_offsets, tile_mask
from .gate import Gate, gate_reduction, gate_tile, halved
from .tiles import (
    Statistics,
    channel_tile,
    deviation_and_gate,
    dx_tile,
    load_statistics,
    load_x,
    logit_parameters,
    store_dx,
    summands,
    x_channel,
)


@triton.jit
def _self_gate_kernel(
    x_ptr,
    z_ptr,
    residual_ptr,
    y_ptr,
    stats,
    weights,
    size,
    K,
    KIND: tl.constexpr,
    ACTIVATION: tl.constexpr,
    TILE: tl.constexpr,
):
    """y = act(x * gate + residual), or with a z act(z * gate + residual), from statistics."""
    acc_ty = stats.mean.dtype.element_ty
    n, c0, c, p = channel_tile(size, TILE)
    mask = tile_mask(c, p, size, TILE)
    offsets = dense_offsets(n, c, p, size, TILE)
    x = load_x(x_ptr, n, c0, c, p, size, KIND, TILE).to(acc_ty)
    cx = x_channel(c, size.C, KIND)
    mean, scale = load_statistics(stats, n, c, cx, size)
    a, b, k, spatial = logit_parameters(weights, cx, size.C, K, acc_ty, KIND)
    _, s = deviation_and_gate(x, mean, scale, a, b, k, spatial, KIND)
    v = x * s
    if z_ptr is not None:
        v = tl.load(z_ptr + offsets, mask=mask, other=0.0).to(acc_ty) * s
    if residual_ptr is not None:
        v += tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(acc_ty)
    tl.store(y_ptr + offsets, activate(v, ACTIVATION), mask=mask)


@triton.jit
def _self_gate_sums_kernel(
    grad_ptr,
    x_ptr,
    z_ptr,
    residual_ptr,
    stats,
    weights,
    dresidual_ptr,
    dx_ptr,
    dz_ptr,
    partials_ptr,
    size,
    K,
    steps,
    KIND: tl.constexpr,
    ACTIVATION: tl.constexpr,
    TILE: tl.constexpr,
):
    """partials [N, splits, 2, C]: sums of `summands` over shares of the pixels; g' if there is an activation.

    Each lane has sums of its own until the end: across warps they meet in shared memory, too slow for every step.
    With dx_ptr, the statistics are given and do not depend on x: dx = g s + r a. The first term is dz if there is a z.
    """
    BLOCK_C: tl.constexpr = TILE.BLOCK_C
    BLOCK_P: tl.constexpr = TILE.BLOCK_P
    acc_ty = stats.mean.dtype.element_ty
    C = size.C
    blocks = tl.cdiv(C, BLOCK_C)
    n = (tl.program_id(0) // blocks).to(tl.int64)
    share = tl.program_id(1)
    c0 = tl.program_id(0) % blocks * BLOCK_C
    c = c0 + tl.arange(0, BLOCK_C)
    cx = x_channel(c, C, KIND)
    mean, scale = load_statistics(stats, n, c, cx, size)
    a, b, k, spatial = logit_parameters(weights, cx, C, K, acc_ty, KIND)
    # With the channels inside, a thread has several pixels of a tile, and these are in its two halves.
    HALVES: tl.constexpr = 2 if TILE.CHANNELS_LAST and BLOCK_P > 1 else 1
    firsts = tl.zeros([BLOCK_C, BLOCK_P // HALVES], acc_ty)
    seconds = tl.zeros([BLOCK_C, BLOCK_P // HALVES], acc_ty)
    for step in range(steps):
        p = (share * steps + step) * BLOCK_P + tl.arange(0, BLOCK_P)
        mask = tile_mask(c, p, size, TILE)
        offsets = dense_offsets(n, c, p, size, TILE)
        x = load_x(x_ptr, n, c0, c, p, size, KIND, TILE).to(acc_ty)
        g = tl.load(grad_ptr + offsets, mask=mask, other=0.0).to(acc_ty)
        d, s = deviation_and_gate(x, mean, scale, a, b, k, spatial, KIND)
        z = x
        if z_ptr is not None:
            z = tl.load(z_ptr + offsets, mask=mask, other=0.0).to(acc_ty)
        if ACTIVATION != NONE:
            pre = z * s
            if residual_ptr is not None:
                pre += tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(acc_ty)
            g = activation_grad(g, pre, ACTIVATION)
            tl.store(dresidual_ptr + offsets, g, mask=mask)
        base = g * s
        r = base * z * (1 - s)
        first, second = summands(r, d, KIND)
        firsts += tl.sum(tl.reshape(first, [BLOCK_C, HALVES, BLOCK_P // HALVES]), 1)
        seconds += tl.sum(tl.reshape(second, [BLOCK_C, HALVES, BLOCK_P // HALVES]), 1)
        if dx_ptr is not None:
            dx = r * (a * scale)[:, None]
            if z_ptr is None:
                dx += base
            else:
                tl.store(dz_ptr + offsets, base, mask=mask)
            store_dx(dx_ptr, dx, n, c0, c, p, size, KIND, TILE)
    row = (n * tl.num_programs(1) + share) * 2 * C
    tl.store(partials_ptr + row + c, tl.sum(firsts, 1), mask=c < C)
    tl.store(partials_ptr + row + C + c, tl.sum(seconds, 1), mask=c < C)


@triton.jit
def _self_gate_dx_kernel(
    grad_ptr,
    x_ptr,
    z_ptr,
    stats,
    sums_ptr,
    weights,
    dx_ptr,
    dz_ptr,
    size,
    K,
    count,
    KIND: tl.constexpr,
    TILE: tl.constexpr,
):
    """dx, and dz if there is a z, from g' and the sums [N, 2, C] or [2, C]."""
    acc_ty = stats.mean.dtype.element_ty
    C = size.C
    n, c0, c, p = channel_tile(size, TILE)
    mask = tile_mask(c, p, size, TILE)
    offsets = dense_offsets(n, c, p, size, TILE)
    x = load_x(x_ptr, n, c0, c, p, size, KIND, TILE).to(acc_ty)
    g = tl.load(grad_ptr + offsets, mask=mask, other=0.0).to(acc_ty)
    cx = x_channel(c, C, KIND)
    mean, scale = load_statistics(stats, n, c, cx, size)
    sums_ptr += n * stats.stride_n * 2 + c
    first = tl.load(sums_ptr, mask=c < C, other=0.0)
    second = tl.load(sums_ptr + C, mask=c < C, other=0.0)
    a, b, k, spatial = logit_parameters(weights, cx, C, K, acc_ty, KIND)
    d, s = deviation_and_gate(x, mean, scale, a, b, k, spatial, KIND)
    z = x
    if z_ptr is not None:
        z = tl.load(z_ptr + offsets, mask=mask, other=0.0).to(acc_ty)
    base = g * s
    r = base * z * (1 - s)
    if z_ptr is not None:
        tl.store(dz_ptr + offsets, base, mask=mask)
        base = tl.zeros_like(base)
    dx = dx_tile(base, r, d, mean, scale, a, k, spatial, first, second, count, KIND)
    store_dx(dx_ptr, dx, n, c0, c, p, size, KIND, TILE)


def _statistics(mean: torch.Tensor, scale: torch.Tensor, layout: Layout) -> Statistics:
    return Statistics(mean, scale, layout.C if mean.dim() == 2 else 0)


def apply_self_gate(
    x: torch.Tensor,
    layout: Layout,
    gate: Gate,
    mean: torch.Tensor,
    scale: torch.Tensor,
    residual: torch.Tensor | None,
    activation: int,
    z: torch.Tensor | None = None,
) -> torch.Tensor:
    """Returns y from the statistics. Reads x once; z, which may be scaled instead, is dense as y is."""
    y = layout.empty(x)
    t = gate_tile(tile(layout, SCALE_TILE), layout, gate)
    launch(
        _self_gate_kernel,
        tiles(layout, t),
        x,
        z,
        layout.dense_or_none(residual),
        y,
        _statistics(mean, scale, layout),
        gate.weights,
        layout.sizes,
        gate.width,
        KIND=gate.kind.value,
        ACTIVATION=activation,
        TILE=t,
        num_warps=t.num_warps,
    )
    return y


def logit_sums(
    grad: torch.Tensor,
    x: torch.Tensor,
    layout: Layout,
    gate: Gate,
    mean: torch.Tensor,
    scale: torch.Tensor,
    residual: torch.Tensor | None,
    activation: int,
    z: torch.Tensor | None = None,
    dx: torch.Tensor | None = None,
    dz: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns (g', dresidual, partials [N, splits, 2, C] of the sums of r and r d). Reads x, grad and z once.

    Writes dx and dz if given: if the statistics do not depend on x, that is all of the backward pass.
    """
    grad = layout.dense(grad)
    dresidual = layout.empty_dresidual(x, activation)
    # Registers let a chip run fewer than PROGRAMS at once; with more programs the last ones are a smaller share.
    exchanges = gate.exchanges(layout)
    channels = 256 // x.element_size() if exchanges else 64  # 128 bytes of each half
    # With 16 elements a thread some variants spill a little, because ptxas prefers more warps at once.
    per_thread = 16 if layout.channels_last or heuristics.amd() else 8
    t, blocks, splits, steps = gate_reduction(layout, channels, 4 * PROGRAMS, per_thread)
    if exchanges and heuristics.amd():
        t = halved(t)
    partials = mean.new_empty((layout.N, splits, 2, layout.C))
    launch(
        _self_gate_sums_kernel,
        layout.N * blocks,
        grad,
        x,
        z,
        layout.dense_or_none(residual if activation else None),
        _statistics(mean, scale, layout),
        gate.weights,
        dresidual,
        dx,
        dz,
        partials,
        layout.sizes,
        gate.width,
        steps,
        KIND=gate.kind.value,
        ACTIVATION=activation,
        TILE=t,
        num_warps=t.num_warps,
        splits=splits,
        **heuristics.registers_for(x, t.num_warps),
    )
    return dresidual if activation else grad, dresidual, partials


def self_gate_dx(
    g: torch.Tensor,
    x: torch.Tensor,
    layout: Layout,
    gate: Gate,
    mean: torch.Tensor,
    scale: torch.Tensor,
    sums: torch.Tensor,
    dx: torch.Tensor,
    z: torch.Tensor | None = None,
    dz: torch.Tensor | None = None,
) -> None:
    """Writes dx, and dz if there is a z, from g' and the sums [N, 2, C] or [2, C]. Reads g', x and z once."""
    t = gate_tile(tile(layout, SCALE_TILE), layout, gate)
    stats = _statistics(mean, scale, layout)
    launch(
        _self_gate_dx_kernel,
        tiles(layout, t),
        g,
        x,
        z,
        stats,
        sums,
        gate.weights,
        dx,
        dz,
        layout.sizes,
        gate.width,
        layout.HW if stats.stride_n else layout.N * layout.HW,
        KIND=gate.kind.value,
        TILE=t,
        num_warps=t.num_warps,
    )
