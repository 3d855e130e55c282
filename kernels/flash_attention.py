"""Attention over the positions of a map without its map of weights: forward, and the mean weight of every position.

As FlashAttention-2 has it (Dao, 2023): a program holds queries and meets all keys, with a running maximum. The bias is
read from its table of offsets. A NaN that a maximum loses is in the exponentials, whose sum keeps it.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ._attention import (
    LN2,
    LOG2E,
    Heads,
    bias,
    finite_or_zero,
    keys_seen,
    load_rows,
    offset_bias,
    pairs,
    place,
    program_head,
    row_tile,
    scores,
    split,
)
from ._heuristics import cdiv
from ._launch import device_guard, launch
from ._layout import accumulation_dtype
from ._product import dot, product


@triton.jit
def _attention_kernel(
    qkv_ptr, table_ptr, mask_ptr, out_ptr, lse_ptr, L, W, heads, stride_n, stride_l, stride_t, stride_h,
    CENTRE, COLUMNS, OFFSETS, SCALE: tl.constexpr, D: tl.constexpr, ALIGN: tl.constexpr, BLOCK_D: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """out [N, L, heads, d] and lse [N, heads, L] of BLOCK queries; -inf of an image that has no keys."""
    acc_ty: tl.constexpr = lse_ptr.dtype.element_ty
    n, h, i = program_head(heads, L, BLOCK)
    qkv_ptr += n * stride_n + h * stride_h
    if table_ptr is not None:
        table_ptr += h * OFFSETS + CENTRE
    q = load_rows(qkv_ptr, i, i < L, stride_l, D, ALIGN, BLOCK_D)
    top = tl.full([BLOCK], -float("inf"), acc_ty)
    count = tl.zeros([BLOCK], acc_ty)
    out = tl.zeros([BLOCK, BLOCK_D], acc_ty)
    found = 0
    for start in range(0, L, STEP):
        j = start + tl.arange(0, STEP)
        seen = keys_seen(mask_ptr, j, n, L)
        k = load_rows(qkv_ptr + stride_t, j, seen, stride_l, D, ALIGN, BLOCK_D)
        offsets = place(i, W, COLUMNS)[:, None] - place(j, W, COLUMNS)[None, :]
        added = offset_bias(table_ptr, offsets, (i < L)[:, None] & seen[None, :])
        s = scores(pairs(q, k, acc_ty, DOT, PRECISION), added, seen[None, :], SCALE)  # [BLOCK, STEP]
        new_top = tl.maximum(top, tl.max(s, 1), propagate_nan=tl.PropagateNan.ALL)
        shift = finite_or_zero(new_top)
        p = tl.exp2(s - shift[:, None])
        shrunk = tl.exp2(top - shift)
        count = count * shrunk + tl.sum(p, 1)
        v = load_rows(qkv_ptr + 2 * stride_t, j, seen, stride_l, D, ALIGN, BLOCK_D)
        out = dot(p, v, out * shrunk[:, None], DOT, PRECISION)
        top = new_top
        found = tl.maximum(found, tl.max(seen.to(tl.int32), 0))
    count = tl.where(found > 0, count, 1.0)  # without any key all is zero
    offsets, mask = row_tile(i, i < L, heads * D, D, ALIGN, BLOCK_D)
    tl.store(out_ptr + (n * L * heads + h) * D + offsets, out / count[:, None], mask=mask)
    tl.store(lse_ptr + (n * heads + h) * L + i, (top + tl.log2(count)) * LN2, mask=i < L)


@triton.jit
def _mean_weights_kernel(
    qkv_ptr, table_ptr, mask_ptr, lse_ptr, mean_ptr, L, W, heads, stride_n, stride_l, stride_t, stride_h,
    CENTRE, COLUMNS, OFFSETS, SCALE: tl.constexpr, D: tl.constexpr, ALIGN: tl.constexpr, BLOCK_D: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """mean [N, heads, L]: the mean over all queries of the weights of BLOCK keys. lse is in powers of two."""
    acc_ty: tl.constexpr = lse_ptr.dtype.element_ty
    n, h, j = program_head(heads, L, BLOCK)
    qkv_ptr += n * stride_n + h * stride_h
    if table_ptr is not None:
        table_ptr += h * OFFSETS + CENTRE
    seen = keys_seen(mask_ptr, j, n, L)
    k = load_rows(qkv_ptr + stride_t, j, seen, stride_l, D, ALIGN, BLOCK_D)
    total = tl.zeros([BLOCK], acc_ty)
    for start in range(0, L, STEP):
        i = start + tl.arange(0, STEP)
        q = load_rows(qkv_ptr, i, i < L, stride_l, D, ALIGN, BLOCK_D)
        lse = tl.load(lse_ptr + (n * heads + h) * L + i, mask=i < L, other=0.0)
        offsets = place(i, W, COLUMNS)[None, :] - place(j, W, COLUMNS)[:, None]
        added = offset_bias(table_ptr, offsets, (i < L)[None, :] & seen[:, None])
        s = scores(pairs(k, q, acc_ty, DOT, PRECISION), added, seen[:, None], SCALE)  # [BLOCK, STEP]
        p = tl.exp2(s - finite_or_zero(lse)[None, :])
        total += tl.sum(tl.where((i < L)[None, :], p, 0.0), 1)
    tl.store(mean_ptr + (n * heads + h) * L + j, total / L, mask=j < L)


def programs(x: Heads, block: int) -> int:
    """One for every block of every head of every image."""
    return x.N * x.heads * cdiv(x.L, block)


def attention_fwd(
    qkv: torch.Tensor, table: torch.Tensor | None, key_mask: torch.Tensor | None, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `visattn_fast.ops.attention2d`."""
    x, offsets = split(qkv), bias(table)
    out = torch.empty((*qkv.shape[:3], x.heads, x.D), dtype=qkv.dtype, device=qkv.device)
    lse = qkv.new_empty((x.N, x.heads, x.L), dtype=accumulation_dtype(qkv))
    blocks = _blocks(x, table is not None)
    with device_guard(qkv):
        launch(
            _attention_kernel, programs(x, blocks["BLOCK"]),
            x.qkv, offsets.table, mask_bytes(key_mask), out, lse, x.L, x.W, x.heads, *x.strides, *offsets[1:],
            SCALE=scale * LOG2E.value, **x.meta, **product(qkv, qkv), **blocks,
        )  # fmt: skip
    return out, lse


