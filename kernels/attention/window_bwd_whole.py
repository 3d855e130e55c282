"""Gradients of attention inside windows whose rows of weights fit on the chip: one kernel does all, or most."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..core import heuristics
from ..core.launch import launch
from ..core.product import add_product
from .tiles import pairs, zero_rows
from .window_grads import statistics_offsets, store_gradient, store_table, window_sums
from .window_tiles import Grid, bias_logits, corner, load_bias, load_part, logits, places, positions, this_run
from .windows import WHOLE, Windows


@triton.jit
def _window_backward_kernel(
    grad_ptr,
    qkv_ptr,
    bias_ptr,
    table_ptr,
    dqkv_ptr,
    lse_ptr,
    mean_ptr,
    dtable_ptr,
    dbias_ptr,
    grid,
    HEAD: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """dqkv [N, H, W, 3, heads, d], and sums: dtable as in `store_table`, dbias as in `window_sums`.

    With lse_ptr it leaves out the gradients of keys and values, and stores lse and mean as `_window_queries_kernel`.
    """
    run = this_run(grid, WINDOW)
    bias_q = load_bias(bias_ptr, run, HEAD)
    i = tl.arange(0, BLOCK)
    bias = positions(table_ptr, i[:, None], i[None, :], run, WINDOW)
    dposition = tl.zeros([BLOCK, BLOCK], HEAD.ACC)
    for window in range(run.first, run.last):
        at = corner(window, run, WINDOW)
        token, exists = places(i, at, WINDOW)
        k_rows, k = load_part(qkv_ptr, token, exists, at, HEAD, 1, 3)
        v_rows, v = load_part(qkv_ptr, token, exists, at, HEAD, 2, 3)
        q_rows, q = load_part(qkv_ptr, token, exists, at, HEAD, 0, 3)
        g_rows, g = load_part(grad_ptr, token, exists, at, HEAD)
        sums_ptr = window_sums(dbias_ptr, window, run, HEAD)
        s = logits(pairs(q_rows, q, k_rows, k, HEAD), bias_logits(k, bias_q, HEAD), bias, HEAD)
        top = tl.max(s, 1)
        p = tl.exp2(s - top[:, None])
        count = tl.sum(p, 1)
        p *= (1 / count)[:, None]
        zeros = zero_rows(BLOCK, HEAD)
        if lse_ptr is None:  # before the logits' gradient, which takes many registers beside the weights
            dv = add_product(tl.trans(p.to(HEAD.DOT)), g, zeros, HEAD)
            store_gradient(dqkv_ptr, sums_ptr + HEAD.D, dv, token, exists, at, HEAD, 2)
        dp = pairs(g_rows, g, v_rows, v, HEAD)
        mean = tl.sum(p * dp, 1)
        ds = p * (dp - mean[:, None])
        dposition += ds
        dq = add_product(ds, k, zeros, HEAD) * HEAD.SCALE
        store_gradient(dqkv_ptr, sums_ptr, dq, token, exists, at, HEAD, 0)
        if lse_ptr is None:
            dk = add_product(tl.trans(ds.to(HEAD.DOT)), q, zeros, HEAD)
            if bias_q is not None:
                dk += tl.sum(ds, 0)[:, None] * bias_q[None, :]
            store_gradient(dqkv_ptr, None, dk * HEAD.SCALE, token, exists, at, HEAD, 1)
        else:
            rows = statistics_offsets(token, at)
            tl.store(lse_ptr + rows, top + tl.log2(count), mask=exists)
            tl.store(mean_ptr + rows, mean, mask=exists)
    store_table(dtable_ptr, dposition, 0, i, WINDOW, ROWS)


def _warps(x: Windows) -> int:
    """Returns the warps; warps of 32 are twice as many, because everything is to be in registers."""
    return (8 if x.wide else 4) * (1 if heuristics.amd() else 2)


def whole_windows_bwd(
    grad: torch.Tensor,
    x: Windows,
    grid: Grid,
    groups: int,
    dqkv: torch.Tensor,
    statistics: tuple[torch.Tensor | None, torch.Tensor | None],
    sums: torch.Tensor,
) -> torch.Tensor:
    """Writes dqkv and the biases' sums; returns partials of the table's gradient [groups, heads, T].

    With statistics, that is lse and mean, it writes these instead of the gradients of keys and values.
    """
    partials = x.table.new_empty((groups, *x.table.shape))
    meta, _ = x.tiles(WHOLE, 0, _warps(x), ROWS=16)
    tensors = (grad, x.qkv, x.bias, x.table, dqkv, *statistics, partials, sums)
    launch(_window_backward_kernel, groups * x.heads, *tensors, grid, **meta)
    return partials
