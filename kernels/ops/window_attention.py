"""Attention inside (shifted) windows: a program takes one head of several windows, and all queries of one at a time.

Of windows of up to 64 tokens the rows of weights fit on the chip: there is no running maximum. Larger ones meet their
keys block by block, as FlashAttention-2 has it (Dao, 2023). Nothing is kept for the backward pass.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..attention.tiles import add_product, pairs, store_rows, zero_rows
from ..attention.window_tiles import (
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
from ..attention.windows import LARGEST, WHOLE, Windows, prepare
from ..core.launch import device_guard, launch


@triton.jit
def _forward_kernel(
    qkv_ptr, bias_ptr, table_ptr, out_ptr, grid, HEAD: tl.constexpr, WINDOW: tl.constexpr, BLOCK: tl.constexpr,
    STEP: tl.constexpr,
):  # fmt: skip
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
        token, there = places(i, at, WINDOW)
        q_rows, q = load_part(qkv_ptr, token, there, at, HEAD, 0, 3)
        if STEP >= TOKENS:
            token_k, there_k = places(j, at, WINDOW)
            k_rows, k = load_part(qkv_ptr, token_k, there_k, at, HEAD, 1, 3)
            _, v = load_part(qkv_ptr, token_k, there_k, at, HEAD, 2, 3)
            s = logits(pairs(q_rows, q, k_rows, k, HEAD), bias_logits(k, bias_q, HEAD), bias, HEAD)
            p = weights(s)
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
        store_rows(part_rows(out_ptr, token, there, at, HEAD), out, HEAD)


@triton.jit
def weights(s):
    """The softmax of each query's logits."""
    p = tl.exp2(s - tl.max(s, 1)[:, None])
    return p * (1 / tl.sum(p, 1))[:, None]


def window_attention_fwd(
    qkv: torch.Tensor, bias: torch.Tensor | None, table: torch.Tensor, heads: int, window_h: int, window_w: int,
    shift_h: int, shift_w: int, scale: float, pad_first: int,
) -> torch.Tensor:  # fmt: skip
    """See `visattn_fast.ops.window_attention`. Writes out once; reads qkv once where one tile has a window's queries.

    Raises:
        ValueError: windows of more than 256 tokens.
    """
    with device_guard(qkv):
        x = prepare(qkv, bias, table, heads, window_h, window_w, shift_h, shift_w, scale, pad_first)
        out = torch.empty((*qkv.shape[:3], qkv.shape[3] // 3), dtype=qkv.dtype, device=qkv.device)
        groups, grid = x.shared()
        meta, parts = x.tiles(*_tiles(x))
        launch(_forward_kernel, groups * heads, *x.tensors, out, grid, **meta, parts=parts)
        return out


def _tiles(x: Windows) -> tuple[int, int, int]:
    """BLOCK, STEP and warps: all queries of a window, where registers hold them."""
    D = x.head.D
    if x.wide and (D > 32 or x.tokens > WHOLE):
        return 64, 32, 8
    if x.tokens <= WHOLE:
        return WHOLE, WHOLE, 8 if x.wide else 4
    # Wide heads take registers, and so does what is masked.
    return 128 if D > 32 or x.tokens % 16 else LARGEST, 16, 8
