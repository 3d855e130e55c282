"""Attention inside (shifted) windows: a program takes one head of several windows.

Shift, partition, biases, seams and padding are addresses. A window's rows of weights fit on the chip: there is no
running maximum, and nothing is kept for the backward pass. Logits are in powers of two. Where a window is one tile of
queries, one backward kernel does all; else, and in float32, one takes tiles of queries, with the table's gradient, and
one takes all keys. Of windows of more than 64 tokens some variants spill registers.

A bias of all keys changes a query's logits alike, and so no weight. One of all values is added to the result, since
weights sum to one, and changes no logit's gradient. So there is none to read but the queries', and in the forward
kernel the values'.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from . import _heuristics
from ._heuristics import cdiv, next_power_of_2
from ._launch import device_guard, launch
from ._layout import accumulation_dtype
from ._product import dot, product

LOG2E = tl.constexpr(1.4426950408889634)
APART = tl.constexpr(-100 * 1.4426950408889634)  # as Swin adds it across a seam
WHOLE = 64  # tokens of a window, at most, that are one tile of queries
LARGEST = 256  # tokens of a window that the kernels hold
PROGRAMS = 512  # at least, where there are so many windows
MOST_WINDOWS = 8  # that a program takes one after the other


@triton.jit
def _source(p, size, cycle, roll, PAD_FIRST: tl.constexpr):
    """The row, or column, that is at position p, and whether there is one."""
    at = p + roll
    at -= tl.where(at >= cycle, cycle, 0)
    return at, (at if PAD_FIRST else p) < size


@triton.jit
def _run(
    steps, heads, N, down, across, inner_h, inner_w, start_1, start_2, start_3, shift_h, shift_w, WH: tl.constexpr,
    WW: tl.constexpr,
):  # fmt: skip
    """This program's head, its first window and the one behind its last, and what these have in common.

    Windows of four kinds are counted each by themselves: those without a seam, in the last row, in the last column, and
    in both. Of a kind: windows along H and W in an image, the first of them, and where in a window the seams are.
    """
    group = tl.program_id(0) // heads
    kind = tl.where(group < start_1, 0, tl.where(group < start_2, 1, tl.where(group < start_3, 2, 3)))
    start = tl.where(kind == 0, 0, tl.where(kind == 1, start_1, tl.where(kind == 2, start_2, start_3)))
    last_h = (kind == 1) | (kind == 3)
    last_w = kind >= 2
    rows = tl.where(last_h, 1, inner_h)
    columns = tl.where(last_w, 1, inner_w)
    row = tl.where(last_h, down - 1, 0)
    column = tl.where(last_w, across - 1, 0)
    seam_h = tl.where(last_h, WH - shift_h, WH)
    seam_w = tl.where(last_w, WW - shift_w, WW)
    first = (group - start) * steps
    last = tl.minimum(first + steps, N * rows * columns)
    return tl.program_id(0) % heads, first, last, rows, columns, row, column, seam_h, seam_w


@triton.jit
def _corner(window, rows, columns, row, column, H, W, WH: tl.constexpr, WW: tl.constexpr):
    """The tokens of the images before a window's (int64), and its first position along H and W."""
    at = window % (rows * columns)
    n = (window // (rows * columns)).to(tl.int64) * H * W
    return n, (row + at // columns) * WH, (column + at % columns) * WW


@triton.jit
def _places(
    i, h, w, H, W, cycle_h, cycle_w, roll_h, roll_w, WH: tl.constexpr, WW: tl.constexpr, PAD_FIRST: tl.constexpr
):  # fmt: skip
    """Of places i of a window: their tokens, counted from the image's first, and whether there are such."""
    h, there_h = _source(h + i // WW, H, cycle_h, roll_h, PAD_FIRST)
    w, there_w = _source(w + i % WW, W, cycle_w, roll_w, PAD_FIRST)
    return h.to(tl.int64) * W + w, (i < WH * WW) & there_h & there_w


@triton.jit
def _tile(token, there, stride, D: tl.constexpr, ALIGN: tl.constexpr, BLOCK_D: tl.constexpr):
    """Offsets (int64) and mask, [tokens, BLOCK_D]."""
    d = tl.arange(0, BLOCK_D)
    offsets = tl.multiple_of(token[:, None] * stride + d[None, :], [1, ALIGN])
    return offsets, tl.max_constancy(there[:, None] & (d < D)[None, :], [1, ALIGN])


@triton.jit
def _load(ptr, token, there, stride, D: tl.constexpr, ALIGN: tl.constexpr, BLOCK_D: tl.constexpr):
    """Queries, keys or values [places, BLOCK_D]; zeros where there is no token.

    So it is past a window's last place, too: there they are weighed by zero.
    """
    offsets, mask = _tile(token, there, stride, D, ALIGN, BLOCK_D)
    return tl.load(ptr + offsets, mask=mask, other=0.0)


@triton.jit
def _load_bias(bias_ptr, acc_ty: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Of queries, or of values: [BLOCK_D]."""
    d = tl.arange(0, BLOCK_D)
    return tl.load(bias_ptr + d, mask=d < D, other=0.0).to(acc_ty)


@triton.jit
def _positions(table_ptr, i, j, seam_h, seam_w, WH: tl.constexpr, WW: tl.constexpr, SEAM: tl.constexpr):
    """[queries, keys], 100 less where a seam lies between them; -inf where there is no key."""
    row = (i // WW)[:, None] - (j // WW)[None, :] + WH - 1
    column = (i % WW)[:, None] - (j % WW)[None, :] + WW - 1
    keys = (j < WH * WW)[None, :]
    mask = (i < WH * WW)[:, None] & keys
    bias = tl.load(table_ptr + row * (2 * WW - 1) + column, mask=mask, other=0.0)
    if SEAM:
        apart = (i // WW >= seam_h)[:, None] != (j // WW >= seam_h)[None, :]
        apart |= (i % WW >= seam_w)[:, None] != (j % WW >= seam_w)[None, :]
        bias += tl.where(apart, APART, 0.0)
    return tl.where(keys, bias, -float("inf"))


@triton.jit
def _weights(q, k, bias_q, bias, SCALE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """The softmax of each query's logits; what its bias [BLOCK_D] adds to them depends on the key alone."""
    logits = dot(q, tl.trans(k), tl.zeros(bias.shape, bias.dtype), DOT, PRECISION) * SCALE + bias
    if bias_q is not None:
        logits += (tl.sum(k.to(bias.dtype) * bias_q[None, :], 1) * SCALE)[None, :]
    p = tl.exp2(logits - tl.max(logits, 1)[:, None])
    return p * (1 / tl.sum(p, 1))[:, None]


@triton.jit
def _logit_gradients(p, v, g, DOT: tl.constexpr, PRECISION: tl.constexpr):
    dp = dot(g, tl.trans(v), tl.zeros(p.shape, p.dtype), DOT, PRECISION)
    return p * (dp - tl.sum(p * dp, 1)[:, None])


@triton.jit
def _store_table(parts_ptr, dbias, start, WH: tl.constexpr, WW: tl.constexpr, ROWS: tl.constexpr):
    """The table's gradient [T] from that of the bias of queries from ``start`` on, [queries, keys].

    Every row of the table belongs to one query, or none, of each key: it is gathered, and summed in a fixed order.
    """
    T: tl.constexpr = (2 * WH - 1) * (2 * WW - 1)
    QUERIES: tl.constexpr = dbias.shape[0]
    j = tl.arange(0, dbias.shape[1])
    for first in range(0, T, ROWS):
        r = first + tl.arange(0, ROWS)
        h = (j // WW)[None, :] + (r // (2 * WW - 1) - WH + 1)[:, None]
        w = (j % WW)[None, :] + (r % (2 * WW - 1) - WW + 1)[:, None]
        i = h * WW + w - start
        valid = (h >= 0) & (h < WH) & (w >= 0) & (w < WW) & (j < WH * WW)[None, :] & (i >= 0) & (i < QUERIES)
        given = tl.gather(dbias, tl.where(valid, i, 0), 0)
        tl.store(parts_ptr + r, tl.sum(tl.where(valid, given, 0.0), 1), mask=r < T)


@triton.jit
def _forward_kernel(
    qkv_ptr, bias_ptr, table_ptr, out_ptr, steps, heads, N, down, across,
    inner_h, inner_w, start_1, start_2, start_3, shift_h, shift_w, H, W, cycle_h, cycle_w, roll_h, roll_w,
    SCALE: tl.constexpr,
    WH: tl.constexpr, WW: tl.constexpr, PAD_FIRST: tl.constexpr, SEAM: tl.constexpr, D: tl.constexpr,
    ALIGN: tl.constexpr, BLOCK_D: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, KEYS: tl.constexpr,
    QUERIES: tl.constexpr,
):  # fmt: skip
    """out [N, H, W, heads, d]."""
    L: tl.constexpr = WH * WW
    head, first, last, rows, columns, row, column, seam_h, seam_w = _run(
        steps, heads, N, down, across, inner_h, inner_w, start_1, start_2, start_3, shift_h, shift_w, WH, WW
    )
    C = heads * D
    table_ptr += head * (2 * WH - 1) * (2 * WW - 1)
    qkv_ptr += head * D
    bias_q = None
    if bias_ptr is not None:
        bias_ptr += head * D
        bias_q = _load_bias(bias_ptr, table_ptr.dtype.element_ty, D, BLOCK_D)
    j = tl.arange(0, KEYS)
    i = tl.arange(0, QUERIES)
    bias = _positions(table_ptr, i, j, seam_h, seam_w, WH, WW, SEAM)
    for window in range(first, last):
        n, h, w = _corner(window, rows, columns, row, column, H, W, WH, WW)
        token, there = _places(j, h, w, H, W, cycle_h, cycle_w, roll_h, roll_w, WH, WW, PAD_FIRST)
        k = _load(qkv_ptr + n * 3 * C + C, token, there, 3 * C, D, ALIGN, BLOCK_D)
        v = _load(qkv_ptr + n * 3 * C + 2 * C, token, there, 3 * C, D, ALIGN, BLOCK_D)
        for start in range(0, L, QUERIES):
            if QUERIES < L:
                i = start + tl.arange(0, QUERIES)
                bias = _positions(table_ptr, i, j, seam_h, seam_w, WH, WW, SEAM)
            token_q, there_q = _places(i, h, w, H, W, cycle_h, cycle_w, roll_h, roll_w, WH, WW, PAD_FIRST)
            q = _load(qkv_ptr + n * 3 * C, token_q, there_q, 3 * C, D, ALIGN, BLOCK_D)
            p = _weights(q, k, bias_q, bias, SCALE, DOT, PRECISION)
            out = dot(p, v, tl.zeros([QUERIES, BLOCK_D], bias.dtype), DOT, PRECISION)
            if bias_ptr is not None:
                out += _load_bias(bias_ptr + 2 * C, bias.dtype, D, BLOCK_D)[None, :]
            offsets, mask = _tile(token_q, there_q, C, D, ALIGN, BLOCK_D)
            tl.store(out_ptr + n * C + head * D + offsets, out, mask=mask)


@triton.jit
def _store_gradient(
    ptr, dbias_ptr, tile, token, there, stride, D: tl.constexpr, ALIGN: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """Of queries, keys or values [places, BLOCK_D], and their sum [d], padding's too, where it is asked for."""
    offsets, mask = _tile(token, there, stride, D, ALIGN, BLOCK_D)
    tl.store(ptr + offsets, tile, mask=mask)
    if dbias_ptr is not None:
        d = tl.arange(0, BLOCK_D)
        tl.store(dbias_ptr + d, tl.sum(tile, 0), mask=d < D)


@triton.jit
def _sums(dbias_ptr, of, steps, D: tl.constexpr):
    """Where those of a program's window number ``of`` go, in [tiles, groups, heads, steps, 2, d]."""
    part = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    return dbias_ptr + (part.to(tl.int64) * steps + of) * 2 * D


@triton.jit
def _backward_kernel(
    grad_ptr, qkv_ptr, bias_ptr, table_ptr, dqkv_ptr, dtable_ptr, dbias_ptr, steps, heads, N, down, across,
    inner_h, inner_w, start_1, start_2, start_3, shift_h, shift_w, H, W, cycle_h, cycle_w, roll_h, roll_w,
    SCALE: tl.constexpr,
    WH: tl.constexpr, WW: tl.constexpr, PAD_FIRST: tl.constexpr, SEAM: tl.constexpr, D: tl.constexpr,
    ALIGN: tl.constexpr, BLOCK_D: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, KEYS: tl.constexpr,
    QUERIES: tl.constexpr, ROWS: tl.constexpr, OTHERS: tl.constexpr,
):  # fmt: skip
    """dqkv [N, H, W, 3, heads, d], and sums: dtable [tiles, groups, heads, T], dbias as `_sums` says.

    A program along the second axis of the grid takes one tile of queries. Only with OTHERS, where there is one tile, it
    has gradients of keys and values, too.
    """
    T: tl.constexpr = (2 * WH - 1) * (2 * WW - 1)
    acc_ty: tl.constexpr = dtable_ptr.dtype.element_ty
    head, first, last, rows, columns, row, column, seam_h, seam_w = _run(
        steps, heads, N, down, across, inner_h, inner_w, start_1, start_2, start_3, shift_h, shift_w, WH, WW
    )
    C = heads * D
    qkv_ptr += head * D
    dqkv_ptr += head * D
    grad_ptr += head * D
    bias_q = None
    if bias_ptr is not None:
        bias_q = _load_bias(bias_ptr + head * D, acc_ty, D, BLOCK_D)
    j = tl.arange(0, KEYS)
    own = tl.program_id(1) * QUERIES
    i = own + tl.arange(0, QUERIES)
    bias = _positions(table_ptr + head * T, i, j, seam_h, seam_w, WH, WW, SEAM)
    dposition = tl.zeros([QUERIES, KEYS], acc_ty)
    for window in range(first, last):
        n, h, w = _corner(window, rows, columns, row, column, H, W, WH, WW)
        token, there = _places(j, h, w, H, W, cycle_h, cycle_w, roll_h, roll_w, WH, WW, PAD_FIRST)
        k = _load(qkv_ptr + n * 3 * C + C, token, there, 3 * C, D, ALIGN, BLOCK_D)
        v = _load(qkv_ptr + n * 3 * C + 2 * C, token, there, 3 * C, D, ALIGN, BLOCK_D)
        token_q, there_q = token, there
        if OTHERS == 0:
            token_q, there_q = _places(i, h, w, H, W, cycle_h, cycle_w, roll_h, roll_w, WH, WW, PAD_FIRST)
        q = _load(qkv_ptr + n * 3 * C, token_q, there_q, 3 * C, D, ALIGN, BLOCK_D)
        g = _load(grad_ptr + n * C, token_q, there_q, C, D, ALIGN, BLOCK_D)
        to = dqkv_ptr + n * 3 * C
        sums_ptr = _sums(dbias_ptr, window - first, steps, D)
        p = _weights(q, k, bias_q, bias, SCALE, DOT, PRECISION)
        if OTHERS:  # before the logits' gradient: it and the weights are many registers
            dv = dot(tl.trans(p.to(DOT)), g, tl.zeros([KEYS, BLOCK_D], acc_ty), DOT, PRECISION)
            _store_gradient(to + 2 * C, sums_ptr + D, dv, token, there, 3 * C, D, ALIGN, BLOCK_D)
        ds = _logit_gradients(p, v, g, DOT, PRECISION)
        dposition += ds
        dq = dot(ds, k, tl.zeros([QUERIES, BLOCK_D], acc_ty), DOT, PRECISION) * (SCALE / LOG2E)
        _store_gradient(to, sums_ptr, dq, token_q, there_q, 3 * C, D, ALIGN, BLOCK_D)
        if OTHERS:
            dk = dot(tl.trans(ds.to(DOT)), q, tl.zeros([KEYS, BLOCK_D], acc_ty), DOT, PRECISION)
            if bias_q is not None:
                dk += tl.sum(ds, 0)[:, None] * bias_q[None, :]
            dk *= SCALE / LOG2E
            _store_gradient(to + C, None, dk, token, there, 3 * C, D, ALIGN, BLOCK_D)
    part = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    _store_table(dtable_ptr + part.to(tl.int64) * T, dposition, own, WH, WW, ROWS)


@triton.jit
def _keys_kernel(
    grad_ptr, qkv_ptr, bias_ptr, table_ptr, dqkv_ptr, dbias_ptr, steps, heads, N, down, across,
    inner_h, inner_w, start_1, start_2, start_3, shift_h, shift_w, H, W, cycle_h, cycle_w, roll_h, roll_w,
    SCALE: tl.constexpr,
    WH: tl.constexpr, WW: tl.constexpr, PAD_FIRST: tl.constexpr, SEAM: tl.constexpr, D: tl.constexpr,
    ALIGN: tl.constexpr, BLOCK_D: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, KEYS: tl.constexpr,
    QUERIES: tl.constexpr,
):  # fmt: skip
    """As _backward_kernel, of keys and values alone: all tiles of queries one after the other."""
    L: tl.constexpr = WH * WW
    acc_ty: tl.constexpr = table_ptr.dtype.element_ty
    head, first, last, rows, columns, row, column, seam_h, seam_w = _run(
        steps, heads, N, down, across, inner_h, inner_w, start_1, start_2, start_3, shift_h, shift_w, WH, WW
    )
    C = heads * D
    qkv_ptr += head * D
    dqkv_ptr += head * D
    grad_ptr += head * D
    table_ptr += head * (2 * WH - 1) * (2 * WW - 1)
    bias_q = None
    if bias_ptr is not None:
        bias_q = _load_bias(bias_ptr + head * D, acc_ty, D, BLOCK_D)
    j = tl.arange(0, KEYS)
    for window in range(first, last):
        n, h, w = _corner(window, rows, columns, row, column, H, W, WH, WW)
        token, there = _places(j, h, w, H, W, cycle_h, cycle_w, roll_h, roll_w, WH, WW, PAD_FIRST)
        k = _load(qkv_ptr + n * 3 * C + C, token, there, 3 * C, D, ALIGN, BLOCK_D)
        v = _load(qkv_ptr + n * 3 * C + 2 * C, token, there, 3 * C, D, ALIGN, BLOCK_D)
        dk = tl.zeros([KEYS, BLOCK_D], acc_ty)
        dv = tl.zeros([KEYS, BLOCK_D], acc_ty)
        dlogits = tl.zeros([KEYS], acc_ty)
        for start in range(0, L, QUERIES):
            i = start + tl.arange(0, QUERIES)
            token_q, there_q = _places(i, h, w, H, W, cycle_h, cycle_w, roll_h, roll_w, WH, WW, PAD_FIRST)
            q = _load(qkv_ptr + n * 3 * C, token_q, there_q, 3 * C, D, ALIGN, BLOCK_D)
            g = _load(grad_ptr + n * C, token_q, there_q, C, D, ALIGN, BLOCK_D)
            bias = _positions(table_ptr, i, j, seam_h, seam_w, WH, WW, SEAM)
            p = _weights(q, k, bias_q, bias, SCALE, DOT, PRECISION)
            dv = dot(tl.trans(p.to(DOT)), g, dv, DOT, PRECISION)
            ds = _logit_gradients(p, v, g, DOT, PRECISION)
            dk = dot(tl.trans(ds.to(DOT)), q, dk, DOT, PRECISION)
            dlogits += tl.sum(ds, 0)
        if bias_ptr is not None:
            bias_q = _load_bias(bias_ptr + head * D, acc_ty, D, BLOCK_D)
            dk += dlogits[:, None] * bias_q[None, :]
        dk *= SCALE / LOG2E
        sums_ptr = _sums(dbias_ptr, window - first, steps, D)
        to = dqkv_ptr + n * 3 * C
        _store_gradient(to + C, None, dk, token, there, 3 * C, D, ALIGN, BLOCK_D)
        _store_gradient(to + 2 * C, sums_ptr + D, dv, token, there, 3 * C, D, ALIGN, BLOCK_D)


class _Launch(NamedTuple):
    """What both directions give their kernels."""

    qkv: torch.Tensor
    bias: torch.Tensor | None
    table: torch.Tensor  # [heads, T]
    groups: int
    scalars: tuple[int, ...]
    meta: dict[str, Any]

    @property
    def heads(self) -> int:
        return self.table.shape[0]

    @property
    def tiles(self) -> int:
        """Of queries."""
        return cdiv(self.meta["WH"] * self.meta["WW"], self.meta["QUERIES"])


def _prepare(qkv, bias, table, heads, window_h, window_w, shift_h, shift_w, scale, pad_first) -> _Launch:
    N, H, W, channels = qkv.shape
    D, L = channels // 3 // heads, window_h * window_w
    down, across = cdiv(H, window_h), cdiv(W, window_w)
    windows = N * down * across
    steps = max(min(windows * heads // PROGRAMS, MOST_WINDOWS), 1)
    padded = H % window_h != 0 or W % window_w != 0
    wide = qkv.itemsize > 2
    keys = max(next_power_of_2(L), 16)
    queries = keys if L <= WHOLE else 16
    warps = 4 if L <= WHOLE and not wide else 8
    meta = {
        "SCALE": scale * LOG2E.value,
        "WH": window_h,
        "WW": window_w,
        "PAD_FIRST": int(bool(pad_first)),
        "SEAM": int(shift_h > 0 or shift_w > 0),
        "D": D,
        "ALIGN": (D | 16) & -(D | 16),
        "BLOCK_D": max(next_power_of_2(D), 16),
        **product(qkv, qkv),
        **({"PRECISION": "ieee"} if qkv.dtype == torch.float32 else {}),  # bfloat16 parts are more than registers hold
        "KEYS": keys,
        "QUERIES": queries,
        "num_warps": warps,
        "num_stages": 2 if padded else 1,  # loads ahead, where there are registers for them
    }
    ready = (table.to(accumulation_dtype(qkv)) * LOG2E.value).t().contiguous()
    bias = None if bias is None else bias.to(qkv.dtype).contiguous()  # wider it takes too many registers
    inner = (down - (shift_h > 0), across - (shift_w > 0))
    starts = [0]
    for rows, columns in (inner, (down - inner[0], inner[1]), (inner[0], across - inner[1])):
        starts.append(starts[-1] + cdiv(N * rows * columns, steps))
    groups = starts[-1] + cdiv(N * (down - inner[0]) * (across - inner[1]), steps)
    cycle = (down * window_h, across * window_w) if pad_first else (H, W)
    roll = (shift_h % cycle[0], shift_w % cycle[1])
    scalars = (steps, heads, N, down, across, *inner, *starts[1:], shift_h, shift_w, H, W, *cycle, *roll)
    return _Launch(qkv.contiguous(), bias, ready, groups, scalars, meta)


def _check_size(window_h: int, window_w: int) -> None:
    if window_h * window_w > LARGEST:
        raise ValueError(f"the Triton kernels are for windows of up to {LARGEST} tokens, got {window_h} x {window_w}")


def window_attention_fwd(
    qkv: torch.Tensor, bias: torch.Tensor | None, table: torch.Tensor, heads: int, window_h: int, window_w: int,
    shift_h: int, shift_w: int, scale: float, pad_first: int,
) -> torch.Tensor:  # fmt: skip
    """See `visattn_fast.ops.window_attention`. Reads qkv once and writes out once.

    Raises:
        ValueError: windows of more than 256 tokens.
    """
    _check_size(window_h, window_w)
    with device_guard(qkv):
        x = _prepare(qkv, bias, table, heads, window_h, window_w, shift_h, shift_w, scale, pad_first)
        out = torch.empty((*qkv.shape[:3], qkv.shape[3] // 3), dtype=qkv.dtype, device=qkv.device)
        launch(_forward_kernel, x.groups * heads, x.qkv, x.bias, x.table, out, *x.scalars, **x.meta)
        return out


def window_attention_bwd(
    grad: torch.Tensor, qkv: torch.Tensor, bias: torch.Tensor | None, table: torch.Tensor, heads: int, window_h: int,
    window_w: int, shift_h: int, shift_w: int, scale: float, pad_first: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """See `visattn_fast.ops.window_attention`. Windows of up to 64 tokens: reads grad and qkv once, writes dqkv once.

    Raises:
        ValueError: windows of more than 256 tokens.
    """
    _check_size(window_h, window_w)
    with device_guard(qkv):
        x = _prepare(qkv, bias, table, heads, window_h, window_w, shift_h, shift_w, scale, pad_first)
        D, programs, acc = x.meta["D"], x.groups * heads, x.table.dtype
        grad, dqkv = grad.contiguous(), torch.empty_like(x.qkv)
        dtable = torch.empty((x.tiles * x.groups, *x.table.shape), dtype=acc, device=qkv.device)
        together = x.tiles == 1 and qkv.itemsize <= 2  # what one kernel's registers hold
        dbias = torch.zeros((x.tiles * x.groups, x.heads, x.scalars[0], 2, D), dtype=acc, device=qkv.device)
        tensors = (grad, x.qkv, x.bias, x.table, dqkv)
        # Twice the threads where whole windows and warps of 32 meet, few queries at a time: all is to be in registers.
        more = x.tiles == 1 and not _heuristics.amd()
        meta = x.meta | {"num_warps": x.meta["num_warps"] * (1 + more)}
        launch(
            _backward_kernel, programs, *tensors, dtable, dbias, *x.scalars, **meta, ROWS=16, OTHERS=int(together),
            parts=x.tiles,
        )  # fmt: skip
        if not together:
            launch(_keys_kernel, programs, *tensors, dbias, *x.scalars, **meta | {"QUERIES": 16})
        q, v = dbias.sum((0, 2)).unbind(1) if bias is not None else dbias.new_zeros(2, x.heads, D)
        return dqkv, torch.stack([q, 0 * q, v]).flatten(), dtable.sum(0).t().contiguous()  # 0 * q: NaN stays
