"""Kernels of LocalAttention's spatial perceptron, whose hidden values of a pixel live in registers.

Forward keeps their signs, 32 to an integer; with S = sum mask dz x and t = sum mask dz, dz the gradient before the
sigmoid, every gradient of the perceptron follows without them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..core.product import dot
from ..core.tiles import SIGMOID, gate_grad, sigmoid, tile_mask, tile_offsets
from .pixel_gate import upstream_tile
from .pool import parts_sum
from .weight_grads import weight_grads_first

WORD = tl.constexpr(32)  # hidden units whose signs share an integer


@triton.jit
def _hidden_units(
    x_ptr, p1_ptr, q1_ptr, p2_ptr, sums_ptr, signs_ptr, n, first, p, logits, C, HW, S, stride_n, stride_o,
    DOT: tl.constexpr, PRECISION: tl.constexpr, CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """logits [BLOCK_P] and what hidden units add to them from the first on; stores their signs, and sums of x."""
    PER_WORD: tl.constexpr = min(BLOCK_S, WORD)
    WORDS: tl.constexpr = BLOCK_S // PER_WORD
    BLOCK_P: tl.constexpr = p.shape[0]
    s = first + tl.arange(0, BLOCK_S)
    hidden = tl.zeros([BLOCK_S, BLOCK_P], logits.dtype)
    for start in range(0, C, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        mask = tile_mask(c, p, C, HW, CHANNELS_LAST, ALIGN)
        x = tl.load(x_ptr + tile_offsets(n * stride_n, c, p, stride_o, CHANNELS_LAST, ALIGN), mask=mask, other=0.0)
        w = tl.load(p1_ptr + s[:, None] * C + c[None, :], mask=(s < S)[:, None] & (c < C)[None, :], other=0.0)
        hidden = dot(w, x, hidden, DOT, PRECISION)
        if sums_ptr is not None:
            tl.store(sums_ptr + c, tl.sum(x.to(logits.dtype), 1), mask=c < C)
    if q1_ptr is not None:
        hidden += tl.load(q1_ptr + s, mask=s < S, other=0.0).to(logits.dtype)[:, None]
    dead = (hidden <= 0) | (s >= S)[:, None]  # past the last one there may be 0 times infinity
    p2 = tl.load(p2_ptr + s, mask=s < S, other=0.0).to(logits.dtype)
    word = tl.sum(tl.reshape(tl.where(dead, 0, 1) << (s % WORD)[:, None], [WORDS, PER_WORD, BLOCK_P]), 1)
    k = first // WORD + tl.arange(0, WORDS)
    words = tl.cdiv(S, WORD)
    out = signs_ptr + (n * words + k[:, None]) * HW + p[None, :]
    tl.store(out, word, mask=(k < words)[:, None] & (p < HW)[None, :])
    return logits + tl.sum(tl.where(dead, 0.0, hidden) * p2[:, None], 0)


@triton.jit
def _hidden_gate_kernel(
    x_ptr, p1_ptr, q1_ptr, p2_ptr, q2_ptr, sums_ptr, gate_ptr, signs_ptr, C, HW, S, stride_n, stride_o,
    DOT: tl.constexpr, PRECISION: tl.constexpr, CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr, MORE: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """gate [N, HW] = sigmoid(p2 relu(p1 x + q1) + q2), signs [N, words, HW], and sums [N, blocks, C] of x.

    A block of hidden units reads x; where there are more, each reads it again.
    """
    blocks = tl.cdiv(HW, BLOCK_P)
    block = tl.program_id(0) % blocks
    n = (tl.program_id(0) // blocks).to(tl.int64)
    p = block * BLOCK_P + tl.arange(0, BLOCK_P)
    logits = _hidden_units(
        x_ptr, p1_ptr, q1_ptr, p2_ptr, sums_ptr + (n * blocks + block) * C, signs_ptr, n, 0, p,
        tl.zeros([BLOCK_P], gate_ptr.dtype.element_ty), C, HW, S, stride_n, stride_o,
        DOT, PRECISION, CHANNELS_LAST, ALIGN, BLOCK_S, BLOCK_C,
    )  # fmt: skip
    if MORE:
        for first in range(BLOCK_S, S, BLOCK_S):
            logits = _hidden_units(
                x_ptr, p1_ptr, q1_ptr, p2_ptr, None, signs_ptr, n, first, p, logits, C, HW, S, stride_n, stride_o,
                DOT, PRECISION, CHANNELS_LAST, ALIGN, BLOCK_S, BLOCK_C,
            )  # fmt: skip
    if q2_ptr is not None:
        logits += tl.load(q2_ptr).to(logits.dtype)
    tl.store(gate_ptr + n * HW + p, sigmoid(logits), mask=p < HW)


@triton.jit
def _masked(dz, signs_ptr, n, s, p, S, HW):
    """dz [BLOCK_P] where the hidden value is positive, [BLOCK_P, BLOCK_S]."""
    words = signs_ptr + (n * tl.cdiv(S, WORD) + s[None, :] // WORD) * HW + p[:, None]
    word = tl.load(words, mask=(p < HW)[:, None] & (s < S)[None, :], other=0)
    return tl.where((word >> (s % WORD)[None, :]) & 1 != 0, dz[:, None], 0.0)


@triton.jit
def _store_sums(sums_ptr, counts_ptr, sums, counts, total, part, c, s, C, S, with_counts, with_total):
    mask = (c < C)[:, None] & (s < S)[None, :]
    tl.store(sums_ptr + (part * S + s[None, :]) * C + c[:, None], sums, mask=mask)
    tl.store(counts_ptr + part * (S + 1) + s, counts, mask=(s < S) & with_counts)
    tl.store(counts_ptr + part * (S + 1) + S, tl.sum(total, 0), mask=with_total)


@triton.jit
def _hidden_grads_kernel(
    grad_ptr, x_ptr, residual_ptr, channel_gate_ptr, spatial_gate_ptr, signs_ptr, dresidual_ptr, dchannel_ptr, sums_ptr,
    counts_ptr, dz_ptr, tiles, C, HW, S, stride_n, stride_o, steps,
    ACTIVATION: tl.constexpr, COMBINE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """All sums of g' x and x in one read of both, where a program can hold all channels of its pixels.

    Stores g' and dz [N, HW]; dchannel [N, blocks of pixels, C], the sums of g' x * spatial_gate over a block; over the
    tiles of all images that a program walks, sums [parts, S, C] of mask dz x, and counts [parts, S + 1] of mask dz and,
    last, of dz.
    """
    acc_ty = channel_gate_ptr.dtype.element_ty
    blocks = tl.cdiv(HW, BLOCK_P)
    c = tl.arange(0, BLOCK_C)
    s = tl.arange(0, BLOCK_S)
    sums = tl.zeros([BLOCK_C, BLOCK_S], acc_ty)
    counts = tl.zeros([BLOCK_S], acc_ty)
    total = tl.zeros([BLOCK_P], acc_ty)
    first = tl.program_id(0) * steps
    for tile in range(first, min(first + steps, tiles)):
        n = (tile // blocks).to(tl.int64)
        block = tile % blocks
        p = block * BLOCK_P + tl.arange(0, BLOCK_P)
        spatial_gate = tl.load(spatial_gate_ptr + n * HW + p, mask=p < HW, other=0.0)
        x, dspatial = upstream_tile(
            grad_ptr, x_ptr, residual_ptr, channel_gate_ptr, dresidual_ptr, dchannel_ptr, spatial_gate, n,
            (n * blocks + block) * C, c, p, C, HW, stride_n, stride_o, ACTIVATION, COMBINE, CHANNELS_LAST, ALIGN,
        )  # fmt: skip
        dz = dspatial * gate_grad(spatial_gate, SIGMOID)
        tl.store(dz_ptr + n * HW + p, dz, mask=p < HW)
        masked = _masked(dz, signs_ptr, n, s, p, S, HW)
        sums = dot(x, masked, sums, DOT, PRECISION)
        counts += tl.sum(masked, 0)
        total += dz
    part = tl.program_id(0).to(tl.int64)
    _store_sums(sums_ptr, counts_ptr, sums, counts, total, part, c, s, C, S, True, True)


@triton.jit
def _hidden_sums_kernel(
    x_ptr, dz_ptr, signs_ptr, sums_ptr, counts_ptr, tiles, C, HW, S, stride_n, stride_o, steps,
    DOT: tl.constexpr, PRECISION: tl.constexpr, CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """The same sums [parts, S, C] and counts [parts, S + 1] alone, by blocks of channels and hidden units."""
    acc_ty = dz_ptr.dtype.element_ty
    blocks = tl.cdiv(HW, BLOCK_P)
    blocks_c = tl.cdiv(C, BLOCK_C)
    c = tl.program_id(0) % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    s = tl.program_id(0) // blocks_c * BLOCK_S + tl.arange(0, BLOCK_S)
    sums = tl.zeros([BLOCK_C, BLOCK_S], acc_ty)
    counts = tl.zeros([BLOCK_S], acc_ty)
    total = tl.zeros([BLOCK_P], acc_ty)
    first = tl.program_id(1) * steps
    for tile in range(first, min(first + steps, tiles)):
        n = (tile // blocks).to(tl.int64)
        p = tile % blocks * BLOCK_P + tl.arange(0, BLOCK_P)
        mask = tile_mask(c, p, C, HW, CHANNELS_LAST, ALIGN)
        x = tl.load(x_ptr + tile_offsets(n * stride_n, c, p, stride_o, CHANNELS_LAST, ALIGN), mask=mask, other=0.0)
        dz = tl.load(dz_ptr + n * HW + p, mask=p < HW, other=0.0)
        masked = _masked(dz, signs_ptr, n, s, p, S, HW)
        sums = dot(x, masked, sums, DOT, PRECISION)
        counts += tl.sum(masked, 0)
        total += dz
    part = tl.program_id(1).to(tl.int64)
    block = tl.program_id(0)
    _store_sums(sums_ptr, counts_ptr, sums, counts, total, part, c, s, C, S, block % blocks_c == 0, block == 0)


@triton.jit(do_not_specialize=["N"])
def _hidden_weights_kernel(
    dz_ptr, hidden_ptr, dhidden_ptr, pooled_ptr, dw1_ptr, db1_ptr, dw2_ptr, db2_ptr, N, C, R,
    sums_ptr, counts_ptr, p1_ptr, q1_ptr, p2_ptr, dp1_ptr, dq1_ptr, dp2_ptr, dq2_ptr, product_ptr, parts, S,
    BRANCHES: tl.constexpr, HIDDEN_ACTIVATION: tl.constexpr, WEIGHT_C: tl.constexpr, WEIGHT_R: tl.constexpr,
    SUM_S: tl.constexpr, SUM_L: tl.constexpr,
):  # fmt: skip
    """The weights' gradients of the channel gate, then those of the perceptron, a hidden unit in each program.

    Of parts of S and t: dp1 = p2 S, dq1 = p2 t, dp2 = p1 S + q1 t, dq2 = sum dz. product [S, C] is p2 p1.
    """
    place = weight_grads_first(
        tl.program_id(0), dz_ptr, hidden_ptr, dhidden_ptr, pooled_ptr, dw1_ptr, db1_ptr, dw2_ptr, db2_ptr, N, C, R,
        None, None, 0, 0, None, None, 0, 0, BRANCHES, HIDDEN_ACTIVATION, WEIGHT_C, WEIGHT_R, 1, 1, 1, 1,
    )  # fmt: skip
    if place >= 0:
        acc_ty = sums_ptr.dtype.element_ty
        s = place + tl.arange(0, 1)
        p2 = tl.load(p2_ptr + s).to(acc_ty)
        dp2 = tl.zeros([SUM_L], acc_ty)
        for start in range(0, C, SUM_L):
            c = start + tl.arange(0, SUM_L)
            k = place * C + c
            p1 = tl.load(p1_ptr + k, mask=c < C, other=0.0).to(acc_ty)
            total = tl.where(c < C, parts_sum(sums_ptr, 0, k, S * C, parts, 1, SUM_S), 0.0)
            dp2 += p1 * total
            tl.store(dp1_ptr + k, p2 * total, mask=c < C)
            tl.store(product_ptr + k, p2 * p1, mask=c < C)
        count = parts_sum(counts_ptr, 0, s, S + 1, parts, 1, SUM_S)
        tl.store(dq1_ptr + s, p2 * count)
        tl.store(dq2_ptr + s, parts_sum(counts_ptr, 0, S + s, S + 1, parts, 1, SUM_S), mask=s == 0)
        q1 = tl.zeros([1], acc_ty)
        if q1_ptr is not None:
            q1 = tl.load(q1_ptr + s).to(acc_ty)
        tl.store(dp2_ptr + s, tl.sum(dp2, 0) + q1 * count)


@triton.jit
def _hidden_dx_kernel(
    grad_ptr, channel_gate_ptr, spatial_gate_ptr, dmean_ptr, weight_ptr, dz_ptr, signs_ptr, dx_ptr, C, HW, S,
    DOT: tl.constexpr, PRECISION: tl.constexpr, CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """dx = grad * channel_gate * spatial_gate + weight^T (mask dz) + dmean / HW; weight [S, C] is p2 p1."""
    acc_ty = dz_ptr.dtype.element_ty
    blocks_p, blocks_c = tl.cdiv(HW, BLOCK_P), tl.cdiv(C, BLOCK_C)
    pid = tl.program_id(0)
    n = (pid // blocks_c // blocks_p).to(tl.int64)
    c = pid % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    p = pid // blocks_c % blocks_p * BLOCK_P + tl.arange(0, BLOCK_P)
    mask = tile_mask(c, p, C, HW, CHANNELS_LAST, ALIGN)
    offsets = tile_offsets(n * C * HW, c, p, C if CHANNELS_LAST else HW, CHANNELS_LAST, ALIGN)
    grad = tl.load(grad_ptr + offsets, mask=mask, other=0.0)  # under way while the product waits for its operands
    dz = tl.load(dz_ptr + n * HW + p, mask=p < HW, other=0.0)
    through = tl.zeros([BLOCK_P, BLOCK_C], acc_ty)
    for start in range(0, S, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        w = tl.load(weight_ptr + s[:, None] * C + c[None, :], mask=(s < S)[:, None] & (c < C)[None, :], other=0.0)
        masked = _masked(dz, signs_ptr, n, s, p, S, HW)
        through = dot(masked, w, through, DOT, PRECISION)
    g = grad.to(acc_ty)
    g *= tl.load(channel_gate_ptr + n * C + c, mask=c < C, other=0.0)[:, None]
    g *= tl.load(spatial_gate_ptr + n * HW + p, mask=p < HW, other=0.0)[None, :]
    g += (tl.load(dmean_ptr + n * C + c, mask=c < C, other=0.0) / HW)[:, None]
    tl.store(dx_ptr + offsets, g + tl.trans(through), mask=mask)
