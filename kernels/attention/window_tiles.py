"""Pieces of the kernels of attention inside (shifted) windows: a program takes one head of several windows.

Shift, partition, biases, seams and padding are addresses. Logits are in powers of two.

A bias of all keys changes a query's logits alike, and so no weight. One of all values is added to the result, since
weights sum to one, and changes no logit's gradient. So there is none to read but the queries', and in the forward
kernel the values'.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .tiles import LOG2E, Rows, finite_or_zero, load_rows, pairs, place

APART = tl.constexpr(-100 * 1.4426950408889634)  # as Swin adds it across a seam


class Window(NamedTuple):
    """What kernels know of a window when they are compiled."""

    H: int
    W: int
    PAD_FIRST: bool
    SEAM: bool  # whether any window has one

    @property
    def tokens(self) -> int:
        return self.H * self.W


class Grid(NamedTuple):
    """What they know of the windows of a map when they run.

    Windows of four kinds are counted each by themselves: those without a seam, in the last row, in the last column, and
    in both.
    """

    steps: Any  # windows of a program
    heads: Any
    N: Any
    down: Any  # windows along H and W in an image
    across: Any
    inner_h: Any  # those without a seam
    inner_w: Any
    start_1: Any  # the first group of programs of each kind but the first
    start_2: Any
    start_3: Any
    shift_h: Any
    shift_w: Any
    H: Any
    W: Any
    cycle_h: Any  # where positions begin again
    cycle_w: Any
    roll_h: Any
    roll_w: Any


class Run(NamedTuple):
    """A program's head, its first window and the one behind its last, and what these have in common.

    That is, of their kind: windows along H and W in an image, the first of them, and where in a window the seams are.
    """

    grid: Grid
    head: Any
    first: Any
    last: Any
    rows: Any
    columns: Any
    row: Any
    column: Any
    seam_h: Any
    seam_w: Any


class Corner(NamedTuple):
    """Of a window: the tokens of the images before its own (int64), and its first position along H and W."""

    run: Run
    n: Any
    h: Any
    w: Any


@triton.jit
def this_run(grid, WINDOW: tl.constexpr):
    """This program's."""
    group = tl.program_id(0) // grid.heads
    kind = tl.where(group < grid.start_1, 0, tl.where(group < grid.start_2, 1, tl.where(group < grid.start_3, 2, 3)))
    start = tl.where(
        kind == 0, 0, tl.where(kind == 1, grid.start_1, tl.where(kind == 2, grid.start_2, grid.start_3))
    )  # fmt: skip
    last_h = (kind == 1) | (kind == 3)
    last_w = kind >= 2
    rows = tl.where(last_h, 1, grid.inner_h)
    columns = tl.where(last_w, 1, grid.inner_w)
    row = tl.where(last_h, grid.down - 1, 0)
    column = tl.where(last_w, grid.across - 1, 0)
    seam_h = tl.where(last_h, WINDOW.H - grid.shift_h, WINDOW.H)
    seam_w = tl.where(last_w, WINDOW.W - grid.shift_w, WINDOW.W)
    first = (group - start) * grid.steps
    last = tl.minimum(first + grid.steps, grid.N * rows * columns)
    return Run(grid, tl.program_id(0) % grid.heads, first, last, rows, columns, row, column, seam_h, seam_w)


