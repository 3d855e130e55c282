"""Gradients of attention inside (shifted) windows: which kernels make them, and the totals of their partial sums.

If a window's rows of weights fit on the chip, one kernel does all. In float32 it leaves keys and values to another one,
because registers do not hold all. With larger windows or wide heads, queries and the table have kernels of their own.
The queries' kernel meets the keys twice: for the sums of weights, which the other kernels need, and with these sums.
The table's kernel has the gradient of the bias of a tile of queries and keys, summed over its windows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..core import heuristics
from ..core.heuristics import cdiv
from ..core.launch import launch
from .window_bwd_blocks import key_grads, key_tiles, query_grads, query_tiles, table_grads
from .window_bwd_whole import whole_windows_bwd
from .windows import WHOLE, Windows


@triton.jit
def _sum_columns(ptr, rows, stride, inside, BLOCK_S: tl.constexpr):
    """Returns the sums of the columns that ptr points to, over rows that lie stride apart, in a fixed order."""
    s = tl.arange(0, BLOCK_S)
    total = tl.zeros([BLOCK_S, ptr.shape[0]], ptr.dtype.element_ty)
    for start in range(0, rows, BLOCK_S):
        mask = (start + s < rows)[:, None] & inside[None, :]
        total += tl.load(ptr[None, :] + (start + s)[:, None].to(tl.int64) * stride, mask=mask, other=0.0)
    return tl.sum(total, 0)


@triton.jit
def _window_totals_kernel(
    table_partials_ptr,
    bias_partials_ptr,
    dtable_ptr,
    dbias_ptr,
    table_rows,
    bias_rows,
    T,
    heads,
    D,
    steps,
    BLOCK_S: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dtable [T, heads] from partials [rows, heads, T], dbias [3, heads, D] from partials [rows, heads, steps, 2, D].

    The keys' bias has a gradient of 0, or NaN if the queries' is NaN.
    """
    k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if tl.program_id(0) < tl.cdiv(heads * T, BLOCK):
        total = _sum_columns(table_partials_ptr + k, table_rows, heads * T, k < heads * T, BLOCK_S)
        tl.store(dtable_ptr + k % T * heads + k // T, total, mask=k < heads * T)
    else:
        k -= tl.cdiv(heads * T, BLOCK) * BLOCK
        inside = k < heads * D
        column_ptr = bias_partials_ptr + (k // D) * steps * 2 * D + k % D
        q = tl.zeros([BLOCK], dbias_ptr.dtype.element_ty)
        v = tl.zeros([BLOCK], dbias_ptr.dtype.element_ty)
        for step in range(steps):
            q += _sum_columns(column_ptr + step * 2 * D, bias_rows, heads * steps * 2 * D, inside, BLOCK_S)
            v += _sum_columns(column_ptr + (step * 2 + 1) * D, bias_rows, heads * steps * 2 * D, inside, BLOCK_S)
        tl.store(dbias_ptr + k, q, mask=inside)
        tl.store(dbias_ptr + heads * D + k, 0 * q, mask=inside)
        tl.store(dbias_ptr + 2 * heads * D + k, v, mask=inside)


def attend_windows_bwd(grad: torch.Tensor, x: Windows) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns (dqkv, dbias, dtable). If one kernel does all, it reads grad and qkv once and writes dqkv once."""
    groups, grid = x.shared()
    together = _all_in_one(x)
    dqkv = torch.empty_like(x.qkv)
    # Tiles of the smallest size; a kernel with larger tiles leaves zeros.
    tiles = 1 if together else max(x.tiles(*query_tiles(x))[1], x.tiles(*key_tiles(x))[1])
    sums = x.table.new_zeros((tiles, groups, x.heads, grid.steps, 2, x.head.D))
    lse, mean = (None, None) if together else x.table.new_empty((2, x.heads, *x.qkv.shape[:3])).unbind()
    statistics = lse, mean
    if together or (x.wide and x.tokens <= WHOLE and x.head.D <= 32):
        partials = whole_windows_bwd(grad, x, grid, groups, dqkv, statistics, sums)
    else:
        query_grads(grad, x, grid, groups, dqkv, statistics, sums)
        partials = table_grads(grad, x, statistics)
    if not together:
        key_grads(grad, x, grid, groups, dqkv, statistics, sums)
    return dqkv, *_totals(x, sums, partials)


def _all_in_one(x: Windows) -> bool:
    """True if registers hold all gradients of a window: those of heads of more than 32 channels in warps of 64."""
    return x.tokens <= WHOLE and not x.wide and (x.head.D <= 32 or heuristics.amd())


def _totals(x: Windows, sums: torch.Tensor, partials: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns dbias [3 C] and dtable [T, heads] from the programs' partials."""
    rows, heads, T = partials.shape
    tiles, groups, _, steps, _, D = sums.shape
    dbias = (sums.new_zeros if x.bias is None else sums.new_empty)(3 * heads * D)
    dtable, programs = sums.new_empty((T, heads)), cdiv(heads * T, 32)
    launch(
        _window_totals_kernel,
        programs if x.bias is None else programs + cdiv(heads * D, 32),
        partials,
        sums,
        dtable,
        dbias,
        rows,
        tiles * groups,
        T,
        heads,
        D,
        steps,
        BLOCK_S=32,
        BLOCK=32,
    )
    return dbias, dtable
