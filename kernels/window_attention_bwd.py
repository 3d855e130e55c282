"""Gradients of attention inside (shifted) windows.

Where a window's rows of weights fit on the chip, one kernel does all. In float32 it leaves keys and values to another
one, as registers do not hold all; in larger windows queries and the table have kernels of their own, too. That of the
queries meets keys twice: for the sums of their weights, which the other kernels need, and with them. That of the table
has the gradient of the bias of a tile of queries and keys, summed over its windows.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from . import _heuristics
from ._attention import LOG2E, load_rows, pairs, row_tile
from ._heuristics import cdiv, next_power_of_2
from ._launch import device_guard, launch
from ._product import dot
from ._windows import WHOLE, Windows, corner, load_bias, logits, more_keys, places, positions, prepare, run


@triton.jit
def _store_gradient(
    ptr, dbias_ptr, tile, token, there, stride, D: tl.constexpr, ALIGN: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """Of queries, keys or values [places, BLOCK_D], and their sum [d], padding's too, where it is asked for."""
    offsets, mask = row_tile(token, there, stride, D, ALIGN, BLOCK_D)
    tl.store(ptr + offsets, tile, mask=mask)
    if dbias_ptr is not None:
        d = tl.arange(0, BLOCK_D)
        tl.store(dbias_ptr + d, tl.sum(tile, 0), mask=d < D)


