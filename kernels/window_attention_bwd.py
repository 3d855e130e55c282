"""Gradients of attention inside (shifted) windows.

Where a window's rows of weights fit on the chip, one kernel does all. In float32 it leaves keys and values to another
one, as registers do not hold all; in larger windows queries and the table have kernels of their own, too. That of the
queries meets keys twice: for the sums of their weights, which the other kernels need, and with them. That of the table
has the gradient of the bias of a tile of queries and keys, summed over its windows.
"""

from __future__ import annotations

from typing import Any

import torch

from . import _heuristics
from ._heuristics import cdiv, next_power_of_2
from ._launch import device_guard, launch
from ._window_attention_bwd_kernels import _backward_kernel, _keys_kernel, _queries_kernel, _table_kernel
from ._windows import WHOLE, Windows, prepare


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
        whole = together or (x.wide and x.tokens <= WHOLE)
        programs, tensors = groups * heads, (grad.contiguous(), *x.tensors)
        dqkv = torch.empty_like(x.qkv)
        # Of the smallest tiles; where a kernel has larger ones, zeros are left.
        dbias = x.table.new_zeros((1 if together else cdiv(x.tokens, 32), groups, heads, grid.steps, 2, x.head.D))
        rows = (None, None) if together else x.table.new_empty((2, heads, *qkv.shape[:3])).unbind()
        if whole:
            dtable = x.table.new_empty((groups, *x.table.shape))
            meta = x.meta | _whole(x)
            launch(_backward_kernel, programs, *tensors, dqkv, *rows, dtable, dbias, grid, **meta)
        else:
            meta, parts = _tiles(x, _of_queries(x))
            launch(_queries_kernel, programs, *tensors, dqkv, *rows, dbias, grid, **meta, parts=parts)
            meta, parts = _tiles(x, _of_pairs(x))
            parts *= cdiv(x.tokens, meta["STEP"])
            groups, of_pairs = x.shared(parts)
            dtable = x.table.new_empty((parts * groups, *x.table.shape))
            launch(_table_kernel, groups * heads, *tensors, *rows, dtable, of_pairs, **meta, ROWS=16, parts=parts)
        if not together:
            meta, parts = _tiles(x, _of_keys(x))
            launch(_keys_kernel, programs, *tensors, dqkv, *rows, dbias, grid, **meta, parts=parts)
        q, v = dbias.sum((0, 1, 3)).unbind(1) if bias is not None else dbias.new_zeros(2, heads, x.head.D)
        return dqkv, torch.stack([q, 0 * q, v]).flatten(), dtable.sum(0).t().contiguous()  # 0 * q: NaN stays


def _together(x: Windows) -> bool:
    """Whether registers hold all gradients of a window: of heads of more than 32 channels where warps are of 64."""
    return x.tokens <= WHOLE and not x.wide and (x.head.D <= 32 or _heuristics.amd())


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
    return (64, 64, 4 if _heuristics.amd() else 8) if x.head.D <= 32 else (64, 32, 4)


def _of_keys(x: Windows) -> tuple[int, int, int]:
    if _heuristics.amd():
        return (32, 32, 4) if x.wide else (64, 64, 4) if x.head.D <= 32 else (64, 32, 4)
    return (64, 16, 8) if x.wide else (64, 32, 4) if x.head.D <= 32 else (32, 32, 8)


def _of_pairs(x: Windows) -> tuple[int, int, int]:
    return (64, 32, 8) if x.wide else (64, 64, 4) if x.head.D <= 32 else (64, 32, 4)
