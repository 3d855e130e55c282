"""Gradients of attention inside windows block by block: of queries, of keys and values, of the table of biases."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..core import heuristics
from ..core.heuristics import cdiv
from ..core.launch import launch
from ..core.product import add_product
from .tiles import pairs, zero_rows
from .window_grads import load_queries, statistics_offsets, store_gradient, store_table, window_sums
from .window_tiles import (
    Grid,
    bias_logits,
    corner,
    load_bias,
    load_part,
    logits,
    meet_keys,
    more_keys,
    places,
    positions,
    this_run,
)
from .windows import Windows


@triton.jit
def _window_queries_kernel(
    grad_ptr,
    qkv_ptr,
    bias_ptr,
    table_ptr,
    dqkv_ptr,
    lse_ptr,
    mean_ptr,
    dbias_ptr,
    grid,
    HEAD: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
):
    """The gradients of BLOCK queries, lse and mean, both [heads, N, H, W].

    lse is the logarithm to base 2 of the sum of a query's weights; mean is the mean of the weights' gradients, weighted
    by the weights.
    """
    run = this_run(grid, WINDOW)
    bias_q = load_bias(bias_ptr, run, HEAD)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    for window in range(run.first, run.last):
        at = corner(window, run, WINDOW)
        token, exists = places(i, at, WINDOW)
        q_rows, q = load_part(qkv_ptr, token, exists, at, HEAD, 0, 3)
        g_rows, g = load_part(grad_ptr, token, exists, at, HEAD)
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
        rows = statistics_offsets(token, at)
        tl.store(lse_ptr + rows, lse, mask=exists)
        tl.store(mean_ptr + rows, mean, mask=exists)
        sums_ptr = window_sums(dbias_ptr, window, run, HEAD)
        store_gradient(dqkv_ptr, sums_ptr, dq * HEAD.SCALE, token, exists, at, HEAD, 0)


@triton.jit
def _window_keys_kernel(
    grad_ptr,
    qkv_ptr,
    bias_ptr,
    table_ptr,
    dqkv_ptr,
    lse_ptr,
    mean_ptr,
    dbias_ptr,
    grid,
    HEAD: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
):
    """The gradients of BLOCK keys (DK), of their values (DV), or both, from lse and mean of all queries."""
    run = this_run(grid, WINDOW)
    bias_q = load_bias(bias_ptr, run, HEAD)
    j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    for window in range(run.first, run.last):
        at = corner(window, run, WINDOW)
        token, exists = places(j, at, WINDOW)
        k_rows, k = load_part(qkv_ptr, token, exists, at, HEAD, 1, 3)
        v_rows, v = load_part(qkv_ptr, token, exists, at, HEAD, 2, 3)
        added = bias_logits(k, bias_q, HEAD)
        dk = zero_rows(BLOCK, HEAD)
        dv = zero_rows(BLOCK, HEAD)
        total = tl.zeros([BLOCK], HEAD.ACC)
        for start in tl.range(0, WINDOW.H * WINDOW.W, STEP, disable_licm=True):
            i = start + tl.arange(0, STEP)
            q_rows, q, g_rows, g, lse, mean = load_queries(grad_ptr, qkv_ptr, lse_ptr, mean_ptr, i, at, HEAD, WINDOW)
            bias = positions(table_ptr, i[None, :], j[:, None], run, WINDOW)
            s = logits(pairs(k_rows, k, q_rows, q, HEAD), added, bias, HEAD, ALONG=1)
            p = tl.exp2(s - lse[None, :])
            if DV:
                dv = add_product(p, g, dv, HEAD)
            if DK:
                ds = p * (pairs(v_rows, v, g_rows, g, HEAD) - mean[None, :])
                dk = add_product(ds, q, dk, HEAD)
                total += tl.sum(ds, 1)
        sums_ptr = window_sums(dbias_ptr, window, run, HEAD)
        if DK:
            if bias_q is not None:
                dk += total[:, None] * bias_q[None, :]
            store_gradient(dqkv_ptr, None, dk * HEAD.SCALE, token, exists, at, HEAD, 1)
        if DV:
            store_gradient(dqkv_ptr, sums_ptr + HEAD.D, dv, token, exists, at, HEAD, 2)


@triton.jit
def _window_table_kernel(
    grad_ptr,
    qkv_ptr,
    bias_ptr,
    table_ptr,
    lse_ptr,
    mean_ptr,
    dtable_ptr,
    grid,
    HEAD: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The share of BLOCK queries and STEP keys in dtable, from lse and mean of the queries."""
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
        token, exists = places(j, at, WINDOW)
        k_rows, k = load_part(qkv_ptr, token, exists, at, HEAD, 1, 3)
        v_rows, v = load_part(qkv_ptr, token, exists, at, HEAD, 2, 3)
        added = bias_logits(k, bias_q, HEAD)
        q_rows, q, g_rows, g, lse, mean = load_queries(grad_ptr, qkv_ptr, lse_ptr, mean_ptr, i, at, HEAD, WINDOW)
        s = logits(pairs(q_rows, q, k_rows, k, HEAD), added, bias, HEAD)
        p = tl.exp2(s - lse[:, None])
        dposition += p * (pairs(g_rows, g, v_rows, v, HEAD) - mean[:, None])
    store_table(dtable_ptr, dposition, own, j, WINDOW, ROWS)


