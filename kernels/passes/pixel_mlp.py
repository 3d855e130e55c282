"""LocalAttention's spatial gate: a perceptron of each pixel's channels, whose hidden values stay in registers.

Forward saves the signs of the hidden values, 32 in an integer. With S = sum mask dlogits x and t = sum mask dlogits,
where dlogits is the gradient before the sigmoid, every gradient of the perceptron follows without the hidden values.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..core.activations import sigmoid
from ..core.heuristics import Tile, cdiv, next_power_of_2
from ..core.launch import launch
from ..core.layout import Layout, contiguous
from ..core.product import add_product, product
from ..core.tiles import tile_mask, x_offsets
from .partials import Partials

WORD = tl.constexpr(32)  # hidden units whose signs share an integer


class PixelMLPWeights(NamedTuple):
    """Weights p1 [S, C] and p2 [S] of the perceptron and its biases q1 [S] and q2 [1] or None, as kernels take them."""

    p1: Any
    q1: Any
    p2: Any
    q2: Any


@triton.jit
def _add_hidden_units(
    logits,
    x_ptr,
    weights,
    sums_ptr,
    signs_ptr,
    n,
    first,
    p,
    size,
    S,
    PRODUCT: tl.constexpr,
    BLOCK_S: tl.constexpr,
    TILE: tl.constexpr,
):
    """Returns logits [BLOCK_P] with the share of BLOCK_S hidden units from ``first`` on; stores signs and sums of x."""
    PER_WORD: tl.constexpr = min(BLOCK_S, WORD)
    WORDS: tl.constexpr = BLOCK_S // PER_WORD
    BLOCK_P: tl.constexpr = TILE.BLOCK_P
    C = size.C
    s = first + tl.arange(0, BLOCK_S)
    hidden = tl.zeros([BLOCK_S, BLOCK_P], logits.dtype)
    for start in range(0, C, TILE.BLOCK_C):
        c = start + tl.arange(0, TILE.BLOCK_C)
        mask = tile_mask(c, p, size, TILE)
        x = tl.load(x_ptr + x_offsets(n, c, p, size, TILE), mask=mask, other=0.0)
        w = tl.load(weights.p1 + s[:, None] * C + c[None, :], mask=(s < S)[:, None] & (c < C)[None, :], other=0.0)
        hidden = add_product(w, x, hidden, PRODUCT)
        if sums_ptr is not None:
            tl.store(sums_ptr + c, tl.sum(x.to(logits.dtype), 1), mask=c < C)
    if weights.q1 is not None:
        hidden += tl.load(weights.q1 + s, mask=s < S, other=0.0).to(logits.dtype)[:, None]
    dead = (hidden <= 0) | (s >= S)[:, None]  # past the last one there may be 0 times infinity
    p2 = tl.load(weights.p2 + s, mask=s < S, other=0.0).to(logits.dtype)
    word = tl.sum(tl.reshape(tl.where(dead, 0, 1) << (s % WORD)[:, None], [WORDS, PER_WORD, BLOCK_P]), 1)
    k = first // WORD + tl.arange(0, WORDS)
    words = tl.cdiv(S, WORD)
    out = signs_ptr + (n * words + k[:, None]) * size.HW + p[None, :]
    tl.store(out, word, mask=(k < words)[:, None] & (p < size.HW)[None, :])
    return logits + tl.sum(tl.where(dead, 0.0, hidden) * p2[:, None], 0)


@triton.jit
def _pixel_mlp_gate_kernel(
    x_ptr,
    weights,
    sums_ptr,
    gate_ptr,
    signs_ptr,
    size,
    S,
    PRODUCT: tl.constexpr,
    MORE: tl.constexpr,
    BLOCK_S: tl.constexpr,
    TILE: tl.constexpr,
):
    """gate [N, HW] = sigmoid(p2 relu(p1 x + q1) + q2), signs [N, words, HW], and sums [N, blocks, C] of x.

    Each block of hidden units reads x; with MORE there are several blocks.
    """
    blocks = tl.cdiv(size.HW, TILE.BLOCK_P)
    block = tl.program_id(0) % blocks
    n = (tl.program_id(0) // blocks).to(tl.int64)
    p = block * TILE.BLOCK_P + tl.arange(0, TILE.BLOCK_P)
    logits = tl.zeros(p.shape, gate_ptr.dtype.element_ty)
    sums_ptr += (n * blocks + block) * size.C
    logits = _add_hidden_units(logits, x_ptr, weights, sums_ptr, signs_ptr, n, 0, p, size, S, PRODUCT, BLOCK_S, TILE)
    if MORE:
        for first in range(BLOCK_S, S, BLOCK_S):
            logits = _add_hidden_units(
                logits, x_ptr, weights, None, signs_ptr, n, first, p, size, S, PRODUCT, BLOCK_S, TILE
            )
    if weights.q2 is not None:
        logits += tl.load(weights.q2).to(logits.dtype)
    tl.store(gate_ptr + n * size.HW + p, sigmoid(logits), mask=p < size.HW)


@triton.jit
def masked_by_signs(dlogits, signs_ptr, n, s, p, S, HW):
    """Returns dlogits [BLOCK_P] where hidden value s of the pixel is positive, else 0, [BLOCK_P, BLOCK_S]."""
    words = signs_ptr + (n * tl.cdiv(S, WORD) + s[None, :] // WORD) * HW + p[:, None]
    word = tl.load(words, mask=(p < HW)[:, None] & (s < S)[None, :], other=0)
    return tl.where((word >> (s % WORD)[None, :]) & 1 != 0, dlogits[:, None], 0.0)


def unit_block(S: int, limit: int) -> int:
    """Returns a block of hidden units, channels or pixels; a product takes no fewer than 16 of anything."""
    return min(max(next_power_of_2(S), 16), limit)


def product_tile(layout: Layout, itemsize: int, channels: int, pixels: int, per_warp: int = 1024) -> Tile:
    """Returns a tile of at most so many channels and pixels; a thread of a warp of 64 has 16 bytes or more."""
    block_c, block_p = unit_block(layout.C, channels), unit_block(layout.HW, pixels)
    num_warps = min(max(block_c * block_p * itemsize // per_warp, 1), 8)
    return Tile(layout.channels_last, layout.align, block_c, block_p, num_warps)


def pixel_mlp_gate(
    x: torch.Tensor,
    layout: Layout,
    p1: torch.Tensor,
    q1: torch.Tensor | None,
    p2: torch.Tensor,
    q2: torch.Tensor | None,
    dtype: torch.dtype,
) -> tuple[Partials, torch.Tensor, torch.Tensor]:
    """Returns partials of the channel means, gate [N, H, W], both in dtype, and signs [N, words, H, W].

    Reads x once.
    """
    N, C, HW, S = layout.N, layout.C, layout.HW, p1.shape[0]
    block_s = unit_block(S, 256)
    # Whole cache lines of channels, too, and few steps along them: each sums them up, and stores the sums.
    limits = (128 // x.element_size(), 64, 2048) if block_s <= 64 else (64, 32)
    t = product_tile(layout, x.element_size(), *limits)
    blocks = cdiv(HW, t.BLOCK_P)
    sums = x.new_empty((N, blocks, C), dtype=dtype)
    gate = x.new_empty((N, layout.H, layout.W), dtype=dtype)
    signs = x.new_empty((N, cdiv(S, WORD.value), layout.H, layout.W), dtype=torch.int32)
    launch(
        _pixel_mlp_gate_kernel,
        N * blocks,
        x,
        PixelMLPWeights(p1.reshape(S, C).contiguous(), contiguous(q1), p2.reshape(-1).contiguous(), q2),
        sums,
        gate,
        signs,
        layout.sizes,
        S,
        PRODUCT=product(x, p1),
        MORE=block_s < S,
        BLOCK_S=block_s,
        TILE=t,
        num_warps=t.num_warps,
    )
    return Partials(sums.view(-1, C), None, blocks, HW), gate, signs
