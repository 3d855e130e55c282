"""Gradients of attention over the positions of a map, from the logarithms of the sums of its weights.

Keys and values, queries, and the table of offsets have one kernel each, which computes the weights again, so no two
programs add to the same element. For the table a program takes one head and one vertical offset, and sums over images
what all pairs of map rows at this offset have, [W, W]. Sums along the diagonals come last, in a fixed order.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from ..core.heuristics import cdiv, next_power_of_2, registers_for, split
from ..core.launch import launch
from ..core.product import add_product
from .flash import FlashMaps, keys_seen, mask_bytes, offset_bias, pair_bias, program_head, scores
from .tiles import LOG2E, Rows, finite_or_zero, load_rows, pairs, store_rows, zero_rows


@triton.jit
def _delta_kernel(grad_ptr, out_ptr, lse_ptr, rows_ptr, count, size, HEAD: tl.constexpr, BLOCK: tl.constexpr):
    """rows [2, N, heads, L]: lse as an exponent of two, 0 for rows without keys; sum_d grad * out, [N, L, heads, d]."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exists = row < count
    g = load_rows(Rows(grad_ptr, row, exists, HEAD.D), HEAD).to(HEAD.ACC)
    o = load_rows(Rows(out_ptr, row, exists, HEAD.D), HEAD).to(HEAD.ACC)
    at = (row // size.heads // size.L * size.heads + row % size.heads) * size.L + row // size.heads % size.L
    lse = tl.load(lse_ptr + at, mask=exists, other=0.0)
    tl.store(rows_ptr + at, finite_or_zero(lse) * LOG2E, mask=exists)
    tl.store(rows_ptr + count + at, tl.sum(g * o, 1), mask=exists)


@triton.jit
def _load_delta(rows_ptr, at, exists, count):
    """Loads what `_delta_kernel` stored for rows ``at``."""
    lse = tl.load(rows_ptr + at, mask=exists, other=0.0)
    return lse, tl.load(rows_ptr + count + at, mask=exists, other=0.0)


@triton.jit
def _score_grads(s, dp, bias, seen, lse, delta, HEAD: tl.constexpr):
    """Returns weights and the scores' gradients, from products of queries with keys and of gradients with values."""
    p = tl.exp2(scores(s, bias, seen, HEAD) - lse)
    return p, p * (dp - delta)


@triton.jit
def _dkdv_kernel(
    grad_ptr,
    qkv_ptr,
    table_ptr,
    mask_ptr,
    rows_ptr,
    dqkv_ptr,
    count,
    size,
    HEAD: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
):
    """The gradients of BLOCK keys and values."""
    n, h, j = program_head(size, BLOCK)
    C = size.heads * HEAD.D
    qkv_ptr += tl.multiple_of(n * size.stride_n + h * size.stride_h, tl.constexpr(HEAD.ALIGN))
    grad_ptr += n * size.L * C + h * HEAD.D
    rows_ptr += (n * size.heads + h) * size.L
    seen = keys_seen(mask_ptr, j, n, size)
    k_rows = Rows(qkv_ptr + size.stride_t, j, seen, size.stride_l)
    v_rows = Rows(qkv_ptr + 2 * size.stride_t, j, seen, size.stride_l)
    k, v = load_rows(k_rows, HEAD), load_rows(v_rows, HEAD)
    dk = zero_rows(BLOCK, HEAD)
    dv = zero_rows(BLOCK, HEAD)
    for start in range(0, size.L, STEP):
        i = start + tl.arange(0, STEP)
        exists = i < size.L
        q_rows = Rows(qkv_ptr, i, exists, size.stride_l)
        g_rows = Rows(grad_ptr, i, exists, C)
        q, g = load_rows(q_rows, HEAD), load_rows(g_rows, HEAD)
        lse, delta = _load_delta(rows_ptr, i, exists, count)
        bias = pair_bias(table_ptr, h, i, j, exists, seen, size, KEYS_FIRST=True)
        s, dp = pairs(k_rows, k, q_rows, q, HEAD), pairs(v_rows, v, g_rows, g, HEAD)  # [BLOCK, STEP]
        p, ds = _score_grads(s, dp, bias, seen[:, None], lse[None, :], delta[None, :], HEAD)
        dv = add_product(p, g, dv, HEAD)
        dk = add_product(ds, q, dk, HEAD)
    dqkv_ptr += (n * size.L * 3 + 1) * C + h * HEAD.D
    store_rows(Rows(dqkv_ptr, j, j < size.L, 3 * C), dk * HEAD.SCALE, HEAD)
    store_rows(Rows(dqkv_ptr + C, j, j < size.L, 3 * C), dv, HEAD)


@triton.jit
def _dq_kernel(
    grad_ptr,
    qkv_ptr,
    table_ptr,
    mask_ptr,
    rows_ptr,
    dqkv_ptr,
    count,
    size,
    HEAD: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
):
    """The gradients of BLOCK queries."""
    n, h, i = program_head(size, BLOCK)
    C = size.heads * HEAD.D
    exists = i < size.L
    qkv_ptr += tl.multiple_of(n * size.stride_n + h * size.stride_h, tl.constexpr(HEAD.ALIGN))
    q_rows = Rows(qkv_ptr, i, exists, size.stride_l)
    g_rows = Rows(grad_ptr + n * size.L * C + h * HEAD.D, i, exists, C)
    q, g = load_rows(q_rows, HEAD), load_rows(g_rows, HEAD)
    lse, delta = _load_delta(rows_ptr + (n * size.heads + h) * size.L, i, exists, count)
    dq = zero_rows(BLOCK, HEAD)
    for start in range(0, size.L, STEP):
        j = start + tl.arange(0, STEP)
        seen = keys_seen(mask_ptr, j, n, size)
        k_rows = Rows(qkv_ptr + size.stride_t, j, seen, size.stride_l)
        v_rows = Rows(qkv_ptr + 2 * size.stride_t, j, seen, size.stride_l)
        k, v = load_rows(k_rows, HEAD), load_rows(v_rows, HEAD)
        bias = pair_bias(table_ptr, h, i, j, exists, seen, size)
        s, dp = pairs(q_rows, q, k_rows, k, HEAD), pairs(g_rows, g, v_rows, v, HEAD)  # [BLOCK, STEP]
        _, ds = _score_grads(s, dp, bias, seen[None, :], lse[:, None], delta[:, None], HEAD)
        dq = add_product(ds, k, dq, HEAD)
    dqkv_ptr += n * size.L * 3 * C + h * HEAD.D
    store_rows(Rows(dqkv_ptr, i, exists, 3 * C), dq * HEAD.SCALE, HEAD)


@triton.jit
def _dtable_kernel(
    grad_ptr,
    qkv_ptr,
    table_ptr,
    mask_ptr,
    rows_ptr,
    sums_ptr,
    count,
    N,
    images,
    size,
    HEAD: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
):
    """sums [splits, heads, 2H - 1, W, W]: of the scores' gradients of queries and keys so many rows apart."""
    W = size.W
    H = size.L // W
    C = size.heads * HEAD.D
    across, down = tl.cdiv(W, STEP), tl.cdiv(W, BLOCK)
    tile = tl.program_id(0) % (across * down)
    apart = tl.program_id(0) // (across * down) % (2 * H - 1)
    h = tl.program_id(0) // (across * down) // (2 * H - 1)
    dy = apart - (H - 1)
    xi = tile // across * BLOCK + tl.arange(0, BLOCK)
    xj = tile % across * STEP + tl.arange(0, STEP)
    exists = xi < W
    qkv_ptr += h * size.stride_h
    grad_ptr += h * HEAD.D
    inside = exists[:, None] & (xj < W)[None, :]
    offsets = h * size.offsets + size.centre + dy * size.columns + xi[:, None] - xj[None, :]
    bias = offset_bias(table_ptr, offsets, inside)  # the same for all these pairs of rows
    first_row = tl.maximum(dy, 0)
    met = H - tl.maximum(dy, -dy)
    first = tl.program_id(1) * images
    total = tl.zeros([BLOCK, STEP], HEAD.ACC)
    for step in range(tl.minimum(images, N - first) * met):
        n = (first + step // met).to(tl.int64)
        yi = first_row + step % met
        i = yi * W + xi
        j = (yi - dy) * W + xj
        seen = (xj < W) & keys_seen(mask_ptr, j, n, size)
        image_ptr = qkv_ptr + tl.multiple_of(n * size.stride_n, tl.constexpr(HEAD.ALIGN))
        q_rows = Rows(image_ptr, i, exists, size.stride_l)
        k_rows = Rows(image_ptr + size.stride_t, j, seen, size.stride_l)
        v_rows = Rows(image_ptr + 2 * size.stride_t, j, seen, size.stride_l)
        g_rows = Rows(grad_ptr + n * size.L * size.heads * HEAD.D, i, exists, C)
        s = pairs(q_rows, load_rows(q_rows, HEAD), k_rows, load_rows(k_rows, HEAD), HEAD)
        dp = pairs(g_rows, load_rows(g_rows, HEAD), v_rows, load_rows(v_rows, HEAD), HEAD)
        lse, delta = _load_delta(rows_ptr, (n * size.heads + h) * size.L + i, exists, count)
        _, ds = _score_grads(s, dp, bias, seen[None, :], lse[:, None], delta[:, None], HEAD)
        total += ds
    share = tl.program_id(1).to(tl.int64)
    sums_ptr += ((share * size.heads + h) * (2 * H - 1) + apart) * W * W
    tl.store(sums_ptr + xi[:, None] * W + xj[None, :], total, mask=inside)


def _backward_blocks(x: FlashMaps, for_keys: bool) -> dict[str, Any]:
    """Returns as many rows as registers hold on every target; the sums of keys and values take twice as many."""
    D, biased = x.head.D, x.biased
    if x.wide:
        if D > 64:
            return x.blocks(16, 16, 8, 1) if for_keys else x.blocks(16, 32, 4, 1)
        return x.blocks(16, 16 if biased or (for_keys and D > 32) else 32, 4, 1)
    if D > 64:
        return x.blocks(32, 32, 4, 2) if biased else x.blocks(64, 32, 8, 2)
    return x.blocks(64, 32 if biased else 64, 4, 2)


def flash_attention_bwd(
    grad: torch.Tensor, x: FlashMaps, key_mask: torch.Tensor | None, out: torch.Tensor, lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns dqkv, dense, and the table's gradient [heads, 2H - 1, 2W - 1], or empty without a table."""
    dqkv = torch.empty(x.qkv.shape, dtype=x.qkv.dtype, device=x.qkv.device)
    rows, count = lse.new_empty((2, *lse.shape)), lse.numel()
    launch(_delta_kernel, cdiv(count, 64), grad, out, lse, rows, count, x.size, HEAD=x.head, BLOCK=64, num_warps=4)
    tensors = (grad, x.qkv, x.table, mask_bytes(key_mask), rows)
    for kernel in (_dkdv_kernel, _dq_kernel):
        blocks = _backward_blocks(x, kernel is _dkdv_kernel)
        launch(kernel, x.programs(blocks["BLOCK"]), *tensors, dqkv, count, x.size, HEAD=x.head, **blocks)
    return dqkv, _offset_grads(x, tensors) if x.biased else lse.new_empty(0)


def _offset_grads(x: FlashMaps, tensors: tuple[torch.Tensor | None, ...]) -> torch.Tensor:
    """Returns the gradient of the biases of all offsets that the map has, [heads, 2H - 1, 2W - 1]."""
    *_, rows = tensors
    assert rows is not None
    H, W, heads = x.size.L // x.size.W, x.size.W, x.size.heads
    block = min(max(next_power_of_2(W), 16), 16 if x.wide else 32)
    tiles = cdiv(W, block) ** 2 * (2 * H - 1) * heads
    splits, images = split(tiles, x.N) if x.N else (0, 1)
    sums = rows.new_empty((splits, heads, 2 * H - 1, W, W))
    launch(
        _dtable_kernel,
        tiles if x.N else 0,
        *tensors,
        sums,
        rows[0].numel(),
        x.N,
        images,
        x.size,
        HEAD=x.head._replace(CHUNK=min(x.head.CHUNK, 32)) if x.wide else x.head,
        BLOCK=block,
        STEP=block,
        num_warps=4,
        num_stages=1,
        splits=splits,
        **registers_for(x.qkv, 4),
    )
    # With keys reversed and rows padded to 2 W, then read as rows of 2 W - 1, each offset x - x' is a column.
    skewed = F.pad(sums.sum(0).flip(3), (0, W)).flatten(2)[..., : W * (2 * W - 1)]
    return skewed.unflatten(2, (W, 2 * W - 1)).sum(2)


def table_grad(offset_grads: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Returns the gradient of the table [2H' - 1, 2W' - 1, heads], with zeros for offsets outside the map."""
    dtable = offset_grads.new_zeros(table.shape)
    (rows, columns, _), (_, height, width) = table.shape, offset_grads.shape
    y, x = (rows - height) // 2, (columns - width) // 2
    dtable[y : y + height, x : x + width] = offset_grads.permute(1, 2, 0)
    return dtable