@triton.jit
def corner(window, run, WINDOW: tl.constexpr):
    """Of a window of this run."""
    at = window % (run.rows * run.columns)
    n = (window // (run.rows * run.columns)).to(tl.int64) * run.grid.H * run.grid.W
    return Corner(run, n, (run.row + at // run.columns) * WINDOW.H, (run.column + at % run.columns) * WINDOW.W)


@triton.jit
def _source(p, size, cycle, roll, PAD_FIRST: tl.constexpr):
    """The row, or column, that is at position p, and whether there is one."""
    at = p + roll
    at -= tl.where(at >= cycle, cycle, 0)
    return at, (at if PAD_FIRST else p) < size


@triton.jit
def places(i, at, WINDOW: tl.constexpr):
    """Of places i of a window at a corner: their tokens, counted from the image's first, and whether there are such."""
    grid = at.run.grid
    h, there_h = _source(at.h + i // WINDOW.W, grid.H, grid.cycle_h, grid.roll_h, WINDOW.PAD_FIRST)
    w, there_w = _source(at.w + i % WINDOW.W, grid.W, grid.cycle_w, grid.roll_w, WINDOW.PAD_FIRST)
    return h.to(tl.int64) * grid.W + w, (i < WINDOW.H * WINDOW.W) & there_h & there_w


@triton.jit
def part_rows(
    ptr, token, there, at, HEAD: tl.constexpr, PART: tl.constexpr = 0, PARTS: tl.constexpr = 1
):  # fmt: skip
    """Places of a window in a map of parts side by side, as queries, keys and values are."""
    C = at.run.grid.heads * HEAD.D
    return Rows(ptr + at.run.head * HEAD.D + at.n * PARTS * C + PART * C, token, there, PARTS * C)


@triton.jit
def load_part(
    ptr, token, there, at, HEAD: tl.constexpr, PART: tl.constexpr = 0, PARTS: tl.constexpr = 1
):  # fmt: skip
    """The rows, and what is there, [places, BLOCK_D]."""
    rows = part_rows(ptr, token, there, at, HEAD, PART, PARTS)
    return rows, load_rows(rows, HEAD)


@triton.jit
def load_bias(bias_ptr, run, HEAD: tl.constexpr, PART: tl.constexpr = 0):
    """Of queries, or of values: [BLOCK_D], or None."""
    bias = None
    if bias_ptr is not None:
        d = tl.arange(0, HEAD.BLOCK_D)
        at = (PART * run.grid.heads + run.head) * HEAD.D
        bias = tl.load(bias_ptr + at + d, mask=d < HEAD.D, other=0.0).to(HEAD.ACC)
    return bias


@triton.jit
def _side(i, run, WINDOW: tl.constexpr):
    """A number for each of the four parts that seams cut a window into."""
    return (i // WINDOW.W >= run.seam_h).to(tl.int32) * 2 + (i % WINDOW.W >= run.seam_w).to(tl.int32)


@triton.jit
def positions(table_ptr, i, j, run, WINDOW: tl.constexpr):
    """The bias of queries i and keys j, [queries, 1] and [1, keys] or the other way round.

    100 less where a seam lies between them; -inf where there is no key.
    """
    TOKENS: tl.constexpr = WINDOW.H * WINDOW.W
    COLUMNS: tl.constexpr = 2 * WINDOW.W - 1
    table_ptr += run.head * (2 * WINDOW.H - 1) * COLUMNS
    offset = place(i, WINDOW.W, COLUMNS) + (WINDOW.H - 1) * COLUMNS + WINDOW.W - 1 - place(j, WINDOW.W, COLUMNS)
    bias = tl.load(table_ptr + offset, mask=(i < TOKENS) & (j < TOKENS), other=0.0)
    if WINDOW.SEAM:
        bias += tl.where(_side(i, run, WINDOW) != _side(j, run, WINDOW), APART, 0.0)
    return tl.where(j < TOKENS, bias, -float("inf"))


@triton.jit
def bias_logits(k, bias_q, HEAD: tl.constexpr):
    """What the queries' bias [BLOCK_D] adds to all logits of a key: [keys], or None."""
    found = None
    if bias_q is not None:
        found = tl.sum(k.to(HEAD.ACC) * bias_q[None, :], 1) * (HEAD.SCALE * LOG2E)
    return found


@triton.jit
def logits(products, added, bias, HEAD: tl.constexpr, ALONG: tl.constexpr = 0):
    """Of queries along axis ``ALONG``, and keys, for which ``added`` is what `bias_logits` found."""
    found = products * (HEAD.SCALE * LOG2E) + bias
    if added is not None:
        found += tl.expand_dims(added, ALONG)
    return found


@triton.jit
def meet_keys(
    start, q_rows, q, i, bias_q, qkv_ptr, table_ptr, at, HEAD: tl.constexpr, WINDOW: tl.constexpr,
    STEP: tl.constexpr,
):  # fmt: skip
    """STEP keys from start on; the rows of their values, and these; and the logits of queries i."""
    j = start + tl.arange(0, STEP)
    token, there = places(j, at, WINDOW)
    k_rows, k = load_part(qkv_ptr, token, there, at, HEAD, 1, 3)
    v_rows, v = load_part(qkv_ptr, token, there, at, HEAD, 2, 3)
    bias = positions(table_ptr, i[:, None], j[None, :], at.run, WINDOW)
    return k, v_rows, v, logits(pairs(q_rows, q, k_rows, k, HEAD), bias_logits(k, bias_q, HEAD), bias, HEAD)


@triton.jit
def more_keys(s, top):
    """Exponentials of logits, with a maximum that grows: the new one, and what former sums are to be multiplied by."""
    new_top = tl.maximum(top, tl.max(s, 1), propagate_nan=tl.PropagateNan.ALL)
    shift = finite_or_zero(new_top)
    return tl.exp2(s - shift[:, None]), new_top, tl.exp2(top - shift)