# BLOCK, STEP and warps: as much as registers hold on every target, and mostly 16 bytes a load of each thread.


def query_tiles(x: Windows) -> tuple[int, int, int]:
    D = x.head.D
    if x.wide:
        return (64, 32, 8) if D <= 64 else (16, 32, 4)
    if D > 64:
        return 32, 32, 8
    if heuristics.amd():
        return (64, 64, 4) if D <= 32 else (64, 32, 4)
    return 64, 32, 8


def key_tiles(x: Windows) -> tuple[int, int, int]:
    D = x.head.D
    if x.wide and D > 32:
        return (32, 16, 8) if D <= 64 else (64, 16, 8)
    if heuristics.amd():
        return (32, 32, 4) if x.wide else (64, 64, 4) if D <= 32 else (64, 32, 4)
    return (64, 16, 8) if x.wide else (64, 32, 4) if D <= 32 else (32, 32, 8)


def _table_tiles(x: Windows) -> tuple[int, int, int]:
    D = x.head.D
    if x.wide:
        return (64, 32, 8) if D <= 64 else (32, 32, 4)
    masked = x.tokens % 16 != 0  # masks take registers
    return (32 if masked and D > 64 else 64), 32, (8 if masked or D > 64 else 4)


def query_grads(
    grad: torch.Tensor,
    x: Windows,
    grid: Grid,
    groups: int,
    dqkv: torch.Tensor,
    statistics: tuple[torch.Tensor | None, torch.Tensor | None],
    sums: torch.Tensor,
) -> None:
    """Writes the queries' gradients and their biases' sums, and the statistics, lse and mean."""
    meta, tiles = x.tiles(*query_tiles(x))
    tensors = (grad, x.qkv, x.bias, x.table, dqkv, *statistics, sums)
    launch(_window_queries_kernel, groups * x.heads, *tensors, grid, **meta, splits=tiles)


def table_grads(
    grad: torch.Tensor, x: Windows, statistics: tuple[torch.Tensor | None, torch.Tensor | None]
) -> torch.Tensor:
    """Returns partials of the table's gradient [programs, heads, T], from the statistics."""
    meta, tiles = x.tiles(*_table_tiles(x), ROWS=16)
    tiles *= cdiv(x.tokens, meta["STEP"])
    groups, grid = x.shared(tiles)
    partials = x.table.new_empty((tiles * groups, *x.table.shape))
    tensors = (grad, x.qkv, x.bias, x.table, *statistics, partials)
    launch(_window_table_kernel, groups * x.heads, *tensors, grid, **meta, splits=tiles)
    return partials


def key_grads(
    grad: torch.Tensor,
    x: Windows,
    grid: Grid,
    groups: int,
    dqkv: torch.Tensor,
    statistics: tuple[torch.Tensor | None, torch.Tensor | None],
    sums: torch.Tensor,
) -> None:
    """Writes the gradients of keys and values and the values' biases' sums, from the statistics.

    There is a launch for each of the two if registers do not hold the sums of both.
    """
    meta, tiles = x.tiles(*key_tiles(x))
    tensors = (grad, x.qkv, x.bias, x.table, dqkv, *statistics, sums)
    for dk, dv in ((True, False), (False, True)) if x.wide and x.head.D > 64 else ((True, True),):
        launch(_window_keys_kernel, groups * x.heads, *tensors, grid, **meta, DK=dk, DV=dv, splits=tiles)
