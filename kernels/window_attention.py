"""Attention inside (shifted) windows: a program takes one head of several windows, and all queries of one at a time.

Of windows of up to 64 tokens the rows of weights fit on the chip: there is no running maximum. Larger ones meet their
keys block by block, as FlashAttention-2 has it (Dao, 2023). Nothing is kept for the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from . import _heuristics
from ._attention import load_rows, pairs, row_tile
from ._heuristics import next_power_of_2
from ._launch import device_guard, launch
from ._product import dot
from ._windows import WHOLE, Windows, corner, load_bias, logits, more_keys, places, positions, prepare, run, weights


@triton.jit
def _forward_kernel(
    qkv_ptr, bias_ptr, table_ptr, out_ptr, steps, heads, N, down, across,
    inner_h, inner_w, start_1, start_2, start_3, shift_h, shift_w, H, W, cycle_h, cycle_w, roll_h, roll_w,
    SCALE: tl.constexpr,
    WH: tl.constexpr, WW: tl.constexpr, PAD_FIRST: tl.constexpr, SEAM: tl.constexpr, D: tl.constexpr,
    ALIGN: tl.constexpr, BLOCK_D: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, KEYS: tl.constexpr,
    QUERIES: tl.constexpr,
):  # fmt: skip
    """out [N, H, W, heads, d]."""
    L: tl.constexpr = WH * WW
    acc_ty: tl.constexpr = table_ptr.dtype.element_ty
    head, first, last, rows, columns, row, column, seam_h, seam_w = run(
        steps, heads, N, down, across, inner_h, inner_w, start_1, start_2, start_3, shift_h, shift_w, WH, WW
    )
    C = heads * D
    table_ptr += head * (2 * WH - 1) * (2 * WW - 1)
    qkv_ptr += head * D
    out_ptr += head * D
    bias_q = load_bias(bias_ptr, head * D, acc_ty, D, BLOCK_D)
    i = tl.arange(0, QUERIES)
    if KEYS == QUERIES:
        bias = positions(table_ptr, i[:, None], i[None, :], seam_h, seam_w, WH, WW, SEAM)
    for window in range(first, last):
        n, h, w = corner(window, rows, columns, row, column, H, W, WH, WW)
        token, there = places(i, h, w, H, W, cycle_h, cycle_w, roll_h, roll_w, WH, WW, PAD_FIRST)
        from_ptr = qkv_ptr + n * 3 * C
        q = load_rows(from_ptr, token, there, 3 * C, D, ALIGN, BLOCK_D)
        if KEYS == QUERIES:
            k = load_rows(from_ptr + C, token, there, 3 * C, D, ALIGN, BLOCK_D)
            v = load_rows(from_ptr + 2 * C, token, there, 3 * C, D, ALIGN, BLOCK_D)
            p = weights(logits(pairs(q, k, acc_ty, DOT, PRECISION), k, bias_q, bias, SCALE))
            out = dot(p, v, tl.zeros([QUERIES, BLOCK_D], acc_ty), DOT, PRECISION)
        else:
            top = tl.full([QUERIES], -float("inf"), acc_ty)
            count = tl.zeros([QUERIES], acc_ty)
            out = tl.zeros([QUERIES, BLOCK_D], acc_ty)
            for start in tl.range(0, L, KEYS, disable_licm=True):
                j = start + tl.arange(0, KEYS)
                token_k, there_k = places(j, h, w, H, W, cycle_h, cycle_w, roll_h, roll_w, WH, WW, PAD_FIRST)
                k = load_rows(from_ptr + C, token_k, there_k, 3 * C, D, ALIGN, BLOCK_D)
                v = load_rows(from_ptr + 2 * C, token_k, there_k, 3 * C, D, ALIGN, BLOCK_D)
                bias = positions(table_ptr, i[:, None], j[None, :], seam_h, seam_w, WH, WW, SEAM)
                p, top, shrunk = more_keys(logits(pairs(q, k, acc_ty, DOT, PRECISION), k, bias_q, bias, SCALE), top)
                count = count * shrunk + tl.sum(p, 1)
                out = dot(p, v, out * shrunk[:, None], DOT, PRECISION)
            out /= count[:, None]
        if bias_ptr is not None:
            out += load_bias(bias_ptr, 2 * C + head * D, acc_ty, D, BLOCK_D)[None, :]
        offsets, mask = row_tile(token, there, C, D, ALIGN, BLOCK_D)
        tl.store(out_ptr + n * C + offsets, out, mask=mask)


def window_attention_fwd(
    qkv: torch.Tensor, bias: torch.Tensor | None, table: torch.Tensor, heads: int, window_h: int, window_w: int,
    shift_h: int, shift_w: int, scale: float, pad_first: int,
) -> torch.Tensor:  # fmt: skip
    """See `visattn_fast.ops.window_attention`. Reads qkv once and writes out once.

    Raises:
        ValueError: windows of more than 256 tokens.
    """
    with device_guard(qkv):
        x = prepare(qkv, bias, table, heads, window_h, window_w, shift_h, shift_w, scale, pad_first)
        out = torch.empty((*qkv.shape[:3], qkv.shape[3] // 3), dtype=qkv.dtype, device=qkv.device)
        groups, scalars = x.shared()
        launch(_forward_kernel, groups * heads, x.qkv, x.bias, x.table, out, *scalars, **x.meta, **_blocks(x))
        return out


def _blocks(x: Windows) -> dict[str, Any]:
    queries = max(next_power_of_2(x.tokens), 16)
    if x.tokens <= WHOLE:
        return {"KEYS": queries, "QUERIES": queries, "num_warps": 8 if x.wide else 4, "num_stages": 1}
    warps = 16 if queries > 128 and x.meta["D"] > 32 and not _heuristics.amd() else 8
    return {"KEYS": 16, "QUERIES": queries, "num_warps": warps, "num_stages": 1}
