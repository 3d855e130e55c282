"""Gradients of attention inside (shifted) windows.

Where a window's rows of weights fit on the chip, one kernel does all. In float32 it leaves keys and values to another
one, as registers do not hold all; with larger windows, or wide heads, queries and the table have kernels of their own.
That of the queries meets keys twice: for the sums of their weights, which the other kernels need, and with them. That
of the table has the gradient of the bias of a tile of queries and keys, summed over its windows.
"""

from __future__ import annotations

import torch

from ..attention.window_bwd import (
    _backward_kernel,
    _keys_kernel,
    _queries_kernel,
    _table_kernel,
    _totals_kernel,
)
from ..attention.windows import WHOLE, Windows, prepare
from ..core import heuristics
from ..core.heuristics import cdiv
from ..core.launch import device_guard, launch


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
        groups, grid = x.shared()
        together = _together(x)
        whole = together or (x.wide and x.tokens <= WHOLE and x.head.D <= 32)
        programs, tensors = groups * heads, (grad.contiguous(), *x.tensors)
        (meta, parts), (of_keys, parts_of_keys) = x.tiles(*_of_queries(x)), x.tiles(*_of_keys(x))
        dqkv = torch.empty_like(x.qkv)
        # Of the smallest tiles; where a kernel has larger ones, zeros are left.
        tiles = 1 if together else max(parts, parts_of_keys)
        sums = x.table.new_zeros((tiles, groups, heads, grid.steps, 2, x.head.D))
        rows = (None, None) if together else x.table.new_empty((2, heads, *qkv.shape[:3])).unbind()
        if whole:
            tables = x.table.new_empty((groups, *x.table.shape))
            meta, _ = x.tiles(WHOLE, 0, _warps(x), ROWS=16)
            launch(_backward_kernel, programs, *tensors, dqkv, *rows, tables, sums, grid, **meta)
        else:
            launch(_queries_kernel, programs, *tensors, dqkv, *rows, sums, grid, **meta, parts=parts)
            meta, parts = x.tiles(*_of_pairs(x), ROWS=16)
            parts *= cdiv(x.tokens, meta["STEP"])
            groups, of_pairs = x.shared(parts)
            tables = x.table.new_empty((parts * groups, *x.table.shape))
            launch(_table_kernel, groups * heads, *tensors, *rows, tables, of_pairs, **meta, parts=parts)
        for which in [] if together else _passes(x):
            launch(_keys_kernel, programs, *tensors, dqkv, *rows, sums, grid, **of_keys, **which, parts=parts_of_keys)
        return dqkv, *_totals(x, sums, tables)


def _totals(x: Windows, sums: torch.Tensor, tables: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """dbias [3 C] and dtable [T, heads] from what programs have of them."""
    parts, heads, T = tables.shape
    tiles, groups, _, steps, _, D = sums.shape
    dbias = (sums.new_zeros if x.bias is None else sums.new_empty)(3 * heads * D)
    dtable, programs = sums.new_empty((T, heads)), cdiv(heads * T, 32)
    launch(
        _totals_kernel, programs if x.bias is None else programs + cdiv(heads * D, 32), tables, sums, dtable, dbias,
        parts, tiles * groups, T, heads, D, steps, BLOCK_S=32, BLOCK=32,
    )  # fmt: skip
    return dbias, dtable


def _together(x: Windows) -> bool:
    """Whether registers hold all gradients of a window: of heads of more than 32 channels where warps are of 64."""
    return x.tokens <= WHOLE and not x.wide and (x.head.D <= 32 or heuristics.amd())


def _warps(x: Windows) -> int:
    """Twice the threads for warps of 32: all is to be in registers."""
    return (8 if x.wide else 4) * (1 if heuristics.amd() else 2)


def _passes(x: Windows) -> list[dict[str, bool]]:
    """Of the kernel of keys: one for each gradient where registers do not hold the sums of both."""
    if x.wide and x.head.D > 64:
        return [{"DK": True, "DV": False}, {"DK": False, "DV": True}]
    return [{"DK": True, "DV": True}]


# BLOCK, STEP and warps: as much as registers hold on every target, and mostly 16 bytes a load of each thread.


def _of_queries(x: Windows) -> tuple[int, int, int]:
    D = x.head.D
    if x.wide:
        return (64, 32, 8) if D <= 64 else (16, 32, 4)
    if D > 64:
        return 32, 32, 8
    if heuristics.amd():
        return (64, 64, 4) if D <= 32 else (64, 32, 4)
    return 64, 32, 8


def _of_keys(x: Windows) -> tuple[int, int, int]:
    D = x.head.D
    if x.wide and D > 32:
        return (32, 16, 8) if D <= 64 else (64, 16, 8)
    if heuristics.amd():
        return (32, 32, 4) if x.wide else (64, 64, 4) if D <= 32 else (64, 32, 4)
    return (64, 16, 8) if x.wide else (64, 32, 4) if D <= 32 else (32, 32, 8)


def _of_pairs(x: Windows) -> tuple[int, int, int]:
    D = x.head.D
    if x.wide:
        return (64, 32, 8) if D <= 64 else (32, 32, 4)
    masked = x.tokens % 16 != 0  # tiles that are masked take registers for it
    return (32 if masked and D > 64 else 64), 32, (8 if masked or D > 64 else 4)
