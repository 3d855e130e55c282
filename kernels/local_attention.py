"""LocalAttention: kernels of its spatial perceptron, launchers of the fused forward and backward.

The hidden values of a pixel live in registers. Forward keeps their signs, 32 to an integer; with S = sum mask dz x and
t = sum mask dz, dz the gradient before the sigmoid, every gradient of the perceptron follows without them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ._gate import PRODUCT, scale
from ._heuristics import Tile, cdiv, next_power_of_2, splits
from ._launch import device_guard, launch
from ._layout import Layout, accumulation_dtype, canonical
from ._mlp import mlp_gate, mlp_gate_bwd
from ._pixel import pixel_grads, sum_images, upstream_tile
from ._pool import combine
from ._product import dot, product
from ._tiles import SIGMOID, gate_grad, sigmoid, tile_mask, tile_offsets

WORD = tl.constexpr(32)  # hidden units whose signs share an integer
FEWER = 4  # times fewer programs than other reductions have: each leaves sums as large as a tile
WIDEST, HELD = 256, 64  # channels and hidden units that a program can hold
SUMS = 8192  # products of them that it can sum up meanwhile


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
        x = tl.load(x_ptr + n * stride_n + tile_offsets(c, p, stride_o, CHANNELS_LAST, ALIGN), mask=mask, other=0.0)
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
def _store_sums(sums_ptr, counts_ptr, sums, counts, part, c, s, C, S, with_counts):
    mask = (c < C)[:, None] & (s < S)[None, :]
    tl.store(sums_ptr + (part * S + s[None, :]) * C + c[:, None], sums, mask=mask)
    tl.store(counts_ptr + part * S + s, counts, mask=(s < S) & with_counts)


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
    tiles of all images that a program walks, sums [parts, S, C] of mask dz x and counts [parts, S] of mask dz.
    """
    acc_ty = channel_gate_ptr.dtype.element_ty
    blocks = tl.cdiv(HW, BLOCK_P)
    c = tl.arange(0, BLOCK_C)
    s = tl.arange(0, BLOCK_S)
    sums = tl.zeros([BLOCK_C, BLOCK_S], acc_ty)
    counts = tl.zeros([BLOCK_S], acc_ty)
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
    part = tl.program_id(0).to(tl.int64)
    _store_sums(sums_ptr, counts_ptr, sums, counts, part, c, s, C, S, True)


