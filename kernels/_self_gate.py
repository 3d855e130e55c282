"""Gates that each element computes of itself and of its channel: SimAM and its like.

y = act(x * sigmoid((q d + a) d + b) + residual), d = x - m; a gate whose statistics the batch shares may scale another
map, z, instead of x. Each KIND derives m, q, a, b from two statistics of a channel, its mean and a scale, and from
parameters. Where whole planes fit in a tile, a program reads them once and does
all; else the passes stream: moments, gate; backward sums, dx.

Shuffled kinds exchange channels behind the gate: channel h C / 2 + j of x becomes channel 2 j + h of y. Their tiles are
in the order of y; with the channels inside, the two halves of x are read side by side, so that accesses stay wide.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ._heuristics import (
    PLANE_TILE,
    SCALE_TILE,
    TILE,
    Tile,
    cdiv,
    next_power_of_2,
    plane_tile,
    reduction,
    tile,
    tiles,
    vector_block,
)
from ._launch import launch
from ._layout import Layout, accumulation_dtype
from ._pool import combine
from ._tiles import NONE, activate, activation_grad, program_tile, sigmoid, tile_mask, tile_offsets

SIMAM, SHUFFLE, AFFINE = map(tl.constexpr, range(3))


@triton.jit
def _x_channel(c, C, KIND: tl.constexpr):
    """The channel of x behind channel c of y."""
    if KIND == SHUFFLE:
        c = c % 2 * (C // 2) + c // 2
    return c


@triton.jit
def _load_x(
    x_ptr, c0, c, p, C, HW, stride_o, KIND: tl.constexpr, CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The tile of x behind channels c of y, the first of which is c0."""
    if KIND == SHUFFLE and CHANNELS_LAST:
        j = c0 // 2 + tl.arange(0, BLOCK_C // 2)
        HALF: tl.constexpr = (ALIGN + 1) // 2
        mask = tile_mask(j, p, C // 2, HW, CHANNELS_LAST, HALF)
        first = tile_offsets(j, p, stride_o, CHANNELS_LAST, HALF)
        second = tile_offsets(j + C // 2, p, stride_o, CHANNELS_LAST, HALF)
        halves = tl.join(tl.load(x_ptr + first, mask=mask, other=0.0), tl.load(x_ptr + second, mask=mask, other=0.0))
        x = tl.reshape(tl.permute(halves, 0, 2, 1), [BLOCK_C, p.shape[0]])
    else:
        mask = tile_mask(c, p, C, HW, CHANNELS_LAST, ALIGN)
        offsets = tile_offsets(_x_channel(c, C, KIND), p, stride_o, CHANNELS_LAST, ALIGN)
        x = tl.load(x_ptr + offsets, mask=mask, other=0.0)
    return x


@triton.jit
def _store_dx(
    dx_ptr, dx, c0, c, p, C, HW, KIND: tl.constexpr, CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The inverse of `_load_x`, into a dense map."""
    dx = dx.to(dx_ptr.dtype.element_ty)
    if KIND == SHUFFLE and CHANNELS_LAST:
        j = c0 // 2 + tl.arange(0, BLOCK_C // 2)
        HALF: tl.constexpr = (ALIGN + 1) // 2
        mask = tile_mask(j, p, C // 2, HW, CHANNELS_LAST, HALF)
        a, b = tl.split(tl.permute(tl.reshape(dx, [BLOCK_C // 2, 2, p.shape[0]]), 0, 2, 1))
        tl.store(dx_ptr + tile_offsets(j, p, C, CHANNELS_LAST, HALF), a, mask=mask)
        tl.store(dx_ptr + tile_offsets(j + C // 2, p, C, CHANNELS_LAST, HALF), b, mask=mask)
    else:
        stride_o = C if CHANNELS_LAST else HW
        offsets = tile_offsets(_x_channel(c, C, KIND), p, stride_o, CHANNELS_LAST, ALIGN)
        tl.store(dx_ptr + offsets, dx, mask=tile_mask(c, p, C, HW, CHANNELS_LAST, ALIGN))


@triton.jit
def _program_tile(C, HW, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr):
    """As `program_tile`, with the first channel as a number: alignment is seen through it, not through a minimum."""
    n, c, p = program_tile(C, HW, BLOCK_C, BLOCK_P)
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    c0 = pid // tl.cdiv(HW, BLOCK_P) % tl.cdiv(C, BLOCK_C) * BLOCK_C
    return n, c0, c, p


@triton.jit
def _scale_of(second, count, EPS: tl.constexpr, KIND: tl.constexpr):
    """The statistic beside the mean, from the second moment over `count` values: of AFFINE kinds the variance."""
    scale = second / count
    if KIND == SHUFFLE:
        scale = 1 / tl.sqrt(scale + EPS)
    if KIND == SIMAM:
        scale = 1 / (4 * (second / tl.maximum(count - 1, 1) + EPS))
    return scale


@triton.jit
def _parameters(p0, p1, p2, p3, p4, p5, cx, C, K, acc_ty: tl.constexpr, KIND: tl.constexpr):
    """(a, b, k, spatial) of channels cx of x: the logit is a scale d + b + k mean, and d = 0 where not `spatial`."""
    a, b, k, spatial = 0.0, 0.0, 0.0, True
    if KIND == SHUFFLE:
        inside, j = cx < C, cx % K
        spatial = cx // K % 2 == 1
        weight = tl.load(p2 + j, mask=inside, other=0.0).to(acc_ty)
        a = tl.where(spatial, weight * tl.load(p4 + j, mask=inside, other=0.0).to(acc_ty), 0.0)
        b = weight * tl.load(p5 + j, mask=inside, other=0.0).to(acc_ty)
        b += tl.load(p3 + j, mask=inside, other=0.0).to(acc_ty)
        b = tl.where(spatial, b, tl.load(p1 + j, mask=inside, other=0.0).to(acc_ty))
        k = tl.where(spatial, 0.0, tl.load(p0 + j, mask=inside, other=0.0).to(acc_ty))
    if KIND == AFFINE:
        a = tl.load(p0 + cx, mask=cx < C, other=0.0).to(acc_ty)
        b = tl.load(p1 + cx, mask=cx < C, other=0.0).to(acc_ty)
    return a, b, k, spatial


@triton.jit
def _deviation_and_gate(x, mean, scale, a, b, k, spatial, KIND: tl.constexpr):
    """d and the sigmoid, tiles, from what each channel has."""
    d = x - mean[:, None]
    if KIND == SIMAM:
        t = scale[:, None] * d * d + 0.5
    elif KIND == SHUFFLE:
        d = tl.where(spatial[:, None], d, 0.0)
        t = tl.where(spatial, a * scale, 0.0)[:, None] * d + tl.where(spatial, b, b + k * mean)[:, None]
    else:
        t = (a * scale)[:, None] * d + b[:, None]
    return d, sigmoid(t)


@triton.jit
def _dx_tile(base, r, d, mean, scale, a, k, spatial, sum_r, sum_rd, sum_rdd, count, KIND: tl.constexpr):
    """base + r (2 q d + a) + u d + v; sums over the `count` values behind a statistic."""
    if KIND == SIMAM:
        u = -8 * scale * scale * sum_rdd / tl.maximum(count - 1, 1)
        v = -2 * scale * sum_rd / count
        dx = base + (2 * scale[:, None] * r + u[:, None]) * d + v[:, None]
    else:
        slope = a * scale
        u = -slope * scale * scale * sum_rd / count
        mean_r = sum_r / count
        v = tl.zeros_like(mean_r)
        if KIND == SHUFFLE:
            slope, u = tl.where(spatial, slope, 0.0), tl.where(spatial, u, 0.0)
            v = tl.where(spatial, 0.0, k * mean_r)
        # Differences before products: of a single pixel they are 0, however steep the slope.
        dx = base + (r - mean_r[:, None]) * slope[:, None] + u[:, None] * d + v[:, None]
    return dx


@triton.jit
def _plane_fwd_kernel(
    x_ptr, residual_ptr, y_ptr, mean_ptr, scale_ptr, p0, p1, p2, p3, p4, p5, C, HW, K, stride_n, stride_o,
    EPS: tl.constexpr, KIND: tl.constexpr, ACTIVATION: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    ALIGN: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Statistics and gate of whole planes: mean and scale [N, C], y. Reads x once."""
    acc_ty = mean_ptr.dtype.element_ty
    n, c0, c, p = _program_tile(C, HW, BLOCK_C, BLOCK_P)
    mask = tile_mask(c, p, C, HW, CHANNELS_LAST, ALIGN)
    x = _load_x(x_ptr + n * stride_n, c0, c, p, C, HW, stride_o, KIND, CHANNELS_LAST, ALIGN, BLOCK_C).to(acc_ty)
    mean = tl.sum(x, 1) / HW
    d = tl.where(mask, x - mean[:, None], 0.0)
    scale = _scale_of(tl.sum(d * d, 1), HW, EPS, KIND)
    cx = _x_channel(c, C, KIND)
    tl.store(mean_ptr + n * C + cx, mean, mask=c < C)
    tl.store(scale_ptr + n * C + cx, scale, mask=c < C)
    a, b, k, spatial = _parameters(p0, p1, p2, p3, p4, p5, cx, C, K, acc_ty, KIND)
    _, s = _deviation_and_gate(x, mean, scale, a, b, k, spatial, KIND)
    offsets = n * C * HW + tile_offsets(c, p, C if CHANNELS_LAST else HW, CHANNELS_LAST, ALIGN)
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
    n, c0, c, p = _program_tile(C, HW, BLOCK_C, BLOCK_P)
    mask = tile_mask(c, p, C, HW, CHANNELS_LAST, ALIGN)
    offsets = n * C * HW + tile_offsets(c, p, C if CHANNELS_LAST else HW, CHANNELS_LAST, ALIGN)
    x = _load_x(x_ptr + n * stride_n, c0, c, p, C, HW, stride_o, KIND, CHANNELS_LAST, ALIGN, BLOCK_C).to(acc_ty)
    g = tl.load(grad_ptr + offsets, mask=mask, other=0.0).to(acc_ty)
    cx = _x_channel(c, C, KIND)
    mean = tl.load(mean_ptr + n * C + cx, mask=c < C, other=0.0)
    scale = tl.load(scale_ptr + n * C + cx, mask=c < C, other=0.0)
    a, b, k, spatial = _parameters(p0, p1, p2, p3, p4, p5, cx, C, K, acc_ty, KIND)
    d, s = _deviation_and_gate(x, mean, scale, a, b, k, spatial, KIND)
    if ACTIVATION != NONE:
        z = x * s
        if residual_ptr is not None:
            z += tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(acc_ty)
        g = activation_grad(g, z, ACTIVATION)
        tl.store(dresidual_ptr + offsets, g, mask=mask)
    r = g * x * s * (1 - s)
    sum_r, sum_rd, sum_rdd = tl.sum(r, 1), tl.sum(r * d, 1), tl.sum(r * d * d, 1)
    if KIND != SIMAM:
        tl.store(sums_ptr + n * 2 * C + cx, sum_r, mask=c < C)
        tl.store(sums_ptr + (n * 2 + 1) * C + cx, sum_rd, mask=c < C)
    dx = _dx_tile(g * s, r, d, mean, scale, a, k, spatial, sum_r, sum_rd, sum_rdd, HW, KIND)
    _store_dx(dx_ptr + n * C * HW, dx, c0, c, p, C, HW, KIND, CHANNELS_LAST, ALIGN, BLOCK_C)


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
        offsets = n * stride_n + tile_offsets(c, ps, stride_o, CHANNELS_LAST, ALIGN)
        x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(acc_ty)
        d = tl.where(mask, x - mean, 0.0)
        mean += d / (step + 1)
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
def _combine_moments_kernel(
    parts_ptr, mean_ptr, scale_ptr, C, HW, rows, parts, span, count,
    EPS: tl.constexpr, KIND: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """[G, rows, 2, C] -> mean and scale [G, C], rows in order; row i has the pixels of part i % parts, `span` each."""
    acc_ty = mean_ptr.dtype.element_ty
    blocks = tl.cdiv(C, BLOCK_L)
    group = (tl.program_id(0) // blocks).to(tl.int64)
    c = tl.program_id(0) % blocks * BLOCK_L + tl.arange(0, BLOCK_L)
    first = tl.load(parts_ptr + group * rows * 2 * C + c, mask=c < C, other=0.0)
    first = tl.where(tl.abs(first) < float("inf"), first, 0.0)  # of equal means the differences are 0
    total = tl.zeros([BLOCK_S, BLOCK_L], acc_ty)
    for start in range(0, rows, BLOCK_S):
        i = start + tl.arange(0, BLOCK_S)
        mask = (i < rows)[:, None] & (c < C)[None, :]
        values = tl.minimum(HW - i % parts * span, span).to(acc_ty)[:, None]
        at = parts_ptr + (group * rows + i[:, None]) * 2 * C + c[None, :]
        total += values * tl.where(mask, tl.load(at, mask=mask, other=0.0) - first[None, :], 0.0)
    mean = first + tl.sum(total, 0) / count
    total = tl.zeros([BLOCK_S, BLOCK_L], acc_ty)
    for start in range(0, rows, BLOCK_S):
        i = start + tl.arange(0, BLOCK_S)
        mask = (i < rows)[:, None] & (c < C)[None, :]
        values = tl.minimum(HW - i % parts * span, span).to(acc_ty)[:, None]
        at = parts_ptr + (group * rows + i[:, None]) * 2 * C + c[None, :]
        apart = tl.where(mask, tl.load(at, mask=mask, other=0.0) - mean[None, :], 0.0)
        total += tl.load(at + C, mask=mask, other=0.0) + values * apart * apart
    tl.store(mean_ptr + group * C + c, mean, mask=c < C)
    tl.store(scale_ptr + group * C + c, _scale_of(tl.sum(total, 0), count, EPS, KIND), mask=c < C)


@triton.jit
def _gate_kernel(
    x_ptr, z_ptr, residual_ptr, y_ptr, mean_ptr, scale_ptr, p0, p1, p2, p3, p4, p5, C, HW, K, stride_n, stride_o,
    stats_n,
    KIND: tl.constexpr, ACTIVATION: tl.constexpr, CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """y, from statistics [G, C] that lie stats_n apart for each image."""
    acc_ty = mean_ptr.dtype.element_ty
    n, c0, c, p = _program_tile(C, HW, BLOCK_C, BLOCK_P)
    mask = tile_mask(c, p, C, HW, CHANNELS_LAST, ALIGN)
    offsets = n * C * HW + tile_offsets(c, p, C if CHANNELS_LAST else HW, CHANNELS_LAST, ALIGN)
    x = _load_x(x_ptr + n * stride_n, c0, c, p, C, HW, stride_o, KIND, CHANNELS_LAST, ALIGN, BLOCK_C).to(acc_ty)
    cx = _x_channel(c, C, KIND)
    mean = tl.load(mean_ptr + n * stats_n + cx, mask=c < C, other=0.0)
    scale = tl.load(scale_ptr + n * stats_n + cx, mask=c < C, other=0.0)
    a, b, k, spatial = _parameters(p0, p1, p2, p3, p4, p5, cx, C, K, acc_ty, KIND)
    _, s = _deviation_and_gate(x, mean, scale, a, b, k, spatial, KIND)
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
    """parts [N, parts, 3, C]: sums of r, r d, r d^2 over parts of the pixels; g' where there is an activation.

    With dx, statistics are given and do not depend on x: dx = g s + r a; the first term is dz if there is a z.
    """
    acc_ty = mean_ptr.dtype.element_ty
    blocks = tl.cdiv(C, BLOCK_C)
    n = (tl.program_id(0) // blocks).to(tl.int64)
    part = tl.program_id(1)
    c0 = tl.program_id(0) % blocks * BLOCK_C
    c = c0 + tl.arange(0, BLOCK_C)
    cx = _x_channel(c, C, KIND)
    mean = tl.load(mean_ptr + n * stats_n + cx, mask=c < C, other=0.0)
    scale = tl.load(scale_ptr + n * stats_n + cx, mask=c < C, other=0.0)
    a, b, k, spatial = _parameters(p0, p1, p2, p3, p4, p5, cx, C, K, acc_ty, KIND)
    sum_r = tl.zeros([BLOCK_C], acc_ty)
    sum_rd = tl.zeros([BLOCK_C], acc_ty)
    sum_rdd = tl.zeros([BLOCK_C], acc_ty)
    for step in range(steps):
        p = (part * steps + step) * BLOCK_P + tl.arange(0, BLOCK_P)
        mask = tile_mask(c, p, C, HW, CHANNELS_LAST, ALIGN)
        offsets = n * C * HW + tile_offsets(c, p, C if CHANNELS_LAST else HW, CHANNELS_LAST, ALIGN)
        x = _load_x(x_ptr + n * stride_n, c0, c, p, C, HW, stride_o, KIND, CHANNELS_LAST, ALIGN, BLOCK_C).to(acc_ty)
        g = tl.load(grad_ptr + offsets, mask=mask, other=0.0).to(acc_ty)
        d, s = _deviation_and_gate(x, mean, scale, a, b, k, spatial, KIND)
        z = x
        if z_ptr is not None:
            z = tl.load(z_ptr + offsets, mask=mask, other=0.0).to(acc_ty)
        if ACTIVATION != NONE:
            pre = z * s
            if residual_ptr is not None:
                pre += tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(acc_ty)
            g = activation_grad(g, pre, ACTIVATION)
            tl.store(dresidual_ptr + offsets, g, mask=mask)
        r = g * z * s * (1 - s)
        sum_r += tl.sum(r, 1)
        sum_rd += tl.sum(r * d, 1)
        sum_rdd += tl.sum(r * d * d, 1)
        if dx_ptr is not None:
            dx = r * (a * scale)[:, None]
            if z_ptr is None:
                dx += g * s
            else:
                tl.store(dz_ptr + offsets, g * s, mask=mask)
            _store_dx(dx_ptr + n * C * HW, dx, c0, c, p, C, HW, KIND, CHANNELS_LAST, ALIGN, BLOCK_C)
    row = (n * tl.num_programs(1) + part) * 3 * C
    tl.store(parts_ptr + row + cx, sum_r, mask=c < C)
    tl.store(parts_ptr + row + C + cx, sum_rd, mask=c < C)
    tl.store(parts_ptr + row + 2 * C + cx, sum_rdd, mask=c < C)


@triton.jit
def _self_gate_dx_kernel(
    grad_ptr, x_ptr, z_ptr, mean_ptr, scale_ptr, sums_ptr, p0, p1, p2, p3, p4, p5, dx_ptr, dz_ptr,
    C, HW, K, stride_n, stride_o, stats_n, count,
    KIND: tl.constexpr, CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """dx, and dz if there is a z, from g' and the sums [G, 3, C]."""
    acc_ty = mean_ptr.dtype.element_ty
    n, c0, c, p = _program_tile(C, HW, BLOCK_C, BLOCK_P)
    mask = tile_mask(c, p, C, HW, CHANNELS_LAST, ALIGN)
    offsets = n * C * HW + tile_offsets(c, p, C if CHANNELS_LAST else HW, CHANNELS_LAST, ALIGN)
    x = _load_x(x_ptr + n * stride_n, c0, c, p, C, HW, stride_o, KIND, CHANNELS_LAST, ALIGN, BLOCK_C).to(acc_ty)
    g = tl.load(grad_ptr + offsets, mask=mask, other=0.0).to(acc_ty)
    cx = _x_channel(c, C, KIND)
    mean = tl.load(mean_ptr + n * stats_n + cx, mask=c < C, other=0.0)
    scale = tl.load(scale_ptr + n * stats_n + cx, mask=c < C, other=0.0)
    sums = sums_ptr + n * stats_n * 3 + cx
    sum_r = tl.load(sums, mask=c < C, other=0.0)
    sum_rd = tl.load(sums + C, mask=c < C, other=0.0)
    sum_rdd = tl.load(sums + 2 * C, mask=c < C, other=0.0)
    a, b, k, spatial = _parameters(p0, p1, p2, p3, p4, p5, cx, C, K, acc_ty, KIND)
    d, s = _deviation_and_gate(x, mean, scale, a, b, k, spatial, KIND)
    z = x
    if z_ptr is not None:
        z = tl.load(z_ptr + offsets, mask=mask, other=0.0).to(acc_ty)
    base = g * s
    r = base * z * (1 - s)
    if z_ptr is not None:
        tl.store(dz_ptr + offsets, base, mask=mask)
        base = tl.zeros_like(base)
    dx = _dx_tile(base, r, d, mean, scale, a, k, spatial, sum_r, sum_rd, sum_rdd, count, KIND)
    _store_dx(dx_ptr + n * C * HW, dx, c0, c, p, C, HW, KIND, CHANNELS_LAST, ALIGN, BLOCK_C)


class Gate(NamedTuple):
    """What a module brings: its KIND, up to six parameters, eps, and whether the batch shares the statistics."""

    kind: Any
    parameters: tuple[torch.Tensor | None, ...] = (None,) * 6
    eps: float = 0.0
    shared: bool = False

    def groups(self, layout: Layout) -> tuple[int, int]:
        """How many groups of images have statistics of their own, and the images in each."""
        return (1, layout.N) if self.shared else (layout.N, 1)

    @property
    def width(self) -> int:
        """The K that kernels know: elements of the first parameter."""
        return 1 if self.parameters[0] is None else self.parameters[0].numel()


def _exchanges(layout: Layout, gate: Gate) -> bool:
    """Whether tiles of x are made of two halves."""
    return gate.kind == SHUFFLE and layout.channels_last


def _for_halves(t: Tile, layout: Layout, gate: Gate) -> Tile:
    """Half as many threads where tiles are made of halves, so that each still has a whole 16 bytes of a half."""
    return t._replace(num_warps=max(t.num_warps // 2, 1)) if _exchanges(layout, gate) else t


def _plane_tile(layout: Layout, gate: Gate, backward: bool = False) -> Tile | None:
    # Backward keeps x and grad in registers. Halves of a shuffled tile meet in shared memory, of which not every chip
    # has enough for the largest tiles.
    half = backward or _exchanges(layout, gate)
    t = None if gate.shared else plane_tile(layout, PLANE_TILE // 2 if half else PLANE_TILE)
    return t and _for_halves(t, layout, gate)


def self_gate(
    x: torch.Tensor, layout: Layout, gate: Gate, residual: torch.Tensor | None, activation: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """y, and of each channel the mean and the scale [G, C]. Reads x once if planes fit in a tile, else twice."""
    t = _plane_tile(layout, gate)
    if t is None:
        mean, scale = statistics(x, layout, gate)
        return apply_gate(x, layout, gate, mean, scale, residual, activation), mean, scale
    y = layout.empty(x)
    mean = x.new_empty((layout.N, layout.C), dtype=accumulation_dtype(x))
    scale = torch.empty_like(mean)
    launch(
        _plane_fwd_kernel, tiles(layout, t),
        x, None if residual is None else layout.dense(residual), y, mean, scale, *gate.parameters,
        layout.C, layout.HW, gate.width, layout.stride_n, layout.stride_o, EPS=gate.eps, KIND=gate.kind.value,
        ACTIVATION=activation, **t._asdict(),
    )  # fmt: skip
    return y, mean, scale


def statistics(x: torch.Tensor, layout: Layout, gate: Gate) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and scale [G, C]. Reads x once."""
    t, blocks, parts, steps = reduction(layout, over_c=False)
    groups, images = gate.groups(layout)
    partial = x.new_empty((layout.N, parts, 2, layout.C), dtype=accumulation_dtype(x))
    mean = partial.new_empty((groups, layout.C))
    scale = torch.empty_like(mean)
    launch(
        _moments_kernel, layout.N * blocks, x, partial, layout.C, layout.HW, layout.stride_n, layout.stride_o, steps,
        **t._asdict(), parts=parts,
    )  # fmt: skip
    if not layout.N:
        return mean.zero_(), scale.zero_()
    rows = images * parts
    block = vector_block(layout.C, 64)
    launch(
        _combine_moments_kernel, groups * cdiv(layout.C, block),
        partial, mean, scale, layout.C, layout.HW, rows, parts, steps * t.BLOCK_P, images * layout.HW,
        EPS=gate.eps, KIND=gate.kind.value, BLOCK_S=min(next_power_of_2(rows), TILE // 2 // block), BLOCK_L=block,
    )  # fmt: skip
    return mean, scale


def apply_gate(
    x: torch.Tensor, layout: Layout, gate: Gate, mean: torch.Tensor, scale: torch.Tensor,
    residual: torch.Tensor | None, activation: int, z: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """y from statistics [G, C]. Reads x once; z, which may be scaled instead, is dense as y is."""
    y = layout.empty(x)
    t = _for_halves(tile(layout, SCALE_TILE), layout, gate)
    launch(
        _gate_kernel, tiles(layout, t),
        x, z, None if residual is None else layout.dense(residual), y, mean, scale, *gate.parameters,
        layout.C, layout.HW, gate.width, layout.stride_n, layout.stride_o, 0 if gate.shared else layout.C,
        KIND=gate.kind.value, ACTIVATION=activation, **t._asdict(),
    )  # fmt: skip
    return y


def self_gate_bwd(
    grad: torch.Tensor, x: torch.Tensor, layout: Layout, gate: Gate, mean: torch.Tensor, scale: torch.Tensor,
    residual: torch.Tensor | None, activation: int, fixed: bool = False, z: torch.Tensor | None = None,
    dz: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """(dx, dresidual, sums): sums [G, 2 or 3, C] are of r, r d (and r d^2), None where no parameter needs them.

    Reads x and grad once if planes fit in a tile, or if the statistics are `fixed`, else twice. With an activation, g'
    is written once more and returned as dresidual (else empty: it is grad), and a residual is read once. z, which may
    be scaled instead of x, is read as often as x, and dz written once; both are dense as dx is.
    """
    C, HW = layout.C, layout.HW
    grad = layout.dense(grad)
    residual = None if residual is None or not activation else layout.dense(residual)
    dx, dresidual = layout.empty(x), layout.empty(x) if activation else x.new_empty(0)
    if not layout.N:
        return dx, dresidual, None
    t = _plane_tile(layout, gate, backward=True)
    if t is not None:
        sums = None if gate.kind == SIMAM else mean.new_empty((layout.N, 2, C))
        launch(
            _plane_bwd_kernel, tiles(layout, t),
            grad, x, residual, mean, scale, *gate.parameters, dx, dresidual, sums,
            C, HW, gate.width, layout.stride_n, layout.stride_o,
            KIND=gate.kind.value, ACTIVATION=activation, **t._asdict(),
        )  # fmt: skip
        return dx, dresidual, sums
    stats_n = 0 if gate.shared else C
    groups, images = gate.groups(layout)
    t, blocks, parts, steps = reduction(layout, over_c=False)
    t = _for_halves(t, layout, gate)
    partial = mean.new_empty((layout.N, parts, 3, C))
    launch(
        _sums_kernel, layout.N * blocks,
        grad, x, z, residual, mean, scale, *gate.parameters, dresidual, dx if fixed else None, dz if fixed else None,
        partial,
        C, HW, gate.width, layout.stride_n, layout.stride_o, stats_n, steps,
        KIND=gate.kind.value, ACTIVATION=activation, **t._asdict(), parts=parts,
    )  # fmt: skip
    sums = mean.new_empty((groups, 3, C))
    combine(partial.view(groups, images * parts, 3 * C), None, sums)
    if not fixed:
        t = _for_halves(tile(layout, SCALE_TILE), layout, gate)
        launch(
            _self_gate_dx_kernel, tiles(layout, t),
            dresidual if activation else grad, x, z, mean, scale, sums, *gate.parameters, dx, dz,
            C, HW, gate.width, layout.stride_n, layout.stride_o, stats_n, images * HW,
            KIND=gate.kind.value, **t._asdict(),
        )  # fmt: skip
    return dx, dresidual, sums
