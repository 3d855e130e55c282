"""Attention over the positions of a map without its map of weights: forward, and the mean weight of every position.

As in FlashAttention-2 (Dao, 2023), a program holds queries and meets all keys, with a running maximum. The bias is
read from its table of offsets. A NaN that the maximum loses is in the exponentials, whose sum keeps it.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ..core.launch import launch
from ..core.layout import accumulation_dtype
from ..core.product import add_product
from .flash import FlashMaps, keys_seen, mask_bytes, pair_bias, program_head, scores
from .tiles import LN2, LOG2E, Rows, finite_or_zero, load_rows, pairs, store_rows, zero_rows


@triton.jit
def _attention_kernel(
    qkv_ptr,
    table_ptr,
    mask_ptr,
    out_ptr,
    lse_ptr,
    size,
    HEAD: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
):
    """out [N, L, heads, d] and lse [N, heads, L] of BLOCK queries; lse is -inf for an image without keys."""
    n, h, i = program_head(size, BLOCK)
    exists = i < size.L
    qkv_ptr += tl.multiple_of(n * size.stride_n + h * size.stride_h, tl.constexpr(HEAD.ALIGN))
    q_rows = Rows(qkv_ptr, i, exists, size.stride_l)
    q = load_rows(q_rows, HEAD)
    top = tl.full([BLOCK], -float("inf"), HEAD.ACC)
    count = tl.zeros([BLOCK], HEAD.ACC)
    out = zero_rows(BLOCK, HEAD)
    found = 0
    for start in range(0, size.L, STEP):
        j = start + tl.arange(0, STEP)
        seen = keys_seen(mask_ptr, j, n, size)
        k_rows = Rows(qkv_ptr + size.stride_t, j, seen, size.stride_l)
        bias = pair_bias(table_ptr, h, i, j, exists, seen, size)
        s = scores(pairs(q_rows, q, k_rows, load_rows(k_rows, HEAD), HEAD), bias, seen[None, :], HEAD)  # [BLOCK, STEP]
        new_top = tl.maximum(top, tl.max(s, 1), propagate_nan=tl.PropagateNan.ALL)
        shift = finite_or_zero(new_top)
        p = tl.exp2(s - shift[:, None])
        shrunk = tl.exp2(top - shift)
        count = count * shrunk + tl.sum(p, 1)
        v = load_rows(Rows(qkv_ptr + 2 * size.stride_t, j, seen, size.stride_l), HEAD)
        out = add_product(p, v, out * shrunk[:, None], HEAD)
        top = new_top
        found = tl.maximum(found, tl.max(seen.to(tl.int32), 0))
    count = tl.where(found > 0, count, 1.0)  # without any key the result is zero
    out_ptr += (n * size.L * size.heads + h) * HEAD.D
    store_rows(Rows(out_ptr, i, exists, size.heads * HEAD.D), out / count[:, None], HEAD)
    tl.store(lse_ptr + (n * size.heads + h) * size.L + i, (top + tl.log2(count)) * LN2, mask=exists)


@triton.jit
def _mean_weights_kernel(
    qkv_ptr,
    table_ptr,
    mask_ptr,
    lse_ptr,
    mean_ptr,
    size,
    HEAD: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
):
    """mean [N, heads, L]: the mean over all queries of the weights of BLOCK keys. lse is an exponent of two."""
    n, h, j = program_head(size, BLOCK)
    qkv_ptr += tl.multiple_of(n * size.stride_n + h * size.stride_h, tl.constexpr(HEAD.ALIGN))
    rows = (n * size.heads + h) * size.L
    seen = keys_seen(mask_ptr, j, n, size)
    k_rows = Rows(qkv_ptr + size.stride_t, j, seen, size.stride_l)
    k = load_rows(k_rows, HEAD)
    total = tl.zeros([BLOCK], HEAD.ACC)
    for start in range(0, size.L, STEP):
        i = start + tl.arange(0, STEP)
        exists = i < size.L
        q_rows = Rows(qkv_ptr, i, exists, size.stride_l)
        lse = tl.load(lse_ptr + rows + i, mask=exists, other=0.0)
        bias = pair_bias(table_ptr, h, i, j, exists, seen, size, KEYS_FIRST=True)
        s = scores(pairs(k_rows, k, q_rows, load_rows(q_rows, HEAD), HEAD), bias, seen[:, None], HEAD)  # [BLOCK, STEP]
        p = tl.exp2(s - finite_or_zero(lse)[None, :])
        total += tl.sum(tl.where(exists[None, :], p, 0.0), 1)
    tl.store(mean_ptr + rows + j, total / size.L, mask=j < size.L)


def _forward_blocks(x: FlashMaps) -> dict[str, Any]:
    """Returns as many rows as registers hold on every target."""
    D = x.head.D
    if x.wide:
        return x.blocks(64, 32, 8, 2) if D <= 32 else x.blocks(32, 32, 4, 2) if D <= 64 else x.blocks(32, 16, 4, 1)
    return x.blocks(128, 32 if x.biased else 64, 8 if x.biased or D > 32 else 4, 2)


def flash_attention(x: FlashMaps, key_mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns out [N, L, heads, d] and lse [N, heads, L]."""
    N, L, heads, D = x.N, x.size.L, x.size.heads, x.head.D
    out = x.qkv.new_empty((N, L, heads, D))
    lse = x.qkv.new_empty((N, heads, L), dtype=accumulation_dtype(x.qkv))
    blocks = _forward_blocks(x)
    launch(
        _attention_kernel,
        x.programs(blocks["BLOCK"]),
        x.qkv,
        x.table,
        mask_bytes(key_mask),
        out,
        lse,
        x.size,
        HEAD=x.head,
        **blocks,
    )
    return out, lse


def mean_weights(x: FlashMaps, key_mask: torch.Tensor | None, lse: torch.Tensor) -> torch.Tensor:
    """Returns the mean weight of every position over all queries, [N, heads, L]."""
    mean = lse.new_empty((x.N, x.size.heads, x.size.L))
    blocks = x.blocks(64, 32 if x.wide else 64, 8 if x.wide else 4, 2)
    launch(
        _mean_weights_kernel,
        x.programs(blocks["BLOCK"]),
        x.qkv,
        x.table,
        mask_bytes(key_mask),
        lse * LOG2E.value,
        mean,
        x.size,
        HEAD=x.head,
        **blocks,
    )
    return mean
