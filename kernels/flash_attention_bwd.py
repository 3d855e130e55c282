"""Gradients of attention over the positions of a map, from the logarithms of the sums of its weights.

Keys and values, queries, and the table of offsets have a kernel each, that computes weights again: nothing is added to
by two programs. For the table a program takes one head and one vertical offset, and sums what pairs of a map's rows so
far apart have, [W, W], over rows and images; sums along the diagonals come last, in a fixed order.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from ._attention import (
    LOG2E,
    Bias,
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
from ._heuristics import cdiv, next_power_of_2, splits
from ._launch import device_guard, launch
from ._product import dot, product
from .flash_attention import mask_bytes, programs


@triton.jit
def _delta_kernel(grad_ptr, out_ptr, lse_ptr, rows_ptr, L, heads, rows, D: tl.constexpr, ALIGN: tl.constexpr,
                  BLOCK_D: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """rows [2, N, heads, L]: lse in powers of two, 0 of rows without keys; sum_d grad * out, both [N, L, heads, d]."""
    acc_ty: tl.constexpr = lse_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    offsets, mask = row_tile(row, row < rows, D, D, ALIGN, BLOCK_D)
    g = tl.load(grad_ptr + offsets, mask=mask, other=0.0).to(acc_ty)
    o = tl.load(out_ptr + offsets, mask=mask, other=0.0).to(acc_ty)
    at = (row // heads // L * heads + row % heads) * L + row // heads % L
    lse = tl.load(lse_ptr + at, mask=row < rows, other=0.0)
    tl.store(rows_ptr + at, finite_or_zero(lse) * LOG2E, mask=row < rows)
    tl.store(rows_ptr + rows + at, tl.sum(g * o, 1), mask=row < rows)


@triton.jit
def _weight_grads(s, dp, bias, seen, lse, delta, SCALE: tl.constexpr):
    """Weights, and the gradients of the scores, from products of queries with keys, and of gradients with values."""
    p = tl.exp2(scores(s, bias, seen, SCALE) - lse)
    return p, p * (dp - delta)


@triton.jit
def _dkdv_kernel(
    grad_ptr, qkv_ptr, table_ptr, mask_ptr, rows_ptr, dqkv_ptr, L, W, heads, rows, stride_n, stride_l, stride_t,
    stride_h, CENTRE, COLUMNS, OFFSETS, UNSCALE: tl.constexpr, SCALE: tl.constexpr, D: tl.constexpr,
    ALIGN: tl.constexpr, BLOCK_D: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr,
    STEP: tl.constexpr,
):  # fmt: skip
    """The gradients of BLOCK keys and values."""
    acc_ty: tl.constexpr = rows_ptr.dtype.element_ty
    n, h, j = program_head(heads, L, BLOCK)
    qkv_ptr += n * stride_n + h * stride_h
    grad_ptr += (n * L * heads + h) * D
    rows_ptr += (n * heads + h) * L
    if table_ptr is not None:
        table_ptr += h * OFFSETS + CENTRE
    seen = keys_seen(mask_ptr, j, n, L)
    k = load_rows(qkv_ptr + stride_t, j, seen, stride_l, D, ALIGN, BLOCK_D)
    v = load_rows(qkv_ptr + 2 * stride_t, j, seen, stride_l, D, ALIGN, BLOCK_D)
    dk = tl.zeros([BLOCK, BLOCK_D], acc_ty)
    dv = tl.zeros([BLOCK, BLOCK_D], acc_ty)
    for start in range(0, L, STEP):
        i = start + tl.arange(0, STEP)
        q = load_rows(qkv_ptr, i, i < L, stride_l, D, ALIGN, BLOCK_D)
        g = load_rows(grad_ptr, i, i < L, heads * D, D, ALIGN, BLOCK_D)
        lse = tl.load(rows_ptr + i, mask=i < L, other=0.0)
        delta = tl.load(rows_ptr + rows + i, mask=i < L, other=0.0)
        offsets = place(i, W, COLUMNS)[None, :] - place(j, W, COLUMNS)[:, None]
        added = offset_bias(table_ptr, offsets, (i < L)[None, :] & seen[:, None])
        s, dp = pairs(k, q, acc_ty, DOT, PRECISION), pairs(v, g, acc_ty, DOT, PRECISION)  # [BLOCK, STEP]
        p, ds = _weight_grads(s, dp, added, seen[:, None], lse[None, :], delta[None, :], SCALE)
        dv = dot(p, g, dv, DOT, PRECISION)
        dk = dot(ds, q, dk, DOT, PRECISION)
    offsets, mask = row_tile(j, j < L, 3 * heads * D, D, ALIGN, BLOCK_D)
    dqkv_ptr += ((n * L * 3 + 1) * heads + h) * D
    tl.store(dqkv_ptr + offsets, dk * UNSCALE, mask=mask)
    tl.store(dqkv_ptr + heads * D + offsets, dv, mask=mask)


@triton.jit
def _dq_kernel(
    grad_ptr, qkv_ptr, table_ptr, mask_ptr, rows_ptr, dqkv_ptr, L, W, heads, rows, stride_n, stride_l, stride_t,
    stride_h, CENTRE, COLUMNS, OFFSETS, UNSCALE: tl.constexpr, SCALE: tl.constexpr, D: tl.constexpr,
    ALIGN: tl.constexpr, BLOCK_D: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr,
    STEP: tl.constexpr,
):  # fmt: skip
    """The gradients of BLOCK queries."""
    acc_ty: tl.constexpr = rows_ptr.dtype.element_ty
    n, h, i = program_head(heads, L, BLOCK)
    qkv_ptr += n * stride_n + h * stride_h
    if table_ptr is not None:
        table_ptr += h * OFFSETS + CENTRE
    q = load_rows(qkv_ptr, i, i < L, stride_l, D, ALIGN, BLOCK_D)
    g = load_rows(grad_ptr + (n * L * heads + h) * D, i, i < L, heads * D, D, ALIGN, BLOCK_D)
    lse = tl.load(rows_ptr + (n * heads + h) * L + i, mask=i < L, other=0.0)
    delta = tl.load(rows_ptr + rows + (n * heads + h) * L + i, mask=i < L, other=0.0)
    dq = tl.zeros([BLOCK, BLOCK_D], acc_ty)
    for start in range(0, L, STEP):
        j = start + tl.arange(0, STEP)
        seen = keys_seen(mask_ptr, j, n, L)
        k = load_rows(qkv_ptr + stride_t, j, seen, stride_l, D, ALIGN, BLOCK_D)
        v = load_rows(qkv_ptr + 2 * stride_t, j, seen, stride_l, D, ALIGN, BLOCK_D)
        offsets = place(i, W, COLUMNS)[:, None] - place(j, W, COLUMNS)[None, :]
        added = offset_bias(table_ptr, offsets, (i < L)[:, None] & seen[None, :])
        s, dp = pairs(q, k, acc_ty, DOT, PRECISION), pairs(g, v, acc_ty, DOT, PRECISION)  # [BLOCK, STEP]
        _, ds = _weight_grads(s, dp, added, seen[None, :], lse[:, None], delta[:, None], SCALE)
        dq = dot(ds, k, dq, DOT, PRECISION)
    offsets, mask = row_tile(i, i < L, 3 * heads * D, D, ALIGN, BLOCK_D)
    tl.store(dqkv_ptr + (n * L * 3 * heads + h) * D + offsets, dq * UNSCALE, mask=mask)


@triton.jit
def _dtable_kernel(
    grad_ptr, qkv_ptr, table_ptr, mask_ptr, rows_ptr, sums_ptr, N, images, L, W, heads, rows, stride_n, stride_l,
    stride_t, stride_h, CENTRE, COLUMNS, OFFSETS, SCALE: tl.constexpr, D: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_D: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
    STEP: tl.constexpr,
):  # fmt: skip
    """sums [parts, heads, 2H - 1, W, W]: of the scores' gradients of queries and keys so many rows apart."""
    acc_ty: tl.constexpr = rows_ptr.dtype.element_ty
    H = L // W
    across, down = tl.cdiv(W, STEP), tl.cdiv(W, BLOCK)
    tile = tl.program_id(0) % (across * down)
    apart = tl.program_id(0) // (across * down) % (2 * H - 1)
    h = tl.program_id(0) // (across * down) // (2 * H - 1)
    dy = apart - (H - 1)
    xi = tile // across * BLOCK + tl.arange(0, BLOCK)
    xj = tile % across * STEP + tl.arange(0, STEP)
    qkv_ptr += h * stride_h
    grad_ptr += h * D
    offsets = h * OFFSETS + CENTRE + dy * COLUMNS + xi[:, None] - xj[None, :]
    added = offset_bias(table_ptr, offsets, (xi < W)[:, None] & (xj < W)[None, :])  # the same for all of them
    first_row = tl.maximum(dy, 0)
    met = H - tl.maximum(dy, -dy)
    first = tl.program_id(1) * images
    total = tl.zeros([BLOCK, STEP], acc_ty)
    for step in range(tl.minimum(images, N - first) * met):
        n = (first + step // met).to(tl.int64)
        yi = first_row + step % met
        i = yi * W + xi
        j = (yi - dy) * W + xj
        there = xi < W
        seen = (xj < W) & keys_seen(mask_ptr, j, n, L)
        image_ptr = qkv_ptr + n * stride_n
        s = tl.zeros([BLOCK, STEP], acc_ty)
        dp = tl.zeros([BLOCK, STEP], acc_ty)
        for c in range(0, BLOCK_D, CHUNK):  # registers do not hold all of wide heads
            q = load_rows(image_ptr + c, i, there, stride_l, D - c, ALIGN, CHUNK)
            k = load_rows(image_ptr + stride_t + c, j, seen, stride_l, D - c, ALIGN, CHUNK)
            s += pairs(q, k, acc_ty, DOT, PRECISION)
            g = load_rows(grad_ptr + n * L * heads * D + c, i, there, heads * D, D - c, ALIGN, CHUNK)
            v = load_rows(image_ptr + 2 * stride_t + c, j, seen, stride_l, D - c, ALIGN, CHUNK)
            dp += pairs(g, v, acc_ty, DOT, PRECISION)
        at = (n * heads + h) * L + i
        lse = tl.load(rows_ptr + at, mask=there, other=0.0)
        delta = tl.load(rows_ptr + rows + at, mask=there, other=0.0)
        _, ds = _weight_grads(s, dp, added, seen[None, :], lse[:, None], delta[:, None], SCALE)
        total += ds
    part = tl.program_id(1).to(tl.int64)
    sums_ptr += ((part * heads + h) * (2 * H - 1) + apart) * W * W
    tl.store(sums_ptr + xi[:, None] * W + xj[None, :], total, mask=(xi < W)[:, None] & (xj < W)[None, :])


def attention_bwd(
    grad: torch.Tensor,
    qkv: torch.Tensor,
    table: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `visattn_fast.ops.attention2d`."""
    x, offsets, mask = split(qkv), bias(table), mask_bytes(key_mask)
    grad = grad.contiguous()
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    rows = lse.new_empty((2, *lse.shape))
    options = {"SCALE": scale * LOG2E.value, **x.meta, **product(qkv, qkv)}
    sizes = (x.L, x.W, x.heads, lse.numel(), *x.strides, *offsets[1:])
    with device_guard(qkv):
        launch(
            _delta_kernel, cdiv(lse.numel(), 64),
            grad, out, lse, rows, x.L, x.heads, lse.numel(), **x.meta, BLOCK=64, num_warps=4,
        )  # fmt: skip
        for kernel in (_dkdv_kernel, _dq_kernel):
            blocks = _blocks(x, table is not None, kernel is _dkdv_kernel)
            launch(
                kernel, programs(x, blocks["BLOCK"]),
                grad, x.qkv, offsets.table, mask, rows, dqkv, *sizes, UNSCALE=scale, **options, **blocks,
            )  # fmt: skip
        if table is None:
            return dqkv, lse.new_empty(0)
        return dqkv, _table_grad(table, grad, x, offsets, mask, rows, sizes, options)


def _blocks(x: Heads, biased: bool, of_keys: bool) -> dict[str, Any]:
    """As many rows as registers hold on every target; what is added up for keys takes twice as many."""
    if x.qkv.itemsize > 2:
        return x.blocks(16, 16 if biased or x.D > 64 else 32, 4 if x.D <= 64 else 8, 1)
    if x.D > 64:
        return x.blocks(32, 32, 4, 2) if biased and of_keys else x.blocks(64, 32, 8, 2)
    return x.blocks(64, 32 if biased and x.D > 32 else 64, 4, 2)


def _table_grad(
    table: torch.Tensor, grad: torch.Tensor, x: Heads, offsets: Bias, mask: torch.Tensor | None, rows: torch.Tensor,
    sizes: tuple[int, ...], options: dict[str, Any],
) -> torch.Tensor:  # fmt: skip
    """[2H' - 1, 2W' - 1, heads], with zeros for offsets that the map has not."""
    H, W = x.L // x.W, x.W
    block = min(max(next_power_of_2(W), 16), 16 if grad.itemsize > 2 else 32)
    tiles = cdiv(W, block) ** 2 * (2 * H - 1) * x.heads
    parts, images = splits(tiles, x.N) if x.N else (0, 1)
    sums = rows.new_empty((parts, x.heads, 2 * H - 1, W, W))
    launch(
        _dtable_kernel, tiles if x.N else 0,
        grad, x.qkv, offsets.table, mask, rows, sums, x.N, images, *sizes, **options,
        CHUNK=min(32, x.meta["BLOCK_D"]) if grad.itemsize > 2 else x.meta["BLOCK_D"], BLOCK=block, STEP=block,
        num_warps=4, num_stages=1, parts=parts,
    )  # fmt: skip
    # Keys reversed and padded to rows of 2 W, read as rows of 2 W - 1, an offset x - x' is a column.
    skewed = F.pad(sums.sum(0).flip(3), (0, W)).flatten(2)[..., : W * (2 * W - 1)]
    found = skewed.unflatten(2, (W, 2 * W - 1)).sum(2)  # [heads, 2H - 1, 2W - 1]
    dtable = torch.zeros(table.shape, dtype=rows.dtype, device=rows.device)
    y, x0 = table.shape[0] // 2 - (H - 1), table.shape[1] // 2 - (W - 1)
    dtable[y : y + 2 * H - 1, x0 : x0 + 2 * W - 1] = found.permute(1, 2, 0)
    return dtable
