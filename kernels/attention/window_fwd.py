"""Attention inside (shifted) windows, forward: a program takes one head of several windows, and all queries of one.

For windows of up to 64 tokens the rows of weights fit on the chip, so there is no running maximum. Larger windows meet
their keys block by block, as in FlashAttention-2 (Dao, 2023). Nothing is saved for the backward pass.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..core.launch import launch
from ..core.product import add_product
from .tiles import pairs, store_rows, zero_rows
from .window_tiles import (
    bias_logits,
    corner,
    load_bias,
    load_part,
    logits,
    meet_keys,
    more_keys,
    part_rows,
    places,
    positions,
    this_run,
)
from .windows import LARGEST, WHOLE, Windows


@triton.jit
def _window_forward_kernel(
    qkv_ptr,
    bias_ptr,
    table_ptr,
    out_ptr,
    grid,
    HEAD: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
):
    """out [N, H, W, heads, d] of BLOCK queries, which meet all keys at once, or STEP at a time."""
    TOKENS: tl.constexpr = WINDOW.H * WINDOW.W
    run = this_run(grid, WINDOW)
    bias_q = load_bias(bias_ptr, run, HEAD)
    i = tl.arange(0, BLOCK)
    if BLOCK < TOKENS:
        i += tl.program_id(1) * BLOCK
    j = tl.arange(0, STEP)
    if STEP >= TOKENS:
        bias = positions(table_ptr, i[:, None], j[None, :], run, WINDOW)
    for window in range(run.first, run.last):
        at = corner(window, run, WINDOW)
        token, exists = places(i, at, WINDOW)
        q_rows, q = load_part(qkv_ptr, token, exists, at, HEAD, 0, 3)
        if STEP >= TOKENS:
            token_k, exists_k = places(j, at, WINDOW)
            k_rows, k = load_part(qkv_ptr, token_k, exists_k, at, HEAD, 1, 3)
            _, v = load_part(qkv_ptr, token_k, exists_k, at, HEAD, 2, 3)
            s = logits(pairs(q_rows, q, k_rows, k, HEAD), bias_logits(k, bias_q, HEAD), bias, HEAD)
            p = _softmax(s)
            out = add_product(p, v, zero_rows(BLOCK, HEAD), HEAD)
        else:
            top = tl.full([BLOCK], -float("inf"), HEAD.ACC)
            count = tl.zeros([BLOCK], HEAD.ACC)
            out = zero_rows(BLOCK, HEAD)
            for start in tl.range(0, TOKENS, STEP, disable_licm=True):
                _, _, v, s = meet_keys(start, q_rows, q, i, bias_q, qkv_ptr, table_ptr, at, HEAD, WINDOW, STEP)
                p, top, shrunk = more_keys(s, top)
                count = count * shrunk + tl.sum(p, 1)
                out = add_product(p, v, out * shrunk[:, None], HEAD)
            out /= count[:, None]
        if bias_ptr is not None:
            out += load_bias(bias_ptr, run, HEAD, 2)[None, :]
        store_rows(part_rows(out_ptr, token, exists, at, HEAD), out, HEAD)


@triton.jit
def _softmax(s):
    """Returns each query's weights, the softmax of its logits."""
    p = tl.exp2(s - tl.max(s, 1)[:, None])
    return p * (1 / tl.sum(p, 1))[:, None]


def _forward_tiles(x: Windows) -> tuple[int, int, int]:
    """Returns BLOCK, STEP and warps: all queries of a window, if registers hold them."""
    D = x.head.D
    if x.wide and (D > 32 or x.tokens > WHOLE):
        return 64, 32, 8
    if x.tokens <= WHOLE:
        return WHOLE, WHOLE, 8 if x.wide else 4
    # Wide heads take registers, and so do masks.
    return 128 if D > 32 or x.tokens % 16 else LARGEST, 16, 8


def attend_windows(x: Windows) -> torch.Tensor:
    """Returns out [N, H, W, C]. Writes out once; reads qkv once if one tile has all queries of a window."""
    out = x.qkv.new_empty((*x.qkv.shape[:3], x.heads * x.head.D))
    groups, grid = x.shared()
    meta, tiles = x.tiles(*_forward_tiles(x))
    launch(_window_forward_kernel, groups * x.heads, x.qkv, x.bias, x.table, out, grid, **meta, splits=tiles)
    return out
