"""What gates of `_self_gate.py` compute of one tile: the kinds, their parameters, d, the sigmoid and dx."""

from __future__ import annotations

import triton
import triton.language as tl

from ...core.tiles import program_tile, tile_mask, tile_offsets

SIMAM, SHUFFLE, AFFINE = map(tl.constexpr, range(3))


@triton.jit
def x_channel(c, C, KIND: tl.constexpr):
    """The channel of x behind channel c of y."""
    if KIND == SHUFFLE:
        c = c % 2 * (C // 2) + c // 2
    return c


@triton.jit
def y_channel(c, C):
    """The channel of a shuffled y that channel c of x becomes: the inverse of `x_channel`."""
    return c % (C // 2) * 2 + c // (C // 2)


@triton.jit
def load_x(
    x_ptr, image, c0, c, p, C, HW, stride_o, KIND: tl.constexpr, CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The tile of x behind channels c of y, the first of which is c0."""
    if KIND == SHUFFLE and CHANNELS_LAST:
        j = c0 // 2 + tl.arange(0, BLOCK_C // 2)
        HALF: tl.constexpr = (ALIGN + 1) // 2
        mask = tile_mask(j, p, C // 2, HW, CHANNELS_LAST, HALF)
        first = tile_offsets(image, j, p, stride_o, CHANNELS_LAST, HALF)
        second = tile_offsets(image, j + C // 2, p, stride_o, CHANNELS_LAST, HALF)
        halves = tl.join(tl.load(x_ptr + first, mask=mask, other=0.0), tl.load(x_ptr + second, mask=mask, other=0.0))
        x = tl.reshape(tl.permute(halves, 0, 2, 1), [BLOCK_C, p.shape[0]])
    else:
        mask = tile_mask(c, p, C, HW, CHANNELS_LAST, ALIGN)
        offsets = tile_offsets(image, x_channel(c, C, KIND), p, stride_o, CHANNELS_LAST, ALIGN)
        x = tl.load(x_ptr + offsets, mask=mask, other=0.0)
    return x


@triton.jit
def store_dx(
    dx_ptr, image, dx, c0, c, p, C, HW, KIND: tl.constexpr, CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The inverse of `load_x`, into a dense map."""
    dx = dx.to(dx_ptr.dtype.element_ty)
    if KIND == SHUFFLE and CHANNELS_LAST:
        j = c0 // 2 + tl.arange(0, BLOCK_C // 2)
        HALF: tl.constexpr = (ALIGN + 1) // 2
        mask = tile_mask(j, p, C // 2, HW, CHANNELS_LAST, HALF)
        a, b = tl.split(tl.permute(tl.reshape(dx, [BLOCK_C // 2, 2, p.shape[0]]), 0, 2, 1))
        tl.store(dx_ptr + tile_offsets(image, j, p, C, CHANNELS_LAST, HALF), a, mask=mask)
        tl.store(dx_ptr + tile_offsets(image, j + C // 2, p, C, CHANNELS_LAST, HALF), b, mask=mask)
    else:
        stride_o = C if CHANNELS_LAST else HW
        offsets = tile_offsets(image, x_channel(c, C, KIND), p, stride_o, CHANNELS_LAST, ALIGN)
        tl.store(dx_ptr + offsets, dx, mask=tile_mask(c, p, C, HW, CHANNELS_LAST, ALIGN))


@triton.jit
def channel_tile(C, HW, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr):
    """As `program_tile`, with the first channel as a number: alignment is seen through it, not through a minimum."""
    n, c, p = program_tile(C, HW, BLOCK_C, BLOCK_P)
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    c0 = pid // tl.cdiv(HW, BLOCK_P) % tl.cdiv(C, BLOCK_C) * BLOCK_C
    return n, c0, c, p


@triton.jit
def scale_of(second, count, EPS: tl.constexpr, KIND: tl.constexpr):
    """The statistic beside the mean, from the second moment over `count` values."""
    scale = 1 / tl.sqrt(second / count + EPS)
    if KIND == SIMAM:
        scale = 1 / (4 * (second / tl.maximum(count - 1, 1) + EPS))
    return scale


@triton.jit
def parameters(p0, p1, p2, p3, p4, p5, cx, C, K, acc_ty: tl.constexpr, KIND: tl.constexpr):
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
def element_gate(t, KIND: tl.constexpr):
    """`sigmoid` of every element, where its instructions are what a pass over the maps takes; NaN stays NaN.

    A division takes seven of them, the square of a reciprocal root and a step of Newton's method four, and exp keeps
    subnormal numbers at three more than exp2. SimAM's t is positive, which needs no choice between two forms.
    """
    e = tl.exp2((t if KIND == SIMAM else tl.abs(t)) * -1.4426950408889634)  # -log2(e)
    root = tl.rsqrt(1 + e)
    s = root * root
    if KIND == AFFINE:
        s += s * (1 - (1 + e) * s)  # of t = 0, equal values behind a batch norm, 0.5 itself
    else:
        s *= 2 - (1 + e) * s  # in fewer registers
    if KIND != SIMAM:
        s *= tl.where(t < 0, e, 1.0)
    return s


@triton.jit
def deviation_and_gate(x, mean, scale, a, b, k, spatial, KIND: tl.constexpr):
    """d and the sigmoid, tiles, from what each channel has."""
    d = x - mean[:, None]
    if KIND == SIMAM:
        t = scale[:, None] * d * d + 0.5
    elif KIND == SHUFFLE:
        # Threads hand each other this mean with `spatial` in it, where they would else divide each channel by K again.
        # Where a spatial mean is NaN, its scale is, and the gate with it.
        centre = tl.where(spatial, mean, float("nan"))[:, None]
        d = tl.where(centre == centre, x - centre, 0.0)
        t = tl.where(spatial, a * scale, 0.0)[:, None] * d + tl.where(spatial, b, b + k * mean)[:, None]
    else:
        t = (a * scale)[:, None] * d + b[:, None]
    return d, element_gate(t, KIND)


@triton.jit
def summands(r, d, KIND: tl.constexpr):
    """The two tiles whose sums over pixels `dx_tile` needs: r d and r d^2 of SimAM, r and r d of the others."""
    rd = r * d
    if KIND == SIMAM:
        first, second = rd, rd * d
    else:
        first, second = r, rd
    return first, second


@triton.jit
def dx_tile(base, r, d, mean, scale, a, k, spatial, first, second, count, KIND: tl.constexpr):
    """base + r (2 q d + a) + u d + v; sums of `summands` over the `count` values behind a statistic."""
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
        # Differences before products: of a single pixel they are 0, however steep the slope.
        dx = base + (r - mean_r[:, None]) * slope[:, None] + u[:, None] * d + v[:, None]
    return dx