@triton.jit
def _store_table(parts_ptr, dbias, i_start, j, WH: tl.constexpr, WW: tl.constexpr, ROWS: tl.constexpr):
    """The table's gradient [tiles, groups, heads, T] from that of the bias of queries from i_start on, and of keys j.

    Every row of the table belongs to one query, or none, of each key: it is gathered, and summed in a fixed order.
    """
    T: tl.constexpr = (2 * WH - 1) * (2 * WW - 1)
    QUERIES: tl.constexpr = dbias.shape[0]
    part = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    parts_ptr += part.to(tl.int64) * T
    for first in range(0, T, ROWS):
        r = first + tl.arange(0, ROWS)
        h = (j // WW)[None, :] + (r // (2 * WW - 1) - WH + 1)[:, None]
        w = (j % WW)[None, :] + (r % (2 * WW - 1) - WW + 1)[:, None]
        i = h * WW + w - i_start
        valid = (h >= 0) & (h < WH) & (w >= 0) & (w < WW) & (j < WH * WW)[None, :] & (i >= 0) & (i < QUERIES)
        given = tl.gather(dbias, tl.where(valid, i, 0), 0)
        tl.store(parts_ptr + r, tl.sum(tl.where(valid, given, 0.0), 1), mask=r < T)


@triton.jit
def _sums(dbias_ptr, of, steps, D: tl.constexpr):
    """Where those of a program's window number ``of`` go, in [tiles, groups, heads, steps, 2, d]."""
    part = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    return dbias_ptr + (part.to(tl.int64) * steps + of) * 2 * D


@triton.jit
def _backward_kernel(
    grad_ptr, qkv_ptr, bias_ptr, table_ptr, dqkv_ptr, lse_ptr, mean_ptr, dtable_ptr, dbias_ptr, steps, heads, N, down,
    across, inner_h, inner_w, start_1, start_2, start_3, shift_h, shift_w, H, W, cycle_h, cycle_w, roll_h, roll_w,
    SCALE: tl.constexpr, WH: tl.constexpr, WW: tl.constexpr, PAD_FIRST: tl.constexpr, SEAM: tl.constexpr,
    D: tl.constexpr, ALIGN: tl.constexpr, BLOCK_D: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    KEYS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """dqkv [N, H, W, 3, heads, d], and sums: dtable and dbias as `_store_table` and `_sums` say.

    With lse_ptr no gradients of keys and values, but lse and mean, as `_queries_kernel`.
    """
    acc_ty: tl.constexpr = dtable_ptr.dtype.element_ty
    head, first, last, rows, columns, row, column, seam_h, seam_w = run(
        steps, heads, N, down, across, inner_h, inner_w, start_1, start_2, start_3, shift_h, shift_w, WH, WW
    )
    C = heads * D
    qkv_ptr += head * D
    dqkv_ptr += head * D
    grad_ptr += head * D
    table_ptr += head * (2 * WH - 1) * (2 * WW - 1)
    bias_q = load_bias(bias_ptr, head * D, acc_ty, D, BLOCK_D)
    i = tl.arange(0, KEYS)
    bias = positions(table_ptr, i[:, None], i[None, :], seam_h, seam_w, WH, WW, SEAM)
    dposition = tl.zeros([KEYS, KEYS], acc_ty)
    for window in range(first, last):
        n, h, w = corner(window, rows, columns, row, column, H, W, WH, WW)
        token, there = places(i, h, w, H, W, cycle_h, cycle_w, roll_h, roll_w, WH, WW, PAD_FIRST)
        from_ptr = qkv_ptr + n * 3 * C
        k = load_rows(from_ptr + C, token, there, 3 * C, D, ALIGN, BLOCK_D)
        v = load_rows(from_ptr + 2 * C, token, there, 3 * C, D, ALIGN, BLOCK_D)
        q = load_rows(from_ptr, token, there, 3 * C, D, ALIGN, BLOCK_D)
        g = load_rows(grad_ptr + n * C, token, there, C, D, ALIGN, BLOCK_D)
        to_ptr = dqkv_ptr + n * 3 * C
        sums_ptr = _sums(dbias_ptr, window - first, steps, D)
        s = logits(pairs(q, k, acc_ty, DOT, PRECISION), k, bias_q, bias, SCALE)
        top = tl.max(s, 1)
        p = tl.exp2(s - top[:, None])
        count = tl.sum(p, 1)
        p *= (1 / count)[:, None]
        if lse_ptr is None:  # before the logits' gradient: it and the weights are many registers
            dv = dot(tl.trans(p.to(DOT)), g, tl.zeros([KEYS, BLOCK_D], acc_ty), DOT, PRECISION)
            _store_gradient(to_ptr + 2 * C, sums_ptr + D, dv, token, there, 3 * C, D, ALIGN, BLOCK_D)
        dp = pairs(g, v, acc_ty, DOT, PRECISION)
        mean = tl.sum(p * dp, 1)
        ds = p * (dp - mean[:, None])
        dposition += ds
        dq = dot(ds, k, tl.zeros([KEYS, BLOCK_D], acc_ty), DOT, PRECISION) * (SCALE / LOG2E)
        _store_gradient(to_ptr, sums_ptr, dq, token, there, 3 * C, D, ALIGN, BLOCK_D)
        if lse_ptr is None:
            dk = dot(tl.trans(ds.to(DOT)), q, tl.zeros([KEYS, BLOCK_D], acc_ty), DOT, PRECISION)
            if bias_q is not None:
                dk += tl.sum(ds, 0)[:, None] * bias_q[None, :]
            dk *= SCALE / LOG2E
            _store_gradient(to_ptr + C, None, dk, token, there, 3 * C, D, ALIGN, BLOCK_D)
        else:
            at = head.to(tl.int64) * N * H * W + n + token
            tl.store(lse_ptr + at, top + tl.log2(count), mask=there)
            tl.store(mean_ptr + at, mean, mask=there)
    _store_table(dtable_ptr, dposition, 0, i, WH, WW, ROWS)


@triton.jit
def _queries_kernel(
    grad_ptr, qkv_ptr, bias_ptr, table_ptr, dqkv_ptr, lse_ptr, mean_ptr, dbias_ptr, steps, heads, N, down, across,
    inner_h, inner_w, start_1, start_2, start_3, shift_h, shift_w, H, W, cycle_h, cycle_w, roll_h, roll_w,
    SCALE: tl.constexpr, WH: tl.constexpr, WW: tl.constexpr, PAD_FIRST: tl.constexpr, SEAM: tl.constexpr,
    D: tl.constexpr, ALIGN: tl.constexpr, BLOCK_D: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Of BLOCK queries: their gradients; lse, the logarithms of sums of weights, in powers of two; and mean.

    That is of the weights' gradients, by the weights; both are [heads, N, H, W].
    """
    L: tl.constexpr = WH * WW
    acc_ty: tl.constexpr = table_ptr.dtype.element_ty
    head, first, last, rows, columns, row, column, seam_h, seam_w = run(
        steps, heads, N, down, across, inner_h, inner_w, start_1, start_2, start_3, shift_h, shift_w, WH, WW
    )
    C = heads * D
    qkv_ptr += head * D
    dqkv_ptr += head * D
    grad_ptr += head * D
    table_ptr += head * (2 * WH - 1) * (2 * WW - 1)
    bias_q = load_bias(bias_ptr, head * D, acc_ty, D, BLOCK_D)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    for window in range(first, last):
        n, h, w = corner(window, rows, columns, row, column, H, W, WH, WW)
        token, there = places(i, h, w, H, W, cycle_h, cycle_w, roll_h, roll_w, WH, WW, PAD_FIRST)
        from_ptr = qkv_ptr + n * 3 * C
        q = load_rows(from_ptr, token, there, 3 * C, D, ALIGN, BLOCK_D)
        g = load_rows(grad_ptr + n * C, token, there, C, D, ALIGN, BLOCK_D)
        top = tl.full([BLOCK], -float("inf"), acc_ty)
        count = tl.zeros([BLOCK], acc_ty)
        mean = tl.zeros([BLOCK], acc_ty)
        for start in tl.range(0, L, STEP, disable_licm=True):
            j = start + tl.arange(0, STEP)
            token_k, there_k = places(j, h, w, H, W, cycle_h, cycle_w, roll_h, roll_w, WH, WW, PAD_FIRST)
            k = load_rows(from_ptr + C, token_k, there_k, 3 * C, D, ALIGN, BLOCK_D)
            v = load_rows(from_ptr + 2 * C, token_k, there_k, 3 * C, D, ALIGN, BLOCK_D)
            bias = positions(table_ptr, i[:, None], j[None, :], seam_h, seam_w, WH, WW, SEAM)
            s = logits(pairs(q, k, acc_ty, DOT, PRECISION), k, bias_q, bias, SCALE)
            p, top, shrunk = more_keys(s, top)
            count = count * shrunk + tl.sum(p, 1)
            mean = mean * shrunk + tl.sum(p * pairs(g, v, acc_ty, DOT, PRECISION), 1)
        lse = top + tl.log2(count)
        mean /= count
        dq = tl.zeros([BLOCK, BLOCK_D], acc_ty)
        for start in tl.range(0, L, STEP, disable_licm=True):
            j = start + tl.arange(0, STEP)
            token_k, there_k = places(j, h, w, H, W, cycle_h, cycle_w, roll_h, roll_w, WH, WW, PAD_FIRST)
            k = load_rows(from_ptr + C, token_k, there_k, 3 * C, D, ALIGN, BLOCK_D)
            v = load_rows(from_ptr + 2 * C, token_k, there_k, 3 * C, D, ALIGN, BLOCK_D)
            bias = positions(table_ptr, i[:, None], j[None, :], seam_h, seam_w, WH, WW, SEAM)
            s = logits(pairs(q, k, acc_ty, DOT, PRECISION), k, bias_q, bias, SCALE)
            ds = tl.exp2(s - lse[:, None]) * (pairs(g, v, acc_ty, DOT, PRECISION) - mean[:, None])
            dq = dot(ds, k, dq, DOT, PRECISION)
        at = head.to(tl.int64) * N * H * W + n + token
        tl.store(lse_ptr + at, lse, mask=there)
        tl.store(mean_ptr + at, mean, mask=there)
        dq *= SCALE / LOG2E
        sums_ptr = _sums(dbias_ptr, window - first, steps, D)
        _store_gradient(dqkv_ptr + n * 3 * C, sums_ptr, dq, token, there, 3 * C, D, ALIGN, BLOCK_D)


@triton.jit
def _keys_kernel(
    grad_ptr, qkv_ptr, bias_ptr, table_ptr, dqkv_ptr, lse_ptr, mean_ptr, dbias_ptr, steps, heads, N, down, across,
    inner_h, inner_w, start_1, start_2, start_3, shift_h, shift_w, H, W, cycle_h, cycle_w, roll_h, roll_w,
    SCALE: tl.constexpr, WH: tl.constexpr, WW: tl.constexpr, PAD_FIRST: tl.constexpr, SEAM: tl.constexpr,
    D: tl.constexpr, ALIGN: tl.constexpr, BLOCK_D: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Of BLOCK keys: their and their values' gradients, from lse and mean of all queries."""
    L: tl.constexpr = WH * WW
    acc_ty: tl.constexpr = table_ptr.dtype.element_ty
    head, first, last, rows, columns, row, column, seam_h, seam_w = run(
        steps, heads, N, down, across, inner_h, inner_w, start_1, start_2, start_3, shift_h, shift_w, WH, WW
    )
    C = heads * D
    qkv_ptr += head * D
    dqkv_ptr += head * D
    grad_ptr += head * D
    table_ptr += head * (2 * WH - 1) * (2 * WW - 1)
    bias_q = load_bias(bias_ptr, head * D, acc_ty, D, BLOCK_D)
    j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    for window in range(first, last):
        n, h, w = corner(window, rows, columns, row, column, H, W, WH, WW)
        token, there = places(j, h, w, H, W, cycle_h, cycle_w, roll_h, roll_w, WH, WW, PAD_FIRST)
        from_ptr = qkv_ptr + n * 3 * C
        k = load_rows(from_ptr + C, token, there, 3 * C, D, ALIGN, BLOCK_D)
        v = load_rows(from_ptr + 2 * C, token, there, 3 * C, D, ALIGN, BLOCK_D)
        dk = tl.zeros([BLOCK, BLOCK_D], acc_ty)
        dv = tl.zeros([BLOCK, BLOCK_D], acc_ty)
        total = tl.zeros([BLOCK], acc_ty)
        for start in tl.range(0, L, STEP, disable_licm=True):
            i = start + tl.arange(0, STEP)
            token_q, there_q = places(i, h, w, H, W, cycle_h, cycle_w, roll_h, roll_w, WH, WW, PAD_FIRST)
            q = load_rows(from_ptr, token_q, there_q, 3 * C, D, ALIGN, BLOCK_D)
            g = load_rows(grad_ptr + n * C, token_q, there_q, C, D, ALIGN, BLOCK_D)
            at = head.to(tl.int64) * N * H * W + n + token_q
            lse = tl.load(lse_ptr + at, mask=there_q, other=float("inf"))  # padding has no gradient
            mean = tl.load(mean_ptr + at, mask=there_q, other=0.0)
            bias = positions(table_ptr, i[None, :], j[:, None], seam_h, seam_w, WH, WW, SEAM)
            s = logits(pairs(k, q, acc_ty, DOT, PRECISION), k, bias_q, bias, SCALE, ALONG=1)
            p = tl.exp2(s - lse[None, :])
            dv = dot(p, g, dv, DOT, PRECISION)
            ds = p * (pairs(v, g, acc_ty, DOT, PRECISION) - mean[None, :])
            dk = dot(ds, q, dk, DOT, PRECISION)
            total += tl.sum(ds, 1)
        if bias_q is not None:
            dk += total[:, None] * bias_q[None, :]
        dk *= SCALE / LOG2E
        to_ptr = dqkv_ptr + n * 3 * C
        sums_ptr = _sums(dbias_ptr, window - first, steps, D)
        _store_gradient(to_ptr + C, None, dk, token, there, 3 * C, D, ALIGN, BLOCK_D)
        _store_gradient(to_ptr + 2 * C, sums_ptr + D, dv, token, there, 3 * C, D, ALIGN, BLOCK_D)


@triton.jit
def _table_kernel(
    grad_ptr, qkv_ptr, bias_ptr, table_ptr, lse_ptr, mean_ptr, dtable_ptr, steps, heads, N, down, across,
    inner_h, inner_w, start_1, start_2, start_3, shift_h, shift_w, H, W, cycle_h, cycle_w, roll_h, roll_w,
    SCALE: tl.constexpr, WH: tl.constexpr, WW: tl.constexpr, PAD_FIRST: tl.constexpr, SEAM: tl.constexpr,
    D: tl.constexpr, ALIGN: tl.constexpr, BLOCK_D: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK: tl.constexpr, STEP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """dtable of BLOCK queries and STEP keys, from lse and mean of the queries."""
    L: tl.constexpr = WH * WW
    acc_ty: tl.constexpr = table_ptr.dtype.element_ty
    head, first, last, rows, columns, row, column, seam_h, seam_w = run(
        steps, heads, N, down, across, inner_h, inner_w, start_1, start_2, start_3, shift_h, shift_w, WH, WW
    )
    C = heads * D
    qkv_ptr += head * D
    grad_ptr += head * D
    table_ptr += head * (2 * WH - 1) * (2 * WW - 1)
    bias_q = load_bias(bias_ptr, head * D, acc_ty, D, BLOCK_D)
    across_tiles: tl.constexpr = tl.cdiv(L, STEP)
    own = tl.program_id(1) // across_tiles * BLOCK
    i = own + tl.arange(0, BLOCK)
    j = tl.program_id(1) % across_tiles * STEP + tl.arange(0, STEP)
    bias = positions(table_ptr, i[:, None], j[None, :], seam_h, seam_w, WH, WW, SEAM)
    dposition = tl.zeros([BLOCK, STEP], acc_ty)
    for window in range(first, last):
        n, h, w = corner(window, rows, columns, row, column, H, W, WH, WW)
        token, there = places(j, h, w, H, W, cycle_h, cycle_w, roll_h, roll_w, WH, WW, PAD_FIRST)
        from_ptr = qkv_ptr + n * 3 * C
        k = load_rows(from_ptr + C, token, there, 3 * C, D, ALIGN, BLOCK_D)
        v = load_rows(from_ptr + 2 * C, token, there, 3 * C, D, ALIGN, BLOCK_D)
        token_q, there_q = places(i, h, w, H, W, cycle_h, cycle_w, roll_h, roll_w, WH, WW, PAD_FIRST)
        q = load_rows(from_ptr, token_q, there_q, 3 * C, D, ALIGN, BLOCK_D)
        g = load_rows(grad_ptr + n * C, token_q, there_q, C, D, ALIGN, BLOCK_D)
        at = head.to(tl.int64) * N * H * W + n + token_q
        lse = tl.load(lse_ptr + at, mask=there_q, other=float("inf"))  # padding has no gradient
        mean = tl.load(mean_ptr + at, mask=there_q, other=0.0)
        p = tl.exp2(logits(pairs(q, k, acc_ty, DOT, PRECISION), k, bias_q, bias, SCALE) - lse[:, None])
        dposition += p * (pairs(g, v, acc_ty, DOT, PRECISION) - mean[:, None])
    _store_table(dtable_ptr, dposition, own, j, WH, WW, ROWS)


def window_attention_bwd(
    grad: torch.Tensor, qkv: torch.Tensor, bias: torch.Tensor | None, table: torch.Tensor, heads: int, window_h: int,
    window_w: int, shift_h: int, shift_w: int, scale: float, pad_first: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """See `visattn_fast.ops.window_attention`. Where one kernel does all, reads grad and qkv once, writes dqkv once.

    Raises:
        ValueError: windows of more than 256 tokens.
    """
    with device_guard(qkv):
        x = prepare(qkv, bias, table, heads, window_h, window_w, shift_h, shift_w, scale, pad_first)
        groups, scalars = x.shared()
        together = _together(x)
        whole = together or (x.wide and x.tokens <= WHOLE)
        programs, tensors = groups * heads, (grad.contiguous(), x.qkv, x.bias, x.table)
        dqkv = torch.empty_like(x.qkv)
        # Of the smallest tiles; where a kernel has larger ones, zeros are left.
        dbias = x.table.new_zeros((1 if together else cdiv(x.tokens, 32), groups, heads, scalars[0], 2, x.meta["D"]))
        rows = (None, None) if together else x.table.new_empty((2, heads, *qkv.shape[:3])).unbind()
        if whole:
            dtable = x.table.new_empty((groups, *x.table.shape))
            meta = x.meta | _whole(x)
            launch(_backward_kernel, programs, *tensors, dqkv, *rows, dtable, dbias, *scalars, **meta)
        else:
            meta, parts = _tiles(x, _of_queries(x))
            launch(_queries_kernel, programs, *tensors, dqkv, *rows, dbias, *scalars, **meta, parts=parts)
            meta, parts = _tiles(x, _of_pairs(x))
            parts *= cdiv(x.tokens, meta["STEP"])
            groups, of_pairs = x.shared(parts)
            dtable = x.table.new_empty((parts * groups, *x.table.shape))
            launch(_table_kernel, groups * heads, *tensors, *rows, dtable, *of_pairs, **meta, ROWS=16, parts=parts)
        if not together:
            meta, parts = _tiles(x, _of_keys(x))
            launch(_keys_kernel, programs, *tensors, dqkv, *rows, dbias, *scalars, **meta, parts=parts)
        q, v = dbias.sum((0, 1, 3)).unbind(1) if bias is not None else dbias.new_zeros(2, heads, x.meta["D"])
        return dqkv, torch.stack([q, 0 * q, v]).flatten(), dtable.sum(0).t().contiguous()  # 0 * q: NaN stays


def _together(x: Windows) -> bool:
    """Whether registers hold all gradients of a window: of heads of more than 32 channels where warps are of 64."""
    return x.tokens <= WHOLE and not x.wide and (x.meta["D"] <= 32 or _heuristics.amd())


def _whole(x: Windows) -> dict[str, Any]:
    """Twice the threads for warps of 32: all is to be in registers."""
    warps = (8 if x.wide else 4) * (1 if _heuristics.amd() else 2)
    return {"KEYS": max(next_power_of_2(x.tokens), 16), "ROWS": 16, "num_warps": warps, "num_stages": 1}


def _tiles(x: Windows, blocks: tuple[int, int, int]) -> tuple[dict[str, Any], int]:
    """The options of a kernel, and the tiles of ``BLOCK`` tokens in a window."""
    block, step, warps = blocks
    return x.meta | {"BLOCK": block, "STEP": step, "num_warps": warps, "num_stages": 1}, cdiv(x.tokens, block)


# BLOCK, STEP and warps: as much as registers hold on every target, and mostly 16 bytes a load of each thread.


def _of_queries(x: Windows) -> tuple[int, int, int]:
    if x.wide:
        return 64, 32, 8
    return (64, 64, 4 if _heuristics.amd() else 8) if x.meta["D"] <= 32 else (64, 32, 4)


def _of_keys(x: Windows) -> tuple[int, int, int]:
    if _heuristics.amd():
        return (32, 32, 4) if x.wide else (64, 64, 4) if x.meta["D"] <= 32 else (64, 32, 4)
    return (64, 16, 8) if x.wide else (64, 32, 4) if x.meta["D"] <= 32 else (32, 32, 8)


def _of_pairs(x: Windows) -> tuple[int, int, int]:
    return (64, 32, 8) if x.wide else (64, 64, 4) if x.meta["D"] <= 32 else (64, 32, 4)
