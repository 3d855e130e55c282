"""Kernels of the gradients of attention inside (shifted) windows."""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import add_product, pairs, store_rows, zero_rows
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


@triton.jit
def _store_gradient(
    ptr, sums_ptr, tile, token, there, at, HEAD: tl.constexpr, PART: tl.constexpr
):  # fmt: skip
    """Of queries, keys or values [places, BLOCK_D], and their sum [d], padding's too, where it is asked for."""
    store_rows(part_rows(ptr, token, there, at, HEAD, PART, 3), tile, HEAD)
    if sums_ptr is not None:
        d = tl.arange(0, HEAD.BLOCK_D)
        tl.store(sums_ptr + d, tl.sum(tile, 0), mask=d < HEAD.D)


@triton.jit
def _sums(dbias_ptr, window, run, HEAD: tl.constexpr):
    """Where those of a program's window go, in [tiles, groups, heads, steps, 2, d]."""
    part = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    return dbias_ptr + (part.to(tl.int64) * run.grid.steps + window - run.first) * 2 * HEAD.D


@triton.jit
def _store_table(parts_ptr, dposition, i_start, j, WINDOW: tl.constexpr, ROWS: tl.constexpr):
    """The table's gradient [tiles, groups, heads, T] from that of the bias of queries from i_start on, and of keys j.

    Every row of the table belongs to one query, or none, of each key: it is gathered, and summed in a fixed order.
    """
    H: tl.constexpr = WINDOW.H
    W: tl.constexpr = WINDOW.W
    T: tl.constexpr = (2 * H - 1) * (2 * W - 1)
    QUERIES: tl.constexpr = dposition.shape[0]
    part = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    parts_ptr += part.to(tl.int64) * T
    for first in range(0, T, ROWS):
        r = first + tl.arange(0, ROWS)
        h = (j // W)[None, :] + (r // (2 * W - 1) - H + 1)[:, None]
        w = (j % W)[None, :] + (r % (2 * W - 1) - W + 1)[:, None]
        i = h * W + w - i_start
        valid = (h >= 0) & (h < H) & (w >= 0) & (w < W) & (j < H * W)[None, :] & (i >= 0) & (i < QUERIES)
        given = tl.gather(dposition, tl.where(valid, i, 0), 0)
        tl.store(parts_ptr + r, tl.sum(tl.where(valid, given, 0.0), 1), mask=r < T)


@triton.jit
def _statistics_at(token, at):
    """Where lse and mean of tokens are, in [heads, N, H, W]."""
    run, grid = at.run, at.run.grid
    return run.head.to(tl.int64) * grid.N * grid.H * grid.W + at.n + token


@triton.jit
def _load_queries(grad_ptr, qkv_ptr, lse_ptr, mean_ptr, i, at, HEAD: tl.constexpr, WINDOW: tl.constexpr):
    """Queries i and their results' gradients, each with its rows, and what `_queries_kernel` found of them."""
    token, there = places(i, at, WINDOW)
    q_rows, q = load_part(qkv_ptr, token, there, at, HEAD, 0, 3)
    g_rows, g = load_part(grad_ptr, token, there, at, HEAD)
    rows = _statistics_at(token, at)
    lse = tl.load(lse_ptr + rows, mask=there, other=float("inf"))  # padding has no gradient
    return q_rows, q, g_rows, g, lse, tl.load(mean_ptr + rows, mask=there, other=0.0)


@triton.jit
def _backward_kernel(
    grad_ptr, qkv_ptr, bias_ptr, table_ptr, dqkv_ptr, lse_ptr, mean_ptr, dtable_ptr, dbias_ptr, grid,
    HEAD: tl.constexpr, WINDOW: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """dqkv [N, H, W, 3, heads, d], and sums: dtable and dbias as `_store_table` and `_sums` say.

    With lse_ptr no gradients of keys and values, but lse and mean, as `_queries_kernel`.
    """
    run = this_run(grid, WINDOW)
    bias_q = load_bias(bias_ptr, run, HEAD)
    i = tl.arange(0, BLOCK)
    bias = positions(table_ptr, i[:, None], i[None, :], run, WINDOW)
    dposition = tl.zeros([BLOCK, BLOCK], HEAD.ACC)
    for window in range(run.first, run.last):
        at = corner(window, run, WINDOW)
        token, there = places(i, at, WINDOW)
        k_rows, k = load_part(qkv_ptr, token, there, at, HEAD, 1, 3)
        v_rows, v = load_part(qkv_ptr, token, there, at, HEAD, 2, 3)
        q_rows, q = load_part(qkv_ptr, token, there, at, HEAD, 0, 3)
        g_rows, g = load_part(grad_ptr, token, there, at, HEAD)
        sums_ptr = _sums(dbias_ptr, window, run, HEAD)
        s = logits(pairs(q_rows, q, k_rows, k, HEAD), bias_logits(k, bias_q, HEAD), bias, HEAD)
        top = tl.max(s, 1)
        p = tl.exp2(s - top[:, None])
        count = tl.sum(p, 1)
        p *= (1 / count)[:, None]
        zeros = zero_rows(BLOCK, HEAD)
        if lse_ptr is None:  # before the logits' gradient: it and the weights are many registers
            dv = add_product(tl.trans(p.to(HEAD.DOT)), g, zeros, HEAD)
            _store_gradient(dqkv_ptr, sums_ptr + HEAD.D, dv, token, there, at, HEAD, 2)
        dp = pairs(g_rows, g, v_rows, v, HEAD)
        mean = tl.sum(p * dp, 1)
        ds = p * (dp - mean[:, None])
        dposition += ds
        dq = add_product(ds, k, zeros, HEAD) * HEAD.SCALE
        _store_gradient(dqkv_ptr, sums_ptr, dq, token, there, at, HEAD, 0)
        if lse_ptr is None:
            dk = add_product(tl.trans(ds.to(HEAD.DOT)), q, zeros, HEAD)
            if bias_q is not None:
                dk += tl.sum(ds, 0)[:, None] * bias_q[None, :]
            _store_gradient(dqkv_ptr, None, dk * HEAD.SCALE, token, there, at, HEAD, 1)
        else:
            rows = _statistics_at(token, at)
            tl.store(lse_ptr + rows, top + tl.log2(count), mask=there)
            tl.store(mean_ptr + rows, mean, mask=there)
    _store_table(dtable_ptr, dposition, 0, i, WINDOW, ROWS)


@triton.jit
def _queries_kernel(
    grad_ptr, qkv_ptr, bias_ptr, table_ptr, dqkv_ptr, lse_ptr, mean_ptr, dbias_ptr, grid,
    HEAD: tl.constexpr, WINDOW: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Of BLOCK queries: their gradients; lse, the logarithms of sums of weights, in powers of two; and mean.

    That is of the weights' gradients, by the weights; both are [heads, N, H, W].
    """
    run = this_run(grid, WINDOW)
    bias_q = load_bias(bias_ptr, run, HEAD)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    for window in range(run.first, run.last):
        at = corner(window, run, WINDOW)
        token, there = places(i, at, WINDOW)
        q_rows, q = load_part(qkv_ptr, token, there, at, HEAD, 0, 3)
        g_rows, g = load_part(grad_ptr, token, there, at, HEAD)
        top = tl.full([BLOCK], -float("inf"), HEAD.ACC)
        count = tl.zeros([BLOCK], HEAD.ACC)
        mean = tl.zeros([BLOCK], HEAD.ACC)
        for start in tl.range(0, WINDOW.H * WINDOW.W, STEP, disable_licm=True):
            _, v_rows, v, s = meet_keys(start, q_rows, q, i, bias_q, qkv_ptr, table_ptr, at, HEAD, WINDOW, STEP)
            p, top, shrunk = more_keys(s, top)
            count = count * shrunk + tl.sum(p, 1)
            mean = mean * shrunk + tl.sum(p * pairs(g_rows, g, v_rows, v, HEAD), 1)
        lse = top + tl.log2(count)
        mean /= count
        dq = zero_rows(BLOCK, HEAD)
        for start in tl.range(0, WINDOW.H * WINDOW.W, STEP, disable_licm=True):
            k, v_rows, v, s = meet_keys(start, q_rows, q, i, bias_q, qkv_ptr, table_ptr, at, HEAD, WINDOW, STEP)
            ds = tl.exp2(s - lse[:, None]) * (pairs(g_rows, g, v_rows, v, HEAD) - mean[:, None])
            dq = add_product(ds, k, dq, HEAD)
        rows = _statistics_at(token, at)
        tl.store(lse_ptr + rows, lse, mask=there)
        tl.store(mean_ptr + rows, mean, mask=there)
        sums_ptr = _sums(dbias_ptr, window, run, HEAD)
        _store_gradient(dqkv_ptr, sums_ptr, dq * HEAD.SCALE, token, there, at, HEAD, 0)


@triton.jit
def _keys_kernel(
    grad_ptr, qkv_ptr, bias_ptr, table_ptr, dqkv_ptr, lse_ptr, mean_ptr, dbias_ptr, grid,
    HEAD: tl.constexpr, WINDOW: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
    DK: tl.constexpr, DV: tl.constexpr,
):  # fmt: skip
    """Of BLOCK keys: their gradients, their values', or both, from lse and mean of all queries."""
    run = this_run(grid, WINDOW)
    bias_q = load_bias(bias_ptr, run, HEAD)
    j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    for window in range(run.first, run.last):
        at = corner(window, run, WINDOW)
        token, there = places(j, at, WINDOW)
        k_rows, k = load_part(qkv_ptr, token, there, at, HEAD, 1, 3)
        v_rows, v = load_part(qkv_ptr, token, there, at, HEAD, 2, 3)
        added = bias_logits(k, bias_q, HEAD)
        dk = zero_rows(BLOCK, HEAD)
        dv = zero_rows(BLOCK, HEAD)
        total = tl.zeros([BLOCK], HEAD.ACC)
        for start in tl.range(0, WINDOW.H * WINDOW.W, STEP, disable_licm=True):
            i = start + tl.arange(0, STEP)
            q_rows, q, g_rows, g, lse, mean = _load_queries(grad_ptr, qkv_ptr, lse_ptr, mean_ptr, i, at, HEAD, WINDOW)
            bias = positions(table_ptr, i[None, :], j[:, None], run, WINDOW)
            s = logits(pairs(k_rows, k, q_rows, q, HEAD), added, bias, HEAD, ALONG=1)
            p = tl.exp2(s - lse[None, :])
            if DV:
                dv = add_product(p, g, dv, HEAD)
            if DK:
                ds = p * (pairs(v_rows, v, g_rows, g, HEAD) - mean[None, :])
                dk = add_product(ds, q, dk, HEAD)
                total += tl.sum(ds, 1)
        sums_ptr = _sums(dbias_ptr, window, run, HEAD)
        if DK:
            if bias_q is not None:
                dk += total[:, None] * bias_q[None, :]
            _store_gradient(dqkv_ptr, None, dk * HEAD.SCALE, token, there, at, HEAD, 1)
        if DV:
            _store_gradient(dqkv_ptr, sums_ptr + HEAD.D, dv, token, there, at, HEAD, 2)


@triton.jit
def _table_kernel(
    grad_ptr, qkv_ptr, bias_ptr, table_ptr, lse_ptr, mean_ptr, dtable_ptr, grid,
    HEAD: tl.constexpr, WINDOW: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """dtable of BLOCK queries and STEP keys, from lse and mean of the queries."""
    run = this_run(grid, WINDOW)
    bias_q = load_bias(bias_ptr, run, HEAD)
    across: tl.constexpr = tl.cdiv(WINDOW.H * WINDOW.W, STEP)
    own = tl.program_id(1) // across * BLOCK
    i = own + tl.arange(0, BLOCK)
    j = tl.program_id(1) % across * STEP + tl.arange(0, STEP)
    bias = positions(table_ptr, i[:, None], j[None, :], run, WINDOW)
    dposition = tl.zeros([BLOCK, STEP], HEAD.ACC)
    for window in range(run.first, run.last):
        at = corner(window, run, WINDOW)
        token, there = places(j, at, WINDOW)
        k_rows, k = load_part(qkv_ptr, token, there, at, HEAD, 1, 3)
        v_rows, v = load_part(qkv_ptr, token, there, at, HEAD, 2, 3)
        added = bias_logits(k, bias_q, HEAD)
        q_rows, q, g_rows, g, lse, mean = _load_queries(grad_ptr, qkv_ptr, lse_ptr, mean_ptr, i, at, HEAD, WINDOW)
        s = logits(pairs(q_rows, q, k_rows, k, HEAD), added, bias, HEAD)
        p = tl.exp2(s - lse[:, None])
        dposition += p * (pairs(g_rows, g, v_rows, v, HEAD) - mean[:, None])
    _store_table(dtable_ptr, dposition, own, j, WINDOW, ROWS)


@triton.jit
def _sum_column(ptr, rows, stride, there, BLOCK_S: tl.constexpr):
    """Of so many rows, so far apart, in a fixed order; columns are where ptr points."""
    s = tl.arange(0, BLOCK_S)
    total = tl.zeros([BLOCK_S, ptr.shape[0]], ptr.dtype.element_ty)
    for start in range(0, rows, BLOCK_S):
        mask = (start + s < rows)[:, None] & there[None, :]
        total += tl.load(ptr[None, :] + (start + s)[:, None].to(tl.int64) * stride, mask=mask, other=0.0)
    return tl.sum(total, 0)


@triton.jit
def _totals_kernel(
    table_parts_ptr, bias_parts_ptr, dtable_ptr, dbias_ptr, table_rows, bias_rows, T, heads, D, steps,
    BLOCK_S: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dtable [T, heads] of parts [rows, heads, T], and dbias [3, heads, D] of parts [rows, heads, steps, 2, D].

    The keys' bias has a gradient of 0, or NaN where the queries' has.
    """
    k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if tl.program_id(0) < tl.cdiv(heads * T, BLOCK):
        total = _sum_column(table_parts_ptr + k, table_rows, heads * T, k < heads * T, BLOCK_S)
        tl.store(dtable_ptr + k % T * heads + k // T, total, mask=k < heads * T)
    else:
        k -= tl.cdiv(heads * T, BLOCK) * BLOCK
        there = k < heads * D
        column_ptr = bias_parts_ptr + (k // D) * steps * 2 * D + k % D
        q = tl.zeros([BLOCK], dbias_ptr.dtype.element_ty)
        v = tl.zeros([BLOCK], dbias_ptr.dtype.element_ty)
        for step in range(steps):
            q += _sum_column(column_ptr + step * 2 * D, bias_rows, heads * steps * 2 * D, there, BLOCK_S)
            v += _sum_column(column_ptr + (step * 2 + 1) * D, bias_rows, heads * steps * 2 * D, there, BLOCK_S)
        tl.store(dbias_ptr + k, q, mask=there)
        tl.store(dbias_ptr + heads * D + k, 0 * q, mask=there)
        tl.store(dbias_ptr + 2 * heads * D + k, v, mask=there)
