"""Attention over the positions of a map without its map of weights: forward, and the mean weight of every position.

As FlashAttention-2 has it (Dao, 2023): a program holds queries and meets all keys, with a running maximum. The bias is
read from its table of offsets. A NaN that a maximum loses is in the exponentials, whose sum keeps it.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ..attention.flash import Maps, keys_seen, mask_bytes, pair_bias, prepare, program_head, scores
from ..attention.tiles import LN2, LOG2E, Rows, add_product, finite_or_zero, load_rows, pairs, store_rows, zero_rows
from ..core.launch import device_guard, launch
from ..core.layout import accumulation_dtype


@triton.jit
def _attention_kernel(
    qkv_ptr, table_ptr, mask_ptr, out_ptr, lse_ptr, size, HEAD: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr
):  # fmt: skip
    """out [N, L, heads, d] and lse [N, heads, L] of BLOCK queries; -inf of an image that has no keys."""
    n, h, i = program_head(size, BLOCK)
    there = i < size.L
    qkv_ptr += tl.multiple_of(n * size.stride_n + h * size.stride_h, tl.constexpr(HEAD.ALIGN))
    q_rows = Rows(qkv_ptr, i, there, size.stride_l)
    q = load_rows(q_rows, HEAD)
    top = tl.full([BLOCK], -float("inf"), HEAD.ACC)
    count = tl.zeros([BLOCK], HEAD.ACC)
    out = zero_rows(BLOCK, HEAD)
    found = 0
    for start in range(0, size.L, STEP):
        j = start + tl.arange(0, STEP)
        seen = keys_seen(mask_ptr, j, n, size)
        k_rows = Rows(qkv_ptr + size.stride_t, j, seen, size.stride_l)
        bias = pair_bias(table_ptr, h, i, j, there, seen, size)
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
    count = tl.where(found > 0, count, 1.0)  # without any key all is zero
    out_ptr += (n * size.L * size.heads + h) * HEAD.D
    store_rows(Rows(out_ptr, i, there, size.heads * HEAD.D), out / count[:, None], HEAD)
    tl.store(lse_ptr + (n * size.heads + h) * size.L + i, (top + tl.log2(count)) * LN2, mask=there)


@triton.jit
def _mean_weights_kernel(
    qkv_ptr, table_ptr, mask_ptr, lse_ptr, mean_ptr, size, HEAD: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr
):  # fmt: skip
    """mean [N, heads, L]: the mean over all queries of the weights of BLOCK keys. lse is in powers of two."""
    n, h, j = program_head(size, BLOCK)
    qkv_ptr += tl.multiple_of(n * size.stride_n + h * size.stride_h, tl.constexpr(HEAD.ALIGN))
    rows = (n * size.heads + h) * size.L
    seen = keys_seen(mask_ptr, j, n, size)
    k_rows = Rows(qkv_ptr + size.stride_t, j, seen, size.stride_l)
    k = load_rows(k_rows, HEAD)
    total = tl.zeros([BLOCK], HEAD.ACC)
    for start in range(0, size.L, STEP):
        i = start + tl.arange(0, STEP)
        there = i < size.L
        q_rows = Rows(qkv_ptr, i, there, size.stride_l)
        lse = tl.load(lse_ptr + rows + i, mask=there, other=0.0)
        bias = pair_bias(table_ptr, h, i, j, there, seen, size, KEYS_FIRST=True)
        s = scores(pairs(k_rows, k, q_rows, load_rows(q_rows, HEAD), HEAD), bias, seen[:, None], HEAD)  # [BLOCK, STEP]
        p = tl.exp2(s - finite_or_zero(lse)[None, :])
        total += tl.sum(tl.where(there[None, :], p, 0.0), 1)
    tl.store(mean_ptr + rows + j, total / size.L, mask=j < size.L)


def attention_fwd(
    qkv: torch.Tensor, table: torch.Tensor | None, key_mask: torch.Tensor | None, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `visattn_fast.ops.attention2d`."""
    N, H, W, _, heads, D = qkv.shape
    with device_guard(qkv):
        x = prepare(qkv, table, scale)
        out = torch.empty((N, H, W, heads, D), dtype=qkv.dtype, device=qkv.device)
        lse = qkv.new_empty((N, heads, H * W), dtype=accumulation_dtype(qkv))
        blocks, tensors = _blocks(x), (*x.tensors, mask_bytes(key_mask), out, lse)
        launch(_attention_kernel, x.programs(blocks["BLOCK"]), *tensors, x.size, HEAD=x.head, **blocks)
        return out, lse


def _blocks(x: Maps) -> dict[str, Any]:
    """As many rows as registers hold on every target."""
    D = x.head.D
    if x.wide:
        return x.blocks(64, 32, 8, 2) if D <= 32 else x.blocks(32, 32, 4, 2) if D <= 64 else x.blocks(32, 16, 4, 1)
    return x.blocks(128, 32 if x.biased else 64, 8 if x.biased or D > 32 else 4, 2)


def attention_mean(
    qkv: torch.Tensor, table: torch.Tensor | None, key_mask: torch.Tensor | None, lse: torch.Tensor, scale: float
) -> torch.Tensor:
    """See `visattn_fast.ops.attention2d`."""
    N, H, W, _, heads, _ = qkv.shape
    with device_guard(qkv):
        x = prepare(qkv, table, scale)
        mean = torch.empty((N, heads, H, W), dtype=lse.dtype, device=qkv.device)
        blocks = x.blocks(64, 32 if x.wide else 64, 8 if x.wide else 4, 2)
        tensors = (*x.tensors, mask_bytes(key_mask), lse * LOG2E.value, mean)
        launch(_mean_weights_kernel, x.programs(blocks["BLOCK"]), *tensors, x.size, HEAD=x.head, **blocks)
        return mean
