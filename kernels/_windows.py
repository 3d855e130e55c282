"""Pieces of the kernels of attention inside (shifted) windows: a program takes one head of several windows.

Shift, partition, biases, seams and padding are addresses. Logits are in powers of two.

A bias of all keys changes a query's logits alike, and so no weight. One of all values is added to the result, since
weights sum to one, and changes no logit's gradient. So there is none to read but the queries', and in the forward
kernel the values'.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ._attention import LOG2E, finite_or_zero, place
from ._heuristics import cdiv, next_power_of_2
from ._layout import accumulation_dtype
from ._product import product

APART = tl.constexpr(-100 * 1.4426950408889634)  # as Swin adds it across a seam
WHOLE = 64  # tokens of a window, at most, whose rows of weights fit on the chip
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
def run(
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
def corner(window, rows, columns, row, column, H, W, WH: tl.constexpr, WW: tl.constexpr):
    """The tokens of the images before a window's (int64), and its first position along H and W."""
    at = window % (rows * columns)
    n = (window // (rows * columns)).to(tl.int64) * H * W
    return n, (row + at // columns) * WH, (column + at % columns) * WW


@triton.jit
def places(
    i, h, w, H, W, cycle_h, cycle_w, roll_h, roll_w, WH: tl.constexpr, WW: tl.constexpr, PAD_FIRST: tl.constexpr
):  # fmt: skip
    """Of places i of a window: their tokens, counted from the image's first, and whether there are such."""
    h, there_h = _source(h + i // WW, H, cycle_h, roll_h, PAD_FIRST)
    w, there_w = _source(w + i % WW, W, cycle_w, roll_w, PAD_FIRST)
    return h.to(tl.int64) * W + w, (i < WH * WW) & there_h & there_w


@triton.jit
def load_bias(bias_ptr, at, acc_ty: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Of queries, or of values, from ``at`` on: [BLOCK_D], or None."""
    bias = None
    if bias_ptr is not None:
        d = tl.arange(0, BLOCK_D)
        bias = tl.load(bias_ptr + at + d, mask=d < D, other=0.0).to(acc_ty)
    return bias


@triton.jit
def _side(i, seam_h, seam_w, WW: tl.constexpr):
    """A number for each of the four parts that seams cut a window into."""
    return (i // WW >= seam_h).to(tl.int32) * 2 + (i % WW >= seam_w).to(tl.int32)


@triton.jit
def positions(table_ptr, i, j, seam_h, seam_w, WH: tl.constexpr, WW: tl.constexpr, SEAM: tl.constexpr):
    """Of queries i and keys j, [queries, 1] and [1, keys] or the other way round.

    100 less where a seam lies between them; -inf where there is no key.
    """
    columns: tl.constexpr = 2 * WW - 1
    offset = place(i, WW, columns) + (WH - 1) * columns + WW - 1 - place(j, WW, columns)
    bias = tl.load(table_ptr + offset, mask=(i < WH * WW) & (j < WH * WW), other=0.0)
    if SEAM:
        bias += tl.where(_side(i, seam_h, seam_w, WW) != _side(j, seam_h, seam_w, WW), APART, 0.0)
    return tl.where(j < WH * WW, bias, -float("inf"))


@triton.jit
def logits(products, k, bias_q, bias, SCALE: tl.constexpr, ALONG: tl.constexpr = 0):
    """Of queries along axis ``ALONG``, and keys; what the queries' bias [BLOCK_D] adds depends on the key alone."""
    found = products * SCALE + bias
    if bias_q is not None:
        found += tl.expand_dims(tl.sum(k.to(bias.dtype) * bias_q[None, :], 1) * SCALE, ALONG)
    return found


@triton.jit
def weights(s):
    """The softmax of each query's logits."""
    p = tl.exp2(s - tl.max(s, 1)[:, None])
    return p * (1 / tl.sum(p, 1))[:, None]


@triton.jit
def more_keys(s, top):
    """Exponentials of logits, with a maximum that grows: the new one, and what former sums are to be multiplied by."""
    new_top = tl.maximum(top, tl.max(s, 1), propagate_nan=tl.PropagateNan.ALL)
    shift = finite_or_zero(new_top)
    return tl.exp2(s - shift[:, None]), new_top, tl.exp2(top - shift)


class Windows(NamedTuple):
    """The windows of qkv as the kernels see them."""

    qkv: torch.Tensor
    bias: torch.Tensor | None
    table: torch.Tensor  # [heads, T]
    window: tuple[int, int]
    shift: tuple[int, int]
    meta: dict[str, Any]

    @property
    def heads(self) -> int:
        return self.table.shape[0]

    @property
    def tokens(self) -> int:
        """Of a window."""
        return self.window[0] * self.window[1]

    @property
    def wide(self) -> bool:
        """Whether a number has more than 16 bits."""
        return self.qkv.itemsize > 2

    def shared(self, tiles: int = 1) -> tuple[int, tuple[int, ...]]:
        """Among how many groups of programs, and the kernels' scalars, ``steps`` first: windows of a program.

        Args:
            tiles: programs that share a group's windows and head; each may take more windows.
        """
        N, H, W, _ = self.qkv.shape
        (window_h, window_w), (shift_h, shift_w) = self.window, self.shift
        down, across = cdiv(H, window_h), cdiv(W, window_w)
        steps = max(min(N * down * across * self.heads * tiles // PROGRAMS, MOST_WINDOWS * tiles), 1)
        inner = (down - (shift_h > 0), across - (shift_w > 0))
        starts = [0]
        for rows, columns in (inner, (down - inner[0], inner[1]), (inner[0], across - inner[1])):
            starts.append(starts[-1] + cdiv(N * rows * columns, steps))
        groups = starts[-1] + cdiv(N * (down - inner[0]) * (across - inner[1]), steps)
        cycle = (down * window_h, across * window_w) if self.meta["PAD_FIRST"] else (H, W)
        roll = (shift_h % cycle[0], shift_w % cycle[1])
        return groups, (steps, self.heads, N, down, across, *inner, *starts[1:], *self.shift, H, W, *cycle, *roll)


def prepare(qkv, bias, table, heads, window_h, window_w, shift_h, shift_w, scale, pad_first) -> Windows:
    """Raises ValueError for windows of more than 256 tokens."""
    if window_h * window_w > LARGEST:
        raise ValueError(f"the Triton kernels are for windows of up to {LARGEST} tokens, got {window_h} x {window_w}")
    D = qkv.shape[3] // 3 // heads
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
    }
    ready = (table.to(accumulation_dtype(qkv)) * LOG2E.value).t().contiguous()
    bias = None if bias is None else bias.to(qkv.dtype).contiguous()  # wider it takes too many registers
    return Windows(qkv.contiguous(), bias, ready, (window_h, window_w), (shift_h, shift_w), meta)
