"""Pieces of the kernels of window attention's gradients: how queries are loaded, and where gradients and sums go."""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import store_rows
from .window_tiles import load_part, part_rows, places


@triton.jit
def store_gradient(ptr, sums_ptr, tile, token, exists, at, HEAD: tl.constexpr, PART: tl.constexpr):
    """Stores gradients of queries, keys or values [places, BLOCK_D]; with sums_ptr their sum [d], with padding's."""
    store_rows(part_rows(ptr, token, exists, at, HEAD, PART, 3), tile, HEAD)
    if sums_ptr is not None:
        d = tl.arange(0, HEAD.BLOCK_D)
        tl.store(sums_ptr + d, tl.sum(tile, 0), mask=d < HEAD.D)


@triton.jit
def window_sums(dbias_ptr, window, run, HEAD: tl.constexpr):
    """Returns a pointer to the sums of a program's window, in [tiles, groups, heads, steps, 2, d]."""
    program = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    return dbias_ptr + (program.to(tl.int64) * run.grid.steps + window - run.first) * 2 * HEAD.D


@triton.jit
def store_table(partials_ptr, dposition, i_start, j, WINDOW: tl.constexpr, ROWS: tl.constexpr):
    """Stores the table's gradient [tiles, groups, heads, T], from the biases of queries from i_start on and of keys j.

    Every row of the table belongs to at most one query of each key: it is gathered, and summed in a fixed order.
    """
    H: tl.constexpr = WINDOW.H
    W: tl.constexpr = WINDOW.W
    T: tl.constexpr = (2 * H - 1) * (2 * W - 1)
    QUERIES: tl.constexpr = dposition.shape[0]
    program = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    partials_ptr += program.to(tl.int64) * T
    for first in range(0, T, ROWS):
        r = first + tl.arange(0, ROWS)
        h = (j // W)[None, :] + (r // (2 * W - 1) - H + 1)[:, None]
        w = (j % W)[None, :] + (r % (2 * W - 1) - W + 1)[:, None]
        i = h * W + w - i_start
        valid = (h >= 0) & (h < H) & (w >= 0) & (w < W) & (j < H * W)[None, :] & (i >= 0) & (i < QUERIES)
        given = tl.gather(dposition, tl.where(valid, i, 0), 0)
        tl.store(partials_ptr + r, tl.sum(tl.where(valid, given, 0.0), 1), mask=r < T)


@triton.jit
def statistics_offsets(token, at):
    """Returns offsets of lse and mean of tokens, in [heads, N, H, W]."""
    run, grid = at.run, at.run.grid
    return run.head.to(tl.int64) * grid.N * grid.H * grid.W + at.n + token


@triton.jit
def load_queries(grad_ptr, qkv_ptr, lse_ptr, mean_ptr, i, at, HEAD: tl.constexpr, WINDOW: tl.constexpr):
    """Loads queries i and their results' gradients, each with its rows, and their lse and mean."""
    token, exists = places(i, at, WINDOW)
    q_rows, q = load_part(qkv_ptr, token, exists, at, HEAD, 0, 3)
    g_rows, g = load_part(grad_ptr, token, exists, at, HEAD)
    rows = statistics_offsets(token, at)
    lse = tl.load(lse_ptr + rows, mask=exists, other=float("inf"))  # padding has no gradient
    return q_rows, q, g_rows, g, lse, tl.load(mean_ptr + rows, mask=exists, other=0.0)
