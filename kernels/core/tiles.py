"""Pieces that the kernels share: addresses of a tile, activations, the maximum."""

from __future__ import annotations

import triton
import triton.language as tl

INDEX_MAX = tl.constexpr(2**31 - 1)
NONE, RELU, SILU, SIGMOID, HARD_SIGMOID = map(tl.constexpr, range(5))  # the first three are also the ops' numbers


@triton.jit
def program_tile(C, HW, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr):
    """This program's image (int64), channels [BLOCK_C] and pixels [BLOCK_P].

    The last images come first: the pass before ended with them, and they may still be in the L2 cache.
    """
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    blocks_p = tl.cdiv(HW, BLOCK_P)
    blocks_c = tl.cdiv(C, BLOCK_C)
    n = (pid // blocks_p // blocks_c).to(tl.int64)
    c = (pid // blocks_p % blocks_c) * BLOCK_C + tl.arange(0, BLOCK_C)
    p = (pid % blocks_p) * BLOCK_P + tl.arange(0, BLOCK_P)
    return n, c, p


@triton.jit
def tile_offsets(image, c, p, stride_o, CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr):
    """Offsets [BLOCK_C, BLOCK_P] of an image that begins at offset ``image``, int64: it may have over 2^31 elements.

    Triton tells of a size whether 16 divides it, and no more: that ALIGN divides where an image begins has to be said.
    """
    if CHANNELS_LAST:
        offsets = c[:, None] + p[None, :].to(tl.int64) * stride_o
    else:
        offsets = c[:, None].to(tl.int64) * stride_o + p[None, :]
    offsets += image
    # Triton does not compile a hint about a tile of one element.
    return offsets if ALIGN == 1 else tl.multiple_of(offsets, [ALIGN, 1] if CHANNELS_LAST else [1, ALIGN])


@triton.jit
def tile_mask(c, p, C, HW, CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr):
    """[BLOCK_C, BLOCK_P]; constant over ALIGN neighbours, which lets a masked load stay wide."""
    mask = (c < C)[:, None] & (p < HW)[None, :]
    return mask if ALIGN == 1 else tl.max_constancy(mask, [ALIGN, 1] if CHANNELS_LAST else [1, ALIGN])


@triton.jit
def sigmoid(v):
    """1 / (1 + exp(-v)) whose exponential does not overflow."""
    e = tl.exp(-tl.abs(v))
    return tl.where(v < 0, e, 1.0) / (1 + e)


@triton.jit
def gate_grad(s, GATE: tl.constexpr):
    """The derivative of the sigmoid, or of the hard sigmoid, from its value."""
    if GATE == HARD_SIGMOID:
        return tl.where((s <= 0) | (s >= 1), 0.0, tl.full([], 1 / 6, s.dtype))  # a plain number would be float32
    return s * (1 - s)


@triton.jit
def activate(v, ACTIVATION: tl.constexpr):
    """The activation of v; NaN stays NaN."""
    if ACTIVATION == RELU:
        v = tl.where(v <= 0, 0.0, v)
    elif ACTIVATION == SILU:
        v = v * sigmoid(v)
    elif ACTIVATION == SIGMOID:
        v = sigmoid(v)
    elif ACTIVATION == HARD_SIGMOID:
        v = v + 3
        v = tl.where(v < 0, 0.0, tl.where(v > 6, 6.0, v)) / 6
    return v


@triton.jit
def activation_grad(g, v, ACTIVATION: tl.constexpr):
    """g * activate'(v), for relu and silu."""
    if ACTIVATION == RELU:
        g = tl.where(v <= 0, 0.0, g)
    elif ACTIVATION == SILU:
        s = sigmoid(v)
        g = g * (s * (1 + v * (1 - s)))
    return g


@triton.jit
def max_first(values, index, AXIS: tl.constexpr):
    """Maximum along AXIS and its lowest index. NaN wins: tl.max alone would drop it on a GPU."""
    is_nan = values != values
    any_nan = tl.max(is_nan.to(tl.int32), AXIS) > 0
    best = tl.max(tl.where(is_nan, -float("inf"), values), AXIS)
    wins = tl.where(tl.expand_dims(any_nan, AXIS), is_nan, values == tl.expand_dims(best, AXIS))
    first = tl.min(tl.where(wins, index, INDEX_MAX), AXIS)
    return tl.where(any_nan, float("nan"), best), first
