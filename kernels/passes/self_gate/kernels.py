"""The passes of `_self_gate.py`: over whole planes, and streaming ones."""

from __future__ import annotations

import triton
import triton.language as tl

from ...core.tiles import NONE, activate, activation_grad, tile_mask, tile_offsets
from .tiles import (
    SIMAM,
    channel_tile,
    deviation_and_gate,
    dx_tile,
    load_x,
    parameters,
    scale_of,
    store_dx,
    summands,
    x_channel,
)


@triton.jit
def _plane_fwd_kernel(
    x_ptr, residual_ptr, y_ptr, mean_ptr, scale_ptr, p0, p1, p2, p3, p4, p5, C, HW, K, stride_n, stride_o,
    EPS: tl.constexpr, KIND: tl.constexpr, ACTIVATION: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    ALIGN: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Statistics and gate of whole planes: mean and scale [N, C], y. Reads x once."""
    acc_ty = mean_ptr.dtype.element_ty
    n, c0, c, p = channel_tile(C, HW, BLOCK_C, BLOCK_P)
    mask = tile_mask(c, p, C, HW, CHANNELS_LAST, ALIGN)
    x = load_x(x_ptr, n * stride_n, c0, c, p, C, HW, stride_o, KIND, CHANNELS_LAST, ALIGN, BLOCK_C).to(acc_ty)
    cx = x_channel(c, C, KIND)
    a, b, k, spatial = parameters(p0, p1, p2, p3, p4, p5, cx, C, K, acc_ty, KIND)  # before x is waited for
    mean = tl.sum(x, 1) / HW
    d = tl.where(mask, x - mean[:, None], 0.0)
    scale = scale_of(tl.sum(d * d, 1), HW, EPS, KIND)
    tl.store(mean_ptr + n * C + cx, mean, mask=c < C)
    tl.store(scale_ptr + n * C + cx, scale, mask=c < C)
    _, s = deviation_and_gate(x, mean, scale, a, b, k, spatial, KIND)
    offsets = tile_offsets(n * C * HW, c, p, C if CHANNELS_LAST else HW, CHANNELS_LAST, ALIGN)
    v = x * s
    if residual_ptr is not None:
        v += tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(acc_ty)
    tl.store(y_ptr + offsets, activate(v, ACTIVATION), mask=mask)


@triton.jit
def _plane_bwd_kernel(
    grad_ptr, x_ptr, residual_ptr, mean_ptr, scale_ptr, p0, p1, p2, p3, p4, p5, dx_ptr, dresidual_ptr, sums_ptr,
    C, HW, K, stride_n, stride_o,
    KIND: tl.constexpr, ACTIVATION: tl.constexpr, CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """dx of whole planes and, for kinds with parameters, the sums of r and r d [N, 2, C]. Reads x and grad once."""
    acc_ty = mean_ptr.dtype.element_ty
    n, c0, c, p = channel_tile(C, HW, BLOCK_C, BLOCK_P)
    mask = tile_mask(c, p, C, HW, CHANNELS_LAST, ALIGN)
    offsets = tile_offsets(n * C * HW, c, p, C if CHANNELS_LAST else HW, CHANNELS_LAST, ALIGN)
    x = load_x(x_ptr, n * stride_n, c0, c, p, C, HW, stride_o, KIND, CHANNELS_LAST, ALIGN, BLOCK_C).to(acc_ty)
    g = tl.load(grad_ptr + offsets, mask=mask, other=0.0).to(acc_ty)
    cx = x_channel(c, C, KIND)
    mean = tl.load(mean_ptr + n * C + cx, mask=c < C, other=0.0)
    scale = tl.load(scale_ptr + n * C + cx, mask=c < C, other=0.0)
    a, b, k, spatial = parameters(p0, p1, p2, p3, p4, p5, cx, C, K, acc_ty, KIND)
    d, s = deviation_and_gate(x, mean, scale, a, b, k, spatial, KIND)
    if ACTIVATION != NONE:
        z = x * s
        if residual_ptr is not None:
            z += tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(acc_ty)
        g = activation_grad(g, z, ACTIVATION)
        tl.store(dresidual_ptr + offsets, g, mask=mask)
    base = g * s
    r = base * x * (1 - s)
    first, second = summands(r, d, KIND)
    first, second = tl.split(tl.sum(tl.join(first, second), 1))  # both at once: their warps meet once
    if KIND != SIMAM:
        tl.store(sums_ptr + n * 2 * C + c, first, mask=c < C)
        tl.store(sums_ptr + (n * 2 + 1) * C + c, second, mask=c < C)
    dx = dx_tile(base, r, d, mean, scale, a, k, spatial, first, second, HW, KIND)
    store_dx(dx_ptr, n * C * HW, dx, c0, c, p, C, HW, KIND, CHANNELS_LAST, ALIGN, BLOCK_C)


@triton.jit
def _moments_kernel(
    x_ptr, parts_ptr, C, HW, stride_n, stride_o, steps,
    CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """parts [N, parts, 2, C]: mean and second moment of a part of the pixels. Each lane follows its own mean."""
    acc_ty = parts_ptr.dtype.element_ty
    blocks = tl.cdiv(C, BLOCK_C)
    n = (tl.program_id(0) // blocks).to(tl.int64)
    part = tl.program_id(1)
    c = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    p = part * steps * BLOCK_P + tl.arange(0, BLOCK_P)
    mean = tl.zeros([BLOCK_C, BLOCK_P], acc_ty)
    second = tl.zeros([BLOCK_C, BLOCK_P], acc_ty)
    for step in range(steps):
        ps = p + step * BLOCK_P
        mask = tile_mask(c, ps, C, HW, CHANNELS_LAST, ALIGN)
        offsets = tile_offsets(n * stride_n, c, ps, stride_o, CHANNELS_LAST, ALIGN)
        x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(acc_ty)
        d = tl.where(mask, x - mean, 0.0)
        mean += d * (tl.full([], 1.0, acc_ty) / (step + 1))
        second += tl.where(mask, d * (x - mean), 0.0)
    seen = tl.minimum(tl.maximum((HW - p + BLOCK_P - 1) // BLOCK_P, 0), steps).to(acc_ty)[None, :]
    total = tl.sum(seen * mean, 1) / tl.sum(seen, 1)
    # What is left corrects the mean, which of equal values is then their value: a batch norm magnifies the rest.
    rest = tl.sum(tl.where(seen > 0, seen * (mean - total[:, None]), 0.0), 1) / tl.sum(seen, 1)
    total += tl.where(rest == rest, rest, 0.0)  # of an infinite mean nothing but NaN is left
    apart = tl.where(seen > 0, mean - total[:, None], 0.0)
    second = tl.sum(second + seen * apart * apart, 1)
    row = (n * tl.num_programs(1) + part) * 2 * C
    tl.store(parts_ptr + row + c, total, mask=c < C)
    tl.store(parts_ptr + row + C + c, second, mask=c < C)


@triton.jit
def combined_moments(parts_ptr, c, C, HW, rows, parts, span, count, BLOCK_S: tl.constexpr):
    """Mean and second moment of channels c, from those of parts [rows, 2, C] in order.

    Row i has the pixels of part i % parts of an image, `span` of them but for the last one's; in all there are `count`.
    """
    acc_ty = parts_ptr.dtype.element_ty
    first = tl.load(parts_ptr + c, mask=c < C, other=0.0)
    first = tl.where(tl.abs(first) < float("inf"), first, 0.0)  # of equal means the differences are 0
    total = tl.zeros([BLOCK_S, c.shape[0]], acc_ty)
    for start in range(0, rows, BLOCK_S):
        i = start + tl.arange(0, BLOCK_S)
        mask = (i < rows)[:, None] & (c < C)[None, :]
        values = tl.minimum(HW - i % parts * span, span).to(acc_ty)[:, None]
        at = parts_ptr + i[:, None].to(tl.int64) * 2 * C + c[None, :]
        total += values * tl.where(mask, tl.load(at, mask=mask, other=0.0) - first[None, :], 0.0)
    mean = first + tl.sum(total, 0) / count
    total = tl.zeros([BLOCK_S, c.shape[0]], acc_ty)
    for start in range(0, rows, BLOCK_S):
        i = start + tl.arange(0, BLOCK_S)
        mask = (i < rows)[:, None] & (c < C)[None, :]
        values = tl.minimum(HW - i % parts * span, span).to(acc_ty)[:, None]
        at = parts_ptr + i[:, None].to(tl.int64) * 2 * C + c[None, :]
        apart = tl.where(mask, tl.load(at, mask=mask, other=0.0) - mean[None, :], 0.0)
        total += tl.load(at + C, mask=mask, other=0.0) + values * apart * apart
    return mean, tl.sum(total, 0)


@triton.jit
def _combine_moments_kernel(
    parts_ptr, mean_ptr, scale_ptr, C, HW, parts, span,
    EPS: tl.constexpr, KIND: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """Parts of each image [N, parts, 2, C] -> mean and scale [N, C]."""
    blocks = tl.cdiv(C, BLOCK_L)
    n = (tl.program_id(0) // blocks).to(tl.int64)
    c = tl.program_id(0) % blocks * BLOCK_L + tl.arange(0, BLOCK_L)
    mean, second = combined_moments(parts_ptr + n * parts * 2 * C, c, C, HW, parts, parts, span, HW, BLOCK_S)
    tl.store(mean_ptr + n * C + c, mean, mask=c < C)
    tl.store(scale_ptr + n * C + c, scale_of(second, HW, EPS, KIND), mask=c < C)


@triton.jit
def _gate_kernel(
    x_ptr, z_ptr, residual_ptr, y_ptr, mean_ptr, scale_ptr, p0, p1, p2, p3, p4, p5, C, HW, K, stride_n, stride_o,
    stats_n,
    KIND: tl.constexpr, ACTIVATION: tl.constexpr, CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """y, from statistics [G, C] that lie stats_n apart for each image."""
    acc_ty = mean_ptr.dtype.element_ty
    n, c0, c, p = channel_tile(C, HW, BLOCK_C, BLOCK_P)
    mask = tile_mask(c, p, C, HW, CHANNELS_LAST, ALIGN)
    offsets = tile_offsets(n * C * HW, c, p, C if CHANNELS_LAST else HW, CHANNELS_LAST, ALIGN)
    x = load_x(x_ptr, n * stride_n, c0, c, p, C, HW, stride_o, KIND, CHANNELS_LAST, ALIGN, BLOCK_C).to(acc_ty)
    cx = x_channel(c, C, KIND)
    mean = tl.load(mean_ptr + n * stats_n + cx, mask=c < C, other=0.0)
    scale = tl.load(scale_ptr + n * stats_n + cx, mask=c < C, other=0.0)
    a, b, k, spatial = parameters(p0, p1, p2, p3, p4, p5, cx, C, K, acc_ty, KIND)
    _, s = deviation_and_gate(x, mean, scale, a, b, k, spatial, KIND)
    v = x * s
    if z_ptr is not None:
        v = tl.load(z_ptr + offsets, mask=mask, other=0.0).to(acc_ty) * s
    if residual_ptr is not None:
        v += tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(acc_ty)
    tl.store(y_ptr + offsets, activate(v, ACTIVATION), mask=mask)


@triton.jit
def _sums_kernel(
    grad_ptr, x_ptr, z_ptr, residual_ptr, mean_ptr, scale_ptr, p0, p1, p2, p3, p4, p5, dresidual_ptr, dx_ptr, dz_ptr,
    parts_ptr, C, HW, K, stride_n, stride_o, stats_n, steps,
    KIND: tl.constexpr, ACTIVATION: tl.constexpr, CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """parts [N, parts, 2, C]: sums of `summands` over parts of the pixels; g' where there is an activation.

    Each lane has sums of its own until the end: across warps they meet in shared memory, too slow for every step.
    With dx, statistics are given and do not depend on x: dx = g s + r a; the first term is dz if there is a z.
    """
    acc_ty = mean_ptr.dtype.element_ty
    blocks = tl.cdiv(C, BLOCK_C)
    n = (tl.program_id(0) // blocks).to(tl.int64)
    part = tl.program_id(1)
    c0 = tl.program_id(0) % blocks * BLOCK_C
    c = c0 + tl.arange(0, BLOCK_C)
    cx = x_channel(c, C, KIND)
    mean = tl.load(mean_ptr + n * stats_n + cx, mask=c < C, other=0.0)
    scale = tl.load(scale_ptr + n * stats_n + cx, mask=c < C, other=0.0)
    a, b, k, spatial = parameters(p0, p1, p2, p3, p4, p5, cx, C, K, acc_ty, KIND)
    # With the channels inside, a thread has more than one pixel of a tile, and these are in its two halves.
    HALVES: tl.constexpr = 2 if CHANNELS_LAST and BLOCK_P > 1 else 1
    firsts = tl.zeros([BLOCK_C, BLOCK_P // HALVES], acc_ty)
    seconds = tl.zeros([BLOCK_C, BLOCK_P // HALVES], acc_ty)
    for step in range(steps):
        p = (part * steps + step) * BLOCK_P + tl.arange(0, BLOCK_P)
        mask = tile_mask(c, p, C, HW, CHANNELS_LAST, ALIGN)
        offsets = tile_offsets(n * C * HW, c, p, C if CHANNELS_LAST else HW, CHANNELS_LAST, ALIGN)
        x = load_x(x_ptr, n * stride_n, c0, c, p, C, HW, stride_o, KIND, CHANNELS_LAST, ALIGN, BLOCK_C).to(acc_ty)
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
            store_dx(dx_ptr, n * C * HW, dx, c0, c, p, C, HW, KIND, CHANNELS_LAST, ALIGN, BLOCK_C)
    row = (n * tl.num_programs(1) + part) * 2 * C
    tl.store(parts_ptr + row + c, tl.sum(firsts, 1), mask=c < C)
    tl.store(parts_ptr + row + C + c, tl.sum(seconds, 1), mask=c < C)


@triton.jit
def _self_gate_dx_kernel(
    grad_ptr, x_ptr, z_ptr, mean_ptr, scale_ptr, sums_ptr, p0, p1, p2, p3, p4, p5, dx_ptr, dz_ptr,
    C, HW, K, stride_n, stride_o, stats_n, count,
    KIND: tl.constexpr, CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """dx, and dz if there is a z, from g' and the sums [G, 2, C]."""
    acc_ty = mean_ptr.dtype.element_ty
    n, c0, c, p = channel_tile(C, HW, BLOCK_C, BLOCK_P)
    mask = tile_mask(c, p, C, HW, CHANNELS_LAST, ALIGN)
    offsets = tile_offsets(n * C * HW, c, p, C if CHANNELS_LAST else HW, CHANNELS_LAST, ALIGN)
    x = load_x(x_ptr, n * stride_n, c0, c, p, C, HW, stride_o, KIND, CHANNELS_LAST, ALIGN, BLOCK_C).to(acc_ty)
    g = tl.load(grad_ptr + offsets, mask=mask, other=0.0).to(acc_ty)
    cx = x_channel(c, C, KIND)
    mean = tl.load(mean_ptr + n * stats_n + cx, mask=c < C, other=0.0)
    scale = tl.load(scale_ptr + n * stats_n + cx, mask=c < C, other=0.0)
    sums = sums_ptr + n * stats_n * 2 + c
    first = tl.load(sums, mask=c < C, other=0.0)
    second = tl.load(sums + C, mask=c < C, other=0.0)
    a, b, k, spatial = parameters(p0, p1, p2, p3, p4, p5, cx, C, K, acc_ty, KIND)
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
    store_dx(dx_ptr, n * C * HW, dx, c0, c, p, C, HW, KIND, CHANNELS_LAST, ALIGN, BLOCK_C)