def _blocks(x: Heads, biased: bool) -> dict[str, Any]:
    """As many rows as registers hold on every target."""
    if x.qkv.itemsize > 2:
        return x.blocks(64, 32, 8, 2) if x.D <= 32 else x.blocks(32, 32, 4, 2) if x.D <= 64 else x.blocks(32, 16, 4, 1)
    return x.blocks(128, 32 if biased and x.D > 32 else 64, 8 if biased or x.D > 64 else 4, 2)


def attention_mean(
    qkv: torch.Tensor, table: torch.Tensor | None, key_mask: torch.Tensor | None, lse: torch.Tensor, scale: float
) -> torch.Tensor:
    """See `visattn_fast.ops.attention2d`."""
    x, offsets = split(qkv), bias(table)
    N, H, W = qkv.shape[:3]
    mean = torch.empty((N, x.heads, H, W), dtype=lse.dtype, device=qkv.device)
    wide = qkv.itemsize > 2
    blocks = x.blocks(64, 32 if wide else 64, 8 if wide else 4, 2)
    mask, lse = mask_bytes(key_mask), lse * LOG2E.value
    with device_guard(qkv):
        launch(
            _mean_weights_kernel, programs(x, blocks["BLOCK"]),
            x.qkv, offsets.table, mask, lse, mean, x.L, x.W, x.heads, *x.strides, *offsets[1:],
            SCALE=scale * LOG2E.value, **x.meta, **product(qkv, qkv), **blocks,
        )  # fmt: skip
    return mean


def mask_bytes(key_mask: torch.Tensor | None) -> torch.Tensor | None:
    """[N, L], a byte each."""
    return None if key_mask is None else key_mask.contiguous().view(torch.uint8)