@triton.jit
def _hidden_sums_kernel(
    x_ptr, dz_ptr, signs_ptr, sums_ptr, counts_ptr, tiles, C, HW, S, stride_n, stride_o, steps,
    DOT: tl.constexpr, PRECISION: tl.constexpr, CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """The same sums [parts, S, C] and counts [parts, S] alone, by blocks of channels and hidden units."""
    acc_ty = dz_ptr.dtype.element_ty
    blocks = tl.cdiv(HW, BLOCK_P)
    blocks_c = tl.cdiv(C, BLOCK_C)
    c = tl.program_id(0) % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    s = tl.program_id(0) // blocks_c * BLOCK_S + tl.arange(0, BLOCK_S)
    sums = tl.zeros([BLOCK_C, BLOCK_S], acc_ty)
    counts = tl.zeros([BLOCK_S], acc_ty)
    first = tl.program_id(1) * steps
    for tile in range(first, min(first + steps, tiles)):
        n = (tile // blocks).to(tl.int64)
        p = tile % blocks * BLOCK_P + tl.arange(0, BLOCK_P)
        mask = tile_mask(c, p, C, HW, CHANNELS_LAST, ALIGN)
        x = tl.load(x_ptr + n * stride_n + tile_offsets(c, p, stride_o, CHANNELS_LAST, ALIGN), mask=mask, other=0.0)
        dz = tl.load(dz_ptr + n * HW + p, mask=p < HW, other=0.0)
        masked = _masked(dz, signs_ptr, n, s, p, S, HW)
        sums = dot(x, masked, sums, DOT, PRECISION)
        counts += tl.sum(masked, 0)
    part = tl.program_id(1).to(tl.int64)
    _store_sums(sums_ptr, counts_ptr, sums, counts, part, c, s, C, S, tl.program_id(0) % blocks_c == 0)


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
    offsets = n * C * HW + tile_offsets(c, p, C if CHANNELS_LAST else HW, CHANNELS_LAST, ALIGN)
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


def _units(S: int, limit: int) -> int:
    """Block of hidden units; a product takes no fewer than 16 of anything."""
    return min(max(next_power_of_2(S), 16), limit)


def _tile(layout: Layout, itemsize: int, channels: int, pixels: int, per_warp: int = 1024) -> Tile:
    """Of at most so many channels and pixels; 16 bytes or more per thread of a warp of 64."""
    block_c, block_p = _units(layout.C, channels), _units(layout.HW, pixels)
    num_warps = min(max(block_c * block_p * itemsize // per_warp, 1), 8)
    return Tile(layout.channels_last, layout.align, block_c, block_p, num_warps)


def _grads_tile(layout: Layout, itemsize: int) -> Tile:
    """All channels of so many pixels that the sums have registers, and copies that are under way shared memory."""
    block_c = _units(layout.C, WIDEST)
    block_p = _units(layout.HW, min(max(16384 // itemsize // block_c, 16), 128))
    per_warp = 2048 // itemsize if layout.align >= 8 else 512
    return Tile(layout.channels_last, layout.align, block_c, block_p, min(max(block_c * block_p // per_warp, 1), 8))


def _registers(x: torch.Tensor, t: Tile, activation: int) -> dict[str, int]:
    """A limit of registers a thread, where the compiler would take a few more than a second program leaves room for.

    Two on a multiprocessor hide each other's sums, and all programs run at once. Elsewhere the limit would spill.
    """
    few = x.element_size() == 2 and t.ALIGN >= 8 and t.num_warps == 8 and not activation
    if not (few and x.is_cuda and torch.version.cuda) or torch.cuda.get_device_capability(x.device) != (9, 0):
        return {}
    return {"maxnreg": 128}


def _hidden_gate(
    x: torch.Tensor, layout: Layout, p1: torch.Tensor, q1: torch.Tensor | None, p2: torch.Tensor,
    q2: torch.Tensor | None, like: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Channel means [N, C], gate [N, H, W] and signs [N, words, H, W]; reads x once. ``like``: the small dtype."""
    N, C, HW, S = layout.N, layout.C, layout.HW, p1.shape[0]
    block_s = _units(S, 256)
    # Whole cache lines of channels, too, and few steps along them: each sums them up, and stores the sums.
    t = _tile(layout, x.element_size(), *((128 // x.element_size(), 64, 2048) if block_s <= 64 else (64, 32)))
    blocks = cdiv(HW, t.BLOCK_P)
    sums, gate = like.new_empty((N, blocks, C)), like.new_empty((N, layout.H, layout.W))
    signs = x.new_empty((N, cdiv(S, WORD.value), layout.H, layout.W), dtype=torch.int32)
    launch(
        _hidden_gate_kernel, N * blocks,
        x, p1.reshape(S, C).contiguous(), q1, p2.reshape(-1).contiguous(), q2, sums, gate, signs, C, HW, S,
        layout.stride_n, layout.stride_o, **product(x, p1), MORE=block_s < S, BLOCK_S=block_s, **t._asdict(),
    )  # fmt: skip
    return combine(sums, None, like.new_empty((N, C)), divisor=HW), gate, signs


class _Grads(NamedTuple):
    """Of both gates: g' and dresidual as `gate_grads` has them, dz before each sigmoid, and the perceptron's sums."""

    g: torch.Tensor
    dresidual: torch.Tensor
    dz_c: torch.Tensor  # [N, C]
    dz_s: torch.Tensor  # [N, HW]
    sums: torch.Tensor  # [S, C], of mask dz_s x
    counts: torch.Tensor  # [S], of mask dz_s


def _fits(layout: Layout, S: int) -> bool:
    """Whether a program can hold all channels of its pixels, and their sums with all hidden units."""
    return layout.C <= WIDEST and S <= HELD and _units(S, HELD) * _units(layout.C, WIDEST) <= SUMS


def _hidden_grads(
    grad: torch.Tensor, x: torch.Tensor, layout: Layout, p1: torch.Tensor, channel_gate: torch.Tensor,
    spatial_gate: torch.Tensor, signs: torch.Tensor, residual: torch.Tensor | None, activation: int,
) -> _Grads:  # fmt: skip
    """Reads grad and x once where the sums fit a program; else x a second time, as dz wants all channels first."""
    N, C, HW, S = layout.N, layout.C, layout.HW, p1.shape[0]
    if not N or not _fits(layout, S):
        g, dresidual, dz_c, dz_s, _ = pixel_grads(
            grad, x, layout, channel_gate, spatial_gate, residual, activation, PRODUCT
        )
        if not N:
            return _Grads(g, dresidual, dz_c, dz_s, dz_s.new_zeros((S, C)), dz_s.new_zeros(S))
        block_s, t = _units(S, 64), _tile(layout, x.element_size(), 64, 128 // x.element_size())
        programs, tiles = cdiv(C, t.BLOCK_C) * cdiv(S, block_s), N * cdiv(HW, t.BLOCK_P)
        parts, steps = splits(programs, tiles)
        sums, counts = dz_s.new_empty((1, parts, S * C)), dz_s.new_empty((1, parts, S))
        launch(
            _hidden_sums_kernel, programs,
            x, dz_s, signs, sums, counts, tiles, C, HW, S, layout.stride_n, layout.stride_o, steps,
            **product(x, p1), BLOCK_S=block_s, **t._asdict(), parts=parts, num_stages=2,
        )  # fmt: skip
    else:
        t = _grads_tile(layout, x.element_size())
        blocks = cdiv(HW, t.BLOCK_P)
        parts, steps = splits(FEWER, N * blocks)
        sums, counts = channel_gate.new_empty((1, parts, S * C)), channel_gate.new_empty((1, parts, S))
        dchannel, dz_s = channel_gate.new_empty((N, blocks, C)), channel_gate.new_empty((N, HW))
        grad = layout.dense(grad)
        dresidual = layout.empty(x) if activation else x.new_empty(0)
        launch(
            _hidden_grads_kernel, parts,
            grad, x, None if residual is None else layout.dense(residual), channel_gate, spatial_gate, signs,
            dresidual if activation else None, dchannel, sums, counts, dz_s, N * blocks, C, HW, S,
            layout.stride_n, layout.stride_o, steps, ACTIVATION=activation, COMBINE=PRODUCT.value, **product(x, p1),
            BLOCK_S=_units(S, HELD), **t._asdict(), **_registers(x, t, activation),
        )  # fmt: skip
        g, dz_c = dresidual if activation else grad, combine(dchannel, channel_gate, torch.empty_like(channel_gate))
    sums, counts = combine(sums, None, dz_s.new_empty((1, S * C))), combine(counts, None, dz_s.new_empty((1, S)))
    return _Grads(g, dresidual, dz_c, dz_s, sums.view(S, C), counts.view(S))


def _hidden_dx(
    grad: torch.Tensor, x: torch.Tensor, layout: Layout, channel_gate: torch.Tensor, spatial_gate: torch.Tensor,
    dmean: torch.Tensor, p1: torch.Tensor, weight: torch.Tensor, dz: torch.Tensor, signs: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    C, HW, S = layout.C, layout.HW, p1.shape[0]
    dx = layout.empty(x)
    # Of few warps: each pays for addresses and for the product's operands. One step has nothing to fetch ahead.
    t, block_s = _tile(layout, x.element_size(), 64, 128 // x.element_size(), 2048), _units(S, 32)
    launch(
        _hidden_dx_kernel, layout.N * cdiv(C, t.BLOCK_C) * cdiv(HW, t.BLOCK_P),
        grad, channel_gate, spatial_gate, dmean, weight, dz, signs, dx, C, HW, S,
        **product(x, p1), BLOCK_S=block_s, **t._asdict(), num_stages=1 if block_s >= S else 2,
    )  # fmt: skip
    return dx


def local_attention_fwd(
    x: torch.Tensor, w1: torch.Tensor, b1: torch.Tensor | None, w2: torch.Tensor, b2: torch.Tensor | None,
    p1: torch.Tensor, q1: torch.Tensor | None, p2: torch.Tensor, q2: torch.Tensor | None,
    residual: torch.Tensor | None, activation: int,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """y = act(x * channel_gate * spatial_gate + residual), the gates sigmoid(w2 relu(w1 mean + b1) + b2), mean over

    H and W, and sigmoid(p2 relu(p1 x + q1) + q2). x, residual [N, C, H, W]; w1 [R, C], w2 [C, R], p1 [S, C], p2 [1, S]
    (or 1x1 filters), any dtype. Returns y, mean [N, C], hidden [N, R], channel_gate [N, C], spatial_gate [N, H, W],
    signs [N, words, H, W]. Moves 3 times the bytes of x: read for the means and the spatial gate, read to scale, write
    y; one more for a residual.
    """
    with device_guard(x):
        x, layout = canonical(x)
        like = x.new_empty(0, dtype=accumulation_dtype(x))
        mean, spatial_gate, signs = _hidden_gate(x, layout, p1, q1, p2, q2, like)
        channel_gate = torch.empty_like(mean)
        hidden = mlp_gate(mean, w1, b1, w2, b2, channel_gate)
        y = scale(x, layout, channel_gate, spatial_gate, residual, activation)
        return y, mean, hidden, channel_gate, spatial_gate, signs


def local_attention_bwd(
    grad: torch.Tensor, x: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor, p1: torch.Tensor,
    q1: torch.Tensor | None, p2: torch.Tensor, residual: torch.Tensor | None, mean: torch.Tensor, hidden: torch.Tensor,
    channel_gate: torch.Tensor, spatial_gate: torch.Tensor, signs: torch.Tensor, activation: int,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """(dx, dresidual, dw1, db1, dw2, db2, dp1, dq1, dp2, dq2), g' = grad * act'(x * gates + residual),

    dx = g' * channel_gate * spatial_gate + (p2 p1)^T (mask dz) + dmean / HW. Moves 4 times the bytes of x: read grad
    and x, read grad, write dx; where a program cannot hold all channels, 5: p1's gradient wants dz, a sum over them,
    before it reads x. With an activation, g' is written once more and returned as dresidual (else empty: it is grad),
    and a residual is read once.
    """
    with device_guard(x):
        x, layout = canonical(x)
        d = _hidden_grads(grad, x, layout, p1, channel_gate, spatial_gate, signs, residual, activation)
        dmean, *dweights = mlp_gate_bwd(d.dz_c, w1, w2, mean, hidden)
        first, second = p1.flatten(1).to(d.sums.dtype), p2.flatten().to(d.sums.dtype)
        weight = second[:, None] * first
        dx = _hidden_dx(d.g, x, layout, channel_gate, spatial_gate, dmean, p1, weight, d.dz_s, signs)
        dp2 = (first * d.sums).sum(1) + (0 if q1 is None else q1.to(d.sums.dtype) * d.counts)
        dp1 = (second[:, None] * d.sums).view(p1.shape)
        dq2 = sum_images(d.dz_s.view(layout.N, layout.HW, 1))
        return dx, d.dresidual, *dweights, dp1, second * d.counts, dp2.view(p2.shape), dq2
