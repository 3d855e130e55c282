"""The mathematics of self-gates on one tile: kinds, weights, d, the sigmoid and dx; see `gate.py`."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ...core.tiles import dense_offsets, program_tile, tile_mask, wide_mask, wide_offsets, x_offsets

SIMAM, SHUFFLE, AFFINE = map(tl.constexpr, range(3))


class ShuffleWeights(NamedTuple):
    """The weights [K] of shuffle attention as kernels take them: of channel half, spatial half and its group norm."""

    cweight: Any
    cbias: Any
    sweight: Any
    sbias: Any
    gn_weight: Any
    gn_bias: Any


def contiguous_weights(*weights: torch.Tensor) -> ShuffleWeights:
    return ShuffleWeights(*(w.contiguous() for w in weights))


class Line(NamedTuple):
    """The logit a scale d + b of each channel, a and b [C], as kernels take it."""

    a: Any
    b: Any


class Statistics(NamedTuple):
    """Mean and scale of each channel, as kernels take them: [N, C], or [C] with stride_n 0 for all images."""

    mean: Any
    scale: Any
    stride_n: Any


@triton.jit
def x_channel(c, C, KIND: tl.constexpr):
    """Returns the channel of x behind channel c of y."""
    if KIND == SHUFFLE:
        c = c % 2 * (C // 2) + c // 2
    return c


@triton.jit
def y_channel(c, C):
    """Returns the channel of a shuffled y that channel c of x becomes: the inverse of `x_channel`."""
    return c % (C // 2) * 2 + c // (C // 2)


@triton.jit
def load_x(x_ptr, n, c0, c, p, size, KIND: tl.constexpr, TILE: tl.constexpr):
    """Loads the tile of x behind channels c of y; c0 is the first of them."""
    if KIND == SHUFFLE and TILE.CHANNELS_LAST:
        BLOCK_C: tl.constexpr = TILE.BLOCK_C
        BLOCK_P: tl.constexpr = TILE.BLOCK_P
        HALF: tl.constexpr = (TILE.ALIGN + 1) // 2
        j = c0 // 2 + tl.arange(0, BLOCK_C // 2)
        mask = wide_mask(j, p, size.C // 2, size.HW, True, HALF)
        image = n * size.stride_n
        first = wide_offsets(image, j, p, size.stride_o, True, HALF)
        second = wide_offsets(image, j + size.C // 2, p, size.stride_o, True, HALF)
        halves = tl.join(tl.load(x_ptr + first, mask=mask, other=0.0), tl.load(x_ptr + second, mask=mask, other=0.0))
        x = tl.reshape(tl.permute(halves, 0, 2, 1), [BLOCK_C, BLOCK_P])
    else:
        offsets = x_offsets(n, x_channel(c, size.C, KIND), p, size, TILE)
        x = tl.load(x_ptr + offsets, mask=tile_mask(c, p, size, TILE), other=0.0)
    return x


@triton.jit
def store_dx(dx_ptr, dx, n, c0, c, p, size, KIND: tl.constexpr, TILE: tl.constexpr):
    """Stores a tile into a dense map: the inverse of `load_x`."""
    dx = dx.to(dx_ptr.dtype.element_ty)
    if KIND == SHUFFLE and TILE.CHANNELS_LAST:
        BLOCK_C: tl.constexpr = TILE.BLOCK_C
        BLOCK_P: tl.constexpr = TILE.BLOCK_P
        HALF: tl.constexpr = (TILE.ALIGN + 1) // 2
        j = c0 // 2 + tl.arange(0, BLOCK_C // 2)
        mask = wide_mask(j, p, size.C // 2, size.HW, True, HALF)
        image = n * size.C * size.HW
        a, b = tl.split(tl.permute(tl.reshape(dx, [BLOCK_C // 2, 2, BLOCK_P]), 0, 2, 1))
        tl.store(dx_ptr + wide_offsets(image, j, p, size.C, True, HALF), a, mask=mask)
        tl.store(dx_ptr + wide_offsets(image, j + size.C // 2, p, size.C, True, HALF), b, mask=mask)
    else:
        offsets = dense_offsets(n, x_channel(c, size.C, KIND), p, size, TILE)
        tl.store(dx_ptr + offsets, dx, mask=tile_mask(c, p, size, TILE))


@triton.jit
def channel_tile(size, TILE: tl.constexpr):
    """Returns the image, the first channel, channels and pixels of `program_tile`.

    The first channel is a number of its own: Triton sees its alignment, and would not see it through a minimum.
    """
    n, c, p = program_tile(size, TILE)
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    c0 = pid // tl.cdiv(size.HW, TILE.BLOCK_P) % tl.cdiv(size.C, TILE.BLOCK_C) * TILE.BLOCK_C
    return n, c0, c, p


@triton.jit
def scale_of(second, count, EPS: tl.constexpr, KIND: tl.constexpr):
    """Returns the statistic beside the mean, from the second moment over `count` values."""
    scale = 1 / tl.sqrt(second / count + EPS)
    if KIND == SIMAM:
        scale = 1 / (4 * (second / tl.maximum(count - 1, 1) + EPS))
    return scale


@triton.jit
def load_statistics(stats, n, c, cx, size):
    """Returns mean and scale of channels cx of image n."""
    mean = tl.load(stats.mean + n * stats.stride_n + cx, mask=c < size.C, other=0.0)
    scale = tl.load(stats.scale + n * stats.stride_n + cx, mask=c < size.C, other=0.0)
    return mean, scale


@triton.jit
def logit_parameters(weights, cx, C, K, acc_ty: tl.constexpr, KIND: tl.constexpr):
    """Returns (a, b, k, spatial) of channels cx of x: the logit is a scale d + b + k mean; d = 0 if not `spatial`."""
    a, b, k, spatial = 0.0, 0.0, 0.0, True
    if KIND == SHUFFLE:
        inside, j = cx < C, cx % K
        spatial = cx // K % 2 == 1
        weight = tl.load(weights.sweight + j, mask=inside, other=0.0).to(acc_ty)
        a = tl.where(spatial, weight * tl.load(weights.gn_weight + j, mask=inside, other=0.0).to(acc_ty), 0.0)
        b = weight * tl.load(weights.gn_bias + j, mask=inside, other=0.0).to(acc_ty)
        b += tl.load(weights.sbias + j, mask=inside, other=0.0).to(acc_ty)
        b = tl.where(spatial, b, tl.load(weights.cbias + j, mask=inside, other=0.0).to(acc_ty))
        k = tl.where(spatial, 0.0, tl.load(weights.cweight + j, mask=inside, other=0.0).to(acc_ty))
    if KIND == AFFINE:
        a = tl.load(weights.a + cx, mask=cx < C, other=0.0).to(acc_ty)
        b = tl.load(weights.b + cx, mask=cx < C, other=0.0).to(acc_ty)
    return a, b, k, spatial


@triton.jit
def element_gate(t, KIND: tl.constexpr):
    """Returns `sigmoid` of every element in few instructions, which are what these passes spend; NaN stays NaN.

    A division takes seven of them, the square of a reciprocal root and a step of Newton's method four. exp takes three
    more than exp2 to keep subnormal numbers. SimAM's t is positive, which needs no choice between two forms.
    """
    e = tl.exp2((t if KIND == SIMAM else tl.abs(t)) * -1.4426950408889634)  # -log2(e)
    root = tl.rsqrt(1 + e)
    s = root * root
    if KIND == AFFINE:
        s += s * (1 - (1 + e) * s)  # exactly 0.5 for t = 0, which a batch norm makes of equal values
    else:
        s *= 2 - (1 + e) * s  # takes fewer registers
    if KIND != SIMAM:
        s *= tl.where(t < 0, e, 1.0)
    return s


@triton.jit
def deviation_and_gate(x, mean, scale, a, b, k, spatial, KIND: tl.constexpr):
    """Returns the tiles of d and of the sigmoid."""
    d = x - mean[:, None]
    if KIND == SIMAM:
        t = scale[:, None] * d * d + 0.5
    elif KIND == SHUFFLE:
        # Threads exchange this mean with `spatial` encoded in it; otherwise each would divide its channel by K again.
        # If a spatial mean is NaN, so are its scale and the gate.
        centre = tl.where(spatial, mean, float("nan"))[:, None]
        d = tl.where(centre == centre, x - centre, 0.0)
        t = tl.where(spatial, a * scale, 0.0)[:, None] * d + tl.where(spatial, b, b + k * mean)[:, None]
    else:
        t = (a * scale)[:, None] * d + b[:, None]
    return d, element_gate(t, KIND)


@triton.jit
def summands(r, d, KIND: tl.constexpr):
    """Returns the tiles whose sums over pixels `dx_tile` needs: r d and r d^2 for SimAM, r and r d for the others."""
    rd = r * d
    if KIND == SIMAM:
        first, second = rd, rd * d
    else:
        first, second = r, rd
    return first, second


@triton.jit
def dx_tile(base, r, d, mean, scale, a, k, spatial, first, second, count, KIND: tl.constexpr):
    """Returns base + r (2 q d + a) + u d + v.

    first and second are sums of `summands` over the `count` values of a statistic.
    """
    if KIND == SIMAM:
        u = -8 * scale * scale * second / tl.maximum(count - 1, 1)
        v = -2 * scale * first / count
        dx = base + (2 * scale[:, None] * r + u[:, None]) * d + v[:, None]
    else:
        slope = a * scale
        u = -slope * scale * scale * second / count
        mean_r = first / count
        v = tl.zeros_like(mean_r)
        if KIND == SHUFFLE:
            slope, u = tl.where(spatial, slope, 0.0), tl.where(spatial, u, 0.0)
            v = tl.where(spatial, 0.0, k * mean_r)
        # Differences before products: for a single pixel they are 0, however steep the slope is.
        dx = base + (r - mean_r[:, None]) * slope[:, None] + u[:, None] * d + v[:, None]
    return dx
